"""The update of one role: REINFORCE with exact KL to the backbone, on the sampled token ids.

What it does: per-trajectory means of token log-probabilities, weighted by advantage, plus β times the exact KL to the
backbone without adapters; one AdamW step on the role's own LoRA tensors; β then moves toward its KL target, if it may.

What it leaves out: importance ratios and clipping (each batch is used once, on the policy that sampled it), value
functions, advantage normalisation, entropy bonuses, dropout. It does not know how a reward was made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ireasoner.method.types import Completion, Role
from ireasoner.model.advantages import MovingBaseline, leave_one_out_advantages
from ireasoner.model.inputs import Prompts
from ireasoner.model.loss import adapt_kl_coef, reinforce_loss, token_statistics, trajectory_means
from ireasoner.model.parallel import Processes
from ireasoner.model.policy import Policy


class Learner:
    """Optimiser, baseline and KL coefficient of one role.

    Args:
        policy: whose adapter is trained.
        role: which.
        advantage: "ema": against a moving average; "rloo": against the group's others.
        tokens_per_batch: most tokens in one forward pass; the update does not depend on it but for rounding.
        processes: who updates along, each on its own groups; the update is that of all of them.
    """

    def __init__(
        self,
        policy: Policy,
        role: Role,
        *,
        learning_rate: float,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
        kl_coef: float = 1e-3,
        kl_target: float = 0.02,
        kl_rate: float = 0.1,
        advantage: Literal["ema", "rloo"] = "ema",
        baseline_momentum: float = 0.9,
        tokens_per_batch: int = 16384,
        processes: Processes | None = None,
    ) -> None:
        self.policy, self.advantage, self.processes = policy, advantage, processes or Processes()
        self.role: Role = role
        self.parameters = policy.parameters(role)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=learning_rate, weight_decay=weight_decay, foreach=True
        )
        self.baseline = MovingBaseline(baseline_momentum)
        self.kl_coef, self.kl_target, self.kl_rate = kl_coef, kl_target, kl_rate
        self.max_grad_norm, self.tokens_per_batch = max_grad_norm, tokens_per_batch

    def update(
        self, prompts: Prompts | None, groups: Sequence[Sequence[Completion]], rewards: Sequence[Sequence[float]]
    ) -> dict[str, float]:
        """One optimiser step on B groups of N completions, and those of the other processes.

        Args:
            prompts: B prompts; None without groups.
            groups: their completions; the same N for all.
            rewards: one number for each completion.

        Returns:
            Metrics by name, without the role.
        """
        rewards_BN = torch.tensor(rewards, dtype=torch.float32)
        counted = torch.tensor([rewards_BN.numel(), rewards_BN.sum()], dtype=torch.float64)
        total, rewards_sum = self.processes.sum(counted).tolist()
        if self.advantage == "ema":
            advantages_BN = self.baseline.advantages(rewards_BN, rewards_sum / total)
        else:
            advantages_BN = leave_one_out_advantages(rewards_BN) if groups else rewards_BN
        sums: dict[str, float] = {"loss": 0.0, "kl": 0.0, "token_entropy": 0.0}
        sampler_gap = torch.zeros(())
        for rows, columns in self._micro_batches(prompts, groups):
            some = [completion for row in rows for completion in groups[row][columns]]
            ids_BC, sampled_BC, mask_BC = _pad(some, self.policy.pad_token, self.policy.device)
            read = prompts[rows]  # type: ignore[index]
            hidden = self.policy.completion_hidden(read, ids_BC, mask_BC, self.role)
            with torch.no_grad():
                reference = self.policy.completion_hidden(read, ids_BC, mask_BC, None)
            tokens_T = ids_BC[mask_BC]
            statistics = token_statistics(hidden, reference, tokens_T, self.policy.output_layer)
            kl_B = trajectory_means(statistics.kl_T, mask_BC)
            loss = reinforce_loss(
                trajectory_means(statistics.logprobs_T, mask_BC),
                kl_B,
                advantages_BN[rows, columns].flatten().to(self.policy.device),
                self.kl_coef,
            )
            (loss / total).backward()
            sums["loss"] += loss.item() / total
            sums["kl"] += kl_B.sum().item() / total
            sums["token_entropy"] += trajectory_means(statistics.token_entropy_T, mask_BC).sum().item() / total
            gap = (statistics.logprobs_T.detach() - sampled_BC[mask_BC]).abs().max().cpu()
            sampler_gap = sampler_gap.maximum(gap)  # which keeps NaN, unlike `max`
        sums = self._exchange(sums, advantages_BN)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm).item()
        if math.isfinite(grad_norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        metrics = {
            **sums,
            "kl_coef": self.kl_coef,
            "grad_norm": grad_norm,
            "sampler_gap": torch.tensor(self.processes.gather([sampler_gap.item()], self.processes.count)).max().item(),
        }
        if math.isfinite(sums["kl"]):
            self.kl_coef = adapt_kl_coef(self.kl_coef, sums["kl"], self.kl_target, self.kl_rate)
        return metrics

    def _exchange(self, sums: Mapping[str, float], advantages_BN: Tensor) -> dict[str, float]:
        """Make gradients and sums those of all processes together; adds the spread of the advantages."""
        if self.processes.count > 1:
            for parameter in self.parameters.values():  # a process without groups has no gradient yet
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            flat = self.processes.sum(torch.cat([g.flatten() for g in gradients]))
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        moments = [advantages_BN.numel(), advantages_BN.sum().item(), advantages_BN.square().sum().item()]
        found = self.processes.sum(torch.tensor([*sums.values(), *moments], dtype=torch.float64)).tolist()
        count, first, second = found[-3:]
        spread = math.sqrt(max(second / count - (first / count) ** 2, 0.0))
        return {**dict(zip(sums, found, strict=False)), "advantage_std": spread}

    def _micro_batches(
        self, prompts: Prompts | None, groups: Sequence[Sequence[Completion]]
    ) -> Iterator[tuple[list[int], slice]]:
        """Rows of prompts, those of like length together, and a slice of their trajectories.

        Their padded tokens stay within `tokens_per_batch`, as far as one trajectory does.
        """
        if prompts is None:
            return
        count = len(groups[0])
        shared = self.policy.shares_prompts

        def padded(rows: Sequence[int], count: int = count) -> int:
            prompt, completion = max(prompt_lengths[i] for i in rows), max(lengths[i] for i in rows)
            return len(rows) * (prompt + count * completion if shared else count * (prompt + completion))

        prompt_lengths = prompts.mask_BP.sum(1).tolist()
        lengths = [max(len(c.token_ids) for c in group) for group in groups]
        rows: list[int] = []
        for row in sorted(range(len(groups)), key=lambda row: (prompt_lengths[row], lengths[row])):
            more = [*rows, row]
            if padded(more) <= self.tokens_per_batch:
                rows = more
                continue
            if rows:
                yield rows, slice(0, count)
            rows = [row]
            if padded(rows) > self.tokens_per_batch:
                fitting = [n for n in range(1, count) if padded(rows, n) <= self.tokens_per_batch]
                size = max(fitting, default=1)
                for first in range(0, count, size):
                    yield rows, slice(first, first + size)
                rows = []
        if rows:
            yield rows, slice(0, count)


def _pad(completions: Sequence[Completion], pad_token: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, the sampler's log-probabilities and the mask of real tokens, each [B, C]."""
    longest = max(len(c.token_ids) for c in completions)
    ids = torch.full((len(completions), longest), pad_token)
    sampled = torch.zeros((len(completions), longest))
    mask = torch.zeros((len(completions), longest), dtype=torch.bool)
    for row, completion in enumerate(completions):
        length = len(completion.token_ids)
        ids[row, :length] = torch.tensor(completion.token_ids)
        sampled[row, :length] = torch.tensor(completion.logprobs)
        mask[row, :length] = True
    return ids.to(device), sampled.to(device), mask.to(device)
