"""The update of one role: REINFORCE with exact KL to the backbone, on the sampled token ids.

What it does: per-trajectory means of token log-probabilities, weighted by advantage, plus β times the exact KL to the
backbone without adapters; one AdamW step on the role's own LoRA tensors; β then moves toward its KL target, if it may.

What it leaves out: importance ratios and clipping (each batch is used once, on the policy that sampled it), value
functions, advantage normalisation, entropy bonuses, dropout. It does not know how a reward was made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ireasoner.method.recipe import Recipe
from ireasoner.method.types import Completion, Role
from ireasoner.model.advantages import MovingBaseline, leave_one_out_advantages
from ireasoner.model.forward import completion_hidden
from ireasoner.model.inputs import Prompts
from ireasoner.model.loss import adapt_kl_coef, reinforce_loss, token_statistics, trajectory_means
from ireasoner.model.options import OptimizerOptions
from ireasoner.model.parallel import Processes
from ireasoner.model.policy import Policy


class Learner:
    """Optimizer, baseline and KL coefficient of one role.

    Args:
        policy: whose adapter is trained.
        role: which.
        recipe: its advantages and KL. A question has no group: the proposer is always measured against the average.
        options: of the optimizer.
        processes: who updates along, each on its own groups; the update is that of all of them.
    """

    def __init__(
        self,
        policy: Policy,
        role: Role,
        recipe: Recipe,
        options: OptimizerOptions,
        processes: Processes | None = None,
    ) -> None:
        self.policy, self.recipe, self.options = policy, recipe, options
        self.processes = processes or Processes()
        self.role: Role = role
        self.parameters = policy.parameters(role)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=options.learning_rate, weight_decay=options.weight_decay, foreach=True
        )
        self.baseline = MovingBaseline(recipe.baseline_momentum)
        self.kl_coef = recipe.kl_coef

    def advantages(self, rewards: Sequence[Sequence[float]]) -> Tensor:
        """Advantages [groups, N] of all groups of a step, those of the other processes too; moves the baseline once."""
        rewards_GN = torch.tensor(rewards, dtype=torch.float32)
        if self.role == "solver" and self.recipe.advantage == "rloo":
            return leave_one_out_advantages(rewards_GN)
        return self.baseline.advantages(rewards_GN)

    def update(
        self, prompts: Prompts | None, groups: Sequence[Sequence[Completion]], advantages_BN: Tensor, total: int
    ) -> dict[str, float]:
        """One optimizer step on B groups of N completions, and those of the other processes.

        Args:
            prompts: B prompts; None without groups.
            groups: this process's completions; the same N for all.
            advantages_BN: one for each of them.
            total: how many completions all processes have together.

        Returns:
            Metrics by name, without the role: `loss`, `kl` and `token_entropy` in nats, means over trajectories;
            `kl_coef`; `grad_norm` before clipping; `sampler_gap`, the largest difference between the sampler's
            log-probabilities and the learner's.
        """
        sums, sampler_gap = torch.zeros(3, dtype=torch.float64), torch.zeros(())
        for rows, columns in self._micro_batches(prompts, groups):
            some = [completion for row in rows for completion in groups[row][columns]]
            ids_BC, sampled_BC, mask_BC = _pad(some, self.policy.pad_token, self.policy.device)
            read = prompts[rows]  # type: ignore[index]
            hidden = completion_hidden(self.policy, read, ids_BC, mask_BC, self.role)
            with torch.no_grad():
                reference = completion_hidden(self.policy, read, ids_BC, mask_BC, None)
            statistics = token_statistics(hidden, reference, ids_BC[mask_BC], self.policy.output_layer)
            kl_B = trajectory_means(statistics.kl_T, mask_BC)
            loss = reinforce_loss(
                trajectory_means(statistics.logprobs_T, mask_BC),
                kl_B,
                advantages_BN[rows, columns].flatten().to(self.policy.device),
                self.kl_coef,
            )
            (loss / total).backward()
            entropy = trajectory_means(statistics.token_entropy_T, mask_BC).sum()
            sums += torch.tensor([loss.item(), kl_B.sum().item(), entropy.item()], dtype=torch.float64) / total
            gap = (statistics.logprobs_T.detach() - sampled_BC[mask_BC]).abs().max().cpu()
            sampler_gap = sampler_gap.maximum(gap)  # unlike `max`, it keeps NaN
        self.processes.sum_gradients(self.parameters.values())
        loss, kl, entropy = self.processes.sum(sums).tolist()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.options.max_grad_norm).item()
        if math.isfinite(grad_norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        metrics = {
            "loss": loss,
            "kl": kl,
            "token_entropy": entropy,
            "kl_coef": self.kl_coef,
            "grad_norm": grad_norm,
            "sampler_gap": self.processes.maximum(sampler_gap.item()),
        }
        if math.isfinite(kl):
            self.kl_coef = adapt_kl_coef(self.kl_coef, kl, self.recipe.kl_target, self.recipe.kl_rate)
        return metrics

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a resumed run needs: the optimizer's tensors by name, and numbers for JSON."""
        state = self.optimizer.state_dict()["state"]  # by the parameters' numbers, empty before the first step
        tensors = {f"{key}/{name}": t for i, name in enumerate(self.parameters) for key, t in state.get(i, {}).items()}
        return tensors, {"kl_coef": self.kl_coef, "baseline": self.baseline.value}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        state: dict[int, dict[str, Tensor]] = {}
        numbered = {name: i for i, name in enumerate(self.parameters)}
        for full_name, tensor in tensors.items():
            key, _, name = full_name.partition("/")
            state.setdefault(numbered[name], {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.kl_coef, self.baseline.value = numbers["kl_coef"], numbers["baseline"]

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
            if padded(more) <= self.options.tokens_per_batch:
                rows = more
                continue
            if rows:
                yield rows, slice(0, count)
            rows = [row]
            if padded(rows) > self.options.tokens_per_batch:
                fitting = [n for n in range(1, count) if padded(rows, n) <= self.options.tokens_per_batch]
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
