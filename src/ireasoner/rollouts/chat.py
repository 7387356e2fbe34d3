"""A request as vLLM's `/v1/chat/completions` is asked it, and its reply as a completion."""

from __future__ import annotations

import base64
import io
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt

from ireasoner.method.types import Completion
from ireasoner.model.inputs import NO_THINKING, EncodedImage, without_special_tokens
from ireasoner.model.policy import Policy
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.live import completion
from ireasoner.rollouts.server import ServerError


class LogProb(BaseModel):
    logprob: Annotated[FiniteFloat, Field(le=0)]


class LogProbs(BaseModel):
    content: list[LogProb]


class Choice(BaseModel):
    finish_reason: str | None
    token_ids: Annotated[list[NonNegativeInt], Field(min_length=1)]
    logprobs: LogProbs


class Reply(BaseModel):
    """A reply, as far as it is read. `prompt_token_ids` are those with a token for every place of the image."""

    prompt_token_ids: list[NonNegativeInt]
    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]


def chat_body(policy: Policy, request: Request, as_features: bool, max_tokens: int) -> dict[str, Any]:
    """What is asked for a request, but for the model, the seed and the temperature.

    Args:
        policy: the learner's.
        as_features: whether the image is sent as the learner's features, or as a picture.
        request, max_tokens: as for `Engine.sample`.
    """
    images = _features(request.image) if as_features else [*map(_picture, request.image.seen.images)]
    chat = [
        {**turn, "content": [p for c in turn["content"] for p in (images if c["type"] == "image" else [c])]}
        for turn in without_special_tokens(policy.processor, request.messages)
    ]
    return {
        "messages": chat,
        "chat_template_kwargs": NO_THINKING,
        "max_tokens": max_tokens,
        # The whole distribution, whatever the checkpoint's generation config asks for.
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(policy.end_tokens),
        "logprobs": True,
        "top_logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,
    }


def completion_of(policy: Policy, address: str, reply: Reply, learner_ids: list[int], max_tokens: int) -> Completion:
    """A server's reply as a completion of the learner's prompt.

    Raises:
        ServerError: the server reads the prompt differently, or this model cannot have completed it so.
    """
    (choice,) = reply.choices
    ids, logprobs = choice.token_ids, [entry.logprob for entry in choice.logprobs.content]
    if reply.prompt_token_ids != learner_ids:
        raise ServerError(
            f"{address} reads a prompt as {len(reply.prompt_token_ids)} tokens that the learner reads as "
            f"{len(learner_ids)}: it serves another model, or its processor treats images differently"
        )
    vocabulary = policy.backbone.get_output_embeddings().weight.shape[0]
    ends = [place for place, token in enumerate(ids, 1) if token in policy.end_tokens]
    length = ends[0] if ends else max_tokens
    if max(ids) >= vocabulary or len(ids) != length or len(logprobs) != length:
        raise ServerError(
            f"{address} replies what this model cannot have completed: {len(ids)} tokens of up to {max_tokens}, the "
            f"largest {max(ids)}, with {len(logprobs)} log-probabilities"
        )
    return completion(policy, ids, logprobs)


def _features(image: EncodedImage) -> list[dict[str, Any]]:
    """The learner's own features as parts of a message, one for each image."""
    # vLLM puts the images of a prompt together: features behind one another, and grids as the rows of a tensor.
    grids = image.extras["image_grid_thw"]
    tokens = grids.prod(1) * len(image.pooled) // grids.prod(1).sum()
    return [
        {"type": "image_embeds", "image_embeds": {"image_embeds": _encoded(own), "image_grid_thw": _encoded(grid)}}
        for own, grid in zip(image.pooled.split(tokens.tolist()), grids, strict=True)
    ]


def _encoded(tensor: torch.Tensor) -> str:
    """A tensor as vLLM reads it in JSON."""
    file = io.BytesIO()
    torch.save(tensor.detach().cpu().clone(), file)  # the clone leaves out what else lies in the same storage
    return base64.b64encode(file.getvalue()).decode()


def _picture(image: Image.Image) -> dict[str, Any]:
    """The picture itself, without loss, as a part of a message."""
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
