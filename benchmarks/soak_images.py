"""Decode mutated image files for as long as one likes, and count what comes of it.

    python benchmarks/soak_images.py --minutes 10 --keep /tmp/found

Valid files of every format are damaged at random: bytes are changed, cut off, repeated, or replaced by parts of another
file. None may raise anything but an `UnreadableImageError`, take more than 2 s of the processor, or add more than
600 MB to the memory. The number of a file is the seed of its damage, so that a file that crashes the process can be
made again: its number is in the folder's `last.txt`. Needs Linux, which tells the peak of a process's memory since it
was last asked.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

from PIL import Image

from ireasoner.training.images import UnreadableImageError, load_image

MAX_SECONDS, MAX_MEGABYTES = 2.0, 600.0
BROKEN = ("slow", "fat", "exceptions")


def valid_files(side: int) -> list[bytes]:
    """Files of one random picture in every format and mode."""
    noise = Image.frombytes("RGB", (side, side), random.Random(side).randbytes(3 * side * side))
    picture = Image.blend(noise, Image.linear_gradient("L").resize((side, side)).convert("RGB"), 0.8)
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    clear = picture.convert("RGBA")
    clear.putalpha(picture.convert("L"))
    kinds: list[tuple[str, Image.Image, dict]] = [
        *(("PNG", picture.convert(mode), {"exif": exif}) for mode in ("1", "L", "LA", "P", "I;16", "RGB")),
        ("PNG", clear, {"save_all": True, "icc_profile": bytes(500)}),
        ("JPEG", picture, {"exif": exif, "xmp": xmp, "comment": b"a" * 50, "icc_profile": bytes(500)}),
        *(("JPEG", picture.convert(mode), {"progressive": True, "quality": 95}) for mode in ("L", "RGB", "CMYK")),
        ("JPEG", picture, {"progressive": True, "restart_marker_rows": 1}),
        ("MPO", picture, {"save_all": True}),
        ("WEBP", picture, {"quality": 60, "exif": exif}),
        ("WEBP", clear, {"quality": 60, "xmp": xmp}),
        ("WEBP", clear, {"lossless": True}),
        ("WEBP", clear, {"save_all": True}),
        ("GIF", picture.convert("P"), {"save_all": True}),
        ("GIF", picture.convert("P"), {"transparency": 3, "disposal": 2, "comment": b"a" * 300}),
        *(("BMP", picture.convert(mode), {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
        *(
            ("TIFF", picture.convert(mode), {"exif": exif})
            for mode in ("1", "L", "P", "I", "F", "RGB", "CMYK", "YCbCr")
        ),
        *(
            ("TIFF", picture, {"compression": name, "tiffinfo": {278: 16}})
            for name in ("tiff_lzw", "packbits", "tiff_adobe_deflate", "jpeg", "lzma", "zstd")
        ),
        *(("TIFF", picture.convert("1"), {"compression": name}) for name in ("tiff_ccitt", "group3", "group4")),
        ("TIFF", picture.convert("F"), {"compression": "tiff_adobe_deflate", "big_tiff": True}),
        ("TIFF", picture, {"save_all": True}),
    ]
    files = []
    for image_format, image, options in kinds:
        buffer = io.BytesIO()
        if options.get("save_all"):
            options["append_images"] = [image.rotate(90), image.rotate(180)]
        image.copy().save(buffer, image_format, **options)  # a copy, since Pillow leaves its settings in what it saves
        files.append(buffer.getvalue())
    return files


def damaged(number: int, files: list[bytes]) -> bytes:
    """A file with one to four damages."""
    rng = random.Random(number)
    data = bytearray(rng.choice(files))
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(rng.choice((len(data), min(len(data), 200))))  # half of them in the header
        end = start + rng.choice((1, 4, 16, rng.randrange(1, 1000)))
        kind = rng.choice(("bytes", "bits", "size", "cut", "remove", "repeat", "repeat often", "splice"))
        if kind == "bytes":
            data[start:end] = rng.choice((b"\0", b"\xff", rng.randbytes(1))) * len(data[start:end])
        elif kind == "bits":
            data[start] ^= 1 << rng.randrange(8)
        elif kind == "size":  # numbers that a parser may trust
            length = rng.choice((2, 4))
            value = rng.choice((0, 1, 2**8, 4999, 2**15 - 1, 2**16 - 1, 2**24, 2**31 - 1, 2**32 - 1)) % 256**length
            data[start : start + length] = value.to_bytes(length, rng.choice(("big", "little")))
        elif kind == "cut":
            del data[max(start, 1) :]
        elif kind == "remove":
            del data[max(start, 1) : end]
        elif kind == "repeat":
            data[start:start] = data[start:end]
        elif kind == "repeat often":
            data[start:start] = data[start:end] * rng.choice((10, 1000))
        else:
            other = rng.choice(files)
            data[start:end] = other[(at := rng.randrange(len(other))) : at + rng.randrange(1, 5000)]
    return with_checksums(data) if rng.random() < 0.8 else bytes(data)


def with_checksums(data: bytes | bytearray) -> bytes:
    """A PNG in which the checksums of the chunks are right again, without which a decoder looks no further."""
    if not data.startswith(b"\x89PNG"):
        return bytes(data)
    mended, at = bytearray(data), 8
    while at + 12 <= len(mended):
        end = at + 8 + int.from_bytes(mended[at : at + 4], "big")
        if end + 4 <= len(mended):
            mended[end : end + 4] = zlib.crc32(mended[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(mended)


def peak_megabytes(*, reset: bool) -> float:
    """The peak of this process's memory since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> int:
    """Returns 1 if a file broke a promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first file (%(default)s)")
    parser.add_argument("--keep", type=Path, default=Path("soak-images"), help="for files that break a promise")
    arguments = parser.parse_args()
    counts = soak(60 * arguments.minutes, arguments.first, arguments.keep)
    return int(any(counts[name] for name in BROKEN))


def soak(seconds: float, first: int, keep: Path) -> Counter[str]:
    """Decode files from number `first` on for so long; how many there were, and how many broke which promise.

    Files that broke one are kept in the folder `keep`.
    """
    keep.mkdir(parents=True, exist_ok=True)
    files = valid_files(48) + valid_files(700)
    assert all(load_image(io_path(keep, data)) for data in files)
    counts, longest, most = Counter[str](), 0.0, 0.0
    number, end = first, time.monotonic() + seconds
    while time.monotonic() < end:
        data = damaged(number, files)
        path = io_path(keep, data)
        (keep / "last.txt").write_text(f"{number}\n")
        before, started, broken = peak_megabytes(reset=True), time.process_time(), ""
        try:
            load_image(path)
            counts["decoded"] += 1
        except UnreadableImageError:
            counts["skipped"] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                break
            counts["exceptions"] += 1
            broken = f"{type(error).__name__}: {error}"
        used, megabytes = time.process_time() - started, peak_megabytes(reset=False) - before
        counts["files"] += 1
        counts["slow"] += used > MAX_SECONDS
        counts["fat"] += megabytes > MAX_MEGABYTES
        longest, most = max(longest, used), max(most, megabytes)
        if broken or used > MAX_SECONDS or megabytes > MAX_MEGABYTES:
            (keep / f"{number}.bin").write_bytes(data)
            print(f"file {number}: {used:.2f} s, {megabytes:.0f} MB {broken}", flush=True)
        number += 1
        if counts["files"] % 5000 == 0:
            report(counts, longest, most)
    report(counts, longest, most)
    return counts


def io_path(folder: Path, data: bytes) -> Path:
    """Write the file that is decoded next."""
    path = folder / "next.bin"
    path.write_bytes(data)
    return path


def report(counts: Counter[str], longest: float, most: float) -> None:
    """Print what was found so far."""
    names = ("files", "decoded", "skipped", *BROKEN)
    told = ", ".join(f"{counts[name]} {name}" for name in names)
    print(f"{told}; longest {longest:.2f} s, most {most:.0f} MB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
