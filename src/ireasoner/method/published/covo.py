"""CoVo: answers to which their reasoning leads straight, and not by way of the others' answers.

Source: Zhang et al. 2025, "Consistent Paths Lead to Truth: Self-Rewarding Reinforcement Learning for LLM Reasoning"
(arXiv 2506.08745), whose equations are taken from the authors' repository. The code there pays 1 for an answer whose
value r_int^V is 0.5 or more, if the group has another answer, and else 0; this is the value itself.

A state is the text up to the end of a reasoning step, and what the same text has between its last step and its answer:
so every answer follows where an answer is expected. The code puts "The answer is:" there, whose tokens, and one behind
the answer, are in its mean of −ln π; its steps are the lines of the whole text, so that the last states hold the answer
itself. A trajectory whose steps are not found in its text, as they are read without emphasis and tags, has no
consistency.

Left out: the curiosity bonus, which the authors' script does not use either; its advantages, which are normalised over
the batch (REINFORCE++), in whose place the recipe has RLOO.
"""

from __future__ import annotations

import cmath
import math

import numpy as np

from ireasoner.method.rewards import FloatArray
from ireasoner.method.scoring import Context, Group, Parts, RewardError
from ireasoner.method.types import Solution

MOST_STATES = 15  # of a trajectory, as in the code, which puts the steps of a longer one together


def reward(group: Group, context: Context) -> Parts:
    """r_i = |1/G Σ_j Con_j exp(i Vol_j)| over the G trajectories j that give the same answer as i.

    Where all give the same answer, nothing is nearer to another one: all earn 1, which nothing is asked for.
    """
    if context.likelihoods is None:
        raise RewardError("the reward covo needs context.likelihoods")
    readable = {i: key for i, key in enumerate(group.answer_keys) if key is not None}
    # As the first who gave each of them wrote it.
    answers = {key: group.solutions[i].answer or "" for i, key in reversed(readable.items())}
    if len(answers) < 2:
        return {"consistent_paths": [1.0] * len(group.answer_keys)}
    states = {i: _states(group.texts[i], group.solutions[i]) for i in readable}
    asked = [(state, answer) for i in readable for state in states[i] for answer in answers.values()]
    distances = iter([-math.fsum(logprobs) / max(1, len(logprobs)) for logprobs in context.likelihoods(asked)])
    vectors: dict[str, list[complex]] = {key: [] for key in answers}
    for i, key in readable.items():
        of_states = np.array([[next(distances) for _ in answers] for _ in states[i]]).reshape(-1, len(answers))
        consistency, volatility = path(of_states, list(answers).index(key))
        vectors[key].append(cmath.rect(consistency, volatility))
    values = {key: abs(sum(of_key)) / len(of_key) for key, of_key in vectors.items()}
    return {"consistent_paths": [None if key is None else values[key] for key in group.answer_keys]}


def path(distances: FloatArray, own: int) -> tuple[float, float]:
    """Con, the share of a trajectory's states that are nearest to its own answer, and Vol, how late in it, from 0 to 1,
    the last state comes that is nearer to another one.

    Args:
        distances: from each state to each answer [states, answers], the mean of −ln π over the answer's tokens.
        own: the trajectory's answer.
    """
    if not len(distances):
        return 0.0, 0.0
    nearest = distances[:, own] == distances.min(axis=1)
    astray = np.flatnonzero(~nearest)
    return float(nearest.mean()), (int(astray[-1]) + 1) / len(distances) if len(astray) else 0.0


def _states(text: str, solution: Solution) -> list[str]:
    """The text up to the end of each of its reasoning steps, and behind it what comes between the last one and the
    answer."""
    ends: list[int] = []
    for step in solution.reasoning_steps:
        at = text.find(step, ends[-1] if ends else 0)
        if step and at >= 0:
            ends.append(at + len(step))
    if not ends or not solution.answer:
        return []
    start = text.rfind(solution.answer, ends[-1])
    if len(ends) > MOST_STATES:
        ends = [ends[len(ends) * i // MOST_STATES - 1] for i in range(1, MOST_STATES + 1)]
    return [text[:end] + text[ends[-1] : start] for end in ends] if start >= 0 else []
