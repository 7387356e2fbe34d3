"""How likely the model that another trainer trains finds completions, with their image and without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ireasoner.method.scoring import RewardError
from ireasoner.model.inputs import token_texts
from ireasoner.plugins.groups import Completions, Prompt, pictures
from ireasoner.training.evaluation import GRAY


class Likelihoods:
    """Log-probabilities of completions behind a prompt, as TRL makes its inputs.

    Args:
        model: the model that is trained, as `GRPOTrainer` got it: adapters that the trainer puts into it are read too.
            Its weights must be whole on this device.
        processor: of the model.
        template_options: the `chat_template_kwargs` of `GRPOConfig`, if there are any.
    """

    def __init__(self, model: Any, processor: Any, template_options: Mapping[str, Any] | None = None) -> None:
        self.model, self.processor, self._options = model, processor, template_options or {}

    def told(self, group: Completions, prompt: Prompt, completion_ids: Sequence[Sequence[int]]) -> Completions:
        """A group with how likely its completions are; `completion_ids` are the N completions' sampled tokens."""
        return replace(
            group,
            tokens=[token_texts(self.processor, ids) for ids in completion_ids],
            logprobs=self.of_tokens(prompt, completion_ids),
            blank_logprobs=lambda: self.without_image(prompt, completion_ids),
        )

    @torch.no_grad()
    def of_tokens(self, prompt: Prompt, completion_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-probability of each token of N completions of one prompt, at temperature 1 and without dropout."""
        inputs = self.processor.apply_chat_template(
            conversation=[prompt] * len(completion_ids),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **self._options,
        ).to(self.model.device)
        ids = [torch.tensor(each, device=self.model.device) for each in completion_ids]
        ids_NC = pad_sequence(ids, batch_first=True)
        mask_NC = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
        behind = {"input_ids": ids_NC, "attention_mask": mask_NC}
        for name in inputs:
            if name in behind or name.endswith("token_type_ids"):  # token type 0 is text
                inputs[name] = torch.cat([inputs[name], behind.get(name, torch.zeros_like(ids_NC))], dim=1)
        kept = ids_NC.shape[1] + 1  # a token is predicted where the one before it stands
        with _evaluating(self.model):
            logits_NCV = self.model(**inputs, use_cache=False, logits_to_keep=kept).logits[:, -kept:-1]
        # One completion at a time, so that the whole group's logits are never held in float32.
        return [_chosen(logits_CV, each) for logits_CV, each in zip(logits_NCV, ids, strict=True)]

    def without_image(self, prompt: Prompt, completion_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """The same, if every image of the prompt were uniformly gray.

        Raises:
            RewardError: the prompt has no image.
        """
        if not pictures(prompt):
            raise RewardError("what the image adds to a reasoning step cannot be told: the prompt has no image")
        return self.of_tokens(_with_gray_images(prompt), completion_ids)


def _chosen(logits_CV: Tensor, ids_T: Tensor) -> list[float]:
    """The log-probabilities of T tokens, whose logits are the first of C."""
    return logits_CV[: len(ids_T)].float().log_softmax(-1).gather(-1, ids_T[:, None])[:, 0].tolist()


def _with_gray_images(prompt: Any) -> list[dict[str, Any]]:
    """The turns of a prompt with a gray image of the same size in place of each image."""

    def gray(block: Any) -> Any:
        if isinstance(block, str) or block.get("image") is None:
            return block
        return {**block, "image": Image.new("RGB", block["image"].size, GRAY)}

    return [{**turn, "content": [gray(block) for block in turn["content"]]} for turn in prompt]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Inside, a model has no dropout; afterwards each of its modules is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
