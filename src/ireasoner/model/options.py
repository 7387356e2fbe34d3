"""The options of the backbone, its adapters and their optimizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ireasoner.method.recipe import Count, NonNegative, Options, Positive


class BackboneOptions(Options):
    """How the backbone is held in memory and where adapters are put on it."""

    max_image_tokens: Count = Field(
        default=1280,
        description="images are scaled down to at most so many tokens, where the model's processor scales by area",
    )
    lora_rank: Count = Field(default=16, description="rank of both adapters")
    lora_alpha: Count = Field(default=32, description="LoRA's scale is alpha / rank")
    lora_targets: tuple[str, ...] = Field(
        default=(), description="linear layers of the language model that get LoRA (all)"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute activations again in the backward pass instead of keeping them: less memory"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="backbone weights; adapters stay in float32"
    )


class OptimizerOptions(Options):
    """One role's AdamW, and how large a piece of a batch it takes at a time."""

    learning_rate: Positive = Field(default=1e-6, description="AdamW learning rate, constant")
    weight_decay: NonNegative = Field(default=0.01, description="AdamW weight decay")
    max_grad_norm: Positive = Field(default=1.0, description="gradients are clipped to this norm, for each role")
    tokens_per_batch: Count = Field(
        default=3072, description="most tokens in one forward pass of the update; larger batches are split"
    )
