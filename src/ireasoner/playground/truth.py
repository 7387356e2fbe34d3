"""What the world knows of its own pictures, in the form in which the rest of the package takes it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ireasoner.method.types import UsageError
from ireasoner.playground import dataset, world


class WorldTruth:
    """A `Truth` about images by name.

    Args:
        pictures: what each image shows.
    """

    def __init__(self, pictures: Mapping[str, world.Picture]) -> None:
        self.pictures = pictures

    def answer(self, image: str, question: str) -> str | None:
        """The true answer to a question in the world's own wording; None where it is not known."""
        with suppress(KeyError, ValueError, TypeError):  # a picture that no world drew
            picture = self.pictures.get(image)
            solved = world.solve(picture, question) if picture else None
            return solved.answer if solved else None

    def step(self, image: str, reasoning_step: str) -> bool | None:
        """Whether a reasoning step is true of its image; None where that is not known."""
        with suppress(KeyError, ValueError, TypeError):
            picture = self.pictures.get(image)
            return world.step_truth(picture, reasoning_step) if picture else None


def read_truth(path: Path) -> WorldTruth:
    """The truth in a file that the playground wrote.

    Raises:
        UsageError: it cannot be read, or is no such file.
    """
    try:
        return WorldTruth(dataset.read_truth(path))
    except OSError as error:
        raise UsageError(f"cannot read the truth in {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{path} does not hold lines of image and picture, as playground writes them") from None


def truth_beside(images: Path, within: Path | None = None) -> WorldTruth:
    """What the playground left beside a folder of images; nothing is known where it left nothing.

    Args:
        images: the folder.
        within: a run directory, which may come from anywhere: what it names is followed no further than itself.
    """
    with suppress(OSError, RuntimeError, ValueError, KeyError, TypeError):
        path = dataset.truth_path(images)
        inside = within is None or path.resolve().is_relative_to(within.resolve())
        if inside and path.is_file():
            return WorldTruth(dataset.read_truth(path))
    return WorldTruth({})


def step_truth(picture: Mapping[str, Any], reasoning_step: str) -> bool | None:
    """Whether a reasoning step is true of the picture in a labelled question's row; None where that is not known.

    Raises:
        KeyError, TypeError, ValueError: an object that no world wrote.
    """
    return world.step_truth(world.picture_from_record(picture), reasoning_step)
