"""How images and text become tensors, whether or not torchvision is installed.

Most processors of vision-language models require a video processor, which requires torchvision. Images alone need
neither, so the model's own processor class is built without one. The image processor is always the one on Pillow: it
and torchvision's differ by up to 0.25 in pixel values, and a run must not depend on what happens to be installed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import (
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    ProcessorMixin,
)


def without_video(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor class for images and text only: its processors of video and sound may be None."""

    class ImageTextProcessor(processor_class):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is None:
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    return ImageTextProcessor


def load_processor(model: str | Path, max_image_tokens: int | None = None, *, raise_limit: bool = False) -> Any:
    """Load the processor of an image-text-to-text model from a folder or a hub id, without its video processor.

    Args:
        model: a folder or a hub id.
        max_image_tokens: images are scaled down until they take at most so many tokens, if the model's processor
            scales images by area (Qwen's do; others fix the number, or cut tiles). None: the model's own limit.
        raise_limit: let `max_image_tokens` lie above the model's own limit, which holds otherwise.

    Raises:
        OSError: no such model, or one without a processor.
        ValueError: a model type that transformers has no processor for, or a processor without a chat template.
        ImportError: the model's processor needs another package; the message names it.
    """
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    if type(config) not in PROCESSOR_MAPPING:
        raise ValueError(f"transformers has no processor for the model type {config.model_type!r}")
    processor_class = without_video(PROCESSOR_MAPPING[type(config)])  # type: ignore[arg-type]
    settings, _ = processor_class.get_processor_dict(model)
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(model, backend="pil", trust_remote_code=False),
        "tokenizer": AutoTokenizer.from_pretrained(model, trust_remote_code=False),
    }
    arguments = [parts.get(name) for name in processor_class.get_attributes()]
    processor: Any = processor_class.from_args_and_dict(arguments, settings)
    processor.chat_template = processor.chat_template or parts["tokenizer"].chat_template
    if not processor.chat_template:
        raise ValueError(f"{model} has no chat template: an instruction-tuned model is needed")
    if max_image_tokens is not None and scales_by_area(processor):
        _limit(parts["image_processor"], max_image_tokens, raise_limit)
    return processor


def scales_by_area(processor: Any) -> bool:
    """Whether `max_image_tokens` has an effect: whether the edges in the processor's `size` are areas in pixels."""
    images = processor.image_processor
    return "merge_size" in images.to_dict() and "longest_edge" in dict(images.size)


def _limit(images: Any, max_image_tokens: int, raise_limit: bool) -> None:
    size = dict(images.size)
    limit = max_image_tokens * (images.patch_size * images.merge_size) ** 2
    size["longest_edge"] = limit if raise_limit else min(size["longest_edge"], limit)
    size["shortest_edge"] = min(size["shortest_edge"], size["longest_edge"])
    images.size = size


class SeenImage:
    """An image with a processor that processes it once; every prompt about the image reuses the result.

    Args:
        processor: the model's; it is not changed.
        image: any picture.
    """

    def __init__(self, processor: Any, image: Image.Image) -> None:
        self.image = image
        self._read: dict[str, BatchFeature] = {}
        self.processor = copy.copy(processor)
        self.processor.image_processor = _Once(processor.image_processor)

    def inputs(self, text: str) -> BatchFeature:
        """The processor's tensors for one text that holds the image once, with batch size 1.

        The text is a rendered chat template, so that no special tokens are added. The tensors are kept, because the
        prompt that is sampled from is needed again for the update.
        """
        if text not in self._read:
            made = self.processor(images=[self.image], text=[text], add_special_tokens=False, return_tensors="pt")
            self._read[text] = made
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


def render(processor: Any, chat: list[dict[str, Any]]) -> str:
    """Chat messages as text in the model's template, up to where its answer begins, with one token for each image."""
    # The tokenizer's method, because that of some processors requires a video processor for the same text.
    return processor.tokenizer.apply_chat_template(
        chat, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
    )
