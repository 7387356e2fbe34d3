"""The trackers that `--report-to` names, on accelerate's, and a run's tracking from its start to its end."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import numpy as np
from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

from ireasoner.training.config import Config
from ireasoner.training.recorder import read_json, write_json
from ireasoner.training.state import Run
from ireasoner.training.trackers import TrackedRun, Tracker, Trackers, Value

KEPT = "trackers.json"  # what each tracker calls the run
PROJECT = "ireasoner"


class Reported:
    """What accelerate's trackers have in common. Each of these adds how it starts and what it makes of pictures."""

    name: str
    tracker: Any  # one of accelerate's, whose base class does not declare all that each of them has

    def begin(self, run: TrackedRun, tracker: GeneralTracker) -> None:
        """Start accelerate's tracker, and tell it the options where the run is new to it."""
        PartialState()  # which accelerate's trackers need; it is there already where several processes run
        tracker.main_process_only = False  # the other processes have none
        self.tracker = tracker
        tracker.start()
        if run.kept is None:
            tracker.store_init_configuration(dict(run.options))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.tracker.log(dict(values), step=step)

    def summarise(self, step: int, values: Mapping[str, Value]) -> None:
        self.tracker.log({f"summary/{name}": value for name, value in values.items()}, step=step)

    def finish(self) -> None:
        self.tracker.finish()


class TensorBoard(Reported):
    """Writes event files into the folder `tensorboard` of the run directory."""

    name = "tensorboard"

    def start(self, run: TrackedRun) -> str:
        # What was written after the checkpoint that a run goes on from is written again, so it is purged.
        self.begin(run, TensorBoardTracker(self.name, run.folder, purge_step=run.first_step))
        return self.name

    def log_pictures(self, step: int, pictures: Sequence[tuple[Image.Image, str]]) -> None:
        writer = self.tracker.tracker
        for number, (image, caption) in enumerate(pictures, 1):
            writer.add_image(f"episodes/{number}", np.asarray(image), step, dataformats="HWC")
            writer.add_text(f"episodes/{number}", caption.replace("\n", "  \n"), step)  # Markdown's line breaks
        writer.flush()


class Wandb(Reported):
    """Reports to Weights & Biases, to the project `WANDB_PROJECT` or `ireasoner`."""

    name = "wandb"

    def start(self, run: TrackedRun) -> str:
        kept, project = run.kept or uuid4().hex, os.environ.get("WANDB_PROJECT", PROJECT)
        self.begin(run, WandBTracker(project, name=run.folder.name, id=kept, resume="allow"))
        return kept

    def log_pictures(self, step: int, pictures: Sequence[tuple[Image.Image, str]]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.tracker.log({"episodes": [wandb.Image(image, caption=caption) for image, caption in pictures]}, step=step)

    def summarise(self, step: int, values: Mapping[str, Value]) -> None:
        self.tracker.tracker.summary.update(dict(values))


class Trackio(Reported):
    """Reports to trackio, to the project `TRACKIO_PROJECT` or `ireasoner`."""

    name = "trackio"

    def start(self, run: TrackedRun) -> str:
        kept = run.kept or f"{run.folder.name}-{uuid4().hex[:8]}"  # trackio knows a run by its name
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.begin(run, TrackioTracker(project, name=kept, resume="allow"))
        return kept

    def log_pictures(self, step: int, pictures: Sequence[tuple[Image.Image, str]]) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        shown = {f"episodes/{i}": trackio.Image(image, caption=caption) for i, (image, caption) in enumerate(pictures)}
        self.tracker.log(shown, step=step)


class MLflow(Reported):
    """Reports to MLflow, to the experiment `MLFLOW_EXPERIMENT_NAME` or `ireasoner`."""

    name = "mlflow"

    def start(self, run: TrackedRun) -> str:
        # MLflow tries seven times by default, each time after twice as long, while the run waits for it.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        self.begin(run, MLflowTracker(PROJECT, run_id=run.kept, run_name=run.folder.name))
        return self.tracker.tracker.info.run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.tracker.log({self._allowed(name): value for name, value in values.items()}, step=step)

    def log_pictures(self, step: int, pictures: Sequence[tuple[Image.Image, str]]) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        for number, (image, caption) in enumerate(pictures, 1):
            mlflow.log_image(image, artifact_file=f"episodes/{step:06d}-{number}.png")
            mlflow.log_text(caption, f"episodes/{step:06d}-{number}.txt")

    def summarise(self, step: int, values: Mapping[str, Value]) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        named = {f"summary/{self._allowed(name)}": value for name, value in values.items()}
        mlflow.set_tags({name: value for name, value in named.items() if isinstance(value, str)})
        self.tracker.log({name: value for name, value in named.items() if not isinstance(value, str)}, step=step)

    @staticmethod
    def _allowed(name: str) -> str:
        """A name in the letters and signs that MLflow takes."""
        return re.sub(r"[^\w .:/-]", "_", name)


REPORTED: dict[str, type[TensorBoard | Wandb | Trackio | MLflow]] = {
    tracker.name: tracker for tracker in (TensorBoard, Wandb, Trackio, MLflow)
}


def named_trackers(config: Config) -> list[Tracker]:
    """The trackers that the config names; nothing is started."""
    return [REPORTED[name]() for name in config.report_to]


@contextmanager
def tracking(run: Run, trackers: Sequence[Tracker]) -> Iterator[None]:
    """Inside, the trackers follow the run, which goes on without those that fail. Only the main process has any."""
    if run.processes.is_main:
        run.trackers = Trackers(trackers, run.tell)
    try:
        kept = read_json(run.out / KEPT, 2**20)
        if names := run.trackers.start(run.out, run.config, run.step + 1, kept):
            run.recorder.write_text(KEPT, write_json({**kept, **names}))
        yield
    finally:
        run.trackers.finish()
