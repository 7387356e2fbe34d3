"""Pictures of the embedded world, for tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from ireasoner.playground import world
from ireasoner.playground.world import Picture


@st.composite
def pictures(draw: st.DrawFn) -> Picture:
    """Any picture that the world can make, of two to six items."""
    seed, family = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(world.FAMILIES))
    return world.sample_picture(np.random.default_rng(seed), family, draw(st.sampled_from([(2, 4), (2, 6), (6, 6)])))


def some(count: int, seed: int = 0, **options) -> list[Picture]:
    rng = np.random.default_rng(seed)
    return [world.sample_picture(rng, **options) for _ in range(count)]
