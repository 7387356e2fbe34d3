"""The pool of unlabeled images: scans a folder, draws images in a seeded order, and reports every skip."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ireasoner.model.parallel import ALONE, Processes
from ireasoner.training.containers import begins_like_an_image
from ireasoner.training.images import (
    MAX_PIXELS,
    ImageError,
    UnreadableImageError,
    printable,
    quoted,
    read_image,
    reason_of,
)

EXTENSIONS = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff")
EXTENSIONS += (".avif", ".heic", ".heif", ".jp2", ".jxl")  # cannot be decoded; found so that they can be reported
SET_ASIDE = "an image of the evaluation data, set aside"  # the reason why it is passed over


class Item(NamedTuple):
    """What the model looks at: an RGB image, with its name in the pool and a hash of its file, for its thumbnail."""

    name: str
    image: Image.Image
    content_hash: str


class ImagePool:
    """All images below a folder, drawn epoch after epoch; the order depends on the seed and the epoch.

    An image's name is its path relative to the folder, with slashes. Names that are not printable are shown with
    Python's escapes. `ImagePool.scan` makes a pool.

    All processes of a run draw the same images: one that only some of them can read is skipped by all. So they must
    call `take` and `peek` alike.

    Args:
        folder: where the images lie.
        seed: seed of the order.
        paths: path of each image by its name.
        skipped: reason why a file or folder was passed over, by its name, in order of discovery.
        max_pixels: larger images are skipped.
        processes: the processes that draw together.
    """

    def __init__(
        self,
        folder: str,
        seed: int,
        paths: Mapping[str, str],
        skipped: dict[str, str],
        max_pixels: int,
        processes: Processes,
    ) -> None:
        self._folder, self._seed, self.paths, self.skipped = folder, seed, paths, skipped
        self._max_pixels, self._processes = max_pixels, processes
        self.names = sorted(paths)
        # A printable name holds no newline, so two different sets of names never give the same text.
        self._fingerprint = hashlib.sha256("\n".join(self.names).encode()).hexdigest()
        self._move_to(epoch=0, position=0)

    @classmethod
    def scan(
        cls,
        folder: str | os.PathLike[str],
        seed: int,
        max_pixels: int = MAX_PIXELS,
        processes: Processes = ALONE,
        held_out: Collection[str | os.PathLike[str]] = (),
    ) -> ImagePool:
        """Find the images below a folder: regular files, or links to one, with an image's extension or first bytes.

        Names that begin with a dot and `__MACOSX` are ignored. Links to folders are reported in `skipped`, and so are
        files with the same bytes as one of the `held_out` image files: the model must not train on these.

        Raises:
            ImageError: the folder is missing, cannot be read, is not a folder, holds no image or held-out ones alone,
                or does not hold the same images for all processes.
        """
        paths, skipped = _scan(os.fspath(folder))
        set_aside = _same_files(paths, held_out) if held_out else []
        if paths and len(set_aside) == len(paths):
            raise ImageError(
                f"All {len(paths)} images in the folder {quoted(folder)} belong to the evaluation data, which is not "
                "trained on: add other images, or evaluate on fewer."
            )
        for name in set_aside:
            del paths[name]
            skipped[name] = SET_ASIDE
        if not paths:
            seen = f" (skipped: {first_skips(skipped)})" if skipped else ""
            raise ImageError(f"No image in the folder {quoted(folder)}{seen}: point to a folder of images.")
        pool = cls(os.fspath(folder), seed, paths, skipped, max_pixels, processes)
        pool.share(processes)
        return pool

    def share(self, processes: Processes) -> None:
        """Draw together with these processes from now on.

        Raises:
            ImageError: they do not hold the same images.
        """
        self._processes = processes
        if len(set(processes.gather([self._fingerprint], processes.count))) > 1:
            raise ImageError(
                f"The processes of this run do not see the same images in {quoted(self._folder)}: give all machines "
                "the same folder, and wait until nobody copies into it."
            )

    def check_readable(self) -> None:
        """Raises `ImageError` if no image can be decoded. It stops at the first that can, and remembers none."""
        reasons: dict[str, str] = {}
        for name in self._epoch_order(0):
            try:
                read_image(self.paths[name], self._max_pixels)
                return
            except UnreadableImageError as error:
                reasons[name] = error.reason
        raise self._nothing_readable(reasons)

    def __len__(self) -> int:
        """The number of images that have not failed to decode so far."""
        return len(self.names) - sum(name in self.paths for name in self.skipped)

    @property
    def set_aside(self) -> int:
        """The number of images that are passed over because the evaluation data has the same."""
        return list(self.skipped.values()).count(SET_ASIDE)

    def take(self, n: int) -> list[Item]:
        """Draw the next `n` images. When all have been drawn, the next epoch begins and they come again.

        A file that cannot be decoded is skipped and never tried again. Raises `ImageError` if none can be decoded.
        """
        taken: list[Item] = []
        while len(taken) < n:
            if self._position == len(self._order):
                self._require_decodable()
                self._move_to(self._epoch + 1, position=0)
            name = self._order[self._position]
            self._position += 1
            if (item := self._load(name)) is not None:
                taken.append(item)
        return taken

    def peek(self, n: int) -> list[Item]:
        """The first `n` images of epoch 0, or all if there are fewer, without drawing them.

        Raises `ImageError` if none can be decoded.
        """
        loaded = (self._load(name) for name in self._epoch_order(0))
        items = list(islice((item for item in loaded if item is not None), n))
        self._require_decodable()
        return items

    def state(self) -> dict[str, Any]:
        """The position of the pool, for JSON. A hash stands for the names of the images, which can be many."""
        cursor = {"seed": self._seed, "epoch": self._epoch, "position": self._position}
        return cursor | {"fingerprint": self._fingerprint, "images": len(self.names), "skipped": dict(self.skipped)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to the position and the skips of a `state()`. A replaced file of the same name goes unnoticed.

        Raises `ImageError`, and changes nothing, if the seed or the names of the images are different.
        """
        if state["seed"] != self._seed:
            raise ImageError(
                f"The images of {quoted(self._folder)} were drawn with the seed {state['seed']}, not {self._seed}: "
                "resume with the same seed."
            )
        if state["fingerprint"] != self._fingerprint:
            raise ImageError(
                f"Images were added to, removed from or renamed in {quoted(self._folder)} since the run was saved, or "
                f"the evaluation data names others of them ({state['images']} images then, {len(self.names)} now), so "
                "that it cannot resume exactly: put both back as they were, or start a new run."
            )
        self.skipped = dict(state["skipped"])
        self._move_to(state["epoch"], state["position"])

    def _move_to(self, epoch: int, position: int) -> None:
        self._epoch, self._position, self._order = epoch, position, self._epoch_order(epoch)

    def _epoch_order(self, epoch: int) -> list[str]:
        # A run must resume under a later numpy, which keeps only a generator's raw bits stable across releases;
        # `Generator.permutation` may change. So the names are ordered by raw bits.
        bits = np.random.Philox(np.random.SeedSequence(self._seed, spawn_key=(epoch,))).random_raw(len(self.names))
        return [self.names[index] for index in np.argsort(bits, kind="stable")]

    def _load(self, name: str) -> Item | None:
        """An image that all processes have read alike; None if one of them could not, and from then on."""
        if name in self.skipped:
            return None
        item, found = None, {"hash": "", "reason": ""}
        try:
            item = Item(name, *read_image(self.paths[name], self._max_pixels))
            found["hash"] = item.content_hash
        except UnreadableImageError as error:
            found["reason"] = error.reason
        by_process = self._processes.gather([found], self._processes.count)
        reasons = [each["reason"] for each in by_process if each["reason"]]
        if not reasons and any(each["hash"] != by_process[0]["hash"] for each in by_process):
            reasons = ["the processes of the run read different bytes"]
        if reasons:
            self.skipped[name] = reasons[0]
            return None
        return item

    def _require_decodable(self) -> None:
        if len(self) == 0:
            raise self._nothing_readable(self.skipped)

    def _nothing_readable(self, reasons: Mapping[str, str]) -> ImageError:
        return ImageError(
            f"None of the {len(self.names)} images in {quoted(self._folder)} can be decoded "
            f"({first_skips(reasons)}): point to a folder of readable images."
        )


def set_aside_line(count: int) -> str:
    """How many images the pool shares with the evaluation data, as a sentence."""
    return f"Images of the evaluation data that are set aside and not trained on: {count}."


def first_skips(skipped: Mapping[str, str]) -> str:
    """The first three skips and their reasons, and the number of the others."""
    first = "; ".join(f"{name}: {reason}" for name, reason in islice(skipped.items(), 3))
    return f"{first}; and {len(skipped) - 3} more" if len(skipped) > 3 else first


def _scan(folder: str) -> tuple[dict[str, str], dict[str, str]]:
    """The paths of all images below a folder by name, and the reasons for what was skipped, by name."""
    paths: dict[str, str] = {}
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
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            relative, named_image = prefix + entry.name, entry.name.lower().endswith(EXTENSIONS)
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
                paths[printable(relative)] = entry.path
            elif named_image:  # opening a pipe, a socket or a device could block for ever
                skipped[printable(relative)] = "not a regular file"
    return paths, skipped


def _same_files(paths: Mapping[str, str], others: Collection[str | os.PathLike[str]]) -> list[str]:
    """The names of the files that have the same bytes as one of the others. Only files of equal sizes are read.

    Raises `ImageError` if a file cannot be read: whether the model may train on it is then not known.
    """
    others_of_size = defaultdict[int, list[str | os.PathLike[str]]](list)
    try:
        for other in others:
            others_of_size[os.path.getsize(other)].append(other)
        sizes = {name: size for name, path in paths.items() if (size := os.path.getsize(path)) in others_of_size}
        digests = {_digest(other) for size in set(sizes.values()) for other in others_of_size[size]}
        return [name for name in sizes if _digest(paths[name]) in digests]
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
