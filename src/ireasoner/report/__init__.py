"""A finished run as one page to look at: `report.html` and `curves.png`, from the run directory alone."""

from __future__ import annotations

import base64
import json
from collections import deque
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from ireasoner.recorder import read_records, replace_file

# What is drawn, panel by panel: title and the metrics in it.
CURVES = (
    ("reward, solver", ("reward/solver/total", "reward/solver/outcome", "reward/solver/step_agreement")),
    ("majority fraction", ("answers/majority_fraction",)),
    ("answer entropy (nats)", ("answers/entropy",)),
    ("KL to the backbone (nats a token)", ("kl/solver", "kl/proposer")),
    ("reward, proposer", ("reward/proposer/total",)),
    ("completion length (tokens)", ("length/solver", "length/proposer")),
    ("well-formed share", ("well_formed/solver", "well_formed/proposer")),
    ("distinct questions in a step", ("questions/distinct",)),
)
LAST_EPISODES = 12


def write_report(run: Path) -> Path:
    """Write `curves.png` and `report.html` into the run directory; returns the page.

    Everything that a model wrote reaches the page as escaped text; images are the run's own thumbnails.
    """
    summary = json.loads((run / "summary.json").read_text("utf-8")) if (run / "summary.json").exists() else None
    draw_curves(run, run / "curves.png")
    episodes = deque(read_records(run / "episodes.jsonl"), maxlen=LAST_EPISODES)
    probes: dict[str, list[dict[str, Any]]] = {}
    for record in read_records(run / "probes.jsonl"):
        probes.setdefault(record["image"], []).append(record)
    environment = Environment(loader=PackageLoader("ireasoner", "report"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("page.html").render(
        name=run.resolve().name,
        config=yaml.safe_load((run / "config.yaml").read_text("utf-8")),
        summary=summary,
        curves=_data_url(run / "curves.png"),
        episodes=[{**e, "thumbnail": _thumbnail(run, e)} for e in reversed(episodes)],
        probes=[(_thumbnail(run, records[0]), records) for records in probes.values()],
        skipped=list(read_records(run / "skipped.jsonl")),
        events=list(read_records(run / "events.jsonl")),
    )
    target = run / "report.html"
    replace_file(target, page.encode("utf-8", errors="backslashreplace"))  # an ablation takes it for the end of a run
    return target


def draw_curves(run: Path, target: Path) -> None:
    """Every metric that matters against the training step; raw values faint, a moving average over them."""
    import numpy as np
    from matplotlib.figure import Figure

    records = list(read_records(run / "metrics.jsonl"))
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(2, 4).flat, CURVES, strict=True):
        for name in names:
            points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
            if not points:
                continue
            steps, values = np.array(points).T
            window = max(1, len(values) // 12)
            padded = np.concatenate([np.full(window - 1, values[0]), values])
            smooth = np.convolve(padded, np.full(window, 1 / window), "valid")
            (line,) = axis.plot(steps, smooth, label=name)
            axis.plot(steps, values, color=line.get_color(), alpha=0.25)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        if len(names) > 1 and axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(target, dpi=110)


def _thumbnail(run: Path, record: dict[str, Any]) -> str:
    """A run's own thumbnail as a data URL; nothing outside the run's image folder is ever read."""
    path = (run / str(record.get("thumbnail", ""))).resolve()
    inside = path.is_relative_to((run / "images").resolve())
    return _data_url(path) if inside and path.is_file() else ""


def _data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
