"""What `ireasoner eval` does with each target: it is loaded and scored on labelled questions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ireasoner.app.display import plain, print_wait
from ireasoner.training.targets import Target, load_target

if TYPE_CHECKING:  # these import torch
    from ireasoner.training.evaluation import EvaluationOptions, Scores
    from ireasoner.training.labelled import LabelledQuestion, StepTruth


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
    from ireasoner.training.evaluation import EvaluationOptions, evaluate

    with out_of_memory_is_told():
        policy, role = load_target(target, device, print_wait)
        if target.run and role is None:
            model = plain(target.config.model)
            print(f"{target.run} learned nothing and has no adapter: its model {model} is scored.", file=sys.stderr)
        options = replace(
            options or EvaluationOptions(),
            images_per_item=target.config.images_per_item,
            frame_rate=target.config.frame_rate,
        )
        return evaluate(policy, questions, role, target.config.sampling, options, truth=truth)
