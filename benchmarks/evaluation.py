"""How long held-out questions take: beside the same in parts, and beside their arithmetic. On the CPU.

    python benchmarks/evaluation.py                                                   # the tiny model
    python benchmarks/evaluation.py --model random-25m --image-tokens 1024 --questions 16 --questions-per-image 2

*In parts* is how it was done before: the greedy reply and the five samples in a call each, every image and every prompt
as a whole once for each question, and one image at a time in the vision tower. The sides take turns on the same
questions. The floor is the arithmetic at the rate of a large matrix product on this machine. Completions of a random
model have the full length.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from ireasoner.model import inputs
from ireasoner.playground import world
from ireasoner.rollouts.live import LiveEngine
from ireasoner.studies.bench import ATTENTION, Bench, ceilings, load_bench
from ireasoner.training.evaluation import evaluate
from ireasoner.training.labelled import LabelledQuestion


class InParts(LiveEngine):
    """The live engine, with a call for each temperature."""

    def sample(self, requests: Any, role: Any, *, n: int = 1, max_tokens: int, temperature: Any = 1.0) -> Any:
        """As `Engine.sample`."""
        found: list[list[Any]] = [[] for _ in requests]
        for heat in dict.fromkeys(temperature):
            count = list(temperature).count(heat)
            drawn = super().sample(requests, role, n=count, max_tokens=max_tokens, temperature=heat)
            found = [before + more for before, more in zip(found, drawn, strict=True)]
        return found


def ask(bench: Bench, folder: Path, count: int, per_image: int) -> tuple[list[LabelledQuestion], ...]:
    """So many questions, `per_image` about each image; and the same with an image for each question."""
    together, apart = [], []
    for i, image in enumerate(bench.pictures(-(-count // per_image))):
        image.save(path := folder / f"{i}.png")
        for color in world.COLORS[: min(per_image, count - i * per_image)]:
            question = f"How many {color} shapes are there?"
            together.append(LabelledQuestion(path, question, "2"))
            apart.append(LabelledQuestion(Path(shutil.copy(path, folder / f"{i}-{color}.png")), question, "2"))
    return together, apart


def main(argv: Sequence[str] | None = None) -> None:
    """Time both sides and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, or a size of ireasoner.studies.random_models")
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--questions-per-image", type=int, default=1, help=f"up to {len(world.COLORS)}")
    parser.add_argument("--image-tokens", type=int, help="of each image, about (those of a small picture)")
    parser.add_argument("--tokens", type=int, default=64, help="longest completion")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args(argv)
    bench = load_bench(options.model, options.tokens, image_tokens=options.image_tokens, device="cpu")
    policy, sampling = bench.policy, bench.config.changed(max_solution_tokens=options.tokens).sampling
    if options.model == "tiny":
        policy.end_tokens = (policy.processor.tokenizer.eos_token_id,)  # a bench's completions never end
    limits = ceilings(torch.device("cpu"), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        together, apart = ask(bench, Path(folder), options.questions, options.questions_per_image)

        def run(in_parts: bool) -> float:
            began = time.perf_counter()
            if in_parts:
                with patch.object(inputs, "LARGEST_BATCH", 0):
                    evaluate(policy, apart, "solver", sampling, engine=InParts(policy))
            else:
                evaluate(policy, together, "solver", sampling)
            return time.perf_counter() - began

        taken = [(run(False), run(True)) for _ in range(options.repetitions + 1)][1:]  # the first is a warm-up
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            run(False)
    ours, ratios = statistics.median(now for now, _ in taken), sorted(before / now for now, before in taken)
    floor = counter.get_total_flops() / limits["flops_per_second"]
    print(
        f"{options.model}, {torch.get_num_threads()} threads, {len(together)} questions: {ours:.2f} s; in parts "
        f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] times as long; {ours / floor:.1f} times "
        f"the arithmetic ({floor:.2f} s at {limits['flops_per_second'] / 1e9:.0f} GFLOP/s)"
    )


if __name__ == "__main__":
    main()
