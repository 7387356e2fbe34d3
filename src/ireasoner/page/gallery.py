"""Which episodes to show, how their reasoning steps agree, and how questions and answers change."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ireasoner.method.answers import answer_key
from ireasoner.method.recipe import Recipe
from ireasoner.method.types import Episode, ProbeAnswer, Trajectory
from ireasoner.page.run import Entry, RecordedRun

Matrix = list[list[float | None]]
Stretch = tuple[int, int]  # first and last training step
STRETCHES = 3  # parts of training that are shown beside each other
PROBE_COLUMNS = 6
MOST_STEPS = 64  # reasoning steps of a trajectory that are shown


# --- choosing episodes ------------------------------------------------------------------------------------------------


# The label of each filter, and how it ranks an episode: the highest rank comes first, then the newest episode; an
# episode whose rank is None is left out.
FILTERS: dict[str, tuple[str, Callable[[Entry], float | None]]] = {
    "newest": ("newest", lambda e: 0.0),
    "disagreement": ("most disagreement", lambda e: e.answer_entropy if e.trajectories else None),
    "highest": ("highest reward", lambda e: e.reward),
    "lowest": ("lowest reward", lambda e: None if e.reward is None else -e.reward),
    "malformed": ("malformed", lambda e: e.malformed or None),
    "wrong": ("majority wrong", lambda e: 0.0 if e.wrong else None),
}


def select(run: RecordedRun, name: str = "newest", text: str = "", steps: Stretch | None = None) -> list[Entry]:
    """The episodes of a filter that contain a text and lie within a stretch of training, in the filter's order."""
    (_, rank), sought = FILTERS[name], text.casefold().strip()
    first, last = steps or (0, math.inf)
    found = [e for e in reversed(run.entries) if sought in e.text and first <= e.step <= last]
    ranked = [(value, e) for e in found if (value := rank(e)) is not None]
    return [e for _, e in sorted(ranked, key=lambda pair: pair[0], reverse=True)]  # stable: the newest stay first


def filters(run: RecordedRun) -> dict[str, str]:
    """The labels of the filters that apply to a run: a wrong majority can be known only where the truth is."""
    known = any(entry.wrong is not None for entry in run.entries)
    return {name: label for name, (label, _) in FILTERS.items() if name != "wrong" or known}


# --- inside an episode ------------------------------------------------------------------------------------------------


def by_answer(episode: Episode) -> list[list[Trajectory]]:
    """The trajectories that give the same answer side by side: the majority first, the unreadable last, the others by
    their number."""
    found: dict[str | None, list[Trajectory]] = {}
    for t in episode.trajectories:
        found.setdefault(t.answer_key, []).append(t)
    return sorted(found.values(), key=lambda own: (not own[0].in_majority, own[0].answer_key is None, -len(own)))


def others(episode: Episode, trajectory: Trajectory, recipe: Recipe) -> list[float] | None:
    """The rewards that a trajectory's is compared with; None where the baseline is a moving average."""
    return [t.reward for t in episode.trajectories if t is not trajectory] if recipe.advantage != "ema" else None


def any_compared(episode: Episode) -> bool:
    """Whether a reasoning step of an episode was compared with others."""
    return any(score.similarity is not None for t in episode.trajectories for score in t.step_scores)


# --- averages over episodes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeatMap:
    """Averaged agreement over a stretch of training; `chosen` if the reader chose the stretch."""

    steps: Stretch
    episodes: int
    rows: Matrix
    mean: float
    chosen: bool


def heat_maps(run: RecordedRun, chosen: Stretch | None) -> list[HeatMap]:
    """The averaged agreement of the parts of training, and of the training steps that a reader chose."""
    found = []
    for first, last in [*stretches(run), *([chosen] if chosen else [])]:
        entries = [entry for entry in run.entries if first <= entry.step <= last]
        if rows := average_agreement(entries):
            mean = float(np.nanmean(np.stack([entry.agreement for entry in entries])))
            steps = (entries[0].step, entries[-1].step)
            found.append(HeatMap(steps, len(entries), rows, mean, (first, last) == chosen))
    return found


def average_agreement(entries: Sequence[Entry]) -> Matrix:
    """Leave-one-out similarity by the trajectory's rank and the step's position (see `Entry`), averaged over episodes.

    Rows and columns that fewer than 2 % of the episodes reach are left out: their means would say nothing.
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


def stretches(run: RecordedRun) -> list[Stretch]:
    """The first, middle and last part of what was played; a single one for a short run."""
    if not run.entries:
        return []
    first, last = run.entries[0].step, run.entries[-1].step
    span = (last - first + 1) / STRETCHES
    if span < 1:
        return [(first, last)]
    return [(first + round(k * span), first + round((k + 1) * span) - 1) for k in range(STRETCHES)]


def openings(run: RecordedRun, most: int = 8) -> tuple[list[str], list[tuple[Stretch, dict[str, float], float]]]:
    """The most common first two words of questions; and for each part of training the share of its questions that
    begin with them, and the share of its texts that differ from one another."""
    counts = Counter(opening for entry in run.entries if (opening := entry.opening))
    shown = [opening for opening, _ in counts.most_common(most)]
    found = []
    for first, last in stretches(run):
        asked = [e for e in run.entries if first <= e.step <= last and e.question]
        if asked:
            own = Counter(e.opening for e in asked)
            distinct = len({" ".join((e.question or "").lower().split()) for e in asked})
            found.append(((first, last), {each: own[each] / len(asked) for each in shown}, distinct / len(asked)))
    return shown, found


# --- probes through training ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeCell:
    """An answer to a probe; whether it differs from the one shown before it, and is correct where that is known."""

    probe: ProbeAnswer
    changed: bool
    correct: bool | None


def probes(run: RecordedRun) -> tuple[list[int], list[tuple[ProbeAnswer, list[ProbeCell | None]]]]:
    """Some training steps; and for each probe its first answer and a cell for each of these steps."""
    steps = sorted({probe.step for probe in run.probes})
    count = min(PROBE_COLUMNS, len(steps))
    columns = sorted({steps[round(k * (len(steps) - 1) / max(1, count - 1))] for k in range(count)})
    by_image: dict[str, dict[int, ProbeAnswer]] = {}
    for probe in run.probes:
        by_image.setdefault(probe.image, {})[probe.step] = probe
    rows = []
    for answers in by_image.values():
        first = next(iter(answers.values()))
        truth = run.true_answer(first.image, first.question)
        true_key, previous = _key(truth, first.question), None
        cells: list[ProbeCell | None] = []
        for probe in (answers.get(step) for step in columns):
            if probe is None:
                cells.append(None)
                continue
            now = _key(probe.answer, first.question)
            changed = previous is not None and now != _key(previous.answer, first.question)
            cells.append(ProbeCell(probe, changed, None if truth is None else now == true_key))
            previous = probe
        rows.append((first, cells))
    return columns, rows


def _key(answer: str | None, question: str) -> str | None:
    return None if answer is None else answer_key(answer, question)
