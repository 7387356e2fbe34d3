"""Is step agreement worth being a reward? Read from a run's episodes, without training.

With truth (the embedded world's pictures): of two trajectories with the same question and answer, does the one with the
truer steps get the higher step agreement, and what does step agreement say of truth beyond answer agreement? Without
it: how far step agreement repeats answer agreement, and what it makes of edits that change what a trajectory claims.

A measure scores the trajectories of one group. To try another, add it in `measures`, or score what `read_groups` gives
and call `statistics` and `sensitivity`. Every bootstrap resamples questions, (image, text), by the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ireasoner.method.answers import majority, vote_shares
from ireasoner.method.claims import agreement, beyond_answer
from ireasoner.method.rewards import FloatArray, step_agreement_rewards
from ireasoner.method.types import UsageError
from ireasoner.model.inputs import embed_texts
from ireasoner.playground import dataset, wording, world
from ireasoner.studies.perturbations import PERTURBATIONS
from ireasoner.training.config import Config, load_config
from ireasoner.training.recorder import read_records

RESAMPLES = 2_000
SAMPLE = 300  # groups of which one trajectory is edited
TIE = 1e-9  # scores this close are the same: rounding must not decide
NOT_FROM_TEXT = ("recorded", "exact")  # measures that cannot follow every edit of the text

Interval = tuple[float, float, float]  # a value and its 95 % interval; NaN where it is not defined


@dataclass(frozen=True)
class Group:
    """One question, (image, text), and its N trajectories; arrays [N] hold NaN where something is not known.

    Unreadable trajectories have the key None, an empty answer and no steps. `words` counts words before the answer,
    `truth` is the share of a trajectory's checkable steps that are true, `recorded` the step agreement that the run
    computed.
    """

    question: tuple[str, str]
    keys: tuple[str | None, ...]
    answers: tuple[str, ...]
    steps: tuple[tuple[str, ...], ...]
    words: FloatArray
    truth: FloatArray
    recorded: FloatArray


Measure = Callable[[Group], FloatArray]


# --- measures: [N] in [0, 1], NaN for no score -----------------------------------------------------------------------


def measures(config: Config, notes: list[str], *, truth: bool) -> dict[str, Measure]:
    """The measures of a run, by name; `notes` hears of one that had to be left out."""
    found: dict[str, Measure] = {"claims": claims, "recorded": lambda group: group.recorded}
    try:
        found = {"embedding": embedding(config), **found}
    except UsageError as error:
        notes.append(f"without the measure 'embedding': {error}")
    return {**found, "exact": exact} if truth else found


def embedding(config: Config) -> Measure:
    """The paper's: `rewards.step_agreement_rewards` with a run's constants and its model's token embeddings.

    Raises:
        ModelError: the model cannot be loaded.
    """
    from ireasoner.model.policy import Policy

    policy = Policy.from_config(config.model_copy(update={"device": "cpu"}))  # of which one table is read
    embed = lru_cache(2048)(lambda step: embed_texts(policy, [step], config.max_step_tokens)[0])
    return lambda group: step_agreement_rewards(
        group.keys,
        [np.stack([embed(step) for step in steps]) if steps else np.zeros((0, 1)) for steps in group.steps],
        density_exponent=config.density_exponent,
        position_decay=config.position_decay,
        max_reasoning_steps=max(map(len, group.steps)),  # they were cut when they were read
    )


def claims(group: Group) -> FloatArray:
    """Ours: the mean of `steps.agreement` over what goes beyond the answer; 0 where nothing does."""
    said = [beyond_answer(own, answer) for own, answer in zip(group.steps, group.answers, strict=True)]
    return np.array([s.mean() if len(s) else 0.0 for s in agreement(said)], dtype=np.float64)


def exact(group: Group) -> FloatArray:
    """An oracle: as `claims`, but two steps agree, wholly, only if the world reads the same claim in both.

    Steps that the world cannot read are left out.
    """
    said = [[claim for step in steps if (claim := _world_claim(step)) is not None] for steps in group.steps]
    found = np.full(len(said), np.nan)
    for i, mine in enumerate(said):
        others = [other for k, other in enumerate(said) if k != i and group.steps[k]]
        if mine:
            found[i] = sum(_in_common(mine, other) for other in others) / len(mine) / max(len(others), 1)
    return found


def _world_claim(step: str) -> object:
    kind, slots = wording.read(step) or ("", {})
    if kind == "value":  # some wordings do without the noun and the verb
        return kind, slots["c"], int(slots["v"])
    return (kind, frozenset(slots["l"].split(", ") if kind == "list" else slots.items())) if kind else None


def _in_common(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the longest common subsequence: how many steps find their like, in order."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = row[:]
        for j, y in enumerate(b):
            row[j + 1] = before[j] + 1 if x == y else max(before[j + 1], row[j])
    return row[-1]


# --- statistics ------------------------------------------------------------------------------------------------------


def pair_validity(groups: Sequence[Group], scores: Sequence[FloatArray]) -> tuple[float, float, float, int, int]:
    """How often the truer of two trajectories of a group with the same answer has the higher score; ties count ½.

    Args:
        groups: every pair of equal keys and unequal, known truth counts once.
        scores: one array [N] for each group; what is NaN takes part in no pair.

    Returns:
        The rate in [0, 1] and its 95 % interval (NaN without pairs), the number of pairs and of questions with pairs.
    """
    questions = _numbered(group.question for group in groups)
    sums = np.zeros((questions.max(initial=0) + 1, 2))
    for question, group, score in zip(questions, groups, scores, strict=True):
        a, b = np.triu_indices(len(score), 1)
        truer, higher = group.truth[a] - group.truth[b], score[a] - score[b]
        keys = np.array(group.keys, dtype=object)
        pairs = (keys[a] == keys[b]) & (keys[a] != None) & (truer != 0) & np.isfinite(truer + higher)  # noqa: E711
        order = np.sign(truer) * np.where(np.abs(higher) <= TIE, 0, np.sign(higher))
        sums[question] += (1 + order[pairs]).sum() / 2, pairs.sum()
    drawn, (wins, count) = _resampled(sums), sums.sum(axis=0)
    low, high = _bounds(np.divide(drawn[:, 0], drawn[:, 1], out=np.full(RESAMPLES, np.nan), where=drawn[:, 1] > 0))
    return float(wins / count) if count else np.nan, low, high, int(count), int((sums[:, 1] > 0).sum())


def partial_correlation(
    x: FloatArray, y: FloatArray, controls: Sequence[FloatArray], questions: NDArray[np.int64]
) -> Interval:
    """Pearson's correlation of what is left of x and y when a linear fit on the controls is taken off both.

    Args:
        x, y, controls: finite arrays [n]; without controls it is the plain correlation.
        questions: [n] numbers from 0.

    Returns:
        The value in [-1, 1] and its 95 % interval; NaN where nothing is left of x or y.
    """
    columns = np.stack([x, y, *controls, np.ones(len(x))])  # the constant takes off the means
    products = np.zeros((questions.max(initial=0) + 1, len(columns), len(columns)))
    np.add.at(products, questions, np.einsum("in,jn->nij", columns, columns))
    return float(_partial(products.sum(axis=0))), *_bounds(_partial(_resampled(products)))


def _partial(products: FloatArray) -> FloatArray:
    """From sums of products [..., k, k]: the correlation of the first two variables given the others."""
    own, cross, others = products[..., :2, :2], products[..., :2, 2:], products[..., 2:, 2:]
    left = own - cross @ np.linalg.pinv(others, rcond=1e-12, hermitian=True) @ np.swapaxes(cross, -1, -2)
    a, b = left[..., 0, 0], left[..., 1, 1]
    defined = (a > TIE * own[..., 0, 0]) & (b > TIE * own[..., 1, 1])
    return np.divide(left[..., 0, 1], np.sqrt(np.abs(a * b)), out=np.full(a.shape, np.nan), where=defined)


def _resampled(sums: FloatArray) -> FloatArray:
    """Sums [Q, ...] by question, added up over Q questions drawn with replacement: [RESAMPLES, ...]."""
    rng, count = np.random.default_rng(0), len(sums)
    parts = []
    for _ in range(RESAMPLES // 100):  # in parts, to hold 100 draws at a time
        drawn = rng.integers(count, size=(100, count)) + count * np.arange(100)[:, None]
        parts.append(np.bincount(drawn.ravel(), minlength=100 * count).reshape(100, count) @ sums.reshape(count, -1))
    return np.concatenate(parts).reshape(RESAMPLES, *sums.shape[1:])


def _bounds(values: FloatArray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (np.nan, np.nan)
    return float(low), float(high)


def _numbered(names: Iterable[object]) -> NDArray[np.int64]:
    """The same name, the same number, from 0."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def statistics(groups: Sequence[Group], scores: Sequence[FloatArray]) -> dict[str, dict[str, float]]:
    """What can be said of one measure but for its sensitivity; `scores` as for `pair_validity`.

    `pairs` and `majority_pairs` (of the majority answer) are `pair_validity`. The others are correlations over readable
    trajectories with an interval: `answer`, with answer agreement, the share of the group that has it too (0.99 for
    the paper's two curves over training); and, once each group's mean is taken off, `answer_within`, the same,
    `answer_given_length`, beyond the number of words, and `truth_given_answer`, with truth beyond answer agreement.
    """
    votes = [majority(group.keys).answer for group in groups]
    of_majority = [
        replace(group, truth=np.where([key == vote for key in group.keys], group.truth, np.nan))
        for group, vote in zip(groups, votes, strict=True)
    ]
    shares = [vote_shares(group.keys) for group in groups]
    answer = np.array([s.get(k or "", np.nan) for s, group in zip(shares, groups, strict=True) for k in group.keys])
    score, words, truth = map(np.concatenate, (scores, [g.words for g in groups], [g.truth for g in groups]))
    sizes = [len(group.keys) for group in groups]
    member = np.repeat(np.arange(len(groups)), sizes)
    question = np.repeat(_numbered(group.question for group in groups), sizes)

    def correlation(*columns: FloatArray, within: bool = True) -> dict[str, float]:
        known = np.isfinite(np.stack([*columns, answer])).all(axis=0)
        chosen, of = [column[known] for column in columns], member[known]
        if within:
            means = [np.bincount(of, column) / np.maximum(np.bincount(of), 1) for column in chosen]
            chosen = [column - mean[of] for column, mean in zip(chosen, means, strict=True)]
        x, y, *controls = chosen
        return dict(zip(("r", "low", "high"), partial_correlation(x, y, controls, question[known]), strict=True))

    names = ("rate", "low", "high", "pairs", "questions")
    return {
        "pairs": dict(zip(names, pair_validity(groups, scores), strict=True)),
        "majority_pairs": dict(zip(names, pair_validity(of_majority, scores), strict=True)),
        "truth_given_answer": correlation(score, truth, answer),
        "answer": correlation(score, answer, within=False),
        "answer_within": correlation(score, answer),
        "answer_given_length": correlation(score, answer, words),
    }


def sensitivity(sample: Sequence[Group], measures: Mapping[str, Measure]) -> dict[str, dict[str, Any]]:
    """What measures make of each of the `PERTURBATIONS` of one trajectory, the others of its group staying as they are.

    The trajectory is drawn from the majority answer's: outside of it the paper's measure is always 0.

    Args:
        sample: groups with at least two trajectories, one of them with steps, of the majority answer.
        measures: those that follow the text, by name.

    Returns:
        By perturbation and measure, the number `edited`, the mean `change` of the score, and the share of scores that
        `fell` by more than TIE; NaN where nothing could be edited.
    """
    changes: dict[str, dict[str, list[float]]] = {edit: {name: [] for name in measures} for edit in PERTURBATIONS}
    for number, group in enumerate(sample):
        rng = np.random.default_rng(number)
        chosen = rng.choice([i for i in majority(group.keys).members if group.steps[i]])
        elsewhere = [other for other in sample if other.question[0] != group.question[0]]
        donor = elsewhere[rng.integers(len(elsewhere))].steps if elsewhere else ()
        before = {name: measure(group)[chosen] for name, measure in measures.items()}
        for edit, perturbation in PERTURBATIONS.items():
            edited = perturbation(group.steps[chosen], rng, [step for steps in donor for step in steps])
            if edited is None:
                continue
            after = replace(group, steps=(*group.steps[:chosen], edited, *group.steps[chosen + 1 :]))
            for name, measure in measures.items():
                changes[edit][name].append(float(measure(after)[chosen] - before[name]))

    def summary(d: FloatArray) -> dict[str, float]:
        change, fell = (float(d.mean()), float((d < -TIE).mean())) if len(d) else (np.nan, np.nan)
        return {"edited": len(d), "change": change, "fell": fell}

    return {edit: {name: summary(np.array(d)) for name, d in by.items()} for edit, by in changes.items()}


# --- a run -----------------------------------------------------------------------------------------------------------


def validity(run: Path, truth: Path | None = None, steps: tuple[int, int] | None = None) -> dict[str, Any]:
    """Reward validity of a run, finished or not, ready for JSON.

    Args:
        run: the run directory, which is only read.
        truth: JSONL of `image` and `picture`; None: what `dataset.write_unlabeled` left beside the run's images, if it
            did.
        steps: first and last training step to read; None: all.

    Returns:
        Counts, `notes`, the `statistics` of each measure, and the `sensitivity` of those that follow the text.

    Raises:
        UsageError: no run, no truth where it was asked for, or no readable trajectory.
    """
    config, notes = load_config(run / "config.yaml"), []
    beside = dataset.truth_path(config.images)
    pictures = _read_truth(truth or beside) if truth or beside.exists() else {}
    scorers = measures(config, notes, truth=bool(pictures))
    scores: dict[str, list[FloatArray]] = {name: [] for name in scorers}
    groups: list[Group] = []
    sample: list[Group] = []
    rng, eligible = np.random.default_rng(0), 0
    for group in read_groups(run, config, pictures, steps):
        groups.append(replace(group, steps=()))  # the texts are not kept
        for name, measure in scorers.items():
            scores[name].append(measure(group))
        vote = majority(group.keys)
        if vote.readable >= 3 and len(vote.members) >= 2 and any(group.steps[i] for i in vote.members):
            eligible += 1
            if len(sample) < SAMPLE:
                sample.append(group)
            elif (place := rng.integers(eligible)) < SAMPLE:  # every eligible group is as likely to stay
                sample[place] = group
    readable = sum(key is not None for group in groups for key in group.keys)
    known = sum(int(np.isfinite(group.truth).sum()) for group in groups)
    if not readable:
        raise UsageError(f"{run} has no readable trajectory{' in these steps' if steps else ''}: nothing to measure")
    if not known and truth:
        raise UsageError(f"{truth} says nothing of what was written in {run}")
    if not known:
        notes.append("without truth: nothing is known of the run's images")
    return {
        "run": str(run),
        "groups": len(groups),
        "trajectories": sum(len(group.keys) for group in groups),
        "readable": readable,
        "with_truth": known,
        "notes": notes,
        "measures": {name: statistics(groups, scores[name]) for name in scorers},
        "sensitivity": sensitivity(sample, {n: m for n, m in scorers.items() if n not in NOT_FROM_TEXT}),
    }


def read_groups(
    run: Path, config: Config, pictures: Mapping[str, world.Picture], steps: tuple[int, int] | None = None
) -> Iterator[Group]:
    """The groups of a run's episodes one by one, without those of unreadable questions; arguments as above.

    Steps are those that the run compared; `pictures` is what is true, by image name.

    Raises:
        UsageError: a record that is no episode.
    """
    path = run / "episodes.jsonl"
    for record in read_records(path):
        if steps is None or steps[0] <= record["step"] <= steps[1]:
            try:
                if record["trajectories"]:
                    yield _group(record, config.max_reasoning_steps, pictures.get(record["image"]))
            except (KeyError, TypeError, AttributeError):
                raise UsageError(f"{path}: a record of step {record['step']} is no episode") from None


def _group(record: Mapping[str, Any], limit: int, picture: world.Picture | None) -> Group:
    trajectories = record["trajectories"]
    steps = [tuple(t["reasoning_steps"]) if t["well_formed"] else () for t in trajectories]
    verdicts = [[world.step_truth(picture, step) for step in own] if picture else [] for own in steps]
    checked = [[verdict for verdict in own if verdict is not None] for own in verdicts]
    return Group(
        question=(record["image"], record["question"]["text"]),
        keys=tuple(t["answer_key"] if t["well_formed"] else None for t in trajectories),
        answers=tuple(t["answer"] or "" for t in trajectories),
        steps=tuple(own[:limit] for own in steps),
        words=np.array([t["words_before_answer"] for t in trajectories], dtype=np.float64),
        truth=np.array([np.mean(own) if own else np.nan for own in checked]),
        recorded=np.array([t["reward_parts"].get("step_agreement") for t in trajectories], dtype=np.float64),
    )


def _read_truth(path: Path) -> dict[str, world.Picture]:
    try:
        return dataset.read_truth(path)
    except OSError as error:
        raise UsageError(f"cannot read the truth in {path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UsageError(f"{path} does not hold lines of image and picture, as the playground writes them") from None


# --- to read ---------------------------------------------------------------------------------------------------------

ROWS = {
    "pairs": "truer one scores higher, %",
    "majority_pairs": "  in the majority, %",
    "truth_given_answer": "r, truth beyond answers",
    "answer": "r, answer agreement",
    "answer_within": "  within groups",
    "answer_given_length": "  and beyond length",
}


def print_validity(report: Mapping[str, Any]) -> None:
    """Print what `validity` found, as two tables; rows without any number are left out."""
    from ireasoner.app.display import plain, print_table

    def cell(values: Mapping[str, float]) -> str:
        scale, digits = (100, 1) if "rate" in values else (1, 2)
        value, low, high = (scale * number for number in list(values.values())[:3])
        return "–" if np.isnan(value) else f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    def change(values: Mapping[str, float]) -> str:
        return f"{values['change']:+.3f} ({values['fell']:.0%})" if values["edited"] else "–"

    found, edits = report["measures"], report["sensitivity"]
    print(
        f"{plain(report['run'])}: {report['groups']} questions, {report['readable']} readable trajectories of "
        f"{report['trajectories']}, truth known of {report['with_truth']}"
    )
    for note in report["notes"]:
        print(plain(note, 300))
    rows = [[label, *(cell(values[row]) for values in found.values())] for row, label in ROWS.items()]
    print_table("Step agreement, with 95 % intervals", [["", *found], *(row for row in rows if set(row[1:]) != {"–"})])
    for label, name in (("pairs", "pairs"), ("in the majority", "majority_pairs")):
        pairs = found["claims"][name]
        if pairs["pairs"]:
            print(f"{label}: {pairs['pairs']} of {pairs['questions']} questions")
    rows = [[edit, str(by["claims"]["edited"]), *map(change, by.values())] for edit, by in edits.items()]
    heads = ["", "edited", *next(iter(edits.values()))]
    print_table("One trajectory edited: mean change (share that fell)", [heads, *rows])
