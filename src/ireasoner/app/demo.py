"""The commands that draw the embedded world: `demo` and `playground`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ireasoner.app.options import WHOLE, Count, OutFolder, Seed, Split, Style
from ireasoner.method.types import UsageError


def demo(
    *,
    out: OutFolder = Path("runs/demo"),
    recipe: str = "default",
    style: Style = "chalk",
    seed: Seed = 0,
    steps: Annotated[Count | None, Parameter(alias="--max-steps")] = None,
) -> int:
    """Write a folder of unlabeled pictures, self-evolve the tiny model that ships here on it, and show its accuracy on
    held-out questions before and after.

    Args:
        out: The run directory to write.
        recipe: Name of a recipe, or a YAML file.
        style: How the pictures are drawn.
        seed: Seed of training.
        steps: Training steps (as many as the preset says).
    """
    from ireasoner.app.display import as_progress
    from ireasoner.app.train import follow
    from ireasoner.playground import dataset
    from ireasoner.training import config as configs

    data = out / "data"
    drawn_as = data / "style"
    flags = {
        "images": str((data / "unlabeled").absolute()),
        "eval_data": str((data / "test" / "test.jsonl").absolute()),
        "eval_questions": 512,
        "model": "tiny",
        "recipe": recipe,
        "seed": seed,
        **({"steps": steps} if steps else {}),
    }
    config = configs.resolve(flags)
    if (out / "config.yaml").exists():
        differing = configs.conflicts(configs.load_config(out / "config.yaml"), flags)
        drawn = drawn_as.read_text("utf-8") if drawn_as.is_file() else style
        if drawn != style:
            differing.append(f"--style is {drawn[:20]!r} in the run, not {style!r}")
        if differing:
            problem = f"{out} holds a run with other options ({'; '.join(differing)})"
            raise UsageError(f"{problem}: choose another --out")
        finished = (out / "summary.json").exists()
        state = ", finished: choose another --out for a new one" if finished else ": going on"
        with as_progress():
            print(f"{out} holds this run{state}.")
        return follow(config, out, resuming=True)
    with as_progress():
        print(f"Drawing 512 pictures into {data}/unlabeled and 512 others, a held-out question each, into {data}/test.")
    try:
        dataset.write_unlabeled(data / "unlabeled", 512, style)
        dataset.write_questions(data / "test", 512, style)
        drawn_as.write_text(style, "utf-8")
    except OSError as error:
        raise UsageError(f"cannot write to {data}: {error.strerror}") from None
    return follow(config, out, resuming=False)


def playground(
    out: Path,
    /,
    *,
    style: Style = "chalk",
    images: Count = 512,
    questions: Count = 512,
    split: Split = "test",
    items: Annotated[tuple[int, int], WHOLE] = (2, 4),
    seed: Seed = 0,
    kind: Literal["pictures", "pairs", "clips"] = "pictures",
    labels: bool = False,
) -> int:
    """Write unlabeled pictures (OUT/unlabeled) and held-out questions (OUT/SPLIT) of the embedded world; or pairs of
    pictures to compare (for train --items folders), or clips of a shape that moves (for train --items clips).

    Args:
        out: Folder to write.
        style: How the pictures are drawn.
        images: Unlabeled pictures.
        questions: Labelled questions.
        split: Which split the questions are of.
        items: Fewest and most items in a picture.
        seed: Seed of the pictures.
        kind: Pictures, pairs of them, or clips.
        labels: Also write true answers about the unlabeled pictures (OUT/labels.jsonl, for train --labels).
    """
    from ireasoner.playground import dataset

    if not 2 <= items[0] <= items[1] <= 6:
        raise UsageError("--items takes LEAST and MOST between 2 and 6, FIRST not above LAST")
    try:
        unlabeled = out / "unlabeled"
        dataset.write_unlabeled(unlabeled, images, style, seed, items, kind)
        folder = out / split
        path = dataset.write_questions(folder, questions, style, split, seed, items, kind)
        about = f"   about them: {dataset.write_labels(unlabeled, kind)}" if labels else ""
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror}") from None
    print(f"Unlabeled pictures: {unlabeled}{about}   labelled questions: {path}")
    return 0
