"""What a policy reads: images after the vision tower, and prompts as the tensors of the model's processor.

An image may be several, or a clip (`views`). They are processed together, by one call of the model's own processor.

Shape suffixes: B prompts, P prompt positions (left-padded), C completion positions (right-padded), D width.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers.decoders import DecodeStream
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature

from ireasoner.method.types import Shown
from ireasoner.model.policy import Policy
from ireasoner.model.processors import ClipProcessor, placeholders, sharing_tokens, shown_by, shows_clips
from ireasoner.model.source import ModelError, brief
from ireasoner.model.views import Pictures, View, images_of, is_clip, shown_in

# For a chat template. Templates call thinking by one of two names (`thinking` in Kimi's, Granite's and DeepSeek's), and
# pass over the other one.
NO_THINKING = {"enable_thinking": False, "thinking": False}
_INNER = ("last_hidden_state", "hidden_states", "attentions")  # of the vision tower: nothing reads them later
LARGEST_BATCH = 2**22  # values of pixels that go through the vision tower together: those of about 900 image tokens


class SeenImage:
    """An image with a processor that processes it once; every prompt about the image reuses the result.

    Args:
        processor: the model's; it is not changed.
        view: any picture, several, or a clip.

    Attributes:
        is_video: whether the model is shown this as a video, in a place of its own kind, and not as images.
    """

    def __init__(self, processor: Any, view: View) -> None:
        self.view, self.images = view, images_of(view)
        self.is_video = is_clip(view) and shows_clips(processor)
        self._read: dict[str, BatchFeature] = {}
        self.processor = copy.copy(processor)
        self.processor.image_processor = _Once(sharing_tokens(processor, view, self.is_video))
        if isinstance(view, Pictures) and self.is_video:
            self.processor.video_processor = _Once(ClipProcessor(self.processor.image_processor, view))

    def inputs(self, text: str) -> BatchFeature:
        """The processor's tensors for one text that holds the places of these images, with batch size 1.

        The text is a rendered chat template, so that no special tokens are added. The tensors are kept, because the
        prompt that is sampled from is needed again for the update.
        """
        if text not in self._read:
            # Some families process several images of one prompt otherwise than those of several prompts.
            images = [list(self.images)] if len(self.images) > 1 else [*self.images]
            shown = {"videos": images} if self.is_video else {"images": images}
            self._read[text] = self.processor(**shown, text=[text], add_special_tokens=False, return_tensors="pt")
        return self._read[text]


class _Once:
    """An image processor that works on its first call, and returns the same tensors on later ones."""

    def __init__(self, image_processor: Any) -> None:
        self._image_processor, self._made = image_processor, None

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        if self._made is None:
            self._made = self._image_processor(*args, **kwargs)
        return copy.copy(self._made)  # processors take entries out of what they are given

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)


@dataclass(frozen=True)
class EncodedImage:
    """An image after the processor and the frozen vision tower, each of which saw it once.

    Attributes:
        seen: the image and what the processor made of it.
        features: what the model's `get_image_features` returned, by name: the features, not the states behind them.
        extras: what the forward pass reads of the image beside the features (grids, sizes), by name.
    """

    seen: SeenImage
    features: dict[str, Any]
    extras: dict[str, Tensor]

    @property
    def shown(self) -> Shown:
        """What the image is, for a prompt that speaks of it."""
        return shown_in(self.seen.view)

    @property
    def pooled(self) -> Tensor:
        """The features that take the places of the image tokens: [tokens, D]."""
        pooled = self.features["pooler_output"]
        pooled = torch.cat(list(pooled)) if isinstance(pooled, list | tuple) else pooled
        return pooled.reshape(-1, pooled.shape[-1])


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts with one image each, or one item of several. They are the same for every adapter.

    Attributes:
        text: tensors [B, P] by their names in the model's forward pass.
        images: one of each prompt.
    """

    text: Mapping[str, Tensor]
    images: tuple[EncodedImage, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice | Sequence[int]) -> Prompts:
        index = list(range(len(self))[rows] if isinstance(rows, slice) else rows)
        start = self.mask_BP[index].any(0).int().argmax()  # the columns before it are padding in all of these rows
        return Prompts(
            {name: tensor[index, start:] for name, tensor in self.text.items()},
            tuple(self.images[i] for i in index),
        )

    def row(self, index: int) -> dict[str, Tensor]:
        """The tensors [P] of one prompt."""
        return {name: tensor[index] for name, tensor in self.text.items()}

    def padded(self, rows: slice) -> Prompts:
        """Some of the rows, padded like all of them."""
        return Prompts({name: tensor[rows] for name, tensor in self.text.items()}, self.images[rows])

    @property
    def mask_BP(self) -> Tensor:
        """1 at real tokens."""
        return self.text["attention_mask"]

    def followed_by(self, ids_BC: Tensor, mask_BC: Tensor) -> Prompts:
        """The same prompts with right-padded text behind them."""
        appended = {"input_ids": ids_BC, "attention_mask": mask_BC}
        zeros = torch.zeros_like(ids_BC)  # token type 0 is text
        text = {n: torch.cat([t, appended.get(n, zeros).to(t.dtype)], dim=1) for n, t in self.text.items()}
        return replace(self, text=text)


@torch.no_grad()
def encode_images(policy: Policy, images: Sequence[View]) -> list[EncodedImage]:
    """Run each image through the processor and the vision tower, once; also one that is there several times.

    Several images of one prompt, or a clip, count as one here, and go through the tower together.

    Small images of one shape go through the tower together, which changes rounding alone. There is no limit of tokens
    as in the update: a large image is alone in the tower, without gradients, and what is kept of it are its features.
    """
    distinct = {id(image): image for image in images}
    if len(distinct) < len(images):
        encoded = dict(zip(distinct, encode_images(policy, [*distinct.values()]), strict=True))
        return [encoded[id(image)] for image in images]
    seen = [SeenImage(policy.processor, image) for image in images]
    inputs = [each.inputs(_places(policy.processor, each.view)) for each in seen]
    of_model = inspect.signature(policy.base.forward).parameters
    # The vision tower has seen the pixels; the image's size may still decide on positions.
    extras = [
        {name: tensor.to(policy.device) for name, tensor in each.items() if name in of_model and not _is_seen(name)}
        for each in inputs
    ]
    features: dict[int, dict[str, Any]] = {}
    for batch in _alike(inputs):
        found = _features(policy, [inputs[i] for i in batch], seen[batch[0]].is_video)
        features |= zip(batch, found, strict=True)
    return [EncodedImage(each, features[i], extras[i]) for i, each in enumerate(seen)]


def _places(processor: Any, view: View) -> str:
    """The shortest text in which a view is shown."""
    token, count = shown_by(processor, view)
    return token * count


def check_several(processor: Any, model: str) -> None:
    """Try out whether a model's prompts may show several images.

    Raises:
        ModelError: they may not.
    """
    trial = Pictures((Image.new("RGB", (64, 64)), Image.new("RGB", (96, 64))))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    try:
        seen = SeenImage(processor, trial)
        seen.inputs(_checked(processor, chat, trial))
    except Exception as error:  # of any family's processor
        problem = f"{model} cannot be shown several images in one prompt ({brief(error)})"
        raise ModelError(f"{problem}: give every item one image, or train another model.") from None


def _checked(processor: Any, chat: list[dict[str, Any]], view: View) -> str:
    """The rendered messages. Raises `ValueError` unless they hold each of the images once."""
    text, (token, count) = render(processor, chat, view), shown_by(processor, view)
    if text.count(token) != count:
        held = "exactly one image" if count == 1 else f"exactly {count} images"
        raise ValueError(f"a prompt must hold {held}, not {text.count(token)}")
    return text


def _alike(inputs: Sequence[BatchFeature]) -> list[list[int]]:
    """The numbers of all images in batches that may go through the vision tower together."""
    batches: dict[Any, list[list[int]]] = {}
    for i, each in enumerate(inputs):
        pixels = each["pixel_values"] if "pixel_values" in each else each["pixel_values_videos"]
        sizes = [(name, each[name].tolist()) for name in each if not _is_seen(name)]
        of_this_shape = batches.setdefault(str((pixels.shape, sizes)), [[]])
        if (len(of_this_shape[-1]) + 1) * pixels.numel() > LARGEST_BATCH:
            of_this_shape.append([])
        of_this_shape[-1].append(i)
    return [batch for of_one_shape in batches.values() for batch in of_one_shape if batch]


def _features(policy: Policy, inputs: Sequence[BatchFeature], is_video: bool) -> list[dict[str, Any]]:
    """What the vision tower makes of each of some images of one shape."""
    see = policy.base.get_video_features if is_video else policy.base.get_image_features
    of_tower = inspect.signature(see).parameters
    tensors = {n: torch.cat([each[n] for each in inputs]).to(policy.device) for n in inputs[0] if n in of_tower}
    pixels = "pixel_values_videos" if is_video else "pixel_values"
    tensors[pixels] = tensors[pixels].to(policy.backbone.dtype)
    output = see(**tensors, return_dict=True)
    # Not `items`: in some versions of transformers, a model sets `pooler_output` on an output without such a field.
    features = {name: value for name, value in vars(output).items() if name not in _INNER and value is not None}
    return [split_features(features, i, len(inputs)) for i in range(len(inputs))]


def build_prompts(policy: Policy, images: Sequence[EncodedImage], messages: Sequence[list[dict[str, Any]]]) -> Prompts:
    """Chat messages, with a place for one item each, as left-padded prompts.

    Raises:
        ValueError: messages without such a place, or with several.
    """
    texts = []
    for image, chat in zip(images, messages, strict=True):
        inputs = image.seen.inputs(_checked(policy.processor, chat, image.seen.view))
        texts.append({name: inputs[name][0] for name in inputs if _is_text(name)})
    return left_padded(policy, texts, images)


def left_padded(policy: Policy, texts: Sequence[Mapping[str, Tensor]], images: Sequence[EncodedImage]) -> Prompts:
    """Texts as prompts, each given as tensors [length] by their names in the model's forward pass."""
    batch = {}
    for name in texts[0]:
        padding = policy.pad_token if name == "input_ids" else 0
        rows = pad_sequence([text[name] for text in texts], True, padding, padding_side="left")
        batch[name] = rows.to(policy.device)
    return Prompts(batch, tuple(images))


def right_padded(policy: Policy, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The token ids of R completions, which are padded to the longest, and where they are real: both [R, C]."""
    ids_RC = pad_sequence([torch.tensor(each) for each in ids], True, policy.pad_token)
    mask_RC = pad_sequence([torch.ones(len(each), dtype=torch.bool) for each in ids], True)
    return ids_RC.to(policy.device), mask_RC.to(policy.device)


def image_tokens(policy: Policy) -> Tensor:
    """The ids of the tokens that stand for parts of an image or of a clip."""
    processor, config = policy.processor, policy.backbone.config.to_dict()
    tokens = [*processor.image_token_ids, *processor.video_token_ids]
    tokens += [config.get("image_token_id"), config.get("video_token_id")]
    return torch.tensor([-1 if token is None else token for token in tokens], device=policy.device)


def render(processor: Any, chat: list[dict[str, Any]], view: View | None = None) -> str:
    """Chat messages as text in the model's template, up to where its answer begins, with one token for each image.

    The place for an image in the messages becomes as many as the view has, or one for a video; without a view, it is
    for one image.

    What the messages say is without special tokens (`without_special_tokens`). Thinking is switched off where the
    template can do so: the prompts of both roles ask for a form of their own. Where it cannot, the text may end with
    `<think>`, which the parsers of replies must be told (`ireasoner.method.texts.opens_thought`).
    """
    parts = placeholders(processor, view)
    chat = [
        {**turn, "content": [p for c in turn["content"] for p in (parts if c.get("type") == "image" else [c])]}
        for turn in chat
    ]
    # The tokenizer's method, because that of some processors requires a video processor for the same text.
    return processor.tokenizer.apply_chat_template(
        without_special_tokens(processor, chat),
        chat_template=processor.chat_template,
        tokenize=False,
        add_generation_prompt=True,
        **NO_THINKING,
    )


def without_special_tokens(processor: Any, chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chat messages whose texts hold no special tokens: `<image>` in a question, as many data sets write it, would
    stand for a second image, and others would end the turn."""
    special = {token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    pattern = re.compile("|".join(map(re.escape, sorted(special | {processor.image_token}, key=len, reverse=True))))
    return [
        {**turn, "content": [{**c, "text": pattern.sub("", c["text"])} if "text" in c else c for c in turn["content"]]}
        for turn in chat
    ]


def embed_texts(policy: Policy, texts: Sequence[str], max_tokens: int) -> NDArray[np.float64]:
    """Normalised means of the backbone's input embeddings over each text's first tokens, special ones left out.

    Returns:
        [texts, D]; an empty text is a row of zeros.
    """
    table = policy.backbone.get_input_embeddings().weight
    rows = np.zeros((len(texts), table.shape[1]))
    for row, text in zip(rows, texts, strict=True):
        ids = policy.processor.tokenizer(text, add_special_tokens=False)["input_ids"][:max_tokens]
        if ids:
            mean = table[torch.tensor(ids, device=policy.device)].detach().double().mean(0)
            row[:] = (mean / mean.norm()).cpu().numpy()
    return rows


def token_texts(processor: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, which together are that of all. A token that ends within a character has none; the next
    one has the character.
    """
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(processor.tokenizer.backend_tokenizer, token) or "" for token in ids]


def join_features(features: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The features of several images, as the vision tower would return them if it saw all of them at once."""

    def join(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return torch.cat(list(values))
        return [tensor for tensors in values for tensor in tensors]

    # A list of pooled features has an entry for each image. Any other list has one for each layer, and each of those
    # holds the images.
    return {
        name: join([f[name] for f in features])
        if name == "pooler_output" or isinstance(first, Tensor)
        else [join(layer) for layer in zip(*(f[name] for f in features), strict=True)]
        for name, first in features[0].items()
    }


def split_features(features: dict[str, Any], index: int, count: int) -> dict[str, Any]:
    """The features of one of `count` images of one shape: the inverse of `join_features`."""

    def part(values: Any) -> Any:
        size = len(values) // count
        return values[index * size : (index + 1) * size]

    return {
        name: part(value) if name == "pooler_output" or isinstance(value, Tensor) else [part(layer) for layer in value]
        for name, value in features.items()
    }


def _is_seen(name: str) -> bool:
    """Whether an input is text or pixels; what else there is says how large an image is."""
    return _is_text(name) or name.startswith("pixel")


def _is_text(name: str) -> bool:
    return name in ("input_ids", "attention_mask") or name.endswith("token_type_ids")
