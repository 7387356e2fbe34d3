"""What the benchmarks beside other programs have in common: options, pictures, a checkpoint that all sides load."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
from PIL import Image

from ireasoner.model.source import TINY_MODEL
from ireasoner.studies import random_models
from ireasoner.studies.bench import Bench, load_bench


def parser_for(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=("tiny", "random-25m"))
    for name, default in (("group-size", 5), ("tokens", 40), ("images-per-step", 1), ("repetitions", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--image-tokens", type=int, help="of each picture, about (9 for tiny, else 144)")
    return parser


def scene(asked: argparse.Namespace, scratch: str) -> tuple[str, Bench, list[Image.Image]]:
    """The folder of the checkpoint, our side of the comparison with it, and the pictures of a step."""
    bench = load_bench(asked.model, asked.tokens, asked.group_size, asked.image_tokens, "cpu")
    images = bench.pictures(asked.images_per_step)
    if asked.model == "tiny":
        return str(TINY_MODEL), bench, images
    # The same weights once more, since those of ours have adapters on them by now.
    backbone = random_models.build(asked.model, torch.float32, "cpu")
    processor = bench.policy.processor
    for part in (backbone, processor.tokenizer, processor.image_processor):
        part.save_pretrained(f"{scratch}/model")
    return f"{scratch}/model", bench, images


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"
