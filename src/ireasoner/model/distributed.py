"""What the processes of a run exchange: completions and the adapters' gradients.

So all processes know the same episodes and take the same optimizer step. They exchange nothing but tensors; what is not
a number is sent as the bytes of JSON, never as a pickle.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes, reduce
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ireasoner.method.types import UsageError
from ireasoner.model.backbone import resolve_device
from ireasoner.model.parallel import ALONE, Processes


class LostProcessError(UsageError):
    """Another process of the run does not answer; the message says what to do.

    Every method of `Joined` that exchanges something may raise it.
    """


class Joined(Processes):
    """One of several processes that have found each other."""

    def gather(self, items: Sequence[Any], total: int) -> list[Any]:
        text = torch.frombuffer(bytearray(json.dumps(list(items)).encode("ascii")), dtype=torch.uint8).to(self.device)
        with _boundary():
            lengths: Any = gather(torch.tensor([len(text)], device=self.device))
            texts: Any = gather(pad_across_processes(text[None], dim=1))
        sent = zip(texts.cpu().numpy(), lengths.tolist(), strict=True)
        shares = [json.loads(row[:length].tobytes()) for row, length in sent]
        return [shares[i % self.count][i // self.count] for i in range(total)]

    def sum(self, values: Tensor) -> Tensor:
        with _boundary():
            return reduce(values.to(self.device), "sum").to(values.device)  # type: ignore[union-attr]

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:  # a process without groups has no gradient yet
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        vector_to_parameters(self.sum(parameters_to_vector(gradients)), gradients)

    def maximum(self, value: float) -> float:
        return torch.tensor(self.gather([value], self.count)).max().item()

    def any(self, value: bool) -> bool:
        return bool(self.sum(torch.tensor([float(value)])).item() > 0)

    def wait(self) -> None:
        self.any(True)


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that were started with this one, for a run on `device` ('auto', 'cpu', 'cuda' or 'cuda:N').

    Raises:
        UsageError: a GPU by its number for several processes, or processes that do not find each other.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))  # set by the launcher
    if started == 1:
        yield ALONE
        return
    if ":" in device:
        raise UsageError(f"--device {device} names one GPU, and several processes were started: use auto, cpu or cuda")
    on_cpu = resolve_device(device) == "cpu"
    state = PartialState(cpu=on_cpu)
    if state.num_processes != started:
        raise UsageError("the processes that were started did not find each other: name --device cpu or cuda")
    try:
        with _boundary_of_passes():
            # On CPUs, accelerate numbers the device by the process ("cpu:1"); there is only one CPU device.
            yield Joined(state.process_index, state.num_processes, "cpu" if on_cpu else str(state.device))
    finally:
        state.destroy_process_group()


@contextmanager
def _boundary() -> Iterator[None]:
    """Turn what torch.distributed raises when a process is gone into a `LostProcessError`."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too, but no other process's doing
        raise
    except RuntimeError as error:
        raise _lost(error) from error


@contextmanager
def _boundary_of_passes() -> Iterator[None]:
    """The same for what is raised where not this module exchanges something, but FSDP within a pass of a sharded model.

    Anything else that a pass raises is no other process's doing, so it counts where the error arose.
    """
    try:
        yield
    except RuntimeError as error:
        if traceback.extract_tb(error.__traceback__)[-1].filename != torch.distributed.distributed_c10d.__file__:
            raise
        raise _lost(error) from error


def _lost(error: RuntimeError) -> LostProcessError:
    reason = str(error).partition("\n")[0]
    return LostProcessError(
        "another process of this run has ended or cannot be reached: what is saved is safe; start as many as you "
        f"like again, with train --resume RUN (torch says: {reason})"
    )
