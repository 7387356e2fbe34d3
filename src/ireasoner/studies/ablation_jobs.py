"""The processes of an ablation: `ireasoner train` and `ireasoner eval`, several at a time, and how far they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ireasoner.method.types import UsageError
from ireasoner.studies.ablation_numbers import repeated_texts
from ireasoner.training.statistics import MEASURES, STRICT
from ireasoner.training.watch import ENDED_ITSELF

POLL_SECONDS, QUIET_SECONDS = 0.25, 30.0
COMPLETE = {*MEASURES, *STRICT, "distinct_solutions", "image", "greedy_texts"}  # what scores of this version hold
Columns = dict[str, NDArray[np.float64]]  # by measure, a value for each question
Jobs = Mapping[str, Sequence[list[str]]]  # by the name of scores in OUT, the commands that make them, an eval last


class ArmsProgress(Progress):
    """Progress of all arms together, with the time left: a bar on a terminal, otherwise a line now and then.

    It counts training steps, which it reads from the run directories. Evaluation is not counted: it takes about the
    same share of each arm's time.

    Args:
        out: the folder of the ablation.
        arms: the names of the run directories in it.
        steps: how many training steps each of them takes.
    """

    def __init__(self, out: Path, arms: Sequence[str], steps: int) -> None:
        self.left = TimeRemainingColumn()
        columns = BarColumn(), TimeElapsedColumn(), TextColumn("left"), self.left
        description = TextColumn("{task.description}", markup=False)
        # The speed is averaged over an hour, because steps of a large model take minutes.
        super().__init__(description, *columns, transient=True, speed_estimate_period=3600)
        self.disable = not self.console.is_terminal
        self.out, self.arms, self.steps, self.told = out, arms, steps, self.get_time()
        self.add_task("", total=steps * len(arms))

    def steps_of(self, arm: str) -> int:
        """How many steps an arm has trained: each is a line of its metrics. A run may end early, but then is scored."""
        if (self.out / f"{arm}.json").exists():
            return self.steps
        metrics = self.out / arm / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def tell(self, running: Sequence[str]) -> None:
        """Show what the running arms and evaluations are doing."""
        done = {arm: self.steps_of(arm) for arm in self.arms}
        states = {arm: f"step {step}/{self.steps}" for arm, step in done.items() if step < self.steps}
        doing = "; ".join(f"{name}: {states.get(name, 'scoring')}" for name in running)
        (task,) = self.tasks
        self.update(task.id, description=doing, completed=sum(done.values()))
        if self.disable and self.get_time() - self.told >= QUIET_SECONDS:
            self.told = self.get_time()
            print(f"{doing}, {self.left.render(task)} left", flush=True)


def make_scores(
    out: Path, jobs: Jobs, at_a_time: int, progress: ArmsProgress, *, tell_accuracy: bool = True
) -> dict[str, Columns]:
    """Make the scores that OUT does not hold yet, at most so many at a time; return all of them by name.

    Scores of an earlier version, which lack a measure, are made again, without training anew.

    Each command is a process in a session of its own, so that Ctrl-C in a terminal does not reach it: this process asks
    it to stop, once. If this process is killed with SIGKILL, the commands at work run to their end; while one of them
    trains, another ablation in OUT finds its run directory locked and says so.

    Raises:
        UsageError: a command failed.
        KeyboardInterrupt: Ctrl-C. In both cases the other commands have been stopped, and training was saved.
    """
    waiting = [(name, list(commands)) for name, commands in jobs.items() if not (out / f"{name}.json").exists()]
    waiting += [(name, list(commands[-1:])) for name, commands in jobs.items() if _is_outdated(out / f"{name}.json")]
    running: dict[subprocess.Popen[bytes], tuple[str, list[list[str]]]] = {}
    threads = max(1, torch.get_num_threads() // at_a_time)
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                name, commands = waiting.pop(0)
                command = commands.pop(0)
                print(f"{name}: {'training' if commands else 'scoring'}", flush=True)
                if not commands:  # the file gets its name when it is complete, for a kill may leave half of it
                    command = [*command, f"--json={out / f'.{name}.json'}"]
                running[_start(command, out / f"{name}.log", threads)] = name, commands
            progress.tell([name for name, _ in running.values()])
            time.sleep(POLL_SECONDS)
            for process in [process for process in running if process.poll() is not None]:
                name, commands = running.pop(process)
                if process.returncode not in (0, ENDED_ITSELF):
                    raise UsageError(f"{name} {_failure(process.returncode, out / f'{name}.log')}")
                if commands:
                    waiting.insert(0, (name, commands))
                    continue
                (out / f".{name}.json").rename(out / f"{name}.json")
                scores = read_scores(out / f"{name}.json")
                if tell_accuracy:
                    print(f"{name}: " + "  ".join(f"{m} {100 * scores[m].mean():.1f}" for m in MEASURES), flush=True)
    finally:
        if running:
            print(f"Stopping {', '.join(name for name, _ in running.values())}.", flush=True)
        for process in running:
            process.terminate()  # `train` saves after its step, and ends
        for process in running:
            process.wait()
    return {name: read_scores(out / f"{name}.json") for name in jobs}


def _start(command: Sequence[str], log: Path, threads: int) -> subprocess.Popen[bytes]:
    """Start `ireasoner` with these arguments; its output is appended to the log."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    program = [sys.executable, "-m", "ireasoner", *command]
    with log.open("ab") as file:
        return subprocess.Popen(
            program, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def _failure(code: int, log: Path) -> str:
    """Why a command failed: the last line of its output."""
    if code < 0:
        return f"was killed (signal {-code}; out of memory? try fewer --jobs); what was saved stays; see {log}"
    last = log.read_text("utf-8", "replace").strip().rpartition("\n")[2]
    return f"failed: {last.removeprefix('ireasoner: ')} (its output is in {log})"


def _is_outdated(path: Path) -> bool:
    """Whether these are scores of an earlier version. Damaged ones are not: `read_scores` says so."""
    try:
        return not json.loads(path.read_text("utf-8"))["per_question"].keys() >= COMPLETE
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def read_scores(path: Path) -> Columns:
    """Scores that OUT holds, with `repeated_texts` of the greedy texts.

    Raises:
        UsageError: the file is damaged.
    """
    columns, texts = _read(path)
    return {**columns, "repeated_texts": np.array(repeated_texts(texts, columns["image"].tolist()))}


def read_texts(path: Path) -> list[str]:
    """The greedy texts of scores that OUT holds, by question.

    Raises:
        UsageError: the file is damaged.
    """
    return _read(path)[1]


def _read(path: Path) -> tuple[Columns, list[str]]:
    try:
        columns = json.loads(path.read_text("utf-8"))["per_question"]
        texts = list(map(str, columns.pop("greedy_texts")))
        arrays = {name: np.array(values, dtype=np.float64) for name, values in columns.items()}
        if any(values.shape != (len(texts),) for values in arrays.values()) or "image" not in arrays:
            raise ValueError
        return arrays, texts
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} cannot be read: remove it, and it is made again") from None
