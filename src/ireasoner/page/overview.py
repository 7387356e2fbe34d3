"""Many runs at a glance: which there are, and a row about each."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ireasoner.method.types import UsageError
from ireasoner.page.run import LONGEST_LINE, state_of
from ireasoner.page.verdict import comparisons, learned_nothing
from ireasoner.training.config import ConfigError, load_config
from ireasoner.training.recorder import is_locked, read_json

DEPTH = 3  # levels of folders below the one that is searched
LAST_BYTES = 200_000  # of a file of metrics, which hold its last record


class Row(NamedTuple):
    """What a list of runs says of one."""

    run: str
    state: str
    model: str = ""
    recipe: str = ""
    seed: str = ""
    step: str = ""
    result: str = ""


class Found(NamedTuple):
    """A run's directory, and its name among the runs that it was found with."""

    path: Path
    name: str


def overview(folder: Path) -> list[list[str]]:
    """A table of the runs in a folder and below it: a row of headings, then one row for each run, the latest last.

    Raises:
        UsageError: no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: name the one that holds your runs")
    return [[*Row._fields], *([*row_of(each)] for each in find_runs([folder], always_below=True).values())]


def find_runs(paths: Sequence[Path], *, always_below: bool = False) -> dict[str, Found]:
    """The runs among some directories and in folders below them, each folder's latest last.

    They are found by keys, which are letters, digits, dots and hyphens that stand for a run in an address.

    Args:
        paths: run directories, and folders that hold some.
        always_below: search below each of them, whether it is a run or not.
    """
    folders = [always_below or not (path / "config.yaml").is_file() for path in paths]
    roots = [path if below else path.parent for path, below in zip(paths, folders, strict=True)]
    root = Path(os.path.commonpath([root.absolute() for root in roots]))
    found: dict[str, Found] = {}
    for path, below in zip(paths, folders, strict=True):
        for run in sorted(_below(path, DEPTH), key=lambda run: (_began(run), run)) if below else [path]:
            name = os.path.relpath(run.absolute(), root)
            key = plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)
            number = 1
            while key in found:
                key = f"{plain}-{(number := number + 1)}"
            found[key] = Found(run, name)
    return found


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """The runs in a folder. Inside of a run there are none, but perhaps a hundred thousand pictures."""
    with suppress(OSError):  # unreadable, or deleted meanwhile
        if (folder / "config.yaml").exists() and _is_run(folder):
            yield folder
        if depth and not (folder / "metrics.jsonl").exists():
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        yield from _below(Path(entry.path), depth - 1)


def _is_run(path: Path) -> bool:
    """Whether a `config.yaml` is a run's: also one of another version, which cannot be read but has metrics."""
    if (path / "metrics.jsonl").exists():
        return True
    try:
        load_config(path / "config.yaml")
    except ConfigError:
        return False
    return True


def _began(path: Path) -> float:
    try:
        return (path / "config.yaml").stat().st_mtime
    except OSError:
        return 0.0


def row_of(found: Found) -> Row:
    """What a list says of a run, from the ends of its files alone."""
    path = found.path
    try:
        config = load_config(path / "config.yaml")
    except ConfigError as error:  # another version's run, or some other program's file
        return Row(found.name, "unreadable", result=str(error))
    summary, last = read_json(path / "summary.json", LONGEST_LINE), _last_metrics(path / "metrics.jsonl")
    step = f"{last.get('step', 0)}/{config.schedule.steps}"
    state = state_of(path, summary)
    return Row(found.name, state, config.model, config.recipe.name, str(config.seed), step, _result(summary, last))


def stamp(path: Path) -> tuple[object, ...]:
    """Changes whenever there is something new to say of a run."""
    with suppress(OSError):
        files = [path / name for name in ("config.yaml", "metrics.jsonl", "summary.json")]
        return is_locked(path), *((file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists())
    return ()


def _result(summary: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    if summary.get("stopped_early"):
        return str(summary.get("reason"))
    if learned_nothing(summary):
        return "nothing was learned"
    for found in comparisons(summary):  # the first one that was measured
        before, after = found.before.percent[0], found.after.percent[0]
        mean, low, high = found.difference.percent
        return f"{found.name} {before:.1f} → {after:.1f} % ({mean:+.1f} [{low:+.1f}, {high:+.1f}])"
    shown = {"reward": "reward/solver/total", "majority": "answers/majority_fraction"}
    return ", ".join(f"{name} {last[key]:.3f}" for name, key in shown.items() if type(last.get(key)) is float)


def _last_metrics(path: Path) -> dict[str, Any]:
    """The last whole record of a run's metrics; empty if there is none."""
    with suppress(OSError):
        if not path.is_file():
            return {}
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            *lines, _ = file.read(LAST_BYTES).split(b"\n")  # what follows the last line break is not yet whole
        for line in reversed(lines):
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and type(record.get("step")) is int:
                    return record
    return {}
