"""Many runs at a glance."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from ireasoner.method.types import UsageError
from ireasoner.page.run import read_json, state_of
from ireasoner.training.config import ConfigError, load_config

DEPTH = 3  # folders below the one that is searched


def overview(folder: Path) -> list[list[str]]:
    """A row for each run in a folder and below it, the latest last, heads first: name, state, recipe, step, result.

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
    """When a run began, and what there is to say of it; None for a folder whose config is not a run's."""
    try:
        if not (path / "config.yaml").is_file():
            return None
        began, config = (path / "config.yaml").stat().st_mtime, load_config(path / "config.yaml")
        summary, last = read_json(path / "summary.json"), _last_metrics(path)
    except (ConfigError, OSError):
        return None
    step = f"{last.get('step', 0)}/{config.steps}"
    state = state_of(path, summary)
    return began, [name, state, config.model, config.recipe, str(config.seed), step, _result(summary or {}, last)]


def _result(summary: dict[str, Any], last: dict[str, Any]) -> str:
    try:
        before, after = (100 * summary[when]["greedy"]["mean"] for when in ("before", "after"))
        low, high = (100 * summary["difference"]["greedy"][end] for end in ("low", "high"))
        return f"greedy {before:.1f} → {after:.1f} % ({after - before:+.1f} [{low:+.1f}, {high:+.1f}])"
    except (KeyError, TypeError, ValueError, ArithmeticError):  # not measured
        shown = {"reward": "reward/solver/total", "majority": "answers/majority_fraction"}
        return ", ".join(f"{name} {last[key]:.3f}" for name, key in shown.items() if type(last.get(key)) is float)


def _last_metrics(path: Path) -> dict[str, Any]:
    """The last whole line of a run's metrics; empty if there is none."""
    file = path / "metrics.jsonl"
    if not file.is_file():
        return {}
    with file.open("rb") as lines:
        lines.seek(max(0, file.stat().st_size - 65536))
        for line in reversed(lines.read().split(b"\n")[:-1]):
            with suppress(ValueError, RecursionError):
                if isinstance(record := json.loads(line), dict):
                    return record
    return {}
