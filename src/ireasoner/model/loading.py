"""Making a policy: load the backbone, add fresh adapters, and find out what its attention allows."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.cache_utils import DynamicLayer

from ireasoner.method.types import ROLES
from ireasoner.model.backbone import language_targets, load_backbone, load_model_processor, resolve_device
from ireasoner.model.forward import can_share_attention, check_output_layer, new_cache
from ireasoner.model.options import BackboneOptions
from ireasoner.model.policy import Policy


def load_policy(model: str, options: BackboneOptions | None = None, *, device: str = "auto", seed: int = 0) -> Policy:
    """Load a model from 'tiny', a folder or a hub id, with fresh adapters.

    Raises:
        ModelError: no such model or device, no vision, another architecture, or a LoRA target that matches nothing.
    """
    options = options or BackboneOptions()
    backbone = load_backbone(model, options.dtype, resolve_device(device))
    return make_policy(backbone, load_model_processor(model, options.max_image_tokens), options, seed=seed)


def make_policy(backbone: Any, processor: Any, options: BackboneOptions, *, seed: int = 0) -> Policy:
    """A policy of a loaded backbone, its adapters drawn from `seed`; each adapter's product is 0.

    Raises:
        ModelError: an architecture that is not supported, or a LoRA target that matches nothing.
    """
    targets = language_targets(backbone, options.lora_targets)
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=0.0,  # dropout in the update would train another policy than the one that sampled
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 by a name that it has deprecated
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        model: PeftModel = get_peft_model(backbone, config, adapter_name=ROLES[0])  # type: ignore[assignment]
        model.add_adapter(ROLES[1], config)
    model.eval()  # no dropout anywhere, in sampling or in the update
    checkpointing = options.gradient_checkpointing
    policy = Policy(backbone, model, processor, targets, gradient_checkpointing=checkpointing, limits_images=True)
    # A cache that is only ever appended to may be shared by a prompt's completions with gradients; states that are
    # overwritten (linear attention, convolutions) may not.
    policy.shares_prompts = all(isinstance(layer, DynamicLayer) for layer in new_cache(policy).layers)
    check_output_layer(policy)
    policy.shares_attention = can_share_attention(policy)
    return policy
