"""What the tiny model learned from: well-formed, true where it is meant to be, and unlike what is played and tested."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import pretrain_tiny
from ireasoner.method.texts import parse_question, parse_trajectory
from ireasoner.model.backbone import load_processor
from ireasoner.model.source import TINY_MODEL
from ireasoner.playground import dataset, wording, world
from ireasoner.playground.world import Picture
from ireasoner.training.config import resolve
from worlds import pictures, some


def test_every_kind_of_question_is_asked():
    kinds = {question.kind for picture in some(200) for question in world.questions(picture)}
    assert kinds == set(pretrain_tiny.RATIONALES)
    rng = np.random.default_rng(0)
    assert {world.sample_question(picture, rng).kind for picture in some(400)} == kinds


@given(pictures(), st.integers(0, 5))
@settings(deadline=None)
def test_every_wording_says_the_same(picture: Picture, manner: int):
    for step in {step for question in world.questions(picture) for step in question.steps}:
        said = pretrain_tiny.reword(step, manner)
        assert world.step_truth(picture, said) is True, said
        found, plain = wording.read(said), wording.read(step)
        assert found is not None
        assert plain is not None
        assert found[0] == plain[0]
        assert found[1].items() <= plain[1].items()  # some wordings leave the noun out


@pytest.mark.parametrize("step", pretrain_tiny.FILLERS)
@pytest.mark.parametrize("picture", some(8))
def test_fillers_are_neither_true_nor_false(picture: Picture, step: str):
    assert world.step_truth(picture, step) is None


def test_the_splits_and_pretraining_draw_different_pictures():
    assert len({*dataset.SPLIT_SEEDS.values(), pretrain_tiny.PRETRAINING_SEED}) == 4


@given(pictures())
@settings(deadline=None, max_examples=50)
def test_true_reasoning_is_well_formed_and_reads_back(picture: Picture):
    for question in world.questions(picture):
        read = parse_trajectory(pretrain_tiny.solver_text(question))
        assert read.problem is None
        assert read.reasoning_steps == question.steps
        assert read.answer == question.answer
        asked = parse_question(pretrain_tiny.proposer_text(question))
        assert (asked.problem, asked.text) == (None, question.text)
        assert asked.rationale == pretrain_tiny.RATIONALES[question.kind]


@given(pictures(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_reasoning_in_any_voice_is_well_formed_and_true(picture: Picture, seed: int):
    rng = np.random.default_rng(seed)
    question = world.sample_question(picture, rng)
    read = parse_trajectory(pretrain_tiny.solver_text(question, rng))
    assert read.answer == question.answer
    said = [step for step in read.reasoning_steps if step not in pretrain_tiny.FILLERS]
    assert len(read.reasoning_steps) - len(said) <= 1
    assert [world.step_truth(picture, step) for step in said] == [True] * len(question.steps)


def test_every_habit_is_reasoning_of_the_same_form():
    rng = np.random.default_rng(2)
    habits = {"careful": 0, "guess": 0, "made up": 0}
    for picture in some(300):
        question = world.sample_question(picture, rng)
        found = pretrain_tiny.with_habit(question, picture, rng)
        assert (found.text, found.kind) == (question.text, question.kind)
        assert len(found.steps) == len(question.steps)
        assert [wording.read(step)[0] for step in found.steps] == [wording.read(step)[0] for step in question.steps]
        truth = [world.step_truth(picture, step) for step in found.steps]
        assert None not in truth
        habits["careful" if all(truth) else "made up" if found.answer == question.answer else "guess"] += 1
    assert min(habits.values()) >= 45


@given(pictures())
@settings(deadline=None, max_examples=50)
def test_what_is_misread_is_a_picture_of_the_same_things(picture: Picture):
    other = pretrain_tiny.misread(picture)
    assert world.picture_from_record(world.picture_record(other)) == other
    assert [color for color, _ in other.values] == [color for color, _ in picture.values]
    assert len(other.objects) == len(picture.objects)
    if picture.family in ("bars", "dots"):
        assert all(abs(a - b) == 1 for (_, a), (_, b) in zip(picture.values, other.values, strict=True))
        assert {value for _, value in other.values} <= set(range(1, 10 if picture.family == "bars" else 7))
    elif picture.family == "pie":
        assert sorted(value for _, value in other.values) == sorted(value for _, value in picture.values)
    else:
        assert pretrain_tiny.misread(other) == picture


def test_pretraining_examples_are_well_formed_and_of_all_three_tasks():
    rng = np.random.default_rng(4)
    tasks = {"describe": 0, "ask": 0, "solve": 0}
    for _ in range(150):
        [image], prompt, completion = pretrain_tiny.example(rng, habits=True)
        assert image.size == (world.IMAGE_SIZE, world.IMAGE_SIZE)
        if prompt == pretrain_tiny.DESCRIBE_PROMPT:
            tasks["describe"] += 1
            assert completion.startswith("The ")
        elif prompt == pretrain_tiny.PROPOSER_PROMPT:
            tasks["ask"] += 1
            assert parse_question(completion).well_formed
        else:
            tasks["solve"] += 1
            assert prompt[-1] in "?."
            assert parse_trajectory(completion).well_formed
    assert min(tasks.values()) >= 10


def test_the_tiny_preset_speaks_as_in_pretraining_and_leaves_room_for_true_answers():
    sampling = resolve({"images": "/x", "model": "tiny"}).sampling
    assert (sampling.proposer_prompt, sampling.solver_prompt) == (
        pretrain_tiny.PROPOSER_PROMPT,
        pretrain_tiny.SOLVER_PROMPT,
    )
    tokenizer = load_processor("tiny").tokenizer
    asked = [question for picture in some(150, seed=8) for question in world.questions(picture)]
    ends = [
        text + "<|im_end|>"
        for question in asked
        for text in (pretrain_tiny.solver_text(question), pretrain_tiny.proposer_text(question))
    ]
    lengths = np.array([len(ids) for ids in tokenizer(ends)["input_ids"]]).reshape(-1, 2)
    assert lengths[:, 0].max() <= sampling.max_solution_tokens
    assert lengths[:, 1].max() <= sampling.max_question_tokens
    assert tokenizer.decode(tokenizer(ends[0])["input_ids"]) == ends[0]


def test_labels_of_pretraining_lie_on_completions_alone():
    processor = load_processor("tiny")
    rng = np.random.default_rng(6)
    examples = [pretrain_tiny.example(rng, habits=True) for _ in range(6)]
    batch = pretrain_tiny.batch_tensors(processor, examples)
    for ids, labels, (_, _, completion) in zip(batch["input_ids"], batch["labels"], examples, strict=True):
        taught = labels[labels != -100]
        assert processor.tokenizer.decode(taught) == f"{completion}<|im_end|>"
        assert (ids[labels != -100] == taught).all()
    assert batch["mm_token_type_ids"].sum() == 6 * 9  # positions in the image come from these


def test_pretraining_makes_a_model_like_the_one_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The tokenizer, its one part that does not take hours, is the same; the weights have the same names and shapes."""
    monkeypatch.setattr(pretrain_tiny, "STAGES", {"see": (1, 1e-3, {"plain": True})})
    torch.set_num_threads(1)
    pretrain_tiny.pretrain(tmp_path)
    made, shipped = (load_processor(model).tokenizer for model in (str(tmp_path / "see"), "tiny"))
    assert made.get_vocab() == shipped.get_vocab()
    assert made.chat_template == shipped.chat_template
    text = "The red bar reaches 7. Step 2: 7 - 3 = 4."
    assert made(text)["input_ids"] == shipped(text)["input_ids"]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "see", TINY_MODEL))
    assert {n: (w.shape, w.dtype) for n, w in ours.items()} == {n: (w.shape, w.dtype) for n, w in theirs.items()}
