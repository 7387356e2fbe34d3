"""Models by the names that users give them: a finished run, a checkpoint of any run, or a plain model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ireasoner.method.types import Role, UsageError
from ireasoner.model.source import Source, find_model
from ireasoner.training.checkpoints import verify_checkpoint
from ireasoner.training.config import Config, load_config, resolve
from ireasoner.training.recorder import VERSIONS, read_json

if TYPE_CHECKING:  # these import torch
    from ireasoner.model.policy import Policy


@dataclass(frozen=True)
class Target:
    """A model to use: its name as the user gave it, its run (None: a plain model), the config to use it under, and
    the folder of its adapters (None: it has none), and where its backbone is."""

    name: str
    run: Path | None
    config: Config
    adapters: Path | None
    model: Source


def find_target(name: str, preset: str | None = None, revision: str | None = None) -> Target:
    """Find out what a target is, without loading it.

    Args:
        name: a run directory or one of its checkpoints (`RUN/checkpoints/step-000040`), whose trained solver is
            used under the run's own prompt and lengths; or a plain model: 'tiny', a folder or a hub id.
        preset: where a plain model gets its prompt and lengths; None: tiny for the model tiny, otherwise 7b.
        revision: of a plain model on the hub; a run has its own.

    Raises:
        ConfigError: the run's config or the preset cannot be read.
        UsageError: the run is not finished, the checkpoint is damaged, or the folder is neither a run nor a model.
    """
    path = Path(name)
    if _run_of(path) is None:
        if path.is_dir() and name != "tiny" and not (path / "config.json").is_file():
            instead = "a run directory, one of its checkpoints (RUN/checkpoints/step-000050) or a model"
            if (path / "adapter_config.json").is_file() and _run_of(path.parent):
                instead = str(path.parent)
            raise UsageError(f"the folder {name} is neither a run nor a model: name {instead}")
        given = {"preset": preset, "revision": revision}
        config = resolve({"model": name, "images": ".", **{option: value for option, value in given.items() if value}})
        return Target(name, None, config, None, find_model(name, revision))
    run, config, adapters = find_adapters(path)
    return Target(name, run, config, adapters, find_model(config.model, model_revision(config, run)))


def find_adapters(path: Path) -> tuple[Path, Config, Path | None]:
    """The run that a run directory or one of its checkpoints belongs to, its config, and the folder with its adapters;
    None if it has learned nothing.

    Raises:
        ConfigError: the run's config cannot be read.
        UsageError: it is no run, the run is not finished, or the checkpoint is damaged.
    """
    run = _run_of(path)
    if run is None:
        raise UsageError(f"{path} is not a run directory, nor one of its checkpoints (RUN/checkpoints/step-000050)")
    if run != path and (problem := verify_checkpoint(path)):
        held = ", ".join(sorted(found.name for found in Path(os.path.realpath(path)).parent.glob("step-*")))
        raise UsageError(f"the checkpoint {path} cannot be used: {problem}; there are {held}")
    has_solver = (path / "solver").is_dir()
    if not has_solver and not (run / "summary.json").exists():
        raise UsageError(
            f"{run} is not finished: name one of its checkpoints, or go on: ireasoner train --resume {run}"
        )
    return run, load_config(run / "config.yaml"), path if has_solver else None


def _run_of(path: Path) -> Path | None:
    """The run directory that a path is itself, or that it is a checkpoint of; None for anything else."""
    # Not Path.resolve, which raises where links form a loop.
    run = Path(os.path.realpath(path)).parent.parent if re.fullmatch(r"step-\d+", path.name) else path
    return run if (run / "config.yaml").is_file() else None


def find_trained(name: str) -> Target:
    """Find a run or a checkpoint that has a trained solver, without loading it.

    Raises:
        ConfigError: the run's config cannot be read.
        UsageError: as for `find_target`; or it is a plain model, or a run that learned nothing.
    """
    if _run_of(Path(name)) is None and not Path(name).is_dir():
        raise UsageError(f"{name} is not a run directory, nor one of its checkpoints (RUN/checkpoints/step-000050)")
    target = find_target(name)
    if target.run is None:
        raise UsageError(f"{name} is a model and not a run: name a run directory or one of its checkpoints")
    if target.adapters is None:
        raise UsageError(f"{name} learned nothing and has no adapter: there is only its model, {target.config.model}")
    return target


def model_revision(config: Config, run_dir: Path) -> str | None:
    """The revision of a run's model: the commit that it began with, once that is recorded, for branches move on."""
    model, at, commit = str(read_json(run_dir / VERSIONS, 2**20).get("model")).rpartition("@")
    return commit if at and model == config.model else config.revision


def load_target(
    target: Target, device: str = "auto", tell: Callable[[str], None] = lambda line: None
) -> tuple[Policy, Role | None]:
    """Load a target; the role to use it under is None where it has no adapter of its own.

    `tell` is told what is waited for.

    Raises:
        UsageError: the model or its adapter cannot be loaded.
    """
    from ireasoner.model.counting import limit_sampling
    from ireasoner.model.loading import load_policy

    config = target.config
    policy = load_policy(target.model, config.backbone, device=device, seed=config.seed, tell=tell)
    limit_sampling(policy, config.fitted_optimizer().tokens_per_batch)
    if target.adapters is None:
        return policy, None
    policy.load_adapters(target.adapters, ["solver"])
    return policy, "solver"
