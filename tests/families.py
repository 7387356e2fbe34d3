"""Tiny random models of the real classes of several families, as folders that `from_pretrained` reads.

Weights are random and sizes small; configs, processors, chat templates and tokens are put together as the published
checkpoints of each family have them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)
from transformers.models.gemma3.configuration_gemma3 import Gemma3Config
from transformers.models.internvl.configuration_internvl import InternVLConfig
from transformers.models.llava_onevision.configuration_llava_onevision import LlavaOnevisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMConfig

from ireasoner.model.source import TINY_MODEL

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "IMAGE{% elif c['type'] == 'video' %}VIDEO{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLIP = "<|vision_start|><|video_pad|><|vision_end|>"
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer(special: Iterable[str], end: str, template: str, **named: str) -> PreTrainedTokenizerFast:
    """The shipped model's vocabulary with a family's own special tokens; `named` become attributes (`image_token`)."""
    vocabulary = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    tokens = [*special, *named.values(), end]
    vocabulary.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    made = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, eos_token=end, pad_token="<|endoftext|>", extra_special_tokens=dict(named)
    )
    made.chat_template = template
    return made


def _save(
    out: Path, config: Any, words: Any, images: dict[str, Any], processor: dict[str, Any], ends: list[str]
) -> str:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = GenerationConfig(
        eos_token_id=words.convert_tokens_to_ids(ends), pad_token_id=words.pad_token_id
    )
    with torch.no_grad():
        for name, tensor in model.named_parameters():  # as initialised, most attend to nothing in particular
            if tensor.ndim > 1:
                tensor.normal_(0, 0.2 if "embed" in name else 0.12)
    model.save_pretrained(out)
    words.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(images))
    (out / "processor_config.json").write_text(json.dumps(processor))
    return str(out)


def qwen2_5_vl(out: Path) -> str:
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>").replace("VIDEO", CLIP)
    words = tokenizer(special, "<|im_end|>", template)
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(words),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        **_qwen_tokens(words),
    )
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14,
        "merge_size": 2,
        "size": {"shortest_edge": 784, "longest_edge": 784 * 64},
    }
    return _save(
        out, config, words, images, {"processor_class": "Qwen2_5_VLProcessor"}, ["<|im_end|>", "<|endoftext|>"]
    )


def _qwen_tokens(words: Any) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: words.convert_tokens_to_ids(token) for name, token in names.items()}


def qwen3_vl(out: Path, config_class: Any = Qwen3VLConfig, **text: Any) -> str:
    """Features of several vision layers are added within the language model (deepstack)."""
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>").replace("VIDEO", CLIP)
    words = tokenizer(special, "<|im_end|>", template)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = config_class(
        text_config={**TEXT, "head_dim": 16, "vocab_size": len(words), "rope_parameters": rope, **text},
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 16,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64,
        },
        **_qwen_tokens(words),
    )
    images = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "patch_size": 16,
        "merge_size": 2,
        "size": {"shortest_edge": 1024, "longest_edge": 1024 * 64},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return _save(out, config, words, images, {"processor_class": "Qwen3VLProcessor"}, ["<|im_end|>", "<|endoftext|>"])


def qwen3_vl_moe(out: Path) -> str:
    """A mixture of experts, which are one tensor for each product."""
    return qwen3_vl(out, Qwen3VLMoeConfig, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48)


def qwen3_5(out: Path) -> str:
    """Most layers are linear attention: their state is overwritten, so that no completion can share it."""
    return qwen3_vl(
        out,
        Qwen3_5Config,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
            "partial_rotary_factor": 1.0,
        },
    )


def smolvlm(out: Path) -> str:
    """Images are cut into tiles, each with tokens of its own between the features."""
    tiles = [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
    named = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    template = (
        "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}:{% for line in message['content'] %}"
        "{% if line['type'] == 'text' %}{{line['text']}}{% else %}{{ '<image>' }}{% endif %}{% endfor %}"
        "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )
    words = tokenizer(tiles, "<end_of_utterance>", template, **named)
    config = SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(words)},
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
    )
    images = {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": 64},
        "do_image_splitting": True,
        "max_image_size": {"longest_edge": 32},
        "do_pad": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return _save(
        out, config, words, images, {"processor_class": "SmolVLMProcessor", "image_seq_len": 4}, ["<end_of_utterance>"]
    )


def internvl(out: Path) -> str:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer([], "<|im_end|>", CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"), **named)
    config = InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(words)},
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    images = {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "size": {"height": 32, "width": 32},
        "crop_to_patches": True,
        "max_patches": 3,
        "min_patches": 1,
    }
    return _save(
        out, config, words, images, {"processor_class": "InternVLProcessor", "image_seq_length": 4}, ["<|im_end|>"]
    )


def gemma3(out: Path) -> str:
    """Image tokens see each other in both directions; most layers attend to a sliding window, shorter than a prompt."""
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    template = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    words = tokenizer(["<start_of_turn>", "<bos>"], "<end_of_turn>", template, **named)
    words.bos_token = "<bos>"
    config = Gemma3Config(
        text_config={
            **TEXT,
            "vocab_size": len(words),
            "head_dim": 16,
            "sliding_window": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        vision_config={**VISION, "image_size": 32, "patch_size": 8, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_id=words.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
    )
    images = {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 32, "width": 32},
        "do_pan_and_scan": False,
    }
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    return _save(out, config, words, images, processor, ["<end_of_turn>", "<|endoftext|>"])


def llava_onevision(out: Path) -> str:
    """Tiles by the image's shape, with learned line ends between the features."""
    words = tokenizer(["<video>"], "<|im_end|>", CHATML.replace("IMAGE", "<image>\n"), image_token="<image>")
    pinpoints = [[32, 32], [32, 64], [64, 32], [64, 64]]
    config = LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(words)},
        vision_config={
            **VISION,
            "image_size": 32,
            "patch_size": 8,
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
        },
        image_token_id=words.convert_tokens_to_ids("<image>"),
        video_token_id=words.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=pinpoints,
    )
    images = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_grid_pinpoints": pinpoints,
    }
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
    }
    return _save(out, config, words, images, processor, ["<|im_end|>"])


FAMILIES: dict[str, Callable[[Path], str]] = {
    f.__name__: f for f in (qwen2_5_vl, qwen3_vl, smolvlm, internvl, gemma3, llava_onevision, qwen3_5)
}
