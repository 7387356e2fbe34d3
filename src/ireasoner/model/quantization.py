"""Backbones whose language model's linear layers are held in 4 or 8 bits, by bitsandbytes.

Only what is frozen is quantised: the adapters stay in float32, and so does the sum of a layer's product and its adapter
(`lora`). The reference is the same quantised backbone without adapters. The vision tower, which encodes each image
once, the embeddings and the output layer keep the backbone's dtype. A weight is brought back to that dtype for each
product with it, which is also what bitsandbytes does for more than one row; its own layers are not run.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from ireasoner.model.options import Quantization
from ireasoner.model.source import ModelError

BLOCK, OUTER_BLOCK = 64, 256  # weights that share a scale in nf4; scales that share one of their own
INT8_RANGE = 127


def settings_for(quantization: Quantization, dtype: str, config: Any) -> BitsAndBytesConfig:
    """What transformers is told, to quantise a model's weights one after another while it loads them.

    Args:
        quantization: how.
        dtype: of all other weights, in which products are computed.
        config: the model's.

    Raises:
        ModelError: bitsandbytes is not installed, or the weights in the model's files are quantised already.
    """
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"--quantization {quantization} needs bitsandbytes: pip install 'ireasoner[quant]', or leave the option out"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError("--quantization is for a model whose weights are whole, and those of this one are quantised")
    return BitsAndBytesConfig(
        load_in_4bit=quantization == "nf4",
        load_in_8bit=quantization == "int8",
        llm_int8_skip_modules=_beside_language_model(config),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def _beside_language_model(config: Any) -> list[str]:
    """The names of the largest modules of a model that have no part of its language model in them."""
    with init_empty_weights():
        parent: Any = AutoModelForImageTextToText.from_config(config)
        decoder = parent.get_decoder()
    found, prefix = [], ""
    while parent is not decoder:
        (within,) = (name for name, child in parent.named_children() if decoder in child.modules())
        found += [prefix + name for name, _ in parent.named_children() if name != within]
        parent, prefix = getattr(parent, within), f"{prefix}{within}."
    return found


def dense(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A weight as products take it: one that is quantised in `dtype`, any other as it is.

    Args:
        weight: [O, I] of a linear layer; a quantised one is a parameter of bitsandbytes', in its own shape.
        dtype: that of the layer's input.

    Returns:
        [O, I]; and [O], by which the outputs are multiplied afterwards, in float32 (None: by 1). Integers of 8 bits are
        exact in every dtype, and with few inputs it takes less time to multiply the outputs than the weight.
    """
    if weight.is_floating_point():
        return weight, None
    quantised: Any = weight
    if weight.dtype == torch.int8:
        return quantised.data.to(dtype), quantised.SCB.float() / INT8_RANGE
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]  # optional

    return dequantize_4bit(quantised.data, quantised.quant_state).to(dtype), None


def quantised_bytes(quantization: Quantization, outputs: int, inputs: int) -> int:
    """Bytes of a quantised weight [outputs, inputs] in memory, with its scales."""
    size = outputs * inputs
    if quantization == "int8":
        return size + 4 * outputs
    blocks = -(-size // BLOCK)
    tables = 4 * (16 + 256 + 1)  # of the values of a weight and of a scale, and the mean of the scales
    return -(-size // 2) + blocks + 4 * -(-blocks // OUTER_BLOCK) + tables
