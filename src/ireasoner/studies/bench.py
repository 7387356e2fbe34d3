"""One training step, phase by phase: ours, the plain path and the published procedure, on one checkpoint.

All sides write completions of the same forced length, and none has a proposer update in the timed step (it comes every
fifth). Repetitions are interleaved; medians are reported.

*plain* does our work batched, without sharing prompts: each of a group's trajectories has a prefill and a cache of its
own, which the model's own attention reads, and the update runs every whole sequence by the model's own forward pass.

*published* keeps the structure of the authors' code: for each image the processor and `generate` run once for the
question and once for each trajectory, one sample at a time; then each trajectory has an update of its own, for which
the processor runs twice more, policy and reference run over the whole sequence (without the image, as published), and
the log-softmax covers every position.

Floors: a phase cannot take less than its arithmetic at this machine's measured matrix-product rate, nor, when decoding,
less than reading the language model's weights and the cache once a token at its measured copy rate.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from ireasoner.method import rewards
from ireasoner.method.seeds import uniforms
from ireasoner.method.texts import parse_trajectory, proposer_messages, solver_messages
from ireasoner.method.types import Completion
from ireasoner.model.backbone import resolve_device
from ireasoner.model.inputs import Prefix, Prompts, build_prompts, embed_texts, encode_images
from ireasoner.model.learner import Learner
from ireasoner.model.policy import Policy
from ireasoner.model.processors import render
from ireasoner.playground import world
from ireasoner.playground.random_models import SHAPES
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training.config import Config, resolve

QUESTION_TOKENS = 20
QUESTION = "What is the value of the red bar?"
SOLVE = ("prefill", "decode")  # the two halves of what the published procedure does in one `generate`


class Phases:
    """Seconds by phase, on a device whose work may still be running when a call returns."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict[str, float](float)
        self.flops = defaultdict[str, float](float)
        self.counter: FlopCounterMode | None = None  # counting slows, so that what is counted is not timed

    @contextmanager
    def timed(self, name: str, within: str | None = None) -> Iterator[None]:
        """Add to a phase; where it lies `within` another, take it from that one."""
        counted = self.counter.get_total_flops() if self.counter else 0
        started = self._now()
        yield
        took = self._now() - started
        more = self.counter.get_total_flops() - counted if self.counter else 0
        for phase, sign in ((name, 1), (within, -1)):
            if phase:
                self.seconds[phase] += sign * took
                self.flops[phase] += sign * more

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Bench:
    """One model at one group size and length; `ours`, `plain` and `published` each play and update one step."""

    def __init__(self, policy: Policy, config: Config, tokens: int) -> None:
        self.policy, self.config, self.tokens = policy, config, tokens
        self.engine = LiveEngine(policy)
        self.cache_bytes = 0.0  # of one position of one row

    def learner(self) -> Learner:
        return Learner(self.policy, "solver", learning_rate=1e-6, tokens_per_batch=self.config.tokens_per_batch)

    def ours(self, phases: Phases, images: Sequence[Image.Image]) -> None:
        """As `train` does it."""
        self._step(phases, images, shared=True)

    def plain(self, phases: Phases, images: Sequence[Image.Image]) -> None:
        """The same without sharing prompts."""
        self._step(phases, images, shared=False)

    def _step(self, phases: Phases, images: Sequence[Image.Image], shared: bool) -> None:
        policy, config, count = self.policy, self.config, self.config.group_size
        learner, prefill = self.learner(), policy.prefill
        shares = policy.shares_prompts, policy.shares_attention
        policy.shares_prompts, policy.shares_attention = (shared and share for share in shares)

        def timed_prefill(prompts: Prompts) -> Prefix:
            with phases.timed("prefill", within="decode"):
                prefix = prefill(prompts)
            rows, width = prompts.mask_BP.shape
            self.cache_bytes = sum(x.keys.nbytes + x.values.nbytes for x in prefix.cache.layers) / rows / width  # type: ignore[union-attr]
            return prefix

        with phases.timed("encode images"):
            encoded = encode_images(policy, images)
        with phases.timed("propose"):
            prompts = build_prompts(policy, encoded, [proposer_messages(config.proposer_prompt)] * len(images))
            draws = uniforms([[0, i] for i in range(len(images))], 1, QUESTION_TOKENS)
            self.engine.sample(prompts, "proposer", draws, min_tokens=QUESTION_TOKENS)
        with phases.timed("decode"):
            prompts = build_prompts(policy, encoded, [solver_messages(config.solver_prompt, QUESTION)] * len(images))
            draws = uniforms([[1, i] for i in range(len(images))], count, self.tokens)
            asked = prompts
            if not shared:
                asked = prompts[[i for i in range(len(images)) for _ in range(count)]]
                draws = draws.reshape(-1, 1, self.tokens)
            policy.prefill = timed_prefill  # type: ignore[method-assign]
            sampled = self.engine.sample(asked, "solver", draws, min_tokens=self.tokens)
            del policy.prefill  # the class's own again
            flat = [completion for group in sampled for completion in group]
            groups = [flat[i : i + count] for i in range(0, len(flat), count)]
        with phases.timed("read and reward"):
            earned = [self._reward([completion.text for completion in group]) for group in groups]
        with phases.timed("update"):
            learner.update(prompts, groups, earned)
        policy.shares_prompts, policy.shares_attention = shares

    def _reward(self, texts: Sequence[str]) -> list[float]:
        trajectories = [parse_trajectory(text) for text in texts]
        keys = [text[:2] for text in texts]  # forced text has no answers; any key costs the same
        outcome = rewards.outcome_rewards(keys, [t.words_before_answer for t in trajectories])
        agreement = rewards.step_agreement_rewards(keys, [embed_texts(self.policy, [text] * 3, 64) for text in texts])
        return rewards.solver_rewards(outcome, agreement, 0.5).tolist()

    def published(self, phases: Phases, images: Sequence[Image.Image]) -> None:
        """The published procedure, one image after another."""
        policy, config = self.policy, self.config
        learner = self.learner()
        ask = render(policy.processor, proposer_messages(config.proposer_prompt))
        solve = render(policy.processor, solver_messages(config.solver_prompt, QUESTION))
        for image in images:
            with phases.timed("propose"), policy.acting_as("proposer"):
                self._generate(image, ask, QUESTION_TOKENS)
            with phases.timed("solve"), policy.acting_as("solver"):
                group = [self._generate(image, solve, self.tokens) for _ in range(config.group_size)]
            with phases.timed("read and reward"):
                earned = self._reward([completion.text for completion in group])
            for completion, reward in zip(group, earned, strict=True):
                with phases.timed("update"):
                    self._published_update(learner, image, solve, completion, reward)

    def _generate(self, image: Image.Image, text: str, length: int) -> Completion:
        processor = self.policy.processor
        inputs = processor(images=[image], text=[text], return_tensors="pt").to(self.policy.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.policy.backbone.dtype)
        with torch.no_grad():
            output = self.policy.model.generate(
                **inputs, do_sample=True, temperature=1.0, top_p=1.0, min_new_tokens=length, max_new_tokens=length
            )
        ids = output[0, inputs["input_ids"].shape[1] :].tolist()
        return Completion(processor.tokenizer.decode(ids, skip_special_tokens=True), tuple(ids), (), "length")

    def _published_update(
        self, learner: Learner, image: Image.Image, prompt: str, completion: Completion, reward: float
    ) -> None:
        policy = self.policy
        inputs = policy.processor(images=[image], text=[prompt], return_tensors="pt")
        policy.processor(images=[image], text=[prompt + completion.text], return_tensors="pt")
        # Its tokens would be read from that text again; the sampled ones keep the lengths of all sides equal.
        ids = torch.cat([inputs["input_ids"], torch.tensor([completion.token_ids])], 1).to(policy.device)
        seen, targets = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids[:, 1:]
        with policy.acting_as("solver"):
            logprobs = policy.model(**seen).logits[:, :-1].float().log_softmax(-1)
        with torch.no_grad(), policy.acting_as(None):
            reference = policy.model(**seen).logits[:, :-1].float().log_softmax(-1)
        written = torch.arange(targets.shape[1], device=policy.device)[None] >= inputs["input_ids"].shape[1] - 1
        kl = (logprobs.exp() * (logprobs - reference)).sum(-1)[written].mean()
        nll = -logprobs.gather(-1, targets[..., None])[..., 0][written].mean()
        (reward * nll + learner.kl_coef * kl).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters.values(), learner.max_grad_norm)
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)

    def floors(self, counted: Phases, images: int, prompt_tokens: int, ceilings: dict[str, float]) -> dict[str, float]:
        """Least seconds of our phases on this machine, from their arithmetic and, for decoding, from what is read."""
        least = {name: flops / ceilings["flops_per_second"] for name, flops in counted.flops.items()}
        head = self.policy.backbone.get_output_embeddings().weight
        embeddings = self.policy.backbone.get_input_embeddings().weight
        weights = sum(p.nbytes for p in self.policy.decoder.parameters() if p is not embeddings) + head.nbytes
        rows = images * self.config.group_size
        steps = self.tokens - 1  # the first token comes from the prefill
        positions = images * prompt_tokens * steps + rows * sum(range(1, steps + 1))  # a prompt's, once for its group
        cache = self.cache_bytes * positions
        read = (weights * steps + cache) / ceilings["bytes_per_second"]
        return {**least, "decode": max(least.get("decode", 0.0), read)}


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine does at best: floating-point operations in a large matrix product, bytes moved in a copy."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(work: Callable[[], Any], repetitions: int = 5) -> float:
        found = []
        for _ in range(repetitions):
            phases = Phases(device)
            with phases.timed("work"):
                work()
            found.append(phases.total)
        return min(found)

    return {
        "flops_per_second": 2 * size**3 / best(lambda: a @ a),
        "bytes_per_second": 2 * source.nbytes / best(lambda: target.copy_(source)),
    }


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def _cpu_attention_backward(
    _: Any, query: Any, key: Any, value: Any, *__: Any, out_shape: Any = None, **___: Any
) -> int:
    return _cpu_attention(query, key, value) * 5 // 2  # five products of that size where forward has two


# torch counts the GPU's fused attention only.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


def reset_peak(device: torch.device) -> None:
    """Begin to measure peak memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (control := Path("/proc/self/clear_refs")).exists():
        control.write_text("5")


def peak_bytes(device: torch.device) -> float | None:
    """Most memory held since then, weights included: of the GPU, else of the process; None where that is not known."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return float(line.split()[1]) * 1024


def bench(
    model: str,
    images_per_step: Sequence[int],
    *,
    sides: Sequence[str] = ("ours", "plain", "published"),
    tokens: int = 40,
    group_size: int | None = None,
    image_tokens: int | None = None,
    repetitions: int = 5,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure and print; returns what was measured, ready for JSON.

    Args:
        model: 'tiny', 'random-25m', 'random-7b', a folder or a hub id.
        images_per_step: batch sizes to measure.
        sides: of "ours", "plain" and "published".
        tokens: forced length of every solver completion.
        group_size: trajectories of a question; None: the preset's.
        image_tokens: of each picture, about; None: a small picture's (the tiny model's 9, else 144).
        repetitions: of each measurement, the sides in turn; medians are reported.
    """
    place = torch.device(resolve_device(device))
    flags: dict[str, Any] = {"model": model, "images": "."}
    if model in SHAPES and place.type == "cpu":
        flags["dtype"] = "float32"
    if group_size:
        flags["group_size"] = group_size
    config = resolve(flags)
    policy = Policy(
        config.model,
        max_image_tokens=max(image_tokens or 0, config.max_image_tokens),
        dtype=config.dtype,
        device=str(place),
    )
    result: dict[str, Any] = {
        "model": model,
        "device": torch.cuda.get_device_name() if place.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": config.dtype,
        "tokens": tokens,
        "group_size": config.group_size,
        "ceilings": ceilings(place, policy.backbone.dtype),
        "sizes": [],
    }
    runner = Bench(policy, config, tokens)
    rng = np.random.default_rng(0)
    for size in images_per_step:
        images = [world.draw(world.sample_picture(rng), world.sample_style("chalk", rng), rng) for _ in range(size)]
        if image_tokens or model != "tiny":
            side = 28 * round((image_tokens or 144) ** 0.5)  # 28 pixels a token, along each side, in Qwen2.5-VL
            images = [image.resize((side, side)) for image in images]
        result["sizes"].append(_measure(runner, images, sides, repetitions, result["ceilings"]))
    _show(result)
    return result


def _measure(
    runner: Bench, images: Sequence[Image.Image], sides: Sequence[str], repetitions: int, limits: dict[str, float]
) -> dict[str, Any]:
    device, size = runner.policy.device, len(images)
    trajectories = size * runner.config.group_size
    runs: dict[str, list[Phases]] = {name: [] for name in sides}
    peaks: dict[str, float | None] = {}
    for repetition in range(repetitions + 1):
        for name in sides:
            phases = Phases(device)
            reset_peak(device)
            getattr(runner, name)(phases, images)
            if repetition:  # the first is a warm-up
                runs[name].append(phases)
                peaks[name] = peak_bytes(device)
    encoded = encode_images(runner.policy, images[:1])
    prompt = build_prompts(runner.policy, encoded, [solver_messages(runner.config.solver_prompt, QUESTION)])
    row: dict[str, Any] = {"images_per_step": size, "image_tokens": len(encoded[0].pooled)}
    row["prompt_tokens"] = prompt.mask_BP.shape[1]
    for name, repeated in runs.items():
        seconds = {k: statistics.median(p.seconds[k] for p in repeated) for k in repeated[0].seconds}
        if set(SOLVE) <= set(seconds):
            seconds["solve"] = statistics.median(sum(p.seconds[k] for k in SOLVE) for p in repeated)
        whole = statistics.median(p.total for p in repeated)
        row[name] = {"seconds": seconds, "step_seconds": whole, "trajectories_per_second": trajectories / whole}
        row[name]["tokens_per_second"] = trajectories * runner.tokens / seconds["solve"]
        row[name]["peak_bytes"] = peaks[name]
        if name != "ours" and "ours" in runs:
            pairs = zip(repeated, runs["ours"], strict=True)
            row[name]["times_ours"] = _spread([theirs.total / ours.total for theirs, ours in pairs])
            both = [k for k in seconds if k in row["ours"]["seconds"]]
            row[name]["times_ours_by_phase"] = {k: seconds[k] / row["ours"]["seconds"][k] for k in both}
    if "ours" in runs:
        counted = Phases(device)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            counted.counter = counter
            runner.ours(counted, images)
        floors = runner.floors(counted, size, row["prompt_tokens"], limits)
        row["ours"]["flops"] = dict(counted.flops)
        row["ours"]["floor_seconds"] = floors
    return row


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def _show(result: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.width = max(console.width, 100)
    limits = result["ceilings"]
    console.print(
        f"{result['model']}, {result['dtype']}, on {result['device']} ({result['threads']} threads; matrix product "
        f"{limits['flops_per_second'] / 1e9:.0f} GFLOP/s, copy {limits['bytes_per_second'] / 1e9:.1f} GB/s), groups of "
        f"{result['group_size']}, completions of {result['tokens']} tokens",
        soft_wrap=True,
    )
    for row in result["sizes"]:
        sides = [name for name in ("ours", "plain", "published") if name in row]
        title = f"{row['images_per_step']} images a step, {row['image_tokens']} tokens each, prompts of "
        table = Table(title=f"{title}{row['prompt_tokens']}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("", *sides):
            table.add_column(name, justify="left" if not name else "right")
        if "ours" in sides:
            table.add_column("ours / floor", justify="right")
        phases = ["encode images", "propose", *SOLVE, "solve", "read and reward", "update"]
        for phase in phases:
            cells = [_seconds(row, name, phase) for name in sides]
            floor = row["ours"]["floor_seconds"].get(phase) if "ours" in sides else None
            if floor:
                cells.append(f"{row['ours']['seconds'][phase] / floor:.1f}")
            table.add_row(phase, *cells)
        table.add_row("whole step", *(_seconds(row, name, None) for name in sides))
        table.add_row("trajectories/s", *(f"{row[name]['trajectories_per_second']:.2f}" for name in sides))
        table.add_row("tokens/s, solving", *(f"{row[name]['tokens_per_second']:.0f}" for name in sides))
        if all(row[name]["peak_bytes"] for name in sides):
            table.add_row("peak memory, MiB", *(f"{row[name]['peak_bytes'] / 2**20:.0f}" for name in sides))
        console.print(table)


def _seconds(row: dict[str, Any], name: str, phase: str | None) -> str:
    """Seconds, and how many times ours they are."""
    side = row[name]
    if phase is None:
        text, spread = f"{side['step_seconds']:.2f} s", side.get("times_ours")
        return text + (f" ({spread['median']:.1f}x [{spread['low']:.1f}, {spread['high']:.1f}])" if spread else "")
    if phase not in side["seconds"]:
        return ""
    ratio = side.get("times_ours_by_phase", {}).get(phase)
    return f"{side['seconds'][phase]:.3f} s" + (f" ({ratio:.1f}x)" if ratio else "")
