"""Is it working? Held-out accuracy, signs that need no labels, and a sentence that sums them up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ireasoner.method.types import Number, Record
from ireasoner.page.curves import series, smooth
from ireasoner.page.run import RecordedRun
from ireasoner.training.advice import advice
from ireasoner.training.energy import energy_line
from ireasoner.training.statistics import MEASURES, READABLE, STRICT
from ireasoner.training.watch import Sign

Tone = Literal["good", "bad", "unsure"]


@dataclass(frozen=True)
class Verdict:
    """What to make of a run, in one sentence, with what else should be known."""

    tone: Tone
    sentence: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A number that tells how a run stands: its name, its value now, and what it was before."""

    name: str
    value: str
    before: str
    tone: Tone | None = None


class Interval(Record):
    """A mean with its 95 % interval, as shares; `p` is the p-value of a difference."""

    mean: Number
    low: Number
    high: Number
    p: Number | None = None

    @property
    def percent(self) -> tuple[float, float, float]:
        """Mean, low and high in per cent."""
        return 100 * self.mean, 100 * self.low, 100 * self.high


@dataclass(frozen=True)
class Comparison:
    """One measure of held-out accuracy before and after training; the difference is paired by question.

    `asked` says on how many questions, and about how many images if that is known. `readable` is the share of the
    judged texts that could be read, before and after, where that is known.
    """

    name: str
    asked: str
    before: Interval
    after: Interval
    difference: Interval
    readable: tuple[float, float] | None = None

    @property
    def by_reading(self) -> float:
        """How much of the difference comes from more or fewer texts that can be read, as a share.

        Accuracy is the readable share times the accuracy among readable texts, and its difference is the difference of
        each factor times the mean of the other one (Kitagawa 1955). Where nothing could be read before, or after, the
        accuracy among readable texts is taken to be the same on both sides.
        """
        if self.readable is None or not any(self.readable):
            return 0.0
        pairs = zip((self.before.mean, self.after.mean), self.readable, strict=True)
        among = [right / share for right, share in pairs if share > 0]
        return (self.readable[1] - self.readable[0]) * sum(among) / len(among)


def comparisons(summary: Mapping[str, Any]) -> list[Comparison]:
    """Held-out accuracy in a run's `summary.json`; empty if none was measured or the file is not one of ours."""
    found = []
    try:
        asked, images = f"{int(summary['before']['questions'])} held-out questions", summary["before"].get("images")
        asked += f" about {int(images)} images" if images else ""
        for name in [n for n in (*MEASURES, *STRICT) if n in summary["difference"]]:  # the first one decides
            before, after, change = (
                Interval.model_validate(summary[p][name]) for p in ("before", "after", "difference")
            )
            shares = [summary[part].get(READABLE.get(name)) for part in ("before", "after")]
            readable = None if None in shares else (float(shares[0]), float(shares[1]))
            found.append(Comparison(name.replace("_", " "), asked, before, after, change, readable))
    except (KeyError, TypeError, ValueError, OverflowError):
        return []
    return found


def energy(summary: Mapping[str, Any]) -> str | None:
    """What energy a run took, by its `summary.json`; None if that was not measured or the file is not one of ours."""
    try:
        return energy_line(summary["energy"]) if summary.get("energy") else None
    except (KeyError, TypeError, ValueError):
        return None


def figures(run: RecordedRun) -> list[Figure]:
    """Three numbers: held-out accuracy, or the reward where none was measured; agreement; and what can be read.

    Those that come from the metrics are means over the first and the last twelfth of the steps.
    """
    found = comparisons(run.summary)[:1]
    shown = [_accuracy(comparison) for comparison in found]
    metrics = [("majority fraction", "answers/majority_fraction", "majority_fraction")]
    metrics += [("well-formed answers", "well_formed/solver", "readable")]
    if not found:
        metrics.insert(0, ("solver's reward", "reward/solver/total", ""))
    troubled = {sign.signal for sign in run.watch.signs() if sign.trouble}
    for name, metric, signal in metrics:
        values = smooth(series(run, metric)[1])
        if len(values):
            first, last = (f"{v:.3f}" if not signal else f"{100 * v:.1f} %" for v in (values[0], values[-1]))
            shown.append(Figure(name, last, f"{first} at the start", "bad" if signal in troubled else None))
    return shown


def _accuracy(comparison: Comparison) -> Figure:
    before, after = comparison.before.percent[0], comparison.after.percent[0]
    mean, low, high = comparison.difference.percent
    tone: Tone = ("unsure", "good", "bad")[_direction(comparison)]
    since = f"{before:.1f} % before: {mean:+.1f} points [{low:+.1f}, {high:+.1f}]"
    return Figure(f"{comparison.name} accuracy, held out", f"{after:.1f} %", since, tone)


def verdict(run: RecordedRun) -> Verdict:
    """Judge a run by its accuracy where labels were given, and by the label-free signs otherwise."""
    found = run.watch.signs()
    troubled = run.summary.get("stopped_early") or any(sign.trouble for sign in found)
    judged = _judge(run, found)
    return replace(judged, notes=(*_notes(run), *(advice(run.config) if troubled else ()), *judged.notes))


def learned_nothing(summary: Mapping[str, Any]) -> bool:
    """Whether a run ended with the solver that it started from."""
    return "solver" not in str(summary.get("trained_roles", "solver"))  # the file may hold anything


def _judge(run: RecordedRun, found: Sequence[Sign]) -> Verdict:
    accuracy = _judge_accuracy(comparisons(run.summary))
    if run.state == "ended itself":
        last, best, reason = (run.summary.get(name) for name in ("steps", "best_step", "reason"))
        ended = f"It went wrong: {reason}. The run ended itself after step {last} and went back to step {best}."
        return Verdict("bad", f"{ended} {accuracy.sentence}" if accuracy else ended)
    if run.state == "finished" and learned_nothing(run.summary):
        return Verdict("bad", "Nothing was learned: the solver is still the model that the run started from.")
    if accuracy:
        return accuracy
    if not run.metrics:
        return Verdict("unsure", "Nothing can be said yet: no step has been recorded.")
    if run.config.labelled_alone and not any(sign.trouble for sign in found):
        return Verdict("unsure", "It is paid for true answers: look at its reward, and at held-out questions.")
    return _judge_signs(found, run.step)


def _judge_signs(found: Sequence[Sign], step: int) -> Verdict:
    notes = (
        "These signs need no labels, and cannot tell a right consensus from a wrong one: "
        "labelled questions can (train --eval-data, or ireasoner eval). Where there are none, ireasoner label RUN asks "
        "you some of the model's own.",
    )
    if right := next((sign for sign in found if sign.signal == "majority_right"), None):
        notes = (
            f"The majority answers {100 * right.recent:.0f} % of the labelled questions that it is trained on rightly.",
        )
    if not found:
        return Verdict("unsure", f"Too early to say: {step} steps are fewer than two windows of the watch.", notes)
    if troubled := [sign for sign in found if sign.trouble]:
        what = "; ".join(f"{sign.trouble} ({_change(sign)})" for sign in troubled)
        if any(sign.alarms for sign in troubled):
            return Verdict("bad", f"It is going wrong: {what}.", notes)
        return Verdict("unsure", f"Keep an eye on it: {what}.", notes)
    shown = [_change(s) for s in found if s.signal in ("majority_fraction", "readable", "distinct_questions")]
    return Verdict("unsure", f"No sign of trouble: {', '.join(shown)}.", notes)


def _change(sign: Sign) -> str:
    since = "" if sign.reference is None else f"{sign.reference:.3g} → "
    return f"{sign.signal.replace('_', ' ')} {since}{sign.recent:.3g}"


def _notes(run: RecordedRun) -> list[str]:
    notes, state, steps = [], run.state, run.config.schedule.steps
    if run.damaged:
        notes.append(f"Lines of its files that are not valid records and were left out: {run.damaged}.")
    if run.gone:
        notes.append("The run directory is gone; this is what had been read of it.")
    if state == "running":
        notes.append(f"It is running: step {run.step} of {steps}.")
    elif state == "stopped" and run.step < steps:
        notes.append(f"It stopped after step {run.step} of {steps}; train --resume continues from its last checkpoint.")
    elif state == "stopped":
        notes.append("All steps were played, but the run was not finished: train --resume finishes it.")
    return notes


def _judge_accuracy(found: Sequence[Comparison]) -> Verdict | None:
    """The first measure decides by the interval of its difference; None if nothing was measured."""
    if not found:
        return None
    first, others = found[0], [other for other in found[1:] if other.name in MEASURES]
    before, after = first.before.percent[0], first.after.percent[0]
    mean, low, high = first.difference.percent
    told = f"{first.name} accuracy {before:.1f} % → {after:.1f} % ({mean:+.1f} points{_because(first)}, 95 % interval "
    told += f"{low:+.1f} to {high:+.1f}) on {first.asked}"
    rest = [
        f"{', '.join(names)} {words}"
        for direction, words in ((1, "rose"), (-1, "fell"), (0, "did not clearly move"))
        if (names := [other.name for other in others if _direction(other) == direction])
    ]
    more = f" Of the other measures, {'; '.join(rest)}." if rest else ""
    strict = next((other for other in found if other.name == f"strict {first.name}"), first)
    if (strict.before, strict.after) != (first.before, first.after):
        more += _strictly(strict)
    if _direction(first) > 0:
        return Verdict("good", f"The model got better: {told}.{more}")
    if _direction(first) < 0:
        return Verdict("bad", f"The model got worse: {told}.{more}")
    return Verdict("unsure", f"No difference is shown: {told}.{more}")


def _because(comparison: Comparison) -> str:
    """How much of a difference comes from reading, so that a gain in format is told from a gain in skill."""
    points = f"{100 * comparison.by_reading:+.1f}"
    if comparison.readable is None or float(points) == 0:
        return ""
    before, after = (100 * share for share in comparison.readable)
    more = "more" if after > before else "fewer"
    return f", of which {points} because {more} texts can be read ({before:.1f} % → {after:.1f} %)"


def _strictly(comparison: Comparison) -> str:
    """The same measure where only the very same answer is right, if that says something else."""
    before, after = comparison.before.percent[0], comparison.after.percent[0]
    mean, low, high = comparison.difference.percent
    return f" Judged strictly, it is {before:.1f} % → {after:.1f} % ({mean:+.1f} points, {low:+.1f} to {high:+.1f})."


def _direction(comparison: Comparison) -> int:
    """1 if the interval of the difference lies above 0, -1 if below; 0 if it holds 0."""
    return (comparison.difference.low > 0) - (comparison.difference.high < 0)
