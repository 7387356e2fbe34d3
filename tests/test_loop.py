"""Runs: what a finished one holds, and that an interrupted and resumed one ends bitwise like an uninterrupted one.

The reference run is made once. Interrupted runs are ended in three ways: SIGKILL at several moments of a real process,
SIGINT, and an exception out of the observer, which leaves the disk as a kill between two writes would.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

import forked
from ireasoner.app.cli import main
from ireasoner.method.texts import proposer_messages, solver_messages
from ireasoner.method.types import ROLES
from ireasoner.model.backbone import load_backbone, load_processor
from ireasoner.model.forward import completion_hidden
from ireasoner.model.inputs import build_prompts, encode_images
from ireasoner.model.loading import load_policy
from ireasoner.model.policy import Policy
from ireasoner.playground import world
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training.checks import check_start
from ireasoner.training.config import ConfigError, load_config, resolve
from ireasoner.training.images import load_image, read_image
from ireasoner.training.loop import resume, start
from ireasoner.training.opening import prepare
from ireasoner.training.recorder import RunError, read_episodes, read_records
from ireasoner.training.state import Observer, Run
from ireasoner.training.teaching import update
from ireasoner.training.watch import ENDED_ITSELF

pytestmark = pytest.mark.usefixtures("copied_models")

# Long enough that most trajectories are readable, and a rate at which every step moves what the next one samples.
OPTIONS = {
    "model": "tiny", "recipe": "paper", "seed": "5", "device": "cpu", "steps": "4", "images_per_step": "2",
    "group_size": "3", "max_question_tokens": "56", "max_solution_tokens": "64", "learning_rate": "3e-3",
    "proposer_every": "2", "save_every": "1", "keep_checkpoints": "2", "probe_every": "2", "probe_images": "2",
    "eval_questions": "3",
}  # fmt: skip
LAST = "checkpoints/step-000004"
LOGS = ("episodes.jsonl", "probes.jsonl", "skipped.jsonl", "events.jsonl")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures and one undecodable file in `pool/`, and four labelled questions in `held-out.jsonl`."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pool" / "sub").mkdir(parents=True)
    rng = np.random.default_rng(7)
    for name in ("a.png", "b.png", "c.png", "sub/d.png", "sub/e.png"):
        world.draw(world.sample_picture(rng), world.sample_style("varied", rng), rng).save(folder / "pool" / name)
    (folder / "pool" / "sub" / "broken.jpg").write_bytes(b"\xff\xd8\xff not an image")
    rows = []
    for index in range(4):
        picture = world.sample_picture(rng)
        world.draw(picture, world.sample_style("varied", rng), rng).save(folder / f"{index}.png")
        question = world.sample_question(picture, rng)
        rows.append(json.dumps({"image": f"{index}.png", "question": question.text, "answer": question.answer}))
    (folder / "held-out.jsonl").write_text("\n".join(rows))
    return folder


def flags(data: Path, **changes: str) -> dict[str, str]:
    return {**OPTIONS, "images": str(data / "pool"), "eval_data": str(data / "held-out.jsonl"), **changes}


def command(data: Path, out: Path, **changes: str) -> list[str]:
    """A `train` command that begins the run, or continues it where there is something to continue."""
    if (out / "config.yaml").exists():
        return ["train", "--resume", str(out)]
    options = flags(data, **changes).items()
    return [
        "train",
        "--out",
        str(out),
        *(text for key, value in options for text in (f"--{key.replace('_', '-')}", value)),
    ]


def run_here(*argv: str) -> tuple[int, str]:
    """Exit code and everything printed, of a command run in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = main(list(argv))
    return code, out.getvalue()


def complete(data: Path, out: Path, ends_with: int = 0, **changes: str) -> str:
    """Bring a run to its end in this process; what it printed, on one line."""
    code, printed = run_here(*command(data, out, **changes))
    assert code == ends_with, printed
    return " ".join(printed.split())


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("reference") / "run"
    complete(data, out)
    return out


def test_a_resumed_run_remembers_what_was_claimed_of_other_images(data: Path, tmp_path: Path):
    scale = {"recipe": "default", "steps": "3", "probe_every": "0", "learning_rate": "3e-3"}
    options = {name: value for name, value in flags(data, **scale).items() if name != "eval_data"}

    def die(step: int, metrics: object, episodes: object) -> None:
        if step == 2:
            raise RuntimeError("as if killed")

    start(resolve(options), tmp_path / "whole")
    with pytest.raises(RuntimeError, match="as if killed"):
        start(resolve(options), tmp_path / "killed", Observer(on_step=die))
    resume(resolve(options), tmp_path / "killed")
    state, resumed = (
        json.loads((tmp_path / run / "checkpoints" / "step-000003" / "state.json").read_text())
        for run in ("whole", "killed")
    )
    assert len(state["memory"]) > 2, "too few groups could be read"
    assert resumed["memory"] == state["memory"]
    assert [e.rewards for e in read_episodes(tmp_path / "killed")] == [
        e.rewards for e in read_episodes(tmp_path / "whole")
    ]


@pytest.fixture(scope="module")
def interrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died after the records of step 3 and before its checkpoint, with torn and stale things lying about."""
    out = tmp_path_factory.mktemp("interrupted") / "run"

    def die(step: int, metrics: object, episodes: object) -> None:
        if step == 3:
            raise RuntimeError("as if killed")

    with pytest.raises(RuntimeError, match="as if killed"):
        start(resolve(flags(data)), out, Observer(on_step=die))
    for log in ("episodes.jsonl", "metrics.jsonl", "skipped.jsonl"):
        with (out / log).open("ab") as file:
            file.write(b'{"step": 4, "image": "c.p')
    stale = out / "checkpoints" / ".tmp-step-000003-999999"
    stale.mkdir()
    (stale / "state.json").write_text('{"step": 3, "ela')
    return out


@pytest.fixture
def dead(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of the interrupted run, to do with as one likes."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def contents(run: Path, last: str = LAST) -> dict[str, Any]:
    """Everything about a finished run that must not depend on how often it was interrupted; `last`: its checkpoint."""
    found: dict[str, Any] = {name: (run / name).read_bytes() for name in LOGS if (run / name).exists()}
    found["config.yaml"] = (run / "config.yaml").read_bytes()
    found["metrics.jsonl"] = [
        {name: value for name, value in record.items() if not name.startswith("time/")}
        for record in read_records(run / "metrics.jsonl")
    ]
    for file in sorted([*run.glob("*/*.safetensors"), *(run / last).rglob("*.safetensors"), *run.glob("images/*")]):
        found[str(file.relative_to(run))] = file.read_bytes()
    found["state"] = json.loads((run / last / "state.json").read_text())
    found["summary"] = json.loads((run / "summary.json").read_text())
    del found["state"]["elapsed"], found["summary"]["training_seconds"]
    return found


def assert_same(run: Path, reference: Path) -> None:
    ours, theirs = contents(run), contents(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []


# --- the reference, so that equality with it means something ----------------------------------------------------------


def test_the_reference_run_learned_in_both_roles_at_every_step(reference: Path):
    for role, updates in (("solver", 4), ("proposer", 2)):
        adapter = load_file(reference / role / "adapter_model.safetensors")
        moved = [tensor.abs().max().item() > 0 for name, tensor in adapter.items() if "lora_B" in name]
        assert moved
        assert all(moved)
        optimizer = load_file(reference / LAST / f"optimizer-{role}.safetensors")
        assert {tensor.item() for name, tensor in optimizer.items() if name.startswith("step/")} == {updates}
    metrics = list(read_records(reference / "metrics.jsonl"))
    assert [record["step"] for record in metrics] == [1, 2, 3, 4]
    assert sum(record["advantage_std/solver"] > 0 for record in metrics) >= 2
    assert ["kl/proposer" in record for record in metrics] == [False, True, False, True]


def test_the_weight_of_step_agreement_follows_the_paper(reference: Path):
    # 0 for the first 30 % of 4 steps, then linear to 0.7 at the last: progress 0, 0.8/2.8, 1.8/2.8, 1.
    weights = [record["step_weight"] for record in read_records(reference / "metrics.jsonl")]
    assert weights == pytest.approx([0.0, 0.2, 0.45, 0.7])


def test_log_probabilities_of_the_update_are_those_of_the_sampler(reference: Path):
    for record in read_records(reference / "metrics.jsonl"):
        assert record["sampler_gap/solver"] < 1e-4
        assert record.get("sampler_gap/proposer", 0.0) < 1e-4


def test_another_seed_is_another_run(data: Path, tmp_path: Path, reference: Path):
    out = tmp_path / "run"
    start(resolve(flags(data, seed="6", steps="1", probe_every="0") | {"eval_data": None}), out)
    assert (out / "episodes.jsonl").read_bytes().splitlines()[0] not in (reference / "episodes.jsonl").read_bytes()


# --- killed and resumed -----------------------------------------------------------------------------------------------


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.usefixtures("no_report")
@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_like_the_reference(data: Path, tmp_path: Path, reference: Path):
    out = tmp_path / "run"
    episodes = out / "episodes.jsonl"
    delays = [random.uniform(0, longest) for longest in (0.01, 0.01, 0.5)]
    print("delays", delays)  # shown if this fails
    moments: list[Callable[[], bool]] = [
        lambda: any((out / "checkpoints").glob(".tmp-step-000000-*")),  # in the middle of the very first checkpoint
        lambda: any((out / "checkpoints").glob(".tmp-step-000002-*")),
        lambda: lines(episodes) > 4,  # somewhere in or after the records of step 3
    ]
    kills = 0
    for due, delay in zip(moments, delays, strict=True):
        process = forked.start(*command(data, out), output=tmp_path)
        process.wait_until(due)
        time.sleep(delay)
        process.send(signal.SIGKILL)
        done = process.wait()
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr
        kills += done.returncode == -signal.SIGKILL
    assert kills >= 2, done.stderr
    complete(data, out)
    assert_same(out, reference)
    assert not [path.name for path in (out / "checkpoints").glob(".*") if path.name.startswith(".tmp-")]


@pytest.mark.usefixtures("no_report")
def test_a_run_that_died_between_records_and_checkpoint_ends_like_the_reference(
    data: Path, dead: Path, reference: Path
):
    kept = {path.name for path in (dead / "checkpoints").glob("step-*")}
    assert kept == {"step-000000", "step-000001", "step-000002"}
    assert lines(dead / "episodes.jsonl") == 6
    printed = complete(data, dead)
    assert "Resumed after step 2." in printed
    assert_same(dead, reference)
    # λ went on where it was, and did not begin again.
    assert [r["step_weight"] for r in read_records(dead / "metrics.jsonl")][2:] == pytest.approx([0.45, 0.7])


@pytest.mark.usefixtures("no_report")
def test_a_damaged_newest_checkpoint_is_skipped_by_name_and_kept(data: Path, dead: Path, reference: Path):
    damaged = dead / "checkpoints" / "step-000002" / "optimizer-solver.safetensors"
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.write_bytes(raw)
    printed = complete(data, dead)
    assert "Skipped the damaged checkpoint step-000002" in printed
    assert "optimizer-solver.safetensors" in printed
    assert "Resumed after step 1." in printed
    (kept,) = (dead / "checkpoints").glob("step-000002.damaged-*")
    assert (kept / damaged.name).read_bytes() == raw
    (event,) = read_records(dead / "events.jsonl")
    assert event["step"] == 1
    assert "step-000002" in event["text"]
    (dead / "events.jsonl").unlink()  # nothing happened to the reference
    assert_same(dead, reference)


def test_a_damaged_record_is_dropped_and_said(dead: Path):
    with (dead / "probes.jsonl").open("rb+") as file:
        file.write(b"\xff")
    resume(load_config(dead / "config.yaml"), dead)
    (event,) = read_records(dead / "events.jsonl")
    assert event == {
        "step": 2, "text": "Dropped a damaged record: probes.jsonl, line 1, is not a record and was left out."
    }  # fmt: skip


def test_a_run_whose_every_checkpoint_is_damaged_says_so_and_loses_nothing(dead: Path):
    for path in (dead / "checkpoints").glob("step-*/state.json"):
        path.write_text("{}")
    before = {str(path): path.read_bytes() for path in dead.rglob("*") if path.is_file() and "jsonl" not in path.name}
    code, printed = run_here("train", "--resume", str(dead))
    assert code == 2
    assert "every checkpoint" in printed
    assert "damaged" in printed
    assert before == {
        str(path): path.read_bytes() for path in dead.rglob("*") if path.is_file() and "jsonl" not in path.name
    }
    assert lines(dead / "episodes.jsonl") == 6


@pytest.mark.usefixtures("no_report")
def test_a_run_that_died_while_it_was_finishing_ends_like_the_reference(data: Path, dead: Path, reference: Path):
    def die(which: str, done: int, total: int) -> None:
        if which == "after":
            raise RuntimeError("as if killed")

    with pytest.raises(RuntimeError, match="as if killed"):
        resume(load_config(dead / "config.yaml"), dead, Observer(on_evaluation=die))
    assert not (dead / "summary.json").exists()
    complete(data, dead)
    assert_same(dead, reference)


@pytest.mark.usefixtures("no_report")
def test_interrupt_saves_says_how_to_go_on_and_the_run_ends_like_the_reference(
    data: Path, tmp_path: Path, reference: Path
):
    out = tmp_path / "run"
    # Nothing but the interrupt itself saves before the end.
    process = forked.start(*command(data, out, save_every="0"), output=tmp_path)
    process.wait_until(lambda: lines(out / "metrics.jsonl") >= 1)
    process.send(signal.SIGINT)
    done = process.wait()
    printed = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 130, printed
    assert "Traceback" not in printed
    steps = lines(out / "metrics.jsonl")
    assert 1 <= steps < 4
    assert f"Stopped after step {steps}, saved." in printed
    assert f"ireasoner train --resume {out}" in printed
    assert (out / "checkpoints" / f"step-{steps:06d}").is_dir()
    assert f"Resumed after step {steps}." in complete(data, out)
    ours, theirs = contents(out), contents(reference)
    for found in (ours, theirs):
        del found["config.yaml"]  # save_every differs
    assert [name for name in theirs if ours[name] != theirs[name]] == []


def test_resuming_with_another_option_is_refused_and_names_it(dead: Path):
    code, printed = run_here("train", "--resume", str(dead), "--learning-rate", "1e-4", "--seed", "5")
    assert code == 2
    assert "--learning-rate is 0.003 in the run, not 0.0001" in printed
    assert "seed" not in printed
    assert printed.count("\n") == 1


@pytest.mark.usefixtures("no_report")
def test_resuming_with_the_same_options_in_another_spelling_goes_on(data: Path, dead: Path, reference: Path):
    code, printed = run_here(
        "train", "--resume", str(dead), "--learning-rate", "0.0030", "--images", str(data / "pool")
    )
    assert code == 0, printed
    assert_same(dead, reference)


@pytest.mark.usefixtures("no_report")
def test_resuming_with_the_folder_named_as_it_was_at_the_start_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(data)
    options = flags(data, steps="1", images="pool", probe_every="0", eval_data="held-out.jsonl", eval_questions="1")
    argv = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", value)]
    assert run_here("train", *argv, "--out", str(tmp_path / "run"))[0] == 0
    code, printed = run_here("train", *argv, "--resume", str(tmp_path / "run"))
    assert code == 0, printed


def test_images_of_the_evaluation_data_are_set_aside_and_a_resumed_run_is_the_same(data: Path, tmp_path: Path):
    rows = (data / "held-out.jsonl").read_text().splitlines()
    rows += [json.dumps({"image": f"pool/{name}.png", "question": "What?", "answer": "red"}) for name in ("a", "sub/e")]
    held_out = data / "held-out-of-the-pool.jsonl"
    held_out.write_text("\n".join(rows))
    scale = {"steps": "2", "probe_every": "1", "eval_questions": "1", "eval_data": str(held_out)}
    options, last = resolve(flags(data, **scale)), "checkpoints/step-000002"

    def die(step: int, metrics: object, episodes: object) -> None:
        if step == 2:
            raise RuntimeError("as if killed")

    told: list[str] = []
    start(options, tmp_path / "whole", Observer(on_message=told.append))
    with pytest.raises(RuntimeError, match="as if killed"):
        start(options, tmp_path / "killed", Observer(on_step=die))
    resume(options, tmp_path / "killed")
    assert contents(tmp_path / "killed", last) == contents(tmp_path / "whole", last)
    assert {e.image for e in read_episodes(tmp_path / "whole")} == {"b.png", "c.png", "sub/d.png"}
    sentence = "Images of the evaluation data that are set aside and not trained on: 2."
    assert sentence in told
    events = list(read_records(tmp_path / "whole" / "events.jsonl"))
    assert [(event["step"], event["text"]) for event in events] == [(0, sentence)]
    skipped = {record["image"] for record in read_records(tmp_path / "whole" / "skipped.jsonl")}
    assert {"a.png", "sub/e.png"} <= skipped


@pytest.mark.usefixtures("no_report")
def test_a_run_whose_folder_grew_goes_on_with_what_it_began_with(
    data: Path, dead: Path, reference: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(data / "pool", tmp_path / "pool"))
    shutil.copy(folder / "a.png", folder / "b2.png")
    config = dead / "config.yaml"
    config.write_text(config.read_text().replace(str(data / "pool"), str(folder)))
    code, printed = run_here("train", "--resume", str(dead))
    assert code == 0, printed
    told = f"Images that were added to the folder '{folder}' since the run began: 1 (b2.png)."
    assert told in " ".join(printed.split())
    ours, theirs = contents(dead), contents(reference)
    assert told in json.loads(ours.pop("events.jsonl").splitlines()[-1])["text"]
    for found in (ours, theirs):
        found.pop("events.jsonl", None)
        del found["config.yaml"]
    assert ours == theirs
    assert (dead / "images.txt").read_bytes() == (reference / "images.txt").read_bytes()


@pytest.mark.parametrize("listing", [None, "a.png\nb.png"])
def test_a_changed_image_folder_is_refused_where_nothing_tells_what_was_in_it(
    data: Path, dead: Path, tmp_path: Path, listing: str | None
):
    # Another picture under a new name; the run's own folder is left alone, for other tests need it.
    folder = Path(shutil.copytree(data / "pool", tmp_path / "pool"))
    shutil.copy(folder / "a.png", folder / "z.png")
    config = dead / "config.yaml"
    config.write_text(config.read_text().replace(str(data / "pool"), str(folder)))
    (dead / "images.txt").unlink()  # as in a run of an older version, or damaged
    if listing is not None:
        (dead / "images.txt").write_text(listing)
    code, printed = run_here("train", "--resume", str(dead))
    assert code == 2
    assert "6 images then, 7 now" in printed
    assert "Traceback" not in printed


def test_resuming_a_finished_run_changes_nothing(reference: Path):
    before = contents(reference)
    stamps = {path: path.stat().st_mtime_ns for path in (reference / "checkpoints").rglob("*")}
    code, printed = run_here("train", "--resume", str(reference))
    assert code == 0, printed
    assert contents(reference) == before
    assert {path: path.stat().st_mtime_ns for path in (reference / "checkpoints").rglob("*")} == stamps


@pytest.mark.parametrize(
    "log",
    [
        "metrics.jsonl",
        "episodes.jsonl",
    ],
)
def test_a_run_that_another_process_writes_is_left_alone(dead: Path, log: str):
    if log == "metrics.jsonl":
        (dead / log).write_bytes((dead / log).read_bytes().rpartition(b"\n")[0] + b"\n")  # nothing is torn
    before = (dead / log).read_bytes()
    with (dead / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, printed = run_here("train", "--resume", str(dead))
    assert code == 2
    assert "another process" in printed
    assert (dead / log).read_bytes() == before


def test_a_new_run_is_refused_where_one_lies_and_leaves_it_as_it_was(data: Path, reference: Path):
    before = contents(reference)
    argv = [text for key, value in flags(data).items() for text in (f"--{key.replace('_', '-')}", value)]
    code, printed = run_here("train", "--out", str(reference), *argv)
    assert code == 2
    assert "holds a run already" in printed
    assert "--resume" in printed
    assert contents(reference) == before


def test_what_was_skipped_while_scanning_is_recorded(data: Path, tmp_path: Path):
    folder = Path(shutil.copytree(data / "pool", tmp_path / "pool"))
    (folder / "linked").symlink_to(data / "pool" / "sub", target_is_directory=True)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    out = tmp_path / "run"
    options = flags(data, images=str(folder), steps="1", images_per_step="6", group_size="2", probe_every="0")
    options |= {"max_question_tokens": "4", "max_solution_tokens": "4", "eval_questions": "1"}
    start(resolve(options), out)
    recorded = [record["image"] for record in read_records(out / "skipped.jsonl")]
    assert sorted(recorded) == ["gone.png", "linked/", "sub/broken.jpg"]


# --- the gate ---------------------------------------------------------------------------------------------------------


def solver_state(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.policy.parameters("solver").items()}


def test_groups_that_teach_nothing_do_not_update_the_solver(data: Path, tmp_path: Path):
    """The gated update is bitwise that of the kept groups alone; rows that match nobody's tokens would show."""
    options = flags(data, probe_every="0", images_per_step="5", step_weight_final="0") | {"eval_data": None}
    found: list[tuple[dict[str, float], dict[str, torch.Tensor]]] = []
    for index, gates in enumerate(({"gate_low": "0.5", "gate_high": "0.9"}, {})):
        out = tmp_path / str(index)
        config = resolve(options | gates)
        run = prepare(config, out, check_start(config, out), Observer())
        run.step = 1
        play = run.selfplay.play(1, run.pool.take(5))
        solved = [i for i, e in enumerate(play.episodes) if e.trajectories]
        fractions = [play.episodes[i].majority_fraction for i in solved]
        kept = [i for i in solved if play.episodes[i].majority_fraction == pytest.approx(2 / 3)]
        assert 0 < len(kept) < len(solved)  # else this shows nothing
        if not gates:
            samples = [sample for sample in play.solver if sample.episode in kept]
            solver = tuple(replace(sample, episode=row) for row, sample in enumerate(samples))
            play = replace(play, episodes=tuple(play.episodes[i] for i in kept), solver=solver)
        episodes, metrics = update(run, play)
        found.append((metrics, solver_state(run)))
        if gates:
            assert metrics["gate/kept"] == len(kept) / len(solved)
            assert metrics["gate/hopeless"] == np.mean([fraction < 0.5 for fraction in fractions])
            assert metrics["gate/unanimous"] == np.mean([fraction > 0.9 for fraction in fractions])
            assert metrics["sampler_gap/solver"] < 1e-4
            for i in solved:  # what taught nothing had no advantage
                assert all((t.advantage is not None) == (i in kept) for t in episodes[i].trajectories)
    (gated, ours), (plain, theirs) = found
    assert any(tensor.any() for name, tensor in ours.items() if "lora_B" in name)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    solver = [name for name in plain if name.endswith("/solver")]
    assert "loss/solver" in solver
    assert [gated[name] for name in solver] == [plain[name] for name in solver]


def test_where_no_group_passes_the_solver_waits_and_the_proposer_goes_on(data: Path, tmp_path: Path):
    # A group of three has a majority fraction of 0, 1/3, 2/3 or 1.
    options = flags(data, gate_low="0.8", gate_high="0.9", steps="4", probe_every="0", save_every="0")
    out = tmp_path / "run"
    outcome = start(resolve(options | {"eval_data": None}), out)
    assert (outcome.step, outcome.complete) == (4, True)
    for record in read_records(out / "metrics.jsonl"):
        assert record["gate/kept"] == 0
        assert record["gate/hopeless"] + record["gate/unanimous"] == pytest.approx(1)
        assert "loss/solver" not in record
        assert "reward/solver/total" in record
    last = out / "checkpoints" / "step-000004"
    solver = load_file(last / "solver" / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in solver.items() if "lora_B" in name)
    assert not (out / "solver").exists()  # it is no result
    state = json.loads((last / "state.json").read_text())["learners"]
    assert (state["solver"]["kl_coef"], state["solver"]["baseline"]) == (1e-3, None)
    assert load_file(last / "optimizer-solver.safetensors") == {}
    assert load_file(last / "optimizer-proposer.safetensors") != {}


def test_a_gate_that_nothing_can_pass_is_refused(data: Path):
    with pytest.raises(ConfigError, match=r"--gate-low 0\.9 is above --gate-high 0\.5"):
        resolve(flags(data, gate_low="0.9", gate_high="0.5"))


def test_by_default_every_group_is_kept(reference: Path):
    for record in read_records(reference / "metrics.jsonl"):
        if "loss/solver" in record:
            assert (record["gate/kept"], record["gate/hopeless"], record["gate/unanimous"]) == (1, 0, 0)


# --- the watch --------------------------------------------------------------------------------------------------------

# A rate that destroys the solver within a few steps.
RUIN = {"learning_rate": "1.4e-2", "steps": "12", "watch_window": "2", "blank_every": "1", "probe_every": "0"}
RUIN |= {"save_every": "1", "keep_checkpoints": "1", "eval_questions": "2"}


@pytest.fixture(scope="module")
def handed_over() -> list[dict[str, torch.Tensor]]:
    """The solver's adapter at each time that the engine of the run `ruined` was told to take it over."""
    return []


@pytest.fixture(scope="module")
def ruined(data: Path, tmp_path_factory: pytest.TempPathFactory, handed_over: list[dict[str, torch.Tensor]]) -> Path:
    """A run that collapsed and went back, uninterrupted."""

    def refresh(engine: LiveEngine) -> None:
        handed_over.append({name: p.detach().clone() for name, p in engine.policy.parameters("solver").items()})

    out = tmp_path_factory.mktemp("ruined") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveEngine, "refresh", refresh)
        printed = complete(data, out, ENDED_ITSELF, **RUIN)
    assert "The run ends itself and goes back to step" in printed
    return out


def last_checkpoint(run: Path) -> str:
    return str(max((run / "checkpoints").glob("step-*[0-9]")).relative_to(run))


def test_a_collapsing_run_ends_itself_and_publishes_the_checkpoint_from_before(ruined: Path):
    summary = json.loads((ruined / "summary.json").read_text())
    assert summary["stopped_early"] is True
    assert summary["steps"] < 12
    assert summary["best_step"] <= summary["steps"] - 2
    best, newest = ruined / "checkpoints" / f"step-{summary['best_step']:06d}", ruined / last_checkpoint(ruined)
    published, kept, last = (
        [(folder / role / "adapter_model.safetensors").read_bytes() for role in ROLES]
        for folder in (ruined, best, newest)
    )
    assert published == kept
    assert published != last  # where nothing can be read any more, the proposer alone may still have learned
    *earlier, event = read_records(ruined / "events.jsonl")  # how far a run has gone by then depends on the machine
    assert all(warning["text"].startswith("Warning: ") for warning in earlier)
    assert event["step"] == summary["steps"]
    assert summary["reason"] in event["text"]
    assert f"goes back to step {summary['best_step']}" in event["text"]
    assert summary["reason"].split(" (")[0] in (ruined / "report.html").read_text()
    metrics = list(read_records(ruined / "metrics.jsonl"))
    assert len(metrics) == summary["steps"]
    assert metrics[0]["watch/majority_fraction"] == metrics[0]["answers/majority_fraction"]
    assert 0 <= metrics[0]["watch/blank_survival"] <= 1


def test_the_engine_takes_over_the_adapters_that_a_run_goes_back_to(
    ruined: Path, handed_over: list[dict[str, torch.Tensor]]
):
    published = load_file(ruined / "solver" / "adapter_model.safetensors")
    last = {name.replace(".solver.", "."): tensor for name, tensor in handed_over[-1].items()}
    assert published.keys() == last.keys()
    assert all(torch.equal(published[name], last[name]) for name in last)


# Nothing that is cut off after so few tokens can be read.
DEAD = {"max_solution_tokens": "6", "steps": "40", "images_per_step": "1", "group_size": "2", "blank_every": "0"}
DEAD |= {"probe_every": "0", "save_every": "0", "eval_questions": "2", "watch_window": "50"}


def test_a_run_that_is_dead_from_the_start_says_so_and_publishes_nothing(data: Path, tmp_path: Path):
    out = tmp_path / "run"
    printed = complete(data, out, ENDED_ITSELF, **DEAD)
    assert "Warning: hardly any solution can be read (readable 0, since step 1). Most texts of this step" in printed
    assert "goes back to step 0: hardly any solution can be read" in printed
    assert "max_solution_tokens is 6, not 112: solutions that are cut off cannot be read" in printed
    assert "adapters: none" in printed
    assert not any((out / role).exists() for role in ROLES)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["best_step"], summary["trained_roles"]) == (15, 0, [])
    assert summary["after"] is None
    report = (out / "report.html").read_text()
    assert "It went wrong: hardly any solution can be read" in report
    assert "max_solution_tokens is 6, not 112" in report
    assert "hardly any solution can be read" in " ".join(run_here("runs", str(tmp_path))[1].split())
    code, said = run_here("eval", str(out), "--data", str(data / "held-out.jsonl"), "--limit", "1")
    assert code == 0
    assert "learned nothing and has no adapter: its model tiny is scored" in said


def test_a_short_run_that_learned_nothing_is_not_called_healthy(data: Path, tmp_path: Path):
    out = tmp_path / "run"
    printed = complete(data, out, ENDED_ITSELF, **{**DEAD, "steps": "2"})
    assert "Nothing was learned: the solver is still the model that the run started from." in printed
    assert "Nothing was learned" in (out / "report.html").read_text()
    assert "nothing was learned" in run_here("runs", str(tmp_path))[1]


@pytest.mark.slow
def test_without_the_watch_the_same_run_goes_on(data: Path, ruined: Path, tmp_path: Path):
    ended = json.loads((ruined / "summary.json").read_text())["steps"]
    options = flags(data, **{**RUIN, "steps": str(ended + 1)}, watch="false") | {"eval_data": None}
    outcome = start(resolve(options), tmp_path / "run")
    assert outcome.summary is not None
    assert (outcome.step, outcome.summary["stopped_early"], outcome.summary["reason"]) == (ended + 1, False, None)
    assert outcome.summary["best_step"] == ended + 1


@pytest.mark.usefixtures("no_report")
@pytest.mark.slow
def test_interrupted_and_killed_it_ends_itself_at_the_same_step_in_the_same_way(
    data: Path, ruined: Path, tmp_path: Path
):
    out, ended = tmp_path / "run", json.loads((ruined / "summary.json").read_text())["steps"]
    config = resolve(flags(data, **RUIN))

    def interrupt(step: int, metrics: object, episodes: object) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    def die(step: int, metrics: object, episodes: object) -> None:
        if step == ended:
            raise RuntimeError("as if killed")

    def die_late(which: str, done: int, total: int) -> None:
        if which == "after":
            raise RuntimeError("as if killed")

    assert not start(config, out, Observer(on_step=interrupt)).complete
    for observer in (Observer(on_step=die), Observer(on_evaluation=die_late)):
        with pytest.raises(RuntimeError, match="as if killed"):
            resume(config, out, observer)
    complete(data, out, ENDED_ITSELF)
    last = last_checkpoint(ruined)
    ours, theirs = contents(out, last), contents(ruined, last)
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert resume(config, out).step == ended


@pytest.mark.slow
def test_it_goes_back_further_where_the_best_checkpoint_is_damaged(data: Path, ruined: Path, tmp_path: Path):
    best = json.loads((ruined / "summary.json").read_text())["best_step"]
    out = tmp_path / "run"

    def damage(message: str) -> None:
        if "ends itself" in message:
            (out / "checkpoints" / f"step-{best:06d}" / "solver" / "adapter_model.safetensors").write_bytes(b"")

    config = resolve(flags(data, **{**RUIN, "keep_checkpoints": "0"}) | {"eval_data": None})
    if best == 0:
        with pytest.raises(RunError, match="no sound checkpoint to go back to"):
            start(config, out, Observer(on_message=damage))
        return
    summary = start(config, out, Observer(on_message=damage)).summary
    assert summary is not None
    assert summary["best_step"] == best - 1
    assert f"step-{best:06d}" in list(read_records(out / "events.jsonl"))[-1]["text"]


# --- what a finished run holds ----------------------------------------------------------------------------------------


def test_the_run_directory_holds_what_it_should_and_nothing_else(reference: Path):
    files = {"config.yaml", "metrics.jsonl", "episodes.jsonl", "probes.jsonl", "skipped.jsonl", "summary.json"}
    folders = {"checkpoints", "images", "solver", "proposer"}
    files |= {"before.json", "versions.json", "images.txt", "report.html", "curves.png", ".lock"}
    assert {path.name for path in reference.iterdir()} == files | folders
    # The two newest, as asked for, and one that the watch may want to go back to.
    assert {path.name for path in (reference / "checkpoints").iterdir()} == {
        "step-000000", "step-000003", "step-000004"
    }  # fmt: skip
    for role in ROLES:
        held = {path.name for path in (reference / role).iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= held
        assert not [
            name for name in held if name.endswith((".bin", ".pt", ".pkl"))
        ]  # nothing that runs code on loading
    assert load_config(reference / "config.yaml").optimizer.learning_rate == 3e-3


def test_the_summary_says_how_it_went(reference: Path):
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["steps"] == 4
    assert (summary["images"], summary["skipped_images"]) == (5, 1)
    assert summary["training_seconds"] > 0
    for package in ("ireasoner", "torch", "transformers", "peft"):
        assert summary["versions"][package] == metadata.version(package)
    for which in ("before", "after"):
        assert summary[which]["questions"] == 3  # --eval-questions 3 of the four
        assert 0 <= summary[which]["well_formed"] <= 1
    for measure, change in summary["difference"].items():
        after, before = summary["after"][measure]["mean"], summary["before"][measure]["mean"]
        assert change["mean"] == pytest.approx(after - before)
        assert change["low"] <= change["mean"] <= change["high"]
        assert 0 < change["p"] <= 1


def test_every_reward_can_be_worked_out_from_the_episode(reference: Path):
    weights = {record["step"]: record["step_weight"] for record in read_records(reference / "metrics.jsonl")}
    episodes = list(read_records(reference / "episodes.jsonl"))
    assert [episode["step"] for episode in episodes] == [1, 1, 2, 2, 3, 3, 4, 4]
    paid = 0
    for episode in episodes:
        group = episode["trajectories"]
        assert len(group) == (3 if episode["question"]["problem"] is None else 0)
        readable = [t for t in group if t["problem"] is None]
        weight = weights[episode["step"]]
        for t in group:
            share = sum(other["answer_key"] == t["answer_key"] for other in readable) / len(group)
            length = min(max((t["words_before_answer"] - 64) / 64, 0), 1)
            outcome = share**0.7 * (1 - 0.05 * length) if t["problem"] is None else 0.0
            assert t["parts"]["outcome"]["value"] == pytest.approx(outcome)
            assert 0 <= t["parts"]["step_agreement"]["value"] <= 1
            if not t["in_majority"]:
                assert t["parts"]["step_agreement"]["value"] == 0
            mixed = (1 - weight) * t["parts"]["outcome"]["value"] + weight * t["parts"]["step_agreement"]["value"]
            assert t["reward"] == pytest.approx(mixed, abs=1e-12)
            paid += t["reward"] > 0
        shares = np.array(
            [sum(t["answer_key"] == key for t in readable) for key in {t["answer_key"] for t in readable}]
        )
        entropy = float(-(shares / shares.sum() * np.log(shares / shares.sum())).sum()) if len(shares) else 0.0
        assert episode["answer_entropy"] == pytest.approx(entropy, abs=1e-12)
        worth = np.exp(-((entropy - 0.9) ** 2) / (2 * 0.35**2)) if len(readable) >= 2 else 0.0
        assert episode["proposer_reward"] == pytest.approx(worth)
    assert paid >= 4


def test_advantages_are_recorded_as_they_were_used(reference: Path):
    """The paper's: against a moving average that starts at the first batch's mean and moves once a step."""
    baseline: float | None = None
    for step in (1, 2, 3, 4):
        mine = [e for e in read_episodes(reference) if e.step == step and e.trajectories]
        rewards = [t.reward for e in mine for t in e.trajectories]
        mean = float(np.mean(rewards))
        baseline = mean if baseline is None else baseline
        advantages = [t.advantage for e in mine for t in e.trajectories]
        assert advantages == pytest.approx([reward - baseline for reward in rewards], abs=1e-6)
        baseline = 0.9 * baseline + 0.1 * mean
        proposals = [e.proposal for e in read_episodes(reference) if e.step == step]
        assert all((p is not None and p.advantage is not None) == (step % 2 == 0) for p in proposals)


def test_metrics_are_the_means_of_the_episodes(reference: Path):
    episodes = list(read_records(reference / "episodes.jsonl"))
    for record in read_records(reference / "metrics.jsonl"):
        mine = [episode for episode in episodes if episode["step"] == record["step"]]
        rewards = [t["reward"] for episode in mine for t in episode["trajectories"]]
        formed = [t["problem"] is None for episode in mine for t in episode["trajectories"]]
        assert record["reward/solver/total"] == pytest.approx(np.mean(rewards) if rewards else 0)
        assert record["well_formed/solver"] == pytest.approx(np.mean(formed) if formed else 0)
        assert record["reward/proposer/total"] == pytest.approx(np.mean([e["proposer_reward"] for e in mine]))


def test_every_played_image_has_its_thumbnail_and_every_skip_its_line(data: Path, reference: Path):
    played = {e["image"]: e["thumbnail"] for e in read_records(reference / "episodes.jsonl")}
    assert set(played) == {"a.png", "b.png", "c.png", "sub/d.png", "sub/e.png"}
    for name, thumbnail in played.items():
        assert thumbnail == f"images/{read_image(data / 'pool' / name)[1]}.png"
        with Image.open(reference / thumbnail) as image:
            assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(load_image(data / "pool" / name)))
    (skipped,) = read_records(reference / "skipped.jsonl")
    assert skipped["image"] == "sub/broken.jpg"
    assert skipped["reason"]


def test_probes_ask_the_same_questions_again(reference: Path):
    probes = list(read_records(reference / "probes.jsonl"))
    asked = {step: {p["image"]: p["question"] for p in probes if p["step"] == step} for step in (0, 2, 4)}
    assert len(probes) == sum(map(len, asked.values()))
    assert 1 <= len(asked[0]) <= 2
    assert asked[0] == asked[2] == asked[4]
    assert all((reference / p["thumbnail"]).is_file() for p in probes)


def test_no_probes_where_they_are_off(data: Path, tmp_path: Path):
    options = flags(data, steps="1", probe_every="0", max_solution_tokens="4")
    start(resolve(options | {"eval_data": None}), tmp_path / "run")
    assert lines(tmp_path / "run" / "probes.jsonl") == 0


@pytest.fixture(scope="module")
def own_policy(reference: Path) -> Policy:
    """The run's own policy, with its trained adapters."""
    config = load_config(reference / "config.yaml")
    policy = load_policy(config.model, config.backbone, device="cpu", seed=99)  # adapters are loaded over its draws
    policy.load_adapters(reference)
    return policy


@pytest.mark.parametrize("role", ROLES)
def test_plain_peft_loads_an_adapter_and_gives_the_runs_own_log_probabilities(
    data: Path, reference: Path, own_policy: Policy, role: str
):
    image = load_image(data / "pool" / "a.png")
    messages = proposer_messages("Ask.") if role == "proposer" else solver_messages("{question}", "What do you see?")
    text = "<think>Step 1: The red bar reaches 7.</think><answer>7</answer>"
    ids = own_policy.processor.tokenizer(text + "<|im_end|>", return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids, dtype=torch.bool)

    @torch.no_grad()
    def of_own(role: Any) -> torch.Tensor:
        prompts = build_prompts(own_policy, encode_images(own_policy, [image]), [messages])
        hidden = completion_hidden(own_policy, prompts, ids, mask, role)
        return own_policy.output_layer(hidden).log_softmax(-1).gather(-1, ids[0, :, None])[:, 0]

    with warnings.catch_warnings():  # PEFT asks transformers by a name that it has deprecated
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        plain = PeftModel.from_pretrained(load_backbone("tiny"), reference / role).eval()
    processor = load_processor("tiny")
    head = processor.apply_chat_template(messages, add_generation_prompt=True)
    batch = processor(images=[image], text=[f"{head}{text}<|im_end|>"], return_tensors="pt")
    with torch.no_grad():
        logits = plain(**batch).logits[0]
    assert torch.equal(batch["input_ids"][0, -ids.shape[1] :], ids[0])
    expected = logits[-ids.shape[1] - 1 : -1].log_softmax(-1).gather(-1, ids[0, :, None])[:, 0]
    assert torch.allclose(of_own(role), expected, atol=1e-4)
    assert not torch.allclose(of_own(role), of_own(None), atol=1e-2)  # training did something to be carried over


def test_every_published_adapter_has_a_card_with_the_summarys_numbers(reference: Path):
    summary = json.loads((reference / "summary.json").read_text())
    mean, low, high = (100 * summary["after"]["greedy"][name] for name in ("mean", "low", "high"))
    for role in ROLES:
        card = (reference / role / "README.md").read_text("utf-8")
        assert f"LoRA adapter of the {role}" in card
        assert f"| {mean:.1f} [{low:.1f}, {high:.1f}] |" in card
        for checkpoint in (reference / "checkpoints").glob("step-*"):
            card = (checkpoint / role / "README.md").read_text("utf-8")
            assert f"LoRA adapter of the {role}" in card
            assert f"steps: {int(checkpoint.name.removeprefix('step-'))} of " in card
            assert "is not known" in card  # nothing was measured of these


def test_evaluating_the_finished_run_gives_the_summarys_numbers(data: Path, reference: Path, tmp_path: Path):
    target = tmp_path / "scores.json"
    argv = ["eval", "tiny", str(reference), "--data", str(data / "held-out.jsonl"), "--limit", "3", "--seed", "5"]
    code, printed = run_here(*argv, "--device", "cpu", "--json", str(target))
    assert code == 0, printed
    summary, scores = json.loads((reference / "summary.json").read_text()), json.loads(target.read_text())
    assert scores["after"] == summary["after"]
    assert scores["models"] == ["tiny", str(reference)]
    # The run evaluated its backbone under its own lengths, plain `tiny` under the preset's: those may differ.
    assert scores["before"]["questions"] == 3


def test_no_evaluation_without_labels_and_a_frozen_proposer_stays_as_it_was(data: Path, tmp_path: Path):
    out = tmp_path / "run"
    options = flags(data, recipe="frozen-proposer", steps="2", proposer_every="1", probe_every="0", save_every="0")
    outcome = start(resolve(options | {"eval_data": None, "max_solution_tokens": "24"}), out)
    assert outcome.complete
    assert outcome.summary is not None
    assert (outcome.summary["before"], outcome.summary["after"], outcome.summary["difference"]) == (None, None, None)
    adapter = load_file(out / "checkpoints" / "step-000002" / "proposer" / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    assert not (out / "proposer").exists()  # it is no result
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-000000", "step-000002"}  # first and last


def test_the_oracle_pays_for_the_true_answer_and_asks_the_labelled_questions(data: Path, tmp_path: Path):
    out = tmp_path / "run"
    rng = np.random.default_rng(3)
    rows = []
    (tmp_path / "pool").mkdir()
    for index in range(2):
        picture = world.sample_picture(rng)
        world.draw(picture, world.sample_style("varied", rng), rng).save(tmp_path / "pool" / f"{index}.png")
        question = world.sample_question(picture, rng)
        rows.append({"image": f"pool/{index}.png", "question": question.text, "answer": question.answer})
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = flags(data, recipe="oracle", steps="2", images=str(tmp_path / "pool"), probe_every="0", save_every="0")
    start(resolve(options | {"labels": str(tmp_path / "labels.jsonl"), "eval_data": None}), out)
    truths = {row["question"]: row["answer"] for row in rows}
    episodes = list(read_records(out / "episodes.jsonl"))
    assert len(episodes) == 4
    for episode in episodes:
        assert episode["proposal"] is None
        truth = truths[episode["question"]["text"]]
        for t in episode["trajectories"]:
            assert t["reward"] == float(t["answer"] is not None and t["answer"].strip().lower() == truth.lower())


def test_a_run_directory_names_no_place_of_its_own(reference: Path):
    """So that it may be moved."""
    for path in reference.rglob("*.json*"):
        assert str(reference) not in path.read_text("utf-8")
