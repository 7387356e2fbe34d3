"""The world as ordinary files: a folder of unlabeled images, and held-out labeled questions beside their images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ireasoner.method.types import UsageError
from ireasoner.playground import several, world

# Each split draws from a seed of its own, and so did the pre-training of the tiny model (tools/pretrain_tiny.py): with
# one seed for all, the model would be tested on the very pictures that it trained on.
SPLIT_SEEDS = {"unlabeled": 1, "validation": 2, "test": 3}


def write_unlabeled(
    folder: Path,
    count: int,
    style: str = "chalk",
    seed: int = 0,
    items: tuple[int, int] = (2, 4),
    kind: several.Kind = "pictures",
) -> Path:
    """Write `count` images, pairs of images or clips, and nothing about them; returns the folder.

    A pair, and a clip, is a subfolder. The truth about them goes beside the folder, to `truth_path(folder)`: it is for
    measurements, not for training.

    Raises:
        UsageError: the folder holds other files, which would be trained on too; images of these names are replaced.
    """
    names = [f"{index // 100:02d}/{index:05d}" for index in range(count)]
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("[!.]*") if path.is_file()}
    if others := sorted(held.difference(file for name in names for file in _files(name, kind))):
        raise UsageError(f"{folder} holds other files, such as {others[0]}: remove them, or choose another folder")
    rng = np.random.default_rng([SPLIT_SEEDS["unlabeled"], seed])
    rows = []
    for name in names:
        thing = several.sample(kind, rng, None, items)
        files = _write_item(folder, name, kind, several.draw(thing, world.sample_style(style, rng), rng))
        rows.append({"image": files[0] if kind == "pictures" else name, "picture": several.record(thing)})
    write_rows(truth_path(folder), rows)
    return folder


def write_labels(folder: Path, kind: several.Kind = "pictures", questions: int = 4) -> Path:
    """Write true answers to so many questions about each item of a folder that `write_unlabeled` wrote, for `train
    --labels`; returns the JSONL file `labels.jsonl`, beside the folder."""
    rng, rows = np.random.default_rng(0), list[dict[str, object]]()
    for name, thing in load_truth(folder).items():
        for question in (several.sample_question(thing, rng) for _ in range(questions)):
            shown = _shown(f"{folder.name}/{name.removesuffix('.png')}", kind)
            rows.append({**shown, "question": question.text, "answer": question.answer})
    path = folder.with_name("labels.jsonl")
    write_rows(path, rows)
    return path


def _files(name: str, kind: several.Kind) -> list[str]:
    """The files of an item of this name: one, two, or the frames of a clip."""
    counts = {"pairs": 2, "clips": several.FRAMES}
    return [f"{name}/{k}.png" for k in range(counts[kind])] if kind in counts else [f"{name}.png"]


def _shown(name: str, kind: several.Kind) -> dict[str, object]:
    """How a row of labelled questions names an item of this name."""
    if kind == "clips":
        return {"clip": name}
    files = _files(name, kind)
    return {"images": files} if kind == "pairs" else {"image": files[0]}


def _write_item(folder: Path, name: str, kind: several.Kind, images: Iterable[Image.Image]) -> list[str]:
    """Write the images of an item; returns the names of its files below the folder."""
    files = _files(name, kind)
    (folder / files[0]).parent.mkdir(parents=True, exist_ok=True)
    for file, image in zip(files, images, strict=True):
        image.save(folder / file)
    return files


def truth_path(folder: Path) -> Path:
    """Where `write_unlabeled` keeps the truth about a folder's images."""
    return folder.with_name(f"{folder.name}.truth.jsonl")


def load_truth(folder: Path) -> dict[str, several.Thing]:
    """What the items of a folder show that `write_unlabeled` wrote, by name; empty where nothing is known."""
    path = truth_path(folder)
    return read_pictures(path) if path.exists() else {}


def read_pictures(path: Path) -> dict[str, several.Thing]:
    """What is told in a file that `write_unlabeled` left beside a folder, by the names of the items.

    Raises:
        UsageError: it cannot be read, or is no such file.
    """
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
        return {row["image"]: several.from_record(row["picture"]) for row in rows}
    except OSError as error:
        raise UsageError(f"cannot read the truth in {path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UsageError(f"{path} does not hold lines of image and picture, as the playground writes them") from None


def write_questions(
    folder: Path,
    count: int,
    style: str = "chalk",
    split: str = "test",
    seed: int = 0,
    items: tuple[int, int] = (2, 4),
    kind: several.Kind = "pictures",
) -> Path:
    """Write `count` questions, one for each image, pair or clip, families in turn; returns the JSONL file.

    Raises:
        KeyError: a split other than those of SPLIT_SEEDS.
    """
    rng = np.random.default_rng([SPLIT_SEEDS[split], seed])
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for index in range(count):
        thing = several.sample(kind, rng, world.FAMILIES[index % len(world.FAMILIES)], items)
        name = f"images/{index:05d}"
        _write_item(folder, name, kind, several.draw(thing, world.sample_style(style, rng), rng))
        question = several.sample_question(thing, rng)
        shown = _shown(name, kind)
        rows.append({**shown, "question": question.text, "answer": question.answer, "picture": several.record(thing)})
    path = folder / f"{split}.jsonl"
    write_rows(path, rows)
    return path


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write JSONL, one object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
