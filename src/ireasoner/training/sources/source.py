"""What every kind of source offers: the names of its images in a fixed order, and the bytes of each."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np


class Names:
    """Different printable names in sorted order, kept as one text with a line for each.

    A million names take about 50 MB this way, and three times as much as a list of Python's strings.

    Args:
        text: the names in UTF-8, sorted, with a newline between each two. UTF-8 sorts as Python's strings do.
    """

    def __init__(self, text: bytes) -> None:
        self.text = text
        ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")) if text else np.empty(0, np.int64)
        self._starts = np.concatenate([[0], ends + 1]) if text else ends
        self._ends = np.append(ends, len(text)) if text else ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """From names in any order."""
        return cls("\n".join(sorted(names)).encode())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the text. A printable name holds no newline, so different sets of names have different texts."""
        return hashlib.sha256(self.text).hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> str:
        return self.text[self._starts[index] : self._ends[index]].decode()

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __contains__(self, name: str) -> bool:
        return self.find(name) is not None

    def find(self, name: str) -> int | None:
        """The place of a name; None if it is not among them."""
        index = bisect_left(self, name)
        return index if index < len(self) and self[index] == name else None

    def missing_from(self, others: Names) -> list[str]:
        """The names that are not among the others. Both are read side by side, so that neither is copied."""
        found, theirs = [], iter(others)
        other = next(theirs, None)
        for name in self:
            while other is not None and other < name:
                other = next(theirs, None)
            if name != other:
                found.append(name)
        return found


class ImageSource(Protocol):
    """Images of one kind of place.

    Attributes:
        where: the place for a message, as "the folder 'photos'".
        names: of all images. They are printable, and the same whenever the same place is opened.
        skipped: reason why a file or folder was passed over, by its name, in order of discovery.
    """

    where: str
    names: Names
    skipped: dict[str, str]

    def read(self, name: str, max_bytes: int) -> bytes:
        """The bytes of an image file.

        Raises:
            UnreachableError: nothing can be read from there at the moment.
            Exception: anything else that says why this image cannot be read, such as more than `max_bytes`.
        """
        ...
