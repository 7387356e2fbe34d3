"""The pool of unlabeled images: scans a folder, draws images in a seeded order, decodes them, and reports every skip.

Image files come from anywhere and may be damaged or malicious. All of their bytes are read inside `_reading`, which
turns whatever goes wrong into an `UnreadableImageError`; the pool reports it and goes on with the next image.
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

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow's other parsers never run: EPS would start ghostscript
MAX_PIXELS = 64_000_000
MAX_ASPECT_RATIO = 200  # the limit of Qwen's image processor

EXTENSIONS = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff")
EXTENSIONS += (".avif", ".heic", ".heif", ".jp2", ".jxl")  # cannot be decoded; found so that they can be reported
# The value of white in gray images of more than 8 bits, by Pillow's mode: the first that no pixel exceeds.
_WHITE = {"I": (255, 65535), "F": (1, 255)}


class ImageError(UsageError):
    """An image or a folder of images cannot be used. The message names the path and says why and what to do."""


class UnreadableImageError(ImageError):
    """An image file cannot be decoded. `reason` says why, without the path."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"Cannot read the image {_quoted(path)} ({reason}): replace or remove it.")
        self.reason = reason


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file to RGB: upright, on a white background where it is transparent, and without metadata.

    The format (PNG, JPEG, WebP, GIF, BMP or TIFF) is found from the content, not from the name. Of an animation or a
    document, this is the first frame or page. Not thread-safe: Python's warning filters are changed while it decodes.

    Raises:
        UnreadableImageError: the file is not a complete image of these formats, has more than `MAX_PIXELS` pixels, or
            is more than `MAX_ASPECT_RATIO` times longer than wide. Nothing else is raised.
    """
    with _reading(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damage that it repairs, and of large images, refused below
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError("the file is empty")
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:  # checked before decoding, which allocates the memory
                raise ValueError(f"{width} x {height} is over the limit of {MAX_PIXELS} pixels")
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise ValueError(f"{width} x {height} is longer than {MAX_ASPECT_RATIO} to 1")
            image.load()
            return _upright_rgb(image)


def content_hash(path: str | os.PathLike[str]) -> str:
    """The first 16 hex digits of the SHA-256 of a file's bytes. Raises `UnreadableImageError` if it cannot be read."""
    with _reading(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class Item(NamedTuple):
    """What the model looks at: an RGB image, with its name in the pool."""

    name: str
    image: Image.Image


class ImagePool:
    """All images below a folder, drawn epoch after epoch; the order depends on the seed and the epoch.

    An image's name is its path relative to the folder, with slashes. Names that are not printable are shown with
    Python's escapes. `ImagePool.scan` makes a pool.

    Args:
        folder: where the images lie.
        seed: seed of the order.
        paths: path of each image by its name.
        skipped: reason why a file or folder was passed over, by its name, in order of discovery.
    """

    def __init__(self, folder: str, seed: int, paths: Mapping[str, str], skipped: dict[str, str]) -> None:
        self._folder, self._seed, self.paths, self.skipped = folder, seed, paths, skipped
        self.names = sorted(paths)
        # A printable name holds no newline, so two different sets of names never give the same text.
        self._fingerprint = hashlib.sha256("\n".join(self.names).encode()).hexdigest()
        self._move_to(epoch=0, position=0)

    @classmethod
    def scan(cls, folder: str | os.PathLike[str], seed: int) -> ImagePool:
        """Find the images below a folder: regular files, or links to one, with an image's extension or first bytes.

        Names that begin with a dot and `__MACOSX` are ignored. Links to folders are reported in `skipped`.

        Raises:
            ImageError: the folder is missing, cannot be read, is not a folder, or holds no image.
        """
        paths, skipped = _scan(os.fspath(folder))
        if not paths:
            seen = f" (skipped: {_first_skips(skipped)})" if skipped else ""
            raise ImageError(f"No image in the folder {_quoted(folder)}{seen}: point to a folder of images.")
        return cls(os.fspath(folder), seed, paths, skipped)

    def __len__(self) -> int:
        """The number of images that have not failed to decode so far."""
        return len(self.names) - sum(name in self.paths for name in self.skipped)

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
            if (image := self._load(name)) is not None:
                taken.append(Item(name, image))
        return taken

    def peek(self, n: int) -> list[Item]:
        """The first `n` images of epoch 0, or all if there are fewer, without drawing them.

        Raises `ImageError` if none can be decoded.
        """
        loaded = ((name, self._load(name)) for name in self._epoch_order(0))
        images = list(islice((Item(name, image) for name, image in loaded if image is not None), n))
        self._require_decodable()
        return images

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
                f"The images of {_quoted(self._folder)} were drawn with the seed {state['seed']}, not {self._seed}: "
                "resume with the same seed."
            )
        if state["fingerprint"] != self._fingerprint:
            raise ImageError(
                f"Images were added to, removed from or renamed in {_quoted(self._folder)} since the run was saved "
                f"({state['images']} images then, {len(self.names)} now), so that it cannot resume exactly: put the "
                "folder back as it was, or start a new run."
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

    def _load(self, name: str) -> Image.Image | None:
        if name in self.skipped:
            return None
        try:
            return load_image(self.paths[name])
        except UnreadableImageError as error:
            self.skipped[name] = error.reason
            return None

    def _require_decodable(self) -> None:
        if len(self) == 0:
            raise ImageError(
                f"None of the {len(self.names)} images in {_quoted(self._folder)} can be decoded "
                f"({_first_skips(self.skipped)}): point to a folder of readable images."
            )


def _first_skips(skipped: Mapping[str, str]) -> str:
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
                problem = f"Cannot read the image folder {_quoted(folder)} ({_reason(error)})"
                raise ImageError(f"{problem}: check the path and its permissions.") from error
            skipped[_printable(prefix)] = f"the folder cannot be read: {_reason(error)}"
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            relative, named_image = prefix + entry.name, entry.name.lower().endswith(EXTENSIONS)
            try:
                mode = entry.stat().st_mode  # for a link, this is the mode of its target
            except OSError as error:
                skipped[_printable(relative)] = _reason(error)
                continue
            if stat.S_ISDIR(mode) and not entry.is_symlink():
                folders.append(relative + "/")
            elif stat.S_ISDIR(mode):  # following it could lead round in a circle, or across the whole disk
                skipped[_printable(relative + "/")] = "a link to a folder, which is not followed"
            elif stat.S_ISREG(mode) and (named_image or _begins_like_an_image(entry.path)):
                paths[_printable(relative)] = entry.path
            elif named_image:  # opening a pipe, a socket or a device could block for ever
                skipped[_printable(relative)] = "not a regular file"
    return paths, skipped


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[io.BufferedReader]:
    """Open a file; any error in opening it or inside the `with` block becomes an `UnreadableImageError`."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file")  # opening a pipe would block
        with open(path, "rb") as file:
            yield file
    except Exception as error:  # malicious bytes make Pillow raise almost anything
        raise UnreadableImageError(path, _reason(error)) from error


def _begins_like_an_image(path: str) -> bool:
    """Whether the first bytes of a file are those of an image format."""
    try:
        with open(path, "rb") as file:
            head = file.read(18)
    except OSError:
        return False
    return (
        head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a"))
        or head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))  # TIFF and BigTIFF
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        # A text can begin with "BM" too, but will not continue with one of the header sizes of BMP.
        or (head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in (12, 16, 40, 52, 56, 64, 108, 124))
    )


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Copy the pixels of a loaded image to a new RGB image, which has no metadata."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata is no reason to skip an image whose pixels are fine
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
    """Scale a gray image of mode I;16*, I or F to 0-255. Pillow's own conversion would clip at 255.

    White is the full scale in I;16, and otherwise the first value of `_WHITE` that no pixel exceeds. Images with larger
    or with negative values are stretched from their lowest to their highest value.
    """
    if image.mode not in _WHITE:
        table = np.rint(np.arange(65536) / 257).astype(np.uint8)
        table[image.info.get("transparency", 65535)] = 255  # a PNG may declare one gray value to be transparent
        return Image.fromarray(table[np.asarray(image)])
    values = np.asarray(image).astype(np.float64)  # float32 could not tell large integers apart
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("none of its pixels is a finite number")
    low, high = values.min(where=finite, initial=np.inf), values.max(where=finite, initial=-np.inf)
    if low >= 0:
        low, high = next(((0, white) for white in _WHITE[image.mode] if high <= white), (low, high))
    values = np.fmin(np.fmax(values, low), high)  # infinities are clipped; NaN becomes `low`
    return Image.fromarray(np.rint((values - low) * 255 / (high - low or 1)).astype(np.uint8))


def _quoted(path: str | os.PathLike[str]) -> str:
    return f"'{_printable(os.fspath(path))}'"


def _printable(path: str) -> str:
    # Names must stay distinct: those that are escaped always hold a backslash, those that are not never do.
    return path if path.isprintable() and "\\" not in path else path.encode("unicode_escape").decode("ascii")


def _reason(error: Exception) -> str:
    """What went wrong, in one short line without the path."""
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG, JPEG, WebP, GIF, BMP or TIFF image, or its header is damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    plain = text and isinstance(error, (OSError, SyntaxError, ValueError))
    return (text if plain else f"{type(error).__name__}: {text}".rstrip(": "))[:200]
