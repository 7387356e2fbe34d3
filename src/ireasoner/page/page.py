"""The page about a run: five questions, in the order in which a person asks them; and a page about one episode.

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
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

from ireasoner.method.types import StepScore
from ireasoner.page import curves, gallery, terms, verdict
from ireasoner.page.run import Entry, FindTruth, RecordedRun
from ireasoner.training.advice import differences
from ireasoner.training.recorder import replace_file

PAGE_SIZE = 12  # episodes shown at a time
IN_REPORT = 24  # episodes of each filter that a report keeps
REPORT_PIXELS = 256  # a side of a picture in a report, which should fit into a mail
LIST_TEXT, WHOLE_TEXT = 3000, 200_000  # most characters of a text in a list of episodes, and on an episode's own page
FOLLOWED = ("working", "agreement", "change", "ran")  # sections that a served page renews while the run goes on
FILES = resources.files("ireasoner.page").joinpath("templates")


@dataclass(frozen=True)
class Query:
    """What a reader asked to see, as read from a web address, which may say anything.

    `episode` is the step and the number of the one episode to show; None: the page about the run.
    """

    show: str = "newest"
    q: str = ""
    steps: tuple[int, int] | None = None
    page: int = 0
    episode: tuple[int, int] | None = None

    @classmethod
    def read(cls, values: Mapping[str, str]) -> Query:
        """From the query of an address; what makes no sense is ignored."""
        show = values.get("show", "newest")
        first, last = (_whole_number(values.get(name, "")) for name in ("from", "to"))
        steps = None if first is None and last is None else (first or 0, 10**9 if last is None else last)
        show = show if show in gallery.FILTERS else "newest"
        step, number = (_whole_number(part) for part in (*values.get("episode", "").split("-"), "", "")[:2])
        episode = None if step is None or number is None else (step, number)
        return cls(show, values.get("q", "")[:200], steps, _whole_number(values.get("page", "")) or 0, episode)

    def link(self, entry: Entry | None = None, page: int | None = None) -> str:
        """The address of an episode among those of this query, or of a page of their list."""
        values = {"show": self.show, "q": self.q}
        values |= {"from": str(self.steps[0]), "to": str(self.steps[1])} if self.steps else {}
        values |= {"episode": entry.name} if entry else {"page": str(self.page if page is None else page)}
        return f"?{urlencode(values, errors='replace')}{'' if entry else '#asks'}"


class NoSuchEpisodeError(Exception):
    """A run has no episode of the step and the number that were asked for."""


def _whole_number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def environment(**names: Any) -> Environment:
    """What renders the templates, which know these names."""
    found = Environment(loader=PackageLoader("ireasoner.page"), autoescape=True, undefined=StrictUndefined)
    found.trim_blocks = found.lstrip_blocks = True
    found.filters |= {"cut": _cut, "ends": _ends, "stretch": _stretch}
    found.globals |= {"curves": curves, "gallery": gallery, "terms": terms, "verdict": verdict, **names}
    return found


def encode(text: str) -> bytes:
    """A page as UTF-8; names of files may hold lone surrogates."""
    return text.encode("utf-8", errors="backslashreplace")


class Page:
    """Renders the page about a run, or parts of it.

    Args:
        run: the run, which the caller refreshes.
        static: whether the page is a file of its own; otherwise it is served.
        home: the address of the list of runs that this one belongs to, if there is one.
    """

    def __init__(self, run: RecordedRun, *, static: bool = False, home: str = "") -> None:
        self.run, self.static = run, static
        self.nonce = secrets.token_hex(4)  # so that a browser shows no picture that it kept from another viewer
        self.environment = environment(run=run, static=static, home=home, parts="" if static else " ".join(FOLLOWED))
        self.environment.filters |= {"shade": self._shade, "explain": self._explain}
        self.environment.globals |= {"differences": differences, "checkpoints": _checkpoints}
        self.environment.globals["charts"] = lambda: [curves.chart(run, panel) for panel in curves.panels(run)]
        self.environment.globals |= {"chart_source": self._chart_source, "thumbnail_source": self._thumbnail_source}

    @property
    def least(self) -> float:
        """Where the colour scale begins: at 0, or at (1 + cos 90°) / 2, which steps without anything in common have."""
        return 0.5 if self.run.config.recipe.step_measure == "embedding" else 0.0

    def render(self, name: str, query: Query | None = None) -> bytes:
        """A template of the page, such as `page.html` or `episodes.html`, as UTF-8."""
        query = query or Query()
        query = query if query.show in gallery.filters(self.run) else replace(query, show="newest")
        values: dict[str, Any] = {
            "query": query,
            "least": self.least,
            "limit": LIST_TEXT,
            "alone": name == "alone.html",
        }
        if name in ("page.html", "gallery.html", "episodes.html"):
            values |= self._chosen_for_report() if self.static else self._chosen(query)
        if name == "alone.html":
            values |= self._alone(query) | {"limit": WHOLE_TEXT}
        if self.static and name == "page.html":
            style, script = (FILES.joinpath(file).read_text("utf-8") for file in ("style.css", "page.js"))
            values |= {"style": style, "script": script, "policy": _policy(style, script)}
        return encode(self.environment.get_template(name).render(values))

    def _chosen(self, query: Query) -> dict[str, Any]:
        """The episodes of one page of a list."""
        found = gallery.select(self.run, query.show, query.q, query.steps)
        page = min(query.page, max(0, (len(found) - 1) // PAGE_SIZE))
        first = page * PAGE_SIZE
        shown = [(entry, self.run.episode(entry), {}) for entry in found[first : first + PAGE_SIZE]]
        return {"chosen": shown, "first": first, "total": len(found), "query": replace(query, page=page)}

    def _alone(self, query: Query) -> dict[str, Any]:
        """The episode that was asked for, and those before and after it in the list that it was chosen from.

        Raises:
            NoSuchEpisodeError: neither this list nor the run holds it.
        """
        found = gallery.select(self.run, query.show, query.q, query.steps)
        if query.episode not in [(entry.step, entry.number) for entry in found]:
            found, query = gallery.select(self.run), Query(episode=query.episode)
        places = [i for i, entry in enumerate(found) if (entry.step, entry.number) == query.episode]
        if not places or (episode := self.run.episode(found[places[0]])) is None:
            raise NoSuchEpisodeError
        i = places[0]
        before, after = (found[k] if 0 <= k < len(found) else None for k in (i - 1, i + 1))
        query = replace(query, page=i // PAGE_SIZE)
        return {
            "entry": found[i], "e": episode, "before": before, "after": after,
            "rank": i + 1, "total": len(found), "query": query,
        }  # fmt: skip

    def _chosen_for_report(self) -> dict[str, Any]:
        """The first episodes of every filter, each once and with its rank in each filter; the newest first."""
        ranks: dict[tuple[int, int], dict[str, int]] = {}
        for name in gallery.filters(self.run):
            for rank, entry in enumerate(gallery.select(self.run, name)[:IN_REPORT]):
                ranks.setdefault(entry.place, {})[name] = rank
        kept = [entry for entry in gallery.select(self.run) if entry.place in ranks]
        return {"chosen": [(e, self.run.episode(e), ranks[e.place]) for e in kept], "kept": IN_REPORT}

    def _shade(self, value: float | None) -> str:
        """The CSS class that colours a similarity in [0, 1]."""
        if value is None or not math.isfinite(value):
            return "none"
        return f"a{round(10 * min(1.0, max(0.0, (value - self.least) / (1 - self.least))))}"

    def _explain(self, score: StepScore | None) -> str:
        """The tooltip of a reasoning step."""
        if score is None or score.similarity is None:
            return "not compared: empty, beyond the last position compared, or it says again what was said before"
        recurs = f"recurs in {100 * score.recurrence:.1f} % of other images' groups; "
        recurs = recurs if self.run.config.recipe.recurrence_window else ""
        counts = "not counted in the reward" if score.score is None else f"counts {score.score:.4f}"
        return f"agreement {score.similarity:.4f}; {recurs}{counts}"

    def _chart_source(self, number: int, chart: curves.Chart) -> str:
        if not self.static:
            return f"curves/{number}.svg?v={self.nonce}-{self.run.version}"
        return f"data:image/svg+xml;base64,{_base64(curves.draw_svg(chart).encode())}"

    def _thumbnail_source(self, name: str) -> str:
        path = self.run.thumbnail(name)
        if path is None or not self.static:
            return f"images/{path.name}" if path else ""
        try:
            with warnings.catch_warnings(), Image.open(path, formats=["PNG", "WEBP"]) as image:
                warnings.simplefilter("error")  # a small file may unpack to a huge picture
                if max(image.size) > 1024:
                    return ""
                small, file = image.convert("RGBA" if image.has_transparency_data else "RGB"), io.BytesIO()
                small.thumbnail((REPORT_PIXELS, REPORT_PIXELS))
                small.save(file, "WEBP", quality=85)
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


def _cut(text: object, limit: int = LIST_TEXT) -> str:
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
