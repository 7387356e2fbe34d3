"""Images in, episodes out: propose, solve N times, read, reward."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from ireasoner.method import claims as steps
from ireasoner.method import rewards
from ireasoner.method.answers import answer_key, majority
from ireasoner.method.rewards import FloatArray
from ireasoner.method.texts import parse_question, parse_trajectory, proposer_messages, solver_messages
from ireasoner.method.types import Completion, Episode, Question, StepScore, Trajectory
from ireasoner.model.inputs import EncodedImage, Prompts
from ireasoner.model.parallel import Processes
from ireasoner.model.policy import Policy
from ireasoner.rollouts.engine import Engine
from ireasoner.rollouts.live import uniforms
from ireasoner.training.config import Config

# The last number of a seed says what is drawn; see `SelfPlay.seed`.
PROPOSE, SOLVE, RANDOM_REWARD, PICK_LABEL = range(4)


@dataclass(frozen=True)
class Play:
    """One step's episodes, with the prompts that the learners need.

    `own` are the numbers of the episodes that this process played; the prompts are theirs alone. `solver_prompts` holds
    one row for each of these with a group, in order; None where there is none. `proposer_prompts` is None where
    questions came with the images, or this process had none.
    """

    episodes: tuple[Episode, ...]
    own: tuple[int, ...]
    proposer_prompts: Prompts | None
    solver_prompts: Prompts | None


class SelfPlay:
    """The method's story for one step, on the live policy.

    Args:
        policy: encodes images and prompts, and embeds reasoning steps.
        engine: samples.
        config: recipe and scale.
        labels: questions and true answers by image name, for the oracle recipe; they replace the proposer.
        processes: who plays along; each plays its share of the images, and all know every episode.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        config: Config,
        labels: Mapping[str, Sequence[tuple[str, str]]] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.policy, self.engine, self.config, self.labels = policy, engine, config, labels
        self.memory = ClaimMemory(config.recurrence_window)

    def play(self, step: int, batch: Sequence[tuple[str, Image.Image]]) -> Play:
        """Play the named images of one step (counted from 1)."""
        names = [name for name, _ in batch]
        occurrences: Counter[str] = Counter()
        keys = []
        for name in names:  # an image played twice in one step must not draw the same numbers twice
            keys.append((name, occurrences[name]))
            occurrences[name] += 1
        own = self.processes.share(len(batch))
        encoded = self.policy.encode_images([batch[i][1] for i in own])
        proposer_prompts: Prompts | None = None
        written: list[Completion | None] = [None] * len(own)
        if self.labels is None and own:
            proposer_prompts, proposed = self.propose(step, [keys[i] for i in own], encoded)
            written = list(proposed)
        proposals = self.exchange([[c] if c else [] for c in written], len(batch))
        if self.labels is None:
            questions, truths = [self.read_question(c) for (c,) in proposals], [None] * len(batch)
        else:
            picked = [self.pick_label(step, key) for key in keys]
            questions, truths = [question for question, _ in picked], [truth for _, truth in picked]
        asked = [n for n, i in enumerate(own) if questions[i].well_formed]
        solver_prompts, groups = self.solve(
            step,
            [keys[own[n]] for n in asked],
            [encoded[n] for n in asked],
            [questions[own[n]].text for n in asked],
        )
        by_image = dict(zip(asked, groups, strict=True))
        solved = self.exchange([by_image.get(n, []) for n in range(len(own))], len(batch))
        read = [tuple(parse_trajectory(c.text, c.finish_reason) for c in group) for group in solved]
        self.memory.add(zip(names, read, strict=True))
        episodes = tuple(
            self.reward(step, keys[i], questions[i], next(iter(proposals[i]), None), solved[i], read[i], truths[i])
            for i in range(len(names))
        )
        return Play(episodes, tuple(own), proposer_prompts, solver_prompts)

    def exchange(self, groups: Sequence[Sequence[Completion]], total: int) -> list[list[Completion]]:
        """The completions of this process's share of the images, and everybody else's."""
        if self.processes.count == 1:
            return [list(group) for group in groups]
        rows = self.processes.gather([[astuple(c) for c in group] for group in groups], total)
        return [[Completion(text, tuple(ids), tuple(ps), end) for text, ids, ps, end in row] for row in rows]

    def seed(self, step: int, key: tuple[str, int], purpose: int) -> list[int]:
        """Randomness is seeded by (seed, step, image, purpose), never carried: a resumed run draws the same."""
        name, occurrence = key
        image = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")
        return [self.config.seed, step, image, occurrence, purpose]

    def propose(
        self, step: int, keys: Sequence[tuple[str, int]], encoded: Sequence[EncodedImage]
    ) -> tuple[Prompts, list[Completion]]:
        """One question for each image."""
        prompts = self.policy.prompts(encoded, [proposer_messages(self.config.proposer_prompt)] * len(keys))
        draws = uniforms([self.seed(step, key, PROPOSE) for key in keys], 1, self.config.max_question_tokens)
        return prompts, [group[0] for group in self.engine.sample(prompts, "proposer", draws)]

    def read_question(self, completion: Completion) -> Question:
        """As `parse_question`; unreadable too where it holds the model's own sign for an image, whatever its form."""
        question = parse_question(completion.text, completion.finish_reason)
        if question.well_formed and self.policy.processor.image_token in question.text:
            return replace(question, problem="an image token inside the question")
        return question

    def solve(
        self, step: int, keys: Sequence[tuple[str, int]], encoded: Sequence[EncodedImage], questions: Sequence[str]
    ) -> tuple[Prompts | None, list[list[Completion]]]:
        """A group of trajectories for each (image, question)."""
        if not keys:
            return None, []
        prompts = self.policy.prompts(encoded, [solver_messages(self.config.solver_prompt, q) for q in questions])
        draws = uniforms(
            [self.seed(step, key, SOLVE) for key in keys], self.config.group_size, self.config.max_solution_tokens
        )
        return prompts, self.engine.sample(prompts, "solver", draws)

    def pick_label(self, step: int, key: tuple[str, int]) -> tuple[Question, str | None]:
        """One of an image's labelled questions, and its true answer."""
        known = (self.labels or {}).get(key[0], ())
        if not known:
            return Question("", "", "no label for this image"), None
        text, truth = known[int(np.random.default_rng(self.seed(step, key, PICK_LABEL)).integers(len(known)))]
        return Question(text, "", None), truth

    def reward(
        self,
        step: int,
        key: tuple[str, int],
        question: Question,
        proposal: Completion | None,
        completions: Sequence[Completion],
        trajectories: tuple[Trajectory, ...],
        truth: str | None,
    ) -> Episode:
        """Pay a group, by the recipe."""
        config = self.config
        keys = tuple(answer_key(t.answer, question.text) if t.answer is not None else None for t in trajectories)
        vote = majority(keys)
        outcome = rewards.outcome_rewards(
            keys,
            [t.words_before_answer for t in trajectories],
            exponent=config.outcome_exponent,
            length_penalty=config.length_penalty,
            target_words=config.target_words,
        )
        agreement, recurrence, step_scores = self.step_agreement(key[0], keys, trajectories)
        outcome *= np.array([1.0 - f.mean() if len(f) else 1.0 for f in recurrence])
        parts = {"outcome": tuple(outcome.tolist()), "step_agreement": tuple(agreement.tolist())}
        readable = np.array([k is not None for k in keys], dtype=np.float64)
        if config.reward == "agreement":
            earned = rewards.solver_rewards(outcome, agreement, step_weight(config, step))
        elif config.reward == "discrete":
            earned = rewards.discrete_rewards(keys)
        elif config.reward == "random":
            earned = readable * np.random.default_rng(self.seed(step, key, RANDOM_REWARD)).random(len(keys))
        elif config.reward == "format":
            earned = readable
        else:
            true_key = answer_key(truth, question.text) if truth is not None else None
            earned = np.array([float(k is not None and k == true_key) for k in keys])
        worth = proposer_worth(config, question, trajectories, vote.entropy)
        return Episode(
            step=step,
            image=key[0],
            question=question,
            question_completion=proposal,
            proposer_reward=worth,
            trajectories=trajectories,
            completions=tuple(completions),
            answer_keys=keys,
            majority_answer=vote.answer,
            majority_fraction=vote.fraction,
            answer_entropy=vote.entropy,
            rewards=tuple(earned.tolist()),
            reward_parts=parts,
            step_weight=step_weight(config, step),
            step_scores=step_scores,
            true_answer=truth,
        )

    def step_agreement(
        self, image: str, keys: Sequence[str | None], trajectories: Sequence[Trajectory]
    ) -> tuple[FloatArray, list[FloatArray], tuple[tuple[StepScore, ...], ...]]:
        """Step agreement by the recipe: the reward [N], each compared step's recurrence, and what explains both."""
        config, compared = self.config, [self.compared_steps(t) for t in trajectories]
        # Over all steps, empty ones too: an answer behind words that fit every image must not pay in full.
        recurrence = [self.memory.recurrence(image, own) for own in compared]
        if config.step_measure == "claims":
            said = [steps.beyond_answer(own, t.answer or "") for own, t in zip(compared, trajectories, strict=True)]
            support = steps.agreement(said)
            similarity = [_in_place(own, some, found) for own, some, found in zip(compared, said, support, strict=True)]
            counted = [f[np.isfinite(s)] for f, s in zip(recurrence, similarity, strict=True)]
            earned = rewards.claim_agreement_rewards(support, counted)
            scores = [s * (1.0 - f) for s, f in zip(similarity, recurrence, strict=True)]
        else:
            embedded = [self.policy.embed_texts(own, config.max_step_tokens) for own in compared]
            similarity = rewards.leave_one_out_similarities(embedded)
            scores = rewards.prototype_similarities(keys, embedded, max_reasoning_steps=config.max_reasoning_steps)
            earned = rewards.prototype_rewards(
                keys, scores, density_exponent=config.density_exponent, position_decay=config.position_decay
            )
        explained = tuple(
            tuple(map(StepScore, _or_none(alike), said_of_all.tolist(), _or_none(score)))
            for alike, said_of_all, score in zip(similarity, recurrence, scores, strict=True)
        )
        return earned, recurrence, explained

    def compared_steps(self, trajectory: Trajectory) -> tuple[str, ...]:
        """The reasoning steps that agreement reads; none of an unreadable trajectory."""
        return trajectory.reasoning_steps[: self.config.max_reasoning_steps] if trajectory.well_formed else ()


def _in_place(all_steps: Sequence[str], some: Sequence[str], values: FloatArray) -> FloatArray:
    """The values of some of the steps at their places among all of them; NaN at the others'."""
    found = iter(values)
    return np.array([next(found) if text in some else np.nan for text in all_steps])


def _or_none(values: FloatArray) -> list[float | None]:
    """As plain floats, NaN as None."""
    return [None if value != value else value for value in values.tolist()]


class ClaimMemory:
    """What the latest groups claimed, to know what is said of every image.

    Args:
        window: how many groups are remembered; 0: none, and nothing recurs.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.groups: deque[tuple[str, frozenset[str]]] = deque(maxlen=window)

    def add(self, groups: Iterable[tuple[str, Sequence[Trajectory]]]) -> None:
        """Remember groups, each with its image's name; unreadable trajectories claim nothing."""
        for image, group in groups:
            claims = {_claim_text(step) for t in group if t.well_formed for step in t.reasoning_steps}
            if claims:
                self.groups.append((image, frozenset(claims)))

    def recurrence(self, image: str, reasoning_steps: Sequence[str]) -> FloatArray:
        """For each step, the share of the remembered groups of other images that make the same claim: array [steps]."""
        others = [claims for name, claims in self.groups if name != image]
        said = map(_claim_text, reasoning_steps)
        found = [sum(claim in claims for claims in others) for claim in said]
        return np.array(found, dtype=np.float64) / max(len(others), 1)

    def state(self) -> list[list[Any]]:
        """Everything, as JSON."""
        return [[image, sorted(claims)] for image, claims in self.groups]

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        """Take back what `state` gave."""
        self.groups.clear()
        self.groups.extend((image, frozenset(claims)) for image, claims in state)


def _claim_text(step: str) -> str:
    """A step without case and spacing, shortened to a digest: memory and checkpoints need no texts."""
    plain = " ".join(step.lower().split()).rstrip(".!")
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def step_weight(config: Config, step: int) -> float:
    """λ(t) of a config's schedule."""
    return rewards.mixing_weight(
        step,
        config.steps,
        warmup=config.step_weight_warmup,
        initial=config.step_weight_initial,
        final=config.step_weight_final,
    )


def proposer_worth(
    config: Config, question: Question, trajectories: Sequence[Trajectory], answer_entropy: float
) -> float:
    """The proposer's reward; 0 for an unreadable question and where fewer than 2 trajectories could be read."""
    if not question.well_formed or sum(t.well_formed for t in trajectories) < 2:
        return 0.0
    return rewards.proposer_reward(answer_entropy, target=config.target_entropy, width=config.entropy_width)
