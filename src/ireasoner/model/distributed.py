"""What the processes of a run exchange: completions and the adapters' gradients.

So all processes know the same episodes and take the same optimizer step. They exchange nothing but tensors; what is not
a number is sent as the bytes of JSON, never as a pickle.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
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
def joined(device: str, patience: float, shard: bool = False) -> Iterator[Processes]:
    """Join the processes that were started with this one.

    Args:
        device: of the run: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        patience: seconds that one process waits for another in any exchange, this one included.
        shard: whether the model's passes are exchanges as well.

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
    if on_cpu:
        _check_address()
    elif not shard:
        # NCCL returns before an exchange is done, and when it takes too long, torch ends the process without a word of
        # ours. Waiting for it raises an error instead. A sharded model must not wait: layers are fetched ahead.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    try:
        state = PartialState(cpu=on_cpu, timeout=timedelta(seconds=patience))
        # On CPUs, accelerate numbers the device by the process ("cpu:1"); there is only one CPU device.
        found = Joined(state.process_index, state.num_processes, "cpu" if on_cpu else str(state.device))
        found.wait()  # NCCL connects at the first exchange
    except (RuntimeError, LostProcessError) as error:
        raise _not_found(error.__cause__ or error) from error
    if found.count != started:
        raise UsageError("the processes that were started did not find each other: name --device cpu or cuda")
    try:
        with _boundary_of_passes():
            yield found
    finally:
        state.destroy_process_group()
        if shard:
            # Gloo's threads need the interpreter to let go of the last tensors that were exchanged. They are waited for
            # where the group ends, but FSDP's caches keep it until the interpreter ends, and a thread that is not done
            # by then aborts the process: 13 of 72 did, and none of 72 with half of this time.
            time.sleep(0.1)


def _is_on_several_hosts() -> bool:
    """Whether the launcher says so; one that is not torch's may say nothing."""
    started = os.environ.get("WORLD_SIZE", "1")
    return int(started) > int(os.environ.get("LOCAL_WORLD_SIZE", started))


def _check_address() -> None:
    """Refuse to start where gloo would tell the other hosts an address that leads them back to themselves.

    Unless an interface is named, gloo takes the first address of this host's name that can be used, or 127.0.0.1.

    Raises:
        UsageError: no interface is named, and this address is a loopback one.
    """
    if not _is_on_several_hosts() or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name, address = socket.gethostname(), "127.0.0.1"
    with suppress(OSError):  # the name may be unknown
        for family, kind, protocol, _, place in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as usable:
                usable.bind(place)
                address = str(place[0])
                break
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise UsageError(
            f"several hosts take part in this run, and this one's name, {name}, leads to {address}, where the others "
            f"cannot reach it: set GLOO_SOCKET_IFNAME to the network interface that leads to them ({_interfaces()})"
        )


def _interfaces() -> str:
    names = [name for _, name in socket.if_nameindex() if name != "lo"]
    return f"there are {', '.join(names)}" if names else "there is none but lo"


def _not_found(error: BaseException) -> LostProcessError:
    """What to say where the processes do not find each other at the start."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    told = f"the processes of this run did not find each other at {place} within --patience"
    if _is_on_several_hosts():
        told += (
            "; on every host GLOO_SOCKET_IFNAME (CPUs) or NCCL_SOCKET_IFNAME (GPUs) may have to name the network "
            f"interface that leads to the others (here, {_interfaces()})"
        )
    return LostProcessError(f"{told} (torch says: {_first_line(error)})")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


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
    """Do the same where FSDP exchanges something, within a pass of a sharded model.

    Whatever else a pass raises is no other process's doing, so what counts is where the error arose.
    """
    try:
        yield
    except RuntimeError as error:
        if traceback.extract_tb(error.__traceback__)[-1].filename != torch.distributed.distributed_c10d.__file__:
            raise
        raise _lost(error) from error


def _lost(error: RuntimeError) -> LostProcessError:
    return LostProcessError(
        "another process of this run has ended, or did not answer within --patience: what is saved is safe; start "
        f"as many as you like again, with train --resume RUN (torch says: {_first_line(error)})"
    )
