"""The options of a run, as commands take them. They are not repeated in signatures: they are read from
`ireasoner.training.config`, which also checks their values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, get_origin

from cyclopts import Group, Parameter

from ireasoner.app.options import shown, without_none
from ireasoner.training.config import MACHINE_OPTIONS, PATHS, PRESET_OPTIONS, RECIPE_OPTIONS, names, option, options_in

Command = Callable[..., int]

# Names that options have elsewhere in the field (transformers, TRL).
ALIASES = {
    "model": "--model-name-or-path",
    "steps": "--max-steps",
    "group_size": "--num-generations",
    "kl_coef": "--beta",
    "save_every": "--save-steps",
}
LONGEST_DEFAULT = 40  # characters; the help says in words what a longer one is

RUN = Group.create_ordered("The run")
MACHINES = Group.create_ordered("Where it runs: a resumed run may be given others")
SCALE = Group.create_ordered("Scale: a preset sets these")
REWARDS = Group.create_ordered("Rewards, advantages, KL: a recipe sets these")
RUN_OPTIONS = [name for name in PATHS if name not in (*RECIPE_OPTIONS, *PRESET_OPTIONS, *MACHINE_OPTIONS)]


def with_training_options(groups: Mapping[Group, Iterable[str]], first: Sequence[str] = ()) -> Callable[..., Any]:
    """A decorator: the command also takes these options of a run, and is given those that were named.

    Args:
        groups: the names of options by the group in which the help shows them.
        first: names of options that come before the command's own.
    """
    parameters = {name: _parameter(name, group) for group, listed in groups.items() for name in listed}

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        before = [parameters[name] for name in first]
        after = [each for name, each in parameters.items() if name not in first]
        places = [each for each in own if each.kind is not inspect.Parameter.KEYWORD_ONLY]
        named = [*before, *(each for each in own if each not in places), *after]
        command.__signature__ = signature.replace(parameters=[*places, *named])  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(name: str, group: Group) -> inspect.Parameter:
    """An option of a run, as the signature of a command would state it."""
    info = option(name)
    kind = without_none(info.annotation)
    several = get_origin(kind) is tuple
    parameter = Parameter(
        group=group,
        alias=ALIASES.get(name),
        help=_help(name, info.description or ""),
        show_default=_default(name) or False,
        consume_multiple=several,
        # Numbers, paths and names stay as they are typed: the config reads them, and says what is wrong with them.
        converter=None if kind is bool or get_origin(kind) is Literal else _typed,
    )
    separated = info.metadata if several else ()  # what takes several names apart that stand between commas
    annotation = Annotated[kind | None, *separated, parameter]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _typed(kind: Any, tokens: Sequence[Any]) -> str | list[str]:
    values = [token.value for token in tokens]
    return values if get_origin(kind) is tuple else values[0]


def _help(name: str, description: str) -> str:
    text = " ".join(description.split())
    if name in ("recipe", "preset"):
        return f"{text} [{name}s: {', '.join(names('recipes' if name == 'recipe' else 'presets'))}]"
    return text


_set_by = cache(options_in)


def _default(name: str) -> str | None:
    """What an option is if it is not given, and what it is with other presets or the paper's recipe; None: in words."""
    if name == "recipe":
        return "default"
    info, others = option(name), {}
    value = None if info.is_required() or info.default_factory else info.default
    if name in RECIPE_OPTIONS:
        others = {"recipe paper": value}
        value = _set_by("recipes", "default").get(name, value)
    elif name in PRESET_OPTIONS:
        others = {f"preset {preset}": _set_by("presets", preset).get(name, value) for preset in names("presets")}
    text = shown(value)
    if text is None or len(text) > LONGEST_DEFAULT:
        return None
    return "; ".join([text, *(f"{whose}: {shown(other)}" for whose, other in others.items() if other != value)])
