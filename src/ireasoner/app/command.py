"""A command is a group of options with a `run` method; the parser follows from its fields, types and docstrings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ireasoner.method.recipe import Options
from ireasoner.method.types import UsageError
from ireasoner.training.config import as_flag, explain, option


class Command(Options):
    """The class's docstring is the command's description; `summary` is its line in the list of commands."""

    summary: ClassVar[str]
    positional: ClassVar[tuple[str, ...]] = ()
    """Fields that are named by their place on the command line."""
    training_options: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Options of `ireasoner.training.config` that the command takes as well, by the title of their group."""

    def run(self) -> int:
        """Do what the command says; its exit code."""
        raise NotImplementedError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage of `train` alone would fill a screen."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def add_command(commands: Any, name: str, command: type[Command]) -> None:
    """Add a command with its options to argparse's subparsers; options that are not given stay out of the result."""
    parser = commands.add_parser(name, help=command.summary, description=" ".join((command.__doc__ or "").split()))
    parser.set_defaults(command=name)
    if command.training_options:  # listing sixty options twice would fill a screen
        parser.usage = " ".join([parser.prog, *map(str.upper, command.positional), "[OPTION ...]"])
    for field, info in command.model_fields.items():
        _add(parser, field, info, positional=field in command.positional)
    for title, names in command.training_options.items():
        group = parser.add_argument_group(title)
        for option_name in names:
            _add(group, option_name, option(option_name), switch=False)


def parsed(command: type[Command], values: dict[str, Any]) -> Command:
    """The command with its options checked.

    Raises:
        UsageError: an option that is missing or has a bad value, by name.
    """
    try:
        return command(**values)
    except ValidationError as error:
        flags = {info.alias or name for name, info in command.model_fields.items()} - set(command.positional)
        raise UsageError(f"{explain(error, flags)} (see ireasoner {command.__name__.lower()} --help)") from None


def _add(parser: Any, name: str, info: FieldInfo, *, positional: bool = False, switch: bool = True) -> None:
    """Add one option of the command's own (`switch`: one for yes or no takes no value), or one of training's.

    What the latter is when it is not given depends on the recipe and the preset, so no default is named.
    """
    kind, name = _kind(info.annotation), info.alias or name
    shape: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(info, with_default=switch)}
    if kind is bool and switch:
        shape["action"] = "store_true"
    elif get_origin(kind) is tuple and Ellipsis not in get_args(kind):
        shape |= {"nargs": 2, "metavar": ("LEAST", "MOST") if name == "items" else ("FIRST", "LAST")}
    else:
        several = get_origin(kind) in (tuple, list)
        shape["metavar"] = name.upper().removesuffix("_DIR") if positional else _metavar(name, kind)
        shape["nargs"] = "+" if several else "?" if positional and not info.is_required() else None
    if positional:
        parser.add_argument(name, **shape)
    else:
        required = info.is_required() and switch
        parser.add_argument(as_flag(name), dest=name, required=required, **shape)


def _kind(annotation: Any) -> Any:
    """A type without its bounds, and without the None that stands for "not given"."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(each for each in get_args(annotation) if each is not type(None))
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _metavar(name: str, kind: Any) -> str:
    if get_origin(kind) in (tuple, list):
        kind = _kind(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return f"{{{','.join(map(str, get_args(kind)))}}}"
    text = "TEXT" if name.endswith("_prompt") else "NAME"
    return {int: "N", float: "X", bool: "{true,false}", Path: "PATH"}.get(kind, text)


def _help(info: FieldInfo, with_default: bool) -> str:
    """A field's docstring, if asked with its default where the docstring does not end with one in brackets."""
    text, default = " ".join((info.description or "").split()).rstrip("."), info.default
    unsaid = default is PydanticUndefined or default is None or default is False or default == () or text.endswith(")")
    shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
    return (text if unsaid or not with_default or len(shown) > 40 else f"{text} ({shown})").replace("%", "%%")
