"""Models of a real size and class with random weights, to measure time and memory where nothing can be downloaded.

`random-7b` has the exact architecture of Qwen2.5-VL-7B-Instruct (its published config.json), and `random-25m` is the
same class at a size for CPUs. Both use the processor of the tiny model: its token ids are a small part of their
vocabularies.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLConfig

from ireasoner.model.backbone import TINY_MODEL

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
    "random-7b": {
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "tie_word_embeddings": False,
    },
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
