"""Images in a column of Parquet or Arrow files, as `datasets` writes them. This needs pyarrow."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from ireasoner.training.containers import begins_like_an_image
from ireasoner.training.images import ImageError, UnreachableError, printable, reason_of, require_at_most
from ireasoner.training.sources.files import Files
from ireasoner.training.sources.source import Names

MAX_ROWS = 2**25  # in all files; a few bytes can claim any number of empty ones
OPEN_FILES = 8  # at most at once
SAMPLE = 8  # rows that show whether a column holds images
# Rows that are decoded at once on the way to the one that is read. One image may stand in all rows of a small file.
BATCH = 16
BUFFER = 2**22  # bytes of a Parquet file that are read at once
MAX_DECODED = 2**26  # bytes of memory that an Arrow file may take, whose rows stay on the disk unless it is compressed


class _Reader(Protocol):
    """An open file with a table; `columns` are the types of those that have a name of their own."""

    columns: dict[str, Any]
    rows: int

    def value(self, column: str, row: int) -> Any:
        """The value in a column and a row, as a scalar of Arrow."""
        ...


class Table:
    """The images in a column of tables; an image's name is that of its file, and the number of its row from 0.

    A column may hold the bytes of image files, objects with these as `bytes`, or lists of one such value.

    Args:
        files: of which each holds a table with this column.
        column: its name; None: the only one that holds images.

    Raises:
        ImageError: a file is damaged, there is no such column, or nothing tells which of several it is.
    """

    def __init__(self, files: Files, column: str | None = None) -> None:
        self._files, self.where, self.skipped = files, f"the table {files.where}", dict[str, str]()
        self._open = lru_cache(OPEN_FILES)(self._reader)
        with self._told(files.names[0]):
            self.column = column or self._only_column_of_images(self._open(files.names[0]))
        rows = dict[str, int]()
        for name in files.names:
            with self._told(name):
                rows[name] = self._checked(name).rows
        if (total := sum(rows.values())) > MAX_ROWS:
            raise ImageError(f"{self.where} has {total} rows, and at most {MAX_ROWS} are drawn from: name fewer files.")
        self.names = Names.of(f"{name}#{row}" for name, count in rows.items() for row in range(count))

    def read(self, name: str, max_bytes: int) -> bytes:
        file, _, row = name.rpartition("#")
        if name not in self.names:  # removed since the run began
            raise FileNotFoundError(errno.ENOENT, "no such row")
        return _image_bytes(self._open(file).value(self.column, int(row)), max_bytes)

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Says of whatever goes wrong with a file that it is damaged: pyarrow has many errors for that."""
        try:
            yield
        except ImageError:
            raise
        except Exception as error:
            problem = f"Cannot read the table {self._files.where} ({name}: {reason_of(error)})"
            raise ImageError(f"{problem}: it is damaged or incomplete, or no such file; copy it again.") from error

    def _reader(self, name: str) -> _Reader:
        with self._files.open(name) as file:
            is_parquet = file.read(4) == b"PAR1"
        path = self._files.path(name)
        if not is_parquet:
            return _ArrowFile(path)
        return _ParquetFile(self._files.open(name) if self._files.is_remote else path)  # pyarrow closes its own files

    def _checked(self, name: str) -> _Reader:
        """A file that has the column."""
        reader = self._open(name)
        kind = reader.columns.get(self.column)
        if kind is None:
            names = _first(reader.columns)
            raise ImageError(f"{name} in {self.where} has no column {self.column!r} (--image-column), but: {names}.")
        if not _may_hold_images(kind):
            kind = printable(str(kind))[:100]
            raise ImageError(f"The column {self.column!r} of {name} in {self.where} holds no images, but {kind}.")
        return reader

    def _only_column_of_images(self, reader: _Reader) -> str:
        """The only column of a file that holds images, as far as its first rows show."""
        able = [column for column, kind in reader.columns.items() if _may_hold_images(kind)]
        found = [column for column in able if _begins_with_images(reader, column)]
        if len(found) == 1:
            return found[0]
        if found:
            names = _first(found)
            raise ImageError(f"{self.where} has several columns of images ({names}): choose one with --image-column.")
        names = _first(reader.columns)
        raise ImageError(f"{self.where} has no column of images ({names}): name another place, or --image-column.")


class _ParquetFile:
    """A Parquet file. To read a row, its group of rows is decoded up to it, a few rows at a time."""

    def __init__(self, file: Any) -> None:
        self._file = parquet.ParquetFile(file, buffer_size=BUFFER)
        meta = self._file.metadata
        self.columns, self.rows = _columns(self._file.schema_arrow), meta.num_rows
        self._starts = np.cumsum([0, *(meta.row_group(i).num_rows for i in range(meta.num_row_groups))])
        if self._starts[-1] != self.rows:
            raise ValueError("its groups do not have as many rows as it says")

    def value(self, column: str, row: int) -> Any:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        place = row - int(self._starts[group])
        for batch in self._file.iter_batches(BATCH, row_groups=[group], columns=[column], use_threads=False):
            if place < len(batch):
                return batch.column(column)[place]
            place -= len(batch)
        raise ValueError("its group of rows ends early")


class _ArrowFile:
    """An Arrow file of this machine, which is mapped into memory, so that only the rows that are read are loaded."""

    def __init__(self, path: str) -> None:
        mapped = pa.memory_map(path)
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        reader = pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)
        self.columns = _columns(reader.schema)
        self._batches, before = [], pa.total_allocated_bytes()
        for batch in (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader:
            self._batches.append(batch)
            if pa.total_allocated_bytes() - before > MAX_DECODED:
                raise ValueError("it is compressed, and would fill the memory")
        self._starts = np.cumsum([0, *map(len, self._batches)])
        self.rows = int(self._starts[-1])

    def value(self, column: str, row: int) -> Any:
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        value = self._batches[index].column(column)
        value.validate(full=True)  # what a file says of its parts may point anywhere
        return value[row - int(self._starts[index])]


def _first(columns: Collection[str]) -> str:
    """The names of the first ten columns, for a message."""
    return ", ".join([*(printable(column)[:100] for column in islice(columns, 10)), *(["…"] * (len(columns) > 10))])


def _columns(schema: Any) -> dict[str, Any]:
    """The types of the columns that have a name of their own."""
    return {field.name: field.type for field in schema if schema.names.count(field.name) == 1}


def _may_hold_images(kind: Any) -> bool:
    """Whether the values of a type are bytes, objects with bytes, or lists of either."""
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        kind = kind.field(index).type if index >= 0 else kind
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _image_bytes(value: Any, max_bytes: int) -> bytes:
    """The bytes of the only image of a value. Raises `ValueError` if there is none."""
    if isinstance(value, pa.ListScalar) and value.is_valid:
        if len(value) != 1:
            raise ValueError(f"the row has {len(value)} images, and one is needed")
        value = value[0]
    if isinstance(value, pa.StructScalar) and value.is_valid:
        if not value["bytes"].is_valid and "path" in value and value["path"].is_valid:
            raise ValueError("the row names an image file and does not hold it")
        value = value["bytes"]
    if not value.is_valid:
        raise ValueError("the row holds no image")
    data = value.as_buffer()
    require_at_most(max_bytes, data.size)
    return data.to_pybytes()


def _begins_with_images(reader: _Reader, column: str) -> bool:
    """Whether there is an image among the first values of a column."""
    for row in range(min(SAMPLE, reader.rows)):
        try:
            if begins_like_an_image(_image_bytes(reader.value(column, row), MAX_DECODED)[:64]):
                return True
        except UnreachableError:
            raise
        except Exception:  # damaged, or no image; the other rows tell
            continue
    return False
