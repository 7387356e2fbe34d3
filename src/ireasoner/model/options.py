"""The options of the backbone, its adapters and their optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from ireasoner.method.recipe import Count, NonNegative, Options, Positive

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "int8"]


def _none_or_from_one(cap: float) -> float:
    """A bound on importance weights. Below 1 it would truncate the weights of a sampler that is the learner itself.

    Raises:
        ValueError: the bound is neither 0, for no weights, nor 1 or more.
    """
    if cap != 0 and cap < 1:
        raise ValueError("must be at least 1, or 0 for no weights")
    return cap


class BackboneOptions(Options):
    """How the backbone is held in memory, and where adapters are put on it."""

    max_image_tokens: Count = 1280
    """Images are scaled down to at most so many tokens, where the model's processor scales by area."""
    lora_rank: Count = 16
    """Rank of both adapters."""
    lora_alpha: Count = 32
    """LoRA's scale is alpha / rank."""
    lora_targets: tuple[str, ...] = ()
    """Linear layers of the language model that get LoRA (all)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them, in all of an update (only in groups above
    tokens_per_batch): less memory, a third more time."""
    dtype: Dtype = "bfloat16"
    """Backbone weights; adapters stay in float32. float16 is for GPUs without bfloat16 (V100, T4): large activations
    overflow in it."""
    quantization: Quantization | None = None
    """Hold the linear layers of the frozen language model in 4 bits a weight (nf4) or 8 (int8), with bitsandbytes: less
    memory, more time (as dtype says)."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """How attention is computed; with flash_attention_2, completions do not share their prompt's cache, and eager takes
    memory that is not counted beforehand (as transformers chooses)."""


class OptimizerOptions(Options):
    """AdamW of one role, and how many tokens an update takes at a time."""

    learning_rate: Positive = 2e-5
    """AdamW learning rate, constant."""
    weight_decay: NonNegative = 0.01
    """AdamW weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm, for each role."""
    importance_cap: Annotated[NonNegative, AfterValidator(_none_or_from_one)] | None = None
    """Each token counts as much more or less in the gradient as the learner finds it likelier or less likely than the
    sampler did, at most by this factor (0: all count the same; by default 2 where vLLM samples, and 0 elsewhere)."""
    tokens_per_batch: Count = 3072
    """Most tokens of an update whose activations are kept at a time; larger groups compute them again in the backward
    pass. Lowered at a run's start to what the GPU holds; sampling is held to the same memory."""
