"""The watch: recognises, without labels, that a run is collapsing, and says when to end it and where to go back to.

A model that learns from its own agreement becomes surer with every step, and so does a model that learns well: a single
value says little. The watch therefore compares each signal, averaged over a window of steps, with the early steps of
the same run. Each signal has two bounds: beyond the first it has left its healthy range, beyond the second it alarms.
An alarm that lasts ends the run, which returns to a checkpoint from before any signal left its healthy range. Beside
these comparisons stand the absolute bounds of `floors`.

The bounds were set outside of what healthy runs reached (docs/experiments.md). Without labels they cannot tell a right
consensus from a wrong one. The watch depends only on recorded metrics and episodes, so a resumed run rebuilds it from
its records.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from statistics import fmean
from typing import Any

from ireasoner.method.types import Episode, Trajectory
from ireasoner.training.config import Config
from ireasoner.training.floors import Broken, Floors

ENDED_ITSELF = 3  # exit code of `train` for a run that ended itself, or that learned nothing
CONTROLS = ("random", "format")  # rewards of controls, which are expected to teach nothing


def _below_one(share: float) -> float:
    return 1 - share


def _inverse(value: float) -> float:
    return 1 / value if value > 0 else math.inf


@dataclass(frozen=True)
class Rule:
    """One way in which a run can fail.

    `room` says how far the mean of a signal is from total failure, where the room is 0. When less than the share
    `healthy` of the reference's room is left, the signal has left its healthy range; at less than `alarm`, it alarms.
    The reference is the run's first window, or with `against_best` the window with the highest mean so far.
    """

    signal: str
    meaning: str
    room: Callable[[float], float]
    healthy: float
    alarm: float
    against_best: bool = False


RULES = (
    Rule("majority_fraction", "the group agrees whatever is asked", _below_one, 0.5, 0.4),
    Rule("majority_fraction", "agreement that had been won is lost again", float, 0.9, 0.8, against_best=True),
    Rule("answer_entropy", "answers lose their diversity", float, 0.5, 0.4),
    Rule("token_entropy", "sampling has become deterministic", float, 0.5, 0.3),
    Rule("token_entropy", "sampling has become random", _inverse, 0.6, 0.4),
    Rule("length", "solutions shrink", float, 0.6, 0.4),
    Rule("length", "solutions swell", _inverse, 0.6, 0.4),
    Rule("repetition", "solutions repeat themselves", _below_one, 0.9, 0.8),
    Rule("readable", "texts can no longer be read", float, 0.95, 0.9),
    Rule("distinct_questions", "the same questions come again and again", float, 0.6, 0.4),
    Rule("recurrence", "the same reasoning is given to every image", _below_one, 0.65, 0.6),
    Rule("majority_right", "the group agrees on what the labels say is wrong", float, 0.5, 0.4),
    Rule("blank_survival", "majority answers no longer need the image", _below_one, 0.5, 0.3),
)
# Two windows must also differ by this many standard errors: with few images in a step, their means are noisy.
STANDARD_ERRORS = 4.0


@dataclass(frozen=True)
class Sign:
    """How a rule judges the latest window of a signal, by its mean there and in the window that it is compared with.

    `trouble` is the rule's meaning if the signal has left its healthy range, otherwise None. `alarms` tells whether it
    has alarmed for so long that the run should end. For a broken floor, `reference` is None and `recent` is the last
    value.
    """

    signal: str
    reference: float | None
    recent: float
    trouble: str | None
    alarms: bool


@dataclass(frozen=True)
class Alarm:
    """Why a run should end, in words, and the last step at which every signal was healthy."""

    reason: str
    healthy_step: int


class Watch:
    """Takes the signals of one step after another and sets `alarm` when the run should end.

    The first fifth of a window is ignored while the run settles, and an alarm has to last for half a window. A run on
    labels alone is judged by floors alone: there, agreement is no sign of collapse. With the option `watch` off nothing
    ends a run, and floors do not end controls.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        window, watched = config.watch.watch_window, config.watch.watch
        self.window, self.settling, self.patience = window, window // 5, max(1, window // 2)
        self.rules = () if config.labelled_alone else RULES
        self.rules_end, self.floors_end = watched, watched and config.recipe.reward not in CONTROLS
        self.alarm: Alarm | None = None
        self.floors = Floors()
        self._step = 0
        self._series: dict[str, list[tuple[int, float]]] = defaultdict(list)  # (step, value) pairs by signal
        self._references: dict[Rule, tuple[float, float]] = {}
        self._left: dict[Rule, int] = {}  # the step at which a signal left its healthy range
        self._alarmed: dict[Rule, int] = {}  # for how many steps in a row a signal has alarmed
        self._signs: list[Sign] = []

    def observe(self, step: int, signals: Mapping[str, float | None]) -> str | None:
        """Take the signals of a step. A signal that was not measured is missing, None or not finite.

        Returns:
            A sentence about a floor that was not yet known to be broken; of several the first, which is the cause of
            the others. None if there is no such floor.
        """
        known = {broken.floor for broken in self.floors.broken}
        self._step = step
        self.floors.observe(step, signals)
        for name, value in signals.items():
            if step > self.settling and value is not None and math.isfinite(value):
                self._series[name].append((step, value))
        self._signs = [sign for rule in self.rules if (sign := self._judge(rule))]
        if self.alarm is None:
            self.alarm = self._find_alarm()
        return next((_warning(broken) for broken in self.floors.broken if broken.floor not in known), None)

    def _find_alarm(self) -> Alarm | None:
        """Why the run should end now: of broken floors the first, which is the cause of the others."""
        if self.floors_end and (ending := [broken for broken in self.floors.broken if broken.ends]):
            sign = _sign(ending[0])
            return Alarm(f"{sign.trouble} ({change(sign)})", max(0, ending[0].began - 1))
        alarming = [sign for sign in self._signs if sign.alarms and self.rules_end]
        if not alarming:
            return None
        return Alarm("; ".join(f"{sign.trouble} ({change(sign)})" for sign in alarming), min(self._before_decline()))

    def recall(self, record: Mapping[str, Any]) -> None:
        """Take the signals of a step from its line of `metrics.jsonl`."""
        signals = {name.removeprefix("watch/"): value for name, value in record.items() if name.startswith("watch/")}
        self.observe(record["step"], signals)

    def may_return_to(self) -> set[int]:
        """The steps whose checkpoints an alarm, now or later, may ask for."""
        return self._before_decline() | {step - 1 for step in self.floors.began()}

    def _before_decline(self) -> set[int]:
        """One window before now, and one window before each signal left the healthy range that it is still outside of.

        The window in which an excursion is noticed may hold steps that were unhealthy already.
        """
        return {max(0, step - self.window) for step in (self._step, *self._left.values())}

    def signs(self) -> list[Sign]:
        """Every signal that can be judged by now, each as the rule that sees most trouble in it judges it."""
        by_signal: dict[str, list[Sign]] = defaultdict(list)
        for sign in [*map(_sign, self.floors.broken), *self._signs]:
            by_signal[sign.signal].append(sign)
        return [max(signs, key=lambda sign: (sign.alarms, sign.trouble is not None)) for signs in by_signal.values()]

    def _judge(self, rule: Rule) -> Sign | None:
        """Judge the latest window by a rule and keep count of its alarms; None if too little was measured."""
        recent, reference = self._mean(rule.signal, self._step), self._reference(rule)
        if recent is None or reference is None:
            return None
        room, initial_room = rule.room(recent[0]), rule.room(reference[0])
        differs = abs(recent[0] - reference[0]) > STANDARD_ERRORS * math.sqrt(recent[1] + reference[1])
        if differs and room < rule.healthy * initial_room:
            self._left.setdefault(rule, self._step)
            self._alarmed[rule] = self._alarmed.get(rule, 0) + 1 if room < rule.alarm * initial_room else 0
        else:
            self._left.pop(rule, None)
            self._alarmed.pop(rule, None)
        trouble = rule.meaning if rule in self._left else None
        return Sign(rule.signal, reference[0], recent[0], trouble, self._alarmed.get(rule, 0) >= self.patience)

    def _reference(self, rule: Rule) -> tuple[float, float] | None:
        """Mean and squared standard error of the window to compare with, which does not overlap the latest window."""
        series, before = self._series[rule.signal], self._step - self.window
        known = self._references.get(rule)
        if series and before >= (first := series[0][0] + self.window - 1) and (known is None or rule.against_best):
            found = self._mean(rule.signal, before if rule.against_best else first)
            if found and (known is None or found[0] > known[0]):
                self._references[rule] = found
        return self._references.get(rule)

    def _mean(self, signal: str, last: int) -> tuple[float, float] | None:
        """Mean of a signal in the window that ends at step `last`, and its squared standard error.

        None if the signal was measured less than twice in that window.
        """
        series = self._series[signal]
        begin, end = (bisect_right(series, step, key=itemgetter(0)) for step in (last - self.window, last))
        values = [value for _, value in series[begin:end]]
        if len(values) < 2:
            return None
        mean = fmean(values)
        return mean, math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)


def _warning(broken: Broken) -> str:
    meaning = broken.floor.meaning
    return f"Warning: {meaning} ({change(_sign(broken))}, since step {broken.began})."


def _sign(broken: Broken) -> Sign:
    return Sign(broken.floor.signal, None, broken.value, broken.floor.meaning, broken.ends)


def change(sign: Sign) -> str:
    """From where to where a signal went, in words."""
    name = sign.signal.replace("_", " ")
    if sign.reference is None:
        return f"{name} {sign.recent:.3g}"
    return f"{name} from {sign.reference:.3g} to {sign.recent:.3g}"


class Signals:
    """Measures the signals of a step from its episodes and from the latest groups before them.

    All signals but `majority_right` are about the questions of the proposer, where it asks any: a few labelled ones
    come again and again.

    Args:
        groups: number of groups that are remembered.
        labelled_alone: whether the run asks labelled questions alone.
    """

    def __init__(self, groups: int, labelled_alone: bool = False) -> None:
        self.labelled_alone = labelled_alone
        self._memory: deque[tuple[str, str, frozenset[str]]] = deque(maxlen=groups)  # image, question, reasoning steps

    def remember(self, episode: Episode) -> None:
        """Add an episode's group to the memory. One without trajectories is passed over."""
        if episode.trajectories and self._counts(episode):
            said = frozenset(_normalized(step) for t in episode.trajectories for step in t.reasoning_steps)
            self._memory.append((episode.image, episode.question.text, said))

    def measure(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """The signals of a step by name, without those that cannot be measured. Its groups are remembered."""
        labelled = [e.majority_rightness for e in episodes if e.majority_rightness is not None]
        found = {"majority_right": fmean(labelled)} if labelled else {}
        counted = [e for e in episodes if self._counts(e)]
        return found | self._measure(counted) if counted else found

    def _counts(self, episode: Episode) -> bool:
        return self.labelled_alone or episode.true_answer is None

    def _measure(self, episodes: Sequence[Episode]) -> dict[str, float]:
        formed = [sum(t.well_formed for t in e.trajectories) / max(1, len(e.trajectories)) for e in episodes]
        found = {"readable": fmean(formed)}
        groups = [e for e in episodes if e.trajectories]
        if not groups:
            return found
        for e in groups:
            self.remember(e)
        trajectories = [t for e in groups for t in e.trajectories]
        tokens = sum(t.num_tokens for t in trajectories)
        surprise = math.fsum(-(t.mean_sampler_logprob or 0.0) * t.num_tokens for t in trajectories)
        found |= {
            "majority_fraction": fmean(e.majority_fraction for e in groups),
            "answer_entropy": fmean(e.answer_entropy for e in groups),
            # The mean of −log p over sampled tokens is an unbiased estimate of the entropy of the distribution.
            "token_entropy": surprise / max(1, tokens),
            "length": tokens / len(trajectories),
            "repetition": fmean(repeated_share(t.text) for t in trajectories),
        }
        if len(self._memory) == self._memory.maxlen:  # with fewer groups, these two would grow with the memory
            found["distinct_questions"] = len({question for _, question, _ in self._memory}) / len(self._memory)
            recurring = [self._recurrence(t, e) for e in groups for t in e.trajectories if t.reasoning_steps]
            found |= {"recurrence": fmean(recurring)} if recurring else {}
        return found

    def _recurrence(self, trajectory: Trajectory, own: Episode) -> float:
        """Share of a trajectory's reasoning steps that also occur with another question about another image."""
        others = [said for image, text, said in self._memory if image != own.image and text != own.question.text]
        return fmean(any(step in said for said in others) for step in map(_normalized, trajectory.reasoning_steps))


def repeated_share(text: str) -> float:
    """Share of a text's word 4-grams that have already occurred in it."""
    words = text.casefold().split()
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _normalized(step: str) -> str:
    """A reasoning step without case and punctuation."""
    return " ".join(re.findall(r"\w+", step.casefold()))
