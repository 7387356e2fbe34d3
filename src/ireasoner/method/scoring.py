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
from ireasoner.method.memory import step_digest
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
        recent_steps: what each of the latest groups of other images claimed (`ireasoner.method.memory`).
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
    recent_steps: Sequence[frozenset[str]] | None = None
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
    agreement: Sequence[_Agreement] = [_Agreement({}, ())] * len(keys)
    lacking = _lacking(recipe, context)
    if lacking and recipe.reward == "agreement":
        raise RewardError(f"the reward of the recipe {recipe.name!r} needs context.{lacking}")
    if not lacking:  # beside other rewards, agreement is recorded where it can be known, but nothing is paid for it
        agreement = _agreement(group, recipe, context)
    other = {} if recipe.reward == "agreement" else _other_reward(group, recipe, context)
    trajectories = []
    for i, solution in enumerate(solutions):
        parts = agreement[i].parts | {name: Part(value=float(values[i])) for name, values in other.items()}
        trajectories.append(
            ScoredTrajectory(
                **dict(solution),
                answer_key=keys[i],
                in_majority=i in group.vote.members,
                reward=sum(part.weight * part.value for part in parts.values()),
                parts=parts,
                step_scores=agreement[i].step_scores,
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
    if recipe.recurrence_window and context.recent_steps is None:
        return "recent_steps"
    if recipe.step_measure == "embedding" and context.embed is None:
        return "embed"
    return None


class _Agreement(NamedTuple):
    """The parts `outcome` and `step_agreement` of a trajectory, and what each compared reasoning step scored."""

    parts: dict[str, Part]
    step_scores: tuple[StepScore, ...]


def _agreement(group: Group, recipe: Recipe, context: Context) -> list[_Agreement]:
    """The agreement of every trajectory; its parts weigh nothing if the recipe pays another reward."""
    keys, votes, paid = group.answer_keys, Counter(group.answer_keys), recipe.reward == "agreement"
    weight, decay = context.step_weight or 0.0, recipe.position_decay if recipe.step_measure == "embedding" else 0.0
    similarities, recurrences, scores = _compare_steps(group, recipe, context)
    words = [s.words_before_answer for s in group.solutions]
    shares = rewards.vote_factors(keys, recipe.outcome_exponent)
    lengths = rewards.length_factors(words, length_penalty=recipe.length_penalty, target_words=recipe.target_words)
    novelties, means = rewards.novelty_factors(recurrences), rewards.step_means(scores, decay)
    density = rewards.density_factor(keys, recipe.density_exponent)
    density_note = f"({len(group.vote.members)}/{len(keys)})^{recipe.density_exponent:g}"
    found = []
    for i, key in enumerate(keys):
        vote = "unreadable, no vote" if key is None else f"({votes[key]}/{len(keys)})^{recipe.outcome_exponent:g}"
        length = f"words before the answer: {words[i]}"
        outcome = {"share of the vote": (shares[i], vote), "length": (lengths[i], length)}
        if recipe.recurrence_window:
            outcome["not said of other images"] = (novelties[i], "")
        agreement = {"share of the majority": (density, density_note)} if recipe.step_measure == "embedding" else {}
        agreement["mean of its steps"] = (means[i], _mean_note(scores[i], decay))
        parts = {
            "outcome": _product(outcome, (1.0 - weight) * paid),
            "step_agreement": _product(agreement, weight * paid),
        }
        found.append(_Agreement(parts, _step_scores(similarities[i], recurrences[i], scores[i])))
    return found


def _compare_steps(group: Group, recipe: Recipe, context: Context) -> tuple[list[FloatArray], ...]:
    """Similarity, recurrence and score of each trajectory's compared steps, as `StepScore` holds them; NaN for None."""
    compared = [s.reasoning_steps[: recipe.max_reasoning_steps] if s.well_formed else () for s in group.solutions]
    # Of all reasoning steps, also those that claim nothing: an answer behind words that fit every image must not earn
    # the full outcome reward.
    recent = context.recent_steps or ()
    recurrences = [rewards.recurrence([step_digest(step) for step in own], recent) for own in compared]
    if recipe.step_measure == "claims":
        support = _claim_support(group.solutions, compared)
        return support, recurrences, rewards.claim_scores(support, recurrences)
    assert context.embed is not None
    embedded = [context.embed(own) for own in compared]
    scores = rewards.prototype_similarities(group.answer_keys, embedded, max_reasoning_steps=recipe.max_reasoning_steps)
    return rewards.leave_one_out_similarities(embedded), recurrences, scores


def _product(factors: Mapping[str, tuple[float, str]], weight: float) -> Part:
    """A part that is a product of factors, each with a note or ""."""
    values = {name: float(value) for name, (value, _) in factors.items()}
    notes = {name: note for name, (_, note) in factors.items() if note}
    value = min(math.prod(values.values()), 1.0)  # rounding may leave a cosine just above 1
    return Part(value=value, weight=weight, factors=values, notes=notes)


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


def _other_reward(group: Group, recipe: Recipe, context: Context) -> dict[str, FloatArray]:
    """The parts [N] of a reward other than agreement."""
    keys = group.answer_keys
    if recipe.reward == "discrete":
        return {"majority_answer": rewards.discrete_rewards(keys)}
    if recipe.reward == "format":
        return {"readable": rewards.readable_rewards(keys)}
    if recipe.reward == "random":
        if context.seed is None:
            raise RewardError("a random reward needs context.seed")
        return {"random": rewards.random_rewards(keys, np.random.default_rng(list(context.seed)))}
    if recipe.reward == "oracle":
        if context.true_answer is None:
            raise RewardError("the oracle's reward needs context.true_answer")
        return {"true_answer": rewards.true_answer_rewards(keys, answer_key(context.true_answer, group.question))}
    if context.reward is None:
        raise RewardError(
            f"the reward {recipe.reward} lies in a file, which is not opened here: hand in context.reward"
        )
    try:
        given = context.reward(group, context)
    except Exception as error:  # the function is the user's and may raise anything
        raise RewardError(f"{recipe.reward} failed: {type(error).__name__}: {error}") from error
    return _own_reward(group, recipe.reward, given)


def _own_reward(group: Group, name: str, given: Any) -> dict[str, FloatArray]:
    """The parts that a user's function gave, checked; an unreadable trajectory earns nothing, whatever it was given."""
    parts = given if isinstance(given, Mapping) else {"reward": given}
    if not parts or RESERVED_PARTS.intersection(parts):
        raise RewardError(
            f"{name} gave parts called {list(parts)}: name at least one, and none of {sorted(RESERVED_PARTS)}"
        )
    found: dict[str, FloatArray] = {}
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
        found[str(part)] = rewards.readable_rewards(group.answer_keys) * numbers
    return found
