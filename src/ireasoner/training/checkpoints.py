"""Checkpoints that are written atomically and verified before they are used.

A checkpoint is a folder `step-000010/` whose `manifest.json` holds the size and SHA-256 of every other file. It is
written under a temporary name and renamed when it is complete, so a kill or a full disk leaves the older ones intact.
What the files are is the caller's choice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from ireasoner.method.types import UsageError

MANIFEST = "manifest.json"


class CheckpointError(UsageError):
    """A checkpoint could not be saved; the message says why."""


def save_checkpoint(
    root: Path, step: int, write: Callable[[Path], None], keep: int, spare: Collection[int] = ()
) -> Path:
    """Save a checkpoint, read it back, and then remove older ones.

    Damaged checkpoints are never removed. If the step has a checkpoint already, it stays where it holds the same files,
    and is otherwise renamed to `step-….damaged-1`.

    Args:
        root: folder of all checkpoints of a run.
        step: the step after which this one is saved.
        write: fills the folder that it is given.
        keep: how many of the newest checkpoints stay; 0 keeps all.
        spare: steps whose checkpoints stay in any case.

    Raises:
        CheckpointError: anything fails, `write` included.
    """
    final = root / f"step-{step:06d}"
    temporary = root / f".tmp-{final.name}-{os.getpid()}"
    try:
        clear_remains(root)
        temporary.mkdir(parents=True)
        write(temporary)
        apply_umask(temporary)
        _publish(temporary, final, step)
        if problem := verify_checkpoint(final):
            raise CheckpointError(f"it did not read back as written ({problem})")
        prune(root, step, keep, spare)
    except Exception as error:  # `write` belongs to the caller and may raise anything
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"saving {final} failed: {type(error).__name__}: {error}") from error
    return final


def verify_checkpoint(path: Path, *, reads_contents: bool = True) -> str | None:
    """None if a folder holds exactly the files of its manifest, unchanged; otherwise what is wrong with it.

    Without reading contents, files of the right size are taken to be unchanged.
    """
    try:
        found = _files(path, reads_contents)
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError, CheckpointError) as error:
        return f"it cannot be read: {error}"
    match manifest:
        case {"format_version": 1, "step": int(step), "files": dict(files)}:
            if path.name.startswith("step-") and path.name != f"step-{step:06d}":
                return f"{MANIFEST} is of step {step}"
        case _:
            return f"{MANIFEST} is not of format version 1"
    # The manifest's names are only compared and never opened: a forged one cannot point outside of the folder.
    for name in sorted(files.keys() | found.keys()):
        expected = files.get(name)
        if not reads_contents and isinstance(expected, dict):
            expected = {"size": expected.get("size")}
        if expected != found.get(name):
            return f"{name} is {found.get(name, 'missing')}, in {MANIFEST} it is {files.get(name, 'missing')}"
    return None


def newest_checkpoint(root: Path, at_most: int | None = None) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, or None; and every newer one, which is damaged, with its problem.

    Checkpoints of steps after `at_most` are ignored. A missing `root` holds no checkpoint, but one that cannot be
    listed raises `OSError`: taking it for empty would restart the run from nothing.
    """
    skipped: list[tuple[Path, str]] = []
    for step, path in _newest_first(root) if root.exists() else ():
        if at_most is not None and step > at_most:
            continue
        if (problem := verify_checkpoint(path)) is None:
            return path, skipped
        skipped.append((path, problem))
    return None, skipped


def _newest_first(root: Path) -> list[tuple[int, Path]]:
    name = re.compile(r"step-([0-9]{6}|[1-9][0-9]{6,11})")
    return sorted(((int(p.name[5:]), p) for p in root.iterdir() if name.fullmatch(p.name) and p.is_dir()), reverse=True)


def _files(folder: Path, reads_contents: bool = True) -> dict[str, dict[str, str | int]]:
    """Size and SHA-256 of every file in a folder except the manifest. A link or a special file is an error."""
    files: dict[str, dict[str, str | int]] = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{name} is a link or a special file")
        if path.is_file() and name != MANIFEST:
            files[name] = {"size": path.stat().st_size}
            if reads_contents:
                with path.open("rb") as file:
                    files[name]["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return files


def _publish(temporary: Path, final: Path, step: int) -> None:
    """Add the manifest to a finished folder and give the folder its final name."""
    manifest = json.dumps({"format_version": 1, "step": step, "files": _files(temporary)}, indent=1)
    with (temporary / MANIFEST).open("x", encoding="ascii") as file:  # fails if `write` made a file of this name
        file.write(manifest)
    # The contents must be on the disk before the name is: after a power cut, a file system may keep a later rename and
    # lose earlier writes. The folder itself is synced last, because its entries name the files.
    _fsync(*temporary.rglob("*"), temporary)
    if os.path.lexists(final):
        if verify_checkpoint(final) is None and (final / MANIFEST).read_text(encoding="ascii") == manifest:
            return shutil.rmtree(temporary)
        asides = (final.with_name(f"{final.name}.damaged-{i}") for i in range(1, 10**6))
        os.rename(final, next(aside for aside in asides if not os.path.lexists(aside)))
    os.rename(temporary, final)
    _fsync(final.parent, final.parent.parent)  # the new name, and the folder of checkpoints if this is the first one


def apply_umask(folder: Path) -> None:
    """Give the files in a folder the mode that the umask asks for; safetensors lets only their owner read them."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def clear_remains(root: Path) -> None:
    """Remove what a process that was killed left unfinished. Only for the process that writes the checkpoints."""
    for stale in root.glob(".tmp-step-*"):
        shutil.rmtree(stale, ignore_errors=True)


def prune(root: Path, step: int, keep: int, spare: Collection[int] = ()) -> None:
    """Remove the whole checkpoints older than `step`, but for the newest `keep - 1` and those of the steps in `spare`.

    Each was verified when it was saved. To hash gigabytes of them again at every save would take longer than a step,
    so that only the sizes of their files are looked at. With `keep` 0, all stay.
    """
    if keep <= 0:
        return
    found = [(other, path) for other, path in _newest_first(root) if other < step]
    older = [(other, path) for other, path in found if verify_checkpoint(path, reads_contents=False) is None]
    for path in [path for other, path in older[keep - 1 :] if other not in spare]:
        # Renamed first: a half-deleted folder under its own name would look like a damaged checkpoint.
        shutil.rmtree(path.rename(root / f".tmp-{path.name}-pruned"), ignore_errors=True)


def _fsync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
