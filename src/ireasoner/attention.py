"""Decoding several completions of one prompt, whose keys and values are kept once and read once for all of them.

Repeating a prompt's cache for each of its N completions costs N times the memory, and N times the bytes that are read
for every token. Here the queries of all completions of a prompt meet its keys in one
matrix product, and each completion's own keys in another; one softmax runs over both. Same mathematics; plugged in
through transformers' `AttentionInterface`.

Shape suffixes: B prompts, M most completions of one, R rows (completions), K key-value heads, G query heads for each,
P prompt positions, T own positions, W width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

NAME = "ireasoner_shared_prompt"
MORE = ("softcap", "s_aux", "position_bias")  # what some families ask of attention beyond softmax and product
_active: list[SharedCache] = []  # whose keys the attention function reads: an attention module knows its layer only


class SharedLayer(DynamicLayer):
    """One layer's cache: the prompts' keys and values [B, K, P, W]; the rows' own [R, K, T, W] as `keys`, `values`."""

    def __init__(self, prompt_keys: Tensor, prompt_values: Tensor) -> None:
        super().__init__()
        self.prompt_keys, self.prompt_values = prompt_keys, prompt_values

    def get_seq_length(self) -> int:
        """Prompt positions and own."""
        return self.prompt_keys.shape[-2] + (self.keys.shape[-2] if self.is_initialized else 0)  # type: ignore[union-attr]


class SharedCache(Cache):
    """The cache of completions that share their prompts.

    Args:
        prompts: the prompts' cache, one row each.
        mask_BP: 1 at real tokens of the prompts.
        count: completions of each prompt, neighbours together.
    """

    def __init__(self, prompts: Cache, mask_BP: Tensor, count: int) -> None:
        super().__init__(layers=[SharedLayer(layer.keys, layer.values) for layer in prompts.layers])  # type: ignore[union-attr, arg-type]
        self.mask_BP = mask_BP.bool()
        self._arrange(torch.arange(len(mask_BP), device=mask_BP.device).repeat_interleave(count))

    def _arrange(self, prompt_R: Tensor) -> None:
        """Rows in order of their prompts, side by side in a [B, M] grid; what is left of it points at row 0."""
        self.prompt_R = prompt_R
        counts_B = torch.bincount(prompt_R, minlength=len(self.mask_BP))
        starts_B = counts_B.cumsum(0) - counts_B
        within_R = torch.arange(len(prompt_R), device=prompt_R.device) - starts_B[prompt_R]
        self.most = int(counts_B.max())
        self.place_R = prompt_R * self.most + within_R
        self.row_BM = torch.zeros(len(self.mask_BP) * self.most, dtype=torch.long, device=prompt_R.device)
        self.row_BM[self.place_R] = torch.arange(len(prompt_R), device=prompt_R.device)
        self.full = len(prompt_R) == len(self.row_BM)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in rising order; prompts that lose all of theirs are dropped too."""
        left_B, prompt_R = torch.unique(self.prompt_R[beam_idx], return_inverse=True)
        for layer in self.layers:
            assert isinstance(layer, SharedLayer)
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[beam_idx], layer.values[beam_idx]  # type: ignore[index]
            if len(left_B) < len(self.mask_BP):
                layer.prompt_keys, layer.prompt_values = layer.prompt_keys[left_B], layer.prompt_values[left_B]
        self.mask_BP = self.mask_BP[left_B]
        self._arrange(prompt_R)

    def to_grid(self, rows: Tensor) -> Tensor:
        """[R, K, X, W] to [B, K, M·X, W]."""
        grid = rows if self.full else rows[self.row_BM]
        grid = grid.view(len(self.mask_BP), self.most, *rows.shape[1:])
        return grid.transpose(1, 2).flatten(2, 3)

    def to_rows(self, grid: Tensor) -> Tensor:
        """[B, K, M·X, W] to [R, K, X, W]."""
        rows = grid.unflatten(2, (self.most, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self.full else rows[self.place_R]


def shared_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: query [R, K·G, 1, W], own keys and values [R, K, T, W]; [R, 1, K·G, W].

    Raises:
        NotImplementedError: the model's attention is more than softmax and product.
    """
    if more := [name for name in MORE if others.get(name) is not None]:
        raise NotImplementedError(f"completions cannot share their prompts in attention with {', '.join(more)}")
    cache = _active[-1]
    layer = cache.layers[module.layer_idx]  # type: ignore[index]
    assert isinstance(layer, SharedLayer)
    rows, heads, length, width = query.shape
    assert length == 1  # every own token lies before it
    key_heads, own = key.shape[1], key.shape[2]
    # Scores in bfloat16 would be off by 1/64 and more where they are large; fused kernels keep them in float32 too.
    exact = torch.promote_types(query.dtype, torch.float32)
    # The query heads of one key head, and in the grid the rows of one prompt, are more queries to the same keys.
    query = (query.to(exact) * (width**-0.5 if scaling is None else scaling)).reshape(rows, key_heads, -1, width)
    to_prompt = cache.to_grid(query) @ layer.prompt_keys.to(exact).transpose(-1, -2)
    to_prompt = to_prompt.masked_fill(~cache.mask_BP[:, None, None], -torch.inf)
    to_own = query @ key.to(exact).transpose(-1, -2)
    weights = torch.cat([to_prompt, cache.to_grid(to_own)], -1).softmax(-1).to(value.dtype)
    output = cache.to_rows(weights[..., :-own] @ layer.prompt_values) + cache.to_rows(weights[..., -own:]) @ value
    return output.reshape(rows, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, shared_attention)


@contextmanager
def attending(decoder: PreTrainedModel, cache: Cache) -> Iterator[None]:
    """Forward passes of the language model inside attend to this cache, if it is a shared one."""
    if not isinstance(cache, SharedCache):
        yield
        return
    before: Any = decoder.config._attn_implementation
    decoder.set_attn_implementation(NAME)
    _active.append(cache)
    try:
        yield
    finally:
        _active.pop()
        decoder.set_attn_implementation(before)
