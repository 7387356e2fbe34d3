"""Sampling the next step on servers while this one is learned from (`--overlap`).

A step is then played by adapters that are one update behind those that learn from it, and the learner weights its
tokens by how much likelier it finds them (`ireasoner.model.loss.importance_weights`). What was sampled ahead is a draft
(`ireasoner.training.selfplay.Draft`), which is part of a checkpoint, so that a resumed run goes on from the same one.

The first step of a run is played by the adapters that learn from it, and so is the first after its planned last one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from ireasoner.training.metrics import timed
from ireasoner.training.selfplay import Draft, at_once
from ireasoner.training.state import Run

T = TypeVar("T")


def in_background(function: Callable[[], T]) -> Callable[[], T]:
    """Call a function in a thread of its own. Gives back what waits for its result, or raises its error.

    The thread does not keep the process alive: where the update fails, nobody waits for servers any more.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised where the result is waited for
            future.set_exception(error)

    threading.Thread(target=work, name="sampling", daemon=True).start()
    return future.result


def draft_of_step(run: Run) -> Draft:
    """What was sampled ahead for this step or, where nothing was, a draft that is sampled now."""
    if run.draft:
        return run.draft
    return run.selfplay.begin(run.step, run.draw(run.step), at_once)()


@contextmanager
def next_step_sampled(run: Run, seconds: dict[str, float]) -> Iterator[None]:
    """Inside, the policy learns from this step, while the next one is sampled if the run overlaps the two.

    The engine goes on with the adapters from before the block, so it must not be refreshed inside. `run.draft` is the
    next step's after the block, but not where that fails, so that the run can be saved as it was before this step.

    Args:
        run: the run.
        seconds: is told how long the next step was sampled, as `ahead`, and for how much of that nothing else was done,
            as `wait`.
    """
    schedule = run.config.schedule
    if not schedule.overlap or run.step == schedule.steps:
        yield
        run.draft = None
        return

    def beside(function: Callable[[], T]) -> Callable[[], T]:
        def call() -> T:
            with timed(seconds, "ahead"):
                return function()

        return in_background(call)

    end = run.selfplay.begin(run.step + 1, run.draw(run.step + 1), beside)
    yield
    with timed(seconds, "wait"):
        run.draft = end()
