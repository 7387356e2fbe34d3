"""Memory and time of a step with the language model in 4 and 8 bits, beside the unquantised run, on the CPU.

    python benchmarks/quantization.py --model random-200m --image-tokens 144 --tokens 40

The model is written to a temporary folder in bfloat16, as models on the hub are, and read from there by one process for
each way of holding it. Memory is what the process has taken since before it loaded the model; seconds are those of the
processor, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from ireasoner.model import backbone
from ireasoner.model.loading import make_policy
from ireasoner.model.source import TINY_MODEL
from ireasoner.studies import random_models
from ireasoner.studies.bench import PHASES, Bench, Phases, peak_bytes, reset_peak
from ireasoner.training.config import resolve

WAYS = ("none", "int8", "nf4")


def measured(folder: Path, way: str, asked: argparse.Namespace) -> dict[str, Any]:
    """What one way takes: bytes held once it is loaded, bytes at the peak of a step, and seconds of its phases."""
    options = {"model": asked.model, "images": ".", "dtype": asked.dtype, "group_size": asked.group_size}
    config = resolve(options | ({} if way == "none" else {"quantization": way}))
    tiny = Bench(random_models.load_policy("tiny", config.backbone, "cpu"), config, 4)
    tiny.ours(Phases(time.process_time), tiny.pictures(1))  # what is imported and made once is not the model's
    process = psutil.Process()
    before = process.memory_info().rss
    quantization = config.backbone.quantization
    reset_peak(torch.device("cpu"))
    loaded = backbone.load_backbone(folder, config.backbone.dtype, "cpu", quantization=quantization)
    loading = peak_bytes(torch.device("cpu"))
    processor = random_models.load_processor("random-25m", config.backbone.max_image_tokens)
    bench = Bench(make_policy(loaded, processor, config.backbone), config, asked.tokens, asked.image_tokens)
    images = bench.pictures(1)
    bench.ours(Phases(time.process_time), images)  # what is mapped from files has been read now
    held, steps = process.memory_info().rss - before, list[Phases]()
    reset_peak(bench.policy.device)
    for _ in range(asked.repetitions):
        bench.ours(phases := Phases(time.process_time), images)
        steps.append(phases)
    peak = peak_bytes(bench.policy.device)
    assert peak is not None
    assert loading is not None
    seconds = {phase: statistics.median(step.took[phase] for step in steps) for phase in steps[0].took}
    total = statistics.median(step.total for step in steps)
    takes = bench.policy.footprint
    return {
        "weights": takes.weights - takes.adapters, "loading": loading - before, "held": held, "peak": peak - before,
        "seconds": {**seconds, "step": total},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random-25m", help="a size of random_models")
    parser.add_argument("--dtype", default="float32", help="of the weights that are not quantised, and of products")
    parser.add_argument("--image-tokens", type=int, default=144)
    parser.add_argument("--tokens", type=int, default=40, help="of each completion")
    parser.add_argument("--group-size", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)  # of a process: which one, and the model's folder
    asked = parser.parse_args()
    if asked.way:
        print(json.dumps(measured(Path(asked.way[1]), asked.way[0], asked)))
        return 0
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        random_models.build(asked.model, torch.bfloat16, "cpu").save_pretrained(folder)
        for path in TINY_MODEL.iterdir():
            if not (Path(folder) / path.name).exists():
                shutil.copy(path, folder)
        for way in WAYS:
            words = [sys.executable, __file__, *sys.argv[1:], "--way", way, folder]
            # Or the allocator would keep what was freed.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found[way] = json.loads(done.stdout.splitlines()[-1])
    plain = found["none"]
    print(
        f"{asked.model}, {asked.dtype}: MB of weights as planned, at the peak of loading, held, and at the peak of a "
        "step; seconds"
    )
    for way, values in found.items():
        megabytes = ", ".join(f"{values[n] / 1e6:.0f} ({values[n] / plain[n]:.2f}x)" for n in values if n != "seconds")
        seconds = ", ".join(
            f"{phase} {values['seconds'][phase]:.3f} ({values['seconds'][phase] / plain['seconds'][phase]:.2f}x)"
            for phase in [*PHASES, "step"]
            if plain["seconds"].get(phase, 0) > 0.005
        )
        print(f"  {way}: {megabytes}; {seconds}")
    if asked.json:
        asked.json.write_text(json.dumps({"asked": vars(asked) | {"json": None}, "found": found}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
