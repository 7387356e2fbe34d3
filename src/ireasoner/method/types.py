"""The records that flow through a run. All are frozen: a stage makes new ones and never edits old ones.

A *step* is the training counter; a unit of thought inside a trajectory is a *reasoning step*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


class UsageError(Exception):
    """Something that whoever runs the program can put right: one sentence: what is wrong, where, what to do."""


Role = Literal["proposer", "solver"]
ROLES: tuple[Role, ...] = ("proposer", "solver")
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model wrote, exactly as sampled.

    `token_ids` are the sampled ids and are never re-made from `text`; they include the end token when
    `finish_reason` is "stop". `logprobs` has one entry per token id: the log-probability under the distribution
    that was sampled from.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Question:
    """A proposer's text, read. `problem` says why it could not be read (None: it could)."""

    text: str
    rationale: str
    problem: str | None

    @property
    def well_formed(self) -> bool:
        return self.problem is None


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A solver's text, read. `problem` says why it could not be read (None: it could); then `answer` is None."""

    reasoning_steps: tuple[str, ...]
    answer: str | None
    words_before_answer: int
    problem: str | None

    @property
    def well_formed(self) -> bool:
        return self.problem is None


@dataclass(frozen=True, slots=True)
class StepScore:
    """What a reasoning step was compared with, and what it adds to its trajectory's step agreement.

    `similarity` is its leave-one-out similarity to the other trajectories of the group, in [0, 1]; `recurrence` the
    share of other images' groups that claim it too; `score` is what the reward's mean over steps reads. None where
    there was nothing to compare, or the reward leaves the step out.
    """

    similarity: float | None
    recurrence: float
    score: float | None


@dataclass(frozen=True, slots=True)
class Episode:
    """One image's whole self-play: a question, a group of trajectories and what each of them earned.

    `answer_keys`, `rewards`, `step_scores` and the values of `reward_parts` run parallel to `trajectories`; an
    unreadable trajectory has the key None. An unreadable question leaves the group empty. `question_completion` is None
    where the question came with the image (labels) and was not proposed; then `true_answer` came with it.
    """

    step: int
    image: str
    question: Question
    question_completion: Completion | None
    proposer_reward: float
    trajectories: tuple[Trajectory, ...]
    completions: tuple[Completion, ...]
    answer_keys: tuple[str | None, ...]
    majority_answer: str | None
    majority_fraction: float
    answer_entropy: float
    rewards: tuple[float, ...]
    reward_parts: Mapping[str, tuple[float, ...]]
    step_weight: float
    step_scores: tuple[tuple[StepScore, ...], ...]
    true_answer: str | None
