"""Where models come from: the backbone, its processor, its device, and the layers of it that can be adapted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    ProcessorMixin,
)

from ireasoner.method.types import UsageError

TINY_MODEL = Path(__file__).with_name("tiny_lmm")


class ModelError(UsageError):
    """The model cannot be used; the message says why and what to do."""


def brief(error: Exception) -> str:
    """What an error says, as a single line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def resolve_model(model: str | Path) -> str:
    """The folder or hub id of a model. 'tiny' ships with the package; anything else is a folder or a hub id already."""
    return str(TINY_MODEL if model == "tiny" else model)


def read_config(model: str) -> Any:
    """The model's config.json.

    Raises:
        ModelError: no such model, or one without vision.
    """
    try:
        config = AutoConfig.from_pretrained(resolve_model(model), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the model {model!r}: {brief(error)}") from None
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(f"{model} is a {config.model_type} model: a model for images and text is needed")
    return config


def load_backbone(model: str, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """Load a model without adapters, frozen, in eval mode; from safetensors only, and without running code it brings.

    Raises:
        ModelError: no such model, no vision, or an architecture that does not continue its prompt.
    """
    config = read_config(model)
    try:
        backbone: Any = AutoModelForImageTextToText.from_pretrained(  # type: ignore[call-arg]
            resolve_model(model), dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the model {model!r}: {brief(error)}") from None
    if config.is_encoder_decoder or backbone.get_output_embeddings() is None:
        raise ModelError(f"{model} is a {config.model_type} model: one that continues its prompt is needed")
    if not hasattr(backbone.base_model, "get_image_features"):  # of whatever class the checkpoint names
        raise ModelError(f"{model} is a {config.model_type} model: one with image features in its prompt is needed")
    return backbone.requires_grad_(False).eval().to(device)


def without_video(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor class for images and text only: its processors of video and sound may be None.

    Most processors of vision-language models require a video processor, which requires torchvision. Images alone need
    neither.
    """

    class ImageTextProcessor(processor_class):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is None:
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    return ImageTextProcessor


def load_processor(model: str | Path, max_image_tokens: int | None = None) -> Any:
    """Load the model's processor, without its video processor.

    The image processor is always the one on Pillow: it and torchvision's differ by up to 0.25 in pixel values, and a
    run must not depend on what happens to be installed.

    Args:
        model: 'tiny', a folder or a hub id.
        max_image_tokens: images are scaled down until they take at most so many tokens, if the model's processor
            scales images by area (Qwen's do; others fix the number, or cut tiles). The model's own limit holds as well.

    Raises:
        ModelError: there is no processor that can be used, or it has no chat template, or it needs another package.
    """
    path = resolve_model(model)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if type(config) not in PROCESSOR_MAPPING:
            raise ValueError(f"transformers has no processor for the model type {config.model_type!r}")
        processor_class = without_video(PROCESSOR_MAPPING[type(config)])  # type: ignore[arg-type]
        settings, _ = processor_class.get_processor_dict(path)
        parts = {
            "image_processor": AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False),
            "tokenizer": AutoTokenizer.from_pretrained(path, trust_remote_code=False),
        }
        arguments = [parts.get(name) for name in processor_class.get_attributes()]
        processor: Any = processor_class.from_args_and_dict(arguments, settings)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"cannot load the processor of {model!r}: {brief(error)}") from None
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if not processor.chat_template:
        raise ModelError(f"{model} has no chat template: an instruction-tuned model is needed")
    if max_image_tokens is not None and scales_by_area(processor):
        images = processor.image_processor
        size, limit = dict(images.size), max_image_tokens * (images.patch_size * images.merge_size) ** 2
        size["longest_edge"] = min(size["longest_edge"], limit)
        size["shortest_edge"] = min(size["shortest_edge"], size["longest_edge"])
        images.size = size
    return processor


def scales_by_area(processor: Any) -> bool:
    """Whether `max_image_tokens` has an effect: whether the edges in the processor's `size` are areas in pixels."""
    images = processor.image_processor
    return "merge_size" in images.to_dict() and "longest_edge" in dict(images.size)


def resolve_device(device: str) -> str:
    """The device that is meant; 'auto' is the first GPU if there is one, else the CPU.

    Raises:
        ModelError: no such device here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.cuda.device_count()
    here = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if device not in here:
        raise ModelError(f"torch sees no device {device!r} here: use auto or one of {', '.join(here)}")
    return device


def module_name(root: torch.nn.Module, module: torch.nn.Module) -> str:
    """The name of `module` below `root`."""
    return next(name for name, descendant in root.named_modules() if descendant is module)


def language_targets(backbone: PreTrainedModel, targets: Sequence[str] = ()) -> str:
    """A pattern for PEFT that matches linear layers of the language model, and nothing else.

    Args:
        targets: names of layers, or the ends of names; empty: all layers.

    Raises:
        ModelError: a target that matches nothing.
    """
    decoder = backbone.get_decoder()
    linear = [name for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)]
    layer_names = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ModelError(
                f"LoRA target {target!r} matches no linear layer of the language model; it has {', '.join(layer_names)}"
            )
    within = re.escape(module_name(backbone, decoder)) + r"\.(?:.*\.)?"
    return f"{within}({'|'.join(map(re.escape, targets or layer_names))})"
