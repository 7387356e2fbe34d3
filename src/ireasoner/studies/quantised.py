"""What quantisation does: the same completions and the same update, seen by a quantised model and by the whole one.

Shape suffixes: T completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ireasoner.method.types import Completion
from ireasoner.model.forward import completion_hidden
from ireasoner.model.inputs import Prompts, right_padded
from ireasoner.model.policy import Policy


@dataclass(frozen=True)
class View:
    """What a model makes of some completions, on the CPU.

    Attributes:
        logprobs_T: of their tokens.
        gradient: of an update of the solver on them, as one vector.
    """

    logprobs_T: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Difference:
    """How a quantised model differs from the whole one.

    Attributes:
        gap: mean absolute difference of the log-probabilities of tokens, in nats.
        kl: of the quantised model to the whole one, in nats a token, estimated on the quantised model's own samples.
        cosine: of the two gradients.
        length: the quantised model's gradient's, in those of the whole one's.
    """

    gap: float
    kl: float
    cosine: float
    length: float


def view(policy: Policy, prompts: Prompts, groups: Sequence[Sequence[Completion]]) -> View:
    """Log-probabilities of completions, and the gradient that makes every second one of them likelier and the others
    less likely. Nothing of the policy changes.

    Args:
        policy: whose solver is looked at.
        prompts: B prompts.
        groups: of each prompt, an even number of completions.
    """
    logprobs = []
    for row, group in enumerate(groups):
        ids_NC, mask_NC = right_padded(policy, [completion.token_ids for completion in group])
        hidden = completion_hidden(policy, prompts[row : row + 1], ids_NC, mask_NC, "solver")
        logprobs_T = policy.output_layer(hidden).log_softmax(-1).gather(-1, ids_NC[mask_NC][:, None])[:, 0]
        means = [each.mean() for each in logprobs_T.split(mask_NC.sum(1).tolist())]
        (sum(means[::2]) - sum(means[1::2])).backward()  # type: ignore[union-attr]
        logprobs.append(logprobs_T.detach().cpu())
    gradients = [p.grad.flatten().cpu() for p in policy.parameters("solver").values() if p.grad is not None]
    policy.model.zero_grad(set_to_none=True)
    return View(torch.cat(logprobs), torch.cat(gradients))


def difference(quantised: View, whole: View) -> Difference:
    """How two views of the same completions differ, which the quantised model has sampled."""
    gap_T = quantised.logprobs_T - whole.logprobs_T
    return Difference(
        gap=gap_T.abs().mean().item(),
        kl=(gap_T + (-gap_T).exp() - 1).mean().item(),  # each term is at least 0 (Schulman's k3)
        cosine=cosine_similarity(quantised.gradient, whole.gradient, dim=0).item(),
        length=(quantised.gradient.norm() / whole.gradient.norm()).item(),
    )
