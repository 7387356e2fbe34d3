"""The plain path: what transformers and PEFT make of an image, a prompt and token ids, one at a time, without a cache.

Tests compare the policy, the sampler and the learner with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor

from ireasoner.method.types import ROLES, Role
from ireasoner.model.backbone import load_backbone, load_processor
from ireasoner.model.policy import Policy

processor_of = cache(load_processor)


def load_apart(policy: Policy, folder: Path, trainable: bool = False) -> dict[Role | None, torch.nn.Module]:
    """What another program would load: under None the frozen backbone, under each role PEFT's reading of its adapter.

    Every model has a backbone of its own, read from disk.
    """
    policy.save_adapters(folder)
    models: dict[Role | None, torch.nn.Module] = {None: load_backbone("tiny")}
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 by a name that it has deprecated
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        for role in ROLES:
            models[role] = PeftModel.from_pretrained(
                load_backbone("tiny"), folder / role, is_trainable=trainable
            ).eval()
    return models


def plain_logprobs(
    model: torch.nn.Module, image: Image.Image, chat: list[dict[str, Any]], ids: Sequence[int]
) -> Tensor:
    """Log-probabilities [tokens, V] at `ids` by one forward of the whole model on the processor's own inputs."""
    processor = processor_of("tiny")
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = dict(processor(images=[image], text=[text], return_tensors="pt"))
    prompt_length = inputs["input_ids"].shape[1]
    extra = torch.tensor([list(ids)])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], extra], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(extra)], 1)
    return model(**inputs).logits[0, prompt_length - 1 : -1].log_softmax(-1)


def chosen(logprobs: Tensor, ids: Sequence[int]) -> Tensor:
    """The log-probabilities [tokens] of `ids` themselves."""
    return logprobs[torch.arange(len(ids)), list(ids)]
