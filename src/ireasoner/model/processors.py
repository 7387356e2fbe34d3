"""How a model's own processor is shown several images, or a clip.

An image's place in a chat message is `{"type": "image"}`. Several images take as many places in it, one after another.
The frames of a clip do the same, unless the family has a place for videos: Qwen's (Qwen2-VL to Qwen3.5), whose vision
tower looks at two frames at a time. Their video processors need torchvision, and resize otherwise than their image
processors on Pillow do; a run must not depend on what is installed. So `ClipProcessor` stands in for them: it puts
together, of frames that the image processor has processed, what a video processor returns. Everything else, such as
timestamps in the text and positions in time, remains the business of the family's own processor and model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import BatchFeature
from transformers.video_utils import VideoMetadata

from ireasoner.model.backbone import scales_by_area
from ireasoner.model.views import Pictures, View, images_of, is_clip

_IMAGE, _VIDEO = {"type": "image"}, {"type": "video"}


def shows_clips(processor: Any) -> bool:
    """Whether the family has a place for videos that `ClipProcessor` can fill: its image processor knows of time, and
    its chat template shows a video by one token."""
    token = getattr(processor, "video_token", None)
    if not token or "temporal_patch_size" not in processor.image_processor.to_dict():
        return False
    chat = [{"role": "user", "content": [_VIDEO, {"type": "text", "text": ""}]}]
    text = processor.tokenizer.apply_chat_template(chat, chat_template=processor.chat_template, tokenize=False)
    return text.count(token) == 1


def placeholders(processor: Any, view: View | None) -> list[dict[str, str]]:
    """The parts of a chat message that stand for what is shown; without a view, for one image."""
    if view is None:
        return [_IMAGE]
    return [_VIDEO] if is_clip(view) and shows_clips(processor) else [_IMAGE] * len(images_of(view))


def shown_by(processor: Any, view: View) -> tuple[str, int]:
    """The token that stands for what is shown in a rendered prompt, and how often it does."""
    parts = placeholders(processor, view)
    return (processor.video_token if parts == [_VIDEO] else processor.image_token), len(parts)


def sharing_tokens(processor: Any, view: View, is_video: bool) -> Any:
    """The image processor under which all images of a view together take at most as many tokens as one image may.

    It is the processor's own for a single image, and where it does not scale images by area.
    """
    images, own = len(images_of(view)), processor.image_processor
    parts = -(-images // own.temporal_patch_size) if is_video else images
    if parts == 1 or not scales_by_area(processor):
        return own
    shared, size = copy.copy(own), dict(own.size)
    size["longest_edge"] = max(size["longest_edge"] // parts, (own.patch_size * own.merge_size) ** 2)
    size["shortest_edge"] = min(size["shortest_edge"], size["longest_edge"])
    shared.size = size
    return shared


class ClipProcessor:
    """In place of the video processor of a model of Qwen: the frames of one clip, by its image processor.

    Args:
        image_processor: makes the patches of an image, [patches, C·T·P·P] with the T instants that the vision tower
            looks at together, which for an image are all the same.
        clip: whose frames have one size.
    """

    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, image_processor: Any, clip: Pictures) -> None:
        self._image_processor, self._clip = image_processor, clip

    def __call__(self, videos: Any, **_: Any) -> BatchFeature:
        """The patches of every two frames as one, the last frame twice if their number is odd."""
        together = self.temporal_patch_size
        seen = self._image_processor(images=list(self._clip.images), return_tensors="pt")
        frames, (_, height, width) = len(self._clip.images), seen["image_grid_thw"][0].tolist()
        channels = seen["pixel_values"].shape[-1] // (together * self.patch_size**2)
        patches = seen["pixel_values"].reshape(frames, height * width, channels, together, -1)
        index = torch.arange(-(-frames // together) * together).clamp(max=frames - 1)
        # All instants of an image are the same, so that the first stands for it.
        pairs = patches[index, :, :, 0].unflatten(0, (-1, together))  # [pairs, T, patches, C, P·P]
        pixels = pairs.permute(0, 2, 3, 1, 4).reshape(len(pairs) * height * width, -1)
        return BatchFeature(
            {
                "pixel_values_videos": pixels,
                "video_grid_thw": torch.tensor([[len(pairs), height, width]]),
                "video_metadata": [VideoMetadata(frames, self._clip.fps, frames_indices=list(range(frames)))],
            }
        )

    def __getattr__(self, name: str) -> Any:  # sizes of patches, which the processor asks for
        return getattr(self._image_processor, name)
