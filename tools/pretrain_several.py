"""How the second tiny model was made, which also sees two pictures beside each other and short clips.

`python tools/pretrain_several.py OUT` goes on from the tiny model in the package, with pairs and clips beside single
pictures: first what is true of them, then bad habits beside the good one, in the same words, as `pretrain_tiny` does it
for single pictures.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import pretrain_tiny
from ireasoner.model.backbone import load_backbone
from ireasoner.playground import several, world
from ireasoner.playground.several import Motion, Pair, Thing
from pretrain_tiny import (
    DESCRIBE_PROMPT,
    MISREAD_SHARE,
    PRETRAINING_SEED,
    PROPOSER_PROMPT,
    SOLVER_PROMPT,
    Example,
    build_model,
    build_processor,
    build_tokenizer,
    example,
    misread,
    proposer_text,
    save,
    solution_text,
    train_stage,
)

RATIONALES = pretrain_tiny.RATIONALES | {
    "more": "Count in both images and compare.", "total": "Count in both images and add.",
    "same": "Compare both images.", "sum": "Read two values and add.", "color": "Read two values and compare.",
    "way": "Compare the first and the last frame.", "goes": "Compare the first and the last frame.",
    "start": "Look at the first frame.", "end": "Look at the last frame.", "what": "Find what moves.",
}  # fmt: skip
ITEMS = (2, 3)  # things in each picture of a pair: with four, solutions would be as long as a page
CARE = 0.45  # share of the solutions of the last stage that are about the item itself
SHARES = {"pairs": 0.35, "clips": 0.4}  # of the examples; the others are single pictures
# Batches of 24, learning rate and mixture of each stage.
STAGES: dict[str, tuple[int, float, dict[str, Any]]] = {
    "compare": (1500, 1e-3, {"describe": 0.3}),
    "habits": (400, 6e-4, {"describe": 0.2, "habits": True}),
}


def with_habit(question: world.WorldQuestion, thing: Pair | Motion, rng: np.random.Generator) -> world.WorldQuestion:
    """The question with the reasoning and the answer of a habit: about the item, about the item as it is always
    misread, or about another one."""
    if rng.random() < CARE:
        return question
    if rng.random() < MISREAD_SHARE and (seen := several.solve(misread_several(thing), question.text)):
        return seen
    for _ in range(60):
        if seen := several.solve(_another(thing, rng), question.text):
            return seen
    return question


def misread_several(thing: Pair | Motion) -> Thing:
    """The item as it is misread, in the same way every time: both pictures of a pair, and a clip as if backwards."""
    if isinstance(thing, Pair):
        return Pair(misread(thing.first), misread(thing.second))
    back = {"left": "right", "right": "left", "up": "down", "down": "up"}[thing.way]
    return replace(thing, way=back, start=thing.end, end=thing.start)


def _another(thing: Pair | Motion, rng: np.random.Generator) -> Thing:
    """Another item of the same family; a clip in which the same two things move otherwise, or the other one does."""
    if isinstance(thing, Pair):
        return several.sample("pairs", rng, thing.first.family, ITEMS)
    other = several.sample("clips", rng, None, ITEMS)
    assert isinstance(other, Motion)
    names = (thing.color, thing.shape), thing.still[:2]
    (color, shape), still = names if rng.random() < 0.7 else names[::-1]
    return replace(other, color=color, shape=shape, still=(*still, other.still[2]))


def several_example(rng: np.random.Generator, describe: float, habits: bool = False) -> Example:
    """Draw one labeled example, about a single picture, a pair or a clip. The arguments are those of `example`."""
    draw = rng.random()
    if draw >= sum(SHARES.values()):
        return example(rng, describe=0.25, habits=habits)
    thing = several.sample("pairs" if draw < SHARES["pairs"] else "clips", rng, None, ITEMS)
    assert isinstance(thing, Pair | Motion)
    images = several.draw(thing, world.sample_style("varied", rng), rng)
    task = rng.random()
    if task < describe:
        return images, DESCRIBE_PROMPT, " ".join(several.facts(thing))
    question = several.sample_question(thing, rng)
    if task >= 0.85:
        return images, PROPOSER_PROMPT, proposer_text(question, RATIONALES)
    solved = with_habit(question, thing, rng) if habits else question
    return images, SOLVER_PROMPT.replace("{question}", question.text), solution_text(solved.steps, solved.answer)


def pretrain(out: Path, start: Path, seed: int = 0) -> None:
    """Make the model in the STAGES, each written to a folder of its name below `out` (fp16).

    Args:
        out: where the folders are written.
        start: the folder of the weights that the first stage begins with.
        seed: of the examples.
    """
    tokenizer = build_tokenizer()
    processor, model = build_processor(tokenizer), build_model(tokenizer)
    model.load_state_dict(load_backbone(str(start), "float32", "cpu").state_dict())
    for number, (name, (batches, rate, mixture)) in enumerate(STAGES.items()):
        rng = np.random.default_rng([PRETRAINING_SEED, seed, 100 + number])
        train_stage(
            model, processor, rng, batches=batches, learning_rate=rate, batch_size=24, draw=several_example, **mixture
        )
        save(model, processor, out / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pre-train the tiny LMM on pairs and clips of the playground.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, default=Path("src/ireasoner/model/tiny_lmm"))
    arguments = parser.parse_args()
    pretrain(arguments.out, arguments.start)
