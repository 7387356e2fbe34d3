"""What `ireasoner eval` does with each target: it is loaded and scored on labelled questions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ireasoner.app.display import plain, print_wait, questions_progress
from ireasoner.training.targets import Target, find_target, load_target

if TYPE_CHECKING:  # these import torch
    from ireasoner.method.types import Role
    from ireasoner.model.policy import Policy
    from ireasoner.training.evaluation import EvaluationOptions, Scores
    from ireasoner.training.labelled import LabelledQuestion, StepTruth
    from ireasoner.training.selection import Selection


def evaluate_target(
    target: Target,
    questions: Sequence[LabelledQuestion],
    options: EvaluationOptions | None = None,
    *,
    device: str = "auto",
    truth: StepTruth | None = None,
) -> Scores:
    """Score a target on labelled questions.

    Args:
        target: as `find_target` found it.
        questions: what it is asked.
        options, truth: as for `evaluate`; how many images an item may have is the target's.
        device: where the model runs.

    Raises:
        UsageError: the model or its adapter cannot be loaded.
    """
    from ireasoner.model.pieces import out_of_memory_is_told

    with out_of_memory_is_told():
        policy, role = load_target(target, device, print_wait)
        if target.run and role is None:
            model = plain(target.config.model)
            print(f"{target.run} learned nothing and has no adapter: its model {model} is scored.", file=sys.stderr)
        return _score(policy, role, target, questions, options, truth, target.name)


def select_target(
    run: Path,
    questions: Sequence[LabelledQuestion],
    options: EvaluationOptions | None = None,
    *,
    device: str = "auto",
    truth: StepTruth | None = None,
) -> tuple[Target, Selection]:
    """Choose among the checkpoints of a run, and its base, by one half of the questions; score the choice on the other.

    The base is loaded once, and each checkpoint's adapter put on it.

    Args:
        run: a run directory, whose run need not be finished.
        questions, options, device, truth: as for `evaluate_target`.

    Returns:
        The run's last checkpoint, whose config is that of all, and the selection.

    Raises:
        UsageError: there is no checkpoint, they cannot be loaded, or all questions are about one image.
    """
    from ireasoner.model.pieces import out_of_memory_is_told
    from ireasoner.training.selection import halves, select_checkpoint, whole_checkpoints

    checkpoints = whole_checkpoints(run, lambda line: print(plain(line, 500), file=sys.stderr))
    halves(questions)  # says what is wrong with them before anything slow
    target = find_target(str(checkpoints[-1]))
    with out_of_memory_is_told():
        policy, _ = load_target(target, device, print_wait)

        def score(checkpoint: Path | None, asked: Sequence[LabelledQuestion]) -> Scores:
            if checkpoint is None:
                return _score(policy, None, target, asked, options, truth, target.config.model)
            policy.load_adapters(checkpoint, ["solver"])
            return _score(policy, "solver", target, asked, options, truth, checkpoint.name)

        return target, select_checkpoint(checkpoints, questions, score)


def _score(
    policy: Policy,
    role: Role | None,
    target: Target,
    questions: Sequence[LabelledQuestion],
    options: EvaluationOptions | None,
    truth: StepTruth | None,
    name: str,
) -> Scores:
    from ireasoner.training.evaluation import EvaluationOptions, evaluate

    config = target.config
    options = replace(
        options or EvaluationOptions(), images_per_item=config.images_per_item, frame_rate=config.frame_rate
    )
    with questions_progress(name, len(questions)) as on_progress:
        return evaluate(policy, questions, role, config.sampling, options, truth=truth, on_progress=on_progress)
