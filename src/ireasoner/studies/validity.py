"""Is step agreement worth being a reward? Read from a run's episodes, without training.

Where the truth is known (pictures of the embedded world): of two trajectories with the same question and answer, does
the one with the truer reasoning steps have the higher step agreement, and what does step agreement say about truth
beyond answer agreement? Without truth: how far does step agreement only repeat answer agreement, and how does the
published one react to edits that change what a trajectory claims?

A measure scores the trajectories of one group. `recorded` is what the run itself paid, which may rest on likelihoods
that no text tells. To try another one, add it in `measures`, or score what `read_groups` gives and call `statistics`
and `sensitivity`. Every bootstrap resamples images, each with all questions about it, by the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ireasoner.method.answers import majority, vote_shares
from ireasoner.method.recipe import Recipe
from ireasoner.method.rewards import FloatArray
from ireasoner.method.scoring import Context, score_solutions
from ireasoner.method.types import Episode, Solution, Truth, UsageError
from ireasoner.playground import wording
from ireasoner.playground.dataset import truth_path
from ireasoner.playground.truth import read_truth
from ireasoner.studies.perturbations import PERTURBATIONS
from ireasoner.training.config import Config, load_config
from ireasoner.training.recorder import read_episodes
from ireasoner.training.statistics import numbered

RESAMPLES = 2_000
SAMPLE = 300  # groups of which one trajectory is edited
TIE = 1e-9  # scores this close are equal: rounding must not decide
NOT_FROM_TEXT = ("recorded", "exact")  # measures that cannot follow every edit of the text


@dataclass(frozen=True)
class ReadGroup:
    """One question and its N trajectories; arrays [N] hold NaN where something is not known.

    Args:
        question: the image's name and the text.
        keys: answer keys, None where a trajectory could not be read.
        solutions: what was read, cut to the reasoning steps that the run compared; none of an unreadable trajectory.
        words: words before the answer.
        truth: the share of true steps among those that can be checked.
        recorded: the step agreement that the run computed.
    """

    question: tuple[str, str]
    keys: tuple[str | None, ...]
    solutions: tuple[Solution, ...]
    words: FloatArray
    truth: FloatArray
    recorded: FloatArray

    @property
    def steps(self) -> list[tuple[str, ...]]:
        """The reasoning steps of each trajectory."""
        return [solution.reasoning_steps for solution in self.solutions]


Measure = Callable[[ReadGroup], FloatArray]  # scores [N] in [0, 1], NaN for no score
Embed = Callable[[Sequence[str]], NDArray[np.floating]]


def measures(config: Config, notes: list[str], *, truth: bool) -> dict[str, Measure]:
    """The measures of a run by name; one that has to be left out adds a sentence to `notes`."""
    found: dict[str, Measure] = {}
    try:
        found["embedding"] = step_agreement(config.recipe, embedder(config))
    except UsageError as error:
        notes.append(f"without the measure 'embedding': {error}")
    found["recorded"] = lambda group: group.recorded
    return {**found, "exact": exact} if truth else found


def step_agreement(recipe: Recipe, embed: Embed) -> Measure:
    """The published step-agreement reward alone, without other parts.

    Args:
        recipe: its constants.
        embed: as in `Context`.
    """
    alone = recipe.model_copy(update={"reward": "agreement", "step_measure": "embedding", "recurrence_window": 0})
    context = Context(step_weight=1.0, embed=embed)

    def measure(group: ReadGroup) -> FloatArray:
        scored = score_solutions(group.question[1], group.solutions, alone, context)
        return np.array([t.parts["step_agreement"].value for t in scored.trajectories])

    return measure


def embedder(config: Config) -> Embed:
    """Embeds reasoning steps by the token embeddings of a run's model.

    Raises:
        ModelError: the model cannot be loaded.
    """
    from ireasoner.model.inputs import embed_texts
    from ireasoner.model.loading import load_policy

    # Only its table of embeddings is used.
    policy = load_policy(config.model, config.backbone, revision=config.revision, device="cpu")
    row = lru_cache(2048)(lambda step: embed_texts(policy, [step], config.recipe.max_step_tokens)[0])
    return lambda steps: np.stack([row(step) for step in steps]) if steps else np.zeros((0, 1))


def exact(group: ReadGroup) -> FloatArray:
    """An oracle: agreement on claims where two steps agree, and then wholly, if the world reads the same claim in both.

    Steps that the world cannot read are left out.
    """
    said = [[claim for step in own if (claim := _world_claim(step)) is not None] for own in group.steps]
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
    """Length of the longest common subsequence: how many steps are found in the other trajectory, in order."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = row[:]
        for j, y in enumerate(b):
            row[j + 1] = before[j] + 1 if x == y else max(before[j + 1], row[j])
    return row[-1]


# --- statistics ------------------------------------------------------------------------------------------------------


def pair_validity(groups: Sequence[ReadGroup], scores: Sequence[FloatArray]) -> tuple[float, float, float, int, int]:
    """How often the truer of two trajectories of a group with the same answer has the higher score; ties count ½.

    Args:
        groups: each pair of equal keys and different, known truth counts once.
        scores: one array [N] for each group; a trajectory with NaN is in no pair.

    Returns:
        The rate in [0, 1] and its 95 % interval (NaN without pairs), the number of pairs and of questions with pairs.
    """
    images = numbered(group.question[0] for group in groups)
    sums, paired = np.zeros((images.max(initial=0) + 1, 2)), set[tuple[str, str]]()
    for image, group, score in zip(images, groups, scores, strict=True):
        a, b = np.triu_indices(len(score), 1)
        truer, higher = group.truth[a] - group.truth[b], score[a] - score[b]
        keys = np.array([object() if key is None else key for key in group.keys])  # the unreadable equal nothing
        pairs = (keys[a] == keys[b]) & (truer != 0) & np.isfinite(truer + higher)
        order = np.sign(truer) * np.where(np.abs(higher) <= TIE, 0, np.sign(higher))
        sums[image] += (1 + order[pairs]).sum() / 2, pairs.sum()
        if pairs.any():
            paired.add(group.question)
    rates = np.array([won / count if count else np.nan for won, count in [sums.sum(axis=0), *_resampled(sums)]])
    return float(rates[0]), *_bounds(rates[1:]), int(sums[:, 1].sum()), len(paired)


def partial_correlation(
    x: FloatArray, y: FloatArray, controls: Sequence[FloatArray], images: NDArray[np.int64]
) -> tuple[float, float, float]:
    """Pearson's correlation of what is left of x and y after a linear fit on the controls.

    Args:
        x, y, controls: finite arrays [n]; without controls it is the plain correlation.
        images: [n] numbers from 0.

    Returns:
        The value in [-1, 1] and its 95 % interval; NaN where nothing is left of x or y.
    """
    columns = np.stack([x, y, *controls, np.ones(len(x))])  # the constant removes the means
    products = np.zeros((images.max(initial=0) + 1, len(columns), len(columns)))
    np.add.at(products, images, np.einsum("in,jn->nij", columns, columns))
    return float(_partial(products.sum(axis=0))), *_bounds(_partial(_resampled(products)))


def _partial(products: FloatArray) -> FloatArray:
    """The correlation of the first two variables given the others, from sums of products [..., k, k].

    Residuals of a least-squares fit have products of their own, the Schur complement; so 2,000 resamples need no fit.
    """
    own, cross, others = products[..., :2, :2], products[..., :2, 2:], products[..., 2:, 2:]
    left = own - cross @ np.linalg.pinv(others, rcond=1e-12, hermitian=True) @ np.swapaxes(cross, -1, -2)
    a, b = left[..., 0, 0], left[..., 1, 1]
    defined = (a > TIE * own[..., 0, 0]) & (b > TIE * own[..., 1, 1])
    return np.divide(left[..., 0, 1], np.sqrt(np.abs(a * b)), out=np.full(a.shape, np.nan), where=defined)


def _resampled(sums: FloatArray) -> FloatArray:
    """Sums [I, ...] by image, added up over I images drawn with replacement: [RESAMPLES, ...]."""
    rng, count = np.random.default_rng(0), len(sums)
    times_drawn = (np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(RESAMPLES))
    return np.stack([np.tensordot(times, sums, 1) for times in times_drawn])


def _bounds(values: FloatArray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (np.nan, np.nan)
    return float(low), float(high)


def statistics(groups: Sequence[ReadGroup], scores: Sequence[FloatArray]) -> dict[str, dict[str, float]]:
    """What can be said about one measure, except for its sensitivity; `scores` as for `pair_validity`.

    `pairs` and `majority_pairs` (those with the majority answer) come from `pair_validity`. The others are correlations
    over readable trajectories, with intervals. `answer` is with answer agreement, the share of the group that gives the
    same answer (0.99 for the paper's two curves over training). With each group's mean removed: `answer_within` is the
    same, `answer_given_length` beyond the number of words, and `truth_given_answer` with truth beyond answer agreement.
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
    image = np.repeat(numbered(group.question[0] for group in groups), sizes)

    def correlation(*columns: FloatArray, within: bool = True) -> dict[str, float]:
        known = np.isfinite(np.stack([*columns, answer])).all(axis=0)
        chosen, of = [column[known] for column in columns], member[known]
        if within:
            means = [np.bincount(of, column) / np.maximum(np.bincount(of), 1) for column in chosen]
            chosen = [column - mean[of] for column, mean in zip(chosen, means, strict=True)]
        x, y, *controls = chosen
        return dict(zip(("r", "low", "high"), partial_correlation(x, y, controls, image[known]), strict=True))

    names = ("rate", "low", "high", "pairs", "questions")
    return {
        "pairs": dict(zip(names, pair_validity(groups, scores), strict=True)),
        "majority_pairs": dict(zip(names, pair_validity(of_majority, scores), strict=True)),
        "truth_given_answer": correlation(score, truth, answer),
        "answer": correlation(score, answer, within=False),
        "answer_within": correlation(score, answer),
        "answer_given_length": correlation(score, answer, words),
    }


def sensitivity(sample: Sequence[ReadGroup], measures: Mapping[str, Measure]) -> dict[str, dict[str, Any]]:
    """How measures react to each of the `PERTURBATIONS` of one trajectory, while the rest of its group stays the same.

    The trajectory is drawn from those with the majority answer: the paper's measure is always 0 for the others.

    Args:
        sample: groups with at least two trajectories of the majority answer, one of them with steps.
        measures: those that follow the text, by name.

    Returns:
        By perturbation and measure: the number `edited`, the mean `change` of the score, and the share of scores that
        `fell` by more than TIE; NaN where nothing could be edited.
    """
    changes: dict[str, dict[str, list[float]]] = {edit: {name: [] for name in measures} for edit in PERTURBATIONS}
    for number, group in enumerate(sample):
        rng, steps = np.random.default_rng(number), group.steps
        chosen = rng.choice([i for i in majority(group.keys).members if steps[i]])
        elsewhere = [other for other in sample if other.question[0] != group.question[0]]
        donor = elsewhere[rng.integers(len(elsewhere))].steps if elsewhere else ()
        before = {name: measure(group)[chosen] for name, measure in measures.items()}
        for edit, perturbation in PERTURBATIONS.items():
            edited = perturbation(steps[chosen], rng, [step for own in donor for step in own])
            if edited is None:
                continue
            solutions = [*group.solutions]
            solutions[chosen] = solutions[chosen].model_copy(update={"reasoning_steps": edited})
            after = replace(group, solutions=tuple(solutions))
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
        truth: a file that the playground wrote; None: the one beside the run's images, if there is one.
        steps: first and last training step to read; None: all.

    Returns:
        Counts, `notes`, the `statistics` of each measure, and the `sensitivity` of those that follow the text.

    Raises:
        UsageError: no run, no truth where it was asked for, or no readable trajectory.
    """
    from ireasoner.training.targets import model_revision

    config, notes = load_config(run / "config.yaml"), []
    config = config.model_copy(update={"revision": model_revision(config, run)})
    beside = truth_path(Path(config.images))
    known = read_truth(truth or beside) if truth or beside.exists() else None
    scorers = measures(config, notes, truth=known is not None)
    scores: dict[str, list[FloatArray]] = {name: [] for name in scorers}
    groups: list[ReadGroup] = []
    sample: list[ReadGroup] = []
    rng, eligible = np.random.default_rng(0), 0
    for group in read_groups(run, config, known, steps):
        groups.append(replace(group, solutions=()))  # a long run's texts would fill the memory
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
    with_truth = sum(int(np.isfinite(group.truth).sum()) for group in groups)
    if not readable:
        raise UsageError(f"{run} has no readable trajectory{' in these steps' if steps else ''}: nothing to measure")
    if not with_truth and truth:
        raise UsageError(f"{truth} says nothing of what was written in {run}")
    if not with_truth:
        notes.append("without truth: nothing is known of the run's images")
    return {
        "run": str(run),
        "groups": len(groups),
        "trajectories": sum(len(group.keys) for group in groups),
        "readable": readable,
        "with_truth": with_truth,
        "notes": notes,
        "measures": {name: statistics(groups, scores[name]) for name in scorers},
        "sensitivity": sensitivity(sample, {n: m for n, m in scorers.items() if n not in NOT_FROM_TEXT}),
    }


def read_groups(
    run: Path, config: Config, truth: Truth | None = None, steps: tuple[int, int] | None = None
) -> Iterator[ReadGroup]:
    """The groups of a run's episodes one by one, without those of unreadable questions; `steps` as for `validity`.

    Raises:
        RunDirectoryError: a record that is no episode.
    """
    for episode in read_episodes(run):
        if episode.trajectories and (steps is None or steps[0] <= episode.step <= steps[1]):
            yield _group(episode, config.recipe.max_reasoning_steps, truth)


def _group(episode: Episode, compared: int, truth: Truth | None) -> ReadGroup:
    """An episode's group, cut to the steps that were compared; its truth is of all steps."""
    written = [t.reasoning_steps if t.well_formed else () for t in episode.trajectories]
    verdicts = [[truth.step(episode.image, step) for step in own] if truth else [] for own in written]
    checked = [[verdict for verdict in own if verdict is not None] for own in verdicts]
    recorded = [
        t.parts["step_agreement"].value if "step_agreement" in t.parts else np.nan for t in episode.trajectories
    ]
    return ReadGroup(
        question=(episode.image, episode.question.text),
        keys=tuple(t.answer_key for t in episode.trajectories),
        solutions=tuple(
            Solution(
                reasoning_steps=steps[:compared],
                answer=t.answer,
                words_before_answer=t.words_before_answer,
                problem=t.problem,
            )
            for steps, t in zip(written, episode.trajectories, strict=True)
        ),
        words=np.array([t.words_before_answer for t in episode.trajectories], dtype=np.float64),
        truth=np.array([np.mean(own) if own else np.nan for own in checked]),
        recorded=np.array(recorded),
    )


# --- to read ---------------------------------------------------------------------------------------------------------

ROWS = {
    "pairs": "truer one scores higher, %",
    "majority_pairs": "  in the majority, %",
    "truth_given_answer": "r, truth beyond answers",
    "answer": "r, answer agreement",
    "answer_within": "  within groups",
    "answer_given_length": "  and beyond length",
}


def sentences(report: Mapping[str, Any]) -> list[str]:
    """What `validity` read, in a few lines of text."""
    counts = (
        f"{report['run']}: {report['groups']} questions, {report['readable']} readable trajectories of "
        f"{report['trajectories']}, truth known of {report['with_truth']}"
    )
    return [counts, *report["notes"]]


def pairs_line(report: Mapping[str, Any]) -> str:
    """How many pairs the first rows of the table are about; empty where there are none."""
    every, among = (report["measures"]["recorded"][row] for row in ("pairs", "majority_pairs"))
    if not every["pairs"]:
        return ""
    return (
        f"Truer one: of {every['pairs']} pairs of trajectories with the same answer and different, known truth, from "
        f"{every['questions']} questions; {among['pairs']} of these pairs gave the majority answer."
    )


def tables(report: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """What `validity` found, as tables with titles; rows without any number are left out, and so is the table of edits
    where no measure follows the text."""

    def cell(values: Mapping[str, float]) -> str:
        scale, digits = (100, 1) if "rate" in values else (1, 2)
        value, low, high = (scale * number for number in list(values.values())[:3])
        return "–" if np.isnan(value) else f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    def change(values: Mapping[str, float]) -> str:
        return f"{values['change']:+.3f} ({values['fell']:.0%})" if values["edited"] else "–"

    found, edits = report["measures"], report["sensitivity"]
    rows = [[label, *(cell(values[row]) for values in found.values())] for row, label in ROWS.items()]
    agreement = [["", *found], *(row for row in rows if set(row[1:]) != {"–"})]
    followed = [*next(iter(edits.values()))]
    edited = [[edit, str(by[followed[0]]["edited"]), *map(change, by.values())] for edit, by in edits.items() if by]
    of_edits = ("One trajectory edited: mean change (share that fell)", [["", "edited", *followed], *edited])
    return [("Step agreement, with 95 % intervals", agreement), *([of_edits] if followed else [])]
