"""Choosing one of a run's checkpoints by labelled questions, and judging it by other ones.

The best of several checkpoints looks better than it is on the questions that chose it, because they were also lucky
for it. So the questions are halved: one half chooses, and only the other half says how good the choice is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ireasoner.method.types import UsageError
from ireasoner.training.checkpoints import verify_checkpoint
from ireasoner.training.config import load_config
from ireasoner.training.evaluation import Scores
from ireasoner.training.labelled import LabelledQuestion

CHOSEN_BY = "mean@1"  # the mean over five answers a question, which is the least noisy of the accuracies

Score = Callable[[Path | None, Sequence[LabelledQuestion]], Scores]


@dataclass(frozen=True)
class Selection:
    """What was chosen, and how it does on questions that did not choose it.

    Args:
        choosing: the scores of the base (None) and of every checkpoint on the choosing half.
        chosen: the best of them by CHOSEN_BY; the earliest of equals, and None where none is better than the base.
        judging: the scores of the base, of the last checkpoint and of the chosen one on the judging half.
        questions: those of the judging half.
    """

    choosing: Mapping[Path | None, Scores]
    chosen: Path | None
    judging: Mapping[Path | None, Scores]
    questions: Sequence[LabelledQuestion]


def whole_checkpoints(run: Path, tell: Callable[[str], None]) -> list[Path]:
    """The checkpoints of a run in the order of their steps; of damaged ones, which are left out, `tell` is told.

    That of step 0 is the base, unless the run began with adapters, and is then left out as well.

    Raises:
        ConfigError: the run's config cannot be read.
        UsageError: there is no checkpoint, or they cannot be listed.
    """
    root, first = run / "checkpoints", 0 if load_config(run / "config.yaml").init_adapters else 1
    try:
        named = [path for path in root.iterdir() if re.fullmatch(r"step-\d+", path.name)]
        found = [path for path in named if int(path.name[5:]) >= first]
    except OSError:
        found = []
    whole = []
    for path in sorted(found, key=lambda path: int(path.name[5:])):
        if problem := verify_checkpoint(path):
            tell(f"{path} is left out: {problem}")
        elif (path / "solver").is_dir():
            whole.append(path)
    if not whole:
        raise UsageError(f"{run} is no run with checkpoints to choose from")
    return whole


def halves(questions: Sequence[LabelledQuestion]) -> tuple[list[LabelledQuestion], list[LabelledQuestion]]:
    """The questions about one half of the images and those about the other, always the same for the same questions.

    Raises:
        UsageError: all questions are about one image.
    """
    images = list(dict.fromkeys(question.image for question in questions))
    if len(images) < 2:
        raise UsageError("to choose by some questions and judge by others, they must be about two images at least")
    drawn = np.random.default_rng(0).permutation(len(images))[: len(images) // 2]
    choosing = {images[i] for i in drawn}
    return [q for q in questions if q.image in choosing], [q for q in questions if q.image not in choosing]


def select_checkpoint(checkpoints: Sequence[Path], questions: Sequence[LabelledQuestion], score: Score) -> Selection:
    """Choose the best of the checkpoints and the base on one half of the questions, and score it on the other half.

    Args:
        checkpoints: in the order of their steps.
        questions: about two images at least.
        score: scores a checkpoint, or the base (None), on questions.

    Raises:
        UsageError: all questions are about one image.
    """
    first, second = halves(questions)
    choosing = {candidate: score(candidate, first) for candidate in (None, *checkpoints)}
    chosen = max(choosing, key=lambda candidate: choosing[candidate].measures[CHOSEN_BY].mean())  # the first of equals
    judging = {candidate: score(candidate, second) for candidate in dict.fromkeys((None, checkpoints[-1], chosen))}
    return Selection(choosing, chosen, judging, second)
