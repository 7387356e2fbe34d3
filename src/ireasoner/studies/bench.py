"""One training step, phase by phase: as `train` does it (*ours*) and without sharing prompts (*plain*), on one model.

All sides write completions of the same forced length, and no side has a proposer update in the timed step, since one
comes every fifth step only. The sides take turns, and medians over the repetitions are reported.

*plain* does the same work batched but shares nothing: each trajectory of a group has its own prefill and its own cache,
which the model's own attention reads, and the update runs the model's own forward pass over every whole sequence.

Floors: a phase cannot be faster than its arithmetic at the rate of matrix products measured on this machine. Decoding
must also read the language model's weights and the cache once for each token, at the measured rate of copying.
"""

from __future__ import annotations

import itertools
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ireasoner.method.memory import RecentSteps
from ireasoner.method.scoring import Context, score_group
from ireasoner.method.texts import proposer_messages, solver_messages
from ireasoner.method.types import Completion
from ireasoner.model.backbone import resolve_device
from ireasoner.model.forward import prefill
from ireasoner.model.inputs import Prompts, build_prompts, encode_images, token_texts
from ireasoner.model.learner import Learner
from ireasoner.model.policy import Policy
from ireasoner.playground import world
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.studies import random_models
from ireasoner.training.config import Config, resolve
from ireasoner.training.selfplay import BlankImages

QUESTION_TOKENS = 20
QUESTION = "What is the value of the red bar?"
PHASES = ("encode images", "propose", "prefill", "decode", "solve", "read and reward", "update")  # as tables show them
aten: Any = torch.ops.aten


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, *(_for_all_heads(query, shape) for shape in (key, value)))


def _attention_backward_flops(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, *(_for_all_heads(query, shape) for shape in (key, value)))


def _for_all_heads(query: torch.Size, shape: torch.Size) -> list[int]:
    """The shape of keys or values with as many heads as queries: several query heads may share one of theirs."""
    return [shape[0], query[1], *shape[2:]]


# torch counts the operations of the GPU's fused attention only, and before 2.13 only where no heads are shared.
ATTENTION = {
    **{
        getattr(aten, f"_scaled_dot_product_{kind}"): _attention_flops
        for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    },
    **{
        getattr(aten, f"_scaled_dot_product_{kind}_backward"): _attention_backward_flops
        for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    },
}


class Phases:
    """What each phase of a step took, by a clock: seconds, or anything else that adds up, such as operations.

    A GPU may still be working when a call returns, so a clock must wait for it (`clock_of`).
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.took = clock, defaultdict[str, float](float)

    @contextmanager
    def timed(self, name: str, within: str | None = None) -> Iterator[None]:
        """Add what happens inside to a phase; where this lies inside another phase, `within`, take it off that one."""
        began = self.clock()
        yield
        took = self.clock() - began
        self.took[name] += took
        if within:
            self.took[within] -= took

    @property
    def total(self) -> float:
        """The sum of all phases."""
        return sum(self.took.values())


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock in seconds for work on this device."""

    def after_the_gpu() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return after_the_gpu if device.type == "cuda" else time.perf_counter


Side = Callable[[Phases, Sequence[Image.Image]], None]  # plays and updates one step on these images


class Bench:
    """A model, and the size of its steps: `ours` and `plain` each play and update one step.

    Args:
        policy: the model.
        config: recipe, prompts and group size.
        tokens: forced length of every solver completion.
        image_tokens: of each picture, about; None: a small picture's (the tiny model's 9, else 144).
    """

    def __init__(self, policy: Policy, config: Config, tokens: int = 40, image_tokens: int | None = None) -> None:
        self.policy, self.config, self.tokens = policy, config, tokens
        self.image_tokens = image_tokens or (None if config.model == "tiny" else 144)
        self.engine = LiveEngine(policy)
        policy.end_tokens = ()  # no completion ends before the forced length
        self.steps = 0  # seeds the draws: equal texts would be scored from a cache
        self.groups, self.memory = itertools.count(), RecentSteps(config.recipe.recurrence_window)

    def pictures(self, count: int) -> list[Image.Image]:
        """The images of a step, from the playground's world."""
        rng = np.random.default_rng(0)
        drawn = [world.draw(world.sample_picture(rng), world.sample_style("chalk", rng), rng) for _ in range(count)]
        if self.image_tokens is None:
            return drawn
        side = 28 * round(self.image_tokens**0.5)  # Qwen2.5-VL has a token for each 28 x 28 pixels
        return [image.resize((side, side)) for image in drawn]

    def learner(self) -> Learner:
        """A new learner of the solver, with so low a learning rate that the model stays as it is."""
        options = self.config.optimizer.model_copy(update={"learning_rate": 1e-6})
        return Learner(self.policy, "solver", self.config.recipe, options)

    def ours(self, phases: Phases, images: Sequence[Image.Image]) -> None:
        """A step as `train` does it."""
        self._step(phases, images, copies=1)

    def plain(self, phases: Phases, images: Sequence[Image.Image]) -> None:
        """The same step without sharing prompts."""
        with self.policy.without_sharing():
            self._step(phases, images, copies=self.config.sampling.group_size)

    def _step(self, phases: Phases, images: Sequence[Image.Image], copies: int) -> None:
        """A step that samples each group from `copies` requests, each of which has its own prefill."""
        policy, sampling, engine, learner = self.policy, self.config.sampling, self.engine, self.learner()
        count, ask = sampling.group_size, proposer_messages(sampling.proposer_prompt)
        solve = solver_messages(sampling.solver_prompt, QUESTION)
        self.steps += 1
        with phases.timed("encode images"):
            encoded = encode_images(policy, images)
        with phases.timed("propose"):
            asked = [Request(image, ask, (self.steps, i)) for i, image in enumerate(encoded)]
            engine.sample(asked, "proposer", max_tokens=QUESTION_TOKENS)
        with phases.timed("decode"), self._prefill_timed(phases):
            asked = [Request(e, solve, (self.steps, i, k)) for i, e in enumerate(encoded) for k in range(copies)]
            drawn = engine.sample(asked, "solver", n=count // copies, max_tokens=self.tokens)
            flat = [completion for group in drawn for completion in group]
            groups = [flat[i : i + count] for i in range(0, len(flat), count)]
        with phases.timed("read and reward"):
            asked = [Request(each, solve) for each in encoded]
            blank = BlankImages(policy, self.config.optimizer.tokens_per_batch)
            earned = [self.reward(*each, blank) for each in zip(groups, asked, strict=True)]
        with phases.timed("update"):
            prompts = build_prompts(policy, encoded, [solve] * len(images))
            advantages = learner.advantages(earned)
            learner.update(prompts, groups, advantages, earned)

    @contextmanager
    def _prefill_timed(self, phases: Phases) -> Iterator[None]:
        """Time prefill apart from the phase `decode`, within which it runs.

        Only prefill calls the model as a whole; a step of decoding calls its language model.
        """
        base, prefill = self.policy.base, ExitStack()
        with (
            base.register_forward_pre_hook(lambda *_: prefill.enter_context(phases.timed("prefill", within="decode"))),
            base.register_forward_hook(lambda *_: prefill.close()),
        ):
            yield

    def reward(self, group: Sequence[Completion], request: Request, blank: BlankImages) -> list[float]:
        """What the completions of a request earn by the config's recipe, read as readable trajectories."""
        recipe, name = self.config.recipe, f"group {next(self.groups)}"  # each counts as another image's
        context = Context(
            step_weight=recipe.step_weight_final,
            recent_steps=self.memory.of_others(name),
            logprobs=[completion.logprobs for completion in group],
            tokens=[token_texts(self.policy.processor, completion.token_ids) for completion in group],
            blank_logprobs=partial(blank.logprobs, request, group),
        )
        scored = score_group(QUESTION, [readable(completion.text) for completion in group], recipe, context)
        self.memory.add(name, scored.trajectories)
        return [*scored.rewards]


def readable(text: str) -> str:
    """A readable trajectory of three reasoning steps, from the words of a text.

    Completions of a forced length seldom end as readable ones do, and unreadable ones would cost nothing to reward.
    """
    words = text.replace("<", " ").replace(">", " ").split()
    third = len(words) // 3 + 1
    steps = [f"Step {i + 1}: {' '.join(words[i * third : (i + 1) * third])}" for i in range(3)]
    return "\n".join(["<think>", *steps, "</think>", "<answer>7</answer>"])


def load_bench(
    model: str,
    tokens: int = 40,
    group_size: int | None = None,
    image_tokens: int | None = None,
    device: str = "auto",
    revision: str | None = None,
) -> Bench:
    """Load 'tiny', a size of `random_models`, a folder or a hub id (of a revision); the rest as for `Bench`.

    Raises:
        ModelError: the model or the device cannot be used.
    """
    device, is_random = resolve_device(device), model in random_models.SIZES
    config = resolve({"model": model, "images": "."})
    config = config.changed(
        group_size=group_size or config.sampling.group_size,
        dtype="float32" if is_random and device == "cpu" else config.backbone.dtype,
        max_image_tokens=max(image_tokens or 0, config.backbone.max_image_tokens),
    )
    policy = random_models.load_policy(model, config.backbone, device, revision)
    return Bench(policy, config, tokens, image_tokens)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine does at best: floating-point operations in a large matrix product, bytes moved in a copy."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(statement: str) -> float:
        timer = Timer(
            statement, globals={"a": a, "source": source, "target": target}, num_threads=torch.get_num_threads()
        )
        return min(timer.timeit(1).mean for _ in range(5))

    return {
        "flops_per_second": 2 * size**3 / best("a @ a"),
        "bytes_per_second": 2 * source.nbytes / best("target.copy_(source)"),
    }


def reset_peak(device: torch.device) -> None:
    """Begin to measure peak memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (control := Path("/proc/self/clear_refs")).exists():
        control.write_text("5")


def peak_bytes(device: torch.device) -> float | None:
    """Most memory held since `reset_peak`, weights included: of the GPU, else of the process; None: not known here."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return float(found[1]) * 1024 if found else None


def measure(
    bench: Bench, sides: Mapping[str, Side], images_per_step: Sequence[int], repetitions: int = 5
) -> dict[str, Any]:
    """Time the sides, by name, at each size of a step; returns what was measured, ready for JSON.

    Where one of them is called "ours", the others are compared with it, and it with what the machine allows.
    """
    device, config = bench.policy.device, bench.config
    limits = ceilings(device, bench.policy.backbone.dtype)
    return {
        "model": config.model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": config.backbone.dtype,
        "tokens": bench.tokens,
        "group_size": config.sampling.group_size,
        "ceilings": limits,
        "sizes": [_measure_size(bench, sides, size, repetitions, limits) for size in images_per_step],
    }


def _measure_size(
    bench: Bench, sides: Mapping[str, Side], size: int, repetitions: int, limits: Mapping[str, float]
) -> dict[str, Any]:
    policy, sampling, images = bench.policy, bench.config.sampling, bench.pictures(size)
    trajectories = size * sampling.group_size
    runs: dict[str, list[Phases]] = {name: [] for name in sides}
    peaks: dict[str, float | None] = {}
    for repetition in range(repetitions + 1):
        for name, side in sides.items():
            phases = Phases(clock_of(policy.device))
            reset_peak(policy.device)
            side(phases, images)
            if repetition:  # the first is a warm-up
                runs[name].append(phases)
                peaks[name] = peak_bytes(policy.device)
    found: dict[str, dict[str, Any]] = {}
    for name, repeated in runs.items():
        seconds = {phase: statistics.median(p.took[phase] for p in repeated) for phase in repeated[0].took}
        if "prefill" in seconds:
            seconds["solve"] = statistics.median(p.took["prefill"] + p.took["decode"] for p in repeated)
        whole = statistics.median(p.total for p in repeated)
        found[name] = {
            "seconds": seconds,
            "step_seconds": whole,
            "trajectories_per_second": trajectories / whole,
            "tokens_per_second": trajectories * bench.tokens / seconds["solve"],
            "peak_bytes": peaks[name],
        }
        if name != "ours" and "ours" in runs:
            ratios = [p.total / ours.total for p, ours in zip(repeated, runs["ours"], strict=True)]
            found[name]["times_ours"] = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    encoded = encode_images(policy, images[:1])
    prompt = build_prompts(policy, encoded, [solver_messages(sampling.solver_prompt, QUESTION)])
    if "ours" in found:
        found["ours"] |= _floors(bench, images, prompt, limits)
    row = {"images_per_step": size, "image_tokens": len(encoded[0].pooled), "prompt_tokens": prompt.mask_BP.shape[1]}
    return {**row, "sides": found}


def _floors(
    bench: Bench, images: Sequence[Image.Image], prompt: Prompts, limits: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """The operations in each phase of our step, and the fewest seconds that this machine needs for them.

    `prompt` is the solver's prompt of one image.
    """
    policy, length = bench.policy, prompt.mask_BP.shape[1]
    capture, bench.engine.capture = bench.engine.capture, None  # the counter does not see into a captured step
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        bench.ours(counted := Phases(counter.get_total_flops), images)
    bench.engine.capture = capture
    least = {phase: flops / limits["flops_per_second"] for phase, flops in counted.took.items()}
    with torch.no_grad():
        layers: Any = prefill(policy, prompt).cache.layers
    per_position = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) / length
    steps = bench.tokens - 1  # the first token comes from the prefill
    # At each step a prompt's cache is read once for its whole group, and each trajectory's own tokens so far.
    rows = len(images) * bench.config.sampling.group_size
    positions = len(images) * length * steps + rows * sum(range(1, steps + 1))
    head, embeddings = (
        get().weight for get in (policy.backbone.get_output_embeddings, policy.backbone.get_input_embeddings)
    )
    weights = sum(p.nbytes for p in policy.decoder.parameters() if p is not embeddings) + head.nbytes
    read = (weights * steps + per_position * positions) / limits["bytes_per_second"]
    return {"flops": dict(counted.took), "floor_seconds": {**least, "decode": max(least["decode"], read)}}


def heading(result: Mapping[str, Any]) -> str:
    """What was measured, and on what."""
    limits = result["ceilings"]
    return (
        f"{result['model']}, {result['dtype']}, on {result['device']} ({result['threads']} threads; matrix product "
        f"{limits['flops_per_second'] / 1e9:.0f} GFLOP/s, copy {limits['bytes_per_second'] / 1e9:.1f} GB/s), groups of "
        f"{result['group_size']}, completions of {result['tokens']} tokens"
    )


def table(row: Mapping[str, Any]) -> tuple[str, list[list[str]]]:
    """The title and the rows of a table for one size of a step: seconds, and how many times ours they are."""
    sides = row["sides"]
    ours = sides.get("ours", {"seconds": {}, "floor_seconds": {}})

    def cell(name: str, phase: str) -> str:
        seconds = sides[name]["seconds"].get(phase)
        if seconds is None:
            return ""
        compared = name != "ours" and phase in ours["seconds"]
        return f"{seconds:.3f} s" + (f" ({seconds / ours['seconds'][phase]:.1f}x)" if compared else "")

    def whole(side: Mapping[str, Any]) -> str:
        times = side.get("times_ours")
        compared = f" ({times['median']:.1f}x [{times['low']:.1f}, {times['high']:.1f}])" if times else ""
        return f"{side['step_seconds']:.2f} s{compared}"

    rows = [["", *sides, "ours / floor"]]
    for phase in PHASES:
        floor = ours["floor_seconds"].get(phase)
        rows.append(
            [phase, *(cell(name, phase) for name in sides), f"{ours['seconds'][phase] / floor:.1f}" if floor else ""]
        )
    floors = sum(ours["floor_seconds"].values())
    rows.append(["whole step", *map(whole, sides.values()), f"{ours['step_seconds'] / floors:.2f}" if floors else ""])
    last = {"trajectories_per_second": ("trajectories/s", 1, 2), "tokens_per_second": ("tokens/s, solving", 1, 0)}
    last["peak_bytes"] = ("peak memory, MiB", 2**20, 0)
    for key, (label, unit, digits) in last.items():
        if all(side[key] is not None for side in sides.values()):
            rows.append([label, *(f"{side[key] / unit:.{digits}f}" for side in sides.values()), ""])
    size = f"{row['images_per_step']} images a step, {row['image_tokens']} tokens each"
    return f"{size}, prompts of {row['prompt_tokens']} tokens", rows
