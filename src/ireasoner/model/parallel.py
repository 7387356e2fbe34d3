"""The processes of a run: one, unless `torchrun` or `accelerate launch` started several.

Every process holds the whole model, or a part of it (`sharding`), and plays its own share of each step's images. What
several processes exchange is in `distributed`, which imports torch; this module does not, so that mistakes can be found
before torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it takes seconds to import
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those of its run; as it is here, it is alone and exchanges nothing.

    Attributes:
        index: its number; process 0 writes the run directory.
        count: how many there are.
        device: where the tensors lie that are exchanged.
    """

    index: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def share(self, total: int) -> list[int]:
        """Which of `total` things this process does: every `count`-th."""
        return list(range(self.index, total, self.count))

    def gather(self, items: Sequence[Any], total: int) -> list[Any]:
        """Results of all processes in order, each of which did its `share(total)`; items must be JSON."""
        return list(items)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all processes' tensors, the same bits in each process."""
        return values

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace the gradients of these parameters by their sums over all processes, in one exchange."""

    def maximum(self, value: float) -> float:
        """The largest of the processes' values, or NaN if one is NaN."""
        return value

    def any(self, value: bool) -> bool:
        """Whether the value is true in any process. No process returns before all have called this."""
        return value

    def wait(self) -> None:
        """Return when all processes have called this."""


ALONE = Processes()  # the only process of its run
