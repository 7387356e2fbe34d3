"""A reward function of the user's own: imported from a Python file, or handed over in Python.

Importing a file runs the code in it, and a run directory may come from somebody else. So only `train` imports the file,
and for a resumed run only if the command line names it again. A function that was handed to `ireasoner.train` is never
imported: whoever resumes the run hands it over again.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

from ireasoner.method.recipe import IN_PYTHON, REWARDS
from ireasoner.method.scoring import RewardError, RewardFunction
from ireasoner.training.config import Config


def names_a_file(config: Config) -> bool:
    """Whether the recipe names a reward function in a file of the user's own."""
    return config.recipe.reward not in REWARDS and not config.recipe.reward.startswith(IN_PYTHON)


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


def check_reward(config: Config) -> None:
    """Find out whether the recipe's reward can be there, if it lies in a file, without running any of the file's code.

    Raises:
        RewardError: the file cannot be read, or is no Python, or nothing in it has the name of the function.
    """
    if not names_a_file(config):
        return
    file, _, name = config.recipe.reward.rpartition(":")
    try:
        tree = ast.parse(read_reward(config), file)
    except (SyntaxError, ValueError) as error:
        raise RewardError(f"the reward file {file} cannot be imported: {type(error).__name__}: {error}") from None
    # Whatever is defined, assigned or imported anywhere; `load_reward` finds out what is left of it.
    named = {getattr(node, field, None) for node in ast.walk(tree) for field in ("name", "asname", "id")}
    if not named & {name, "*"}:
        raise RewardError(f"the reward file {file} has no function {name}")


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


def reward_to_start(config: Config, handed: RewardFunction | None) -> tuple[Config, RewardFunction | None]:
    """The reward function of a new run, if it is one of the user's own, and the config with its name and digest.

    Args:
        config: options of the run.
        handed: a function that comes before the reward of the recipe.

    Raises:
        RewardError: there is no such file or function, or the file cannot be imported.
    """
    if handed is not None:
        config = config.model_copy(
            update={
                "recipe": config.recipe.model_copy(update={"reward": _name(handed)}),
                "reward_sha256": _source_digest(handed),
            }
        )
        return config, handed
    if not names_a_file(config):
        return config, None
    reward, digest = load_reward(config)
    return config.model_copy(update={"reward_sha256": digest}), reward


def reward_to_resume(
    config: Config, run_dir: Path, handed: RewardFunction | None, trusts_file: bool
) -> RewardFunction | None:
    """The reward function of a run that goes on, if it is one of the user's own.

    Args:
        config: options of the run.
        run_dir: the run's directory.
        handed: the function, if the run was started with one that was handed over.
        trusts_file: whether the file that the config names may be imported, which runs its code.

    Raises:
        RewardError: the function was not handed over, the file is not trusted, or one of them has changed.
    """
    name = config.recipe.reward
    if name.startswith(IN_PYTHON):
        if handed is None:
            told = f"the function {name.removeprefix(IN_PYTHON)}, which was handed to ireasoner.train"
            raise RewardError(f"{run_dir} uses {told}: go on in Python, with ireasoner.resume(..., reward=...)")
        if _name(handed) != name or _source_digest(handed) != config.reward_sha256:
            raise RewardError(f"{_name(handed)} is not the function that {run_dir} was started with, {name}")
        return handed
    if handed is not None:
        raise RewardError(f"{run_dir} uses the reward {name}, and not a function that is handed over: leave it out")
    if not names_a_file(config):
        return None
    if not trusts_file:
        raise RewardError(f"{run_dir} uses the reward {name}, whose code runs only if you name it: add --reward {name}")
    reward, digest = load_reward(config)
    if digest != config.reward_sha256:
        raise RewardError(f"{name} has changed since {run_dir} was started: restore the file, or start a new run")
    return reward


def _name(function: RewardFunction) -> str:
    """How a config names a function that was handed over."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{IN_PYTHON}{named.__module__}.{named.__qualname__}"


def _source_digest(function: RewardFunction) -> str | None:
    """The SHA-256 of a function's source text: of this alone, not of what it uses. None where it cannot be found."""
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    except (OSError, TypeError):  # typed at the prompt, or an object that is called
        return None
