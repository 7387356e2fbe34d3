"""What an image file is made of, before a decoder sees it.

A file of a few bytes can keep a decoder busy for minutes: by a thousand scans, a million segments, or tables that all
claim the same bytes. `stripped` leaves only what the first frame's pixels need, and refuses a file with more parts than
any real one has. Metadata is dropped, except for what says which way is up.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

MAX_PARTS = 100_000  # segments, chunks, blocks, or values of a TIFF tag
MAX_SCANS = 100  # of a JPEG; cameras write 1, optimizers up to about 20
MAX_METADATA = 2**18  # bytes of a chunk of metadata, and of all tables of a JPEG
MAX_RUN_LENGTH = 4_000_000  # pixels and bytes of a run-length encoded BMP, which Pillow decodes in Python

_PNG_ORIENTATION = (
    b"eXIf",
    b"tEXtRaw profile type exif\0",
    b"zTXtRaw profile type exif\0",
    b"iTXtXML:com.adobe.xmp\0\0",
)
_JPEG_ORIENTATION = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")
_JPEG_BARE = {0x00, 0x01, 0xFF, *range(0xD0, 0xD9)}  # fill bytes, and markers without a segment
_JPEG_TABLES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xDB, 0xDD}  # sizes of the image, Huffman codes and divisors
_JPEG_OTHER = {0xC5, 0xC6, 0xC7, *range(0xC9, 0xD0)}  # sizes of an arithmetic or hierarchical image

PNG = b"\x89PNG\r\n\x1a\n"
_BEGINNINGS = {
    PNG: "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+"), "TIFF"),  # the last two: BigTIFF
}
_OTHER_IMAGES = {
    b"\0\0\0\x0cjP  ": "a JPEG 2000 image",
    b"\xff\x4f\xff\x51": "a JPEG 2000 image",
    b"\0\0\0\x0cJXL ": "a JPEG XL image",
    b"\xff\x0a": "a JPEG XL image",
    b"8BPS": "a Photoshop image",
}
_BRANDS = dict.fromkeys((b"avif", b"avis"), "an AVIF image")  # before the others, which an AVIF may name too
_BRANDS |= dict.fromkeys((b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"), "a HEIC image")
_OTHER_FILES = {  # in lower case
    b"version https://git-lfs": "a Git LFS pointer, whose image was not downloaded",
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML file",
    b"%pdf": "a PDF document",
    b"%!ps": "a PostScript document",
    b"pk\3\4": "a ZIP archive",
    b"\0\0\1\0": "an icon",
    **{b"p%d%c" % (kind, space): "a PNM image" for kind in range(1, 8) for space in b" \n\r\t"},
}


def format_of(data: bytes) -> str | None:
    """Pillow's name of the format, one of six, that the first bytes of a file are of. None: it is something else.

    Pillow's other parsers never run: that of EPS would start ghostscript.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _BEGINNINGS.items() if data.startswith(magic)), None)


def name_of_other(data: bytes) -> str | None:
    """What a file is that is of no such format, as "a HEIC image". None: not known."""
    text = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    named = (name for magic, name in _OTHER_FILES.items() if text.startswith(magic))
    return _other_image(data) or next(named, None)


def begins_like_an_image(head: bytes) -> bool:
    """Whether the first 64 bytes of a file are those of an image, which may be one that cannot be decoded here."""
    if head.startswith(b"BM"):
        # A text can begin with "BM" too, but will not continue with one of the header sizes of BMP.
        return int.from_bytes(head[14:18], "little") in (12, 16, 40, 52, 56, 64, 108, 124)
    return format_of(head) is not None or _other_image(head) is not None


def _other_image(head: bytes) -> str | None:
    if head[4:8] == b"ftyp":  # of a HEIC, an AVIF or a video; the brands that the file claims to fit follow
        brands = [head[at : at + 4] for at in (8, *range(16, min(64, int.from_bytes(head[:4], "big")), 4))]
        return next((name for brand, name in _BRANDS.items() if brand in brands), None)
    return next((name for magic, name in _OTHER_IMAGES.items() if head.startswith(magic)), None)


def stripped(image_format: str, data: bytes, max_pixels: int) -> bytes:
    """A file with only what the pixels of its first frame need, and its orientation.

    Args:
        image_format: as `format_of` names it.
        data: the bytes of the file.
        max_pixels: limit for a tile of a TIFF; what is said of the whole image is not looked at.

    Raises:
        ValueError, struct.error, IndexError: the file has too many parts, or is damaged.
    """
    if image_format == "JPEG":
        return b"".join(_jpeg_parts(data))
    if image_format == "PNG":
        return PNG + b"".join(_png_parts(data))
    if image_format == "WEBP":
        chunks = b"".join(_webp_parts(data))
        return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks
    if image_format == "GIF":
        return b"".join(_gif_parts(data))
    (_check_bmp if image_format == "BMP" else _check_tiff)(data, max_pixels)
    return data


def _limited(count: int) -> None:
    if count > MAX_PARTS:
        raise ValueError(f"it is made of more than {MAX_PARTS} parts")


def _jpeg_parts(data: bytes) -> Iterator[bytes]:
    """The tables, the first Exif and the first XMP; then all scans, up to the end of the first image."""
    yield data[:2]
    at, count, tables, seen = 2, 0, 0, set[bytes]()
    while True:
        at = data.find(b"\xff", at)  # a decoder skips what lies between segments
        if at < 0:
            raise IndexError("no further segment")
        marker, count = data[at + 1], count + 1
        _limited(count)
        if marker in _JPEG_BARE:
            at += 1 if marker == 0xFF else 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 36]
        if marker == 0xDA:
            break
        if marker in _JPEG_OTHER:
            # Arithmetic decoding goes on at full cost where the data has ended, so its work would have no bound.
            raise ValueError("an arithmetic or hierarchical JPEG, which few programs read")
        if marker in _JPEG_TABLES or (marker in (0xE0, 0xEE) and body.startswith((b"JFIF\0", b"Adobe"))):
            tables += end - at
            if tables > MAX_METADATA:
                raise ValueError(f"its tables are larger than {MAX_METADATA} bytes")
            yield data[at:end]
        elif marker == 0xE1 and body.startswith(_JPEG_ORIENTATION) and body[:4] not in seen:
            seen.add(body[:4])
            yield data[at:end]
        at = max(end, at + 2)
    # In the scans, these two bytes stand only for the end of the image and for the start of a scan.
    end = data.find(b"\xff\xd9", at)
    end = len(data) if end < 0 else end + 2
    if data.count(b"\xff\xda", at, end) > MAX_SCANS:
        raise ValueError(f"it has more than {MAX_SCANS} scans")
    yield data[at:end]


def _png_parts(data: bytes) -> Iterator[bytes]:
    """The chunks of the default image, and metadata that may hold an orientation."""
    at, count, seen = len(PNG), 0, set[bytes]()
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end, count = at + 12 + length, count + 1
        _limited(count)
        useful = data.startswith(_PNG_ORIENTATION, at + 4) and length <= MAX_METADATA and _is_sound(data[at:end])
        if kind == b"IDAT":
            yield data[at:end]
        elif kind not in seen and (kind in (b"IHDR", b"PLTE", b"tRNS") or useful):
            seen.add(kind)
            yield data[at:end]
        at = end
        if kind == b"IEND":
            break
    yield struct.pack(">I4sI", 0, b"IEND", 0xAE426082)


def _is_sound(chunk: bytes) -> bool:
    """Whether Pillow will accept a chunk of metadata; if not, the pixels may still be fine."""
    if zlib.crc32(chunk[4:-4]).to_bytes(4, "big") != chunk[-4:]:
        return False
    if chunk[4:8] == b"zTXt":
        text = chunk[8:-4].partition(b"\0")[2][1:]
        try:
            return len(zlib.decompressobj().decompress(text, MAX_METADATA + 1)) <= MAX_METADATA
        except zlib.error:
            return False
    return True


def _webp_parts(data: bytes) -> Iterator[bytes]:
    """The first chunk of each kind that matters: of an animation, only the first frame."""
    at, count, seen = 12, 0, set[bytes]()
    stop = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while at + 8 <= stop:
        kind, length = struct.unpack_from("<4sI", data, at)
        end, count = at + 8 + length + length % 2, count + 1
        _limited(count)
        useful = kind in (b"EXIF", b"XMP ") and length <= MAX_METADATA
        if kind not in seen and (useful or kind in (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")):
            seen.add(kind)
            yield data[at : min(end, stop)]
        at = end


def _gif_parts(data: bytes) -> Iterator[bytes]:
    """The header, the transparent color, and everything from the first frame on, where a decoder stops by itself."""
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    yield data[:at]
    count, control = 0, b""
    while data[at] != 0x2C:
        if data[at] == 0x3B:
            raise ValueError("it has no frame")
        if data[at] != 0x21:
            at, count = at + 1, count + 1
            _limited(count)
            continue
        if data[at + 1] == 0xF9 and data[at + 2] == 4:
            # Only the transparent color: what to do after the frame would make Pillow allocate another one.
            control = b"\x21\xf9\4" + bytes((data[at + 3] & 1, 0, 0, data[at + 6], 0))
        at += 2
        while data[at]:
            at, count = at + 1 + data[at], count + 1
            _limited(count)
        at += 1
    yield control
    yield data[at:]


def gif_frames(data: bytes) -> int:
    """The number of frames of a GIF.

    Raises:
        ValueError: the file ends before it says so, or has more parts than any real one.
    """
    at, frames, count = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0), 0, 0
    try:
        while data[at] != 0x3B:
            is_frame, is_extension = data[at] == 0x2C, data[at] == 0x21
            if is_frame:
                frames += 1
                at += 11 + (3 << (data[at + 9] & 7) + 1 if data[at + 9] & 0x80 else 0)
            elif is_extension:
                at += 2
            count += 1
            _limited(count)
            while (is_frame or is_extension) and data[at]:
                at += 1 + data[at]
            at += 1
    except IndexError:
        raise ValueError(f"the clip ends early: the file is cut off after {max(0, frames - 1)} frames") from None
    return frames


def _check_bmp(data: bytes, _max_pixels: int) -> None:
    if int.from_bytes(data[14:18], "little") >= 40:
        width, height, _, compression = struct.unpack_from("<iiII", data, 18)
        if compression in (1, 2) and abs(width * height) + len(data) > MAX_RUN_LENGTH:
            raise ValueError(f"a run-length encoded BMP of more than {MAX_RUN_LENGTH} pixels and bytes")


def _check_tiff(data: bytes, max_pixels: int) -> None:
    """Check the tags of the first page. Pillow itself sees to it that they claim no more bytes than the file has."""
    big, order = data[2] == 43, "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
    _limited(count)
    entry = struct.Struct(order + ("HHQ" if big else "HHI"))
    tile, is_jpeg = {322: 1, 323: 1}, False  # the width and the length of a tile
    for i in range(count):
        at = start + (8 + 20 * i if big else 2 + 12 * i)
        tag, kind, values = entry.unpack_from(data, at)
        if kind not in (1, 2, 6, 7):  # numbers; bytes and text are never unpacked into Python's objects
            _limited(values)
        (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, at + entry.size)
        if tag in tile:
            tile[tag] = max(tile[tag], value)
        is_jpeg |= tag == 259 and value in (6, 7)
    if tile[322] * tile[323] > max_pixels:
        raise ValueError(f"its tiles are over the limit of {max_pixels} pixels")
    if is_jpeg and any(b"\xff%c" % marker in data for marker in (0xC2, *range(0xC5, 0xC8), *range(0xC9, 0xCC))):
        raise ValueError("a TIFF of progressive or arithmetic JPEGs")
