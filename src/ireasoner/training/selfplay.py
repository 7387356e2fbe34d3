"""Items in, episodes out: the proposer asks about each image, the solver answers N times, the texts are rewarded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from ireasoner.method import seeds
from ireasoner.method.memory import ClaimMemory
from ireasoner.method.scoring import Context, RewardFunction, ScoredGroup, score_solutions, step_weight
from ireasoner.method.texts import parse_question, parse_trajectory, proposer_messages, solver_messages
from ireasoner.method.types import Completion, Episode, Proposal, Question, Sampled, Solution, Trajectory
from ireasoner.model.inputs import EncodedImage, embed_texts, encode_images
from ireasoner.model.parallel import Processes
from ireasoner.model.policy import Policy
from ireasoner.model.processors import render
from ireasoner.rollouts.engine import Engine, Request
from ireasoner.training.config import Config
from ireasoner.training.items import Item


@dataclass(frozen=True)
class Taught:
    """What one role's learner may be taught by a step: its completions, with the prompts that they answer.

    `episodes` are the numbers of the episodes that these belong to; only this process's own are among them.
    """

    episodes: tuple[int, ...]
    requests: tuple[Request, ...]
    groups: tuple[Sequence[Completion], ...]


@dataclass(frozen=True)
class Play:
    """One step's episodes, all processes', and what this process's share of them teaches each role."""

    episodes: tuple[Episode, ...]
    solver: Taught
    proposer: Taught


@dataclass(frozen=True)
class _Asked:
    """A question about one item, and where it comes from: a proposal, or a label with its true answer."""

    question: Question
    proposal: Completion | None
    true_answer: str | None


class SelfPlay:
    """Plays the items of a step on the live policy.

    Args:
        policy: encodes images and embeds reasoning steps.
        engine: samples.
        config: recipe and scale.
        labels: questions and true answers by image name, for the oracle recipe; they replace the proposer.
        reward: the function that the recipe names, if it names one of the user's.
        processes: who plays along; each plays its share of the items, and all know every episode.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        config: Config,
        labels: Mapping[str, Sequence[tuple[str, str]]] | None = None,
        reward: RewardFunction | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.policy, self.engine, self.config = policy, engine, config
        self.labels, self.reward = labels, reward
        self.processes = processes or Processes()
        self.memory = ClaimMemory(config.recipe.recurrence_window)

    def play(self, step: int, items: Sequence[Item]) -> Play:
        """Play the items of one step (counted from 1)."""
        draws = _Draws(self.config.seed, step, [item.name for item in items])
        own = self.processes.share(len(items))
        images = dict(zip(own, encode_images(self.policy, [items[i].image for i in own]), strict=True))
        asked, proposer = self._ask(draws, images, len(items))
        solver = self._solve(draws, images, [a.question for a in asked])
        # Every process rewards every group, so that all have the same episodes and the same memory.
        by_episode = dict(zip(solver.episodes, solver.groups, strict=True))
        groups = self._exchange([by_episode.get(i, []) for i in own], len(items))
        read = [[self._read(completion) for completion in group] for group in groups]
        for item, solutions in zip(items, read, strict=True):
            self.memory.add(item.name, solutions)
        episodes = [
            self._episode(step, items[i].name, asked[i], groups[i], self._score(draws, i, items[i], asked[i], read[i]))
            for i in range(len(items))
        ]
        return Play(tuple(episodes), solver, proposer)

    def _ask(self, draws: _Draws, images: Mapping[int, EncodedImage], total: int) -> tuple[list[_Asked], Taught]:
        """One question about each item: the proposer's, or one of its labelled ones."""
        if self.labels is not None:
            return [self._pick_label(draws, i) for i in range(total)], Taught((), (), ())
        messages = proposer_messages(self.config.sampling.proposer_prompt)
        requests = [Request(image, messages, draws.seed(i, seeds.PROPOSE)) for i, image in images.items()]
        written = self._sample(requests, "proposer")
        taught = Taught(tuple(images), tuple(requests), tuple(written))
        proposals = [group[0] for group in self._exchange(written, total)]
        return [_Asked(self._read_question(c), c, None) for c in proposals], taught

    def _solve(self, draws: _Draws, images: Mapping[int, EncodedImage], questions: Sequence[Question]) -> Taught:
        """A group of completions for each of this process's readable questions."""
        own = [i for i in images if questions[i].well_formed]
        prompt = self.config.sampling.solver_prompt
        requests = [
            Request(images[i], solver_messages(prompt, questions[i].text), draws.seed(i, seeds.SOLVE)) for i in own
        ]
        return Taught(tuple(own), tuple(requests), tuple(self._sample(requests, "solver")))

    def _sample(self, requests: Sequence[Request], role: str) -> list[list[Completion]]:
        sampling = self.config.sampling
        if not requests:
            return []
        if role == "proposer":
            return self.engine.sample(requests, "proposer", max_tokens=sampling.max_question_tokens)
        return self.engine.sample(requests, "solver", n=sampling.group_size, max_tokens=sampling.max_solution_tokens)

    def _exchange(self, groups: Sequence[Sequence[Completion]], total: int) -> list[list[Completion]]:
        """The completions of this process's share of the items, and everybody else's."""
        if self.processes.count == 1:
            return [list(group) for group in groups]
        rows = self.processes.gather([[astuple(c) for c in group] for group in groups], total)
        return [[Completion(text, tuple(ids), tuple(ps), end) for text, ids, ps, end in row] for row in rows]

    def _pick_label(self, draws: _Draws, i: int) -> _Asked:
        """One of an image's labelled questions, and its true answer."""
        known = (self.labels or {}).get(draws.names[i], ())
        if not known:
            return _Asked(Question("", "", "no label for this image"), None, None)
        rng = np.random.default_rng(list(draws.seed(i, seeds.PICK_LABEL)))
        text, truth = known[int(rng.integers(len(known)))]
        return _Asked(Question(text, "", None), None, truth)

    def _read_question(self, completion: Completion) -> Question:
        """As `parse_question`; unreadable too where it holds the model's own image token, which would take an image."""
        question = parse_question(completion.text, completion.finish_reason)
        if question.well_formed and self.policy.processor.image_token in question.text:
            return replace(question, problem="an image token inside the question")
        return question

    def _read(self, completion: Completion) -> Solution:
        return parse_trajectory(completion.text, completion.finish_reason, self.config.sampling.solution_form)

    def _score(self, draws: _Draws, i: int, item: Item, asked: _Asked, solutions: Sequence[Solution]) -> ScoredGroup:
        recipe = self.config.recipe
        context = Context(
            step_weight=step_weight(recipe, draws.step, self.config.schedule.steps),
            embed=lambda texts: embed_texts(self.policy, texts, recipe.max_step_tokens),
            recent_claims=self.memory.of_others(item.name),
            true_answer=asked.true_answer,
            seed=draws.seed(i, seeds.RANDOM_REWARD),
            reward=self.reward,
        )
        return score_solutions(asked.question.text, solutions, recipe, context)

    def _episode(
        self, step: int, image: str, asked: _Asked, completions: Sequence[Completion], scored: ScoredGroup
    ) -> Episode:
        sampling, vote = self.config.sampling, scored.group.vote
        proposal, question = asked.proposal, asked.question
        return Episode(
            step=step,
            image=image,
            question=question,
            proposal=proposal
            and Proposal(
                **Sampled.fields_of(proposal),
                prompt=render(self.policy.processor, proposer_messages(sampling.proposer_prompt)),
            ),
            proposer_reward=scored.proposer_reward,
            prompt=render(self.policy.processor, solver_messages(sampling.solver_prompt, question.text)),
            trajectories=trajectories(completions, scored),
            majority_answer=vote.answer,
            majority_fraction=vote.fraction,
            answer_entropy=vote.entropy,
            step_weight=step_weight(self.config.recipe, step, self.config.schedule.steps),
            true_answer=asked.true_answer,
        )


class _Draws:
    """The seeds of one step's draws (`ireasoner.method.seeds`)."""

    def __init__(self, run_seed: int, step: int, names: Sequence[str]) -> None:
        self.run_seed, self.step, self.names = run_seed, step, names
        seen: Counter[str] = Counter()
        self.occurrences: list[int] = []
        for name in names:  # an image that is played twice in one step must not draw the same numbers twice
            self.occurrences.append(seen[name])
            seen[name] += 1

    def seed(self, i: int, purpose: int) -> tuple[int, ...]:
        """The seed of a draw for item i."""
        return seeds.draw_seed(self.run_seed, self.step, self.names[i], self.occurrences[i], purpose)


def trajectories(completions: Sequence[Completion], scored: ScoredGroup) -> tuple[Trajectory, ...]:
    """The records of a group's completions."""
    return tuple(
        Trajectory(
            **Sampled.fields_of(completion),
            reasoning_steps=solution.reasoning_steps,
            answer=solution.answer,
            words_before_answer=solution.words_before_answer,
            problem=solution.problem,
            answer_key=key,
            in_majority=key is not None and key == scored.group.vote.answer,
            reward=reward,
            parts=parts,
            step_scores=steps,
        )
        for completion, solution, key, reward, parts, steps in zip(
            completions,
            scored.group.solutions,
            scored.group.answer_keys,
            scored.rewards,
            scored.parts,
            scored.step_scores,
            strict=True,
        )
    )
