"""The page about a run: five questions, in the order in which a person asks them.

`ireasoner view` serves it in parts; `write_report` writes it into one file. Whatever a model wrote is escaped, and
pictures are the run's own thumbnails. The served page has no inline style or script; the file has one of each, which
its content security policy allows by their digests.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

from ireasoner.method.types import StepScore
from ireasoner.page import curves, gallery, terms, verdict
from ireasoner.page.run import FindTruth, RecordedRun
from ireasoner.training.advice import differences
from ireasoner.training.recorder import replace_file

PAGE_SIZE = 12  # episodes shown at a time
IN_REPORT = 24  # episodes of each filter that a report keeps
FILES = resources.files("ireasoner.page").joinpath("templates")


@dataclass(frozen=True)
class Query:
    """What a reader asked to see, as read from a web address, which may say anything."""

    show: str = "newest"
    q: str = ""
    steps: tuple[int, int] | None = None
    page: int = 0

    @classmethod
    def read(cls, values: Mapping[str, str]) -> Query:
        """From the query of an address; what makes no sense is ignored."""
        show = values.get("show", "newest")
        first, last = (_whole_number(values.get(name, "")) for name in ("from", "to"))
        steps = None if first is None and last is None else (first or 0, 10**9 if last is None else last)
        show = show if show in gallery.FILTERS else "newest"
        return cls(show, values.get("q", "")[:200], steps, _whole_number(values.get("page", "")) or 0)


def _whole_number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


class Page:
    """Renders the page about a run, or parts of it.

    Args:
        run: the run, which the caller refreshes.
        static: whether the page is a file of its own; otherwise it is served.
    """

    def __init__(self, run: RecordedRun, *, static: bool = False) -> None:
        self.run, self.static = run, static
        self.nonce = secrets.token_hex(4)  # so that a browser shows no picture that it kept from another viewer
        environment = Environment(loader=PackageLoader("ireasoner.page"), autoescape=True, undefined=StrictUndefined)
        environment.trim_blocks = environment.lstrip_blocks = True
        environment.filters |= {"cut": _cut, "ends": _ends, "stretch": _stretch}
        environment.filters |= {"shade": self._shade, "explain": self._explain}
        environment.globals |= {"run": run, "static": static}
        environment.globals |= {"curves": curves, "gallery": gallery, "terms": terms, "verdict": verdict}
        environment.globals |= {"differences": differences, "checkpoints": _checkpoints}
        environment.globals |= {"panel_source": self._panel_source, "thumbnail_source": self._thumbnail_source}
        self.environment = environment

    @property
    def least(self) -> float:
        """Similarity of steps that have nothing in common, where the colour scale begins: 0, or (1 + cos 90°) / 2."""
        return 0.0 if self.run.config.recipe.step_measure == "claims" else 0.5

    def render(self, name: str, query: Query | None = None) -> bytes:
        """A template of the page, such as `page.html` or `episodes.html`, as UTF-8."""
        query = query or Query()
        query = query if query.show in gallery.filters(self.run) else replace(query, show="newest")
        values: dict[str, Any] = {"query": query, "least": self.least}
        if name in ("page.html", "gallery.html", "episodes.html"):
            values |= self._chosen_for_report() if self.static else self._chosen(query)
        if self.static and name == "page.html":
            style, script = (FILES.joinpath(file).read_text("utf-8") for file in ("style.css", "page.js"))
            values |= {"style": style, "script": script, "policy": _policy(style, script)}
        text = self.environment.get_template(name).render(values)
        return text.encode("utf-8", errors="backslashreplace")  # file names may hold lone surrogates

    def _chosen(self, query: Query) -> dict[str, Any]:
        """The episodes of one page of a list."""
        found = gallery.select(self.run, query.show, query.q, query.steps)
        page = min(query.page, max(0, (len(found) - 1) // PAGE_SIZE))
        first = page * PAGE_SIZE
        shown = [(self.run.episode(entry), {}) for entry in found[first : first + PAGE_SIZE]]
        return {"chosen": shown, "first": first, "total": len(found), "query": replace(query, page=page)}

    def _chosen_for_report(self) -> dict[str, Any]:
        """The first episodes of every filter, each once and with its rank in each filter; the newest first."""
        ranks: dict[tuple[int, int], dict[str, int]] = {}
        for name in gallery.filters(self.run):
            for rank, entry in enumerate(gallery.select(self.run, name)[:IN_REPORT]):
                ranks.setdefault(entry.place, {})[name] = rank
        kept = [entry for entry in gallery.select(self.run) if entry.place in ranks]
        return {"chosen": [(self.run.episode(e), ranks[e.place]) for e in kept], "kept": IN_REPORT}

    def _shade(self, value: float | None) -> str:
        """The CSS class that colours a similarity in [0, 1]."""
        if value is None or not math.isfinite(value):
            return "none"
        return f"a{round(10 * min(1.0, max(0.0, (value - self.least) / (1 - self.least))))}"

    def _explain(self, score: StepScore | None) -> str:
        """The tooltip of a reasoning step."""
        if score is None or score.similarity is None:
            return "not compared: empty, beyond the last position compared, or it states nothing of its own"
        recurs = f"recurs in {100 * score.recurrence:.1f} % of other images' groups; "
        recurs = recurs if self.run.config.recipe.recurrence_window else ""
        counts = "not counted in the reward" if score.score is None else f"counts {score.score:.4f}"
        return f"agreement {score.similarity:.4f}; {recurs}{counts}"

    def _panel_source(self, number: int) -> str:
        if not self.static:
            return f"/curves/{number}.svg?v={self.nonce}-{self.run.version}"
        return f"data:image/svg+xml;base64,{_base64(curves.draw_panel(self.run, number).encode())}"

    def _thumbnail_source(self, name: str) -> str:
        path = self.run.thumbnail(name)
        if path is None or not self.static:
            return f"/images/{path.name}" if path else ""
        try:
            with warnings.catch_warnings(), Image.open(path, formats=["PNG"]) as image:
                warnings.simplefilter("error")  # a small file may unpack to a huge picture
                if max(image.size) > 1024:
                    return ""
                file = io.BytesIO()
                image.convert("RGBA" if image.has_transparency_data else "RGB").save(file, "WEBP", quality=85)
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Warning, Image.DecompressionBombError):
            return ""
        return f"data:image/webp;base64,{_base64(file.getvalue())}"


def write_report(path: Path, target: Path | None = None, find_truth: FindTruth | None = None) -> Path:
    """Write the page about a run as one file, and return where it is.

    Args:
        path: the run directory.
        target: the file; None: `report.html` in the run directory, with `curves.png` beside it.
        find_truth: as for `RecordedRun`.

    Raises:
        UsageError: this is no run directory, or its config or its truth cannot be read.
        OSError: the file cannot be written.
    """
    run = RecordedRun.open(path, find_truth)
    if target is None:
        curves.draw_curves(run, path / "curves.png")
    target = target or path / "report.html"
    replace_file(target, Page(run, static=True).render("page.html"))
    return target


def _policy(style: str, script: str) -> str:
    digests = (_base64(hashlib.sha256(text.encode()).digest()) for text in (style, script))
    return "default-src 'none'; img-src data:; style-src 'sha256-{}'; script-src 'sha256-{}'".format(*digests)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _cut(text: object, limit: int = 3000) -> str:
    text = str(text)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit} more characters)"


def _ends(values: list[float | None]) -> str:
    """The first and the last value of a smoothed curve."""
    known = [value for value in values if value is not None]
    return f"{known[0]:.3g} → {known[-1]:.3g}" if known else ""


def _stretch(steps: tuple[int, int]) -> str:
    first, last = steps
    return f"steps {first} to {last}" if last > first else f"step {first}"


def _checkpoints(run: RecordedRun) -> list[tuple[str, str]]:
    """Names and sizes of the checkpoints that are there, the newest first."""
    folder, found = run.path / "checkpoints", []
    try:
        for path in [] if folder.is_symlink() else sorted(folder.glob("step-*"), reverse=True)[:100]:
            if path.is_dir() and not path.is_symlink():
                files = [*path.glob("*"), *path.glob("*/*")]
                size = sum(file.lstat().st_size for file in files if file.is_file())
                found.append((path.name, f"{size / 1e6:.1f} MB"))
    except OSError:  # none yet, or deleted while it was being read
        pass
    return found
