"""The reasoning steps of the latest groups: what is said of every image says nothing about this one."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from ireasoner.method.types import Solution


def step_digest(reasoning_step: str) -> str:
    """A digest of a step without its case and spacing, so that memory and checkpoints need no texts."""
    plain = " ".join(reasoning_step.lower().split()).rstrip(".!")
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class RecentSteps:
    """The reasoning steps of the latest groups, as digests.

    Args:
        window: how many groups are remembered; 0: none.
    """

    def __init__(self, window: int) -> None:
        self._groups: deque[tuple[str, frozenset[str]]] = deque(maxlen=window)

    def add(self, image: str, group: Sequence[Solution]) -> None:
        """Remember the steps of a group that could be read; a group without any is not remembered."""
        digests = {step_digest(step) for s in group if s.well_formed for step in s.reasoning_steps}
        if digests:
            self._groups.append((image, frozenset(digests)))

    def of_others(self, image: str) -> list[frozenset[str]]:
        """The digests of each remembered group of another image."""
        return [digests for name, digests in self._groups if name != image]

    def state(self) -> list[list[Any]]:
        """Everything, as JSON."""
        return [[image, sorted(digests)] for image, digests in self._groups]

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        """Take back what `state` gave."""
        self._groups.clear()
        self._groups.extend((image, frozenset(digests)) for image, digests in state)
