"""The rewards of iReasoner (arXiv 2601.05877), one pure function for each equation. All lie in [0, 1].

`answers` are canonical answer keys (`ireasoner.answers.answer_key`), one for each of the N trajectories of a group;
None is an unreadable trajectory: it casts no vote, stays in N and earns 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ireasoner.answers import majority, vote_shares

Answers = Sequence[str | None]
FloatArray = NDArray[np.float64]


def outcome_rewards(
    answers: Answers,
    words_before_answer: Sequence[int],
    *,
    exponent: float = 0.7,
    length_penalty: float = 0.05,
    target_words: int = 64,
) -> FloatArray:
    """Agreement on the answer: r_out,i = p̂(a_i)^γ · (1 − η · clip((w_i − w*)/w*, 0, 1)).

    Args:
        answers: N answer keys, None where unreadable.
        words_before_answer: w_i, words before `<answer>`, one for each trajectory.
        exponent: γ. length_penalty: η. target_words: w*.

    Returns:
        Array [N].

    Raises:
        ValueError: the two sequences differ in length.
    """
    shares = vote_shares(answers)
    p_hat = np.array([0.0 if key is None else shares[key] for key in answers])
    words = np.asarray(words_before_answer, dtype=np.float64)
    if words.shape != p_hat.shape:
        raise ValueError(f"{len(answers)} answers but {len(words)} word counts")
    readable = np.array([key is not None for key in answers], dtype=np.float64)
    too_long = np.clip((words - target_words) / target_words, 0.0, 1.0)
    return readable * p_hat**exponent * (1.0 - length_penalty * too_long)


def step_agreement_rewards(
    answers: Answers,
    step_embeddings: Sequence[NDArray[np.floating]],
    *,
    density_exponent: float = 0.7,
    position_decay: float = 0.15,
    max_reasoning_steps: int = 8,
) -> FloatArray:
    """Agreement on the reasoning within the majority group G.

    r_step,i = (|G|/N)^γd · Σ_j ω_j s_ij / Σ_j ω_j over the positions j that i and at least one other of G reach, with
    s_ij = (1 + cos(e_ij, μ_j))/2, μ_j the normalised mean of the e_·j over G, and ω_j = exp(−δ j), j from 0. It is 0
    outside G, where |G| < 2, and where no position is shared. A row of zeros is an empty reasoning step: it keeps its
    position and is neither compared nor counted.

    Args:
        answers: N answer keys, None where unreadable.
        step_embeddings: one array [reasoning steps, width] for each trajectory, rows of any length.
        density_exponent: γd. position_decay: δ. max_reasoning_steps: later reasoning steps are left out.

    Returns:
        Array [N].

    Raises:
        ValueError: the two sequences differ in length.
    """
    if len(answers) != len(step_embeddings):
        raise ValueError(f"{len(answers)} answers but {len(step_embeddings)} arrays of step embeddings")
    rewards = np.zeros(len(answers))
    group = majority(answers).members
    if len(group) < 2:
        return rewards
    units = {i: _unit_rows(np.asarray(step_embeddings[i], dtype=np.float64)[:max_reasoning_steps]) for i in group}
    totals, weights = np.zeros(len(answers)), np.zeros(len(answers))
    for position in range(max_reasoning_steps):
        reached = [i for i in group if position < len(units[i]) and units[i][position].any()]
        if len(reached) < 2:
            continue
        vectors = np.stack([units[i][position] for i in reached])
        prototype = _unit_rows(vectors.mean(axis=0, keepdims=True))[0]
        weight = math.exp(-position_decay * position)
        totals[reached] += weight * (1.0 + vectors @ prototype) / 2.0
        weights[reached] += weight
    scored = weights > 0
    rewards[scored] = (len(group) / len(answers)) ** density_exponent * totals[scored] / weights[scored]
    return np.clip(rewards, 0.0, 1.0)  # rounding may leave a cosine just above 1


def claim_agreement_rewards(
    support: Sequence[NDArray[np.float64]], recurrence: Sequence[NDArray[np.float64]]
) -> FloatArray:
    """Agreement on what the reasoning steps claim: r_step,i = mean_j s_ij (1 − f_ij); 0 without steps.

    Args:
        support: s_ij in [0, 1], one array for each of the N trajectories: how far the others of the group make the same
            claim (`ireasoner.steps.agreement`), over the steps that claim more than the answer
            (`ireasoner.steps.beyond_answer`); empty for an unreadable trajectory.
        recurrence: f_ij in [0, 1], the share of other images' groups that make it too: what is said of every image says
            nothing about this one.

    Returns:
        Array [N].
    """
    return np.array(
        [float((s * (1.0 - f)).mean()) if len(s) else 0.0 for s, f in zip(support, recurrence, strict=True)]
    )


def _unit_rows(rows: FloatArray) -> FloatArray:
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def mixing_weight(
    step: int, total_steps: int, *, warmup: float = 0.3, initial: float = 0.0, final: float = 0.7
) -> float:
    """λ(t): `initial` for the first `warmup` share of training, then linear to `final` at the last step.

    Args:
        step: the step being trained, from 1 to `total_steps`.
        total_steps: steps of the whole run, not of what is left of it.

    Raises:
        ValueError: a step outside 0..total_steps.
    """
    if not 0 <= step <= total_steps:
        raise ValueError(f"step {step} is outside 0..{total_steps}")
    start = warmup * total_steps
    progress = (step - start) / (total_steps - start) if total_steps > start else 0.0
    return initial + (final - initial) * min(max(progress, 0.0), 1.0)


def solver_rewards(outcome: FloatArray, step_agreement: FloatArray, weight: float) -> FloatArray:
    """r_i = (1 − λ) r_out,i + λ r_step,i; arrays [N], `weight` is λ(t)."""
    return (1.0 - weight) * outcome + weight * step_agreement


def proposer_reward(answer_entropy: float, *, target: float = 0.90, width: float = 0.35) -> float:
    """Questions of middle difficulty: exp(−(H − μ)² / 2σ²), H the entropy in nats of the readable votes.

    Args:
        answer_entropy: H. target: μ. width: σ.
    """
    return math.exp(-((answer_entropy - target) ** 2) / (2.0 * width**2))


def discrete_rewards(answers: Answers) -> FloatArray:
    """The discrete baseline: 1 for the majority answer, else 0; array [N]."""
    members = majority(answers).members
    return np.array([float(i in members) for i in range(len(answers))])
