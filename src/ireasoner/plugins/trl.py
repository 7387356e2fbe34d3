"""Agreement as a reward function for TRL's `GRPOTrainer` (tested with TRL 1.16); TRL itself is not imported.

    config = GRPOConfig("out", num_generations=8, per_device_train_batch_size=8, ...)
    reward = agreement_reward(num_generations=8, model=model, processor=processor)
    trainer = GRPOTrainer(model, reward, config, train_dataset=data, processing_class=processor)

`examples/trl_grpo.py` is a whole script. The prompts must ask for a form that can be read, as
`ireasoner.method.texts.SOLVER_PROMPT` does; a text in another form earns 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ireasoner.method.recipe import Recipe
from ireasoner.method.scoring import RewardError
from ireasoner.method.types import FinishReason, Form
from ireasoner.plugins.groups import Completions, GroupScorer, Prompt, digest, last_question, last_text, pictures


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
    model: Any = None,
    processor: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    embed: Callable[[Sequence[str]], NDArray[np.floating]] | None = None,
    seed: int = 0,
) -> TRLReward:
    """A reward function that pays each completion for an answer that its group agrees on, and for its reasoning steps.

    A group is `num_generations` consecutive completions. It cannot be found by its image, for TRL hands every copy of a
    prompt an image object of its own. TRL gives each device `per_device_train_batch_size * steps_per_generation`
    consecutive completions at a time; `steps_per_generation` is `gradient_accumulation_steps` unless it is set. If that
    is a multiple of `num_generations`, every group is whole on one device; otherwise the function refuses to judge.

    Args:
        recipe: the name of a recipe, a YAML file, or a recipe; `answers-only` needs nothing but the texts.
        num_generations: that of `GRPOConfig`, which `num_generations_eval` must not differ from.
        question_column: the column that holds the question; None: the column `question` if there is one, otherwise the
            text of the last user turn. Answers are compared by what the question asks for, so a column with the bare
            question is better than a prompt with instructions around it.
        form: how the prompt asks for the answer.
        solver_prompt: the instructions of the prompt, whose recital earns nothing; None: the ones that are shipped.
        eos_token_ids: tokens that end a completion. A completion without one at its end was cut off, and earns 0; if
            none are given, all are taken to have ended by themselves.
        model: the model that is trained, which `default` needs: it asks how likely the completions are with the image
            and with a gray one, in two forward passes of each group, without gradients and dropout. It is the object
            that `GRPOTrainer` gets, not its name, and its weights must be whole on each device.
        processor: the model's, which `GRPOTrainer` gets as `processing_class`.
        chat_template_kwargs: those of `GRPOConfig`, so that the prompt is the same.
        embed: texts to normalised embeddings [texts, width], which `paper` and its variants need.
        seed: of the recipe `random-reward`.

    Returns:
        A function that raises `RewardError` if it is handed parts of groups, or if completions that should be one group
        answer different prompts.

    Raises:
        RewardError: the recipe's reward cannot be computed in TRL, or lacks `model` and `processor`, or `embed`.
        ConfigError: there is no such recipe.
    """
    if num_generations < 2:
        raise RewardError(f"num_generations is {num_generations}, but agreement takes a group of at least 2")
    scorer = GroupScorer(recipe, form=form, solver_prompt=solver_prompt, embed=embed, seed=seed)
    ends = frozenset(eos_token_ids)
    likelihoods = None
    if scorer.reads_likelihoods:
        if model is None or processor is None or isinstance(model, str):
            raise RewardError(
                f"the recipe {scorer.recipe.name!r} asks how likely reasoning steps are: hand in model (the loaded one "
                "that is trained) and processor, or take the recipe 'answers-only', which reads the answers alone"
            )
        from ireasoner.plugins.likelihoods import Likelihoods  # which needs torch

        likelihoods = Likelihoods(model, processor, chat_template_kwargs)

    def reward(
        prompts: Sequence[Prompt],
        completions: Sequence[Prompt],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        _check_groups(prompts, completions, num_generations)
        groups = []
        for start in range(0, len(completions), num_generations):
            rows = range(start, start + num_generations)
            group = Completions(
                _question(prompts[start], columns, question_column, start),
                digest(pictures(prompts[start]) or prompts[start]),
                [scorer.read(last_text(completions[i]), _finish_reason(completion_ids, i, ends)) for i in rows],
            )
            if likelihoods is not None:
                if completion_ids is None:
                    raise RewardError("without completion_ids it is not known how likely the completions are")
                ids = [completion_ids[i] for i in rows]
                group = likelihoods.told(group, prompts[start], ids)
            groups.append(group)
        state = columns.get("trainer_state")
        step, steps = (None, 0) if state is None else (state.global_step + 1, state.max_steps)
        return [paid for group in scorer.score(groups, step, steps) for paid in group.rewards]

    reward.__name__ = f"ireasoner_{scorer.recipe.name}"
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
    asked = [digest(prompt) for prompt in prompts]
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


def _finish_reason(completion_ids: Sequence[Sequence[int]] | None, row: int, ends: Collection[int]) -> FinishReason:
    """Whether a completion ended by itself, as far as can be known."""
    if completion_ids is None or not ends or (len(completion_ids[row]) and completion_ids[row][-1] in ends):
        return "stop"
    return "length"


def _question(prompt: Prompt, columns: Mapping[str, Any], column: str | None, row: int) -> str:
    if column is None and "question" not in columns:
        return last_question(prompt)
    name = column or "question"
    if name not in columns:
        raise RewardError(f"the data set has no column {name!r} with the questions")
    return str(columns[name][row])
