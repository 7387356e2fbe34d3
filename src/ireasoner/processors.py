"""One place that decides how images and text become tensors, with torchvision or without it.

transformers' `AutoProcessor` for Qwen2.5-VL wants a video processor, which wants torchvision. Images alone need
neither, so without torchvision the same processor class is built with no video processor. The image processor is the
Pillow one in both cases: it and torchvision's differ by up to 0.25 in pixel values, and a run must not depend on what
happens to be installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


class ImageTextProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's own processor, for images and text only."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor" and argument is None:
            return type(None)
        return super().check_argument_for_proper_class(argument_name, argument)


def load_processor(model: str | Path, max_image_tokens: int | None = None) -> ImageTextProcessor:
    """The processor of a Qwen2.5-VL model, from a folder or a hub id.

    Args:
        model: a folder or a hub id.
        max_image_tokens: images are scaled down until they take at most so many tokens; None: the model's own limit.

    Raises:
        OSError: no such model, or one without a processor.
    """
    images = Qwen2VLImageProcessorPil.from_pretrained(model)
    if max_image_tokens is not None:
        pixels_per_token = (images.patch_size * images.merge_size) ** 2
        size = dict(images.size)
        size["longest_edge"] = min(size["longest_edge"], max_image_tokens * pixels_per_token)
        size["shortest_edge"] = min(size["shortest_edge"], size["longest_edge"])
        images.size = size  # type: ignore[assignment]
    tokenizer = AutoTokenizer.from_pretrained(model)
    return ImageTextProcessor(images, tokenizer, None, chat_template=tokenizer.chat_template)
