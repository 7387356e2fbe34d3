"""The metrics of a step that follow from its episodes, and how long its parts took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean

from ireasoner.method.recipe import REWARD
from ireasoner.method.types import Episode


def play_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Means over the episodes of a step by name; 0 where there is nothing to average.

    Each part of the solver's reward has a metric `reward/solver/<part>`, even if its weight is 0.
    """
    groups = [e for e in episodes if e.trajectories]
    trajectories = [t for e in groups for t in e.trajectories]
    proposals = [e.proposal for e in episodes if e.proposal is not None]
    asked = [e.question.text for e in groups]
    parts = dict.fromkeys(name for t in trajectories for name in t.parts)

    def mean(values: Sequence[float]) -> float:
        return fmean(values) if values else 0.0

    return {
        f"{REWARD}total": mean([t.reward for t in trajectories]),
        **{f"{REWARD}{name}": mean([t.parts[name].value for t in trajectories]) for name in parts},
        "reward/proposer/total": mean([e.proposer_reward for e in episodes]),
        "answers/majority_fraction": mean([e.majority_fraction for e in groups]),
        "answers/answer_entropy": mean([e.answer_entropy for e in groups]),
        "well_formed/solver": mean([t.well_formed for t in trajectories]),
        "well_formed/proposer": mean([e.question.well_formed for e in episodes]),
        "length/solver": mean([t.num_tokens for t in trajectories]),
        "length/proposer": mean([p.num_tokens for p in proposals]),
        "truncated/solver": mean([t.finish_reason == "length" for t in trajectories]),
        "questions/distinct": len(set(asked)) / len(asked) if asked else 0.0,
        "step_weight": episodes[0].step_weight,
        **label_metrics(episodes),
    }


def label_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """How right the answers to labelled questions are, all of them and those of the majority; empty without any."""
    labelled = [e for e in episodes if e.majority_rightness is not None]
    if not labelled:
        return {}
    return {
        "labels/right": fmean(t.rightness or 0.0 for e in labelled for t in e.trajectories),
        "labels/majority_right": fmean(e.majority_rightness or 0.0 for e in labelled),
    }


def energy_metrics(readings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Joules that each part of the machines took since the processes' counters were read before, all together."""
    parts = {part for reading in readings for part in reading}
    return {f"energy/{part}_joules": sum(r.get(part, 0.0) for r in readings) for part in sorted(parts)}


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Store how long the `with` block took."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
