"""Shared material: the tiny LMM that ships with the package, and pictures of its world."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
from PIL import Image

from ireasoner.playground import world


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Six pictures of the world in the demo's style, all different."""
    rng = np.random.default_rng(123)
    return [world.draw(world.sample_picture(rng), world.sample_style("chalk", rng), rng) for _ in range(6)]
