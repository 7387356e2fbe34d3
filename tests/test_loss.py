"""The loss: log-probabilities, exact KL and entropy by hand and against the direct computation, in bounded memory."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ireasoner.model.loss import adapt_kl_coef, reinforce_loss, token_statistics, trajectory_means

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
    """1,500 tokens of a 152k vocabulary: all logits at once would take 0.85 GiB a copy, and a log-softmax several."""
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
update(1500)
print((peak_bytes() - before) / 2**30)
"""
    gib = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.1 < gib <= 1.0
