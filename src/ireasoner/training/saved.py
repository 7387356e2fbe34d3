"""A run directory in Python: its options, numbers, episodes and summary. Nothing of it needs torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ireasoner.method.types import Episode
from ireasoner.training.config import Config, load_config
from ireasoner.training.recorder import LARGEST, read_episodes, read_json, read_records


@dataclass(frozen=True)
class SavedRun:
    """A run directory, finished or not; `load_run` opens one. Each call reads what the files hold by then.

    Attributes:
        path: the run directory.
        config: its options.
    """

    path: Path
    config: Config

    @property
    def summary(self) -> dict[str, Any]:
        """What the run wrote at its end, `before`, `after` and `difference` among it; empty until then."""
        return read_json(self.path / "summary.json", LARGEST)

    def episodes(self) -> Iterator[Episode]:
        """The episodes, in order: the question, all trajectories, and what each earned for what.

        Raises:
            RunDirectoryError: a record is not an episode of this version.
        """
        return read_episodes(self.path)

    def metrics(self) -> list[dict[str, float]]:
        """A row for each training step, the first of which is 1, with the key `step` and every metric by its name.

        `pandas.DataFrame(run.metrics())` is a table of them. A number that was not finite is None.
        """
        return list(read_records(self.path / "metrics.jsonl"))

    def events(self) -> list[dict[str, Any]]:
        """What a person should know, such as warnings, each with its `step` and its `text`."""
        return list(read_records(self.path / "events.jsonl"))


def load_run(path: str | os.PathLike[str]) -> SavedRun:
    """Open a run directory, finished or not, to read what it holds.

    Raises:
        ConfigError: it is not a run directory, or this version cannot read it.
    """
    folder = Path(path)
    return SavedRun(folder, load_config(folder / "config.yaml"))
