"""Prompts that are to be sampled from, run once: in parts where memory asks for it, and what prompts about the same
image begin with once for all of them.

The questions of an evaluation come several to an image. Their prompts begin alike, with the image and the words before
the question, which is nearly all of them. This beginning is run once, and what is left of each prompt behind it, as the
completions of a prompt are in an update. Then each prompt gets a cache of its own, as if it had been run alone.

Shape suffixes: B prompts, P prompt positions (left-padded), A images, T positions of a line, which holds what is left
of the prompts about an image, one after another (right-padded); D width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicLayer

from ireasoner.model.forward import Prefix, prefill, run_packed
from ireasoner.model.inputs import Prompts, image_tokens, left_padded
from ireasoner.model.policy import Policy


def prefill_in_parts(policy: Policy, prompts: Prompts, size: int) -> Prefix:
    """As `prefill`, with at most `size` prompts at a time, and with what those about one image begin with run once.

    Without gradients. Several parts are for caches of keys and values alone (`shares_prompts`).
    """
    parts = [_prefill_by_image(policy, prompts.padded(slice(i, i + size))) for i in range(0, len(prompts), size)]
    first, *others = parts
    # Layer by layer, so that the parts' caches and their copy are never all there at once.
    for layer, *rest in zip(*(part.cache.layers for part in parts), strict=True) if others else ():
        assert isinstance(layer, DynamicLayer)
        for name in ("keys", "values"):
            setattr(layer, name, torch.cat([getattr(each, name) for each in (layer, *rest)]))
            for each in rest:
                setattr(each, name, None)
    joined = (torch.cat([getattr(part, name) for part in parts]) for name in ("last_hidden_BD", "next_position_B"))
    return Prefix(first.cache, prompts.mask_BP, *joined)


def _prefill_by_image(policy: Policy, prompts: Prompts) -> Prefix:
    """As `prefill`, with what the prompts about one image begin with run once."""
    lengths: list[int] = prompts.mask_BP.sum(1).tolist()
    images = _beginnings(policy, prompts, lengths)
    if not images:
        return prefill(policy, prompts)
    texts = [{name: row[-n:] for name, row in prompts.row(i).items()} for i, n in enumerate(lengths)]
    starts = left_padded(
        policy,
        [{name: row[:shared] for name, row in texts[rows[0]].items()} for rows, shared in images],
        [prompts.images[rows[0]] for rows, _ in images],
    )
    ends = [[texts[row]["input_ids"][shared:] for row in rows] for rows, shared in images]
    number_AT = _lines([[torch.full_like(end, number) for number, end in enumerate(line)] for line in ends])
    offset_AT = _lines([[torch.arange(len(end), device=end.device) for end in line] for line in ends])
    real_AT = _lines([[torch.ones_like(end, dtype=torch.bool) for end in line] for line in ends])
    prefix = prefill(policy, starts)
    hidden_ATD = run_packed(policy, prefix, _lines(ends), number_AT, offset_AT, real_AT)

    width = starts.mask_BP.shape[1]
    image_B, column_BP = (each.to(policy.device) for each in _places(prompts, images, lengths, width))
    for layer in prefix.cache.layers:  # one after another, so that both caches are never there as a whole
        assert isinstance(layer, DynamicLayer)
        for name in ("keys", "values"):
            of_images: Tensor = getattr(layer, name).transpose(1, 2)
            setattr(layer, name, of_images[image_B[:, None], column_BP].transpose(1, 2).contiguous())
    last_B = column_BP[:, -1] - width
    next_position_B = prefix.next_position_B[image_B] + offset_AT[image_B, last_B] + 1
    return Prefix(prefix.cache, prompts.mask_BP, hidden_ATD[image_B, last_B], next_position_B)


def _places(
    prompts: Prompts, images: Sequence[tuple[list[int], int]], lengths: Sequence[int], width: int
) -> tuple[Tensor, Tensor]:
    """Where the images' cache, of beginnings that are padded to `width` and lines behind them, has the prompts.

    Returns:
        The image of each prompt [B], and the columns of its tokens [B, P]; any column where it has padding.
    """
    image_B = torch.zeros(len(prompts), dtype=torch.long)
    column_BP = torch.zeros(prompts.mask_BP.shape, dtype=torch.long)
    for image, (rows, shared) in enumerate(images):
        end = width
        for row in rows:
            begin, end = end, end + lengths[row] - shared  # of what is left of this prompt
            image_B[row] = image
            column_BP[row, -lengths[row] :] = torch.tensor([*range(width - shared, width), *range(begin, end)])
    return image_B, column_BP


def _beginnings(policy: Policy, prompts: Prompts, lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """For each image the prompts about it, and how many tokens they begin with in common: these are run once.

    Empty where the prompts are to be run as they are, because that is less work or the only way that is right.
    """
    # What may be packed behind a prompt in an update may be so here. Models that are told by token types which words
    # of a prompt see later ones (PaliGemma) need prompts whole. Where the types say what is an image
    # (`mm_token_type_ids`), such words are parts of an image, and an image is never divided.
    if not policy.shares_attention or "token_type_ids" in prompts.text:
        return []
    rows_of: dict[int, list[int]] = {}
    for row, image in enumerate(prompts.images):
        rows_of.setdefault(id(image), []).append(row)
    if len(rows_of) == len(prompts):
        return []
    ids = [row[-length:] for row, length in zip(prompts.text["input_ids"].tolist(), lengths, strict=True)]
    images = [(rows, _in_common([ids[row] for row in rows])) for rows in rows_of.values()]
    # The beginning must hold the whole image, and one more token: of a position of several dimensions (M-RoPE), only a
    # word's tells where the next word is.
    tokens = set(image_tokens(policy).tolist())
    if any(not tokens.isdisjoint(ids[row][shared - 1 :]) for rows, shared in images for row in rows):
        return []
    longest = max(shared for _, shared in images)
    line = max(sum(lengths[row] - shared for row in rows) for rows, shared in images)
    return images if len(images) * (longest + line) < prompts.mask_BP.numel() else []


def _in_common(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens the texts begin with in common; less than all of any, because something must be left."""
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False))
    return min(sum(1 for _ in alike), min(map(len, texts)) - 1)


def _lines(ends: Sequence[Sequence[Tensor]]) -> Tensor:
    """The ends [length] of each image in a line [A, T]."""
    return pad_sequence([torch.cat([*line]) for line in ends], batch_first=True)
