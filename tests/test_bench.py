"""The sides of the benchmark do what they are said to do; what they take is for `ireasoner bench` to say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from ireasoner.model import inputs as prompts
from ireasoner.model.attention import SharedCache
from ireasoner.studies.bench import Bench, Phases
from ireasoner.training.config import resolve
from models import load


def test_the_plain_side_shares_no_prompt(pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch):
    shared: list[SharedCache] = []

    def counted(*args: Any, **kwargs: Any) -> SharedCache:
        shared.append(SharedCache(*args, **kwargs))
        return shared[-1]

    monkeypatch.setattr(prompts, "SharedCache", counted)
    policy = load()
    runner = Bench(policy, resolve({"model": "tiny", "images": "."}), 4)
    for side, caches in ((runner.plain, 0), (runner.ours, 2)):  # the question's and the answers'
        shared.clear()
        side(Phases(torch.device("cpu")), pictures[:1])
        assert len(shared) == caches
        assert (policy.shares_prompts, policy.shares_attention) == (True, True)
