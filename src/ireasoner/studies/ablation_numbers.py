"""The numbers of an ablation: means over seeds with 95 % intervals, paired differences, and what the runs recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ireasoner.method.types import Episode
from ireasoner.training.recorder import read_episodes, read_records
from ireasoner.training.statistics import half_width

REFERENCES = ("base", "default", "paper", "outcome-only", "answers-only")
COST_REFERENCES = ("paper", "outcome-only")  # costs are told relative to the first of these, or else to the first arm
FALLEN = 0.9  # step truth is void where less than this share of the base's checkable steps is left
# Asked about other pictures than the rest: each of these has an image column of its own, such as `described_image`.
ELSEWHERE = ("other_style", "described")
COSTS = ("seconds", "sampled_tokens", "trained_tokens")
Columns = Mapping[str, NDArray[np.float64]]
RunNumbers = Mapping[str, float]
Values = dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]  # by measure, values [seeds, N] and images [N]


def summarize(arms: Mapping[str, Columns], runs: Mapping[str, Sequence[RunNumbers]]) -> dict[str, Any]:
    """Every arm's means over seeds, and its paired differences from the REFERENCES among them, with 95 % intervals.

    Args:
        arms: by arm and measure, values [seeds, questions], as in `ablation.npz`; one arm is called base. `image` is
            no measure, but the number of the image that a question is about, which is the same for all.
        runs: by arm, what its run under each seed recorded, as `run_numbers` gives it.
    """
    checked = all("true_steps" in columns for columns in arms.values())
    readable = all("well_formed" in c and c["well_formed"].any(1).all() for c in arms.values())  # under every seed
    all_values = {arm: _values(columns, checked, readable) for arm, columns in arms.items()}
    void = {arm: checked and steps_fell(columns, arms["base"]) for arm, columns in arms.items()}

    def change(arm: str, reference: str, name: str) -> list[float] | None:
        if name == "step_truth" and (void[arm] or void[reference]):
            return None
        (values, image), (before, _) = all_values[arm][name], all_values[reference][name]
        mean, half = float((values - before).mean()), half_width(values - before, image)
        return [mean, mean - half, mean + half]

    yardstick = next((arm for arm in (*COST_REFERENCES, *runs) if arm in runs), None)
    found = {}
    for arm in arms:
        values = all_values[arm] | _values_of_runs(runs.get(arm, ()))
        sure = [name for name in values if not (void[arm] and name == "step_truth")]
        minus = {
            other: {name: change(arm, other, name) for name in values if name in all_values[other]}
            for other in REFERENCES
            if other in arms and other != arm
        }
        found[arm] = {
            "mean": {name: float(values[name][0].mean()) for name in sure},
            "plus_minus": {name: half_width(*values[name]) for name in sure},
            "by_seed": {name: of_arm.mean(1).tolist() for name, (of_arm, _) in values.items()},
            "void": void[arm],
            "minus": minus,
            "relative": relative_costs(runs[arm], runs[yardstick]) if yardstick and arm in runs else {},
        }
    return {
        "references": [reference for reference in REFERENCES if reference in arms],
        "cost_reference": yardstick,
        "measures": list(dict.fromkeys(name for arm in found.values() for name in arm["by_seed"])),
        "arms": found,
    }


def _values(columns: Columns, checked: bool, readable: bool) -> Values:
    """The measures of an arm, those that follow from others as well, each with the images that its questions are about.

    Args:
        checked: whether the reasoning steps of all arms were checked.
        readable: whether all arms wrote something that could be read.
    """
    images = {name: columns[f"{name}_image"] for name in ELSEWHERE if name in columns}
    hidden = {"image", "true_steps", *(f"{name}_image" for name in ELSEWHERE)}
    found = {name: values for name, values in columns.items() if name not in hidden}
    if "answer_entropy" in columns:
        found["effective_answers"] = np.exp(columns["answer_entropy"])
    if checked:
        found["step_truth"] = _share(columns["true_steps"], columns["checkable_steps"])
    else:
        found.pop("checkable_steps", None)
    if readable:
        found["mean@1_of_readable"] = _share(columns["mean@1"], columns["well_formed"])
    return {name: (of_arm, images.get(name, columns["image"])[0].astype(np.int64)) for name, of_arm in found.items()}


def _values_of_runs(runs: Sequence[RunNumbers]) -> Values:
    """What runs recorded: one number for each of those that have it, as if all were about one image."""
    names = dict.fromkeys(name for run in runs for name in run)
    values = {name: np.array([[run[name]] for run in runs if name in run]) for name in names}
    return {name: (of_runs, np.zeros(1, dtype=np.int64)) for name, of_runs in values.items()}


def run_numbers(run: Path) -> RunNumbers:
    """What a run recorded about itself; numbers that it does not have are left out.

    - `distinct_questions`: see there.
    - `blank_survival`: the share of majority answers that the solver also gave to a gray image instead of the true one;
      the mean of the checks in the second half of the run, each of a few questions. A run that answers without looking
      has 1.
    - `seconds`: the median time of a step, which evaluation and loading are no part of.
    - `sampled_tokens`: what the proposer and the solver wrote in a step, in tokens.
    - `trained_tokens`: how many of these had an advantage: on them, the update runs the model forward and back.
    """
    steps, episodes = list(read_records(run / "metrics.jsonl")), list(read_episodes(run))
    if not steps:
        return {}
    written = [text for e in episodes for text in (*e.trajectories, e.proposal) if text is not None]
    survived = [step.get("watch/blank_survival") for step in steps if step["step"] > steps[-1]["step"] / 2]
    checks = [share for share in survived if share is not None]
    distinct = distinct_questions(episodes)
    return {
        **({} if distinct is None else {"distinct_questions": distinct}),
        **({"blank_survival": fmean(checks)} if checks else {}),
        "seconds": median(step["time/step_seconds"] for step in steps),
        "sampled_tokens": sum(text.num_tokens for text in written) / len(steps),
        "trained_tokens": sum(text.num_tokens for text in written if text.advantage is not None) / len(steps),
    }


def distinct_questions(episodes: Sequence[Episode]) -> float | None:
    """Different readable question texts for each question that was proposed in the last quarter of a run."""
    asked = [(episode.step, episode.question) for episode in episodes if episode.proposal]
    late = [question for step, question in asked if step > 0.75 * asked[-1][0]]
    texts = {" ".join(question.text.lower().split()) for question in late if question.well_formed}
    return len(texts) / len(late) if late else None


def relative_costs(runs: Sequence[RunNumbers], others: Sequence[RunNumbers]) -> dict[str, tuple[float, float]]:
    """What runs cost as a multiple of what others cost, by the names in COSTS: mean over seeds, half of its interval.

    The ratio is taken seed by seed, because a seed draws the same images for both.
    """
    found = {}
    for name in COSTS:
        ratios = [a[name] / b[name] for a, b in zip(runs, others, strict=True) if name in a and b.get(name)]
        if ratios:
            ratios_S1 = np.array(ratios)[:, None]
            found[name] = fmean(ratios), half_width(ratios_S1, np.zeros(1, dtype=np.int64))
    return found


def repeated_texts(texts: Sequence[str], images: Sequence[int]) -> list[float]:
    """For each text, 1 if the same one was written about another image as well, and 0 otherwise.

    Case and spacing make no difference. A model that writes the same whatever it is shown has ones alone.
    """
    plain = [" ".join(text.lower().split()) for text in texts]
    about: dict[str, set[int]] = {}
    for text, image in zip(plain, images, strict=True):
        about.setdefault(text, set()).add(image)
    return [float(len(about[text]) > 1) for text in plain]


def steps_fell(columns: Columns, base: Columns) -> bool:
    """Whether an arm says so much less that can be checked that the true share of it means nothing."""
    kept = columns["checkable_steps"].mean()
    return bool(kept < FALLEN * base["checkable_steps"].mean() or kept == 0)


def _share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of one column over that of another one, as a mean [seeds, questions]; nan where the latter is 0.

    Such a share is no mean over questions, but has the same intervals as the mean of its linearization, which adds to
    the share what each question contributes to it (Taylor's series, as in surveys).
    """
    whole_S1 = whole.mean(1, keepdims=True)
    whole_S1[whole_S1 == 0] = np.nan
    share_S1 = part.mean(1, keepdims=True) / whole_S1
    return share_S1 + (part - share_S1 * whole) / whole_S1
