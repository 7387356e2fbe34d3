"""The page about many runs: their list, and some of them laid over each other."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from ireasoner.method.types import UsageError
from ireasoner.page.curves import LINES, overlay, panels_together
from ireasoner.page.overview import Found, row_of, stamp
from ireasoner.page.page import encode, environment
from ireasoner.page.run import RecordedRun
from ireasoner.page.verdict import figures


class ManyRuns:
    """Renders what several runs have to say together. Of a run, only its metrics are read."""

    def __init__(self) -> None:
        self.nonce = secrets.token_hex(4)  # so that a browser shows no picture that it kept from another viewer
        self.environment = environment(static=False, figures=figures)
        self.runs: dict[Path, RecordedRun] = {}

    def opened(self, found: Mapping[str, Found], keys: Sequence[str]) -> dict[str, RecordedRun]:
        """Those of the runs with these keys that can be read, as they are now, by name.

        They are as many at most as there are lines that can be told apart.
        """
        chosen: dict[str, RecordedRun] = {}
        for path, name in [found[key] for key in dict.fromkeys(keys) if key in found][: len(LINES)]:
            try:
                run = self.runs.get(path) or RecordedRun.open(path, files=("metrics",))
            except UsageError:
                continue
            run.refresh()
            chosen[name] = self.runs[path] = run
        return chosen

    def version(self, found: Mapping[str, Found], keys: Sequence[str]) -> str:
        """Changes whenever there is something new to show."""
        shown = [run.version for run in self.opened(found, keys).values()] or [
            (each.name, stamp(each.path)) for each in found.values()
        ]
        return hashlib.sha256(repr(shown).encode(errors="backslashreplace")).hexdigest()[:16]

    def render(self, found: Mapping[str, Found], keys: Sequence[str], *, whole: bool) -> bytes:
        """The runs with these keys laid over each other, or the list of all if there are none, as UTF-8.

        Args:
            found: all runs by their keys.
            keys: those that a reader chose, which may be anything.
            whole: with the page around it; otherwise only the section that changes.
        """
        chosen = self.opened(found, keys)
        version = self.version(found, keys)
        values: dict[str, Any] = {"version": version, "parts": "overlay" if chosen else "runs", "chosen": chosen}
        values["root"] = " + ".join(sorted({str(each.path.parent) for each in found.values()})[:3])
        if chosen:
            by_name = {name: key for key, (_, name) in found.items()}
            query = urlencode([("run", by_name[name]) for name in chosen])
            values |= {
                "keys": by_name,
                "charts": [overlay(chosen, panel) for panel in panels_together(chosen)],
                "differing": differing(chosen),
            }
            values["chart_source"] = lambda number, _: f"curves/{number}.svg?{query}&v={self.nonce}-{version}"
        else:
            values["rows"] = [(key, row_of(each)) for key, each in reversed([*found.items()])]
        return encode(self.environment.get_template("many.html" if whole else f"{values['parts']}.html").render(values))


def differing(runs: Mapping[str, RecordedRun]) -> list[tuple[str, list[str]]]:
    """The recipe and the options that are not the same in all runs, each with its value in every run."""
    flat = [{"recipe": run.config.recipe.name, **run.config.flat()} for run in runs.values()]
    rows = [(name, [str(options.get(name)) for options in flat]) for name in dict.fromkeys(n for f in flat for n in f)]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
