"""What the plug-ins for other trainers share: whole groups of completions become rewards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ireasoner.method.instructions import SOLVER_PROMPTS
from ireasoner.method.memory import RecentSteps
from ireasoner.method.recipe import Recipe
from ireasoner.method.scoring import Context, RewardError, ScoredGroup, score_solutions, step_weight
from ireasoner.method.texts import parse_trajectory
from ireasoner.method.types import FinishReason, Form, Solution
from ireasoner.training.config import load_recipe

Prompt = str | Sequence[Mapping[str, Any]]  # text, or the turns of a chat


@dataclass(frozen=True)
class Completions:
    """The group of one prompt: its question, a digest of what it is about, and what was read in its completions.

    The others are those of `Context`, for recipes that read how likely the completions are.
    """

    question: str
    image: str
    solutions: Sequence[Solution]
    tokens: Sequence[Sequence[str]] | None = None
    logprobs: Sequence[Sequence[float]] | None = None
    blank_logprobs: Callable[[], Sequence[Sequence[float]]] | None = None


class GroupScorer:
    """Scores whole groups by a recipe, and remembers what recent groups said.

    Args:
        recipe: the name of a recipe, a YAML file, or a recipe.
        form: how the prompt asks for the answer.
        solver_prompt: the instructions of the prompt, whose recital earns nothing; None: the ones that are shipped.
        embed: texts to normalised embeddings [texts, width], which `paper` and its variants need.
        seed: of the recipe `random-reward`.

    Attributes:
        reads_likelihoods: whether the recipe needs to know how likely completions are, as `Completions` tells it.

    Raises:
        RewardError: the reward cannot be computed from the texts of a group alone, lacks `embed`, or there is no such
            form.
        ConfigError: there is no such recipe.
    """

    def __init__(
        self,
        recipe: str | Recipe,
        *,
        form: Form = "tags",
        solver_prompt: str | None = None,
        embed: Callable[[Sequence[str]], NDArray[np.floating]] | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(recipe, Recipe):
            recipe = load_recipe(recipe)
        if form not in SOLVER_PROMPTS:
            raise RewardError(f"form is {form!r}, but must be one of {', '.join(SOLVER_PROMPTS)}")
        if recipe.reward not in ("agreement", "discrete", "random", "format"):
            raise RewardError(
                f"the reward {recipe.reward} is none of the texts alone: hand in a function of your own beside"
            )
        judges_steps = recipe.reward == "agreement" and bool(recipe.step_weight_initial or recipe.step_weight_final)
        if judges_steps and recipe.step_measure == "embedding" and embed is None:
            raise RewardError(f"the recipe {recipe.name!r} compares embeddings of reasoning steps: hand in embed")
        self.reads_likelihoods = judges_steps and recipe.step_measure != "embedding"
        self.recipe, self._embed, self._seed = recipe, embed, seed
        self._form: Form = form
        self._prompt = solver_prompt or SOLVER_PROMPTS[form]
        self._memory, self._calls = RecentSteps(recipe.recurrence_window), count()

    def read(self, text: str, finish_reason: FinishReason) -> Solution:
        """Read a completion."""
        return parse_trajectory(text, finish_reason, self._form, self._prompt)

    def score(self, groups: Sequence[Completions], step: int | None = None, steps: int = 0) -> list[ScoredGroup]:
        """Score groups that were sampled at the same time.

        Args:
            groups: whole groups.
            step: the training step that they are for, from 1 on, of `steps` in all, which decides λ; None: not known,
                and λ has its last value.
        """
        weight = self.recipe.step_weight_final
        if step is not None and steps >= 1:
            weight = step_weight(self.recipe, step, steps)
        for group in groups:  # all are remembered before any is scored, as in training here
            self._memory.add(group.image, group.solutions)
        call, scored = next(self._calls), []
        for number, group in enumerate(groups):
            context = Context(
                step_weight=weight,
                embed=self._embed,
                recent_steps=self._memory.of_others(group.image),
                tokens=group.tokens,
                logprobs=group.logprobs,
                blank_logprobs=group.blank_logprobs,
                seed=(self._seed, call, number),
            )
            scored.append(score_solutions(group.question, group.solutions, self.recipe, context))
        return scored


def digest(value: Any) -> str:
    """A digest of a prompt or of its pictures, the same for equal ones."""
    return hashlib.sha256(json.dumps(value, default=_as_text, sort_keys=True).encode()).hexdigest()


def _as_text(value: Any) -> str:
    """What a prompt may hold beside text: pictures and videos by their contents, whatever object they are."""
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size} {hashlib.sha256(value.tobytes()).hexdigest()}"
    array = np.asarray(value)
    return f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"


def pictures(prompt: Prompt) -> list[Any]:
    """The images among the turns of a prompt."""
    turns = [] if isinstance(prompt, str) else prompt
    blocks = [block for turn in turns for block in turn["content"] if not isinstance(block, str)]
    return [block["image"] for block in blocks if block.get("image") is not None]


def last_text(written: Prompt) -> str:
    """A completion, or the last turn of a chat, as text."""
    if isinstance(written, str):
        return written
    content = written[-1]["content"]
    return content if isinstance(content, str) else "".join(block.get("text") or "" for block in content)


def last_question(prompt: Prompt) -> str:
    """What the last turn of the user says."""
    return last_text(prompt if isinstance(prompt, str) else [turn for turn in prompt if turn["role"] == "user"])
