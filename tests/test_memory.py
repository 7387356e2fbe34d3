"""Memory: what is counted, what is done in one pass, and what becomes of a run when it runs out."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from families import FAMILIES
from forked import Forked, environments_of_two
from ireasoner.method.texts import solver_messages
from ireasoner.method.types import Completion
from ireasoner.model.counting import TRIAL, limit_sampling
from ireasoner.model.footprint import Footprint
from ireasoner.model.learner import Learner
from ireasoner.model.loading import meta_policy
from ireasoner.model.options import BackboneOptions
from ireasoner.model.parallel import ALONE
from ireasoner.model.pieces import DoesNotFitError, Piece
from ireasoner.model.policy import Policy
from ireasoner.model.source import TINY_MODEL, find_model
from ireasoner.playground import dataset
from ireasoner.rollouts.live import LiveEngine
from ireasoner.studies.doctor import fill_adapters
from ireasoner.studies.random_models import SIZES, config_of
from ireasoner.training import fitting, planning
from ireasoner.training.config import Config, conflicts, load_config, resolve
from ireasoner.training.loop import resume, start
from ireasoner.training.recorder import read_records
from ireasoner.training.state import Observer
from models import load, requests, sample
from test_learner import REWARDS, MakePolicy, Scene, assert_same_gradient, descend, make_scene, weights

pytestmark = pytest.mark.usefixtures("copied_models")

QUESTIONS = ("Which bar is the tallest?", "Is red more than blue, or is there no telling which of them is?", "Where?")
GB = 10**9
TINY = find_model("tiny")


# --- the count --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_counted_without_weights_is_what_the_model_keeps(folder: str, dtype: str):
    options = BackboneOptions(dtype=dtype)  # type: ignore[arg-type]
    real, counted = load(folder, dtype=dtype).footprint, meta_policy(folder, options).footprint
    for name, value in vars(real).items():
        assert vars(counted)[name] == pytest.approx(value, rel=0.02 if name in ("kept", "layer") else 0), name


def test_a_pass_keeps_what_is_counted(make_policy: MakePolicy):
    """A longer sequence than those of the count, with all that the graph saves, in one sum."""
    policy, saved = make_policy(), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids, mask = torch.full((2, 5 * TRIAL), 7), torch.zeros(2, 1, 5 * TRIAL, 5 * TRIAL)
    with policy.acting_as("solver"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.decoder(input_ids=ids, attention_mask=mask, use_cache=False)
    held = {p.data_ptr() for p in [mask, *policy.model.parameters(), *policy.model.buffers()]}
    total = sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in held)
    assert total == pytest.approx(ids.numel() * policy.footprint.kept, rel=0.03)


@pytest.fixture(scope="module")
def of_7b(tmp_path_factory: pytest.TempPathFactory) -> Footprint:
    """Of Qwen2.5-VL-7B's exact architecture in bfloat16: nothing but a config and the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("7b")
    shutil.copytree(TINY_MODEL, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    config_of("random-7b").save_pretrained(folder)
    return meta_policy(str(folder), BackboneOptions()).footprint


def test_the_count_of_a_7b(of_7b: Footprint):
    """8.29e9 parameters of 2 bytes; two adapters of 40.4e6 in float32; on 48 GB an update of 3,072 tokens fits."""
    text = SIZES["random-7b"]["text_config"]
    assert of_7b.weights == pytest.approx(16.58 * GB + 2 * 40.4e6 * 4, rel=0.02)
    assert of_7b.optimizer == pytest.approx(6 * 40.4e6 * 4, rel=0.01)
    assert of_7b.cache == 2 * 28 * 4 * 128 * 2
    assert of_7b.shared == 28 * 4 * 128 * (4 + 2)  # keys in float32
    assert of_7b.inputs == 28 * text["hidden_size"] * 2
    assert of_7b.fixed + 3072 * of_7b.update_per_token(False) == pytest.approx(39.2 * GB, rel=0.05)
    assert of_7b.fixed + 3072 * of_7b.update_per_token(True) == pytest.approx(20.7 * GB, rel=0.05)


# --- the choice at the start ------------------------------------------------------------------------------------------


def test_a_7b_fits_on_cards_of_24_and_48_gb(of_7b: Footprint):
    config = resolve({"model": "7B", "images": ".", "eval_data": "questions.jsonl"})
    large, small = (planning.tokens_that_fit(config, of_7b, 1280, free) for free in (47 * 2**30, 23 * 2**30))
    assert large > config.optimizer.tokens_per_batch  # nothing is changed there
    assert 300 < small < 700
    for tokens, free in ((large, 47 * 2**30), (small, 23 * 2**30)):
        assert of_7b.fixed + tokens * of_7b.update_per_token(False) < free
        # A group of five at the default lengths is not cut, on the small card with checkpointing.
        checkpointed = tokens * of_7b.update_per_token(False) // of_7b.update_per_token(True)
        assert checkpointed > 1280 + 200 + 5 * 256
    with pytest.raises(DoesNotFitError, match=r"^7B does not fit: it takes \d+\.\d GB to train .* 15\.5 GB of the dev"):
        planning.tokens_that_fit(config, of_7b, 1280, 16 * 2**30)


def gpu(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(fitting, "resolve_device", lambda device: "cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(free)))


def test_the_choice_is_told_and_stored_and_a_resumed_run_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    observer = Observer(on_message=said.append)
    config = resolve({"model": "tiny", "images": ".", "device": "cuda"})
    takes = meta_policy("tiny", config.backbone).footprint
    each = takes.update_per_token(False) + 6 * takes.logits
    ample, scarce = (takes.weights + takes.optimizer + share * each for share in (10**6, 2000))
    gpu(monkeypatch, ample)
    with fitting.fitted(config, TINY, tmp_path, ALONE, observer) as found:
        assert found == config
    assert said == []
    gpu(monkeypatch, scarce / 0.9)
    with fitting.fitted(config, TINY, tmp_path, ALONE, observer) as found:
        fitting_tokens = found.fitted_optimizer().tokens_per_batch
        assert 1500 < fitting_tokens <= 2000
        assert found == config.model_copy(update={"fitted_tokens_per_batch": fitting_tokens})
        assert found.changed(seed=1).fitted_optimizer().tokens_per_batch == fitting_tokens
        assert not conflicts(found, {"tokens_per_batch": config.optimizer.tokens_per_batch})
    (text,) = said
    assert text.startswith("Memory: 0.3 GB are free, and tiny takes 0.02 GB, and 0.1 MB and logits for each token")
    assert f"so {fitting_tokens} tokens are taken at a time" in text
    (tmp_path / "config.yaml").touch()
    with fitting.fitted(config, TINY, tmp_path, ALONE, observer) as found:
        assert found == config
    gpu(monkeypatch, 10**6)
    with (
        pytest.raises(DoesNotFitError, match="lower --max-image-tokens"),
        fitting.fitted(config, TINY, tmp_path, ALONE, observer),
    ):
        pass


def test_on_the_cpu_a_small_model_is_not_counted_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fitting, "meta_policy", lambda *_: pytest.fail("counted"))
    config = resolve({"model": "tiny", "images": ".", "device": "cpu"})
    with fitting.fitted(config, TINY, tmp_path, ALONE, Observer()) as found:
        assert found == config
    told = r"^out of memory: lower .* \(torch says: CUDA out of memory\)$"
    with pytest.raises(DoesNotFitError, match=told), fitting.fitted(config, TINY, tmp_path, ALONE, Observer()):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")


# --- what is done in one pass -----------------------------------------------------------------------------------------


@contextmanager
def passes(policy: Policy) -> Iterator[list[int]]:
    """The number of positions in each pass through the language model, once more where it is recomputed."""
    seen: list[int] = []
    hook = policy.decoder.layers[0].mlp.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[:2].numel())
    )
    try:
        yield seen
    finally:
        hook.remove()


def asked_by(policy: Policy, pictures: Sequence[Image.Image]) -> Any:
    images = [pictures[0], pictures[1].resize((112, 56)), pictures[2].resize((56, 90))]
    return requests(policy, images, [solver_messages("{question}", q) for q in QUESTIONS])


def written(groups: Sequence[Sequence[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def assert_same_samples(found: list[list[Completion]], expected: list[list[Completion]]) -> None:
    assert written(found) == written(expected)
    for mine, theirs in zip(found, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_samples_do_not_depend_on_the_batches(folder: str, pictures: list[Image.Image]):
    """In every family: prompts computed in parts, requests in several batches, and one at a time."""
    policy = load(folder)
    fill_adapters(policy, 0.3, seed=1)
    engine, asked, takes = LiveEngine(policy), asked_by(policy, pictures), policy.footprint
    with passes(policy) as whole:
        expected = sample(engine, asked, "solver", 2, 8)
    longest = whole[0] // 3
    each = takes.caches(longest, 8, 2, shares=policy.shares_attention) + longest * takes.passing
    for limit, prefills in ((2 * 3 * longest * takes.passing, {1, 2, 3}), (2 * each, {2, 3}), (1, {6})):
        policy.sampling_bytes = limit
        with passes(policy) as seen:
            assert_same_samples(sample(engine, asked, "solver", 2, 8), expected)
        assert sum(size > 6 for size in seen) in prefills  # and the others are steps of decoding


def test_prompts_are_computed_in_parts_and_decoded_together(make_policy: MakePolicy, pictures: list[Image.Image]):
    policy = make_policy(0.2)
    engine, asked = LiveEngine(policy), asked_by(policy, pictures)
    with passes(policy) as whole:
        expected = sample(engine, asked, "solver", 2, 8)
    # Room for the caches of all three, and in the other half of the memory for one prompt on its way.
    monkeyed = policy.footprint
    policy.footprint = Footprint(**{**vars(monkeyed), "passing": 100 * monkeyed.passing})
    policy.sampling_bytes = 2 * 100 * monkeyed.passing * (whole[0] // 3)
    with passes(policy) as seen:
        assert_same_samples(sample(engine, asked, "solver", 2, 8), expected)
    assert seen == [whole[0] // 3] * 3 + whole[1:]


def test_a_limit_that_is_not_reached_changes_no_bit(make_policy: MakePolicy, pictures: list[Image.Image]):
    policy = make_policy(0.2)
    engine, asked = LiveEngine(policy), asked_by(policy, pictures)
    expected = sample(engine, asked, "solver", 5, 12)
    limit_sampling(policy, 3072)
    assert sample(engine, asked, "solver", 5, 12) == expected


def test_a_group_is_checkpointed_before_it_is_cut(make_policy: MakePolicy, pictures: list[Image.Image]):
    scene = make_scene(make_policy(0.2), pictures)
    start, takes = weights(scene.policy), scene.policy.footprint
    expected, _ = descend(scene.learner(), scene.prompts, scene.groups, REWARDS)
    smaller, larger = sorted(int(length) + 3 * 10 for length in scene.prompts.mask_BP.sum(1))
    # Prompt and completions, under policy and reference; where they are checkpointed, the policy's once more.
    for limit, expected_passes in ((2 * larger, 4), (larger - 1, 2 * 4 + 2), (smaller - 1, 2 * 6)):
        scene.policy.model.load_state_dict(start, strict=False)
        with passes(scene.policy) as seen:
            found, _ = descend(scene.learner(tokens_per_batch=limit), scene.prompts, scene.groups, REWARDS)
        assert_same_gradient(found, expected)
        assert len(seen) == expected_passes
    ratio = takes.update_per_token(False) / takes.update_per_token(True)
    batching = scene.learner(tokens_per_batch=int(larger / ratio) - 1).batching
    assert len(batching.pieces([(larger - 30, 10)], 3)) > 1  # not even with checkpointing


# --- out of memory ----------------------------------------------------------------------------------------------------


@contextmanager
def failing(policy: Policy, calls: set[int]) -> Iterator[list[int]]:
    """Memory runs out at these moments: a layer's MLP is called, once more where it is recomputed, or runs backward."""
    moments: list[int] = []

    def fail(*_: Any) -> None:
        moments.append(len(moments))
        if moments[-1] in calls:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def fail_backward(module: Any, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(fail)

    modules = [layer.mlp for layer in policy.decoder.layers]
    hooks = [module.register_forward_pre_hook(fail) for module in modules]
    hooks += [module.register_forward_hook(fail_backward) for module in modules]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def told(make_policy: MakePolicy, pictures: list[Image.Image]) -> tuple[Scene, list[str]]:
    scene, texts = make_scene(make_policy(0.2), pictures), list[str]()
    scene.policy.on_shortage = texts.append
    return scene, texts


def test_an_update_that_runs_out_of_memory_counts_nothing_twice(told: tuple[Scene, list[str]]):
    """Forward, backward, and while a checkpointed layer is computed again: wherever it happens, the same gradient."""
    scene, texts = told
    start = weights(scene.policy)
    with failing(scene.policy, set()) as made:
        expected, metrics = descend(scene.learner(), scene.prompts, scene.groups, REWARDS)
    rng = random.Random(0)
    for calls in [{n} for n in range(0, len(made), 9)] + [set(rng.sample(range(2 * len(made)), 3)) for _ in range(4)]:
        scene.policy.model.load_state_dict(start, strict=False)
        texts.clear()
        with failing(scene.policy, calls) as seen:
            found, others = descend(scene.learner(), scene.prompts, scene.groups, REWARDS)
        assert_same_gradient(found, expected)
        assert others == pytest.approx(metrics, rel=1e-4, abs=1e-5)
        assert len(texts) == sum(call < len(seen) for call in calls)


def test_what_did_not_fit_is_not_tried_again(told: tuple[Scene, list[str]]):
    scene, texts = told
    learner = scene.learner()
    with failing(scene.policy, {20}):
        descend(learner, scene.prompts, scene.groups, REWARDS)
    (text,) = texts
    assert text.startswith("Out of memory in an update of ")
    assert text.endswith("tokens, which is tried again in halves.")
    lengths = [(20, 10), (22, 10)]
    learner.batching._lowered.clear()
    first = Piece([0, 1], slice(0, 3))
    alone, _ = learner.batching.smaller(lengths, first)
    assert alone.rows == [0]
    assert [piece.rows for piece in learner.batching.pieces(lengths, 3)] == [[0], [1]]
    (checkpointed,) = learner.batching.smaller(lengths, alone)
    assert checkpointed == Piece([0], slice(0, 3), recomputed=True)
    assert {piece.recomputed for piece in learner.batching.pieces(lengths, 3)} == {True}
    halves = learner.batching.smaller(lengths, checkpointed)
    assert [piece.columns for piece in halves] == [slice(0, 2), slice(2, 3)]
    with pytest.raises(DoesNotFitError, match=r"^out of memory in an update of 30 tokens, of which no smaller part"):
        learner.batching.smaller(lengths, halves[1])


def test_an_update_that_cannot_be_made_leaves_the_learner_as_it_was(told: tuple[Scene, list[str]]):
    scene, _ = told
    learner = scene.learner(advantage="ema")
    before, state = weights(scene.policy), learner.state()
    advantages = learner.advantages(REWARDS)
    with failing(scene.policy, set(range(18, 10**6))), pytest.raises(DoesNotFitError):
        learner.update(scene.prompts, scene.groups, advantages, REWARDS)
    assert learner.state() == state
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(scene.policy).items())
    expected, _ = descend(scene.learner(), scene.prompts, scene.groups, REWARDS)
    scene.policy.model.load_state_dict(before, strict=False)
    found, _ = descend(learner, scene.prompts, scene.groups, REWARDS)  # nothing is left of the one that failed
    assert found.keys() == expected.keys()
    assert learner.updates == 1


@pytest.mark.parametrize("shared", [True, False])
def test_sampling_that_runs_out_of_memory_is_tried_in_halves(
    told: tuple[Scene, list[str]], pictures: list[Image.Image], shared: bool
):
    scene, texts = told
    scene.policy.shares_prompts = scene.policy.shares_attention = shared
    engine, asked = LiveEngine(scene.policy), asked_by(scene.policy, pictures)
    expected = sample(engine, asked, "solver", 3, 8)
    for calls in ({0}, {9}, {2, 3}, {5, 7, 30}):
        texts.clear()
        scene.policy.sampling_bytes = None
        with failing(scene.policy, calls):
            assert_same_samples(sample(engine, asked, "solver", 3, 8), expected)
        assert texts[0] == (
            "Out of memory in sampling 9 completions of up to 8 tokens, which is tried again in halves."
        )
        assert len(texts) == len(calls)
        with passes(scene.policy) as seen:  # the next call does not try as much again
            assert_same_samples(sample(engine, asked, "solver", 3, 8), expected)
        assert max(seen) < expected_size(scene.policy, engine, asked)
    with failing(scene.policy, set(range(10**6))), pytest.raises(DoesNotFitError, match="in sampling 1 completions"):
        sample(engine, asked, "solver", 3, 8)


def expected_size(policy: Policy, engine: LiveEngine, asked: Any) -> int:
    policy.sampling_bytes = None
    with passes(policy) as seen:
        sample(engine, asked, "solver", 3, 1)
    return seen[0]


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("memory")
    dataset.write_unlabeled(out / "unlabeled", 8, "chalk")
    dataset.write_questions(out / "test", 5, "chalk")
    return out


def configured(data: Path) -> Config:
    options = {"images_per_step": 3, "steps": 3, "proposer_every": 2, "probe_every": 3, "probe_images": 2}
    options |= {"blank_every": 2, "save_every": 0, "watch": False, "eval_questions": 2, "max_solution_tokens": 64}
    return resolve({"images": data / "unlabeled", "eval_data": data / "test/test.jsonl", "model": "tiny", **options})


@pytest.fixture(scope="module")
def undisturbed(data: Path) -> Path:
    assert start(configured(data), data / "undisturbed").complete
    return data / "undisturbed"


def lower_capacity() -> None:
    """No more than four completions fit at a time: rollouts, probes, blank checks, evaluation and updates are cut."""
    complete, backward = LiveEngine._complete, Learner._backward

    def require(needed: int) -> None:
        if needed > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def limited_complete(self: LiveEngine, prompts: Any, draws: torch.Tensor, temperatures: Sequence[float]) -> Any:
        require(draws.shape[0] * draws.shape[1])
        return complete(self, prompts, draws, temperatures)

    def limited_backward(self: Learner, prompts: Any, completions: Sequence[Any], *rest: Any) -> Any:
        require(len(completions))
        return backward(self, prompts, completions, *rest)

    LiveEngine._complete, Learner._backward = limited_complete, limited_backward


@pytest.mark.slow
def test_a_run_that_runs_out_of_memory_goes_on_and_says_so(
    data: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
):
    for owner, name in ((LiveEngine, "_complete"), (Learner, "_backward")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # to be put back
    lower_capacity()
    run, said = data / "cut", list[str]()
    assert start(configured(data), run, Observer(on_message=said.append)).complete
    assert_same_run(run, undisturbed)
    events = [event["text"] for event in read_records(run / "events.jsonl")]
    for what in ("in sampling ", "in an update of "):
        (text, *_) = [event for event in events if what in event]
        assert text in said
        assert text.endswith("With a lower --tokens-per-batch (16384 here), less is tried at a time.")
    assert len(events) < 20  # what did not fit once is not tried again at every step


def test_a_run_that_no_longer_fits_is_saved_and_goes_on(data: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch):
    """At step 3 no rollout fits, and resumed, no update: what came before is saved, and ends bitwise the same."""
    out, taken = data / "no-longer-fits", [0]
    observer = Observer(on_step=lambda step, metrics, episodes: taken.__setitem__(0, step))
    for begin, owner, name in ((start, LiveEngine, "_complete"), (resume, Learner, "_backward")):
        whole = getattr(owner, name)

        def fail(*arguments: Any, whole: Callable[..., Any] = whole) -> Any:
            if taken == [2]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(*arguments)

        monkeypatch.setattr(owner, name, fail)
        with pytest.raises(DoesNotFitError) as raised:
            begin(configured(data), out, observer)
        monkeypatch.setattr(owner, name, whole)
        assert str(raised.value).startswith("out of memory in ")
        assert str(raised.value).endswith("the run is saved after step 2, and --resume goes on from there")
    assert resume(load_config(out / "config.yaml"), out).complete
    for name in ("episodes.jsonl", "probes.jsonl", "solver/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("episodes.jsonl", "probes.jsonl"):
        for mine, theirs in zip(read_records(one / name), read_records(other / name), strict=True):
            texts = [[t["text"] for t in record.get("trajectories", [])] for record in (mine, theirs)]
            assert texts[0] == texts[1]
            assert mine["question"] == theirs["question"]
    for mine, theirs in zip(read_records(one / "metrics.jsonl"), read_records(other / "metrics.jsonl"), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            if not name.startswith(("time/", "sampler_gap/")):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def run_with_a_second_process_of_low_capacity(data: Path) -> int:
    """What each of two processes does."""
    if os.environ["RANK"] == "1":
        lower_capacity()
    return 0 if start(configured(data), data / "two").complete else 1


@pytest.mark.slow
def test_one_process_of_two_runs_out_of_memory(data: Path, undisturbed: Path):
    """What it tries again is its own: neither process waits for the other, and both end with the same adapters."""
    run = partial(run_with_a_second_process_of_low_capacity, data)
    both = [Forked(run, data / f"printed-{each['RANK']}", each) for each in environments_of_two()]
    for process in both:
        done = process.wait()
        assert done.returncode == 0, done.stderr
    assert_same_run(data / "two", undisturbed)
    events = [event["text"] for event in read_records(data / "two" / "events.jsonl")]
    assert any("in an update of" in event for event in events)
    assert not list(read_records(undisturbed / "events.jsonl"))
