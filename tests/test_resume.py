"""What a user may do to a run between two stops, and what may befall its directory: one sentence each, nothing lost."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import forked
from ireasoner.app.cli import main
from ireasoner.playground import world
from ireasoner.training import stopping
from ireasoner.training.checkpoints import newest_checkpoint
from ireasoner.training.config import Config, load_config, resolve
from ireasoner.training.evaluation import EvaluationOptions
from ireasoner.training.loop import resume, start
from ireasoner.training.recorder import read_records
from ireasoner.training.state import Observer

pytestmark = pytest.mark.usefixtures("copied_models", "no_reports")

SHORT = [
    "--model", "tiny", "--recipe", "paper", "--device", "cpu", "--images-per-step", "1", "--group-size", "2",
    "--max-solution-tokens", "64", "--steps", "3", "--save-every", "1", "--probe-every", "1", "--probe-images", "1",
    "--learning-rate", "3e-3", "--blank-every", "0",
]  # fmt: skip


def command(*argv: object) -> tuple[int, str]:
    """Exit code and everything printed, of a command run in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = main([str(argument) for argument in argv])
    return code, " ".join(out.getvalue().split())


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pool"), np.random.default_rng(3)
    for index in range(4):
        world.draw(world.sample_picture(rng), world.sample_style("varied", rng), rng).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def finished(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps that came to its end, under a umask that is not the usual one."""
    out, before = tmp_path_factory.mktemp("runs") / "run", os.umask(0o027)
    try:
        code, printed = command("train", "--images", pool, "--out", out, *SHORT)
    finally:
        os.umask(before)
    assert code == 0, printed
    return out


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """The same run as it was before its end: all steps taken and saved, nothing published."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "summary.json").unlink()
    for role in ("solver", "proposer"):
        shutil.rmtree(out / role, ignore_errors=True)
    return out


# --- a longer run -----------------------------------------------------------------------------------------------------


def test_a_finished_run_goes_on_to_a_later_step_under_the_last_step_weight(finished: Path, tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    code, printed = command("train", "--resume", out, "--steps", 5)
    assert code == 0, printed
    assert "The run is extended from 3 to 5 steps." in printed
    assert json.loads((out / "summary.json").read_text())["steps"] == 5
    metrics = list(read_records(out / "metrics.jsonl"))
    assert [record["step"] for record in metrics] == [1, 2, 3, 4, 5]
    before = [record["step_weight"] for record in read_records(finished / "metrics.jsonl")]
    assert [record["step_weight"] for record in metrics] == [*before, before[-1], before[-1]]
    assert before[-1] == pytest.approx(0.7)  # λ at the end of its schedule (METHOD: linear to 0.7 at the last step)
    told = [e["text"] for e in read_records(out / "events.jsonl")]
    assert [text for text in told if "extended" in text] == ["The run is extended from 3 to 5 steps."]
    config = load_config(out / "config.yaml")
    assert (config.schedule.steps, config.planned_steps) == (5, 3)


def test_an_extended_run_that_was_stopped_goes_on_without_being_told_again(finished: Path, tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    config = load_config(out / "config.yaml")

    def die(step: int, metrics: object, episodes: object) -> None:
        raise RuntimeError("as if killed")

    with pytest.raises(RuntimeError, match="as if killed"):
        resume(config, out, Observer(on_step=die), extend_to=5)
    assert not (out / "summary.json").exists()
    assert command("train", "--resume", out)[0] == 0
    assert [record["step"] for record in read_records(out / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_run_cannot_be_made_shorter(finished: Path):
    code, printed = command("train", "--resume", finished, "--steps", 2)
    assert code == 2
    assert "steps is 3 in the run, not 2" in printed


# --- a config that changed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("group_size: 2", "group_size is 5, and was 2"),
        ("learning_rate: 0.003", "learning_rate is 2e-05, and was 0.003"),
    ],
)
def test_a_config_that_lost_a_line_is_named(stopped: Path, line: str, told: str):
    path = stopped / "config.yaml"
    text = path.read_text()
    assert text.count(f"  {line}\n") == 1
    path.write_text(text.replace(f"  {line}\n", ""))
    code, printed = command("train", "--resume", stopped)
    assert code == 2
    assert f"config.yaml was changed since {stopped}/checkpoints/step-000003 was saved: {told}" in printed


# --- a directory that something befell --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("episodes.jsonl", '{"step": 1}'),
        ("episodes.jsonl", '{"step": -1}'),
        ("probes.jsonl", '{"step": 0}'),
        ("skipped.jsonl", '{"step": 0}'),
        ("events.jsonl", '{"step": 1, "text": 5}'),
        ("metrics.jsonl", '{"step": 10000000000}'),
        ("metrics.jsonl", "[]"),
    ],
)
def test_a_damaged_record_is_told_and_dropped(stopped: Path, name: str, line: str):
    with (stopped / name).open("a") as file:
        file.write(line + "\n")
    code, printed = command("train", "--resume", stopped)
    assert code == 0, printed
    assert f"Dropped a damaged record: {name}" in printed
    assert line not in (stopped / name).read_text()


def test_records_that_are_missing_are_told(stopped: Path):
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[:1] + lines[2:]))
    code, printed = command("train", "--resume", stopped)
    assert code == 0, printed
    assert "metrics.jsonl lacks 1 of 3 steps, the first of them 2" in printed


@pytest.mark.parametrize("content", ["", "[]", "{", '{"steps": 3}'])
def test_a_damaged_summary_is_one_sentence(stopped: Path, content: str):
    (stopped / "summary.json").write_text(content)
    code, printed = command("train", "--resume", stopped)
    assert code == 2
    assert "summary.json is damaged: remove it" in printed


def test_a_file_in_the_place_of_the_adapters_is_no_hindrance(stopped: Path):
    (stopped / ".adapters").write_text("something")
    code, printed = command("train", "--resume", stopped)
    assert code == 0, printed
    assert (stopped / "solver" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", ".lock"])
def test_a_named_pipe_is_refused_and_not_waited_for(stopped: Path, name: str):
    (stopped / name).unlink(missing_ok=True)
    os.mkfifo(stopped / name)
    code, printed = command("train", "--resume", stopped)
    assert code == 2
    assert f"{stopped / name} is not a file: move it away" in printed


def test_checkpoints_that_may_not_be_listed_are_one_sentence(stopped: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("ireasoner.training.checkpoints._newest_first", refuse)
    code, printed = command("train", "--resume", stopped)
    assert code == 2
    assert f"the checkpoints of {stopped} cannot be read" in printed


def test_a_named_pipe_in_the_place_of_the_summary_is_not_waited_for(stopped: Path):
    os.mkfifo(stopped / "summary.json")
    code, printed = command("train", "--resume", stopped)
    assert code == 2
    assert "summary.json is damaged: remove it" in printed


@pytest.mark.parametrize("damage", ["cut", "missing", "pipe"])
def test_a_damaged_adapter_is_one_sentence(finished: Path, pool: Path, tmp_path: Path, damage: str):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    path = out / "solver" / "adapter_model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": str(pool / "0.png"), "question": "How many?", "answer": "1"}))
    code, printed = command("eval", out, "--data", rows)
    assert code == 2
    assert f"the adapter in {out / 'solver'} cannot be read" in printed


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-000003"])
def test_links_that_form_a_loop_are_one_sentence(finished: Path, pool: Path, tmp_path: Path, name: str):
    out, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    shutil.copytree(finished, out)
    shutil.rmtree(out / name)
    (out / name).symlink_to(out / name)
    rows.write_text(json.dumps({"image": str(pool / "0.png"), "question": "How many?", "answer": "1"}))
    code, printed = command("eval", out / "checkpoints" / "step-000003", "--data", rows)
    assert code == 2, printed
    assert printed.startswith("ireasoner: ")


def test_what_a_kill_left_of_the_last_save_is_removed(stopped: Path):
    """A kill between the new checkpoint's name and the removal of the older ones: no further save comes."""
    root = stopped / "checkpoints"
    (last, _), config = newest_checkpoint(root), load_config(stopped / "config.yaml")
    assert last is not None
    shutil.copytree(root / "step-000000", root / ".tmp-step-000000-pruned")
    kept = sorted(path.name for path in root.glob("step-*"))
    assert len(kept) >= config.schedule.keep_checkpoints
    assert command("train", "--resume", stopped)[0] == 0
    assert not list(root.glob(".tmp-*"))
    assert sorted(path.name for path in root.glob("step-*")) == kept


def test_adapters_and_checkpoints_may_be_read_as_the_umask_says(finished: Path):
    written = [path for part in ("solver", "checkpoints") for path in (finished / part).rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in written)
    assert {oct(path.stat().st_mode & 0o777) for path in written} == {"0o640"}


# --- what asks a run to stop ------------------------------------------------------------------------------------------


def test_a_run_stops_after_its_hours_and_goes_on(pool: Path, tmp_path: Path):
    out = tmp_path / "run"
    code, printed = command("train", "--images", pool, "--out", out, *SHORT, "--max-hours", "1e-6")
    assert code == 130
    assert "saved. Continue with: ireasoner train --resume" in printed
    assert len(list(read_records(out / "metrics.jsonl"))) < 3
    assert command("train", "--resume", out)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_s_signal_saves_and_stops(pool: Path, tmp_path: Path, number: int):
    out, argv = tmp_path / "run", ["train", "--images", pool, *SHORT]
    argv[argv.index("--steps") + 1] = "1000"
    with forked.start(*argv, "--out", out, output=tmp_path) as process:
        process.wait_until(lambda: "\nstep 1/" in process.printed())
        process.send(number)
        done = process.wait()
    assert done.returncode == 130
    assert "saved. Continue with" in done.stdout
    assert newest_checkpoint(out / "checkpoints")[0] is not None


def asks_after_two_signals() -> bool:
    """Whether a run is asked to stop by two signals, one right after the other; the second may end the process."""
    with stopping.stop_requests() as asked:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return asked()


def test_a_signal_that_the_launcher_passes_on_is_the_first_one_again(monkeypatch: pytest.MonkeyPatch):
    """Slurm sends it to all processes, and torchrun once more to those that it has started."""
    with pytest.raises(KeyboardInterrupt):
        asks_after_two_signals()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert asks_after_two_signals()
    monkeypatch.setattr(stopping, "PASSED_ON_WITHIN", 0.0)  # somebody is in a hurry
    with pytest.raises(KeyboardInterrupt):
        asks_after_two_signals()


def test_a_closed_output_does_not_end_a_run(pool: Path, tmp_path: Path):
    out = tmp_path / "run"
    os.mkfifo(tmp_path / "stdout")
    with forked.start("train", "--images", pool, "--out", out, *SHORT, output=tmp_path) as process:
        with process.stdout.open() as read:
            read.readline()
        done = process.wait()
    assert done.returncode == 0, done.stderr
    assert "standard output was closed; the run goes on" in done.stderr
    assert (out / "summary.json").exists()


# --- the evaluation at both ends --------------------------------------------------------------------------------------


def write_rows(path: Path, pool: Path) -> Path:
    """Two held-out questions."""
    asked = [{"image": str(pool / f"{i}.png"), "question": "How many?", "answer": str(i)} for i in range(2)]
    path.write_text("\n".join(map(json.dumps, asked)))
    return path


class Evaluations(Observer):
    """Counts the evaluations of a run by name, and does something when one with a certain name goes on."""

    def __init__(self, name: str = "", action: Callable[[], None] = lambda: None) -> None:
        self.seen = Counter[str]()

        def note(which: str, done: int, total: int) -> None:
            self.seen[which] += 1
            if which == name:
                action()

        super().__init__(on_evaluation=note)


def config_with(rows: Path, pool: Path) -> Config:
    options = {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(SHORT[::2], SHORT[1::2], strict=True)
    }
    return resolve({**options, "images": str(pool), "eval_data": str(rows)})


def fail() -> None:
    raise RuntimeError("as if the disk had gone")


@pytest.fixture(scope="module")
def not_evaluated(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, Evaluations]:
    """A run with two held-out questions whose last evaluation failed; its config, and how it was evaluated."""
    folder = tmp_path_factory.mktemp("not-evaluated")
    seen, config = Evaluations("after", fail), config_with(write_rows(folder / "rows.jsonl", pool), pool)
    with pytest.raises(RuntimeError, match="as if the disk"):
        start(config, folder / "run", seen)
    return folder / "run", config, seen


def test_before_is_measured_once_and_an_evaluation_that_fails_leaves_the_adapters(
    not_evaluated: tuple[Path, Config, Evaluations], tmp_path: Path
):
    failed, config, first = not_evaluated
    out = Path(shutil.copytree(failed, tmp_path / "run"))
    assert (out / "solver" / "adapter_model.safetensors").exists()
    second = Evaluations()
    summary = resume(config, out, second).summary
    assert (first.seen, second.seen) == ({"before": 1, "after": 1}, {"after": 1})
    assert summary is not None
    whole = start(config, tmp_path / "uninterrupted").summary
    assert whole is not None
    for name in ("before", "after", "difference"):
        assert summary[name] == whole[name]


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"questions_sha256": "x", "per_question": {}}', "pipe", "foreign"]
)
def test_a_damaged_or_foreign_measurement_is_made_again(
    not_evaluated: tuple[Path, Config, Evaluations], tmp_path: Path, content: str
):
    """Foreign: it was made of other questions. Pipe: a named pipe is in its place, which would be waited for."""
    failed, config, _ = not_evaluated
    out = Path(shutil.copytree(failed, tmp_path / "run"))
    before = out / "before.json"
    if content == "pipe":
        before.unlink()
        os.mkfifo(before)
    elif content == "foreign":
        before.write_text(json.dumps({**json.loads(before.read_text()), "questions_sha256": "x"}))
    else:
        before.write_text(content)
    again = Evaluations()
    assert resume(config, out, again).complete
    assert again.seen == {"before": 1, "after": 1}


@pytest.mark.parametrize("which", ["before", "after"])
def test_ctrl_c_is_heard_during_an_evaluation(pool: Path, tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ireasoner.training.closing.EvaluationOptions", partial(EvaluationOptions, batch_size=1))
    out, config = tmp_path / "run", config_with(write_rows(tmp_path / "rows.jsonl", pool), pool)
    stopped = Evaluations(which, lambda: os.kill(os.getpid(), signal.SIGINT))
    outcome = start(config, out, stopped)
    assert (outcome.complete, outcome.step) == (False, 0 if which == "before" else 3)
    assert stopped.seen[which] == 1  # of two batches
    assert resume(config, out).complete
