"""What only a GPU shows: decoding that is captured, captures that fail, memory, and bfloat16 as its kernels round it.

`make test-gpu` runs these; elsewhere they are skipped. With IREASONER_TEST_DEVICE=cpu those run that need no CUDA.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from families import FAMILIES, internvl, qwen2_5_vl
from ireasoner.method.texts import solver_messages
from ireasoner.method.types import Completion
from ireasoner.model.inputs import build_prompts
from ireasoner.model.loading import load_policy
from ireasoner.model.loss import token_statistics
from ireasoner.model.options import BackboneOptions
from ireasoner.model.pieces import release_memory
from ireasoner.model.policy import Policy
from ireasoner.rollouts import live
from ireasoner.rollouts.capture import CudaGraph
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.studies import doctor, random_models
from ireasoner.training.config import resolve
from ireasoner.training.loop import resume, start
from ireasoner.training.state import Observer
from models import learner, requests, sample

DEVICE = torch.device(os.environ.get("IREASONER_TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU that torch can use"
)
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="is about CUDA itself")
quantises = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
QUESTIONS = ("Which bar is the tallest?", "Is red more than blue, or is there no telling which of them is?", "Where?")
CHATS = [solver_messages("{question}", question) for question in QUESTIONS]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](out)
    return out


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("qwen")
    qwen2_5_vl(out)
    return out


def filled(folder: Path, dtype: str = "float32", quantization: str | None = None) -> Policy:
    """A policy on the device whose adapters do something."""
    options = BackboneOptions.model_validate({"dtype": dtype, "quantization": quantization})
    policy = load_policy(str(folder), options, device=str(DEVICE))
    doctor.fill_adapters(policy, 0.1, seed=1)
    return policy


def asking(policy: Policy, pictures: Sequence[Image.Image]) -> list[Request]:
    return requests(policy, pictures[:3], CHATS)


def ids_of(groups: Sequence[Sequence[Completion]]) -> list[tuple[int, ...]]:
    return [completion.token_ids for group in groups for completion in group]


def logprobs_of(groups: Sequence[Sequence[Completion]]) -> Tensor:
    return torch.tensor([p for group in groups for completion in group for p in completion.logprobs])


# --- decoding ---------------------------------------------------------------------------------------------------------


def counting_replays(engine: LiveEngine, replays: list[int]) -> None:
    """Let an engine count, for each capture, how often it was replayed."""
    capture = engine.capture
    assert capture is not None

    def counted(step: Callable[[], None]) -> Callable[[], None]:
        replay, index = capture(step), len(replays)
        replays.append(0)

        def call() -> None:
            replays[index] += 1
            replay()

        return call

    engine.capture = counted


@needs_cuda
def test_captured_decoding_writes_what_decoding_writes(folder: Path, pictures: list[Image.Image]):
    policy, replays = filled(folder), []
    eager, engine = LiveEngine(policy), LiveEngine(policy)
    eager.capture = None
    asked = asking(policy, pictures)
    expected = sample(eager, asked, "solver", 4, 64)
    counting_replays(engine, replays)
    for _ in range(2):  # a decode finds nothing that the one before it left behind
        found = sample(engine, asked, "solver", 4, 64)
        assert ids_of(found) == ids_of(expected)
        torch.testing.assert_close(logprobs_of(found), logprobs_of(expected), atol=1e-4, rtol=0.0)
    if policy.shares_attention:
        assert engine.capture is not None
        assert sum(replays) > 10
    else:
        assert replays == []


@needs_cuda
def test_the_memory_of_captured_steps_is_returned(qwen: Path, pictures: list[Image.Image]):
    policy = filled(qwen)
    engine, asked = LiveEngine(policy), asking(policy, pictures)
    held = []
    for _ in range(4):
        sample(engine, asked, "solver", 8, 64)
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved(DEVICE))
    assert held[3] <= held[1]  # the first one makes cuBLAS take its workspace


def test_a_dynamic_rope_decodes_uncaptured_with_a_warning(tmp_path: Path, pictures: list[Image.Image]):
    internvl(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config["text_config"] |= {"rope_parameters": rope, "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    policy = filled(tmp_path)
    assert policy.shares_attention
    eager, engine = LiveEngine(policy), LiveEngine(policy)
    eager.capture = None
    asked = asking(policy, pictures)
    expected = sample(eager, asked, "solver", 3, 24)
    warned = pytest.warns(UserWarning, match="waits for the GPU in .*modeling_rope_utils.py")
    with warned if DEVICE.type == "cuda" else nullcontext():
        found = sample(engine, asked, "solver", 3, 24)
    assert engine.capture is None
    assert ids_of(found) == ids_of(expected)
    usable()


def usable() -> None:
    """Everything that a failed capture could have spoiled: streams, the allocator, the generator, later captures."""
    if DEVICE.type != "cuda":
        return
    assert torch.cuda.current_stream(DEVICE) == torch.cuda.default_stream(DEVICE)
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.get_sync_debug_mode() == 0
    torch.cuda.synchronize()
    torch.randn(8, device=DEVICE).sum().item()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(DEVICE)
    block = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    assert torch.cuda.memory_reserved(DEVICE) >= before + 2**28
    del block
    torch.cuda.empty_cache()  # with a capture underway, this does not return it
    assert torch.cuda.memory_reserved(DEVICE) <= before
    count = torch.zeros(1, device=DEVICE)

    def step() -> None:
        count.add_(1)

    step()
    graph = CudaGraph(torch.cuda.Stream(DEVICE), step)
    graph()
    graph()
    assert count.item() == 3


@needs_cuda
@pytest.mark.parametrize("fault", ["python", "wait", "memory"])
def test_a_failed_capture_leaves_the_process_usable(fault: str):
    ones, stream = torch.ones(2**10, device=DEVICE), torch.cuda.Stream(DEVICE)

    def step() -> None:
        ones.add_(1)
        torch.randn(8, device=DEVICE)
        ones @ ones
        if fault == "python":
            raise RuntimeError("a fault in the step")
        if fault == "wait":
            ones.sum().item()
        if fault == "memory":
            torch.empty(2**45, dtype=torch.uint8, device=DEVICE)

    ones @ ones  # cuBLAS begins
    with pytest.raises(torch.OutOfMemoryError if fault == "memory" else RuntimeError):
        CudaGraph(stream, step)
    assert ones.sum().item() == 2**10
    usable()


@needs_cuda
def test_decoding_goes_on_after_a_capture_that_failed(
    qwen: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
):
    policy = filled(qwen)
    eager, engine = LiveEngine(policy), LiveEngine(policy)
    eager.capture = None
    asked = asking(policy, pictures)
    expected = sample(eager, asked, "solver", 3, 32)
    hook = policy.decoder.norm.register_forward_hook(lambda *args: (args[-1].sum().item(), None)[1])
    monkeypatch.setattr(live, "host_waits", lambda _: nullcontext([]))  # as if torch had not seen it
    with pytest.warns(UserWarning, match="cannot be captured"):
        found = sample(engine, asked, "solver", 3, 32)
    assert ids_of(found) == ids_of(expected)
    hook.remove()
    usable()
    assert ids_of(sample(engine, asked, "solver", 3, 32)) == ids_of(expected)
    another, replays = LiveEngine(policy), []
    counting_replays(another, replays)
    assert ids_of(sample(another, asked, "solver", 3, 32)) == ids_of(expected)
    assert sum(replays) > 5


# --- the update -------------------------------------------------------------------------------------------------------


def gradient(policy: Policy, asked: Sequence[Request], groups: Sequence[Sequence[Completion]]) -> Tensor:
    """The solver's gradient, as one vector in float64, of an update on these groups, which is not carried out."""
    prompts = build_prompts(policy, [request.image for request in asked], CHATS)
    update = learner(policy, "solver", max_grad_norm=1e9)
    found: list[Tensor] = []

    def kept() -> None:
        found.append(torch.cat([p.grad.double().flatten() for p in update.parameters.values() if p.grad is not None]))

    update.optimizer.step = kept  # type: ignore[method-assign, assignment]
    rewards = [[float(i % 2) for i in range(len(group))] for group in groups]
    update.update(prompts, groups, update.advantages(rewards), rewards)
    return found[0]


def test_in_bfloat16_shared_prompts_err_no_more_than_the_plain_path(qwen: Path, pictures: list[Image.Image]):
    """Both round differently; neither may be further from the gradient in float32 than twice the other."""
    policy, exact = filled(qwen, "bfloat16"), filled(qwen)
    exact.model.load_state_dict(policy.model.state_dict())  # weights that bfloat16 holds exactly
    asked = asking(policy, pictures)
    groups = sample(LiveEngine(policy), asked, "solver", 4, 32)
    shared = gradient(policy, asked, groups)
    with policy.without_sharing():
        plain = gradient(policy, asked, groups)
    expected = gradient(exact, asking(exact, pictures), groups)
    errors = [((found - expected).norm() / expected.norm()).item() for found in (shared, plain)]
    print("errors of the gradient in bfloat16: shared", errors[0], "plain", errors[1])
    assert errors[0] <= 2 * errors[1]
    assert torch.nn.functional.cosine_similarity(shared, plain, 0) > 0.99


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_doctor_finds_nothing_wrong(folder: Path, dtype: Any):
    """Among others: sampler and learner agree, and the update's log-probabilities are the model's own."""
    findings = list(doctor.examine(str(folder), BackboneOptions(dtype=dtype), device=str(DEVICE)))
    assert [(f.name, f.figure) for f in findings if not f.passed] == []


@quantises
@pytest.mark.parametrize("how", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_doctor_finds_nothing_wrong_with_a_quantised_model(qwen: Path, dtype: Any, how: Any):
    options = BackboneOptions(dtype=dtype, quantization=how)
    findings = list(doctor.examine(str(qwen), options, device=str(DEVICE)))
    print(f"quantisation, {dtype}: {findings[-1].figure}")
    assert [(f.name, f.figure) for f in findings if not f.passed] == []


@quantises
@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_quantised_model_takes_less_memory(how: Any, pictures: list[Image.Image]):
    """Of 200 million parameters in bfloat16, with the memory and the time of sampling and of an update."""

    def measured(quantization: Any) -> int:
        options = BackboneOptions(dtype="bfloat16", quantization=quantization)
        policy = random_models.load_policy("random-200m", options, str(DEVICE))
        policy.end_tokens = ()
        asked = asking(policy, pictures)
        sample(LiveEngine(policy), asked, "solver", 4, 32)
        began = time.perf_counter()
        groups = sample(LiveEngine(policy), asked, "solver", 4, 32)
        sampled = time.perf_counter()
        gradient(policy, asked, groups).norm().item()  # waits for the GPU
        ended = time.perf_counter()
        held = torch.cuda.memory_allocated(DEVICE) if DEVICE.type == "cuda" else policy.footprint.weights
        took = f"sampling {sampled - began:.2f} s, update {ended - sampled:.2f} s"
        print(f"quantisation {quantization}: {held / 2**20:.0f} MiB, {took}")
        return held

    whole = measured(None)
    release_memory()
    assert measured(how) < {"nf4": 0.55, "int8": 0.72}[how] * whole


@quantises
@needs_cuda
@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_quantised_model_is_captured(qwen: Path, pictures: list[Image.Image], how: str):
    policy, replays = filled(qwen, quantization=how), []
    eager, engine = LiveEngine(policy), LiveEngine(policy)
    eager.capture = None
    asked = asking(policy, pictures)
    counting_replays(engine, replays)
    assert ids_of(sample(engine, asked, "solver", 4, 64)) == ids_of(sample(eager, asked, "solver", 4, 64))
    assert sum(replays) > 10


@needs_cuda
def test_the_memory_of_the_loss_does_not_grow_with_the_tokens_times_the_vocabulary():
    """All logits of 3,000 tokens would take 1.7 GiB a copy in float32, and the loss several copies."""
    layer = torch.nn.Linear(64, 152064, bias=False, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)

    def peak(tokens: int) -> float:
        hidden = torch.randn(tokens, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        reference, ids = torch.randn_like(hidden).detach(), torch.arange(tokens, device=DEVICE)
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_allocated(DEVICE)
        found = token_statistics(hidden, reference, ids, layer)
        (found.logprobs_T.mean() + found.kl_T.mean()).backward()
        return (torch.cuda.max_memory_allocated(DEVICE) - before) / 2**30

    peak(256)
    less, more = peak(1500), peak(3000)
    print(f"peak memory of the loss: {less:.2f} GiB at 1,500 tokens, {more:.2f} GiB at 3,000")
    assert more < 1.1 * less
    assert more < 1.2


# --- a run ------------------------------------------------------------------------------------------------------------


def adapters(out: Path) -> dict[str, Tensor]:
    return {
        f"{role}/{name}": tensor
        for role in ("solver", "proposer")
        for name, tensor in load_file(out / role / "adapter_model.safetensors").items()
    }


@pytest.mark.parametrize("quantization", [None, pytest.param("nf4", marks=quantises)])
def test_a_resumed_run_equals_one_that_was_not_stopped(
    tmp_path: Path, pictures: list[Image.Image], quantization: str | None
):
    """Bit by bit, where this GPU repeats itself bit by bit at all."""
    (tmp_path / "pool").mkdir()
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / "pool" / f"{index}.png")
    config = resolve({
        "model": "tiny", "images": str(tmp_path / "pool"), "recipe": "paper", "device": str(DEVICE), "steps": 4,
        "images_per_step": 2, "group_size": 3, "max_solution_tokens": 48, "save_every": 1, "learning_rate": 3e-3,
        "probe_every": 0, "blank_every": 0, "proposer_every": 2, "watch": False,
        **({"quantization": quantization} if quantization else {}),
    })  # fmt: skip
    for name in ("one", "other"):
        start(config, tmp_path / name)

    def die(step: int, *_: object) -> None:
        if step == 3:
            raise RuntimeError("as if killed")

    with pytest.raises(RuntimeError, match="as if killed"):
        start(config, tmp_path / "stopped", Observer(on_step=die))
    resume(config, tmp_path / "stopped")
    one, other, stopped = (adapters(tmp_path / name) for name in ("one", "other", "stopped"))
    assert one.keys() == stopped.keys()
    if any(not torch.equal(one[name], other[name]) for name in one):
        pytest.skip("two runs that nothing stopped differ on this GPU")
    assert all(torch.equal(one[name], stopped[name]) for name in one)
