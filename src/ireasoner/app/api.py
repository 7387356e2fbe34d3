"""`ireasoner.train` and `ireasoner.resume`: a run from Python, as the command line makes it."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ireasoner.app.paths import absolute, find_truth
from ireasoner.method.types import UsageError
from ireasoner.training import config as configs
from ireasoner.training.checks import check_resume, check_start, finished
from ireasoner.training.saved import SavedRun, load_run

if TYPE_CHECKING:  # these import torch
    from ireasoner.method.scoring import RewardFunction
    from ireasoner.training.loop import Outcome
    from ireasoner.training.state import Observer


def train(
    images: str | os.PathLike[str],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    reward: RewardFunction | str | None = None,
    observer: Observer | None = None,
    max_hours: float | None = None,
    force: bool = False,
    **options: Any,
) -> SavedRun:
    """Self-evolve a model on unlabeled images, as `ireasoner train` does.

    Args:
        images: unlabeled images: a folder, or anything else that `--images` takes.
        model: a folder, a hub id, or 'tiny', which ships here.
        out: the run directory to write; None: a new one below `runs`, named after the time.
        reward: what a trajectory earns, instead of what the recipe says: a function of the `Group` and the `Context`,
            or a name as `--reward` takes it.
        observer: is told about every step; None: progress is shown in the terminal.
        max_hours: after which the run saves and stops, as it does at Ctrl-C; `resume` goes on.
        force: begin even if memory does not suffice by what `ireasoner plan` counts.
        options: any other option of `ireasoner train`, by its name: `recipe="paper"`, `steps=40`.

    Returns:
        The run, finished if its `summary` is not empty.

    Raises:
        UsageError: an option is bad, or something that it names cannot be used.
    """
    named = {"reward": reward} if isinstance(reward, str) else {}
    given = {"images": os.fspath(images), "model": os.fspath(model), **named, **options}
    config = configs.resolve(absolute(given))
    if out is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("several processes train one run: name its directory, as out=...")
        out = Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    function = None if isinstance(reward, str) else reward
    follow(config, Path(out), observer, resuming=False, max_hours=max_hours, reward=function, force=force)
    return load_run(out)


def resume(
    run: str | os.PathLike[str],
    *,
    reward: RewardFunction | str | None = None,
    observer: Observer | None = None,
    max_hours: float | None = None,
    steps: int | None = None,
    force: bool = False,
) -> SavedRun:
    """Continue a run from its newest checkpoint, as `ireasoner train --resume` does.

    Args:
        run: the run directory.
        reward: the function that `train` was given, or the name of a reward file, which runs the code in it.
        observer: is told about every step; None: progress is shown in the terminal.
        max_hours: after which the run saves and stops.
        steps: a later last step than the run was planned for.
        force: as for `train`.

    Raises:
        UsageError: no checkpoint can be used, or the reward is not the one that the run was started with.
    """
    out = Path(run)
    flags: dict[str, Any] = {"reward": reward} if isinstance(reward, str) else {}
    config, extend_to = configs.continued(out, absolute(flags) | ({} if steps is None else {"steps": steps}))
    follow(
        config,
        out,
        observer,
        resuming=True,
        max_hours=max_hours,
        reward=None if isinstance(reward, str) else reward,
        trusts_reward=isinstance(reward, str),
        extend_to=extend_to,
        force=force,
    )
    return load_run(out)


def follow(
    config: configs.Config,
    out: Path,
    observer: Observer | None = None,
    *,
    resuming: bool,
    max_hours: float | None = None,
    reward: RewardFunction | None = None,
    trusts_reward: bool = False,
    extend_to: int | None = None,
    force: bool = False,
) -> Outcome:
    """Start or resume a run and write its report; the main process shows the progress unless there is an observer."""
    from ireasoner.app.display import Display, quiet_libraries, verbosity

    if observer is None and verbosity() != "debug":
        quiet_libraries()
    from ireasoner.page import write_report
    from ireasoner.playground.truth import step_truth

    inputs = None  # mistakes are found before torch is imported, which takes seconds
    if not resuming:
        inputs = check_start(config, out, step_truth, reward=reward)
    elif finished(wanted := config.extended(extend_to) if extend_to else config, out) is None:
        inputs = check_resume(wanted, out, step_truth, reward=reward, trusts_reward=trusts_reward)
    from ireasoner.training import loop

    def go(told: Observer | None) -> Outcome:
        if resuming:
            more = {"trusts_reward": trusts_reward, "extend_to": extend_to, "force": force}
            return loop.resume(config, out, told, step_truth, max_hours, reward=reward, inputs=inputs, **more)
        return loop.start(config, out, told, step_truth, max_hours, reward=reward, inputs=inputs, force=force)

    def go_and_report(told: Observer | None) -> Outcome:
        outcome = go(told)
        if outcome.complete:
            try:
                write_report(out, find_truth=find_truth(out))
            except OSError as error:  # the run itself is safe by now
                raise UsageError(f"the run is complete, but its report could not be written: {error}") from None
        return outcome

    if os.environ.get("RANK", "0") != "0":  # another of the run's processes shows and writes
        return go(None)
    if observer is not None:
        return go_and_report(observer)
    with Display(config, out) as shown:
        return go_and_report(shown.observer())
