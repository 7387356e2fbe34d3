"""A run's metrics as panels of curves: all of them in one PNG, or each as an SVG."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ireasoner.page.run import RecordedRun
from ireasoner.training.recorder import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THROUGHPUT = "trajectories a second"
REWARD = "reward/solver/"  # begins the names of the metrics of the solver's reward and its parts
COLORS = ("#2b8cd6", "#e06c1f", "#1aa179", "#a06fd0")  # readable on white and on black; style.css has the same
MOST_POINTS = 300  # drawn of a curve: a panel is about as many pixels wide
FOREGROUND = "#010203"  # stands for the colour of the page's text in an SVG
AXES = (0.15, 0.12, 0.80, 0.84)  # left, bottom, width and height of a panel's axes, as shares of the panel


@dataclass(frozen=True)
class Panel:
    """Curves that share axes: their title, a hint at what they show, and the metric of each by its label."""

    title: str
    hint: str
    metrics: dict[str, str]


def _roles(metric: str) -> dict[str, str]:
    return {role: f"{metric}/{role}" for role in ("solver", "proposer")}


PANELS = (
    Panel("Solver's reward", "mean, and unweighted parts", {"total": f"{REWARD}total"}),
    Panel("Proposer's reward", "best at middle difficulty", {"proposer": "reward/proposer/total"}),
    Panel("Majority fraction", "of a group's answers", {"": "answers/majority_fraction"}),
    Panel("Answer entropy", "nats; 0: unanimous", {"": "answers/answer_entropy"}),
    Panel("KL to the reference", "nats a token", _roles("kl")),
    Panel("KL coefficient β", "weight of that KL", _roles("kl_coef")),
    Panel("Completion length", "tokens", _roles("length")),
    Panel("Well-formed", "share of texts that could be read", _roles("well_formed")),
    Panel(
        "Distinct questions",
        "texts per question asked",
        {"in a step": "questions/distinct", "in the watch's window": "watch/distinct_questions"},
    ),
    Panel("Token entropy", "nats; randomness of sampling", _roles("token_entropy")),
    Panel("Blank image", "share of majority answers that survive it", {"": "watch/blank_survival"}),
    Panel("Throughput", THROUGHPUT, {"": THROUGHPUT}),
)


def panels(run: RecordedRun) -> tuple[Panel, ...]:
    """The panels of a run: the first one has a curve for the reward and for as many of its parts as there are colours.

    Which parts there are depends on the reward, which may be the user's own.
    """
    first, *others = PANELS
    recorded = dict.fromkeys(name for record in run.metrics for name in record if name.startswith(REWARD))
    parts = [name for name in recorded if name not in first.metrics.values()][: len(COLORS) - 1]
    labels = {_label(name): name for name in parts}
    return (replace(first, metrics=first.metrics | labels), *others)


def _label(metric: str) -> str:
    """The name of a reward's part, which may be any text, as a short label."""
    return "".join(filter(str.isprintable, metric.removeprefix(REWARD).replace("_", " ")))[:40]


def series(run: RecordedRun, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A metric's steps and values where it was measured; throughput is computed from the episodes and the time."""
    if metric == THROUGHPUT:
        played = Counter[int]()
        for entry in run.entries:
            played[entry.step] += entry.trajectories
        took = {r["step"]: r["time/step_seconds"] for r in run.metrics if r.get("time/step_seconds", 0) > 0}
        points = [(step, played[step] / seconds) for step, seconds in took.items() if step in played]
    else:
        points = [(record["step"], record[metric]) for record in run.metrics if metric in record]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Moving average: the mean of each value and those before it, over a twelfth of the series."""
    window = max(1, len(values) // 12)
    total = np.cumsum(np.concatenate([np.zeros(1), values - values[:1]]))  # a constant stays exactly itself
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return values[:1] + (total[ends] - total[starts]) / (ends - starts)


def thin(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """Which points of a long series to draw: the lowest and the highest of each chunk, so that no spike is lost."""
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    chunks = np.array_split(np.arange(len(values)), MOST_POINTS // 2 - 1)
    extremes = [pick for c in chunks for pick in (c[values[c].argmin()], c[values[c].argmax()])]
    return np.unique([0, *extremes, len(values) - 1])


def readings(run: RecordedRun) -> dict[str, Any]:
    """Smoothed values for the page to read out: `steps`, and for each panel as many values by label.

    Where a metric was not measured at a step, its last value is repeated; None before its first.
    """
    steps = np.array([record["step"] for record in run.metrics], dtype=np.float64)
    if len(steps) > MOST_POINTS:
        steps = steps[np.linspace(0, len(steps) - 1, MOST_POINTS).astype(int)]
    found: list[dict[str, list[float | None]]] = []
    for panel in panels(run):
        found.append({})
        for label, metric in panel.metrics.items():
            at, values = series(run, metric)
            if len(values):
                last, smoothed = np.searchsorted(at, steps, side="right") - 1, smooth(values)
                found[-1][label] = [float(f"{smoothed[i]:.4g}") if i >= 0 else None for i in last]
    return {"steps": steps.astype(int).tolist(), "panels": found, "axes": AXES}


def draw_curves(run: RecordedRun, target: Path) -> None:
    """Write all panels as one PNG: raw values faint, moving averages over them.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8))
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.04, top=0.95, wspace=0.2, hspace=0.27)
    for axis, panel in zip(figure.subplots(3, 4).flat, panels(run), strict=True):
        _draw(axis, run, panel)
        axis.set_title(panel.title, fontsize=10)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    replace_file(target, png.getvalue())


def draw_panel(run: RecordedRun, number: int) -> str:
    """One panel as a transparent SVG, whose text and axes take the colour that suits the reader's page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "panel"}):
        figure = Figure(figsize=(4, 2.3))
        axis = figure.add_axes(AXES)
        _draw(axis, run, panels(run)[number])
        axis.tick_params(labelsize=9, length=3, color=FOREGROUND, labelcolor=FOREGROUND)
        axis.grid(axis="y", color="#888", alpha=0.25, linewidth=0.6)
        for side, spine in axis.spines.items():
            spine.set_color(FOREGROUND)
            spine.set_visible(side in ("left", "bottom"))
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    colors = "<style>svg{color:#444}@media(prefers-color-scheme:dark){svg{color:#bbb}}</style>"
    head, _, rest = text.getvalue().replace(FOREGROUND, "currentColor").partition("<defs>")
    return f"{head}{colors}<defs>{rest}"


def _draw(axis: Axes, run: RecordedRun, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))  # no half steps
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")  # an exponent at the top would be cut off
    for color, (label, metric) in zip(COLORS, panel.metrics.items(), strict=False):
        steps, values = series(run, metric)
        if not len(values):
            continue
        axis.plot(steps[raw := thin(values)], values[raw], color=color, alpha=0.3, linewidth=0.8)
        smoothed, name = smooth(values), label.replace("$", r"\$")  # matplotlib reads $…$ as mathematics
        axis.plot(steps[drawn := thin(smoothed)], smoothed[drawn], color=color, linewidth=1.6, label=name or None)
    if run.metrics:
        first, last = run.metrics[0]["step"], run.metrics[-1]["step"]
        axis.set_xlim(first, max(last, first + 1))
        back = run.summary.get("best_step") if run.state == "ended itself" else None
        if type(back) is int and first <= back <= last:  # the step that the run went back to
            axis.axvline(back, color="#888", linestyle=":", linewidth=1.2)
