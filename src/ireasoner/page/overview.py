"""Many runs at a glance."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ireasoner.method.types import UsageError
from ireasoner.page.run import LONGEST_LINE, state_of
from ireasoner.page.verdict import comparisons, learned_nothing
from ireasoner.training.config import ConfigError, load_config
from ireasoner.training.recorder import RunDirectoryError, read_json, read_records

DEPTH = 3  # levels of folders below the one that is searched


def overview(folder: Path) -> list[list[str]]:
    """A table of the runs in a folder and below it: a row of headings, then one row for each run, the latest last.

    Raises:
        UsageError: no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: name the one that holds your runs")
    configs = [path for depth in range(DEPTH + 1) for path in folder.glob("*/" * depth + "config.yaml")]
    found = [row for path in configs if (row := _row(path.parent, str(path.parent.relative_to(folder))))]
    rows = [["run", "state", "model", "recipe", "seed", "step", "result"]]
    return rows + [row for _, row in sorted(found)]


def _row(path: Path, name: str) -> tuple[float, list[str]] | None:
    """When a run began, and its row; None for a folder whose `config.yaml` is not a run's."""
    try:
        began = (path / "config.yaml").stat().st_mtime
        try:
            config = load_config(path / "config.yaml")
        except ConfigError as error:  # another version's run, or some other program's file
            row = [name, "unreadable", "", "", "", "", str(error)]
            return (began, row) if (path / "metrics.jsonl").exists() else None
        summary, last = read_json(path / "summary.json", LONGEST_LINE), _last_metrics(path / "metrics.jsonl")
        state = state_of(path, summary)
    except (OSError, RunDirectoryError):
        return None
    step = f"{last.get('step', 0)}/{config.schedule.steps}"
    return began, [name, state, config.model, config.recipe.name, str(config.seed), step, _result(summary, last)]


def _result(summary: dict[str, Any], last: dict[str, Any]) -> str:
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
    if not path.is_file():
        return {}
    with warnings.catch_warnings(action="ignore"):  # about damaged lines
        *_, last = {}, *read_records(path)
    return last
