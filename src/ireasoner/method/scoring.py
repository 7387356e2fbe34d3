"""`score_group`: the one place where a group of texts becomes rewards.

Self-play, the validity study, plug-ins and tests all call it. What it needs beside the texts comes in a `Context`, each
field of which is optional; a recipe that needs a missing one says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ireasoner.method import claims, rewards
from ireasoner.method.answers import Vote, answer_key, majority
from ireasoner.method.memory import claim_digest
from ireasoner.method.recipe import Recipe
from ireasoner.method.rewards import FloatArray
from ireasoner.method.texts import parse_trajectory
from ireasoner.method.types import FinishReason, Form, Part, ScoredTrajectory, Solution, StepScore, UsageError

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
    """The vote of a group, what each trajectory earned, in the order of the texts, and what the proposer earned."""

    vote: Vote
    trajectories: tuple[ScoredTrajectory, ...]
    proposer_reward: float

    @property
    def rewards(self) -> tuple[float, ...]:
        """What each trajectory earned."""
        return tuple(t.reward for t in self.trajectories)


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
        return ScoredGroup(group.vote, (), 0.0)
    columns: dict[str, list[Part]] = {}
    step_scores: list[tuple[StepScore, ...]] = [()] * len(keys)
    lacking = _lacking(recipe, context)
    if lacking and recipe.reward == "agreement":
        raise RewardError(f"the reward of the recipe {recipe.name!r} needs context.{lacking}")
    if not lacking:  # beside other rewards, agreement is recorded where it can be known, but nothing is paid for it
        columns, step_scores = _agreement(group, recipe, context)
    if recipe.reward != "agreement":
        columns |= _other_reward(group, recipe, context)
    trajectories = []
    for i, solution in enumerate(solutions):
        parts = {name: column[i] for name, column in columns.items()}
        trajectories.append(
            ScoredTrajectory(
                **asdict(solution),
                answer_key=keys[i],
                in_majority=i in group.vote.members,
                reward=sum(part.weight * part.value for part in parts.values()),
                parts=parts,
                step_scores=step_scores[i],
            )
        )
    worth = rewards.proposer_reward(group.vote.entropy, target=recipe.target_entropy, width=recipe.entropy_width)
    # Of fewer than two readable answers nothing can be said about the question.
    return ScoredGroup(group.vote, tuple(trajectories), worth if group.vote.readable >= 2 else 0.0)


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
) -> tuple[dict[str, list[Part]], list[tuple[StepScore, ...]]]:
    """The parts `outcome` and `step_agreement` of every trajectory, and what each compared reasoning step scored."""
    compared = [s.reasoning_steps[: recipe.max_reasoning_steps] if s.well_formed else () for s in group.solutions]
    # Of all reasoning steps, also those that claim nothing: an answer behind words that fit every image must not earn
    # the full outcome reward.
    recurrences = [
        rewards.recurrence([claim_digest(step) for step in own], context.recent_claims or ()) for own in compared
    ]
    outcome = _outcome_factors(group, recipe, recurrences)
    if recipe.step_measure == "claims":
        similarities, decay, agreement = _claim_support(group.solutions, compared), 0.0, []
        scores = rewards.claim_scores(similarities, recurrences)
    else:
        assert context.embed is not None
        embedded, decay = [context.embed(own) for own in compared], recipe.position_decay
        similarities = rewards.leave_one_out_similarities(embedded)
        keys, exponent, members = group.answer_keys, recipe.density_exponent, len(group.vote.members)
        scores = rewards.prototype_similarities(keys, embedded, max_reasoning_steps=recipe.max_reasoning_steps)
        share, density = f"({members}/{len(keys)})^{exponent:g}", rewards.density_factor(keys, exponent)
        agreement = [_Factor("share of the majority", np.full(len(keys), density), [share] * len(keys))]
    notes = [_mean_note(own, decay) for own in scores]
    agreement.append(_Factor("mean of its steps", rewards.step_means(scores, decay), notes))
    weight, paid = context.step_weight or 0.0, recipe.reward == "agreement"
    parts = {
        "outcome": _products(outcome, (1.0 - weight) * paid),
        "step_agreement": _products(agreement, weight * paid),
    }
    return parts, [_step_scores(*row) for row in zip(similarities, recurrences, scores, strict=True)]


def _outcome_factors(group: Group, recipe: Recipe, recurrences: Sequence[FloatArray]) -> list[_Factor]:
    """The factors of the outcome reward, as in `rewards.outcome_rewards`, and that of recurring reasoning steps."""
    keys, exponent, votes = group.answer_keys, recipe.outcome_exponent, Counter(group.answer_keys)
    shares = ["unreadable, no vote" if key is None else f"({votes[key]}/{len(keys)})^{exponent:g}" for key in keys]
    words = [s.words_before_answer for s in group.solutions]
    length = rewards.length_factors(words, length_penalty=recipe.length_penalty, target_words=recipe.target_words)
    factors = [
        _Factor("share of the vote", rewards.vote_factors(keys, exponent), shares),
        _Factor("length", length, [f"words before the answer: {count}" for count in words]),
    ]
    if recipe.recurrence_window:
        factors.append(_Factor("not said of other images", rewards.novelty_factors(recurrences)))
    return factors


def _mean_note(scores: FloatArray, position_decay: float) -> str:
    """The scores of a trajectory's steps that count, with their weights in the mean if these differ."""
    weights = rewards.position_weights(len(scores), position_decay)
    counted = [(s, w) for s, w in zip(scores.tolist(), weights.tolist(), strict=True) if not math.isnan(s)]
    shown = [f"{s:.4f} (weight {w:.4g})" if position_decay else f"{s:.4f}" for s, w in counted]
    return f"of {', '.join(shown)}" if shown else "no step that counts"


def _step_scores(similarities: FloatArray, recurrences: FloatArray, scores: FloatArray) -> tuple[StepScore, ...]:
    """The records of one trajectory's compared steps."""
    known, counted = ([None if math.isnan(x) else x for x in values.tolist()] for values in (similarities, scores))
    rows = zip(known, recurrences.tolist(), counted, strict=True)
    return tuple(StepScore(similarity=alike, recurrence=said, score=score) for alike, said, score in rows)


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
