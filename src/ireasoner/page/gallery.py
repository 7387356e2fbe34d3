"""Which episodes to look at, and how their steps agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ireasoner.page.run import Entry, Run

Matrix = list[list[float | None]]
STRETCHES = 3  # of training, that are shown beside each other


@dataclass(frozen=True)
class Filter:
    """A way through the episodes: which ones, and in which order; a higher rank comes first, then the newest."""

    label: str
    keep: Callable[[Entry], bool]
    rank: Callable[[Entry], float]


FILTERS = {
    "newest": Filter("newest", lambda e: True, lambda e: 0.0),
    "disagreement": Filter("most disagreement", lambda e: e.trajectories > 0, lambda e: e.answer_entropy),
    "highest": Filter("highest reward", lambda e: e.reward is not None, lambda e: e.reward or 0.0),
    "lowest": Filter("lowest reward", lambda e: e.reward is not None, lambda e: -(e.reward or 0.0)),
    "malformed": Filter("malformed", lambda e: e.malformed > 0, lambda e: e.malformed),
    "wrong": Filter("majority wrong", lambda e: e.wrong is True, lambda e: 0.0),
}


def select(run: Run, name: str = "newest", text: str = "", steps: tuple[int, int] | None = None) -> list[Entry]:
    """The episodes of a filter that hold a text and lie between two steps, in the filter's order.

    Raises:
        KeyError: a filter other than those of FILTERS.
    """
    chosen, sought = FILTERS[name], text.casefold().strip()
    found = [
        entry
        for entry in reversed(run.entries)
        if chosen.keep(entry) and sought in entry.text and (steps is None or steps[0] <= entry.step <= steps[1])
    ]
    return sorted(found, key=chosen.rank, reverse=True)  # stable: the newest first among equals


def filters(run: Run) -> dict[str, Filter]:
    """The filters that make sense for a run: a wrong majority can be known only where the truth is."""
    known = any(entry.wrong is not None for entry in run.entries)
    return {name: each for name, each in FILTERS.items() if name != "wrong" or known}


def average_agreement(entries: Sequence[Entry]) -> Matrix:
    """Leave-one-out similarity by trajectory's rank and step's position (`Entry`), averaged over episodes.

    Without the rows and columns that fewer than 2 % of the episodes reach: they would say nothing.
    """
    if not entries:
        return []
    stacked = np.stack([entry.agreement for entry in entries])  # [episodes, trajectories, positions]
    known = np.isfinite(stacked)
    counts = known.sum(0)
    shown = counts >= max(1, len(entries) // 50)
    height, width = (int(np.flatnonzero(shown.any(axis)).max(initial=-1)) + 1 for axis in (1, 0))
    sums = np.where(known, stacked, 0).sum(0)
    return [[float(sums[i, j] / counts[i, j]) if shown[i, j] else None for j in range(width)] for i in range(height)]


def stretches(run: Run) -> list[tuple[int, int]]:
    """First, middle and last part of what was played, as steps from and to; fewer for a short run."""
    if not run.entries:
        return []
    first, last = run.entries[0].step, run.entries[-1].step
    span = (last - first + 1) / STRETCHES
    if span < 1:
        return [(first, last)]
    return [(first + round(k * span), first + round((k + 1) * span) - 1) for k in range(STRETCHES)]


def openings(run: Run, most: int = 8) -> tuple[list[str], list[tuple[tuple[int, int], dict[str, float], float]]]:
    """How questions begin: the commonest first two words, and by stretch their shares and that of different texts."""
    counts = Counter(opening for entry in run.entries if (opening := entry.opening))
    shown = [opening for opening, _ in counts.most_common(most)]
    rows = []
    for first, last in stretches(run):
        asked = [e for e in run.entries if first <= e.step <= last and e.question]
        if asked:
            shares = Counter(e.opening for e in asked)
            distinct = len({" ".join((e.question or "").lower().split()) for e in asked}) / len(asked)
            rows.append(((first, last), {opening: shares[opening] / len(asked) for opening in shown}, distinct))
    return shown, rows
