"""A person answers some of a run's own questions; the answers become evaluation data.

The answers of the model are not shown before, and not even after each question, because they would bias the person's.
"""

from __future__ import annotations

import json
import mimetypes
import os
import random
from collections.abc import Callable
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ireasoner.app.display import plain, print_text
from ireasoner.method.answers import answer_key
from ireasoner.method.types import UsageError
from ireasoner.training.config import Config, is_elsewhere
from ireasoner.training.images import UnreadableImageError, path_of, printable, quoted, read_image
from ireasoner.training.labelled import LabelledQuestion, load_questions
from ireasoner.training.recorder import append_record, read_episodes
from ireasoner.training.statistics import share_interval

LONGEST_QUESTION = 1000  # characters; a person reads a question as a whole, or not at all


class OwnQuestion(NamedTuple):
    """A question that a run asked itself about an image, with the key of the answer that most trajectories gave."""

    step: int
    image: Path
    text: str
    majority_answer: str | None


def own_questions(run_dir: Path, images: Path, parts: int, seed: int) -> list[OwnQuestion]:
    """The readable questions of a run about images that are still there, one an image, in the order to ask them in.

    The first `parts` of them, one from each of as many parts of the training, are spread evenly over its steps; so are
    the next ones.

    Raises:
        UsageError: there are none, or the run cannot be read.
    """
    found = [
        OwnQuestion(e.step, images / path_of(e.image), e.question.text, e.majority_answer)
        for e in read_episodes(run_dir)
        if e.proposal is not None and e.question.well_formed and len(e.question.text) <= LONGEST_QUESTION
    ]
    if not found:
        raise UsageError(f"{run_dir} has recorded no readable question of its own: train it for some steps first")
    rng = random.Random(seed)
    rng.shuffle(found)
    by_image = {question.image: question for question in found if os.path.isfile(question.image)}
    if not by_image:
        raise UsageError(
            f"no image that {run_dir} asked about is in {quoted(images)} as a file of its own: put back what was moved"
        )
    ordered = sorted(by_image.values(), key=lambda question: question.step)
    parts = min(parts, len(ordered))
    ends = [len(ordered) * i // parts for i in range(parts + 1)]
    by_part = [ordered[first:last] for first, last in pairwise(ends)]
    for part in by_part:
        rng.shuffle(part)
    rng.shuffle(by_part)
    return [question for turn in zip_longest(*by_part) for question in turn if question]


def label(run_dir: Path, config: Config, out: Path, count: int, seed: int, show: Callable[[str], None] | None) -> bool:
    """Ask a person questions until `out` holds `count` answers, none are left, or the person stops.

    Every answer is saved before the next question is asked. Skipped questions are kept in a file beside `out`, so that
    they are not asked again.

    Args:
        run_dir: the run, finished or not.
        config: the run's options.
        out: the JSONL file that is written or continued.
        count: how many answers it shall hold.
        seed: which questions are asked.
        show: opens the address of an image file; None: only its path is printed.

    Returns:
        Whether `out` holds any answers.

    Raises:
        UsageError: the run has no questions or cannot be read, or a file cannot be read or written.
    """
    if config.has_groups:
        raise UsageError(f"label shows single images, and an item of {run_dir} may be several of them, or a clip")
    if is_elsewhere(config.images) or os.path.isfile(config.images):
        raise UsageError(
            f"label shows image files of a folder here, and those of {run_dir} are in {quoted(config.images)}"
        )
    skips = out.with_name(f"{out.stem}.skipped.jsonl")
    answered, skipped = _read(out), _read(skips)
    done = {row.image for row in (*answered, *skipped)}
    questions = own_questions(run_dir, Path(config.images).absolute(), count, seed)
    open_questions = (q for q in questions if q.image.resolve() not in done and _readable(q.image, config))
    print_text(
        "Answer as briefly as the model should: a number, a word or two, yes or no. Enter alone skips a question that "
        "has no clear answer, and q stops."
    )
    number, total = len(answered), min(count, len(questions))
    while number < count:
        question = next(open_questions, None)
        if question is None:
            print("\nThe run has no other question that can be asked.")
            break
        answer = _ask(question, f"{number + 1}/{total}", show)
        if answer is None:
            break
        row = {"image": str(question.image), "question": question.text, "answer": answer, "step": question.step}
        if answer:
            _save(out, {**row, "majority_answer": question.majority_answer})
            number += 1
        else:
            _save(skips, row)
    return number > 0


def _ask(question: OwnQuestion, number: str, show: Callable[[str], None] | None) -> str | None:
    """What a person answers to a question: "" skips it, and None stops."""
    print(f"\n{number}  {printable(str(question.image))}\n{plain(question.text, LONGEST_QUESTION)}")
    # What was decoded as an image and is named as one is shown as one; by another name, it could be opened as a page.
    if show and (mimetypes.guess_type(question.image.name)[0] or "").startswith("image/"):
        show(question.image.as_uri())
    try:
        typed = input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    answer = plain(typed, len(typed)).strip()  # arrow keys may have typed control characters
    return None if answer == "q" else answer


def agreement(path: Path) -> str:
    """How often the majority answers of training are those of the person, as a sentence; "" where none are known."""
    rows = [json.loads(line) for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
    rows = [row for row in rows if "majority_answer" in row]  # others were added by hand
    if not rows:
        return ""
    keys = [answer_key(str(row["answer"]), row["question"]) for row in rows]
    right = np.array([k is not None and k == row["majority_answer"] for k, row in zip(keys, rows, strict=True)])
    mean, low, high = (100 * share for share in share_interval(right.astype(float), np.arange(len(rows))))
    return (
        f"When these questions were asked in training, the majority answered as you do to {right.sum()} of {len(rows)} "
        f"({mean:.1f} %, 95 % interval {low:.1f} to {high:.1f}); what is worded differently counts as different."
    )


def _read(path: Path) -> list[LabelledQuestion]:
    """The questions in a file that is to be continued. A run may come from anywhere, so no link is written through."""
    if os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path)):
        raise UsageError(f"{path} is a link, or not a regular file: move it away, or choose another --out")
    if not os.access(path if os.path.exists(path) else path.parent, os.W_OK):
        raise UsageError(f"{path} cannot be written: choose another --out")
    return load_questions(path) if os.path.exists(path) and os.path.getsize(path) else []


def _save(path: Path, row: dict[str, Any]) -> None:
    try:
        if path.exists() and not path.read_bytes().endswith(b"\n"):  # as an editor may have left it
            with path.open("ab") as file:
                file.write(b"\n")
        append_record(path, row, sync=True)
    except OSError as error:
        raise UsageError(
            f"the last answer could not be saved in {path} ({error.strerror}): make room, and start again"
        ) from None


def _readable(image: Path, config: Config) -> bool:
    try:
        read_image(image, config.max_image_pixels)
    except UnreadableImageError:
        return False
    return True
