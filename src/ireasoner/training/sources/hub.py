"""The images of a data set of the hub, which are downloaded into its local cache."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ireasoner.training.images import ImageError, quoted, reason_of
from ireasoner.training.sources.files import Files, kind_of

KINDS = ("Parquet files", "Arrow files", "tar files", "images")  # the first of which a set has any is read
FOR_TRAINING, FOR_OTHERS = {"train", "training"}, {"test", "validation", "valid", "val", "dev", "eval"}
SECONDS = 10  # after which a hub that does not answer is taken to be out of reach


def newest_commit(images: str) -> str:
    """The commit of a data set's main branch, or of the branch or tag that stands behind the @ of its id.

    Raises:
        ImageError: there is no such data set, or the hub is out of reach.
    """
    with _told(images):
        return str(_info(images).sha)


def downloaded(images: str) -> Files:
    """Download the files of a data set that are for training, as far as they are not here yet.

    Args:
        images: its id, maybe with a branch, tag or commit: `OWNER/NAME@main`.

    Raises:
        ImageError: there is no such data set, it has no images for training, or the hub is out of reach.
    """
    with _told(images):
        try:
            info = _info(images)
            chosen = files_for_training(images, [each.rfilename for each in info.siblings])
            patterns = [glob.escape(each) for each in chosen]
            name = images.partition("@")[0]
            folder = snapshot_download(name, repo_type="dataset", revision=info.sha, allow_patterns=patterns)
        except (ImageError, HfHubHTTPError, HFValidationError):  # the hub has answered
            raise
        except Exception as error:
            folder = _folder_here(images, error)
            chosen = files_for_training(images, list(_files_in(folder)))
    return Files(folder, set(chosen).__contains__)


def files_for_training(images: str, names: Sequence[str]) -> list[str]:
    """The files of a data set that hold its images, without those that are named as another split's than train.

    Raises:
        ImageError: there are none.
    """
    kinds = {kind: [name for name in names if kind_of(name) == kind] for kind in KINDS}
    found = next((files for files in kinds.values() if files), [])
    words = {name: set(re.split(r"[^a-z]+", name.lower())) for name in found}
    chosen = [name for name in found if words[name] & FOR_TRAINING]
    chosen = chosen or [name for name in found if not words[name] & FOR_OTHERS]
    address = f"hf://datasets/{images.partition('@')[0]}"
    if not found:
        raise ImageError(
            f"The data set {quoted(images)} has neither Parquet nor tar files nor images: the hub may keep a copy as "
            f"Parquet, at {address}@refs/convert/parquet."
        )
    if not chosen:
        raise ImageError(
            f"The data set {quoted(images)} has no files for training, only such as {found[0]}: if these are meant, "
            f"name their address, {address}/{found[0]}."
        )
    return chosen


def _info(images: str) -> Any:
    name, _, revision = images.partition("@")
    return HfApi().dataset_info(name, revision=revision or None, timeout=SECONDS)


def _folder_here(images: str, error: Exception) -> str:
    """The folder of what was downloaded before, for want of a network; a run compares the names of its images.

    Raises the error if there is none.
    """
    name, _, revision = images.partition("@")
    options: dict[str, Any] = {"local_files_only": True, "allow_patterns": []}  # it need not be the whole data set
    try:
        return snapshot_download(name, repo_type="dataset", revision=revision or None, **options)
    except LocalEntryNotFoundError:
        raise error from None


def _files_in(folder: str) -> Iterator[str]:
    for found, _, names in os.walk(folder):
        yield from (os.path.relpath(os.path.join(found, name), folder).replace(os.sep, "/") for name in names)


@contextmanager
def _told(images: str) -> Iterator[None]:
    """Puts into words what can go wrong on the way from the hub."""
    log_in = "log in with: hf auth login"
    try:
        yield
    except ImageError:
        raise
    except GatedRepoError:
        problem = f"it is only for those who accepted its terms: accept them on its page on the hub, and {log_in}"
    except RepositoryNotFoundError:
        problem = f"there is no such folder, and no such public data set on the hub: check the name, or {log_in}"
    except RevisionNotFoundError:
        problem = "the hub has no such version of it: name one of its branches, tags or commits"
    except HFValidationError:
        problem = "there is no such folder, and no data set on the hub can have this name"
    except Exception as error:  # among them those of the HTTP library, which differs between versions of the hub's
        problem = (
            f"no such folder is here, and it could not be downloaded from the hub ({reason_of(error)}): check the "
        )
        problem += "name and the network"
    else:
        return
    raise ImageError(f"Cannot read the images of {quoted(images)}: {problem}.")
