"""The equations of an update: advantages, log-probabilities, exact KL and the REINFORCE loss.

Log-probabilities and KL are computed over completion tokens only and in bounded memory.

Shape suffixes: B rewards of a step, in any shape, G groups of N trajectories, R trajectories, T their completion tokens
laid end to end, C completion positions (padded), V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ireasoner.method.recipe import PAPER

# One chunk of float32 logits takes at most 2^25 x 4 bytes = 128 MiB; policy, reference and their gradients are a few
# of these, whatever the number of tokens and the size of the vocabulary.
CHUNK_LOGITS = 2**25


@dataclass
class MovingBaseline:
    """Exponential moving average of a role's mean reward; it starts at the first batch's mean.

    Starting anywhere else (at 0, say) would give identical rewards a non-zero advantage.
    """

    momentum: float = PAPER.baseline_momentum
    value: float | None = None

    def advantages(self, rewards_B: Tensor) -> Tensor:
        """A = r − b, in the same shape, with b as it is before `update` moves it by these rewards."""
        return rewards_B - self._before(rewards_B)

    def update(self, rewards_B: Tensor) -> None:
        """Move b towards the mean of a whole step's rewards; to be called once in a step."""
        self.value = self.momentum * self._before(rewards_B) + (1.0 - self.momentum) * _mean(rewards_B)

    def _before(self, rewards_B: Tensor) -> float:
        return _mean(rewards_B) if self.value is None else self.value


def _mean(rewards_B: Tensor) -> float:
    """The mean of float32 rewards in double precision, to which `Tensor.mean` would not divide."""
    return rewards_B.sum().item() / rewards_B.numel()


def leave_one_out_advantages(rewards_GN: Tensor) -> Tensor:
    """RLOO: each trajectory against the mean of the others in its group, A_i = r_i − mean_{j≠i} r_j.

    Args:
        rewards_GN: [groups, N], N ≥ 2.

    Raises:
        ValueError: groups of one trajectory, which have no others.
    """
    count = rewards_GN.shape[-1]
    if count < 2:
        raise ValueError("leave-one-out advantages need at least 2 trajectories in a group")
    return (rewards_GN - rewards_GN.mean(-1, keepdim=True)) * count / (count - 1)


def group_normalized_advantages(rewards_GN: Tensor) -> Tensor:
    """GRPO: how many standard deviations of its group a reward is above the group's mean, A_i = (r_i − r̄) / (s + 1e-6).

    s is the standard deviation with N − 1, as in TRL and verl (Shao et al. 2024, arXiv 2402.03300). Equal rewards have
    the advantage 0, whatever rounding leaves of their differences.

    Args:
        rewards_GN: [groups, N], N ≥ 2.

    Raises:
        ValueError: groups of one trajectory, which have no standard deviation.
    """
    if rewards_GN.shape[-1] < 2:
        raise ValueError("group-normalized advantages need at least 2 trajectories in a group")
    differences_GN = rewards_GN - rewards_GN.mean(-1, keepdim=True)
    equal_G1 = (rewards_GN == rewards_GN[..., :1]).all(-1, keepdim=True)
    return torch.where(equal_G1, 0.0, differences_GN / (rewards_GN.std(-1, keepdim=True) + 1e-6))


def advantage_std(advantages: Tensor) -> float:
    """Standard deviation of a step's advantages. 0 means that the step teaches nothing."""
    return advantages.double().std(correction=0).item()


class TokenStatistics(NamedTuple):
    """For each completion token: the chosen token's log-probability, exact KL to the reference, entropy (nats)."""

    logprobs_T: Tensor
    kl_T: Tensor
    token_entropy_T: Tensor


def token_statistics(
    hidden_TD: Tensor,
    reference_hidden_TD: Tensor,
    tokens_T: Tensor,
    output_layer: Callable[[Tensor], Tensor],
    chunk_logits: int = CHUNK_LOGITS,
) -> TokenStatistics:
    """Statistics of each completion token from the hidden states that predict it.

    KL(policy ‖ reference) = Σ_v π (log π − log π_ref), exact over the vocabulary. Gradients flow through `hidden_TD`;
    logits are computed again in the backward pass chunk by chunk, so that memory does not grow with T · V.

    Args:
        hidden_TD: final hidden states of the policy at the positions before each token.
        reference_hidden_TD: those of the reference, without gradient.
        tokens_T: the sampled token ids.
        output_layer: hidden states to logits over V, in float32; the same for policy and reference.
        chunk_logits: the largest number of logits to hold at once.
    """

    def of_chunk(hidden: Tensor, reference_hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logprobs_TV = output_layer(hidden).log_softmax(-1)
        with torch.no_grad():
            reference_TV = output_layer(reference_hidden).log_softmax(-1)
        probabilities_TV = logprobs_TV.exp()
        kl_T = (probabilities_TV * (logprobs_TV - reference_TV)).sum(-1)
        with torch.no_grad():
            entropy_T = -(probabilities_TV * logprobs_TV).sum(-1)
        return logprobs_TV.gather(-1, tokens[:, None])[:, 0], kl_T, entropy_T

    with torch.no_grad():
        vocabulary = output_layer(hidden_TD[:1].detach()).shape[-1]
    size = max(1, chunk_logits // vocabulary)
    parts = [
        checkpoint(of_chunk, h, r, t, use_reentrant=False)
        for h, r, t in zip(hidden_TD.split(size), reference_hidden_TD.split(size), tokens_T.split(size), strict=True)
    ]
    return TokenStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))  # type: ignore[arg-type]


def importance_weights(logprobs_T: Tensor, sampler_logprobs_T: Tensor, cap: float) -> Tensor:
    """How much each token counts: w = min(cap, π(a) / q(a)), through which no gradient flows.

    A token a was drawn from the sampler's distribution q, which is not quite the learner's π: it rounds differently, or
    is of an older version. For any f, E_q[w f] = E_π[f] given what was written before the token, as long as no weight
    is truncated. The cap bounds what a single token can add that the sampler thought unlikely (truncated importance
    sampling: Ionides 2008; for language models Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training"). What was written before and after the token stays the sampler's: to correct that as well
    would take the product of the weights of a whole trajectory, whose variance grows with the length.

    Where one of the log-probabilities is not finite, nothing is known about the token, and its weight is 1.

    Args:
        logprobs_T: log π of the tokens that were drawn.
        sampler_logprobs_T: log q of them, as the sampler told it.
        cap: the largest weight, at least 1; or 0: every weight is 1.
    """
    gap_T = logprobs_T.detach() - sampler_logprobs_T
    known_T = gap_T.isfinite() & (cap > 0)
    return torch.where(known_T, gap_T.exp().clamp(max=cap), 1.0)


def gap_sums(gap_T: Tensor, weights_T: Tensor, cap: float) -> Tensor:
    """What `gap_metrics` needs of some tokens [5], in double precision, to be added up over all tokens of an update.

    Args:
        gap_T: log π − log q of the tokens.
        weights_T: their importance weights.
        cap: the largest weight.
    """
    columns = (torch.ones_like(gap_T), gap_T.abs(), weights_T, weights_T.square(), weights_T == cap)
    return torch.stack([column.double().sum() for column in columns]).cpu()


def gap_metrics(sums: Tensor, weighted: bool) -> dict[str, float]:
    """How far the sampler is from the learner, from the sums of `gap_sums` over all tokens of an update.

    Returns:
        `mean_sampler_gap`: the mean of |log π − log q|, in nats. Where tokens are weighted, also `importance_weight`,
        the mean weight; `importance_capped`, the share of tokens at the cap; and `effective_tokens`, the share of them
        that would make as precise a gradient with equal weights, (Σ w)² / (n Σ w²) (Kish 1965).
    """
    count, distance, weight, squares, capped = sums.tolist()
    found = {"mean_sampler_gap": distance / count}
    if weighted:
        found |= {"importance_weight": weight / count, "importance_capped": capped / count}
        found["effective_tokens"] = weight**2 / (count * squares) if squares else 0.0
    return found


def trajectory_means(values_T: Tensor, mask_RC: Tensor) -> Tensor:
    """The mean [R] over each trajectory's own tokens, of values that stand row by row at True positions of the mask."""
    zeros_RC = torch.zeros(mask_RC.shape, dtype=values_T.dtype, device=values_T.device)
    return zeros_RC.masked_scatter(mask_RC, values_T).sum(-1) / mask_RC.sum(-1)


def forking_means(values_T: Tensor, token_entropy_T: Tensor, mask_RC: Tensor, share: float) -> Tensor:
    """As `trajectory_means`, over the share of each trajectory's tokens with the largest entropy, rounded up.

    They are where a text may go on in different ways, and the others follow (SPINE, arXiv 2511.17938). Of equal
    entropies the earlier token comes first.
    """
    lowest = torch.finfo(token_entropy_T.dtype).min
    entropy_RC = torch.full(mask_RC.shape, lowest, dtype=token_entropy_T.dtype, device=mask_RC.device)
    order_RC = entropy_RC.masked_scatter(mask_RC, token_entropy_T).argsort(dim=-1, descending=True, stable=True)
    kept_R = (share * mask_RC.sum(-1)).ceil()
    kept_RC = order_RC.argsort(-1) < kept_R[:, None]
    return trajectory_means(values_T[kept_RC[mask_RC]], kept_RC)


def reinforce_loss(logprobs_R: Tensor, kl_R: Tensor, advantages_R: Tensor, kl_coef: float) -> Tensor:
    """Σ_i [A_i · (−log π)_i + β · KL_i], from per-trajectory token means; divide by the number of trajectories."""
    return (-advantages_R * logprobs_R + kl_coef * kl_R).sum()


def adapt_kl_coef(kl_coef: float, kl: float, target: float, rate: float = PAPER.kl_rate) -> float:
    """β ← clip(β · exp(rate · (KL − τ)/τ), 1e-8, 1e2), after each update; a rate of 0 leaves β as it is."""
    exponent = min(rate * (kl - target) / target, 50.0)  # exp would overflow long after the clip has decided
    # Not math.exp: for one number in 200 its last bit differs from that of torch, with which runs were recorded.
    factor = torch.tensor(exponent, dtype=torch.float64).exp().item()
    return min(max(kl_coef * factor, 1e-8), 1e2)
