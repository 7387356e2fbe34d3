"""`--overlap`: the next step is sampled while this one is learned from, one update behind, and is part of a checkpoint.

But for the last test, the servers are stood in for by the live model, which two threads must not use at the same time.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from forked import Forked
from ireasoner.method.types import Completion, Role
from ireasoner.model.parallel import ALONE
from ireasoner.model.pieces import DoesNotFitError
from ireasoner.model.policy import Policy
from ireasoner.playground import dataset
from ireasoner.rollouts.adapters import Adapters
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.rollouts.server import ServerError
from ireasoner.studies.doctor import fill_adapters
from ireasoner.training import loop, overlap
from ireasoner.training.config import ConfigError, load_config, resolve
from ireasoner.training.overlap import in_background
from ireasoner.training.selfplay import at_once
from ireasoner.training.state import Observer
from models import load
from stand_in import StandIn, free_port

pytestmark = pytest.mark.usefixtures("copied_models")

OPTIONS: dict[str, Any] = {
    "model": "tiny", "recipe": "paper", "device": "cpu", "steps": 4, "images_per_step": 2, "group_size": 3,
    "proposer_every": 2, "save_every": 1, "keep_checkpoints": 0, "gate_low": 0, "gate_high": 1, "learning_rate": 3e-3,
    "max_solution_tokens": 80, "max_question_tokens": 48, "probe_every": 2, "probe_images": 1, "blank_every": 2,
    "watch": False, "servers": "http://127.0.0.1:9", "overlap": True,
}  # fmt: skip


class Noting(LiveEngine):
    """Notes with which adapters it samples."""

    adapters: list[str]

    def sample(self, requests: Sequence[Request], role: Role | None, **options: Any) -> list[list[Completion]]:
        self.adapters.append(self.policy.adapter_sha256("solver"))
        return super().sample(requests, role, **options)


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """With which adapters the engine of a run has sampled."""
    noted: list[str] = []

    def open_engine(config: Any, policy: Policy, *_: object) -> LiveEngine:
        engine = Noting(policy)
        engine.adapters = noted
        return engine

    monkeypatch.setattr("ireasoner.training.opening.open_engine", open_engine)
    monkeypatch.setattr("ireasoner.rollouts.server.check_servers", lambda *_, **__: None)
    monkeypatch.setattr(overlap, "in_background", at_once)
    return noted


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    dataset.write_unlabeled(tmp_path / "images", 5, "chalk")
    return {**OPTIONS, "images": str(tmp_path / "images")}


def records(run: Path, name: str) -> list[Any]:
    rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def stop_after(step: int) -> Observer:
    def on_step(taken: int, *_: object) -> None:
        if taken == step:
            raise KeyboardInterrupt

    return Observer(on_step=on_step)


def sha256(out: Path, step: int) -> str:
    """Of the solver's adapter after a step."""
    return hashlib.sha256(
        (out / f"checkpoints/step-{step:06d}/solver/adapter_model.safetensors").read_bytes()
    ).hexdigest()


def test_a_step_is_sampled_with_the_adapters_before_the_last_update(
    adapters: list[str], options: dict[str, Any], tmp_path: Path
):
    """But for the first, which has none before it."""
    out = tmp_path / "run"
    loop.start(resolve({**options, "probe_every": 0, "blank_every": 0}), out)
    saved = [sha256(out, step) for step in range(5)]
    assert len(set(saved)) == 5  # every step taught something
    proposed_and_solved = [[saved[max(0, step - 2)]] * 2 for step in range(1, 5)]
    assert adapters == [each for both in proposed_and_solved for each in both]
    first, *later = records(out, "metrics.jsonl")
    assert first["mean_sampler_gap/solver"] < 1e-4
    assert all(row["mean_sampler_gap/solver"] > 1e-3 for row in later)
    assert all(row["importance_weight/solver"] != 1 for row in later)


def test_a_resumed_run_goes_on_from_what_was_sampled_ahead(
    adapters: list[str], options: dict[str, Any], tmp_path: Path
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    loop.start(resolve(options), whole)
    with pytest.raises(KeyboardInterrupt):
        loop.start(resolve(options), stopped, stop_after(3))
    assert (stopped / "checkpoints/step-000002/draft.json").exists()
    loop.resume(load_config(stopped / "config.yaml"), stopped)
    for name in ("metrics.jsonl", "episodes.jsonl", "probes.jsonl"):
        assert records(stopped, name) == records(whole, name)
    assert sha256(stopped, 4) == sha256(whole, 4)
    assert not (whole / "checkpoints/step-000004/draft.json").exists()  # nothing comes after it


def test_an_image_that_is_gone_is_left_out_of_what_was_sampled_ahead(
    adapters: list[str], options: dict[str, Any], tmp_path: Path
):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        loop.start(resolve(options), out, stop_after(3))
    drafted = json.loads((out / "checkpoints/step-000002/draft.json").read_text())
    assert drafted["step"] == 3
    gone, left = [item["name"] for item in drafted["items"]]
    (tmp_path / "images" / gone).unlink()
    assert loop.resume(load_config(out / "config.yaml"), out).complete
    played = [row for row in records(out, "episodes.jsonl") if row["step"] == 3]
    assert [row["image"] for row in played] == [left]
    texts = [text for text, *_ in drafted["groups"][1]]
    assert [t["text"] for t in played[0]["trajectories"]] == texts
    assert [row["image"] for row in records(out, "skipped.jsonl")] == [gone]


def test_the_next_step_is_sampled_while_this_one_is_learned_from(
    adapters: list[str], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It begins before the update ends, and the update does not wait for it."""
    learned, sampling, sample, update = threading.Event(), threading.Event(), Noting.sample, loop.update

    def sample_when_learned(engine: Noting, *arguments: Any, **options: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            sampling.set()
            assert learned.wait(30)
        return sample(engine, *arguments, **options)

    def learn_when_sampling(run: Any, play: Any) -> Any:
        if run.step == 1:
            assert sampling.wait(30)
        found = update(run, play)
        learned.set()
        return found

    monkeypatch.setattr(overlap, "in_background", in_background)
    monkeypatch.setattr(Noting, "sample", sample_when_learned)
    monkeypatch.setattr(loop, "update", learn_when_sampling)
    loop.start(resolve({**options, "steps": 2}), tmp_path / "run")
    first, last = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert first["time/ahead_seconds"] > 0
    assert "time/ahead_seconds" not in last


def test_what_fails_beside_the_update_ends_the_run(
    adapters: list[str], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sample = Noting.sample

    def fail_in_thread(engine: Noting, *arguments: Any, **options: Any) -> Any:
        if len(adapters) == 4:  # of the step after the next
            raise ServerError("no server has answered")
        return sample(engine, *arguments, **options)

    monkeypatch.setattr(overlap, "in_background", in_background)
    monkeypatch.setattr(loop, "update", lambda run, play: (list(play.episodes), {}))  # two threads must not compute
    with monkeypatch.context() as broken:
        broken.setattr(Noting, "sample", fail_in_thread)
        with pytest.raises(ServerError, match="no server has answered"):
            loop.start(resolve({**options, "probe_every": 0, "blank_every": 0}), tmp_path / "run")
    assert [row["step"] for row in records(tmp_path / "run", "metrics.jsonl")] == [1]
    assert loop.resume(load_config(tmp_path / "run/config.yaml"), tmp_path / "run").complete


@pytest.mark.slow
def test_where_memory_runs_out_the_run_is_saved_with_the_draft_of_that_step(
    adapters: list[str], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    update, whole, out = loop.update, tmp_path / "whole", tmp_path / "run"
    loop.start(resolve(options), whole)

    def run_out(run: Any, play: Any) -> Any:
        if run.step == 3:
            raise DoesNotFitError("too large")
        return update(run, play)

    with monkeypatch.context() as small:
        small.setattr(loop, "update", run_out)
        with pytest.raises(DoesNotFitError, match="saved after step 2"):
            loop.start(resolve({**options, "save_every": 0}), out)
    assert json.loads((out / "checkpoints/step-000002/draft.json").read_text())["step"] == 3
    loop.resume(load_config(out / "config.yaml"), out)
    assert records(out, "episodes.jsonl") == records(whole, "episodes.jsonl")


def test_it_needs_servers(options: dict[str, Any]):
    with pytest.raises(ConfigError, match="--overlap needs --servers"):
        resolve({**options, "servers": ()})


def test_adapters_are_kept_as_they_were_while_the_policy_learns(tmp_path: Path):
    """A server that comes back in between is handed those that the others sample with."""
    policy = load()
    fill_adapters(policy, 0.1, seed=1)
    handed = Adapters(policy, ALONE, tmp_path, 1.0, ahead=True)
    handed.next_version()
    fill_adapters(policy, 0.1, seed=2)
    data = (handed.files("solver") / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() != policy.adapter_sha256("solver")


def serve(port: int) -> int:
    with StandIn(load(), port):
        threading.Event().wait()
    return 0


@pytest.mark.usefixtures("no_report")
def test_what_servers_sample_beside_an_update_is_what_they_would_sample_before_it(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run on a server of its own process, with both computing at the same time."""
    port = free_port()
    few = {"steps": 3, "images_per_step": 1, "group_size": 2, "max_solution_tokens": 16, "probe_every": 0}
    config = resolve({**options, **few, "blank_every": 0, "servers": f"http://127.0.0.1:{port}"})
    with Forked(partial(serve, port), tmp_path / "server") as server:
        server.wait_until(lambda: answers(port))
        loop.start(config, tmp_path / "beside")
        monkeypatch.setattr(overlap, "in_background", at_once)
        loop.start(config, tmp_path / "before")
    beside, before = (
        [e["trajectories"] for e in records(tmp_path / n, "episodes.jsonl")] for n in ("beside", "before")
    )
    assert [[t["text"] for t in group] for group in beside] == [[t["text"] for t in group] for group in before]
    assert sha256(tmp_path / "beside", 3) == sha256(tmp_path / "before", 3)


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
