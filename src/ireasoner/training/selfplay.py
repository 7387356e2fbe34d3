"""Self-play: the proposer asks about each item, the solver answers N times, and the texts are rewarded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from ireasoner.method import seeds
from ireasoner.method.memory import RecentSteps
from ireasoner.method.scoring import Context, RewardFunction, score_solutions, step_weight
from ireasoner.method.texts import parse_question, parse_trajectory, proposer_messages, solver_messages
from ireasoner.method.types import Completion, Episode, Proposal, Question, Sampled, Solution, Trajectory
from ireasoner.model.inputs import EncodedImage, embed_texts, encode_images, render
from ireasoner.model.parallel import ALONE, Processes
from ireasoner.model.policy import Policy
from ireasoner.rollouts.engine import Engine, Request
from ireasoner.training.config import Config
from ireasoner.training.items import Item


@dataclass(frozen=True)
class Sample:
    """A request and the completions that this process sampled for it; `episode` is an index in `Play.episodes`."""

    episode: int
    request: Request
    completions: Sequence[Completion]


@dataclass(frozen=True)
class Play:
    """The episodes of one step, those of all processes, and what this process sampled for each role."""

    episodes: tuple[Episode, ...]
    solver: tuple[Sample, ...]
    proposer: tuple[Sample, ...]


@dataclass(frozen=True)
class _Asked:
    """A question about an item. It comes from a proposal to `prompt`, or with its true answer from a label."""

    question: Question
    prompt: str
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
        self.memory = RecentSteps(config.recipe.recurrence_window)

    def play(self, step: int, items: Sequence[Item]) -> Play:
        """Play the items of one step, counted from 1."""
        batch = _Batch(self.config.seed, step, [item.name for item in items])
        share = self.processes.share(len(items))
        encoded = encode_images(self.policy, [items[i].image for i in share])
        images = dict(zip(share, encoded, strict=True))
        asked, proposer = self._ask(batch, images)
        solver = self._solve(batch, images, [a.question for a in asked])
        # Completions are exchanged before they are scored, so that every process remembers the steps of every group.
        written = {sample.episode: sample.completions for sample in solver}  # nothing for an unreadable question
        groups = self._exchange([written.get(i, ()) for i in share], len(items))
        sampling, processor = self.config.sampling, self.policy.processor
        prompts = [render(processor, solver_messages(sampling.solver_prompt, a.question.text)) for a in asked]
        solutions = [
            [parse_trajectory(c.text, c.finish_reason, sampling.solution_form, prompt) for c in group]
            for group, prompt in zip(groups, prompts, strict=True)
        ]
        for name, group in zip(batch.names, solutions, strict=True):
            self.memory.add(name, group)
        episodes = [self._episode(batch, i, asked[i], prompts[i], groups[i], solutions[i]) for i in share]
        return Play(tuple(self._exchange_episodes(episodes, len(items))), solver, proposer)

    def _ask(self, batch: _Batch, images: Mapping[int, EncodedImage]) -> tuple[list[_Asked], tuple[Sample, ...]]:
        """One question about every item of the batch, the proposer's or a labelled one; and what this process sampled.

        `images` are those of this process's share, by their index in the batch.
        """
        total = len(batch.names)
        if self.labels is not None:
            return [self._pick_label(batch, i) for i in range(total)], ()
        sampling = self.config.sampling
        messages = proposer_messages(sampling.proposer_prompt, sampling.domain)
        requests = [Request(image, messages, batch.seed(i, seeds.PROPOSE)) for i, image in images.items()]
        longest = sampling.max_question_tokens
        groups = self.engine.sample(requests, "proposer", max_tokens=longest)
        proposals = [group[0] for group in self._exchange(groups, total)]
        prompt = render(self.policy.processor, messages)
        asked = [_Asked(parse_question(p.text, p.finish_reason, prompt), prompt, p, None) for p in proposals]
        return asked, tuple(Sample(*row) for row in zip(images, requests, groups, strict=True))

    def _solve(
        self, batch: _Batch, images: Mapping[int, EncodedImage], questions: Sequence[Question]
    ) -> tuple[Sample, ...]:
        """A group of completions for each readable question of this process's share."""
        sampling = self.config.sampling
        readable = [i for i in images if questions[i].well_formed]
        messages = [solver_messages(sampling.solver_prompt, questions[i].text) for i in readable]
        requests = [
            Request(images[i], chat, batch.seed(i, seeds.SOLVE)) for i, chat in zip(readable, messages, strict=True)
        ]
        n, longest = sampling.group_size, sampling.max_solution_tokens
        groups = self.engine.sample(requests, "solver", n=n, max_tokens=longest)
        return tuple(Sample(*row) for row in zip(readable, requests, groups, strict=True))

    def _exchange(self, groups: Sequence[Sequence[Completion]], total: int) -> Sequence[Sequence[Completion]]:
        """The groups of all `total` items, given those of this process's share."""
        if self.processes.count == 1:
            return groups
        rows = self.processes.gather([[astuple(c) for c in group] for group in groups], total)
        return [[Completion(text, tuple(ids), tuple(ps), end) for text, ids, ps, end in row] for row in rows]

    def _exchange_episodes(self, episodes: Sequence[Episode], total: int) -> Sequence[Episode]:
        """The episodes of all `total` items, given those of this process's share.

        Every process could score all groups, but a user's reward need not give the same number twice, and the
        advantages of all processes must be computed from the same numbers.
        """
        if self.processes.count == 1:
            return episodes
        records = self.processes.gather([episode.model_dump(mode="json") for episode in episodes], total)
        return [Episode.model_validate(record) for record in records]

    def _pick_label(self, batch: _Batch, i: int) -> _Asked:
        """One of the labelled questions about an image, with its true answer."""
        labels = (self.labels or {}).get(batch.names[i], ())
        if not labels:
            return _Asked(Question("", "", "no label for this image"), "", None, None)
        rng = np.random.default_rng(list(batch.seed(i, seeds.PICK_LABEL)))
        text, truth = labels[int(rng.integers(len(labels)))]
        return _Asked(Question(text, "", None), "", None, truth)

    def _episode(
        self,
        batch: _Batch,
        i: int,
        asked: _Asked,
        prompt: str,
        completions: Sequence[Completion],
        solutions: Sequence[Solution],
    ) -> Episode:
        """Score the group of item i, which are the solver's replies to `prompt`, and make its record."""
        recipe = self.config.recipe
        planned = self.config.planned_steps or self.config.schedule.steps
        weight = step_weight(recipe, min(batch.step, planned), planned)
        context = Context(
            image=batch.names[i],
            form=self.config.sampling.solution_form,
            prompt=prompt,
            finish_reasons=[c.finish_reason for c in completions],
            logprobs=[c.logprobs for c in completions],
            step_weight=weight,
            embed=lambda texts: embed_texts(self.policy, texts, recipe.max_step_tokens),
            recent_steps=self.memory.of_others(batch.names[i]),
            true_answer=asked.true_answer,
            seed=batch.seed(i, seeds.RANDOM_REWARD),
            reward=self.reward,
        )
        scored = score_solutions(asked.question.text, solutions, recipe, context, [c.text for c in completions])
        proposal = None
        if asked.proposal:
            proposal = Proposal(**Sampled.fields_of(asked.proposal), prompt=asked.prompt)
        return Episode(
            step=batch.step,
            image=batch.names[i],
            question=asked.question,
            proposal=proposal,
            proposer_reward=scored.proposer_reward,
            prompt=prompt,
            trajectories=tuple(
                Trajectory(**Sampled.fields_of(completion), **dict(trajectory))
                for completion, trajectory in zip(completions, scored.trajectories, strict=True)
            ),
            majority_answer=scored.vote.answer,
            majority_fraction=scored.vote.fraction,
            answer_entropy=scored.vote.entropy,
            step_weight=weight,
            true_answer=asked.true_answer,
        )


class _Batch:
    """The names of a step's images, and the seeds of all random draws about them.

    `ireasoner.method.seeds` says why the seeds are made anew for every draw.
    """

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
