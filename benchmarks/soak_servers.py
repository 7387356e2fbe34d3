"""Two servers in processes of their own, which are killed, hung and started again at random moments: for `soak.py`.

They speak vLLM's routes over the tiny model (`tests/stand_in.py`), one completion at a time, so that what a run samples
on them does not depend on which of them it asked, bit by bit.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from ireasoner.model.loading import load_policy
from ireasoner.model.options import BackboneOptions
from stand_in import StandIn, free_port

START_SECONDS = 30.0  # in which a server that was started has to answer


class Server:
    """A server that can be killed and hung.

    Args:
        folder: for its temporary files, which a killed one leaves behind.
        receives: whether adapters are sent to it; otherwise it reads them from the run's folder.

    Attributes:
        since: when it was started last, or went on, by `time.monotonic`; None: it hangs or is dead.
    """

    def __init__(self, folder: Path, *, receives: bool) -> None:
        self.folder, self.receives, self.port = folder, receives, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.pid: int | None = None
        self.since: float | None = None

    def start(self) -> None:
        """Start it, or let it go on if it hangs; it may take a second until it answers."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGCONT)
        elif (pid := os.fork()) == 0:
            self._serve()
        else:
            self.pid = pid
        self.since = self.since or time.monotonic()

    def _serve(self) -> None:
        """In the forked process: answer until somebody kills it."""
        try:
            printed = os.open(self.folder / f"printed-{self.port}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            tempfile.tempdir = str(self.folder)
            policy = load_policy("tiny", BackboneOptions(dtype="float32"), device="cpu", seed=0)
            with StandIn(policy, self.port, receives=self.receives) as server:
                server.thread.join()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def hang(self) -> None:
        """Let it answer nothing, while its connections stay open."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGSTOP)
        self.since = None

    def kill(self) -> None:
        """End it at once."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.pid = self.since = None

    def wait(self) -> None:
        """Wait until it answers."""
        self.start()
        end = time.monotonic() + START_SECONDS
        while not self._answers():
            printed = (self.folder / f"printed-{self.port}").read_text("utf-8", "replace")
            assert time.monotonic() < end, f"the server at {self.address} does not begin to answer: {printed[-3000:]}"
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            return httpx2.get(f"{self.address}/health", timeout=1.0).status_code == 200
        except httpx2.HTTPError:
            return False


@contextmanager
def servers(folder: Path) -> Iterator[list[Server]]:
    """Two servers that answer."""
    folder.mkdir()
    both = [Server(folder, receives=receives) for receives in (True, False)]
    try:
        for server in both:
            server.wait()
        yield both
    finally:
        for server in both:
            server.kill()


class Disturbances:
    """What happens to the servers while a run goes on. Called all the time, as `forked` in `soak.py` does.

    Args:
        both: the servers.
        rng: decides what happens, and when.
        patience: the run's. Half of the outages are over within half of it; the others may last twice as long as it.
        run_dies_at: seconds after its start; None: the run is not killed.

    Attributes:
        done: what has happened.
    """

    def __init__(self, both: list[Server], rng: random.Random, patience: float, run_dies_at: float | None) -> None:
        self.both, self.rng, self.patience, self.run_dies_at = both, rng, patience, run_dies_at
        self.mean = patience * rng.choice((0.1, 0.4, 1.2))  # seconds between one disturbance and the next
        self.next = rng.expovariate(1 / self.mean)
        self.back: dict[int, float] = {}  # when each server that was disturbed is started again
        self.done: list[str] = []

    def __call__(self, now: float) -> bool:
        """Do what is due after so many seconds; whether the run is to be killed."""
        for number, at in list(self.back.items()):
            if now >= at:
                del self.back[number]
                self.both[number].start()
        if now >= self.next:
            self.next = now + self.rng.expovariate(1 / self.mean)
            self._disturb(now)
        return self.run_dies_at is not None and now >= self.run_dies_at

    def _disturb(self, now: float) -> None:
        hit, hangs = self.rng.choice(([0], [1], [0, 1])), self.rng.random() < 0.4
        for number in hit:
            if hangs:
                self.both[number].hang()
            else:
                self.both[number].kill()
            longest = self.patience * self.rng.choice((0.5, 2))
            self.back[number] = now + self.rng.uniform(0, longest)
        self.done.append(f"{'both' if len(hit) == 2 else 'one'} {'hung' if hangs else 'killed'}")
