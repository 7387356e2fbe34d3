"""The results of an ablation: the numbers in `ablation.json`, and these as tables, CSV and a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ireasoner.training.recorder import read_episodes
from ireasoner.training.statistics import half_width

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
}
DIFFERENCES = ("greedy", "mean@1", "maj@5", "pass@5", "step_truth")
REFERENCES = ("base", "paper", "outcome-only", "answers-only")
COOLED = "base, cooled"
FALLEN = 0.9  # step truth is void where less than this share of the base's checkable steps is left
Rows = list[list[str]]
Columns = Mapping[str, NDArray[np.float64]]


def summarize(arms: Mapping[str, Columns], distinct: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """Every arm's means over seeds, and its paired differences from the REFERENCES among them, with 95 % intervals.

    Args:
        arms: by arm and measure, values [seeds, questions], as in `ablation.npz`; one arm is called base. `image` is
            no measure, but the number of the image that a question is about, which is the same for all.
        distinct: by arm, the share of distinct questions of each seed.
    """
    checked = all("true_steps" in columns for columns in arms.values())
    hidden = {"image", "true_steps"} if checked else {"image", "true_steps", "checkable_steps"}
    readable = all("well_formed" in c and c["well_formed"].any(1).all() for c in arms.values())  # under every seed
    shown = [name for name in arms["base"] if name not in hidden]
    shown += ["step_truth"] * checked + ["mean@1_of_readable"] * readable
    image = arms["base"]["image"][0].astype(np.int64)
    all_values = {arm: _with_shares(columns) for arm, columns in arms.items()}
    void = {arm: checked and steps_fell(columns, arms["base"]) for arm, columns in arms.items()}

    def change(arm: str, reference: str, name: str) -> list[float] | None:
        if name == "step_truth" and (void[arm] or void[reference]):
            return None
        difference = all_values[arm][name] - all_values[reference][name]
        mean, half = float(difference.mean()), half_width(difference, image)
        return [mean, mean - half, mean + half]

    found = {}
    for arm in arms:
        values = {name: (all_values[arm][name], image) for name in shown}
        if asked := [share for share in distinct.get(arm, ()) if share is not None]:
            values["distinct_questions"] = np.array(asked)[:, None], np.zeros(1, dtype=np.int64)  # one for each seed
        sure = [name for name in values if not (void[arm] and name == "step_truth")]
        found[arm] = {
            "mean": {name: float(values[name][0].mean()) for name in sure},
            "plus_minus": {name: half_width(*values[name]) for name in sure},
            "by_seed": {name: of_arm.mean(1).tolist() for name, (of_arm, _) in values.items()},
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


def _with_shares(columns: Columns) -> Columns:
    """The columns with `mean@1_of_readable`, the share of all readable samples that are right, and with `step_truth`,
    the share of all checkable steps that are true."""
    found = dict(columns)
    if "well_formed" in columns:
        found["mean@1_of_readable"] = _share(columns["mean@1"], columns["well_formed"])
    if "true_steps" in columns:
        found["step_truth"] = _share(columns["true_steps"], columns["checkable_steps"])
    return found


def _share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of one column over that of another one, as a mean [seeds, questions]; nan where the latter is 0.

    Such a share is no mean over questions, but has the same intervals as the mean of its linearization, which adds to
    the share what each question contributes to it (Taylor's series, as in surveys).
    """
    whole_S1 = whole.mean(1, keepdims=True)
    whole_S1[whole_S1 == 0] = np.nan
    share_S1 = part.mean(1, keepdims=True) / whole_S1
    return share_S1 + (part - share_S1 * whole) / whole_S1


def score_rows(result: Mapping[str, Any]) -> Rows:
    """Every arm's measures, mean ± half of the 95 % interval; heads first."""
    shown = [name for name in COLUMNS if name in result["measures"]]
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
    """The arms to hold against a reference: not the base, for they are held against it already; cooled to it alone."""
    return [arm for arm in result["arms"] if arm not in (reference, "base") and (reference == "base" or arm != COOLED)]


def _change(values: Sequence[float] | None) -> str:
    return "void" if values is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in values))


def blank_rows(result: Mapping[str, Any]) -> Rows:
    """What is answered when every image is replaced by a gray one; heads first."""
    rows = [["images blanked", *DIFFERENCES[:4]]]
    return rows + [[arm, *(f"{100 * m[name]:.1f}" for name in DIFFERENCES[:4])] for arm, m in result["blank"].items()]


def legend(result: Mapping[str, Any]) -> str:
    """What the numbers are, for whoever sees the tables without their makers."""
    settings, seeds = result["settings"], result["seeds"]
    where = settings["data"] or f"the embedded world ({settings['split']} split, style {settings['style']})"
    text = (
        f"{result['questions']} questions about {result['images']} images of {where}; model {settings['model']}; seeds "
        f"0 to {seeds - 1}. Shares in %. ± and [ ] are 95 % intervals over seeds and images. mean@1, maj@5 and pass@5: "
        "accuracy of one sampled answer, of the majority of 5, of any of 5; answers are judged by the metric that a "
        f"question names, or else {settings['match']}. Strict: only the same answer, with the same unit, as the first "
        "accepted one. Well-formed: samples that could be read, and mean@1 of these. "
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
    what = "percentage points, paired 95 % interval over seeds and images"
    minus = [(f"Minus {r}: {what}", difference_rows(result, r)) for r in result["references"] if _others(result, r)]
    blank = ("Without looking: every image gray, seed 0", blank_rows(result))
    return [("Scores", score_rows(result)), *minus, blank]


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

    shown, blocks = _compared(result), {r: arms for r in result["references"] if (arms := _others(result, r))}
    if not blocks:
        return
    heights = [len(arms) + 2.2 for arms in blocks.values()]
    figure = Figure(figsize=(1.6 + 2.1 * len(shown), 0.34 * sum(heights)), layout="constrained")
    parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (reference, arms) in zip(parts, blocks.items(), strict=True):
        part.suptitle(f"minus {reference}, percentage points with 95 % intervals (logarithmic beyond ±10)", fontsize=11)
        axes = part.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
        for axis, name in zip(axes, shown, strict=True):
            axis.set_title(COLUMNS[name][0], fontsize=10)
            _draw_panel(axis, {arm: result["arms"][arm]["minus"][reference][name] for arm in arms})
    figure.savefig(target, dpi=130)


def _draw_panel(axis: Any, changes: Mapping[str, Sequence[float] | None]) -> None:
    """One measure: a row for each arm, green where it is surely better, red where it is surely worse."""
    axis.axvline(0, color="0.6", linewidth=1)
    for row, change in enumerate(changes.values()):
        if change is None:
            axis.text(0, row, " void", color="0.4", va="center", fontsize=9)
            continue
        mean, low, high = (100 * x for x in change)
        color = "tab:green" if low > 0 else "tab:red" if high < 0 else "0.35"
        axis.plot([low, high], [row, row], color=color, linewidth=2, solid_capstyle="butt")
        axis.plot(mean, row, "o", color=color, markersize=5)
    axis.set_xscale("symlog", linthresh=10, linscale=1.2)  # beside the controls, the rest would be one dot
    axis.set_xticks([-40, -5, 0, 5, 40], ["−40", "−5", "0", "5", "40"])
    axis.set_yticks(range(len(changes)), list(changes))
    axis.set_ylim(len(changes) - 0.4, -0.6)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=9, length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
