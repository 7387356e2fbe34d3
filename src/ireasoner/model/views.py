"""What a prompt shows: an image, several images, or the frames of a clip."""

from __future__ import annotations

from dataclasses import dataclass, replace

from PIL import Image

from ireasoner.method.types import Shown

STRIP = 4  # images in a row of a filmstrip
GAP = 4  # pixels between them


@dataclass(frozen=True, eq=False)  # as an image, it is itself and no other
class Pictures:
    """Several images that are looked at together, in an order.

    Attributes:
        images: RGB, two at least; the frames of a clip have one size.
        fps: frames a second, if they are those of a clip; None: they are pictures beside one another.
    """

    images: tuple[Image.Image, ...]
    fps: float | None = None

    @property
    def size(self) -> tuple[object, ...]:
        """The sizes of all images, and whether they are a clip."""
        return (*(image.size for image in self.images), self.fps)


View = Image.Image | Pictures


def images_of(view: View) -> tuple[Image.Image, ...]:
    """The images of a view, in their order."""
    return view.images if isinstance(view, Pictures) else (view,)


def is_clip(view: View) -> bool:
    return isinstance(view, Pictures) and view.fps is not None


def shown_in(view: View) -> Shown:
    """What a view is in words."""
    return "clip" if is_clip(view) else "images" if isinstance(view, Pictures) else "image"


def filled(view: View, color: tuple[int, int, int]) -> View:
    """A view of the same kind and the same sizes, in one color."""
    blank = tuple(Image.new("RGB", image.size, color) for image in images_of(view))
    return replace(view, images=blank) if isinstance(view, Pictures) else blank[0]


def filmstrip(view: View) -> Image.Image:
    """All images of a view in one, side by side in rows of `STRIP`; a single image as it is."""
    if not isinstance(view, Pictures):
        return view
    height = min(256, max(image.height for image in view.images))
    scaled = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in view.images]
    rows = [scaled[i : i + STRIP] for i in range(0, len(scaled), STRIP)]
    width = max(sum(image.width + GAP for image in row) for row in rows) - GAP
    strip = Image.new("RGB", (width, len(rows) * (height + GAP) - GAP), "white")
    for i, row in enumerate(rows):
        left = 0
        for image in row:
            strip.paste(image, (left, i * (height + GAP)))
            left += image.width + GAP
    return strip
