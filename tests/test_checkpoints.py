import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ireasoner.training.checkpoints import (
    CheckpointError,
    newest_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)


def writer(step: int, size: int = 8) -> Callable[[Path], None]:
    """Files as a run writes them, in subfolders too, all derived from `step`."""

    def write(folder: Path) -> None:
        (folder / "solver").mkdir()
        save_file({"weight": torch.full((size,), float(step))}, folder / "solver" / "adapter.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": step, "baseline": step / 3}))

    return write


def save_steps(root: Path, *steps: int, keep: int = 0) -> None:
    for step in steps:
        save_checkpoint(root, step, writer(step), keep)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def loaded_step(folder: Path) -> int:
    step = json.loads((folder / "state.json").read_text())["step"]
    assert load_file(folder / "solver" / "adapter.safetensors")["weight"].eq(step).all()
    return step


# --- saving, finding, pruning -----------------------------------------------------------------------------------------


def test_what_is_saved_is_found_and_verified(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    path = save_checkpoint(root, 10, writer(10), keep=3)
    assert path == root / "step-000010"
    assert newest_checkpoint(root) == (path, [])
    assert names(root) == ["step-000010"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format_version"], manifest["step"]) == (1, 10)
    assert set(manifest["files"]) == {"solver/adapter.safetensors", "state.json"}
    assert manifest["files"]["state.json"]["size"] == (path / "state.json").stat().st_size


def test_no_checkpoints_and_a_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") == (None, [])
    assert newest_checkpoint(tmp_path) == (None, [])
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        newest_checkpoint(tmp_path / "file")


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    save_steps(tmp_path, 1_000_000, 999_999, 0, 9)
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "step-1000000"
    save_steps(tmp_path, 1_000_001, keep=2)
    assert names(tmp_path) == ["step-1000000", "step-1000001"]


def test_other_names_are_ignored(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    others = ["step-7", "step-0000009", "step-000009.damaged-1", "step-", "step-abcdef", "best", "step-٠٠٠٠٠٩"]
    for name in others:
        shutil.copytree(tmp_path / "step-000005", tmp_path / name)
    (tmp_path / "step-000008").write_text("a file")
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-000005", [])
    save_steps(tmp_path, 6, keep=1)
    assert set(names(tmp_path)) == {*others, "step-000008", "step-000006"}


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (4, [1, 2, 3, 4]), (0, range(5)), (-1, range(5))])
def test_pruning_keeps_the_newest(tmp_path: Path, keep: int, left: list[int]) -> None:
    save_steps(tmp_path, *range(5), keep=keep)
    assert names(tmp_path) == [f"step-{step:06d}" for step in left]


def test_pruning_counts_and_removes_complete_ones_only(tmp_path: Path) -> None:
    save_steps(tmp_path, 0, 1, 2, 3)
    for step in (0, 2):
        (tmp_path / f"step-{step:06d}" / "state.json").unlink()
    save_steps(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-000000", "step-000002", "step-000003", "step-000004"]


def test_a_newer_checkpoint_survives_saving_an_older_step(tmp_path: Path) -> None:
    save_steps(tmp_path, 8, 9)
    save_steps(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step-000005", "step-000008", "step-000009"]


def test_nothing_is_pruned_before_the_new_one_has_been_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 1, 2)
    rename = os.rename

    def damaging_rename(source: Path, target: Path) -> None:
        rename(source, target)
        (Path(target) / "state.json").write_text("{}")

    monkeypatch.setattr(os, "rename", damaging_rename)
    with pytest.raises(CheckpointError, match="did not read back"):
        save_steps(tmp_path, 3, keep=1)
    path, [(skipped, _)] = newest_checkpoint(tmp_path)
    assert (path, skipped) == (tmp_path / "step-000002", tmp_path / "step-000003")
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    for name in (".tmp-step-000004-123", ".tmp-step-000001-pruned"):
        (tmp_path / name / "solver").mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == (None, [])
    save_steps(tmp_path, 5)
    assert names(tmp_path) == ["step-000005"]


def test_saving_the_same_again_keeps_what_is_there(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    inode = (tmp_path / "step-000005").stat().st_ino
    save_steps(tmp_path, 5)
    assert names(tmp_path) == ["step-000005"]
    assert (tmp_path / "step-000005").stat().st_ino == inode


def test_a_damaged_or_different_one_of_the_same_step_moves_aside(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    save_checkpoint(tmp_path, 5, writer(6), keep=1)
    (tmp_path / "step-000005" / "state.json").write_text("{}")
    (tmp_path / "step-000009").write_text("a file in the way")
    save_steps(tmp_path, 5, 9, keep=1)
    assert names(tmp_path) == ["step-000005.damaged-1", "step-000005.damaged-2", "step-000009", "step-000009.damaged-1"]
    assert loaded_step(tmp_path / "step-000005.damaged-1") == 5
    assert loaded_step(tmp_path / "step-000009") == 9


# --- damage -----------------------------------------------------------------------------------------------------------


def link_inside(folder: Path) -> None:
    (folder / "solver" / "link").symlink_to(folder / "state.json")


def link_folder(folder: Path) -> None:
    shutil.copytree(folder / "solver", folder.parent / "elsewhere")
    shutil.rmtree(folder / "solver")
    (folder / "solver").symlink_to(folder.parent / "elsewhere")


def edit_manifest(edit: Callable[[dict], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        edit(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def point_outside(manifest: dict) -> None:
    manifest["files"]["../secret"] = manifest["files"].pop("state.json")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json"),
    "empty manifest": (lambda p: (p / "manifest.json").write_text(""), "cannot be read"),
    "half a manifest": (lambda p: os.truncate(p / "manifest.json", 40), "cannot be read"),
    "zeros": (lambda p: (p / "manifest.json").write_bytes(b"\0" * 200), "cannot be read"),
    "not UTF-8": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe\xfa"), "cannot be read"),
    "deep JSON": (lambda p: (p / "manifest.json").write_text("[" * 100_000), "cannot be read"),
    "a list": (lambda p: (p / "manifest.json").write_text("[]"), "format version"),
    "manifest is a folder": (
        lambda p: ((p / "manifest.json").unlink(), (p / "manifest.json").mkdir()),
        "cannot be read",
    ),
    "other format": (edit_manifest(lambda m: m.update(format_version=2)), "format version"),
    "other step": (edit_manifest(lambda m: m.update(step=7)), "of step 7"),
    "step in words": (edit_manifest(lambda m: m.update(step="2")), "format version"),
    "files a list": (edit_manifest(lambda m: m.update(files=[])), "format version"),
    "entry a number": (edit_manifest(lambda m: m["files"].update({"state.json": 3})), "state.json"),
    "path outside": (edit_manifest(point_outside), r"\.\./secret is missing"),
    "absolute path": (edit_manifest(lambda m: m["files"].update({"/etc/hostname": {}})), "/etc/hostname is missing"),
    "file missing": (lambda p: (p / "state.json").unlink(), "state.json is missing"),
    "folder missing": (lambda p: shutil.rmtree(p / "solver"), "adapter.safetensors is missing"),
    "file cut off": (lambda p: os.truncate(p / "solver" / "adapter.safetensors", 20), "adapter.safetensors"),
    "file longer": (
        lambda p: (p / "state.json").write_text('{"step": 2, "baseline": 0.6666666666666666} '),
        "state.json",
    ),
    "extra file": (lambda p: (p / "solver" / "extra").write_text(""), "extra is .*missing"),
    "link": (link_inside, "link is a link"),
    "linked folder": (link_folder, "solver is a link"),
    "device": (lambda p: os.mkfifo(p / "pipe"), "pipe is a link or a special file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_passed_over_and_left_where_it_is(tmp_path: Path, kind: str) -> None:
    save_steps(tmp_path, 1, 2)
    shutil.copy(tmp_path / "step-000002" / "state.json", tmp_path / "secret")
    damage, reason = DAMAGE[kind]
    damage(tmp_path / "step-000002")
    path, skipped = newest_checkpoint(tmp_path)
    assert path == tmp_path / "step-000001"
    assert loaded_step(path) == 1
    ((bad, said),) = skipped
    assert bad == tmp_path / "step-000002"
    assert re.search(reason, said), said
    left = os.listdir(bad)
    save_steps(tmp_path, 3, keep=1)
    assert os.listdir(bad) == left
    assert not (tmp_path / "step-000001").exists()


def test_a_flipped_bit_in_any_byte_is_noticed(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    for path in [p for p in (tmp_path / "step-000001").rglob("*") if p.is_file()]:
        good = path.read_bytes()
        for i in range(len(good)):
            path.write_bytes(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :])
            assert verify_checkpoint(tmp_path / "step-000001"), (path.name, i)
        path.write_bytes(good)
    assert verify_checkpoint(tmp_path / "step-000001") is None


def test_a_linked_checkpoint_folder_is_refused_and_never_removed(tmp_path: Path) -> None:
    save_steps(tmp_path / "other", 1)
    (tmp_path / "here").mkdir()
    link = tmp_path / "here" / "step-000001"
    link.symlink_to(tmp_path / "other" / "step-000001")
    assert newest_checkpoint(tmp_path / "here") == (None, [(link, "it cannot be read: . is a link or a special file")])
    save_steps(tmp_path / "here", 2, keep=1)
    assert names(tmp_path / "here") == ["step-000001", "step-000002"]
    assert newest_checkpoint(tmp_path / "other") == (tmp_path / "other" / "step-000001", [])


# --- failures and kills -----------------------------------------------------------------------------------------------


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    before = content(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyError("weight")

    def claim_manifest(folder: Path) -> None:
        (folder / "manifest.json").write_text("{}")

    for write in (fail, claim_manifest, link_into_folder):
        with pytest.raises(CheckpointError, match="step-000002 failed: ") as caught:
            save_checkpoint(tmp_path, 2, write, keep=1)
        assert caught.value.__cause__ is not None
        assert content(tmp_path) == before
        assert names(tmp_path) == ["step-000001"]


def link_into_folder(folder: Path) -> None:
    (folder / "link").symlink_to("/etc/hostname")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"):
        save_steps(tmp_path / "file" / "checkpoints", 1)


@pytest.mark.parametrize("limit", [0, 20, 4096, 100_000])
def test_a_file_that_outgrows_the_disk(tmp_path: Path, limit: int) -> None:
    save_steps(tmp_path, 1)
    before = content(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step-000002 failed: .*too large"):
            save_checkpoint(tmp_path, 2, writer(2, size=100_000), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(tmp_path) == before
    assert names(tmp_path) == ["step-000001"]


class Killed(BaseException):
    """Ends a save where it is, as a kill does: nothing is cleaned up."""


SYSTEM_CALLS = ("fsync", "rename", "mkdir", "rmdir", "unlink")


@pytest.mark.parametrize(
    ("failure", "after"),
    [(Killed(), False), (Killed(), True), (OSError(28, "No space left on device"), False)],
    ids=["killed before", "killed after", "full disk"],
)
def test_a_save_cut_short_at_any_system_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, after: bool
) -> None:
    save_steps(tmp_path / "template", 0, 1, 2)
    (tmp_path / "template" / "step-000002" / "state.json").write_text("{}")  # so that it has to move aside
    (tmp_path / "template" / ".tmp-step-000002-1").mkdir()
    countdown = -1
    for name in SYSTEM_CALLS:
        call = getattr(os, name)

        def fail_at_zero(*args: object, call: Callable = call, **options: object) -> object:
            nonlocal countdown
            countdown -= 1
            if countdown == 0 and not after:
                raise failure
            result = call(*args, **options)
            if countdown == 0:
                raise failure
            return result

        monkeypatch.setattr(os, name, fail_at_zero)

    outcomes = set()
    for n in range(1, 1000):
        root = tmp_path / f"{n}"
        shutil.copytree(tmp_path / "template", root)
        countdown = n
        try:
            save_checkpoint(root, 2, writer(2), keep=1)
            error = None
        except (Killed, CheckpointError) as caught:
            error = caught
        finished, countdown = countdown > 0, -1
        path, skipped = newest_checkpoint(root)
        assert path is not None
        assert loaded_step(path) == int(path.name[5:])
        assert loaded_step(path) == 2 or (root / "step-000000").is_dir()
        damaged = root / ("step-000002" if skipped else "step-000002.damaged-1")
        assert (damaged / "state.json").read_text() == "{}"
        if isinstance(error, CheckpointError):
            assert "No space left" in str(error)
            assert not list(root.glob(".tmp-step-000002-*"))
        outcomes.add((loaded_step(path), type(error).__name__))

        save_checkpoint(root, 3, writer(3), keep=1)  # whatever was left, the next save puts things right
        assert set(names(root)) - {damaged.name} == {"step-000003"}
        if finished:
            break
    assert finished
    assert {1, 2} == {step for step, _ in outcomes}


KILLED_SAVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from ireasoner.training.checkpoints import newest_checkpoint, save_checkpoint

root = Path(sys.argv[1])
random.seed(0)

def write(step):
    def fill(folder):
        for role in ("proposer", "solver"):
            (folder / role).mkdir()
            save_file({"weight": torch.full((64, 64), float(step))}, folder / role / "adapter.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": step}))
    return fill

def newest_step():
    path, skipped = newest_checkpoint(root)
    assert not skipped, skipped
    if path is None:
        return -1
    step = json.loads((path / "state.json").read_text())["step"]
    for role in ("proposer", "solver"):
        assert load_file(path / role / "adapter.safetensors")["weight"].eq(step).all()
    return step

for attempt in range(15):
    child = os.fork()
    if child == 0:
        try:
            step = newest_step()
            while True:
                step += 1
                save_checkpoint(root, step, write(step), keep=2)
        finally:
            os._exit(1)
    time.sleep(random.uniform(0.01, 0.15))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print(json.dumps({"step": newest_step(), "cut_short": any(root.glob(".tmp-*"))}))
"""


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_SAVER, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    steps = [kill["step"] for kill in kills]
    assert len(steps) == 15
    assert steps == sorted(steps)
    assert steps[-1] > 0
    assert sum(kill["cut_short"] for kill in kills) >= 5  # otherwise this shows little
    assert all(re.fullmatch(r"step-\d{6}|\.tmp-step-.*", name) for name in names(tmp_path))
