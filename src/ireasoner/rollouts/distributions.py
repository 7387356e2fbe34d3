"""The policy's next-token distributions at the tokens of texts that have been sampled, for rewards that read them.

No engine is asked for them: a server would have to send a number for every word of its vocabulary. They are computed
by one forward pass of the group, as the update computes them, whoever has sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ireasoner.method.types import Completion, Role, TokenDistributions
from ireasoner.model.forward import completion_hidden
from ireasoner.model.inputs import build_prompts
from ireasoner.model.loss import CHUNK_LOGITS
from ireasoner.model.policy import Policy
from ireasoner.rollouts.engine import Request


@torch.no_grad()
def token_distributions(
    policy: Policy, request: Request, completions: Sequence[Completion], role: Role | None
) -> list[TokenDistributions]:
    """Entropy and self-certainty at every token of a request's completions, under a role's adapter as it is now.

    All completions go through the model together. Logits are held in chunks, whatever the size of the vocabulary.
    """
    prompts = build_prompts(policy, [request.image], [request.messages])
    lengths = [len(completion.token_ids) for completion in completions]
    ids_RC = pad_sequence([torch.tensor(c.token_ids) for c in completions], True, policy.pad_token)
    mask_RC = pad_sequence([torch.ones(length, dtype=torch.bool) for length in lengths], True)
    ids_RC, mask_RC = ids_RC.to(policy.device), mask_RC.to(policy.device)
    hidden_TD = completion_hidden(policy, prompts, ids_RC, mask_RC, role)
    vocabulary = policy.output_layer(hidden_TD[:1]).shape[-1]
    parts = [_statistics(policy.output_layer(each)) for each in hidden_TD.split(max(1, CHUNK_LOGITS // vocabulary))]
    entropies, certainties = (torch.cat(column).split(lengths) for column in zip(*parts, strict=True))
    pairs = zip(entropies, certainties, strict=True)
    return [TokenDistributions(tuple(h.tolist()), tuple(c.tolist())) for h, c in pairs]


def _statistics(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """H(π) = −Σ_v π ln π, and KL(U ‖ π) = −ln V − 1/V Σ_v ln π, of each row [T]."""
    logprobs_TV = logits_TV.log_softmax(-1)
    entropies_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    return entropies_T, -math.log(logits_TV.shape[-1]) - logprobs_TV.mean(-1)
