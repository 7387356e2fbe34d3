"""A recorded reward as a sum that a reader can check: which parts were paid, and what each of them is a product of.

Nothing here knows a reward's equation, so that a reward of the user's own is shown like one of ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ireasoner.method.types import Part, Trajectory

SLACK = 1e-6  # recorded numbers are exact, but sums and products depend on the order of their terms


@dataclass(frozen=True)
class Term:
    """A number on the page: its recorded value, what it is made of, and whether that gives the value."""

    name: str
    value: float
    made_of: str
    adds_up: bool


def reward_terms(trajectory: Trajectory) -> list[Term]:
    """A trajectory's reward as the sum of weight × value over its parts, followed by the parts."""
    paid = {name: part for name, part in trajectory.parts.items() if part.weight}
    total = sum(part.weight * part.value for part in paid.values())
    made_of = " + ".join(f"{part.weight:.6g} × {part.value:.4f} {_plain(name)}" for name, part in paid.items())
    made_of = f"= {made_of}" if paid else "no part is paid"
    reward = Term("reward", trajectory.reward, made_of, _close(trajectory.reward, total))
    return [reward, *(_part_term(name, part) for name, part in trajectory.parts.items())]


def _part_term(name: str, part: Part) -> Term:
    notes = {of: f" ({note})" for of, note in part.notes.items()}
    product = " × ".join(f"{factor:.4f} {_plain(of)}{notes.get(of, '')}" for of, factor in part.factors.items())
    made_of = [f"= {product}"] if product else []
    made_of += [] if part.weight else ["recorded, not paid"]
    adds_up = not part.factors or _close(part.value, math.prod(part.factors.values()))
    return Term(_plain(name), part.value, "; ".join(made_of), adds_up)


def _close(recorded: float, computed: float) -> bool:
    return math.isclose(recorded, computed, rel_tol=1e-9, abs_tol=SLACK)


def _plain(name: str) -> str:
    return name.replace("_", " ")
