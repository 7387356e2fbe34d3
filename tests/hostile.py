"""Image files that try to keep a decoder busy or to fill the memory, made from nothing."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 16: 8}  # bytes of a value of a TIFF tag, by its type


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(extra: bytes, side: int = 64) -> bytes:
    """A gray PNG with these chunks before its pixels."""
    data = encoded(Image.new("L", (side, side), 9), "PNG")
    return data[:33] + extra + data[33:]


def jpeg(extra: bytes = b"", side: int = 64, **options) -> bytes:
    """A gray JPEG with these segments before all others."""
    data = encoded(Image.new("RGB", (side, side), (9, 9, 9)), "JPEG", **options)
    return data[:2] + extra + data[2:]


def segment(marker: int, body: bytes) -> bytes:
    """A segment of a JPEG."""
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def scans(times: int, side: int = 64) -> bytes:
    """A progressive JPEG of 10 scans whose last is repeated."""
    data = jpeg(progressive=True, side=side)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * times + b"\xff\xd9"


def webp(extra: bytes) -> bytes:
    """A WebP with these chunks after its pixels."""
    data = encoded(Image.new("RGB", (64, 64)), "WEBP", lossless=True)
    return b"RIFF" + struct.pack("<I", len(data) - 8 + len(extra)) + data[8:] + extra


def gif(extra: bytes) -> bytes:
    """A GIF with these blocks before its frame."""
    data = encoded(Image.new("L", (8, 8)), "GIF")
    start = data.index(b",\0\0\0\0\x08\0\x08\0")
    return data[:start] + extra + data[start:]


def disposed_gif(side: int) -> bytes:
    """A GIF without pixels whose large frame is to be wiped out afterwards."""
    control, frame = b"!\xf9\4\x0d\0\0\0\0", b",\0\0\0\0" + struct.pack("<HHB", side, side, 0) + b"\2\2\x4c\1\0;"
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0) + control + frame


def tiff(size: tuple[int, int], tags: dict[int, tuple[int, Sequence[int]]], pixels: bytes = b"") -> bytes:
    """A gray BigTIFF of 8 bits with more tags: types and values by number. The pixels come first, at byte 16."""
    basic = {256: (4, [size[0]]), 257: (4, [size[1]]), 258: (3, [8]), 259: (3, [1]), 262: (3, [1])}
    entries, values, at = b"", b"", 16 + len(pixels)
    for tag, (kind, numbers) in sorted((basic | tags).items()):
        packed = b"".join(number.to_bytes(SIZES[kind], "little") for number in numbers)
        place = packed if len(packed) <= 8 else struct.pack("<Q", at + len(values))
        values += packed if len(packed) > 8 else b""
        entries += struct.pack("<HHQ", tag, kind, len(numbers)) + place.ljust(8, b"\0")
    head = b"II+\0\x08\0\0\0" + struct.pack("<Q", at + len(values))
    return head + pixels + values + struct.pack("<Q", len(entries) // 20) + entries + bytes(8)


def many_entries(count: int) -> bytes:
    """A BigTIFF whose page has the same tag over and over."""
    return b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, count) + struct.pack("<HHQQ", 256, 4, 1, 8) * count + bytes(8)


def jpeg_in_tiff() -> bytes:
    """A TIFF whose strip holds a progressive JPEG, with as many scans as one likes."""
    data = jpeg(progressive=True)
    tags = {258: (3, [8] * 3), 259: (3, [7]), 262: (3, [6]), 277: (3, [3]), 278: (3, [64])}
    return tiff((64, 64), {**tags, 273: (4, [16]), 279: (4, [len(data)])}, data)


def run_length_bmp(side: int) -> bytes:
    """A BMP of `side` lines that all end at once, so that Pillow fills them up byte by byte."""
    body = b"\1\1\0\0" * side
    info = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 14 + 40 + 1024 + len(body), 0, 0, 14 + 40 + 1024) + info + bytes(1024) + body


TOO_MANY = 100_001
BUSY = {  # and what is said of each
    "scans": (scans(1000), "more than 100 scans"),
    "Exif segments": (jpeg(segment(0xE1, b"Exif\0\0") * TOO_MANY), "100000 parts"),
    "comments of a JPEG": (jpeg(segment(0xFE, b"") * TOO_MANY), "100000 parts"),
    "tables": (jpeg(segment(0xDB, (b"\0" + bytes([9] * 64)) * 1000) * 5), "tables are larger"),
    "arithmetic JPEG": (jpeg(progressive=True).replace(b"\xff\xc2", b"\xff\xca"), "arithmetic"),
    "zTXt": (png(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1000))) * TOO_MANY), "100000 parts"),
    "IDAT": (png(chunk(b"IDAT", b"") * TOO_MANY), "100000 parts"),
    "WebP chunks": (webp(b"junk\0\0\0\0" * TOO_MANY), "100000 parts"),
    "GIF comments": (gif(b"!\xfe" + b"\1x" * TOO_MANY + b"\0"), "100000 parts"),
    "GIF extensions": (gif(b"!\xfe\1x\0" * TOO_MANY), "100000 parts"),
    "GIF junk": (gif(b"x" * TOO_MANY), "100000 parts"),
    "TIFF entries": (many_entries(TOO_MANY), "100000 parts"),
    "TIFF strips": (tiff((8, 8), {273: (3, [16] * TOO_MANY), 278: (3, [8])}, bytes(64)), "100000 parts"),
    "TIFF strips in turns": (tiff((8, 8), {273: (3, [16] * 1000), 278: (3, [4])}, bytes(64)), "many times over"),
    "TIFF tile": (tiff((8, 8), {322: (4, [2**20]), 323: (4, [2**10]), 324: (4, [16])}), "tiles are over the limit"),
    "progressive JPEG in TIFF": (jpeg_in_tiff(), "progressive or arithmetic"),
    "run lengths": (run_length_bmp(2001), "run-length"),
}
