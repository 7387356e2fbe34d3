"""Self-play: the proposer asks about each item, the solver answers N times, and the texts are rewarded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np

from ireasoner.method import seeds
from ireasoner.method.memory import RecentSteps
from ireasoner.method.scoring import Context, Group, RewardFunction, read_group, score_solutions, step_weight
from ireasoner.method.texts import parse_question, parse_trajectory, proposer_messages, solver_messages
from ireasoner.method.types import Alteration, Completion, Episode, Proposal, Question, Sampled, Solution, Trajectory
from ireasoner.model.inputs import EncodedImage, embed_texts, encode_images, render, token_texts
from ireasoner.model.parallel import ALONE, Processes
from ireasoner.model.policy import Policy
from ireasoner.model.sharding import equal_passes
from ireasoner.model.views import shown_in
from ireasoner.rollouts.distributions import text_logprobs, token_distributions, token_logprobs
from ireasoner.rollouts.engine import Engine, Request
from ireasoner.training.alterations import altered
from ireasoner.training.config import Config
from ireasoner.training.evaluation import blanked
from ireasoner.training.items import Item
from ireasoner.training.labelled import LabelledQuestion, judged

T = TypeVar("T")
# Calls a function, now or in another thread, and gives back what waits for its result.
Call = Callable[[Callable[[], T]], Callable[[], T]]
_Sampled = tuple[list[list[Completion]], ...]  # proposals, groups, and groups about another view, as in a draft


@dataclass(frozen=True)
class Sample:
    """A request and the completions that this process sampled for it; `episode` is an index in `Play.episodes`."""

    episode: int
    request: Request
    completions: Sequence[Completion]


@dataclass(frozen=True)
class Draft:
    """What was sampled for a step and is not scored yet: of all processes, so that any number of them can score it.

    Attributes:
        step: the step, counted from 1.
        items: what it is about.
        images: those of this process's share, by their index in `items`.
        proposals: for each item the proposer's one completion, or none where a labelled question is asked.
        groups: the solver's completions for each item; none for an unreadable question.
        others: the same about another view of each item; none where the recipe has no other view.
    """

    step: int
    items: Sequence[Item]
    images: Mapping[int, EncodedImage]
    proposals: Sequence[Sequence[Completion]]
    groups: Sequence[Sequence[Completion]]
    others: Sequence[Sequence[Completion]]

    def state(self) -> dict[str, Any]:
        """What a resumed run needs of it, for JSON. The images are read again."""
        items = [{"name": item.name, "labelled": bool(item.labels)} for item in self.items]
        sampled = {"proposals": self.proposals, "groups": self.groups, "others": self.others}
        return {"step": self.step, "items": items} | {name: rows_of(groups) for name, groups in sampled.items()}


@dataclass(frozen=True)
class Play:
    """The episodes of one step, those of all processes, and what this process sampled for each role."""

    episodes: tuple[Episode, ...]
    solver: tuple[Sample, ...]
    proposer: tuple[Sample, ...]


@dataclass(frozen=True)
class _Asked:
    """A question about an item. It comes from a proposal to `prompt`, or from a label."""

    question: Question
    prompt: str = ""
    proposal: Completion | None = None
    label: LabelledQuestion | None = None


class SelfPlay:
    """Plays the items of a step on the live policy.

    Args:
        policy: encodes images and embeds reasoning steps.
        engine: samples completions.
        config: options of the run.
        examples: labelled questions, of which the proposer is shown some if the config says so.
        reward: the reward function, if the recipe names one of the user's own.
        processes: the processes that take part. Each plays its share of the items and learns of every episode.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        config: Config,
        examples: Sequence[LabelledQuestion] = (),
        reward: RewardFunction | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.policy, self.engine, self.config = policy, engine, config
        self.examples, self.reward = examples, reward
        self.processes = processes
        self.tokens_per_batch = config.fitted_optimizer().tokens_per_batch  # for the passes that rewards ask for
        self.memory = RecentSteps(config.recipe.recurrence_window)

    def play(self, step: int, items: Sequence[Item]) -> Play:
        """Play the items of one step, counted from 1."""
        return self.score(self.begin(step, items, at_once)())

    def begin(self, step: int, items: Sequence[Item], call: Call[_Sampled]) -> Callable[[], Draft]:
        """Begin to sample for a step. Every process must call this, and then what it gives back, which ends it.

        Args:
            step: the step, counted from 1.
            items: what it is about.
            call: calls a function, now or in another thread, and gives back what waits for its result.
        """
        images, batch = self.encode(items), _Batch(self.config.seed, step, items)
        views = self._views(batch, images, "light") if self.config.recipe.other_view else {}
        sampled = call(partial(self._sample, batch, images, views))

        def end() -> Draft:
            proposals, groups, others = (self._exchange(each, len(items)) for each in sampled())
            return Draft(step, items, images, proposals, groups, others)

        return end

    def encode(self, items: Sequence[Item]) -> dict[int, EncodedImage]:
        """The images of this process's share of some items, by their index among them."""
        share = self.processes.share(len(items))
        return dict(zip(share, encode_images(self.policy, [items[i].image for i in share]), strict=True))

    def _views(self, batch: _Batch, of: Iterable[int], view: Alteration) -> dict[int, EncodedImage]:
        """A view of some items' images, by their index in the batch."""
        chosen = list(of)
        views = [altered(batch.items[i].image, view, batch.seed(i, seeds.CHANGE_VIEW)) for i in chosen]
        return dict(zip(chosen, encode_images(self.policy, views), strict=True))

    def restored(self, state: Mapping[str, Any], found: Sequence[Item | None]) -> Draft | None:
        """A draft from its `state` and its items, without those that were not found; None if none was.

        It may be of any number of processes.
        """
        kept = [(i, item) for i, item in enumerate(found) if item is not None]
        if not kept:
            return None
        items = [item for _, item in kept]
        proposals, groups = groups_of(state["proposals"]), groups_of(state["groups"])
        others = groups_of(state["others"]) if self.config.recipe.other_view else [[]] * len(found)
        sampled = [[each[i] for i, _ in kept] for each in (proposals, groups, others)]
        return Draft(state["step"], items, self.encode(items), *sampled)

    def score(self, draft: Draft) -> Play:
        """Read and reward what was sampled. Drafts must be scored in the order of their steps."""
        batch, images = _Batch(self.config.seed, draft.step, draft.items), draft.images
        asked = [self._asked(batch, i, proposal) for i, proposal in enumerate(draft.proposals)]
        solver_prompt, processor = self.config.sampling.solver_prompt, self.policy.processor
        prompts = [
            render(processor, solver_messages(solver_prompt, a.question.text, shown_in(item.image)), item.image)
            for a, item in zip(asked, draft.items, strict=True)
        ]
        solutions = [self._read(group, prompt) for group, prompt in zip(draft.groups, prompts, strict=True)]
        # Completions were exchanged before they are scored, so that every process remembers the steps of every group.
        for item, group in zip(draft.items, solutions, strict=True):
            self.memory.add(item.name, group)
        questions = [a.question.text for a in asked if a.question.well_formed]
        solving = self._solver_requests(batch, images, {i: asked[i].question for i in images})
        blank = BlankImages(self.policy, self.tokens_per_batch)
        with equal_passes(self.policy):  # which a reward may ask for
            episodes = [
                self._episode(batch, i, draft, asked[i], questions, prompts[i], solving.get(i), solutions[i], blank)
                for i in images
            ]
        solver = [Sample(i, request, draft.groups[i]) for i, request in solving.items()]
        proposing = self._proposer_requests(batch, images)
        proposer = [Sample(i, request, draft.proposals[i]) for i, request in proposing.items()]
        return Play(tuple(self._exchange_episodes(episodes, len(draft.items))), tuple(solver), tuple(proposer))

    def _read(self, completions: Sequence[Completion], prompt: str) -> list[Solution]:
        """What the solver replied to a prompt."""
        form = self.config.sampling.solution_form
        return [parse_trajectory(c.text, c.finish_reason, form, prompt) for c in completions]

    def _sample(self, batch: _Batch, images: Mapping[int, EncodedImage], views: Mapping[int, EncodedImage]) -> _Sampled:
        """This process's share of a draft: its proposals, its groups, and its groups about other views.

        Nothing is exchanged here, where another thread may exchange something else.
        """
        sampling = self.config.sampling
        proposing = self._proposer_requests(batch, images)
        proposed = self.engine.sample(list(proposing.values()), "proposer", max_tokens=sampling.max_question_tokens)
        written = dict(zip(proposing, proposed, strict=True))  # nothing where a labelled question is asked
        proposals = [written.get(i, []) for i in images]
        asked = {i: self._asked(batch, i, each).question for i, each in zip(images, proposals, strict=True)}
        solving = self._solver_requests(batch, images, asked)
        again = self._solver_requests(batch, views, {i: asked[i] for i in views}, seeds.SOLVE_VIEW)
        n, longest = sampling.group_size, sampling.max_solution_tokens
        found = self.engine.sample([*solving.values(), *again.values()], "solver", n=n, max_tokens=longest)
        solved = dict(zip(solving, found[: len(solving)], strict=True))  # nothing for an unreadable question
        others = dict(zip(again, found[len(solving) :], strict=True))
        return proposals, [solved.get(i, []) for i in images], [others.get(i, []) for i in images]

    def _proposer_requests(self, batch: _Batch, images: Mapping[int, EncodedImage]) -> dict[int, Request]:
        """A request about each image that has no labelled question, by its index in the batch."""
        return {
            i: Request(image, self._proposer_messages(batch, i), batch.seed(i, seeds.PROPOSE))
            for i, image in images.items()
            if not batch.items[i].labels
        }

    def _proposer_messages(self, batch: _Batch, i: int) -> list[dict[str, Any]]:
        """What the proposer is told about item i, with examples of questions if it is shown any."""
        sampling, count = self.config.sampling, min(self.config.label_examples, len(self.examples))
        picked: list[int] = []
        if count:
            rng = np.random.default_rng(list(batch.seed(i, seeds.PICK_EXAMPLES)))
            picked = rng.choice(len(self.examples), count, replace=False).tolist()
        examples, shown = [self.examples[n].question for n in picked], shown_in(batch.items[i].image)
        return proposer_messages(sampling.proposer_prompt, sampling.domain, examples, shown)

    def _asked(self, batch: _Batch, i: int, proposal: Sequence[Completion]) -> _Asked:
        """The question about item i: one of its labelled ones, or the one that was proposed."""
        if labels := batch.items[i].labels:
            rng = np.random.default_rng(list(batch.seed(i, seeds.PICK_LABEL)))
            label = labels[int(rng.integers(len(labels)))]
            return _Asked(Question(label.question, "", None), label=label)
        (proposed,) = proposal
        prompt = render(self.policy.processor, self._proposer_messages(batch, i), batch.items[i].image)
        return _Asked(parse_question(proposed.text, proposed.finish_reason, prompt), prompt, proposed)

    def _solver_requests(
        self,
        batch: _Batch,
        images: Mapping[int, EncodedImage],
        questions: Mapping[int, Question],
        purpose: int = seeds.SOLVE,
    ) -> dict[int, Request]:
        """A request for each image whose question is readable, by its index in the batch."""
        prompt = self.config.sampling.solver_prompt
        return {
            i: Request(images[i], solver_messages(prompt, question.text, images[i].shown), batch.seed(i, purpose))
            for i, question in questions.items()
            if question.well_formed
        }

    def _exchange(self, groups: Sequence[Sequence[Completion]], total: int) -> Sequence[Sequence[Completion]]:
        """The groups of all `total` items, given those of this process's share."""
        if self.processes.count == 1:
            return groups
        return groups_of(self.processes.gather(rows_of(groups), total))

    def _exchange_episodes(self, episodes: Sequence[Episode], total: int) -> Sequence[Episode]:
        """The episodes of all `total` items, given those of this process's share.

        Every process could score all groups, but a user's reward need not give the same number twice, and the
        advantages of all processes must be computed from the same numbers.
        """
        if self.processes.count == 1:
            return episodes
        records = self.processes.gather([episode.model_dump(mode="json") for episode in episodes], total)
        return [Episode.model_validate(record) for record in records]

    def _episode(
        self,
        batch: _Batch,
        i: int,
        draft: Draft,
        asked: _Asked,
        questions: Sequence[str],
        prompt: str,
        request: Request | None,
        solutions: Sequence[Solution],
        blank: BlankImages,
    ) -> Episode:
        """Score the group of item i, in which `solutions` were read, and make its record.

        `questions` are all readable ones of the step, whose images share `blank`; `request` is None where this one was
        not asked.
        """
        recipe, completions, limit = self.config.recipe, draft.groups[i], self.tokens_per_batch
        planned = self.config.planned_steps or self.config.schedule.steps
        weight = step_weight(recipe, min(batch.step, planned), planned)
        label, name = asked.label, batch.items[i].name
        context = Context(
            image=name,
            form=self.config.sampling.solution_form,
            prompt=prompt,
            finish_reasons=[c.finish_reason for c in completions],
            logprobs=[c.logprobs for c in completions],
            tokens=[token_texts(self.policy.processor, c.token_ids) for c in completions],
            # A reward of the user's own may ask for what the step agreement beside it asks for too.
            blank_logprobs=request and cache(partial(blank.logprobs, request, completions)),
            distributions=request
            and cache(partial(token_distributions, self.policy, request, completions, "solver", limit)),
            likelihoods=request and partial(self._likelihoods, batch, i, request),
            other_view=self._other_view(asked.question.text, draft.others[i], prompt),
            questions=questions,
            step_weight=weight,
            embed=lambda texts: embed_texts(self.policy, texts, recipe.max_step_tokens),
            recent_steps=self.memory.of_others(name),
            true_answer=label.answer if label else None,
            judge=partial(judged, label, self.config.match) if label else None,
            seed=batch.seed(i, seeds.RANDOM_REWARD),
            reward=self.reward,
        )
        scored = score_solutions(asked.question.text, solutions, recipe, context, [c.text for c in completions])
        proposal = None
        if asked.proposal:
            proposal = Proposal(**Sampled.fields_of(asked.proposal), prompt=asked.prompt)
        return Episode(
            step=batch.step,
            image=name,
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
            true_answer=label.answer if label else None,
        )

    def _likelihoods(
        self, batch: _Batch, i: int, request: Request, texts: Sequence[tuple[str, str]], view: Alteration = "same"
    ) -> list[list[float]]:
        """How likely the solver finds texts as replies to the request about item i, or about another view of it."""
        image = request.image if view == "same" else self._views(batch, [i], view)[i]
        return text_logprobs(self.policy, replace(request, image=image), texts, "solver", self.tokens_per_batch)

    def _other_view(self, question: str, completions: Sequence[Completion], prompt: str) -> Group | None:
        """What was replied about another view of an item; None if that was not asked about."""
        if not completions:
            return None
        return read_group(question, self._read(completions, prompt), [c.text for c in completions])


class BlankImages:
    """Gray images in place of those of some requests: one for each size, encoded when it is first asked for.

    It keeps what the processor made of every prompt about them, and so is for the requests of one step.
    """

    def __init__(self, policy: Policy, tokens_per_batch: int) -> None:
        self.policy, self.tokens_per_batch = policy, tokens_per_batch
        self._encoded: dict[Any, EncodedImage] = {}

    def logprobs(self, request: Request, completions: Sequence[Completion]) -> list[list[float]]:
        """How likely the solver finds the tokens of completions of a request if it is shown a gray image instead."""
        view = request.image.seen.view
        if view.size not in self._encoded:
            (self._encoded[view.size],) = encode_images(self.policy, blanked([view]))
        blind = replace(request, image=self._encoded[view.size])
        return token_logprobs(self.policy, blind, completions, "solver", self.tokens_per_batch)


def at_once(function: Callable[[], T]) -> Callable[[], T]:
    """Call a function now. Gives back what returns its result."""
    result = function()
    return lambda: result


def rows_of(groups: Sequence[Sequence[Completion]]) -> list[Any]:
    """Groups of completions for JSON."""
    return [[astuple(completion) for completion in group] for group in groups]


def groups_of(rows: Sequence[Any]) -> list[list[Completion]]:
    """The inverse of `rows_of`."""
    return [[Completion(text, tuple(ids), tuple(ps), end) for text, ids, ps, end in row] for row in rows]


class _Batch:
    """The items of a step, and the seeds of all random draws about them.

    `ireasoner.method.seeds` says why the seeds are made anew for every draw.
    """

    def __init__(self, run_seed: int, step: int, items: Sequence[Item]) -> None:
        self.run_seed, self.step, self.items = run_seed, step, items
        seen: Counter[str] = Counter()
        self.occurrences: list[int] = []
        for item in items:  # an image that is played twice in one step must not draw the same numbers twice
            self.occurrences.append(seen[item.name])
            seen[item.name] += 1

    def seed(self, i: int, purpose: int) -> tuple[int, ...]:
        """The seed of a draw for item i, such as `seeds.SOLVE`."""
        return seeds.draw_seed(self.run_seed, self.step, self.items[i].name, self.occurrences[i], purpose)
