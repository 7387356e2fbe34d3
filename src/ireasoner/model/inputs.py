"""What a policy reads: images after the vision tower, prompts before the language model, and prompts after it.

Shape suffixes: B prompts, P prompt positions (left-padded), C completion positions (right-padded), D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ireasoner.model.attention import SharedCache
from ireasoner.model.processors import SeenImage


@dataclass(frozen=True)
class EncodedImage:
    """An image after the processor and the frozen vision tower, each of which saw it once."""

    seen: SeenImage
    features: Any  # what the model's `get_image_features` returned, features alone

    @property
    def pooled(self) -> Tensor:
        """The features that stand at the image tokens: [tokens, D]."""
        pooled = self.features["pooler_output"]
        pooled = torch.cat(list(pooled)) if isinstance(pooled, list | tuple) else pooled
        return pooled.reshape(-1, pooled.shape[-1])


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts, one image each, as the processor wrote them; the same for every adapter.

    `text` holds [B, P] tensors by their names in the model's forward pass, `extras` one mapping for each row of what
    that pass wants to know about the image beside its features (grids, sizes), `texts` the prompts before their images
    took their places, for engines that read text.
    """

    texts: tuple[str, ...]
    text: Mapping[str, Tensor]
    images: tuple[EncodedImage, ...]
    extras: tuple[Mapping[str, Tensor], ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice | Sequence[int]) -> Prompts:
        index = list(range(len(self))[rows] if isinstance(rows, slice) else rows)
        used = self.mask_BP[index].any(0).int().argmax()  # columns before it would be padding alone
        return Prompts(
            tuple(self.texts[i] for i in index),
            {name: tensor[index, used:] for name, tensor in self.text.items()},
            tuple(self.images[i] for i in index),
            tuple(self.extras[i] for i in index),
        )

    @property
    def mask_BP(self) -> Tensor:
        """1 at real tokens."""
        return self.text["attention_mask"]

    def followed_by(self, ids_BC: Tensor, mask_BC: Tensor) -> Prompts:
        """The same with right-padded text behind them."""
        more = {"input_ids": ids_BC, "attention_mask": mask_BC}
        zeros = torch.zeros_like(ids_BC)
        text = {n: torch.cat([t, more.get(n, zeros).to(t.dtype)], dim=1) for n, t in self.text.items()}
        return replace(self, text=text)


@dataclass
class Prefix:
    """Prompts after the forward pass: their cache, and what the first completion token needs."""

    cache: Cache
    mask_BP: Tensor
    last_hidden_BD: Tensor
    next_position_B: Tensor

    def select(self, rows: Tensor) -> Prefix:
        """Some of the rows, or some of them several times; the cache is changed in place."""
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]  # for every kind of layer: index_select along the batch
        return Prefix(self.cache, self.mask_BP[rows], self.last_hidden_BD[rows], self.next_position_B[rows])

    def repeat(self, count: int, *, room: int | None = None, fixed: bool = False) -> Prefix:
        """Every prompt `count` times over, neighbours together.

        Its cache is repeated too; or kept once for all, with `room` for so many further positions of each (`fixed`: as
        in `SharedCache`).
        """
        rows = torch.arange(len(self.mask_BP), device=self.mask_BP.device).repeat_interleave(count)
        if room is None:
            return self.select(rows)
        cache = SharedCache(self.cache, self.mask_BP, count, room, fixed)
        return Prefix(cache, self.mask_BP[rows], self.last_hidden_BD[rows], self.next_position_B[rows])


def is_text(name: str) -> bool:
    return name in ("input_ids", "attention_mask") or name.endswith("token_type_ids")


def joined(features: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The features of several images as the vision tower would return them for all at once."""

    def join(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return torch.cat(list(values))
        return [each for value in values for each in value]

    # Pooled features come image by image; anything else in a list comes layer by layer, and in each image by image.
    return {
        name: join([f[name] for f in features])
        if name == "pooler_output" or isinstance(first, Tensor)
        else [join(layer) for layer in zip(*(f[name] for f in features), strict=True)]
        for name, first in features[0].items()
    }
