"""A few labels: some items are asked labelled questions, the truth replaces the vote there, and checks it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ireasoner.method.recipe import Recipe
from ireasoner.method.scoring import Context, score_group
from ireasoner.playground import dataset
from ireasoner.training import loop
from ireasoner.training.checks import check_start, match_labels
from ireasoner.training.config import ConfigError, load_config, resolve
from ireasoner.training.images import ImageError
from ireasoner.training.items import ImagePool, labelled_items
from ireasoner.training.labelled import LabelledQuestion, judged, load_questions
from ireasoner.training.recorder import RunError, read_records
from ireasoner.training.state import Observer
from ireasoner.training.watch import Watch

OPTIONS: dict[str, Any] = {
    "model": "tiny", "recipe": "paper", "device": "cpu", "steps": 4, "images_per_step": 2, "group_size": 2,
    "proposer_every": 1, "save_every": 1, "learning_rate": 3e-3, "max_solution_tokens": 16, "max_question_tokens": 24,
    "probe_every": 0, "blank_every": 0, "watch": False, "label_share": 0.25,
}  # fmt: skip


def text(answer: str) -> str:
    return f"<think>The red bar reaches 3. The blue bar reaches {answer}.</think><answer>{answer}</answer>"


# --- rewards ----------------------------------------------------------------------------------------------------------

ANSWERS = ("7", "7", "7", "5", "5.1")


def score(recipe: Recipe) -> Any:
    label = LabelledQuestion(Path("a.png"), "How tall is the blue bar?", "5", match="relaxed")
    asked = Context(
        judge=lambda answer: judged(label, "exact", answer), step_weight=0.0, recent_steps=(),
        embed=lambda texts: np.ones((len(texts), 1)),
    )  # fmt: skip
    return score_group(label.question, [text(answer) for answer in ANSWERS], recipe, asked)


def test_the_truth_takes_the_place_of_the_vote_as_the_evaluation_judges_it():
    """The metric is the label's own: 5.1 is within 5 % of 5. The vote is recorded as it was."""
    found = score(Recipe())
    assert found.rewards == pytest.approx((0, 0, 0, 1, 1))
    assert [t.rightness for t in found.trajectories] == [0, 0, 0, 1, 1]
    assert (found.vote.answer, found.vote.fraction) == ("number:7", 3 / 5)
    assert [t.in_majority for t in found.trajectories] == [True, True, True, False, False]
    assert found.trajectories[3].parts["outcome"].factors["right"] == 1
    assert score(Recipe(reward="oracle")).rewards == (0, 0, 0, 1, 1)
    assert score(Recipe(reward="discrete")).rewards == (0, 0, 0, 1, 1)


def test_the_papers_steps_are_compared_among_those_that_are_right():
    """The two that are right have equal steps, |G|/N = 2/5, and the others are of no majority."""
    found = score(Recipe(position_decay=0.0)).trajectories
    steps = [t.parts["step_agreement"].value for t in found]
    assert steps == pytest.approx([0, 0, 0, (2 / 5) ** 0.7, (2 / 5) ** 0.7])


# --- which items ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 0.7, 1.0])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_their_share_is_kept_over_the_steps(share: float, count: int):
    asked = [labelled_items(step, count, share) for step in range(1, 61)]
    assert all(0 <= each <= count for each in asked)
    assert sum(asked) == int(60 * count * share + 1e-9)
    assert max(asked) - min(asked) <= 1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unlabeled pictures, and `labels.jsonl` about the first two of them."""
    folder = tmp_path_factory.mktemp("world")
    dataset.write_unlabeled(folder / "images", 5, "chalk")
    rows = [
        {"image": f"{path.relative_to(folder)}", "question": "How many objects are there?", "answer": "3"}
        for path in sorted((folder / "images").rglob("*.png"))[:2]
    ]
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def config_of(world: Path, **options: Any) -> Any:
    return resolve({**OPTIONS, "images": str(world / "images"), "labels": str(world / "labels.jsonl"), **options})


def test_a_run_asks_both_and_is_resumed_as_it_was(world: Path, tmp_path: Path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    loop.start(config_of(world), whole)

    def stop(step: int, *_: object) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.start(config_of(world), stopped, Observer(on_step=stop))
    loop.resume(load_config(stopped / "config.yaml"), stopped)
    episodes = list(read_records(whole / "episodes.jsonl"))
    assert episodes == list(read_records(stopped / "episodes.jsonl"))
    labelled = [e for e in episodes if e["true_answer"]]
    assert [e["step"] for e in labelled] == [2, 4]  # a quarter of two images a step
    assert all(e["proposal"] is None and e["question"]["text"] == "How many objects are there?" for e in labelled)
    assert all(t["rightness"] is not None for e in labelled for t in e["trajectories"])
    assert all(e["proposal"]["advantage"] is not None for e in episodes if not e["true_answer"])
    rows = list(read_records(whole / "metrics.jsonl"))
    assert ["labels/majority_right" in row for row in rows] == [False, True, False, True]
    assert ["watch/majority_right" in row for row in rows] == [False, True, False, True]


# --- what cannot be used ----------------------------------------------------------------------------------------------


def test_labels_that_cannot_be_used_are_left_out_and_told(world: Path, tmp_path: Path):
    first, second = sorted((world / "images").rglob("*.png"))[:2]
    elsewhere = tmp_path / "elsewhere.png"
    elsewhere.write_bytes(first.read_bytes())
    rows = [(first, "How many?", "3"), (first, "how  many?", "three"), (second, "How many?", "3"),
            (second, "How Many?", "4"), (second, "Where?", "left"), (elsewhere, "How many?", "3")]  # fmt: skip
    lines = [json.dumps({"image": str(image), "question": q, "answer": a}) for image, q, a in rows]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    config = config_of(world, labels=str(tmp_path / "labels.jsonl"))
    inputs = check_start(config, tmp_path / "run")
    found = {name: [(q.question, q.answer) for q in questions] for name, questions in inputs.labels.items()}
    assert found == {f"00/{first.name}": [("How many?", "3")], f"00/{second.name}": [("Where?", "left")]}
    assert inputs.notes == [
        "1 of 6 labelled questions are about images that are not trained on, and are left out.",
        f"'How many?' about 00/{second.name} is left out: its labels say '3' and '4'.",
    ]


def test_contradictions_alone_are_refused(world: Path, tmp_path: Path):
    image = str(next((world / "images").rglob("*.png")))
    lines = [json.dumps({"image": image, "question": "How many?", "answer": answer}) for answer in "34"]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    config = config_of(world, labels=str(tmp_path / "labels.jsonl"))
    with pytest.raises(RunError, match="has two answers that differ"):
        match_labels(config, load_questions(tmp_path / "labels.jsonl"), ImagePool.scan(config.images, 0))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"labels": None}, "need --labels"),
        ({"label_share": 0}, "--label-share"),
        ({"label_share": 1, "label_examples": 2}, "asks nothing"),
    ],
)
def test_options_that_do_not_fit_together(world: Path, options: dict[str, Any], problem: str):
    with pytest.raises(ConfigError, match=problem):
        config_of(world, **options)


# --- the watch --------------------------------------------------------------------------------------------------------


def test_the_watch_sees_a_wrong_consensus(world: Path):
    """Agreement stays as it is; what the majority says becomes wrong."""
    watch = Watch(config_of(world, watch=True, watch_window=10, steps=100))
    for step in range(1, 80):
        right = 0.8 if step < 30 else 0.1
        watch.observe(step, {"majority_fraction": 0.6 + 0.01 * (step % 3), "majority_right": right + 0.1 * (step % 2)})
    assert watch.alarm is not None
    assert "the group agrees on what the labels say is wrong" in watch.alarm.reason
    assert watch.alarm.healthy_step < 30


def test_labels_about_unreadable_images_alone_end_the_run_where_they_are_drawn(world: Path, tmp_path: Path):
    """And not the next time: a pool in which nothing can be read is no missing one."""
    shutil.copytree(world / "images", tmp_path / "images")
    broken = next((tmp_path / "images").rglob("*.png"))
    broken.write_bytes(b"no picture")
    line = json.dumps({"image": str(broken), "question": "How many?", "answer": "3"})
    (tmp_path / "labels.jsonl").write_text(line)
    config = config_of(tmp_path)
    with pytest.raises(ImageError, match="None of the 1 images"):
        loop.start(config, tmp_path / "run")
    with pytest.raises(ImageError, match="None of the 1 images"):
        loop.resume(config, tmp_path / "run")
