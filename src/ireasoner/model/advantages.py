"""From rewards to advantages. A baseline is read once and then moved once in each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ireasoner.method.recipe import PAPER


@dataclass
class MovingBaseline:
    """Exponential moving average of a role's mean reward; it starts at the first batch's mean.

    Starting anywhere else (at 0, say) would give identical rewards a non-zero advantage.
    """

    momentum: float = PAPER.baseline_momentum
    value: float | None = None

    def advantages(self, rewards_B: Tensor) -> Tensor:
        """A = r − b, with b from before this batch, in the same shape; then b moves once, towards the batch's mean."""
        mean = rewards_B.sum().item() / rewards_B.numel()
        if self.value is None:
            self.value = mean
        advantages_B = rewards_B - self.value
        self.value = self.momentum * self.value + (1.0 - self.momentum) * mean
        return advantages_B


def leave_one_out_advantages(rewards_GN: Tensor) -> Tensor:
    """RLOO: each trajectory against the mean of the others in its group, A_i = r_i − mean_{j≠i} r_j.

    Args:
        rewards_GN: [groups, N], N ≥ 2.

    Raises:
        ValueError: groups of one trajectory, which have no others.
    """
    count = rewards_GN.shape[-1]
    if count < 2:
        raise ValueError("leave-one-out advantages need at least 2 trajectories in a group")
    return (rewards_GN - rewards_GN.mean(-1, keepdim=True)) * count / (count - 1)


def spread(advantages: Tensor) -> float:
    """Standard deviation of a step's advantages. 0 means that the step teaches nothing."""
    count = advantages.numel()
    mean, square = advantages.sum().item() / count, advantages.square().sum().item() / count
    return math.sqrt(max(square - mean**2, 0.0))  # rounding can make a variance of 0 negative
