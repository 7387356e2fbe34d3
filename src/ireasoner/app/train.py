"""`ireasoner train`: a run with a display, begun or resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import Field

from ireasoner.app.options import OutFolder
from ireasoner.app.paths import absolute
from ireasoner.app.training_options import MACHINES, REWARDS, RUN, RUN_OPTIONS, SCALE, with_training_options
from ireasoner.method.types import UsageError
from ireasoner.training import config as configs

NEEDED, OFTEN_NEEDED = ("images", "model"), ("recipe", "preset", "eval_data", "seed")
OPTIONS = {
    RUN: dict.fromkeys((*NEEDED, *OFTEN_NEEDED, *RUN_OPTIONS)),
    MACHINES: configs.MACHINE_OPTIONS,
    SCALE: configs.PRESET_OPTIONS,
    REWARDS: configs.RECIPE_OPTIONS,
}


@with_training_options(OPTIONS, first=NEEDED)
def train(
    *,
    out: Annotated[OutFolder | None, Parameter(group=RUN)] = None,
    resume: Annotated[Path | None, Parameter(group=RUN)] = None,
    config: Annotated[Path | None, Parameter(group=RUN)] = None,
    max_hours: Annotated[Annotated[float, Field(gt=0)] | None, Parameter(group=RUN)] = None,
    force: Annotated[bool, Parameter(group=RUN, negative=())] = False,
    **flags: Any,
) -> int:
    """Self-evolve a model on a folder of unlabeled images, or continue a run. With --config, options are read from a
    file, and those that are given here come before it: a recipe or preset that is named here replaces every option in
    the file that recipes or presets may set. Paths in the file are relative to the current folder.

    Args:
        out: The run directory to write.
        resume: Continue the run in this directory.
        config: YAML file of options by these names, or the config.yaml of a run.
        max_hours: Save and stop after so many hours, as Ctrl-C does; --resume continues.
        force: Begin even if memory does not suffice, by what plan counts.
    """
    if config is not None:
        flags = configs.with_options_of(config, flags)
    flags = absolute(flags)
    if resume is not None:
        if out is not None:
            raise UsageError("--resume RUN continues RUN in place: leave out --out")
        kept, extend_to = configs.continued(resume, flags)
        trust = "reward" in flags
        return follow(
            kept, resume, resuming=True, trusts_reward=trust, max_hours=max_hours, extend_to=extend_to, force=force
        )
    missing = [name for name in ("images", "model") if name not in flags] + ["out"] * (out is None)
    if missing or out is None:
        raise UsageError(f"train needs {', '.join('--' + name for name in missing)} (or --resume RUN)")
    return follow(configs.resolve(flags), out, resuming=False, max_hours=max_hours, force=force)


def follow(
    config: configs.Config,
    out: Path,
    *,
    resuming: bool,
    trusts_reward: bool = False,
    max_hours: float | None = None,
    extend_to: int | None = None,
    force: bool = False,
) -> int:
    """Run or resume with a display, and say what came of it; the exit code."""
    from ireasoner.app import api, display
    from ireasoner.training.advice import advice
    from ireasoner.training.energy import energy_line
    from ireasoner.training.watch import ENDED_ITSELF

    outcome = api.follow(
        config,
        out,
        resuming=resuming,
        max_hours=max_hours,
        trusts_reward=trusts_reward,
        extend_to=extend_to,
        force=force,
    )
    if os.environ.get("RANK", "0") != "0":
        return 0 if outcome.complete else 130  # the first process tells how the run ended
    if not outcome.complete:
        print(f"Stopped after step {outcome.step}, saved. Continue with: ireasoner train --resume {out}")
        return 130
    summary = outcome.summary or {}
    if summary.get("before") and summary.get("after"):
        display.results_table(summary)
    print(energy_line(summary.get("energy")))
    trained = summary.get("trained_roles", [])
    print(f"Run directory: {out}   adapters: {', '.join(f'{out}/{role}' for role in trained) or 'none'}")
    if "solver" not in trained:
        print("Nothing was learned: the solver is still the model that the run started from.")
    else:
        print(f"Use it: ireasoner ask {out} IMAGE... QUESTION   or ireasoner export {out} --to FOLDER")
    if ended := summary.get("stopped_early") or "solver" not in trained:
        for sentence in advice(config):
            print(sentence)
    print(f"Look at it: ireasoner view {out}   or open {out}/report.html")
    return ENDED_ITSELF if ended else 0
