"""Rewards taken apart into the terms of their equations, so that a reader can add them up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ireasoner.method.answers import answer_key
from ireasoner.page.run import Episode, Trajectory
from ireasoner.training.config import Config

SLACK = 1e-6  # recorded numbers are exact; only the order of sums differs


@dataclass(frozen=True)
class Line:
    """One line of the sum: a name, the recorded value, and what it is made of; `adds_up` says whether it is."""

    name: str
    value: float
    made_of: str
    adds_up: bool


def solver_terms(config: Config, episode: Episode, trajectory: Trajectory) -> list[Line]:
    """A trajectory's reward and its parts (`ireasoner.method.rewards`), each with its terms from the record.

    Runs that were recorded before steps were scored show their parts without terms.
    """
    parts, weight = trajectory.reward_parts, episode.step_weight
    if weight is None or set(parts) != {"outcome", "step_agreement"}:
        lines = [Line("reward", trajectory.reward, "", True)]
        return lines + [Line(name.replace("_", " "), value, "", True) for name, value in parts.items()]
    with suppress(ArithmeticError):  # constants that no run could have used
        return _solver_lines(config, episode, trajectory, weight)
    return [Line("reward", trajectory.reward, "terms that overflow", False)]


def _solver_lines(config: Config, episode: Episode, trajectory: Trajectory, weight: float) -> list[Line]:
    parts = trajectory.reward_parts
    outcome, agreement = parts["outcome"], parts["step_agreement"]
    if config.reward != "agreement":
        return [_other_reward(config, episode, trajectory)]
    total = (1 - weight) * outcome + weight * agreement
    made_of = f"{1 - weight:.6g} × {outcome:.4f} outcome + {weight:.6g} × {agreement:.4f} step agreement"
    return [
        _line("reward", trajectory.reward, total, made_of),
        _outcome(config, episode, trajectory),
        _agreement(config, episode, trajectory),
    ]


def proposer_term(config: Config, episode: Episode) -> Line:
    """The proposer's reward: how near the group's entropy came to the one aimed at."""
    entropy, target, width = episode.answer_entropy, config.target_entropy, config.entropy_width
    readable = sum(t.well_formed for t in episode.trajectories)
    if readable < 2:
        return _line("proposer's reward", episode.proposer_reward, 0.0, "fewer than two answers could be read")
    try:
        worth = math.exp(-((entropy - target) ** 2) / (2 * width**2))
    except ArithmeticError:  # constants that no run could have used
        return Line("proposer's reward", episode.proposer_reward, "terms that overflow", False)
    made_of = f"exp(−({entropy:.6f} − {target:g})² / (2 · {width:g}²)): entropy of the vote against the one aimed at"
    return _line("proposer's reward", episode.proposer_reward, worth, made_of)


def _other_reward(config: Config, episode: Episode, trajectory: Trajectory) -> Line:
    """What the recipes pay that do not pay agreement; of a random number nothing can be checked but its bounds."""
    paid = trajectory.reward
    if config.reward == "discrete":
        return _line("reward", paid, float(trajectory.in_majority), "1 for the majority's answer, else 0")
    if config.reward == "format":
        return _line("reward", paid, float(trajectory.well_formed), "1 for being readable, else 0")
    if config.reward == "random":
        sound = 0 <= paid < 1 if trajectory.well_formed else paid == 0
        return Line("reward", paid, "a random number, 0 if unreadable", sound)
    truth = answer_key(episode.true_answer, episode.question.text) if episode.true_answer is not None else None
    true = trajectory.answer_key is not None and trajectory.answer_key == truth
    return _line("reward", paid, float(true), "1 for the true answer, else 0")


def _line(name: str, recorded: float, computed: float, made_of: str) -> Line:
    return Line(name, recorded, made_of, abs(recorded - computed) <= SLACK)


def _outcome(config: Config, episode: Episode, trajectory: Trajectory) -> Line:
    recorded = trajectory.reward_parts["outcome"]
    if not trajectory.well_formed:
        return _line("outcome", recorded, 0.0, "unreadable: no vote")
    votes = sum(t.answer_key == trajectory.answer_key for t in episode.trajectories)
    share = (votes / len(episode.trajectories)) ** config.outcome_exponent
    over = (trajectory.words_before_answer - config.target_words) / config.target_words
    length = 1 - config.length_penalty * min(max(over, 0.0), 1.0)
    recurring = [score.recurrence for score in trajectory.step_scores]
    new = 1 - sum(recurring) / len(recurring) if recurring else 1.0
    made_of = f"({votes}/{len(episode.trajectories)})^{config.outcome_exponent:g} = {share:.4f} of the vote"
    made_of += f" × {length:.4f} for {trajectory.words_before_answer} words"
    if config.recurrence_window:
        made_of += f" × {new:.4f} not said of other images"
    return _line("outcome", recorded, share * length * new, made_of)


def _agreement(config: Config, episode: Episode, trajectory: Trajectory) -> Line:
    recorded = trajectory.reward_parts["step_agreement"]
    counted = [(j, s.score) for j, s in enumerate(trajectory.step_scores) if s.score is not None]
    if not counted:
        return _line("step agreement", recorded, 0.0, "no step that counts")
    if config.step_measure == "claims":
        mean = sum(score for _, score in counted) / len(counted)
        return _line("step agreement", recorded, mean, f"mean of {_listed([score for _, score in counted])}")
    members = sum(t.in_majority for t in episode.trajectories)
    density = (members / len(episode.trajectories)) ** config.density_exponent
    weights = [math.exp(-config.position_decay * j) for j, _ in counted]
    mean = sum(w * score for w, (_, score) in zip(weights, counted, strict=True)) / sum(weights)
    made_of = f"({members}/{len(episode.trajectories)})^{config.density_exponent:g} = {density:.4f} of the group × "
    made_of += (
        f"mean {mean:.4f} of {_listed([score for _, score in counted])} weighed by exp(−{config.position_decay:g} j)"
    )
    return _line("step agreement", recorded, min(1.0, density * mean), made_of)


def _listed(scores: Sequence[float]) -> str:
    return ", ".join(f"{score:.4f}" for score in scores)
