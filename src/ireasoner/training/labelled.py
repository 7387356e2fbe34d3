"""Labelled questions: a JSONL file of `image`, `question` and `answer`, for evaluation and for the recipe `oracle`."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ireasoner.method.answers import answer_key
from ireasoner.method.types import UsageError

# Whether a reasoning step is true of what the field `picture` of a labelled question describes; None: not known.
StepTruth = Callable[[Mapping[str, Any], str], bool | None]


class DataError(UsageError):
    """A labelled data set cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class LabelledQuestion:
    """A question about an image with its true answer.

    `image` is an absolute path; `picture` is a description of the image by whoever drew it, if the file holds one.
    """

    image: Path
    question: str
    answer: str
    picture: Mapping[str, Any] | None = None


def load_questions(path: Path, limit: int | None = None, truth: StepTruth | None = None) -> list[LabelledQuestion]:
    """Read a file of labelled questions.

    Args:
        path: JSONL of `image` (a path relative to the file), `question`, `answer` (text or a number) and, if known,
            `picture` (an object). Other keys are ignored.
        limit: return only so many questions, drawn at random from as many images as possible: no image has a second
            question before every image has its first. The draw depends on the file and the limit alone, so that all
            models and seeds are asked the same; the order stays that of the file.
        truth: must be able to read every `picture`.

    Raises:
        DataError: the file is missing, a line is no such object, or an image is not there.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} leaves no question of {path}")
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # splitlines would also break at U+2028, which JSON allows
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_question(line, path.parent, f"{path}, line {number}", truth))
    if not found:
        raise DataError(f"{path} holds no questions")
    return found if limit is None else draw_questions(found, limit)


def draw_questions(questions: Sequence[LabelledQuestion], limit: int) -> list[LabelledQuestion]:
    """So many of the questions, as `load_questions` draws them."""
    turns, of_image = {}, Counter[Path]()
    for i in np.random.default_rng(0).permutation(len(questions)).tolist():
        turns[i] = of_image[questions[i].image]  # how many questions about its image come before it
        of_image[questions[i].image] += 1
    chosen = sorted(turns, key=lambda i: turns[i])[:limit]
    return [questions[i] for i in sorted(chosen)]


def _question(line: str, folder: Path, where: str, truth: StepTruth | None) -> LabelledQuestion:
    try:
        row = json.loads(line)
        name, question, answer = (row[key] for key in ("image", "question", "answer"))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{where}: needs an object with image, question and answer") from None
    if not isinstance(name, str) or not isinstance(question, str) or not isinstance(answer, str | int | float):
        raise DataError(f"{where}: image and question must be text, answer text or a number")
    try:
        image = (folder / name).resolve()
        if not image.is_file():
            raise ValueError
    except (OSError, RuntimeError, ValueError):  # links that form a loop are a RuntimeError
        raise DataError(f"{where}: no image {name[:100]!r}") from None
    picture = row.get("picture") if isinstance(row.get("picture"), dict) else None
    if truth is not None and picture is not None:
        try:
            truth(picture, "")
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{where}: an object in picture must be a record of the embedded world") from None
    return LabelledQuestion(image, question, str(answer), picture)


def answer_prior(questions: Sequence[LabelledQuestion]) -> dict[str, float]:
    """Accuracy of always giving the most frequent answer: `overall`, or `by_first_words`, per first two words.

    It reads the labels that it is measured on, so it is an upper bound for guessing by such a rule without looking.
    """
    every, by_words = Counter[str](), defaultdict[tuple[str, ...], Counter[str]](Counter)
    for q in questions:
        key = answer_key(q.answer, q.question)
        every[key] += 1
        by_words[tuple(q.question.lower().split()[:2])][key] += 1
    right = {"overall": max(every.values()), "by_first_words": sum(max(c.values()) for c in by_words.values())}
    return {name: count / len(questions) for name, count in right.items()}


def prior_line(prior: Mapping[str, float]) -> str:
    """What `answer_prior` found, as a sentence."""
    return (
        f"Answer prior: always the most frequent answer {100 * prior['overall']:.1f} %, by the question's first two "
        f"words {100 * prior['by_first_words']:.1f} % (an upper bound for a blind guesser: it reads these labels)"
    )
