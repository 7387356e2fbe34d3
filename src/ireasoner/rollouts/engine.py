"""Who samples. An engine holds no state that a resumed run would miss."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ireasoner.method.types import Completion, Role
from ireasoner.model.inputs import Prompts


class Engine(Protocol):
    """Samples completions under a role's adapter, from the whole distribution."""

    def sample(
        self,
        prompts: Prompts,
        role: Role | None,
        uniforms_BNC: NDArray[np.float64],
        *,
        temperature: float = 1.0,
        min_tokens: int = 0,
    ) -> list[list[Completion]]:
        """N completions of each of B prompts, at most as long as the last axis of the numbers they are drawn with."""
        ...

    def refresh(self) -> None:
        """Take over the policy's adapters as they are now: called after every change of them."""
        ...
