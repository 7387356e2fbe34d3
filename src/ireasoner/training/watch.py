"""The watch: label-free signs of a run that eats itself, and when to end it and go back.

Whoever learns from their own agreement becomes surer with every step, and a surer vote is also what learning looks
like. So each signal is compared, as a mean over a window of steps, with the run's own early steps, and has two bounds:
beyond the first it has left its healthy range, beyond the second it alarms. An alarm that lasts ends the run, which
goes back to before any signal left its range. The bounds lie outside what healthy runs reached (docs/experiments.md).
They cannot tell a right consensus from a wrong one. All of it follows from the recorded metrics and episodes.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ireasoner.method.types import Episode, Trajectory


def _from_one(share: float) -> float:
    return 1 - share


def _inverse(value: float) -> float:
    return 1 / value if value > 0 else math.inf


@dataclass(frozen=True)
class Rule:
    """One way to fail. `room` says how far a signal's mean is from ruin, where it is 0.

    The signal has left its healthy range when less than `healthy` of the reference's room is left, and alarms at less
    than `alarm`. The reference is the run's first window that counts, or its best one so far.
    """

    signal: str
    meaning: str
    room: Callable[[float], float]
    healthy: float
    alarm: float
    against_best: bool = False


RULES = (
    Rule("majority_fraction", "the group agrees whatever is asked", _from_one, 0.5, 0.4),
    Rule("majority_fraction", "agreement that had been won is lost again", float, 0.9, 0.8, against_best=True),
    Rule("answer_entropy", "answers lose their diversity", float, 0.5, 0.4),
    Rule("token_entropy", "sampling has become deterministic", float, 0.5, 0.3),
    Rule("token_entropy", "sampling has become random", _inverse, 0.6, 0.4),
    Rule("length", "solutions shrink", float, 0.6, 0.4),
    Rule("length", "solutions swell", _inverse, 0.6, 0.4),
    Rule("repetition", "solutions repeat themselves", _from_one, 0.9, 0.8),
    Rule("readable", "texts can no longer be read", float, 0.95, 0.9),
    Rule("distinct_questions", "the same questions come again and again", float, 0.6, 0.4),
    Rule("recurrence", "the same reasoning is given to every image", _from_one, 0.65, 0.6),
    Rule("blank_survival", "majority answers no longer need the image", _from_one, 0.5, 0.3),
)
STANDARD_ERRORS = 4.0  # that two windows must be apart as well: with few images a step, means are noisy


@dataclass(frozen=True)
class Sign:
    """What the watch makes of a signal: the means that it compares, the trouble that it sees in them, if any."""

    signal: str
    reference: float
    recent: float
    trouble: str | None
    alarms: bool


@dataclass(frozen=True)
class Alarm:
    """Why a run should end, in words, and the last step known to be healthy."""

    reason: str
    healthy_step: int


class Watch:
    """Takes the signals of one step after the other and says when to stop.

    Args:
        window: steps that are averaged; a fifth of it passes before the reference, an alarm lasts for half of it.
    """

    def __init__(self, window: int) -> None:
        self.window, self.settling, self.patience = window, window // 5, max(1, window // 2)
        self.alarm: Alarm | None = None
        self._step = 0
        self._series: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self._references: dict[Rule, tuple[float, float]] = {}
        self._left: dict[Rule, int] = {}  # since which step a signal has been outside its healthy range
        self._alarmed: dict[Rule, int] = {}  # for how many steps on end

    def observe(self, step: int, signals: Mapping[str, float | None]) -> None:
        """Take a step's signals, after which `alarm` may be set; what was not measured is left out, None or NaN."""
        self._step = step
        for name, value in signals.items():
            if step > self.settling and value is not None and math.isfinite(value):
                self._series[name].append((step, value))
        reasons = [reason for rule in RULES if (reason := self._judge(rule))]
        if reasons and self.alarm is None:
            self.alarm = Alarm("; ".join(reasons), min(self.may_return_to()))

    def recall(self, record: Mapping[str, Any]) -> None:
        """Take a step's signals from its line of `metrics.jsonl`."""
        signals = {name.removeprefix("watch/"): value for name, value in record.items() if name.startswith("watch/")}
        self.observe(record["step"], signals)

    def may_return_to(self) -> set[int]:
        """After which steps a checkpoint may be needed: from before every excursion that goes on, and before now."""
        return {max(0, step - self.window) for step in (self._step, *self._left.values())}

    def signs(self) -> list[Sign]:
        """Every signal that can be judged by now, by its worst rule; what an alarm needs is that it lasts."""
        found: dict[str, Sign] = {}
        for rule in RULES:
            recent, reference = self._mean(rule.signal, self._step), self._references.get(rule)
            if recent is None or reference is None:
                continue
            trouble = rule.meaning if rule in self._left else None
            alarms = self._alarmed.get(rule, 0) >= self.patience
            sign = Sign(rule.signal, reference[0], recent[0], trouble, alarms)
            known = found.get(rule.signal)
            if known is None or (sign.alarms, bool(sign.trouble)) > (known.alarms, bool(known.trouble)):
                found[rule.signal] = sign
        return list(found.values())

    def _judge(self, rule: Rule) -> str | None:
        """Keep account of one rule; what it says if it has alarmed for long enough."""
        recent, reference = self._mean(rule.signal, self._step), self._reference(rule)
        if recent is None or reference is None:
            return None
        room, had = rule.room(recent[0]), rule.room(reference[0])
        clear = abs(recent[0] - reference[0]) > STANDARD_ERRORS * math.sqrt(recent[1] + reference[1])
        if not clear or room >= rule.healthy * had:
            self._left.pop(rule, None)
            self._alarmed.pop(rule, None)
            return None
        self._left.setdefault(rule, self._step)
        self._alarmed[rule] = self._alarmed.get(rule, 0) + 1 if room < rule.alarm * had else 0
        name = rule.signal.replace("_", " ")
        lasts = self._alarmed[rule] >= self.patience
        return f"{rule.meaning} ({name} from {reference[0]:.3g} to {recent[0]:.3g})" if lasts else None

    def _reference(self, rule: Rule) -> tuple[float, float] | None:
        """What a signal is compared with: steps that do not overlap the recent ones."""
        series, before = self._series[rule.signal], self._step - self.window
        known = self._references.get(rule)
        if series and before >= (first := series[0][0] + self.window - 1) and (known is None or rule.against_best):
            found = self._mean(rule.signal, before if rule.against_best else first)
            if found and (known is None or found[0] > known[0]):
                self._references[rule] = found
        return self._references.get(rule)

    def _mean(self, signal: str, last: int) -> tuple[float, float] | None:
        """Mean of a signal over the window up to a step, and its squared error; None if measured less than twice."""
        values = []
        for step, value in reversed(self._series[signal]):
            if step <= last - self.window:
                break
            if step <= last:
                values.append(value)
        if len(values) < 2:
            return None
        mean = fmean(values)
        return mean, math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)


class Signals:
    """Measures a step's episodes against what the last groups said.

    Args:
        groups: how many groups are remembered.
    """

    def __init__(self, groups: int) -> None:
        self._memory: deque[tuple[str, str, frozenset[str]]] = deque(maxlen=groups)

    def remember(self, episode: Episode) -> None:
        """Add an episode's group: its image, its question and the reasoning steps of all its trajectories."""
        if episode.trajectories:
            said = frozenset(_normal(step) for t in episode.trajectories for step in t.reasoning_steps)
            self._memory.append((episode.image, episode.question.text, said))

    def measure(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """A step's signals; its groups are remembered. What nothing can be said about is left out."""
        groups = [e for e in episodes if e.trajectories]
        formed = [sum(t.well_formed for t in e.trajectories) / max(1, len(e.trajectories)) for e in episodes]
        if not groups:
            return {"readable": fmean(formed)}
        for e in groups:
            self.remember(e)
        written = [t for e in groups for t in e.trajectories]
        tokens = sum(t.num_tokens for t in written)
        surprise = math.fsum(-(t.mean_sampler_logprob or 0.0) * t.num_tokens for t in written)
        found = {
            "readable": fmean(formed),
            "majority_fraction": fmean(e.majority_fraction for e in groups),
            "answer_entropy": fmean(e.answer_entropy for e in groups),
            # The mean surprise of what was sampled is an unbiased estimate of the entropy that it was sampled with.
            "token_entropy": surprise / max(1, tokens),
            "length": tokens / len(written),
            "repetition": fmean(repeated_share(t.text) for t in written),
        }
        if len(self._memory) == self._memory.maxlen:
            found["distinct_questions"] = len({question for _, question, _ in self._memory}) / len(self._memory)
            recurring = [self._recurrence(t, e) for e in groups for t in e.trajectories if t.reasoning_steps]
            found |= {"recurrence": fmean(recurring)} if recurring else {}
        return found

    def _recurrence(self, trajectory: Trajectory, own: Episode) -> float:
        """Share of a trajectory's steps that other images' groups with other questions hold too."""
        others = [said for image, text, said in self._memory if image != own.image and text != own.question.text]
        return fmean(any(step in said for said in others) for step in map(_normal, trajectory.reasoning_steps))


def repeated_share(text: str) -> float:
    """Share of a text's word 4-grams that have occurred in it before."""
    words = text.casefold().split()
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _normal(step: str) -> str:
    return " ".join(re.findall(r"\w+", step.casefold()))
