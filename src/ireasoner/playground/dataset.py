"""The world as ordinary files: a folder of unlabeled images, and held-out labeled questions beside their images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ireasoner.method.types import UsageError
from ireasoner.playground import world

# Each split draws from a seed of its own, and so did the pre-training of the tiny model (tools/pretrain_tiny.py): with
# one seed for all, the model would be tested on the very pictures that it trained on.
SPLIT_SEEDS = {"unlabeled": 1, "validation": 2, "test": 3}


def write_unlabeled(
    folder: Path, count: int, style: str = "chalk", seed: int = 0, items: tuple[int, int] = (2, 4)
) -> Path:
    """Write `count` images and nothing about them; returns the folder.

    The truth about them goes beside the folder, to `truth_path(folder)`: it is for measurements, not for training.

    Raises:
        UsageError: the folder holds other files, which would be trained on too; images of these names are replaced.
    """
    names = [f"{index // 100:02d}/{index:05d}.png" for index in range(count)]
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("[!.]*") if path.is_file()}
    if others := sorted(held.difference(names)):
        raise UsageError(f"{folder} holds other files, such as {others[0]}: remove them, or choose another folder")
    rng = np.random.default_rng([SPLIT_SEEDS["unlabeled"], seed])
    rows = []
    for name in names:
        picture = world.sample_picture(rng, items=items)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        world.draw(picture, world.sample_style(style, rng), rng).save(folder / name)
        rows.append({"image": name, "picture": world.picture_record(picture)})
    write_rows(truth_path(folder), rows)
    return folder


def truth_path(folder: Path) -> Path:
    """Where `write_unlabeled` keeps the truth about a folder's images."""
    return folder.with_name(f"{folder.name}.truth.jsonl")


def load_truth(folder: Path) -> dict[str, world.Picture]:
    """The pictures behind a folder that `write_unlabeled` wrote, by image name; empty where nothing is known."""
    path = truth_path(folder)
    return read_pictures(path) if path.exists() else {}


def read_pictures(path: Path) -> dict[str, world.Picture]:
    """The pictures in a file that `write_unlabeled` left beside a folder, by image name.

    Raises:
        UsageError: it cannot be read, or is no such file.
    """
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
        return {row["image"]: world.picture_from_record(row["picture"]) for row in rows}
    except OSError as error:
        raise UsageError(f"cannot read the truth in {path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UsageError(f"{path} does not hold lines of image and picture, as the playground writes them") from None


def write_questions(
    folder: Path, count: int, style: str = "chalk", split: str = "test", seed: int = 0, items: tuple[int, int] = (2, 4)
) -> Path:
    """Write `count` questions, one for each image, families in turn; returns the JSONL file.

    Raises:
        KeyError: a split other than those of SPLIT_SEEDS.
    """
    rng = np.random.default_rng([SPLIT_SEEDS[split], seed])
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        picture = world.sample_picture(rng, world.FAMILIES[index % len(world.FAMILIES)], items)
        name = f"images/{index:05d}.png"
        world.draw(picture, world.sample_style(style, rng), rng).save(folder / name)
        question = world.sample_question(picture, rng)
        row = {"image": name, "question": question.text, "answer": question.answer}
        rows.append({**row, "picture": world.picture_record(picture)})
    path = folder / f"{split}.jsonl"
    write_rows(path, rows)
    return path


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write JSONL, one object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
