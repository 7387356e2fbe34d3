"""Self-play: the proposer asks about each item, the solver answers N times, and the texts are rewarded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from ireasoner.method import seeds
from ireasoner.method.memory import ClaimMemory
from ireasoner.method.scoring import Context, RewardFunction, score_group, step_weight
from ireasoner.method.texts import parse_question, parse_trajectory, proposer_messages, solver_messages
from ireasoner.method.types import Completion, Episode, Proposal, Question, Sampled, Trajectory
from ireasoner.model.inputs import EncodedImage, embed_texts, encode_images, render
from ireasoner.model.parallel import ALONE, Processes
from ireasoner.model.policy import Policy
from ireasoner.rollouts.engine import Engine, Request
from ireasoner.training.config import Config
from ireasoner.training.items import Item


@dataclass(frozen=True)
class RoleSamples:
    """What one role wrote in a step, as far as this process sampled it: requests and their groups of completions.

    `episodes` holds the number of the episode that each request belongs to.
    """

    episodes: tuple[int, ...]
    requests: tuple[Request, ...]
    groups: tuple[Sequence[Completion], ...]


@dataclass(frozen=True)
class Play:
    """The episodes of one step, those of all processes, and what this process sampled for each role."""

    episodes: tuple[Episode, ...]
    solver: RoleSamples
    proposer: RoleSamples


@dataclass(frozen=True)
class _Asked:
    """A question about an item. It comes from a proposal, or with its true answer from a label."""

    question: Question
    proposal: Completion | None
    true_answer: str | None


class SelfPlay:
    """Plays the items of a step on the live policy.

    Args:
        policy: encodes images and embeds reasoning steps.
        engine: samples completions.
        config: options of the run.
        labels: questions and true answers by image name, which replace the proposer in the oracle recipe.
        reward: the reward function, if the recipe names one of the user's own.
        processes: the processes that take part. Each plays its share of the items and learns of every episode.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        config: Config,
        labels: Mapping[str, Sequence[tuple[str, str]]] | None = None,
        reward: RewardFunction | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.policy, self.engine, self.config = policy, engine, config
        self.labels, self.reward = labels, reward
        self.processes = processes
        self.memory = ClaimMemory(config.recipe.recurrence_window)

    def play(self, step: int, items: Sequence[Item]) -> Play:
        """Play the items of one step, counted from 1."""
        draws = _Draws(self.config.seed, step, [item.name for item in items])
        own = self.processes.share(len(items))
        images = dict(zip(own, encode_images(self.policy, [items[i].image for i in own]), strict=True))
        asked, proposer = self._ask(draws, images, len(items))
        solver = self._solve(draws, images, [each.question for each in asked])
        # Completions are exchanged before they are scored, so that every process remembers what every group claimed.
        by_episode = dict(zip(solver.episodes, solver.groups, strict=True))
        groups = self._exchange([by_episode.get(i, []) for i in own], len(items))
        form = self.config.sampling.solution_form
        solutions = [[parse_trajectory(c.text, c.finish_reason, form) for c in group] for group in groups]
        for item, group in zip(items, solutions, strict=True):
            self.memory.add(item.name, group)
        # Each process scores its own share and the others take over the result: a user's reward need not give the same
        # number twice, and advantages must agree.
        scored = [self._episode(draws, i, asked[i], groups[i]).model_dump(mode="json") for i in own]
        episodes = [Episode.model_validate(record) for record in self.processes.gather(scored, len(items))]
        return Play(tuple(episodes), solver, proposer)

    def _ask(self, draws: _Draws, images: Mapping[int, EncodedImage], total: int) -> tuple[list[_Asked], RoleSamples]:
        """One question about each of the `total` items: the proposer's, or a labelled one."""
        if self.labels is not None:
            return [self._pick_label(draws, i) for i in range(total)], RoleSamples((), (), ())
        messages = proposer_messages(self.config.sampling.proposer_prompt)
        requests = [Request(image, messages, draws.seed(i, seeds.PROPOSE)) for i, image in images.items()]
        longest = self.config.sampling.max_question_tokens
        groups = self.engine.sample(requests, "proposer", max_tokens=longest) if requests else []
        proposals = [group[0] for group in self._exchange(groups, total)]
        asked = [_Asked(self._read_question(completion), completion, None) for completion in proposals]
        return asked, RoleSamples(tuple(images), tuple(requests), tuple(groups))

    def _solve(self, draws: _Draws, images: Mapping[int, EncodedImage], questions: Sequence[Question]) -> RoleSamples:
        """A group of completions for each readable question of this process's share."""
        own, sampling = [i for i in images if questions[i].well_formed], self.config.sampling
        messages = [solver_messages(sampling.solver_prompt, questions[i].text) for i in own]
        requests = [Request(images[i], m, draws.seed(i, seeds.SOLVE)) for i, m in zip(own, messages, strict=True)]
        n, longest = sampling.group_size, sampling.max_solution_tokens
        groups = self.engine.sample(requests, "solver", n=n, max_tokens=longest) if requests else []
        return RoleSamples(tuple(own), tuple(requests), tuple(groups))

    def _exchange(self, groups: Sequence[Sequence[Completion]], total: int) -> list[list[Completion]]:
        """The groups of all `total` items, given those of this process's share."""
        if self.processes.count == 1:
            return [list(group) for group in groups]
        rows = self.processes.gather([[astuple(c) for c in group] for group in groups], total)
        return [[Completion(text, tuple(ids), tuple(ps), end) for text, ids, ps, end in row] for row in rows]

    def _pick_label(self, draws: _Draws, i: int) -> _Asked:
        """One of the labelled questions about an image, with its true answer."""
        known = (self.labels or {}).get(draws.names[i], ())
        if not known:
            return _Asked(Question("", "", "no label for this image"), None, None)
        rng = np.random.default_rng(list(draws.seed(i, seeds.PICK_LABEL)))
        text, truth = known[int(rng.integers(len(known)))]
        return _Asked(Question(text, "", None), None, truth)

    def _read_question(self, completion: Completion) -> Question:
        """As `parse_question`. In the solver's prompt, the model's image token would stand for a second image."""
        question = parse_question(completion.text, completion.finish_reason)
        if question.well_formed and self.policy.processor.image_token in question.text:
            return replace(question, problem="an image token inside the question")
        return question

    def _episode(self, draws: _Draws, i: int, asked: _Asked, completions: Sequence[Completion]) -> Episode:
        """Score the group of item i and make its record."""
        recipe, sampling, processor = self.config.recipe, self.config.sampling, self.policy.processor
        planned = self.config.planned_steps or self.config.schedule.steps
        weight = step_weight(recipe, min(draws.step, planned), planned)
        context = Context(
            image=draws.names[i],
            form=sampling.solution_form,
            finish_reasons=[c.finish_reason for c in completions],
            logprobs=[c.logprobs for c in completions],
            step_weight=weight,
            embed=lambda texts: embed_texts(self.policy, texts, recipe.max_step_tokens),
            recent_claims=self.memory.of_others(draws.names[i]),
            true_answer=asked.true_answer,
            seed=draws.seed(i, seeds.RANDOM_REWARD),
            reward=self.reward,
        )
        scored = score_group(asked.question.text, [c.text for c in completions], recipe, context)
        proposal = None
        if asked.proposal:
            prompt = render(processor, proposer_messages(sampling.proposer_prompt))
            proposal = Proposal(**Sampled.fields_of(asked.proposal), prompt=prompt)
        return Episode(
            step=draws.step,
            image=draws.names[i],
            question=asked.question,
            proposal=proposal,
            proposer_reward=scored.proposer_reward,
            prompt=render(processor, solver_messages(sampling.solver_prompt, asked.question.text)),
            trajectories=tuple(
                Trajectory(**Sampled.fields_of(completion), **dict(earned))
                for completion, earned in zip(completions, scored.trajectories, strict=True)
            ),
            majority_answer=scored.vote.answer,
            majority_fraction=scored.vote.fraction,
            answer_entropy=scored.vote.entropy,
            step_weight=weight,
            true_answer=asked.true_answer,
        )


class _Draws:
    """The seeds of all random draws of a step; `ireasoner.method.seeds` says why they are made anew for each."""

    def __init__(self, run_seed: int, step: int, names: Sequence[str]) -> None:
        self.run_seed, self.step, self.names = run_seed, step, names
        seen: Counter[str] = Counter()
        self.occurrences: list[int] = []
        for name in names:  # an image that is played twice in one step must not draw the same numbers twice
            self.occurrences.append(seen[name])
            seen[name] += 1

    def seed(self, i: int, purpose: int) -> tuple[int, ...]:
        """The seed of a draw for item i, such as `seeds.SOLVE`."""
        return seeds.draw_seed(self.run_seed, self.step, self.names[i], self.occurrences[i], purpose)
