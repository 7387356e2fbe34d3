"""`score_group`: the one place where a group of texts becomes rewards.

Self-play, the validity study, plug-ins and tests all call it. What it needs beside the texts comes in a `Context`, each
field of which is optional; a recipe that needs a missing one says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ireasoner.method import claims, rewards
from ireasoner.method.answers import Vote, answer_key, majority
from ireasoner.method.memory import claim_digest
from ireasoner.method.recipe import Recipe
from ireasoner.method.rewards import FloatArray
from ireasoner.method.texts import parse_trajectory
from ireasoner.method.types import FinishReason, Form, Part, Solution, StepScore, UsageError

# Parts of a user's own reward cannot be called like these, which metrics and records hold for every reward.
RESERVED_PARTS = frozenset({"total", "outcome", "step_agreement"})


class RewardError(UsageError):
    """A reward cannot be computed: the context lacks something, or the user's own function is at fault."""


@dataclass(frozen=True)
class Group:
    """One question's trajectories as they were read, with the vote on their answers; what a reward function gets.

    `texts` are the raw texts; empty where only readings are known.
    """

    question: str
    texts: tuple[str, ...]
    solutions: tuple[Solution, ...]
    answer_keys: tuple[str | None, ...]
    vote: Vote


# What a reward function gives: numbers [N], or several parts by name, whose sum is the reward. None stands for a part
# that does not apply to a trajectory.
Numbers = Sequence[float | None] | FloatArray
RewardFunction = Callable[[Group, "Context"], Numbers | Mapping[str, Numbers]]


@dataclass(frozen=True)
class Context:
    """What a reward may need beside the texts.

    Args:
        image: the name of the image that the question is about.
        form: how the texts give their answers.
        finish_reasons: of each text; None: all ended by themselves.
        step_weight: λ, the weight of step agreement.
        embed: texts to normalised embeddings [texts, width], a row of zeros for an empty text.
        recent_claims: what each of the latest groups of other images claimed (`ireasoner.method.memory`).
        logprobs: of each text's tokens, under the distribution that was sampled from.
        true_answer: what is true, for the recipe `oracle`.
        seed: of whatever a reward draws at random; a resumed run passes the same.
        reward: the function that a recipe names as `file.py:function`.
    """

    image: str | None = None
    form: Form = "tags"
    finish_reasons: Sequence[FinishReason] | None = None
    step_weight: float | None = None
    embed: Callable[[Sequence[str]], NDArray[np.floating]] | None = None
    recent_claims: Sequence[frozenset[str]] | None = None
    logprobs: Sequence[Sequence[float]] | None = None
    true_answer: str | None = None
    seed: Sequence[int] | None = None
    reward: RewardFunction | None = None


@dataclass(frozen=True)
class ScoredGroup:
    """A group with what each trajectory earned; all sequences run parallel to the texts."""

    group: Group
    rewards: tuple[float, ...]
    parts: tuple[dict[str, Part], ...]
    step_scores: tuple[tuple[StepScore, ...], ...]
    proposer_reward: float


def score_group(question: str, texts: Sequence[str], recipe: Recipe, context: Context | None = None) -> ScoredGroup:
    """Read the N texts of one question and reward them by a recipe (arXiv 2601.05877, section 3, for `paper`).

    Args:
        question: which all of them answer.
        texts: as the solver wrote them.
        recipe: which reward, and its constants.
        context: what the reward needs beside the texts.

    Raises:
        RewardError: the context lacks what the recipe needs, or the recipe's own function fails.
    """
    if isinstance(texts, str):
        raise RewardError("score_group takes a group of texts, not one")
    texts, context = tuple(texts), context or Context()
    ends: Sequence[FinishReason] = context.finish_reasons or tuple("stop" for _ in texts)
    if len(ends) != len(texts):
        raise RewardError(f"context.finish_reasons has {len(ends)} entries for {len(texts)} texts")
    solutions = [parse_trajectory(text, end, context.form) for text, end in zip(texts, ends, strict=True)]
    return score_solutions(question, solutions, recipe, context, texts)


def score_solutions(
    question: str, solutions: Sequence[Solution], recipe: Recipe, context: Context, texts: Sequence[str] = ()
) -> ScoredGroup:
    """Score solutions that have already been read; `texts`, if known, are what they were read from."""
    keys = tuple(answer_key(s.answer, question) if s.answer is not None else None for s in solutions)
    group = Group(question, tuple(texts), tuple(solutions), keys, majority(keys))
    if not solutions:
        return ScoredGroup(group, (), (), (), 0.0)
    lacking = _lacking(recipe, context)
    if recipe.reward == "agreement":
        if lacking:
            raise RewardError(f"the reward of the recipe {recipe.name!r} needs context.{lacking}")
        parts, step_scores = _agreement(group, recipe, context)
    else:
        # Agreement is recorded beside other rewards where it can be known, but nothing is paid for it.
        known, step_scores = ({}, ((),) * len(keys)) if lacking else _agreement(group, recipe, context)
        unpaid = {name: [part.model_copy(update={"weight": 0.0}) for part in own] for name, own in known.items()}
        parts = {**unpaid, **_other_reward(group, recipe, context)}
    by_trajectory = tuple({name: own[i] for name, own in parts.items()} for i in range(len(keys)))
    earned = tuple(sum(part.weight * part.value for part in own.values()) for own in by_trajectory)
    worth = rewards.proposer_reward(group.vote.entropy, target=recipe.target_entropy, width=recipe.entropy_width)
    # Of fewer than two readable answers nothing can be said about the question.
    return ScoredGroup(group, earned, by_trajectory, step_scores, worth if group.vote.readable >= 2 else 0.0)


def step_weight(recipe: Recipe, step: int, total_steps: int) -> float:
    """λ(t) of a recipe's schedule, as `rewards.mixing_weight`."""
    return rewards.mixing_weight(
        step,
        total_steps,
        warmup=recipe.step_weight_warmup,
        initial=recipe.step_weight_initial,
        final=recipe.step_weight_final,
    )


def _lacking(recipe: Recipe, context: Context) -> str | None:
    """The field of the context that the agreement reward needs and that is not set, or None."""
    if context.step_weight is None:
        return "step_weight"
    if not 0 <= context.step_weight <= 1:
        raise RewardError(f"context.step_weight is {context.step_weight}: a weight lies between 0 and 1")
    if recipe.recurrence_window and context.recent_claims is None:
        return "recent_claims"
    if recipe.step_measure == "embedding" and context.embed is None:
        return "embed"
    return None


def _agreement(
    group: Group, recipe: Recipe, context: Context
) -> tuple[dict[str, list[Part]], tuple[tuple[StepScore, ...], ...]]:
    """The parts `outcome` and `step_agreement` of every trajectory, and what each compared reasoning step scored."""
    keys, weight = group.answer_keys, context.step_weight or 0.0
    compared = [s.reasoning_steps[: recipe.max_reasoning_steps] if s.well_formed else () for s in group.solutions]
    # Of all reasoning steps, also those that claim nothing: an answer behind words that fit every image must not earn
    # the full outcome reward.
    recurrences = [
        rewards.recurrence([claim_digest(step) for step in own], context.recent_claims or ()) for own in compared
    ]
    words, votes = [s.words_before_answer for s in group.solutions], Counter(keys)
    vote, power = rewards.vote_factors(keys, recipe.outcome_exponent), f"^{recipe.outcome_exponent:g}"
    shares = ["unreadable, no vote" if key is None else f"({votes[key]}/{len(keys)}){power}" for key in keys]
    length = rewards.length_factors(words, length_penalty=recipe.length_penalty, target_words=recipe.target_words)
    outcome = [
        _Factor("share of the vote", vote, shares),
        _Factor("length", length, [f"words before the answer: {n}" for n in words]),
    ]
    if recipe.recurrence_window:
        outcome.append(_Factor("not said of other images", rewards.novelty_factors(recurrences)))
    if recipe.step_measure == "claims":
        similarity, decay = _claim_support(group.solutions, compared), 0.0
        scores = rewards.claim_scores(similarity, recurrences)
        agreement = []
    else:
        assert context.embed is not None
        embedded, decay = [context.embed(own) for own in compared], recipe.position_decay
        similarity = rewards.leave_one_out_similarities(embedded)
        scores = rewards.prototype_similarities(keys, embedded, max_reasoning_steps=recipe.max_reasoning_steps)
        density = rewards.density_factor(keys, recipe.density_exponent)
        share = f"({len(group.vote.members)}/{len(keys)})^{recipe.density_exponent:g}"
        agreement = [_Factor("share of the majority", np.full(len(keys), density), [share] * len(keys))]
    means = rewards.step_means(scores, decay)
    agreement.append(_Factor("mean of its steps", means, [_mean_note(own, decay) for own in scores]))
    explained = tuple(
        tuple(
            StepScore(similarity=alike, recurrence=said, score=score)
            for alike, said, score in zip(_or_none(s), r.tolist(), _or_none(x), strict=True)
        )
        for s, r, x in zip(similarity, recurrences, scores, strict=True)
    )
    return {"outcome": _products(outcome, 1.0 - weight), "step_agreement": _products(agreement, weight)}, explained


def _mean_note(scores: FloatArray, position_decay: float) -> str:
    """The scores of a trajectory's steps that count, with their weights in the mean if these differ."""
    weights = rewards.position_weights(len(scores), position_decay)
    counted = [(s, w) for s, w in zip(scores.tolist(), weights.tolist(), strict=True) if s == s]
    shown = [f"{s:.4f} (weight {w:.4g})" if position_decay else f"{s:.4f}" for s, w in counted]
    return f"of {', '.join(shown)}" if shown else "no step that counts"


def _claim_support(solutions: Sequence[Solution], compared: Sequence[Sequence[str]]) -> list[FloatArray]:
    """How far the others of the group support each compared step; NaN where it claims nothing beyond the answer."""
    said = [claims.beyond_answer(own, s.answer or "") for own, s in zip(compared, solutions, strict=True)]
    support = []
    for own, some, found in zip(compared, said, claims.agreement(said), strict=True):
        values = iter(found)
        support.append(np.array([next(values) if step in some else np.nan for step in own]))
    return support


def _other_reward(group: Group, recipe: Recipe, context: Context) -> dict[str, list[Part]]:
    """The parts of a reward other than agreement."""
    keys = group.answer_keys
    if recipe.reward == "discrete":
        return {"majority_answer": _parts(rewards.discrete_rewards(keys))}
    if recipe.reward == "format":
        return {"readable": _parts(rewards.readable_rewards(keys))}
    if recipe.reward == "random":
        if context.seed is None:
            raise RewardError("a random reward needs context.seed")
        return {"random": _parts(rewards.random_rewards(keys, np.random.default_rng(list(context.seed))))}
    if recipe.reward == "oracle":
        if context.true_answer is None:
            raise RewardError("the oracle's reward needs context.true_answer")
        true_key = answer_key(context.true_answer, group.question)
        return {"true_answer": _parts(rewards.true_answer_rewards(keys, true_key))}
    if context.reward is None:
        raise RewardError(
            f"the reward {recipe.reward} lies in a file, which is not opened here: hand in context.reward"
        )
    try:
        given = context.reward(group, context)
    except Exception as error:  # the function is the user's and may raise anything
        raise RewardError(f"{recipe.reward} failed: {type(error).__name__}: {error}") from error
    return _own_reward(group, recipe.reward, given)


def _own_reward(group: Group, name: str, given: Any) -> dict[str, list[Part]]:
    """The parts that a user's function gave, checked; an unreadable trajectory earns nothing, whatever it was given."""
    parts = given if isinstance(given, Mapping) else {"reward": given}
    if not parts or RESERVED_PARTS.intersection(parts):
        raise RewardError(
            f"{name} gave parts called {list(parts)}: name at least one, and none of {sorted(RESERVED_PARTS)}"
        )
    found: dict[str, list[Part]] = {}
    for part, values in parts.items():
        try:
            if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str):
                raise TypeError
            numbers = [0.0 if value is None else float(value) for value in values]
        except (TypeError, ValueError):
            raise RewardError(f"{name} gave {values!r:.100} as {part}: it must give a number for each text") from None
        if len(numbers) != len(group.answer_keys):
            raise RewardError(f"{name} gave {len(numbers)} numbers as {part} for {len(group.answer_keys)} texts")
        if not np.isfinite(numbers).all() or np.abs(numbers).max(initial=0) > 1e6:
            raise RewardError(f"{name} gave {numbers} as {part}: rewards must be finite, and at most a million")
        found[str(part)] = _parts(rewards.readable_rewards(group.answer_keys) * numbers)
    return found


def _parts(values: FloatArray) -> list[Part]:
    """A part of every trajectory that is paid in full."""
    return [Part(value=value) for value in values.tolist()]


class _Factor(NamedTuple):
    """A factor of every trajectory's part [N], with a note for each (or none)."""

    name: str
    values: FloatArray
    notes: Sequence[str] = ()


def _products(factors: Sequence[_Factor], weight: float) -> list[Part]:
    """The parts of N trajectories that are products of factors."""
    parts = []
    for i in range(len(factors[0].values)):
        own = {factor.name: float(factor.values[i]) for factor in factors}
        notes = {factor.name: factor.notes[i] for factor in factors if factor.notes}
        value = min(math.prod(own.values()), 1.0)  # rounding may leave a cosine just above 1
        parts.append(Part(value=value, weight=weight, factors=own, notes=notes))
    return parts


def _or_none(values: FloatArray) -> list[float | None]:
    """As plain floats, NaN as None."""
    return [None if value != value else value for value in values.tolist()]
