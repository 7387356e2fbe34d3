"""Trajectories per second of one training step: ours, and the published procedure, on one checkpoint.

The published procedure is timed with its own structure: for each image the processor and `generate` run once for the
question and once for each trajectory, one sample at a time; then each trajectory has an update of its own, for which
the processor runs twice more, policy and reference run over the whole sequence (without the image, as published), and
the log-softmax covers every position. Both sides write completions of the same forced length; neither has a proposer
update in the timed step (it comes every fifth).
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from ireasoner import rewards
from ireasoner.config import Config, resolve
from ireasoner.engines.transformers import TransformersEngine, uniforms
from ireasoner.learner import Learner
from ireasoner.playground import world
from ireasoner.policy import Policy, resolve_device
from ireasoner.roles import parse_trajectory, proposer_messages, solver_messages

QUESTION_TOKENS = 20
QUESTION = "What is the value of the red bar?"


class Phases:
    """Seconds by phase name, on a device whose work may still be running when a call returns."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict(float)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - started


def our_step(policy: Policy, learner: Learner, config: Config, images: Sequence[Image.Image], tokens: int) -> Phases:
    """One step as `train` does it, at forced lengths."""
    phases, engine, count = Phases(policy.device), TransformersEngine(policy), config.group_size
    with phases.timed("encode images"):
        encoded = policy.encode_images(images)
    with phases.timed("propose"):
        prompts = policy.prompts(encoded, [proposer_messages(config.proposer_prompt)] * len(images))
        draws = uniforms([[0, i] for i in range(len(images))], 1, QUESTION_TOKENS)
        engine.sample(prompts, "proposer", draws, min_tokens=QUESTION_TOKENS)
    with phases.timed("solve"):
        prompts = policy.prompts(encoded, [solver_messages(config.solver_prompt, QUESTION)] * len(images))
        draws = uniforms([[1, i] for i in range(len(images))], count, tokens)
        groups = engine.sample(prompts, "solver", draws, min_tokens=tokens)
    with phases.timed("read and reward"):
        earned = [_reward(policy, [completion.text for completion in group]) for group in groups]
    with phases.timed("update"):
        learner.update(prompts, groups, earned)
    return phases


def _reward(policy: Policy, texts: Sequence[str]) -> list[float]:
    trajectories = [parse_trajectory(text) for text in texts]
    keys = [text[:2] for text in texts]  # forced text has no answers; any key costs the same
    outcome = rewards.outcome_rewards(keys, [t.words_before_answer for t in trajectories])
    agreement = rewards.step_agreement_rewards(keys, [policy.embed_texts([text] * 3, 64) for text in texts])
    return rewards.solver_rewards(outcome, agreement, 0.5).tolist()


def published_step(
    policy: Policy, learner: Learner, config: Config, images: Sequence[Image.Image], tokens: int
) -> Phases:
    """The same work by the published procedure, one image after another."""
    phases, processor = Phases(policy.device), policy.processor
    ask = processor.apply_chat_template(proposer_messages(config.proposer_prompt), add_generation_prompt=True)
    solve = processor.apply_chat_template(solver_messages(config.solver_prompt, QUESTION), add_generation_prompt=True)

    def generate(image: Image.Image, text: str, length: int) -> str:
        inputs = processor(images=[image], text=[text], return_tensors="pt").to(policy.device)
        with torch.no_grad():
            output = policy.model.generate(
                **inputs, do_sample=True, temperature=1.0, top_p=1.0, min_new_tokens=length, max_new_tokens=length
            )
        return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    for image in images:
        with phases.timed("propose"), policy.acting_as("proposer"):
            generate(image, ask, QUESTION_TOKENS)
        with phases.timed("solve"), policy.acting_as("solver"):
            texts = [generate(image, solve, tokens) for _ in range(config.group_size)]
        with phases.timed("read and reward"):
            earned = _reward(policy, texts)
        for text, reward in zip(texts, earned, strict=True):
            with phases.timed("update"):
                _published_update(policy, learner, image, solve, text, reward)
    return phases


def _published_update(
    policy: Policy, learner: Learner, image: Image.Image, prompt: str, text: str, reward: float
) -> None:
    prompt_length = policy.processor(images=[image], text=[prompt], return_tensors="pt")["input_ids"].shape[1]
    inputs = policy.processor(images=[image], text=[prompt + text], return_tensors="pt").to(policy.device)
    seen = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    targets = inputs["input_ids"][:, 1:]
    completion = torch.arange(targets.shape[1], device=policy.device)[None] >= prompt_length - 1
    with policy.acting_as("solver"):
        logprobs = policy.model(**seen).logits[:, :-1].float().log_softmax(-1)
    with torch.no_grad(), policy.acting_as(None):
        reference = policy.model(**seen).logits[:, :-1].float().log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - reference)).sum(-1)[completion].mean()
    nll = -logprobs.gather(-1, targets[..., None])[..., 0][completion].mean()
    (reward * nll + learner.kl_coef * kl).backward()
    torch.nn.utils.clip_grad_norm_(learner.parameters.values(), learner.max_grad_norm)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)


def bench(
    model: str, images_per_step: Sequence[int], *, tokens: int = 40, repetitions: int = 5, device: str = "auto"
) -> dict[str, Any]:
    """Measure and print; returns what was measured, ready for JSON.

    Args:
        images_per_step: batch sizes to measure.
        tokens: forced length of every solver completion.
        repetitions: of each measurement, the two sides in turn; medians are reported.
    """
    config = resolve({"model": model, "images": "."})
    place = resolve_device(device)
    result: dict[str, Any] = {
        "model": model,
        "device": place,
        "threads": torch.get_num_threads(),
        "tokens": tokens,
        "sizes": [],
    }
    if place == "cuda":
        result["device_name"] = torch.cuda.get_device_name()
    policy = Policy(config.model, max_image_tokens=config.max_image_tokens, dtype=config.dtype, device=place)
    rng = np.random.default_rng(0)
    for size in images_per_step:
        images = [world.draw(world.sample_picture(rng), world.sample_style("chalk", rng), rng) for _ in range(size)]
        sides: dict[str, Callable[..., Phases]] = {"published": published_step, "ours": our_step}
        runs: dict[str, list[Phases]] = {name: [] for name in sides}
        for repetition in range(repetitions + 1):
            for name, step in sides.items():
                learner = Learner(policy, "solver", learning_rate=1e-6, tokens_per_batch=config.tokens_per_batch)
                phases = step(policy, learner, config, images, tokens)
                if repetition:  # the first is a warm-up
                    runs[name].append(phases)
        result["sizes"].append(_summarise(size, config.group_size, runs))
    _show(result)
    return result


def _summarise(size: int, group_size: int, runs: dict[str, list[Phases]]) -> dict[str, Any]:
    row: dict[str, Any] = {"images_per_step": size}
    totals = {name: [sum(p.seconds.values()) for p in repeated] for name, repeated in runs.items()}
    for name, repeated in runs.items():
        median = statistics.median(totals[name])
        row[name] = {
            "step_seconds": median,
            "trajectories_per_second": size * group_size / median,
            "share": {
                k: statistics.median(p.seconds[k] / sum(p.seconds.values()) for p in repeated)
                for k in repeated[0].seconds
            },
        }
    ratios = [a / b for a, b in zip(totals["published"], totals["ours"], strict=True)]
    row["speedup"] = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return row


def _show(result: dict[str, Any]) -> None:
    machine = f"{result.get('device_name', result['device'])}, {result['threads']} threads"
    title = f"{result['model']} on {machine}, completions of {result['tokens']} tokens"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("images a step", "procedure", "trajectories/s", "s a step", "times faster [range]"):
        table.add_column(name)
    lines = []
    for row in result["sizes"]:
        size, speedup = row["images_per_step"], row["speedup"]
        ratio = f"{speedup['median']:.1f} [{speedup['low']:.1f}, {speedup['high']:.1f}]"
        for name in ("published", "ours"):
            side = row[name]
            numbers = (f"{side['trajectories_per_second']:.1f}", f"{side['step_seconds']:.2f}")
            table.add_row(str(size), name, *numbers, ratio if name == "ours" else "")
            shares = ", ".join(f"{phase} {100 * share:.0f} %" for phase, share in side["share"].items())
            lines.append(f"{name}, {size} images a step: {shares}")
    console = Console(highlight=False)
    console.print(table)
    console.print("\n".join(lines), soft_wrap=True)
