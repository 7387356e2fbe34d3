"""The sides of the benchmark do what they are said to do; what they take is for `ireasoner bench` to say."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import pytest
import torch
from PIL import Image

from ireasoner.app.cli import main
from ireasoner.method.memory import step_digest
from ireasoner.method.scoring import Context, score_group
from ireasoner.method.texts import parse_trajectory, solver_messages
from ireasoner.model.attention import SharedCache
from ireasoner.model.inputs import encode_images, token_texts
from ireasoner.rollouts.engine import Request
from ireasoner.studies.bench import QUESTION, Bench, Phases, load_bench, measure, readable, table
from ireasoner.training.config import resolve
from ireasoner.training.selfplay import BlankImages
from models import load


def test_the_plain_side_shares_no_prompt(pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch):
    shared: list[SharedCache] = []

    make = SharedCache.__init__

    def counted(self: SharedCache, *args: Any, **kwargs: Any) -> None:
        shared.append(self)
        make(self, *args, **kwargs)

    policy = load()
    monkeypatch.setattr(SharedCache, "__init__", counted)
    runner = Bench(policy, resolve({"model": "tiny", "images": "."}), 4)
    for side, caches in ((runner.plain, 0), (runner.ours, 2)):  # the question's and the answers'
        shared.clear()
        side(Phases(perf_counter), pictures[:1])
        assert len(shared) == caches
        assert (policy.shares_prompts, policy.shares_attention) == (True, True)


def test_both_sides_write_and_reward_whole_groups_of_the_forced_length(monkeypatch: pytest.MonkeyPatch):
    bench = load_bench("tiny", tokens=48, group_size=3, device="cpu")
    drawn: list[Any] = []
    sample = bench.engine.sample

    def noted(*args: Any, **kwargs: Any) -> Any:
        drawn.append(sample(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(bench.engine, "sample", noted)
    for side, rows in ((bench.ours, [3, 3]), (bench.plain, [1] * 6)):
        drawn.clear()
        side(phases := Phases(perf_counter), bench.pictures(2))
        assert [len(group) for group in drawn[-1]] == rows
        assert {len(completion.token_ids) for group in drawn[-1] for completion in group} == {48}
        assert set(phases.took) == {"encode images", "propose", "prefill", "decode", "read and reward", "update"}


def test_groups_are_rewarded_as_the_recipe_default_does_it():
    """By how much likelier the image makes the steps, less what recurs among earlier groups."""
    bench = load_bench("tiny", tokens=32, group_size=3, device="cpu")
    (image,), policy, recipe = bench.pictures(1), bench.policy, bench.config.recipe
    request = Request(encode_images(policy, [image])[0], solver_messages(bench.config.sampling.solver_prompt, QUESTION))
    (group,) = bench.engine.sample([request], "solver", n=3, max_tokens=32)
    texts = [readable(completion.text) for completion in group]
    images = BlankImages(policy, 3072)
    blank = images.logprobs(request, group)

    def paid(*recent: frozenset[str]) -> Any:
        context = Context(
            step_weight=0.5, recent_steps=recent, logprobs=[c.logprobs for c in group], blank_logprobs=lambda: blank,
            tokens=[token_texts(policy.processor, c.token_ids) for c in group],
        )  # fmt: skip
        return score_group(QUESTION, texts, recipe, context)

    said = {step_digest(step) for text in texts for step in parse_trajectory(text).reasoning_steps}
    first, again = paid(), paid(frozenset(said))
    assert any(t.parts["step_agreement"].value for t in first.trajectories)
    assert bench.reward(group, request, images) == pytest.approx(first.rewards)
    assert bench.reward(group, request, images) == pytest.approx(again.rewards)
    assert first.rewards[0] > again.rewards[0]


def test_the_published_side_is_named_where_it_is(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "--sides", "ours", "published"]) == 2
    message = capsys.readouterr().err
    assert "benchmarks/published_step.py" in message
    assert message.count("\n") == 1


def test_any_text_becomes_a_readable_trajectory_of_three_steps():
    solution = parse_trajectory(readable("<think> The red bar reaches 7 </answer and so on and on"))
    assert solution.well_formed
    assert len(solution.reasoning_steps) == 3
    assert "red bar" in " ".join(solution.reasoning_steps)


def test_ours_is_compared_with_plain_and_with_its_floors():
    bench = load_bench("tiny", tokens=2, group_size=2, image_tokens=16, device="cpu")
    (row,) = measure(bench, {"ours": bench.ours, "plain": bench.plain}, [1], 1)["sizes"]
    ours, plain = row["sides"]["ours"], row["sides"]["plain"]
    assert all(
        ours["floor_seconds"][phase] > 0 for phase in ("encode images", "propose", "prefill", "decode", "update")
    )
    assert plain["times_ours"]["median"] == pytest.approx(plain["step_seconds"] / ours["step_seconds"])
    title, rows = table(row)
    assert title.startswith("1 images a step, 16 tokens each")
    assert rows[0] == ["", "ours", "plain", "ours / floor"]
    assert {len(cells) for cells in rows} == {4}
    (whole,) = (cells[-1] for cells in rows if cells[0] == "whole step")
    assert float(whole) == pytest.approx(ours["step_seconds"] / sum(ours["floor_seconds"].values()), rel=0.01)


def test_a_model_with_random_weights_takes_images_above_the_tiny_model_s_limit():
    bench = load_bench("random-25m", image_tokens=1600, device="cpu")
    assert (bench.config.backbone.dtype, bench.policy.backbone.dtype) == ("float32", torch.float32)
    assert sum(p.numel() for p in bench.policy.backbone.parameters()) > 25e6
    assert len(encode_images(bench.policy, bench.pictures(1))[0].pooled) == 1600
