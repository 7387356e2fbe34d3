"""What the arms of an ablation come to: the numbers of `ablation.json`, and these as tables, spreadsheet and figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ireasoner.training.recorder import read_episodes
from ireasoner.training.statistics import plus_minus, resampled_means

# By measure: how it is headed, what it is multiplied by, its decimals.
COLUMNS = {
    "greedy": ("greedy", 100, 1),
    "mean@1": ("mean@1", 100, 1),
    "maj@5": ("maj@5", 100, 1),
    "pass@5": ("pass@5", 100, 1),
    "step_truth": ("step truth", 100, 1),
    "checkable_steps": ("checked steps", 1, 2),
    "well_formed": ("well-formed", 100, 1),
    "tokens": ("tokens", 1, 1),
    "distinct_questions": ("distinct questions", 100, 1),
}
DIFFERENCES = ("greedy", "mean@1", "maj@5", "pass@5", "step_truth")
REFERENCES = ("base", "paper", "outcome-only", "answers-only")
COOLED = "base, cooled"
FALLEN = 0.9  # step truth is void where less than this share of the base's checkable steps is left
Rows = list[list[str]]
Columns = Mapping[str, NDArray[np.float64]]


def summarize(arms: Mapping[str, Columns], distinct: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """Every arm's means over seeds, and its paired differences from the REFERENCES among them.

    Args:
        arms: by arm and measure, values [seeds, questions]; one arm is called base.
        distinct: by arm, the share of distinct questions of each seed.
    """
    checked = all("true_steps" in columns for columns in arms.values())
    shown = [
        name for name in next(iter(arms.values())) if name != "true_steps" and (checked or name != "checkable_steps")
    ]
    shown += ["step_truth"] if checked else []
    by_seed = {arm: _with_truth({name: v.mean(1) for name, v in columns.items()}) for arm, columns in arms.items()}
    draws = {
        arm: _with_truth(dict(zip(columns, resampled_means(np.stack(list(columns.values()))).T, strict=True)))
        for arm, columns in arms.items()
    }
    void = {arm: checked and steps_fell(columns, arms["base"]) for arm, columns in arms.items()}

    def change(arm: str, reference: str, name: str) -> list[float] | None:
        if name == "step_truth" and (void[arm] or void[reference]):
            return None
        low, high = np.nanquantile(draws[arm][name] - draws[reference][name], [0.025, 0.975])
        return [float(by_seed[arm][name].mean() - by_seed[reference][name].mean()), float(low), float(high)]

    found = {}
    for arm in arms:
        values = {name: by_seed[arm][name].tolist() for name in shown}
        if asked := [share for share in distinct.get(arm, ()) if share is not None]:
            values["distinct_questions"] = asked
        sure = [name for name in values if not (void[arm] and name == "step_truth")]
        found[arm] = {
            "mean": {name: float(np.mean(values[name])) for name in sure},
            "plus_minus": {name: plus_minus(values[name]) for name in sure},
            "by_seed": values,
            "void": void[arm],
            "minus": {r: {name: change(arm, r, name) for name in shown} for r in REFERENCES if r in arms and r != arm},
        }
    references = [reference for reference in REFERENCES if reference in arms]
    return {"references": references, "measures": [*shown, "distinct_questions"], "arms": found}


def distinct_questions(run: Path) -> float | None:
    """Different readable question texts for each question that was proposed in the last quarter of a run."""
    asked = [(episode.step, episode.question) for episode in read_episodes(run) if episode.proposal]
    late = [question for step, question in asked if step > 0.75 * asked[-1][0]]
    texts = {" ".join(question.text.lower().split()) for question in late if question.well_formed}
    return len(texts) / len(late) if late else None


def steps_fell(columns: Columns, base: Columns) -> bool:
    """Whether an arm says so much less that can be checked that the true share of it means nothing."""
    kept = columns["checkable_steps"].mean()
    return bool(kept < FALLEN * base["checkable_steps"].mean() or kept == 0)


def _with_truth(means: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """The share of checkable steps that are true beside the means it is made of."""
    if "true_steps" not in means:
        return means
    checkable = np.where(means["checkable_steps"] > 0, means["checkable_steps"], np.nan)
    return {**means, "step_truth": means["true_steps"] / checkable}


def score_rows(result: Mapping[str, Any]) -> Rows:
    """Every arm's measures, mean ± 95 % interval over seeds; heads first."""
    shown = [name for name in COLUMNS if name in result["measures"]]
    rows = [["", *(COLUMNS[name][0] for name in shown)]]
    for arm, found in result["arms"].items():
        cells = []
        for name in shown:
            _, scale, decimals = COLUMNS[name]
            mean, half = found["mean"].get(name), found["plus_minus"].get(name)
            if mean is None:
                cells.append("void" if name == "step_truth" and found["void"] else "")
            else:
                cells.append(
                    f"{scale * mean:.{decimals}f}" + ("" if half is None else f" ±{scale * half:.{decimals}f}")
                )
        rows.append([arm, *cells])
    return rows


def difference_rows(result: Mapping[str, Any], reference: str) -> Rows:
    """Every other arm minus the reference, in percentage points with 95 % intervals; heads first."""
    rows = [["", *(COLUMNS[name][0] for name in _compared(result))]]
    for arm in _others(result, reference):
        changes = [result["arms"][arm]["minus"][reference][name] for name in _compared(result)]
        rows.append([arm, *("void" if change is None else _change(change) for change in changes)])
    return rows


def _compared(result: Mapping[str, Any]) -> list[str]:
    return [name for name in DIFFERENCES if name in result["measures"]]


def _others(result: Mapping[str, Any], reference: str) -> list[str]:
    """The arms to hold against a reference: not the base, for they are held against it already; cooled to it alone."""
    return [arm for arm in result["arms"] if arm not in (reference, "base") and (reference == "base" or arm != COOLED)]


def _change(values: Sequence[float]) -> str:
    mean, low, high = (100 * x for x in values)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def blank_rows(result: Mapping[str, Any]) -> Rows:
    """What is answered when every image is replaced by a gray one; heads first."""
    rows = [["images blanked", *(COLUMNS[name][0] for name in DIFFERENCES[:4])]]
    for arm, means in result["blank"].items():
        rows.append([arm, *(f"{100 * means[name]:.1f}" for name in DIFFERENCES[:4])])
    return rows


def legend(result: Mapping[str, Any]) -> str:
    """What the numbers are, for whoever sees the tables without their makers."""
    settings, seeds = result["settings"], result["seeds"]
    where = settings["data"] or f"of the embedded world ({settings['split']} split, style {settings['style']})"
    text = (
        f"{result['questions']} questions {where}; model {settings['model']}; seeds 0 to {seeds - 1}. Shares in %. "
        "± is the 95 % interval over seeds (Student's t). mean@1, maj@5 and pass@5: accuracy of one sampled answer, of "
        "the majority of 5, of any of 5. "
    )
    if "step_truth" in result["measures"]:
        text += (
            "Step truth: share of the checkable reasoning steps of readable samples that are true of the picture; "
            "checked steps: how many of these a sample has; where they fall by over 10 % against base, step truth is "
            "void. "
        )
    return text + (
        "Tokens: mean length of a sample. Distinct questions: different texts per question asked in the last quarter "
        "of the run (base asks none here: the recipe frozen-proposer shows what the untrained proposer asks)."
        + result["note"]
    )


def tables(result: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """Every table with its title, in reading order."""
    found = [("Scores", score_rows(result))]
    for reference in result["references"]:
        if _others(result, reference):
            title = f"Minus {reference}: percentage points, paired 95 % interval over seeds and questions"
            found.append((title, difference_rows(result, reference)))
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


def draw_differences(result: Mapping[str, Any], target: Path) -> None:
    """`ablation.png`: each arm's difference from each reference with its interval, a panel for each measure."""
    from matplotlib.figure import Figure

    shown = _compared(result)
    blocks = {r: arms for r in result["references"] if (arms := _others(result, r))}
    if not blocks:
        return
    heights = [len(arms) + 2.2 for arms in blocks.values()]
    figure = Figure(figsize=(1.6 + 2.1 * len(shown), 0.34 * sum(heights)), layout="constrained")
    parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (reference, arms) in zip(parts, blocks.items(), strict=True):
        part.suptitle(f"minus {reference}, percentage points with 95 % intervals (logarithmic beyond ±10)", fontsize=11)
        axes = part.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
        for axis, name in zip(axes, shown, strict=True):
            axis.axvline(0, color="0.6", linewidth=1)
            for row, arm in enumerate(arms):
                change = result["arms"][arm]["minus"][reference][name]
                if change is None:
                    axis.text(0, row, " void", color="0.4", va="center", fontsize=9)
                    continue
                mean, low, high = (100 * x for x in change)
                color = "tab:green" if low > 0 else "tab:red" if high < 0 else "0.35"
                axis.plot([low, high], [row, row], color=color, linewidth=2, solid_capstyle="butt")
                axis.plot(mean, row, "o", color=color, markersize=5)
            axis.set_xscale("symlog", linthresh=10, linscale=1.2)  # beside the controls, the rest would be one dot
            axis.set_xticks([-40, -5, 0, 5, 40], ["−40", "−5", "0", "5", "40"])
            axis.set_yticks(range(len(arms)), arms)
            axis.set_ylim(len(arms) - 0.4, -0.6)
            axis.grid(axis="x", color="0.9")
            axis.set_axisbelow(True)
            axis.tick_params(labelsize=9, length=0)
            axis.set_title(COLUMNS[name][0], fontsize=10)
            for side in ("top", "right", "left"):
                axis.spines[side].set_visible(False)
    figure.savefig(target, dpi=130)
