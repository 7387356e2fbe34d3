"""Agreement as a reward function for TRL's `GRPOTrainer` (tested with TRL 1.16); TRL itself is not imported.

    config = GRPOConfig("out", num_generations=8, per_device_train_batch_size=8, ...)
    trainer = GRPOTrainer(model, agreement_reward(num_generations=8), config, train_dataset=data)

`examples/trl_grpo.py` is a whole script. The prompts must ask for a form that can be read, as
`ireasoner.method.texts.SOLVER_PROMPT` does; a text in another form earns 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import count, groupby
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ireasoner.method.memory import RecentSteps
from ireasoner.method.recipe import Recipe
from ireasoner.method.scoring import Context, RewardError, score_solutions, step_weight
from ireasoner.method.texts import SOLVER_PROMPTS, parse_trajectory
from ireasoner.method.types import FinishReason, Form, Solution
from ireasoner.training.config import load_recipe

Prompt = str | Sequence[Mapping[str, Any]]  # text, or the turns of a chat


class TRLReward(Protocol):
    """A reward function as `GRPOTrainer` takes it; TRL logs its rewards under `__name__`."""

    __name__: str

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Prompt],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """The reward of each completion; `columns` are those of the data set, a value for each completion."""
        ...


def agreement_reward(
    recipe: str | Recipe = "default",
    *,
    num_generations: int,
    question_column: str | None = None,
    form: Form = "tags",
    solver_prompt: str | None = None,
    eos_token_ids: Collection[int] = (),
    embed: Callable[[Sequence[str]], NDArray[np.floating]] | None = None,
    seed: int = 0,
) -> TRLReward:
    """A reward function that pays each completion for what it shares with the others of its group.

    A group is `num_generations` consecutive completions. It cannot be found by its image, for TRL hands every copy of a
    prompt an image object of its own. TRL gives each device `per_device_train_batch_size * steps_per_generation`
    consecutive completions at a time; `steps_per_generation` is `gradient_accumulation_steps` unless it is set. If that
    is a multiple of `num_generations`, every group is whole on one device; otherwise the function refuses to judge.

    Args:
        recipe: the name of a recipe, a YAML file, or a recipe; `default` needs nothing but the texts.
        num_generations: that of `GRPOConfig`, which `num_generations_eval` must not differ from.
        question_column: the column that holds the question; None: the column `question` if there is one, otherwise the
            text of the last user turn. What a question says earns nothing in an answer's steps, so a column with the
            bare question is better than a prompt with instructions around it.
        form: how the prompt asks for the answer.
        solver_prompt: the instructions of the prompt, whose recital earns nothing; None: the ones that are shipped.
        eos_token_ids: tokens that end a completion. A completion without one at its end was cut off, and earns 0; if
            none are given, all are taken to have ended by themselves.
        embed: texts to normalised embeddings [texts, width], which `paper` and its variants need.
        seed: of the recipe `random-reward`.

    Returns:
        A function that raises `RewardError` if it is handed parts of groups, or if completions that should be one group
        answer different prompts.

    Raises:
        RewardError: the recipe's reward cannot be computed in TRL, or lacks `embed`.
        ConfigError: there is no such recipe.
    """
    if num_generations < 2:
        raise RewardError(f"num_generations is {num_generations}, but agreement takes a group of at least 2")
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if chosen.reward not in ("agreement", "discrete", "random", "format"):
        raise RewardError(
            f"the reward {chosen.reward} is none of the texts alone: give TRL a function of your own beside"
        )
    if chosen.reward == "agreement" and chosen.step_measure == "embedding" and embed is None:
        raise RewardError(f"the recipe {chosen.name!r} compares embeddings of reasoning steps: hand in embed")
    prompt, ends = solver_prompt or SOLVER_PROMPTS[form], frozenset(eos_token_ids)
    memory, calls = RecentSteps(chosen.recurrence_window), count()

    def reward(
        prompts: Sequence[Prompt],
        completions: Sequence[Prompt],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        _check_groups(prompts, completions, num_generations)
        solutions: list[list[Solution]] = []
        starts = range(0, len(completions), num_generations)
        for start in starts:
            rows = range(start, start + num_generations)
            solutions.append(
                [
                    parse_trajectory(_text(completions[i]), _finish_reason(completion_ids, i, ends), form, prompt)
                    for i in rows
                ]
            )
        # All groups are remembered before any is scored, as in training here.
        pictures = [_digest(_pictures(prompts[start]) or prompts[start]) for start in starts]
        for picture, group in zip(pictures, solutions, strict=True):
            memory.add(picture, group)
        call, weight, rewards = next(calls), _step_weight(chosen, columns.get("trainer_state")), list[float]()
        for start, picture, group in zip(starts, pictures, solutions, strict=True):
            context = Context(
                step_weight=weight, embed=embed, recent_steps=memory.of_others(picture), seed=(seed, call, start)
            )
            question = _question(prompts[start], columns, question_column, start)
            rewards += score_solutions(question, group, chosen, context).rewards
        return rewards

    reward.__name__ = f"ireasoner_{chosen.name}"
    return reward


def _check_groups(prompts: Sequence[Prompt], completions: Sequence[Prompt], size: int) -> None:
    """Check that completions are whole groups.

    Raises:
        RewardError: they are not, and a part would be judged as if it were the whole, or two groups as one.
    """
    if len(completions) % size or len(prompts) != len(completions):
        raise RewardError(
            f"{len(completions)} completions are no whole groups of num_generations={size}, and a part of a group "
            "cannot be judged: make per_device_train_batch_size * steps_per_generation a multiple of num_generations"
        )
    # Copies of one image are equal in their pixels alone.
    asked = [_digest(prompt) for prompt in prompts]
    groups = [asked[start : start + size] for start in range(0, len(asked), size)]
    if any(len(set(group)) > 1 for group in groups):
        raise RewardError(
            f"{size} completions in a row answer different prompts: num_generations must be what GRPOConfig says"
        )
    runs = [len(list(same)) for _, same in groupby(group[0] for group in groups)]
    if min(runs, default=1) > 1:  # one repeated row of the data set is no mistake; every group twice is
        raise RewardError(
            f"more than {size} completions in a row answer one prompt: num_generations must be what GRPOConfig says"
        )


def _digest(value: Any) -> str:
    """A digest of a prompt or of its pictures, the same for equal ones."""
    return hashlib.sha256(json.dumps(value, default=_as_text, sort_keys=True).encode()).hexdigest()


def _as_text(value: Any) -> str:
    """What a prompt may hold beside text: pictures and videos by their contents, whatever object they are."""
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size} {hashlib.sha256(value.tobytes()).hexdigest()}"
    array = np.asarray(value)
    return f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"


def _pictures(prompt: Prompt) -> list[Any]:
    """The images of a prompt; TRL puts those of the data set's columns into the prompt's turns."""
    turns = [] if isinstance(prompt, str) else prompt
    blocks = [block for turn in turns for block in turn["content"] if not isinstance(block, str)]
    return [block["image"] for block in blocks if block.get("image") is not None]


def _text(written: Prompt) -> str:
    """A completion, or the last turn of a chat, as text."""
    if isinstance(written, str):
        return written
    content = written[-1]["content"]
    return content if isinstance(content, str) else "".join(block.get("text") or "" for block in content)


def _finish_reason(completion_ids: Sequence[Sequence[int]] | None, row: int, ends: Collection[int]) -> FinishReason:
    """Whether a completion ended by itself, as far as can be known."""
    if completion_ids is None or not ends or (len(completion_ids[row]) and completion_ids[row][-1] in ends):
        return "stop"
    return "length"


def _question(prompt: Prompt, columns: Mapping[str, Any], column: str | None, row: int) -> str:
    if column is None and "question" not in columns:
        turns = prompt if isinstance(prompt, str) else [turn for turn in prompt if turn["role"] == "user"]
        return _text(turns)
    name = column or "question"
    if name not in columns:
        raise RewardError(f"the data set has no column {name!r} with the questions")
    return str(columns[name][row])


def _step_weight(recipe: Recipe, state: Any) -> float:
    """λ at the trainer's step; its last value where the trainer does not say at which step it is."""
    if state is None or state.max_steps < 1:
        return recipe.step_weight_final
    return step_weight(recipe, state.global_step + 1, state.max_steps)
