"""A reward of the user's own, from a Python file.

Importing the file runs it. Only `train` does so; a resumed run does so only when its command line names the file again.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from ireasoner.method.recipe import REWARDS
from ireasoner.method.scoring import Context, Group, Numbers, RewardError, RewardFunction
from ireasoner.training.config import Config


def names_a_file(config: Config) -> bool:
    """Whether a run's reward is one of the user's own."""
    return config.recipe.reward not in REWARDS


def load_reward(config: Config) -> tuple[RewardFunction, str]:
    """Import the file that a recipe's reward names, as `file.py:function`; the function, and the file's SHA-256.

    Raises:
        RewardError: no such file or function, or the file fails to import.
    """
    file, _, name = config.recipe.reward.rpartition(":")
    try:
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError as error:
        raise RewardError(f"cannot read the reward file {file}: {error.strerror}") from None
    spec = importlib.util.spec_from_file_location("ireasoner_custom_reward", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is the user's and may raise anything
        raise RewardError(f"the reward file {file} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise RewardError(f"the reward file {file} has no function {name}")
    function: RewardFunction = getattr(module, name)

    def reward(group: Group, context: Context) -> Numbers | Mapping[str, Numbers]:
        try:
            return function(group, context)
        except Exception as error:
            raise RewardError(f"{config.recipe.reward} failed: {type(error).__name__}: {error}") from error

    return reward, digest
