"""Image files from anywhere: each is read once, and decoded to RGB or refused with a reason.

They may be damaged or malicious. Whatever goes wrong becomes an `UnreadableImageError`. What a file may cost is bounded
by what is in it, never by the clock, so that every machine refuses the same files: by its bytes, its pixels, and, in
`containers`, by the number of its parts.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import logging
import os
import stat
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ireasoner.method.types import UsageError
from ireasoner.training.config import option
from ireasoner.training.containers import format_of, name_of_other, stripped

MAX_PIXELS: int = option("max_image_pixels").default
# How large a file may be: so many bytes for each pixel of the limit, and others for metadata. 4 channels of 16 bits
# need 8 bytes. Those of a WebP have only 8 bits, compressed, and its decoder takes the most memory.
MAX_BYTES_PER_PIXEL, MAX_WEBP_BYTES_PER_PIXEL, MAX_OTHER_BYTES = 8, 2, 2**24
MAX_ASPECT_RATIO = 200  # the limit of Qwen's image processor
RETRY_AFTER = (0.1, 1.0)  # seconds before a file that could not be read is tried again: network disks fail for moments

# The value of white in gray images of more than 8 bits, by Pillow's mode: the first that no pixel exceeds.
_WHITE = {"I": (255, 65535), "F": (1, 255)}
_ACCEPTED = "not a PNG, JPEG, WebP, GIF, BMP or TIFF image"

logging.getLogger("PIL").addHandler(logging.NullHandler())  # otherwise Python prints what it logs of damaged files
try:  # libtiff would write what it thinks of a file to the terminal
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)
    ctypes.CDLL(Image.core.__file__).TIFFSetWarningHandler(None)
except (AttributeError, OSError):  # a Pillow without libtiff, or one that hides it
    pass


class ImageError(UsageError):
    """An image or a folder of images cannot be used. The message names the path and says why and what to do."""


class UnreadableImageError(ImageError):
    """An image file cannot be decoded. `reason` says why, without the path."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"Cannot read the image {quoted(path)} ({reason}): replace or remove it.")
        self.reason = reason


class UnreachableError(ImageError):
    """Images cannot be read at the moment, as when the network is down: no reason to do without them for ever."""


def load_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file as `read_image` does."""
    return read_image(path, max_pixels)[0]


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, str]:
    """Decode an image file as `image_from` does."""
    return image_from(path, partial(read_file, path), max_pixels)


def image_from(
    name: str | os.PathLike[str], read: Callable[[int], bytes], max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, str]:
    """Decode an image file to RGB: upright, on a white background where it is transparent, and without metadata.

    The format (PNG, JPEG, WebP, GIF, BMP or TIFF) is found from the content, not from the name. Of an animation or a
    document, this is the first frame or page. Not thread-safe: Python's warning filters are changed while it decodes.

    Args:
        name: of the file, for an error.
        read: returns the bytes of the file, and raises any error where they are more than it is given.
        max_pixels: most pixels of the image.

    Returns:
        The image, and the `content_hash` of the file.

    Raises:
        UnreadableImageError: the file is not a complete image of these formats, has more than `max_pixels` pixels or
            more bytes than such an image needs, is more than `MAX_ASPECT_RATIO` times longer than wide, or is made of
            too many parts.
        UnreachableError: as `read` raises it. Nothing else is raised.
    """
    try:
        data = read(MAX_BYTES_PER_PIXEL * max_pixels + MAX_OTHER_BYTES)
        if not data:
            raise ValueError("the file is empty")
        found = content_hash(data)
        image_format = format_of(data)
        if image_format is None:
            other = name_of_other(data)
            raise ValueError(f"{other}, {_ACCEPTED}" if other else f"{_ACCEPTED}, or its header is damaged")
        data = stripped(image_format, data, max_pixels)  # under the same name: the original is large and not needed
        if image_format == "WEBP":
            require_at_most(MAX_WEBP_BYTES_PER_PIXEL * max_pixels + MAX_OTHER_BYTES, len(data))
        image, orientation = _decoded(image_format, data, max_pixels)
        return _upright(image, orientation), found
    except UnreachableError:
        raise
    except Exception as error:  # malicious bytes make Pillow raise almost anything
        raise UnreadableImageError(name, reason_of(error)) from error


def content_hash(data: bytes) -> str:
    """The first 16 hex digits of the SHA-256 of a file's bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def quoted(path: str | os.PathLike[str]) -> str:
    """A path for a message, in one line."""
    return f"'{printable(os.fspath(path))}'"


def printable(path: str) -> str:
    """A path with Python's escapes where it is not printable. Different paths stay different."""
    # Those that are escaped always hold a backslash, those that are not never do.
    return path if path.isprintable() and "\\" not in path else path.encode("unicode_escape").decode("ascii")


def path_of(name: str) -> str:
    """The path of which `printable` made this name. Other text is returned as it is where it cannot be such a name."""
    try:
        return name.encode("ascii").decode("unicode_escape") if "\\" in name else name
    except UnicodeError:
        return name


def reason_of(error: Exception) -> str:
    """What went wrong, in one short line without the path."""
    if isinstance(error, UnidentifiedImageError):
        return f"{_ACCEPTED}, or its header is damaged"
    if isinstance(error, struct.error | IndexError):
        return "it is truncated, or its header is damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    plain = text and isinstance(error, (OSError, SyntaxError, ValueError))
    return (text if plain else f"{type(error).__name__}: {text}".rstrip(": "))[:200]


def read_file(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """The bytes of a file. Errors of the disk may pass, so they are tried again; a missing or forbidden file is not."""
    for pause in (*RETRY_AFTER, None):
        try:
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("not a regular file")  # opening a pipe would block
            require_at_most(max_bytes, found.st_size)
            with open(path, "rb") as file:
                return file.read(max_bytes)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            raise
        except OSError:
            if pause is None:
                raise
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def require_at_most(max_bytes: int, size: int) -> None:
    """Raises `ValueError` if a file is larger than it may be."""
    if size > max_bytes:
        raise ValueError(f"{size} bytes is over the limit of {max_bytes} bytes")


def _decoded(image_format: str, data: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    """Decode what `stripped` has left of a file to RGB; with the image's orientation, by the number that Exif gives it.

    The decoder's memory is free when this returns.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damage that it repairs, and of large images, refused below
        with Image.open(io.BytesIO(data), formats=[image_format]) as image:
            width, height = image.size
            if width * height > max_pixels:  # checked before decoding, which allocates the memory
                raise ValueError(f"{width} x {height} is over the limit of {max_pixels} pixels (--max-image-pixels)")
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise ValueError(f"{width} x {height} is longer than {MAX_ASPECT_RATIO} to 1")
            boxes = (tile.extents or (0, 0, width, height) for tile in image.tile)
            covered = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes)
            if covered > 4 * width * height:  # a TIFF has up to 4 planes
                raise ValueError("its parts cover the image many times over")
            image.load()
            try:
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            except Exception:  # damaged metadata is no reason to skip an image whose pixels are fine
                orientation = 1
            return rgb(image), orientation


def rgb(image: Image.Image) -> Image.Image:
    """Copy the pixels of a loaded image to a new RGB image, which has no metadata."""
    if image.mode in _WHITE or image.mode.startswith("I;16"):
        image = _eight_bit(image)
    if image.has_transparency_data and image.mode != "RGBA":
        image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image if image.mode == "RGBA" else None)
    return canvas


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turn an image as its orientation asks for."""
    if orientation in range(2, 9):
        image.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale a gray image of mode I;16*, I or F to 0-255. Pillow's own conversion would clip at 255.

    White is the full scale in I;16, and otherwise the first value of `_WHITE` that no pixel exceeds. Images with larger
    or with negative values are stretched from their lowest to their highest value.
    """
    gray = Image.new("L", image.size)
    if image.mode not in _WHITE:
        table = np.rint(np.arange(65536) / 257).astype(np.uint8)
        table[image.info.get("transparency", 65535)] = 255  # a PNG may declare one gray value to be transparent
        for top, band in _bands(image):
            gray.paste(Image.fromarray(table[band]), (0, top))
        return gray
    low, high = np.inf, -np.inf
    for _, band in _bands(image):
        values = band.astype(np.float64)  # float32 could not tell large integers apart
        finite = np.isfinite(values)
        low = min(low, values.min(where=finite, initial=np.inf))
        high = max(high, values.max(where=finite, initial=-np.inf))
    if low > high:
        raise ValueError("none of its pixels is a finite number")
    if low >= 0:
        low, high = next(((0, white) for white in _WHITE[image.mode] if high <= white), (low, high))
    for top, band in _bands(image):
        values = np.fmin(np.fmax(band.astype(np.float64), low), high)  # infinities are clipped; NaN becomes `low`
        scaled = np.rint((values - low) * 255 / (high - low or 1)).astype(np.uint8)
        gray.paste(Image.fromarray(scaled), (0, top))
    return gray


def _bands(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of an image, about a million pixels at a time, each band with the number of its first row.

    An array of the whole image would take several times the memory of the image.
    """
    rows = max(1, 2**20 // image.width)
    for top in range(0, image.height, rows):
        yield top, np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
