"""Floors: bounds that hold for every run, whatever it was like at its beginning.

The watch compares a run with its own start, so it cannot see that a run was dead from the start, and it needs two
windows before it says anything. A floor needs a few steps. Where nothing can be learned any more, it ends the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ireasoner.method.types import Episode

WARNS_AFTER = 5  # steps in a row


@dataclass(frozen=True)
class Floor:
    """A bound on a signal. It is broken while `warns` holds, and the run ends where `ends` holds for long.

    Attributes:
        signal: which one. A step at which it is not measured is passed over.
        meaning: what a broken floor means, for people.
        warns: whether a value breaks the floor.
        ends: whether it is so bad that nothing can be learned (None: it only warns).
        ends_after: steps in a row, all of them this bad, after which the run ends.
        warns_after: steps in a row after which a broken floor is reported.
    """

    signal: str
    meaning: str
    warns: Callable[[float], bool]
    ends: Callable[[float], bool] | None = None
    ends_after: int = 15
    warns_after: int = WARNS_AFTER


def _at_most(bound: float) -> Callable[[float], bool]:
    return lambda value: value <= bound


def _above(bound: float) -> Callable[[float], bool]:
    return lambda value: value > bound


# In the order of cause and effect: where questions cannot be read there are no solutions, and without solutions no
# rewards. The runs of docs/experiments.md that learn stay far from all of these: their readable share is above 0.9 and
# their KL below 0.1. Rewards that are all zero are given more time, because true answers to hard questions may be rare.
# The mean gap that half precision makes is below 0.04 nats a token there. At 0.15, the sampler is about as far from the
# learner as the KL's target lets the learner go from its reference.
FLOORS = (
    Floor("finite", "gradients are not finite, and such updates are left out", _at_most(0.5), _at_most(0.5), 10),
    Floor("readable_questions", "hardly any question can be read", _at_most(0.1), _at_most(0.02)),
    Floor("readable", "hardly any solution can be read", _at_most(0.1), _at_most(0.02)),
    Floor("paid", "every reward is zero", _at_most(0.0), _at_most(0.0), ends_after=50),
    Floor("advantage_std", "the rewards of a step are all the same, so there is nothing to learn from", _at_most(1e-6)),
    Floor("kl", "the model has moved very far from the one it started from", _above(0.5), _above(2.0), 10),
    Floor("mean_sampler_gap", "the sampler seems to be another model than the learner", _above(0.15)),
    Floor("moved", "the solver's adapter is as it was at the start", _at_most(0.0), _at_most(0.0), 50, warns_after=15),
    Floor("kl", "the model hardly moves: the learning rate may be too small", _at_most(1e-5), warns_after=15),
    Floor("majority_fraction", "every group agrees, so that votes say nothing", _above(0.999), warns_after=15),
    Floor("distinct_questions", "nearly all questions are the same", _at_most(0.05), warns_after=15),
    Floor("token_entropy", "sampling is as good as deterministic", _at_most(1e-3), warns_after=15),
    Floor("repetition", "solutions are little but repetition", _above(0.9), warns_after=15),
)


@dataclass(frozen=True)
class Broken:
    """A floor that has been broken for some steps, with the signal's last value.

    `began` is the first of these steps. `ends` tells whether nothing can be learned any more.
    """

    floor: Floor
    value: float
    began: int
    ends: bool


class Floors:
    """Takes the signals of one step after another and keeps count of the floors that are broken."""

    def __init__(self) -> None:
        self._began: dict[Floor, int] = {}  # the step since which a floor is broken
        self._broken_for: dict[Floor, int] = {}  # measured steps in a row
        self._ending_for: dict[Floor, int] = {}
        self._values: dict[Floor, float] = {}
        self.broken: list[Broken] = []  # for so long that it should be known; the cause first

    def observe(self, step: int, signals: Mapping[str, float | None]) -> None:
        """Take the signals of a step. A signal that was not measured is missing, None or not finite."""
        for floor in FLOORS:
            value = signals.get(floor.signal)
            if value is None or not math.isfinite(value):
                continue
            if not floor.warns(value):
                for counts in (self._began, self._broken_for, self._ending_for, self._values):
                    counts.pop(floor, None)
                continue
            self._values[floor] = value
            self._began.setdefault(floor, step)
            self._broken_for[floor] = self._broken_for.get(floor, 0) + 1
            ends = floor.ends is not None and floor.ends(value)
            self._ending_for[floor] = self._ending_for.get(floor, 0) + 1 if ends else 0
        self.broken = [
            Broken(floor, self._values[floor], self._began[floor], self._ending_for[floor] >= floor.ends_after)
            for floor in FLOORS
            if self._broken_for.get(floor, 0) >= floor.warns_after
        ]

    def began(self) -> set[int]:
        """The steps since which those floors are broken that may end the run."""
        return {step for floor, step in self._began.items() if floor.ends is not None}


def floor_signals(episodes: Sequence[Episode], learned: Mapping[str, float], moved: float) -> dict[str, float]:
    """The signals of a step that only floors read, by name.

    Args:
        episodes: those of the step.
        learned: the metrics of the step's updates, as `ireasoner.training.teaching.update` gives them.
        moved: the largest entry of the solver's LoRA matrices B, which start at 0.
    """
    rewards = [reward for e in episodes for reward in e.rewards]
    norms, gaps = (
        [value for name, value in learned.items() if name.startswith(f"{metric}/")]
        for metric in ("grad_norm", "mean_sampler_gap")
    )
    found = {"readable_questions": fmean(e.question.well_formed for e in episodes), "moved": moved}
    if rewards:
        found["paid"] = fmean(reward != 0 for reward in rewards)
    if norms:
        found["finite"] = fmean(math.isfinite(norm) for norm in norms)
    if gaps:
        found["mean_sampler_gap"] = max(gaps)
    if "kl/solver" in learned:
        found |= {"kl": learned["kl/solver"], "advantage_std": learned["advantage_std/solver"]}
    return found


def common_problem(episodes: Sequence[Episode]) -> str | None:
    """The most frequent reason why texts could not be read, such as "cut off"; None if most could be read."""
    problems = [e.question.problem for e in episodes] + [t.problem for e in episodes for t in e.trajectories]
    return max(problems, key=problems.count)
