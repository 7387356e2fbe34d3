"""The run directory: what happened, step by step, for people and reports to read.

Each `.jsonl` file holds one strict JSON object a line, in ASCII, with its `step`. NaN and infinities, which JSON lacks,
become null. Nothing here depends on time or process: a resumed run writes what an uninterrupted one would have.
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
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, Self

from PIL import Image
from pydantic import ValidationError

from ireasoner.method.types import Episode, ProbeAnswer, UsageError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

FILES = ("metrics.jsonl", "episodes.jsonl", "probes.jsonl", "skipped.jsonl", "events.jsonl")


class RunDirectoryError(UsageError):
    """The run directory cannot be written or read; the message says where and why in one sentence."""


class Recorder:
    """Writes into one run directory. Made by `Recorder.open`.

    Every method raises `RunDirectoryError` if the disk refuses; no part of a line is left behind then. In a run of
    several processes one records; the others have recorders that write nothing (`writes=False`).
    """

    def __init__(self, run_dir: Path, *, writes: bool) -> None:
        self.run_dir, self.writes = run_dir, writes
        self._paths = [run_dir / name for name in FILES] if writes else []
        self._skipped: set[str] = set()

    @classmethod
    def open(cls, run_dir: Path, *, writes: bool = True) -> Self:
        """Create the directory, cut off the lines that a killed process left unfinished, and know what was skipped."""
        recorder = cls(run_dir, writes=writes)
        if writes:
            with _boundary(run_dir):
                (run_dir / "images").mkdir(parents=True, exist_ok=True)
                for path in filter(Path.exists, recorder._paths):
                    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
            recorder._read_skipped()
        return recorder

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
        """Add an image that could not be used, unless it is there already."""
        if image not in self._skipped:
            self._append("skipped.jsonl", {"step": step, "image": image, "reason": reason})
            self._skipped.add(image)

    def event(self, step: int, text: str) -> None:
        """Add something that a person should know, such as a warning."""
        self._append("events.jsonl", {"step": step, "text": text})

    def thumbnail(self, image: Image.Image, key: str) -> str:
        """Save a PNG of at most 256 px a side (smaller images unchanged), once for each key; return its relative path.

        `key` stands for the image's content: 8 to 64 lower-case hexadecimal digits; anything else is a `ValueError`.
        """
        if not re.fullmatch(r"[0-9a-f]{8,64}", key):
            raise ValueError(f"not a content key: {key!r}")
        path = self.run_dir / "images" / f"{key}.png"
        if self.writes and not path.exists():
            small = image.convert("RGBA" if image.has_transparency_data else "RGB")
            small.thumbnail((256, 256))
            png = io.BytesIO()
            small.save(png, "PNG", icc_profile=None)
            _replace(path, png.getvalue())
        return f"images/{path.name}"

    def write_text(self, name: str, text: str) -> None:
        """Write a whole file, or replace it, in one go."""
        if self.writes:
            _replace(self.run_dir / name, text.encode())

    def sync(self) -> None:
        """Return when everything is on the disk; call it before a checkpoint, which counts on earlier records."""
        for path in filter(Path.exists, self._paths):
            with _boundary(path), path.open("rb") as file:
                os.fsync(file.fileno())

    def rewind(self, step: int) -> list[str]:
        """Drop all records after `step`, and damaged lines, each of which is named in one returned sentence."""
        damage: list[str] = []
        for path in filter(Path.exists, self._paths):
            _replace(path, b"".join(line for line, record in _lines(path, damage) if record["step"] <= step))
        if self.writes:
            self._read_skipped()
        return damage

    def _read_skipped(self) -> None:
        self._skipped = {record["image"] for record in read_records(self.run_dir / "skipped.jsonl")}

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if type(record.get("step")) is not int:
            raise ValueError(f"a record for {name} needs an int as its step, not {record.get('step')!r}")
        if not self.writes:
            return
        line = json.dumps(_plain(record), allow_nan=False).encode("ascii") + b"\n"
        with _boundary(self.run_dir / name), (self.run_dir / name).open("ab", buffering=0) as file:
            written = file.write(line)
            if written < len(line):  # a full disk took what fits: leave no part of a line
                file.truncate(file.tell() - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def writer_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run directory, which is created if it is missing: one process at a time trains there.

    The operating system releases the lock when the process ends, however it ends.

    Raises:
        RunDirectoryError: another process holds the lock, or the directory cannot be used.
    """
    with _boundary(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("ab")  # never truncated: it may be a link to some other file
    with file:
        for _ in range(10):  # a process that asks `is_locked` holds the lock for a moment
            with _boundary(run_dir):
                if _try_lock(file, exclusive=True):
                    break
            time.sleep(0.05)
        else:
            raise RunDirectoryError(f"another process is training in {run_dir}: wait for it or stop it")
        yield


def is_locked(run_dir: Path) -> bool:
    """Whether a process is training in a run directory; False where that cannot be found out."""
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
        if sys.platform == "win32":  # which knows exclusive locks only
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # the first byte, which need not exist
        else:
            fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # what POSIX and Windows raise for a lock that is held
        return False
    return True


def read_episodes(run_dir: Path) -> Iterator[Episode]:
    """The episodes of a run, in order.

    Raises:
        RunDirectoryError: a record that is no episode.
    """
    for record in read_records(run_dir / "episodes.jsonl"):
        try:
            yield Episode.model_validate(record)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            reason = f"a record of step {record['step']} is no episode ({where}: {error.errors()[0]['msg'].lower()})"
            raise RunDirectoryError(f"{run_dir / 'episodes.jsonl'}: {reason}") from None


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a `.jsonl` file (none if it is missing), without a last line that is still being written.

    Any other line that is no record is left out too, and named in a `UserWarning` after the last record.
    """
    damage: list[str] = []
    yield from (record for _, record in _lines(path, damage))
    for text in damage:
        warnings.warn(text, stacklevel=2)


def write_json(value: Any) -> str:
    """Strict JSON text for people to read; NaN and infinities become null."""
    return json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"


def _lines(path: Path, damage: list[str]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with _boundary(path), path.open("rb") if path.exists() else nullcontext(()) as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return  # a kill tore it, or its writer is not done
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and type(record.get("step")) is int:
                yield line, record
            else:
                damage.append(f"{path.name}, line {number}, is not a record and was left out")


def _plain(value: Any) -> Any:
    """`value` in dicts and lists, with None for the numbers that JSON cannot say."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace_file(path: Path, data: bytes) -> None:
    """Write a whole file, or replace it, in one go; whatever lies there is not followed anywhere. Raises `OSError`."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _replace(path: Path, data: bytes) -> None:
    with _boundary(path):
        replace_file(path, data)


@contextmanager
def _boundary(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(f"the run directory cannot be used: {path}: {error.strerror or error}") from error
