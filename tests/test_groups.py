"""Items of several images, and clips: what is shown of them, what is refused, and runs on them."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ireasoner.method.types import UsageError
from ireasoner.model.inputs import build_prompts, check_several, encode_images, render
from ireasoner.model.source import ModelError
from ireasoner.model.views import Pictures, filmstrip, images_of, is_clip
from ireasoner.page.page import Page
from ireasoner.page.run import RecordedRun
from ireasoner.playground import dataset, several
from ireasoner.rollouts.chat import chat_body
from ireasoner.rollouts.engine import Request
from ireasoner.training.checks import check_clips, match_labels, open_pool
from ireasoner.training.clips import ItemFiles, Limits, load_view
from ireasoner.training.config import ConfigError, load_config, resolve
from ireasoner.training.images import ImageError, UnreadableImageError, load_image
from ireasoner.training.items import ImagePool
from ireasoner.training.labelled import load_questions
from ireasoner.training.loop import resume, start
from ireasoner.training.recorder import read_episodes, read_records
from ireasoner.training.state import Observer
from models import load


def patch(color: tuple[int, int, int], left: int = 0, size: tuple[int, int] = (84, 84)) -> Image.Image:
    """A white picture with a coloured square, `left` pixels from its left edge."""
    pixels = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
    pixels[20:40, left : left + 20] = color
    return Image.fromarray(pixels)


def moving(frames: int = 8, color: tuple[int, int, int] = (200, 30, 30)) -> list[Image.Image]:
    """A square that goes to the right, five pixels a frame."""
    return [patch(color, 5 * k) for k in range(frames)]


def left_edge(image: Image.Image) -> int:
    """How far the square is from the left edge."""
    return int(np.flatnonzero((np.asarray(image).min(2) < 128).any(0))[0])


def save_all(folder: Path, images: Sequence[Image.Image], names: Sequence[str] = ()) -> None:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(folder / (names[i] if names else f"{i}.png"))


def animated(path: Path, frames: Sequence[Image.Image], duration: int = 100) -> bytes:
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, lossless=True)
    return path.read_bytes()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Four pairs of pictures of which two have two sizes, and a picture beside them."""
    folder = tmp_path / "pairs"
    for i in range(4):
        size = (84, 84 + 28 * (i % 2))
        save_all(folder / f"pair-{i}", [patch((200, 30, 30), 7 * i), patch((30, 30, 200), 7 * i, size)])
    patch((30, 150, 30)).save(folder / "alone.png")
    return folder


# --- folders and manifests --------------------------------------------------------------------------------------------


def test_the_images_of_a_subfolder_are_one_item(pairs: Path):
    pool = ImagePool.scan(pairs, 0, items="folders")
    items = {item.name: item for item in pool.take(5)}
    assert set(items) == {"alone.png", *(f"pair-{i}" for i in range(4))}
    assert isinstance(items["alone.png"].image, Image.Image)
    assert [image.size for image in images_of(items["pair-1"].image)] == [(84, 84), (84, 112)]
    assert not is_clip(items["pair-1"].image)
    assert len({item.content_hash for item in items.values()}) == 5
    assert [item.name for item in ImagePool.scan(pairs, 0).take(9)] != list(items)  # without the option: nine images


def test_what_is_wrong_with_an_item_costs_that_item_alone(pairs: Path):
    save_all(pairs / "many", [patch((0, 0, 0), k) for k in range(9)])
    save_all(pairs / "broken", moving(2))
    (pairs / "broken" / "1.png").write_bytes((pairs / "broken" / "0.png").read_bytes()[:-40])
    os.mkfifo(pairs / "broken" / "pipe.png")
    (pairs / "clip.mp4").write_bytes(b"")
    (pairs / "empty").mkdir()
    pool = ImagePool.scan(pairs, 0, items="folders")
    assert {item.name for item in pool.take(10)} == {"alone.png", *(f"pair-{i}" for i in range(4))}
    assert pool.skipped.pop("broken").startswith("1.png: ")
    assert pool.skipped == {
        "many": "9 images are over the limit of 8 (--images-per-item)",
        "broken/pipe.png": "not a regular file",
        "clip.mp4": "a video, which --items clips would show",
    }


def test_a_manifest_lists_items_of_every_kind(pairs: Path, tmp_path: Path):
    save_all(tmp_path / "frames", moving(3), ["f9.png", "f10.png", "f11.png"])
    rows: list[Any] = [
        {"name": "two", "images": ["pairs/pair-0/0.png", "pairs/pair-0/1.png"]},
        {"image": "pairs/alone.png"},
        {"clip": "frames", "fps": 10},
        {"name": "chosen", "clip": ["pairs/pair-2/0.png", "pairs/pair-2/1.png"]},
        {"images": ["pairs/alone.png", "missing.png"]},
        {"images": [7]},
        {"image": "pairs/alone.png", "clip": "frames"},
        {"name": "two", "image": "pairs/alone.png"},
        {"name": 3, "image": "pairs/alone.png"},
        {"name": "timeless", "clip": "frames", "fps": 0},
        ["pairs/alone.png"],
        {"images": ["pairs/alone.png", "\ud800" + "x" * 5000]},
    ]
    manifest = tmp_path / "items.jsonl"
    manifest.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n{\n" + "[" * 10**5, "utf-8")
    pool = ImagePool.scan(manifest, 0)
    items = {item.name: item.image for item in pool.take(8)}
    assert set(items) == {"two", "pairs/alone.png", "frames", "chosen"}
    frames = items["frames"]
    assert isinstance(frames, Pictures)
    assert [left_edge(image) for image in frames.images] == [0, 5, 10]  # 9 before 10
    assert frames.fps == 10
    missing = {"pairs/alone.png + missing.png", "pairs/alone.png + 1 more"}
    assert set(pool.skipped) == {f"line {n}" for n in (11, 13, 15, 17, 19, 21, 24, 25)} | missing
    assert pool.skipped["pairs/alone.png + missing.png"] == "missing.png: No such file or directory"
    assert pool.skipped["line 24"] == pool.skipped["line 25"] == "it is no JSON"
    assert all(reason.isprintable() and len(reason) < 300 for reason in pool.skipped.values())


@pytest.mark.parametrize(
    ("place", "options", "said"),
    [
        ("items.jsonl", {"items": "clips"}, "--items clips is for folders, and '.*items.jsonl' lists its items itself"),
        ("nothing.jsonl", {}, "Cannot read the manifest '.*nothing.jsonl' .No such file"),
        ("bad.jsonl", {}, "No image in the manifest '.*bad.jsonl' .skipped: line 1: it is no JSON"),
        ("items.jsonl", {"column": "x"}, "--image-column is for tables, and the manifest '.*' is none"),
        (
            "alone.png",
            {"items": "folders"},
            "--items folders needs a folder on this machine, and '.*alone.png' is none",
        ),
        ("empty", {"items": "clips"}, "No image in the folder '.*empty'"),
    ],
)
def test_a_place_that_cannot_be_used_is_one_sentence(pairs: Path, place: str, options: dict[str, Any], said: str):
    (pairs / "items.jsonl").write_text('{"image": "alone.png"}')
    (pairs / "bad.jsonl").write_text("no json")
    (pairs / "empty").mkdir()
    with pytest.raises(ImageError, match=said):
        ImagePool.scan(pairs / place, 0, **options)


def test_options_that_say_nothing_are_refused():
    given = {"images": ".", "model": "tiny"}
    with pytest.raises(ConfigError, match="--frame-rate is for clips"):
        resolve({**given, "frame_rate": 2})
    with pytest.raises(ConfigError, match=r"images-per-item.*greater than or equal to 2"):
        resolve({**given, "items": "folders", "images_per_item": 1})
    assert resolve({**given, "images": "a.jsonl", "frame_rate": 2}).most_images == 8
    assert resolve(given).most_images == 1


def test_an_item_with_an_image_of_the_evaluation_data_is_set_aside(pairs: Path, tmp_path: Path):
    rows = [{"images": [f"pairs/pair-{i}/0.png", "pairs/alone.png"], "question": "?", "answer": "1"} for i in (0, 2)]
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = resolve({"images": str(pairs), "model": "tiny", "items": "folders"})
    pool = open_pool(config, load_questions(tmp_path / "eval.jsonl"))
    assert {item.name for item in pool.take(4)} == {"pair-1", "pair-3"}
    assert pool.set_aside == 3


def test_labels_are_about_items_by_their_files(pairs: Path, tmp_path: Path):
    rows = [
        {"images": ["pairs/pair-1/0.png", "pairs/pair-1/1.png"], "question": "<image><image>Same?", "answer": "no"},
        {"image": "pairs/alone.png", "question": "Colour?", "answer": "green"},
        {"images": ["pairs/pair-1/1.png", "pairs/pair-1/0.png"], "question": "Other order?", "answer": "no"},
    ]
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = resolve({"images": str(pairs), "model": "tiny", "items": "folders", "recipe": "oracle", "labels": path})
    labels, notes = match_labels(config, load_questions(path), open_pool(config, []))
    assert {name: [row.question for row in rows] for name, rows in labels.items()} == {
        "pair-1": ["Same?"],
        "alone.png": ["Colour?"],
    }
    assert len(notes) == 1


@pytest.mark.parametrize(("kind", "items"), [("pictures", "images"), ("pairs", "folders"), ("clips", "clips")])
def test_labels_of_the_embedded_world_are_true_and_about_its_items(tmp_path: Path, kind: several.Kind, items: str):
    folder = dataset.write_unlabeled(tmp_path / "unlabeled", 4, kind=kind)
    path, truth = dataset.write_labels(folder, kind, questions=2), dataset.load_truth(folder)
    config = resolve({"images": str(folder), "model": "tiny", "items": items, "labels": path})
    labels, notes = match_labels(config, load_questions(path), open_pool(config, []))
    assert labels.keys() == truth.keys()
    assert not notes
    for name, rows in labels.items():
        for row in rows:
            known = several.solve(truth[name], row.question)
            assert known
            assert known.answer == row.answer


# --- clips ------------------------------------------------------------------------------------------------------------


def test_frames_are_spread_over_a_clip(tmp_path: Path):
    save_all(tmp_path / "frames", moving(9))
    folder = ItemFiles(tuple(tmp_path / "frames" / f"{k}.png" for k in range(9)), True, 4.0)

    def seen(**limits: Any) -> tuple[list[int], float | None]:
        view = load_view(folder, Limits(**limits))
        assert isinstance(view, Pictures)
        return [left_edge(image) // 5 for image in view.images], view.fps

    assert seen(images=3) == ([0, 4, 8], 1.0)
    assert seen(images=20) == (list(range(9)), 4.0)
    assert seen(images=20, frame_rate=2.0) == ([0, 3, 5, 8], 1.5)  # 9 frames last 2.25 seconds
    assert seen(images=3, frame_rate=2.0) == ([0, 4, 8], 1.0)
    assert seen(images=20, frame_rate=0.1) == ([0, 8], 0.5)


@pytest.mark.parametrize("ending", ["gif", "webp", "apng"])
def test_an_animation_is_a_clip(tmp_path: Path, ending: str):
    animated(tmp_path / f"a.{ending}", moving(7), duration=200)
    animated(tmp_path / "b.gif", moving(7), duration=200)
    pool = ImagePool.scan(tmp_path, 0, items="clips", limits=Limits(images=4))
    (view,) = (item.image for item in pool.take(2) if item.name == f"a.{ending}")
    assert isinstance(view, Pictures)
    assert [left_edge(image) for image in view.images] == [0, 10, 20, 30]
    assert view.fps == pytest.approx(2.5)


def test_clips_that_cannot_be_shown_are_skipped_with_a_reason(tmp_path: Path):
    whole = animated(tmp_path / "whole.gif", moving())
    (tmp_path / "cut.gif").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.gif").write_bytes(whole[:40] + bytes(range(256)) * 8 + b";")
    webp = animated(tmp_path / "whole.webp", moving())
    (tmp_path / "cut.webp").write_bytes(webp[: len(webp) // 2])
    moving(1)[0].save(tmp_path / "still.gif")
    save_all(tmp_path / "one", moving(1))
    save_all(tmp_path / "sizes", [patch((0, 0, 0)), patch((0, 0, 0), size=(84, 112))])
    save_all(tmp_path / "broken", moving(3))
    (tmp_path / "broken" / "1.png").write_bytes(b"no image")
    (tmp_path / "text.mp4").write_bytes(b"no video")
    pool = ImagePool.scan(tmp_path, 0, items="clips")
    assert {item.name for item in pool.take(12)} == {"whole.gif", "whole.webp"}
    reasons = {name: pool.skipped[name] for name in ("cut.gif", "still.gif", "one", "sizes")}
    assert reasons == {
        "cut.gif": "the clip ends early: the file is cut off after 3 frames",
        "still.gif": "1 frame, of which at least 2 are needed to see a change",
        "one": "1 frame, of which at least 2 are needed to see a change",
        "sizes": "frames of a clip have one size, and these have several: 84 x 84 and 84 x 112",
    }
    assert pool.skipped["broken"].startswith("1.png: not a PNG")
    assert {"cut.webp", "noise.gif", "text.mp4"} <= set(pool.skipped)
    assert all("\n" not in reason for reason in pool.skipped.values())


def test_a_clip_with_too_much_in_it_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    animated(tmp_path / "a.gif", moving())
    monkeypatch.setattr("ireasoner.training.clips.MAX_ANIMATION_PIXELS", 7 * 84 * 84)
    with pytest.raises(UnreadableImageError, match="8 frames of 84 x 84 are too many pixels"):
        load_view(ItemFiles((tmp_path / "a.gif",), True), Limits())
    with pytest.raises(UnreadableImageError, match="84 x 84 is over the limit of 99 pixels"):
        load_view(ItemFiles((tmp_path / "a.gif",), True), Limits(max_pixels=99))


def test_random_damage_of_an_animation_raises_nothing_else(tmp_path: Path):
    rng = np.random.default_rng(0)
    for ending in ("gif", "webp"):
        data = np.frombuffer(animated(tmp_path / f"a.{ending}", moving(4)), np.uint8)
        for _ in range(60):
            damaged = data[: rng.integers(20, len(data) + 1)].copy()
            damaged[rng.integers(0, len(damaged), 4)] = rng.integers(0, 256, 4)
            (tmp_path / f"b.{ending}").write_bytes(damaged.tobytes())
            with suppress(UnreadableImageError):
                load_view(ItemFiles((tmp_path / f"b.{ending}",), True), Limits())


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Three seconds of a square that goes to the right, ten frames a second, with a key frame every twelve."""
    av = pytest.importorskip("av")
    path = tmp_path / "videos" / "a.mp4"
    path.parent.mkdir()
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=10, width=160, height=96, pix_fmt="yuv420p", bit_rate=800_000)
        stream.gop_size = 12
        for k in range(30):
            frame = av.VideoFrame.from_image(patch((200, 30, 30), 4 * k, (160, 96)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_video_is_a_clip(video: Path):
    (item,) = ImagePool.scan(video.parent, 0, items="clips", limits=Limits(images=5)).take(1)
    assert isinstance(item.image, Pictures)
    found = [left_edge(image) for image in item.image.images]
    assert found == pytest.approx([0, 28, 56, 88, 116], abs=3)  # frames 0, 7, 14, 22 and 29
    assert item.image.fps == pytest.approx(10 * 4 / 29)
    view = load_view(ItemFiles((video,), True), Limits(images=30, frame_rate=2.0))
    assert len(images_of(view)) == 6


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [((0, 1, -1, 0), Image.Transpose.ROTATE_270), ((-1, 0, 0, -1), Image.Transpose.ROTATE_180),
     ((0, -1, 1, 0), Image.Transpose.ROTATE_90), ((-1, 0, 0, 1), Image.Transpose.FLIP_LEFT_RIGHT),
     ((0, 1, 1, 0), Image.Transpose.TRANSPOSE)],
)  # fmt: skip
def test_a_video_is_shown_upright(video: Path, matrix: tuple[int, ...], turn: Image.Transpose):
    as_stored = images_of(load_view(ItemFiles((video,), True), Limits(images=3)))
    data, (a, b, c, d) = video.read_bytes(), (2**16 * value for value in matrix)
    track = data.index(b"tkhd")  # of a track, ISO/IEC 14496-12: its matrix ends in 0, 0, 1
    at = data.index(struct.pack(">9i", 2**16, 0, 0, 0, 2**16, 0, 0, 0, 2**30), track)
    video.write_bytes(data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30) + data[at + 36 :])
    upright = images_of(load_view(ItemFiles((video,), True), Limits(images=3)))
    assert upright[0].size == as_stored[0].transpose(turn).size
    for image, stored in zip(upright, as_stored, strict=True):
        assert image.tobytes() == stored.transpose(turn).tobytes()


def test_a_video_of_another_kind_is_named(tmp_path: Path):
    animated(tmp_path / "a.gif", moving(3))
    (tmp_path / "b.WMV").write_bytes(bytes(64))
    pool = ImagePool.scan(tmp_path, 0, items="clips")
    assert list(pool.names) == ["a.gif"]
    assert "convert it" in pool.skipped["b.WMV"]


def test_a_video_that_ends_early_is_skipped_wherever_it_ends(video: Path):
    data = video.read_bytes()
    for end in range(len(data) // 20, len(data) * 19 // 20, len(data) // 20):
        video.write_bytes(data[:end])
        with pytest.raises(UnreadableImageError, match="ends early"):
            load_view(ItemFiles((video,), True), Limits(images=5))


def test_without_pyav_a_sentence_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    with pytest.raises(ImageError, match=r"None of the 1 images .*pip install 'ireasoner\[video\]'"):
        ImagePool.scan(tmp_path, 0, items="clips").check_readable()


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_all_images_of_an_item_share_the_tokens_of_one():
    policy = load(max_image_tokens=36)
    image = patch((200, 30, 30), size=(280, 280))
    views = [image, Pictures((image, image)), Pictures((image,) * 4)]
    assert [len(encoded.pooled) for encoded in encode_images(policy, views)] == [36, 2 * 16, 4 * 9]


def test_a_prompt_has_a_place_for_every_image():
    policy, chat = load(), [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
    view = Pictures((patch((200, 30, 30)), patch((30, 30, 200))))
    text = render(policy.processor, chat, view)
    assert text.count(policy.processor.image_token) == 2
    assert text.index("Why?") > text.rindex(policy.processor.image_token)
    (encoded,) = encode_images(policy, [view])
    with pytest.raises(ValueError, match="exactly 2 images, not 4"):
        build_prompts(policy, [encoded], [[{**chat[0], "content": [*chat[0]["content"], {"type": "image"}]}]])


def test_a_model_that_takes_one_image_is_refused_in_a_sentence():
    processor = load().processor
    check_several(processor, "tiny")

    def one(images: Any, **others: Any) -> Any:
        raise ValueError("only one image")

    processor.image_processor = SimpleNamespace(to_dict=dict, __call__=one, fetch_images=lambda images: images, size={})
    with pytest.raises(ModelError, match=r"^tiny cannot be shown several images in one prompt .*: give every item one"):
        check_several(processor, "tiny")


def test_clips_are_not_sent_to_servers(pairs: Path):
    options = {"images": str(pairs), "model": "tiny", "servers": "http://127.0.0.1:1"}
    for items in ("folders", "clips"):
        config = resolve({**options, "items": items})
        pool = open_pool(config, [])
        if items == "folders":
            check_clips(config, pool, [])
            continue
        with pytest.raises(UsageError, match="clips are sampled by transformers alone: leave out --servers"):
            check_clips(config, pool, [])


@pytest.mark.parametrize("as_features", [True, False])
def test_a_server_is_sent_every_image_as_a_part_of_its_own(as_features: bool):
    policy, chat = load(), [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
    one, other = patch((200, 30, 30)), patch((30, 30, 200), size=(84, 112))
    views = encode_images(policy, [Pictures((one, other)), one, other])
    both, *alone = (chat_body(policy, Request(view, chat), as_features, 8)["messages"][0]["content"] for view in views)
    assert [part["type"] for part in both] == ["image_embeds" if as_features else "image_url"] * 2 + ["text"]
    if not as_features:
        assert both[:2] == [alone[0][0], alone[1][0]]
        return
    for part, (own, _) in zip(both, alone, strict=False):
        sent, expected = (
            {name: torch.load(io.BytesIO(base64.b64decode(text))) for name, text in each["image_embeds"].items()}
            for each in (part, own)
        )
        torch.testing.assert_close(sent, expected, atol=1e-5, rtol=1e-5)


def test_a_filmstrip_has_four_images_a_row():
    images = tuple(patch((200, 30, 30), size=(100, 50 + 10 * k)) for k in range(6))
    strip = filmstrip(Pictures(images))
    assert strip.height == 2 * 100 + 4
    assert filmstrip(images[0]) is images[0]


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("copied_models", "no_report")
def test_a_run_on_items_of_every_kind_resumes_exactly(pairs: Path, tmp_path: Path):
    """With held-out questions about several images and about a clip, whose thumbnails are filmstrips."""
    save_all(tmp_path / "frames", moving(5, (0, 0, 0)))
    animated(tmp_path / "a.gif", moving(6, (30, 30, 200)))
    rows: list[Any] = [{"images": [f"pairs/pair-{i}/0.png", f"pairs/pair-{i}/1.png"]} for i in range(3)]
    rows += [{"image": "pairs/alone.png"}, {"clip": "a.gif"}, {"images": ["gone.png", "pairs/alone.png"]}]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [
        {"images": ["pairs/pair-3/0.png", "pairs/pair-3/1.png"], "question": "Which?", "answer": "1"},
        {"clip": "frames", "question": "Which way did it go?", "answer": "right"},
    ]
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, asked)))
    told = [{**row, "question": "How many?", "answer": "3"} for row in (*rows[:2], rows[4])]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, told)))
    config = resolve({
        "images": str(tmp_path / "items.jsonl"), "model": "tiny", "recipe": "random-reward", "device": "cpu",
        "steps": 2, "images_per_item": 3, "images_per_step": 5, "group_size": 2, "max_solution_tokens": 24,
        "probe_images": 1, "max_question_tokens": 24, "proposer_every": 1, "save_every": 1, "probe_every": 2,
        "learning_rate": 3e-3, "eval_data": tmp_path / "eval.jsonl", "labels": tmp_path / "labels.jsonl",
        "label_share": 0.4,
    })  # fmt: skip

    def die(step: int, metrics: object, episodes: object) -> None:
        if step == 1:
            raise RuntimeError("as if killed")

    start(config, tmp_path / "whole")
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["before"]["questions"] == 2
    with pytest.raises(RuntimeError, match="as if killed"):
        start(config, tmp_path / "killed", Observer(on_step=die))
    resume(load_config(tmp_path / "killed" / "config.yaml"), tmp_path / "killed")
    for name in ("episodes.jsonl", "skipped.jsonl", "solver/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    page = Page(RecordedRun.open(tmp_path / "whole")).render("page.html").decode()
    assert '<img class="thumb strip"' in page
    skipped = [record["image"] for record in read_records(tmp_path / "whole" / "skipped.jsonl")]
    assert skipped == ["gone.png + pairs/alone.png"]
    strips = {e.image: load_image(tmp_path / "whole" / e.thumbnail).size for e in read_episodes(tmp_path / "whole")}
    assert strips == {
        "a.gif": (3 * 84 + 2 * 4, 84),
        "pairs/alone.png": (84, 84),
        **{f"pairs/pair-{i}/0.png + pairs/pair-{i}/1.png": (2 * 84 + 4, 84) for i in (0, 2)},
        "pairs/pair-1/0.png + pairs/pair-1/1.png": (112 + 4 + 84, 112),
    }
