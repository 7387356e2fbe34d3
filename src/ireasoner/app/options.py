"""What the options of several commands have in common.

The library (cyclopts) reads what a command takes from its signature, and the help from its docstring.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from cyclopts import Parameter
from pydantic import Field

from ireasoner.method.types import UsageError

Style = Literal["chalk", "varied", "plain"]
Split = Literal["validation", "test"]


def whole(kind: Any, tokens: Sequence[Any]) -> int | tuple[int, ...]:
    """Whole numbers as they are typed; the library itself would round 2.5."""
    try:
        numbers = tuple(int(token.value) for token in tokens)
    except ValueError:
        raise ValueError("a whole number is needed, not " + " ".join(token.value for token in tokens)) from None
    return numbers if get_origin(without_none(kind)) is tuple else numbers[0]


def _writable(kind: Any, path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written")


WHOLE = Parameter(converter=whole)
Count = Annotated[int, Field(ge=1), WHOLE]
Seed = Annotated[int, Field(ge=0), WHOLE]
Device = Annotated[str, Parameter(help="One of auto, cpu, cuda and cuda:N.")]
Revision = Annotated[str | None, Parameter(help="Branch, tag or commit of a model on the hub (the newest commit).")]
Writable = Annotated[Path | None, Parameter(validator=_writable)]  # found out now rather than after hours of work
JsonFile = Annotated[Writable, Parameter(name="--json", help="Write the results here too.")]
OutFolder = Annotated[Path, Parameter(alias="--output-dir")]


def keep(file: Path | None, results: Any) -> None:
    """Write the results of a command to the file that was named, if any."""
    from ireasoner.training.recorder import write_json

    if file is not None:
        try:
            file.write_text(write_json(results), "utf-8")
        except OSError as error:
            raise UsageError(f"the results cannot be written to {file}: {error}") from None


def shown(value: Any) -> str | None:
    """A default as the help shows it; None for one that is not worth showing."""
    if value is None or value == ():
        return None
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def without_none(kind: Any) -> Any:
    """A type without its bounds, and without the None that stands for "not given"."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(each for each in get_args(kind) if each is not type(None))
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind
