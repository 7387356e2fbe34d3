"""The image pool: every image found, every skip reported, nothing hostile gets through, exact resume."""

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image, ImageFile

import hostile
from hostile import chunk, encoded
from ireasoner.model.parallel import Processes
from ireasoner.training import images
from ireasoner.training.images import ImageError, UnreadableImageError, load_image, read_image
from ireasoner.training.items import SET_ASIDE, ImagePool, Item
from ireasoner.training.labelled import load_questions
from ireasoner.training.recorder import Recorder
from ireasoner.training.sources import folder
from ireasoner.training.state import Run

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
MAGICS = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xe0",
    b"RIFF\0\0\1\0WEBPVP8 ",
    b"RIFF\0\0\1\0WEBPVP8X",
    b"GIF89a",
    b"GIF87a",
)
MAGICS += (b"BM", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0", b"")


def corners(width: int = 24, height: int = 16) -> Image.Image:
    """Red top left, green top right, blue bottom left, white bottom right: every turn of it looks different."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def png(width: int, height: int, pixels: bytes, *, depth: int = 8, color: int = 2, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return MAGICS[0] + header + extra + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def close(image: Image.Image, expected: Image.Image, tolerance: int = 0) -> bool:
    """Equal up to `tolerance`, compared at the middle of each quarter, where lossy formats are faithful."""
    assert image.mode == "RGB"
    assert image.size == expected.size
    w, h = image.size
    spots = [(w // 4, h // 4), (3 * w // 4, h // 4), (w // 4, 3 * h // 4), (3 * w // 4, 3 * h // 4)]
    pairs = [(image.getpixel(spot), expected.getpixel(spot)) for spot in spots]
    return all(abs(a - b) <= tolerance for got, wanted in pairs for a, b in zip(got, wanted, strict=True))


def save(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def fill(folder: Path, count: int) -> Path:
    """`count` 2x2 images; the i-th has red = i, so that pixels tell which one it is."""
    for i in range(count):
        save(folder / f"{i:02}.png", encoded(Image.new("RGB", (2, 2), (i, 0, 0)), "PNG"))
    return folder


def names(items: list[Item]) -> list[str]:
    return [item.name for item in items]


def reason_of(path: Path) -> str:
    with pytest.raises(UnreadableImageError) as caught:
        load_image(path)
    assert str(path) in str(caught.value)
    assert str(path) not in caught.value.reason
    assert "\n" not in str(caught.value)
    return caught.value.reason


# --- decoding -------------------------------------------------------------------------------------------------------

GRAY = corners().convert("L")
PALETTE = corners().quantize(8)
HALF_TURN = corners().rotate(180)
FILES = {
    "png": (encoded(corners(), "PNG"), corners(), 0),
    "png L": (encoded(GRAY, "PNG"), GRAY.convert("RGB"), 0),
    "png P": (encoded(PALETTE, "PNG"), corners(), 0),
    "png LA": (encoded(GRAY.convert("LA"), "PNG"), GRAY.convert("RGB"), 0),
    "png 1": (encoded(corners().convert("1", dither=Image.Dither.NONE), "PNG"), None, 0),
    "png animated": (
        encoded(corners(), "PNG", save_all=True, append_images=[HALF_TURN.copy()]),
        corners(),
        0,
    ),
    "jpeg": (encoded(corners(), "JPEG", quality=95), corners(), 12),
    "jpeg progressive": (encoded(corners(), "JPEG", quality=95, progressive=True), corners(), 12),
    "jpeg L": (encoded(GRAY, "JPEG", quality=95), GRAY.convert("RGB"), 12),
    "jpeg CMYK": (encoded(corners().convert("CMYK"), "JPEG", quality=95), corners(), 24),
    "jpeg MPO": (encoded(corners(), "MPO", quality=95, save_all=True, append_images=[HALF_TURN.copy()]), corners(), 12),
    "webp": (encoded(corners(), "WEBP", quality=95), corners(), 40),
    "webp lossless": (encoded(corners(), "WEBP", lossless=True), corners(), 0),
    "webp animated": (
        encoded(corners(), "WEBP", lossless=True, save_all=True, append_images=[HALF_TURN.copy()]),
        corners(),
        0,
    ),
    "gif": (encoded(PALETTE, "GIF"), corners(), 0),
    "gif animated": (encoded(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]), corners(), 0),
    "bmp": (encoded(corners(), "BMP"), corners(), 0),
    "bmp 1": (encoded(corners().convert("1", dither=Image.Dither.NONE), "BMP"), None, 0),
    "tiff": (encoded(corners(), "TIFF"), corners(), 0),
    "tiff pages": (encoded(corners(), "TIFF", save_all=True, append_images=[HALF_TURN.copy()]), corners(), 0),
    "tiff lzw": (encoded(corners(), "TIFF", compression="tiff_lzw"), corners(), 0),
    "tiff big": (encoded(corners(), "TIFF", big_tiff=True), corners(), 0),
    "tiff CMYK": (encoded(corners().convert("CMYK"), "TIFF"), corners(), 0),
    "tiff YCbCr": (encoded(corners().convert("YCbCr"), "TIFF"), corners(), 2),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("extension", ["right", ".txt", ".png", ".gif", ""])
def test_every_format_and_mode_decodes_whatever_the_name(tmp_path, kind, extension):
    data, expected, tolerance = FILES[kind]
    path = save(tmp_path / ("image" + extension.replace("right", "." + kind.split()[0])), data)
    image = load_image(path)
    assert type(image) is Image.Image  # no lazy file object
    assert image.mode == "RGB"
    if expected is not None:
        assert close(image, expected, tolerance)
    [item] = ImagePool.scan(tmp_path, seed=0).take(1)
    assert (item.name, item.image.tobytes()) == (path.name, image.tobytes())


def test_one_bit_is_black_and_white(tmp_path):
    path = save(tmp_path / "a", encoded(Image.new("1", (4, 4), 1), "TIFF", compression="group4"))
    assert load_image(path).getpixel((0, 0)) == WHITE
    path = save(tmp_path / "a", encoded(Image.new("1", (4, 4), 0), "PNG"))
    assert load_image(path).getpixel((0, 0)) == BLACK


def gray_row(path: Path) -> list[int]:
    pixels = np.asarray(load_image(path))
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[0, :, 0].tolist()


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, image_format):
    values = np.array([[0, 128, 129, 257, 256 * 128, 65534]], dtype=np.uint16)
    path = save(tmp_path / "a", encoded(Image.fromarray(values), image_format))
    assert gray_row(path) == [0, 0, 1, 1, 128, 255]
    big_endian = Image.frombytes("I;16B", (6, 1), values.astype(">u2").tobytes())
    assert gray_row(save(tmp_path / "b", encoded(big_endian, "TIFF"))) == [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 100, 255], [0, 100, 255]),  # 8 bits in a wide type
        ([0, 32768, 65535], [0, 128, 255]),  # 16 bits
        ([0, 2**30, 2**31 - 1], [0, 128, 255]),  # no known scale: stretched
        ([-100, 0, 100], [0, 128, 255]),
        ([2**30, 2**30 + 1, 2**30 + 2], [0, 128, 255]),  # float32 could not tell these apart
        ([10**6] * 3, [0, 0, 0]),
    ],
)
def test_integers_are_scaled_not_clipped(tmp_path, values, expected):
    image = Image.fromarray(np.array([values], dtype=np.int32))
    assert image.mode == "I"
    assert gray_row(save(tmp_path / "a", encoded(image, "TIFF"))) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.4, 255.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([-3e38, 0.0, 3e38], [0, 128, 255]),
        ([np.nan, 1.0, np.inf], [0, 255, 255]),
        ([np.nan, -np.inf, 0.5], [0, 0, 128]),
        ([np.nan, -5.0, 5.0, np.inf, -np.inf], [0, 0, 255, 255, 0]),
    ],
)
def test_floats_are_scaled(tmp_path, values, expected):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert image.mode == "F"
    assert gray_row(save(tmp_path / "a", encoded(image, "TIFF"))) == expected


def test_an_image_without_a_single_number_is_unreadable(tmp_path):
    image = Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32))
    assert "finite" in reason_of(save(tmp_path / "a", encoded(image, "TIFF")))


def test_transparency_lies_on_white(tmp_path):
    clear_black, half_red = (0, 0, 0, 0), (255, 0, 0, 128)
    rgba = Image.new("RGBA", (2, 1), clear_black)
    rgba.putpixel((1, 0), half_red)
    for image_format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        image = load_image(save(tmp_path / "a", encoded(rgba, image_format, **options)))
        assert image.getpixel((0, 0)) == WHITE
        assert image.getpixel((1, 0)) == (255, 127, 127)
    gray = Image.new("LA", (1, 1), (0, 0))
    assert load_image(save(tmp_path / "a", encoded(gray, "PNG"))).getpixel((0, 0)) == WHITE


def test_named_transparent_colors_lie_on_white(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    for image_format, transparency in (("PNG", 0), ("PNG", b"\x00\xff"), ("GIF", 0)):
        image = load_image(save(tmp_path / "a", encoded(palette, image_format, transparency=transparency)))
        assert [image.getpixel((x, 0)) for x in (0, 1)] == [WHITE, RED]
    half = load_image(save(tmp_path / "a", encoded(palette, "PNG", transparency=b"\x80\xff")))
    assert half.getpixel((0, 0)) == (127, 127, 127)
    rgb = load_image(save(tmp_path / "a", encoded(Image.new("RGB", (1, 1)), "PNG", transparency=(0, 0, 0))))
    assert rgb.getpixel((0, 0)) == WHITE
    gray16 = png(2, 1, b"\0" + struct.pack(">HH", 7, 8), depth=16, color=0, extra=chunk(b"tRNS", struct.pack(">H", 7)))
    assert gray_row(save(tmp_path / "a", gray16)) == [255, 0]


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path, image_format, orientation):
    # How a camera held that way stores an upright scene: the inverse of the turn that the tag asks for.
    method = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)
    stored = corners(48, 32) if method is None else corners(48, 32).transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if image_format == "WEBP" else {}
    image = load_image(save(tmp_path / "a", encoded(stored, image_format, exif=exif, **options)))
    assert close(image, corners(48, 32), 30)


def test_metadata_is_stripped(tmp_path):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", 6
    data = encoded(corners(), "JPEG", exif=exif, icc_profile=b"profile" * 30, comment=b"secret", dpi=(300, 300))
    image = load_image(save(tmp_path / "a", data))
    assert image.info == {}
    assert dict(image.getexif()) == {}
    assert encoded(image, "PNG") == encoded(Image.frombytes("RGB", image.size, image.tobytes()), "PNG")


@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"\xff" * 50])
def test_damaged_exif_does_not_cost_the_picture(tmp_path, exif):
    assert close(load_image(save(tmp_path / "a", encoded(corners(), "PNG", exif=exif))), corners())


@pytest.mark.parametrize("kind", FILES)
def test_truncated_files_are_unreadable(tmp_path, kind):
    data = FILES[kind][0]
    for length in (1, 10, 30, len(data) // 3):
        reason_of(save(tmp_path / "a.png", data[:length]))
    if kind.split()[0] in ("png", "jpeg"):
        noise = encoded(Image.frombytes("RGB", (40, 40), random.Random(0).randbytes(4800)), kind.split()[0].upper())
        for length in (len(noise) // 2, len(noise) - 60):
            assert "truncated" in reason_of(save(tmp_path / "a.png", noise[:length])).lower()


def test_what_is_no_image_says_so(tmp_path):
    assert reason_of(save(tmp_path / "a.png", b"")) == "the file is empty"
    for data in (
        b"hello",
        b"<svg/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"P6 1 1 255\nabc",
        b"8BPS\0\1",
    ):
        assert "not a PNG" in reason_of(save(tmp_path / "a.png", data))
    for data, name in (
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0avifmif1miaf", "an AVIF image"),
        (encoded(corners(), "AVIF"), "an AVIF image"),
        (b"\xef\xbb\xbf\n<!DOCTYPE HTML><p>Log in", "an HTML page"),
        (b"<html lang=en>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "a Git LFS pointer"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image"),
        (b"P6 1 1 255\nabc", "a PNM image"),
        (b"%PDF-1.7", "a PDF document"),
    ):
        for image_name in ("a.png", "a.JPG", "a.heic"):
            reason = reason_of(save(tmp_path / image_name, data))
            assert reason.startswith(name)
            assert reason.endswith("not a PNG, JPEG, WebP, GIF, BMP or TIFF image")
    assert reason_of(tmp_path / "missing.png") == "No such file or directory"
    assert reason_of(tmp_path) == "not a regular file"
    with pytest.raises(UnreadableImageError, match="null byte"):
        load_image("a\0b.png")


def bomb_bmp() -> bytes:
    data = bytearray(encoded(corners(), "BMP"))
    data[18:26] = struct.pack("<ii", 100000, 100000)
    return bytes(data)


def bomb_jpeg() -> bytes:
    data = bytearray(encoded(corners(), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", 65000, 65000)
    return bytes(data)


BOMBS = {
    "png": png(100000, 100000, b""),
    "png above our limit": png(5001, 5000, b""),
    "png where Pillow only warns": png(10000, 10000, b""),
    "png widest": png(2**31 - 1, 2**31 - 1, b""),
    "gif": b"GIF89a" + struct.pack("<HHBBB", 60000, 60000, 0, 0, 0) + b",\0\0\0\0\0\0\0\0\0\2\2\x4c\1\0;",
    "gif frame": b"GIF89a\1\0\1\0\0\0\0," + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0) + b"\2\2\x4c\1\0;",
    "bmp": bomb_bmp(),
    "jpeg": bomb_jpeg(),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_by_their_header(tmp_path, kind):  # they hold no pixels: decoding would say "truncated"
    limits = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        assert "limit of" in reason_of(save(tmp_path / "a.png", BOMBS[kind]))
    assert leaked == []
    assert limits == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_limits_of_size_and_shape(tmp_path):
    path = save(tmp_path / "a", encoded(corners(20, 10), "PNG"))
    assert load_image(path, max_pixels=200).size == (20, 10)
    with pytest.raises(UnreadableImageError, match="20 x 10 is over the limit of 199 pixels"):
        load_image(path, max_pixels=199)
    assert ImagePool.scan(tmp_path, seed=0, max_pixels=200).take(1)
    with pytest.raises(ImageError, match=r"None of the 1 images .*limit of 199 pixels"):
        ImagePool.scan(tmp_path, seed=0, max_pixels=199).take(1)
    path.write_bytes(path.read_bytes() + bytes(2**24 + 8 * 200))  # sparse or not, it is not read
    with pytest.raises(UnreadableImageError, match="bytes is over the limit of 16778816 bytes"):
        load_image(path, max_pixels=200)
    assert load_image(save(tmp_path / "a", encoded(Image.new("RGB", (200, 1)), "PNG"))).size == (200, 1)
    assert "longer than 200 to 1" in reason_of(save(tmp_path / "a", encoded(Image.new("RGB", (201, 1)), "PNG")))
    assert "longer than 200 to 1" in reason_of(save(tmp_path / "a", encoded(Image.new("RGB", (2, 401)), "PNG")))
    reason_of(save(tmp_path / "a", png(0, 5, b"")))


@pytest.mark.parametrize("kind", hostile.BUSY)
def test_files_that_would_keep_a_decoder_busy_are_refused_for_what_they_hold(tmp_path, kind):
    data, reason = hostile.BUSY[kind]
    assert reason in reason_of(save(tmp_path / "a", data))


def test_what_real_files_hold_is_not_too_much(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = {
        "scans": hostile.scans(90),
        "comments": hostile.jpeg(hostile.segment(0xFE, bytes(60_000)) * 100, exif=exif),
        "profile": encoded(corners(), "PNG", icc_profile=bytes(3_000_000), exif=exif),
        "run lengths": hostile.run_length_bmp(100),
        "extensions": hostile.gif(b"!\xfe\1x\0" * 1000),
        "strips": hostile.tiff((8, 8), {273: (3, [16 + 8 * i for i in range(8)]), 278: (3, [1])}, bytes(64)),
    }
    for data in turned.values():
        load_image(save(tmp_path / "a", data))
    assert close(load_image(save(tmp_path / "a", turned["profile"])), corners().rotate(180))


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf"])
def test_large_or_damaged_metadata_of_a_png_does_not_cost_the_picture(tmp_path, kind):
    for data in (b"a\0" + bytes(2_000_000), b"XML:com.adobe.xmp\0" + bytes(2_000_000), b"\xff" * 2_000_000):
        assert load_image(save(tmp_path / "a", hostile.png(chunk(kind, data)))).getpixel((0, 0)) == (9, 9, 9)
    swollen = chunk(kind, b"Raw profile type exif\0\0" + zlib.compress(bytes(2_000_000)))
    swollen += chunk(kind, b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2_000_000)))
    for data in (swollen, chunk(kind, b"a\0b")[:-4] + b"oops", chunk(kind, b"Raw profile type exif\0\0oops")):
        assert load_image(save(tmp_path / "a", hostile.png(data))).getpixel((0, 0)) == (9, 9, 9)


def test_orientation_is_found_wherever_it_is_told(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    raw = b"\nexif\n      %d\n" % len(exif.tobytes()) + exif.tobytes().hex().encode() + b"\n"
    of_text = png_with(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)))  # as ImageMagick writes it
    of_xmp = png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    lossless = encoded(corners(), "WEBP", lossless=True, xmp=xmp)
    for data in (of_text, of_xmp, lossless, encoded(corners(), "JPEG", quality=95, xmp=xmp)):
        assert close(load_image(save(tmp_path / "a", data)), corners().rotate(180), 12)


def png_with(extra: bytes) -> bytes:
    data = encoded(corners(), "PNG")
    return data[:33] + extra + data[33:]


QUIET = """
import sys
from ireasoner.training.images import UnreadableImageError, load_image
try:
    load_image(sys.argv[1])
except UnreadableImageError:
    print("skipped")
"""

MEASURE = """
import sys
from pathlib import Path
from ireasoner.training.images import UnreadableImageError, load_image

def kilobytes(name):
    return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0])

before = kilobytes("VmRSS")
try:
    load_image(sys.argv[1])
except UnreadableImageError as error:
    print(error.reason, file=sys.stderr)
print((kilobytes("VmHWM") - before) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process's memory")
def test_no_file_takes_more_than_600_mb(tmp_path):
    side = (5000, 5000)  # the limit
    rgba = Image.new("RGBA", side, (1, 2, 3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turning it takes memory as well
    fat = {  # and the most megabytes that each may take
        "float": (encoded(Image.new("F", side, 0.5), "TIFF", compression="tiff_adobe_deflate"), 400),
        "integer": (encoded(Image.new("I", side, 70_000), "TIFF", compression="tiff_adobe_deflate"), 400),
        "lossless": (encoded(rgba, "WEBP", lossless=True, quality=0, method=0, exact=True, exif=exif), 450),
        "transparent": (encoded(rgba, "PNG", compress_level=1, exif=exif), 300),
        "CMYK": (encoded(Image.new("CMYK", side), "JPEG", progressive=True), 400),
        "disposed": (hostile.disposed_gif(13_000), 60),
        "tags": (hostile.tiff(side, {273: (3, [16] * 5_000_000)}), 60),
    }
    for name, (data, limit) in fat.items():
        path = save(tmp_path / name, data)
        measured = [sys.executable, "-c", MEASURE, path]  # each in its own process, because only peaks can be measured
        done = subprocess.run(measured, capture_output=True, text=True, check=True)
        assert int(done.stdout) < limit, (name, done.stdout, done.stderr)


def test_libtiff_and_pillow_write_nothing_to_the_terminal(tmp_path):
    data = bytearray(encoded(corners(), "TIFF", compression="tiff_lzw"))
    data[9:60] = bytes(51)
    damaged = save(tmp_path / "a", bytes(data))
    many_samples = save(tmp_path / "b", hostile.tiff((8, 8), {277: (3, [2048])}))
    for path in (damaged, many_samples):
        done = subprocess.run([sys.executable, "-c", QUIET, path], capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("skipped\n", "")


def test_what_may_pass_is_tried_again(tmp_path, monkeypatch):
    waited, failures = [], iter([OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale handle")])
    monkeypatch.setattr(images.time, "sleep", waited.append)

    def flaky(*arguments):
        for error in failures:
            raise error
        return open(*arguments)

    monkeypatch.setattr(images, "open", flaky, raising=False)
    path = save(tmp_path / "a.png", encoded(corners(), "PNG"))
    assert close(load_image(path), corners())
    assert waited == [0.1, 1.0]
    failures = iter([OSError(errno.EIO, "Input/output error")] * 3)
    assert reason_of(path) == "Input/output error"
    assert waited == [0.1, 1.0] * 2
    reason_of(tmp_path / "missing.png")
    failures = iter([OSError(errno.EACCES, "Permission denied")])
    assert reason_of(path) == "Permission denied"
    assert waited == [0.1, 1.0] * 2


@pytest.mark.parametrize("magic", MAGICS)
def test_random_bytes_raise_nothing_else(tmp_path, magic):
    rng = random.Random(repr(magic))
    for _ in range(60):
        path = save(tmp_path / "a", magic + rng.randbytes(rng.choice((0, 1, 5, 40, 400, 4000))))
        try:
            assert load_image(path).mode == "RGB"
        except UnreadableImageError as error:
            json.dumps(error.reason).encode()


@pytest.mark.parametrize("kind", FILES)
def test_mutated_images_raise_nothing_else(tmp_path, kind):
    rng = random.Random(kind)
    for _ in range(60):
        data = bytearray(FILES[kind][0])
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(rng.choice((60, len(data))))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        with contextlib.suppress(UnreadableImageError):
            image = load_image(save(tmp_path / "a", bytes(data)))
            assert (image.mode, image.info) == ("RGB", {})


def test_content_hash(tmp_path):
    data = encoded(corners(), "PNG")
    path = save(tmp_path / "a", data)
    assert read_image(path)[1] == hashlib.sha256(data).hexdigest()[:16]
    [item] = ImagePool.scan(tmp_path, seed=0).take(1)
    assert item.content_hash == read_image(path)[1]


def test_labelled_questions_may_begin_with_a_byte_order_mark(tmp_path):
    save(tmp_path / "a.png", encoded(corners(), "PNG"))
    line = json.dumps({"image": "a.png", "question": "What?", "answer": "1"})
    path = save(tmp_path / "questions.jsonl", b"\xef\xbb\xbf" + line.encode())
    assert [found.question for found in load_questions(path)] == ["What?"]


# --- finding --------------------------------------------------------------------------------------------------------


def test_finds_images_beside_and_below_subfolders(tmp_path):  # fault 14
    data = encoded(corners(), "PNG")
    wanted = {"top.png", "sub/in.JPG", "sub/deep/er/x.webp", "sub/noext", "other/y.txt", "sub.png/z.png"}
    for name in wanted:
        save(tmp_path / name, data)
    for name in (".hidden.png", ".git/a.png", "sub/._x.png", "__MACOSX/a.png", "sub/__MACOSX/a.png"):
        save(tmp_path / name, data)
    for name in ("notes.txt", "sub/data.json", "BMs.txt", "empty"):
        save(tmp_path / name, b"" if name == "empty" else b"BM is how this text begins, and it is long enough")
    pool = ImagePool.scan(tmp_path, seed=0)
    assert len(pool) == len(wanted)
    assert set(names(pool.take(len(wanted)))) == wanted
    assert pool.skipped == {}
    save(tmp_path / "photo", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")  # reported under any name
    save(tmp_path / "index.html", b"<!doctype html>")  # not meant to be an image
    pool = ImagePool.scan(tmp_path, seed=0)
    pool.take(len(wanted) + 1)
    assert list(pool.skipped) == ["photo"]
    assert pool.source.path("sub/noext") == str(tmp_path / "sub" / "noext")


@pytest.mark.parametrize("kind", FILES)
def test_every_format_is_recognised_by_its_first_bytes(tmp_path, kind):
    save(tmp_path / "nameless", FILES[kind][0])
    assert len(ImagePool.scan(tmp_path, seed=0)) == 1


def test_unusable_folders_are_clear_errors(tmp_path):
    fill(tmp_path / "images", 2)
    for wrong, match in (
        (tmp_path / "imagse", r"imagse' \(No such file or directory\): check the path"),
        (tmp_path / "images" / "subb", "No such file"),
        (tmp_path / "images" / "00.png", "Not a directory"),
        ("", "No such file"),
        ("a\0b", "null"),
    ):
        with pytest.raises(ImageError, match=match):
            ImagePool.scan(wrong, seed=0)
    (tmp_path / "none").mkdir()
    save(tmp_path / "none" / "notes.txt", b"no image here")
    with pytest.raises(ImageError, match=r"No image in the folder '.*none': point to"):
        ImagePool.scan(tmp_path / "none", seed=0)
    (tmp_path / "none" / "link").symlink_to(tmp_path / "images")
    with pytest.raises(ImageError, match="link/: a link to a folder"):
        ImagePool.scan(tmp_path / "none", seed=0)


def test_negative_seed_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="non-negative"):
        ImagePool.scan(fill(tmp_path, 1), seed=-1)


def test_pipes_sockets_and_links_cannot_hang_it(tmp_path, monkeypatch):
    fill(tmp_path / "a", 2)
    os.mkfifo(tmp_path / "a" / "pipe.png")
    os.mkfifo(tmp_path / "a" / "pipe")
    (tmp_path / "a" / "device.png").symlink_to("/dev/zero")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "self.png").symlink_to(tmp_path / "a" / "self.png")
    (tmp_path / "a" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "a" / "linked.png").symlink_to(tmp_path / "a" / "00.png")
    with socket.socket(socket.AF_UNIX) as sock:
        monkeypatch.chdir(tmp_path / "a")  # the whole path can be too long for a socket
        sock.bind("s.png")
        pool = ImagePool.scan(tmp_path, seed=0)
    assert set(names(pool.take(3))) == {"a/00.png", "a/01.png", "a/linked.png"}
    assert pool.skipped == {
        "a/dangling.png": "No such file or directory",
        "a/device.png": "not a regular file",
        "a/loop/": "a link to a folder, which is not followed",
        "a/pipe.png": "not a regular file",
        "a/s.png": "not a regular file",
        "a/self.png": "Too many levels of symbolic links",
    }
    assert len(pool) == 3
    assert reason_of(tmp_path / "a" / "pipe.png") == "not a regular file"


def test_the_folder_itself_may_be_a_link(tmp_path):
    fill(tmp_path / "real", 1)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert names(ImagePool.scan(tmp_path / "link", seed=0).take(1)) == ["00.png"]


def test_an_unreadable_subfolder_is_reported(tmp_path):
    # Deeper than the longest path the system takes: this fails for root too, whom permissions do not stop.
    fill(tmp_path, 1)
    parts = ["d" * 250] * 20
    handles = [os.open(tmp_path, os.O_RDONLY)]
    for part in parts:
        os.mkdir(part, dir_fd=handles[-1])
        handles.append(os.open(part, os.O_RDONLY, dir_fd=handles[-1]))
    for handle in handles:
        os.close(handle)
    try:
        pool = ImagePool.scan(tmp_path, seed=0)
        [(name, reason)] = pool.skipped.items()
        assert name.startswith("ddd")
        assert "too long" in reason
        assert names(pool.take(2)) == ["00.png"] * 2
    finally:
        shutil.rmtree(tmp_path / parts[0])


def test_deep_trees_do_not_exhaust_the_stack(tmp_path):
    deep = tmp_path.joinpath(*["d"] * 1200)
    fill(tmp_path, 1)
    subprocess.run(["mkdir", "-p", deep], check=True)
    try:
        save(deep / "x.png", encoded(corners(), "PNG"))
        assert len(ImagePool.scan(tmp_path, seed=0)) == 2
    finally:
        subprocess.run(["rm", "-r", tmp_path / "d"], check=True)


def test_weird_names(tmp_path):
    data = encoded(corners(), "PNG")
    weird = [
        b"not-utf8-\xff.png",
        b"\\udcff.png",
        b"\xff.png",
        b"new\nline.png",
        b"esc\x1b[31m.png",
        "größe 图.png".encode(),
    ]
    for name in weird:
        try:
            Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(data)
        except OSError:
            pytest.skip("the file system allows UTF-8 names only")
    save(tmp_path / os.fsdecode(b"dir\xfe\n") / "bad\n.png", b"broken")
    pool = ImagePool.scan(tmp_path, seed=0)
    found = names(pool.take(6))
    assert len(set(found)) == 6
    assert {"größe 图.png", "new\\nline.png", "not-utf8-\\udcff.png", "\\udcff.png", "\\\\udcff.png"} <= set(found)
    assert len(pool.peek(9)) == 6
    assert list(pool.skipped) == ["dir\\udcfe\\n/bad\\n.png"]
    for name in found:
        assert name.isprintable()
        assert read_image(pool.source.path(name))[1] == read_image(pool.source.path(found[0]))[1]
    json.dumps(pool.state(), ensure_ascii=False).encode()
    with pytest.raises(UnreadableImageError) as caught:
        load_image(pool.source.path("dir\\udcfe\\n/bad\\n.png"))
    str(caught.value).encode()


# --- drawing --------------------------------------------------------------------------------------------------------


def test_order_is_seeded_and_every_epoch_covers_every_image_once(tmp_path):
    fill(tmp_path, 12)
    pool = ImagePool.scan(tmp_path, seed=3)
    epochs = [names(pool.take(12)) for _ in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 12 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert names(ImagePool.scan(str(tmp_path), seed=3).take(48)) == [name for epoch in epochs for name in epoch]
    assert names(ImagePool.scan(tmp_path, seed=4).take(12)) != epochs[0]
    assert names(ImagePool.scan(tmp_path, seed=2**70).take(12)) != epochs[0]


def test_order_is_the_same_on_every_machine(tmp_path):
    # Written down once: a change here breaks the resume of every saved run.
    sorted_names = ["B/5.png", "B/a/0.png", "a-b/4.png", "a.png", "a/2.png", "c/d/1.png"]
    for name in reversed(sorted_names):
        save(tmp_path / name, encoded(corners(), "PNG"))
    taken = names(ImagePool.scan(tmp_path, seed=0).take(12))
    assert "".join(str(sorted_names.index(name)) for name in taken) == "145203231045"


def test_skips_come_in_the_same_order_on_every_machine(tmp_path):
    fill(tmp_path, 1)
    links = [f"{i * 37 % 50:02}.jpg" for i in range(50)]
    for link in links:
        (tmp_path / link).symlink_to(tmp_path / "nowhere")
    assert list(ImagePool.scan(tmp_path, seed=0).skipped) == sorted(links)


def test_pixels_belong_to_their_names(tmp_path):
    for item in ImagePool.scan(fill(tmp_path, 9), seed=1).take(20):
        assert item.image.getpixel((1, 1)) == (int(item.name[:2]), 0, 0)


def test_fewer_images_than_asked_for_repeat(tmp_path):
    pool = ImagePool.scan(fill(tmp_path, 2), seed=0)
    taken = names(pool.take(7))
    assert all(sorted(taken[i : i + 2]) == ["00.png", "01.png"] for i in (0, 2, 4))
    assert len(taken) == 7
    assert pool.take(0) == []
    assert (pool.state()["epoch"], pool.state()["position"]) == (3, 1)


def test_each_undecodable_file_is_skipped_once_and_stops_nothing(tmp_path):
    fill(tmp_path, 5)
    save(tmp_path / "sub" / "broken.JPG", b"not a jpeg")
    save(tmp_path / "empty.png", b"")
    save(tmp_path / "phone.heic", b"\0\0\0\x18ftypheic")
    pool = ImagePool.scan(tmp_path, seed=0)
    assert len(pool) == 8
    taken = names(pool.take(15))
    assert sorted(taken) == sorted([f"{i:02}.png" for i in range(5)] * 3)
    assert set(pool.skipped) == {"sub/broken.JPG", "empty.png", "phone.heic"}
    assert all(reason and "\n" not in reason for reason in pool.skipped.values())
    assert len(pool) == 5
    save(tmp_path / "empty.png", encoded(corners(), "PNG"))
    assert "empty.png" not in names(pool.take(15))  # never tried again


def test_a_file_deleted_after_the_scan_is_skipped(tmp_path):
    pool = ImagePool.scan(fill(tmp_path, 3), seed=0)
    (tmp_path / "01.png").unlink()
    assert set(names(pool.take(6))) == {"00.png", "02.png"}
    assert pool.skipped == {"01.png": "No such file or directory"}
    shutil.rmtree(tmp_path)
    with pytest.raises(ImageError, match="None of the 3 images"):
        pool.take(1)


def test_all_corrupt_folder_is_an_error_and_ends(tmp_path):  # fault 14
    for i in range(5):
        save(tmp_path / f"{i}.png", b"junk")
    pool = ImagePool.scan(tmp_path, seed=0)
    for draw in (pool.take, pool.peek, pool.take):
        with pytest.raises(ImageError) as caught:
            draw(1)
        message = str(caught.value)
        assert str(tmp_path) in message
        assert "None of the 5 images" in message
        assert message.count("not a PNG") == 3
        assert "and 2 more" in message
    assert sorted(pool.skipped) == [f"{i}.png" for i in range(5)]


def test_peek_shows_the_first_of_epoch_0_and_does_not_move(tmp_path):
    fill(tmp_path, 6)
    save(tmp_path / "bad.png", b"junk")
    first = names(ImagePool.scan(tmp_path, seed=5).take(6))
    pool = ImagePool.scan(tmp_path, seed=5)
    for _ in range(3):
        before = pool.state()["epoch"], pool.state()["position"]
        assert names(pool.peek(4)) == first[:4]
        assert names(pool.peek(99)) == first
        assert (pool.state()["epoch"], pool.state()["position"]) == before
        pool.take(5)
    fresh = ImagePool.scan(tmp_path, seed=5)
    assert names(fresh.take(20))[15:] == names(pool.take(5))


def test_an_image_lost_during_its_own_step_still_has_its_thumbnail(tmp_path):
    pool = ImagePool.scan(fill(tmp_path / "pool", 2), seed=0)
    items = pool.take(2)
    shutil.rmtree(tmp_path / "pool")
    run = SimpleNamespace(recorder=Recorder.open(tmp_path / "run"))
    for item in items:
        assert (tmp_path / "run" / Run.thumbnail(cast(Run, run), item)).is_file()


@dataclass(frozen=True, kw_only=True)
class Beside(Processes):
    """One of two processes, as threads of this one."""

    count: int = 2
    barrier: threading.Barrier
    sent: dict[int, str]

    def gather(self, items: Sequence[Any], total: int) -> list[Any]:
        self.sent[self.index] = json.dumps(items)
        self.barrier.wait(10)
        found = [json.loads(self.sent[i % 2])[i // 2] for i in range(total)]
        self.barrier.wait(10)
        return found


def in_two_processes(folders: list[Path], draw: Callable[[ImagePool], Any]) -> list[Any]:
    barrier, sent = threading.Barrier(2), dict[int, str]()

    def work(index: int) -> Any:
        processes = Beside(index=index, barrier=barrier, sent=sent)
        try:
            return draw(ImagePool.scan(folders[index], 0, processes=processes))
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(work, range(2)))


def test_processes_draw_the_same_images_even_if_one_cannot_read_them(tmp_path):
    folders = [fill(tmp_path / "one", 6), fill(tmp_path / "other", 6)]
    save(folders[1] / "02.png", b"junk")  # cannot be read by the second only
    save(folders[0] / "03.png", b"junk")  # by the first only
    save(folders[1] / "04.png", (folders[1] / "05.png").read_bytes())  # has changed in between

    def draw(pool: ImagePool) -> Any:
        first = names(pool.peek(2))
        return first, [names(pool.take(n)) for n in (1, 2, 3, 4)], pool.state(), len(pool)

    one, other = in_two_processes(folders, draw)
    assert one == other
    assert set(one[2]["skipped"]) == {"02.png", "03.png", "04.png"}
    assert "different bytes" in one[2]["skipped"]["04.png"]
    save(folders[1] / "new.png", (folders[1] / "05.png").read_bytes())
    for message in in_two_processes(folders, draw):
        assert "do not see the same images" in message


# --- evaluation data ------------------------------------------------------------------------------------------------


def test_images_of_the_evaluation_data_are_set_aside_wherever_they_lie_and_whatever_their_names(tmp_path):
    pool = fill(tmp_path / "pool", 6)
    shutil.copy(pool / "01.png", pool / "twin.png")  # once more in the pool
    (pool / "link.png").symlink_to(pool / "01.png")
    shutil.copy(pool / "02.png", tmp_path / "elsewhere.jpg")
    save(tmp_path / "other.png", encoded(Image.new("RGB", (2, 2), (77, 0, 0)), "PNG"))  # not in the pool
    held_out = [pool / "01.png", tmp_path / "elsewhere.jpg", tmp_path / "other.png"]
    set_aside = ImagePool.scan(pool, seed=0, held_out=held_out)
    assert set_aside.skipped == dict.fromkeys(("01.png", "02.png", "link.png", "twin.png"), SET_ASIDE)
    assert len(set_aside) == 4
    assert set(names(set_aside.take(40))) == {"00.png", "03.png", "04.png", "05.png"}
    assert set_aside.state()["skipped"] == set_aside.skipped


def test_an_image_of_the_same_size_stays_and_others_are_not_read(tmp_path, monkeypatch):
    pool = fill(tmp_path / "pool", 3)
    save(pool / "large.png", encoded(corners(), "PNG"))
    data = (pool / "01.png").read_bytes()
    held_out = save(tmp_path / "held-out.png", data[:-1] + bytes([data[-1] ^ 1]))
    digest, read = folder._digest, []
    monkeypatch.setattr(folder, "_digest", lambda path: read.append(Path(path).name) or digest(path))
    assert ImagePool.scan(pool, seed=0, held_out=[held_out]).skipped == {}
    assert "large.png" not in read


def test_a_pool_of_held_out_images_alone_is_one_sentence(tmp_path):
    pool = fill(tmp_path / "pool", 2)
    with pytest.raises(
        ImageError, match=r"All 2 images in the folder '.*pool' belong to the evaluation data"
    ) as caught:
        ImagePool.scan(pool, seed=0, held_out=list(pool.iterdir()))
    assert "\n" not in str(caught.value)


def test_a_held_out_image_that_cannot_be_compared_is_named(tmp_path, monkeypatch):
    pool = fill(tmp_path / "pool", 2)

    def failing(path: str) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr(folder, "_digest", failing)
    with pytest.raises(ImageError, match=r"01\.png.*Input/output error"):
        ImagePool.scan(pool, seed=0, held_out=[pool / "01.png"])


def test_a_pool_resumes_with_the_same_evaluation_data_alone(tmp_path):
    pool = fill(tmp_path / "pool", 6)
    held_out = [pool / "01.png"]
    whole, cut = (ImagePool.scan(pool, seed=3, held_out=held_out) for _ in range(2))
    cut.take(4)
    resumed = ImagePool.scan(pool, seed=3, held_out=held_out)
    resumed.restore(cut.state())
    assert names(whole.take(12))[4:] == names(resumed.take(8))
    for others in ([], [pool / "02.png"], [pool / "01.png", pool / "02.png"]):
        with pytest.raises(ImageError, match="the evaluation data names others of them"):
            ImagePool.scan(pool, seed=3, held_out=others).restore(cut.state())


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", range(12))
def test_resume_continues_exactly(tmp_path, trial):
    rng = random.Random(trial)
    count = rng.randint(1, 9)
    fill(tmp_path, count)
    for i in range(rng.randint(0, 4)):
        save(tmp_path / f"bad{i}.png", b"junk")
    seed = rng.randrange(1000)
    whole, cut = ImagePool.scan(tmp_path, seed), ImagePool.scan(tmp_path, seed)
    for _ in range(12):
        n = rng.randint(0, 5)
        if rng.random() < 0.5:
            state = json.loads(json.dumps(cut.state()))
            cut = ImagePool.scan(tmp_path, seed)
            if rng.random() < 0.5:
                cut.take(rng.randint(0, 20))  # whatever it did before must not matter
            cut.restore(state)
            assert cut.state() == state
        expected, got = whole.take(n), cut.take(n)
        assert names(got) == names(expected)
        assert [item.image.tobytes() for item in got] == [item.image.tobytes() for item in expected]
        assert cut.state() == whole.state()
        assert list(cut.skipped.items()) == list(whole.skipped.items())
        assert len(cut) == len(whole)


def test_restored_skips_are_not_tried_again(tmp_path):
    fill(tmp_path, 2)
    save(tmp_path / "bad.png", b"junk")
    pool = ImagePool.scan(tmp_path, seed=0)
    pool.take(4)
    save(tmp_path / "bad.png", encoded(corners(), "PNG"))
    resumed = ImagePool.scan(tmp_path, seed=0)
    resumed.restore(pool.state())
    assert "bad.png" not in names(resumed.take(9))
    assert resumed.skipped == pool.skipped


def test_state_is_a_snapshot_and_small(tmp_path):
    fill(tmp_path, 40)
    save(tmp_path / "bad.png", b"junk")
    pool = ImagePool.scan(tmp_path, seed=0)
    state = pool.state()
    pool.take(50)
    assert state["skipped"] == {}
    assert len(json.dumps(pool.state())) < 400


def test_a_changed_folder_cannot_be_resumed(tmp_path):
    pool = ImagePool.scan(fill(tmp_path, 4), seed=0)
    pool.take(2)
    state = pool.state()
    save(tmp_path / "new.png", encoded(corners(), "PNG"))
    grown = ImagePool.scan(tmp_path, seed=0)
    before = grown.state()
    with pytest.raises(ImageError, match=r"added to, removed from or renamed .*4 images then, 5 now.*cannot resume"):
        grown.restore(state)
    assert grown.state() == before
    (tmp_path / "00.png").unlink()
    with pytest.raises(ImageError, match="4 images then, 4 now"):
        ImagePool.scan(tmp_path, seed=0).restore(state)
    (tmp_path / "new.png").rename(tmp_path / "00.png")
    ImagePool.scan(tmp_path, seed=0).restore(state)
    with pytest.raises(ImageError, match="seed 0, not 1"):
        ImagePool.scan(tmp_path, seed=1).restore(state)


def test_a_folder_that_grew_goes_on_with_its_old_listing(tmp_path):
    fill(tmp_path / "pool", 6)
    whole, cut = (ImagePool.scan(tmp_path / "pool", seed=2) for _ in range(2))
    cut.take(4)
    state, listing = json.loads(json.dumps(cut.state())), cut.names.text
    for name in ("zz.png", "0new.png", "sub/03.png", "03b.png"):
        save(tmp_path / "pool" / name, encoded(corners(), "PNG"))
    resumed = ImagePool.scan(tmp_path / "pool", seed=2)
    assert resumed.restore(state, listing) == [
        f"Images that were added to the folder '{tmp_path}/pool' since the run began: 4 (03b.png, 0new.png, "
        "sub/03.png, …). It goes on with the 6 that it began with; a new run draws all of them."
    ]
    assert names(resumed.take(14)) == names(whole.take(18))[4:]
    assert resumed.state() == whole.state()
    again = ImagePool.scan(tmp_path / "pool", seed=2)
    again.restore(resumed.state(), resumed.names.text)
    assert names(again.take(6)) == names(whole.take(6))


def test_images_that_were_removed_are_told_and_skipped(tmp_path):
    pool = ImagePool.scan(fill(tmp_path, 4), seed=0)
    pool.take(1)
    state, listing = pool.state(), pool.names.text
    (tmp_path / "02.png").unlink()
    resumed = ImagePool.scan(tmp_path, seed=0)
    assert resumed.restore(state, listing) == [
        f"Images that are no longer in the folder '{tmp_path}': 1 (02.png). They are skipped when they are drawn."
    ]
    assert set(names(resumed.take(9))) == {"00.png", "01.png", "03.png"}
    assert resumed.skipped == {"02.png": "No such file or directory"}
    for i in range(4):
        (tmp_path / f"{i:02}.png").unlink(missing_ok=True)
    save(tmp_path / "other.png", encoded(corners(), "PNG"))
    with pytest.raises(ImageError, match=r"None of the 4 images of the run is in .* any more: put them back"):
        ImagePool.scan(tmp_path, seed=0).restore(state, listing)


def test_a_listing_that_is_damaged_is_not_followed(tmp_path):
    pool = ImagePool.scan(fill(tmp_path, 4), seed=0)
    state, listing = pool.state(), pool.names.text
    save(tmp_path / "new.png", encoded(corners(), "PNG"))
    for damaged in (b"", listing[:-1], listing + b"\nx.png", b"\xff\n"):
        with pytest.raises(ImageError, match="4 images then, 5 now"):
            ImagePool.scan(tmp_path, seed=0).restore(state, damaged)


def test_a_forged_listing_reads_nothing_outside_of_the_folder(tmp_path):
    fill(tmp_path / "pool", 2)
    save(tmp_path / "secret.png", encoded(corners(), "PNG"))
    listing = b"../secret.png\n00.png"
    state = ImagePool.scan(tmp_path / "pool", seed=0).state()
    pool = ImagePool.scan(tmp_path / "pool", seed=0)
    pool.restore(state | {"fingerprint": hashlib.sha256(listing).hexdigest()}, listing)
    assert set(names(pool.take(6))) == {"00.png"}
    assert pool.skipped == {"../secret.png": "No such file or directory"}


def test_a_folder_that_grew_resumes_with_the_same_evaluation_data_alone(tmp_path):
    pool = fill(tmp_path / "pool", 6)
    held_out = [pool / "01.png"]
    began = ImagePool.scan(pool, seed=3, held_out=held_out)
    state, listing = began.state(), began.names.text
    save(pool / "new.png", encoded(corners(), "PNG"))
    shutil.copy(pool / "01.png", pool / "twin.png")  # set aside as well, and not in the listing
    [told] = ImagePool.scan(pool, seed=3, held_out=held_out).restore(state, listing)
    assert ": 1 (new.png)." in told
    for others in ([], [pool / "02.png"], [pool / "01.png", pool / "02.png"]):
        with pytest.raises(ImageError, match="the evaluation data names others of them"):
            ImagePool.scan(pool, seed=3, held_out=others).restore(state, listing)


def test_a_moved_folder_can_be_resumed(tmp_path):
    pool = ImagePool.scan(fill(tmp_path / "here", 5), seed=0)
    pool.take(3)
    moved = ImagePool.scan((tmp_path / "here").rename(tmp_path / "there"), seed=0)
    moved.restore(pool.state())
    rest = names(moved.take(4))
    assert rest == names(ImagePool.scan(tmp_path / "there", seed=0).take(7))[3:]
