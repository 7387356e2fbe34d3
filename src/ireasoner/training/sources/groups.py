"""Items of several files: folders of images, clips, and what a manifest lists."""

from __future__ import annotations

import errno
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ireasoner.model.views import View
from ireasoner.training.clips import (
    FOLDER_FPS,
    OTHER_VIDEOS,
    VIDEO_KINDS,
    VIDEOS,
    ItemFiles,
    Limits,
    clip_files,
    is_clip_file,
    load_item,
    natural,
)
from ireasoner.training.config import ItemKind
from ireasoner.training.images import (
    ImageError,
    UnreadableImageError,
    path_of,
    printable,
    quoted,
    read_file,
    reason_of,
)
from ireasoner.training.sources.folder import scan
from ireasoner.training.sources.source import Names

MANIFEST = ".jsonl"
MAX_MANIFEST_BYTES = 2**30
LONGEST_NAME = 200  # characters of a name that is made of those of its files


class Groups:
    """Items of several files each, by their names.

    Args:
        where: the place for a message.
        items: the files of each.
        skipped: reason why a file, a folder or a row was passed over, by its name.
        limits: of what is shown of an item. One with more images is passed over.

    Raises:
        ImageError: there is no item.
    """

    def __init__(self, where: str, items: Mapping[str, ItemFiles], skipped: dict[str, str], limits: Limits) -> None:
        problems = {name: limits.problem(len(files.paths)) for name, files in items.items() if not files.is_clip}
        over = {name: problem for name, problem in problems.items() if problem}
        self.where, self._limits, self.skipped = where, limits, skipped | over
        self._items = {name: files for name, files in items.items() if name not in over}
        self.names = Names.of(self._items)

    def load(self, name: str) -> tuple[View, tuple[str, ...]]:
        """What an item shows, and the hashes of its files, as `load_item` returns them. Raises `ImageError` as well."""
        if name not in self._items:  # removed since the run began
            raise UnreadableImageError(name, os.strerror(errno.ENOENT))
        return load_item(name, self._items[name], self._limits)

    def paths(self, name: str) -> tuple[Path, ...]:
        """The files of an item."""
        return self._items[name].paths

    @property
    def has_clips(self) -> bool:
        return any(files.is_clip for files in self._items.values())

    def read(self, name: str, max_bytes: int) -> bytes:
        """The bytes of an item that is one file."""
        (path,) = self.paths(name)
        return read_file(path, max_bytes)


def open_folder(folder: str, items: ItemKind, limits: Limits) -> Groups:
    """The items below a folder.

    With `folders`, the images in each of its subfolders are an item, and so is each image beside them. With `clips`,
    the images in each folder are the frames of a clip, and a GIF, an animated WebP or a video is one by itself.
    Pictures and frames come in the order of their names.

    Raises:
        ImageError: the folder is missing, cannot be read, or holds no item.
    """
    names, skipped = scan(folder, VIDEOS + OTHER_VIDEOS)
    root, found = Path(folder), dict[str, ItemFiles]()
    inside = defaultdict[str, list[str]](list)
    for name in names:
        path = root / path_of(name)
        if items == "clips" and is_clip_file(path):
            found[name] = ItemFiles((path,), True)
        elif name.lower().endswith(OTHER_VIDEOS):
            skipped[name] = f"a video of another kind: convert it to one that is read ({VIDEO_KINDS})"
        elif name.lower().endswith(VIDEOS):
            skipped[name] = "a video, which --items clips would show"
        elif items == "folders" and "/" not in name:
            found[name] = ItemFiles((path,))
        else:
            inside[name.rpartition("/")[0] or "."].append(name)
    for group, members in inside.items():
        paths = tuple(root / path_of(member) for member in sorted(members, key=natural))
        found[group] = ItemFiles(paths, items == "clips")
    return Groups(f"the folder {quoted(folder)}", found, skipped, limits)


def open_manifest(path: str, limits: Limits) -> Groups:
    """The items that a JSONL file lists. Each row has one of `image`, `images` and `clip`, and maybe a `name`.

    `clip` is a file, a folder of frames, or a list of them, of which `fps` says how many there are a second. Paths are
    relative to the file. A row that says anything else is passed over.

    Raises:
        ImageError: the file cannot be read, or lists nothing.
    """
    try:
        if os.path.getsize(path) > MAX_MANIFEST_BYTES:
            raise ValueError(f"it has more than {MAX_MANIFEST_BYTES} bytes")
        lines = Path(path).read_text("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ImageError(f"Cannot read the manifest {quoted(path)} ({reason_of(error)}).") from error
    found, skipped = dict[str, ItemFiles](), dict[str, str]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            name, files = _row(json.loads(line), Path(path).parent)
            if name in found:
                raise ValueError(f"another item has the name {name[:100]}: give each row a name of its own")
            found[name] = files
        except (OSError, ValueError, TypeError, RecursionError) as error:
            is_json = not isinstance(error, json.JSONDecodeError | RecursionError)
            skipped[f"line {number}"] = reason_of(error) if is_json else "it is no JSON"
    return Groups(f"the manifest {quoted(path)}", found, skipped, limits)


def _row(row: Any, folder: Path) -> tuple[str, ItemFiles]:
    """The name and the files of a row. Raises `ValueError` or `OSError` if it is none."""
    given = [key for key in ("image", "images", "clip") if isinstance(row, dict) and row.get(key)]
    if len(given) != 1:
        raise ValueError("a row is an object with one of image, images and clip")
    is_clip, values = given == ["clip"], row[given[0]]
    texts = values if isinstance(values, list) else [values]
    if not all(isinstance(text, str) and text and "\0" not in text for text in texts):
        raise ValueError(f"{given[0]} must be a path or a list of paths")
    name = row.get("name") or _name_of(texts)
    if not isinstance(name, str):
        raise ValueError("name must be text")
    fps = row.get("fps", FOLDER_FPS)
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6:
        raise ValueError("fps must be a number above 0")
    paths = tuple(folder / text for text in texts)
    return printable(name), clip_files(paths, fps) if is_clip else ItemFiles(paths)


def _name_of(texts: list[str]) -> str:
    joined, first = " + ".join(texts), texts[0][-LONGEST_NAME:]
    if len(joined) <= LONGEST_NAME:
        return joined
    return f"{first} + {len(texts) - 1} more" if len(texts) > 1 else first
