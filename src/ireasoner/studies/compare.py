"""A paired comparison of two models by the samples that lmms-eval logged of them (`--log_samples`, tested with 0.7.3).

A log has a line for each document: `doc_id`, the true answer (`target`), what the model was given (`input`) and wrote
(`filtered_resps`), and what each metric gave. A metric gives a number, or an object with a number under one of SCORES.
A task with several filters logs its documents once for each filter, in order and without the filter's name. `doc_hash`
is of no use: lmms-eval 0.7.3 writes the same one for every document.

What `ireasoner eval MODEL --json FILE.json` wrote can be compared as well.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ireasoner.method.types import UsageError
from ireasoner.training.recorder import read_json
from ireasoner.training.statistics import MEASURES, numbered, paired_differences

SCORES = ("score", "correct", "accuracy", "acc", "is_correct")  # where a metric that is an object has its number
# What a line holds beside its metrics.
FIELDS = frozenset({
    "doc_id", "doc", "doc_hash", "target", "arguments", "input", "input_media", "resps", "filtered_resps",
    "token_counts",
})  # fmt: skip
LONGEST = 2**26  # bytes of a line; images that lmms-eval writes into a line have less than half a megabyte each
LARGEST = 2**28  # bytes of a file of ireasoner eval
MOST_LOGS = 10_000  # in a folder
ALL = "all tasks"

FloatArray = NDArray[np.float64]
Key = tuple[str, int]  # a document's number as text, and how many lines of the log were about it before


@dataclass(frozen=True)
class Document:
    """One line of a log: its true answer, digests of what was asked and of its images, and its scores by metric.

    Where the images are not known, `image` names the document itself.
    """

    target: str
    asked: str
    image: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """The paired difference B − A in one metric of one task.

    Attributes:
        a, b: mean score of each model.
        difference: `mean`, the ends `low` and `high` of its 95 % interval, and a two-sided `p`.
        test: what `p` is of: "McNemar" (exact) where all scores are 0 or 1 and no two documents are known to be about
            the same image, otherwise "sign flips", all documents about one image together.
        wins, losses, ties: documents in which B scored higher than A, lower, or the same.
    """

    task: str
    metric: str
    documents: int
    a: float
    b: float
    difference: Mapping[str, float]
    test: str
    wins: int
    losses: int
    ties: int


@dataclass(frozen=True)
class Comparison:
    """A row for each metric of each task; then, of several tasks, one of all their documents.

    `notes` are sentences about what was not compared, or not asked alike.
    """

    rows: Sequence[Row]
    notes: Sequence[str] = field(default_factory=tuple)


def compare_logs(a: Path, b: Path, metric: str | None = None) -> Comparison:
    """Compare two models, document by document.

    Args:
        a, b: a sample log of each model (`*_samples_*.jsonl`), or a folder that holds its logs, of which the newest of
            each task counts, and tasks that only one of them has are left out; or a `.json` file of `ireasoner eval`.
        metric: by this metric alone; None: by all that both have.

    Raises:
        UsageError: a log is missing or damaged, the two are not about the same documents, or have no metric in common.
    """
    logs, others = _find(a), _find(b)
    if a.is_file() and b.is_file():
        ((task, path),), (other,) = logs.items(), others.values()
        pairs = {task: (path, other)}
    else:
        pairs = {task: (logs[task], others[task]) for task in logs if task in others}
    if not pairs:
        raise UsageError(f"{a} and {b} have no task in common: {', '.join(logs)} and {', '.join(others)}")
    alone = sorted((logs.keys() | others.keys()) - pairs.keys()) if not (a.is_file() and b.is_file()) else []
    notes = [f"Only one of the two was asked {', '.join(alone)}."] if alone else []
    rows, first_metrics = [], []
    for task, (path, other) in pairs.items():
        before, after = _read(path), _read(other)
        _check_same(before, after, path, other)
        changed = sum(before[key].asked != after[key].asked for key in before)
        if changed:
            notes.append(f"{task}: the two were given different text for {changed} of {len(before)} documents.")
        found = list(_paired(before, after, metric))
        if not found:
            wanted = "metric" if metric is None else f"metric {metric!r}"
            raise UsageError(f"{path} and {other} have no {wanted} in common: {_named(before)} and {_named(after)}")
        rows += [_row(task, *pair) for pair in found]
        first_metrics.append(found[0])
    if len(pairs) > 1:
        if all(0 <= value <= 1 for _, old, new, _ in first_metrics for value in (*old, *new)):
            rows.append(_pooled(first_metrics))
        else:
            notes.append(f"There is no row of {ALL}: not all scores lie between 0 and 1.")
    return Comparison(rows, notes)


# --- reading ----------------------------------------------------------------------------------------------------------


def _find(path: Path) -> dict[str, Path]:
    """The log of each task, by task: the file itself, or the newest in a folder.

    Raises:
        UsageError: there is none, or there are logs of several models.
    """
    if not path.is_dir():
        if not path.is_file():  # a named pipe would be waited for without end
            raise UsageError(f"there is no sample log {path}")
        return {_task(path) or ("eval" if path.suffix == ".json" else path.stem): path}
    found: dict[str, Path] = {}
    for number, log in enumerate(path.rglob("*_samples_*.jsonl")):
        if number == MOST_LOGS:
            raise UsageError(f"{path} holds more than {MOST_LOGS} sample logs: name a folder of one model")
        task = _task(log)
        other = found.setdefault(task, log)
        if other.parent != log.parent:
            raise UsageError(f"{path} holds logs of several models, such as {other} and {log}: name the folder of one")
        found[task] = max(other, log, key=lambda each: each.name)  # names begin with the time
    if not found:
        raise UsageError(f"{path} holds no *_samples_*.jsonl, which lmms-eval writes with --log_samples")
    return dict(sorted(found.items()))


def _task(log: Path) -> str:
    """The task that a log is of, by its name; "" if its name does not say so."""
    return log.name.partition("_samples_")[2].removesuffix(".jsonl")


def _read(path: Path) -> dict[Key, Document]:
    """The documents of a log, in its order."""
    if path.suffix == ".json":
        return _read_evaluation(path)
    found: dict[Key, Document] = {}
    lines_about = Counter[str]()
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or "doc_id" not in record or "target" not in record:
            raise UsageError(f"{where}, is not a sample of lmms-eval with doc_id and target")
        name = str(record["doc_id"])[:100]
        turn = lines_about[name]
        lines_about[name] += 1
        filtered = f", filter {turn + 1}" if turn else ""
        scores = {f"{key}{filtered}": score for key, score in _scores(record, where)}
        media = record.get("input_media")
        image = _digest(media) if media else f"document {name}"
        found[name, turn] = Document(str(record["target"]), _digest(record.get("input")), image, scores)
    if not found:
        raise UsageError(f"{path} holds no samples")
    return found


def _read_evaluation(path: Path) -> dict[Key, Document]:
    """What `ireasoner eval` wrote about the questions of one model."""
    found, documents = read_json(path, LARGEST), dict[Key, Document]()
    try:
        scores = np.array([found["per_question"][name] for name in MEASURES], dtype=np.float64)  # [measures, questions]
        for number, (row, values) in enumerate(zip(found["asked"], scores.T.tolist(), strict=True)):
            of_row = dict(zip(MEASURES, values, strict=True))
            asked = _digest(row["question"])
            documents[str(number), 0] = Document(str(row["answer"]), asked, str(row["image"]), of_row)
        if not documents or not np.isfinite(scores).all():
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{path} is not what ireasoner eval --json wrote of one model") from None
    return documents


def _digest(value: Any) -> str:
    """Of a text or of images, which may be long."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while line := file.readline(LONGEST + 1):
                if len(line) > LONGEST:
                    raise UsageError(f"{path} has a line of more than {LONGEST >> 20} MiB")
                yield line
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _scores(record: Mapping[str, Any], where: str) -> Iterator[tuple[str, float]]:
    """The metrics of a sample that are numbers, or hold one."""
    for name, value in record.items():
        if name in FIELDS:
            continue
        if isinstance(value, dict):
            value = next((value[key] for key in SCORES if key in value), None)
        if not isinstance(value, bool | int | float):
            continue  # text, a list or nothing
        try:
            score = float(value)
        except OverflowError:
            score = math.inf
        if not math.isfinite(score):
            raise UsageError(f"{where}: {name[:100]} is no finite number")
        yield name[:100], score


def _check_same(before: Mapping[Key, Document], after: Mapping[Key, Document], path: Path, other: Path) -> None:
    if before.keys() != after.keys():
        alone = len(before.keys() ^ after.keys())
        raise UsageError(f"{path} and {other} are not about the same documents: {alone} are in one of them alone")
    for key, document in before.items():
        if document.target != after[key].target:
            raise UsageError(
                f"{path} and {other} are not about the same documents: the answer of document {key[0]} is "
                f"{document.target[:50]!r} in one and {after[key].target[:50]!r} in the other"
            )


# --- comparing --------------------------------------------------------------------------------------------------------


def _paired(
    before: Mapping[Key, Document], after: Mapping[Key, Document], metric: str | None
) -> Iterator[tuple[str, FloatArray, FloatArray, list[str]]]:
    """Every metric that both have for the same documents: its name, the scores of both, and the documents' images."""
    for name in _names(before):
        if metric is not None and name != metric:
            continue
        keys = [key for key in before if name in before[key].scores]
        if keys != [key for key in before if name in after[key].scores]:
            continue
        old, new = (np.array([model[key].scores[name] for key in keys]) for model in (before, after))
        yield name, old, new, [before[key].image for key in keys]


def _names(documents: Mapping[Key, Document]) -> list[str]:
    """The metrics of a log, in its order."""
    return list(dict.fromkeys(name for document in documents.values() for name in document.scores))


def _named(documents: Mapping[Key, Document]) -> str:
    return ", ".join(_names(documents)[:20]) or "none"


def _row(task: str, metric: str, old: FloatArray, new: FloatArray, images: Sequence[str]) -> Row:
    lowest, highest = min(0.0, old.min(), new.min()), max(1.0, old.max(), new.max())
    span = highest - lowest  # 1 where all scores are shares
    images_Q, differences = numbered(images), new - old
    paired = paired_differences({metric: differences / span}, images_Q)[metric]
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    alone = len(images) == len(set(images))
    exact = alone and bool(np.isin(np.concatenate([old, new]), (0, 1)).all())
    p = mcnemar(wins, losses) if exact else paired["p"]
    return Row(
        task, metric, len(old), float(old.mean()), float(new.mean()),
        {**{name: paired[name] * span for name in ("mean", "low", "high")}, "p": p},
        "McNemar" if exact else "sign flips", wins, losses, len(old) - wins - losses,
    )  # fmt: skip


def _pooled(of_tasks: Sequence[tuple[str, FloatArray, FloatArray, list[str]]]) -> Row:
    """The first metric of each task, over the documents of all of them; an image of several tasks is one image."""
    metrics, old, new, images = zip(*of_tasks, strict=True)
    metric = metrics[0] if len(set(metrics)) == 1 else "first metric of each"
    told = [
        image if not image.startswith("document ") else f"{task} {image}"
        for task, of_task in enumerate(images)
        for image in of_task
    ]
    return _row(ALL, metric, np.concatenate(old), np.concatenate(new), told)


def mcnemar(wins: int, losses: int) -> float:
    """McNemar's (1947) exact two-sided p-value, from the documents that one of two models alone gets right.

    If the models were equally good, each of these documents would be a win with probability 1/2.
    """
    decided, fewer = wins + losses, min(wins, losses)
    tail = math.fsum(math.exp(_log_choose(decided, k) - decided * math.log(2)) for k in range(fewer + 1))
    return min(1.0, 2 * tail)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
