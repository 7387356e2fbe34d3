"""Counting the memory that a model takes, from the tensors that it makes.

What a pass keeps depends on shapes and types alone, so the count is the same on the meta device, where a model of any
size takes no memory. It follows the model and its adapters by itself, whatever they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface

from ireasoner.method.types import ROLES
from ireasoner.model.footprint import Footprint
from ireasoner.model.forward import new_cache
from ireasoner.model.pieces import release_memory
from ireasoner.model.policy import Policy

NAME = "ireasoner_counting"
TRIAL = 64  # tokens of a trial; another one has twice as many
SPARE = 0.1  # of the free memory: allocators leave gaps, and libraries have buffers of their own


def limit_sampling(policy: Policy, tokens_per_batch: int) -> None:
    """Let sampling take as much memory as an update of so many tokens would, and no more than the device has free."""
    policy.sampling_bytes = tokens_per_batch * policy.footprint.update_per_token(False)
    if policy.device.type == "cuda":
        release_memory()  # what an earlier model left behind for reuse does not count as free
        free, _ = torch.cuda.mem_get_info(policy.device)
        policy.sampling_bytes = min(policy.sampling_bytes, int((1 - SPARE) * free))


class _Fused(torch.autograd.Function):
    """Keeps for the backward pass what fused attention keeps: what goes in and what comes out. Computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        rows, heads, length, _ = query.shape
        output = value.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output)
        return output


def _fused_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """In place of fused kernels where these cannot run: on the meta device, and flash attention with a mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) if groups > 1 else each for each in (key, value))
    output: Any = _Fused.apply(query, key, value)
    return output.transpose(1, 2), None


AttentionInterface.register(NAME, _fused_attention)


def count(policy: Policy) -> Footprint:
    """What a policy takes, from running a few tokens of text."""
    before: Any = policy.decoder.config._attn_implementation
    if policy.device.type == "meta" or "flash" in before:
        policy.decoder.set_attn_implementation(NAME)
    try:
        return _counted(policy)
    finally:
        policy.decoder.set_attn_implementation(before)
        policy.model.set_adapter(ROLES[0])  # as it is in a new policy


def _counted(policy: Policy) -> Footprint:
    vocabulary, width = policy.backbone.get_output_embeddings().weight.shape
    itemsize = policy.backbone.dtype.itemsize
    adapters = [sum(p.nbytes for p in policy.parameters(role).values()) for role in ROLES]
    once, twice = _saved(policy, TRIAL), _saved(policy, 2 * TRIAL)
    # The mask grows with the square of the tokens, and so do scores of attention that is not fused. Both are left out.
    kept = [2 * one / TRIAL - two / (2 * TRIAL) for one, two in zip(once, twice, strict=True)]
    once, twice = _cached(policy, TRIAL), _cached(policy, 2 * TRIAL)
    keys, values = ((two - one) // TRIAL for one, two in zip(once, twice, strict=True))
    return Footprint(
        weights=sum(_held(tensor) for tensor in [*policy.model.parameters(), *policy.model.buffers()]),
        optimizer=2 * sum(adapters) + 2 * max(adapters),
        kept=round(sum(kept)),
        layer=round(max(kept)),
        inputs=len(policy.decoder.layers) * width * itemsize,
        cache=keys + values,
        shared=max(keys, keys * 4 // itemsize) + values,
        state=sum(once) - TRIAL * (keys + values),
        logits=4 * vocabulary,
        feature=width * itemsize,
    )


def _held(tensor: Tensor) -> int:
    """Bytes of a tensor in this process, which may have a share of it."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def _saved(policy: Policy, tokens: int) -> list[int]:
    """Bytes that the backward pass needs of each layer of the language model, after a pass over so many tokens."""
    layers = policy.decoder.layers
    held = {tensor.untyped_storage()._cdata for tensor in [*policy.model.parameters(), *policy.model.buffers()]}
    saved: list[list[Any]] = [[] for _ in range(len(layers) + 1)]  # what comes before the first layer is apart
    place = 0

    def enter(index: int) -> None:
        nonlocal place
        place = index

    def keep(tensor: Tensor) -> None:  # no backward pass follows; what a node saved of its own output would be a circle
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            held.add(storage._cdata)
            saved[place].append(storage)  # kept alive, or another one might get its address

    hooks = [
        layer.register_forward_pre_hook(lambda *_, index=index: enter(index)) for index, layer in enumerate(layers, 1)
    ]
    try:
        with (
            torch.enable_grad(),
            policy.acting_as("solver"),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            policy.decoder(**_inputs(policy, tokens), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [sum(storage.nbytes() for storage in storages) for storages in saved[1:]]


@torch.no_grad()
def _cached(policy: Policy, tokens: int) -> tuple[int, int]:
    """Bytes in the cache after a pass over so many tokens: of keys, and of values and everything else."""
    cache = new_cache(policy)
    with policy.acting_as(None):
        policy.decoder(**_inputs(policy, tokens), past_key_values=cache, use_cache=True)
    held = [(name, each) for layer in cache.layers for name, each in vars(layer).items() if isinstance(each, Tensor)]
    keys = sum(tensor.nbytes for name, tensor in held if name == "keys")
    return keys, sum(tensor.nbytes for _, tensor in held) - keys


def _inputs(policy: Policy, tokens: int) -> dict[str, Tensor]:
    """One sequence of text with a mask, as packed completions have; with none, a model would look into tensors to make
    one, which the meta device does not have."""
    ids = torch.full((1, tokens), policy.pad_token, dtype=torch.long, device=policy.device)
    mask = torch.zeros(1, 1, tokens, tokens, dtype=policy.backbone.dtype, device=policy.device)
    return {"input_ids": ids, "attention_mask": mask}
