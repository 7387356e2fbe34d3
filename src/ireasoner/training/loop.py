"""The loop: play, update, record. No maths here.

`start` and `resume` open a run, take it step by step to its end, and close it; `advance` is one step.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ireasoner.method.types import Episode
from ireasoner.model.parallel import joined
from ireasoner.training.closing import evaluate_role, finish, versions
from ireasoner.training.config import Config, dump_config
from ireasoner.training.custom_reward import load_reward, names_a_file
from ireasoner.training.evaluation import StepTruth
from ireasoner.training.items import Item, content_hash
from ireasoner.training.metrics import play_metrics
from ireasoner.training.probes import blank_survival, probe
from ireasoner.training.recorder import Recorder, write_json, writer_lock
from ireasoner.training.state import Observer, Run, RunError, open_run, record_skips, regular_step, save
from ireasoner.training.teaching import update


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after which step, whether it is complete, and its `summary.json` if it is."""

    step: int
    complete: bool
    summary: dict[str, Any] | None


def start(config: Config, out: Path, observer: Observer | None = None, truth: StepTruth | None = None) -> Outcome:
    """Begin a run in a new or empty folder. A reward that the recipe names in a file is imported.

    Args:
        config: the run's options.
        out: the run directory.
        observer: is told what happens.
        truth: says whether a reasoning step about a held-out question is true, for the evaluation.

    Raises:
        RunError: the folder holds a run already.
        RunDirectoryError, ImageError, ModelError, DataError, ConfigError, RewardError: what they say.
    """
    if (out / "config.yaml").exists() or (out / "checkpoints").exists():
        raise RunError(f"{out} holds a run already: continue it with --resume {out}, or choose another --out")
    if out.resolve().is_relative_to(config.images.resolve()):
        raise RunError(
            f"{out} lies inside the image folder {config.images}, whose images it would join: choose another --out"
        )
    if names_a_file(config):
        config = config.model_copy(update={"reward_sha256": load_reward(config)[1]})
    return _run(config, out, observer or Observer(), truth)


def resume(
    config: Config,
    out: Path,
    observer: Observer | None = None,
    truth: StepTruth | None = None,
    *,
    trusts_reward: bool = False,
) -> Outcome:
    """Continue a run from its newest sound checkpoint, as if it had never stopped.

    Args:
        config, out, observer, truth: as for `start`.
        trusts_reward: whether a reward file that the run's config names may be imported, which runs it.

    Raises:
        RunError: nothing to resume from, or a reward file that may not be imported or has changed.
    """
    summary = out / "summary.json"
    if summary.exists():
        found = json.loads(summary.read_text("utf-8"))
        return Outcome(found["steps"], True, found)
    if names_a_file(config) and not trusts_reward:
        reward = config.recipe.reward
        raise RunError(f"{out} is paid by {reward}, whose code is run only if you say so: add --reward {reward}")
    if names_a_file(config) and load_reward(config)[1] != config.reward_sha256:
        raise RunError(f"{config.recipe.reward} has changed since {out} was begun: put it back, or start a new run")
    return _run(config, out, observer or Observer(), truth)


def _run(config: Config, out: Path, observer: Observer, truth: StepTruth | None) -> Outcome:
    with ExitStack() as stack:
        stop = stack.enter_context(_stop_on_interrupt())
        processes = stack.enter_context(joined(config.device))
        if processes.is_main:
            stack.enter_context(writer_lock(out))
        recorder = Recorder.open(out, writes=processes.is_main)
        reward = load_reward(config)[0] if names_a_file(config) else None
        run, resumed = open_run(config, out, recorder, observer, processes, reward, truth)
        if not resumed:
            # Only now, when everything that the user named has proved usable, does the folder become a run.
            recorder.write_text("versions.json", write_json(versions()))
            recorder.write_text("config.yaml", dump_config(config))
            probe(run)
            save(run)
        observer.on_start(config, run.step + 1)
        before = evaluate_role(run, "before", None) if run.questions else None
        while run.step < config.schedule.steps and run.alarm is None:
            if processes.any(stop.is_set()):
                save(run)
                return Outcome(run.step, False, None)
            advance(run)
        return Outcome(run.step, True, finish(run, before))


def advance(run: Run) -> None:
    """One step: play, update, record; then save and probe when they are due."""
    started = time.perf_counter()
    run.step += 1
    schedule = run.config.schedule

    # Play: questions, solutions and rewards.
    items = run.pool.take(schedule.images_per_step)
    play = run.selfplay.play(run.step, items)
    played = time.perf_counter()

    signals = {**run.signals.measure(play.episodes), **blank_survival(run, play.episodes, items)}
    watched = time.perf_counter()

    # Update each role on its own share of them.
    episodes, learned = update(run, play)
    updated = time.perf_counter()

    # Record what happened, and look whether the run is still healthy.
    metrics = {**play_metrics(run.config, episodes), **learned}
    metrics |= {f"watch/{name}": value for name, value in signals.items()}
    record(run, items, episodes)
    metrics |= {"time/play_seconds": played - started, "time/watch_seconds": watched - played}
    metrics |= {"time/update_seconds": updated - watched, "time/step_seconds": time.perf_counter() - started}
    run.recorder.metrics(run.step, metrics)
    run.elapsed += metrics["time/step_seconds"]
    run.watch.observe(run.step, signals)
    run.observer.on_step(run.step, metrics, episodes)

    if run.alarm:
        best = regular_step(run.config, run.alarm.healthy_step)
        run.tell(f"The run ends itself and goes back to step {best}: {run.alarm.reason}.")
    if run.due(schedule.probe_every):
        probe(run)
    if run.due(schedule.save_every) or run.step == schedule.steps:
        save(run)


def record(run: Run, items: Sequence[Item], episodes: Sequence[Episode]) -> None:
    """Write down a step's episodes, each with a thumbnail, and the images that were skipped on the way."""
    record_skips(run)
    for episode, item in zip(episodes, items, strict=True):
        picture = run.recorder.thumbnail(item.image, content_hash(run.pool.path(item.name)))
        run.recorder.episode(episode.model_copy(update={"thumbnail": picture}))


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C (or SIGTERM) asks the loop to stop after its step; a second one ends it at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: object) -> None:
        stop.set()
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in previous:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
