"""The results of an ablation: the numbers in `ablation.json`, and these as tables, CSV and a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ireasoner.studies.ablation_numbers import COSTS, ELSEWHERE

# By measure: how it is headed, what it is multiplied by, its decimals.
COLUMNS = {
    "greedy": ("greedy", 100, 1),
    "mean@1": ("mean@1", 100, 1),
    "maj@5": ("maj@5", 100, 1),
    "pass@5": ("pass@5", 100, 1),
    "strict_greedy": ("strict greedy", 100, 1),
    "strict_mean@1": ("strict mean@1", 100, 1),
    "step_truth": ("step truth", 100, 1),
    "checkable_steps": ("checked steps", 1, 2),
    "well_formed": ("well-formed", 100, 1),
    "mean@1_of_readable": ("mean@1 of these", 100, 1),
    "tokens": ("tokens", 1, 1),
    "distinct_questions": ("distinct questions", 100, 1),
    "distinct_solutions": ("distinct solutions", 100, 1),
    "effective_answers": ("answers of 5", 1, 2),
    "repeated_texts": ("repeated texts", 100, 1),
    "blank_survival": ("same when gray", 100, 1),
    "other_style": ("other style", 100, 1),
    "described": ("described", 100, 1),
    "seconds": ("seconds", 1, 2),
    "sampled_tokens": ("tokens sampled", 1, 0),
    "trained_tokens": ("tokens trained on", 1, 0),
}
SCORES = (
    *("greedy", "mean@1", "maj@5", "pass@5", "strict_greedy", "strict_mean@1", "step_truth", "checkable_steps"),
    *("well_formed", "mean@1_of_readable", "tokens"),
)
VARIETY = ("distinct_questions", "distinct_solutions", "effective_answers", "repeated_texts", "blank_survival")
DIFFERENCES = ("greedy", "mean@1", "maj@5", "pass@5", "step_truth")
GAINS = ("mean@1", "step_truth", "other_style")  # of the figure; arms are sorted by the first
COOLED = "base, cooled"
CONTROLS = ("random-reward", "oracle", COOLED)
Rows = list[list[str]]


def score_rows(result: Mapping[str, Any], names: Sequence[str] = SCORES) -> Rows:
    """Every arm's measures, mean ± half of the 95 % interval; heads first."""
    shown = [name for name in names if name in result["measures"]]
    rows = [["", *(COLUMNS[name][0] for name in shown)]]
    return rows + [[arm, *(_score(found, name) for name in shown)] for arm, found in result["arms"].items()]


def _score(found: Mapping[str, Any], name: str) -> str:
    """One cell of an arm's row of scores."""
    _, scale, decimals = COLUMNS[name]
    if name not in found["mean"]:
        return "void" if name == "step_truth" and found["void"] else ""
    mean, half = found["mean"][name], found["plus_minus"][name]
    return f"{scale * mean:.{decimals}f}" + (f" ±{scale * half:.{decimals}f}" if np.isfinite(half) else "")


def difference_rows(result: Mapping[str, Any], reference: str) -> Rows:
    """Every other arm minus the reference, in percentage points with 95 % intervals; heads first."""
    rows = [["", *(COLUMNS[name][0] for name in _compared(result))]]
    for arm in _others(result, reference):
        changes = result["arms"][arm]["minus"][reference]
        rows.append([arm, *(_change(changes[name]) for name in _compared(result))])
    return rows


def _compared(result: Mapping[str, Any]) -> list[str]:
    return [name for name in DIFFERENCES if name in result["measures"]]


def _others(result: Mapping[str, Any], reference: str) -> list[str]:
    """The arms to hold against a reference: not the base, for they are held against it already.

    The cooled base is held against the base and `default` alone, of which a reader asks what they add to being sure.
    """
    left_out = {reference, "base"} if reference in ("base", "default") else {reference, "base", COOLED}
    return [arm for arm in result["arms"] if arm not in left_out]


def _change(values: Sequence[float] | None) -> str:
    return "void" if values is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in values))


def blank_rows(result: Mapping[str, Any]) -> Rows:
    """What is answered when every image is replaced by a gray one; heads first."""
    rows = [["images blanked", *DIFFERENCES[:4]]]
    return rows + [[arm, *(f"{100 * m[name]:.1f}" for name in DIFFERENCES[:4])] for arm, m in result["blank"].items()]


def forgetting_rows(result: Mapping[str, Any]) -> Rows:
    """What is left of what the base knew and training did not ask about, and by how much it changed; heads first."""
    shown = [name for name in ELSEWHERE if name in result["measures"]]
    rows = [["", *(head for name in shown for head in (COLUMNS[name][0], "minus base"))]]
    for arm, found in result["arms"].items():
        if arm != COOLED:
            minus = found["minus"].get("base", {})
            changes = {name: _change(minus[name]) if name in minus else "" for name in shown}
            rows.append([arm, *(cell for name in shown for cell in (_score(found, name), changes[name]))])
    return rows


def cost_rows(result: Mapping[str, Any]) -> Rows:
    """What a step of each arm takes, and as a multiple of what it takes the arm of `cost_reference`; heads first."""
    reference = result["cost_reference"]
    rows = [["", *(head for name in COSTS for head in (COLUMNS[name][0], f"x {reference}"))]]
    for arm, found in result["arms"].items():
        if relative := found["relative"]:
            times = {name: _times(*relative[name]) if name in relative else "" for name in COSTS}
            rows.append([arm, *(cell for name in COSTS for cell in (_score(found, name), times[name]))])
    return rows


def _times(ratio: float, half: float) -> str:
    return f"{ratio:.2f}" + (f" ±{half:.2f}" if np.isfinite(half) else "")


def legend(result: Mapping[str, Any]) -> str:
    """What the numbers are, for whoever sees the tables without their makers."""
    settings, seeds, measures = result["settings"], result["seeds"], result["measures"]
    where = settings["data"] or f"the embedded world ({settings['split']} split, style {settings['style']})"
    text = (
        f"{result['questions']} questions about {result['images']} images of {where}; model {settings['model']}; seeds "
        f"0 to {seeds - 1}. Shares in %. ± and [ ] are 95 % intervals over seeds and images. mean@1, maj@5 and pass@5: "
        "accuracy of one sampled answer, of the majority of 5, of any of 5; answers are judged by the metric that a "
        f"question names, or else {settings['match']}. Strict: only the same answer, with the same unit, as the first "
        "accepted one. Well-formed: samples that could be read, and mean@1 of these. "
    )
    if "step_truth" in measures:
        text += (
            "Step truth: share of the checkable reasoning steps of readable samples that are true of the picture; "
            "checked steps: how many of these a sample has; where they fall by over 10 % against base, step truth is "
            "void. "
        )
    text += (
        "Tokens: mean length of a sample. Distinct questions: different texts per question asked in the last quarter "
        "of the run (base asks none here: the recipe frozen-proposer shows what the untrained proposer asks). Distinct "
        "solutions: different texts among the 5 samples of a question. Answers of 5: how many different answers these "
        "amount to (e to the power of their entropy): 1 where all agree. Repeated texts: greedy solutions that are "
        "word for word the same as one about another image. Same when gray: majority answers of the run's second half "
        "that the solver also gave to a gray image. "
    )
    if "other_style" in measures:
        text += (
            "Other style: mean@1 on new pictures in a style that was not trained on, which the base knows. Described: "
            "share of what there is to see in such a picture that the greedy answer to a request for a description "
            "says; nothing like it was asked in training. "
        )
    if result["cost_reference"]:
        text += (
            "Costs are those of one training step, seconds the median; they depend on what else the machine did, and "
            "jobs that ran at the same time shared its cores. Tokens are counted: those that both roles sampled, and "
            "those of them with an advantage."
        )
    return text + result["note"]


def tables(result: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """Every table with its title, in reading order."""
    what = "percentage points, paired 95 % interval over seeds and images"
    found = [("Scores", score_rows(result))]
    found += [(f"Minus {r}: {what}", difference_rows(result, r)) for r in result["references"] if _others(result, r)]
    found.append(("Variety and collapse", score_rows(result, VARIETY)))
    if "other_style" in result["measures"]:
        found.append(("Forgetting: other pictures and another request", forgetting_rows(result)))
    if result["cost_reference"]:
        found.append(("Cost of a training step", cost_rows(result)))
    return [*found, ("Without looking: every image gray, seed 0", blank_rows(result))]


def markdown(result: Mapping[str, Any], prior: str) -> str:
    """`ablation.md`."""
    parts = ["# Ablation", legend(result)]
    for title, rows in tables(result):
        head, *body = (f"| {' | '.join(row)} |" for row in rows)
        parts += [f"## {title}", "\n".join([head, "|---" * len(rows[0]) + "|", *body])]
    return "\n\n".join([*parts, prior]) + "\n"


def csv_text(result: Mapping[str, Any]) -> str:
    """`ablation.csv`: a line for each arm and measure; shares as fractions, what is void or unknown empty."""
    target, references = io.StringIO(), result["references"]
    writer = csv.writer(target, lineterminator="\n")
    changes = [f"minus_{name.replace('-', '_')}{part}" for name in references for part in ("", "_low", "_high")]
    writer.writerow(["arm", "measure", "mean", "plus_minus", *changes, *(f"seed_{i}" for i in range(result["seeds"]))])
    for arm, found in result["arms"].items():
        for name in result["measures"]:
            minus = [found["minus"].get(reference, {}).get(name) or (None,) * 3 for reference in references]
            by_seed = found["by_seed"][name] if name in found["mean"] else [None] * result["seeds"]
            values = found["mean"].get(name), found["plus_minus"].get(name), *(x for three in minus for x in three)
            writer.writerow([arm, name, *values, *by_seed])
    return target.getvalue()


def draw_gains(result: Mapping[str, Any], target: Path) -> None:
    """`ablation.png`: what each arm gained on the base with its interval, a panel for each measure in GAINS.

    The arm that gained most in accuracy comes first. The names of controls are gray.
    """
    from matplotlib.figure import Figure

    shown = [name for name in GAINS if name in result["measures"]]
    gains = {arm: result["arms"][arm]["minus"]["base"] for arm in _others(result, "base")}
    if not gains:
        return
    arms = sorted(gains, key=lambda arm: gains[arm]["mean@1"][0], reverse=True)
    figure = Figure(figsize=(1.8 + 2.8 * len(shown), 1.1 + 0.3 * len(arms)), layout="constrained")
    figure.suptitle("minus base, percentage points with 95 % intervals (logarithmic beyond ±10)", fontsize=11)
    axes = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, shown, strict=True):
        axis.set_title(COLUMNS[name][0], fontsize=10)
        _draw_panel(axis, arms, {arm: gains[arm][name] for arm in arms if name in gains[arm]})
    for label in axes[0].get_yticklabels():
        label.set_color("0.5" if label.get_text() in CONTROLS else "black")
    figure.savefig(target, dpi=130)


def _draw_panel(axis: Any, arms: Sequence[str], changes: Mapping[str, Sequence[float] | None]) -> None:
    """One measure: a row for each arm, green where it is surely better, red where it is surely worse."""
    axis.axvline(0, color="0.6", linewidth=1)
    for arm, change in changes.items():
        row = arms.index(arm)
        if change is None:
            axis.text(0, row, " void", color="0.4", va="center", fontsize=9)
            continue
        mean, low, high = (100 * x for x in change)
        color = "tab:green" if low > 0 else "tab:red" if high < 0 else "0.35"
        axis.plot([low, high], [row, row], color=color, linewidth=2, solid_capstyle="butt")
        axis.plot(mean, row, "o", color=color, markersize=5)
    axis.set_xscale("symlog", linthresh=10, linscale=1.2)  # beside the controls, the rest would be one dot
    axis.set_xticks([-40, -10, 0, 10, 40], ["−40", "−10", "0", "10", "40"])
    axis.set_yticks(range(len(arms)), arms)
    axis.set_ylim(len(arms) - 0.4, -0.6)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=9, length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
