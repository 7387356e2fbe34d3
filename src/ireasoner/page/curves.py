"""Metrics as charts, of one run or of several laid over each other: all of a run in one PNG, or each as an SVG."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ireasoner.method.recipe import REWARD, paid_rewards
from ireasoner.page.run import RecordedRun
from ireasoner.training.recorder import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THROUGHPUT = "trajectories a second"
# After Okabe and Ito, whose colours readers with any kind of colour vision can tell apart: on white and on black. Their
# red stands for trouble alone. The styles tell lines apart a second time. style.css has the same.
COLORS = (
    ("#0072b2", "#56b4e9"),
    ("#008f68", "#2fc79a"),
    ("#b8609a", "#e29ac4"),
    ("#a87400", "#e6b422"),
    ("#1c1d21", "#e7e8ea"),
)
LINES = tuple((k % 5, style) for k, style in enumerate(("-", "-", "--", "--", ":", ":", ":", "-", "-", "--")))
MOST_PARTS = 4  # curves of a reward: its total and its first parts
MOST_POINTS = 300  # drawn of a curve: a chart is about as many pixels wide
FOREGROUND = "#010203"  # stands for the colour of the page's text in an SVG
PLACEHOLDERS = tuple(f"#0a0b0{k}" for k in range(len(COLORS)))  # stand for the colours of lines
AXES = (0.16, 0.13, 0.80, 0.83)  # left, bottom, width and height of a chart's axes, as shares of the chart


@dataclass(frozen=True)
class Panel:
    """What a chart shows: its title, what to make of it, the metric of each curve by its label.

    `share` says that the values lie between 0 and 1.
    """

    title: str
    hint: str
    metrics: dict[str, str]
    share: bool = False


@dataclass(frozen=True)
class Curve:
    """A metric's values where it was measured; `line` says which of `LINES` draws it."""

    line: int
    steps: NDArray[np.float64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Chart:
    """Curves by their labels, which share axes over the training steps `span`; a dotted line marks the step `back`."""

    panel: Panel
    curves: dict[str, Curve]
    span: tuple[int, int]
    back: int | None = None


def _roles(metric: str) -> dict[str, str]:
    return {role: f"{metric}/{role}" for role in ("solver", "proposer")}


DECIDING = 4  # the first panels, which say whether a run goes well; the page folds the others
PANELS = (
    Panel("Solver's reward", "rises while it learns", {"total": f"{REWARD}total"}),
    Panel(
        "Majority fraction",
        "should rise and stay below 1",
        {"solver": "answers/majority_fraction", "right, by labels": "labels/majority_right"},
        share=True,
    ),
    Panel("Well-formed", "texts that can be read; should stay near 1", _roles("well_formed"), share=True),
    Panel(
        "Distinct questions",
        "low: the same questions come again",
        {"in a step": "questions/distinct", "in the last window": "watch/distinct_questions"},
        share=True,
    ),
    Panel("Proposer's reward", "highest at middle difficulty: may fall", {"proposer": "reward/proposer/total"}),
    Panel("Answer entropy", "nats; falls as answers agree, 0: unanimous", {"solver": "answers/answer_entropy"}),
    Panel("KL to the reference", "nats a token; how far it has moved", _roles("kl")),
    Panel("KL coefficient β", "weight of that KL in the loss", _roles("kl_coef")),
    Panel("Completion length", "tokens", _roles("length")),
    Panel("Token entropy", "nats; randomness of sampling", _roles("token_entropy")),
    Panel(
        "Blank image",
        "majority answers that survive it; should stay low",
        {"solver": "watch/blank_survival"},
        share=True,
    ),
    Panel("Throughput", "trajectories a second", {"both roles": THROUGHPUT}),
)


def panels(run: RecordedRun) -> list[Panel]:
    """The panels of a run: the first one has a curve for the reward and for its first parts, before their weights.

    Which parts there are depends on the reward, which may be the user's own.
    """
    first, *others = PANELS
    names = [name for name in paid_rewards(run.measured, run.config.recipe) if name not in first.metrics.values()]
    parts = {_label(name): name for name in names[: MOST_PARTS - 1]}
    return [replace(first, metrics=first.metrics | parts), *others]


def _label(metric: str) -> str:
    """The name of a reward's part, which may be any text, as a short label."""
    return "".join(filter(str.isprintable, metric.removeprefix(REWARD).replace("_", " ")))[:40]


def chart(run: RecordedRun, panel: Panel) -> Chart:
    """A panel of a run as a chart, without the curves that were not measured."""
    span = _span([run])
    back = run.summary.get("best_step") if run.state == "ended itself" else None
    back = back if type(back) is int and span[0] <= back <= span[1] else None  # the step that the run went back to
    lines = {label: 1 if label == "proposer" else i for i, label in enumerate(panel.metrics)}  # one colour a role
    curves = {label: Curve(lines[label], *series(run, metric)) for label, metric in panel.metrics.items()}
    return Chart(panel, _measured(curves), span, back)


def panels_together(runs: Mapping[str, RecordedRun]) -> list[Panel]:
    """A panel of one metric for each that some of these runs measured, apart from throughput; first, what decides."""
    wanted = []
    for alike in zip(*(panels(run) for run in runs.values()), strict=True):
        metrics = {label: metric for panel in alike for label, metric in panel.metrics.items()}
        for label, metric in metrics.items():
            if any(metric in run.measured for run in runs.values()):
                title = f"{alike[0].title}, {label}" if len(metrics) > 1 else alike[0].title
                wanted.append(replace(alike[0], title=title, metrics={label: metric}))
    first = {next(iter(panel.metrics.values())) for panel in PANELS[:DECIDING]}
    return sorted(wanted, key=lambda panel: first.isdisjoint(panel.metrics.values()))  # stable: the rest stays in order


def overlay(runs: Mapping[str, RecordedRun], panel: Panel) -> Chart:
    """A panel of one metric as a chart with a curve for each run that measured it.

    Args:
        runs: at most as many as there are `LINES`, by the names that the legend gives them.
        panel: one of `panels_together`.
    """
    (metric,) = panel.metrics.values()
    curves = {name: Curve(i, *series(run, metric)) for i, (name, run) in enumerate(runs.items())}
    return Chart(panel, _measured(curves), _span(runs.values()))


def _measured(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    return {label: curve for label, curve in curves.items() if len(curve.values)}


def _span(runs: Iterable[RecordedRun]) -> tuple[int, int]:
    """The first and the last step of runs, which differ: axes have some width."""
    ends = [run.metrics[end]["step"] for run in runs if run.metrics for end in (0, -1)] or [0]
    return min(ends), max(max(ends), min(ends) + 1)


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


def limits(low: float, high: float, *, share: bool) -> tuple[float, float]:
    """The ends of a vertical axis for values from `low` to `high`.

    It spans at least half of the largest value, so that a level that hardly moves is a flat line instead of a drama.
    It shows nothing below 0 where no value is, and little above 1 where no value can be.
    """
    span = 1.1 * max(high - low, 0.5 * max(abs(low), abs(high))) or 1.0
    bottom = (low + high - span) / 2
    bottom = max(0.0, bottom) if low >= 0 else bottom
    top = bottom + span
    return (1.04 - span, 1.04) if share and top > 1.04 >= span and high <= 1 else (bottom, top)


def readings(charts: Sequence[Chart]) -> dict[str, Any]:
    """Smoothed values for the page to read out: `steps`, and for each of some charts as many values by label.

    Where a metric was not measured at a step, its last value is repeated; None before its first.
    """
    measured = [curve.steps for chart in charts for curve in chart.curves.values()]
    steps = np.unique(np.concatenate(measured)) if measured else np.zeros(0)
    if len(steps) > MOST_POINTS:
        steps = steps[np.linspace(0, len(steps) - 1, MOST_POINTS).astype(int)]
    found: list[dict[str, list[float | None]]] = []
    for chart in charts:
        found.append({})
        for label, curve in chart.curves.items():
            last, smoothed = np.searchsorted(curve.steps, steps, side="right") - 1, smooth(curve.values)
            found[-1][label] = [float(f"{smoothed[i]:.4g}") if i >= 0 else None for i in last]
    return {"steps": steps.astype(int).tolist(), "panels": found, "axes": AXES, "span": charts[0].span}


def draw_curves(run: RecordedRun, target: Path) -> None:
    """Write all charts of a run as one PNG: raw values faint, moving averages over them.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8))
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.04, top=0.95, wspace=0.2, hspace=0.27)
    for axis, panel in zip(figure.subplots(3, 4).flat, panels(run), strict=True):
        shown = chart(run, panel)
        _draw(axis, shown, [on_white for on_white, _ in COLORS])
        axis.set_title(panel.title, fontsize=10)
        if shown.curves:
            axis.legend(fontsize=7)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    replace_file(target, png.getvalue())


def draw_svg(chart: Chart) -> str:
    """A chart as a transparent SVG, whose text, axes and lines take the colours that suit the reader's page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "panel"}):
        figure = Figure(figsize=(3.6, 2.1))
        axis = figure.add_axes(AXES)
        _draw(axis, chart, PLACEHOLDERS)
        axis.tick_params(labelsize=9.5, length=3, color=FOREGROUND, labelcolor=FOREGROUND)
        axis.grid(axis="y", color="#888", alpha=0.25, linewidth=0.6)
        for side, spine in axis.spines.items():
            spine.set_color(FOREGROUND)
            spine.set_visible(side in ("left", "bottom"))
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = text.getvalue().replace(FOREGROUND, "currentColor")
    for k, placeholder in enumerate(PLACEHOLDERS):
        drawn = drawn.replace(placeholder, f"var(--c{k})")
    light, dark = (";".join(f"--c{k}:{pair[side]}" for k, pair in enumerate(COLORS)) for side in (0, 1))
    style = f"svg{{color:#444;{light}}}@media(prefers-color-scheme:dark){{svg{{color:#bbb;{dark}}}}}"
    head, _, rest = drawn.partition("<defs>")
    return f"{head}<style>{style}</style><defs>{rest}"


def _draw(axis: Axes, chart: Chart, colors: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))  # no half steps
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")  # an exponent at the top would be cut off
    for label, curve in chart.curves.items():
        color, style = colors[LINES[curve.line][0]], LINES[curve.line][1]
        smoothed, name = smooth(curve.values), label.replace("$", r"\$")  # matplotlib reads $…$ as mathematics
        raw, drawn = thin(curve.values), thin(smoothed)
        axis.plot(curve.steps[raw], curve.values[raw], color=color, alpha=0.3, linewidth=0.7)
        axis.plot(curve.steps[drawn], smoothed[drawn], style, color=color, linewidth=1.6, label=name)
    axis.set_xlim(*chart.span)
    if chart.curves:
        values = np.concatenate([curve.values for curve in chart.curves.values()])
        axis.set_ylim(*limits(values.min(), values.max(), share=chart.panel.share))
    if chart.back is not None:
        axis.axvline(chart.back, color="#888", linestyle=":", linewidth=1.2)
