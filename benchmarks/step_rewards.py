"""Rewards that pay reasoning steps in other ways than `default`, for the table in docs/experiments.md.

    ireasoner ablate OUT --split validation --seeds 3 --recipes default MY.yaml

where MY.yaml is the recipe `default` with, say, `reward: benchmarks/step_rewards.py:least`: everything but the part for
the steps is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ireasoner.method import rewards
from ireasoner.method.likelihood import step_likelihoods, step_tokens
from ireasoner.method.memory import step_digest
from ireasoner.method.recipe import PAPER
from ireasoner.method.rewards import FloatArray
from ireasoner.method.scoring import Context, Group

LENGTH = {"length_penalty": PAPER.length_penalty, "target_words": PAPER.target_words}
STEP_WEIGHT = 0.5  # λ of `default`


@dataclass(frozen=True)
class Parts:
    """What all of these rewards begin with: the steps, how often they recur, the outcome reward [N], likelihoods."""

    steps: Sequence[Sequence[str]]
    recurrences: Sequence[FloatArray]
    outcome: FloatArray
    likelihoods: Sequence[FloatArray]

    def of_steps(self, scores: Sequence[FloatArray]) -> FloatArray:
        """The mean score of each trajectory's steps, less what is said of other images; [N]."""
        return rewards.supported_step_rewards(scores, self.recurrences)


def parts(group: Group, context: Context) -> Parts:
    """The parts of a group."""
    assert context.tokens is not None
    assert context.logprobs is not None
    steps = [s.reasoning_steps[: PAPER.max_reasoning_steps] if s.well_formed else () for s in group.solutions]
    recurrences = [rewards.recurrence([step_digest(x) for x in own], context.recent_steps or ()) for own in steps]
    words = [s.words_before_answer for s in group.solutions]
    outcome = rewards.outcome_rewards(group.answer_keys, words) * rewards.novelty_factors(recurrences)
    likelihoods = [step_likelihoods(*each) for each in zip(steps, context.tokens, context.logprobs, strict=True)]
    return Parts(steps, recurrences, outcome, likelihoods)


def least_likely_tokens(
    steps: Sequence[Sequence[str]], tokens: Sequence[Sequence[str]], logprobs: Sequence[Sequence[float]]
) -> list[FloatArray]:
    """The probability of the least likely token of each step; NaN for one that repeats an earlier one."""
    found = []
    for own, texts, values in zip(steps, tokens, logprobs, strict=True):
        seen: set[str] = set()
        least = []
        for step, place in zip(own, step_tokens(own, texts), strict=True):
            least.append(np.nan if place is None or step_digest(step) in seen else np.exp(np.min(values[place])))
            seen.add(step_digest(step))
        found.append(np.array(least))
    return found


def _added(outcome: FloatArray, steps: FloatArray) -> Mapping[str, FloatArray]:
    return {"of_outcome": (1 - STEP_WEIGHT) * outcome, "of_steps": STEP_WEIGHT * steps}


def least(group: Group, context: Context) -> Mapping[str, FloatArray]:
    """The least likely token of each step, in place of its likelihood."""
    own = parts(group, context)
    assert context.tokens is not None
    assert context.logprobs is not None
    return _added(own.outcome, own.of_steps(least_likely_tokens(own.steps, context.tokens, context.logprobs)))


def least_less_blank(group: Group, context: Context) -> Mapping[str, FloatArray]:
    """The least likely token of each step, less the one if the image were gray."""
    own = parts(group, context)
    assert context.tokens is not None
    assert context.logprobs is not None
    assert context.blank_logprobs is not None
    seen, blank = (
        least_likely_tokens(own.steps, context.tokens, each) for each in (context.logprobs, context.blank_logprobs())
    )
    return _added(own.outcome, own.of_steps([np.maximum(a - b, 0) for a, b in zip(seen, blank, strict=True)]))


def factor(group: Group, context: Context) -> Mapping[str, FloatArray]:
    """The likelihood of the steps times the outcome reward."""
    own = parts(group, context)
    return {"of_outcome": own.outcome * own.of_steps(own.likelihoods)}


def weighted_vote(group: Group, context: Context) -> Mapping[str, FloatArray]:
    """The likelihood of the steps, which are also what a trajectory weighs in the vote."""
    own = parts(group, context)
    weights = rewards.step_means(own.likelihoods)
    keys = group.answer_keys
    readable = [i for i, key in enumerate(keys) if key is not None]
    total = max(float(weights[readable].sum()), 1e-9)
    shares = [
        sum(weights[j] for j in readable if keys[j] == keys[i]) / total if i in readable else 0.0
        for i in range(len(keys))
    ]
    words = [s.words_before_answer for s in group.solutions]
    agreed = (np.array(shares) * len(readable) / len(keys)) ** PAPER.outcome_exponent
    outcome = agreed * rewards.length_factors(words, **LENGTH) * rewards.novelty_factors(own.recurrences)
    return _added(outcome, own.of_steps(own.likelihoods))
