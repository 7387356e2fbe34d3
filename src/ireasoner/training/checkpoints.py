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
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ireasoner.method.types import UsageError

MANIFEST = "manifest.json"


class CheckpointError(UsageError):
    """A checkpoint could not be saved, or does not fit the optimizer; the message says why in one sentence."""


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


def optimizer_tensors(optimizer: Optimizer, named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copy an AdamW's state out: tensors `exp_avg/<parameter name>` and so on, and a JSON value that goes with them.

    Raises `CheckpointError` if `named`, the parameters by name, lacks one of the optimizer's.
    """
    names = {parameter: name for name, parameter in named.items()}
    own = [names.get(parameter, "") for group in optimizer.param_groups for parameter in group["params"]]
    if "" in own:
        raise CheckpointError(f"{own.count('')} of the optimizer's {len(own)} parameters have no name")
    state = optimizer.state_dict()
    tensors = {f"{key}/{own[i]}": t.clone().contiguous() for i, s in state["state"].items() for key, t in s.items()}
    return tensors, {"groups": [{**g, "params": [own[i] for i in g["params"]]} for g in state["param_groups"]]}


def load_optimizer(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], named: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` took out, by parameter name: the state and the options (learning rate, …).

    Raises `CheckpointError`, with nothing changed, if names, groups, shapes or dtypes differ from the optimizer's.
    """
    groups, saved = optimizer_tensors(optimizer, named)[1]["groups"], meta["groups"]
    own = [name for group in groups for name in group["params"]]
    here, there = ({(name, i) for i, group in enumerate(some) for name in group["params"]} for some in (groups, saved))
    strangers = {name for name, _ in here ^ there}
    state: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        state.setdefault(name, {})[key] = tensor.clone()
        like = named[name] if name in own else None
        if like is None or (key != "step" and (tensor.shape, tensor.dtype) != (like.shape, like.dtype)):
            strangers.add(full_name)
    if strangers:
        raise CheckpointError(f"optimizer and checkpoint differ in {', '.join(sorted(strangers))}")
    for group, options in zip(groups, saved, strict=True):  # torch matches by position; JSON made the betas a list
        group.update({**options, "betas": tuple(options["betas"]), "params": [own.index(n) for n in group["params"]]})
    optimizer.load_state_dict({"state": {own.index(n): s for n, s in state.items()}, "param_groups": groups})


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
