"""Open, draw from and resume pools of many small images of every kind, and measure time and memory.

    python benchmarks/million_images.py --images 1000000 --folder /tmp/million

The images are PNGs of about 150 bytes, each with pixels of its own. For each kind (a folder of files, Parquet files in
groups of 1000 rows, a set as `datasets` saves it, and 100 tar files), a process of its own opens the pool, draws 200
images in the run's order, and restores the pool from its state and its listing. It prints the seconds and how much
more memory the process took at its peak than before. What was written is deleted at the end. Needs Linux.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as parquet

KINDS = ("folder", "parquet", "saved", "shards")
DRAWS, PARTS, SIDE = 200, 100, 6


def png(number: int) -> bytes:
    """A PNG whose pixels tell its number."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(">Q", number).rjust(3 * SIDE, b"\x55")
    pixels = chunk(b"IDAT", zlib.compress(row * SIDE, 1))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def parts(count: int) -> Iterator[tuple[int, range]]:
    """The numbers of all images in parts of the same size."""
    for part in range(PARTS):
        yield part, range(count * part // PARTS, count * (part + 1) // PARTS)


def write(kind: str, folder: Path, count: int) -> None:
    """Write a pool of so many images."""
    folder.mkdir(parents=True)
    for part, numbers in parts(count):
        images = [png(number) for number in numbers]
        column = pa.StructArray.from_arrays([pa.array(images), pa.nulls(len(images), pa.string())], ["bytes", "path"])
        table = pa.table({"image": column})
        if kind == "folder":
            (folder / f"{part:03}").mkdir()
            for number, data in zip(numbers, images, strict=True):
                (folder / f"{part:03}" / f"{number:07}.png").write_bytes(data)
        elif kind == "parquet":
            parquet.write_table(table, folder / f"train-{part:05}.parquet", row_group_size=1000)
        elif kind == "saved":
            with pa.ipc.new_stream(folder / f"data-{part:05}.arrow", table.schema) as file:
                file.write_table(table, max_chunksize=1000)
        else:
            with tarfile.open(folder / f"shard-{part:06}.tar", "w") as tar:
                for number, data in zip(numbers, images, strict=True):
                    member = tarfile.TarInfo(f"{number:07}.png")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    if kind == "saved":
        files = [{"filename": path.name} for path in sorted(folder.glob("*.arrow"))]
        (folder / "state.json").write_text(json.dumps({"_data_files": files}))
        (folder / "dataset_info.json").write_text("{}")


def memory(name: str) -> float:
    """Megabytes of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def measure(folder: str) -> dict[str, float]:
    """Open a pool, draw from it, and restore it."""
    from ireasoner.training.items import ImagePool
    from ireasoner.training.sources import table  # noqa: F401  its libraries are no part of what is measured

    def timed(call) -> tuple[float, object]:
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start, result

    before = memory("VmRSS")
    opening, pool = timed(lambda: ImagePool.scan(folder, seed=0))
    found = {"images": len(pool.names), "open_seconds": opening, "open_megabytes": memory("VmHWM") - before}
    drawing, _ = timed(lambda: pool.take(DRAWS))
    found |= {"draw_milliseconds": 1000 * drawing / DRAWS, "peak_megabytes": memory("VmHWM") - before}
    state, listing = pool.state(), pool.names.text
    found |= {"kept_megabytes": memory("VmRSS") - before, "listing_megabytes": len(listing) / 2**20}
    del pool
    opening, pool = timed(lambda: ImagePool.scan(folder, seed=0))
    restoring, _ = timed(lambda: pool.restore(state, listing))
    return found | {"resume_seconds": opening + restoring}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--images", type=int, default=1_000_000, help="(%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--folder", type=Path, default=Path("million"), help="written, and deleted (%(default)s)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    for kind in arguments.kinds:
        pool = arguments.folder / kind
        try:
            write(kind, pool, arguments.images)
            command = [sys.executable, __file__, "--measure", str(pool)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
            figures = {name: round(value, 2) for name, value in json.loads(done.stdout).items()}
            print(json.dumps({"kind": kind, **figures}), flush=True)
        finally:
            shutil.rmtree(pool, ignore_errors=True)
    arguments.folder.rmdir()


if __name__ == "__main__":
    main()
