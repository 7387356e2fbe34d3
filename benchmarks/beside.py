"""What the benchmarks beside other programs have in common: options, pictures, a checkpoint that all sides load."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ireasoner.model.backbone import TINY_MODEL, load_backbone, load_model_processor
from ireasoner.model.policy import Policy
from ireasoner.playground import world
from ireasoner.studies.bench import Bench
from ireasoner.training.config import resolve


def parser_for(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=("tiny", "random-25m"))
    for name, default in (("group-size", 5), ("tokens", 40), ("images-per-step", 1), ("repetitions", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--image-tokens", type=int, help="of each picture, about (a small picture's)")
    return parser


def scene(asked: argparse.Namespace, scratch: str) -> tuple[str, Bench, list[Image.Image]]:
    """The folder of the checkpoint, our side of the comparison on it, and the pictures of a step."""
    config = resolve({"model": asked.model, "images": ".", "dtype": "float32", "group_size": asked.group_size})
    rng = np.random.default_rng(0)
    styles = [(world.sample_picture(rng), world.sample_style("chalk", rng)) for _ in range(asked.images_per_step)]
    images = [world.draw(picture, style, rng) for picture, style in styles]
    if asked.image_tokens:
        images = [image.resize((28 * round(asked.image_tokens**0.5),) * 2) for image in images]
    folder = str(TINY_MODEL) if asked.model == "tiny" else f"{scratch}/model"
    if asked.model != "tiny":
        processor = load_model_processor(asked.model, config.max_image_tokens)
        for part in (load_backbone(asked.model), processor.tokenizer, processor.image_processor):
            part.save_pretrained(folder)
    return folder, Bench(Policy(folder), config, asked.tokens), images


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"
