"""What a step's episodes teach: advantages for both roles, and one update of each learner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ireasoner.method.types import Episode, Role
from ireasoner.model.advantages import spread
from ireasoner.model.inputs import build_prompts
from ireasoner.training.config import Config
from ireasoner.training.selfplay import Play, Taught
from ireasoner.training.state import Run

Gate = Literal["kept", "hopeless", "unanimous"]
GATES: tuple[Gate, ...] = ("kept", "hopeless", "unanimous")


def update(run: Run, play: Play) -> tuple[list[Episode], dict[str, float]]:
    """Update each role once: the solver at every step, the proposer at every `proposer_every`-th.

    Returns:
        The episodes with the advantages that their trajectories and questions had, and metrics by name.
    """
    episodes = list(play.episodes)
    solved = [i for i, e in enumerate(episodes) if e.trajectories]
    gates = {i: gate(run.config, episodes[i].majority_fraction) for i in solved}
    metrics = {f"gate/{name}": list(gates.values()).count(name) / len(solved) for name in GATES if solved}
    if kept := [i for i in solved if gates[i] == "kept"]:
        lesson = _teach(run, "solver", play.solver, {i: episodes[i].rewards for i in kept})
        metrics |= lesson.metrics
        for i, own in lesson.advantages.items():
            pairs = zip(episodes[i].trajectories, own, strict=True)
            trajectories = tuple(t.model_copy(update={"advantage": advantage}) for t, advantage in pairs)
            episodes[i] = episodes[i].model_copy(update={"trajectories": trajectories})
    due = run.config.recipe.train_proposer and run.step % run.config.schedule.proposer_every == 0
    if due and run.config.labels is None:
        lesson = _teach(run, "proposer", play.proposer, {i: (e.proposer_reward,) for i, e in enumerate(episodes)})
        metrics |= lesson.metrics
        for i, (advantage,) in lesson.advantages.items():
            proposal = episodes[i].proposal
            assert proposal is not None  # without labels, every question was proposed
            changed = proposal.model_copy(update={"advantage": advantage})
            episodes[i] = episodes[i].model_copy(update={"proposal": changed})
    run.engine.refresh()
    return episodes, metrics


def gate(config: Config, majority_fraction: float) -> Gate:
    """Whether a group updates the solver: one that is neither hopeless nor unanimous does."""
    if majority_fraction < config.recipe.gate_low:
        return "hopeless"
    return "unanimous" if majority_fraction > config.recipe.gate_high else "kept"


@dataclass(frozen=True)
class _Lesson:
    """The advantages of one role's episodes by their numbers, and the metrics of its update."""

    advantages: dict[int, list[float]]
    metrics: dict[str, float]


def _teach(run: Run, role: Role, taught: Taught, rewards: Mapping[int, Sequence[float]]) -> _Lesson:
    """Update one role on the episodes that have rewards here; this process computes its own share of the gradient."""
    learner = run.learners[role]
    advantages = learner.advantages([list(own) for own in rewards.values()])
    row_of = {i: row for row, i in enumerate(rewards)}
    own = [k for k, i in enumerate(taught.episodes) if i in row_of]
    requests = [taught.requests[k] for k in own]
    prompts = build_prompts(run.policy, [r.image for r in requests], [r.messages for r in requests]) if own else None
    rows = advantages[[row_of[taught.episodes[k]] for k in own]]
    found = learner.update(prompts, [taught.groups[k] for k in own], rows, advantages.numel())
    metrics = {f"{name}/{role}": value for name, value in {**found, "advantage_std": spread(advantages)}.items()}
    return _Lesson(dict(zip(rewards, advantages.tolist(), strict=True)), metrics)
