"""Which kind of source a place of images is, found by looking at it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path

from ireasoner.training.clips import Limits
from ireasoner.training.config import ItemKind, is_dataset_id, is_manifest
from ireasoner.training.images import ImageError, quoted
from ireasoner.training.sources.files import Files, kind_of
from ireasoner.training.sources.folder import Folder
from ireasoner.training.sources.groups import Groups, open_folder, open_manifest
from ireasoner.training.sources.image_files import ImageFiles
from ireasoner.training.sources.shards import Shards
from ireasoner.training.sources.source import ImageSource


def open_source(
    images: str,
    column: str | None = None,
    held_out: Collection[str | os.PathLike[str]] = (),
    items: ItemKind = "images",
    limits: Limits | None = None,
) -> ImageSource:
    """The images of a place.

    Args:
        images: a folder of images, of Parquet or Arrow files, or of tar files; one of such files, or a pattern with
            `*`; a folder that `datasets` has saved; the address of any of them but Arrow files; or the id of a data
            set of the hub; or a manifest.
        column: the column of a table that holds the images; None: the only one that does.
        held_out: image files; a folder of images leaves out those with the same bytes.
        items: what an item is, in a folder: an image, all images of a subfolder, or a clip.
        limits: of items of several images.

    Raises:
        ImageError: the place cannot be used.
    """
    if is_manifest(images):
        if items != "images":
            raise ImageError(f"--items {items} is for folders, and {quoted(images)} lists its items itself.")
        source = open_manifest(images, limits or Limits())
    elif items != "images":
        if "://" in images or is_dataset_id(images) or not os.path.isdir(images):
            raise ImageError(f"--items {items} needs a folder on this machine, and {quoted(images)} is none.")
        source = open_folder(images, items, limits or Limits())
    else:
        source = _open(images, column, held_out)
    if column is not None and isinstance(source, Folder | Groups | ImageFiles | Shards):
        raise ImageError(f"--image-column is for tables, and {source.where} is none: leave it out.")
    return source


def pinned(images: str) -> str:
    """The id of a data set with the commit that it has now, `OWNER/NAME@COMMIT`; any other place as it is.

    A run keeps this, so that it goes on with the same images when the data set has changed.

    Raises:
        ImageError: there is no such data set, or the hub is out of reach.
    """
    if not is_dataset_id(images) or re.search(r"@[0-9a-f]{40}$", images):
        return images
    from ireasoner.training.sources.hub import newest_commit  # imports the hub's library, which takes half a second

    return f"{images.partition('@')[0]}@{newest_commit(images)}"


def _open(images: str, column: str | None, held_out: Collection[str | os.PathLike[str]]) -> ImageSource:
    if is_dataset_id(images):
        from ireasoner.training.sources.hub import downloaded  # imports the hub's library, which takes half a second

        return _of_files(downloaded(images), column)
    if "://" in images or ("*" in images and not os.path.exists(images)):
        return _of_files(Files(images, lambda name: kind_of(name) is not None), column)
    if os.path.isdir(images):
        if saved := _saved_files(Path(images)):
            folder, names = saved
            files = Files(folder, names.__contains__)
            if len(files.names) < len(names):
                raise ImageError(f"Of the {len(names)} files of {quoted(folder)} only {len(files.names)} are there.")
            return _of_files(files, column)
        folder = Folder(images, held_out)
        files = None if folder.names else Files(images, _is_container)
        return _of_files(files, column) if files and files.names else folder
    if _is_container(images) and os.path.exists(images):
        return _of_files(Files(images, _is_container), column)
    return Folder(images, held_out)  # which says what is wrong with it


def _is_container(name: str) -> bool:
    return kind_of(name) not in (None, "images")


def _of_files(files: Files, column: str | None) -> ImageSource:
    """The source that files are, which must all be of one kind."""
    kinds = sorted({str(kind_of(name)) for name in files.names})
    if len(kinds) > 1:
        raise ImageError(f"{files.where} holds {' and '.join(kinds)}: name those of one kind, as in FOLDER/*.parquet.")
    if kinds == ["compressed archives"]:
        raise ImageError(f"{files.where} holds compressed archives, of which no image can be read alone: unpack them.")
    if kinds == ["images"] or not kinds:
        return ImageFiles(files)
    if kinds == ["tar files"]:
        return Shards(files)
    if kinds == ["Arrow files"] and files.is_remote:
        raise ImageError(f"{files.where} holds Arrow files, which are only read from the disk: copy them here.")
    try:
        from ireasoner.training.sources.table import Table  # imports pyarrow, which is an optional dependency
    except ImportError:
        raise ImageError(f"Reading {kinds[0]} needs pyarrow: pip install 'ireasoner[data]'") from None
    return Table(files, column)


def _saved_files(folder: Path) -> tuple[str, Collection[str]] | None:
    """The folder and the names of the files of a set that `datasets` saved; None if it is none.

    Of several splits, this is the one for training.

    Raises:
        ImageError: there is none for training, or what the folder says of its files is damaged.
    """
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = list(map(str, json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]))
            if "train" not in splits and len(splits) != 1:
                raise ImageError(f"{quoted(folder)} has no split train: name one of its folders {', '.join(splits)}.")
            folder = folder / os.path.basename("train" if "train" in splits else splits[0])
        if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
            return None
        files = json.loads((folder / "state.json").read_text("utf-8"))["_data_files"]
        return str(folder), {str(file["filename"]) for file in files}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        problem = f"{quoted(folder)} was saved by the library datasets, but its files are damaged"
        raise ImageError(f"{problem} ({type(error).__name__}): save it again.") from error
