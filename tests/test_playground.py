"""The world: what it asks is true, what it draws can be told apart, and its files are readable by everyone else."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ireasoner.app.cli import main
from ireasoner.model.views import images_of, is_clip
from ireasoner.playground import dataset, easyvqa, several, wording, world
from ireasoner.playground.truth import step_truth, truth_beside
from ireasoner.playground.world import Picture
from ireasoner.training.clips import Limits, load_view
from ireasoner.training.items import ImagePool
from ireasoner.training.labelled import load_questions
from worlds import pictures, some

STYLES = ("plain", "varied", "chalk")


BARS = Picture("bars", values=(("red", 7), ("blue", 3), ("green", 3)))
PIE = Picture("pie", values=(("orange", 5), ("purple", 3)))
SCENE = Picture("scene", objects=(("red", "circle", "top left"), ("blue", "cross", "middle right")))
SIGN = Picture("sign", objects=(("teal", "rectangle", ""),))

# --- questions and their truth ----------------------------------------------------------------------------------------


@given(pictures())
@settings(deadline=None)
def test_every_question_is_answered_the_same_again_and_every_step_is_true(picture: Picture):
    asked = world.questions(picture)
    assert len({question.text for question in asked}) == len(asked)
    for question in asked:
        assert world.solve(picture, question.text) == question
        assert question.steps
        assert question.answer
        assert [step for step in question.steps if world.step_truth(picture, step) is not True] == []
    assert [fact for fact in world.facts(picture) if world.step_truth(picture, fact) is not True] == []


@given(pictures(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_a_changed_number_makes_a_step_false(picture: Picture, random):
    for step in {step for question in world.questions(picture) for step in question.steps}:
        numbers = list(re.finditer(r"\d+", step))
        if not numbers or "more than" in step:  # "3 is more than 2" may stay true
            continue
        number = random.choice(numbers)
        other = int(number[0]) + random.choice([1, 2, 10])
        changed = f"{step[: number.start()]}{other}{step[number.end() :]}"
        assert world.step_truth(picture, changed) is False, changed


@given(pictures())
@settings(deadline=None)
def test_a_changed_color_or_place_makes_a_fact_false(picture: Picture):
    values = dict(picture.values)
    for fact in world.facts(picture):
        for color, other in itertools.permutations(world.COLORS, 2):
            if f"The {color} " in fact:
                same = other in values and values[other] == values[color]
                assert world.step_truth(picture, fact.replace(f"The {color} ", f"The {other} ")) is same
        for color, other in itertools.permutations(world.SIGN_COLORS, 2):
            if f" a {color} " in fact:
                assert world.step_truth(picture, fact.replace(f" a {color} ", f" a {other} ")) is False
        for place, other in itertools.permutations(world.CELLS, 2):
            if fact.endswith(f" {place}."):
                assert world.step_truth(picture, fact.replace(place, other)) is False


@given(pictures())
@settings(deadline=None)
def test_conclusions_are_checked_too(picture: Picture):
    for question in world.questions(picture):
        last = question.steps[-1]
        if question.kind == "extreme":
            for color in set(world.COLORS) - {question.answer}:
                assert world.step_truth(picture, last.replace(question.answer, color)) is False
        elif question.kind in ("compare", "relation", "exists", "absent"):
            turned = last.replace("is not ", "is ") if "is not " in last else last.replace("is ", "is not ", 1)
            assert world.step_truth(picture, turned) is False
        elif question.kind == "count":
            head, _, names = last.rstrip(".").partition(" are ")
            fewer = names.split(", ")[1:]
            assert world.step_truth(picture, f"{head} are {', '.join(fewer)}.") is False
            assert world.step_truth(picture, f"{head} are {', '.join(reversed(names.split(', ')))}.") is True


def test_no_form_is_read_as_another_kind():
    slots = {
        "c": "red", "s": "circle", "n": "bar", "k": "object", "verb": "reaches", "m": "tallest", "p": "top left",
        "w": "top", "u": "bottom", "rel": "above", "no": "not ", "l": "red, blue", "x": "red shape",
        "v": "7", "a": "5", "b": "4", "r": "9",
    }  # fmt: skip
    for kind, forms in wording.FORMS.items():
        for form in forms:
            found = wording.read(form.format(**slots))
            assert found
            assert found[0] == kind
            assert found[1] == {name: slots[name] for name in found[1]}


@pytest.mark.parametrize("picture", [BARS, PIE, SCENE, SIGN])
@pytest.mark.parametrize(
    "step",
    [
        "",
        ".",
        "Look at the picture.",
        "The answer is 7.",
        "I compare them.",
        "Step 1",
        "7",
        "The red one.",
    ],
)
def test_what_states_nothing_is_neither_true_nor_false(picture: Picture, step: str):
    assert world.step_truth(picture, step) is None


@pytest.mark.parametrize(
    ("picture", "step", "truth"),
    [
        (BARS, "the RED bar  reaches 7", True),  # case, blanks and the full stop do not matter
        (BARS, "The red bar reaches 07.", True),
        (BARS, "The red row has 7.", False),  # another chart's words
        (BARS, "The yellow bar reaches 7.", False),
        (BARS, "The tallest is red.", True),
        (BARS, "The shortest is blue.", True),  # one of two
        (BARS, "The longest is red.", False),
        (BARS, "The bars are red, blue, green.", True),
        (BARS, "The bars are red, blue.", False),
        (BARS, "The red circle is at the top left.", False),
        (BARS, "I read 7 for red.", True),
        (BARS, "Blue is at 4.", False),
        (BARS, "Red is the tallest.", True),
        (BARS, "7 minus 3 is 5.", False),
        (BARS, "3 is not larger than 7.", True),
        (SCENE, "At the middle right is the blue cross.", True),
        (SCENE, "I count red circle, blue cross.", True),
        (SCENE, "Top is not further above middle.", False),
        (SCENE, "This is a red circle.", False),  # of signs alone
        (SIGN, "The shape is a teal rectangle.", True),
        (SIGN, "I see a teal square.", False),
        (SIGN, "It is a teal shape.", True),
        (SIGN, "That is not a circle.", True),
        (SIGN, "It is not a rectangle.", False),
        (SIGN, "The tallest is teal.", False),
        (BARS, "4 + 3 = 7.", True),
        (BARS, "3 - 4 = -1.", None),
        (BARS, "7 is more than 3.", True),
        (BARS, "3 is not more than 3.", True),
        (BARS, "3 is more than 3.", False),
        (PIE, "The orange slice takes 5.", True),
        (PIE, "The biggest is orange.", True),
        (PIE, "The orange bar reaches 5.", False),
        (SCENE, "The red circle is at the top left.", True),
        (SCENE, "The red square is at the top left.", False),
        (SCENE, "The objects are blue cross, red circle.", True),
        (SCENE, "The objects are blue cross.", False),
        (SCENE, "top is above middle.", True),
        (SCENE, "left is not left of right.", False),
        (SCENE, "sky is above earth.", False),
        (SCENE, "The tallest is red.", False),
        (SCENE, "The red bar reaches 7.", False),
    ],
)
def test_statements_by_hand(picture: Picture, step: str, truth: bool | None):
    assert world.step_truth(picture, step) is truth


@pytest.mark.parametrize(
    ("picture", "question", "answer"),
    [
        (BARS, "What is the value of the red bar?", "7"),
        (BARS, "  What is the   value of the red bar? ", "7"),
        (BARS, "Which bar is the tallest?", "red"),
        (BARS, "Which bar is the shortest?", None),  # two are
        (BARS, "How much more is red than blue?", "4"),
        (BARS, "How much more is blue than red?", None),
        (BARS, "How much more is blue than green?", None),
        (BARS, "What do red and blue add up to?", "10"),
        (BARS, "What do red and red add up to?", None),
        (BARS, "Is red more than blue?", "yes"),
        (BARS, "Is blue more than green?", "no"),
        (BARS, "Is red more than red?", None),
        (BARS, "How many bars are there?", "3"),
        (BARS, "How many rows are there?", None),
        (BARS, "What is the value of the yellow bar?", None),
        (BARS, "Where is the red circle?", None),
        (BARS, "How many bars are there", None),
        (BARS, "", None),
        (PIE, "Which slice is the smallest?", "purple"),
        (SCENE, "Where is the red circle?", "top left"),
        (SCENE, "What is at the middle right?", "blue cross"),
        (SCENE, "What is at the middle center?", None),
        (SCENE, "What color is the cross?", "blue"),
        (SCENE, "What color is the square?", None),
        (SCENE, "Is the red circle above the blue cross?", "yes"),
        (SCENE, "Is the blue cross left of the red circle?", "no"),
        (SCENE, "Is the red circle above the red circle?", None),
        (SCENE, "How many objects are there?", "2"),
        (SCENE, "How many bars are there?", None),
    ],
)
def test_answers_by_hand(picture: Picture, question: str, answer: str | None):
    found = world.solve(picture, question)
    assert (found and found.answer) == answer


def test_signs_are_asked_about_evenly():
    """Most shapes and colours are not there; an answerer that always denies must not be right for it."""
    rng = np.random.default_rng(0)
    asked = [world.sample_question(picture, rng) for picture in some(800, family="sign")]
    for kind in ("exists", "absent"):
        answers = [question.answer for question in asked if question.kind == kind]
        assert 0.4 < np.mean([answer == "yes" for answer in answers]) < 0.6
    assert 0.4 < np.mean([question.text.islower() for question in asked]) < 0.6


@given(pictures())
@settings(deadline=None)
def test_a_picture_survives_its_record(picture: Picture):
    assert world.picture_from_record(json.loads(json.dumps(world.picture_record(picture)))) == picture


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"family": "oil", "values": [], "objects": []},
        {"family": "bars", "values": 3},
        {"family": "bars"},
        {"family": "bars", "values": [["red", float("inf")]]},
        {"family": "bars", "values": [["red", 3], ["red", 4]]},
        {"family": "scene", "objects": [["red", "circle", "nowhere"]]},
        {"family": "sign", "objects": []},
        ["bars"],
        None,
    ],
)
def test_a_bad_record_is_an_error(record: dict):
    with pytest.raises(ValueError, match=r"Picture|there is no such"):
        world.picture_from_record(record)


@given(
    st.sampled_from(world.FAMILIES),
    st.lists(st.tuples(st.text() | st.sampled_from(world.COLORS), st.integers()), max_size=3),
    st.lists(st.tuples(st.text(), st.text() | st.just("cross"), st.text() | st.sampled_from(world.CELLS)), max_size=3),
)
@settings(deadline=None)
def test_a_record_is_refused_or_its_picture_can_be_asked_about(family: world.Family, values: list, objects: list):
    try:
        picture = world.picture_from_record({"family": family, "values": values, "objects": objects})
    except ValueError:
        return
    for question in world.questions(picture):
        world.solve(picture, question.text)
        for step in question.steps:
            world.step_truth(picture, step)


@given(pictures())
@settings(deadline=None)
def test_a_picture_holds_what_it_may(picture: Picture):
    items = picture.values or picture.objects
    assert len(items) == 1 if picture.family == "sign" else 2 <= len(items) <= 6
    if picture.family == "sign":
        assert picture.objects[0][0] in world.SIGN_COLORS
        assert picture.objects[0][1] in world.SIGN_SHAPES
    elif picture.family == "scene":
        assert len({cell for *_, cell in picture.objects}) == len(items)
        assert len({(color, shape) for color, shape, _ in picture.objects}) == len(items)
        assert all(o[0] in world.COLORS and o[1] in world.SHAPES and o[2] in world.CELLS for o in picture.objects)
    else:
        assert len(dict(picture.values)) == len(items)
        top = {"bars": 9, "dots": 6, "pie": world.PIE_PARTS}[picture.family]
        assert all(color in world.COLORS and 1 <= value <= top for color, value in picture.values)
        if picture.family == "pie":
            assert sum(dict(picture.values).values()) == world.PIE_PARTS


# --- drawing ----------------------------------------------------------------------------------------------------------


def drawn(picture: Picture, style: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = world.draw(picture, world.sample_style(style, rng), rng)
    assert (image.mode, image.size) == ("RGB", (world.IMAGE_SIZE, world.IMAGE_SIZE))
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", world.FAMILIES)
def test_every_family_is_drawn_in_every_style_and_the_same_again(family: world.Family, style: str):
    for seed, picture in enumerate(some(6, family=family, items=(2, 6))):
        pixels = drawn(picture, style, seed)
        assert pixels.std() > 3  # something is there
        assert np.array_equal(pixels, drawn(picture, style, seed))
    if style != "plain":
        assert not np.array_equal(pixels, drawn(picture, style, seed + 1))


@given(pictures(), st.sampled_from(world.COLORS))
@settings(deadline=None, max_examples=40)
def test_another_color_or_number_or_place_looks_different(picture: Picture, color: str):
    if picture.family == "scene":
        (old, shape, cell), *rest = picture.objects
        free = next(c for c in world.CELLS if c not in {o[2] for o in picture.objects})
        others = [replace(picture, objects=((old, shape, free), *rest))]
        others += [replace(picture, objects=((color, shape, cell), *rest))] if color != old else []
    elif picture.family == "sign":
        ((old, shape, _),) = picture.objects
        others = [replace(picture, objects=((color, shape, ""),))] if color != old else []
        other_shape = world.SIGN_SHAPES[(world.SIGN_SHAPES.index(shape) + 1) % len(world.SIGN_SHAPES)]
        others += [replace(picture, objects=((old, other_shape, ""),))]
    else:
        (old, value), *rest = picture.values
        others = [replace(picture, values=((color, value), *rest))] if color != old else []
        if picture.family != "pie":
            others += [replace(picture, values=((old, value - 1 if value > 3 else value + 1), *rest))]
    for other in others:
        assert np.abs(drawn(picture, "plain") - drawn(other, "plain")).max() > 40


def test_the_two_worlds_look_different():
    """The demo's style is not the one that the tiny LMM was pre-trained on."""
    chalk, varied = (np.mean([drawn(p, style, i).mean() for i, p in enumerate(some(30))]) for style in STYLES[:0:-1])
    assert chalk < varied - 30  # dark boards, mostly light paper


def test_an_unknown_style_is_named():
    with pytest.raises(ValueError, match=r"'oil'.*chalk"):
        world.sample_style("oil", np.random.default_rng(0))


# --- files ------------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_splits_hold_different_pictures(tmp_path: Path):
    dataset.write_unlabeled(tmp_path / "unlabeled", 40)
    for split in ("validation", "test"):
        dataset.write_questions(tmp_path / split, 40, split=split)
    found = {name: {data for path, data in files(tmp_path / name).items() if path.endswith(".png")} for name in
             ("unlabeled", "validation", "test")}  # fmt: skip
    assert all(len(pictures) == 40 for pictures in found.values())
    for one, other in itertools.combinations(found.values(), 2):
        assert not one & other


def test_the_files_are_the_same_for_the_same_seed(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        dataset.write_unlabeled(tmp_path / name / "u", 5, seed=seed)
        dataset.write_questions(tmp_path / name / "q", 5, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert not set(files(tmp_path / "a").values()) & set(files(tmp_path / "c").values())


def test_the_unlabeled_folder_holds_pictures_and_nothing_else(tmp_path: Path):
    assert dataset.write_unlabeled(tmp_path / "u", 103) == tmp_path / "u"
    names = list(files(tmp_path / "u"))
    assert len(names) == 103
    assert sorted(dataset.load_truth(tmp_path / "u")) == names  # which lies beside the folder
    assert dataset.load_truth(tmp_path) == {}
    assert all(re.fullmatch(r"\d\d/\d{5}\.png", name) for name in names)
    pool = ImagePool.scan(tmp_path / "u", 0)
    assert sorted(pool.names) == names
    assert len(pool.take(103)) == 103
    assert not pool.skipped


def test_pictures_of_another_world_are_not_left_among_the_new_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def playground(*options: str) -> tuple[int, str]:
        code = main(["playground", str(tmp_path), "--questions", "1", *options])
        return code, capsys.readouterr().err

    assert playground("--images", "3")[0] == 0
    assert playground("--images", "3", "--split", "validation")[0] == 0  # the other split beside the same pictures
    (tmp_path / "unlabeled" / ".thumbs").touch()  # hidden files are never trained on
    assert playground("--images", "4", "--style", "varied")[0] == 0
    before = files(tmp_path)
    code, message = playground("--images", "2")
    assert code == 2
    assert "unlabeled holds other files, such as 00/00002.png" in message
    (tmp_path / "unlabeled" / "cat").touch()  # a picture needs no extension to be trained on
    assert "such as cat" in playground("--images", "4")[1]
    (tmp_path / "unlabeled" / "cat").unlink()
    assert files(tmp_path) == before


@pytest.mark.parametrize("style", STYLES)
def test_the_questions_can_be_read_for_evaluation(tmp_path: Path, style: str):
    path = dataset.write_questions(tmp_path / "v", 12, style, "validation", items=(2, 3))
    assert path == tmp_path / "v" / "validation.jsonl"
    found = load_questions(path)
    assert len(found) == 12
    assert len({q.image for q in found}) == 12
    texts = [q.question for q in found]
    for index, words in enumerate(
        (
            "bar|more|add up",
            "row|more|add up",
            "slice|more|add up",
            "where|what|is the|objects",
            "|".join(("shape", *world.SIGN_SHAPES)),
        )
    ):
        assert all(re.search(words, text.lower()) for text in texts[index::5])  # the families take turns
    assert all(q.answer for q in found)


def test_an_unknown_split_is_named(tmp_path: Path):
    with pytest.raises(KeyError, match="training"):
        dataset.write_questions(tmp_path, 1, split="training")


def test_easy_vqa_becomes_files_without_its_training_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = []
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: opened.append(self) or real(self, *a, **k))
    path = easyvqa.write(tmp_path)
    assert [file.parent.name for file in opened] == ["test"]
    assert len(list((tmp_path / "unlabeled").iterdir())) == 4000
    monkeypatch.undo()
    found = load_questions(path)
    assert len(found) == 9673
    assert len({question.answer for question in found}) == 13
    assert len({question.image for question in found}) == 1000


def test_easy_vqa_has_labels_of_its_training_images_where_they_are_asked_for(tmp_path: Path):
    assert easyvqa.write(tmp_path, with_labels=True) == tmp_path / "test" / "test.jsonl"
    found = load_questions(tmp_path / "labels.jsonl")
    assert len(found) == 38575
    assert {question.image.parent for question in found if isinstance(question.image, Path)} == {tmp_path / "unlabeled"}


# --- pairs and clips --------------------------------------------------------------------------------------------------

KINDS: tuple[several.Kind, ...] = ("pairs", "clips")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_of_pairs_and_clips_is_true_of_them(kind: several.Kind):
    """Every step of every answer is true, and the answer of another item's question is found wrong by its own truth."""
    rng = np.random.default_rng(0)
    things = [several.sample(kind, rng, world.FAMILIES[i % 5], (2, 4)) for i in range(40)]
    kinds = set()
    for thing in things:
        assert several.from_record(json.loads(json.dumps(several.record(thing)))) == thing
        for question in several.questions(thing):
            kinds.add(question.kind)
            assert several.solve(thing, f"  {question.text} ") == question
            assert all(several.step_truth(thing, step) is True for step in question.steps), question
        assert several.sample_question(thing, rng) in several.questions(thing)
    assert (
        kinds
        == {
            "pairs": {"same", "more", "total", "sum", "color"},
            "clips": {"way", "goes", "start", "end", "what"},
        }[kind]
    )
    false = [several.step_truth(things[0], step) for step in several.questions(things[1])[0].steps]
    assert False in false


def test_steps_about_pairs_and_clips_that_cannot_be_checked_are_no_truth():
    motion = several.Motion("red", "circle", "right", "top left", "top right", ("blue", "square", "bottom left"))
    for step, true in (
        ("First frame: the red circle is at the top left.", True),
        ("last frame: the red circle is at the top left", False),
        ("Last frame: the blue square is at the bottom left.", True),
        ("The red circle goes right.", True),
        ("The blue square goes right.", False),
        ("The red circle is at the top left.", None),  # when?
        ("Image 1: the red circle is at the top left.", None),
        ("3 + 4 = 7.", True),
        ("It is nice.", None),
    ):
        assert several.step_truth(motion, step) is true, step


@pytest.mark.parametrize(
    "change", [{"way": "back"}, {"end": "nowhere"}, {"still": ["red", "circle", "x"]}, {"family": "pair"}]
)
def test_a_record_of_no_possible_clip_is_refused(change: dict[str, object]):
    motion = several.Motion("red", "circle", "right", "top left", "top right", ("blue", "square", "bottom left"))
    with pytest.raises(ValueError, match=r"no such motion|validation error"):
        several.from_record({**several.record(motion), **change})


@pytest.mark.parametrize("style", STYLES)
def test_a_shape_of_a_clip_goes_where_it_is_said_to_go_and_nothing_else_moves(style: str):
    rng = np.random.default_rng(1)
    for _ in range(4):
        motion = several.sample("clips", rng, None, (2, 4))
        assert isinstance(motion, several.Motion)
        frames = several.draw(motion, world.sample_style(style, rng), rng)
        first, last = (np.asarray(frames[k], dtype=float) for k in (0, -1))
        changed = np.abs(first - last).max(2) > 40
        for cell in world.CELLS:
            row, column = divmod(world.CELLS.index(cell), 3)
            inside = changed[28 * row + 4 : 28 * row + 24, 28 * column + 4 : 28 * column + 24].mean()
            assert (inside > 0.05) == (cell in (motion.start, motion.end)), (cell, motion)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_and_clips_become_files_that_train_and_eval_read(kind: several.Kind, tmp_path: Path):
    folder = dataset.write_unlabeled(tmp_path / "unlabeled", 6, "varied", kind=kind)
    pool = ImagePool.scan(folder, 0, items="folders" if kind == "pairs" else "clips")
    items, truth = pool.take(6), truth_beside(folder)
    assert {item.name for item in items} == set(truth.pictures)
    assert {len(images_of(item.image)) for item in items} == {2 if kind == "pairs" else several.FRAMES}
    asked = several.questions(truth.pictures[items[0].name])[0]
    assert truth.answer(items[0].name, asked.text) == asked.answer
    assert truth.step(items[0].name, asked.steps[0]) is True
    found = load_questions(dataset.write_questions(tmp_path / "test", 5, "varied", kind=kind), truth=step_truth)
    assert len(found) == 5
    for question in found:
        view = load_view(question.image, Limits())
        assert is_clip(view) == (kind == "clips")
        assert question.picture is not None
        solved = several.solve(several.from_record(question.picture), question.question)
        assert solved is not None
        assert solved.answer == question.answer
