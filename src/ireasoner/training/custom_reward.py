"""A reward function of the user's own, imported from a Python file.

Importing a file runs the code in it, and a run directory may come from somebody else. So only `train` imports the file,
and for a resumed run only if the command line names it again.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import ModuleType

from ireasoner.method.recipe import REWARDS
from ireasoner.method.scoring import RewardError, RewardFunction
from ireasoner.training.config import Config


def names_a_file(config: Config) -> bool:
    """Whether the recipe names a reward function of the user's own."""
    return config.recipe.reward not in REWARDS


def read_reward(config: Config) -> bytes:
    """The bytes of the file that the recipe's reward is in; its code is not run.

    Raises:
        RewardError: it cannot be read.
    """
    file = config.recipe.reward.rpartition(":")[0]
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise RewardError(f"cannot read the reward file {file}: {error.strerror}") from None


def sha256_of(config: Config) -> str | None:
    """The digest of the file that the recipe's reward is in, which is not run; None for the rewards that ship here."""
    return hashlib.sha256(read_reward(config)).hexdigest() if names_a_file(config) else None


def load_reward(config: Config) -> tuple[RewardFunction, str]:
    """Import the reward that the recipe names as `file.py:function`.

    Returns:
        The function, and the SHA-256 of the file: of this one alone, not of what it imports.

    Raises:
        RewardError: there is no such file or function, or the file cannot be imported.
    """
    file, _, name = config.recipe.reward.rpartition(":")
    code = read_reward(config)
    # Not by Python's import, which would read the file again: the code that runs must be the code that is hashed.
    module = ModuleType("ireasoner_custom_reward")
    module.__file__ = file
    sys.modules[module.__name__] = module  # where dataclasses and pickles look for it
    sys.path.insert(0, str(Path(file).absolute().parent))  # it may import a file beside it
    try:
        exec(compile(code, file, "exec", dont_inherit=True), vars(module))
    except Exception as error:  # the code is the user's and may raise anything
        raise RewardError(f"the reward file {file} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    function: RewardFunction | None = vars(module).get(name)
    if not callable(function):
        raise RewardError(f"the reward file {file} has no function {name}")
    return function, hashlib.sha256(code).hexdigest()
