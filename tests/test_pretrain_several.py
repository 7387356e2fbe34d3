"""What the second tiny model learned from: pairs and clips, and habits of the same words about them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pretrain_several
import pretrain_tiny
from ireasoner.method.texts import parse_question, parse_trajectory
from ireasoner.model.backbone import load_processor
from ireasoner.playground import dataset, several
from ireasoner.training.config import SamplingOptions
from ireasoner.training.evaluation import evaluate
from ireasoner.training.labelled import load_questions
from models import load

ROOT = Path(__file__).parents[1]
KINDS: tuple[several.Kind, ...] = ("pairs", "clips")


def things(kind: several.Kind, count: int, seed: int = 0) -> list[several.Pair | several.Motion]:
    rng = np.random.default_rng(seed)
    drawn = [several.sample(kind, rng, None, pretrain_several.ITEMS) for _ in range(count)]
    return [thing for thing in drawn if isinstance(thing, several.Pair | several.Motion)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_question_has_a_rationale_and_every_fact_is_true(kind: several.Kind):
    for thing in things(kind, 60):
        assert {question.kind for question in several.questions(thing)} <= pretrain_several.RATIONALES.keys()
        facts = several.facts(thing)
        assert [several.step_truth(thing, fact) for fact in facts] == [True] * len(facts)


@pytest.mark.parametrize("kind", KINDS)
def test_habits_are_true_of_some_other_item(kind: several.Kind):
    rng = np.random.default_rng(1)
    right, wrong = 0, 0
    for thing in things(kind, 200):
        question = several.sample_question(thing, rng)
        found = pretrain_several.with_habit(question, thing, rng)
        assert (found.text, found.kind) == (question.text, question.kind)
        truth = [several.step_truth(thing, step) for step in found.steps]
        assert None not in truth
        right += all(truth)
        wrong += not all(truth)
    assert min(right, wrong) >= 60


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_misread_can_be_drawn_and_asked_the_same(kind: several.Kind):
    rng = np.random.default_rng(2)
    for thing in things(kind, 60):
        other = pretrain_several.misread_several(thing)
        assert other != thing
        assert several.from_record(several.record(other)) == other
        question = several.sample_question(thing, rng)
        if isinstance(thing, several.Motion):
            assert several.solve(other, question.text)
            assert pretrain_several.misread_several(other) == thing


def test_examples_are_well_formed_and_their_labels_lie_on_the_completions():
    rng, processor = np.random.default_rng(3), load_processor("tiny")
    examples = [pretrain_several.several_example(rng, describe=0.2, habits=True) for _ in range(48)]
    assert {len(images) for images, _, _ in examples} == {1, 2, several.FRAMES}
    for _, prompt, completion in examples:
        if prompt == pretrain_tiny.PROPOSER_PROMPT:
            assert parse_question(completion).well_formed
        elif prompt != pretrain_tiny.DESCRIBE_PROMPT:
            assert parse_trajectory(completion).well_formed
    batch = pretrain_tiny.batch_tensors(processor, examples)
    for ids, labels, (_, _, completion) in zip(batch["input_ids"], batch["labels"], examples, strict=True):
        taught = labels[labels != -100]
        assert processor.tokenizer.decode(taught) == f"{completion}<|im_end|>"
        assert (ids[labels != -100] == taught).all()


def test_the_second_model_sees_which_way_a_clip_goes(tmp_path: Path):
    """The same frames backwards go the other way. One answer in four would be right without looking."""
    policy = load(model=str(ROOT / "models/tiny_several"), max_image_tokens=64)
    file = dataset.write_questions(tmp_path, 24, "varied", "validation", kind="clips")
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    motions = [several.from_record(row["picture"]) for row in rows]

    def right() -> float:
        """The share of clips whose way the model tells."""
        for row, motion in zip(rows, motions, strict=True):
            assert isinstance(motion, several.Motion)
            row |= {"question": f"Which way does the {motion.name} go?", "answer": motion.way}
        dataset.write_rows(file, rows)
        options = SamplingOptions(solver_prompt="{question}", max_solution_tokens=96)
        found = evaluate(policy, load_questions(file), None, options)
        return float(found.measures["greedy"].mean())

    assert right() > 0.5
    for clip in (tmp_path / "images").iterdir():
        frames = sorted(clip.iterdir())
        images = [Image.open(path).copy() for path in reversed(frames)]
        for path, image in zip(frames, images, strict=True):
            image.save(path)
    motions = [pretrain_several.misread_several(motion) for motion in motions]  # a clip is misread backwards
    assert right() > 0.5
