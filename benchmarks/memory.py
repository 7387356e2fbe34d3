"""Counted memory beside measured peaks: an update, a batch of samples and a whole step of a model with random weights.

    python benchmarks/memory.py                                       # 25 M parameters, on the CPU
    python benchmarks/memory.py --model random-7b --dtypes bfloat16   # on a GPU
    python benchmarks/memory.py --model random-200m --rows step       # `ireasoner plan` beside it
    python benchmarks/memory.py --model random-200m --rows step --processes 4     # each on its share of the layers

Every row is measured in a process of its own, above what that process held before; a step, which includes weights and
optimizer, above what it held before the model. On the CPU that is its resident memory, and glibc is told to return what
is freed, which would otherwise count as held. Where several processes share the model, a step samples few tokens, and
updates on completions of full length (`FewTokens`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ireasoner.model.parallel import Processes

ROWS = {  # tokens of the image, of a completion; images
    "update": (1156, 192, 1),
    "update, checkpointed": (1156, 192, 1),
    "update, checkpointed, vocabulary of 65,536": (256, 96, 1),
    "sampling": (1156, 24, 6),
    "sampling, two prompts at a time": (1156, 24, 6),
    "step": (256, 96, 1),
    "step, checkpointed": (256, 96, 1),
    "step of short texts": (256, 16, 4),
}


class FewTokens:
    """An engine that samples the first tokens of each completion, and repeats them up to its length.

    For every token that a sharded model writes, all of its layers are gathered, which takes a second for 200 M on two
    cores. What comes of it takes less memory than an update, whose peak is looked for.
    """

    def __init__(self, engine: Any, sampled: int) -> None:
        self.engine, self.sampled = engine, sampled

    def sample(self, requests: Any, role: Any, *, n: int = 1, max_tokens: int) -> list[list[Any]]:
        """As `Engine.sample`."""
        few = min(self.sampled, max_tokens)

        def repeated(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(itertools.islice(itertools.cycle(values), max_tokens))

        return [
            [replace(each, token_ids=repeated(each.token_ids), logprobs=repeated(each.logprobs)) for each in group]
            for group in self.engine.sample(requests, role, n=n, max_tokens=few)
        ]


def measure_step(row: str, model: str, dtype: str, device: str) -> dict[str, int]:
    """Planned and measured bytes of a process that plays and updates a step, and the tokens of its groups.

    Where a launcher has started several processes, each of them has its share of the model, and a step as large.
    """
    from ireasoner.model.distributed import joined

    with joined(device, 100, shard=True) as processes:
        found = _measured_step(row, model, dtype, device, processes)
        return {name: max(processes.gather([value], processes.count)) for name, value in found.items()}


def _measured_step(row: str, model: str, dtype: str, device: str, processes: Processes) -> dict[str, int]:
    import torch

    from ireasoner.method.texts import solver_messages
    from ireasoner.method.types import ROLES, Completion
    from ireasoner.model.counting import limit_sampling
    from ireasoner.model.inputs import build_prompts, encode_images
    from ireasoner.model.learner import Learner
    from ireasoner.model.loading import make_policy
    from ireasoner.studies import random_models
    from ireasoner.studies.bench import QUESTION, Bench, Phases, clock_of, peak_bytes, reset_peak
    from ireasoner.training import planning
    from ireasoner.training.config import resolve

    image_tokens, written, images = ROWS[row]
    options = {"max_image_tokens": image_tokens, "max_solution_tokens": written}
    options |= {"images_per_step": images * processes.count, "shard": processes.count > 1}
    options |= {"dtype": dtype, "gradient_checkpointing": "checkpointed" in row}
    config = resolve({"model": model, "images": ".", **options})
    loads = resolve({"model": "tiny", "images": ".", "dtype": dtype})  # every library, and the kernels of this dtype
    tiny = Bench(random_models.load_policy("tiny", loads.backbone, device), loads, 4)
    tiny.ours(Phases(clock_of(tiny.policy.device)), tiny.pictures(1))
    del tiny
    before = 0 if device.startswith("cuda") else resident()
    backbone = random_models.build(model, getattr(torch, dtype), "cpu" if processes.count > 1 else device)
    processor = random_models.load_processor(model, image_tokens)
    policy = make_policy(backbone, processor, config.backbone, sharded_over=processes)
    del backbone
    limit_sampling(policy, config.optimizer.tokens_per_batch)
    bench, n = Bench(policy, config, written, image_tokens), config.sampling.group_size
    learners = [Learner(policy, role, config.recipe, config.optimizer, processes) for role in ROLES]
    encoded = encode_images(policy, bench.pictures(1))
    prompts = build_prompts(policy, encoded, [solver_messages("{question}", QUESTION)])
    for learner in learners:  # so that AdamW has its state
        completion = Completion("", (10, 11), (-1.0,) * 2, "length")
        rewards = [[float(i % 2) for i in range(n)]]
        learner.update(prompts, [[completion] * n], learner.advantages(rewards), rewards * processes.count)
    bench.learner = lambda: learners[1]
    if processes.count > 1:
        bench.engine = FewTokens(bench.engine, 8)  # type: ignore[assignment]
    # Prompts as long as those of the benchmark, by the plan's rule.
    solve = solver_messages(config.sampling.solver_prompt, QUESTION)
    prompt = build_prompts(policy, encoded, [solve]).mask_BP.shape[1]
    config = config.changed(max_question_tokens=(prompt - image_tokens) // 2)
    del encoded, prompts
    on_gpu, ready = policy.device.type == "cuda", resident()
    reset_peak(policy.device)
    bench.ours(Phases(clock_of(policy.device)), bench.pictures(images))
    measured = int((peak_bytes(policy.device) or 0) - before)
    # A CPU's kernels keep something for shapes that they have seen: 3 MB in float32 and 73 in bfloat16, of any model.
    measured -= 0 if on_gpu else resident() - ready
    planned = planning.needs(random_models.meta_policy(model, config.backbone), config, image_tokens, processes.count)
    assert processes.count == 1 or planned.update > planned.sampling
    tokens = images * planning.group_tokens(policy, config, image_tokens)
    return {"tokens": tokens, "counted": planned.total, "measured": measured}


def measure(row: str, model: str, dtype: str, device: str) -> dict[str, int]:
    """Counted and measured bytes of a row, and its tokens."""
    if row.startswith("step"):
        return measure_step(row, model, dtype, device)
    import torch

    from ireasoner.method.texts import solver_messages
    from ireasoner.method.types import Completion
    from ireasoner.model.backbone import load_processor
    from ireasoner.model.inputs import build_prompts, encode_images
    from ireasoner.model.loading import make_policy
    from ireasoner.model.options import BackboneOptions
    from ireasoner.rollouts.engine import Request
    from ireasoner.studies import random_models
    from ireasoner.studies.bench import QUESTION, Bench, peak_bytes, reset_peak
    from ireasoner.training.config import resolve

    image_tokens, written, images = ROWS[row]
    recomputed = "checkpointed" in row
    if "vocabulary" in row:
        random_models.SIZES[model]["text_config"]["vocab_size"] = 65536
    processor = load_processor("tiny")
    processor.image_processor.size = {**dict(processor.image_processor.size), "longest_edge": 2 * image_tokens * 28**2}
    options = BackboneOptions(dtype=dtype, gradient_checkpointing=recomputed)  # type: ignore[arg-type]
    policy = make_policy(random_models.build(model, getattr(torch, dtype), device), processor, options)
    config = resolve({"model": model, "images": ".", "tokens_per_batch": 10**6})
    bench, takes, n = Bench(policy, config, written, image_tokens), policy.footprint, config.sampling.group_size
    # An image of its own for each prompt: what prompts about the same image begin with would be run once.
    encoded = [replace(image) for image in encode_images(policy, bench.pictures(1)) * images]
    requests = [Request(image, solver_messages("{question}", QUESTION), (i,)) for i, image in enumerate(encoded)]
    prompts = build_prompts(policy, encoded[:1], [requests[0].messages])
    prompt, learner = prompts.mask_BP.shape[1], bench.learner()

    def update(length: int) -> None:
        completion = Completion("", tuple(range(10, 10 + length)), (-1.0,) * length, "length")
        rewards = [[float(i % 2) for i in range(n)]]
        learner.update(prompts, [[completion] * n], learner.advantages(rewards), rewards)

    def sample(length: int, requests: list[Request]) -> None:
        bench.engine.sample(requests, "solver", n=n, max_tokens=length)

    tokens = prompt + n * (written - 1)
    work: Callable[[], None] = lambda: update(written)  # noqa: E731
    counted = takes.update(tokens, n * written, recomputed)
    if "sampling" in row:
        tokens, work = images * prompt, lambda: sample(written, requests)
        at_a_time = 2 if "two prompts" in row else images
        bench.engine._prefilled_at_a_time = lambda _: at_a_time
        counted = takes.sampling(images, prompt, written, n, at_a_time=at_a_time, shares=policy.shares_attention)
        sample(4, requests[:1])  # the first pass loads kernels
    else:
        update(8)
    before = torch.cuda.memory_allocated() if device.startswith("cuda") else resident()
    reset_peak(policy.device)
    work()
    return {"tokens": tokens, "counted": counted, "measured": int((peak_bytes(policy.device) or 0) - before)}


def resident() -> int:
    """Bytes of this process that are in memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def main() -> None:
    """Print a table, or measure one row of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="random-25m")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", default="", help="only those whose names begin so")
    parser.add_argument("--processes", type=int, default=1, help="that share the model; rows `step` only")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        found = measure(given.row, given.model, given.dtypes[0], given.device)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        return
    print("| | dtype | tokens | counted, MB | measured, MB | counted / measured |\n|---|---|---|---|---|---|")
    for dtype in given.dtypes:
        for row in (row for row in ROWS if row.startswith(given.rows)):
            command = [sys.executable, __file__, "--row", row, "--model", given.model, "--dtypes", dtype]
            if given.processes > 1:
                launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(given.processes)]
                command[1:1] = launcher
            done = subprocess.run(
                [*command, "--device", given.device],
                env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            counted, measured = found["counted"] / 1e6, found["measured"] / 1e6
            numbers = f"{found['tokens']:,} | {counted:,.0f} | {measured:,.0f} | {counted / measured:.2f}"
            print(f"| {row} | {dtype} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
