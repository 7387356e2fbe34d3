import io
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ireasoner.method.types import (
    Completion,
    Episode,
    Part,
    ProbeAnswer,
    Proposal,
    Question,
    Sampled,
    StepScore,
    Trajectory,
)
from ireasoner.training.recorder import (
    FILES,
    Recorder,
    RunDirectoryError,
    read_episodes,
    read_records,
    replace_file,
    write_json,
)

HOSTILE = '\ud800 \u2028\u2029 \x00 \x1b[31m </script><!-- \r\n " \\ \u202e é 🦉 \x85'


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk that is full once a file has `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def reject(token: str) -> None:
    raise AssertionError(f"{token} is not JSON")


def strict_lines(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=reject) for line in path.read_text("ascii").split("\n")[:-1]]


def episode(step: int = 1, text: str = "How many?", **changes: object) -> Episode:
    """An episode of two trajectories, one of which could not be read."""
    readable = Trajectory(
        text=text, finish_reason="stop", num_tokens=2, mean_sampler_logprob=-0.5, reasoning_steps=(text,), answer=text,
        words_before_answer=3, problem=None, answer_key="k", in_majority=True, reward=step / 7,
        parts={"outcome": Part(value=step / 7, factors={"share": step / 7})},
        step_scores=(StepScore(similarity=None, recurrence=0.25, score=None),), advantage=0.1 + 0.2,
    )  # fmt: skip
    cut = {"finish_reason": "length", "problem": "cut off", "answer": None, "answer_key": None, "in_majority": False}
    fields = {
        "step": step, "image": f"{text}.png", "question": Question(text, text, None), "proposer_reward": 0.0,
        "proposal": Proposal(text=text, finish_reason="stop", num_tokens=2, mean_sampler_logprob=None, prompt=text),
        "prompt": text, "trajectories": (readable, readable.model_copy(update=cut)), "majority_answer": "k",
        "majority_fraction": 0.5, "answer_entropy": 0.0, "step_weight": 0.5, "true_answer": None,
    }  # fmt: skip
    return Episode(**{**fields, **changes})  # type: ignore[arg-type]


def probe(step: int) -> ProbeAnswer:
    return ProbeAnswer(step=step, image="a.png", question="?", text=HOSTILE, answer=None, reasoning_steps=(HOSTILE,))


def write_steps(recorder: Recorder, first: int, last: int) -> None:
    for step in range(first, last + 1):
        recorder.metrics(step, {"reward/solver/total": step / 3, "kl/solver": math.sin(step)})
        recorder.episode(episode(step, HOSTILE, majority_fraction=step / 7))
        recorder.skip(step, f"broken-{step // 2}.png", "cut off")
        if step % 2 == 0:
            recorder.probe(probe(step))
        if step % 3 == 0:
            recorder.event(step, "the learning rate is high")


def contents(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in FILES}


# --- lines ------------------------------------------------------------------------------------------------------------


def test_floats_round_trip_and_keys_keep_their_order(tmp_path: Path) -> None:
    values = {"z": 0.1 + 0.2, "a": 5e-324, "m": -0.0, "k": 1.7976931348623157e308, "f": float(np.float32(0.1))}
    Recorder.open(tmp_path).metrics(3, values)
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert list(record) == ["step", *values]
    assert [record[name].hex() for name in values] == [value.hex() for value in values.values()]


def test_what_json_cannot_say_becomes_null_at_any_depth(tmp_path: Path) -> None:
    recorder = Recorder.open(tmp_path)
    recorder.metrics(1, {"a": math.nan, "b": math.inf, "c": np.float32(-np.inf), "d": 1})
    assert strict_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": None, "b": None, "c": None, "d": 1.0}]
    deep = {"mean": math.nan, "deep": ({"x": [math.nan, 2.5]},), "proxy": MappingProxyType({"y": math.inf})}
    assert json.loads(write_json(deep), parse_constant=reject) == {
        "mean": None,
        "deep": [{"x": [None, 2.5]}],
        "proxy": {"y": None},
    }


def test_hostile_text_stays_one_ascii_line_and_comes_back(tmp_path: Path) -> None:
    recorder = Recorder.open(tmp_path)
    recorder.episode(episode(1, HOSTILE))
    recorder.skip(1, HOSTILE, HOSTILE)
    recorder.metrics(1, {HOSTILE: 1.0})
    assert (tmp_path / "episodes.jsonl").read_bytes().count(b"\n") == 1
    assert strict_lines(tmp_path / "episodes.jsonl") == [episode(1, HOSTILE).model_dump(mode="json")]
    assert strict_lines(tmp_path / "metrics.jsonl") == [{"step": 1, HOSTILE: 1.0}]
    assert list(read_records(tmp_path / "skipped.jsonl")) == [{"step": 1, "image": HOSTILE, "reason": HOSTILE}]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(codec=None, exclude_categories=[])), max_size=4))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    run = tmp_path_factory.mktemp("run")
    recorder = Recorder.open(run)
    for text in texts:
        recorder.event(0, text)
    assert [record["text"] for record in read_records(run / "events.jsonl")] == texts


@pytest.mark.parametrize("step", ["1", 1.0, True, None])
def test_a_record_without_a_step_is_refused(tmp_path: Path, step: object) -> None:
    recorder = Recorder.open(tmp_path)
    with pytest.raises(ValueError, match="step"):
        recorder.event(step, "text")  # type: ignore[arg-type]
    assert not (tmp_path / "events.jsonl").exists()


def test_a_metric_cannot_replace_the_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step"):
        Recorder.open(tmp_path).metrics(1, {"step": 7})


def test_an_image_is_reported_once_also_by_a_later_process(tmp_path: Path) -> None:
    Recorder.open(tmp_path).skip(1, "a.png", "cut off")
    recorder = Recorder.open(tmp_path)
    recorder.skip(2, "a.png", "cut off")
    recorder.skip(2, "b.png", "not an image")
    recorder.skip(3, "b.png", "not an image")
    assert [(r["step"], r["image"]) for r in read_records(tmp_path / "skipped.jsonl")] == [(1, "a.png"), (2, "b.png")]


# --- reading and rewinding --------------------------------------------------------------------------------------------


def test_reading_a_missing_file_and_a_torn_last_line(tmp_path: Path) -> None:
    assert list(read_records(tmp_path / "metrics.jsonl")) == []
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3, "x')
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    "damage",
    [b"", b"nonsense", b"\xff\xfe", b"\x00" * 9, b"[1]", b'"step"', b'{"x": 1}', b'{"step": -1}', b"[" * 100_000],
)
def test_a_damaged_line_in_the_middle_is_named_and_left_out(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl, line 2,"):
        assert [record["step"] for record in read_records(path)] == [1, 2]
    (sentence,) = Recorder.open(tmp_path).rewind(9)
    assert "metrics.jsonl, line 2," in sentence
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("torn", [b"", b'{"step": 8, "rew', b'{"step": 8}', b"\x00\x00\x00", b"\xff"])
def test_a_resumed_run_ends_with_the_files_of_an_uninterrupted_one(tmp_path: Path, torn: bytes) -> None:
    write_steps(Recorder.open(tmp_path / "whole"), 1, 10)
    killed = Recorder.open(tmp_path / "killed")
    write_steps(killed, 1, 7)
    killed.sync()
    for name in FILES:
        with (tmp_path / "killed" / name).open("ab") as file:
            file.write(torn)

    resumed = Recorder.open(tmp_path / "killed")
    resumed.skip(0, "broken-0.png", "cut off")  # a pool scans its folder before the run is rewound
    assert resumed.rewind(4) == []
    assert max(record["step"] for record in read_records(tmp_path / "killed" / "metrics.jsonl")) == 4
    write_steps(resumed, 5, 10)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {*FILES, "images"}


def test_writing_goes_on_after_a_torn_line_before_any_rewind(tmp_path: Path) -> None:
    (tmp_path / "skipped.jsonl").write_bytes(b'{"step": 0, "image": "a.png", "reason": "empty"}\n{"step": 0, "im')
    recorder = Recorder.open(tmp_path)
    recorder.skip(0, "b.png", "cut off")
    assert [record["image"] for record in read_records(tmp_path / "skipped.jsonl")] == ["a.png", "b.png"]


def test_every_way_to_tear_the_last_line(tmp_path: Path) -> None:
    recorder = Recorder.open(tmp_path)
    for step in (1, 2, 3):
        recorder.metrics(step, {"reward/solver/total": 0.5})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    first_two = whole[: whole[:-1].rindex(b"\n") + 1]
    for length in range(len(first_two), len(whole)):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:length])
        assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2]
        assert Recorder.open(tmp_path).rewind(3) == []
        assert (tmp_path / "metrics.jsonl").read_bytes() == first_two


def test_rewinding_before_the_first_step_empties_the_files(tmp_path: Path) -> None:
    recorder = Recorder.open(tmp_path)
    assert recorder.rewind(-1) == []
    write_steps(recorder, 0, 6)
    recorder.rewind(-1)
    assert set(contents(tmp_path).values()) == {b""}
    recorder.skip(1, "broken-0.png", "cut off")  # forgotten, so reported anew
    assert len(list(read_records(tmp_path / "skipped.jsonl"))) == 1


def test_a_failed_rewind_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder.open(tmp_path)
    write_steps(recorder, 1, 6)
    before = contents(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunDirectoryError, match="No space left"):
        recorder.rewind(2)
    with pytest.raises(RunDirectoryError, match="No space left"):
        recorder.sync()
    assert contents(tmp_path) == before


# --- a disk that refuses ----------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"file.*: Not a directory"):
        Recorder.open(tmp_path / "file" / "run")


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    recorder = Recorder.open(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl: Is a directory"):
        recorder.metrics(1, {})


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path) -> None:
    recorder = Recorder.open(tmp_path)
    recorder.event(1, "x" * 100)
    before = (tmp_path / "events.jsonl").read_bytes()
    with file_size_limit(200), pytest.raises(RunDirectoryError, match=r"events\.jsonl"):
        recorder.event(2, "y" * 100)
    assert (tmp_path / "events.jsonl").read_bytes() == before
    with file_size_limit(200), pytest.raises(RunDirectoryError, match=r"notes\.txt"):
        recorder.write_text("notes.txt", "z" * 1000)
    assert not (tmp_path / "notes.txt").exists()
    recorder.event(3, "there is room again")
    assert [record["step"] for record in read_records(tmp_path / "events.jsonl")] == [1, 3]


# --- thumbnails -------------------------------------------------------------------------------------------------------


def test_a_small_image_is_kept_without_loss_and_written_once(tmp_path: Path) -> None:
    recorder = Recorder.open(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 256, 3), dtype=np.uint8))
    name = recorder.thumbnail(image, "0123456789abcdef")
    assert name == "images/0123456789abcdef.png"
    with Image.open(tmp_path / name) as saved:
        assert saved.tobytes() == image.tobytes()
    recorder.thumbnail(Image.new("RGB", (9, 9)), "0123456789abcdef")
    with Image.open(tmp_path / name) as saved:
        assert saved.size == (256, 200)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["0123456789abcdef.png"]


@pytest.mark.parametrize(
    ("size", "small"), [((1024, 512), (768, 384)), ((100, 3000), (26, 768)), ((4000, 1), (768, 1))]
)
def test_a_large_image_is_reduced_and_the_original_untouched(
    tmp_path: Path, size: tuple[int, int], small: tuple[int, int]
) -> None:
    image = Image.new("RGB", size, "red")
    with Image.open(tmp_path / Recorder.open(tmp_path).thumbnail(image, "a" * 64)) as saved:
        assert saved.size == small
        assert saved.format == "WEBP"
    assert image.size == size


def test_a_photograph_takes_fewer_bytes_than_a_small_png_of_it(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(128, 8, (1024, 1024, 3)).cumsum(0).cumsum(1)
    image = Image.fromarray(np.uint8(255 * (noise - noise.min()) / np.ptp(noise)))
    name, png = Recorder.open(tmp_path).thumbnail(image, "c" * 16), io.BytesIO()
    image.resize((256, 256)).save(png, "PNG")
    assert (tmp_path / name).stat().st_size < len(png.getvalue())


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"]
)
@pytest.mark.parametrize("width", [200, 300])
def test_every_image_mode_can_be_saved(tmp_path: Path, mode: str, width: int) -> None:
    image = Image.new(mode, (width, 20))
    image.info |= {"icc_profile": b"x" * 999, "exif": b"y" * 999} | ({"transparency": b"\0\1"} if mode == "P" else {})
    with Image.open(tmp_path / Recorder.open(tmp_path).thumbnail(image, "b" * 8)) as saved:
        assert saved.size == (width, 20)
        assert saved.mode in ("RGB", "RGBA")
        assert not {"icc_profile", "exif"} & saved.info.keys()


@pytest.mark.parametrize(
    "key",
    ["", "abc", "a" * 65, "A" * 8, "../../../etc", "aaaaaaaa/", "aaaaaaaa\n", "٣٣٣٣٣٣٣٣", "a" * 8 + "\0", "g" * 8],
)
def test_a_key_that_is_no_content_hash_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="content key"):
        Recorder.open(tmp_path).thumbnail(Image.new("RGB", (2, 2)), key)
    assert not any((tmp_path / "images").iterdir())


# --- episodes ---------------------------------------------------------------------------------------------------------


def test_an_episode_explains_every_reward_and_reads_back_as_it_was(tmp_path: Path) -> None:
    recorder, found = (
        Recorder.open(tmp_path),
        [episode(1, HOSTILE), episode(2), episode(3, trajectories=(), proposal=None)],
    )
    for each in found:
        recorder.episode(each)
    assert list(read_episodes(tmp_path)) == found
    record = strict_lines(tmp_path / "episodes.jsonl")[1]
    trajectory = record.pop("trajectories")[0]
    assert record == {
        "schema_version": 2,
        "step": 2,
        "image": "How many?.png",
        "thumbnail": "",
        "question": {"text": "How many?", "rationale": "How many?", "problem": None},
        "proposal": {
            "text": "How many?",
            "finish_reason": "stop",
            "num_tokens": 2,
            "mean_sampler_logprob": None,
            "prompt": "How many?",
            "advantage": None,
        },
        "proposer_reward": 0.0,
        "prompt": "How many?",
        "majority_answer": "k",
        "majority_fraction": 0.5,
        "answer_entropy": 0.0,
        "step_weight": 0.5,
        "true_answer": None,
    }
    assert trajectory == {
        "text": "How many?",
        "finish_reason": "stop",
        "num_tokens": 2,
        "mean_sampler_logprob": -0.5,
        "reasoning_steps": ["How many?"],
        "answer": "How many?",
        "words_before_answer": 3,
        "problem": None,
        "answer_key": "k",
        "in_majority": True,
        "rightness": None,
        "reward": 2 / 7,
        "parts": {"outcome": {"value": 2 / 7, "weight": 1.0, "factors": {"share": 2 / 7}, "notes": {}}},
        "step_scores": [{"similarity": None, "recurrence": 0.25, "score": None}],
        "advantage": 0.1 + 0.2,
    }


def test_what_is_kept_of_a_completion() -> None:
    sampled = Sampled.fields_of(Completion("A", (7, 8), (-0.25, -0.75), "stop"))
    assert sampled == {"text": "A", "finish_reason": "stop", "num_tokens": 2, "mean_sampler_logprob": -0.5}
    assert Sampled.fields_of(Completion("B", (), (), "length"))["mean_sampler_logprob"] is None


@pytest.mark.parametrize(
    "record",
    [
        {"step": 1},
        {"schema_version": 1},
        {"schema_version": 3},
        {"majority_fraction": 1e300},
        {"trajectories": [{}]},
    ],
)
def test_a_record_that_is_no_episode_is_named(tmp_path: Path, record: dict) -> None:
    whole = episode().model_dump(mode="json")
    line = {**whole, **record} if record != {"step": 1} else record
    (tmp_path / "episodes.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(RunDirectoryError, match=r"episodes\.jsonl: a record of step 1 is no episode") as caught:
        list(read_episodes(tmp_path))
    assert "\n" not in str(caught.value)


def test_steps_without_a_record_are_named(tmp_path: Path) -> None:
    recorder = Recorder.open(tmp_path)
    for step in (1, 2, 5):
        recorder.metrics(step, {})
    assert recorder.gaps(5) == [
        "metrics.jsonl lacks 2 of 5 steps, the first of them 3",
        "episodes.jsonl lacks 5 of 5 steps, the first of them 1",
    ]


def test_a_file_is_replaced_and_never_written_through_a_link(tmp_path: Path) -> None:
    victim, target = tmp_path / "victim", tmp_path / "report.html"
    victim.write_text("dear to me")
    (tmp_path / ".report.html.tmp").symlink_to(victim)
    target.symlink_to(victim)
    replace_file(target, b"new")
    assert victim.read_text() == "dear to me"
    assert (target.read_text(), target.is_symlink()) == ("new", False)


def test_the_recorder_imports_no_torch() -> None:
    code = "import sys, ireasoner.training.recorder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["events.jsonl", "images", "checkpoints", "solver"])
def test_a_run_does_not_write_through_links(tmp_path: Path, name: str) -> None:
    """A run directory may come from somebody else."""
    victim, run = tmp_path / "victim", tmp_path / "run"
    run.mkdir()
    victim.write_text("dear to me") if "." in name else victim.mkdir()
    (run / name).symlink_to(victim)
    with pytest.raises(RunDirectoryError, match=rf"{name} is a link"):
        Recorder.open(run)
    assert victim.read_text() == "dear to me" if "." in name else list(victim.iterdir()) == []
