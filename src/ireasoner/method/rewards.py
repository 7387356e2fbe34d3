"""Every equation that turns a group's answers and reasoning steps into rewards, one pure function each.

They are those of iReasoner (arXiv 2601.05877), what the recipe `default` puts in their place, and the controls; all lie
in [0, 1]. `ireasoner.method.scoring` calls them with the constants of a recipe, in training as everywhere else.
`answers` are canonical answer keys (`ireasoner.method.answers.answer_key`), one for each of the N trajectories of a
group; None is an unreadable trajectory: it casts no vote, stays in N and earns 0. Defaults are the paper's constants,
as `Recipe` states them. Where a reward is a product, its factors are functions too, so that scoring can record them
beside the product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ireasoner.method.answers import majority, vote_shares
from ireasoner.method.recipe import PAPER

Answers = Sequence[str | None]
FloatArray = NDArray[np.float64]


def outcome_rewards(
    answers: Answers,
    words_before_answer: Sequence[int],
    *,
    exponent: float = PAPER.outcome_exponent,
    length_penalty: float = PAPER.length_penalty,
    target_words: int = PAPER.target_words,
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
    if len(answers) != len(words_before_answer):
        raise ValueError(f"{len(answers)} answers but {len(words_before_answer)} word counts")
    return vote_factors(answers, exponent) * length_factors(
        words_before_answer, length_penalty=length_penalty, target_words=target_words
    )


def vote_factors(answers: Answers, exponent: float) -> FloatArray:
    """p̂(a_i)^γ, the share of the group that gives the same answer; 0 for the unreadable; array [N]."""
    shares = vote_shares(answers)
    p_hat = np.array([0.0 if key is None else shares[key] for key in answers])
    readable = np.array([key is not None for key in answers], dtype=np.float64)
    return readable * p_hat**exponent


def length_factors(words_before_answer: Sequence[int], *, length_penalty: float, target_words: int) -> FloatArray:
    """1 − η · clip((w_i − w*)/w*, 0, 1): what length leaves of the outcome reward; array [N]."""
    words = np.asarray(words_before_answer, dtype=np.float64)
    return 1.0 - length_penalty * np.clip((words - target_words) / target_words, 0.0, 1.0)


def prototype_similarities(
    answers: Answers,
    step_embeddings: Sequence[NDArray[np.floating]],
    *,
    max_reasoning_steps: int = PAPER.max_reasoning_steps,
) -> list[FloatArray]:
    """How near each reasoning step is to the majority group's prototype: s_ij = (1 + cos(e_ij, μ_j))/2.

    μ_j is the normalised mean of the e_·j over the majority group G.

    Args:
        answers: N answer keys, None where unreadable.
        step_embeddings: one array [reasoning steps, width] for each trajectory, rows of any length. A row of zeros is
            an empty reasoning step: it keeps its position and is neither compared nor counted.
        max_reasoning_steps: later reasoning steps are left out.

    Returns:
        One array [reasoning steps] for each trajectory; NaN outside G, at positions that no other of G reaches, and for
        empty steps.

    Raises:
        ValueError: the two sequences differ in length.
    """
    if len(answers) != len(step_embeddings):
        raise ValueError(f"{len(answers)} answers but {len(step_embeddings)} arrays of step embeddings")
    units = [_unit_rows(np.asarray(rows, dtype=np.float64)[:max_reasoning_steps]) for rows in step_embeddings]
    similarities = [np.full(len(rows), np.nan) for rows in units]
    for position in range(max_reasoning_steps):
        present = [i for i in majority(answers).members if position < len(units[i]) and units[i][position].any()]
        if len(present) < 2:
            continue
        vectors = np.stack([units[i][position] for i in present])
        prototype = _unit_rows(vectors.mean(axis=0))
        for i, cosine in zip(present, vectors @ prototype, strict=True):
            similarities[i][position] = (1.0 + cosine) / 2.0
    return similarities


def step_agreement_rewards(
    answers: Answers,
    step_embeddings: Sequence[NDArray[np.floating]],
    *,
    density_exponent: float = PAPER.density_exponent,
    position_decay: float = PAPER.position_decay,
    max_reasoning_steps: int = PAPER.max_reasoning_steps,
) -> FloatArray:
    """Agreement on the reasoning within the majority group G.

    r_step,i = (|G|/N)^γd · Σ_j ω_j s_ij / Σ_j ω_j over the positions j that i and at least one other of G reach, with
    s_ij of `prototype_similarities` and ω_j = exp(−δ j), j from 0. It is 0 outside G, where |G| < 2, and where no
    position is shared.

    Args:
        answers: N answer keys, None where unreadable.
        step_embeddings: as for `prototype_similarities`.
        density_exponent: γd. position_decay: δ. max_reasoning_steps: later reasoning steps are left out.

    Returns:
        Array [N].

    Raises:
        ValueError: the two sequences differ in length.
    """
    similarities = prototype_similarities(answers, step_embeddings, max_reasoning_steps=max_reasoning_steps)
    return prototype_rewards(answers, similarities, density_exponent=density_exponent, position_decay=position_decay)


def prototype_rewards(
    answers: Answers,
    similarities: Sequence[FloatArray],
    *,
    density_exponent: float = PAPER.density_exponent,
    position_decay: float = PAPER.position_decay,
) -> FloatArray:
    """Step agreement rewards from similarities that `prototype_similarities` has computed; array [N]."""
    density = density_factor(answers, density_exponent)
    return np.clip(density * step_means(similarities, position_decay), 0.0, 1.0)  # rounding may leave it just above 1


def density_factor(answers: Answers, exponent: float) -> float:
    """(|G|/N)^γd, the majority's share of the group, where N includes the unreadable."""
    return (len(majority(answers).members) / max(len(answers), 1)) ** exponent


def step_means(scores: Sequence[FloatArray], position_decay: float = 0.0) -> FloatArray:
    """Σ_j ω_j s_ij / Σ_j ω_j over the reasoning steps that count; array [N], 0 where none does.

    Args:
        scores: s_ij, one array for each of the N trajectories; NaN for a step that does not count.
        position_decay: δ of ω_j = exp(−δ j), j from 0; by default all steps count alike.
    """
    means = np.zeros(len(scores))
    for i, step_scores in enumerate(scores):
        counts = np.isfinite(step_scores)
        if counts.any():
            weights = position_weights(len(step_scores), position_decay)
            means[i] = np.average(step_scores[counts], weights=weights[counts])
    return means


def position_weights(count: int, position_decay: float) -> FloatArray:
    """ω_j = exp(−δ j) of the first `count` reasoning steps, j from 0."""
    return np.exp(-position_decay * np.arange(count))


def leave_one_out_similarities(step_embeddings: Sequence[NDArray[np.floating]]) -> list[FloatArray]:
    """How near each reasoning step is to those of the others at its position: (1 + cos)/2 with the mean of theirs.

    Unlike the prototype of the published reward, this mean leaves the step itself out; answers play no part.

    Args:
        step_embeddings: one array [reasoning steps, width] for each trajectory; a row of zeros is an empty step.

    Returns:
        One array [reasoning steps] for each trajectory; NaN where no other trajectory reaches the position.
    """
    units = [_unit_rows(np.asarray(rows, dtype=np.float64)) for rows in step_embeddings]
    similarities = [np.full(len(rows), np.nan) for rows in units]
    for position in range(max(map(len, units), default=0)):
        present = [i for i, rows in enumerate(units) if position < len(rows) and rows[position].any()]
        if len(present) < 2:
            continue
        total = sum(units[i][position] for i in present)
        for i in present:
            others = _unit_rows(total - units[i][position])
            similarities[i][position] = np.clip((1.0 + units[i][position] @ others) / 2.0, 0.0, 1.0)
    return similarities


def supported_step_rewards(support: Sequence[FloatArray], recurrence: Sequence[FloatArray]) -> FloatArray:
    """What supports the reasoning steps: r_step,i = mean_j s_ij (1 − f_ij); 0 without steps.

    Args:
        support: s_ij in [0, 1], one array for each of the N trajectories: how far a step is supported, such as by the
            image (`ireasoner.method.likelihood.step_grounding`); NaN for a step that does not count.
        recurrence: f_ij in [0, 1], the share of other images' groups that say it too: what is said of every image says
            nothing about this one.

    Returns:
        Array [N].
    """
    return step_means(support_scores(support, recurrence))


def support_scores(support: Sequence[FloatArray], recurrence: Sequence[FloatArray]) -> list[FloatArray]:
    """s_ij (1 − f_ij) of each reasoning step, as in `supported_step_rewards`."""
    return [s * (1.0 - f) for s, f in zip(support, recurrence, strict=True)]


def recurrence(said: Sequence[str], others: Sequence[frozenset[str]]) -> FloatArray:
    """f_j: the share of other images' groups that say the same; array [reasoning steps], 0 without other groups.

    Args:
        said: what one trajectory's reasoning steps say, as `ireasoner.method.memory.step_digest` gives it.
        others: what each of the latest groups of other images said.
    """
    groups = [sum(step in group for group in others) for step in said]
    return np.array(groups, dtype=np.float64) / max(len(others), 1)


def novelty_factors(recurrences: Sequence[FloatArray]) -> FloatArray:
    """1 − mean_j f_ij: what is left of the outcome reward of an answer whose steps fit every image; array [N].

    Args:
        recurrences: `recurrence` of each trajectory's compared steps; 1 is left where it has none.
    """
    return np.array([1.0 - f.mean() if len(f) else 1.0 for f in recurrences])


def _unit_rows(rows: FloatArray) -> FloatArray:
    """Rows [..., width] with norm 1; a row of zeros stays."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def mixing_weight(
    step: int,
    total_steps: int,
    *,
    warmup: float = PAPER.step_weight_warmup,
    initial: float = PAPER.step_weight_initial,
    final: float = PAPER.step_weight_final,
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
    of_outcome, of_step_agreement = solver_weights(weight)
    return of_outcome * outcome + of_step_agreement * step_agreement


def solver_weights(weight: float) -> tuple[float, float]:
    """1 − λ and λ: what the outcome and the step agreement weigh in the solver's reward."""
    return 1.0 - weight, weight


def proposer_reward(
    answer_entropy: float, *, target: float = PAPER.target_entropy, width: float = PAPER.entropy_width
) -> float:
    """Questions of middle difficulty: exp(−(H − μ)² / 2σ²), H the entropy in nats of the readable votes.

    Args:
        answer_entropy: H. target: μ. width: σ.
    """
    return math.exp(-((answer_entropy - target) ** 2) / (2.0 * width**2))


def readable_rewards(answers: Answers) -> FloatArray:
    """A control: 1 for being readable, else 0; array [N]."""
    return np.array([float(key is not None) for key in answers])


def random_rewards(answers: Answers, rng: np.random.Generator) -> FloatArray:
    """A control: a random number in [0, 1), 0 for the unreadable; array [N]."""
    return readable_rewards(answers) * rng.random(len(answers))


def true_answer_rewards(answers: Answers, true_key: str) -> FloatArray:
    """The ceiling: 1 for the true answer's key, else 0; array [N]."""
    return np.array([float(key == true_key) for key in answers])
