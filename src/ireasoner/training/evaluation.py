"""Held-out accuracy with intervals, how much of it needs the image, and paired comparisons on the same questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ireasoner.method.answers import Vote, answer_key, majority
from ireasoner.method.texts import parse_trajectory, solver_messages
from ireasoner.method.types import Match, Role, Solution
from ireasoner.model.inputs import check_several, encode_images
from ireasoner.model.parallel import ALONE, Processes
from ireasoner.model.policy import Policy
from ireasoner.model.views import View, filled
from ireasoner.rollouts.engine import Engine, Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training.clips import ItemFiles, Limits, load_view
from ireasoner.training.config import SamplingOptions
from ireasoner.training.images import MAX_PIXELS
from ireasoner.training.labelled import LabelledQuestion, StepTruth, judged
from ireasoner.training.statistics import (
    MEASURES,
    READABLE,
    SAMPLES,
    STRICT,
    numbered,
    paired_differences,
    share_interval,
)
from ireasoner.training.stopping import Stopped

ACCURACIES = (*MEASURES, *STRICT)
TRUTH = ("checkable_steps", "true_steps")
GRAY = (128, 128, 128)


@dataclass(frozen=True)
class EvaluationOptions:
    """How questions are asked and answers judged.

    Args:
        match: by which metric an answer is right, where the question names none.
        seed: of the sampled answers.
        temperature: of the sampled answers.
        blank: show a uniformly gray image of the same size instead of each image.
        batch_size: questions that are sampled together; the scores do not depend on it.
        max_image_pixels: larger images cannot be used.
        images_per_item: most images of a question; of a clip, so many frames are shown.
        frame_rate: frames of a clip that are shown for each second; None: as many as may be.
    """

    match: Match = "exact"
    seed: int = 0
    temperature: float = 1.0
    blank: bool = False
    batch_size: int = 64
    max_image_pixels: int = MAX_PIXELS
    images_per_item: int = Limits().images
    frame_rate: float | None = None

    @property
    def limits(self) -> Limits:
        return Limits(self.max_image_pixels, self.images_per_item, self.frame_rate)


@dataclass(frozen=True)
class Scores:
    """How one model did on Q questions: arrays [Q].

    `image` is the number of the image that a question is about. `measures` lie in [0, 1], both those judged as the
    benchmark would and the strict ones; `answer_entropy` is in nats. `greedy_well_formed` is 1 where the greedy text
    could be read. `distinct_solutions` is the number of different texts among the sampled trajectories of a question,
    as a share of them; case and spacing make no difference. The others are means over these trajectories: the share
    that could be read (`well_formed`), their `tokens`, and how many of their reasoning steps can be checked
    (`checkable_steps`) and are true (`true_steps`). The last two are None unless every question has a picture;
    unreadable trajectories count for nothing in them.
    """

    measures: dict[str, NDArray[np.float64]]
    answer_entropy: NDArray[np.float64]
    greedy_well_formed: NDArray[np.float64]
    well_formed: NDArray[np.float64]
    tokens: NDArray[np.float64]
    distinct_solutions: NDArray[np.float64]
    greedy_texts: tuple[str, ...]
    image: NDArray[np.int64]
    checkable_steps: NDArray[np.float64] | None = None
    true_steps: NDArray[np.float64] | None = None

    @property
    def step_truth(self) -> float | None:
        """Share of the checkable reasoning steps that are true; None where there are none."""
        if self.checkable_steps is None or self.true_steps is None or not self.checkable_steps.any():
            return None
        return float(self.true_steps.sum() / self.checkable_steps.sum())

    def of_readable(self, measure: str) -> float | None:
        """Accuracy among the texts that could be read, by a measure in `READABLE`; None if there are none."""
        readable = getattr(self, READABLE[measure])
        return float(self.measures[measure].sum() / readable.sum()) if readable.any() else None

    def summary(self) -> dict[str, Any]:
        """Every measure with its 95 % interval, ready for JSON; how many questions and images it is measured on."""
        return {
            "questions": len(self.greedy_texts),
            "images": len(np.unique(self.image)),
            **{
                name: dict(zip(("mean", "low", "high"), share_interval(values, self.image), strict=True))
                for name, values in self.measures.items()
            },
            **{f"{measure}_of_readable": self.of_readable(measure) for measure in READABLE},
            "answer_entropy": float(self.answer_entropy.mean()),
            "greedy_well_formed": float(self.greedy_well_formed.mean()),
            "well_formed": float(self.well_formed.mean()),
            "tokens": float(self.tokens.mean()),
            "checkable_steps": None if self.checkable_steps is None else float(self.checkable_steps.mean()),
            "step_truth": self.step_truth,
        }

    def per_question(self) -> dict[str, list[Any]]:
        """Every value of every question, by name, ready for JSON; without reasoning steps that nobody could check."""
        columns = {name: values for name, values in vars(self).items() if isinstance(values, np.ndarray)}
        found = {name: values.tolist() for name, values in {**self.measures, **columns}.items()}
        return {**found, "greedy_texts": list(self.greedy_texts)}

    @classmethod
    def of_questions(cls, columns: Mapping[str, Any]) -> Scores:
        """The inverse of `per_question`. Raises `KeyError`, `TypeError` or `ValueError` for anything else."""
        arrays = {
            name: np.array(values, dtype=np.float64) for name, values in columns.items() if name != "greedy_texts"
        }
        texts, image = tuple(map(str, columns["greedy_texts"])), arrays.pop("image").astype(np.int64)
        if any(values.shape != (len(texts),) for values in (image, *arrays.values())):
            raise ValueError("columns of different lengths")
        return cls({name: arrays.pop(name) for name in ACCURACIES}, greedy_texts=texts, image=image, **arrays)


def evaluate(
    policy: Policy,
    questions: Sequence[LabelledQuestion],
    role: Role | None,
    sampling: SamplingOptions,
    options: EvaluationOptions | None = None,
    *,
    truth: StepTruth | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    stop_asked: Callable[[], bool] = lambda: False,
    processes: Processes = ALONE,
    engine: Engine | None = None,
) -> Scores:
    """Measure greedy, mean@1, maj@5 and pass@5 accuracy, and what the samples are like.

    An unreadable or truncated answer is wrong. Others are judged by the metric of the question, or else of the options,
    and strictly besides: then only what has the key of the first accepted answer is right. maj@5 is the value of the
    majority answer, as the first sample with it words it.

    Sampling is seeded by (seed, question number), so that two models are compared under the same random numbers.

    Args:
        policy: the model.
        questions: what it is asked.
        role: whose adapter is measured; None: the backbone alone.
        sampling: the solver's prompt, the form of its text and its longest completion.
        options: how it is asked.
        truth: says whether a reasoning step about a question is true; None: steps are not checked.
        on_progress: called with the number of questions done and their total.
        stop_asked: tells before each batch whether to leave the evaluation.
        processes: the processes that share the questions; all of them get all scores.
        engine: who samples; None: the live policy.

    Raises:
        ImageError: a labelled image that cannot be decoded.
        ModelError: a question about several images, of which the model cannot be shown more than one.
        Stopped: it was asked to stop, in one process at least.
    """
    options = options or EvaluationOptions()
    engine = engine or LiveEngine(policy)
    image = numbered(question.image for question in questions)
    if any(isinstance(question.image, ItemFiles) for question in questions):
        check_several(policy.processor, policy.backbone.config.model_type)
    # Questions about one image are asked together, and by one process as far as equal shares allow: what they have in
    # common is then run once.
    own = np.array_split(image.argsort(kind="stable"), processes.count)[processes.index].tolist()
    found: list[tuple[int, dict[str, float], str]] = []
    for first in range(0, math.ceil(len(questions) / processes.count), options.batch_size):
        if processes.any(stop_asked()):  # all processes do equally many batches, so that they stop at the same one
            raise Stopped
        numbers = own[first : first + options.batch_size]
        batch = [questions[i] for i in numbers]
        # Several questions may be about one image.
        images = {q.image: load_view(q.image, options.limits) for q in batch}
        if options.blank:
            images = dict(zip(images, blanked([*images.values()]), strict=True))
        encoded = dict(zip(images, encode_images(policy, [*images.values()]), strict=True))
        requests = [
            Request(
                encoded[q.image],
                solver_messages(sampling.solver_prompt, q.question, encoded[q.image].shown),
                (options.seed, i),
            )
            for q, i in zip(batch, numbers, strict=True)
        ]
        # The greedy reply is drawn with the samples, so that prompts are read once and there is one decoding. It comes
        # last: the random numbers of a sample are those of its place.
        heats = [*[options.temperature] * SAMPLES, 0.0]
        longest = sampling.max_solution_tokens
        drawn = engine.sample(requests, role, n=len(heats), max_tokens=longest, temperature=heats)
        for i, question, request, (*group, single) in zip(numbers, batch, requests, drawn, strict=True):
            read = [
                parse_trajectory(c.text, c.finish_reason, sampling.solution_form, request.prompt)
                for c in (single, *group)
            ]
            row = _score(question, read, options.match, truth)
            row["tokens"] = float(np.mean([len(c.token_ids) for c in group]))
            row["distinct_solutions"] = len({" ".join(c.text.lower().split()) for c in group}) / len(group)
            found.append((i, row, single.text))
        on_progress(min((first + options.batch_size) * processes.count, len(questions)), len(questions))
    _, rows, texts = zip(*sorted(processes.gather(found, len(questions)), key=itemgetter(0)), strict=True)
    names = rows[0].keys() if all(row.keys() == rows[0].keys() for row in rows) else rows[0].keys() - TRUTH
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in names}
    return Scores({name: columns.pop(name) for name in ACCURACIES}, greedy_texts=texts, image=image, **columns)


def blanked(images: Sequence[View]) -> list[View]:
    """A uniformly gray image of the same size instead of each image. Images of one size get one and the same, which is
    then encoded once."""
    gray = {image.size: filled(image, GRAY) for image in images}
    return [gray[image.size] for image in images]


def _score(
    question: LabelledQuestion, solutions: Sequence[Solution], match: Match, truth: StepTruth | None
) -> dict[str, float]:
    """The values of one question by name, from what was read in its greedy completion and in its samples."""
    asked = question.question
    best, *read = solutions
    answers = [s.answer for s in solutions]
    keys = [None if answer is None else answer_key(answer, asked) for answer in answers]
    true_key, vote = answer_key(question.answer, asked), majority(keys[1:])
    values = [0.0 if answer is None else judged(question, match, answer) for answer in answers]
    strict = [float(key is not None and key == true_key) for key in keys]
    row = dict(zip(ACCURACIES, (*_accuracies(values, vote), *_accuracies(strict, vote)), strict=True))
    row |= {"answer_entropy": vote.entropy, "greedy_well_formed": float(best.well_formed)}
    row |= {"well_formed": float(np.mean([s.well_formed for s in read]))}
    if question.picture is not None and truth is not None:
        verdicts = [truth(question.picture, step) for s in read if s.well_formed for step in s.reasoning_steps]
        counts = (sum(v is not None for v in verdicts), sum(v is True for v in verdicts))
        row |= {name: count / len(read) for name, count in zip(TRUTH, counts, strict=True)}
    return row


def _accuracies(values: Sequence[float], vote: Vote) -> tuple[float, float, float, float]:
    """The MEASURES of one question from the values of its greedy answer and of the sampled ones, which voted."""
    greedy, *drawn = values
    return greedy, float(np.mean(drawn)), drawn[vote.members[0]] if vote.members else 0.0, max(drawn)


def compare(before: Scores, after: Scores) -> dict[str, dict[str, float]]:
    """Paired differences after − before on the same questions, by measure, as `paired_differences` gives them."""
    differences = {name: after.measures[name] - before.measures[name] for name in before.measures}
    return paired_differences(differences, before.image)
