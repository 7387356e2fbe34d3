"""Images wherever they lie: tables, tar shards, saved sets and addresses, each listed, read and resumed exactly."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as parquet
import pytest
from PIL import Image

import hostile
from hub import COMMIT, OLDER, serving
from ireasoner.app.paths import absolute
from ireasoner.playground import world
from ireasoner.studies.ablate import arm_config, prepare, settle
from ireasoner.training.config import is_dataset_id, load_config, resolve
from ireasoner.training.images import ImageError, UnreachableError
from ireasoner.training.items import SET_ASIDE, ImagePool
from ireasoner.training.loop import resume, start
from ireasoner.training.recorder import read_episodes, read_records
from ireasoner.training.sources import files as source_files
from ireasoner.training.sources import table
from ireasoner.training.sources.finding import pinned
from ireasoner.training.sources.source import Names
from ireasoner.training.state import Observer

pytestmark = pytest.mark.usefixtures("copied_models")


def picture(red: int) -> bytes:
    """A 2x2 PNG whose red tells which one it is."""
    return hostile.encoded(Image.new("RGB", (2, 2), (red, 0, 0)), "PNG")


def reds(pool: ImagePool, count: int) -> list[int]:
    return [item.image.getpixel((0, 0))[0] for item in pool.take(count)]


def structs(*reds_: int) -> list[dict[str, Any]]:
    """Images as `datasets` writes them."""
    return [{"bytes": picture(red), "path": f"{red}.png"} for red in reds_]


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, **options)
    return path


def write_tar(path: Path, contents: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def error_of(place: object, **options: Any) -> str:
    """The one sentence that a place is refused with."""
    with pytest.raises(ImageError) as caught:
        ImagePool.scan(str(place), seed=0, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- each kind --------------------------------------------------------------------------------------------------------

TEN = [picture(red) for red in range(10)]


def in_parquet(folder: Path, images: Sequence[bytes] = TEN) -> str:
    for shard, part in enumerate(np.array_split(np.array(images, object), 2)):
        columns = {"image": [{"bytes": data, "path": None} for data in part], "label": list(range(len(part)))}
        write_parquet(folder / f"train-{shard:05}-of-00002.parquet", columns, row_group_size=2)
    return str(folder)


def in_a_saved_set(folder: Path, images: Sequence[bytes] = TEN) -> str:
    features = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")})
    rows = {"picture": [Image.open(io.BytesIO(data)) for data in images], "text": list(map(str, range(len(images))))}
    saved = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": saved, "test": saved.select(range(2))}).save_to_disk(folder)
    return str(folder)


def in_shards(folder: Path, images: Sequence[bytes] = TEN) -> str:
    for shard, part in enumerate(np.array_split(np.array(images, object), 2)):
        contents = {
            f"{i}.{ending}": data for i, png in enumerate(part) for ending, data in (("png", png), ("txt", b"x"))
        }
        write_tar(folder / f"shard-{shard:06}.tar", contents)
    return str(folder)


def behind_an_address(folder: Path, images: Sequence[bytes] = TEN) -> str:
    address = f"memory://{folder.name}-{zlib.crc32(str(folder).encode())}"
    fsspec.filesystem("memory").pipe({f"{address}/sub/{i}.png": data for i, data in enumerate(images)})
    return address


datasets.disable_progress_bars()
KINDS: dict[str, Callable[..., str]] = {
    "parquet": in_parquet,
    "saved set": in_a_saved_set,
    "shards": in_shards,
    "address": behind_an_address,
}


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return KINDS[request.param](tmp_path / "images")


def test_every_image_is_drawn_once_an_epoch_and_resumes_exactly(place: str):
    whole, cut = ImagePool.scan(place, seed=1), ImagePool.scan(place, seed=1)
    order = reds(whole, 20)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert reds(cut, 7) == order[:7]
    resumed = ImagePool.scan(place, seed=1)
    resumed.restore(json.loads(json.dumps(cut.state())))
    assert reds(resumed, 13) == order[7:]
    assert resumed.state() == whole.state()
    assert all(name.isprintable() for name in resumed.names)


def test_images_of_the_evaluation_data_are_set_aside_when_they_are_drawn(place: str, tmp_path: Path):
    paths = []
    for item in ImagePool.scan(place, seed=0).take(2):
        source = ImagePool.scan(place, seed=0).source
        paths.append(tmp_path / f"held-out-{len(paths)}")
        paths[-1].write_bytes(source.read(item.name, 10**6))
    pool = ImagePool.scan(place, seed=1, held_out=paths)
    assert pool.compares_when_drawing
    drawn = reds(pool, 16)
    assert len(set(drawn)) == 8
    assert (pool.set_aside, set(pool.skipped.values())) == (2, {SET_ASIDE})
    ImagePool.scan(place, seed=1, held_out=paths).restore(pool.state())
    for others in ([], paths[:1]):
        with pytest.raises(ImageError, match="the evaluation data names others of them"):
            ImagePool.scan(place, seed=1, held_out=others).restore(pool.state())


def test_names_are_those_of_files_and_rows(tmp_path: Path):
    assert list(ImagePool.scan(in_parquet(tmp_path / "a"), seed=0).names)[4:6] == [
        "train-00000-of-00002.parquet#4",
        "train-00001-of-00002.parquet#0",
    ]
    assert ImagePool.scan(in_a_saved_set(tmp_path / "b"), seed=0).names[0] == "data-00000-of-00001.arrow#0"
    assert list(ImagePool.scan(in_shards(tmp_path / "c"), seed=0).names)[4:6] == [
        "shard-000000.tar/4.png",
        "shard-000001.tar/0.png",
    ]
    assert ImagePool.scan(behind_an_address(tmp_path / "d"), seed=0).names[0] == "sub/0.png"


def test_what_was_added_is_told_and_left_out(place: str, tmp_path: Path):
    if "://" in place or "dataset_dict.json" in os.listdir(place):
        pytest.skip("files are added to a folder")
    pool = ImagePool.scan(place, seed=0)
    state, listing = pool.state(), pool.names.text
    first = next(path for path in sorted(Path(place).iterdir()))
    shutil.copy(first, first.with_name(f"more{first.suffix}"))
    grown = ImagePool.scan(place, seed=0)
    [told] = grown.restore(state, listing)
    assert f"since the run began: 5 (more{first.suffix}" in told
    assert grown.names.text == listing
    assert reds(grown, 10) == reds(pool, 10)


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_a_column_may_hold_bytes_alone(tmp_path: Path, kind: pa.DataType):
    column = pa.array([picture(i) for i in range(3)], kind)
    path = write_parquet(tmp_path / "a.parquet", {"x": [1, 2, 3], "photo": column, "audio": [b"RIFF"] * 3})
    assert sorted(reds(ImagePool.scan(path, seed=0), 3)) == [0, 1, 2]


def test_a_list_with_one_image_is_that_image(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", {"images": [structs(7), structs(8), structs(1, 2), []]})
    pool = ImagePool.scan(path, seed=0)
    assert sorted(reds(pool, 4)) == [7, 7, 8, 8]
    assert pool.skipped == {
        "a.parquet#2": "the row has 2 images, and one is needed",
        "a.parquet#3": "the row has 0 images, and one is needed",
    }


def test_rows_without_an_image_are_skipped_with_a_reason(tmp_path: Path):
    rows: list[Any] = structs(0, 1, 2)
    rows += [None, {"bytes": None, "path": "/etc/passwd"}, {"bytes": None, "path": None}, {"bytes": b"", "path": None}]
    rows += [{"bytes": b"text", "path": None}, {"bytes": bytes(300), "path": None}]
    pool = ImagePool.scan(write_parquet(tmp_path / "a.parquet", {"image": rows}), seed=0, max_pixels=4)
    assert set(reds(pool, 9)) == {0, 1, 2}
    assert {name.rpartition("#")[2]: reason for name, reason in pool.skipped.items()} == {
        "3": "the row holds no image",
        "4": "the row names an image file and does not hold it",
        "5": "the row holds no image",
        "6": "the file is empty",
        "7": "not a PNG, JPEG, WebP, GIF, BMP or TIFF image, or its header is damaged",
        "8": "not a PNG, JPEG, WebP, GIF, BMP or TIFF image, or its header is damaged",
    }


def test_a_row_of_many_bytes_is_refused_before_it_is_copied(tmp_path: Path):
    rows = [*structs(1), {"bytes": picture(2) + bytes(2**24 + 100), "path": None}]
    pool = ImagePool.scan(write_parquet(tmp_path / "a.parquet", {"image": rows}), seed=0, max_pixels=4)
    assert set(reds(pool, 3)) == {1}
    assert "is over the limit of 16777248 bytes" in pool.skipped["a.parquet#1"]


def test_a_message_does_not_repeat_whatever_a_file_calls_its_columns(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", {f"{i}\n" + "x" * 10**4: [1] for i in range(100)})
    assert len(error_of(path)) < 2000
    assert len(error_of(path, column="image")) < 2000


def test_the_column_is_named_where_it_is_not_clear(tmp_path: Path):
    both = write_parquet(tmp_path / "both.parquet", {"front": structs(1), "back": structs(2), "text": ["x"]})
    none = write_parquet(tmp_path / "none.parquet", {"text": ["x"], "audio": [b"RIFF"]})
    assert error_of(both).endswith("has several columns of images (front, back): choose one with --image-column.")
    assert "has no column of images (text, audio)" in error_of(none)
    assert reds(ImagePool.scan(both, seed=0, column="back"), 1) == [2]
    assert "has no column 'side' (--image-column), but: front, back, text." in error_of(both, column="side")
    assert "'text' of both.parquet" in error_of(both, column="text")
    assert "holds no images, but string" in error_of(both, column="text")
    assert "--image-column is for tables" in error_of(in_shards(tmp_path / "tar"), column="text")
    mixed = tmp_path / "mixed"
    write_parquet(mixed / "a.parquet", {"image": structs(1)})
    write_parquet(mixed / "b.parquet", {"picture": structs(1)})
    assert "b.parquet in the table" in error_of(mixed)


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files_of_both_forms_are_read(tmp_path: Path, kind: str):
    content = pa.table({"image": structs(*range(5))})
    writer = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with writer(tmp_path / "a.arrow", content.schema) as file:
        file.write_table(content, max_chunksize=2)
    assert sorted(reds(ImagePool.scan(tmp_path / "a.arrow", seed=0), 5)) == [0, 1, 2, 3, 4]


def test_a_compressed_arrow_file_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(table, "MAX_DECODED", 10**6)
    content = pa.table({"image": [bytes(10**6)] * 4})
    with pyarrow.ipc.new_stream(
        tmp_path / "a.arrow", content.schema, options=pyarrow.ipc.IpcWriteOptions(compression="zstd")
    ) as file:
        file.write_table(content, max_chunksize=1)
    assert (tmp_path / "a.arrow").stat().st_size < 10**5
    assert "it is compressed, and would fill the memory" in error_of(tmp_path / "a.arrow")


def test_an_image_that_stands_in_every_row_does_not_fill_the_memory(tmp_path: Path):
    large = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3000, np.int32)), pa.array([picture(3) + bytes(2**22)]))
    path = write_parquet(tmp_path / "a.parquet", {"image": large}, compression="zstd", store_schema=False)
    assert path.stat().st_size < 10**5
    pool, before = ImagePool.scan(path, seed=0), pa.total_allocated_bytes()
    pa.default_memory_pool().release_unused()
    assert reds(pool, 2) == [3, 3]
    assert pa.default_memory_pool().max_memory() - before < 2**29  # all rows of it would take 12 GB


@pytest.mark.parametrize("damage", ["cut", "footer", "text", "empty"])
@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_damaged_table_is_one_sentence(tmp_path: Path, ending: str, damage: str):
    path = write_parquet(tmp_path / "a.parquet", {"image": structs(1, 2)})
    if ending == "arrow":
        content = parquet.read_table(path)
        path = tmp_path / "a.arrow"
        with pyarrow.ipc.new_stream(path, content.schema) as file:
            file.write_table(content)
    data = path.read_bytes()
    damaged = {
        "cut": data[: len(data) // 2],
        "footer": data[:4] + bytes(40) + data[-8:],
        "text": b"x" * 99,
        "empty": b"",
    }
    path.write_bytes(damaged[damage])
    assert f"Cannot read the table '{path}' (a.{ending}: " in error_of(path)


def test_damaged_pages_cost_their_rows_alone(tmp_path: Path):
    columns = {"image": [picture(red) for red in range(6)]}
    path = write_parquet(tmp_path / "a.parquet", columns, row_group_size=2, use_dictionary=False)
    data = bytearray(path.read_bytes())
    spot = parquet.read_metadata(path).row_group(0).column(0).data_page_offset
    data[spot : spot + 40] = b"\xff" * 40
    path.write_bytes(data)
    pool = ImagePool.scan(path, seed=0, column="image")
    assert set(reds(pool, 8)) == {2, 3, 4, 5}
    assert set(pool.skipped) == {"a.parquet#0", "a.parquet#1"}
    assert all(reason and "\n" not in reason for reason in pool.skipped.values())


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_random_damage_of_a_table_raises_nothing_else(tmp_path: Path, ending: str):
    rng = np.random.default_rng(0)
    path = write_parquet(tmp_path / "a.parquet", {"image": structs(*range(6))}, row_group_size=3)
    if ending == "arrow":
        content = parquet.read_table(path)
        path = tmp_path / "a.arrow"
        with pyarrow.ipc.new_stream(path, content.schema) as file:
            file.write_table(content, max_chunksize=3)
    whole = path.read_bytes()
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.integers(len(data), size=rng.integers(1, 6)):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        with contextlib.suppress(ImageError):
            ImagePool.scan(path, seed=0, column=rng.choice([None, "image"])).take(3)


def test_a_set_whose_files_are_missing_is_one_sentence(tmp_path: Path):
    in_a_saved_set(tmp_path / "set")
    test = tmp_path / "set" / "test"
    assert len(ImagePool.scan(test, seed=0)) == 2
    shutil.copy(test / "data-00000-of-00001.arrow", test / "cache-1.arrow")  # as `map` leaves it, and not of the set
    assert len(ImagePool.scan(test, seed=0)) == 2
    os.remove(test / "data-00000-of-00001.arrow")
    assert "Of the 1 files of" in error_of(test)
    (test / "state.json").write_text("{}")
    assert "its files are damaged (KeyError)" in error_of(test)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["test", "validation"]}')
    assert "has no split train: name one of its folders test, validation." in error_of(tmp_path / "set")


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_every_form_of_tar_are_found(tmp_path: Path, form: int):
    deep = "/".join(["d" * 60] * (3 if form == tarfile.USTAR_FORMAT else 9))
    contents = {"a.png": picture(0), f"{deep}/b.png": picture(1), "./c.JPG": picture(2), "d.txt": b"x" * 600}
    if form != tarfile.USTAR_FORMAT:
        contents["größe.png"] = picture(3)
    path = write_tar(tmp_path / "s.tar", contents | {".hidden.png": b"", "__MACOSX/x.png": b"", "._e.png": b""}, form)
    pool = ImagePool.scan(path, seed=0)
    assert set(pool.names) == {f"s.tar/{name.removeprefix('./')}" for name in contents if name != "d.txt"}
    assert sorted(reds(pool, len(pool))) == list(range(len(pool)))


def test_links_and_doubles_in_a_tar_are_told_and_never_followed(tmp_path: Path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for red in (1, 2):
            member = tarfile.TarInfo("a.png")
            member.size = len(picture(red))
            tar.addfile(member, io.BytesIO(picture(red)))
        for kind, name in ((tarfile.SYMTYPE, "soft.png"), (tarfile.LNKTYPE, "hard.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        member = tarfile.TarInfo("/abs/up\x1b.png")
        member.size = len(picture(3))
        tar.addfile(member, io.BytesIO(picture(3)))
    pool = ImagePool.scan(tmp_path, seed=0)
    assert list(pool.names) == ["s.tar//abs/up\\x1b.png", "s.tar/a.png"]
    assert sorted(reds(pool, 2)) == [1, 3]
    reason = "a link, or not a regular file"
    told = {name.partition(" ")[0]: reason for name, reason in pool.skipped.items()}
    assert told == {
        "s.tar/soft.png": reason,
        "s.tar/hard.png": reason,
        "s.tar/a.png": "another file of the same name",
    }


def forged(size: bytes, kind: bytes = b"0", name: bytes = b"a.png") -> bytes:
    """A header with this size, and a sum that fits."""
    header = bytearray(
        name.ljust(100, b"\0") + bytes(24) + size.ljust(12, b"\0") + bytes(12) + b" " * 8 + kind + bytes(355)
    )
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (forged(b"77777777777"), "it ends early"),
        (forged(b"\xff" * 12), "it ends early"),
        (forged(b"\x80" + b"\xff" * 11), "it ends early"),
        (forged(b"99999999999"), "invalid literal"),
        (forged(b"10000000", b"L") + bytes(2**21), "is too long"),
        (forged(b"10000000", b"x") + bytes(2**21), "is too long"),
        (forged(b"1000", b"x") + b"9999999 path".ljust(512, b"x"), "an extended header is damaged"),
        (forged(b"1000", b"x") + b"0 path=x\n".ljust(512, b"\0"), "an extended header is damaged"),
        (forged(b"1000", b"S") + bytes(512), "a sparse file"),
        (b"x" * 5000, "invalid literal"),
        (bytes(511) + b"x" + bytes(512), "there is no header at byte 0"),
        (b"\x1f\x8b" + bytes(1000), "it is compressed: unpack it first"),
        (forged(b"1000") + bytes(100), "it ends early"),
        (forged(b"0") + bytes(100), "it ends early"),
    ],
)
def test_a_hostile_tar_is_one_sentence(tmp_path: Path, data: bytes, reason: str):
    (tmp_path / "s.tar").write_bytes(data)
    told = error_of(tmp_path)
    assert told.startswith("Cannot read the tar file s.tar of the shards '")
    assert reason in told


def test_a_tar_that_is_cut_is_one_sentence_wherever_it_is_cut(tmp_path: Path):
    path = write_tar(tmp_path / "s.tar", {"a.png": picture(1) + bytes(600), "b.png": picture(2)})
    data = path.read_bytes()
    for length in (100, 600, 1100, 1500, 1600, 2100, 2500):
        path.write_bytes(data[:length])
        assert "(it ends early): it is damaged or incomplete" in error_of(path)


def test_random_damage_of_a_tar_raises_nothing_else(tmp_path: Path):
    rng = np.random.default_rng(0)
    whole = write_tar(tmp_path / "s.tar", {f"{i}.png": picture(i) for i in range(4)}, tarfile.PAX_FORMAT).read_bytes()
    for _ in range(200):
        data = bytearray(whole)
        for at in rng.integers(len(data), size=rng.integers(1, 4)):
            data[at] = rng.integers(256)
        (tmp_path / "s.tar").write_bytes(data)
        with contextlib.suppress(ImageError):
            ImagePool.scan(tmp_path / "s.tar", seed=0).take(2)


# --- places -----------------------------------------------------------------------------------------------------------


def test_patterns_and_mixed_folders(tmp_path: Path):
    in_parquet(tmp_path)
    in_shards(tmp_path)
    assert "holds Parquet files and tar files: name those of one kind" in error_of(tmp_path)
    assert len(ImagePool.scan(tmp_path / "train-00000*.parquet", seed=0)) == 5
    assert len(ImagePool.scan(tmp_path / "*.tar", seed=0)) == 10
    assert "No image in" in error_of(tmp_path / "*.jpg")
    (tmp_path / "a*b").mkdir()
    (tmp_path / "a*b" / "x.png").write_bytes(picture(5))
    assert reds(ImagePool.scan(tmp_path / "a*b", seed=0), 1) == [5]
    (tmp_path / "a.png").write_bytes(picture(77))  # a folder with images is one of images, as it always was
    assert reds(ImagePool.scan(tmp_path, seed=0), 1) == [77]


def test_links_in_a_folder_of_tables_do_not_lead_round_in_a_circle(tmp_path: Path):
    in_parquet(tmp_path / "real")
    (tmp_path / "pool" / "sub").mkdir(parents=True)
    (tmp_path / "pool" / "sub" / "loop").symlink_to(tmp_path / "pool")
    (tmp_path / "pool" / "a.parquet").symlink_to(tmp_path / "real" / "train-00000-of-00002.parquet")  # as the hub does
    assert list(ImagePool.scan(tmp_path / "pool", seed=0).names) == [f"a.parquet#{row}" for row in range(5)]
    (tmp_path / "pool" / "b.parquet").symlink_to(tmp_path / "real")
    assert "not a regular file" in error_of(tmp_path / "pool")


def test_an_ablation_takes_images_from_a_table(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", {"front": structs(1, 2), "back": structs(3, 4)})
    (tmp_path / "held-out.png").write_bytes(picture(3))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "held-out.png", "question": "How many?", "answer": "1"}))
    given = {"images": str(path), "data": str(tmp_path / "rows.jsonl"), "recipes": ("paper",), "questions": 1}
    settings = settle(tmp_path / "out", {**given, "training": {"image_column": "back"}})
    prepare(tmp_path / "out", settings)
    config = arm_config(tmp_path / "out", settings, "paper", 0)
    assert (config.images, config.image_column) == (str(path), "back")
    with pytest.raises(ImageError, match=r"several columns of images \(front, back\)"):
        prepare(tmp_path / "out", settle(tmp_path / "other", {**given, "training": {}}))


def test_compressed_archives_are_one_sentence(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    assert "holds compressed archives" in error_of(tmp_path)
    os.mkfifo(tmp_path / "b.tar")
    assert "not a regular file" in error_of(tmp_path / "*.tar")


def test_tables_and_shards_are_read_behind_an_address(tmp_path: Path):
    memory = fsspec.filesystem("memory")
    for kind, write in (("parquet", in_parquet), ("tar", in_shards)):
        address = f"memory://{tmp_path.name}-{kind}"
        memory.put(write(tmp_path / kind), address, recursive=True)
        for place in (address, f"{address}/*.{kind}"):
            assert sorted(reds(ImagePool.scan(place, seed=0), 10)) == list(range(10))


def test_addresses_that_cannot_be_used_are_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(source_files, "RETRY_AFTER", (0, 0))
    assert "(No such file or directory): check the name" in error_of("memory://nowhere")
    assert "Protocol not known: bucket" in error_of("bucket://a/b")
    assert "s3fs" in error_of("s3://bucket/folder")
    for within in ("simplecache::memory://a", "reference://", "filecache::https://a/b.tar"):
        assert "an address within another is not followed" in error_of(within)
    address = f"memory://{tmp_path.name}-arrow"
    fsspec.filesystem("memory").pipe(f"{address}/a.arrow", b"")
    assert "Arrow files, which are only read from the disk" in error_of(address)


class Flaky:
    """A file of which some reads fail."""

    def __init__(self, file: Any, failures: list[Exception]) -> None:
        self.file, self.failures = file, failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def read(self, *size: int) -> bytes:
        if self.failures:
            self.file.seek(3)
            raise self.failures.pop()
        return self.file.read(*size)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_network_that_fails_for_a_moment_is_waited_for_and_one_that_stays_away_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    waited, failures = list[float](), list[Exception]()
    monkeypatch.setattr(source_files.time, "sleep", waited.append)
    address, memory = f"memory://{tmp_path.name}-flaky", fsspec.filesystem("memory")
    memory.put((in_parquet if kind == "parquet" else in_shards)(tmp_path / "pool"), address, recursive=True)
    expected, opened = reds(ImagePool.scan(address, seed=0), 3), type(memory).open
    monkeypatch.setattr(type(memory), "open", lambda *args, **options: Flaky(opened(*args, **options), failures))
    pool = ImagePool.scan(address, seed=0)
    failures += [RuntimeError("reset by peer"), OSError(5, "Input/output error")]
    assert reds(pool, 1) == expected[:1]
    assert waited == [0.1, 1.0]
    failures += [RuntimeError("no route to host")] * 99
    with pytest.raises(UnreachableError, match=r"cannot be reached \(.*no route to host.*go on later"):
        pool.take(2)
    assert pool.skipped == {}


def test_without_pyarrow_a_sentence_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_parquet(tmp_path / "a.parquet", {"image": structs(1)})
    monkeypatch.delitem(sys.modules, "ireasoner.training.sources.table", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert error_of(path) == "Reading Parquet files needs pyarrow: pip install 'ireasoner[data]'"


def test_names_sort_and_are_found_like_python_s_strings():
    texts = ["b", "a", "a/b", "a.b", "größe", "zz", "图", "a#10", "a#9"]
    found = Names.of(texts)
    assert list(found) == sorted(texts)
    assert [found.find(text) for text in sorted(texts)] == list(range(len(texts)))
    assert found.find("c") is None
    assert ("图" in found, "\U0010ffff" in found, "" in found) == (True, False, False)
    assert (len(Names(b"")), list(Names(b""))) == (0, [])
    assert Names.of(["a", "c", "d"]).missing_from(Names.of(["b", "c"])) == ["a", "d"]


# --- the hub ----------------------------------------------------------------------------------------------------------


def names_on_the_hub(*places: str) -> int:
    """Print the names of the images of each place, or the sentence that it is refused with."""
    for place in places:
        try:
            pool = ImagePool.scan(pinned(place), seed=0)
            print(*pool.names, sep="\n")
            pool.take(len(pool))
        except ImageError as error:
            print(error)
    return 0


def test_a_data_set_of_the_hub_is_downloaded_and_its_files_for_training_are_drawn_from(tmp_path: Path):
    folder = tmp_path / "set"
    in_parquet(folder / "data")
    write_parquet(folder / "data" / "test-00000.parquet", {"image": structs(99)})
    (folder / "logo.png").write_bytes(picture(1))
    shutil.copytree(folder, tmp_path / "newer")
    write_parquet(tmp_path / "newer" / "data" / "train-2.parquet", {"image": structs(99)})
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "rows.jsonl").write_text("{}")
    write_parquet(tmp_path / "tests" / "test.parquet", {"image": structs(1)})
    with serving() as hub:
        hub.models = {"datasets/owner/set": {COMMIT: tmp_path / "newer", OLDER: folder}}
        hub.models |= {f"datasets/owner/{name}": {COMMIT: tmp_path / name} for name in ("text", "tests")}

        def printed(*places: str, **variables: str) -> list[str]:
            done = hub.call(tmp_path / "home", partial(names_on_the_hub, *places), **variables)
            return (done.stdout + done.stderr).splitlines()

        old = [f"data/train-0000{shard}-of-00002.parquet#{row}" for shard in range(2) for row in range(5)]
        assert printed(f"owner/set@{OLDER}", "owner/set") == [*old, *old, "data/train-2.parquet#0"]
        assert not list((tmp_path / "home").rglob("test-00000.parquet"))
        assert not list((tmp_path / "home").rglob("logo.png"))
        asked = len(hub.asked)
        assert printed(f"owner/set@{OLDER}", HF_HUB_OFFLINE="1") == old
        assert len(hub.asked) == asked
        refused = {
            "owner/sett": "there is no such folder, and no such public data set on the hub",
            "owner/set@nowhere": "the hub has no such version of it",
            "owner/text": "has neither Parquet nor tar files nor images",
            "owner/tests": "no files for training, only such as test.parquet",
        }
        for line, told in zip(printed(*refused), refused.values(), strict=True):
            assert told in line
        hub.gated.add("datasets/owner/set")
        shutil.rmtree(tmp_path / "home" / "hub")
        [line] = printed("owner/set")
        assert "only for those who accepted its terms" in line
    [line] = printed("owner/set")
    assert "could not be downloaded from the hub" in line


def test_a_command_keeps_an_address_and_an_id_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for images in ("s3://bucket/photos", "owner/set", f"owner/set@{COMMIT}"):
        assert absolute({"images": images}) == {"images": images}
        assert resolve({"images": images, "model": "tiny"}).images == images
    for images in ("data", "data/sett", "data/*.tar", "a/b/c"):
        assert absolute({"images": images}) == {"images": str(tmp_path / images)}


def test_the_commit_of_a_data_set_is_asked_for_once():
    assert pinned("/pictures/of/mine") == "/pictures/of/mine"
    assert pinned("s3://bucket/name") == "s3://bucket/name"
    assert pinned(f"owner/set@{COMMIT}") == f"owner/set@{COMMIT}"


def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert is_dataset_id("owner/set")
    assert not is_dataset_id("data/sett")  # beside others
    for path in ("set", "./owner/set", "/owner/set", "a/b/c", "~/set", "owner/set/", "s3://set"):
        assert not is_dataset_id(path)
    assert "No such file" in error_of("data/sett")


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["parquet", "shards", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("saved set", "address"))]
)
@pytest.mark.usefixtures("no_report")
def test_a_run_that_was_killed_ends_like_an_undisturbed_one(kind: str, tmp_path: Path):
    rng = np.random.default_rng(3)
    drawn = [world.draw(world.sample_picture(rng), world.sample_style("varied", rng), rng) for _ in range(4)]
    images = [hostile.encoded(image, "PNG") for image in drawn]
    held_out = tmp_path / "held-out.png"
    scale = {"images_per_step": 1, "group_size": 2, "max_solution_tokens": 48, "steps": 4, "save_every": 1}
    scale |= {"probe_every": 2, "probe_images": 1, "blank_every": 0, "learning_rate": 3e-3, "device": "cpu"}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "held-out.png", "question": "How many?", "answer": "1"}))
    place = KINDS[kind](tmp_path / "pool", images)
    pool = ImagePool.scan(place, seed=0)
    held_out.write_bytes(pool.source.read(pool.peek(1)[0].name, 10**7))
    scale |= {"held_out": str(tmp_path / "rows.jsonl")}
    config = resolve({"images": place, "model": "tiny", "recipe": "paper", **scale})

    def die(step: int, metrics: object, episodes: object) -> None:
        if step == 2:
            raise RuntimeError("as if killed")

    start(config, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="as if killed"):
        start(config, tmp_path / "killed", Observer(on_step=die))
    assert load_config(tmp_path / "killed" / "config.yaml").images == place
    resume(load_config(tmp_path / "killed" / "config.yaml"), tmp_path / "killed")
    whole, killed = (everything(tmp_path / name) for name in ("whole", "killed"))
    assert killed == whole
    episodes = list(read_episodes(tmp_path / "whole"))
    assert len({episode.image for episode in episodes}) == 3  # the held-out one is not among them
    assert {episode.image for episode in episodes} < set(pool.names)
    assert [record["reason"] for record in read_records(tmp_path / "whole" / "skipped.jsonl")] == [SET_ASIDE]


def everything(run: Path) -> dict[str, Any]:
    """What a run leaves that must not depend on whether it was killed."""
    names = ("episodes.jsonl", "probes.jsonl", "skipped.jsonl", "images.txt", "config.yaml")
    found: dict[str, Any] = {name: (run / name).read_bytes() for name in names}
    for path in sorted([*run.glob("*/*.safetensors"), *run.glob("checkpoints/step-000004/*.safetensors")]):
        found[str(path.relative_to(run))] = path.read_bytes()
    found["pool"] = json.loads((run / "checkpoints" / "step-000004" / "state.json").read_text())["pool"]
    metrics = read_records(run / "metrics.jsonl")
    found["metrics"] = [{k: v for k, v in record.items() if not k.startswith("time/")} for record in metrics]
    return found
