"""Where randomness comes from: seeds made anew for every draw, and never a generator that is carried along.

A draw's seed is (run seed, step, image, occurrence, purpose). So a resumed run draws what an uninterrupted one would
have drawn, and what is drawn for one image does not depend on which other images are in its batch or on its rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Purposes; their numbers are part of every stored run.
PROPOSE, SOLVE, RANDOM_REWARD, PICK_LABEL, PICK_EXAMPLES, CHANGE_VIEW, SOLVE_VIEW = range(7)


def draw_seed(run_seed: int, step: int, image: str, occurrence: int, purpose: int) -> tuple[int, ...]:
    """The seed of one draw.

    Args:
        run_seed: the run's `--seed`.
        step: the training step, from 1.
        image: its name.
        occurrence: how often the image has come before in this step's batch: a repetition must not draw the same.
        purpose: what is drawn, such as `SOLVE`.
    """
    name = int.from_bytes(hashlib.sha256(image.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return (run_seed, step, name, occurrence, purpose)


def uniforms(seeds: Sequence[Sequence[int]], count: int, longest: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) to draw tokens with, [len(seeds), count, longest]; each row depends on its own seed alone."""
    return np.stack([np.random.default_rng(list(seed)).random((count, longest)) for seed in seeds])
