"""`ireasoner` in processes of its own that need not import torch and the rest anew, which takes some seconds.

A server imports the package once, and every process is forked from it. It has a memory, signals, an exit code and
output of its own, as `python -m ireasoner` has. Only what is about the launcher or about imports needs a real program.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Self

from ireasoner import page
from ireasoner.app.cli import main

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "pytest",  # which the modules of tests import
        "ireasoner.app.cli",
        "ireasoner.page.page",
        "ireasoner.page.server",
        "ireasoner.playground.dataset",
        "ireasoner.training.loop",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
    ]
)


class Forked:
    """A process that calls a function; a context manager, which kills it at the end.

    Args:
        function: a function of a module, or a `partial` of one. Its result is the exit code.
        output: the folder with the files `stdout` and `stderr`, to which is appended; made where it is missing.
        environment: variables of the environment that differ from those of the tests.
    """

    def __init__(self, function: Callable[[], int], output: Path, environment: Mapping[str, str] | None = None) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.stdout, self.stderr = output / "stdout", output / "stderr"
        arguments = function, self.stdout, self.stderr, dict(environment or {})
        self.process = _context.Process(target=_call, args=arguments, daemon=True)  # ended with the tests at the latest
        self.process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.join()

    def wait_until(self, due: Callable[[], bool], seconds: float = 120) -> None:
        """Return as soon as `due()` is true, or the process has ended."""
        deadline = time.monotonic() + seconds
        while self.process.is_alive() and not due():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def send(self, number: int) -> bool:
        """Send a signal, unless the process has ended; whether it was sent."""
        running = self.process.is_alive()
        if running and self.process.pid is not None:
            os.kill(self.process.pid, number)
        return running

    def wait(self, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        """The exit code and what was printed, once the process has ended."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "the process does not end"
        return subprocess.CompletedProcess((), self.process.exitcode, self.printed(), _text(self.stderr))

    def printed(self) -> str:
        """The standard output so far; nothing of a named pipe, which a test may have put in the place of the file."""
        return _text(self.stdout)


def start(
    *arguments: object, output: Path, environment: Mapping[str, str] | None = None, before: Callable[[], object] = int
) -> Forked:
    """Start `ireasoner` with these arguments; a run that is finished has no report, which would take a second or two.

    Args:
        before: a function of a module that the process calls first, such as one that puts a fault into the package.
        output, environment: as for `Forked`.
    """
    return Forked(partial(_run_main, list(map(str, arguments)), before), output, environment)


def start_two(*arguments: object, output: Path, before: Callable[[], object] = int) -> list[Forked]:
    """Start the two processes of one run, whose outputs are folders in `output`."""
    return [
        start(*arguments, output=output / environment["RANK"], environment=environment, before=before)
        for environment in environments_of_two()
    ]


def environments_of_two() -> list[dict[str, str]]:
    """What a launcher tells the two processes that it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def _text(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.is_file() else ""


def _call(function: Callable[[], int], stdout: Path, stderr: Path, environment: Mapping[str, str]) -> None:
    for path, number in ((stdout, 1), (stderr, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, number)
        os.close(file)
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", **environment})
    gc.freeze()  # what was imported is there to stay, and to look through it would copy it into this process
    sys.exit(function())


def _run_main(arguments: Sequence[str], before: Callable[[], object]) -> int:
    page.write_report = lambda path, *_, **__: path
    before()
    return main(arguments)
