"""`ireasoner label`: a person answers a run's own questions, may stop at any time, and sees no answer of the model."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import sys
import webbrowser
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ireasoner.app.cli import main
from ireasoner.method.answers import answer_key
from ireasoner.training.images import printable
from ireasoner.training.labelled import load_questions
from runs import HandMade, episode, new_run, unreadable

SECRET = answer_key("a mauve heron")  # no question and no path holds it


def picture(folder: Path, name: str, shade: int = 0) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (shade, 0, 0)).save(folder / name, "PNG")
    return folder / name


def asked(step: int, image: str, question: str, majority: str | None = SECRET, **changes: Any) -> dict[str, Any]:
    return episode(step=step, question=question, image=image, majority_answer=majority, **changes)


def make_run(place: Path, images: int = 6) -> HandMade:
    """A run with two questions about each image, at steps 1, 1, 2, 2, …"""
    recorder = new_run(place / "run", images=str(place / "pool"))
    for index in range(images):
        picture(place / "pool", f"{index}.png", index)
        for which in ("first", "second"):
            recorder.episode(asked(index + 1, f"{index}.png", f"What is the {which} of {index}?"))
    return recorder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path).run_dir


class Typist(io.StringIO):
    """Types lines; a function among them is called when its turn comes. Then the input ends."""

    def __init__(self, lines: Iterable[str | Callable[[], str]]) -> None:
        super().__init__()
        self.lines = iter(lines)

    def readline(self, size: int | None = -1, /) -> str:
        line = next(self.lines, None)
        return "" if line is None else f"{line() if callable(line) else line}\n"


@pytest.fixture
def label(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `label` prints to somebody who types these lines."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)

    def type_in(lines: Iterable[str | Callable[[], str]], *argv: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "stdin", Typist(lines))
        assert main(["label", *map(str, argv)]) == code
        printed = capsys.readouterr()
        assert printed.err.count("\n") == (1 if code else 0), printed.err
        return printed.err if code else printed.out

    return type_in


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def questions_in(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("What is the ")]


# --- answering --------------------------------------------------------------------------------------------------------


def test_answers_become_evaluation_data_about_as_many_images(run: Path, label: Callable[..., str]):
    printed = label(["7", "seven", "A red one", "no", " yes ", "0"], run)
    assert [f"{i}/6  {run.parent}/pool/" in printed for i in range(1, 8)] == [True] * 6 + [False]
    found = load_questions(run / "labelled.jsonl")
    assert [q.question for q in found] == questions_in(printed)
    assert [q.answer for q in found] == ["7", "seven", "A red one", "no", "yes", "0"]
    assert len({q.image for q in found}) == 6
    for question in found:
        assert question.image.stem in question.question
    assert f"ireasoner eval tiny {run} --data {run}/labelled.jsonl" in printed
    assert f"ireasoner train --images {run.parent}/pool --model tiny --out NEW --eval-data {run}" in printed
    assert "The run has trained on these images" in printed
    assert not (run / "labelled.skipped.jsonl").exists()


def test_the_majority_is_never_shown_and_compared_at_the_end(tmp_path: Path, label: Callable[..., str]):
    recorder = new_run(tmp_path / "run", images=str(tmp_path / "pool"))
    for index, majority in enumerate((SECRET, SECRET, "number:7", None)):
        picture(tmp_path / "pool", f"{index}.png")
        recorder.episode(asked(index + 1, f"{index}.png", "What is it?", majority))
    printed = label(["A mauve heron."] * 4, recorder.run_dir)
    assert "mauve heron" in SECRET
    assert "heron" not in printed
    assert "majority answered as you do to 2 of 4 (50.0 %, 95 % interval " in printed


def test_questions_are_drawn_by_seed_and_spread_over_the_steps(tmp_path: Path, label: Callable[..., str]):
    run = make_run(tmp_path, images=20).run_dir
    for seed in range(3):
        out = tmp_path / f"{seed}.jsonl"
        label(["x"] * 9, run, "--questions", 5, "--seed", seed, "--out", out)
        assert sorted((row["step"] - 1) // 4 for row in rows(out)) == [0, 1, 2, 3, 4]
    label(["x"] * 9, run, "--questions", 5, "--seed", 2, "--out", tmp_path / "again.jsonl")
    assert rows(tmp_path / "again.jsonl") == rows(out)
    assert rows(tmp_path / "0.jsonl") != rows(out)


def test_more_questions_than_any_run_has_are_all_that_there_are(run: Path, label: Callable[..., str]):
    printed = label(["x"] * 9, run, "--questions", 10**9)
    assert "6/6" in printed
    assert "no other question" in printed


# --- stopping and going on --------------------------------------------------------------------------------------------


def interrupt() -> str:
    raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [["q"], [], [interrupt]], ids=["q", "the end of the input", "Ctrl-C"])
def test_a_stopped_person_goes_on_with_the_other_questions(run: Path, label: Callable[..., str], stop: list[Any]):
    first = questions_in(label(["one", "", "two", *stop], run, "--questions", 4))
    assert len(first) == 4
    assert [row["answer"] for row in rows(run / "labelled.jsonl")] == ["one", "two"]
    assert [row["question"] for row in rows(run / "labelled.skipped.jsonl")] == [first[1]]
    printed = label(["", "three", "four"], run, "--questions", 4)
    second = questions_in(printed)
    assert second[0] == first[3]  # it was asked, but neither answered nor skipped
    assert len(second) == 3
    assert "3/4" in printed
    images = [row["image"] for name in ("labelled", "labelled.skipped") for row in rows(run / f"{name}.jsonl")]
    assert len(images) == len(set(images)) == 6
    assert [q.answer for q in load_questions(run / "labelled.jsonl")] == ["one", "two", "three", "four"]
    assert questions_in(label(["five"], run, "--questions", 4)) == []
    assert len(rows(run / "labelled.jsonl")) == 4


def test_an_answer_is_saved_before_the_next_question(run: Path, label: Callable[..., str]):
    counts: list[int] = []

    def look() -> str:
        counts.append(len(rows(run / "labelled.jsonl")))
        return "x"

    label(["x", look, look], run)
    assert counts == [1, 2]


def test_who_answers_nothing_leaves_no_file(run: Path, label: Callable[..., str]):
    assert "Nothing was answered." in label(["q"], run)
    assert not list(run.glob("labelled*"))


def test_rows_of_ones_own_are_kept_and_counted(run: Path, label: Callable[..., str]):
    out = run / "labelled.jsonl"
    own = json.dumps({"image": "../pool/3.png", "question": "Mine?", "answer": 4})
    out.write_text(own)  # an editor left no newline at its end
    printed = label(["x"] * 9, run)
    assert out.read_text().splitlines()[0] == own
    assert "2/6" in printed
    assert "pool/3.png" not in printed
    assert len(load_questions(out)) == 6
    assert " of 5 (" in printed  # of the run's own questions


# --- what others wrote ------------------------------------------------------------------------------------------------

NASTY = "What \x1b[31mis\x1b[0m\x07 \r\n[bold]it[/bold] \u202e\x9b31m?"


def test_a_question_is_text_and_nothing_else(tmp_path: Path, label: Callable[..., str]):
    pool = tmp_path / "pool"
    recorder = new_run(tmp_path / "run", images=str(pool), model="tiny; rm -rf $HOME\x1b[2J")
    name = "a\n\x1b[31mb.png"
    picture(pool, name)
    recorder.episode(asked(1, printable(name), NASTY))
    picture(pool, "long.png")
    recorder.episode(asked(2, "long.png", "What? " * 1000))  # would be cut, and then another question was answered
    for missing in ("\ud800.png", "a\x00.png", "x" * 5000, "\\", "é\\x", "gone.png", "."):
        recorder.episode(asked(3, missing, "What?"))
    printed = label(["\x1b[Da"] * 9, recorder.run_dir)
    assert all(c.isprintable() for c in printed.replace("\n", ""))
    assert "[bold]it[/bold]" in printed
    assert "1/1" in printed
    assert "'tiny; rm -rf $HOME [2J'" in printed
    (question,) = load_questions(recorder.run_dir / "labelled.jsonl")
    assert (question.question, question.answer, question.image) == (NASTY, "[Da", (pool / name).resolve())


def test_an_image_that_cannot_be_evaluated_on_is_not_asked_about(run: Path, label: Callable[..., str]):
    (run.parent / "pool" / "2.png").write_bytes(b"nothing to see")
    label(["x"] * 9, run)
    assert "2.png" not in (run / "labelled.jsonl").read_text()
    assert len(rows(run / "labelled.jsonl")) == 5


def test_a_viewer_opens_images_alone(tmp_path: Path, label: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    recorder = new_run(tmp_path / "run", images=str(tmp_path / "pool"))
    for name in ("ä b.png", "page.html", "bare"):  # all of them hold an image; a browser would go by the name
        recorder.episode(asked(1, name, "What?"))
        picture(tmp_path / "pool", name)
    label([], recorder.run_dir)
    monkeypatch.setenv("DISPLAY", ":0")
    label(["x"] * 9, recorder.run_dir, "--no-viewer", "--out", tmp_path / "one.jsonl")
    assert opened == []
    label(["x"] * 9, recorder.run_dir, "--out", tmp_path / "other.jsonl")
    assert opened == [f"file://{tmp_path}/pool/%C3%A4%20b.png"]


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_run_without_questions(tmp_path: Path, label: Callable[..., str]):
    recorder = new_run(tmp_path / "run", images=str(tmp_path / "pool"))
    picture(tmp_path / "pool", "a.png")
    assert "has recorded no readable question of its own" in label([], recorder.run_dir, code=2)
    recorder.episode(unreadable())
    recorder.episode(asked(1, "a.png", "What is known already?", proposal=None))  # from the oracle's labels
    assert "has recorded no readable question of its own" in label([], recorder.run_dir, code=2)
    recorder.episode(asked(2, "elsewhere.png", "What?"))
    assert f"no image that {recorder.run_dir} asked about is in '{tmp_path}/pool'" in label(
        [], recorder.run_dir, code=2
    )
    assert "not a run directory" in label([], tmp_path, code=2)


def test_a_run_whose_images_are_no_files_here(tmp_path: Path, label: Callable[..., str]):
    (tmp_path / "a.tar").write_bytes(b"")
    for number, images in enumerate(("s3://bucket/photos", "owner/set@main", str(tmp_path / "a.tar"))):
        recorder = new_run(tmp_path / f"run-{number}", images=images)
        recorder.episode(asked(1, "a.tar/a.png", "What?"))
        assert f"label shows image files of a folder here, and those of {recorder.run_dir} are in '{images}'" in label(
            [], recorder.run_dir, code=2
        )


@pytest.mark.parametrize("name", ["labelled.jsonl", "labelled.skipped.jsonl"])
def test_nothing_is_written_through_a_link_or_into_what_is_no_file(run: Path, label: Callable[..., str], name: str):
    target = run.parent / "precious"
    target.write_text("")
    (run / name).symlink_to(target)
    assert f"{name} is a link" in label(["x", ""], run, code=2)
    assert target.read_text() == ""
    (run / name).unlink()
    (run / name).mkdir()
    assert "not a regular file" in label(["x", ""], run, code=2)


def test_a_file_that_cannot_be(run: Path, label: Callable[..., str]):
    assert "cannot be written" in label(["x"], run, "--out", run / "nowhere" / "x.jsonl", code=2)
    (run / "labelled.jsonl").write_text("{not json\n")
    assert "labelled.jsonl, line 1" in label(["x"], run, code=2)


def test_a_full_disk_is_one_sentence_and_loses_no_earlier_answer(run: Path, label: Callable[..., str]):
    label(["x", "q"], run)
    before = (run / "labelled.jsonl").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
        told = label(["y", "z"], run, code=2)
    assert "could not be saved" in told
    assert (run / "labelled.jsonl").read_bytes() == before
    label(["y", "q"], run)
    assert [row["answer"] for row in rows(run / "labelled.jsonl")] == ["x", "y"]
