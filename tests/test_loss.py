"""The loss: log-probabilities, exact KL and entropy by hand and against the direct computation, in bounded memory."""

from __future__ import annotations

import math
import subprocess
import sys
from statistics import fmean

import pytest
import torch
from torch import Tensor

from ireasoner.model.loss import (
    adapt_kl_coef,
    forking_means,
    gap_metrics,
    gap_sums,
    importance_weights,
    reinforce_loss,
    token_statistics,
    trajectory_means,
)

T, D, V = 37, 4, 50


def test_token_statistics_of_two_tokens_by_hand():
    # Policy (1/2, 1/2), reference (3/4, 1/4): KL = ½ ln(2/3) + ½ ln 2 = ½ (−0.405465 + 0.693147) = 0.143841.
    found = token_statistics(
        torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]]), torch.tensor([1]), torch.nn.Identity()
    )
    assert found.logprobs_T.tolist() == pytest.approx([-0.693147], abs=1e-6)
    assert found.kl_T.tolist() == pytest.approx([0.143841], abs=1e-6)
    assert found.token_entropy_T.tolist() == pytest.approx([0.693147], abs=1e-6)
    # The other way round, with the rarer token chosen: ¾ ln(3/2) + ¼ ln(1/2) = 0.304099 − 0.173287 = 0.130812;
    # entropy −¾ ln ¾ − ¼ ln ¼ = 0.215762 + 0.346574 = 0.562335; ln ¼ = −1.386294.
    found = token_statistics(
        torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([1]), torch.nn.Identity()
    )
    assert found.logprobs_T.tolist() == pytest.approx([-1.386294], abs=1e-6)
    assert found.kl_T.tolist() == pytest.approx([0.130812], abs=1e-6)
    assert found.token_entropy_T.tolist() == pytest.approx([0.562335], abs=1e-6)


class Case:
    """Random hidden states behind a weight, so that gradients reach both the hidden states and what made them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.raw, self.reference = normal(T, D), normal(T, D)
        self.weight = normal(D, D).requires_grad_()
        self.table = normal(V, D)
        self.tokens = torch.randint(V, (T,), generator=generator)
        self.factors = normal(2, T)
        self.layer_inputs: list[int] = []

    def layer(self, hidden: Tensor) -> Tensor:
        self.layer_inputs.append(len(hidden))
        return hidden @ self.table.T

    def hidden(self) -> Tensor:
        return self.raw @ self.weight

    def gradient(self, logprobs: Tensor, kl: Tensor) -> Tensor:
        return torch.autograd.grad((self.factors[0] * logprobs + self.factors[1] * kl).sum(), self.weight)[0]


def direct(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, KL and entropy token by token over the whole vocabulary at once, in float64."""
    logprobs, kls, entropies = [], [], []
    for t in range(T):
        p = torch.softmax(case.table @ (case.raw[t] @ case.weight), 0)
        q = torch.softmax(case.table @ case.reference[t], 0)
        logprobs.append(torch.log(p[case.tokens[t]]))
        kls.append(sum(p[v] * (torch.log(p[v]) - torch.log(q[v])) for v in range(V)))
        entropies.append(-sum(p[v] * torch.log(p[v]) for v in range(V)))
    return torch.stack(logprobs), torch.stack(kls), torch.stack(entropies)


@pytest.mark.parametrize("chunk_logits", [1, V, 5 * V + 3, 10**9])
def test_token_statistics_equal_the_direct_computation_whatever_the_chunk(chunk_logits: int):
    case = Case()
    logprobs, kl, entropy = direct(case)
    expected_gradient = case.gradient(logprobs, kl)
    found = token_statistics(case.hidden(), case.reference, case.tokens, case.layer, chunk_logits)
    # The softmax is taken in float32 whatever the layer's precision.
    torch.testing.assert_close(found.logprobs_T.double(), logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.kl_T.double(), kl, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.token_entropy_T.double(), entropy, atol=1e-5, rtol=1e-5)
    assert (found.kl_T > 0).all()
    gradient = case.gradient(found.logprobs_T, found.kl_T)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)
    assert not found.token_entropy_T.requires_grad


def test_no_logits_of_every_position_at_once():
    """Forward and backward, the output layer sees at most a chunk, and nothing of size T · V is kept in between."""
    case = Case()
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    hidden = case.hidden()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        found = token_statistics(hidden, case.reference, case.tokens, case.layer, chunk_logits=4 * V)
    case.gradient(found.logprobs_T, found.kl_T)
    assert max(case.layer_inputs) == 4
    assert sum(case.layer_inputs) >= 3 * T  # policy, reference, and again in the backward pass
    assert kept < T * V / 2


def test_the_reference_gets_no_gradient():
    case = Case()
    reference = case.reference.clone().requires_grad_()
    found = token_statistics(case.hidden(), reference, case.tokens, case.layer)
    assert torch.autograd.grad(found.kl_T.sum(), reference, allow_unused=True) == (None,)


def test_kl_of_a_policy_to_itself_is_zero():
    case = Case()
    assert token_statistics(case.raw, case.raw, case.tokens, case.layer).kl_T.abs().max() < 1e-6


def test_forking_means_by_hand():
    """The mean over the most uncertain tokens: of five, a third is two, and of two it is one."""
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    entropies = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.0, 0.0])
    assert forking_means(values, entropies, mask, 1 / 3).tolist() == [
        3.0,
        6.0,
    ]  # (2 + 4) / 2; the earlier of equal ones
    assert forking_means(values, entropies, mask, 0.001).tolist() == [2.0, 6.0]  # at least one
    torch.testing.assert_close(forking_means(values, entropies, mask, 1.0), trajectory_means(values, mask))


def test_trajectory_means_by_hand():
    # Rows (1, 2, 3), (4) and (5, 6): means 2, 4 and 5.5, whatever the padding.
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], requires_grad=True)
    means = trajectory_means(values, mask)
    assert means.tolist() == [2.0, 4.0, 5.5]
    means.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0, 0.5, 0.5])


def test_reinforce_loss_by_hand():
    # 0.5 · 2 + 0.1 · 0.3 = 1.03; −0.25 · 4 + 0.1 · 0.2 = −0.98; together 0.05.
    logprobs = torch.tensor([-2.0, -4.0], requires_grad=True)
    loss = reinforce_loss(logprobs, torch.tensor([0.3, 0.2]), torch.tensor([0.5, -0.25]), 0.1)
    assert loss.item() == pytest.approx(0.05)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-0.5, 0.25]  # descent raises what earned more and lowers what earned less


# Learner (0.6, 0.1, 0.9), sampler (0.5, 0.2, 0.3): ratios 1.2, 0.5 and 3, of which the last is cut to 2.
LEARNER, SAMPLER = torch.tensor([0.6, 0.1, 0.9]).log(), torch.tensor([0.5, 0.2, 0.3]).log()


def test_importance_weights_by_hand():
    learner = LEARNER.clone().requires_grad_()
    weights = importance_weights(learner, SAMPLER, 2.0)
    assert weights.tolist() == pytest.approx([1.2, 0.5, 2.0])
    assert not weights.requires_grad
    assert importance_weights(LEARNER, SAMPLER, 10.0).tolist() == pytest.approx([1.2, 0.5, 3.0])
    assert importance_weights(LEARNER, SAMPLER, 0.0).tolist() == [1.0, 1.0, 1.0]
    assert importance_weights(LEARNER, LEARNER, 2.0).tolist() == [1.0, 1.0, 1.0]  # exactly
    assert importance_weights(torch.tensor([0.0]), torch.tensor([-1e4]), 2.0).tolist() == [2.0]  # no overflow


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_token_whose_probability_is_unknown_counts_once(broken: float):
    unknown = torch.tensor([broken, -0.5])
    assert importance_weights(torch.tensor([-0.5, -0.5]), unknown, 2.0).tolist() == [1.0, 1.0]
    assert importance_weights(unknown, torch.tensor([-0.5, -0.5]), 2.0).tolist() == [1.0, 1.0]


def test_gap_metrics_by_hand():
    # |ln 1.2| = 0.182322, |ln 0.5| = 0.693147, |ln 3| = 1.098612: mean 0.658027. Weights 1.2, 0.5, 2: mean 1.233333, of
    # their squares 1.44 + 0.25 + 4 = 5.69, so that (3.7)² / (3 · 5.69) = 0.801992 of the tokens count.
    parts = [
        gap_sums(LEARNER[part] - SAMPLER[part], importance_weights(LEARNER[part], SAMPLER[part], 2.0), 2.0)
        for part in (slice(0, 1), slice(1, 3))  # of two micro-batches
    ]
    assert gap_metrics(parts[0] + parts[1], weighted=True) == pytest.approx(
        {
            "mean_sampler_gap": 0.658027, "importance_weight": 1.233333, "importance_capped": 1 / 3,
            "effective_tokens": 0.801992,
        },
        abs=1e-6,
    )  # fmt: skip
    assert gap_metrics(parts[0], weighted=False) == pytest.approx({"mean_sampler_gap": 0.182322}, abs=1e-6)


def expected_gradient(logits: Tensor, sampler: Tensor, rewards: Tensor, cap: float) -> Tensor:
    """The gradient of the loss in expectation over all texts of two tokens that a sampler may write.

    Args:
        logits: of the learner, [1 + V, V]: of the first token, and of the second one after each first token.
        sampler: the same of the sampler.
        rewards: of each text [V, V].
        cap: of the importance weights.
    """
    logits = logits.clone().requires_grad_()
    ours, theirs = logits.log_softmax(-1), sampler.log_softmax(-1)
    loss, size = torch.zeros(()), logits.shape[1]
    for a in range(size):
        for b in range(size):
            drawn, told = (torch.stack([table[0, a], table[1 + a, b]]) for table in (ours, theirs))
            weighted = importance_weights(drawn, told, cap) * drawn
            means = trajectory_means(weighted, torch.ones(1, 2, dtype=torch.bool))
            loss = loss + told.sum().exp() * reinforce_loss(means, torch.zeros(1), rewards[a, b, None], 0.0)
    return torch.autograd.grad(loss, logits)[0]


def gradient_errors(seed: int, last_token_counts: bool, centred: bool) -> tuple[float, float]:
    """How far the gradients of a slightly different sampler are from the policy's own, unweighted and weighted.

    Args:
        seed: of the two policies and the rewards.
        last_token_counts: whether rewards depend on the second token as well.
        centred: whether their mean is taken off, as a baseline does.
    """
    generator = torch.Generator().manual_seed(seed)
    policy = torch.randn(5, 4, generator=generator)
    sampler = policy + 0.1 * torch.randn(5, 4, generator=generator)
    rewards = torch.rand(4, 4, generator=generator)
    if not last_token_counts:
        rewards = rewards[:, :1].repeat(1, 4)
    if centred:
        logprobs = policy.log_softmax(-1)
        rewards -= ((logprobs[0, :, None] + logprobs[1:]).exp() * rewards).sum()
    aim = expected_gradient(policy, policy, rewards, 0.0)
    plain, weighted = (expected_gradient(policy, sampler, rewards, cap) for cap in (0.0, 2.0))
    return (plain - aim).norm().item(), (weighted - aim).norm().item()


@pytest.mark.parametrize(("centred", "left"), [(False, 0.4), (True, 0.8)])
def test_weights_bring_the_gradient_of_another_sampler_nearer_to_that_of_the_policy(centred: bool, left: float):
    """Nothing is sampled: these are expectations over all texts of two tokens, for several policies."""
    errors = [gradient_errors(seed, last_token_counts=True, centred=centred) for seed in range(10)]
    assert fmean(weighted / plain for plain, weighted in errors) < left


def test_weights_correct_all_that_a_token_itself_earns():
    """What is left above is that the other token is the sampler's as well."""
    plain, weighted = gradient_errors(0, last_token_counts=False, centred=True)
    assert plain > 1e-3
    assert weighted < 1e-6


def test_adapt_kl_coef_by_hand():
    # KL 0.04 is one target too much: × e^0.1 = 1.105171. KL 0: × e^−0.1 = 0.904837. On target: unchanged.
    assert adapt_kl_coef(1e-3, 0.04, 0.02) == pytest.approx(1.105171e-3, rel=1e-6)
    assert adapt_kl_coef(1e-3, 0.0, 0.02) == pytest.approx(0.904837e-3, rel=1e-6)
    assert adapt_kl_coef(1e-3, 0.02, 0.02) == pytest.approx(1e-3)
    assert adapt_kl_coef(1e-3, 0.06, 0.02, rate=0.5) == pytest.approx(1e-3 * math.e)  # e^(0.5 · 2)


def test_kl_coef_stays_within_its_bounds():
    assert adapt_kl_coef(1.05e-8, 0.0, 0.02) == 1e-8
    assert adapt_kl_coef(99.0, 0.04, 0.02) == 1e2
    for huge in (1e3, 1e9, 1e300, math.inf):  # exp of the exponent itself would overflow
        assert adapt_kl_coef(1e-8, huge, 0.02) == 1e2
    assert adapt_kl_coef(1e-3, 0.0, 1e-300) == pytest.approx(0.904837e-3, rel=1e-6)


def test_memory_does_not_grow_with_the_vocabulary_and_the_tokens():
    """660 tokens of a 152k vocabulary: all logits at once would take 0.37 GiB a copy, and a log-softmax several."""
    code = """
from pathlib import Path
import torch
from ireasoner.model.loss import token_statistics
def peak_bytes():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return float(line.split()[1]) * 1024
layer = torch.nn.Linear(32, 152064, bias=False).requires_grad_(False)
def update(tokens):
    hidden = torch.randn(tokens, 32, requires_grad=True)
    found = token_statistics(hidden, torch.randn(tokens, 32), torch.arange(tokens), layer)
    (found.logprobs_T.mean() + found.kl_T.mean()).backward()
update(2)
Path("/proc/self/clear_refs").write_text("5")  # begin to measure peak memory anew
before = peak_bytes()
update(660)
print((peak_bytes() - before) / 2**30)
"""
    gib = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.1 < gib <= 1.0
