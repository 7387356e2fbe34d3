"""Whether small updates survive the backbone's precision: the same updates, seen in that precision and in float32.

Shape suffixes: T completion tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ireasoner.method.recipe import Recipe
from ireasoner.method.types import Completion, Role
from ireasoner.model.forward import completion_hidden
from ireasoner.model.inputs import Prompts, right_padded
from ireasoner.model.learner import Learner
from ireasoner.model.lora import HALF
from ireasoner.model.loss import token_statistics
from ireasoner.model.options import OptimizerOptions
from ireasoner.model.policy import Policy

UPDATES = 10  # one alone is hard to tell from rounding, even where it comes through in full


@dataclass(frozen=True)
class Precision:
    """How an adapter comes through in the backbone's precision.

    Attributes:
        moved: root mean square of what it changes, in float32, in the log-probabilities of tokens (nats).
        rounding: root mean square of what the precision adds to this.
        slope: how much of the change in float32 is found in the backbone's precision, by least squares.
        error: standard error of the slope.
        kl: of the policy to the reference, in float32, in nats a token.
        kl_floor: how much more it is in the backbone's precision, because both round.
    """

    moved: float
    rounding: float
    slope: float
    error: float
    kl: float
    kl_floor: float


def measure_precision(
    policy: Policy, prompts: Prompts, groups: Sequence[Sequence[Completion]], learning_rate: float
) -> Precision:
    """Make some updates of the solver, and compare what they do in the backbone's precision and in float32.

    The solver's adapter is as before in the end. The backbone is taken to float32 layer by layer, so that there is
    never a second copy of it.

    Args:
        policy: with a backbone in any precision.
        prompts: B prompts.
        groups: of each prompt, the same number of completions, at least 2; the more tokens, the smaller the error.
        learning_rate: of the updates.
    """
    before = {name: p.detach().clone() for name, p in policy.parameters("solver").items()}
    learner = Learner(policy, "solver", Recipe(), OptimizerOptions(learning_rate=learning_rate))
    rewards = [[float(i % 2) for i in range(len(group))] for group in groups]  # any: they make the updates' direction
    try:
        for _ in range(UPDATES):
            learner.update(prompts, groups, 2 * torch.tensor(rewards) - 1, rewards)
        return compare_precision(policy, prompts, groups)
    finally:
        with torch.no_grad():
            for name, parameter in policy.parameters("solver").items():
                parameter.copy_(before[name])


def compare_precision(policy: Policy, prompts: Prompts, groups: Sequence[Sequence[Completion]]) -> Precision:
    """How the solver's adapter, as it is, comes through in the backbone's precision; arguments as above."""
    found_T, kl = changes(policy, prompts, groups)
    with in_float32(policy):
        expected_T, true_kl = changes(policy, prompts, groups)
    power = expected_T.square().sum().clamp(min=1e-30)  # 0 where no update was finite
    slope = (found_T @ expected_T) / power
    off = (found_T - slope * expected_T).square().mean()
    return Precision(
        moved=expected_T.square().mean().sqrt().item(),
        rounding=(found_T - expected_T).square().mean().sqrt().item(),
        slope=slope.item(),
        error=(off / power).sqrt().item(),
        kl=true_kl,
        kl_floor=kl - true_kl,
    )


@torch.no_grad()
def changes(policy: Policy, prompts: Prompts, groups: Sequence[Sequence[Completion]]) -> tuple[Tensor, float]:
    """The solver's log-probabilities of the completions' tokens less those of the reference [T], and the mean KL."""
    ids_RC, mask_RC = right_padded(policy, [completion.token_ids for group in groups for completion in group])
    tokens_T = ids_RC[mask_RC]
    with policy.without_sharing():
        roles: tuple[Role | None, ...] = ("solver", None)
        ours, reference = (completion_hidden(policy, prompts, ids_RC, mask_RC, role) for role in roles)
    solver = token_statistics(ours, reference, tokens_T, policy.output_layer)
    unadapted = token_statistics(reference, reference, tokens_T, policy.output_layer)
    return solver.logprobs_T - unadapted.logprobs_T, solver.kl_T.mean().item()


@contextmanager
def in_float32(policy: Policy) -> Iterator[None]:
    """Inside, the language model computes in float32 with the same weights; the image features stay as they are.

    Each part is taken to float32 for its own forward pass, and put back after it.
    """
    head = policy.backbone.get_output_embeddings()
    embedding = policy.backbone.get_input_embeddings()  # looks its rows up, and computes nothing
    parts = [part for part in policy.decoder.children() if part is not policy.decoder.layers and part is not embedding]
    halves: dict[torch.nn.Parameter, Tensor] = {}

    def widen(part: torch.nn.Module, _: Any = None) -> None:
        for parameter in part.parameters():
            if parameter.dtype in HALF:
                halves[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(part: torch.nn.Module, *_: Any) -> None:
        for parameter in part.parameters():
            if parameter in halves:
                parameter.data = halves.pop(parameter)

    def enter(decoder: torch.nn.Module, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return given, {**named, "inputs_embeds": named["inputs_embeds"].float()}

    hooks = [policy.decoder.register_forward_pre_hook(enter, with_kwargs=True)]
    for part in (*policy.decoder.layers, *parts):
        hooks += [part.register_forward_pre_hook(widen), part.register_forward_hook(restore)]
    output_layer = policy.output_layer

    def logits(hidden: Tensor) -> Tensor:
        widen(head)
        found = output_layer(hidden)
        restore(head)
        return found

    policy.output_layer = logits  # type: ignore[method-assign]  # hides the class's own
    try:
        yield
    finally:
        del policy.output_layer
        for hook in hooks:
            hook.remove()
        for parameter, half in halves.items():  # of a part whose forward pass failed
            parameter.data = half
