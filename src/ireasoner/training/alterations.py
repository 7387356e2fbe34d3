"""Other views of an image, for rewards that ask whether an answer depends on what is seen, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageEnhance

from ireasoner.method.types import Alteration
from ireasoner.model.views import Pictures, View, images_of
from ireasoner.training.evaluation import blanked

# Of a light change: the widest margin on each side, as a share of the image, and the largest change of the light. The
# image moves and shrinks and is not cropped, because what is asked about may lie at its edge; it is not mirrored,
# because text and "left of" do not survive that.
MARGIN, LIGHT = 0.04, 0.1
# Of a masked image, as in PAPO (arXiv 2507.06448): the pixels of a square, and the share of the squares that are black.
SQUARE, HIDDEN = 14, 0.6


def altered(view: View, how: Alteration, seed: Sequence[int]) -> View:
    """Another view of an image, of the same size, so that it is as many tokens. The same seed draws the same one.

    Of several images, each is altered by a draw of its own.
    """
    if how == "same":
        return view
    if how == "blank":
        return blanked([view])[0]
    rng = np.random.default_rng(list(seed))
    change = _lightly_changed if how == "light" else _masked
    images = tuple(change(image, rng) for image in images_of(view))
    return replace(view, images=images) if isinstance(view, Pictures) else images[0]


def _lightly_changed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image on a narrow margin in the colour of its border, a little brighter or darker and with other contrast."""
    width, height = image.size
    left, top, right, bottom = rng.uniform(0.0, MARGIN, 4) * (width, height, width, height)
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    fill = tuple(int(value) for value in np.median(border, axis=0))
    # Where each pixel of the view is looked up in the image: x' = (width + left + right) / width · x − left.
    lookup = ((width + left + right) / width, 0.0, -left, 0.0, (height + top + bottom) / height, -top)
    moved = image.transform(image.size, Image.Transform.AFFINE, lookup, Image.Resampling.BICUBIC, fillcolor=fill)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast):
        moved = change(moved).enhance(rng.uniform(1.0 - LIGHT, 1.0 + LIGHT))
    return moved


def _masked(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image with most of its squares black."""
    pixels = np.array(image)
    height, width = pixels.shape[:2]
    hidden = rng.random((-(-height // SQUARE), -(-width // SQUARE))) < HIDDEN
    pixels[hidden.repeat(SQUARE, axis=0).repeat(SQUARE, axis=1)[:height, :width]] = 0
    return Image.fromarray(pixels)
