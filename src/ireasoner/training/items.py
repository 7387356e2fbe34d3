"""The pool of unlabeled images: draws images in a seeded order from wherever they lie, and reports every skip."""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from ireasoner.model.parallel import ALONE, Processes
from ireasoner.model.views import View
from ireasoner.training.clips import Limits
from ireasoner.training.config import ItemKind
from ireasoner.training.images import (
    MAX_PIXELS,
    ImageError,
    UnreadableImageError,
    content_hash,
    image_from,
)
from ireasoner.training.labelled import LabelledQuestion
from ireasoner.training.sources.finding import open_source
from ireasoner.training.sources.folder import SET_ASIDE, Folder, content_hashes
from ireasoner.training.sources.groups import Groups
from ireasoner.training.sources.source import ImageSource, Names

Labels = Mapping[str, Sequence[LabelledQuestion]]  # by the names of the images that they are about
LISTING = "images.txt"  # the names of a run's images, in its directory


class Item(NamedTuple):
    """What the model looks at: an RGB image, several, or a clip, with its name in the pool and a hash of what was read
    of its files, for its thumbnail.

    `labels` are the labelled questions of which one is asked about it; where it has none, the proposer asks. Where
    several files were read, `file_hashes` are those of each.
    """

    name: str
    image: View
    content_hash: str
    labels: tuple[LabelledQuestion, ...] = ()
    file_hashes: tuple[str, ...] = ()


class ImagePool:
    """All images of a source, drawn epoch after epoch; the order depends on the seed and the epoch.

    All processes of a run draw the same images: one that only some of them can read is skipped by all. So they must
    call `take` and `peek` alike. `ImagePool.scan` makes a pool.

    Args:
        source: where the images lie.
        seed: seed of the order.
        max_pixels: larger images are skipped.
        processes: the processes that draw together.
        held_out: content hashes of the images that are set aside once they are drawn.

    Attributes:
        names: of all images.
        skipped: reason why a file or folder was passed over, by its name, in order of discovery.
    """

    def __init__(
        self, source: ImageSource, seed: int, max_pixels: int, processes: Processes, held_out: Collection[str] = ()
    ) -> None:
        self.source, self._seed, self._max_pixels, self._processes = source, seed, max_pixels, processes
        self.names, self.skipped, self._held_out = source.names, dict(source.skipped), frozenset(held_out)
        self._labels: Labels = {}
        self._fingerprint = self.names.fingerprint
        self._move_to(epoch=0, position=0)

    @classmethod
    def scan(
        cls,
        images: str | os.PathLike[str],
        seed: int,
        max_pixels: int = MAX_PIXELS,
        processes: Processes = ALONE,
        held_out: Collection[str | os.PathLike[str]] = (),
        column: str | None = None,
        items: ItemKind = "images",
        limits: Limits | None = None,
    ) -> ImagePool:
        """Find the images of a place, as `open_source` does. `limits` are of items of several images, `max_pixels`
        apart.

        Those with the same bytes as one of the `held_out` image files are set aside, for the model must not train on
        them: in a folder now, by comparing the files of equal sizes; elsewhere when they are drawn, because comparing
        them all would mean reading them all.

        Raises:
            ImageError: the place is missing, cannot be read, holds no image or held-out ones alone, or does not hold
                the same images for all processes.
        """
        limits = (limits or Limits())._replace(max_pixels=max_pixels)
        source = open_source(os.fspath(images), column, held_out, items, limits)
        if not source.names:
            seen = f" (skipped: {first_skips(source.skipped)})" if source.skipped else ""
            raise ImageError(f"No image in {source.where}{seen}: point to a folder of images.")
        hashes = () if isinstance(source, Folder) else content_hashes(held_out)
        pool = cls(source, seed, max_pixels, processes, hashes)
        pool.share(processes)
        return pool

    def labelled(self, labels: Labels) -> ImagePool:
        """A pool of those images of this one that have labelled questions, which are drawn with them."""
        part = copy.copy(self)
        part.names, part.skipped, part._labels = Names.of(labels), {}, labels
        part._fingerprint = part.names.fingerprint
        part._move_to(epoch=0, position=0)
        return part

    def share(self, processes: Processes) -> None:
        """Draw together with these processes from now on.

        Raises:
            ImageError: they do not hold the same images.
        """
        self._processes = processes
        if len(set(processes.gather([self._fingerprint], processes.count))) > 1:
            raise ImageError(
                f"The processes of this run do not see the same images in {self.source.where}: give all machines the "
                "same, and wait until nobody copies there."
            )

    def check_readable(self) -> None:
        """Raises `ImageError` if no image can be decoded. It stops at the first that can, and remembers none."""
        reasons: dict[str, str] = {}
        for name in (self.names[index] for index in self._epoch_order(0)):
            try:
                self._read(name)
                return
            except UnreadableImageError as error:
                reasons[name] = error.reason
        raise self._nothing_readable(reasons)

    def __len__(self) -> int:
        """The number of images that have not failed to decode so far."""
        return len(self.names) - sum(name in self.names for name in self.skipped)

    @property
    def set_aside(self) -> int:
        """The number of images, so far, that are passed over because the evaluation data has the same."""
        return list(self.skipped.values()).count(SET_ASIDE)

    @property
    def compares_when_drawing(self) -> bool:
        """Whether images of the evaluation data are set aside when they are drawn, and not before."""
        return bool(self._held_out)

    def take(self, n: int) -> list[Item]:
        """Draw the next `n` images. When all have been drawn, the next epoch begins and they come again.

        A file that cannot be decoded is skipped and never tried again. Raises `ImageError` if none can be decoded.
        """
        taken: list[Item] = []
        while len(taken) < n:
            if self._position == len(self._order):
                self._require_decodable()
                self._move_to(self._epoch + 1, position=0)
            name = self.names[self._order[self._position]]
            self._position += 1
            if (item := self._load(name)) is not None:
                taken.append(item)
        return taken

    def peek(self, n: int) -> list[Item]:
        """The first `n` images of epoch 0, or all if there are fewer, without drawing them.

        Raises `ImageError` if none can be decoded.
        """
        loaded = (self._load(self.names[index]) for index in self._epoch_order(0))
        items = list(islice((item for item in loaded if item is not None), n))
        self._require_decodable()
        return items

    def again(self, name: str) -> Item | None:
        """An image that was drawn before; None if it cannot be read any more, and it is skipped from then on."""
        return self._load(name)

    def state(self) -> dict[str, Any]:
        """The position of the pool, for JSON. A hash stands for the names of the images, which can be many."""
        cursor = {"seed": self._seed, "epoch": self._epoch, "position": self._position}
        cursor |= {"fingerprint": self._fingerprint, "images": len(self.names), "skipped": dict(self.skipped)}
        return cursor | ({"held_out": self._held_out_digest} if self.compares_when_drawing else {})

    def restore(self, state: Mapping[str, Any], listing: bytes = b"") -> list[str]:
        """Return to the position and the skips of a `state()`. A replaced file of the same name goes unnoticed.

        Args:
            state: of a pool with the same seed.
            listing: the names of that pool, as `names.text` holds them. With it, images may have been added since,
                which are left out, or removed, which are skipped when they are drawn.

        Returns:
            Sentences about what was added and removed.

        Raises:
            ImageError: the seed, the evaluation data or, without their listing, the names of the images are different;
                the pool is then as it was.
        """
        if state["seed"] != self._seed:
            raise ImageError(
                f"The images of {self.source.where} were drawn with the seed {state['seed']}, not {self._seed}: "
                "resume with the same seed."
            )
        names = self.names if state["fingerprint"] == self._fingerprint else Names(listing)
        if names.fingerprint != state["fingerprint"] or self._sets_others_aside(names, state):
            raise ImageError(
                f"Images were added to, removed from or renamed in {self.source.where} since the run was saved, or the "
                f"evaluation data names others of them ({state['images']} images then, {len(self.names)} now), so that "
                "it cannot resume exactly: put both back as they were, or start a new run."
            )
        told = [] if names is self.names else _changes(names, self.names, self.source.where)
        self.names, self._fingerprint, self.skipped = names, state["fingerprint"], dict(state["skipped"])
        self._move_to(state["epoch"], state["position"])
        return told

    def _sets_others_aside(self, names: Names, state: Mapping[str, Any]) -> bool:
        """Whether the evaluation data sets other images aside than it did when the pool had these names and state."""
        if self.compares_when_drawing or "held_out" in state:
            return state.get("held_out") != self._held_out_digest
        now = [name for name, reason in self.skipped.items() if reason == SET_ASIDE]
        then = [name for name, reason in state["skipped"].items() if reason == SET_ASIDE]
        return any(name in names for name in now) or any(name in self.names for name in then)

    @property
    def _held_out_digest(self) -> str:
        return hashlib.sha256("".join(sorted(self._held_out)).encode()).hexdigest()

    def _move_to(self, epoch: int, position: int) -> None:
        self._epoch, self._position, self._order = epoch, position, self._epoch_order(epoch)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """The places of the names in the order of an epoch."""
        # A run must resume under a later numpy, which keeps only a generator's raw bits stable across releases;
        # `Generator.permutation` may change. So the names are ordered by raw bits.
        bits = np.random.Philox(np.random.SeedSequence(self._seed, spawn_key=(epoch,))).random_raw(len(self.names))
        return np.argsort(bits, kind="stable")

    def _load(self, name: str) -> Item | None:
        """An image that all processes have read alike; None if one of them could not, and from then on."""
        if name in self.skipped:
            return None
        item, found = None, {"hash": "", "reason": ""}
        try:
            item = self._read(name)
            found["hash"] = item.content_hash
        except UnreadableImageError as error:
            found["reason"] = error.reason
        by_process = self._processes.gather([found], self._processes.count)
        reasons = [each["reason"] for each in by_process if each["reason"]]
        if not reasons and any(each["hash"] != by_process[0]["hash"] for each in by_process):
            reasons = ["the processes of the run read different bytes"]
        if not reasons and item and not self._held_out.isdisjoint((item.content_hash, *item.file_hashes)):
            reasons = [SET_ASIDE]
        if reasons:
            self.skipped[name] = reasons[0]
            return None
        return item

    def _read(self, name: str) -> Item:
        labels = tuple(self._labels.get(name, ()))
        if isinstance(self.source, Groups):
            view, hashes = self.source.load(name)
            own = hashes[0] if len(hashes) == 1 else content_hash("".join(hashes).encode())
            return Item(name, view, own, labels, hashes)
        image, own = image_from(name, partial(self.source.read, name), self._max_pixels)
        return Item(name, image, own, labels)

    def _require_decodable(self) -> None:
        if len(self) == 0:
            raise self._nothing_readable(self.skipped)

    def _nothing_readable(self, reasons: Mapping[str, str]) -> ImageError:
        return ImageError(
            f"None of the {len(self.names)} images in {self.source.where} can be decoded ({first_skips(reasons)}): "
            "point to readable images."
        )


def labelled_items(step: int, count: int, share: float) -> int:
    """How many of the `count` items of a step are asked a labelled question, so that after every step their share of
    all items is as near to `share` as it can be from below."""
    due = [math.floor(steps * count * share + 1e-9) for steps in (step - 1, step)]
    return due[1] - due[0]


def _changes(then: Names, now: Names, where: str) -> list[str]:
    """A sentence each about what was added to the images of a run and removed from them.

    Raises:
        ImageError: none of them is left, as when a disk is not mounted.
    """
    added, removed = now.missing_from(then), then.missing_from(now)
    if len(removed) == len(then):
        raise ImageError(f"None of the {len(then)} images of the run is in {where} any more: put them back.")
    told = []
    if added:
        told.append(
            f"Images that were added to {where} since the run began: {_first(added)}. It goes on with the {len(then)} "
            "that it began with; a new run draws all of them."
        )
    if removed:
        told.append(f"Images that are no longer in {where}: {_first(removed)}. They are skipped when they are drawn.")
    return told


def _first(names: Sequence[str]) -> str:
    """How many names there are, and the first three of them."""
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def set_aside_line(pool: ImagePool) -> str:
    """How many images the pool shares with the evaluation data, as a sentence."""
    if pool.compares_when_drawing:
        return "Images that are also in the evaluation data are set aside when they are drawn, and not trained on."
    return f"Images of the evaluation data that are set aside and not trained on: {pool.set_aside}."


def first_skips(skipped: Mapping[str, str]) -> str:
    """The first three skips and their reasons, and the number of the others."""
    first = "; ".join(f"{name}: {reason}" for name, reason in islice(skipped.items(), 3))
    return f"{first}; and {len(skipped) - 3} more" if len(skipped) > 3 else first
