"""Writing a trained solver as a folder that other programs load: a LoRA adapter of PEFT's, or a whole merged model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from peft.tuners import lora
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig

from ireasoner.method.types import UsageError
from ireasoner.model.backbone import load_processor, read_config, scales_by_area
from ireasoner.model.options import Dtype
from ireasoner.model.policy import Policy
from ireasoner.model.source import ModelError
from ireasoner.training.card import HERE, Base, find_base, model_card
from ireasoner.training.checkpoints import apply_umask
from ireasoner.training.recorder import LARGEST, read_json
from ireasoner.training.targets import Target, load_target

OF_PROCESSOR = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)  # beside the vocabulary, whose files each tokenizer names
SOLVER = "solver.json"  # how the solver was asked in training, for programs; the model card says it in Python
PATHS = ("_name_or_path", "name_or_path")  # where transformers and tokenizers may have kept a folder's name


def check_destination(folder: Path) -> None:
    """Raises `UsageError` unless a folder can be written there: it is missing or empty, and its parent is a folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not an empty folder: name another one")
    parent = folder.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"{folder} cannot be written: {parent} is no folder that may be written to")


def export(
    target: Target,
    folder: Path,
    *,
    merge: bool = False,
    name: str = HERE,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the trained solver of a run, with its processor and its model card.

    The folder is written under a temporary name beside its own, and renamed when it is complete.

    Args:
        target: a run or checkpoint with adapters, as `find_trained` found it.
        folder: where to; missing or empty.
        merge: write a whole model, with the adapter merged into its weights in float32, each then rounded once to the
            dtype of the base, and none of them quantised; otherwise only the adapter, as PEFT and vLLM load it.
        name: what the card says that it is loaded by.
        tell: is told what is waited for.

    Raises:
        UsageError: the folder cannot be written, or the model or its adapter cannot be read.
    """
    assert target.run is not None
    folder = folder.absolute()
    check_destination(folder)
    config = target.config
    base = find_base(config.model, target.model.commit)
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        staging.mkdir()
        if merge:
            _write_merged(target, staging, tell)
        else:
            _write_adapter(target, staging, base)
        _write_processor(target, staging)
        card = model_card(config, _summary(target), base, form="merged" if merge else "adapter", here=name)
        (staging / "README.md").write_text(card, "utf-8")
        asked = {"solver_prompt", "solution_form", "max_solution_tokens"}
        _write_json(staging / SOLVER, config.sampling.model_dump(mode="json", include=asked))
        apply_umask(staging)
        if folder.exists():
            folder.rmdir()
        staging.rename(folder)
    except OSError as error:
        raise UsageError(f"{folder} could not be written: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _summary(target: Target) -> dict[str, Any]:
    """What the run's summary says about these weights; of a checkpoint, whose accuracy nobody measured, only a part."""
    assert target.run is not None
    assert target.adapters is not None
    summary = read_json(target.run / "summary.json", LARGEST)
    if target.adapters == target.run:
        return summary
    return {"images": summary.get("images"), "best_step": int(target.adapters.name.removeprefix("step-"))}


def _write_adapter(target: Target, folder: Path, base: Base) -> None:
    """The adapter as the run wrote it, whose config names the base as others can find it."""
    assert target.adapters is not None
    solver = target.adapters / "solver"
    weights = solver / "adapter_model.safetensors"
    settings = read_json(solver / "adapter_config.json", 2**20)
    try:
        if not settings or not weights.is_file() or weights.is_symlink():
            raise OSError("adapter_config.json or adapter_model.safetensors is missing, damaged or a link")
        with safe_open(weights, "pt"):  # compares the length that the header tells with the file's
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"the adapter in {solver} cannot be read: {error}") from None
    shutil.copyfile(weights, folder / weights.name)
    settings |= {"base_model_name_or_path": base.hub_id, "revision": base.commit, "inference_mode": True}
    _write_json(folder / "adapter_config.json", settings)


def _write_merged(target: Target, folder: Path, tell: Callable[[str], None]) -> None:
    """The whole model, on the CPU: of each adapted layer W + s·B·A in float32, rounded to the dtype of the base."""
    config = target.config
    stored = str(read_config(target.model).dtype).removeprefix("torch.")
    dtype = stored if stored in get_args(Dtype) else config.backbone.dtype
    policy, _ = load_target(replace(target, config=config.changed(dtype=dtype, quantization=None)), "cpu", tell)
    for module in policy.model.modules():
        if isinstance(module, lora.Linear):
            layer: Any = module.get_base_layer()
            merged = layer.weight.data.float() + module.get_delta_weight("solver").detach()
            layer.weight.data = merged.to(layer.weight.dtype)
    model: Any = policy.model.unload()
    model.generation_config = _greedy(policy)
    model.save_pretrained(folder)
    settings = read_json(folder / "config.json", 2**24)
    _write_json(folder / "config.json", {name: value for name, value in settings.items() if name not in PATHS})


def _greedy(policy: Policy) -> GenerationConfig:
    """Greedy, from the model's own distribution as in training: the base's settings may ask for a penalty or top-k."""
    return GenerationConfig(
        do_sample=False,
        repetition_penalty=1.0,
        bos_token_id=policy.backbone.generation_config.bos_token_id,
        eos_token_id=list(policy.end_tokens),
        pad_token_id=policy.pad_token,
    )


def _write_processor(target: Target, folder: Path) -> None:
    """The files of the base's processor, with the limit of image tokens that the run was trained under."""
    processor, source = load_processor(target.model, target.config.backbone.max_image_tokens), target.model.folder
    (class_name,) = (base.__name__ for base in type(processor).__bases__)  # of transformers; ours leaves videos out
    for name in (*OF_PROCESSOR, *processor.tokenizer.vocab_files_names.values()):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        settings = {key: value for key, value in read_json(folder / name, 2**24).items() if key not in PATHS}
        # By which AutoProcessor finds the class where there is no config.json, as beside an adapter.
        settings.setdefault("processor_class", class_name)
        images = settings if name == "preprocessor_config.json" else settings.get("image_processor")
        if isinstance(images, dict) and scales_by_area(processor):
            size = dict(processor.image_processor.size)
            older = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
            images |= {"size": size, **{key: value for key, value in older.items() if key in images}}
        _write_json(folder / name, settings)


def _write_json(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
