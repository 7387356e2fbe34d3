"""A folder of image files on this machine."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from ireasoner.training.containers import begins_like_an_image
from ireasoner.training.images import (
    ImageError,
    UnreadableImageError,
    path_of,
    printable,
    quoted,
    read_file,
    reason_of,
)
from ireasoner.training.sources.source import Names

EXTENSIONS = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff")
EXTENSIONS += (".avif", ".heic", ".heif", ".jp2", ".jxl")  # cannot be decoded; found so that they can be reported
SET_ASIDE = "an image of the evaluation data, set aside"  # the reason why it is passed over


def named_like_an_image(path: str) -> bool:
    return path.lower().endswith(EXTENSIONS)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is never looked at, such as the copies that macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


class Folder:
    """The images below a folder: regular files, or links to one, with an image's extension or first bytes.

    An image's name is its path relative to the folder, with slashes. Names that are not printable are shown with
    Python's escapes. Hidden names are ignored. Links to folders are reported in `skipped`, and so are files with the
    same bytes as one of the `held_out` image files: the model must not train on these.

    Raises:
        ImageError: the folder is missing, cannot be read, is not a folder, holds no image or held-out ones alone.
    """

    def __init__(self, folder: str, held_out: Collection[str | os.PathLike[str]] = ()) -> None:
        self._folder, self.where = folder, f"the folder {quoted(folder)}"
        found, self.skipped = scan(folder)
        set_aside = self._same_files(found, held_out) if held_out else set[str]()
        if found and len(set_aside) == len(found):
            raise ImageError(
                f"All {len(found)} images in {self.where} belong to the evaluation data, which is not trained on: add "
                "other images, or evaluate on fewer."
            )
        self.skipped |= {name: SET_ASIDE for name in found if name in set_aside}
        self.names = Names.of(name for name in found if name not in set_aside)

    def path(self, name: str) -> str:
        """The path of an image."""
        return os.path.join(self._folder, path_of(name))

    def paths(self, name: str) -> tuple[Path, ...]:
        """The files of an item, of which there is one."""
        return (Path(self.path(name)),)

    def read(self, name: str, max_bytes: int) -> bytes:
        if name not in self.names:  # it was removed before a run went on, or the run comes from somebody else
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return read_file(self.path(name), max_bytes)

    def _same_files(self, names: Collection[str], others: Collection[str | os.PathLike[str]]) -> set[str]:
        """The names of the files that have the same bytes as one of the others. Only files of equal sizes are read.

        Raises `ImageError` if a file cannot be read: whether the model may train on it is then not known.
        """
        others_of_size = defaultdict[int, list[str | os.PathLike[str]]](list)
        try:
            for other in others:
                others_of_size[os.path.getsize(other)].append(other)
            sized = ((name, os.path.getsize(self.path(name))) for name in names)
            sizes = {name: size for name, size in sized if size in others_of_size}
            digests = {_digest(other) for size in set(sizes.values()) for other in others_of_size[size]}
            return {name for name in sizes if _digest(self.path(name)) in digests}
        except OSError as error:
            raise UnreadableImageError(error.filename, reason_of(error)) from error


def scan(folder: str, also: tuple[str, ...] = ()) -> tuple[list[str], dict[str, str]]:
    """The names of all images below a folder, and of files that end so; the reasons for what was skipped, by name."""
    names: list[str] = []
    skipped: dict[str, str] = {}
    folders = [""]  # still to be scanned; a list and no recursion, because trees can be deeper than Python's stack
    while folders:
        prefix = folders.pop()
        try:
            with os.scandir(os.path.join(folder, prefix)) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except (OSError, ValueError) as error:
            if not prefix:
                problem = f"Cannot read the image folder {quoted(folder)} ({reason_of(error)})"
                raise ImageError(f"{problem}: check the path and its permissions.") from error
            skipped[printable(prefix)] = f"the folder cannot be read: {reason_of(error)}"
            continue
        for entry in entries:
            if is_hidden(entry.name):
                continue
            relative, named_image = prefix + entry.name, entry.name.lower().endswith((*EXTENSIONS, *also))
            try:
                mode = entry.stat().st_mode  # for a link, this is the mode of its target
            except OSError as error:
                skipped[printable(relative)] = reason_of(error)
                continue
            if stat.S_ISDIR(mode) and not entry.is_symlink():
                folders.append(relative + "/")
            elif stat.S_ISDIR(mode):  # following it could lead round in a circle, or across the whole disk
                skipped[printable(relative + "/")] = "a link to a folder, which is not followed"
            elif stat.S_ISREG(mode) and (named_image or _begins_like_an_image(entry.path)):
                names.append(printable(relative))
            elif named_image:  # opening a pipe, a socket or a device could block for ever
                skipped[printable(relative)] = "not a regular file"
    return names, skipped


def content_hashes(paths: Collection[str | os.PathLike[str]]) -> set[str]:
    """The `content_hash` of each file. Raises `UnreadableImageError` if one cannot be read."""
    try:
        return {_digest(path).hex()[:16] for path in paths}
    except OSError as error:
        raise UnreadableImageError(error.filename, reason_of(error)) from error


def _digest(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _begins_like_an_image(path: str) -> bool:
    """Whether the first bytes of a file are those of an image. False if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return begins_like_an_image(file.read(64))
    except OSError:
        return False
