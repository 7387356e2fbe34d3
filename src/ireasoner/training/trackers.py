"""Trackers of experiments, such as TensorBoard, which are told what a run records.

`Tracker` is the protocol, which your own class may have as well (`Observer(trackers=[...])`); the trackers that
`--report-to` names are in `ireasoner.training.reporting`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ireasoner.method.types import Episode
from ireasoner.training.config import Config

SHOWN = 4  # episodes with pictures that are reported at a time

Value = bool | int | float | str


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told at the start.

    Attributes:
        folder: the run directory.
        options: every option of the run by its own name, except those that have no value.
        first_step: the next step; above 1 where the run is resumed. Values of this step and of later ones, which the
            tracker may know from before the run was interrupted, come again.
        kept: what `Tracker.start` returned when the run began; None at its beginning.
    """

    folder: Path
    options: Mapping[str, Value]
    first_step: int
    kept: str | None


class Tracker(Protocol):
    """Follows a run. A method that raises anything ends the tracking, never the run."""

    name: str

    def start(self, run: TrackedRun) -> str | None:
        """Begin, or go on with what `run.kept` names.

        Returns:
            The tracker's own name of the run, to be given back when the run is resumed; None if it needs none.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step, by their names in `metrics.jsonl`."""

    def log_pictures(self, step: int, pictures: Sequence[tuple[Image.Image, str]]) -> None:
        """Take images that were played in a step, each with its question and answers as text."""

    def summarise(self, step: int, values: Mapping[str, Value]) -> None:
        """Take the result of a run after its last step: what `summary.json` holds, and the verdict in a sentence."""

    def finish(self) -> None:
        """Write what is still to be written; the run ends or stops."""


class Trackers:
    """The trackers of a run that still work. One that fails is switched off, which is told once."""

    def __init__(self, trackers: Sequence[Tracker] = (), tell: Callable[[str], None] = lambda text: None) -> None:
        self._working, self._tell = list(trackers), tell

    def start(self, folder: Path, config: Config, first_step: int, kept: Mapping[str, Any]) -> dict[str, str]:
        """Start all trackers.

        Args:
            folder: the run directory.
            config: options of the run.
            first_step: the next step.
            kept: what this returned when the run began; empty at its beginning.

        Returns:
            Each tracker's own name of the run by the tracker's name, where it has one.
        """
        options = {name: _plain(value) for name, value in config.flat().items() if value is not None}
        names: dict[str, str] = {}

        def begin(tracker: Tracker) -> None:
            before = kept.get(tracker.name)
            run = TrackedRun(folder, options, first_step, before if isinstance(before, str) else None)
            if (name := tracker.start(run)) is not None:
                names[tracker.name] = name

        self._each("at the start", begin)
        return names

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell of the numbers of a step."""
        values = {name: float(value) for name, value in metrics.items()}
        self._each(f"at step {step}", lambda tracker: tracker.log(step, values))

    def pictures(self, step: int, folder: Path, episodes: Sequence[Episode]) -> None:
        """Tell of some episodes, whose thumbnails are in the run directory `folder`."""

        def show(tracker: Tracker) -> None:
            played = [episode for episode in episodes if episode.thumbnail][:SHOWN]
            pictures = []
            for episode in played:
                with Image.open(folder / str(episode.thumbnail)) as image:
                    pictures.append((image.convert("RGB"), caption(episode)))
            tracker.log_pictures(step, pictures)

        self._each(f"with the pictures of step {step}", show)

    def summarise(self, step: int, summary: Mapping[str, Any], verdict: Callable[[], str]) -> None:
        """Tell how the run ended.

        Args:
            step: the last step.
            summary: the contents of `summary.json`.
            verdict: what to make of it, in a sentence.
        """
        self._each(
            "at the end", lambda tracker: tracker.summarise(step, {"verdict": verdict(), **dict(_flat(summary))})
        )

    def finish(self) -> None:
        """Close all trackers."""
        self._each("at its own end", lambda tracker: tracker.finish())

    def _each(self, when: str, call: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._working):
            try:
                call(tracker)
            except Exception as error:  # a tracker may raise anything, and no experiment should end because of it
                self._working.remove(tracker)
                reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
                self._tell(f"{tracker.name} failed {when} and is switched off; the run goes on without it ({reason}).")


def caption(episode: Episode) -> str:
    """An episode in a line for each of: its image, the question, every trajectory's answer with its reward."""
    answers = [f"{'unreadable' if t.answer is None else t.answer} ({t.reward:.2f})" for t in episode.trajectories]
    return "\n".join([episode.image, episode.question.text or "The question could not be read.", ", ".join(answers)])


def _plain(value: Any) -> Value:
    """An option as every tracker takes it."""
    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, Value) else json.dumps(value)


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Value]]:
    """What nested mappings hold, by names such as `after/greedy/mean`, without what is None."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}/")
        elif value is not None:
            yield f"{path}{key}", _plain(value)
