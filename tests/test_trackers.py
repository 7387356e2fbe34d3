"""Trackers: what TensorBoard is told of a run, and that none that fails ever stops one."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ireasoner.app.cli import main
from ireasoner.method.types import UsageError
from ireasoner.model.parallel import Processes
from ireasoner.playground import dataset
from ireasoner.training import checks, reporting
from ireasoner.training.config import load_config, resolve
from ireasoner.training.loop import resume, start
from ireasoner.training.recorder import read_records
from ireasoner.training.state import Observer
from ireasoner.training.trackers import SHOWN, TrackedRun, Value

pytestmark = pytest.mark.usefixtures("copied_models")

OPTIONS = {
    "model": "tiny", "device": "cpu", "steps": 2, "images_per_step": 2, "group_size": 2, "max_question_tokens": 56,
    "max_solution_tokens": 64, "learning_rate": 3e-3, "proposer_every": 1, "save_every": 1, "probe_every": 0,
    "eval_questions": 2,
}  # fmt: skip


class Remembers:
    """A tracker that keeps what it is told."""

    name = "remembers"

    def __init__(self) -> None:
        self.started: TrackedRun | None = None
        self.steps: dict[int, dict[str, float]] = {}
        self.shown: dict[int, list[str]] = {}
        self.summary: dict[str, Value] = {}
        self.finished = 0

    def start(self, run: TrackedRun) -> str | None:
        self.started = run
        return run.kept or "my run"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.steps[step] = dict(values)

    def log_pictures(self, step: int, pictures: Sequence[tuple[Image.Image, str]]) -> None:
        self.shown[step] = [caption for _, caption in pictures]

    def summarise(self, step: int, values: Mapping[str, Value]) -> None:
        self.summary = {"step": step, **values}

    def finish(self) -> None:
        self.finished += 1


class Fails(Remembers):
    """A tracker of which one method fails, whenever it is called."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.name, self.calls = f"fails to {method}", 0
        setattr(self, method, self.fail)

    def fail(self, *_: Any) -> None:
        self.calls += 1
        raise OSError("No space left on device\nand more")


class Killed(BaseException):
    """What ends a run as a kill would, for nothing catches it."""


class Kills(Remembers):
    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step == 2:
            raise Killed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures in `pool/`, and two labelled questions in `test/test.jsonl`."""
    folder = tmp_path_factory.mktemp("data")
    dataset.write_unlabeled(folder / "pool", 4, "chalk")
    dataset.write_questions(folder / "test", 2, "chalk")
    return folder


def flags(data: Path, **changes: Any) -> dict[str, Any]:
    return {
        **OPTIONS,
        "images": str(data / "pool"),
        "eval_data": str(data / "test" / "test.jsonl"),
        **changes,
    }


def events(run: Path) -> EventAccumulator:
    """Everything that TensorBoard reads in a run directory."""
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return found.Reload()


def text(found: EventAccumulator, tag: str) -> str:
    return found.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


@pytest.fixture(scope="module")
def tracked(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command line that was reported to TensorBoard."""
    out = tmp_path_factory.mktemp("tracked") / "run"
    given = flags(data, report_to="tensorboard", report_images="true")
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ireasoner.page.write_report", lambda *_, **__: None)
        assert main(["train", "--out", str(out), *words]) in (0, 3)
    assert not list(read_records(out / "events.jsonl")), "the tracker failed"
    return out


def test_tensorboard_holds_every_number_of_metrics_jsonl_by_its_name(tracked: Path):
    found, recorded = events(tracked), list(read_records(tracked / "metrics.jsonl"))
    assert [record["step"] for record in recorded] == [1, 2]
    for name in set(recorded[0]) | set(recorded[1]) - {"step"}:
        if name != "step":
            told = {event.step: event.value for event in found.Scalars(name)}
            assert told == pytest.approx({r["step"]: r[name] for r in recorded if name in r}, rel=1e-6), name


def test_tensorboard_is_told_the_result_and_the_verdict(tracked: Path):
    found, summary = events(tracked), json.loads((tracked / "summary.json").read_text())
    (after,) = found.Scalars("summary/after/greedy/mean")
    assert (after.step, after.value) == (2, pytest.approx(summary["after"]["greedy"]["mean"]))
    assert "accuracy" in text(found, "summary/verdict")
    assert text(found, "summary/trained_roles") == json.dumps(summary["trained_roles"])


def test_tensorboard_shows_a_few_episodes_with_pictures(tracked: Path):
    found, episode = events(tracked), next(read_records(tracked / "episodes.jsonl"))
    assert [event.step for event in found.Images("episodes/1")] == [1, 2]
    image = found.Images("episodes/1")[0]
    with Image.open(tracked / episode["thumbnail"]) as thumbnail:
        assert (image.width, image.height) == thumbnail.size
    assert episode["image"] in found.Tensors("episodes/1/text_summary")[0].tensor_proto.string_val[0].decode()


def test_tensorboard_holds_the_options(tracked: Path):
    (file,) = (tracked / "tensorboard").glob("*/hparams.yml")
    assert "learning_rate: 0.003" in file.read_text()
    assert f"images: {load_config(tracked / 'config.yaml').images}" in file.read_text()


def test_without_the_option_no_picture_is_shown(data: Path, tmp_path: Path):
    tracker = Remembers()
    start(resolve(flags(data, steps=1)), tmp_path / "run", Observer(trackers=[tracker]))
    assert list(tracker.steps) == [1]
    assert tracker.shown == {}
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_resumed_run_goes_on_in_its_trackers(data: Path, tmp_path: Path):
    """It is killed after TensorBoard was told of step 2, and before that was saved: step 2 is taken again."""
    out, config = tmp_path / "run", resolve(flags(data, report_to="tensorboard"))
    with pytest.raises(Killed):
        start(config, out, Observer(trackers=[Kills()]))
    again = Remembers()
    assert resume(load_config(out / "config.yaml"), out, Observer(trackers=[again])).complete
    assert again.started is not None
    assert (again.started.first_step, again.started.kept) == (2, "my run")
    assert list(again.steps) == [2]
    assert len(list((out / "tensorboard").glob("events.*"))) == 2
    assert [event.step for event in events(out).Scalars("reward/solver/total")] == [1, 2]
    assert len(list((out / "tensorboard").glob("*/hparams.yml"))) == 1


def test_trackers_that_fail_are_named_once_and_the_run_goes_on(data: Path, tmp_path: Path):
    methods = ("start", "log", "log_pictures", "summarise", "finish")
    healthy, failing, said = Remembers(), [Fails(method) for method in methods], list[str]()
    observer = Observer(on_message=said.append, verdict=lambda out: f"Seen: {out.name}.", trackers=[*failing, healthy])
    outcome = start(resolve(flags(data, report_images=True)), tmp_path / "run", observer)
    assert outcome.complete
    assert [tracker.calls for tracker in failing] == [1] * len(methods)
    recorded = [record["text"] for record in read_records(tmp_path / "run" / "events.jsonl")]
    for tracker in failing:
        (told,) = [text for text in recorded if text.startswith(f"{tracker.name} failed ")]
        assert told in said
        assert told.endswith("the run goes on without it (OSError: No space left on device).")
    assert list(healthy.steps) == list(healthy.shown) == [1, 2]
    assert all(0 < len(captions) <= SHOWN for captions in healthy.shown.values())
    assert healthy.summary["verdict"] == "Seen: run."
    assert healthy.summary["step"] == 2
    assert healthy.finished == 1


def test_a_tracker_whose_package_is_missing_is_told_before_anything_else(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    config = resolve(flags(data, report_to="trackio", model="/no/such/model"))
    with pytest.raises(UsageError, match="--report-to trackio needs the package trackio"):
        start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
@pytest.mark.filterwarnings("default")  # trackio and what it imports warn of their own options
def test_trackio_is_told_the_numbers_of_every_step(data: Path, tmp_path: Path):
    """In a process of its own, for trackio chooses its folder when it is imported."""
    out, words = tmp_path / "run", [f"--{name}={value}" for name, value in flags(data, report_to="trackio").items()]
    command = [sys.executable, "-m", "ireasoner", "train", "--out", str(out), *words]
    done = subprocess.run(command, env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}, check=False)
    assert done.returncode in (0, 3)
    assert not list(read_records(out / "events.jsonl")), "the tracker failed"
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as tables:
        told = [json.loads(metrics) for (metrics,) in tables.execute("SELECT metrics FROM metrics ORDER BY step")]
    for recorded in read_records(out / "metrics.jsonl"):
        name, value = "reward/solver/total", recorded["reward/solver/total"]
        assert any(metrics.get(name) == pytest.approx(value) for metrics in told)


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "wandb_of_a_test").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not checks.installed("wandb_of_a_test")
    assert checks.installed("tensorboard")


def test_only_the_main_process_tracks():
    tracker, run = Remembers(), SimpleNamespace(processes=Processes(1, 2), trackers=reporting.Trackers())
    run.out, run.config, run.step = Path("/no/such/run"), resolve({"images": "/pictures", "model": "tiny"}), 0
    with reporting.tracking(run, [tracker]):  # type: ignore[arg-type]
        run.trackers.step(1, {"reward": 1.0})
    assert tracker.started is None
    assert tracker.steps == {}
    assert tracker.finished == 0


def test_numbers_reach_a_tracker_as_plain_floats():
    tracker = Remembers()
    reporting.Trackers([tracker]).step(1, {"kl": np.float32(0.5)})  # type: ignore[dict-item]
    assert type(tracker.steps[1]["kl"]) is float
