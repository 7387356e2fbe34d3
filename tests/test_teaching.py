"""What the episodes of a step teach: which samples reach which role, and that the sampler takes over the result."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from ireasoner.model.policy import Policy
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training.config import Config, resolve
from ireasoner.training.items import Item
from ireasoner.training.selfplay import SelfPlay
from ireasoner.training.teaching import update
from models import load


class Listener:
    """Stands for a learner: notes what it is taught."""

    def __init__(self) -> None:
        self.taught: list[int] = []

    def advantages(self, rewards: Sequence[Sequence[float]]) -> torch.Tensor:
        return torch.tensor(rewards) - 0.5

    def update(self, prompts: Any, groups: Sequence[Any], advantages_GN: torch.Tensor, total: int) -> dict[str, float]:
        assert len(prompts) == len(groups) == len(advantages_GN)
        self.taught.append(len(groups))
        return {}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load()


def run_of(policy: Policy, config: Config, due: bool) -> Any:
    learners = {"solver": Listener(), "proposer": Listener()}
    return SimpleNamespace(
        policy=policy, config=config, engine=LiveEngine(policy), learners=learners, due=lambda every: due
    )


@pytest.mark.parametrize("due", [True, False])
def test_unreadable_questions_teach_the_proposer_when_its_turn_comes(
    policy: Policy, pictures: list[Image.Image], due: bool
):
    scale = {"steps": 2, "group_size": 3, "max_question_tokens": 2, "max_solution_tokens": 8}  # all questions cut off
    config = resolve({"images": "images", "model": "tiny", "recipe": "paper", **scale})
    run = run_of(policy, config, due)
    play = SelfPlay(policy, run.engine, config).play(
        1, [Item(f"{i}.png", p, "0" * 16) for i, p in enumerate(pictures[:2])]
    )
    episodes, _ = update(run, play)
    assert run.learners["solver"].taught == []
    assert run.learners["proposer"].taught == ([2] if due else [])
    advantages = [episode.proposal.advantage for episode in episodes if episode.proposal]
    assert advantages == ([-0.5, -0.5] if due else [None, None])
