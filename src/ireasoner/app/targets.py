"""What `ireasoner eval` can score: a finished run, a checkpoint of any run, or a plain model."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ireasoner.method.types import Role, UsageError
from ireasoner.model.loading import load_policy
from ireasoner.training.checkpoints import verify_checkpoint
from ireasoner.training.config import load_config, resolve
from ireasoner.training.evaluation import EvaluationOptions, Scores, evaluate
from ireasoner.training.labelled import LabelledQuestion, StepTruth


def evaluate_target(
    target: str,
    questions: Sequence[LabelledQuestion],
    options: EvaluationOptions | None = None,
    *,
    preset: str | None = None,
    device: str = "auto",
    truth: StepTruth | None = None,
) -> Scores:
    """Score a target on labelled questions.

    Args:
        target: a run directory or one of its checkpoints (`RUN/checkpoints/step-000040`), whose trained solver is
            scored under the run's own prompt and lengths; or a plain model: 'tiny', a folder or a hub id.
        questions: what it is asked.
        preset: where a plain model gets its prompt and lengths; None: tiny for the model tiny, otherwise 7b.
        options, truth: as for `evaluate`.
        device: where the model runs.

    Raises:
        ModelError, ConfigError: the target is none of these.
        UsageError: the run is not finished, or the checkpoint is damaged.
    """
    adapters = Path(target)
    is_checkpoint = re.fullmatch(r"step-\d+", adapters.name) is not None
    run = adapters.resolve().parent.parent if is_checkpoint else adapters
    is_run = (run / "config.yaml").is_file()
    if is_run:
        config = load_config(run / "config.yaml")
        if is_checkpoint and (problem := verify_checkpoint(adapters)):
            held = ", ".join(sorted(path.name for path in adapters.resolve().parent.glob("step-*")))
            raise UsageError(f"the checkpoint {adapters} cannot be used: {problem}; there are {held}")
        if not (adapters / "solver").is_dir():
            if not (run / "summary.json").exists():
                raise UsageError(
                    f"{run} is not finished: score one of its checkpoints, or go on: ireasoner train --resume {run}"
                )
            print(f"{run} learned nothing and has no adapter: its model {config.model} is scored.", file=sys.stderr)
    else:
        flags = {"model": target, "images": ".", **({"preset": preset} if preset else {})}
        config = resolve(flags)
    policy = load_policy(config.model, config.backbone, device=device, seed=config.seed)
    role: Role | None = "solver" if is_run and (adapters / "solver").is_dir() else None
    if role:
        policy.load_adapters(adapters, [role])
    return evaluate(policy, questions, role, config.sampling, options, truth=truth)
