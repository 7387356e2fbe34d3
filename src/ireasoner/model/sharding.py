"""Sharing the frozen language model out among processes, so that none of them holds it whole (FSDP2).

Each process keeps its share of the weights of every decoder layer. A layer is gathered when a pass comes to it, and
freed behind it. The adapters, the embeddings, the output layer and the vision tower are whole in every process; so
adapters are trained, saved and loaded as ever.

A pass through the language model is then work of all processes together: where one made a pass more than the others,
it would wait for them for ever. So all make equally many, of the same kind:

- Before each pass without gradients, every process says whether it has one to make. One that has none left makes a pass
  of a single token, whose result nobody uses, until no process has one left (`equal_passes`).
- The passes of a micro-batch of an update, forward and backward, are the same in number and order whatever is in it, so
  a micro-batch counts as one (`Learner.update`, `idle_hidden`). Gradient checkpointing changes nothing about that: it
  runs a layer again while its weights are there for the backward pass.

Each process makes a pass if and only if any of them has one to make, and all leave when none has. So no process is
ever alone in a pass, however much each of them has to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ireasoner.method.types import ROLES
from ireasoner.model.parallel import Processes
from ireasoner.model.policy import Policy


def shard(policy: Policy, processes: Processes) -> None:
    """Share the weights of the decoder layers out, and move everything to the processes' device.

    Layers move to the device one after another, and only this process's share of each stays there: a model that is too
    large for one device is never on it as a whole. Tried with gloo on CPUs, not with NCCL on GPUs.

    Args:
        policy: with adapters, on the CPU.
        processes: the processes that hold it together from now on. All of them must call this.
    """
    device = torch.device(processes.device)
    mesh = init_device_mesh(device.type, (processes.count,))
    adapters = {parameter for role in ROLES for parameter in policy.parameters(role).values()}
    for layer in policy.decoder.layers:
        # A number alone cannot be shared out.
        whole = {parameter for parameter in layer.parameters() if parameter in adapters or parameter.ndim == 0}
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    # The root shards nothing. Below it, FSDP knows the order of the layers, and fetches the next one ahead.
    fully_shard(policy.decoder, mesh=mesh, ignored_params=set(policy.decoder.parameters()))
    policy.model.to(device)
    policy.device, policy.sharded_over = device, processes


@contextmanager
def equal_passes(policy: Policy) -> Iterator[None]:
    """Inside, the processes make passes without gradients through the language model, each as many as it needs.

    None of them leaves before all have made theirs. Without sharding, this does nothing. All processes must enter.
    """
    processes = policy.sharded_over
    if not policy.is_sharded:
        yield
        return

    def announce(*_: Any) -> None:
        processes.any(True)

    hook = policy.decoder.register_forward_pre_hook(announce)
    try:
        yield
    finally:
        hook.remove()
    token = torch.full((1, 1), policy.pad_token, device=policy.device)
    while processes.any(False):
        with torch.no_grad():
            policy.decoder(input_ids=token, use_cache=False)
