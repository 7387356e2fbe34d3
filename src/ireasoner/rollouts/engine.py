"""Who samples: one small protocol over plain requests. An engine holds no state that a resumed run would miss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ireasoner.method.types import Completion, Role
from ireasoner.model.inputs import EncodedImage, render


@dataclass(frozen=True)
class Request:
    """One prompt to complete: an image (or several, or a clip), chat messages with a place for it, and the seed of the
    completions."""

    image: EncodedImage
    messages: list[dict[str, Any]]
    seed: tuple[int, ...] = (0,)

    @property
    def prompt(self) -> str:
        """The messages as the model reads them, which a parser of what it replies wants to know."""
        return render(self.image.seen.processor, self.messages, self.image.seen.view)


def temperatures(temperature: float | Sequence[float], n: int) -> Sequence[float]:
    """The temperature of each of n completions of a request."""
    return [temperature] * n if isinstance(temperature, int | float) else temperature


class Engine(Protocol):
    """Samples completions under a role's adapter, from the model's whole distribution (no top-k, no top-p)."""

    def sample(
        self,
        requests: Sequence[Request],
        role: Role | None,
        *,
        n: int = 1,
        max_tokens: int,
        temperature: float | Sequence[float] = 1.0,
    ) -> list[list[Completion]]:
        """Sample n completions of each request.

        Every process of a run calls this equally often, with no requests where it has none: a policy that is sharded
        is run by all of them together.

        Args:
            requests: what to complete.
            role: whose adapter; None: the backbone alone.
            n: completions of each request.
            max_tokens: the length at which a completion is cut off.
            temperature: of all of them, or of each of the n; 0 is greedy.
        """
        ...

    def refresh(self) -> None:
        """Take over the policy's adapters as they are now; called by every process after every change of them."""
        ...

    def close(self) -> None:
        """Give back what it holds outside of this process's memory; called once, when the run ends."""
        ...
