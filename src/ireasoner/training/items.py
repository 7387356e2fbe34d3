"""The pool of unlabeled images: scan a folder, draw in a seeded order, decode safely, report every skip.

Image files come from anywhere and may be damaged or hostile. `_reading` is the one boundary around their bytes:
whatever goes wrong inside it becomes an `UnreadableImageError`, which the pool reports and passes over.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ireasoner.method.types import UsageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # no other parser ever runs: EPS would start ghostscript
MAX_PIXELS = 64_000_000
MAX_ASPECT_RATIO = 200  # Qwen's image processor refuses anything longer

_DECODABLE = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff")
_NOT_DECODABLE = (".avif", ".heic", ".heif", ".jp2", ".jxl")  # candidates all the same, so that their skip is reported
EXTENSIONS = _DECODABLE + _NOT_DECODABLE
# White in a gray image of more than 8 bits: the first of these that covers its values. If none does, the values are
# stretched.
_WHITE = {"I": (255, 65535), "F": (1, 255)}


class ImageError(UsageError):
    """An image or a folder of images cannot be used. The message is one sentence: which path, why, what to do."""


class UnreadableImageError(ImageError):
    """One image file cannot be decoded. `reason` says why, without the path."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"Cannot read the image {_quoted(path)} ({reason}): replace or remove it.")
        self.reason = reason


def load_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in a file: RGB, upright, on white where it was transparent, without metadata.

    The content decides the format, not the name: PNG, JPEG, WebP, GIF and TIFF (first frame or page), BMP. Not for
    concurrent threads: Python's warning filters are changed while it decodes.

    Args:
        path: the file.
        max_pixels: largest width x height that is decoded (Pillow has a limit of its own near 179 million).

    Raises:
        UnreadableImageError: the file is not a whole image of these formats, has too many pixels, or is over 200 times
            longer than wide. Nothing else is raised.
    """
    with _reading(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damage it repairs, and of bombs that we refuse below
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError("the file is empty")
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ValueError(f"{width} x {height} is over the limit of {max_pixels} pixels")
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise ValueError(f"{width} x {height} is longer than {MAX_ASPECT_RATIO} to 1")
            image.load()
            return _upright_rgb(image)


def content_hash(path: str | os.PathLike[str]) -> str:
    """The first 16 hex digits of the SHA-256 of the file's bytes. Raises UnreadableImageError if it cannot be read."""
    with _reading(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class Item(NamedTuple):
    """What the model looks at: today, one image, RGB, under its name in the pool."""

    name: str
    image: Image.Image


class ImagePool:
    """Every image below a folder, drawn epoch after epoch, each epoch in its own order given by (seed, epoch).

    An image's name is its POSIX path relative to the folder; one that is not plainly printable (not UTF-8, a newline, a
    backslash) is shown with Python escapes. Candidates are the regular files, or links to one, that have an image
    extension or begin like an image. Names that begin with a dot and `__MACOSX` are left out. Links to folders are
    reported and not followed. `skipped` maps what was passed over to the reason, in order of discovery.

    Args:
        folder: where the images lie.
        seed: of the order.
        paths: where each candidate lies, by its name.
        skipped: what was passed over so far.
    """

    def __init__(self, folder: str, seed: int, paths: Mapping[str, str], skipped: dict[str, str]) -> None:
        self._folder, self._seed, self._paths, self.skipped = folder, seed, paths, skipped
        self._names = sorted(paths)
        # A printable name holds no newline, so two different listings never join to the same text.
        self._fingerprint = hashlib.sha256("\n".join(self._names).encode()).hexdigest()
        self._move_to(epoch=0, position=0)

    @classmethod
    def scan(cls, folder: str | os.PathLike[str], seed: int) -> ImagePool:
        """Look through a folder.

        Raises:
            ImageError: the folder is missing, unreadable, not a folder or holds no image.
        """
        paths, skipped = _scan(os.fspath(folder))
        if not paths:
            seen = f" (skipped: {_first_skips(skipped)})" if skipped else ""
            raise ImageError(f"No image in the folder {_quoted(folder)}{seen}: point to a folder of images.")
        return cls(os.fspath(folder), seed, paths, skipped)

    def __len__(self) -> int:
        """The number of candidates that are not known to be undecodable."""
        return len(self._names) - sum(name in self._paths for name in self.skipped)

    @property
    def names(self) -> list[str]:
        """Every candidate's name, sorted."""
        return list(self._names)

    def path(self, name: str) -> str:
        """Where the image called `name` lies on disk. Raises KeyError if it is none of the pool's."""
        return self._paths[name]

    def take(self, n: int) -> list[Item]:
        """The next `n` decodable images; a new epoch, and so a repetition, begins when all have been drawn.

        An undecodable file is skipped and never tried again. Raises ImageError if none can be decoded.
        """
        taken: list[Item] = []
        while len(taken) < n:
            if self._position == len(self._order):
                self._require_decodable()
                self._move_to(self._epoch + 1, position=0)
            name = self._order[self._position]
            self._position += 1
            if (image := self._load(name)) is not None:
                taken.append(Item(name, image))
        return taken

    def peek(self, n: int) -> list[Item]:
        """The first `n` decodable images of epoch 0, or all if they are fewer; the cursor stays where it is.

        Raises ImageError if none can be decoded.
        """
        loaded = ((name, self._load(name)) for name in self._epoch_order(0))
        images = list(islice((Item(name, image) for name, image in loaded if image is not None), n))
        self._require_decodable()
        return images

    def state(self) -> dict[str, Any]:
        """Where the pool stands, ready for JSON. The listing is kept as a hash and a count, not name by name."""
        cursor = {"seed": self._seed, "epoch": self._epoch, "position": self._position}
        return cursor | {"fingerprint": self._fingerprint, "images": len(self._names), "skipped": dict(self.skipped)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state()` was called; `skipped` becomes what it was then.

        A file that was replaced under the same name goes unnoticed. Raises ImageError, and changes nothing, if the seed
        or the set of image names is another.
        """
        if state["seed"] != self._seed:
            raise ImageError(
                f"The images of {_quoted(self._folder)} were drawn with the seed {state['seed']}, not {self._seed}: "
                "resume with the same seed."
            )
        if state["fingerprint"] != self._fingerprint:
            raise ImageError(
                f"Images were added to, removed from or renamed in {_quoted(self._folder)} since the run was saved "
                f"({state['images']} images then, {len(self._names)} now), so that it cannot resume exactly: put the "
                "folder back as it was, or start a new run."
            )
        self.skipped = dict(state["skipped"])
        self._move_to(state["epoch"], state["position"])

    def _move_to(self, epoch: int, position: int) -> None:
        self._epoch, self._position, self._order = epoch, position, self._epoch_order(epoch)

    def _epoch_order(self, epoch: int) -> list[str]:
        # Sorting by raw bits, which numpy promises never to change; `Generator.permutation` may change with a release.
        bits = np.random.Philox(np.random.SeedSequence(self._seed, spawn_key=(epoch,))).random_raw(len(self._names))
        return [self._names[index] for index in np.argsort(bits, kind="stable")]

    def _load(self, name: str) -> Image.Image | None:
        if name in self.skipped:
            return None
        try:
            return load_image(self._paths[name])
        except UnreadableImageError as error:
            self.skipped[name] = error.reason
            return None

    def _require_decodable(self) -> None:
        if len(self) == 0:
            raise ImageError(
                f"None of the {len(self._names)} images in {_quoted(self._folder)} can be decoded "
                f"({_first_skips(self.skipped)}): point to a folder of readable images."
            )


def _first_skips(skipped: Mapping[str, str]) -> str:
    first = "; ".join(f"{name}: {reason}" for name, reason in islice(skipped.items(), 3))
    return f"{first}; and {len(skipped) - 3} more" if len(skipped) > 3 else first


def _scan(folder: str) -> tuple[dict[str, str], dict[str, str]]:
    """Name to real path of every candidate; and what cannot be looked into, with the reason."""
    paths: dict[str, str] = {}
    skipped: dict[str, str] = {}
    folders = [""]  # relative, with a closing slash; a list, because trees can be deeper than Python's stack
    while folders:
        prefix = folders.pop()
        try:
            with os.scandir(os.path.join(folder, prefix)) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except (OSError, ValueError) as error:
            if not prefix:
                problem = f"Cannot read the image folder {_quoted(folder)} ({_reason(error)})"
                raise ImageError(f"{problem}: check the path and its permissions.") from error
            skipped[_printable(prefix)] = f"the folder cannot be read: {_reason(error)}"
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            relative, named_image = prefix + entry.name, entry.name.lower().endswith(EXTENSIONS)
            try:
                mode = entry.stat().st_mode  # of what a link points to
            except OSError as error:
                skipped[_printable(relative)] = _reason(error)
                continue
            if stat.S_ISDIR(mode) and not entry.is_symlink():
                folders.append(relative + "/")
            elif stat.S_ISDIR(mode):  # following it could lead round in a circle, or out into the whole disk
                skipped[_printable(relative + "/")] = "a link to a folder, which is not followed"
            elif stat.S_ISREG(mode) and (named_image or _begins_like_an_image(entry.path)):
                paths[_printable(relative)] = entry.path
            elif named_image:  # a pipe, socket or device, which could block for ever if opened
                skipped[_printable(relative)] = "not a regular file"
    return paths, skipped


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[io.BufferedReader]:
    """The open file; any error on the way in or inside the block becomes an UnreadableImageError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file")  # opening a pipe would block
        with open(path, "rb") as file:
            yield file
    except Exception as error:  # not narrower: hostile bytes make Pillow raise almost anything
        raise UnreadableImageError(path, _reason(error)) from error


def _begins_like_an_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(18)
    except OSError:
        return False  # nothing says that it is an image
    return (
        head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a"))
        or head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))  # TIFF and BigTIFF
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        # A text can begin with "BM" too, but does not go on with one of the sizes that a BMP's header has.
        or (head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in (12, 16, 40, 52, 56, 64, 108, 124))
    )


def _upright_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image with nothing but the pixels of `image`, which is loaded."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata is no reason to lose a picture whose pixels are fine
        orientation = 1
    if image.mode in _WHITE or image.mode.startswith("I;16"):
        image = _eight_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image if image.mode == "RGBA" else None)
    if orientation in range(2, 9):
        canvas.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(canvas, in_place=True)
    return canvas


def _eight_bit(image: Image.Image) -> Image.Image:
    """The gray `image` of mode I;16*, I or F, its full scale brought to 0-255. Pillow would clip at 255."""
    if image.mode not in _WHITE:
        table = np.rint(np.arange(65536) / 257).astype(np.uint8)
        table[image.info.get("transparency", 65535)] = 255  # a PNG may name one gray that is see-through
        return Image.fromarray(table[np.asarray(image)])
    values = np.asarray(image).astype(np.float64)  # float32 would lose a narrow range of large integers
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("none of its pixels is a finite number")
    low, high = values.min(where=finite, initial=np.inf), values.max(where=finite, initial=-np.inf)
    if low >= 0:
        low, high = next(((0, white) for white in _WHITE[image.mode] if high <= white), (low, high))
    values = np.fmin(np.fmax(values, low), high)  # brings infinities into range; NaN becomes `low`
    return Image.fromarray(np.rint((values - low) * 255 / (high - low or 1)).astype(np.uint8))


def _quoted(path: str | os.PathLike[str]) -> str:
    return f"'{_printable(os.fspath(path))}'"


def _printable(path: str) -> str:
    # One-to-one: what is escaped always holds a backslash, what is left as it is never does.
    return path if path.isprintable() and "\\" not in path else path.encode("unicode_escape").decode("ascii")


def _reason(error: Exception) -> str:
    """What went wrong in one short line, without the path, fit for JSON."""
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG, JPEG, WebP, GIF, BMP or TIFF image, or its header is damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    plain = text and isinstance(error, (OSError, SyntaxError, ValueError))
    return (text if plain else f"{type(error).__name__}: {text}".rstrip(": "))[:200]
