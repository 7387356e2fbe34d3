"""Advantages: numbers worked out by hand, and what a baseline must never do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ireasoner.model.loss import (
    MovingBaseline,
    advantage_std,
    group_normalized_advantages,
    leave_one_out_advantages,
)


def test_moving_baseline_by_hand():
    baseline = MovingBaseline()
    batches = [
        # b starts at the first batch's mean 0.5, and 0.9 · 0.5 + 0.1 · 0.5 leaves it there.
        ([1.0, 0.0, 0.0, 1.0], [0.5, -0.5, -0.5, 0.5], 0.5),
        # Read at 0.5, then 0.9 · 0.5 + 0.1 · 1 = 0.55.
        ([1.0, 1.0], [0.5, 0.5], 0.55),
        # Read at 0.55, then 0.9 · 0.55 + 0.1 · 0.25 = 0.52.
        ([0.0, 0.5], [-0.55, -0.05], 0.52),
    ]
    for rewards, advantages, moved in batches:
        before = baseline.value
        for _ in range(2):  # to read is not to move
            assert baseline.advantages(torch.tensor(rewards)).tolist() == pytest.approx(advantages)
        assert baseline.value == before
        baseline.update(torch.tensor(rewards))
        assert baseline.value == pytest.approx(moved)


def test_no_baseline_that_starts_at_zero():
    """Started at 0, a baseline gives the identical rewards of a first step an advantage, and trains on nothing."""
    for reward in (1.0, 0.3, 0.7311):
        baseline = MovingBaseline()
        for _ in range(5):
            assert baseline.advantages(torch.full((5,), reward)).abs().max() < 1e-6
            baseline.update(torch.full((5,), reward))


def test_no_baseline_that_moves_within_a_batch():
    """The whole batch is measured against one number, and that number moves once, by the batch mean."""
    rewards = torch.tensor([0.1, 0.9, 0.4, 0.8, 0.3])
    whole, shuffled = MovingBaseline(0.5, value=0.2), MovingBaseline(0.5, value=0.2)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(rewards - whole.advantages(rewards), torch.full((5,), 0.2))
    torch.testing.assert_close(rewards[order] - shuffled.advantages(rewards[order]), torch.full((5,), 0.2))
    whole.update(rewards)
    shuffled.update(rewards[order])
    assert whole.value == pytest.approx(0.5 * 0.2 + 0.5 * 0.5)  # the mean is 2.5 / 5 = 0.5
    assert shuffled.value == pytest.approx(whole.value)


def test_leave_one_out_by_hand():
    # 1 − mean(0, 0, 0, 0) = 1; 0 − mean(1, 0, 0, 0) = −0.25.
    assert leave_one_out_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])).tolist() == pytest.approx(
        [1.0, -0.25, -0.25, -0.25, -0.25]
    )
    # Groups do not see each other: 0.8 − 0.2 = 0.6; identical rewards: 0.
    assert leave_one_out_advantages(torch.tensor([[0.8, 0.2], [0.5, 0.5]])).tolist() == [
        pytest.approx([0.6, -0.6]),
        [0.0, 0.0],
    ]


def test_leave_one_out_equals_its_definition_in_loops():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        groups, count = (int(torch.randint(1, 4, (), generator=generator)) for _ in range(2))
        count += 1
        rewards = torch.rand(groups, count, generator=generator, dtype=torch.float64)
        expected = torch.zeros_like(rewards)
        for g in range(groups):
            for i in range(count):
                others = [rewards[g, j].item() for j in range(count) if j != i]
                expected[g, i] = rewards[g, i] - sum(others) / len(others)
        advantages = leave_one_out_advantages(rewards)
        torch.testing.assert_close(advantages, expected)
        torch.testing.assert_close(advantages.sum(-1), torch.zeros(groups, dtype=torch.float64))
        torch.testing.assert_close(leave_one_out_advantages(rewards + 3.0), advantages)  # a shift changes nothing


def test_group_normalized_by_hand():
    # Mean 0.5, variance (0.25 + 0 + 0.25)/2 = 0.25 with N − 1: (±0.5)/0.5. Groups do not see each other.
    advantages = group_normalized_advantages(torch.tensor([[1.0, 0.5, 0.0], [4.0, 4.0, 1.0]]))
    assert advantages[0].tolist() == pytest.approx([1.0, 0.0, -1.0], abs=1e-5)
    assert advantages[1].tolist() == pytest.approx([0.57735, 0.57735, -1.15470], abs=1e-5)  # mean 3, deviation √3


def test_equal_rewards_are_not_normalized_into_a_difference():
    """Rounding leaves a difference from the mean, which a small standard deviation would blow up."""
    for reward in (0.1, 0.3, 0.7311, 80.7):
        assert not group_normalized_advantages(torch.full((3, 5), reward)).any()


@pytest.mark.parametrize("of_group", [leave_one_out_advantages, group_normalized_advantages])
def test_a_group_of_one_has_no_others(of_group: Callable[[torch.Tensor], torch.Tensor]):
    with pytest.raises(ValueError, match="at least 2"):
        of_group(torch.tensor([[0.5]]))


def test_rewards_are_not_overwritten():
    rewards = torch.tensor([[0.2, 0.6]])
    baseline = MovingBaseline()
    baseline.advantages(rewards.flatten())
    baseline.update(rewards.flatten())
    leave_one_out_advantages(rewards)
    assert rewards.tolist() == [pytest.approx([0.2, 0.6])]


def test_advantage_std_by_hand():
    # Mean 0.5; squared deviations 0.25, 0.25, 0, 0: variance 0.125.
    assert advantage_std(torch.tensor([[1.0, 0.0], [0.5, 0.5]])) == pytest.approx(0.125**0.5)
    assert advantage_std(torch.zeros(2, 3)) == 0.0
