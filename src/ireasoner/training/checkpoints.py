"""Checkpoints that are atomic, verified and exact; what they hold is the caller's, in safetensors and JSON.

A checkpoint is a folder `step-000010/` whose `manifest.json` has the size and SHA-256 of all other files. Written under
another name and renamed when complete, it leaves the earlier ones as they were if a kill or a full disk interrupts it.
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
    """A checkpoint could not be saved; the message says why in one sentence."""


def save_checkpoint(
    root: Path, step: int, write: Callable[[Path], None], keep: int, spare: Collection[int] = ()
) -> Path:
    """Save one checkpoint under `root` and return its folder; `write(folder)` fills the folder it is given.

    When it has been read back, complete older ones beyond the `keep` newest are removed (`keep` <= 0: none), but those
    of the steps in `spare`. A folder that already has this name stays if complete and the same, and is otherwise
    renamed `….damaged-1`; a damaged one is never deleted. Raises `CheckpointError` if anything fails, `write` included.
    """
    final = root / f"step-{step:06d}"
    temporary = root / f".tmp-{final.name}-{os.getpid()}"
    try:
        for stale in root.glob(".tmp-step-*"):  # a killed run's: never complete
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        _publish(temporary, final, step)
        if problem := verify_checkpoint(final):
            raise CheckpointError(f"it did not read back as written ({problem})")
        if keep > 0:
            _prune(root, step, keep, spare)
    except Exception as error:  # a named boundary: `write` is the caller's and may raise anything
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"saving {final} failed: {type(error).__name__}: {error}") from error
    return final


def verify_checkpoint(path: Path) -> str | None:
    """None if the folder holds exactly the files of its manifest, unchanged; otherwise what is wrong, in words."""
    try:
        found = _files(path)  # only these are opened, so a manifest that names a path elsewhere reads nothing there
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError, CheckpointError) as error:
        return f"it cannot be read: {error}"
    match manifest:
        case {"format_version": 1, "step": int(step), "files": dict(files)}:
            if path.name.startswith("step-") and path.name != f"step-{step:06d}":
                return f"{MANIFEST} is of step {step}"
        case _:
            return f"{MANIFEST} is not of format version 1"
    for name in sorted(files.keys() | found.keys()):
        if files.get(name) != found.get(name):
            return f"{name} is {found.get(name, 'missing')}, in {MANIFEST} it is {files.get(name, 'missing')}"
    return None


def newest_checkpoint(root: Path, at_most: int | None = None) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint under `root` that verifies (None: there is none), and each newer one with its problem.

    Those after the step `at_most` are passed over. A `root` that does not exist holds none; one that cannot be listed
    raises `OSError`, lest the run start anew.
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


def _files(folder: Path) -> dict[str, dict[str, str | int]]:
    """Size and SHA-256 of every file below `folder` but the manifest; a link or a device is an error."""
    files = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{name} is a link or a special file")
        if path.is_file() and name != MANIFEST:
            with path.open("rb") as file:
                files[name] = {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}
    return files


def _publish(temporary: Path, final: Path, step: int) -> None:
    """Write the manifest, bring all to the disk and rename; but not if the same checkpoint is there already."""
    manifest = json.dumps({"format_version": 1, "step": step, "files": _files(temporary)}, indent=1)
    with (temporary / MANIFEST).open("x", encoding="ascii") as file:  # "x": the name is ours, not the caller's
        file.write(manifest)
    _fsync(*temporary.rglob("*"), temporary)
    if os.path.lexists(final):
        if verify_checkpoint(final) is None and (final / MANIFEST).read_text(encoding="ascii") == manifest:
            return shutil.rmtree(temporary)
        asides = (final.with_name(f"{final.name}.damaged-{i}") for i in range(1, 10**6))
        os.rename(final, next(aside for aside in asides if not os.path.lexists(aside)))
    os.rename(temporary, final)
    _fsync(final.parent, final.parent.parent)  # the first save makes final.parent


def _prune(root: Path, step: int, keep: int, spare: Collection[int]) -> None:
    older = [(other, p) for other, p in _newest_first(root) if other < step and verify_checkpoint(p) is None]
    for path in [path for other, path in older[keep - 1 :] if other not in spare]:
        # renamed first: a kill must leave nothing that looks like a damaged checkpoint
        shutil.rmtree(path.rename(root / f".tmp-{path.name}-pruned"), ignore_errors=True)


def _fsync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
