"""Labelled questions: JSONL of images, questions and answers, for evaluation and for the recipe `oracle`.

The fields have the names of the public sets, so that rows of R1-V, EasyR1, VLM-R1 and VLMEvalKit and the samples of
lmms-eval can be read as they are, if their images are files.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from ireasoner.method.answers import answer_key, lettered_options
from ireasoner.method.matching import match_value
from ireasoner.method.types import Match, UsageError
from ireasoner.training.clips import ItemFiles, clip_files

# Whether a reasoning step is true of what the field `picture` of a labelled question describes; None: not known.
StepTruth = Callable[[Mapping[str, Any], str], bool | None]

# What the public sets call each field; the first name that a row has counts. In VLMEvalKit, `image` holds the pixels
# where there is an `image_path` beside it.
FIELDS = {
    "image": ("image_path", "image", "images", "clip", "video", "videos"),
    "question": ("question", "problem", "query", "prompt"),
    "answer": ("answer", "answers", "solution", "ground_truth", "label", "target"),
    "choices": ("choices", "options"),
    "match": ("match", "metric"),
}
METRICS: dict[str, Match] = {
    **dict.fromkeys(("exact", "exact_match", "accuracy"), "exact"),
    **dict.fromkeys(("relaxed", "relaxed_accuracy", "relaxed_overall", "relaxed_correctness"), "relaxed"),
    "anls": "anls",
    **dict.fromkeys(("vqa", "vqa_score", "vqa_accuracy"), "vqa"),
}
CLIPS = ("clip", "video", "videos")  # the names of those that are a clip
_PLACEHOLDER = re.compile(r"<(?:image|video)(?: ?\d+)?>")  # where a processor would put the image
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class DataError(UsageError):
    """A labelled data set cannot be used; the message names the file, the line and the field."""


@dataclass(frozen=True)
class LabelledQuestion:
    """A question about an image with its true answer.

    `image` is an absolute path, or the files of several images or of a clip; `picture` is a description of it by
    whoever drew it, if the file holds one.
    `others` are further answers that are accepted, `choices` the texts of the options that the question shows, and
    `match` is the metric that the file names for it, if any.
    """

    image: Path | ItemFiles
    question: str
    answer: str
    picture: Mapping[str, Any] | None = None
    others: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    match: Match | None = None


def true_key(label: LabelledQuestion) -> str:
    """The key of the true answer; an answer without a key stands for itself."""
    return answer_key(label.answer, label.question) or label.answer


def judged(label: LabelledQuestion, match: Match, answer: str) -> float:
    """How right an answer to a labelled question is, in [0, 1]; `match` is the metric where the question names none."""
    return match_value(answer, (label.answer, *label.others), label.question, label.match or match, label.choices)


def load_questions(path: Path, limit: int | None = None, truth: StepTruth | None = None) -> list[LabelledQuestion]:
    """Read a file of labelled questions.

    Args:
        path: JSONL of objects with the FIELDS, of which only `image` (a path relative to the file), `question` and
            `answer` (text or a number, or a list of those that are accepted) must be there, and, if known, `picture`
            (an object). `images` may be a list of several, which are shown together; instead there may be a `clip`: a
            file, a folder of frames, or a list of them. Choices may also stand in fields A, B, C and so on, question
            and answer in `conversations`, and all of them in `doc`. Other keys are ignored.
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
    turns, of_image = {}, Counter[Path | ItemFiles]()
    for i in np.random.default_rng(0).permutation(len(questions)).tolist():
        turns[i] = of_image[questions[i].image]  # how many questions about its image come before it
        of_image[questions[i].image] += 1
    chosen = sorted(turns, key=lambda i: turns[i])[:limit]
    return [questions[i] for i in sorted(chosen)]


def _question(line: str, folder: Path, where: str, truth: StepTruth | None) -> LabelledQuestion:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise DataError(f"{where}: needs an object with image, question and answer")
    row = _flat(row)
    found = {field: next((name for name in names if _given(row, name)), None) for field, names in FIELDS.items()}
    for field in ("image", "question", "answer"):
        if found[field] is None:
            raise DataError(f"{where}: has no {field}: it may be named {', '.join(FIELDS[field])}")

    def read(field: str, reader: Callable[..., Any], *more: Any) -> Any:
        name = found[field]
        try:
            return reader(None if name is None else row[name], *more)
        except ValueError as error:
            raise DataError(f"{where}: {name or field} {error}") from None

    image, question, choices = (
        read("image", _image, folder, found["image"] in CLIPS),
        read("question", _text),
        read("choices", _choices, row),
    )
    answers, match = read("answer", _answers, choices), read("match", _match, row)
    picture = row.get("picture") if isinstance(row.get("picture"), dict) else None
    if truth is not None and picture is not None:
        try:
            truth(picture, "")
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{where}: an object in picture must be a record of the embedded world") from None
    return LabelledQuestion(image, with_choices(question, choices), answers[0], picture, answers[1:], choices, match)


def with_choices(question: str, choices: Sequence[str]) -> str:
    """A question with its options on lines `A. …` below it, unless it shows them itself."""
    shows = len(lettered_options(question)) >= len(choices)
    if shows and all(choice.casefold() in question.casefold() for choice in choices):
        return question
    return "\n".join([question, *(f"{ascii_uppercase[i]}. {choice}" for i, choice in enumerate(choices))])


# --- fields of the public sets, each of which raises a ValueError that says what its field must be -------------------


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what lmms-eval's samples hold in `doc`, and what VLM-R1's rows say in their two `conversations`."""
    if isinstance(row.get("doc"), dict):
        row = {**row["doc"], **row}
    turns = row.get("conversations")
    if isinstance(turns, list) and len(turns) >= 2 and all(isinstance(turn, dict) for turn in turns[:2]):
        row = {"question": turns[0].get("value"), "answer": turns[1].get("value"), **row}
    return row


def _given(row: Mapping[str, Any], name: str) -> bool:
    """Whether a row has a value of this name; tables leave NaN or an empty list where there is none."""
    value = row.get(name)
    return value is not None and value != [] and value == value


def _text(value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise ValueError("must be text or a number")
    text = _PLACEHOLDER.sub("", str(value))
    return text if text == str(value) else text.strip()


def _image(value: Any, folder: Path, is_clip: bool) -> Path | ItemFiles:
    """The file of the image of a row, or the files of several or of a clip: each a path, or an object with `path`, as
    `datasets` writes it."""
    values = value if isinstance(value, list) else [value]
    if is_clip:
        files = clip_files(tuple(_file(each, folder, or_folder=len(values) == 1) for each in values))
        if not files.paths:
            raise ValueError(f"names a folder without a frame: {values[0]!r:.100}")
        return files
    first, *others = (_file(each, folder) for each in values)
    return ItemFiles((first, *others)) if others else first


def _file(value: Any, folder: Path, or_folder: bool = False) -> Path:
    name = value.get("path") if isinstance(value, dict) else value
    if not isinstance(name, str):
        raise ValueError("must be the path of an image")
    try:
        path = (folder / name).resolve()
        if path.is_file() or (or_folder and path.is_dir()):
            return path
    except (OSError, RuntimeError, ValueError):  # links that form a loop are a RuntimeError
        pass
    raise ValueError(f"names no image: {name[:100]!r}")


def _list(value: Any) -> list[Any]:
    """The values of a list, also of one that is written as text, as in MMMU and VLMEvalKit: "['red', 'blue']"."""
    if isinstance(value, str) and re.match(r"\s*\[\s*['\"]", value):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return [value]
    return list(value) if isinstance(value, list) else [value]


def _choices(value: Any, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The options of a row, without the letters that they may begin with; none if it has none."""
    if value is None:
        letters = [letter for letter in ascii_uppercase if _given(row, letter) and row[letter] != ""]
        value = {letter: row[letter] for letter in letters} if len(letters) > 1 else None
    if value is None:
        return ()
    if isinstance(value, dict):
        if list(value) != list(ascii_uppercase[: len(value)]):
            raise ValueError("must have the letters A, B, C and so on as keys, in this order")
        value = list(value.values())
    texts = [" ".join(_text(choice).split()) for choice in _list(value)]
    if not 2 <= len(texts) <= len(ascii_uppercase):
        raise ValueError(f"must be 2 to {len(ascii_uppercase)} options, not {len(texts)}")
    bare = [
        re.sub(rf"^(?:\({mark}\)|{mark}[.):])\s*", "", text) for mark, text in zip(ascii_uppercase, texts, strict=False)
    ]
    return tuple(bare if all(map(str.__ne__, bare, texts)) else texts)


def _answers(value: Any, choices: Sequence[str]) -> tuple[str, ...]:
    """The accepted answers of a row. Each is text, a number, or an object with `answer`, as in VQA.

    With choices, digits that are none of them are the place of one, counted from 0, as in ScienceQA and AI2D.
    """
    answers = []
    for one in _list(value):
        one = one.get("answer") if isinstance(one, dict) else one
        text = _text(one)
        tagged = _ANSWER_TAG.findall(text)
        text = (tagged[-1] if tagged else text).strip()
        if choices and re.fullmatch(r"\d{1,2}", text):
            place = int(text)
            if text not in choices and place >= len(choices):
                raise ValueError(f"is {text}, but there are only {len(choices)} choices, counted from 0")
            if isinstance(one, int) and text in choices and choices[place : place + 1] not in ((), (text,)):
                raise ValueError(f"is {text}, which one choice says and another one has as its place: write a letter")
            text = text if text in choices else ascii_uppercase[place]
        answers.append(text)
    return tuple(answers)


def _match(value: Any, row: Mapping[str, Any]) -> Match | None:
    """The metric of a row. A `type` counts if it is one; in ChartQA it says who asked."""
    if value is None:
        return METRICS.get(str(row.get("type")))
    if str(value) not in METRICS:
        raise ValueError(f"must be one of {', '.join(METRICS)}, not {str(value)[:50]!r}")
    return METRICS[str(value)]


def answer_prior(questions: Sequence[LabelledQuestion]) -> dict[str, float]:
    """Accuracy of always giving the most frequent answer: `overall`, or `by_first_words`, per first two words.

    It reads the labels that it is measured on, so it is an upper bound for guessing by such a rule without looking.
    """
    every, by_words = Counter[str](), defaultdict[tuple[str, ...], Counter[str]](Counter)
    for q in questions:
        key = true_key(q)
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
