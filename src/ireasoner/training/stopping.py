"""What asks a run to save and stop: Ctrl-C, the signals of a scheduler, or a limit of hours."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopped(Exception):  # noqa: N818  (it is no error)
    """Work was left undone because the run was asked to stop; a resumed run does it again."""


# Slurm and other schedulers announce the end of a job by SIGTERM or SIGUSR1, which Windows does not have.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


# Slurm sends a signal to every process of a job, torchrun among them, which passes it on to the processes that it has
# started: they get it twice, the second time within so many seconds, and are not meant to end at once.
PASSED_ON_WITHIN = 3.0


@contextmanager
def stop_requests(max_hours: float | None = None, began: float | None = None) -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether the run should save and stop now.

    The first of the signals asks for that; a second one ends the process as usual. Under torchrun, or accelerate's
    launcher, one that follows at once is the first one again.

    Args:
        max_hours: how long the run may go on; None: as long as it takes.
        began: when it began, by `time.monotonic`; None: now.
    """
    flag, began = threading.Event(), time.monotonic() if began is None else began

    def asked() -> bool:
        return flag.is_set() or (max_hours is not None and time.monotonic() - began >= 3600 * max_hours)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield asked
        return
    passed_on_until = 0.0
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        nonlocal passed_on_until
        if not flag.is_set():
            flag.set()
            passed_on_until = time.monotonic() + PASSED_ON_WITHIN if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        elif time.monotonic() > passed_on_until:
            restore()
            signal.raise_signal(number)

    for number in previous:
        signal.signal(number, handle)
    try:
        yield asked
    finally:
        restore()
