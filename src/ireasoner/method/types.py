"""The records that flow through a run. All are frozen: a stage makes new ones and never edits old ones.

A *step* is the training counter; a unit of thought inside a trajectory is a *reasoning step*. `Completion` is what the
model sampled; `Question` and `Solution` are what was read in it; `Episode` is all that became of one image, and the
one record that is written, read, shown and analysed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field


class UsageError(Exception):
    """An error that the user can fix. Its message says in one sentence what is wrong, where, and what to do."""


Role = Literal["proposer", "solver"]
ROLES: tuple[Role, ...] = ("proposer", "solver")
FinishReason = Literal["stop", "length"]
Form = Literal["tags", "boxed", "answer-line"]
# Of an image: as it is; lightly changed, which should change no answer; with most of it black; gray all over.
Alteration = Literal["same", "light", "masked", "blank"]
Shown = Literal["image", "images", "clip"]  # what a prompt shows
Match = Literal["exact", "relaxed", "anls", "vqa"]  # how answers are judged, as `ireasoner.method.matching` says


class Truth(Protocol):
    """Ground truth about images, looked up by image name, for measuring. Methods return None where it is unknown."""

    def answer(self, image: str, question: str) -> str | None:
        """The true answer to a question about an image."""
        ...

    def step(self, image: str, reasoning_step: str) -> bool | None:
        """Whether a reasoning step is true of an image."""
        ...


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
class TokenDistributions:
    """The policy's next-token distributions π at the tokens of a completion, in nats; one number for each token.

    `entropies` are H(π); `certainties` are KL(U ‖ π), how far π is from the uniform distribution U over the vocabulary.
    """

    entropies: tuple[float, ...]
    certainties: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A proposer's text, read. `problem` says why it could not be read (None: it could)."""

    text: str
    rationale: str
    problem: str | None

    @property
    def well_formed(self) -> bool:
        return self.problem is None


# --- what is recorded -------------------------------------------------------------------------------------------------

# No record of ours comes near these bounds, and within them no sum overflows: a run directory may come from anywhere.
Number = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=0, le=10**9)]


class Record(BaseModel):
    """Part of what is written to a run directory; keys that are not known are ignored when it is read."""

    # Validators are built when they are first used, because --help needs none.
    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)


class StepScore(Record):
    """How a reasoning step was judged, and what it adds to its trajectory's step agreement.

    `similarity`, in [0, 1], is what its recipe's `step_measure` says of it: its leave-one-out similarity to the other
    trajectories of the group, how likely it was, or how much likelier the image makes it; `recurrence` is the share of
    other images' groups that say it too; `score` is what the reward's mean over steps reads. None where there was
    nothing to judge, or the reward leaves the step out.
    """

    similarity: Number | None
    recurrence: Number
    score: Number | None


class Part(Record):
    """One part of a reward, which is the sum of its parts' `weight` times `value`.

    `factors`, by name, multiply to the value; empty where the value is not a product. `notes` say in words, by the same
    names, what a factor was computed from, such as "(3/5)^0.7".
    """

    value: Number
    weight: Number = 1.0
    factors: dict[str, Number] = {}
    notes: dict[str, str] = {}


class Sampled(Record):
    """A completion without its token ids, which are too many to keep."""

    text: str
    finish_reason: FinishReason
    num_tokens: Whole
    mean_sampler_logprob: Number | None

    @staticmethod
    def fields_of(completion: Completion) -> dict[str, Any]:
        """What is kept of a completion, by the names of these fields."""
        mean = sum(completion.logprobs) / len(completion.logprobs) if completion.logprobs else None
        return {
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.token_ids),
            "mean_sampler_logprob": mean,
        }


class Proposal(Sampled):
    """What the proposer wrote under which prompt; the advantage is None where it trained nothing."""

    prompt: str
    advantage: Number | None = None


class Solution(Record):
    """A solver's text, read. `problem` says why it could not be read (None: it could); then `answer` is None."""

    reasoning_steps: tuple[str, ...]
    answer: str | None
    words_before_answer: Whole
    problem: str | None

    @property
    def well_formed(self) -> bool:
        return self.problem is None


class ScoredTrajectory(Solution):
    """What a solution earned.

    `answer_key` is None where the text could not be read. `rightness`, from 0 to 1, is what the label says of the
    answer; None where the question has none. `step_scores` has an entry for each reasoning step that was compared, from
    the first on.
    """

    answer_key: str | None
    in_majority: bool
    rightness: Number | None = None
    reward: Number
    parts: dict[str, Part]
    step_scores: tuple[StepScore, ...]


class Trajectory(ScoredTrajectory, Sampled):
    """What the solver wrote, how it was read, and what it earned; the advantage is None where it trained nothing."""

    advantage: Number | None = None


class Episode(Record):
    """One image's whole self-play: a question, a group of trajectories and what each of them earned.

    An unreadable question leaves the group empty. `proposal` is None where the question came with the image (labels);
    then `true_answer` came with it. `prompt` is the solver's, as the model read it; `step_weight` is λ.
    """

    schema_version: Literal[2] = 2
    step: Whole
    image: str
    thumbnail: str = ""
    question: Question
    proposal: Proposal | None
    proposer_reward: Number
    prompt: str
    trajectories: tuple[Trajectory, ...]
    majority_answer: str | None
    majority_fraction: Number
    answer_entropy: Number
    step_weight: Number
    true_answer: str | None

    @property
    def rewards(self) -> tuple[float, ...]:
        """What each trajectory earned."""
        return tuple(t.reward for t in self.trajectories)

    @property
    def majority_rightness(self) -> float | None:
        """How right the majority answer is by the label, from 0 to 1; None where the question has none."""
        if self.true_answer is None or not self.trajectories:
            return None
        return next((t.rightness for t in self.trajectories if t.in_majority), 0.0)


class ProbeAnswer(Record):
    """What the solver answered to one of the questions that are asked again and again."""

    step: Whole
    image: str
    thumbnail: str = ""
    question: str
    text: str
    answer: str | None
    reasoning_steps: tuple[str, ...]
