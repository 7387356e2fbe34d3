"""Files of this machine or behind an address that fsspec knows, listed and read alike."""

from __future__ import annotations

import errno
import io
import os
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar, cast

from ireasoner.training.images import (
    RETRY_AFTER,
    ImageError,
    UnreachableError,
    path_of,
    printable,
    quoted,
    reason_of,
)
from ireasoner.training.sources.folder import is_hidden, named_like_an_image

ENDINGS = {
    "Parquet files": (".parquet", ".pq"),
    "Arrow files": (".arrow",),
    "tar files": (".tar",),
    "compressed archives": (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip"),
}

_Result = TypeVar("_Result")


def kind_of(name: str) -> str | None:
    """What a file is by its name: one of the kinds that `ENDINGS` names, or "images". None: something else."""
    lower = name.lower()
    found = next((kind for kind, endings in ENDINGS.items() if lower.endswith(endings)), None)
    return found or ("images" if named_like_an_image(lower) else None)


class Files:
    """The files below a folder, those that a pattern with `*` matches, or a single one.

    A file's name is its path relative to the folder, with slashes, as `printable` shows it. Hidden files are left out.

    Args:
        place: a path, or an address such as `s3://bucket/folder`.
        wanted: whether the file with this path, relative to the folder, is listed.

    Attributes:
        where: the place, for a message.
        names: of the files, sorted.
        is_remote: whether they are behind an address.

    Raises:
        ImageError: there is nothing at this place, or it cannot be read.
    """

    def __init__(self, place: str, wanted: Callable[[str], bool]) -> None:
        self.where, self.is_remote = quoted(place), "://" in place
        self._system, path = _connect(place if self.is_remote else os.path.abspath(place))
        try:
            self._folder, found = _patiently(place, lambda: _find(self._system, path, wanted))
        except OSError as error:
            raise ImageError(f"Cannot read the images in {self.where} ({reason_of(error)}): check the name.") from error
        self.names = sorted(map(printable, found))

    def path(self, name: str) -> str:
        """The path of a file in its file system."""
        return f"{self._folder}/{path_of(name)}"

    def open(self, name: str, *, streams: bool = False) -> IO[bytes]:
        """Open a file to read from; `streams`: from its beginning to its end, so that large pieces may be fetched.

        Raises:
            UnreachableError: also when the file is read, if nothing can be read from there at the moment.
            OSError: the file is missing or may not be read.
        """
        path, options = self.path(name), {} if streams else {"cache_type": "none"}
        if not self.is_remote:
            if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would block
                raise OSError(errno.EINVAL, "not a regular file")
            return open(path, "rb")
        file = _patiently(path, lambda: self._system.open(path, "rb", **options))
        return cast(IO[bytes], _Patient(path, file))


class _Patient(io.RawIOBase):
    """A remote file whose reads are tried again; what fails still is an `UnreachableError`."""

    def __init__(self, path: str, file: Any) -> None:
        self._path, self._file = path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        start = self._file.tell()

        def read() -> bytes:
            self._file.seek(start)  # an attempt that failed may have moved it
            return self._file.read(len(buffer))

        data = _patiently(self._path, read)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _connect(place: str) -> tuple[Any, str]:
    """The file system of a path or an address, and the path there.

    Raises:
        ImageError: no file system of this kind is known or installed.
    """
    import fsspec  # not needed for a folder of images
    from fsspec.core import url_to_fs

    if "://" not in place:
        return fsspec.filesystem("file"), place
    try:
        if "::" in place or place.startswith("reference:"):  # whose files are templates that can hold code
            raise ValueError("an address within another is not followed")
        system, path = url_to_fs(place, use_listings_cache=False)
        return system, path if path == "/" else path.rstrip("/")
    except ImportError as error:
        install = "for https://, pip install 'ireasoner[data]'"
        raise ImageError(f"Cannot read the images in {quoted(place)} ({reason_of(error)}): {install}.") from error
    except Exception as error:  # every file system has errors of its own
        raise ImageError(f"Cannot read the images in {quoted(place)} ({reason_of(error)}).") from error


def _find(system: Any, place: str, wanted: Callable[[str], bool]) -> tuple[str, list[str]]:
    """The folder of what lies at a place, and the paths of the wanted files relative to it."""
    folder, _, name = place.rpartition("/")
    if "*" in place:
        folder = place.partition("*")[0].rpartition("/")[0]
        return folder, [name for path in system.glob(place) if wanted(name := path[len(folder) + 1 :])]
    if wanted(name) and system.isfile(place):  # asked first, for over HTTP a file is downloaded to see if it is none
        return folder, [name]
    if not system.isdir(place):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    return place, list(_below(system, place, wanted))


def _below(system: Any, folder: str, wanted: Callable[[str], bool]) -> Iterator[str]:
    for found, _, names in system.walk(folder, on_error="raise"):
        prefix = [part for part in found[len(folder) :].split("/") if part]
        if not any(map(is_hidden, prefix)):
            paths = ("/".join([*prefix, name]) for name in names if name and not is_hidden(name))
            yield from filter(wanted, paths)


def _patiently(place: str, call: Callable[[], _Result]) -> _Result:
    """What a call returns that reads from a place. It is made again if it fails, as a network does for moments.

    Raises:
        UnreachableError: it fails every time.
        OSError: something is missing or may not be read.
    """
    for pause in (*RETRY_AFTER, None):
        try:
            return call()
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            raise
        except Exception as error:  # of any library
            if pause is None:
                problem = f"{quoted(place)} cannot be reached ({reason_of(error)})"
                raise UnreachableError(f"{problem}: check the address and the network, and go on later.") from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")
