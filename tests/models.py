"""Policies, learners and samples from the shipped tiny model, with the options that a test names."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ireasoner.method.recipe import Recipe
from ireasoner.method.types import Completion, Role
from ireasoner.model.forward import completion_hidden
from ireasoner.model.inputs import Prompts, build_prompts, encode_images
from ireasoner.model.learner import Learner
from ireasoner.model.loading import load_policy
from ireasoner.model.loss import advantage_std
from ireasoner.model.options import BackboneOptions, OptimizerOptions
from ireasoner.model.parallel import ALONE, Processes
from ireasoner.model.policy import Policy
from ireasoner.rollouts.engine import Engine, Request


def load(model: str = "tiny", *, seed: int = 0, **options: Any) -> Policy:
    """A policy in float32 on the CPU; `options` are those of `BackboneOptions`.

    It is a copy, which is made in a fraction of the time that loading takes: each model is loaded once.
    """
    torch.manual_seed(seed)  # as loading does
    return copy.deepcopy(_loaded(model, BackboneOptions(**{"dtype": "float32", **options}), seed))


def load_anew(model: str = "tiny", **options: Any) -> Policy:
    """The same by way of its files, for tests of what happens while a model is loaded."""
    return load_policy(model, BackboneOptions(**{"dtype": "float32", **options}), device="cpu")


@lru_cache(maxsize=16)
def _loaded(model: str, options: BackboneOptions, seed: int) -> Policy:
    return load_policy(model, options, device="cpu", seed=seed)


def learner(policy: Policy, role: Role, processes: Processes = ALONE, **options: Any) -> Learner:
    """A learner; `options` are those of `Recipe` and of `OptimizerOptions`, by name."""
    of_optimizer = {name: options.pop(name) for name in OptimizerOptions.model_fields if name in options}
    return Learner(policy, role, Recipe(**options), OptimizerOptions(**of_optimizer), processes)


def teach(
    learner: Learner, prompts: Prompts, groups: Sequence[Sequence[Completion]], rewards: Sequence[Sequence[float]]
) -> dict[str, float]:
    """One update on groups and their rewards, as training does it in one process; its metrics."""
    advantages = learner.advantages(rewards)
    metrics = learner.update(prompts, groups, advantages, rewards)
    return {**metrics, "advantage_std": advantage_std(advantages)}


def requests(
    policy: Policy, images: Sequence[Image.Image], messages: Sequence[list[dict[str, Any]]], seeds: Sequence[int] = ()
) -> list[Request]:
    """One request for each image and chat; seeds 0, 1, … unless given."""
    encoded = encode_images(policy, images)
    numbers = seeds or range(len(images))
    return [Request(image, chat, (seed,)) for image, chat, seed in zip(encoded, messages, numbers, strict=True)]


def sample(
    engine: Engine, asked: Sequence[Request], role: Role | None, n: int, longest: int, **options: Any
) -> list[list[Completion]]:
    """N completions of each request, at most `longest` tokens long; at temperature 1 unless `options` say otherwise."""
    return engine.sample(asked, role, n=n, max_tokens=longest, **options)


def padded(policy: Policy, completions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids of completions, right-padded, and the mask of the real ones."""
    longest = max(len(ids) for ids in completions)
    ids = torch.tensor([[*row, *[policy.pad_token] * (longest - len(row))] for row in completions])
    return ids, torch.tensor([[i < len(row) for i in range(longest)] for row in completions])


def sampler_gap(
    policy: Policy, asked: Sequence[Request], groups: Sequence[Sequence[Completion]], role: Role | None
) -> float:
    """Most that the log-probabilities of a sampler differ from those that an update computes."""
    prompts = build_prompts(policy, [r.image for r in asked], [r.messages for r in asked])
    flat = [completion for group in groups for completion in group]
    ids, mask = padded(policy, [completion.token_ids for completion in flat])
    with torch.no_grad():
        logprobs = policy.output_layer(completion_hidden(policy, prompts, ids, mask, role)).log_softmax(-1)
    found = logprobs.gather(-1, ids[mask][:, None])[:, 0]
    return (found - torch.tensor([p for completion in flat for p in completion.logprobs])).abs().max().item()


def tokens(groups: Sequence[Sequence[Completion]]) -> list[list[tuple[int, ...]]]:
    """The token ids of each completion."""
    return [[completion.token_ids for completion in group] for group in groups]
