"""Held-out accuracy with intervals, and the paired comparison of two models on the same questions.

Labels are read here and nowhere else but in the oracle recipe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ireasoner.answers import answer_key, majority
from ireasoner.config import load_config, resolve
from ireasoner.engines.transformers import TransformersEngine, uniforms
from ireasoner.images import load_image
from ireasoner.policy import Policy
from ireasoner.roles import parse_trajectory, solver_messages
from ireasoner.types import Completion, Role, UsageError

SAMPLES = 5
RESAMPLES = 10_000
MEASURES = ("greedy", "mean@1", f"maj@{SAMPLES}")


class DataError(UsageError):
    """A labelled data set cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class LabelledQuestion:
    """One held-out question; `image` is an absolute path."""

    image: Path
    question: str
    answer: str


@dataclass(frozen=True)
class Scores:
    """How one model did on Q questions. The measures run parallel to the questions and lie in [0, 1]."""

    measures: dict[str, NDArray[np.float64]]
    answer_entropy: NDArray[np.float64]
    well_formed: NDArray[np.float64]
    greedy_texts: tuple[str, ...]

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
        }


def load_questions(path: Path, limit: int | None = None) -> list[LabelledQuestion]:
    """Read JSONL lines of `image`, `question`, `answer`; image paths are relative to the file's own folder.

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
        found.append(LabelledQuestion(image, texts[1], str(texts[2])))
        if len(found) == limit:
            break
    if not found:
        raise DataError(f"{path} holds no questions")
    return found


def evaluate(
    policy: Policy,
    questions: Sequence[LabelledQuestion],
    role: Role | None,
    *,
    prompt: str,
    max_tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Greedy, mean@1 and maj@5 accuracy of a role (None: the backbone alone).

    An unreadable or truncated answer is wrong. Sampling is seeded by (seed, question number), so two models meet the
    same random numbers.

    Args:
        prompt: the solver's prompt, with {question}.
        max_tokens: longest completion.
        temperature: of the sampled answers.
        on_progress: called with questions done and their total.

    Raises:
        ImageError: a labelled image that cannot be decoded.
    """
    engine = TransformersEngine(policy)
    greedy, samples, majorities, entropies, formed, texts = [], [], [], [], [], []
    for first in range(0, len(questions), batch_size):
        batch = questions[first : first + batch_size]
        encoded = policy.encode_images([load_image(q.image) for q in batch])
        prompts = policy.prompts(encoded, [solver_messages(prompt, q.question) for q in batch])
        zeros = np.zeros((len(batch), 1, max_tokens))
        draws = uniforms([[seed, first + i] for i in range(len(batch))], SAMPLES, max_tokens)
        best = engine.sample(prompts, role, zeros, temperature=0)
        drawn = engine.sample(prompts, role, draws, temperature=temperature)
        for question, (single,), group in zip(batch, best, drawn, strict=True):
            truth = answer_key(question.answer, question.question)
            keys = [read_key(c, question.question) for c in group]
            vote = majority(keys)
            greedy.append(read_key(single, question.question) == truth)
            samples.append(np.mean([key == truth for key in keys]))
            majorities.append(vote.answer == truth)
            entropies.append(vote.entropy)
            formed.append(np.mean([key is not None for key in keys]))
            texts.append(single.text)
        on_progress(min(first + batch_size, len(questions)), len(questions))
    columns = [np.asarray(values, dtype=np.float64) for values in (greedy, samples, majorities)]
    return Scores(dict(zip(MEASURES, columns, strict=True)), np.array(entropies), np.array(formed), tuple(texts))


def read_key(completion: Completion, question: str) -> str | None:
    """The answer key of a solver's completion; None if it cannot be read."""
    answer = parse_trajectory(completion.text, completion.finish_reason).answer
    return None if answer is None else answer_key(answer, question)


def interval(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95 % percentile-bootstrap interval over questions."""
    means = _bootstrap_means(values, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def _bootstrap_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES)
    return weights @ values / len(values)


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


def evaluate_target(
    target: str,
    questions: Sequence[LabelledQuestion],
    *,
    preset: str | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    device: str = "auto",
) -> Scores:
    """Scores of a run directory (its trained solver, its own prompt and lengths) or of a plain model.

    Args:
        preset: for a plain model: where prompt and lengths come from; 'tiny' for the model 'tiny', else '7b'.

    Raises:
        ModelError, ConfigError: the target is neither, or the run is not finished.
    """
    run = Path(target)
    is_run = (run / "config.yaml").is_file()
    if is_run:
        config = load_config(run / "config.yaml")
        if not (run / "solver").is_dir():
            raise UsageError(f"{run} is not finished: continue it with: ireasoner train --resume {run}")
    else:
        flags = {"model": target, "images": ".", **({"preset": preset} if preset else {})}
        config = resolve(flags)
    policy = Policy.from_config(config.model_copy(update={"device": device}))
    if is_run:
        policy.load_adapters(run)
    return evaluate(
        policy,
        questions,
        "solver" if is_run else None,
        prompt=config.solver_prompt,
        max_tokens=config.max_solution_tokens,
        seed=seed,
        temperature=temperature,
    )
