"""The truth about the world's pictures, in the form in which the rest of the package takes it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ireasoner.method.types import UsageError
from ireasoner.playground import dataset, several


@dataclass(frozen=True)
class WorldTruth:
    """A `Truth` about items of which is known what they show, by name."""

    pictures: Mapping[str, several.Thing]

    def answer(self, image: str, question: str) -> str | None:
        """The true answer to a question in the world's own wording; None where it is not known."""
        picture = self.pictures.get(image)
        solved = several.solve(picture, question) if picture else None
        return solved.answer if solved else None

    def step(self, image: str, reasoning_step: str) -> bool | None:
        """Whether a reasoning step is true of its image; None where that is not known."""
        picture = self.pictures.get(image)
        return several.step_truth(picture, reasoning_step) if picture else None


def read_truth(path: Path) -> WorldTruth:
    """The truth in a file that the playground wrote.

    Raises:
        UsageError: it cannot be read, or is no such file.
    """
    return WorldTruth(dataset.read_pictures(path))


def truth_beside(images: str | Path, within: Path | None = None) -> WorldTruth:
    """The truth that the playground left beside a folder of images; empty where it left none.

    Args:
        images: the folder; where a config names something else, nothing lies beside it.
        within: a run directory, which may come from anywhere: the file is read only if it lies inside. In one that was
            copied or moved, a demo's pictures are found although the config still names the place where they were.
    """
    images = Path(images)
    for folder in (images,) if within is None else (images, within / "data" / images.name):
        # The folder's name is whatever a config says: it may have no name to derive the file's from, or be a loop of
        # links.
        with suppress(OSError, RuntimeError, ValueError, UsageError):
            path = dataset.truth_path(folder)
            inside = within is None or path.resolve().is_relative_to(within.resolve())
            if inside and path.is_file():  # a pipe would be waited for
                return read_truth(path)
    return WorldTruth({})


def step_truth(picture: Mapping[str, Any], reasoning_step: str) -> bool | None:
    """Whether a reasoning step is true of the picture in a labeled question's row; None where that is not known.

    Raises:
        ValueError: the world cannot draw such a picture.
    """
    return several.step_truth(several.from_record(picture), reasoning_step)
