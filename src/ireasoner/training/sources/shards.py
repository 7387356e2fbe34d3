"""Images in tar files, as WebDataset has them. Nothing is ever extracted, and only image members are read."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from itertools import pairwise
from typing import IO, NamedTuple

import numpy as np

from ireasoner.training.images import ImageError, UnreachableError, printable, reason_of, require_at_most
from ireasoner.training.sources.files import Files
from ireasoner.training.sources.folder import is_hidden, named_like_an_image
from ireasoner.training.sources.source import Names

BLOCK = 512  # bytes of a header; contents are filled up to a multiple of it
MAX_NAME = 2**16  # bytes of a long name, and of the extended header that may hold it
_FILES = (b"0", b"\0", b"7")
_WITHOUT_CONTENTS = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders and pipes, whatever size they claim


class Member(NamedTuple):
    """Something in a tar file: its path there, whether it is a regular file, and where its contents are."""

    path: str
    is_file: bool
    offset: int
    size: int


class Shards:
    """The image files in tar files; an image's name is that of its tar file, a slash, and its path there.

    Each tar file is read once, from header to header, for where its images are.

    Raises:
        ImageError: one of them is no tar file, is damaged or ends early.
    """

    def __init__(self, files: Files) -> None:
        self._files, self.where, self.skipped = files, f"the shards {files.where}", dict[str, str]()
        found, shards, offsets, sizes = list[str](), array("i"), array("q"), array("q")
        for index, file in enumerate(files.names):
            for member in self._members(file):
                name = f"{file}/{printable(member.path)}"
                if not named_like_an_image(member.path) or any(map(is_hidden, member.path.split("/"))):
                    continue
                if not member.is_file:
                    self.skipped[f"{name} (byte {member.offset})"] = "a link, or not a regular file"
                    continue
                found.append(name)
                shards.append(index)
                offsets.append(member.offset)
                sizes.append(member.size)
        order = sorted(range(len(found)), key=found.__getitem__)
        twice = {i for before, i in pairwise(order) if found[before] == found[i]}
        self.skipped |= {f"{found[i]} (byte {offsets[i]})": "another file of the same name" for i in sorted(twice)}
        order = [i for i in order if i not in twice]
        self.names = Names.of(found[i] for i in order)
        self._places = [np.frombuffer(column, column.typecode)[order] for column in (shards, offsets, sizes)]

    def read(self, name: str, max_bytes: int) -> bytes:
        index = self.names.find(name)
        if index is None:  # removed since the run began
            raise FileNotFoundError(errno.ENOENT, "no such file in the shards")
        shard, offset, size = (int(column[index]) for column in self._places)
        require_at_most(max_bytes, size)
        with self._files.open(self._files.names[shard]) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise ValueError("the tar file ends early")
        return data

    def _members(self, name: str) -> Iterator[Member]:
        try:
            with self._files.open(name, streams=True) as file:
                yield from members(file)
        except UnreachableError:
            raise
        except (OSError, ValueError) as error:
            problem = f"Cannot read the tar file {name} of {self.where} ({reason_of(error)})"
            raise ImageError(f"{problem}: it is damaged or incomplete, or no such file; copy it again.") from error


def members(file: IO[bytes]) -> Iterator[Member]:
    """What is in a tar file, in order: POSIX (ustar and pax) or GNU.

    Python's `tarfile` would keep an object for each, and read a header of any length that a file claims.

    Raises:
        ValueError: it is damaged, compressed or no tar file, or ends early.
    """
    end = file.seek(0, 2)
    at, extended = 0, dict[str, bytes]()  # what is said of the next member by what comes before it
    while at < end:
        file.seek(at)
        header = file.read(BLOCK)
        if at == 0 and header.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
            raise ValueError("it is compressed: unpack it first, so that single images can be read")
        if len(header) < BLOCK:
            raise ValueError("it ends early")
        if not any(header):
            return
        if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise ValueError(f"there is no header at byte {at}")
        kind, size = header[156:157], int(extended.get("size") or _number(header[124:136]))
        size = 0 if kind in _WITHOUT_CONTENTS else size
        at, filled = at + BLOCK, -(-size // BLOCK) * BLOCK
        if size < 0 or at + filled > end:
            raise ValueError("it ends early")
        if kind in (b"L", b"x"):
            if size > MAX_NAME:
                raise ValueError(f"the name of {size} bytes at byte {at} is too long")
            data = file.read(size)
            extended |= {"path": data.rstrip(b"\0")} if kind == b"L" else _records(data)
        elif kind == b"S":
            raise ValueError("it holds a sparse file")
        elif kind not in (b"K", b"g"):
            path = extended.get("path") or _path(header)
            yield Member(path.decode("utf-8", "surrogateescape").removeprefix("./"), kind in _FILES, at, size)
            extended = {}
        at += filled


def _path(header: bytes) -> bytes:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _number(field: bytes) -> int:
    """A number of a header: in octal digits, or, if it is large, in bytes. Raises `ValueError` if it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") - (1 << 8 * len(field) - 1)
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _records(data: bytes) -> dict[str, bytes]:
    """The records of an extended header, each a line `LENGTH KEY=VALUE`. Raises `ValueError` if it is damaged."""
    found, at = dict[str, bytes](), 0
    while at < len(data):
        length = int(data[at : at + 20].partition(b" ")[0])
        key, is_record, value = data[at : at + length].partition(b" ")[2].partition(b"=")
        if length < 5 or not is_record:
            raise ValueError("an extended header is damaged")
        found[key.decode("utf-8", "replace")] = value.removesuffix(b"\n")
        at += length
    return found
