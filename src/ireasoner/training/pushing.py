"""Putting a trained solver on the hub: its export and nothing else of the run, unless episodes are asked for."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ireasoner.method.types import UsageError
from ireasoner.model.source import brief
from ireasoner.training.export import export
from ireasoner.training.targets import Target

# The files of an adapter and of a whole model: a repository that held both would be loaded as the sum of the two.
OF_ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]
OF_MODEL = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]


def push(target: Target, name: str, *, private: bool = False, merge: bool = False, with_episodes: bool = False) -> str:
    """Upload the export of a run's solver to the hub; its address there.

    A repository that is there already gets a new commit.

    Args:
        target: a run or checkpoint with adapters, as `find_trained` found it.
        name: of the repository, OWNER/NAME.
        private: make a new repository private, and refuse a public one.
        merge: upload the whole model instead of the adapter.
        with_episodes: upload the run's episodes as well, which hold the names of images, small copies of them, and all
            questions and replies.

    Raises:
        UsageError: the name cannot be, nobody is logged in, the hub refuses something, or the export fails.
    """
    api = _logged_in(name)
    with tempfile.TemporaryDirectory(prefix="ireasoner-") as place:
        folder = Path(place) / "export"
        export(target, folder, merge=merge, name=name)
        if with_episodes:
            _copy_episodes(target, folder / "episodes")
        try:
            address = str(api.create_repo(name, private=private or None, exist_ok=True))
            if private and not api.model_info(name).private:
                raise UsageError(f"{name} is on the hub already and public: name another one, or make it private there")
            what = "merged model" if merge else "LoRA adapter"
            api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=f"Upload the {what} of a run of ireasoner",
                delete_patterns=OF_ADAPTER if merge else OF_MODEL,
            )
        except UsageError:
            raise
        except Exception as error:  # among them those of the HTTP library, which differs between versions of the hub's
            raise UsageError(f"{name} could not be uploaded: {_reason(error)}") from None
    return address


def _logged_in(name: str) -> HfApi:
    """The hub's interface, once it has accepted the token; what would fail after the export is tried before it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UsageError(f"no model on the hub can have the name {name}: name OWNER/NAME") from None
    if name.count("/") != 1:
        raise UsageError(f"{name} names no owner: name OWNER/NAME")
    if get_token() is None:
        raise UsageError("nobody is logged in to the hub: set HF_TOKEN, or log in with: hf auth login")
    api = HfApi(library_name="ireasoner")
    try:
        api.whoami()
    except Exception as error:  # as above
        raise UsageError(f"the hub cannot be used: {_reason(error)}") from None
    return api


def _reason(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code in (401, 403):
        return "it does not accept the token for this; set HF_TOKEN to one that may write, or: hf auth login"
    return brief(error) or type(error).__name__


def _copy_episodes(target: Target, folder: Path) -> None:
    """The records of the episodes and the small copies of their images; links in a run may lead to any file at all."""
    assert target.run is not None
    records, images = target.run / "episodes.jsonl", target.run / "images"
    found = [records, *sorted(path for path in images.glob("*") if path.suffix in (".png", ".webp"))]
    if links := [path for path in (images, *found) if path.is_symlink()]:
        raise UsageError(f"{links[0]} is a link, which is not followed: episodes are uploaded from the run alone")
    try:
        for path in found:
            copy = folder / path.relative_to(target.run)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    except OSError as error:
        raise UsageError(f"the episodes of {target.run} cannot be read: {error}") from None
