"""The update of one role: REINFORCE with exact KL to the backbone, on the sampled token ids.

What it does: the mean log-probability of each trajectory's tokens, or of the most uncertain ones, weighted by its
advantage, plus β times the exact KL to the backbone without adapters; one AdamW step on the role's own LoRA tensors;
then β moves toward its KL target.

Where the sampler is not the learner's own model, as with vLLM, a token's log-probability in that mean is weighted by
how much likelier the learner finds the token (`importance_weights`). The KL is not: it is exact over the vocabulary
at every position, whichever token was drawn there, so that a weight, whose mean is 1, would only add noise.

What it leaves out: clipping of ratios as in PPO (each batch is used once), value functions, entropy bonuses, dropout.
It does not know how a reward was made.

Shape suffixes: G groups, N completions of each, R completions of a micro-batch, C completion positions (right-padded).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ireasoner.method.recipe import Recipe
from ireasoner.method.types import Completion, Role
from ireasoner.model.batching import Batching
from ireasoner.model.forward import completion_hidden, idle_hidden
from ireasoner.model.inputs import Prompts, right_padded
from ireasoner.model.loss import (
    MovingBaseline,
    adapt_kl_coef,
    forking_means,
    gap_metrics,
    gap_sums,
    group_normalized_advantages,
    importance_weights,
    leave_one_out_advantages,
    reinforce_loss,
    token_statistics,
    trajectory_means,
)
from ireasoner.model.options import OptimizerOptions
from ireasoner.model.parallel import ALONE, Processes
from ireasoner.model.pieces import Piece, in_pieces
from ireasoner.model.policy import Policy


class Learner:
    """Optimizer, baseline and KL coefficient of one role.

    Args:
        policy: whose adapter is trained.
        role: which adapter.
        recipe: how advantages are computed, and the KL. `rloo` and `grpo` are for the solver only: a question has no
            group, and the proposer is always measured against the moving average.
        options: of the optimizer.
        processes: those that update together, each on its own groups.
    """

    def __init__(
        self, policy: Policy, role: Role, recipe: Recipe, options: OptimizerOptions, processes: Processes = ALONE
    ) -> None:
        self.policy, self.recipe, self.options = policy, recipe, options
        self.role: Role = role
        self.processes = processes
        self.parameters = policy.parameters(role)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=options.learning_rate, weight_decay=options.weight_decay, foreach=True
        )
        self.baseline = MovingBaseline(recipe.baseline_momentum)
        self.token_share = recipe.token_share if role == "solver" else 1.0
        self.kl_coef = recipe.kl_coef
        self.importance_cap = options.importance_cap or 0.0
        self.batching = Batching(policy, options.tokens_per_batch)
        self.updates = 0  # how many have changed something here

    def advantages(self, rewards: Sequence[Sequence[float]]) -> Tensor:
        """Advantages [G, N] of all processes' groups of a step. To read them does not move the baseline."""
        rewards_GN = torch.tensor(rewards, dtype=torch.float32)
        if self._has_baseline:
            return self.baseline.advantages(rewards_GN)
        of_group = group_normalized_advantages if self.recipe.advantage == "grpo" else leave_one_out_advantages
        return of_group(rewards_GN)

    @property
    def _has_baseline(self) -> bool:
        return self.role == "proposer" or self.recipe.advantage == "ema"

    def update(
        self,
        prompts: Prompts | None,
        groups: Sequence[Sequence[Completion]],
        advantages_GN: Tensor,
        rewards: Sequence[Sequence[float]],
    ) -> dict[str, float]:
        """Take one optimizer step on this process's groups and those of the others, and move the baseline once.

        Args:
            prompts: one of each group; None if this process has no group.
            groups: this process's completions, N of each prompt.
            advantages_GN: one of each of these completions.
            rewards: those of all processes' groups, as `advantages` was given them. The gradient is divided by their
                number, and the baseline moves towards their mean.

        Returns:
            Metrics by name, without the role: `loss`, `kl` and `token_entropy` in nats, means over trajectories;
            `kl_coef` in this update; `grad_norm` before clipping; `sampler_gap`, the largest difference between the
            sampler's log-probabilities and the learner's; and those of `gap_metrics`.
        """
        rewards_GN = torch.tensor(rewards, dtype=torch.float32)
        scale = self._loss_scale(groups, rewards_GN.numel())
        sums, sampler_gap = torch.zeros(8, dtype=torch.float64), torch.zeros(())

        def backward(piece: Piece) -> tuple[Tensor, Tensor]:
            assert prompts is not None
            self.policy.sharded_over.any(True)  # which `_take_part` waits for
            completions = [completion for row in piece.rows for completion in groups[row][piece.columns]]
            advantages_R = advantages_GN[piece.rows, piece.columns].flatten()
            with self.policy.checkpointing(piece.recomputed):
                return self._backward(prompts[piece.rows], completions, advantages_R, rewards_GN.numel(), scale)

        if prompts is not None:
            longest = [max(len(completion.token_ids) for completion in group) for group in groups]
            lengths = list(zip(prompts.mask_BP.sum(1).tolist(), longest, strict=True))
            pieces = self.batching.pieces(lengths, len(groups[0]))
            for _, (shares, gap) in in_pieces(pieces, backward, partial(self.batching.smaller, lengths)):
                sums += shares
                sampler_gap = sampler_gap.maximum(gap)  # unlike Python's `max`, it keeps NaN
        while self.policy.sharded_over.any(False):  # others, which share the decoder layers with this one, have more
            self._take_part()
        self.updates += 1
        if self._has_baseline:
            self.baseline.update(rewards_GN)
        if scale != 1.0:
            for gradient in (p.grad for p in self.parameters.values() if p.grad is not None):
                gradient.div_(scale)
        # Every process divided by the number of completions of all, so that the sum is the gradient of their mean, in
        # whatever way they were dealt out.
        self.processes.sum_gradients(self.parameters.values())
        sums = self.processes.sum(sums)
        loss, kl, entropy = sums[:3].tolist()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.options.max_grad_norm).item()
        # One NaN would spoil the adapter and AdamW's moments for good; the step is left out, and `grad_norm` shows it.
        # It is left out as well where there is nothing to learn, neither from advantages nor from the KL: the gradient
        # is then rounding alone, which AdamW would scale up to a real step.
        teaches = kl != 0 or self.processes.any(bool(advantages_GN.any()))
        if teaches and math.isfinite(grad_norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        metrics = {"loss": loss, "kl": kl, "token_entropy": entropy, "kl_coef": self.kl_coef, "grad_norm": grad_norm}
        metrics["sampler_gap"] = self.processes.maximum(sampler_gap.item())
        metrics |= gap_metrics(sums[3:], weighted=self.importance_cap > 0)
        if math.isfinite(kl):
            self.kl_coef = adapt_kl_coef(self.kl_coef, kl, self.recipe.kl_target, self.recipe.kl_rate)
        return metrics

    def _loss_scale(self, groups: Sequence[Sequence[Completion]], total: int) -> float:
        """What the loss is multiplied by for the backward pass, and its gradient divided by afterwards.

        It is 1 but in float16, where gradients below 6e-8 become 0. There a token's share of the loss becomes about 32,
        by a power of two, which rounds nothing. Measured on the tiny model, gradients are then right to 0.3 % for
        advantages from 1 to 1e-4, and overflow at 1,000 times as much; without a scale they are 7 % off at 1e-2.
        """
        if self.policy.backbone.dtype != torch.float16 or not groups:
            return 1.0
        longest = max(len(completion.token_ids) for group in groups for completion in group)
        return 2.0 ** (5 + round(math.log2(total * longest)))

    def _backward(
        self, prompts: Prompts, completions: Sequence[Completion], advantages_R: Tensor, total: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Add a micro-batch's share of the gradient, times `scale`: all of it or, where memory runs out, nothing.

        Returns:
            Its share of the mean loss, KL and token entropy, followed by its `gap_sums`; and its sampler gap.
        """
        ids_RC, mask_RC = right_padded(self.policy, [c.token_ids for c in completions])
        hidden = completion_hidden(self.policy, prompts, ids_RC, mask_RC, self.role)
        with torch.no_grad():
            reference_hidden = completion_hidden(self.policy, prompts, ids_RC, mask_RC, None)
        tokens = token_statistics(hidden, reference_hidden, ids_RC[mask_RC], self.policy.output_layer)
        sampler_logprobs_T = torch.tensor([p for c in completions for p in c.logprobs], device=self.policy.device)
        weights_T = importance_weights(tokens.logprobs_T, sampler_logprobs_T, self.importance_cap)
        kl_R = trajectory_means(tokens.kl_T, mask_RC)
        logprobs_T = weights_T * tokens.logprobs_T
        if self.token_share < 1.0:
            logprobs_R = forking_means(logprobs_T, tokens.token_entropy_T, mask_RC, self.token_share)
        else:
            logprobs_R = trajectory_means(logprobs_T, mask_RC)
        loss = reinforce_loss(logprobs_R, kl_R, advantages_R.to(self.policy.device), self.kl_coef)
        entropy = trajectory_means(tokens.token_entropy_T, mask_RC).sum()
        gap_T = tokens.logprobs_T.detach() - sampler_logprobs_T
        means = torch.tensor([loss.item(), kl_R.sum().item(), entropy.item()], dtype=torch.float64) / total
        sums = torch.cat([means, gap_sums(gap_T, weights_T, self.importance_cap)])
        # Not `backward`, which adds to each gradient as soon as it has it: one that ran out of memory halfway would
        # leave a part behind, and its micro-batch is done again.
        parameters = list(self.parameters.values())
        with self.policy.acting_as(self.role):  # PEFT asks for gradients of the adapter that acts, and of no other
            # Layers of experts that no token went to are unused.
            gradients = torch.autograd.grad(loss / total * scale, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return sums, gap_T.abs().max().cpu()

    def _take_part(self) -> None:
        """Make the passes of a micro-batch of another process, forward and backward, for nothing."""
        hidden = idle_hidden(self.policy, self.role)
        with torch.no_grad():
            idle_hidden(self.policy, None)
        with self.policy.acting_as(self.role):
            torch.autograd.grad(hidden.sum(), list(self.parameters.values()), allow_unused=True)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a resumed run needs: copies of the optimizer's tensors (none before its first step), and numbers.

        torch.distributed.checkpoint's helpers do not do: they leave out the parameters of an adapter that is switched
        off, and take an optimizer step of their own where there is no state yet.
        """
        tensors = {
            f"{key}/{name}": tensor.clone()
            for name, parameter in self.parameters.items()
            for key, tensor in self.optimizer.state.get(parameter, {}).items()
        }
        return tensors, {"kl_coef": self.kl_coef, "baseline": self.baseline.value}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take back what `state` gave.

        Raises:
            ValueError: the tensors are not those of this learner's optimizer. PyTorch would take other shapes and
                types without a word.
        """
        number = torch.tensor(0.0)
        expected = {
            f"{key}/{name}": (like.shape, like.dtype)
            for name, parameter in self.parameters.items()
            for key, like in (("step", number), ("exp_avg", parameter), ("exp_avg_sq", parameter))
        }
        given = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        if tensors and (differing := sorted({name for name, _ in given.items() ^ expected.items()})):
            raise ValueError(f"the {self.role}'s optimizer and the state for it differ in {', '.join(differing)}")
        state: dict[int, dict[str, Tensor]] = {}
        for i, name in enumerate(self.parameters if tensors else ()):
            state[i] = {key: tensors[f"{key}/{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.kl_coef, self.baseline.value = numbers["kl_coef"], numbers["baseline"]
