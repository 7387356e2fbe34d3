"""Decoding several completions of one prompt, whose keys and values are kept once and read once for all of them.

Repeating a prompt's cache for each of its N completions costs N times the memory, and N times the bytes that are read
for every token. Here the queries of all completions of a prompt meet its keys in one matrix product, and each
completion's own keys in another; one softmax runs over both. That is the same mathematics. It is plugged in through
transformers' `AttentionInterface`.

A step of decoding must be the same work on the same memory every time, so that it can be captured as a CUDA graph and
replayed (`ireasoner.rollouts.live`). So room for a completion's own keys and values is allocated at the start, and how
far decoding has come stands in a tensor.

Shape suffixes: B prompts, M the largest number of completions of one prompt, R rows (completions), K key-value heads,
G query heads for each, P prompt positions, T own positions, W width of a head.
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
# Arguments by which some families ask for more of attention than softmax and product.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
# transformers tells an attention function a layer's number and not its cache; so `attending` leaves the cache here.
_active: list[SharedCache] = []


class SharedLayer(DynamicLayer):
    """One layer's cache: the prompts' keys and values [B, K, P, W], and the rows' own [R, K, T, W] (`keys`, `values`).

    Keys are in float32 at least, because scores in bfloat16 would be off by 1/64 and more where they are large. Fused
    kernels keep scores in float32, too.
    """

    keys: Tensor  # type: ignore[assignment]  # never None here
    values: Tensor  # type: ignore[assignment]

    def __init__(self, prompt_keys: Tensor, prompt_values: Tensor, rows: int, at: Tensor, room: int) -> None:
        super().__init__()
        self.prompt_keys = prompt_keys.to(torch.promote_types(prompt_keys.dtype, torch.float32))
        self.prompt_values = prompt_values
        self.at = at
        self.keys, self.values = (
            of_prompts.new_zeros(rows, of_prompts.shape[1], room, of_prompts.shape[3])
            for of_prompts in (self.prompt_keys, prompt_values)
        )
        self.is_initialized = True

    def get_seq_length(self) -> Tensor:  # type: ignore[override]  # transformers' static layers return a tensor, too
        """The number of positions so far: the prompt's and a row's own."""
        return self.prompt_keys.shape[-2] + self.at[0]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one more position of every row in its place; returns all places."""
        # In place and at an index in a tensor: a captured step finds the memory and the position where they were.
        self.keys.index_copy_(2, self.at, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.at, value_states)
        return self.keys, self.values


class SharedCache(Cache):
    """The cache of completions that share their prompts.

    Args:
        prompts: the prompts' cache, one row each.
        mask_BP: 1 at real tokens of the prompts.
        count: completions of each prompt, neighbours together.
        room: own positions that a completion may take.
        fixed: attend to all places, with those ahead masked, so that every step is the same work on the same memory.
    """

    def __init__(self, prompts: Cache, mask_BP: Tensor, count: int, room: int, fixed: bool) -> None:
        self.at = mask_BP.new_zeros(1, dtype=torch.long)  # the own position that comes next
        self.fixed = fixed
        self.written = 1  # places that hold keys when attention reads them: a number on the host, unlike `at`
        rows = len(mask_BP) * count
        layers: list[Any] = [SharedLayer(layer.keys, layer.values, rows, self.at, room) for layer in prompts.layers]  # type: ignore[union-attr, arg-type]
        super().__init__(layers=layers)
        # What is added to the scores of a prompt's positions: nothing, or what hides padding.
        self.hiding_BP = torch.zeros(mask_BP.shape, device=mask_BP.device).masked_fill(~mask_BP.bool(), -torch.inf)
        self.places_T = torch.arange(room, device=mask_BP.device)
        self.ahead_T = self.places_T > 0
        self._arrange(torch.arange(len(mask_BP), device=mask_BP.device).repeat_interleave(count))

    def advance(self) -> None:
        """Go to the next own position; must be called after each forward pass."""
        self.at += 1
        self.ahead_T.copy_(self.places_T > self.at)  # in place, because a captured step reads this very memory
        self.written += 1

    def _arrange(self, prompt_R: Tensor) -> None:
        """Place the rows in a [B, M] grid, side by side with those of the same prompt.

        Where a prompt has fewer than M rows, the grid's places are filled with row 0, whose results are not used.
        """
        # Rows are sorted by prompt. Those of prompt b begin where those of the prompts before it end, and row r is
        # number `within_R[r]` of its prompt.
        self.prompt_R = prompt_R
        counts_B = torch.bincount(prompt_R, minlength=len(self.hiding_BP))
        starts_B = counts_B.cumsum(0) - counts_B
        within_R = torch.arange(len(prompt_R), device=prompt_R.device) - starts_B[prompt_R]
        self.most = int(counts_B.max())
        self.place_R = prompt_R * self.most + within_R
        self.row_BM = torch.zeros(len(self.hiding_BP) * self.most, dtype=torch.long, device=prompt_R.device)
        self.row_BM[self.place_R] = torch.arange(len(prompt_R), device=prompt_R.device)
        self.full = len(prompt_R) == len(self.row_BM)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in rising order. Prompts that lose all of their rows are dropped, too."""
        # `prompt_R` numbers the prompts that are left anew, and each of them has a row: `_arrange` counts on both.
        left_B, prompt_R = torch.unique(self.prompt_R[beam_idx], return_inverse=True)
        for layer in self.layers:
            assert isinstance(layer, SharedLayer)
            layer.keys, layer.values = layer.keys[beam_idx], layer.values[beam_idx]
            if len(left_B) < len(self.hiding_BP):
                layer.prompt_keys, layer.prompt_values = layer.prompt_keys[left_B], layer.prompt_values[left_B]
        self.hiding_BP = self.hiding_BP[left_B]
        self._arrange(prompt_R)

    def to_grid(self, rows: Tensor) -> Tensor:
        """[R, K, X, W] to [B, K, M·X, W]: what the rows of a prompt ask becomes one matrix."""
        grid = rows if self.full else rows[self.row_BM]
        grid = grid.view(len(self.hiding_BP), self.most, *rows.shape[1:])
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
    """The attention function that transformers calls in each layer while `attending` to a shared cache.

    It gets queries [R, K·G, 1, W] and the rows' own keys and values [R, K, T, W], and returns [R, 1, K·G, W]. The mask
    is not used: the cache knows what is padding.

    Raises:
        NotImplementedError: the model's attention is more than softmax and product.
    """
    if unsupported := [name for name in UNSUPPORTED if others.get(name) is not None]:
        raise NotImplementedError(f"completions cannot share their prompts in attention with {', '.join(unsupported)}")
    cache = _active[-1]
    layer = cache.layers[module.layer_idx]  # type: ignore[index]
    assert isinstance(layer, SharedLayer)
    rows, heads, length, width = query.shape
    assert length == 1  # decoding runs one token at a time
    # Where every step must be the same work, all places are read, and those that are still to be written, which hold
    # zeros, are hidden below. Elsewhere only the written ones are read.
    if not cache.fixed:
        key, value = key[:, :, : cache.written], value[:, :, : cache.written]
    key_heads, places = key.shape[1], key.shape[2]
    # The G query heads of a key head are G queries to the same keys; in the grid, the rows of a prompt are so as well.
    query = (query.to(key.dtype) * (width**-0.5 if scaling is None else scaling)).reshape(rows, key_heads, -1, width)
    to_prompt = cache.to_grid(query) @ layer.prompt_keys.transpose(-1, -2)
    to_prompt += cache.hiding_BP[:, None, None]  # in place: on a CPU much faster than a mask
    to_own = query @ key.transpose(-1, -2)
    if cache.fixed:
        to_own = to_own.masked_fill(cache.ahead_T, -torch.inf)
    # One softmax over both: the prompt's positions and the row's own compete as they would in one cache.
    weights = torch.cat([to_prompt, cache.to_grid(to_own)], -1).softmax(-1).to(value.dtype)
    # The prompts' values are multiplied in the grid, because the rows of a prompt share them; own values row by row.
    from_prompt = cache.to_rows(weights[..., :-places] @ layer.prompt_values)
    output = from_prompt + cache.to_rows(weights[..., -places:]) @ value
    return output.reshape(rows, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, shared_attention)


@contextmanager
def attending(decoder: PreTrainedModel, cache: Cache) -> Iterator[None]:
    """Let the language model's forward passes inside attend to this cache, if it is a `SharedCache`."""
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
