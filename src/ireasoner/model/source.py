"""Where a model's files are: in this package, in a folder of the user's, or in the local cache of the hub.

This is the only module that asks the hub for anything. Everything else reads the folder that it returns, so that the
configuration, the weights, the processor and vLLM are of one and the same commit, and what can go wrong on the way from
the hub is put into words in one place. Nothing is downloaded but JSON, text, tokenizers and safetensors: no code, no
pickles.

A mistyped name is told before torch is imported, so this module does without it, and imports the hub's library only
where it asks the hub.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ireasoner.method.types import UsageError

TINY_MODEL = Path(__file__).with_name("tiny_lmm")
# Configuration, processor and tokenizer; and the model's card, which names its licence.
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "README.md")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
IMAGE_PROCESSOR = ("preprocessor_config.json", "processor_config.json")  # either of them says how images are read
# Seconds in which the hub must begin to answer, or what was downloaded before is used. Its library would wait for ever,
# here at least; for other requests it has a variable, HF_HUB_ETAG_TIMEOUT, which counts here too.
PATIENCE = 5.0


class ModelError(UsageError):
    """The model cannot be used; the message says why and what to do."""


def brief(error: BaseException) -> str:
    """What an error says, as a single line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


@dataclass(frozen=True)
class Source:
    """A model whose small files are on this machine; `with_weights` brings the large ones.

    Attributes:
        name: what the user called it: 'tiny', a folder or a hub id.
        folder: where its files are.
        commit: of the hub, in full; None if it is not from there.
    """

    name: str
    folder: Path
    commit: str | None = None

    def __str__(self) -> str:
        return self.name

    def damaged(self, problem: str) -> ModelError:
        """An error about its files, with what to do about them."""
        again = "copy or download the model again"
        if self.commit is not None:
            again = f"download it again with: hf download {self.name} --revision {self.commit} --force-download"
        return unusable(self.name, f"{problem}; {again}")


def unusable(model: str | Path, problem: str) -> ModelError:
    """The error that says why a model cannot be loaded."""
    return ModelError(f"cannot load the model {str(model)!r}: {problem}")


def is_folder_name(model: str) -> bool:
    """Whether a name can only mean a folder, so that the hub need not be asked: a hub id is NAME or OWNER/NAME."""
    return (
        model.startswith((".", "/", "~"))
        or model.count("/") > 1
        or os.path.exists(model)
        or ("/" in model and os.path.isdir(os.path.dirname(model)))  # its end was mistyped
    )


def find_model(model: str | Path | Source, revision: str | None = None) -> Source:
    """Find a model, and download its small files if they are on the hub and not here yet.

    Args:
        model: 'tiny', a folder or a hub id; one that was found already is returned as it is.
        revision: a branch, a tag or a commit on the hub; None: the newest commit of the main branch. Without a network,
            what was downloaded before is used.

    Raises:
        ModelError: there is no such model or revision, it may not be downloaded, or it has no configuration.
    """
    if isinstance(model, Source):
        return model
    name = str(model)
    if name == "tiny" or is_folder_name(name):
        source = Source(name, TINY_MODEL if name == "tiny" else Path(name).expanduser())
        if not source.folder.is_dir():
            raise unusable(name, f"there is no such folder{_beside(name)}")
        if revision is not None:
            raise unusable(name, "--revision is for models on the hub, and this is a folder: leave --revision out")
    else:
        folder = _download(name, revision, SMALL_FILES)
        source = Source(name, folder, folder.name)
    if not isinstance(_read_json(source, "config.json"), dict):
        raise source.damaged(f"{source.folder / 'config.json'} holds no options of a model")
    return source


def check_processor(source: Source) -> None:
    """Raises `ModelError` if a model has nothing that says how it reads images."""
    if not any((source.folder / name).is_file() for name in IMAGE_PROCESSOR):
        kind = str(_read_json(source, "config.json").get("model_type"))
        raise unusable(
            source.name,
            f"it is a {kind} model with neither {' nor '.join(IMAGE_PROCESSOR)}: "
            "a model for images and text is needed, with its processor",
        )


def with_weights(source: Source) -> Source:
    """Download a model's weights if they are not here yet, and check that every file of them is whole.

    Raises:
        ModelError: files are missing or end early, or there are none in safetensors.
    """
    from safetensors import SafetensorError, safe_open

    names = _weight_files(source)
    if source.commit is not None and _missing(source, names):
        _download(source.name, source.commit, names)
    missing = _missing(source, names)
    if missing == [SINGLE]:
        raise unusable(
            source.name,
            f"it has neither {SINGLE} nor {INDEX}, and other formats of weights, which can run code, are not read",
        )
    if missing:
        raise source.damaged(f"of its {len(names)} files with weights {len(missing)} are missing, such as {missing[0]}")
    for name in names:
        try:  # reads the header alone, and compares the length that it tells with the file's
            with safe_open(source.folder / name, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise source.damaged(f"{source.folder / name} is damaged or not complete ({brief(error)})") from None
    return source


def waiting_line(source: Source) -> str:
    """What is waited for until a model is loaded: that it is loaded, or downloaded first, and its size where known."""
    doing = "Downloading and loading" if _missing(source, _weight_files(source)) else "Loading"
    size = weight_bytes(source)
    unit, told = (1e9, "GB") if size and size >= 1e9 else (1e6, "MB")
    return f"{doing} {source.name}{'' if size is None else f' ({size / unit:.1f} {told})'} …"


def weight_bytes(source: Source) -> int | None:
    """Bytes of the files with a model's weights, which may still have to be downloaded; None: not known."""
    names = _weight_files(source)
    missing = _missing(source, names)
    if not missing:
        return sum((source.folder / name).stat().st_size for name in names)
    size = _read_json(source, INDEX).get("metadata", {}).get("total_size") if missing != [SINGLE] else None
    return size if isinstance(size, int) else None


def _weight_files(source: Source) -> list[str]:
    """The names of the files with a model's weights. Raises `ModelError` if its index names none."""
    if (source.folder / SINGLE).exists() or not (source.folder / INDEX).exists():
        return [SINGLE]
    try:
        names = sorted(set(_read_json(source, INDEX)["weight_map"].values()))
        if not names or any(os.path.basename(name) != name for name in names):
            raise KeyError("files in this folder")
        return names
    except (KeyError, TypeError, AttributeError):
        raise source.damaged(f"{source.folder / INDEX} names no files with weights") from None


def _missing(source: Source, names: Sequence[str]) -> list[str]:
    return [name for name in names if not (source.folder / name).is_file()]


def _download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of a commit in the hub's cache, with those of these files that it has on the hub.

    Raises:
        ModelError: whatever is in the way, and what to do about it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    files = partial(snapshot_download, name, revision=revision, allow_patterns=[*patterns], ignore_patterns=["*/*"])
    log_in = "log in with: hf auth login"
    try:
        try:
            patience = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or PATIENCE)
            HfApi().model_info(name, revision=revision, timeout=patience)
        except Exception:  # whatever it is, what is here already may do
            with suppress(OSError, ValueError):
                return Path(files(local_files_only=True))
            raise
        return Path(files())
    except GatedRepoError:
        problem = f"it is only for those who accepted its terms: accept them on its page on the hub, and {log_in}"
    except RepositoryNotFoundError:
        problem = f"there is no such folder, and no such public model on the hub: check the name, or {log_in}"
    except RevisionNotFoundError:
        problem = f"the hub has no version {revision} of it: name one of its branches, tags or commits"
    except HFValidationError:
        problem = "there is no such folder, and no model on the hub can have this name"
    except Exception as error:  # among them those of the HTTP library, which differs between versions of the hub's
        cause = error.__cause__ or error
        if isinstance(cause, OfflineModeIsEnabled):
            problem = "not all of it is on this machine, and HF_HUB_OFFLINE forbids to download it: unset that, "
        else:
            reason = brief(cause).partition(" For more information")[0] or type(cause).__name__
            problem = f"it could not be downloaded from the hub ({reason}): check the network and start again, "
        problem += "or name a folder that holds the model"
    raise unusable(name, problem)


def _read_json(source: Source, name: str) -> Any:
    path = source.folder / name
    if not path.is_file():
        raise unusable(source.name, f"{source.folder} has no {name}, so it holds no model of transformers")
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise source.damaged(f"{path} cannot be read ({brief(error)})") from None


def _beside(name: str) -> str:
    """What is near a folder that does not exist, for a name that was mistyped."""
    parent = Path(name).expanduser().parent
    if not parent.is_dir():
        return f", nor {parent}"
    models = sorted(each.parent.name for each in parent.glob("*/config.json"))
    found = f"; the models in {parent} are {', '.join(models[:10])}" if models else f", and no model in {parent}"
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
    return found + (f" (the hub is not asked, because there is a folder {parent} here)" if hub_id else "")
