"""The page about a run: five questions, in the order in which a person asks them.

`ireasoner view` serves it part by part; `write_report` writes the same into one file. Whatever a model wrote reaches
it as escaped text, and pictures are the run's own thumbnails. No style and no script is inline where it is served, and
in the file both are allowed by their digests alone.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import secrets
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

from ireasoner.method.answers import answer_key
from ireasoner.page.curves import PANELS, draw_curves, draw_panel, readings
from ireasoner.page.gallery import FILTERS, Matrix, average_agreement, filters, openings, select, stretches
from ireasoner.page.run import Episode, Run, StepScore
from ireasoner.page.terms import proposer_term, solver_terms
from ireasoner.page.verdict import MEASURES, signs, verdict
from ireasoner.training.config import ConfigError, names, resolve
from ireasoner.training.recorder import replace_file

PAGE_SIZE = 12  # episodes shown at a time
IN_REPORT = 24  # episodes of each filter that a report keeps
PROBE_COLUMNS = 6
FILES = resources.files("ireasoner.page").joinpath("templates")


@dataclass(frozen=True)
class Query:
    """What a reader asked to see; made from a web address, of which nothing has to be right."""

    show: str = "newest"
    q: str = ""
    steps: tuple[int, int] | None = None
    page: int = 0

    @classmethod
    def read(cls, values: Mapping[str, str]) -> Query:
        """From the query of an address; what makes no sense is left out."""
        show = values.get("show", "newest")
        first, last = (_whole(values.get(name, "")) for name in ("from", "to"))
        steps = None if first is None and last is None else (first or 0, 10**9 if last is None else last)
        show = show if show in FILTERS else "newest"
        return cls(show, values.get("q", "")[:200], steps, _whole(values.get("page", "")) or 0)

    def link(self, page: int) -> str:
        """The address of another page of the same list."""
        values: dict[str, Any] = {"show": self.show, "q": self.q, "page": page}
        if self.steps:
            values |= {"from": self.steps[0], "to": self.steps[1]}
        return f"?{urlencode(values)}#asks"


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


class Page:
    """Renders a run's page, or parts of it.

    Args:
        run: as it was read; the caller refreshes it.
        static: for a file that stands alone.
    """

    def __init__(self, run: Run, *, static: bool = False) -> None:
        self.run, self.static = run, static
        self.nonce = secrets.token_hex(4)  # a browser keeps pictures: of this viewer, not of the last one at its port
        environment = Environment(loader=PackageLoader("ireasoner.page"), autoescape=True, undefined=StrictUndefined)
        environment.trim_blocks = environment.lstrip_blocks = True
        environment.filters |= {"cut": _cut, "short": _short, "ends": _ends}
        environment.filters |= {"shade": self._shade, "explain": self._explain}
        environment.globals |= {"verdict": verdict, "signs": signs, "accuracy": _accuracy, "readings": readings}
        environment.globals |= {"panels": PANELS, "filters": filters, "by_answer": _by_answer, "agrees": _agrees}
        environment.globals |= {"solver_terms": solver_terms, "proposer_term": proposer_term}
        environment.globals |= {"similarities": _similarities, "heat_maps": _heat_maps, "openings": openings}
        environment.globals |= {"probes": _probes, "differences": _differences, "options": _options}
        environment.globals |= {"checkpoints": _checkpoints, "static": static, "least": self.least}
        environment.globals |= {"panel_source": self._panel_source, "thumbnail_source": self._thumbnail_source}
        self.environment = environment

    @property
    def least(self) -> float:
        """The similarity of steps that have nothing in common, where the scale of colours begins."""
        return 0.0 if self.run.config.step_measure == "claims" else 0.5  # (1 + cos)/2

    def _shade(self, value: float | None) -> str:
        """The class of a colour for a similarity in [0, 1]."""
        if value is None or not math.isfinite(value):
            return "none"
        return f"a{round(10 * min(1.0, max(0.0, (value - self.least) / (1 - self.least))))}"

    def _explain(self, score: StepScore | None) -> str:
        """What the pointer says above a step."""
        if score is None or score.similarity is None:
            return "not compared: empty, beyond the last position compared, or it claims nothing beyond the answer"
        recurs = f"recurs in {100 * score.recurrence:.1f} % of other images' groups; "
        recurs = recurs if self.run.config.recurrence_window else ""
        counts = "not counted in the reward" if score.score is None else f"counts {score.score:.4f}"
        return f"agreement {score.similarity:.4f}; {recurs}{counts}"

    def render(self, name: str, query: Query | None = None) -> bytes:
        """A template of the page, such as `page.html` or `episodes.html`, as UTF-8."""
        query = query or Query()
        query = query if query.show in filters(self.run) else replace(query, show="newest")
        values: dict[str, Any] = {"run": self.run, "query": query}
        if name in ("page.html", "gallery.html", "episodes.html"):
            values |= self._chosen_for_report() if self.static else self._chosen(query)
        if self.static and name == "page.html":
            style, script = (FILES.joinpath(file).read_text("utf-8") for file in ("style.css", "page.js"))
            values |= {"style": style, "script": script, "policy": _policy(style, script)}
        text = self.environment.get_template(name).render(values)
        return text.encode("utf-8", errors="backslashreplace")  # names of files may hold lone surrogates

    def _chosen(self, query: Query) -> dict[str, Any]:
        found = select(self.run, query.show, query.q, query.steps)
        page = min(query.page, max(0, (len(found) - 1) // PAGE_SIZE))
        first = page * PAGE_SIZE
        shown = [(self.run.episode(entry), {}) for entry in found[first : first + PAGE_SIZE]]
        return {"chosen": shown, "first": first, "total": len(found), "query": replace(query, page=page)}

    def _chosen_for_report(self) -> dict[str, Any]:
        """The first episodes of every filter, each once, with its rank in each; the newest first."""
        ranks: dict[tuple[int, int], dict[str, int]] = {}
        for name in filters(self.run):
            for rank, entry in enumerate(select(self.run, name)[:IN_REPORT]):
                ranks.setdefault(entry.place, {})[name] = rank
        kept = [entry for entry in select(self.run) if entry.place in ranks]
        return {"chosen": [(self.run.episode(e), ranks[e.place]) for e in kept], "kept": IN_REPORT}

    def _panel_source(self, run: Run, number: int) -> str:
        if not self.static:
            return f"/curves/{number}.svg?v={self.nonce}-{run.version}"
        return f"data:image/svg+xml;base64,{base64.b64encode(draw_panel(run, number).encode()).decode('ascii')}"

    def _thumbnail_source(self, run: Run, name: str) -> str:
        path = run.thumbnail(name)
        if path is None or not self.static:
            return f"/images/{path.name}" if path else ""
        try:
            with warnings.catch_warnings(), Image.open(path, formats=["PNG"]) as image:
                warnings.simplefilter("error")  # a picture that unpacks to something huge
                if max(image.size) > 1024:
                    return ""
                file = io.BytesIO()
                image.convert("RGBA" if image.has_transparency_data else "RGB").save(file, "WEBP", quality=85)
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Warning, Image.DecompressionBombError):
            return ""
        return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def write_report(path: Path, target: Path | None = None, truth: Path | None = None) -> Path:
    """Write a run's `curves.png` and its page as one file, which it returns.

    Args:
        path: the run directory. target: the file; None: `report.html` in the run directory, beside `curves.png`.
        truth: as for `Run`.

    Raises:
        UsageError: no run. OSError: the file cannot be written.
    """
    run = Run(path, truth)
    if target is None:
        draw_curves(run, path / "curves.png")
    target = target or path / "report.html"
    replace_file(target, Page(run, static=True).render("page.html"))  # an ablation takes it for the end of a run
    return target


def _policy(style: str, script: str) -> str:
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") for text in (style, script))
    return "default-src 'none'; img-src data:; style-src 'sha256-{}'; script-src 'sha256-{}'".format(*digests)


# --- how values are shown ---------------------------------------------------------------------------------------------


def _cut(text: object, limit: int = 3000) -> str:
    text = str(text)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit} more characters)"


def _short(value: float) -> str:
    return f"{value:.3g}"


def _ends(values: list[float | None]) -> str:
    """First and last of a smoothed curve."""
    known = [value for value in values if value is not None]
    return f"{known[0]:.3g} → {known[-1]:.3g}" if known else ""


# --- Is it working? ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """Rows of the table of accuracies."""

    questions: int
    measures: list[tuple[str, str, str, str, str]]


def _accuracy(run: Run) -> Accuracy | None:
    summary = run.summary or {}
    try:
        rows = []
        for name in [name for name in MEASURES if name in (summary.get("difference") or {})]:
            change, parts = summary["difference"][name], (summary["before"][name], summary["after"][name])
            cells = [_interval(part, "{:.1f}") for part in parts]
            rows.append((name, cells[0], cells[1], _interval(change, "{:+.1f}"), f"{change['p']:.4f}"))
        return Accuracy(int(summary["before"]["questions"]), rows) if rows else None
    except (KeyError, TypeError, ValueError, ArithmeticError):  # not ours
        return None


def _interval(part: Mapping[str, float], form: str) -> str:
    mean, low, high = (form.format(100 * part[name]) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


# --- What does it ask and answer? How do the steps agree? -------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Trajectories of an episode that give the same answer."""

    answer: str
    key: str | None
    majority: bool
    readable: bool
    trajectories: list[Any]


def _by_answer(episode: Episode) -> list[Group]:
    """The majority's group first, the unreadable last, the others by size."""
    found: dict[str | None, list[Any]] = {}
    for t in episode.trajectories:
        found.setdefault(t.answer_key, []).append(t)
    groups = [
        Group(own[0].answer or "unreadable", key, own[0].in_majority, key is not None, own)
        for key, own in found.items()
    ]
    return sorted(groups, key=lambda g: (not g.majority, not g.readable, -len(g.trajectories)))


def _agrees(truth: str, key: str | None, question: str) -> bool:
    return answer_key(truth, question) == key


def _similarities(episode: Episode) -> list[tuple[str, list[float | None]]]:
    """The heat map of an episode: a row for each trajectory that has compared steps, by answer."""
    rows = [
        (t.answer or "unreadable", [score.similarity for score in t.step_scores])
        for group in _by_answer(episode)
        for t in group.trajectories
        if t.step_scores
    ]
    width = max((len(row) for _, row in rows), default=0)
    compared = any(value is not None for _, row in rows for value in row)
    return [(label, [*row, *[None] * (width - len(row))]) for label, row in rows] if compared else []


def _heat_maps(run: Run, chosen: tuple[int, int] | None) -> list[tuple[tuple[int, int], int, Matrix, float, bool]]:
    """The averaged heat maps of the run's stretches, and of the steps that a reader chose, which are marked."""
    found, parts = [], [(*stretch, False) for stretch in stretches(run)]
    for first, last, own in [*parts, *([(*chosen, True)] if chosen else [])]:
        entries = [entry for entry in run.entries if first <= entry.step <= last]
        if matrix := average_agreement(entries):
            steps = (entries[0].step, entries[-1].step)
            mean = float(np.nanmean(np.stack([entry.agreement for entry in entries])))
            found.append((steps, len(entries), matrix, mean, own))
    return found


# --- How did it change? What ran? -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """An answer to a probe; whether it changed from the one before it in time, and is correct, where that is known."""

    answer: str | None
    reasoning_steps: list[str]
    changed: bool
    correct: bool | None


def _probes(run: Run) -> tuple[list[int], list[tuple[str, str, str, list[Cell | None]]]]:
    """Some points of training, and for each probe its question, image, thumbnail and answers at these."""
    steps = sorted({probe.step for probe in run.probes})
    count = min(PROBE_COLUMNS, len(steps))
    columns = sorted({steps[round(k * (len(steps) - 1) / max(1, count - 1))] for k in range(count)})
    by_image: dict[str, dict[int, Any]] = {}
    for probe in run.probes:
        by_image.setdefault(probe.image, {})[probe.step] = probe
    rows = []
    for image, answers in by_image.items():
        any_probe = next(iter(answers.values()))
        truth = run.true_answer(image, any_probe.question)
        rows.append((any_probe.question, image, any_probe.thumbnail, list(_cells(columns, answers, truth))))
    return columns, rows


def _cells(columns: list[int], answers: Mapping[int, Any], truth: str | None) -> Iterator[Cell | None]:
    before, known = None, False
    for step in columns:
        probe = answers.get(step)
        if probe is None:
            yield None
            continue
        key = answer_key(probe.answer, probe.question) if probe.answer is not None else None
        correct = None if truth is None else key == answer_key(truth, probe.question)
        yield Cell(probe.answer, probe.reasoning_steps, known and key != before, correct)
        before, known = key, True


def _differences(run: Run) -> list[tuple[str, str, str]] | None:
    """Options that are not what recipe and preset say, without those that name the run; None for files of one's own."""
    config = run.config
    flags = {"images": config.images, "model": config.model, "recipe": config.recipe, "preset": config.preset}
    if config.recipe not in names("recipes") or config.preset not in names("presets"):
        return None  # a run directory may name any file
    try:
        expected = resolve({**flags, **({"labels": config.labels} if config.labels else {})})
    except ConfigError:
        return None
    named = {*flags, "labels"}
    return [(n, str(v), str(getattr(expected, n))) for n, v in config if n not in named and v != getattr(expected, n)]


def _options(run: Run) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in run.config]


def _checkpoints(run: Run) -> list[tuple[str, str]]:
    """The checkpoints that are there, the newest first, with their sizes."""
    folder, found = run.path / "checkpoints", []
    try:
        for path in [] if folder.is_symlink() else sorted(folder.glob("step-*"), reverse=True)[:100]:
            if path.is_dir() and not path.is_symlink():
                files = [*path.glob("*"), *path.glob("*/*")]
                size = sum(file.lstat().st_size for file in files if file.is_file())
                found.append((path.name, f"{size / 1e6:.1f} MB"))
    except OSError:  # none yet, or deleted while it was read
        pass
    return found
