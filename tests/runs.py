"""Run directories made by hand: records with texts of any kind, and records that no run would write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ireasoner.method.rewards import proposer_reward
from ireasoner.method.scoring import Context, ScoredGroup, read_group, score_group
from ireasoner.method.texts import parse_trajectory
from ireasoner.method.types import (
    Episode,
    Part,
    ProbeAnswer,
    Proposal,
    Question,
    StepScore,
    TokenDistributions,
    Trajectory,
)
from ireasoner.playground import dataset, world
from ireasoner.training.config import dump_config, load_config, resolve
from ireasoner.training.recorder import Recorder, write_json

HOSTILE = (
    "<script>window.pwned = 1</script>",
    "</style></head><script src=//evil></script>",
    "\"'><img src=x onerror=window.pwned=1>",
    "{{ config }} {% for x in y %} {{ 7 * 7 }}",
    "<!-- --><iframe src=javascript:window.pwned=1></iframe>",
    "</title></div></article><b>bold</b>&lt;script&gt; &amp;lt; \x00 \u202e \ud800",
    "</script><script>window.pwned = 1</script>",
)
METRICS = {
    "reward/solver/total": 0.5, "reward/solver/outcome": 0.6, "reward/solver/step_agreement": 0.4,
    "reward/proposer/total": 0.3, "answers/majority_fraction": 0.7, "answers/answer_entropy": 0.8, "kl/solver": 0.01,
    "kl/proposer": 0.0, "kl_coef/solver": 0.001, "kl_coef/proposer": 0.001, "length/solver": 30.0,
    "length/proposer": 12.0, "well_formed/solver": 1.0, "well_formed/proposer": 1.0, "questions/distinct": 0.9,
    "token_entropy/solver": 0.2, "watch/blank_survival": 0.3, "watch/distinct_questions": 0.9,
    "time/step_seconds": 1.5,
}  # fmt: skip


class HandMade(Recorder):
    """Writes episodes and probes as they are given, so that a test can record what the real recorder would refuse."""

    def episode(self, episode: Episode | Mapping[str, Any]) -> None:
        self._append("episodes.jsonl", episode.model_dump(mode="json") if isinstance(episode, Episode) else episode)

    def probe(self, answer: ProbeAnswer | Mapping[str, Any]) -> None:
        self._append("probes.jsonl", answer.model_dump(mode="json") if isinstance(answer, ProbeAnswer) else answer)


def new_run(path: Path, **options: Any) -> HandMade:
    """A run directory that holds nothing but its config."""
    recorder = HandMade.open(path)
    flags = {"images": "/pictures", "model": "tiny", "steps": 3, **options}
    recorder.write_text("config.yaml", dump_config(resolve(flags)))
    return recorder


def with_metrics(recorder: HandMade, steps: int = 3, **values: float) -> HandMade:
    for step in range(1, steps + 1):
        recorder.metrics(step, METRICS | values)
    return recorder


def episode(text: str = "7", step: int = 1, question: str = "How many?", **changes: Any) -> dict[str, Any]:
    """The record of two readable trajectories and an unreadable one, whose rewards add up."""
    share = (2 / 3) ** 0.7

    def trajectory(agreement: float, scores: tuple[StepScore, ...], **read: Any) -> Trajectory:
        unreadable = read["problem"] is not None
        outcome = 0.0 if unreadable else share
        factors = {"share of the vote": outcome, "length": 1.0, "not said of other images": 1.0}
        notes = {"share of the vote": "(2/3)^0.7", "length": "words before the answer: 8"}
        parts = {"outcome": Part(value=outcome, weight=0.5, factors=factors, notes=notes)}
        parts["step_agreement"] = Part(value=agreement, weight=0.5)
        return Trajectory(
            text=text, finish_reason="stop", num_tokens=1, mean_sampler_logprob=-1.0, in_majority=not unreadable,
            reward=0.5 * outcome + 0.5 * agreement, parts=parts, step_scores=scores,
            answer=None if unreadable else text, answer_key=None if unreadable else "k", **read,
        )  # fmt: skip

    def score(similarity: float | None) -> StepScore:
        return StepScore(similarity=similarity, recurrence=0.0, score=similarity)

    steps = (f"I see {text}.", "So it is.")
    trajectories = (
        trajectory(0.5, (score(0.5), score(None)), reasoning_steps=steps, words_before_answer=8, problem=None),
        trajectory(0.25, (score(0.25),), reasoning_steps=("Another.",), words_before_answer=4, problem=None),
        trajectory(0.0, (), reasoning_steps=(), words_before_answer=4, problem=f"no closed <think>: {text}"),
    )
    record = Episode(
        step=step, image=f"{text}.png", question=Question(question, text, None), proposal=proposal(text),
        proposer_reward=proposer_reward(0.0), prompt=f"Answer: {question}", trajectories=with_advantages(trajectories),
        majority_answer="k", majority_fraction=2 / 3, answer_entropy=0.0, step_weight=0.5, true_answer=None,
    )  # fmt: skip
    return record.model_dump(mode="json") | changes


def with_advantages(trajectories: Sequence[Trajectory], advantage: str = "rloo") -> tuple[Trajectory, ...]:
    """Trajectories with what the group's own baseline would give them: the reward minus the mean of the others', or
    for GRPO minus the group's mean, by its standard deviation."""
    rewards = np.array([t.reward for t in trajectories])
    differences = rewards - rewards.mean()
    found = differences * len(rewards) / (len(rewards) - 1)
    if advantage == "grpo":
        found = differences / (rewards.std(ddof=1) + 1e-6)
    return tuple(t.model_copy(update={"advantage": a}) for t, a in zip(trajectories, found.tolist(), strict=True))


def proposal(text: str) -> Proposal:
    sampled = {"text": text, "finish_reason": "stop", "num_tokens": 2, "mean_sampler_logprob": -0.375}
    return Proposal(**sampled, prompt="Ask something.", advantage=-0.0625)


def unreadable(step: int = 1, text: str = "?") -> dict[str, Any]:
    """The record of an episode whose question could not be read."""
    return Episode(
        step=step, image="a.png", question=Question("", "", "no closed <question>"), proposal=proposal(text),
        proposer_reward=0.0, prompt="", trajectories=(), majority_answer=None, majority_fraction=0.0,
        answer_entropy=0.0, step_weight=0.5, true_answer=None,
    ).model_dump(mode="json")  # fmt: skip


def probe(step: int, image: str = "a.png", answer: str | None = "1", **changes: Any) -> dict[str, Any]:
    """The record of an answer to a probe."""
    record = ProbeAnswer(step=step, image=image, question="q", text="", answer=answer, reasoning_steps=())
    return record.model_dump(mode="json") | changes


# --- a whole run ------------------------------------------------------------------------------------------------------


def played_run(path: Path, recipe: str = "default", steps: int = 4, images_per_step: int = 4) -> None:
    """A finished run about pictures of the world, with its truth inside: what is written and paid is as in a real one.

    Only the texts are made up: each trajectory tells the true reasoning, or leaves out or exchanges its colours.
    """
    images, rng = path / "data" / "unlabeled", np.random.default_rng(0)
    dataset.write_unlabeled(images, 8)
    options = {"steps": steps, "images_per_step": images_per_step, "eval_data": "/test.jsonl", "recipe": recipe}
    recorder = new_run(path, images=str(images), probe_every=2, save_every=2, blank_every=2, **options)
    config = load_config(path / "config.yaml")
    pictures = list(dataset.load_truth(images).items())
    for step in range(1, steps + 1):
        for index in rng.choice(len(pictures), images_per_step, replace=False):
            name, picture = pictures[index]
            with Image.open(images / name) as image:
                thumbnail = recorder.thumbnail(image, f"{index:016x}")
            asked = world.sample_question(picture, rng)
            texts = [_solution(asked, rng) for _ in range(config.sampling.group_size)]
            context = Context(
                step_weight=0.5,
                recent_steps=[],
                embed=_embed,
                seed=(step,),
                tokens=[text.split() for text in texts],
                logprobs=[[-0.5] * len(text.split()) for text in texts],
                blank_logprobs=lambda texts=texts: [_without_image(text) for text in texts],
                distributions=lambda texts=texts: [TokenDistributions((0.5,) * len(t.split()), (2.0,)) for t in texts],
                likelihoods=lambda texts, view="same": [[-0.1 * len(follows)] for _, follows in texts],
                other_view=read_group(asked.text, [parse_trajectory(text) for text in reversed(texts)]),
            )
            scored = score_group(asked.text, texts, config.recipe, context)
            recorder.episode(_episode(step, name, thumbnail, asked.text, texts, scored, config.recipe.advantage))
        recorder.metrics(step, METRICS)
    for step in range(0, steps + 1, 2):
        for name, picture in pictures[:3]:
            asked = world.questions(picture)[0]
            recorder.probe(probe(step, name, asked.answer, question=asked.text, reasoning_steps=asked.steps))
    parts = {"before": 0.25, "after": 0.5, "difference": 0.25}
    summary = {
        part: {
            name: {"mean": mean, "low": mean - 0.125, "high": mean + 0.125, "p": 0.0123}
            for name in ("greedy", "mean@1", "maj@5", "pass@5")
        }
        for part, mean in parts.items()
    }
    summary["before"] |= {"questions": 8, "images": 4}
    recorder.write_text("summary.json", write_json({"stopped_early": False, "steps": steps, **summary}))
    recorder.write_text("versions.json", write_json({"ireasoner": "0", "torch": "0"}))
    (path / "checkpoints" / f"step-{steps:06d}").mkdir(parents=True)


def _solution(asked: world.WorldQuestion, rng: np.random.Generator) -> str:
    """A solver's text about a question: true, with colours exchanged, with a false answer, or unreadable."""
    kind = rng.integers(6)
    steps = [step.replace("red", "blue") if kind == 1 else step for step in asked.steps]
    steps = steps[:-1] if kind == 2 else steps
    answer = "nothing" if kind == 3 else asked.answer
    think = "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
    return f"<think>{think}" if kind == 4 else f"<think>{think}</think><answer>{answer}</answer>"


def _without_image(text: str) -> list[float]:
    """The log-probabilities of a text's words if nothing is seen: what has a number is less likely then."""
    return [-2.5 if any(map(str.isdigit, word)) else -0.5 for word in text.split()]


def _embed(texts: Any) -> np.ndarray:
    """Normalised counts of letters; zeros for an empty text."""
    counts = np.array([[text.count(chr(c)) for c in range(97, 123)] for text in texts], dtype=float).reshape(-1, 26)
    return counts / np.maximum(1e-9, np.linalg.norm(counts, axis=1, keepdims=True))


def _episode(
    step: int, image: str, thumbnail: str, asked: str, texts: list[str], scored: ScoredGroup, advantage: str
) -> Episode:
    vote = scored.vote
    trajectories = with_advantages([
        Trajectory(
            text=text, finish_reason="stop", num_tokens=len(text.split()), mean_sampler_logprob=-0.5, **dict(earned)
        )
        for text, earned in zip(texts, scored.trajectories, strict=True)
    ], advantage)  # fmt: skip
    return Episode(
        step=step, image=image, thumbnail=thumbnail, question=Question(asked, "It can be seen.", None),
        proposal=proposal(f"<question>{asked}</question>"), proposer_reward=scored.proposer_reward,
        prompt=f"<image>\n{asked}", trajectories=trajectories, majority_answer=vote.answer,
        majority_fraction=vote.fraction, answer_entropy=vote.entropy, step_weight=0.5, true_answer=None,
    )  # fmt: skip
