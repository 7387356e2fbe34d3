"""The published architectures of some models, to plan with where the hub is out of reach.

The numbers are those of each model's config.json on the hub, as far as they decide on sizes. They say nothing about
weights, tokenizers or token ids. They were compared, in November 2026 and each of them, with copies in public code:

- Qwen2.5-VL 3B, 7B, 32B and 72B: `examples/qwen2.5vl/model_*.json` of Ascend/MindSpeed-MM.
- Qwen3-VL 2B, 8B, 30B-A3B and 235B-A22B: `torchtitan/experiments/qwen3_vl/__init__.py` of pytorch/torchtitan; the
  mixtures also with `scripts/models/qwen3-vl-*.sh` of THUDM/slime.
- Qwen3-VL 4B: the copy of its config.json in kohya-ss's training scripts for Krea 2, and
  `xtuner/v1/model/compose/qwen3_vl/qwen3_vl_config.py` of InternLM/xtuner.
- Qwen3-VL 32B: no copy under its own name was found. The language model is that of Qwen3-32B, as copies of that
  config.json have it; the vision tower is that of the 8B.
"""

from __future__ import annotations

from typing import Any


def _qwen2_5_vl(
    width: int, layers: int, heads: int, key_heads: int, mlp: int, vocabulary: int, vision_mlp: int, tied: bool = False
) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": vision_mlp,
            "num_heads": 16,
            "out_hidden_size": width,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "tie_word_embeddings": tied,
    }


# Of the vision tower: depth, width, width of its MLP, and the layers whose features go into the language model.
_SMALL_TOWER, _LARGE_TOWER = (24, 1024, 4096, [5, 11, 17]), (27, 1152, 4304, [8, 16, 24])


def _qwen3_vl(
    width: int,
    layers: int,
    heads: int,
    key_heads: int,
    mlp: int,
    tower: tuple[int, int, int, list[int]] = _LARGE_TOWER,
    tied: bool = False,
    expert_mlp: int = 0,
) -> dict[str, Any]:
    depth, vision_width, vision_mlp, deepstack = tower
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": expert_mlp} if expert_mlp else {}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    return {
        "model_type": "qwen3_vl_moe" if expert_mlp else "qwen3_vl",
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "tie_word_embeddings": tied,
            "rope_parameters": rope,
            **experts,
        },
        "vision_config": {
            "depth": depth,
            "hidden_size": vision_width,
            "intermediate_size": vision_mlp,
            "num_heads": 16,
            "out_hidden_size": width,
            "patch_size": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": deepstack,
        },
        "tie_word_embeddings": tied,
    }


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5_vl(2048, 36, 16, 2, 11008, 151936, 3420, tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5_vl(3584, 28, 28, 4, 18944, 152064, 3420),
    "Qwen/Qwen2.5-VL-32B-Instruct": _qwen2_5_vl(5120, 64, 40, 8, 27648, 152064, 3456),
    "Qwen/Qwen2.5-VL-72B-Instruct": _qwen2_5_vl(8192, 80, 64, 8, 29568, 152064, 3456),
    "Qwen/Qwen3-VL-2B-Instruct": _qwen3_vl(2048, 28, 16, 8, 6144, _SMALL_TOWER, tied=True),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl(2560, 36, 32, 8, 9728, _SMALL_TOWER, tied=True),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl(4096, 36, 32, 8, 12288),
    "Qwen/Qwen3-VL-32B-Instruct": _qwen3_vl(5120, 64, 64, 8, 25600),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": _qwen3_vl(2048, 48, 32, 4, 6144, expert_mlp=768),
    "Qwen/Qwen3-VL-235B-A22B-Instruct": _qwen3_vl(4096, 94, 64, 4, 12288, expert_mlp=1536),
}
