"""Runs on two real vLLM servers, where vLLM is installed: `make test-vllm`. The rest of the suite has a stand-in."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("vllm")

from ireasoner import Observer
from ireasoner.app import api
from ireasoner.method.texts import solver_messages
from ireasoner.method.types import ROLES
from ireasoner.model.policy import Policy
from ireasoner.playground import dataset
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.server import ServerError
from ireasoner.rollouts.servers import ServersEngine
from ireasoner.studies.doctor import fill_adapters
from models import load, requests, sample, sampler_gap, tokens

KEY = "the-key-of-the-tests"


class RealServer:
    """A vLLM server as `ireasoner serve` starts it; a context manager, which ends it."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address, self.log = f"http://127.0.0.1:{self.port}", log
        command = [sys.executable, "-m", "ireasoner", "serve", "tiny", "--device", "cpu", "--port", str(self.port)]
        kept = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        environment = kept | {"VLLM_API_KEY": KEY, "VLLM_NO_USAGE_STATS": "1"}
        with log.open("wb") as written:
            self.process = subprocess.Popen(
                [*command, "--run"], stdout=written, stderr=written, env=environment, start_new_session=True
            )

    def __enter__(self) -> RealServer:
        for _ in range(480):  # at most four minutes
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text(errors="replace")[-3000:])

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)  # its engine is a process of its own, in its group
            self.process.wait(60)


@pytest.fixture(scope="module", autouse=True)
def key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IREASONER_SERVER_KEY", KEY)
        yield


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RealServer]]:
    logs = tmp_path_factory.mktemp("logs")
    with RealServer(logs / "one") as one, RealServer(logs / "other") as other:
        yield [one, other]


@pytest.fixture(scope="module")
def policy() -> Policy:
    policy = load()
    fill_adapters(policy, 0.1, seed=1)
    return policy


@pytest.fixture(scope="module")
def asked(policy: Policy, pictures: list[Image.Image]) -> list[Request]:
    sized = [pictures[0], pictures[1].resize((112, 56)), pictures[2].resize((56, 28))]
    questions = ("Which bar is the tallest?", "Is red <image> more than<|im_end|> blue?", "Where?")
    return requests(policy, sized, [solver_messages("{question}", q) for q in questions], (1, 2, 3))


def test_completions_are_the_learners_on_one_server_or_two(
    policy: Policy, asked: list[Request], servers: list[RealServer]
):
    addresses = [server.address for server in servers]
    both = ServersEngine.open(policy, addresses, 363, patience=120)
    alone = ServersEngine.open(policy, addresses[:1], 363, patience=120)
    for role in (None, *ROLES):
        groups = sample(both, asked, role, 4, 32)
        assert sampler_gap(policy, asked, groups, role) < 1e-4
        assert tokens(groups) == tokens(sample(alone, asked, role, 4, 32))
        assert len({c.token_ids for group in groups for c in group}) > 6  # samples, not one answer
    greedy = sample(both, asked, "solver", 1, 32, temperature=0)
    assert sampler_gap(policy, asked, greedy, "solver") < 1e-4
    fill_adapters(policy, 0.1, seed=2)
    assert sampler_gap(policy, asked, sample(both, asked, "solver", 2, 32), "solver") > 1e-2
    before = time.monotonic()
    both.refresh()
    print("handed over in", time.monotonic() - before)
    assert sampler_gap(policy, asked, sample(both, asked, "solver", 2, 32), "solver") < 1e-4
    fill_adapters(policy, 0.1, seed=1)
    with pytest.raises(ServerError, match=r"refuses a prompt: .*363"):
        sample(both, asked, None, 1, 400)
    for engine in (both, alone):
        engine.close()


def test_a_step_is_sampled_while_the_one_before_is_learned_from(tmp_path: Path, servers: list[RealServer]):
    dataset.write_unlabeled(tmp_path / "images", 6, "chalk")
    options: dict[str, Any] = {"steps": 4, "images_per_step": 2, "proposer_every": 2, "device": "cpu", "patience": 120}
    addresses = [server.address for server in servers]
    api.train(tmp_path / "images", "tiny", tmp_path / "run", servers=addresses, overlap=True, **options)
    first, *others = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in others] == [2, 3, 4]
    assert first.get("sampler_gap/solver", 0) < 1e-4
    assert any(row.get("sampler_gap/solver", 0) > 1e-4 for row in others)  # one update behind
    assert ["time/ahead_seconds" in row for row in (first, *others)] == [True, True, True, False]


def test_a_run_goes_on_when_one_of_two_servers_ends(tmp_path: Path, servers: list[RealServer]):
    """The last test here: it ends a server."""
    dataset.write_unlabeled(tmp_path / "images", 6, "chalk")
    told: list[str] = []

    def on_step(step: int, *_: Any) -> None:
        if step == 2:
            servers[1].stop()

    options: dict[str, Any] = {"steps": 4, "images_per_step": 2, "proposer_every": 2, "device": "cpu", "patience": 120}
    addresses = [server.address for server in servers]
    observer = Observer(on_step=on_step, on_message=told.append)
    api.train(tmp_path / "images", "tiny", tmp_path / "run", observer=observer, servers=addresses, **options)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    gaps = [value for row in metrics for name, value in row.items() if name.startswith("sampler_gap/")]
    assert len(gaps) >= 4
    assert max(gaps) < 1e-4
    assert len([line for line in told if servers[1].address in line]) == 1
