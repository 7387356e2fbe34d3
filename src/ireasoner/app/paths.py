"""What the options of a run name as paths, and where the truth about a run's images lies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ireasoner.training import config as configs


def absolute(flags: dict[str, Any]) -> dict[str, Any]:
    """The same with paths from the root, for a run may be resumed from another folder."""
    return {name: value if value is None else _from_root(name, value) for name, value in flags.items()}


def _from_root(name: str, value: Any) -> Any:
    if name == "recipes":
        known = configs.names("recipes")
        return [each if each in known or not Path(each).is_file() else os.path.abspath(each) for each in value]
    is_path = (
        name in ("labels", "eval_data", "held_out", "data", "init_adapters", "adapters_folder")
        or (name == "images" and not configs.is_elsewhere(str(value)))
        or (name == "model" and Path(value).expanduser().is_dir())
        or (name == "reward" and ".py:" in value)
    )
    return os.path.abspath(os.path.expanduser(value) if name == "model" else value) if is_path else value


def find_truth(run: Path, file: Path | None = None) -> Any:
    """How the page learns what is true of a run's images: from a file, or from what the playground left in the run."""
    from ireasoner.playground.truth import read_truth, truth_beside

    if file is None:
        return lambda config: truth_beside(config.images, within=run)
    return lambda config: read_truth(file)
