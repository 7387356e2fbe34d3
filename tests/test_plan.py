"""What a run takes, before it begins: the arithmetic, what it refuses, and `ireasoner plan`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from families import qwen3_vl_moe
from ireasoner.app.cli import main
from ireasoner.method.texts import solver_messages
from ireasoner.method.types import Completion
from ireasoner.model import counting, loading, memory
from ireasoner.model.inputs import build_prompts
from ireasoner.model.loading import meta_policy
from ireasoner.model.options import BackboneOptions
from ireasoner.model.parallel import ALONE, Processes
from ireasoner.model.pieces import DoesNotFitError
from ireasoner.model.policy import Policy
from ireasoner.model.source import TINY_MODEL, find_model
from ireasoner.rollouts.live import LiveEngine
from ireasoner.studies import random_models
from ireasoner.training import fitting, planning
from ireasoner.training.config import Config, resolve
from ireasoner.training.state import Observer
from models import learner, load, requests

GB = 10**9


def config_of(**options: Any) -> Config:
    return resolve({"model": "random-25m", "images": ".", "max_image_tokens": 1024, **options})


@pytest.fixture(scope="module")
def small() -> Policy:
    """A model of 25 million parameters, without weights."""
    return random_models.meta_policy("random-25m", config_of().backbone)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    return qwen3_vl_moe(tmp_path_factory.mktemp("mixture"))


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def test_a_published_mixture_is_counted():
    """Qwen3-VL-30B-A3B: 31.07e9 parameters, of which 48 layers hold 128 experts each; 3.0e9 work on a token."""
    policy = random_models.meta_policy("Qwen/Qwen3-VL-30B-A3B-Instruct", BackboneOptions())
    takes, experts = policy.footprint, 48 * 128 * 3 * 2048 * 768
    assert takes.weights - takes.adapters == pytest.approx(2 * 31_070_754_032, rel=1e-6)  # and a few buffers
    assert takes.layers - 2 * experts == 2 * 48 * (2048 * 128 * (2 * 32 + 2 * 4) + 128 * 2048 + 2 * 2048 + 2 * 128)
    assert takes.adapters == 2 * 4 * 48 * 16 * (4 * 2048 + 2 * 32 * 128 + 2 * 4 * 128)  # queries, keys, values, output
    assert takes.cache == 2 * 48 * 4 * 128 * 2
    active = experts * 8 // 128 + 48 * 2048 * 128 * (2 * 32 + 2 * 4) + 48 * 2048 * 128 + 2048 * 151936
    assert counting.forward_flops(policy) == pytest.approx(2 * active, rel=0.01)  # and LoRA's
    assert f"experts ({experts:,} parameters) stay frozen" in policy.describe()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_is_counted_without_weights_and_its_experts_stay_frozen(mixture: str, dtype: str):
    options = BackboneOptions(dtype=dtype)  # type: ignore[arg-type]
    real, counted = load(mixture, dtype=dtype), meta_policy(mixture, options)
    for name, value in vars(real.footprint).items():
        assert vars(counted.footprint)[name] == pytest.approx(value, rel=0.02), name
    assert real.describe() == counted.describe()
    assert "stay frozen" in real.describe()
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in real.parameters("solver")} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip


def test_what_takes_more_and_what_takes_less(small: Policy):
    def total(processes: int = 1, **options: Any) -> int:
        return planning.needs(small, config_of(**options), 1024, processes).total

    usual = total()
    assert total(processes=2, shard=True) > total(processes=4, shard=True) > total(processes=8, shard=True)
    assert total(max_solution_tokens=300) > usual > total(max_solution_tokens=200)
    assert total(images_per_step=1) < usual
    assert total(tokens_per_batch=1000) < usual  # groups are recomputed then
    # Evaluation asks 64 questions at once, unless servers are asked.
    busy = planning.needs(small, config_of(eval_data="q.jsonl", tokens_per_batch=10**6), 1024)
    served = planning.needs(small, config_of(eval_data="q.jsonl", servers="http://gpu:8000"), 1024)
    assert busy.evaluation > busy.sampling > 0 == served.evaluation == served.sampling
    checkpointed = random_models.meta_policy("random-25m", config_of(gradient_checkpointing=True).backbone)
    one = config_of(images_per_step=1)
    assert planning.needs(checkpointed, one, 1024).update < planning.needs(small, one, 1024).update / 2


def test_groups_about_other_views_and_passes_about_gray_images_count(small: Policy):
    """The second group doubles what is sampled, but no update; a gray image costs a pass over each group."""
    one, two = (config_of(recipe="paper", other_view=twice, tokens_per_batch=10**6) for twice in (False, True))
    alone, both = (planning.needs(small, config, 1024) for config in (one, two))
    assert both.images == 2 * alone.images == 2 * 4 * 1024 * small.footprint.feature
    assert both.sampling == pytest.approx(2 * alone.sampling, rel=0.05)
    assert (both.update, both.optimizer) == (alone.update, alone.optimizer)
    step, twice = (planning.step_of(small, config, 1024) for config in (one, two))
    solutions, prompt = 4 * 5 * 256, 4 * (1024 + 2 * 128)
    assert replace(step, sampled=step.sampled + solutions, read=step.read + prompt) == twice
    gray = planning.step_of(small, config_of(recipe="paper", step_measure="grounding"), 1024)
    assert gray == replace(step, scored=prompt + solutions)
    cached = 1.5 * (4 * (1024 + 2 * 128) + solutions) * small.footprint.cache  # room for one group of each image
    memory_of_one = (planning.VLLM_OWN + planning.whole_weights(small) + cached) / planning.VLLM_SHARE
    servers = [planning.smallest_server(small, config, 1024, memory_of_one) for config in (one, two)]
    assert [server and server.gpus for server in servers] == [1, 2]


def test_the_features_of_the_images_at_hand_count_once(small: Policy):
    """Those of a process's share of a step or of the questions asked together, the same in the plan and in the fit."""
    takes = small.footprint
    for options, processes, images in (
        ({"images_per_step": 12}, 4, 3),
        ({"images_per_step": 12, "eval_data": "q.jsonl", "eval_questions": 20}, 4, 5),
        ({"images_per_step": 12, "eval_data": "q.jsonl", "eval_questions": 10**4}, 4, 64),
    ):
        config = config_of(**options)
        assert planning.needs(small, config, 1024, processes).images == images * 1024 * takes.feature
        fitting, free = planning.tokens_that_fit(config, takes, 1024, 2 * GB, processes), 0.9 * 2 * GB
        assert fitting == takes.tokens_in(free - images * 1024 * takes.feature)
    of_qwen3 = random_models.meta_policy("Qwen/Qwen3-VL-8B-Instruct", BackboneOptions()).footprint
    assert of_qwen3.feature == 4 * 4096 * 2  # and those of three layers inside of the vision tower


def test_layers_are_shared_out_and_two_of_them_are_gathered(small: Policy):
    whole = small.footprint
    for ranks in (2, 4):
        held = whole.sharded(ranks)
        assert held.weights == whole.weights - whole.layers + whole.layers // ranks
        assert held.gathered == 2 * whole.widest
        # The loss is computed when no layer is gathered; the backward pass of a layer, when two are.
        assert held.update(10, 10**6, True) == whole.update(10, 10**6, True)
        assert held.update(10**5, 10, True) == whole.update(10**5, 10, True) + 2 * whole.widest
        assert held.tokens_in(GB) == whole.tokens_in(GB + whole.layers - whole.layers // ranks - 2 * whole.widest)
    assert whole.sharded(1) == whole
    assert replace(whole.sharded(4), weights=whole.weights, gathered=0) == whole  # nothing else changes


def test_scores_of_attention_that_is_not_fused_count():
    fused, eager = (meta_policy("tiny", BackboneOptions(attention=kind)).footprint for kind in (None, "eager"))  # type: ignore[arg-type]
    assert fused.scores == 0
    assert eager.scores == 4 * 4 * 6 // 2 * 2  # layers, heads, and bytes: after the softmax in float32, and in bfloat16
    assert fused.among(1000) == fused
    assert eager.among(1000).kept == eager.kept + 1000 * eager.scores


def held_by(work: Callable[[], Any]) -> int:
    """The most bytes of tensors that work holds at a time, on top of what was there before."""
    with counting.Held() as held:
        work()
    return held.peak


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"gradient_checkpointing": True}])
def test_what_is_planned_is_what_is_held(options: dict[str, Any], pictures: list[Image.Image]):
    """An update and a batch of samples of the tiny model, with every tensor that torch makes followed."""
    policy = load(**options)
    takes, (image, *_) = policy.footprint, pictures
    policy.end_tokens = ()
    (asked,) = requests(policy, [image.resize((448, 448))], [solver_messages("{question}", "What?")])
    engine, solver, written, n = LiveEngine(policy), learner(policy, "solver"), 64, 5
    prompts = build_prompts(policy, [asked.image], [asked.messages])
    prompt = prompts.mask_BP.shape[1]
    completion = Completion("", tuple(range(10, 10 + written)), (-1.0,) * written, "length")
    rewards = [[1.0, 0.0, 0.0, 0.0, 0.0]]

    def update() -> None:
        solver.update(prompts, [[completion] * n], solver.advantages(rewards), rewards)

    update()  # AdamW makes its state
    planned = takes.update(prompt + n * (written - 1), n * written, bool(options.get("gradient_checkpointing")))
    assert planned / 1.35 < held_by(update) < planned  # which counts what kernels hold, too
    sampled = takes.sampling(1, prompt, written, n, at_a_time=1, shares=True)
    found = held_by(lambda: engine.sample([asked], "solver", n=n, max_tokens=written))
    # A product in half precision is made of float32 copies on a CPU, which count in a model as small as this one.
    assert found == pytest.approx(sampled, rel=0.1 if "dtype" not in options else 0.4)


# --- what train refuses -----------------------------------------------------------------------------------------------


class Two(Processes):
    """The first of two processes, which say the same."""

    def __init__(self) -> None:
        super().__init__(0, 2, "cpu")

    def gather(self, items: Any, total: int) -> list[Any]:
        return [*items, *items][:total]


def begin(
    config: Config, folder: Path, out: Path, processes: Processes = ALONE, force: bool = False
) -> tuple[Config, list[str]]:
    """The config that a run on a CPU begins with, and what it is told."""
    said: list[str] = []
    observer = Observer(on_message=said.append)
    with fitting.fitted(config, find_model(str(folder)), out, processes, observer, force=force) as found:
        return found, said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 25 million parameters: its config and processor, and a file of weights that nobody reads."""
    folder = tmp_path_factory.mktemp("25m")
    shutil.copytree(TINY_MODEL, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    random_models.config_of("random-25m").save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(bytes(10**8))
    return folder


def leave(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    """Let this machine have so many bytes free."""
    monkeypatch.setattr(fitting, "free_memory", lambda device: (int(free), 64 * GB))


def test_a_run_that_does_not_fit_in_this_machines_memory_is_refused(
    folder: Path, tmp_path: Path, small: Policy, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(model=str(folder), device="cpu", dtype="float32")
    leave(monkeypatch, 0.2 * GB)
    with pytest.raises(
        DoesNotFitError, match=r"25m\d* does not fit: it takes 0\.\d GB to train .* or go on regardless with --f"
    ):
        begin(config, folder, tmp_path)
    found, (told,) = begin(config, folder, tmp_path, force=True)
    assert found == config
    assert told.startswith(f"Begun all the same: {folder} does not fit")
    leave(monkeypatch, 0.9 * GB)
    found, (told,) = begin(config, folder, tmp_path)
    assert 500 < (found.fitted_tokens_per_batch or 0) < 3072
    assert told.startswith("Memory: 0.9 GB are free")
    leave(monkeypatch, 5.5 * GB)  # 50 times its weights: not even counted
    monkeypatch.setattr(fitting, "meta_policy", lambda *_: pytest.fail("counted"))
    assert begin(config, folder, tmp_path) == (config, [])


def test_a_run_whose_model_cannot_be_counted_begins(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise NotImplementedError("Cannot copy out of meta tensor")

    monkeypatch.setattr(loading, "count", refuse)
    leave(monkeypatch, 0.2 * GB)
    config = config_of(model=str(folder), device="cpu", dtype="float32")
    found, (told,) = begin(config, folder, tmp_path)
    assert found == config
    assert told.startswith("Memory was not counted: what a qwen2_5_vl model takes cannot be counted without its wei")
    assert main(["plan", str(folder)]) == 2


def test_processes_of_a_machine_share_its_memory_and_the_layers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(model=str(folder), device="cpu", dtype="float32")
    leave(monkeypatch, 1.4 * GB)
    (alone, _), (whole, _) = begin(config, folder, tmp_path), begin(config, folder, tmp_path, Two())
    sharded, _ = begin(config.changed(shard=True), folder, tmp_path, Two())
    tokens = [each.fitted_optimizer().tokens_per_batch for each in (alone, sharded, whole)]
    assert tokens == sorted(tokens, reverse=True)
    assert len(set(tokens)) == 3


V1 = {"memory.limit_in_bytes": "3000", "memory.usage_in_bytes": "2500", "memory.stat": "x 7\ntotal_inactive_file 100\n"}
V2 = {"memory.max": "3000", "memory.current": "2500", "memory.stat": "inactive_file 100\n"}
OPEN = {"memory.max": "max", "memory.current": "1", "memory.stat": ""}


@pytest.mark.parametrize(
    ("lines", "files"),
    [
        ("0::/run", {"run": V2}),
        ("0::/run/inner", {"run": V2, "run/inner": OPEN}),
        ("4:memory:/run", {"memory/run": V1}),
        ("4:memory:/elsewhere", {"memory": V1}),  # as a container sees it
    ],
)
def test_the_limit_of_a_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, files: dict[str, dict[str, str]]
):
    for folder, texts in files.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (tmp_path / folder / name).write_text(text)
    (tmp_path / "own").write_text(lines)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    free, total = memory.free_memory("cpu")
    assert free == 600
    assert total > GB


# --- the command ------------------------------------------------------------------------------------------------------


def planned(tmp_path: Path, *argv: str) -> dict[str, Any]:
    file = tmp_path / "plan.json"
    assert main(["plan", *argv, "--json", str(file)]) in (0, 1)
    return json.loads(file.read_text())


def test_a_plan_says_what_fits_and_what_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = planned(tmp_path, "random-25m", "--gpus", "2", "--gpu-memory", "80GB", "--servers", "3", "--steps", "100",
                    "--tokens-per-second", "1000", "--tflops", "0.001", "--no-watch")  # fmt: skip
    printed = capsys.readouterr().out
    assert "It fits whole." in printed
    whole, sharded = found["variants"]["whole"], found["variants"]["sharded"]
    assert whole["total"] > sharded["total"] > 0 == whole["sampling"]
    # Four images a step: a question of 128 tokens and five solutions of 256 each, for 100 steps at 1,000 a second.
    assert f"100 steps are {100 * 4 * (128 + 5 * 256) / 1000 / 3600:.1f} hours of sampling" in printed
    sampling, rest, together = map(float, re.findall(r"([\d.]+) hours", printed))
    assert min(sampling, rest) > 0
    assert together == pytest.approx(max(sampling, rest) + min(sampling, rest) / 100, abs=0.1)
    assert found["commands"] == [
        "VLLM_API_KEY=KEY ireasoner serve random-25m --host 0.0.0.0 --run",
        "IREASONER_SERVER_KEY=KEY torchrun --nproc-per-node 2 -m ireasoner train --images IMAGES --out RUN "
        "--model random-25m --steps 100 --no-watch --servers http://server1:8000,http://server2:8000,http://server3:8000",
    ]
    for command in found["commands"]:
        assert command in printed.splitlines()[-1] or f"    {command}" in printed.splitlines()


def test_a_plan_of_what_does_not_fit_says_what_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "random-7b", "--gpu-memory", "14"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "Nothing fits: random-7b does not fit: it takes" in printed
    assert "What would do, each by itself: 4 GPUs with --shard, or --quantization nf4." in printed


def test_a_plan_says_what_will_be_slow_and_what_idle(capsys: pytest.CaptureFixture[str]):
    given = ["plan", "random-7b", "--gpus", "8", "--gpu-memory", "14"]
    assert main(given) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--servers samples far faster" in printed
    assert "4 of the GPUs have nothing to do: a step has --images-per-step 4." in printed
    assert main([*given, "--servers", "1", "--images-per-step", "8"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "samples far faster" not in printed
    assert "nothing to do" not in printed


def test_a_plan_needs_no_weights_and_train_decides_by_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    found = planned(tmp_path, str(bare), "--gpu-memory", "0.9", "--max-image-tokens", "1024", "--dtype", "float32")
    leave(monkeypatch, 0.9 * GB)
    config, _ = begin(config_of(model=str(folder), device="cpu", dtype="float32"), folder, tmp_path)
    assert found["variants"]["whole"]["tokens_per_batch"] == config.fitted_tokens_per_batch


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["nowhere/at-all/x"], "cannot load the model 'nowhere/at-all/x': there is no such folder"),
        (["tiny", "--gpus", "0"], "--gpus: input should be greater than or equal to 1, not 0"),
        (["tiny", "--gpu-memory", "80TB"], "--gpu-memory: a number of gigabytes is needed, such as 80, not 80TB"),
        (["tiny", "--gpu-memory", "0"], "--gpu-memory: a number of gigabytes is needed, such as 80, not 0"),
        (["tiny", "--servers", "-1"], "--servers: input should be greater than or equal to 0, not -1"),
        (["{text}"], "is a llama model: a model for images and text is needed"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    argv: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert main(["plan", *(str(tmp_path) if word == "{text}" else word for word in argv)]) == 2
    assert told in capsys.readouterr().err
