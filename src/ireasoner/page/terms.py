"""Recorded rewards as sums and products that a reader can check.

A trajectory's reward is shown from its record alone, without knowing any equation, so that a reward of the user's own
is shown like one of ours. The proposer's reward is computed again, unless the reward function gave it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from ireasoner.method.recipe import OWN, Recipe
from ireasoner.method.rewards import proposer_reward
from ireasoner.method.types import Episode, Part, Trajectory

SLACK = 1e-6  # recorded numbers are exact, but sums and products depend on the order of their terms
FLOAT32 = 1e-4  # advantages were computed in float32, from rewards of about 1


@dataclass(frozen=True)
class Term:
    """A number on the page: its recorded value, what it is made of (in lines), and whether that gives the value."""

    name: str
    value: float
    made_of: str
    adds_up: bool


def reward_terms(trajectory: Trajectory) -> list[Term]:
    """A trajectory's reward as the sum of weight × value over its parts, followed by the parts."""
    paid = {name: part for name, part in trajectory.parts.items() if part.weight}
    total = sum(part.weight * part.value for part in paid.values())
    made_of = "\n+ ".join(f"{part.weight:.6g} × {part.value:.4f} {_plain(name)}" for name, part in paid.items())
    made_of = f"= {made_of}" if paid else "no part is paid"
    reward = Term("reward", trajectory.reward, made_of, _close(trajectory.reward, total))
    return [reward, *(_part_term(name, part) for name, part in trajectory.parts.items())]


def advantage_terms(
    advantage: float | None, reward: float, others: Sequence[float] | None = None, normalized: bool = False
) -> list[Term]:
    """The baseline and the advantage, A = r − b, of a text that was trained on; empty for one that was not.

    Args:
        advantage: as it was recorded.
        reward: that it was computed from.
        others: the rewards of the rest of the group, whose mean is the baseline; None: it is a moving average, which is
            not recorded.
        normalized: the baseline is the mean of the whole group, and A = (r − b) / s with its standard deviation.
    """
    if advantage is None:
        return []
    if normalized and others:
        return _normalized_terms(advantage, reward, [reward, *others])
    baseline = reward - advantage
    told = "= mean reward of the group's others" if others else "= moving average of earlier rewards"
    adds_up = not others or math.isclose(baseline, sum(others) / len(others), abs_tol=FLOAT32 * max(1.0, abs(reward)))
    taken = f"= {reward:.4f} reward − {baseline:.4f} baseline"
    return [Term("baseline", baseline, told, adds_up), Term("advantage", advantage, taken, adds_up=True)]


def _normalized_terms(advantage: float, reward: float, group: Sequence[float]) -> list[Term]:
    """The group's mean as the baseline, and the advantage as a number of its standard deviations."""
    baseline, deviation = fmean(group), stdev(group)
    # Of nearly equal rewards, rounding decides how far they are apart; those of equal ones are 0.
    tolerance = FLOAT32 * max(1.0, abs(reward)) / max(deviation, FLOAT32)
    adds_up = math.isclose(advantage, (reward - baseline) / (deviation + 1e-6), abs_tol=tolerance)
    taken = f"= ({reward:.4f} reward − {baseline:.4f} baseline) / {deviation:.4f} standard deviation of the group"
    mean = Term("baseline", baseline, "= mean reward of the group", adds_up=True)
    return [mean, Term("advantage", advantage, taken, adds_up)]


def proposer_term(episode: Episode, recipe: Recipe) -> Term:
    """The proposer's reward: how near the entropy of the vote came to the one that is aimed at."""
    entropy, target, width = episode.answer_entropy, recipe.target_entropy, recipe.entropy_width
    if sum(t.well_formed for t in episode.trajectories) < 2:
        worth, made_of = 0.0, "fewer than two answers could be read"
    else:
        made_of = f"= exp(−({entropy:.4f} − {target:g})² / (2 · {width:g}²)), the vote's entropy against its target"
        try:
            worth = proposer_reward(entropy, target=target, width=width)
        except ArithmeticError:  # with constants that no run could have used
            worth = math.nan
    adds_up = _close(episode.proposer_reward, worth)
    if not adds_up and recipe.reward not in OWN:  # others may say themselves what a question earns
        return Term("proposer's reward", episode.proposer_reward, f"as {recipe.reward} gave it", adds_up=True)
    return Term("proposer's reward", episode.proposer_reward, made_of, adds_up)


def _part_term(name: str, part: Part) -> Term:
    factors = [f"{value:.4f} {', '.join([_plain(of), *_note(part, of)])}" for of, value in part.factors.items()]
    made_of = ["= " + "\n× ".join(factors)] if factors else []
    made_of += [] if part.weight else ["recorded, not paid"]
    adds_up = not part.factors or _close(part.value, math.prod(part.factors.values()))
    return Term(_plain(name), part.value, "\n".join(made_of), adds_up)


def _note(part: Part, factor: str) -> list[str]:
    """What the factor was computed from, where that was recorded."""
    return [part.notes[factor]] if factor in part.notes else []


def _close(recorded: float, computed: float) -> bool:
    return math.isclose(recorded, computed, rel_tol=1e-9, abs_tol=SLACK)


def _plain(name: str) -> str:
    return name.replace("_", " ")
