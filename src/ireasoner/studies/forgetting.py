"""What training makes a model forget: questions about other pictures than those of the training, and another request.

The held-out questions of an ablation are drawn like the pictures that it trains on. Here the pictures are drawn in
another style, which the tiny model knows from its pre-training, and about some of them it is also asked for what the
self-play never asks: a description of all there is to see.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ireasoner.playground import dataset, world
from ireasoner.training.labelled import LabelledQuestion
from ireasoner.training.statistics import numbered

REQUEST = "Describe."  # as in the pre-training of the tiny model (tools/pretrain_tiny.py)
QUESTIONS = 192  # at most; beside them, every third picture is to be described
EVERY = 3
SEED = 1  # of the pictures; those of the held-out questions have seed 0
Columns = dict[str, NDArray[np.float64]]


def other_style(style: str) -> str:
    """A style that is not trained on: the one of the tiny model's pre-training, if possible."""
    return "chalk" if style == "varied" else "varied"


def write_elsewhere(folder: Path, questions: int, style: str, split: str) -> Path:
    """Draw pictures in another style, with a question about each and requests for descriptions; returns the JSONL file.

    Args:
        folder: the folder to write.
        questions: how many held-out questions the ablation asks; here are no more than that, nor than QUESTIONS.
        style, split: those of the ablation.
    """
    path = dataset.write_questions(folder, min(questions, QUESTIONS), other_style(style), split, SEED)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    described = [{**row, "question": REQUEST, "answer": " ".join(_facts(row["picture"]))} for row in rows[::EVERY]]
    dataset.write_rows(path, [*rows, *described])
    return path


def forgetting_columns(
    mean_at_1: NDArray[np.float64], texts: Sequence[Sequence[str]], asked: Sequence[LabelledQuestion]
) -> Columns:
    """What the runs of one arm answered elsewhere, by measure: values [seeds, N], and the images that they are about.

    `other_style` is mean@1 of the questions, and `described` the share of a picture's facts that its description says.

    Args:
        mean_at_1: of all questions [seeds, questions].
        texts: the greedy texts, by seed and question.
        asked: the questions, as `write_elsewhere` wrote them.
    """
    requests = np.array([question.question == REQUEST for question in asked])
    described = [[_told(text, q) for text, q in zip(of_seed, asked, strict=True)] for of_seed in texts]
    values = {"other_style": mean_at_1[:, ~requests], "described": np.array(described)[:, requests]}
    about = {"other_style": ~requests, "described": requests}
    for name, chosen in about.items():
        image = numbered(q.image for q, is_chosen in zip(asked, chosen, strict=True) if is_chosen)
        values[f"{name}_image"] = np.tile(image.astype(np.float64), (len(texts), 1))
    return values


def _told(text: str, question: LabelledQuestion) -> float:
    """The share of the facts of a question's picture that a text says, in the wording of the pre-training."""
    facts = _facts(question.picture or {})
    return sum(fact in text for fact in facts) / len(facts)


def _facts(record: Mapping[str, object]) -> tuple[str, ...]:
    return world.facts(world.picture_from_record(record))
