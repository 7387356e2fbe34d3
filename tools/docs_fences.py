"""What the documentation makes of its own fences: equations, and the tables of options and commands.

`mkdocs.yml` names these functions, and the generator calls them while it builds a page. So the tables always describe
the code that they are built with, and nothing generated is committed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from html import escape
from importlib import resources
from typing import Any, Literal, get_args, get_origin

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ireasoner.app import cli
from ireasoner.training import config as configs

GROUPS: dict[str, Callable[[str], bool]] = {
    "run": lambda name: name not in (*configs.MACHINE_OPTIONS, *configs.PRESET_OPTIONS, *configs.RECIPE_OPTIONS),
    "machines": configs.MACHINE_OPTIONS.__contains__,
    "preset": configs.PRESET_OPTIONS.__contains__,
    "recipe": configs.RECIPE_OPTIONS.__contains__,
}


def math(source: str, *_: Any, **__: Any) -> str:
    """LaTeX as MathML, which browsers show without a script."""
    return f'<div class="math">{convert(source.strip(), display="block")}</div>'


class InlineMath(Extension):
    """`$x$` as MathML."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(_Dollars(r"(?<![\\$])\$(?! )([^$\n]+?)(?<! )\$", md), "inline_math", 185)


class _Dollars(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:
        return self.md.htmlStash.store(convert(m[1])), m.start(0), m.end(0)


def makeExtension(**options: Any) -> InlineMath:
    """What Markdown calls for the extension `docs_fences`."""
    return InlineMath(**options)


def options(source: str, *_: Any, **__: Any) -> str:
    """The table of a group of options: `run`, `machines`, `preset` or `recipe`."""
    chosen = GROUPS[source.strip()]
    rows = [_option_row(name) for name in configs.PATHS if chosen(name)]
    head = "<tr><th>option</th><th>values</th><th>default</th><th>meaning</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def parts(source: str, *_: Any, **__: Any) -> str:
    """The files of all `recipes` or `presets`, each of which begins with what it is for."""
    kind: Any = source.strip()
    files = [(name, escape(_text_of(kind, name))) for name in configs.names(kind)]
    return "".join(
        f'<h3 id="{kind[:-1]}-{name}"><code>{name}</code></h3><pre><code>{text}</code></pre>' for name, text in files
    )


def command_help(source: str, *_: Any, **__: Any) -> str:
    """What `ireasoner COMMAND --help` prints."""
    shown = io.StringIO()
    with redirect_stdout(shown), suppress(SystemExit):
        cli.main([*source.split(), "--help"])
    return f"<pre><code>{escape(shown.getvalue().strip())}</code></pre>"


def _option_row(name: str) -> str:
    info = configs.option(name)
    flag, text = configs.as_flag(name), " ".join((info.description or "").split())
    cells = [f"<code>{flag}</code>", _values(info), _default(name, info), _code(escape(text))]
    return f'<tr id="{flag[2:]}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _values(info: FieldInfo) -> str:
    """What an option may be, in words."""
    annotation, bounds = info.annotation, [*map(str, info.metadata)]
    for part in (annotation, *get_args(annotation)):
        if get_origin(part) is Literal:
            return " or ".join(f"<code>{value}</code>" for value in get_args(part))
        bounds += map(str, getattr(part, "__metadata__", ()))
    found = re.findall(r"\b(ge|gt|le|lt)=([-\d.e+]+)", " ".join(bounds))
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "&lt;"}
    shown = ", ".join(f"{signs[sign]} {float(value):g}" for sign, value in found)
    words = {"int": "whole number", "float": "number", "bool": "true or false", "Path": "path", "tuple": "names"}
    kind = next((word for key, word in words.items() if key in str(annotation)), "text")
    return f"{kind} {shown}".strip()


def _default(name: str, info: FieldInfo) -> str:
    """The default, and what each recipe or preset makes of it. A long text is shown by what its description says."""
    default = info.default
    unsaid = default is PydanticUndefined or default is None or default == () or len(str(default)) > 60
    shown = [] if unsaid else [_value(default)]
    kind: Literal["recipes", "presets"] = "recipes" if name in configs.RECIPE_OPTIONS else "presets"
    for part in configs.names(kind):
        value = configs.options_in(kind, part).get(name, default)
        if value != default:
            shown.append(f"{part}: {_value(value)}")
    return "<br>".join(shown)


def _value(value: Any) -> str:
    """A value as YAML and the command line have it."""
    return f"<code>{escape(str(value).lower() if isinstance(value, bool) else str(value))}</code>"


def _text_of(kind: Literal["recipes", "presets"], name: str) -> str:
    return resources.files("ireasoner.training").joinpath(kind, f"{name}.yaml").read_text("utf-8")


def _code(text: str) -> str:
    """Markdown's code spans as HTML, the only mark that docstrings of options use."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
