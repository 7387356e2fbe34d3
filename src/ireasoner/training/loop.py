"""The training loop: play, update, record. With `--overlap`, the next step is played while this one updates.

`start` and `resume` take a run from its beginning or its newest checkpoint to its end. `advance` is one step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ireasoner.method.scoring import RewardFunction
from ireasoner.method.types import Episode
from ireasoner.model.distributed import joined
from ireasoner.training.checks import Inputs, check_out, check_resume, check_start, finished
from ireasoner.training.closing import Outcome, finish, scores_before
from ireasoner.training.config import Config
from ireasoner.training.fitting import fitted, within_memory
from ireasoner.training.floors import common_problem, floor_signals
from ireasoner.training.items import Item
from ireasoner.training.labelled import StepTruth
from ireasoner.training.metrics import energy_metrics, play_metrics, timed
from ireasoner.training.opening import begin_directory, open_directory, prepare
from ireasoner.training.overlap import draft_of_step, next_step_sampled
from ireasoner.training.probes import blank_survival, probe
from ireasoner.training.recorder import writer_lock
from ireasoner.training.reporting import named_trackers, tracking
from ireasoner.training.state import Observer, Run, record_extension, record_skips, regular_step, save
from ireasoner.training.stopping import Stopped, stop_requests
from ireasoner.training.teaching import update


def start(
    config: Config,
    out: Path,
    observer: Observer | None = None,
    truth: StepTruth | None = None,
    max_hours: float | None = None,
    *,
    reward: RewardFunction | None = None,
    inputs: Inputs | None = None,
    force: bool = False,
) -> Outcome:
    """Begin a run in a new or empty directory.

    If the recipe names a reward of the user's own, its file is imported, which runs the code in it.

    Args:
        config: options of the run.
        out: the run directory.
        observer: is told about every step, evaluation and message.
        truth: tells for the evaluation whether a reasoning step about a held-out question is true.
        max_hours: after which it saves and stops; None: it goes on to its end.
        reward: a reward function, instead of the one that the recipe names.
        inputs: what `check_start` gave for this config, if it was called before.
        force: begin even if the device's memory does not suffice.

    Raises:
        UsageError: something that the user named cannot be used, or the directory holds a run already. Nothing has
            been written then.
    """
    inputs = inputs or check_start(config, out, truth, reward=reward)
    return _run(inputs, out, observer or Observer(), truth, max_hours, resuming=False, force=force)


def resume(
    config: Config,
    out: Path,
    observer: Observer | None = None,
    truth: StepTruth | None = None,
    max_hours: float | None = None,
    *,
    reward: RewardFunction | None = None,
    extend_to: int | None = None,
    trusts_reward: bool = False,
    inputs: Inputs | None = None,
    force: bool = False,
) -> Outcome:
    """Continue a run from its newest sound checkpoint, so that it ends as if it had never stopped.

    Args:
        config, out, observer, truth, max_hours, force: as for `start`.
        reward: the function that `start` was given, if it was.
        extend_to: a later last step than the run has so far; a finished run then goes on as well. None: its own.
        trusts_reward: whether a reward file that the run's config names may be imported, which runs its code.
        inputs: what `check_resume` gave for this config, extended if it is to be, if it was called before.

    Raises:
        UsageError: no checkpoint can be used, or the reward file may not be imported or has changed.
    """
    if extend_to is not None:
        config = config.extended(extend_to)
    if (summary := finished(config, out)) is not None:
        return Outcome(summary["steps"], True, summary)
    inputs = inputs or check_resume(config, out, truth, reward=reward, trusts_reward=trusts_reward)
    return _run(inputs, out, observer or Observer(), truth, max_hours, resuming=True, force=force)


def _run(
    inputs: Inputs,
    out: Path,
    observer: Observer,
    truth: StepTruth | None,
    max_hours: float | None,
    *,
    resuming: bool,
    force: bool,
) -> Outcome:
    began = time.monotonic()
    trackers = [*named_trackers(inputs.config), *observer.trackers]
    with ExitStack() as stack:
        machine = inputs.config
        processes = stack.enter_context(joined(machine.device, machine.patience, machine.shard))
        if resuming and processes.is_main:
            stack.enter_context(writer_lock(out))
        config = stack.enter_context(fitted(inputs.config, inputs.model, out, processes, observer, force=force))
        run = prepare(config, out, inputs, observer, processes, truth)
        stack.callback(run.engine.close)
        # Until here Ctrl-C ends the process as usual, and a new run has written nothing.
        run.stop_asked = stack.enter_context(stop_requests(max_hours, began))
        if not resuming and processes.is_main:
            check_out(config, out)  # somebody else may have begun a run there in the meantime
            stack.enter_context(writer_lock(out))
        if open_directory(run):
            record_extension(run)
        else:
            begin_directory(run, inputs.notes)
            probe(run)
            save(run)
        observer.on_start(run.config, run.step + 1)
        stack.enter_context(tracking(run, trackers))
        try:
            before = scores_before(run)
            while run.step < run.config.schedule.steps and run.alarm is None:
                if processes.any(run.stop_asked()):  # all processes must stop after the same step
                    save(run)
                    return Outcome(run.step, False, None)
                with within_memory(run):
                    advance(run)
            return Outcome(run.step, True, finish(run, before))
        except Stopped:  # during an evaluation; what was trained has been saved
            return Outcome(run.step, False, None)


def advance(run: Run) -> None:
    """Take one step: play, update and record; then answer the probes and save if that is due."""
    run.step += 1
    schedule, seconds = run.config.schedule, dict[str, float]()
    run.meter.read()  # what was used between the steps is not counted
    with timed(seconds, "step"):
        with timed(seconds, "play"):
            draft = draft_of_step(run)
            play = run.selfplay.score(draft)
        with timed(seconds, "watch"):  # before the update: the signals are of the policy that played
            signals = {**run.signals.measure(play.episodes), **blank_survival(run, play.episodes, draft.items)}
        with next_step_sampled(run, seconds), timed(seconds, "update"):
            episodes, learned = update(run, play)
        with timed(seconds, "refresh"):
            run.engine.refresh()
        episodes = record(run, draft.items, episodes)
    signals |= floor_signals(episodes, learned, run.policy.largest_lora_b("solver") if run.moved("solver") else 0.0)
    metrics = {**play_metrics(episodes), **learned}
    metrics |= {f"watch/{name}": value for name, value in signals.items()}
    metrics |= {f"time/{name}_seconds": value for name, value in seconds.items()}
    metrics |= energy_metrics(run.processes.gather([run.meter.read()], run.processes.count))
    run.elapsed += seconds["step"]
    run.report(metrics, episodes)

    if warning := run.watch.observe(run.step, signals):
        problem = common_problem(episodes)
        run.tell(warning + (f" Most texts of this step could not be read: {problem}." if problem else ""))
    if run.alarm:
        best = regular_step(run.config, run.alarm.healthy_step)
        run.tell(f"The run ends itself and goes back to step {best}: {run.alarm.reason}.")
    if run.due(schedule.probe_every):
        probe(run)
    if run.due(schedule.save_every) or run.step == schedule.steps:
        save(run)


def record(run: Run, items: Sequence[Item], episodes: Sequence[Episode]) -> list[Episode]:
    """Record the episodes of a step, each with a thumbnail of its item, and the images that were skipped.

    Returns:
        The episodes as they were recorded.
    """
    record_skips(run)
    recorded = []
    for episode, item in zip(episodes, items, strict=True):
        recorded.append(episode.model_copy(update={"thumbnail": run.thumbnail(item)}))
        run.recorder.episode(recorded[-1])
    return recorded
