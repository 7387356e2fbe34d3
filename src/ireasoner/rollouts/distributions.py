"""The policy's next-token distributions at the tokens of texts that have been sampled, and how likely these tokens are
to it, for rewards that read them.

No engine is asked for them: a server would have to send a number for every word of its vocabulary. They are computed
by a forward pass of the group, as the update computes them, whoever has sampled.

`tokens_per_batch` is the most tokens of completions, padding included, that go through the model together, unless one
completion has more. It bounds the memory, whatever the size of a group.
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
    policy: Policy, request: Request, completions: Sequence[Completion], role: Role | None, tokens_per_batch: int
) -> list[TokenDistributions]:
    """Entropy and self-certainty at every token of a request's completions, under a role's adapter as it is now."""

    def read(logits_TV: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return _statistics(logits_TV)

    entropies, certainties = _of_tokens(policy, request, completions, role, tokens_per_batch, read)
    pairs = zip(entropies, certainties, strict=True)
    return [TokenDistributions(tuple(h.tolist()), tuple(c.tolist())) for h, c in pairs]


@torch.no_grad()
def token_logprobs(
    policy: Policy, request: Request, completions: Sequence[Completion], role: Role | None, tokens_per_batch: int
) -> list[list[float]]:
    """The log-probability of every token of some completions behind a request's prompt, at temperature 1.

    The prompt need not be the one that they were sampled for: it may show another image.
    """

    def chosen(logits_TV: Tensor, ids_T: Tensor) -> tuple[Tensor]:
        return (logits_TV.log_softmax(-1).gather(-1, ids_T[:, None])[:, 0],)

    (found,) = _of_tokens(policy, request, completions, role, tokens_per_batch, chosen)
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
        tokens_per_batch: as the module says, counted over both parts of a text.
    """
    tokenizer = policy.processor.tokenizer
    before, after = (
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in column]
        for column in ([said for said, _ in texts], [follows for _, follows in texts])
    )
    whole = [(*said, *follows) for said, follows in zip(before, after, strict=True)]
    found: list[list[float]] = [[] for _ in texts]
    by_length = sorted((i for i in range(len(texts)) if after[i]), key=lambda i: len(whole[i]))
    rows = [Completion("", whole[i], (), "stop") for i in by_length]
    if rows:
        logprobs = token_logprobs(policy, request, rows, role, tokens_per_batch)
        for i, of_text in zip(by_length, logprobs, strict=True):
            found[i] = of_text[len(before[i]) :]
    return found


def _of_tokens(
    policy: Policy,
    request: Request,
    completions: Sequence[Completion],
    role: Role | None,
    tokens_per_batch: int,
    read: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
) -> list[tuple[Tensor, ...]]:
    """What is read from the logits [T, V] at tokens [T]: for each column of it, a tensor for each completion.

    Logits are held in chunks, whatever the size of the vocabulary.
    """
    prompts = build_prompts(policy, [request.image], [request.messages])
    lengths = [len(completion.token_ids) for completion in completions]
    parts: list[tuple[Tensor, ...]] = []

    def fits(rows: Sequence[int]) -> bool:
        return len(rows) * max(lengths[i] for i in rows) <= tokens_per_batch

    for rows in gathered(range(len(lengths)), fits):
        ids_RC, mask_RC = right_padded(policy, [completions[i].token_ids for i in rows])
        hidden_TD = completion_hidden(policy, prompts, ids_RC, mask_RC, role)
        size = max(1, CHUNK_LOGITS // policy.output_layer(hidden_TD[:1]).shape[-1])
        chunks = zip(hidden_TD.split(size), ids_RC[mask_RC].split(size), strict=True)
        parts += [read(policy.output_layer(hidden), ids) for hidden, ids in chunks]
    return [torch.cat(column).split(lengths) for column in zip(*parts, strict=True)]


def _statistics(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """H(π) = −Σ_v π ln π, and KL(U ‖ π) = −ln V − 1/V Σ_v ln π, of each row [T]."""
    logprobs_TV = logits_TV.log_softmax(-1)
    entropies_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    return entropies_T, -math.log(logits_TV.shape[-1]) - logprobs_TV.mean(-1)
