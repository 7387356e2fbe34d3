"""Is it working? A sentence that says so, and the signs behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any, Literal

from ireasoner.report.run import Run
from ireasoner.watch import RULES, STANDARD_ERRORS, Rule

Tone = Literal["good", "bad", "unsure"]
MEASURES = ("greedy", "mean@1", "maj@5", "pass@5")


@dataclass(frozen=True)
class Verdict:
    """What to make of a run, in one sentence, with what else should be known."""

    tone: Tone
    sentence: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sign:
    """A label-free sign: its mean over an early window of steps and over the last, and what that means."""

    signal: str
    early: float
    late: float
    trouble: str | None
    severe: bool


def verdict(run: Run) -> Verdict:
    """Accuracy where labels were given; what the label-free signs say otherwise, and of runs that are not done."""
    state, found, notes = run.state(), signs(run), []
    summary = run.summary or {}
    if run.damaged:
        notes.append(f"{run.damaged} lines of its files are no records and were left out.")
    if run.gone:
        notes.append("The run directory is gone; this is what was read of it before.")
    if state == "running":
        notes.append(f"It is running: step {run.step} of {run.config.steps}.")
    elif state == "stopped":
        notes.append(f"It stopped after step {run.step} of {run.config.steps}; train --resume goes on from there.")
    if state == "ended itself":
        notes += _accuracy(summary).notes
        accuracy = _accuracy(summary).sentence
        return Verdict(
            "bad",
            f"It went wrong: the run ended itself after step {summary.get('steps')} ({summary.get('reason')}) and went "
            f"back to step {summary.get('best_step')}.{' ' + accuracy if accuracy else ''}",
            tuple(notes),
        )
    if summary.get("difference"):
        accuracy = _accuracy(summary)
        return Verdict(accuracy.tone, accuracy.sentence, (*accuracy.notes, *notes))
    if not run.metrics:
        return Verdict("unsure", "Nothing can be said yet: no step has been recorded.", tuple(notes))
    notes.append(
        "These signs need no labels, and cannot tell a right consensus from a wrong one: "
        "labelled questions can (train --eval-data, or ireasoner eval)."
    )
    if not found:
        return Verdict("unsure", f"Too early to say: {run.step} steps are not two windows of the watch.", tuple(notes))
    if troubled := [sign for sign in found if sign.trouble]:
        what = "; ".join(dict.fromkeys(f"{sign.trouble} ({_change(sign)})" for sign in troubled))
        if any(sign.severe for sign in troubled):
            return Verdict("bad", f"It is going wrong: {what}.", tuple(notes))
        return Verdict("unsure", f"Keep an eye on it: {what}.", tuple(notes))
    shown = [_change(s) for s in found if s.signal in ("majority_fraction", "readable", "distinct_questions")]
    return Verdict("unsure", f"No sign of trouble: {', '.join(shown)}.", tuple(notes))


def _change(sign: Sign) -> str:
    return f"{sign.signal.replace('_', ' ')} {sign.early:.3g} → {sign.late:.3g}"


def _accuracy(summary: Mapping[str, Any]) -> Verdict:
    """Held-out accuracy before and after, by the intervals of the paired differences."""
    try:
        changes = {name: summary["difference"][name] for name in MEASURES if name in summary["difference"]}
        ends = {name: (c["low"], c["high"]) for name, c in changes.items()}
        up = [name for name, (low, _) in ends.items() if low > 0]
        down = [name for name, (_, high) in ends.items() if high < 0]
        questions = summary["before"]["questions"]
        told = {name: _points(name, summary, changes[name]) for name in changes}
    except (KeyError, TypeError, ValueError, ArithmeticError):  # none measured, or a file of somebody else's
        return Verdict("unsure", "")
    if up and not down:
        rest = [name for name in changes if name not in up]
        no_change = f" {_and(rest)} moved by no more than chance could." if rest else ""
        return Verdict("good", f"The model got better: {told[up[0]]} on {questions} held-out questions.{no_change}")
    if down and not up:
        return Verdict("bad", f"The model got worse: {told[down[0]]} on {questions} held-out questions.")
    if up and down:
        return Verdict(
            "unsure",
            f"Better in one way, worse in another: {told[up[0]]}, {told[down[0]]}, on {questions} held-out questions.",
        )
    first = next(iter(told.values()), "")
    return Verdict("unsure", f"No difference that {questions} held-out questions can show: {first}.")


def _points(name: str, summary: Mapping[str, Any], change: Mapping[str, float]) -> str:
    before, after = (100 * summary[when][name]["mean"] for when in ("before", "after"))
    mean, low, high = (100 * change[key] for key in ("mean", "low", "high"))
    return (
        f"{name} accuracy {before:.1f} % → {after:.1f} % ({mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f})"
    )


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def signs(run: Run) -> list[Sign]:
    """The watch's signals in the first window of steps that counts and in the last, by the watch's own bounds.

    Empty while the two would overlap.
    """
    window = run.config.watch_window
    found: dict[str, Sign] = {}
    for rule in RULES:
        series = [
            (record["step"], record[f"watch/{rule.signal}"])
            for record in run.metrics
            if f"watch/{rule.signal}" in record and record["step"] > window // 5
        ]
        if not series or series[-1][0] - series[0][0] < 2 * window - 1:
            continue
        early = [value for step, value in series if step < series[0][0] + window]
        late = [value for step, value in series if step > series[-1][0] - window]
        if min(len(early), len(late)) < 2:
            continue
        sign = _judge(rule, _best(series, window, early) if rule.against_best else early, late)
        known = found.get(rule.signal)
        if known is None or (sign.severe, bool(sign.trouble)) > (known.severe, bool(known.trouble)):
            found[rule.signal] = sign
    return list(found.values())


def _best(series: Sequence[tuple[int, float]], window: int, early: list[float]) -> list[float]:
    """The values of the window with the highest mean, of the early one and those that follow without overlap."""
    groups: dict[int, list[float]] = {}
    for step, value in series:
        groups.setdefault(step // window, []).append(value)
    return max((values for values in (early, *groups.values()) if len(values) >= 2), key=fmean)


def _judge(rule: Rule, reference: Sequence[float], late: Sequence[float]) -> Sign:
    before, now = fmean(reference), fmean(late)
    noise = math.sqrt(sum(variance(values) / len(values) for values in (reference, late)))
    room, had = rule.room(now), rule.room(before)
    left = abs(now - before) > STANDARD_ERRORS * noise and room < rule.healthy * had
    return Sign(rule.signal, before, now, rule.meaning if left else None, left and room < rule.alarm * had)
