"""Where models come from: the backbone, its processor, its device, and the layers of it that can be adapted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from ireasoner.method.types import UsageError
from ireasoner.model.processors import load_processor

TINY_MODEL = Path(__file__).parents[1] / "playground" / "tiny_lmm"


class ModelError(UsageError):
    """The model cannot be used; the message says why and what to do."""


def resolve_model(model: str) -> str:
    """The folder or hub id of a model. 'tiny' ships with the package; anything else is a folder or a hub id already."""
    return str(TINY_MODEL) if model == "tiny" else model


def load_backbone(model: str, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """Load a model without adapters, frozen, in eval mode; from safetensors only, and without running code it brings.

    Raises:
        ModelError: no such model, no vision, or an architecture that does not continue its prompt.
    """
    path = resolve_model(model)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ModelError(f"{model} is a {config.model_type} model: a model for images and text is needed")
        backbone: Any = AutoModelForImageTextToText.from_pretrained(  # type: ignore[call-arg]
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the model {model!r}: {' '.join(str(error).split())[:300]}") from None
    if config.is_encoder_decoder or backbone.get_output_embeddings() is None:
        raise ModelError(f"{model} is a {config.model_type} model: one that continues its prompt is needed")
    if not hasattr(backbone.base_model, "get_image_features"):  # of whatever class the checkpoint names
        raise ModelError(f"{model} is a {config.model_type} model: one with image features in its prompt is needed")
    return backbone.requires_grad_(False).eval().to(device)


def load_model_processor(model: str, max_image_tokens: int | None = None) -> Any:
    """Load the processor of 'tiny', a folder or a hub id.

    Raises:
        ModelError: there is none that can be used.
    """
    try:
        return load_processor(resolve_model(model), max_image_tokens)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"cannot load the processor of {model!r}: {' '.join(str(error).split())[:300]}") from None


def resolve_device(device: str) -> str:
    """The device that is meant; 'auto' is the first GPU if there is one, else the CPU.

    Raises:
        ModelError: no such device here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ModelError(f"no device {device!r}: use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device != "cpu" and int(device.removeprefix("cuda").removeprefix(":") or 0) >= count:
        raise ModelError(f"device {device} was asked for, but torch sees {count} GPUs: use --device cpu")
    return device


def module_name(root: torch.nn.Module, module: torch.nn.Module) -> str:
    """The name of `module` below `root`."""
    return next(name for name, found in root.named_modules() if found is module)


def language_targets(backbone: PreTrainedModel, targets: Sequence[str] = ()) -> str:
    """A pattern for PEFT that matches linear layers of the language model, and nothing else.

    Args:
        targets: names of layers, or the ends of names; empty: all layers.

    Raises:
        ModelError: a target that matches nothing.
    """
    tower = re.escape(module_name(backbone, backbone.get_decoder())) + r"\.(?:.*\.)?"
    linear = [name for name, module in backbone.named_modules() if isinstance(module, torch.nn.Linear)]
    found = sorted({name.rsplit(".", 1)[-1] for name in linear if re.fullmatch(tower + ".*", name)})
    for target in targets:
        if not any(re.fullmatch(tower + re.escape(target), name) for name in linear):
            raise ModelError(
                f"LoRA target {target!r} matches no linear layer of the language model; it has {', '.join(found)}"
            )
    return f"{tower}({'|'.join(map(re.escape, targets or found))})"
