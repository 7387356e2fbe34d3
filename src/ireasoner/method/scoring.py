"""`score_group`: the one place where a group of texts becomes rewards.

Self-play, the studies and the tests call it, or `score_solutions` where the texts have already been read. It applies
the equations of `ireasoner.method.rewards`, and explains the result for the record. What it needs beside the texts
comes in a `Context`, whose fields are optional; a recipe that needs a missing one says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ireasoner.method import rewards
from ireasoner.method.answers import Vote, answer_key, majority
from ireasoner.method.likelihood import step_grounding, step_likelihoods
from ireasoner.method.memory import step_digest
from ireasoner.method.recipe import AGREEMENT_PARTS, PUBLISHED, Recipe
from ireasoner.method.rewards import FloatArray
from ireasoner.method.texts import parse_trajectory
from ireasoner.method.types import (
    Alteration,
    FinishReason,
    Form,
    Part,
    ScoredTrajectory,
    Solution,
    StepScore,
    TokenDistributions,
    UsageError,
)

# Parts of a user's own reward cannot be called like these, which metrics and records hold for every reward.
RESERVED_PARTS = frozenset({"total", *AGREEMENT_PARTS})
LARGEST_REWARD = 1e6
NO_COMMITMENT = "the answer does not commit itself"  # the problem of a readable text whose answer has no key
# What each measure of reasoning steps reads in the context.
NEEDED_FOR_STEPS = {
    "embedding": ("embed",),
    "likelihood": ("logprobs", "tokens"),
    "grounding": ("logprobs", "tokens", "blank_logprobs"),
}
# What a reward may ask of the model, in self-play; elsewhere some of it may not be known.
ASKED_OF_THE_MODEL = ("logprobs", "tokens", "blank_logprobs", "distributions", "likelihoods", "embed", "other_view")


class RewardError(UsageError):
    """A reward cannot be computed: the context lacks something, or the user's own function is at fault."""


@dataclass(frozen=True)
class Group:
    """One question's trajectories as they were read, with the vote on their answers; what a reward function gets.

    `texts` are the raw texts; empty where only readings are known. Where a label says what is true, `vote` is not that
    of the group: those that are right have won it, by their share. `rightness` says how right each answer is, from 0 to
    1; None where the truth is not known.
    """

    question: str
    texts: tuple[str, ...]
    solutions: tuple[Solution, ...]
    answer_keys: tuple[str | None, ...]
    vote: Vote
    rightness: tuple[float, ...] | None = None


# What a reward function gives: numbers [N], or several parts by name, whose sum is the reward. None stands for a part
# that does not apply to a trajectory. `proposer` is no such part, but one number: what the question earns.
Numbers = Sequence[float | None] | NDArray[np.floating]
Parts = Mapping[str, Numbers | float]
RewardFunction = Callable[[Group, "Context"], Numbers | Parts]


class Likelihoods(Protocol):
    """How likely the solver finds texts."""

    def __call__(self, texts: Sequence[tuple[str, str]], view: Alteration = "same") -> Sequence[Sequence[float]]:
        """The log-probability of each token of a text, in nats. It takes forward passes.

        Args:
            texts: what the solver has said behind its prompt ("": nothing yet), and the text that follows.
            view: of the image.
        """
        ...


@dataclass(frozen=True)
class Context:
    """What a reward may need beside the texts.

    Args:
        image: the name of the image that the question is about.
        form: how the texts give their answers.
        prompt: what the solver was told, as it read it; None: the shipped prompt of the form.
        finish_reasons: of each text; None: all ended by themselves.
        step_weight: λ, the weight of step agreement.
        embed: texts to normalised embeddings [texts, width], a row of zeros for an empty text.
        recent_steps: digests of the reasoning steps of each of the latest groups of other images, as
            `ireasoner.method.memory.RecentSteps` gives them.
        logprobs: of each text's tokens, under the distribution that was sampled from.
        tokens: the text of each of these tokens, as `ireasoner.method.likelihood.step_tokens` takes them.
        blank_logprobs: of the same tokens, if the image were uniformly gray. To call it takes a forward pass of the
            group.
        distributions: the solver's next-token distributions at each text's tokens. To call it takes a forward pass of
            the group.
        likelihoods: tells how likely the solver finds texts of any kind, about the image or another view of it.
        other_view: the group of the same question about a lightly changed view of the image, if it was asked about that
            too, as recipes with `other_view: true` do. Its vote is never that of a label.
        questions: all readable questions that were asked in the same training step, this one among them.
        true_answer: what is true, for the recipe `oracle`: an answer is right if it has the same key.
        judge: how right an answer is, from 0 to 1, where a label says so. The truth then takes the place of the vote.
        seed: of whatever a reward draws at random; a resumed run passes the same.
        reward: the function that a recipe names as `file.py:function`.
    """

    image: str | None = None
    form: Form = "tags"
    prompt: str | None = None
    finish_reasons: Sequence[FinishReason] | None = None
    step_weight: float | None = None
    embed: Callable[[Sequence[str]], NDArray[np.floating]] | None = None
    recent_steps: Sequence[frozenset[str]] | None = None
    logprobs: Sequence[Sequence[float]] | None = None
    tokens: Sequence[Sequence[str]] | None = None
    blank_logprobs: Callable[[], Sequence[Sequence[float]]] | None = None
    distributions: Callable[[], Sequence[TokenDistributions]] | None = None
    likelihoods: Likelihoods | None = None
    other_view: Group | None = None
    questions: Sequence[str] | None = None
    true_answer: str | None = None
    judge: Callable[[str], float] | None = None
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
    form, prompt = context.form, context.prompt
    solutions = [parse_trajectory(text, end, form, prompt) for text, end in zip(texts, ends, strict=True)]
    return score_solutions(question, solutions, recipe, context, texts)


def score_solutions(
    question: str, solutions: Sequence[Solution], recipe: Recipe, context: Context, texts: Sequence[str] = ()
) -> ScoredGroup:
    """Score solutions that have already been read; `texts`, if known, are what they were read from.

    Raises:
        RewardError: as for `score_group`.
    """
    group = read_group(question, solutions, texts)
    keys, vote = group.answer_keys, group.vote
    if not solutions:
        return ScoredGroup(vote, (), 0.0)
    if context.judge is not None:
        group = _with_truth(group, context.judge)
    lacking = _lacking(recipe, context)
    if lacking and recipe.reward == "agreement":
        raise RewardError(f"the reward of the recipe {recipe.name!r} needs context.{lacking}")
    # Beside other rewards, agreement is recorded where it can be known, but nothing is paid for it.
    agreement = None if lacking else _agreement(group, recipe, context)
    other: dict[str, FloatArray] = {}
    worth = rewards.proposer_reward(group.vote.entropy, target=recipe.target_entropy, width=recipe.entropy_width)
    if agreement and recipe.reward == "agreement":
        paid = rewards.solver_rewards(agreement.outcome, agreement.steps, agreement.weight)
    else:
        other, own_worth = _other_reward(group, recipe, context)
        worth = worth if own_worth is None else own_worth
        paid = sum(other.values(), np.zeros(len(keys)))
    parts = _agreement_parts(agreement, group, recipe) if agreement else [{} for _ in keys]
    trajectories = tuple(
        ScoredTrajectory(
            **dict(solution),
            answer_key=keys[i],
            in_majority=i in vote.members,
            rightness=group.rightness[i] if group.rightness else None,
            reward=float(paid[i]),
            parts=parts[i] | {name: Part(value=float(values[i])) for name, values in other.items()},
            step_scores=_step_scores(agreement, i) if agreement else (),
        )
        for i, solution in enumerate(group.solutions)
    )
    # Of fewer than two readable answers nothing can be said about the question.
    return ScoredGroup(vote, trajectories, worth if vote.readable >= 2 else 0.0)


def read_group(question: str, solutions: Sequence[Solution], texts: Sequence[str] = ()) -> Group:
    """Solutions of one question as a group, with the vote on their answers; `texts`, if known, are what they say.

    An answer that does not commit itself, such as "A or B", has no vote and earns nothing, as if it were unreadable.
    """
    keys = tuple(answer_key(s.answer, question) if s.answer is not None else None for s in solutions)
    committed = tuple(
        s if key is not None or s.problem else s.model_copy(update={"answer": None, "problem": NO_COMMITMENT})
        for s, key in zip(solutions, keys, strict=True)
    )
    return Group(question, tuple(texts), committed, keys, majority(keys))


def _with_truth(group: Group, judge: Callable[[str], float]) -> Group:
    """A group whose vote those have won that are right."""
    right = tuple(judge(s.answer) if s.answer is not None else 0.0 for s in group.solutions)
    members = tuple(i for i, value in enumerate(right) if value > 0)
    answer = group.answer_keys[members[0]] if members else None
    vote = replace(group.vote, answer=answer, members=members, fraction=len(members) / len(right))
    return replace(group, vote=vote, rightness=right)


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
    # With λ = 0, as always in `answers-only`, nothing is paid for the steps.
    return _lacking_of_steps(recipe, context) if context.step_weight else None


def _lacking_of_steps(recipe: Recipe, context: Context) -> str | None:
    """The field of the context that it takes to judge reasoning steps and that is not set, or None."""
    return next((name for name in NEEDED_FOR_STEPS[recipe.step_measure] if getattr(context, name) is None), None)


# --- agreement: first its numbers, then how the record explains them --------------------------------------------------


@dataclass(frozen=True)
class _Agreement:
    """The two parts of a group's agreement, arrays [N]; their weight λ; and what the reasoning steps scored.

    The lists have one array [compared reasoning steps] for each trajectory, as `StepScore` explains them; NaN for None.
    """

    weight: float
    outcome: FloatArray
    steps: FloatArray
    similarities: list[FloatArray]
    recurrences: list[FloatArray]
    scores: list[FloatArray]


def _agreement(group: Group, recipe: Recipe, context: Context) -> _Agreement:
    """Apply the equations of `rewards` to a group, with the constants of a recipe."""
    assert context.step_weight is not None
    weight = context.step_weight
    keys, words = _voting_keys(group), [s.words_before_answer for s in group.solutions]
    compared = [s.reasoning_steps[: recipe.max_reasoning_steps] if s.well_formed else () for s in group.solutions]
    recent = context.recent_steps or ()
    # Of all reasoning steps, also those that earn nothing: an answer behind words that fit every image must not earn
    # the full outcome reward.
    recurrences = [rewards.recurrence([step_digest(step) for step in steps], recent) for steps in compared]
    penalty = {"length_penalty": recipe.length_penalty, "target_words": recipe.target_words}
    if group.rightness is None:
        outcome = rewards.outcome_rewards(keys, words, exponent=recipe.outcome_exponent, **penalty)
    else:
        outcome = np.array(group.rightness) * rewards.length_factors(words, **penalty)
    if recipe.recurrence_window:
        outcome = outcome * rewards.novelty_factors(recurrences)
    if _lacking_of_steps(recipe, context):  # and λ is 0
        unknown = [np.full(len(steps), np.nan) for steps in compared]
        return _Agreement(weight, outcome, rewards.step_means(unknown), unknown, recurrences, unknown)
    if recipe.step_measure != "embedding":
        support = _likelihoods(compared, recipe, context)
        steps = rewards.supported_step_rewards(support, recurrences)
        return _Agreement(weight, outcome, steps, support, recurrences, rewards.support_scores(support, recurrences))
    assert context.embed is not None
    embedded = [context.embed(steps) for steps in compared]
    steps = rewards.step_agreement_rewards(
        keys,
        embedded,
        density_exponent=recipe.density_exponent,
        position_decay=recipe.position_decay,
        max_reasoning_steps=recipe.max_reasoning_steps,
    )
    scores = rewards.prototype_similarities(keys, embedded, max_reasoning_steps=recipe.max_reasoning_steps)
    return _Agreement(weight, outcome, steps, rewards.leave_one_out_similarities(embedded), recurrences, scores)


def _voting_keys(group: Group) -> list[str | None]:
    """The answer keys; where the truth is known, of the right answers alone, which have one key between them."""
    if group.rightness is None:
        return list(group.answer_keys)
    return [group.vote.answer if right > 0 else None for right in group.rightness]


def _likelihoods(compared: Sequence[Sequence[str]], recipe: Recipe, context: Context) -> list[FloatArray]:
    """How likely each compared step was when it was sampled, or how much of that is owed to the image; NaN where that
    is not known."""
    assert context.logprobs is not None
    assert context.tokens is not None
    if recipe.step_measure == "likelihood":
        return [step_likelihoods(*each) for each in zip(compared, context.tokens, context.logprobs, strict=True)]
    assert context.blank_logprobs is not None
    blank = context.blank_logprobs()
    return [step_grounding(*each) for each in zip(compared, context.tokens, context.logprobs, blank, strict=True)]


def _agreement_parts(agreement: _Agreement, group: Group, recipe: Recipe) -> list[dict[str, Part]]:
    """The parts of each trajectory as they are recorded; they weigh nothing if the recipe pays another reward."""
    keys, count = _voting_keys(group), len(group.solutions)
    words = [s.words_before_answer for s in group.solutions]
    weights = rewards.solver_weights(agreement.weight) if recipe.reward == "agreement" else (0.0, 0.0)
    # The factors of the two products by name: their values [N], and a note for each of the N trajectories.
    votes, power = Counter(keys), f"^{recipe.outcome_exponent:g}"
    shares = rewards.vote_factors(keys, recipe.outcome_exponent)
    vote_notes = [f"({votes[key]}/{count}){power}" if key else "unreadable, no vote" for key in keys]
    lengths = rewards.length_factors(words, length_penalty=recipe.length_penalty, target_words=recipe.target_words)
    outcome = {"share of the vote": (shares, vote_notes)}
    if group.rightness is not None:
        outcome = {"right": (np.array(group.rightness), ["by the label"] * count)}
    outcome["length"] = (lengths, [f"words before the answer: {number}" for number in words])
    if recipe.recurrence_window:
        outcome["not said of other images"] = (rewards.novelty_factors(agreement.recurrences), [""] * count)
    steps, decay = {}, 0.0
    if recipe.step_measure == "embedding":
        decay = recipe.position_decay
        density = np.full(count, rewards.density_factor(keys, recipe.density_exponent))
        note = f"({len(group.vote.members)}/{count})^{recipe.density_exponent:g}"
        steps["share of the majority"] = (density, [note] * count)
    means = rewards.step_means(agreement.scores, decay)
    steps["mean of its steps"] = (means, [_mean_note(scores, decay) for scores in agreement.scores])
    parts = _products(agreement.outcome, weights[0], outcome), _products(agreement.steps, weights[1], steps)
    return [{"outcome": of_outcome, "step_agreement": of_steps} for of_outcome, of_steps in zip(*parts, strict=True)]


def _products(values: FloatArray, weight: float, factors: Mapping[str, tuple[FloatArray, Sequence[str]]]) -> list[Part]:
    """A part for each of the N values, with its factors, each of which has N values and N notes; "" is no note."""
    return [
        Part(
            value=float(value),
            weight=weight,
            factors={name: float(numbers[i]) for name, (numbers, _) in factors.items()},
            notes={name: notes[i] for name, (_, notes) in factors.items() if notes[i]},
        )
        for i, value in enumerate(values)
    ]


def _mean_note(scores: FloatArray, position_decay: float) -> str:
    """The scores of a trajectory's steps that count, with their weights in the mean if these differ."""
    weights = rewards.position_weights(len(scores), position_decay)
    that_count = [(s, w) for s, w in zip(scores.tolist(), weights.tolist(), strict=True) if not math.isnan(s)]
    shown = [f"{s:.4f} (weight {w:.4g})" if position_decay else f"{s:.4f}" for s, w in that_count]
    return f"of {', '.join(shown)}" if shown else "no step that counts"


def _step_scores(agreement: _Agreement, i: int) -> tuple[StepScore, ...]:
    """The records of the compared steps of trajectory i."""
    similarities, scores = (
        [None if math.isnan(x) else x for x in values[i].tolist()]
        for values in (agreement.similarities, agreement.scores)
    )
    rows = zip(similarities, agreement.recurrences[i].tolist(), scores, strict=True)
    return tuple(StepScore(similarity=alike, recurrence=again, score=score) for alike, again, score in rows)


# --- other rewards: ours and the user's -------------------------------------------------------------------------------


def _random_reward(group: Group, context: Context) -> Mapping[str, Numbers]:
    if context.seed is None:
        raise RewardError("a random reward needs context.seed")
    return {"random": rewards.random_rewards(group.answer_keys, np.random.default_rng(list(context.seed)))}


def _oracle_reward(group: Group, context: Context) -> Mapping[str, Numbers]:
    if group.rightness is not None:
        return {"true_answer": group.rightness}
    if context.true_answer is None:
        raise RewardError("the oracle's reward needs context.true_answer")
    true_key = answer_key(context.true_answer, group.question) or ""  # no vote has the key of a hedge
    return {"true_answer": rewards.true_answer_rewards(group.answer_keys, true_key)}


# The rewards that ship beside agreement, by the names that a recipe gives them (`ireasoner.method.recipe.REWARDS`).
BUILT_IN: dict[str, RewardFunction] = {
    "discrete": lambda group, context: published_reward("ttrl")(group, context),  # the paper's baseline pays as TTRL
    "random": _random_reward,
    "format": lambda group, context: {"readable": rewards.readable_rewards(group.answer_keys)},
    "oracle": _oracle_reward,
}


def published_reward(name: str) -> RewardFunction:
    """The published reward of a name in `ireasoner.method.recipe.PUBLISHED`.

    Its module is imported when it is first paid, by its name, so that one more paper is one more file.
    """
    return import_module(f"ireasoner.method.published.{name}").reward


def _other_reward(group: Group, recipe: Recipe, context: Context) -> tuple[dict[str, FloatArray], float | None]:
    """The parts [N] of a reward other than agreement, and what it gives the proposer, if it says so."""
    if recipe.reward in PUBLISHED:
        return _checked(group, recipe.reward, published_reward(recipe.reward)(group, context))
    if built_in := BUILT_IN.get(recipe.reward):
        return _checked(group, recipe.reward, built_in(group, context))
    if context.reward is None:
        raise RewardError(
            f"the reward {recipe.reward} lies in a file, which is not opened here: hand in context.reward"
        )
    try:
        given = context.reward(group, context)
    except Exception as error:  # the function is the user's and may raise anything
        unknown = [f"context.{name}" for name in ASKED_OF_THE_MODEL if getattr(context, name) is None]
        is_none = unknown and isinstance(error, TypeError | AttributeError)
        lacking = f" (not known here: {', '.join(unknown)})" if is_none else ""
        raise RewardError(f"{recipe.reward} failed: {type(error).__name__}: {error}{lacking}") from error
    return _checked(group, recipe.reward, given)


def _checked(group: Group, name: str, given: Any) -> tuple[dict[str, FloatArray], float | None]:
    """What a function gave, checked: the parts of the trajectories, and what the proposer earns (None: not said).

    An unreadable trajectory earns nothing, whatever it was given.
    """
    parts = dict(given) if isinstance(given, Mapping) else {"reward": given}
    worth = _checked_worth(name, parts.pop("proposer")) if "proposer" in parts else None
    if not parts:
        raise RewardError(f"{name} gave no part for the trajectories: at least one is needed, beside the proposer's")
    if taken := RESERVED_PARTS.intersection(parts):
        raise RewardError(f"{name} gave a part called {', '.join(sorted(taken))}, which has another meaning: rename it")
    checked: dict[str, FloatArray] = {}
    for part, values in parts.items():
        try:
            if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str):
                raise TypeError
            numbers = [0.0 if value is None else float(value) for value in values]
        except (TypeError, ValueError):
            raise RewardError(f"{name} gave {values!r:.100} as {part}: it must give a number for each text") from None
        if len(numbers) != len(group.answer_keys):
            raise RewardError(f"{name} gave {len(numbers)} numbers as {part} for {len(group.answer_keys)} texts")
        if not np.isfinite(numbers).all() or np.abs(numbers).max(initial=0) > LARGEST_REWARD:
            raise RewardError(f"{name} gave {numbers} as {part}: rewards must be finite, and at most a million")
        checked[str(part)] = rewards.readable_rewards(group.answer_keys) * numbers
    return checked, worth


def _checked_worth(name: str, given: Any) -> float:
    """What a function gave as `proposer`, checked."""
    if not isinstance(given, int | float | np.number) or not abs(given) <= LARGEST_REWARD:
        raise RewardError(f"{name} gave {given!r:.100} as proposer: it must be one number, and at most a million")
    return float(given)
