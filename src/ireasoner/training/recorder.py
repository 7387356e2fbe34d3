"""The run directory: records of what happened at each step, for people and reports to read.

Each `.jsonl` file holds one JSON object a line, in ASCII, with its `step`. JSON has no NaN and no infinities: they are
written as null. No record depends on the time or the process, except for the measured seconds in `metrics.jsonl` and
what `events.jsonl` tells of servers and of memory: a resumed run writes what an uninterrupted one would have written.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, Self, TypeGuard

from PIL import Image
from pydantic import ValidationError

from ireasoner.method.types import ROLES, Episode, ProbeAnswer, UsageError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

FILES = ("metrics.jsonl", "episodes.jsonl", "probes.jsonl", "skipped.jsonl", "events.jsonl")
VERSIONS = "versions.json"  # what the run began with: packages, and the commit of a model on the hub
LARGEST = 2**28  # bytes of a file of results that is read again


class RunDirectoryError(UsageError):
    """The run directory cannot be written or read; the message says where and why."""


class RunError(UsageError):
    """A run cannot start or continue; the message says why and what to do."""


class Recorder:
    """Writes into a run directory. Use `Recorder.open` to make one.

    Every method raises `RunDirectoryError` if the disk refuses, and then leaves no part of a line behind. In a run of
    several processes only the main one records; the recorders of the others have `writes=False` and write nothing.
    """

    def __init__(self, run_dir: Path, *, writes: bool) -> None:
        self.run_dir, self.writes = run_dir, writes
        self._skipped: set[str] = set()

    @classmethod
    def open(cls, run_dir: Path, *, writes: bool = True) -> Self:
        """Create the directory, or prepare one whose process was killed: a line that it did not finish is cut off."""
        recorder = cls(run_dir, writes=writes)
        recorder.prepare()
        return recorder

    def prepare(self) -> None:
        """Do to the directory what `open` does."""
        if self.writes:
            refuse_links(self.run_dir)
            with _boundary(self.run_dir):
                (self.run_dir / "images").mkdir(parents=True, exist_ok=True)
                for path in self._files():
                    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
            self._read_skipped()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Add one line of numbers, by names such as `reward/solver/outcome`."""
        self._append("metrics.jsonl", {"step": step, **{name: float(value) for name, value in values.items()}})

    def episode(self, episode: Episode) -> None:
        """Add an episode."""
        self._append("episodes.jsonl", episode.model_dump(mode="json"))

    def probe(self, answer: ProbeAnswer) -> None:
        """Add an answer to a probe question."""
        self._append("probes.jsonl", answer.model_dump(mode="json"))

    def skip(self, step: int, image: str, reason: str) -> None:
        """Add an image that could not be used, unless it is recorded already."""
        if image not in self._skipped:
            self._append("skipped.jsonl", {"step": step, "image": image, "reason": reason})
            self._skipped.add(image)

    def event(self, step: int, text: str) -> None:
        """Add something that the user should know, such as a warning."""
        self._append("events.jsonl", {"step": step, "text": text})

    def thumbnail(self, image: Image.Image, key: str) -> str:
        """Save an image of at most 768 pixels a side, unless it is there, and return its relative path.

        Up to 256 pixels a side it is a PNG, without loss; a larger one is a WebP, which of a photograph takes fewer
        bytes at 768 pixels than a PNG at 256. `key` identifies the image's content by 8 to 64 lower-case hexadecimal
        digits.
        """
        if not re.fullmatch(r"[0-9a-f]{8,64}", key):
            raise ValueError(f"not a content key: {key!r}")
        kind, options = ("png", {}) if max(image.size) <= 256 else ("webp", {"quality": 80, "method": 2})
        path = self.run_dir / "images" / f"{key}.{kind}"
        if self.writes and not path.exists():
            small = image.convert("RGBA" if image.has_transparency_data else "RGB")
            small.thumbnail((768, 768))
            file = io.BytesIO()
            small.save(file, kind, icc_profile=None, **options)
            with _boundary(path):
                replace_file(path, file.getvalue())
        return f"images/{path.name}"

    def write_text(self, name: str, text: str) -> None:
        """Write or replace a whole file atomically."""
        if self.writes:
            with _boundary(self.run_dir / name):
                replace_file(self.run_dir / name, text.encode())

    def remove(self, name: str) -> None:
        """Remove a whole file, if it is there."""
        if self.writes:
            with _boundary(self.run_dir / name):
                (self.run_dir / name).unlink(missing_ok=True)

    def sync(self) -> None:
        """Bring all records to the disk. A checkpoint relies on the records before it, so call this before saving."""
        for path in self._files():
            with _boundary(path), path.open("rb") as file:
                os.fsync(file.fileno())

    def rewind(self, step: int) -> list[str]:
        """Drop the records after `step`, which a resumed run will write again, and damaged lines.

        Returns:
            A sentence about each damaged line.
        """
        damage: list[str] = []
        for path in self._files():
            kept: list[bytes] = []
            for line, record in _lines(path, damage):
                try:
                    if path.name == "episodes.jsonl":
                        Episode.model_validate(record)
                except ValidationError as error:
                    damage.append(f"{path.name}: {_no_episode(record, error)} and was left out")
                    continue
                if record["step"] <= step:
                    kept.append(line)
            with _boundary(path):
                replace_file(path, b"".join(kept))
        if self.writes:
            self._read_skipped()
        return damage

    def gaps(self, step: int) -> list[str]:
        """A sentence about each file that should have a record of every step up to `step` and lacks some."""
        found = []
        for name in ("metrics.jsonl", "episodes.jsonl") if self.writes else ():
            held = {record["step"] for _, record in _lines(self.run_dir / name, [])}
            if missing := sorted(set(range(1, step + 1)) - held):
                found.append(f"{name} lacks {len(missing)} of {step} steps, the first of them {missing[0]}")
        return found

    def _files(self) -> list[Path]:
        """The files of records that exist; none if this recorder does not write."""
        return [self.run_dir / name for name in FILES if self.writes and (self.run_dir / name).exists()]

    def _read_skipped(self) -> None:
        records = _lines(self.run_dir / "skipped.jsonl", [])  # `rewind` tells of damage
        self._skipped = {record["image"] for _, record in records}

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if type(record.get("step")) is not int:
            raise ValueError(f"a record for {name} needs an int as its step, not {record.get('step')!r}")
        if not self.writes:
            return
        with _boundary(self.run_dir / name):
            append_record(self.run_dir / name, record)


def refuse_links(run_dir: Path) -> None:
    """A run directory may come from somebody else; what is written into it must not end up elsewhere.

    Raises:
        RunDirectoryError: something that a run writes to is a link, or is not of its kind: reading a named pipe would
            wait for ever.
    """
    for name in (*FILES, "images", "checkpoints", "tensorboard", *ROLES):
        path = run_dir / name
        if path.is_symlink():
            raise RunDirectoryError(f"{path} is a link, but a run writes into its own directory: remove it")
        if path.exists() and not (path.is_file() if name in FILES else path.is_dir()):
            raise RunDirectoryError(f"{path} is not a {'file' if name in FILES else 'folder'}: move it away")


@contextmanager
def writer_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run directory, so that only one process trains in it. A missing directory is created.

    The operating system releases the lock when the process ends, even if it is killed.

    Raises:
        RunDirectoryError: another process holds the lock, or the directory cannot be used.
    """
    with _boundary(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = run_dir / ".lock"
        if lock.exists() and not lock.is_file():  # opening a named pipe would wait for ever
            raise RunDirectoryError(f"{lock} is not a file: move it away")
        file = lock.open("ab")  # opened without truncating it: it may be a link to another file
    with file:
        for _ in range(10):  # `is_locked` of another process holds the lock for a moment
            with _boundary(run_dir):
                if _try_lock(file, exclusive=True):
                    break
            time.sleep(0.05)
        else:
            raise RunDirectoryError(f"another process is training in {run_dir}: wait for it or stop it")
        yield


def is_locked(run_dir: Path) -> bool:
    """Whether a process is training in a run directory; False if that cannot be found out."""
    lock = run_dir / ".lock"
    try:
        if not lock.is_file():
            return False
        with lock.open("rb") as file:
            return not _try_lock(file, exclusive=False)
    except OSError:  # unreadable, or on a file system without locks
        return False


def _try_lock(file: IO[bytes], exclusive: bool) -> bool:
    """Lock a file until it is closed; False if another process holds the lock."""
    try:
        if sys.platform == "win32":  # has exclusive locks only
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # locks the first byte, which need not exist
        else:
            fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # raised on POSIX and on Windows when the lock is held
        return False
    return True


def read_episodes(run_dir: Path) -> Iterator[Episode]:
    """The episodes of a run, in order.

    Raises:
        RunDirectoryError: a record is not an episode of this version.
    """
    for record in read_records(run_dir / "episodes.jsonl"):
        try:
            yield Episode.model_validate(record)
        except ValidationError as error:
            raise RunDirectoryError(f"{run_dir / 'episodes.jsonl'}: {_no_episode(record, error)}") from None


def _no_episode(record: Mapping[str, Any], error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"a record of step {record['step']} is no episode ({where}: {first['msg'].lower()})"


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a `.jsonl` file, or none if the file is missing.

    An unfinished last line is ignored. Other damaged lines are left out, with a `UserWarning` after the last record.
    """
    damage: list[str] = []
    yield from (record for _, record in _lines(path, damage))
    for text in damage:
        warnings.warn(text, stacklevel=2)


def append_record(path: Path, record: Mapping[str, Any], *, sync: bool = False) -> None:
    """Add a line to a `.jsonl` file, as a whole or not at all; `sync` brings it to the disk before this returns.

    Raises:
        OSError: the disk refuses.
    """
    line = json.dumps(_plain(record), allow_nan=False).encode("ascii") + b"\n"
    # Unbuffered: one write call, so that what was written is known when the disk is full.
    with path.open("ab", buffering=0) as file:
        written = file.write(line)
        if written < len(line):
            file.truncate(file.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if sync:
            os.fsync(file.fileno())


def read_json(file: Path, largest: int) -> dict[str, Any]:
    """The object in a JSON file of at most `largest` bytes; empty if the file is missing or is anything else.

    A named pipe, which would be waited for without end, is not opened.
    """
    with suppress(OSError, ValueError, RecursionError):
        if file.is_file() and file.stat().st_size < largest:
            found = json.loads(file.read_bytes())
            return found if isinstance(found, dict) else {}
    return {}


def write_json(value: Any) -> str:
    """Indented JSON text. NaN and infinities become null."""
    return json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"


def replace_file(path: Path, data: bytes) -> None:
    """Write or replace a file atomically: readers see all of the old contents or all of the new ones.

    A link of that name is replaced and never written through.

    Raises:
        OSError: the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # before the rename: a power cut could otherwise leave an empty file under the name
    temporary.replace(path)


def _lines(path: Path, damage: list[str]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a file with their records. A sentence about each damaged line is added to `damage`."""
    with _boundary(path), path.open("rb") if path.exists() else nullcontext(()) as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return  # still being written, or torn when its writer was killed
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if is_record(record, path.name):
                yield line, record
            else:
                damage.append(f"{path.name}, line {number}, is not a record and was left out")


def is_record(record: Any, name: str) -> TypeGuard[dict[str, Any]]:
    """Whether a line of one of `FILES` holds what a run writes there."""
    needed = {"skipped.jsonl": ("image", "reason"), "probes.jsonl": ("image", "question"), "events.jsonl": ("text",)}
    if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] <= 10**9:
        return False
    return all(isinstance(record.get(key), str) for key in needed.get(name, ()))


def _plain(value: Any) -> Any:
    """A copy of `value` made of dicts and lists, with None for NaN and infinities."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _boundary(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(f"the run directory cannot be used: {path}: {error.strerror or error}") from error
