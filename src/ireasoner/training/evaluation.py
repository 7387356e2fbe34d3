"""Held-out accuracy with intervals, how much of it needs the image, and paired comparisons on the same questions.

Labels are read here and nowhere else but in the oracle recipe.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ireasoner.method.answers import answer_key, majority
from ireasoner.method.texts import parse_trajectory, solver_messages
from ireasoner.method.types import Completion, Form, Role, UsageError
from ireasoner.model.inputs import encode_images
from ireasoner.model.loading import load_policy
from ireasoner.model.parallel import Processes
from ireasoner.model.policy import Policy
from ireasoner.rollouts.engine import Engine, Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training.checkpoints import verify_checkpoint
from ireasoner.training.config import SamplingOptions, load_config, resolve
from ireasoner.training.items import load_image
from ireasoner.training.statistics import RESAMPLES, interval

SAMPLES = 5
MEASURES = ("greedy", "mean@1", f"maj@{SAMPLES}", f"pass@{SAMPLES}")
TRUTH = ("checkable_steps", "true_steps")
GRAY = (128, 128, 128)


StepTruth = Callable[[Mapping[str, Any], str], bool | None]  # of a question's `picture` and a reasoning step


class DataError(UsageError):
    """A labelled data set cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class LabelledQuestion:
    """One held-out question; `image` is an absolute path, `picture` what whoever drew the image says of it."""

    image: Path
    question: str
    answer: str
    picture: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Scores:
    """How one model did on Q questions; every array runs parallel to them.

    `measures` lie in [0, 1]. The others are means over a question's sampled trajectories: the readable share, tokens,
    and how many reasoning steps can be checked against the picture and are true of it; None unless every question has
    its picture. Steps of unreadable trajectories do not count.
    """

    measures: dict[str, NDArray[np.float64]]
    answer_entropy: NDArray[np.float64]
    well_formed: NDArray[np.float64]
    tokens: NDArray[np.float64]
    greedy_texts: tuple[str, ...]
    checkable_steps: NDArray[np.float64] | None = None
    true_steps: NDArray[np.float64] | None = None

    @property
    def step_truth(self) -> float | None:
        """Share of the checkable reasoning steps that are true; None where there are none."""
        if self.checkable_steps is None or self.true_steps is None or not self.checkable_steps.any():
            return None
        return float(self.true_steps.sum() / self.checkable_steps.sum())

    def summary(self) -> dict[str, Any]:
        """Every measure with its 95 % interval over questions, ready for JSON."""
        return {
            "questions": len(self.greedy_texts),
            **{
                name: dict(zip(("mean", "low", "high"), interval(values), strict=True))
                for name, values in self.measures.items()
            },
            "answer_entropy": float(self.answer_entropy.mean()),
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


def load_questions(path: Path, limit: int | None = None, truth: StepTruth | None = None) -> list[LabelledQuestion]:
    """Read JSONL lines of `image`, `question`, `answer`; image paths are relative to the file's own folder.

    An object in `picture` is what whoever drew the image says of it; `truth`, if given, must be able to read it. Other
    keys are passed over.

    Raises:
        DataError: a missing file, a line that is not such an object, or an image that is not there.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} leaves no question of {path}")
    found = []
    try:
        lines = path.read_text("utf-8").split("\n")  # splitlines would also break at U+2028, which JSON allows
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            texts = [row[name] for name in ("image", "question", "answer")]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f"{where}: needs an object with image, question and answer") from None
        if not all(isinstance(text, str) for text in texts[:2]) or not isinstance(texts[2], str | int | float):
            raise DataError(f"{where}: image and question must be text, answer text or a number")
        if special := re.search(r"<\|\w+\|>", texts[1]):
            raise DataError(f"{where}: the question holds the special token {special[0]}")
        try:
            image = (path.parent / texts[0]).resolve()
            if not image.is_file():
                raise ValueError
        except (OSError, ValueError):
            raise DataError(f"{where}: no image {texts[0][:100]!r}") from None
        picture = row.get("picture")
        if truth is not None and isinstance(picture, dict):
            try:
                truth(picture, "")
            except (KeyError, TypeError, ValueError):
                raise DataError(f"{where}: an object in picture must be a record of the embedded world") from None
        found.append(LabelledQuestion(image, texts[1], str(texts[2]), picture if isinstance(picture, dict) else None))
        if len(found) == limit:
            break
    if not found:
        raise DataError(f"{path} holds no questions")
    return found


def evaluate(
    policy: Policy,
    questions: Sequence[LabelledQuestion],
    role: Role | None,
    sampling: SamplingOptions,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 64,
    blank: bool = False,
    truth: StepTruth | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    processes: Processes | None = None,
    engine: Engine | None = None,
) -> Scores:
    """Greedy, mean@1, maj@5 and pass@5 accuracy of a role (None: the backbone alone), and what its samples are like.

    An unreadable or truncated answer is wrong. Sampling is seeded by (seed, question number), so two models meet the
    same random numbers.

    Args:
        sampling: the solver's prompt, the form of its text and its longest completion.
        temperature: of the sampled answers.
        blank: show a uniformly gray image of the same size instead of each image.
        truth: says whether a reasoning step about a question is true; None: steps are not checked.
        on_progress: called with questions done and their total.
        processes: who scores along, each its share of the questions; all have the scores.
        engine: who samples; None: the live policy.

    Raises:
        ImageError: a labelled image that cannot be decoded.
    """
    engine = engine or LiveEngine(policy)
    processes = processes or Processes()
    own = processes.share(len(questions))
    found: list[tuple[dict[str, float], str]] = []
    for first in range(0, len(own), batch_size):
        numbers = own[first : first + batch_size]
        batch = [questions[i] for i in numbers]
        images = [load_image(q.image) for q in batch]
        encoded = encode_images(policy, [Image.new("RGB", image.size, GRAY) for image in images] if blank else images)
        requests = [
            Request(image, solver_messages(sampling.solver_prompt, q.question), (seed, i))
            for image, q, i in zip(encoded, batch, numbers, strict=True)
        ]
        longest = sampling.max_solution_tokens
        best = engine.sample(requests, role, max_tokens=longest, temperature=0)
        drawn = engine.sample(requests, role, n=SAMPLES, max_tokens=longest, temperature=temperature)
        for question, (single,), group in zip(batch, best, drawn, strict=True):
            found.append((_score(question, single, group, sampling.solution_form, truth), single.text))
        on_progress(min((first + batch_size) * processes.count, len(questions)), len(questions))
    rows, texts = zip(*processes.gather(found, len(questions)), strict=True)
    names = rows[0].keys() if all(row.keys() == rows[0].keys() for row in rows) else rows[0].keys() - TRUTH
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in names}
    return Scores({name: columns.pop(name) for name in MEASURES}, greedy_texts=texts, **columns)


def _score(
    question: LabelledQuestion, single: Completion, group: Sequence[Completion], form: Form, truth: StepTruth | None
) -> dict[str, float]:
    """One question's row: what the greedy completion and the samples are worth."""
    true_key = answer_key(question.answer, question.question)
    best, *read = (parse_trajectory(c.text, c.finish_reason, form) for c in (single, *group))
    greedy, *keys = (None if s.answer is None else answer_key(s.answer, question.question) for s in (best, *read))
    vote, right = majority(keys), [key == true_key for key in keys]
    values = (greedy == true_key, np.mean(right), vote.answer == true_key, any(right))
    row = {name: float(value) for name, value in zip(MEASURES, values, strict=True)}
    row |= {"answer_entropy": vote.entropy, "well_formed": float(np.mean([s.well_formed for s in read]))}
    row |= {"tokens": float(np.mean([len(c.token_ids) for c in group]))}
    if question.picture is not None and truth is not None:
        verdicts = [truth(question.picture, step) for s in read if s.well_formed for step in s.reasoning_steps]
        counts = (sum(v is not None for v in verdicts), sum(v is True for v in verdicts))
        row |= {name: count / len(group) for name, count in zip(TRUTH, counts, strict=True)}
    return row


def compare(before: Scores, after: Scores) -> dict[str, dict[str, float]]:
    """Paired differences after − before on the same questions, by measure.

    Each has a 95 % bootstrap interval over questions and a two-sided sign-flip p-value (chance of a mean difference at
    least as large if before and after were exchangeable question by question).
    """
    found = {}
    for name in MEASURES:
        difference = after.measures[name] - before.measures[name]
        mean, low, high = interval(difference)
        signs = np.random.default_rng(0).choice(np.array([-1.0, 1.0]), size=(RESAMPLES, len(difference)))
        extreme = np.abs(signs @ difference / len(difference)) >= abs(mean) - 1e-12
        found[name] = {"mean": mean, "low": low, "high": high, "p": float((extreme.sum() + 1) / (RESAMPLES + 1))}
    return found


def answer_prior(questions: Sequence[LabelledQuestion]) -> dict[str, float]:
    """Accuracy of always giving the most frequent answer: to all questions, or to those with the same first two words.

    It reads the labels that it is measured on: an upper bound for whoever guesses by such a rule without looking.
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


def evaluate_target(
    target: str,
    questions: Sequence[LabelledQuestion],
    *,
    preset: str | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    blank: bool = False,
    truth: StepTruth | None = None,
) -> Scores:
    """Scores of a finished run, of a checkpoint of any run (`RUN/checkpoints/step-000040`), or of a plain model.

    Of a run it is the trained solver, under the run's own prompt and length.

    Args:
        preset: for a plain model: where prompt and lengths come from; 'tiny' for the model 'tiny', else '7b'.
        blank: gray images instead of the true ones.

    Raises:
        ModelError, ConfigError: the target is none of these.
        UsageError: the run is not finished, or the checkpoint is damaged.
    """
    adapters = Path(target)
    is_checkpoint = re.fullmatch(r"step-\d+", adapters.name) is not None
    run = adapters.resolve().parent.parent if is_checkpoint else adapters
    is_run = (run / "config.yaml").is_file()
    if is_run:
        config = load_config(run / "config.yaml")
        if is_checkpoint and (problem := verify_checkpoint(adapters)):
            held = ", ".join(sorted(path.name for path in adapters.resolve().parent.glob("step-*")))
            raise UsageError(f"the checkpoint {adapters} cannot be used: {problem}; there are {held}")
        if not (adapters / "solver").is_dir():
            raise UsageError(
                f"{run} is not finished: score one of its checkpoints, or go on: ireasoner train --resume {run}"
            )
    else:
        flags = {"model": target, "images": ".", **({"preset": preset} if preset else {})}
        config = resolve(flags)
    policy = load_policy(config.model, config.backbone, device=device, seed=config.seed)
    if is_run:
        policy.load_adapters(adapters)
    role: Role | None = "solver" if is_run else None
    return evaluate(
        policy, questions, role, config.sampling, seed=seed, temperature=temperature, blank=blank, truth=truth
    )
