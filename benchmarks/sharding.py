"""Memory of each process where the decoder layers are shared out among 1, 2 and 4 processes (`--shard`), on the CPU.

    python benchmarks/sharding.py                      # 200 M parameters
    python benchmarks/sharding.py --model random-25m --processes 1 2

A model with random weights is written to a folder in bfloat16, and loaded from there in float32: weights that are left
in their files would be resident, although nobody holds them. Every process then samples and learns from one image of
its own. Memory is that of the largest process, above what it held before it loaded the model; glibc is told to return
what is freed, which would otherwise count as held.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGE_TOKENS, WRITTEN, GROUP = 256, 32, 4


def measure(folder: str) -> None:
    """What one of the processes does; the first prints the bytes of the largest."""
    from memory import resident
    from torch.distributed.tensor import DTensor

    from ireasoner.method.recipe import Recipe
    from ireasoner.method.texts import solver_messages
    from ireasoner.model.distributed import joined
    from ireasoner.model.inputs import build_prompts, encode_images
    from ireasoner.model.learner import Learner
    from ireasoner.model.loading import load_policy
    from ireasoner.model.options import BackboneOptions, OptimizerOptions
    from ireasoner.rollouts.engine import Request
    from ireasoner.rollouts.live import LiveEngine
    from ireasoner.studies.bench import QUESTION, Bench, peak_bytes, reset_peak
    from ireasoner.training.config import resolve

    def step(model: str) -> tuple[int, int, int]:
        """Load a model and take one step: bytes of its weights, resident bytes after loading, and most in the step."""
        policy = load_policy(model, options, device="cpu", sharded_over=processes)
        held = resident()
        reset_peak(policy.device)
        bench = Bench(policy, resolve({"model": model, "images": "."}), WRITTEN, IMAGE_TOKENS)
        (image,) = encode_images(policy, bench.pictures(1))
        request = Request(image, solver_messages("{question}", QUESTION), (processes.index,))
        groups = LiveEngine(policy).sample([request], "solver", n=GROUP, max_tokens=WRITTEN)
        rewards = [[float(i % 2) for i in range(GROUP)]] * processes.count
        learner = Learner(policy, "solver", Recipe(), OptimizerOptions(tokens_per_batch=10**6), processes)
        advantages = learner.advantages(rewards)[[processes.index]]
        learner.update(build_prompts(policy, [image], [request.messages]), groups, advantages, rewards)
        tensors = [*policy.model.parameters(), *policy.model.buffers()]
        return (
            sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors),
            held,
            int(peak_bytes(policy.device) or 0),
        )

    with joined("cpu", 600, shard=True) as processes:
        options = BackboneOptions(dtype="float32", max_image_tokens=IMAGE_TOKENS)
        step("tiny")  # which loads every library
        before = resident()
        weights, held, peak = step(folder)
        rows = processes.gather([[weights, held - before, peak - before]], processes.count)
        if processes.is_main:
            print(json.dumps([max(column) for column in zip(*rows, strict=True)]))


def write(model: str, folder: Path) -> None:
    """Write a model with random weights, with the processor of the tiny one."""
    import torch

    from ireasoner.model.source import TINY_MODEL
    from ireasoner.studies import random_models

    shutil.copytree(TINY_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    random_models.build(model, torch.bfloat16, "cpu").save_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["size"]["longest_edge"] = 4 * IMAGE_TOKENS * 28**2
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def main() -> None:
    """Print a table, or be one of the processes of a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="random-200m")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder:
        measure(given.folder)
        return
    print("| processes | weights held, MB | resident after loading, MB | peak of a step, MB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write(given.model, folder)
        for count in given.processes:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            done = subprocess.run(
                [*launch, __file__, "--folder", str(folder)],
                env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                sys.exit(done.stderr)
            numbers = json.loads(done.stdout.splitlines()[-1])
            print(f"| {count} | {' | '.join(f'{number / 1e6:,.0f}' for number in numbers)} |", flush=True)


if __name__ == "__main__":
    main()
