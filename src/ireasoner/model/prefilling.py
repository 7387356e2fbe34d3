"""Prompts that are to be sampled from, run once: in parts where memory asks for it, and what prompts about the same
image begin with once for all of them.

The questions of an evaluation come several to an image. Their prompts begin alike, with the image and the words before
the question, which is most of them. This beginning is run once, and what is left of each prompt behind a copy of its
cache, as if each had been run alone.

Shape suffixes: B prompts, P prompt positions (padding on the left and, where the beginning was run apart, behind the
end as well), C positions of what is left of a prompt (right-padded), D width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ireasoner.model.forward import Prefix, prefill, run_decoder
from ireasoner.model.inputs import Prompts, image_tokens, left_padded
from ireasoner.model.policy import Policy


def prefill_in_parts(policy: Policy, prompts: Prompts, size: int) -> Prefix:
    """As `prefill`, with at most `size` prompts at a time, and with what those about one image begin with run once.

    Without gradients. Several parts are for caches of keys and values alone (`shares_prompts`).
    """
    parts = [_prefill_by_image(policy, prompts.padded(slice(i, i + size))) for i in range(0, len(prompts), size)]
    first, *others = parts
    if not others:
        return first
    # A part that shares beginnings may be longer than one that does not, which then gets more padding. All of this
    # happens layer by layer, so that the parts' caches and their copy are never all there at once.
    for layers in zip(*(part.cache.layers for part in parts), strict=True):
        for name in ("keys", "values"):
            of_parts = [getattr(layer, name) for layer in layers]
            longest = max(each.shape[2] for each in of_parts)  # a sliding window keeps less than the prompt
            joined = torch.cat([pad(each, (0, 0, longest - each.shape[2], 0)) for each in of_parts])
            for layer in layers:
                setattr(layer, name, joined if layer is layers[0] else None)
    width = max(part.mask_BP.shape[1] for part in parts)
    mask_BP = torch.cat([pad(part.mask_BP, (width - part.mask_BP.shape[1], 0)) for part in parts])
    rest = (torch.cat([getattr(part, name) for part in parts]) for name in ("last_hidden_BD", "next_position_B"))
    return Prefix(first.cache, mask_BP, *rest)


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
    image_of = {row: image for image, (rows, _) in enumerate(images) for row in rows}
    image_B = torch.tensor([image_of[row] for row in range(len(prompts))], device=policy.device)
    ends = [text["input_ids"][images[image_of[row]][1] :] for row, text in enumerate(texts)]
    ids_BC = pad_sequence(ends, batch_first=True, padding_value=policy.pad_token)
    length_B = torch.tensor([len(end) for end in ends], device=policy.device)
    place_C = torch.arange(ids_BC.shape[1], device=policy.device)

    prefix = prefill(policy, starts).select(image_B)
    mask_BP = torch.cat([prefix.mask_BP, (place_C < length_B[:, None]).to(prefix.mask_BP.dtype)], dim=1)
    positions_BC = prefix.next_position_B[:, None] + place_C
    hidden_BCD = run_decoder(policy, prefix.cache, ids_BC, mask_BP, positions_BC)
    last_hidden_BD = hidden_BCD[torch.arange(len(prompts), device=policy.device), length_B - 1]
    return Prefix(prefix.cache, mask_BP, last_hidden_BD, prefix.next_position_B + length_B)


def _beginnings(policy: Policy, prompts: Prompts, lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """For each image the prompts about it, and how many tokens they begin with in common: these are run once.

    Empty where the prompts are to be run as they are, because that is less work or the only way that is right.
    """
    # Where completions may follow a prompt that is run once, ends of prompts may as well. Models that are told by token
    # types which words of a prompt see later ones (PaliGemma) need prompts whole. Where the types say what is an image
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
    end = max(lengths[row] - shared for rows, shared in images for row in rows)
    return images if len(images) * longest + len(prompts) * end < prompts.mask_BP.numel() else []


def _in_common(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens the texts begin with in common; less than all of any, because something must be left."""
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False))
    return min(sum(1 for _ in alike), min(map(len, texts)) - 1)
