"""Other views of an image: what a light change leaves, what a mask hides, and that a seed draws the same again."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from PIL import Image

from ireasoner.training.alterations import SQUARE, altered
from ireasoner.training.evaluation import GRAY


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=float)


@pytest.mark.parametrize("view", ["light", "masked"])
def test_a_seed_draws_a_view(pictures: list[Image.Image], view: Literal["light", "masked"]):
    before = pixels(pictures[0]).copy()
    first, again, other = (altered(pictures[0], view, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert first.size == pictures[0].size
    assert np.array_equal(pixels(first), pixels(again))
    assert not np.array_equal(pixels(first), pixels(other))
    assert not np.array_equal(pixels(first), before)
    assert np.array_equal(pixels(pictures[0]), before)  # which is not changed itself


@pytest.mark.parametrize("seed", range(8))
def test_a_light_change_keeps_what_lies_at_the_edge(seed: int):
    """Four coloured corners on white are there, in their places, and the light changes by a tenth at most."""
    corners = {(0, 0): (255, 0, 0), (1, 0): (0, 255, 0), (0, 1): (0, 0, 255), (1, 1): (0, 0, 0)}
    image = Image.new("RGB", (200, 120), "white")
    for (right, down), colour in corners.items():
        image.paste(colour, (right * 180, down * 100, right * 180 + 20, down * 100 + 20))
    changed = pixels(altered(image, "light", (seed,)))
    for (right, down), colour in corners.items():
        place = changed[down * 80 : down * 80 + 40, right * 150 : right * 150 + 50]
        assert (np.abs(place - colour).max(axis=2) < 60).sum() > 250  # of 400 pixels
    white = changed[50:70, 80:120]
    assert white.min() > 255 * 0.8


def test_a_mask_hides_six_in_ten_squares_and_nothing_else():
    image = Image.new("RGB", (SQUARE * 40, SQUARE * 30 + 5), "white")
    masked = pixels(altered(image, "masked", (0,)))
    assert set(np.unique(masked)) == {0, 255}
    squares = masked[: SQUARE * 30].reshape(30, SQUARE, 40, SQUARE, 3)
    assert (squares == squares[:, :1, :, :1, :1]).all()
    assert 0.55 < (squares[:, 0, :, 0, 0] == 0).mean() < 0.65


def test_the_image_itself_and_a_gray_one(pictures: list[Image.Image]):
    assert altered(pictures[0], "same", (0,)) is pictures[0]
    assert (pixels(altered(pictures[0], "blank", (0,))) == GRAY).all()
