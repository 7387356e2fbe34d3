"""The policy's next-token distributions at the tokens of texts that have been sampled, and how likely these tokens are
to it, for rewards that read them.

No engine is asked for them: a server would have to send a number for every word of its vocabulary. They are computed
by one forward pass of the group, as the update computes them, whoever has sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ireasoner.method.types import Completion, Role, TokenDistributions
from ireasoner.model.forward import completion_hidden
from ireasoner.model.inputs import build_prompts, right_padded
from ireasoner.model.loss import CHUNK_LOGITS
from ireasoner.model.pieces import gathered
from ireasoner.model.policy import Policy
from ireasoner.rollouts.engine import Request


@torch.no_grad()
def token_distributions(
    policy: Policy, request: Request, completions: Sequence[Completion], role: Role | None
) -> list[TokenDistributions]:
    """Entropy and self-certainty at every token of a request's completions, under a role's adapter as it is now.

    All completions go through the model together.
    """
    entropies, certainties = _of_tokens(policy, request, completions, role, lambda logits, _: _statistics(logits))
    pairs = zip(entropies, certainties, strict=True)
    return [TokenDistributions(tuple(h.tolist()), tuple(c.tolist())) for h, c in pairs]


@torch.no_grad()
def token_logprobs(
    policy: Policy, request: Request, completions: Sequence[Completion], role: Role | None
) -> list[list[float]]:
    """The log-probability of every token of some completions behind a request's prompt, at temperature 1.

    The prompt need not be the one that they were sampled for: it may show another image.
    """

    def chosen(logits_TV: Tensor, ids_T: Tensor) -> tuple[Tensor]:
        return (logits_TV.log_softmax(-1).gather(-1, ids_T[:, None])[:, 0],)

    (found,) = _of_tokens(policy, request, completions, role, chosen)
    return [each.tolist() for each in found]


def text_logprobs(
    policy: Policy, request: Request, texts: Sequence[tuple[str, str]], role: Role | None, tokens_per_batch: int
) -> list[list[float]]:
    """The log-probability of every token of some texts, under a role's adapter as it is now and at temperature 1.

    Args:
        policy: the model.
        request: the prompt, with the image that is looked at.
        texts: what was said behind the prompt, and the text that follows. Each of the two is tokenized by itself.
        role: whose adapter; None: the backbone alone.
        tokens_per_batch: most tokens, padding included, that go through the model together, unless one text has more.
    """
    tokenizer = policy.processor.tokenizer
    before, after = (
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in column]
        for column in ([said for said, _ in texts], [follows for _, follows in texts])
    )
    whole = [(*said, *follows) for said, follows in zip(before, after, strict=True)]
    found: list[list[float]] = [[] for _ in texts]
    by_length = sorted((i for i in range(len(texts)) if after[i]), key=lambda i: len(whole[i]))
    for batch in gathered(by_length, lambda rows: len(rows) * len(whole[rows[-1]]) <= tokens_per_batch):
        rows = [Completion("", whole[i], (), "stop") for i in batch]
        for i, logprobs in zip(batch, token_logprobs(policy, request, rows, role), strict=True):
            found[i] = logprobs[len(before[i]) :]
    return found


def _of_tokens(
    policy: Policy,
    request: Request,
    completions: Sequence[Completion],
    role: Role | None,
    read: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
) -> list[tuple[Tensor, ...]]:
    """What is read from the logits [T, V] at tokens [T]: for each column of it, a tensor for each completion.

    Logits are held in chunks, whatever the size of the vocabulary.
    """
    prompts = build_prompts(policy, [request.image], [request.messages])
    lengths = [len(completion.token_ids) for completion in completions]
    ids_RC, mask_RC = right_padded(policy, [c.token_ids for c in completions])
    hidden_TD = completion_hidden(policy, prompts, ids_RC, mask_RC, role)
    size = max(1, CHUNK_LOGITS // policy.output_layer(hidden_TD[:1]).shape[-1])
    chunks = zip(hidden_TD.split(size), ids_RC[mask_RC].split(size), strict=True)
    parts = [read(policy.output_layer(hidden), ids) for hidden, ids in chunks]
    return [torch.cat(column).split(lengths) for column in zip(*parts, strict=True)]


def _statistics(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """H(π) = −Σ_v π ln π, and KL(U ‖ π) = −ln V − 1/V Σ_v ln π, of each row [T]."""
    logprobs_TV = logits_TV.log_softmax(-1)
    entropies_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    return entropies_T, -math.log(logits_TV.shape[-1]) - logprobs_TV.mean(-1)
