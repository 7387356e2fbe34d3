"""Items of several files, and clips: several pictures, the frames in a folder, an animation, or a video.

What cannot be read, or what is too much, is an `UnreadableImageError` with a reason, as it is for a single image. Of a
clip only the frames that are shown are kept; they are spread evenly from the first to the last one, both included. A
video is read by PyAV (the extra `video`), everything else by Pillow.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from ireasoner.model.views import Pictures, View
from ireasoner.training.config import Config, ItemKind, option
from ireasoner.training.containers import format_of, gif_frames
from ireasoner.training.images import (
    MAX_PIXELS,
    ImageError,
    UnreadableImageError,
    content_hash,
    image_from,
    load_image,
    printable,
    read_file,
    reason_of,
    rgb,
)
from ireasoner.training.sources.folder import is_hidden, named_like_an_image

ANIMATIONS = (".gif", ".apng")  # a WebP is one if its first bytes say so
VIDEOS = (".mp4", ".m4v", ".mov", ".3gp", ".webm", ".mkv", ".avi")
VIDEO_KINDS = "MP4, MOV, WebM, Matroska or AVI"
OTHER_VIDEOS = (".mpg", ".mpeg", ".wmv", ".flv", ".ogv")  # not read, and named where they are skipped
FOLDER_FPS = 2.0  # frames a second in a folder, which says nothing of time: as many as Qwen samples of a video
MAX_ANIMATION_BYTES = 2**27
MAX_ANIMATION_PIXELS = 2**30  # of all frames together, each of which is made from the one before it
MAX_PACKETS = 2**20  # of a video: ten hours of 29 frames a second
MAX_DECODED = 20_000  # frames that are decoded on the way to those that are shown
MICROSECONDS = 10**6  # of a second: the unit of a whole file's duration
# How a video says that its frames are to be turned, as phones do: the upper left corner of its matrix, in 1/65536.
TURNS = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
IN_VIDEO = "showing videos needs PyAV: pip install 'ireasoner[video]'"


class Limits(NamedTuple):
    """What is shown of an item.

    Attributes:
        max_pixels: of each image.
        images: most images of an item; one with more is refused, and of a clip so many frames are shown.
        frame_rate: frames of a clip for each second, as far as `images` allows; None: as many as that allows.
    """

    max_pixels: int = MAX_PIXELS
    images: int = option("images_per_item").default
    frame_rate: float | None = None

    @classmethod
    def of(cls, config: Config) -> Limits:
        """The limits of a run."""
        return cls(config.max_image_pixels, config.images_per_item, config.frame_rate)

    def problem(self, images: int) -> str | None:
        """Why so many images cannot be shown together, or None."""
        if images == 0:
            return "it has no image"
        over = f"{images} images are over the limit of {self.images} (--images-per-item)"
        return over if images > self.images else None

    def chosen(self, frames: int, fps: float) -> tuple[list[int], float]:
        """The numbers of the frames that are shown of a clip, in their order, and how many they are a second.

        Raises:
            ValueError: the clip, or what is to be shown of it, is no more than one frame.
        """
        count = min(frames, self.images)
        if self.frame_rate is not None:
            count = min(count, max(2, round(frames / fps * self.frame_rate)))
        if count < 2:
            raise ValueError(f"{frames} frame{'s' * (frames != 1)}, of which at least 2 are needed to see a change")
        places = np.linspace(0, frames - 1, count).round().astype(int).tolist()
        return places, fps * (count - 1) / (frames - 1)


class ItemFiles(NamedTuple):
    """The files of an item that is no single image.

    Attributes:
        paths: of its pictures in their order, or of the frames of a clip; or the one file that is the clip.
        is_clip: whether they are a clip.
        fps: frames a second of a clip whose frames are files.
    """

    paths: tuple[Path, ...]
    is_clip: bool = False
    fps: float = FOLDER_FPS

    def __str__(self) -> str:
        return " + ".join(map(str, self.paths))


def files_of(image: Path | ItemFiles) -> tuple[Path, ...]:
    """The files of an image, or of an item of several."""
    return image.paths if isinstance(image, ItemFiles) else (image,)


def load_view(image: Path | ItemFiles, limits: Limits) -> View:
    """An image as `load_image` decodes it, or what an item of several shows. Raises `UnreadableImageError`."""
    if isinstance(image, ItemFiles):
        return load_item(str(image), image, limits)[0]
    return load_image(image, limits.max_pixels)


def load_path(path: Path, limits: Limits, items: ItemKind) -> View:
    """What a file or a folder shows that somebody names by its path alone.

    A video and an animation are clips, and every other file is an image. A folder is what it is in a run on these
    `items`: images that are shown together with `folders`, and otherwise the frames of a clip. Raises
    `UnreadableImageError`.
    """
    try:
        if path.is_dir():
            files = ItemFiles(frames_below(path), is_clip=items != "folders")
        elif is_clip_file(path) and not _is_still(path):
            files = ItemFiles((path,), is_clip=True)
        else:
            return load_image(path, limits.max_pixels)
    except (OSError, ValueError) as error:
        raise UnreadableImageError(path, reason_of(error)) from error
    return load_item(os.fspath(path), files, limits)[0]


def _is_still(path: Path) -> bool:
    """Whether a file is named like a GIF and is an image. Raises `OSError` or `ValueError` if it cannot be read."""
    if not path.name.lower().endswith(".gif"):
        return False
    data = read_file(path, MAX_ANIMATION_BYTES)
    return format_of(data) != "GIF" or gif_frames(data) == 1


def natural(name: str) -> list[tuple[str, int]]:
    """A key that sorts names with numbers by the numbers: frame 9 before frame 10."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d{0,18})", name)]


def frames_below(folder: Path) -> tuple[Path, ...]:
    """The image files in a folder, but not in its subfolders, in the order of their names.

    Raises:
        OSError: it cannot be read.
    """
    names = (name for name in os.listdir(folder) if named_like_an_image(name) and not is_hidden(name))
    return tuple(folder / name for name in sorted(names, key=natural))


def clip_files(paths: tuple[Path, ...], fps: float = FOLDER_FPS) -> ItemFiles:
    """A clip: a file that is one, a folder of frames, or these frames. Raises `OSError` if a folder cannot be read."""
    if len(paths) == 1 and paths[0].is_dir():
        paths = frames_below(paths[0])
    return ItemFiles(paths, True, fps)


def is_clip_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a clip by itself: by its name, or, of a WebP, by what its header says."""
    lower = os.fspath(path).lower()
    if not lower.endswith(".webp"):
        return lower.endswith((*ANIMATIONS, *VIDEOS))
    try:
        with open(path, "rb") as file:
            head = file.read(21)
        return head[12:16] == b"VP8X" and len(head) == 21 and bool(head[20] & 2)
    except OSError:
        return False


def load_item(name: str, files: ItemFiles, limits: Limits) -> tuple[View, tuple[str, ...]]:
    """What an item shows, and the `content_hash` of each of its files that was read.

    Raises:
        UnreadableImageError: something of it cannot be read, or it is too much.
    """
    try:
        if files.is_clip and len(files.paths) == 1:
            return _clip_file(files.paths[0], limits)
        return _images(files, limits)
    except ImageError:
        raise
    except Exception as error:  # malicious bytes make decoders raise almost anything
        raise UnreadableImageError(name, reason_of(error)) from error


def _images(files: ItemFiles, limits: Limits) -> tuple[View, tuple[str, ...]]:
    """Images that are files, each as `image_from` decodes it."""
    paths, fps = files.paths, None
    if files.is_clip:
        places, fps = limits.chosen(len(paths), files.fps)
        paths = [paths[place] for place in places]
    elif problem := limits.problem(len(paths)):
        raise ValueError(problem)
    images, hashes = [], []
    for path in paths:
        try:
            image, found = image_from(path, partial(read_file, path), limits.max_pixels)
        except UnreadableImageError as error:
            raise ValueError(f"{printable(path.name)[-100:]}: {error.reason}") from error
        images.append(image)
        hashes.append(found)
    if files.is_clip:
        _check_sizes([image.size for image in images])
    return (Pictures(tuple(images), fps) if len(images) > 1 else images[0]), tuple(hashes)


def _check_sizes(sizes: Sequence[tuple[int, int]]) -> None:
    if len(set(sizes)) > 1:
        told = " and ".join(f"{width} x {height}" for width, height in sorted(set(sizes))[:2])
        raise ValueError(f"frames of a clip have one size, and these have several: {told}")


def _clip_file(path: Path, limits: Limits) -> tuple[Pictures, tuple[str, ...]]:
    if not path.name.lower().endswith(VIDEOS):
        data = read_file(path, MAX_ANIMATION_BYTES)
        return _animation(data, limits), (content_hash(data),)
    if not path.is_file():  # opening a pipe would block
        raise ValueError("no such file, or not a regular one")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        file.seek(0)
        return _video(file, limits), (found,)


# --- animations -------------------------------------------------------------------------------------------------------


def _animation(data: bytes, limits: Limits) -> Pictures:
    """Frames of a GIF, a WebP or a PNG. Their time is that of the first one."""
    image_format = format_of(data)
    if image_format not in ("GIF", "WEBP", "PNG"):
        raise ValueError(f"no animated GIF, WebP or PNG and no video ({VIDEO_KINDS}), or its header is damaged")
    frames = gif_frames(data) if image_format == "GIF" else None  # Pillow would count those that are there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=[image_format]) as image:
            width, height = image.size
            if width * height > limits.max_pixels:
                raise ValueError(f"{width} x {height} is over the limit of {limits.max_pixels} pixels")
            frames = frames or int(getattr(image, "n_frames", 1))
            if frames * width * height > MAX_ANIMATION_PIXELS:
                raise ValueError(f"{frames} frames of {width} x {height} are too many pixels")
            image.seek(0)
            image.load()  # of a WebP, the time is known only then
            milliseconds = float(image.info.get("duration", 0)) or 100.0
            places, fps = limits.chosen(frames, 1000 / milliseconds)
            return Pictures(tuple(_decoded(image, places)), fps)


def _decoded(image: Image.Image, places: Sequence[int]) -> Iterator[Image.Image]:
    for place in range(places[-1] + 1):
        try:
            image.seek(place)  # in order, for a frame is what has changed since the one before it
            image.load()
        except (EOFError, OSError) as error:
            raise ValueError(f"the clip ends early: frame {place + 1} cannot be read ({error})") from error
        if place in places:
            yield rgb(image)


# --- videos -----------------------------------------------------------------------------------------------------------


def _video(file: IO[bytes], limits: Limits) -> Pictures:
    """Frames of a video. It is gone through once without decoding, for when its frames are."""
    try:
        import av  # pyright: ignore[reportMissingImports]
        from av.error import FFmpegError  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(IN_VIDEO) from None
    head = file.read(12)
    file.seek(0)
    if head[4:8] != b"ftyp" and head[:4] != b"\x1a\x45\xdf\xa3" and head[:4] + head[8:] != b"RIFFAVI ":
        raise ValueError(f"no video ({VIDEO_KINDS}), or its header is damaged")
    try:
        with av.open(file) as container:  # a file and no name: whatever it says, nothing else is opened
            return _shown(container, limits)
    except FFmpegError as error:
        raise ValueError(f"the clip is damaged or ends early: {error.strerror}") from error


def _shown(container: Any, limits: Limits) -> Pictures:
    """Frames of an open video."""
    stream = container.streams.best("video")  # and no picture of a cover
    if stream is None or not stream.codec_context:
        raise ValueError("the clip is damaged or ends early: the file holds no video that can be decoded")
    if (size := stream.codec_context.width * stream.codec_context.height) > limits.max_pixels:
        raise ValueError(f"frames of {size} pixels are over the limit of {limits.max_pixels} (--max-image-pixels)")
    times = _times(container, stream)
    seconds = float((times[-1] - times[0]) * stream.time_base)
    fps = (len(times) - 1) / seconds if seconds > 0 else 1.0
    lasts = float((stream.duration or 0) * stream.time_base)
    if not lasts and not container.streams.audio:  # which may last longer than what is seen
        lasts = float(container.duration or 0) / MICROSECONDS
    promised = stream.frames or lasts * fps
    if len(times) < 0.98 * promised - 1:  # what a file says of its length is rounded
        raise ValueError(f"the clip ends early: after {len(times)} of {promised:.0f} frames")
    places, fps = limits.chosen(len(times), fps)
    images = tuple(_at(container, stream, [times[place] for place in places]))
    _check_sizes([image.size for image in images])
    return Pictures(images, fps)


def _times(container: Any, stream: Any) -> list[int]:
    """When each frame of a video is shown, in the stream's own unit."""
    times = []
    for packet in container.demux(stream):
        if packet.pts is not None and packet.size:
            times.append(packet.pts)
        if len(times) > MAX_PACKETS:
            raise ValueError(f"it has more than {MAX_PACKETS} frames")
    if not times:
        raise ValueError("the clip ends early: it has no frame")
    return sorted(times)


def _at(container: Any, stream: Any, times: Sequence[int]) -> Iterator[Image.Image]:
    """The frames that are shown at these times."""
    decoded = 0
    for time in times:
        container.seek(time, stream=stream)  # to the key frame before it
        for frame in container.decode(stream):
            decoded += 1
            if decoded > MAX_DECODED:
                raise ValueError("its key frames are too far apart")
            if frame.pts is not None and frame.pts >= time:
                yield _turned(frame)
                break
        else:
            raise ValueError(f"the clip ends early: no frame after {float(time * stream.time_base):.1f} seconds")


def _turned(frame: Any) -> Image.Image:
    """A frame as it is to be shown: upright, where the video says how the camera was held."""
    image, matrix = frame.to_image(), frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d = (round(value / 2**16) for value in struct.unpack_from("<5i", bytes(matrix)))
    turn = TURNS.get((a, b, c, d))
    return image if turn is None else image.transpose(turn)
