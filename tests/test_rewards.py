"""The rewards: numbers worked out by hand, and a second, naive implementation of the paper's equations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ireasoner.method.answers import majority
from ireasoner.method.rewards import (
    leave_one_out_similarities,
    mixing_weight,
    outcome_rewards,
    proposer_reward,
    solver_rewards,
    step_agreement_rewards,
)

# 0.6^0.7 = exp(0.7 · ln 0.6) = exp(0.7 · −0.510826) = exp(−0.357578) = 0.699368
# 0.4^0.7 = exp(0.7 · −0.916291) = exp(−0.641404) = 0.526553
# 0.2^0.7 = exp(0.7 · −1.609438) = exp(−1.126607) = 0.324131
POW_06, POW_04, POW_02 = 0.699368, 0.526553, 0.324131


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_outcome_by_hand():
    # p̂ = 3/5, 1/5; the unreadable one stays in N = 5 and earns 0.
    # w − 64 over 64: 64 → 0; 96 → 0.5, 1 − 0.05 · 0.5 = 0.975; 128 → 1, 0.95; 1000 → clipped to 1; 10 → clipped to 0.
    earned = outcome_rewards(["7", "7", "7", "3", None], [64, 96, 128, 1000, 10])
    expected = [POW_06, POW_06 * 0.975, POW_06 * 0.95, POW_02 * 0.95, 0.0]
    assert earned == pytest.approx(expected, abs=1e-6)
    assert outcome_rewards(["7", "7"], [10, 64]).tolist() == [1.0, 1.0]


def test_outcome_with_evolmms_constants():
    # EvoLMM: η 0.10, w* 6. w = 9: (9 − 6)/6 = 0.5, 1 − 0.10 · 0.5 = 0.95. w = 12: 0.9.
    earned = outcome_rewards(["a", "a", "b"], [9, 12, 6], exponent=1.0, length_penalty=0.10, target_words=6)
    assert earned == pytest.approx([2 / 3 * 0.95, 2 / 3 * 0.9, 1 / 3])


def test_no_vote_earns_nothing_even_where_the_exponent_is_zero():
    assert outcome_rewards([None, "a"], [0, 0], exponent=0.0).tolist() == [0.0, 1.0]


def test_step_agreement_of_identical_steps_is_the_density():
    same = np.array([[3.0, 4.0], [0.0, 2.0]])  # not normalised: only directions count
    earned = step_agreement_rewards(["7", "7", "7", "3", None], [same] * 5)
    assert earned == pytest.approx([POW_06, POW_06, POW_06, 0.0, 0.0], abs=1e-6)


def test_step_agreement_of_one_position_by_hand():
    # G = {0, 1, 2} of N = 5. e = (1, 0), (1, 0), (0, 1): mean (2/3, 1/3), μ = (2, 1)/√5.
    # cos = 2/√5 = 0.894427 (twice) and 1/√5 = 0.447214; s = (1 + cos)/2 = 0.947214 and 0.723607.
    x, y = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    earned = step_agreement_rewards(["a", "a", "a", "b", "b"], [x, x, y, x, x])
    assert earned == pytest.approx([POW_06 * 0.947214, POW_06 * 0.947214, POW_06 * 0.723607, 0, 0], abs=1e-6)


def test_step_agreement_of_two_orthogonal_steps_is_the_papers_085():
    # The prototype includes the sample itself: μ = (1, 1)/√2, cos = 0.707107, s = 0.853553; |G|/N = 1.
    earned = step_agreement_rewards(["a", "a"], [np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])])
    assert earned == pytest.approx([0.853553, 0.853553], abs=1e-6)


def test_step_agreement_weighs_positions_by_their_decay():
    # Position 0: both (1, 0): s = 1. Position 1: orthogonal: s = 0.853553. ω = 1 and e^−0.15 = 0.860708.
    # (1 + 0.860708 · 0.853553) / 1.860708 = 1.734661 / 1.860708 = 0.932258.
    x, y = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    steps = [np.stack([x, x]), np.stack([x, y])]
    assert step_agreement_rewards(["a", "a"], steps) == pytest.approx([0.932258] * 2, abs=1e-6)
    # δ = 0: (1 + 0.853553) / 2 = 0.926777.
    assert step_agreement_rewards(["a", "a"], steps, position_decay=0.0) == pytest.approx([0.926777] * 2, abs=1e-6)


def test_step_agreement_scores_only_positions_that_another_of_the_majority_reaches():
    # Position 1 is reached by the first alone: it counts for nobody, so both earn s = 1 from position 0.
    x, y = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert step_agreement_rewards(["a", "a"], [np.stack([x, y]), x[None]]).tolist() == [1.0, 1.0]
    # No position is shared at all.
    none = np.zeros((0, 2))
    assert step_agreement_rewards(["a", "a"], [x[None], none]).tolist() == [0.0, 0.0]
    # The outsider's steps are no company: only members of the majority are compared.
    assert step_agreement_rewards(["a", "a", "b"], [np.stack([x, y]), x[None], np.stack([x, y])]) == pytest.approx(
        [(2 / 3) ** 0.7, (2 / 3) ** 0.7, 0.0]
    )


def test_leave_one_out_similarity_by_hand():
    # Others of the first at position 0: (1, 0) and (0, 1), mean direction (1, 1)/√2, cos 0.707107, s 0.853553.
    # Of the third: (1, 0) twice, cos 0, s 0.5. Position 1 is reached by the first alone.
    x, y = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    first, second, third, empty = leave_one_out_similarities([np.stack([x, y]), x[None], y[None], np.zeros((1, 2))])
    assert first[0] == second[0] == pytest.approx(0.853553, abs=1e-6)
    assert np.isnan(first[1])
    assert third == pytest.approx([0.5])
    assert np.isnan(empty[0])
    assert leave_one_out_similarities([np.zeros((0, 2)), x[None]])[1].tolist() == pytest.approx([np.nan], nan_ok=True)
    assert leave_one_out_similarities([]) == []


def test_an_empty_step_keeps_its_position():
    # Steps x, "", x against y, y, x: positions 0 and 2 are compared, each with its own weight. Were the empty step
    # dropped, the second x would face y.
    x, y, empty = np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.zeros(2)
    earned = step_agreement_rewards(["a", "a"], [np.stack([x, empty, x]), np.stack([y, y, x])])
    # ω_2 = e^−0.30 = 0.740818: (0.853553 + 0.740818) / 1.740818 = 0.915875.
    assert earned == pytest.approx([0.915875] * 2, abs=1e-6)


def test_step_agreement_needs_a_majority_of_two():
    x = np.array([[1.0, 0.0]])
    assert step_agreement_rewards(["a", "b", None], [x, x, x]).tolist() == [0.0, 0.0, 0.0]
    assert step_agreement_rewards([None, None], [x, x]).tolist() == [0.0, 0.0]
    assert step_agreement_rewards([], []).tolist() == []


def test_reasoning_steps_after_the_eighth_do_not_count():
    x, y = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    long = [np.stack([x] * 8 + [x] * 3), np.stack([x] * 8 + [y] * 3)]
    assert step_agreement_rewards(["a", "a"], long).tolist() == [1.0, 1.0]
    assert step_agreement_rewards(["a", "a"], long, max_reasoning_steps=9)[0] < 1.0


def test_a_tie_goes_to_the_answer_sampled_first():
    x = np.array([[1.0, 0.0]])
    assert majority(["b", "a", "a", "b"]).members == (0, 3)
    # |G|/N = 2/4: 0.5^0.7 = exp(0.7 · −0.693147) = 0.615572.
    assert step_agreement_rewards(["b", "a", "a", "b"], [x] * 4) == pytest.approx([0.615572, 0, 0, 0.615572], abs=1e-6)


def test_solver_rewards_by_hand():
    # λ = 0.7: 0.3 · 0.5 + 0.7 · 0.9 = 0.15 + 0.63 = 0.78; 0.3 · 1.0 + 0.7 · 0 = 0.3.
    outcome, steps = np.array([0.5, 1.0]), np.array([0.9, 0.0])
    assert solver_rewards(outcome, steps, 0.7) == pytest.approx([0.78, 0.3])
    assert solver_rewards(outcome, steps, 0.0).tolist() == outcome.tolist()
    assert solver_rewards(outcome, steps, 1.0).tolist() == steps.tolist()


@pytest.mark.parametrize(
    ("entropy", "expected"),
    [
        (0.90, 1.0),
        (0.0, 0.036659),  # all agree: 0.81 / 0.245 = 3.306122
        (0.673012, 0.810341),  # 3–2: 0.226988² / 0.245 = 0.210300
        (0.500402, 0.521133),  # 4–1: 0.399598² / 0.245 = 0.651750
        (0.950271, 0.989737),  # 3–1–1: 0.050271² / 0.245 = 0.010315
        (1.609438, 0.128183),  # all differ: 0.709438² / 0.245 = 2.054295
    ],
)
def test_proposer_reward_by_hand(entropy: float, expected: float):
    # 2σ² = 2 · 0.35² = 0.245
    assert proposer_reward(entropy) == pytest.approx(expected, abs=2e-6)


def test_proposer_reward_of_one_width_off_the_target():
    assert proposer_reward(1.5, target=1.0, width=0.5) == pytest.approx(math.exp(-0.5))
    assert proposer_reward(0.5, target=1.0, width=0.5) == pytest.approx(math.exp(-0.5))


def test_mixing_weight_by_hand():
    # 2,500 steps: 0 up to step 750, then 0.7 · (t − 750)/1750.
    assert [mixing_weight(t, 2500) for t in (1, 749, 750)] == [0.0, 0.0, 0.0]
    assert mixing_weight(751, 2500) == pytest.approx(0.7 / 1750)
    assert mixing_weight(1625, 2500) == pytest.approx(0.35)
    assert mixing_weight(2500, 2500) == pytest.approx(0.7)
    # No warm-up: linear from the first step on. Constant: both ends alike.
    assert mixing_weight(1, 10, warmup=0.0) == pytest.approx(0.07)
    assert mixing_weight(10, 10, warmup=0.0) == pytest.approx(0.7)
    assert {mixing_weight(t, 7, initial=1.0, final=1.0) for t in range(1, 8)} == {1.0}
    assert mixing_weight(1, 1) == pytest.approx(0.7)  # the only step is the last


@pytest.mark.parametrize("step", [-1, 11])
def test_a_step_outside_the_run_is_an_error(step: int):
    with pytest.raises(ValueError, match=r"outside 0\.\.10"):
        mixing_weight(step, 10)


def test_sequences_of_different_length_are_an_error():
    with pytest.raises(ValueError, match="2 answers but 1 word counts"):
        outcome_rewards(["a", "b"], [3])
    with pytest.raises(ValueError, match="2 answers but 1 arrays"):
        step_agreement_rewards(["a", "b"], [np.ones((1, 2))])


# --- against a second implementation: the equations of arXiv 2601.05877 in plain loops -------------------------------


def naive_majority(answers):
    best, best_count = None, 0
    for candidate in answers:  # in order of sampling: a later answer must have strictly more
        if candidate is None:
            continue
        count = 0
        for other in answers:
            count += other == candidate
        if count > best_count:
            best, best_count = candidate, count
    return [i for i in range(len(answers)) if best is not None and answers[i] == best]


def naive_outcome(answers, words, gamma, eta, target):
    rewards = []
    for i in range(len(answers)):
        if answers[i] is None:
            rewards.append(0.0)
            continue
        share = sum(1 for a in answers if a == answers[i]) / len(answers)
        over = (words[i] - target) / target
        over = 0.0 if over < 0 else 1.0 if over > 1 else over
        rewards.append(share**gamma * (1 - eta * over))
    return rewards


def naive_step_agreement(answers, embeddings, gamma_d, delta, most):
    group = naive_majority(answers)
    rewards = [0.0] * len(answers)
    if len(group) < 2:
        return rewards

    def unit(vector):
        norm = math.sqrt(sum(x * x for x in vector))
        return [x / norm for x in vector] if norm > 0 else None

    def step(i, j):
        return unit(embeddings[i][j]) if j < min(len(embeddings[i]), most) else None

    for i in group:
        top = bottom = 0.0
        for j in range(most):
            here = [step(k, j) for k in group]
            here = [e for e in here if e is not None]
            mine = step(i, j)
            if mine is None or len(here) < 2:
                continue
            mean = [sum(e[d] for e in here) / len(here) for d in range(len(mine))]
            prototype = unit(mean) or [0.0] * len(mine)
            cosine = sum(a * b for a, b in zip(mine, prototype, strict=True))
            omega = math.exp(-delta * j)
            top += omega * (1 + cosine) / 2
            bottom += omega
        if bottom > 0:
            rewards[i] = (len(group) / len(answers)) ** gamma_d * top / bottom
    return rewards


def random_group(rng: np.random.Generator):
    count = int(rng.integers(1, 8))
    letters = [None, "a", "b", "c"]
    answers = [letters[k] for k in rng.choice(4, count, p=[0.2, 0.5, 0.2, 0.1])]
    words = rng.integers(0, 200, count).tolist()
    shared = rng.normal(size=(11, 5))
    embeddings = []
    for _ in range(count):
        rows = shared[: rng.integers(0, 12)] + rng.normal(size=5) * rng.choice([0.0, 0.3, 3.0])
        rows = rows * rng.choice([-1.0, 1.0, 1.0, 1.0], size=(len(rows), 1))
        rows = rows * rng.choice([0.0, 1.0, 1.0, 7.0], size=(len(rows), 1))  # empty steps; other lengths
        embeddings.append(rows)
    return answers, words, embeddings


def test_rewards_equal_a_naive_second_implementation():
    rng = np.random.default_rng(0)
    seen = {"none": 0, "empty step": 0, "more than 8": 0, "scored": 0}
    for _ in range(500):
        answers, words, embeddings = random_group(rng)
        gamma, eta, target = float(rng.choice([0.3, 0.7, 2.0])), float(rng.random()), int(rng.integers(1, 100))
        outcome = outcome_rewards(answers, words, exponent=gamma, length_penalty=eta, target_words=target)
        assert outcome == pytest.approx(naive_outcome(answers, words, gamma, eta, target), abs=1e-12)
        gamma_d, delta, most = float(rng.choice([0.0, 0.7, 1.5])), float(rng.choice([0.0, 0.15, 1.0])), 8
        if rng.random() < 0.3:
            most = int(rng.integers(1, 12))
        options = {"density_exponent": gamma_d, "position_decay": delta, "max_reasoning_steps": most}
        steps = step_agreement_rewards(answers, embeddings, **options)
        assert steps == pytest.approx(naive_step_agreement(answers, embeddings, gamma_d, delta, most), abs=1e-12)
        group = naive_majority(answers)
        assert sorted(majority(answers).members) == sorted(group)
        for earned in (outcome, steps):
            assert ((earned >= 0) & (earned <= 1)).all()
        seen["none"] += None in answers
        seen["empty step"] += any(len(e) and not e.any(1).all() for e in embeddings)
        seen["more than 8"] += any(len(e) > 8 for e in embeddings)
        seen["scored"] += bool((steps > 0).any())
    assert all(count > 50 for count in seen.values()), seen


def test_rewards_do_not_depend_on_the_order_of_the_group_but_for_ties():
    rng = np.random.default_rng(1)
    for _ in range(200):
        answers, words, embeddings = random_group(rng)
        counts = sorted((answers.count(a) for a in set(answers) - {None}), reverse=True)
        if len(counts) > 1 and counts[0] == counts[1]:
            continue
        order = rng.permutation(len(answers))
        mixed = [answers[i] for i in order], [words[i] for i in order], [embeddings[i] for i in order]
        assert outcome_rewards(mixed[0], mixed[1]) == pytest.approx(outcome_rewards(answers, words)[order])
        assert step_agreement_rewards(mixed[0], mixed[2]) == pytest.approx(
            step_agreement_rewards(answers, embeddings)[order], abs=1e-12
        )
