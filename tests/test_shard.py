"""The decoder layers shared out among processes (`--shard`): the same numbers as in one process, and no process waits
for another for ever.

What differs between processes is where they could fall out of step: their shares of images and questions, the lengths
of what they sample, the number of micro-batches, and whether these are checkpointed.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.tensor import DTensor

import families
import forked
from forked import Forked
from ireasoner.method.texts import solver_messages
from ireasoner.method.types import Completion
from ireasoner.model import learner as learners
from ireasoner.model.distributed import joined
from ireasoner.model.inputs import build_prompts
from ireasoner.model.loading import load_policy
from ireasoner.model.options import BackboneOptions
from ireasoner.model.parallel import Processes
from ireasoner.model.policy import Policy
from ireasoner.playground import dataset
from ireasoner.rollouts.live import LiveEngine
from ireasoner.studies.doctor import fill_adapters
from ireasoner.training.config import SamplingOptions
from ireasoner.training.evaluation import evaluate
from ireasoner.training.labelled import load_questions
from models import learner, requests
from test_parallel import assert_lost, assert_same_run, finish, finish_alone, finish_together


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sharded")
    dataset.write_unlabeled(out / "unlabeled", 6, "chalk")
    return out


def options(place: Path, **more: Any) -> list[str]:
    given = {
        **{"images": place / "unlabeled", "model": "tiny", "device": "cpu", "steps": 1, "images-per-step": 3},
        **{"proposer-every": 1, "blank-every": 1, "save-every": 1, "watch-window": 2, "probe-images": 1},
        **{"keep-checkpoints": 0, "group-size": 3, "max-solution-tokens": 64, **more},
    }
    return ["train", *(str(part) for name, value in given.items() for part in (f"--{name}", value))]


def test_a_sharded_run_is_that_of_one_process_and_each_goes_on_from_the_other(place: Path):
    """Three images and blank images over two processes: one of them has less to do everywhere. One run is sharded in
    its first step, the other in its second."""
    first, second, more = place / "sharded-first", place / "sharded-second", ("--steps", 2)
    finish_together(place, "first", *options(place), "--shard", "--out", first)
    finish_alone(place, "second", *options(place), "--out", second)
    said = finish_alone(place, "first-goes-on", "train", "--resume", first, *more)
    assert "--shard changes nothing here: there is one process" in said
    finish_together(place, "second-goes-on", "train", "--resume", second, "--shard", *more)
    assert_same_run(first, second)


FAMILIES = ("qwen3_vl", "gemma3", "qwen3_5")  # packed completions; copies of the prompt's cache; whole sequences


def test_logprobs_and_gradients_are_those_of_the_whole_model(tmp_path: Path):
    dataset.write_questions(tmp_path / "test", 5, "chalk")
    for name in FAMILIES:
        families.FAMILIES[name](tmp_path / name)
    environments = forked.environments_of_two()
    finish([Forked(partial(compare, tmp_path), tmp_path / each["RANK"], each) for each in environments])


def compare(folder: Path) -> int:
    """What each of two processes does: the same with a model that it holds whole, and with one that is sharded."""
    with joined("cpu", 60, shard=True) as processes:
        for name, dtype in zip(FAMILIES, ("float32", "bfloat16", "float32"), strict=True):
            # Only one process computes activations again in the backward pass.
            chosen = BackboneOptions(dtype=dtype, gradient_checkpointing=processes.is_main)
            whole = load_policy(str(folder / name), chosen, device="cpu")
            sharded = load_policy(str(folder / name), chosen, device="cpu", sharded_over=processes)
            for policy in (whole, sharded):
                fill_adapters(policy, 0.1)
            assert sharded.footprint == whole.footprint.sharded(processes.count)
            layers = [*sharded.decoder.layers.parameters()]
            shares = sum(p.to_local().nbytes for p in layers if isinstance(p, DTensor))
            assert shares == pytest.approx(whole.footprint.layers / processes.count, rel=0.01)
            assert (sharded.shares_prompts, sharded.shares_attention) == (whole.shares_prompts, whole.shares_attention)
            tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]  # with other memory, products may round otherwise
            assert_close_to(played(sharded, processes), played(whole, processes), tolerance)
            (metrics, gradients), (expected, theirs) = (learned(policy, processes) for policy in (sharded, whole))
            assert metrics == pytest.approx(expected, rel=tolerance, abs=tolerance)
            largest = max(gradient.abs().max().item() for gradient in theirs)
            for mine, gradient in zip(gradients, theirs, strict=True):
                assert gradient.any()
                torch.testing.assert_close(mine, gradient, rtol=0, atol=tolerance * largest)
        one_image = (played(policy, processes, count=1) for policy in (sharded, whole))  # one process has none at all
        assert_close_to(*one_image, tolerance)
        # One process gets all questions about the first image, and makes a pass more for them than for whole prompts.
        questions = load_questions(folder / "test/test.jsonl")[:3]
        questions += [replace(questions[0], question=text) for text in ("What is it?", "How many are there?")]
        short = SamplingOptions(max_solution_tokens=4)
        scores = [evaluate(policy, questions, None, short, processes=processes) for policy in (sharded, whole)]
        alone = evaluate(whole, questions, None, short)
        assert scores[0].greedy_texts == scores[1].greedy_texts == alone.greedy_texts
    return 0


def assert_close_to(groups: list[list[Completion]], others: list[list[Completion]], tolerance: float) -> None:
    for mine, theirs in zip(chain.from_iterable(groups), chain.from_iterable(others), strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=tolerance)


def asked(policy: Policy, processes: Processes, count: int) -> list[Any]:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8)) for _ in range(count)]
    share = processes.share(count)
    chats = [solver_messages("{question}", "What? " * (i + 1)) for i in share]
    return requests(policy, [images[i] for i in share], chats, [i + 1 for i in share])


def played(policy: Policy, processes: Processes, count: int = 3) -> list[list[Completion]]:
    """Completions of this process's images, which may be longer in one process than in the other."""
    longest = 3 + 3 * processes.index
    return LiveEngine(policy).sample(asked(policy, processes, count), "solver", n=2, max_tokens=longest)


def learned(policy: Policy, processes: Processes) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Metrics of an update on three groups, each a micro-batch of its own, and the gradient. One of the groups has
    completions of one token only, which need no second pass behind the prompt."""
    mine = asked(policy, processes, 3)
    texts = [[Completion("", (7 + i, 8, 9)[: 1 + i % 3], (-1.0,) * (1 + i % 3), "stop")] * 2 for i in range(3)]
    solver = learner(policy, "solver", processes, tokens_per_batch=1)
    gradients: list[torch.Tensor] = []
    parameters = solver.parameters.values()
    solver.optimizer.step = lambda: gradients.extend(p.grad.clone() for p in parameters if p.grad is not None)  # type: ignore[method-assign, assignment]
    rewards = [[0.0, 1.0], [1.0, 0.5], [0.25, 0.0]]
    prompts = build_prompts(policy, [r.image for r in mine], [r.messages for r in mine])
    share = processes.share(3)
    advantages = solver.advantages(rewards)[share]
    return solver.update(prompts, [texts[i] for i in share], advantages, rewards), gradients


def end_within_an_update() -> None:
    """Rank 1 is killed between the forward and the backward pass of its first micro-batch."""

    def end(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == "1":
        learners.token_statistics = end


def test_where_a_process_is_killed_within_a_pass_the_other_says_so(place: Path):
    """It waits for the weights of a layer then, in the midst of its backward pass."""
    out = place / "killed"
    few = options(place, **{"images-per-step": 2, "blank-every": 0, "probe-every": 0})
    both = forked.start_two(*few, "--shard", "--out", out, output=place / "killed-printed", before=end_within_an_update)
    first, other = (process.wait() for process in both)
    assert (first.returncode, other.returncode) == (2, -signal.SIGKILL)
    assert_lost(first.stderr, out)


def run_out_of_memory() -> None:
    """Rank 1 has no memory for a batch of samples."""

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("made to fail")

    if os.environ["RANK"] == "1":
        LiveEngine._complete = fail  # type: ignore[method-assign]


def test_a_shortage_of_memory_ends_the_run_with_a_sentence(place: Path):
    """The other process would wait for the weights that it would have got from a pass that broke off."""
    out = place / "short"
    few = options(place, **{"images-per-step": 2, "probe-every": 0})
    both = forked.start_two(*few, "--shard", "--out", out, output=place / "short-printed", before=run_out_of_memory)
    first, other = (process.wait() for process in both)
    assert (first.returncode, other.returncode) == (2, 2)
    assert_lost(first.stderr, out)
    assert "not tried again in parts where the model is sharded: start more processes" in other.stderr
