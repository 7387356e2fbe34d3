"""What the episodes of a step teach: advantages for both roles, and one update of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ireasoner.method.types import Episode, Role
from ireasoner.model.inputs import build_prompts
from ireasoner.model.loss import advantage_std
from ireasoner.training.config import Config
from ireasoner.training.selfplay import Play, Sample
from ireasoner.training.state import Run

GATES = ("kept", "hopeless", "unanimous")


def update(run: Run, play: Play) -> tuple[list[Episode], dict[str, float]]:
    """Update each role once: the solver after every step, the proposer after every `proposer_every`-th.

    Returns:
        The episodes, with the advantages of the trajectories and proposals that were trained on; and metrics by name.
    """
    episodes = list(play.episodes)
    # Below, `i` is always an index in `episodes`, which holds those of all processes.
    solved = [i for i, episode in enumerate(episodes) if episode.trajectories]
    gates = {i: gate(run.config, episodes[i].majority_fraction) for i in solved}
    metrics = {f"gate/{name}": list(gates.values()).count(name) / len(solved) for name in GATES if solved}
    if kept := [i for i in solved if gates[i] == "kept"]:
        advantages, learned = _teach(run, "solver", play.solver, {i: episodes[i].rewards for i in kept})
        metrics |= learned
        for i in kept:
            pairs = zip(episodes[i].trajectories, advantages[i], strict=True)
            trajectories = tuple(t.model_copy(update={"advantage": advantage}) for t, advantage in pairs)
            episodes[i] = episodes[i].model_copy(update={"trajectories": trajectories})
    due = run.config.recipe.train_proposer and run.due(run.config.schedule.proposer_every)
    rewards = {i: (episode.proposer_reward,) for i, episode in enumerate(episodes) if episode.proposal}
    if due and rewards:
        advantages, learned = _teach(run, "proposer", play.proposer, rewards)
        metrics |= learned
        for i, (advantage,) in advantages.items():
            proposal = episodes[i].proposal
            assert proposal is not None
            changed = proposal.model_copy(update={"advantage": advantage})
            episodes[i] = episodes[i].model_copy(update={"proposal": changed})
    return episodes, metrics


def gate(config: Config, majority_fraction: float) -> str:
    """Which of `GATES` a group is. Only kept groups, which are neither hopeless nor unanimous, update the solver."""
    if majority_fraction < config.recipe.gate_low:
        return "hopeless"
    return "unanimous" if majority_fraction > config.recipe.gate_high else "kept"


def _teach(
    run: Run, role: Role, samples: Sequence[Sample], rewards: Mapping[int, Sequence[float]]
) -> tuple[dict[int, list[float]], dict[str, float]]:
    """Update one role once.

    All processes know all rewards and compute the same advantages, but each computes only the gradient of the samples
    of its share. The learner adds the gradients up.

    Args:
        run: whose learner is updated.
        role: which learner.
        samples: those of this process; one whose episode has no rewards is left out.
        rewards: of the groups that teach, those of all processes, by the index of their episode.

    Returns:
        Advantages by the same indices, and the metrics of the update.
    """
    learner = run.learners[role]
    paid = list(rewards.values())
    advantages_GN = learner.advantages(paid)
    row_of = {episode: row for row, episode in enumerate(rewards)}  # which row of the advantages is an episode's
    samples = [sample for sample in samples if sample.episode in row_of]
    requests = [sample.request for sample in samples]
    prompts = (
        build_prompts(run.policy, [r.image for r in requests], [r.messages for r in requests]) if samples else None
    )
    own_advantages = advantages_GN[[row_of[sample.episode] for sample in samples]]
    metrics = learner.update(prompts, [sample.completions for sample in samples], own_advantages, paid)
    metrics["advantage_std"] = advantage_std(advantages_GN)
    by_role = {f"{name}/{role}": value for name, value in metrics.items()}
    return dict(zip(rewards, advantages_GN.tolist(), strict=True)), by_role
