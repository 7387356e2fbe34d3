"""A reward function of the user's own, imported from a Python file.

Importing a file runs the code in it, and a run directory may come from somebody else. So only `train` imports the file,
and for a resumed run only if the command line names it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ireasoner.method.recipe import REWARDS
from ireasoner.method.scoring import Context, Group, Numbers, RewardError, RewardFunction
from ireasoner.training.config import Config


def names_a_file(config: Config) -> bool:
    """Whether the recipe names a reward function of the user's own."""
    return config.recipe.reward not in REWARDS


def load_reward(config: Config) -> tuple[RewardFunction, str]:
    """Import the reward that the recipe names as `file.py:function`.

    Returns:
        The function, whose exceptions become `RewardError`s, and the SHA-256 of the file.

    Raises:
        RewardError: there is no such file or function, or the file cannot be imported.
    """
    file, _, name = config.recipe.reward.rpartition(":")
    try:
        code = Path(file).read_bytes()
    except OSError as error:
        raise RewardError(f"cannot read the reward file {file}: {error.strerror}") from None
    # Not by Python's import, which would read the file again: the code that runs must be the code that is hashed.
    namespace: dict[str, Any] = {"__name__": "ireasoner_custom_reward", "__file__": file}
    try:
        exec(compile(code, file, "exec", dont_inherit=True), namespace)
    except Exception as error:  # the code is the user's and may raise anything
        raise RewardError(f"the reward file {file} cannot be imported: {type(error).__name__}: {error}") from error
    function: RewardFunction | None = namespace.get(name)
    if not callable(function):
        raise RewardError(f"the reward file {file} has no function {name}")

    def reward(group: Group, context: Context) -> Numbers | Mapping[str, Numbers]:
        try:
            return function(group, context)
        except Exception as error:
            raise RewardError(f"{config.recipe.reward} failed: {type(error).__name__}: {error}") from error

    return reward, hashlib.sha256(code).hexdigest()
