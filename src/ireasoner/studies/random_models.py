"""Models of a real size and class with random weights, to measure time and memory where nothing can be downloaded.

`random-7b` has the exact architecture of Qwen2.5-VL-7B-Instruct (its published config.json); `random-25m` and
`random-200m` are the same class at sizes for CPUs. All use the processor of the tiny model: its token ids are a small
part of their vocabularies. So do the models of `published`, of which nothing but the architecture is here.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLConfig

from ireasoner.model import backbone, loading
from ireasoner.model.options import BackboneOptions, Dtype, Quantization
from ireasoner.model.pieces import release_memory
from ireasoner.model.policy import Policy
from ireasoner.model.source import TINY_MODEL, find_model
from ireasoner.studies.architectures import ARCHITECTURES

OF_7B = "Qwen/Qwen2.5-VL-7B-Instruct"
SIZES: dict[str, dict[str, Any]] = {
    "random-25m": {
        "text_config": {
            "vocab_size": 4096,
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 10,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        "vision_config": {
            "depth": 6,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_heads": 4,
            "out_hidden_size": 384,
            "fullatt_block_indexes": [2, 5],
        },
        "tie_word_embeddings": True,
    },
    "random-200m": {
        "text_config": {
            "vocab_size": 32768,
            "hidden_size": 896,
            "intermediate_size": 3584,
            "num_hidden_layers": 14,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        "vision_config": {
            "depth": 6,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_heads": 4,
            "out_hidden_size": 896,
            "fullatt_block_indexes": [2, 5],
        },
        "tie_word_embeddings": True,
    },
    "random-7b": {name: value for name, value in ARCHITECTURES[OF_7B].items() if name != "model_type"},
}


def config_of(size: str) -> Qwen2_5_VLConfig:
    """The config of a size of `SIZES`, with the special tokens of the tiny model."""
    reference = AutoConfig.from_pretrained(TINY_MODEL)
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen2_5_VLConfig(**SIZES[size], **{name: getattr(reference, name) for name in tokens})
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(reference.text_config, name))
    return config


def build(size: str, dtype: torch.dtype, device: str) -> Any:
    """Build a frozen model in eval mode.

    Args:
        size: of `SIZES`.
        dtype: of its weights.
        device: where they are drawn, so that a large model never lies in this process's memory.
    """
    config = config_of(size)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    text: Any = config.text_config
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = text.eos_token_id, text.pad_token_id
    return model.requires_grad_(False).eval()


def find_commit(model: str, revision: str | None) -> str | None:
    """The commit of a model on the hub, so that all parts of it are loaded from the same one; None: not of the hub."""
    return None if model in SIZES else find_model(model, revision).commit


def load_backbone(
    model: str, dtype: Dtype, device: str, revision: str | None = None, quantization: Quantization | None = None
) -> Any:
    """As `ireasoner.model.backbone.load_backbone`; a size of `SIZES` has the same random weights every time.

    Weights are quantised while they are read from files, so that random ones are written to a temporary folder first.
    """
    if model not in SIZES:
        return backbone.load_backbone(model, dtype, device, revision=revision, quantization=quantization)
    if quantization is None:
        return build(model, getattr(torch, dtype), device)
    with TemporaryDirectory() as folder:
        build(model, getattr(torch, dtype), device).save_pretrained(folder)
        release_memory()
        return backbone.load_backbone(folder, dtype, device, quantization=quantization)


def load_processor(model: str, max_image_tokens: int, revision: str | None = None) -> Any:
    """As `ireasoner.model.backbone.load_processor`, for a size of `SIZES` too."""
    if model not in SIZES:
        return backbone.load_processor(model, max_image_tokens, revision=revision)
    processor = backbone.load_processor("tiny")
    pixels = max_image_tokens * 28**2  # more than the tiny model's own limit
    processor.image_processor.size = {**dict(processor.image_processor.size), "longest_edge": pixels}
    return processor


def load_policy(model: str, options: BackboneOptions, device: str, revision: str | None = None) -> Policy:
    """As `ireasoner.model.loading.load_policy`, for a size of `SIZES` too."""
    if model not in SIZES:
        return loading.load_policy(model, options, revision=revision, device=device)
    processor = load_processor(model, options.max_image_tokens)
    loaded = load_backbone(model, options.dtype, device, quantization=options.quantization)
    return loading.make_policy(loaded, processor, options)


def meta_policy(model: str, options: BackboneOptions, revision: str | None = None) -> Policy:
    """As `ireasoner.model.loading.meta_policy`, for a size of `SIZES` and the names in `ARCHITECTURES` too.

    The hub is not asked about a published model, unless a revision is named.
    """
    if model in SIZES:
        config = config_of(model)
    elif model in ARCHITECTURES and revision is None:
        config = AutoConfig.for_model(**ARCHITECTURES[model])
    else:
        return loading.meta_policy(model, options, revision)
    return loading.meta_policy_of(config, load_processor("random-7b", options.max_image_tokens), options)
