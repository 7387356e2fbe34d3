"""Is it working? A sentence that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ireasoner.page.run import Run
from ireasoner.training.watch import Sign

Tone = Literal["good", "bad", "unsure"]
MEASURES = ("greedy", "mean@1", "maj@5", "pass@5")  # the first of those that were measured decides


@dataclass(frozen=True)
class Verdict:
    """What to make of a run, in one sentence, with what else should be known."""

    tone: Tone
    sentence: str
    notes: tuple[str, ...] = ()


def verdict(run: Run) -> Verdict:
    """Accuracy where labels were given; what the label-free signs say otherwise, and of runs that are not done."""
    summary, notes = run.summary or {}, tuple(_notes(run))
    accuracy = _accuracy(summary)
    if run.state() == "ended itself":
        last, best = summary.get("steps"), summary.get("best_step")
        more = f" {accuracy.sentence}" if accuracy else ""
        ended = f"The run ended itself after step {last} and went back to step {best}.{more}"
        return Verdict("bad", f"It went wrong: {summary.get('reason')}. {ended}", notes)
    if accuracy:
        return Verdict(accuracy.tone, accuracy.sentence, notes)
    if not run.metrics:
        return Verdict("unsure", "Nothing can be said yet: no step has been recorded.", notes)
    if run.config.labels is not None:
        return Verdict("unsure", "It is paid for true answers: look at its reward, and at held-out questions.", notes)
    notes = (
        *notes,
        "These signs need no labels, and cannot tell a right consensus from a wrong one: "
        "labelled questions can (train --eval-data, or ireasoner eval).",
    )
    found = signs(run)
    if not found:
        return Verdict("unsure", f"Too early to say: {run.step} steps are not two windows of the watch.", notes)
    if troubled := [sign for sign in found if sign.trouble]:
        what = "; ".join(f"{sign.trouble} ({_change(sign)})" for sign in troubled)
        if any(sign.alarms for sign in troubled):
            return Verdict("bad", f"It is going wrong: {what}.", notes)
        return Verdict("unsure", f"Keep an eye on it: {what}.", notes)
    shown = [_change(s) for s in found if s.signal in ("majority_fraction", "readable", "distinct_questions")]
    return Verdict("unsure", f"No sign of trouble: {', '.join(shown)}.", notes)


def signs(run: Run) -> list[Sign]:
    """What the watch makes of the run so far; nothing where true answers are paid, for then agreement is no sign."""
    return run.watch.signs() if run.config.labels is None else []


def _notes(run: Run) -> list[str]:
    notes, state = [], run.state()
    if run.damaged:
        notes.append(f"Left out of its files, for they are no records: {run.damaged} lines.")
    if run.gone:
        notes.append("The run directory is gone; this is what was read of it before.")
    if state == "running":
        notes.append(f"It is running: step {run.step} of {run.config.steps}.")
    elif state == "stopped" and run.step < run.config.steps:
        notes.append(
            f"It stopped after step {run.step} of {run.config.steps}; train --resume goes on from its last checkpoint."
        )
    elif state == "stopped":
        notes.append("Every step was played, but the run did not come to its end: train --resume finishes it.")
    return notes


def _change(sign: Sign) -> str:
    return f"{sign.signal.replace('_', ' ')} {sign.reference:.3g} → {sign.recent:.3g}"


def _accuracy(summary: Mapping[str, Any]) -> Verdict | None:
    """Held-out accuracy before and after, by the interval of the paired difference; None if it was not measured."""
    try:
        changes = {name: summary["difference"][name] for name in MEASURES if name in summary["difference"]}
        first, *others = changes
        went = {name: (c["low"] > 0) - (c["high"] < 0) for name, c in changes.items()}
        told = f"{_points(first, summary, changes[first])} on {summary['before']['questions']} held-out questions"
    except (KeyError, TypeError, ValueError, ArithmeticError):  # none measured, or a file of somebody else's
        return None
    rest = [f"{_and(own)} {what}" for what, own in _grouped(went, others)]
    more = f" Of the other measures, {'; '.join(rest)}." if rest else ""
    if went[first] > 0:
        return Verdict("good", f"The model got better: {told}.{more}")
    if went[first] < 0:
        return Verdict("bad", f"The model got worse: {told}.{more}")
    return Verdict("unsure", f"No difference is shown: {told}.{more}")


def _grouped(went: Mapping[str, int], names: Sequence[str]) -> list[tuple[str, list[str]]]:
    words = {1: "rose", -1: "fell", 0: "did not clearly move"}
    return [(what, own) for sign, what in words.items() if (own := [name for name in names if went[name] == sign])]


def _points(name: str, summary: Mapping[str, Any], change: Mapping[str, float]) -> str:
    before, after = (100 * summary[when][name]["mean"] for when in ("before", "after"))
    mean, low, high = (100 * change[key] for key in ("mean", "low", "high"))
    interval = f"95 % interval {low:+.1f} to {high:+.1f}"
    return f"{name} accuracy {before:.1f} % → {after:.1f} % ({mean:+.1f} points, {interval})"


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
