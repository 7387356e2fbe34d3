"""The processes of a run: one, unless `accelerate launch` started several.

Every process holds the whole model and plays its own share of each step's images; what was written and the adapters'
gradients are exchanged, so that all know the same episodes and take the same step. What they send each other is JSON
and tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes, reduce
from torch import Tensor

from ireasoner.method.types import UsageError
from ireasoner.model.backbone import resolve_device


class LostProcessError(UsageError):
    """Another process of the run does not answer; the message says what to do."""


class Processes:
    """This process among those of its run.

    Args:
        index: its number; process 0 writes the run directory.
        count: how many there are.
        device: where tensors lie that are exchanged.
    """

    def __init__(self, index: int = 0, count: int = 1, device: torch.device | None = None) -> None:
        self.index, self.count, self.device = index, count, device or torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def share(self, total: int) -> list[int]:
        """Which of `total` things this process does: every `count`-th."""
        return list(range(self.index, total, self.count))

    def gather(self, items: Sequence[Any], total: int) -> list[Any]:
        """What all processes made of their `share(total)`, in order; items are JSON.

        Raises:
            LostProcessError: a process has ended.
        """
        if self.count == 1:
            return list(items)
        text = torch.frombuffer(bytearray(json.dumps(list(items)).encode("ascii")), dtype=torch.uint8).to(self.device)
        with _boundary():
            lengths: Any = gather(torch.tensor([len(text)], device=self.device))
            texts: Any = gather(pad_across_processes(text[None], dim=1))
        sent = zip(texts.cpu().numpy(), lengths.tolist(), strict=True)
        shares = [json.loads(row[:length].tobytes()) for row, length in sent]
        return [shares[i % self.count][i // self.count] for i in range(total)]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of a tensor that each has, the same bits for all.

        Raises:
            LostProcessError: a process has ended.
        """
        if self.count == 1:
            return values
        with _boundary():
            return reduce(values.to(self.device), "sum").to(values.device)  # type: ignore[union-attr]

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Make the gradients of these parameters the sums over all processes, in one exchange."""
        if self.count == 1:
            return
        trained = list(parameters)
        for parameter in trained:  # a process without groups has no gradient yet
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients = [p.grad for p in trained if p.grad is not None]
        flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def maximum(self, value: float) -> float:
        """The largest of the processes' values, or NaN if one is."""
        return torch.tensor(self.gather([value], self.count)).max().item()

    def any(self, value: bool) -> bool:
        """Whether it is so in any process; a point that none passes before all have come to it."""
        return bool(self.sum(torch.tensor([float(value)])).item() > 0)

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.any(True)


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """This process among those that were started with it, for a run on `device` ('auto', 'cpu', 'cuda' or 'cuda:N')."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # the launcher's word for how many it started
        yield Processes()
        return
    if ":" in device:
        raise UsageError(f"--device {device} names one GPU, and several processes were started: use auto, cpu or cuda")
    state = PartialState(cpu=resolve_device(device) == "cpu")
    if state.num_processes != int(os.environ["WORLD_SIZE"]):
        raise UsageError("the processes that were started did not find each other: name --device cpu or cuda")
    try:
        yield Processes(state.process_index, state.num_processes, state.device)
    finally:
        state.destroy_process_group()


@contextmanager
def _boundary() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too, and no peer's doing
        raise
    except RuntimeError as error:  # what torch.distributed raises if a peer is gone, whatever the backend
        reason = str(error).partition("\n")[0]
        raise LostProcessError(
            "another process of this run has ended or cannot be reached: what is saved is safe; start as many as you "
            f"like again, with train --resume RUN (torch says: {reason})"
        ) from error
