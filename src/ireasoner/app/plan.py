"""`ireasoner plan`: what a run takes, what of it fits, and the commands to type, without loading any weights."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter
from pydantic import Field

from ireasoner.app.options import WHOLE, Count, JsonFile, Revision, keep
from ireasoner.app.serve import SERVED_WITH
from ireasoner.app.training_options import with_training_options
from ireasoner.training import config as configs

if TYPE_CHECKING:  # these import torch
    from ireasoner.training.planning import Plan

PLANNED_WITH = (
    "preset", "recipe", "step_measure", "other_view", "group_size", "max_question_tokens", "max_solution_tokens",
    "max_image_tokens", "steps", "images_per_step", "proposer_every", "eval_data", "eval_questions", "save_every",
    "keep_checkpoints", "watch", "lora_rank", "lora_targets", "dtype", "quantization", "attention",
    "gradient_checkpointing", "tokens_per_batch", "engine", "vllm_share", "shard",
)  # fmt: skip
GPUS_OF_A_MACHINE = 8
PARTS = {
    "weights": "weights and adapters",
    "optimizer": "optimizer and gradients",
    "images": "features of images",
    "update": "an update",
    "sampling": "sampling",
    "evaluation": "evaluation",
    "total": "at most (the last three take turns)",
}
Rate = Annotated[float | None, Field(gt=0, allow_inf_nan=False)]


def _gigabytes(kind: Any, tokens: Sequence[Any]) -> float:
    """80, 80GB or 74.5GiB."""
    text = tokens[0].value
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|G|GiB)?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"a number of gigabytes is needed, such as 80, not {text}")
    return float(found[1]) * (1.073741824 if (found[2] or "").lower() == "gib" else 1)


@with_training_options({Group.create_ordered("What train would be given"): PLANNED_WITH})
def plan(
    model: str,
    /,
    *,
    gpus: Count = 1,
    gpu_memory: Annotated[float, Parameter(converter=_gigabytes)] = 80.0,
    vllm_servers: Annotated[int, Field(ge=0), WHOLE, Parameter(name="--servers")] = 0,  # train's are addresses
    tokens_per_second: Rate = None,
    tflops: Rate = None,
    revision: Revision = None,
    json: JsonFile = None,
    **flags: Any,
) -> int:
    """Say what a run takes, from the model's config alone: the memory of each GPU, whole and with --shard, host memory,
    disk, hours, what fits and what to switch on, and the commands to type. Weights are not needed; of a model on the
    hub, its small files are. Every text counts as long as it may be. The exit code is 1 if nothing fits.

    Args:
        model: A folder, a hub id, or 'tiny'; the sizes of Qwen2.5-VL and Qwen3-VL are known without the hub.
        gpus: GPUs to train on, with a process on each.
        gpu_memory: Gigabytes of each.
        vllm_servers: vLLM servers that sample, on GPUs of their own (none; the processes sample themselves).
        tokens_per_second: What sampling makes, all of it together, for the hours (not estimated).
        tflops: Operations of a GPU in a second, in 10^12, for the hours: its peak times a share (not estimated).
    """
    if vllm_servers:
        flags["servers"] = tuple(f"http://server{i + 1}:8000" for i in range(vllm_servers))
    options = {"model": model, **({"revision": revision} if revision else {}), **flags}
    config = configs.resolve({**options, "images": "IMAGES"})  # a mistake need not wait for imports
    from ireasoner.app import display
    from ireasoner.studies import random_models
    from ireasoner.training import planning

    policy = random_models.meta_policy(model, config.backbone, revision)
    planned = planning.plan(policy, config, gpus, gpu_memory * 1e9)
    sentences = [*_advice(planned), *_beside(planned, vllm_servers), _time(planned, tokens_per_second, tflops)]
    commands = _commands(planned, options, vllm_servers) if planned.best else []
    display.print_text(_model(planned))
    display.print_table(*_table(planned))
    display.print_text("\n".join(sentences))
    for command in commands:
        print(f"\n    {command}", end="")  # in one piece, to be copied
    print("\n" if commands else "", end="")
    keep(json, _result(planned) | {"sentences": sentences, "commands": commands})
    return 0 if planned.best else 1


def _model(planned: Plan) -> str:
    from ireasoner.training.planning import whole_weights

    options = planned.config.backbone
    parameters = whole_weights(planned.policy) / planned.policy.backbone.dtype.itemsize
    return (
        f"{planned.config.model} in {options.dtype}: {parameters / 1e6:,.0f} million parameters. "
        f"{planned.policy.describe()}."
    )


def _table(planned: Plan) -> tuple[str, list[list[str]]]:
    """What each GPU holds, part by part, in GB."""
    from ireasoner.model.counting import SPARE

    usable = (1 - SPARE) * planned.memory
    title = f"GB on each GPU; of {_gb(planned.memory)}, {usable / 1e9:,.1f} are planned with"
    found = planned.variants
    rows = [["", *("--shard" if each.config.shard else "whole" for each in found)]]
    for name, label in PARTS.items():
        rows.append([label, *(_number(getattr(each.needs, name)) for each in found)])
    rows.append(["tokens of an update at a time", *(f"{each.tokens:,}" for each in found)])
    rows.append(["fits", *("no" if each.problem else "yes" for each in found)])
    return title, rows


def _advice(planned: Plan) -> list[str]:
    """What fits, and what to switch on."""
    from ireasoner.training.planning import group_tokens

    best, config = planned.best, planned.config
    if best is None:
        told = f" What would do, each by itself: {', or '.join(planned.helps)}." if planned.helps else ""
        return [f"Nothing fits: {planned.variants[-1].problem}.{told}"]
    text = "It fits with --shard." if best.config.shard else "It fits whole."
    if best.tokens < config.optimizer.tokens_per_batch:
        text += f" An update keeps activations of {best.tokens:,} tokens at a time (--tokens-per-batch asks for more)."
    group = group_tokens(planned.policy, config, planned.image_tokens)
    if group > best.tokens or config.backbone.gradient_checkpointing:
        text += (
            f" Groups, of up to {group:,} tokens, are computed again in the backward pass (gradient checkpointing), "
            "which takes a third more time."
        )
    if best.config.shard and not config.servers and config.engine == "transformers":
        text += " Its processes gather every layer for every token that they sample: --servers samples far faster."
    if (images := config.schedule.images_per_step) < planned.devices:
        text += f" {planned.devices - images} of the GPUs have nothing to do: a step has --images-per-step {images}."
    return [text]


def _beside(planned: Plan, servers: int) -> list[str]:
    """Host memory, disk, and vLLM servers."""
    from ireasoner.training.planning import checkpoint_bytes

    config, takes, server = planned.config, planned.policy.footprint, planned.server
    each, kept = checkpoint_bytes(planned.policy, config)
    saved = str(planned.policy.backbone.config.dtype or "another precision").removeprefix("torch.")
    host = "weights are read from their files piece by piece, and little is held."
    if planned.best and planned.best.config.shard and saved != config.backbone.dtype:
        host = (
            f"the files are in {saved}, so that each process holds a copy of {_gb(takes.weights)} while it loads; "
            f"none with --dtype {saved}."
        )
    found = [f"Host memory: {host}", f"Disk: {_gb(each)} a checkpoint, and {_gb(kept)} for those that are kept."]
    if server is None:
        return [*found, "vLLM: 16 such GPUs do not hold a server."]
    told = f"vLLM: a server takes {server.gpus} such GPU{'s' * (server.gpus > 1)}"
    return [
        *found,
        f"{told if servers < 2 else f'{told}, and {servers} take {servers * server.gpus}'}, beside those that train: "
        f"{_gb(server.weights)} of weights on each, and room for {server.cached:,} tokens in the cache, or "
        f"{server.completions:,} of the longest completions at a time.",
    ]


def _time(planned: Plan, tokens_per_second: float | None, tflops: float | None) -> str:
    """Hours of the run, from the rates that the user states."""
    from ireasoner.model.counting import forward_flops
    from ireasoner.training.planning import group_tokens, step_of

    policy, config, steps = planned.policy, planned.config, planned.config.schedule.steps
    step = step_of(policy, config, planned.image_tokens)
    tokens = planned.best.tokens if planned.best else config.optimizer.tokens_per_batch
    recomputed = config.backbone.gradient_checkpointing or group_tokens(policy, config, planned.image_tokens) > tokens
    # Forward as the policy and as the reference, backward to the inputs alone, as the weights are frozen.
    passes = 4 if recomputed else 3
    read = step.scored + (0 if config.servers else step.read)
    operations = forward_flops(policy) * (passes * step.trained + read)
    rounded = float(f"{operations / 1e12:.3g}")
    text = (
        f"Time: a step samples at most {step.sampled:,} tokens, and takes {rounded:,g} x 10^12 operations in matrix "
        "products"
    )
    hours = []
    if tokens_per_second:
        hours.append((f"sampling at {tokens_per_second:g} tokens a second", steps * step.sampled / tokens_per_second))
    if tflops:
        hours.append((f"the rest at {tflops:g} x 10^12 a GPU", steps * operations / (tflops * 1e12 * planned.devices)))
    if not hours:
        return f"{text}; for hours, state --tokens-per-second and --tflops."
    parts = " and ".join(f"{seconds / 3600:.1f} hours of {what}" for what, seconds in hours)
    aside = "" if len(hours) == 2 else "; the other part was not estimated"
    if config.servers and len(hours) == 2:  # all but the first step's sampling and the last one's learning overlap
        (_, sampling), (_, rest) = hours
        together = (min(sampling, rest) / steps + max(sampling, rest)) / 3600
        aside = f"; with --overlap, {together:.1f} hours in all"
    return f"{text}: {steps:,} steps are {parts}, if every text is as long as it may be{aside}."


def _commands(planned: Plan, options: Mapping[str, Any], servers: int) -> list[str]:
    """The commands to type for the variant that is best: of each server, if there are any, and of the run."""
    assert planned.best is not None
    shard = {"shard": True} if planned.best.config.shard else {}
    train = shlex.join(["train", "--images", "IMAGES", "--out", "RUN", *_typed({**options, **shard})])
    command = f"ireasoner {train}"
    if planned.devices > 1:
        machines, left = divmod(planned.devices, GPUS_OF_A_MACHINE)
        launcher = f"--nproc-per-node {planned.devices}"
        if machines > 1 and not left:  # on the first machine; the others have numbers of their own
            launcher = (
                f"--nnodes {machines} --node-rank 0 --master-addr FIRST_MACHINE --master-port 29500 "
                f"--nproc-per-node {GPUS_OF_A_MACHINE}"
            )
        command = f"torchrun {launcher} -m ireasoner {train}"
    if not servers:
        return [command]
    model, served = options["model"], {name: value for name, value in options.items() if name in SERVED_WITH}
    shared = planned.server.gpus if planned.server else 1
    words = [model, *_typed(served), "--host", "0.0.0.0"]
    words += ["--tensor-parallel-size", str(shared)] if shared > 1 else []
    return [f"VLLM_API_KEY=KEY ireasoner serve {shlex.join(words)} --run", f"IREASONER_SERVER_KEY=KEY {command}"]


def _typed(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command."""
    words = []
    for name, value in options.items():
        flag = configs.as_flag(name)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            values = [",".join(value)] if name == "servers" else value if isinstance(value, list | tuple) else [value]
            words += [flag, *map(str, values)]
    return words


def _result(planned: Plan) -> dict[str, Any]:
    """The plan for JSON, in bytes."""
    return {
        "model": planned.config.model,
        "gpus": planned.devices,
        "gpu_memory": planned.memory,
        "variants": {
            "sharded" if each.config.shard else "whole": {
                **asdict(each.needs),
                "total": each.needs.total,
                "tokens_per_batch": each.tokens,
                "problem": each.problem,
            }
            for each in planned.variants
        },
        "server": asdict(planned.server) if planned.server else None,
        "helps": planned.helps,
    }


def _gb(size: float) -> str:
    """Bytes in GB, with as many digits as tell something."""
    return f"{_number(size)} GB"


def _number(size: float) -> str:
    return f"{size / 1e9:,.1f}" if size >= 1e9 else f"{size / 1e9:.2g}"
