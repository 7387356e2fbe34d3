"""Attention over shared prompts against plain attention over repeated ones, in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from ireasoner.model import attention
from ireasoner.model.attention import SharedCache, shared_attention

B, N, KEY_HEADS, GROUPS, WIDTH, PROMPT = 3, 4, 2, 3, 8, 7
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]])


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Heads one by one, over [prompt, own] keys: [R, C, H, W]."""
    out = []
    for head in range(query.shape[1]):
        scores = query[:, head] @ keys[:, head // GROUPS].transpose(1, 2) * WIDTH**-0.5
        out.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values[:, head // GROUPS])
    return torch.stack(out, 2)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kept", [range(12), [0, 2, 3, 4, 9, 11], [1, 8, 9, 10, 11], [7]], ids=len)
def test_shared_prompts_are_repeated_prompts(monkeypatch: pytest.MonkeyPatch, kept: Any, fixed: bool):
    """Two own tokens before, one now, room for two more; whole groups, ragged ones, and groups that are gone."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    prompt_keys, prompt_values = draw(B, KEY_HEADS, PROMPT, WIDTH), draw(B, KEY_HEADS, PROMPT, WIDTH)
    past = draw(B * N, KEY_HEADS, 2, WIDTH), draw(B * N, KEY_HEADS, 2, WIDTH)
    rows = torch.tensor(list(kept))
    now = draw(len(rows), KEY_HEADS, 1, WIDTH), draw(len(rows), KEY_HEADS, 1, WIDTH)
    query = draw(len(rows), KEY_HEADS * GROUPS, 1, WIDTH)
    prompts = DynamicCache()
    prompts.update(prompt_keys, prompt_values, 0)
    cache = SharedCache(prompts, MASK, N, 5, fixed)
    for t in range(2):
        cache.update(*(each[:, :, t : t + 1] for each in past), 0)
        cache.advance()
    assert cache.get_seq_length() == PROMPT + 2
    if len(rows) < B * N:
        cache.reorder_cache(rows)
    keys, values = cache.update(*now, 0)
    monkeypatch.setattr(attention, "_active", [cache])
    found, _ = shared_attention(SimpleNamespace(layer_idx=0), query, keys, values, None)  # type: ignore[arg-type]

    prompt_R = rows // N
    all_keys = torch.cat([prompt_keys[prompt_R], past[0][rows], now[0]], 2)
    all_values = torch.cat([prompt_values[prompt_R], past[1][rows], now[1]], 2)
    mask = torch.cat([MASK.bool()[prompt_R], torch.ones(len(rows), 3, dtype=torch.bool)], 1)[:, None]
    expected = plain_attention(query, all_keys, all_values, mask)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_bfloat16_is_as_exact_as_a_fused_kernel(monkeypatch: pytest.MonkeyPatch):
    """Large scores, as trained heads have them: rounded to bfloat16 they would lose five times as much."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    prompt, own = (draw(B, KEY_HEADS, 100, 64) * 3, draw(B, KEY_HEADS, 100, 64)), draw(2, B * N, KEY_HEADS, 20, 64)
    query = draw(B * N, KEY_HEADS * GROUPS, 1, 64)
    prompts = DynamicCache()
    prompts.update(*prompt, 0)
    cache = SharedCache(prompts, torch.ones(B, 100), N, 20, fixed=False)
    monkeypatch.setattr(attention, "_active", [cache])
    for t in range(20):
        if t:
            cache.advance()
        written = cache.update(*(each[:, :, t : t + 1] for each in own), 0)
    found, _ = shared_attention(SimpleNamespace(layer_idx=0), query, *written, None)  # type: ignore[arg-type]

    keys, values = (torch.cat([p.repeat_interleave(N, 0), o], 2) for p, o in zip(prompt, own, strict=True))
    fused, exact = (
        scaled_dot_product_attention(query.to(kind), keys.to(kind), values.to(kind), enable_gqa=True).transpose(1, 2)
        for kind in (torch.bfloat16, torch.float64)
    )
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 2 * (fused - exact).norm()


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_attention_of_another_kind_is_refused(name: str):
    one = torch.ones(1, 1, 1, 1)
    with pytest.raises(NotImplementedError, match=f"attention with {name}"):
        shared_attention(SimpleNamespace(layer_idx=0), one, one, one, None, **{name: torch.ones(1)})  # type: ignore[arg-type]


def test_a_prompts_cache_is_held_once():
    prompts = DynamicCache()
    prompts.update(torch.zeros(B, KEY_HEADS, PROMPT, WIDTH), torch.zeros(B, KEY_HEADS, PROMPT, WIDTH), 0)
    cache = SharedCache(prompts, MASK, N, 1, fixed=False)
    assert cache.layers[0].prompt_keys.data_ptr() == prompts.layers[0].keys.data_ptr()  # type: ignore[union-attr]
    cache.update(torch.zeros(B * N, KEY_HEADS, 1, WIDTH), torch.zeros(B * N, KEY_HEADS, 1, WIDTH), 0)
    cache.reorder_cache(torch.tensor([4, 6]))  # the second prompt's
    assert cache.layers[0].prompt_keys.shape[0] == 1  # type: ignore[union-attr]
    assert cache.layers[0].keys.shape[0] == 2  # type: ignore[union-attr]
