"""Run directories made by hand: records with texts of any kind, as the recorder writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ireasoner.method.types import Completion, Episode, Question, StepScore, Trajectory
from ireasoner.training.config import dump_config, resolve
from ireasoner.training.recorder import Recorder, episode_record

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
    "reward/proposer/total": 0.3, "answers/majority_fraction": 0.7, "answers/entropy": 0.8, "kl/solver": 0.01,
    "kl/proposer": 0.0, "kl_coef/solver": 0.001, "kl_coef/proposer": 0.001, "length/solver": 30.0,
    "length/proposer": 12.0, "well_formed/solver": 1.0, "well_formed/proposer": 1.0, "questions/distinct": 0.9,
    "token_entropy/solver": 0.2, "watch/blank_survival": 0.3, "watch/distinct_questions": 0.9,
    "time/step_seconds": 1.5,
}  # fmt: skip


def new_run(path: Path, **options: Any) -> Recorder:
    """A run directory that holds nothing but its config."""
    recorder = Recorder(path)
    flags = {"images": "/pictures", "model": "tiny", "steps": 3, **options}
    recorder.write_text("config.yaml", dump_config(resolve(flags)))
    return recorder


def with_metrics(recorder: Recorder, steps: int = 3, **values: float) -> Recorder:
    for step in range(1, steps + 1):
        recorder.metrics(step, METRICS | values)
    return recorder


def episode(text: str = "7", step: int = 1, question: str = "How many?", **changes: Any) -> dict[str, Any]:
    """A recorded episode of two readable trajectories and an unreadable one, whose terms add up under `default`."""
    trajectories = (
        Trajectory((f"I see {text}.", "So it is."), text, 8, None),
        Trajectory(("Another.",), text, 4, None),
        Trajectory((), None, 4, f"no closed <think>: {text}"),
    )
    outcome = (2 / 3) ** 0.7
    parts = {"outcome": (outcome, outcome, 0.0), "step_agreement": (0.5, 0.25, 0.0)}
    record = episode_record(
        Episode(
            step=step, image=f"{text}.png", question=Question(question, text, None),
            question_completion=Completion(text, (1, 2), (-0.5, -0.25), "stop"), proposer_reward=0.125,
            trajectories=trajectories, completions=(Completion(text, (3,), (-1.0,), "stop"),) * 3,
            answer_keys=("k", "k", None), majority_answer="k", majority_fraction=2 / 3, answer_entropy=0.0,
            rewards=tuple(0.5 * a + 0.5 * b for a, b in zip(*parts.values(), strict=True)), reward_parts=parts,
            step_weight=0.5,
            step_scores=((StepScore(0.5, 0.0, 0.5), StepScore(None, 0.0, None)), (StepScore(0.25, 0.0, 0.25),), ()),
            true_answer=None,
        )
    )  # fmt: skip
    return record | changes


def unreadable(step: int = 1, text: str = "?") -> dict[str, Any]:
    """A recorded episode whose question could not be read."""
    nothing = Episode(
        step=step, image="a.png", question=Question("", "", "no closed <question>"),
        question_completion=Completion(text, (1,), (-1.0,), "stop"), proposer_reward=0.0, trajectories=(),
        completions=(), answer_keys=(), majority_answer=None, majority_fraction=0.0, answer_entropy=0.0, rewards=(),
        reward_parts={"outcome": (), "step_agreement": ()}, step_weight=0.5, step_scores=(), true_answer=None,
    )  # fmt: skip
    return episode_record(nothing)
