"""`ireasoner ablate`: the numbers by hand, the tables, what is refused, and one small ablation stopped and resumed."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import forked
from forked import Forked
from ireasoner.app.cli import build_app, main
from ireasoner.app.display import Display, print_table
from ireasoner.app.paths import absolute
from ireasoner.app.targets import evaluate_target
from ireasoner.method.recipe import PUBLISHED
from ireasoner.method.types import Episode, Proposal, Question, UsageError
from ireasoner.playground import dataset, world
from ireasoner.studies import ablate, ablation_jobs, forgetting
from ireasoner.studies.ablate import Settings, _check_run, arm_config, arm_names, eval_command, settle, train_command
from ireasoner.studies.ablation_jobs import ArmsProgress
from ireasoner.studies.ablation_numbers import distinct_questions, repeated_texts, run_numbers, summarize
from ireasoner.studies.ablation_tables import (
    COOLED,
    VARIETY,
    cost_rows,
    csv_text,
    difference_rows,
    draw_gains,
    forgetting_rows,
    legend,
    markdown,
    score_rows,
    tables,
)
from ireasoner.training.config import dump_config, names, resolve
from ireasoner.training.custom_reward import check_reward, sha256_of
from ireasoner.training.evaluation import ACCURACIES, EvaluationOptions
from ireasoner.training.labelled import load_questions
from ireasoner.training.recorder import read_episodes, writer_lock
from ireasoner.training.statistics import half_width
from ireasoner.training.targets import find_target

pytestmark = pytest.mark.usefixtures("copied_models")

# --- the numbers ------------------------------------------------------------------------------------------------------

MEASURES = ("greedy", "mean@1", "maj@5", "pass@5")
IMAGE = np.array([0, 1, 1, 2])


def columns(right: float, checkable: float = 2.0, true: float = 1.0) -> dict[str, np.ndarray]:
    """Two seeds, four questions about three images: of the first seed's `right` are right, of the second's all."""
    by_seed = np.array([(np.arange(4) < 4 * right).astype(float), np.ones(4)])
    shared = {"answer_entropy": 0 * by_seed, "well_formed": 0 * by_seed + 1, "tokens": 0 * by_seed + 20}
    shared["image"] = 0 * by_seed + IMAGE
    steps = {"checkable_steps": 0 * by_seed + checkable, "true_steps": 0 * by_seed + true}
    return {**dict.fromkeys(MEASURES, by_seed), **shared, **steps}


@pytest.fixture
def result() -> dict[str, Any]:
    """Three arms; outcome-only says so little that its step truth is void."""
    arms = {"base": columns(0.0), "paper": columns(0.5, 1.8, 1.35), "outcome-only": columns(0.25, 1.79, 1.79)}
    distinct = {"paper": (0.5, 0.7), "outcome-only": (1.0, 1.0)}
    found = summarize(arms, {arm: [{"distinct_questions": x} for x in of_arm] for arm, of_arm in distinct.items()})
    settings = Settings(seeds=2, questions=4).model_dump()
    blank = {"base": dict.fromkeys(MEASURES, 0.125)}
    return {"settings": settings, "questions": 4, "images": 3, "seeds": 2, **found, "blank": blank, "note": ""}


def test_the_summary_by_hand(result: dict[str, Any]):
    base, paper = result["arms"]["base"], result["arms"]["paper"]
    assert base["by_seed"]["greedy"] == [0.0, 1.0]
    assert paper["by_seed"]["greedy"] == [0.5, 1.0]
    assert paper["mean"]["greedy"] == 0.75
    # The deviation of 0.5 and 1 is 0.5 / √2; over √2 and times 12.706, the quantile for one degree of freedom. The
    # images differ as well, but by less than the seeds.
    assert paper["plus_minus"]["greedy"] == pytest.approx(12.706 * 0.25, rel=1e-4)
    assert base["plus_minus"]["tokens"] == 0
    assert paper["mean"]["step_truth"] == pytest.approx(0.75)
    assert paper["mean"]["tokens"] == 20
    assert paper["mean"]["distinct_questions"] == pytest.approx(0.6)
    assert "distinct_questions" not in base["mean"]
    assert base["minus"].keys() == {"paper", "outcome-only"}
    change = columns(0.5)["greedy"] - columns(0.0)["greedy"]
    mean, *bounds = paper["minus"]["base"]["greedy"]
    assert mean == 0.25
    half = half_width(change, IMAGE)
    assert bounds == pytest.approx([0.25 - half, 0.25 + half])
    assert paper["minus"]["base"]["step_truth"] == pytest.approx([0.25, 0.25, 0.25])  # nothing varies in it
    assert paper["minus"]["outcome-only"]["greedy"][0] == 0.125
    json.dumps(result, allow_nan=False)


def test_step_truth_weighs_steps_and_not_questions():
    uneven = columns(0.5)
    uneven["checkable_steps"] = np.array([[4.0, 0.0, 0.0, 1.0]] * 2)
    uneven["true_steps"] = np.array([[4.0, 0.0, 0.0, 0.0]] * 2)
    found = summarize({"base": uneven}, {})
    assert found["arms"]["base"]["mean"]["step_truth"] == pytest.approx(4 / 5)
    assert found["arms"]["base"]["mean"]["checkable_steps"] == 1.25


def test_accuracy_among_readable_samples_weighs_samples_and_not_questions():
    some = columns(0.0)
    some["well_formed"] = np.array([[1.0, 0.5, 0.0, 0.0]] * 2)
    some["mean@1"] = np.array([[0.5, 0.5, 0.0, 0.0]] * 2)
    found = summarize({"base": some}, {})["arms"]["base"]
    assert found["mean"]["mean@1_of_readable"] == pytest.approx(1.0 / 1.5)
    some["well_formed"][1] = some["mean@1"][1] = 0.0  # of a seed without any, there is no such accuracy
    assert "mean@1_of_readable" not in summarize({"base": some}, {})["measures"]


def test_where_checkable_steps_fall_step_truth_is_void(result: dict[str, Any]):
    arms = result["arms"]
    assert [arms[arm]["void"] for arm in ("base", "paper", "outcome-only")] == [False, False, True]  # 1.8 and 1.79 of 2
    assert "step_truth" not in arms["outcome-only"]["mean"]
    assert arms["outcome-only"]["minus"]["base"]["step_truth"] is None
    assert arms["paper"]["minus"]["outcome-only"]["step_truth"] is None
    assert score_rows(result)[3][5] == "void"
    assert difference_rows(result, "base")[2][5] == "void"
    assert difference_rows(result, "outcome-only")[1][5] == "void"


def test_without_pictures_there_is_no_step_truth():
    arms = {"base": columns(0.0), "paper": columns(0.5)}
    for found in arms.values():
        del found["checkable_steps"], found["true_steps"]
    result = summarize(arms, {})
    assert not {"step_truth", "checkable_steps", "true_steps"} & set(result["measures"])
    head, *rows = score_rows(result)
    assert head == ["", *MEASURES, "well-formed", "mean@1 of these", "tokens"]
    assert not any("void" in row for row in rows)


def test_nothing_checkable_at_all_is_void_and_no_nan():
    result = summarize({"base": columns(0.0, 0.0, 0.0), "paper": columns(0.5, 0.0, 0.0)}, {})
    assert result["arms"]["paper"]["void"]
    assert score_rows(result)[2][5] == "void"


def asked_at(step: int, text: str, problem: str | None, proposed: bool) -> str:
    """A recorded episode of which only the question matters."""
    proposal = Proposal(prompt="Ask.", text=text, finish_reason="stop", num_tokens=3, mean_sampler_logprob=-0.5)
    return Episode(
        step=step, image="a.png", question=Question(text, "", problem), proposal=proposal if proposed else None,
        proposer_reward=0.0, prompt="", trajectories=(), majority_answer=None, majority_fraction=0.0,
        answer_entropy=0.0, step_weight=0.0, true_answer=None,
    ).model_dump_json()  # fmt: skip


def test_distinct_questions_by_hand(tmp_path: Path):
    asked = [
        (15, "Old?", True),
        (16, "What now?", True),
        (17, "what  NOW?", True),
        (18, "Who?", True),
        (20, "??", False),
    ]
    records = [asked_at(step, text, None if readable else "no question", True) for step, text, readable in asked]
    records.append(asked_at(20, "A label?", None, False))
    (tmp_path / "episodes.jsonl").write_text("".join(record + "\n" for record in records))
    episodes = list(read_episodes(tmp_path))
    assert distinct_questions(episodes) == 2 / 4  # of those proposed after step 15: what now, who
    assert distinct_questions(episodes[-1:]) is None


def test_what_a_run_recorded_by_hand(tmp_path: Path):
    def episode(step: int, tokens: Sequence[int], trained: bool) -> str:
        record = json.loads(asked_at(step, f"What of {step}?", None, proposed=True))
        record["proposal"]["advantage"] = 0.5 if trained else None
        record["trajectories"] = [
            {"reasoning_steps": [], "answer": "1", "words_before_answer": 0, "problem": None, "answer_key": "number:1",
             "in_majority": True, "reward": 1.0, "parts": {}, "step_scores": [], "text": "", "finish_reason": "stop",
             "num_tokens": count, "mean_sampler_logprob": None, "advantage": 0.1 if trained else None}
            for count in tokens
        ]  # fmt: skip
        return json.dumps(record) + "\n"

    assert run_numbers(tmp_path) == {}
    (tmp_path / "episodes.jsonl").write_text(episode(1, [10, 20], trained=True) + episode(2, [30], trained=False))
    times, survived = (1.0, 9.0, 2.0, 3.0), (1.0, 1.0, 0.25, 0.75)  # what was before the last half does not count
    steps = [
        {"step": step, "time/step_seconds": seconds, "watch/blank_survival": share}
        for step, seconds, share in zip((1, 2, 3, 4), times, survived, strict=True)
    ]
    del steps[3]["watch/blank_survival"]  # it is not checked in every step
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert run_numbers(tmp_path) == {
        "distinct_questions": 1.0,
        "blank_survival": 0.25,
        "seconds": 2.5,
        "sampled_tokens": (10 + 20 + 30 + 2 * 3) / 4,
        "trained_tokens": (10 + 20 + 3) / 4,
    }


def test_texts_are_repeated_if_they_are_about_another_image():
    texts = ["A red bar.", "a  red BAR.", "Two rows.", "Two rows.", "A pie."]
    assert repeated_texts(texts, [0, 1, 2, 2, 3]) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert repeated_texts(["Yes."] * 3, [0, 1, 2]) == [1.0] * 3  # a model that is stuck


def test_variety_is_counted_in_answers():
    some = columns(0.5)
    some["answer_entropy"][:] = np.log([[1, 1, 2, 4], [2, 2, 2, 2]])
    found = summarize({"base": some}, {})["arms"]["base"]
    assert found["by_seed"]["effective_answers"] == pytest.approx([2.0, 2.0])


def forgetful(accuracy: float, said: float) -> dict[str, np.ndarray]:
    """The columns of an arm that was asked elsewhere too: three questions, and descriptions of two of the pictures."""
    return columns(0.5) | {
        "other_style": np.array([[accuracy] * 3, [accuracy + 0.1] * 3]),
        "other_style_image": np.array([[0.0, 1.0, 2.0]] * 2),
        "described": np.full((2, 2), said),
        "described_image": np.array([[0.0, 1.0]] * 2),
    }


def test_forgetting_is_what_was_lost_elsewhere():
    arms = {"base": forgetful(0.5, 1.0), "base, cooled": columns(0.0), "paper": forgetful(0.2, 0.25)}
    result = summarize(arms, {})
    minus = result["arms"]["paper"]["minus"]["base"]
    assert minus["other_style"] == pytest.approx([-0.3, -0.3, -0.3])  # paired: the seeds differ, and all alike
    assert minus["described"] == pytest.approx([-0.75] * 3)
    head, base, paper = forgetting_rows(result)  # what is cooled learned nothing
    assert head == ["", "other style", "minus base", "described", "minus base"]
    assert (base[0], base[2], base[4]) == ("base", "", "")
    assert paper[2:] == ["-30.0 [-30.0, -30.0]", "25.0 ±0.0", "-75.0 [-75.0, -75.0]"]


def test_costs_are_relative_to_paper_seed_by_seed():
    runs = {
        "default": [{"seconds": 2.0, "sampled_tokens": 80.0, "trained_tokens": 0.0}] * 2,
        "paper": [{"seconds": s, "sampled_tokens": t, "trained_tokens": 0.0} for s, t in ((1.0, 40.0), (2.0, 20.0))],
    }
    result = summarize({"base": columns(0.0), "default": columns(0.5), "paper": columns(0.5)}, runs)
    assert result["cost_reference"] == "paper"
    ratio, half = result["arms"]["default"]["relative"]["seconds"]
    # The ratios are 2 and 1; their deviation over √2 is 1/2, and 12.706 is Student's quantile.
    assert (ratio, half) == pytest.approx((1.5, 12.706 / 2), rel=1e-4)
    head, default, paper = cost_rows(result)
    assert head[:3] == ["", "seconds", "x paper"]
    assert default == ["default", "2.00 ±0.00", "1.50 ±6.35", "80 ±0", "3.00 ±12.71", "0 ±0", ""]
    assert paper[2] == "1.00 ±0.00"


# --- how they are shown -----------------------------------------------------------------------------------------------


def test_the_tables_by_hand(result: dict[str, Any]):
    head, base, paper, outcome = score_rows(result)
    readable = ["well-formed", "mean@1 of these"]
    assert head == ["", *MEASURES, "step truth", "checked steps", *readable, "tokens"]
    assert base[:2] == ["base", "50.0 ±635.3"]
    assert paper[5:] == ["75.0 ±0.0", "1.80 ±0.00", "100.0 ±0.0", "75.0 ±317.7", "20.0 ±0.0"]
    assert outcome[6] == "1.79 ±0.00"
    rows = difference_rows(result, "base")
    assert [row[0] for row in rows] == ["", "paper", "outcome-only"]
    assert re.fullmatch(r"\+25\.0 \[-\d+\.\d, \+\d+\.\d\]", rows[1][1])  # of two seeds, one of them alone was better
    assert rows[1][5] == "+25.0 [+25.0, +25.0]"
    assert [row[0] for row in difference_rows(result, "outcome-only")] == ["", "paper"]


def test_the_cooled_base_is_held_against_default_and_no_other_recipe():
    arms = dict.fromkeys(("base", COOLED, "default", "paper"), columns(0.5))
    result = summarize(arms, {})
    held = {other: [row[0] for row in difference_rows(result, other)[1:]] for other in result["references"]}
    assert held == {"base": [COOLED, "default", "paper"], "default": [COOLED, "paper"], "paper": ["default"]}


def test_of_one_seed_the_interval_is_over_images():
    arms = {name: {m: values[:1] for m, values in columns(0.5).items()} for name in ("base", "paper")}
    half = half_width(np.array([[1.0, 1.0, 0.0, 0.0]]), IMAGE)
    found = summarize(arms, {"paper": [{"distinct_questions": 0.5}]})
    assert score_rows(found)[1][1] == f"50.0 ±{100 * half:.1f}"
    assert score_rows(found, VARIETY)[2][1] == "50.0"  # distinct questions are counted once for each seed


def test_step_truth_has_the_interval_of_a_ratio():
    rng = np.random.default_rng(0)
    said = rng.integers(0, 5, size=300).astype(float)
    true = rng.binomial(said.astype(int), rng.random(300)).astype(float)
    of_arm = {"image": np.arange(300.0), "greedy": said > 2, "checkable_steps": said, "true_steps": true}
    found = summarize({"base": {name: values[None].astype(float) for name, values in of_arm.items()}}, {})
    drawn = rng.integers(300, size=(4000, 300))
    spread = (true[drawn].sum(1) / said[drawn].sum(1)).std()
    assert found["arms"]["base"]["mean"]["step_truth"] == pytest.approx(true.sum() / said.sum())
    assert found["arms"]["base"]["plus_minus"]["step_truth"] == pytest.approx(1.968 * spread, rel=0.05)


def test_the_csv_has_a_line_for_each_arm_and_measure(result: dict[str, Any]):
    rows = list(csv.DictReader(io.StringIO(csv_text(result))))
    assert len(rows) == 3 * len(result["measures"])
    by_name = {(row["arm"], row["measure"]): row for row in rows}
    paper = by_name["paper", "greedy"]
    assert [float(paper[name]) for name in ("mean", "seed_0", "seed_1", "minus_base")] == [0.75, 0.5, 1.0, 0.25]
    assert float(paper["minus_base_low"]) <= 0.25 <= float(paper["minus_base_high"])
    assert by_name["base", "greedy"]["minus_base"] == ""
    void = by_name["outcome-only", "step_truth"]
    assert {value for name, value in void.items() if name not in ("arm", "measure")} == {""}
    assert float(by_name["outcome-only", "checkable_steps"]["mean"]) == 1.79


def test_the_markdown_holds_every_table_and_says_what_it_shows(result: dict[str, Any]):
    text = markdown(result, "The prior.")
    for title, rows in tables(result):
        assert f"## {title}\n" in text
        for row in rows:
            assert f"| {' | '.join(row)} |" in text
    assert legend(result) in text
    assert "style chalk" in text
    assert text.endswith("The prior.\n")


def test_the_figure_is_drawn(result: dict[str, Any], tmp_path: Path):
    draw_gains(result, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert image.width > 2 * image.height


def test_a_table_on_a_narrow_terminal_loses_no_digit(
    result: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)
    rows = [["", "step truth"] + ["mean@1"] * 4, ["random-reward", *["-10.0 [-15.0, -8.0]"] * 5]]
    print_table("Some [red] title", rows)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 80
    assert "Some [red] title" in lines[0]
    assert "…" not in "".join(lines)
    assert sum(line.count("[-15.0,-8.0]") for line in lines) == 5


def test_the_time_left_is_told_where_output_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    progress, now = ArmsProgress(tmp_path, ["[arm]-0", "arm-1", "arm-2"], 10), [0.0]
    monkeypatch.setattr(progress, "get_time", lambda: now[0])
    progress.told = 0.0
    (tmp_path / "arm-1").mkdir()
    (tmp_path / "arm-2.json").touch()  # scored already
    for seconds, steps in ((0, 1), (29, 2), (60, 3)):
        now[0] = float(seconds)
        (tmp_path / "arm-1" / "metrics.jsonl").write_text("{}\n" * steps)
        progress.tell(["[arm]-0", "arm-1", "arm-2", "base-0"])
    # Two steps in the last 60 seconds, and 17 are left; what was there at first is no sign of speed.
    doing = "[arm]-0: step 0/10; arm-1: step 3/10; arm-2: scoring; base-0: scoring"
    assert capsys.readouterr().out == f"{doing}, 0:08:30 left\n"


# --- what it is asked for ---------------------------------------------------------------------------------------------


def stored(out: Path, **given: Any) -> Settings:
    settings = settle(out, given)
    out.mkdir(exist_ok=True)
    (out / "settings.json").write_text(settings.model_dump_json())
    return settings


def test_what_out_holds_stands_unless_it_may_grow(tmp_path: Path):
    out = tmp_path / "out"
    first = stored(out, seeds=2, style="varied", training={"steps": "24"})
    assert first.recipes == ("paper", "outcome-only", "answers-only", "random-reward", "default")
    assert settle(out, {}) == first
    grown = settle(out, {"seeds": 4, "recipes": ["paper", "oracle"], "cooled": True, "training": {"steps": "24.0"}})
    assert (grown.seeds, grown.recipes, grown.cooled, grown.style) == (4, ("paper", "oracle"), True, "varied")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"style": "plain"}, "style is varied, not plain"),
        ({"questions": 7}, "questions is 512, not 7"),
        ({"split": "validation"}, "split is test"),
        ({"training": {"steps": "25"}}, "steps is 24, not 25"),
        ({"training": {"preset": "7b", "steps": "24"}}, "preset is tiny, not 7b"),
    ],
)
def test_options_that_contradict_what_out_holds(tmp_path: Path, given: dict[str, Any], named: str):
    stored(tmp_path / "out", style="varied", training={"steps": "24"})
    with pytest.raises(UsageError, match=re.escape(named)):
        settle(tmp_path / "out", given)


def test_labels_reach_the_oracle_and_no_other(tmp_path: Path):
    settings = Settings()
    assert arm_config(tmp_path, settings, "oracle", 1).labels == tmp_path / "data" / "labels.jsonl"
    for recipe in set(names("recipes")) - {"oracle"}:
        config = arm_config(tmp_path, settings, recipe, 1)
        assert config.labels is None
        assert config.seed == 1
        assert config.eval_data is None


def test_arms_have_names_of_their_own():
    assert arm_names(["paper", "/somewhere/mine.yaml"]) == {"paper": "paper", "mine": "/somewhere/mine.yaml"}
    for recipes in (["paper", "paper"], ["/a/mine.yaml", "/b/mine.yaml"], ["/a/base.yaml"], ["step.yaml"]):
        with pytest.raises(UsageError, match="name of its own"):
            arm_names(recipes)


def test_the_labels_of_the_world_are_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ablate, "UNLABELED", 6)
    ablate.draw_world(tmp_path, Settings(questions=5))
    truth = dataset.load_truth(tmp_path / "data" / "unlabeled")
    labels = load_questions(tmp_path / "data" / "labels.jsonl")
    assert len(labels) == 6 * 4
    for label in labels:
        picture = truth[label.image.relative_to(tmp_path / "data" / "unlabeled").as_posix()]
        solved = world.solve(picture, label.question)
        assert solved is not None
        assert solved.answer == label.answer
    assert len(load_questions(tmp_path / "data" / "test" / "test.jsonl")) == 5
    assert not list((tmp_path / "data" / "unlabeled").rglob("*.jsonl"))  # nothing is told among the images


def test_what_is_asked_elsewhere_is_in_another_style_and_described_by_its_facts(tmp_path: Path):
    assert [forgetting.other_style(style) for style in ("chalk", "plain", "varied")] == ["varied", "varied", "chalk"]
    asked = load_questions(forgetting.write_elsewhere(tmp_path, 4, "chalk", "test"))
    assert [question.question == "Describe." for question in asked] == [False] * 4 + [True] * 2
    assert [asked[4].image, asked[5].image] == [asked[0].image, asked[3].image]
    held_out = load_questions(dataset.write_questions(tmp_path / "held_out", 4))
    assert all(question.picture not in [q.picture for q in held_out] for question in asked)
    facts = [world.facts(world.picture_from_record(q.picture or {})) for q in asked[4:]]
    texts = [["", "", "", "", asked[4].answer, f"{facts[1][0]} It is late."]]
    found = forgetting.forgetting_columns(np.arange(6.0)[None], texts, asked)
    assert found["other_style"].tolist() == [[0.0, 1.0, 2.0, 3.0]]
    assert found["described"].tolist() == [[1.0, 1 / len(facts[1])]]
    assert found["described_image"].tolist() == [[0.0, 1.0]]  # numbered anew: no image is counted that is not described


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's own images, and questions about one of them."""
    (tmp_path / "pool").mkdir()
    for name, colour in (("a", "red"), ("c", "green")):
        Image.new("RGB", (84, 84), colour).save(tmp_path / "pool" / f"{name}.png")
    row = json.dumps({"image": "pool/a.png", "question": "Which color?", "answer": "red"})
    (tmp_path / "own.jsonl").write_text(f"{row}\n{row}\n")
    (tmp_path / "elsewhere.jsonl").write_text(row.replace("pool/a.png", str(_picture(tmp_path / "b.png"))))
    (tmp_path / "mine.yaml").write_text("reward: discrete\n")
    return tmp_path


def _picture(path: Path) -> Path:
    Image.new("RGB", (84, 84)).save(path)
    return path


def mistake(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    code = main(["ablate", *map(str, argv)])
    printed = capsys.readouterr()
    assert code == 2, printed
    assert printed.err.startswith("ireasoner: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_a_reward_of_ones_own_is_run_only_if_its_recipe_is_named_again(own: Path):
    out, recipe, reward = own / "out", own / "mine.yaml", f"{own / 'my.py'}:pay"
    recipe.write_text(f"reward: {reward}\n")
    settings = stored(out, recipes=[str(recipe)])
    with pytest.raises(UsageError, match="run only if you say so: name the recipes again with --recipes"):
        settle(out, {})
    assert settle(out, {"recipes": [str(recipe)]}) == settings
    run = out / "mine-0"
    assert "--reward" not in " ".join(train_command(out, settings, str(recipe), run, 0))
    run.mkdir()
    (run / "config.yaml").touch()
    assert train_command(out, settings, str(recipe), run, 0) == ["train", f"--resume={run}", f"--reward={reward}"]


def test_training_is_told_every_option(tmp_path: Path):
    training = {"steps": "3", "lora_targets": ["q_proj", "v_proj"], "solver_prompt": "-{question}"}
    settings = Settings(training=training, recipes=("oracle",))
    command = train_command(tmp_path, settings, "oracle", tmp_path / "oracle-2", 2)
    given = build_app().parse_args(command)[1].arguments
    assert given.pop("out") == tmp_path / "oracle-2"
    config = resolve(given)
    assert config == arm_config(tmp_path, settings, "oracle", 2)


def test_mistakes_are_named_and_leave_nothing(capsys: pytest.CaptureFixture[str], own: Path):
    out, mine = own / "out", ("--images", own / "pool", "--data", own / "own.jsonl")
    assert "papre" in mistake(capsys, out, "--recipes", "papre")
    assert "steps" in mistake(capsys, out, "--steps", "many")
    assert "--seeds: input should be greater than or equal to 1, not 0 " in mistake(capsys, out, "--seeds", "0")
    assert '"oil" for --style' in mistake(capsys, out, "--style", "oil")
    assert "both --images and --data" in mistake(capsys, out, "--images", own / "pool")
    assert "both --images and --data" in mistake(capsys, out, "--data", own / "own.jsonl")
    assert "no.jsonl" in mistake(capsys, out, "--images", own / "pool", "--data", own / "no.jsonl")
    assert "none" in mistake(capsys, out, "--images", own / "none", "--data", own / "own.jsonl")
    assert "--cooled" in mistake(capsys, out, *mine, "--cooled")
    assert "--style" in mistake(capsys, out, *mine, "--style", "chalk")
    assert "needs --labels" in mistake(capsys, out, *mine, "--recipes", "oracle")
    text = mistake(capsys, out, *mine, "--recipes", "oracle", "--labels", own / "elsewhere.jsonl")
    assert "no question in" in text
    assert "no/such" in mistake(capsys, out, *mine, "--model", own / "no/such")
    assert "inside the image folder" in mistake(capsys, own / "pool" / "out", *mine)
    assert not out.exists()
    assert "holds no ablation" in mistake(capsys, own)
    assert "own.jsonl" in mistake(capsys, own / "own.jsonl")
    assert "own.jsonl" in mistake(capsys, own / "own.jsonl" / "out")
    (own / "odd").mkdir()
    (own / "odd" / "settings.json").write_text('{"flavour": "sweet"}')
    assert "no settings of an ablation" in mistake(capsys, own / "odd")


# --- from end to end --------------------------------------------------------------------------------------------------

SMALL = [
    "--questions", "4", "--steps", "3", "--images-per-step", "2", "--group-size", "3", "--max-solution-tokens", "40",
    "--learning-rate", "3e-3", "--probe-every", "0", "--save-every", "1", "--device", "cpu",
]  # fmt: skip


class Ended:
    """What is left of a process that has ended."""

    def __init__(self, code: int) -> None:
        self.returncode = code

    def poll(self) -> int:
        return self.returncode


@contextmanager
def in_this_process() -> Iterator[None]:
    """Commands are carried out in this process, which saves them the time to start. Ctrl-C is for both of them."""

    def carry_out(command: Sequence[str], log: Path, threads: int) -> Ended:
        with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
            code = main(command)
        if code == 130:
            raise KeyboardInterrupt
        return Ended(code)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation_jobs, "_start", carry_out)
        patch.setattr(ablation_jobs, "POLL_SECONDS", 0)
        yield


class ForkedJob:
    """A command in a process of its own that need not import anything, with what an ablation asks of a process."""

    def __init__(self, command: Sequence[str], log: Path, threads: int) -> None:
        self.forked = forked.start(*command, output=log.with_suffix(".printed"))

    def poll(self) -> int | None:
        return self.forked.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()


@pytest.fixture
def at_once() -> Iterator[None]:
    with in_this_process():
        yield


def files(out: Path) -> dict[str, tuple[int, bytes]]:
    """The scores and records that must not be made twice, with when they were written."""
    kept = [*out.glob("*-?.json"), *out.glob("*/metrics.jsonl"), *out.glob("*/summary.json")]
    return {str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes()) for path in kept}


@pytest.mark.usefixtures("at_once")
def test_an_ablation_stopped_moved_resumed_and_extended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ablate, "UNLABELED", 12)
    monkeypatch.setattr(ablate, "VALIDATION", 3)
    monkeypatch.setattr(ablate, "BISECTIONS", 3)
    out, on_step = tmp_path / "first" / "out", Display.on_step

    def interrupt(display: Display, step: int, *rest: Any) -> None:
        on_step(display, step, *rest)
        if (display.out.name, step) == ("outcome-only-0", 2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Display, "on_step", interrupt)
    assert main(["ablate", str(out), "--recipes", "paper", "outcome-only", "--seeds", "1", *SMALL]) == 130
    assert f"Continue with: ireasoner ablate {out}" in capsys.readouterr().out
    monkeypatch.setattr(Display, "on_step", on_step)
    done = files(out)
    assert {"base-0.json", "paper-0.json", "paper-0/summary.json", "outcome-only-0/metrics.jsonl"} <= done.keys()
    assert "outcome-only-0/summary.json" not in done
    assert not (out / "ablation.json").exists()

    (tmp_path / "first").rename(tmp_path / "moved")  # what was begun there goes on here
    out = tmp_path / "moved" / "out"
    assert main(["ablate", str(out)]) == 0
    printed = capsys.readouterr().out
    finished = files(out)
    assert all(finished[name] == done[name] for name in done if not name.startswith("outcome-only"))
    assert len(finished["outcome-only-0/metrics.jsonl"][1].splitlines()) == 3
    assert finished["outcome-only-0/metrics.jsonl"][1].startswith(done["outcome-only-0/metrics.jsonl"][1])
    for name in ("Scores", "Minus base", "Minus outcome-only", "Without looking", "Answer prior", "step truth"):
        assert name in printed
    for name in ("Variety and collapse", "Forgetting", "Cost of a training step", "x paper"):
        assert name in printed
    result = json.loads((out / "ablation.json").read_text())
    assert list(result["arms"]) == ["base", "paper", "outcome-only"]
    assert result["blank"].keys() == {"base"}
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "paper-0" / "report.html").exists()
    assert "| paper |" in (out / "ablation.md").read_text()

    monkeypatch.setattr("ireasoner.page.write_report", lambda *_, **__: None)  # of the further runs
    more = ["--recipes", "paper", "oracle", "--seeds", "2", "--cooled"]
    assert main(["ablate", str(out), *more, "--steps", "3"]) == 0
    extended = files(out)
    assert all(extended[name] == finished[name] for name in finished)
    result = json.loads((out / "ablation.json").read_text())
    assert list(result["arms"]) == ["base", "base, cooled", "paper", "oracle"]
    assert result["arms"]["paper"]["by_seed"]["tokens"][0] != result["arms"]["paper"]["by_seed"]["tokens"][1]
    assert "distinct_questions" not in result["arms"]["oracle"]["mean"]  # nobody asked: labels were played
    assert 0 < result["arms"]["paper"]["mean"]["distinct_questions"] <= 1
    assert "temperature" in legend(result)
    assert "early" not in legend(result)
    # What an earlier version began lacks some scores, and only these are made.
    earlier = json.loads((out / "paper-0.json").read_text())
    del earlier["per_question"]["distinct_solutions"]
    (out / "paper-0.json").write_text(json.dumps(earlier))
    shutil.rmtree(out / "data" / "elsewhere")
    for seed in (0, 1):
        (out / f"paper-{seed}-elsewhere.json").unlink()
    capsys.readouterr()
    summary = out / "oracle-1" / "summary.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "stopped_early": True}))
    assert main(["ablate", str(out)]) == 0
    assert "ended themselves early: oracle-1." in (out / "ablation.md").read_text()
    made = set(re.findall(r"^(\S+): (training|scoring)$", capsys.readouterr().out, re.MULTILINE))
    assert made == {(name, "scoring") for name in ("paper-0", "paper-0-elsewhere", "paper-1-elsewhere")}
    completed = files(out)
    changed = {name for name in completed if completed[name] != extended[name]}
    assert changed == {"paper-0.json", "oracle-1/summary.json"}
    again, before = (json.loads(kept["paper-0.json"][1])["per_question"] for kept in (completed, extended))
    assert again == before
    result = json.loads((out / "ablation.json").read_text())
    assert {"other_style", "blank_survival", "trained_tokens"} <= set(result["arms"]["paper"]["mean"])
    # The base is the backbone alone, and an arm its trained solver, each under the arm's seed.
    questions = load_questions(out / "data" / "test" / "test.jsonl")
    for target, name in (("tiny", "base-1"), (str(out / "paper-1"), "paper-1")):
        kept, again = (
            scores_of(out, name),
            evaluate_target(
                find_target(target, str(out / "preset.yaml")), questions, options=EvaluationOptions(seed=1)
            ),
        )
        assert kept["greedy_texts"] == list(again.greedy_texts)
        assert kept["mean@1"] == again.measures["mean@1"].tolist()
        assert kept["answer_entropy"] == again.answer_entropy.tolist()
    assert scores_of(out, "base-1")["greedy_texts"] != scores_of(out, "paper-1")["greedy_texts"]
    # The values of every question are kept beside the results, for whoever wants to compute these again.
    with np.load(out / "ablation.npz") as kept:
        arms: dict[str, dict[str, np.ndarray]] = {}
        for name in kept:
            arm, _, measure = name.rpartition("/")
            arms.setdefault(arm, {})[measure] = kept[name]
    again = summarize(arms, {})
    assert all(again["arms"][arm]["minus"] == result["arms"][arm]["minus"] for arm in result["arms"])
    assert result["images"] == len(questions)
    heat = json.loads((out / "cooled.json").read_text())["temperature"]
    again = evaluate_target(
        find_target("tiny", str(out / "preset.yaml")),
        questions,
        options=EvaluationOptions(seed=1, temperature=heat),
    )
    assert scores_of(out, f"base-1-at-{heat:.3f}")["mean@1"] == again.measures["mean@1"].tolist()
    # A run's last checkpoint is what it ended with; a damaged one is refused.
    checkpoints = out / "paper-1" / "checkpoints"
    seed = EvaluationOptions(seed=1)
    first = evaluate_target(find_target(str(checkpoints / "step-000001")), questions, options=seed)
    last = evaluate_target(find_target(str(out / "paper-1")), questions, options=seed)
    assert first.answer_entropy.tolist() != last.answer_entropy.tolist()
    (checkpoints / "step-000001" / "solver" / "adapter_config.json").write_text("{}")
    for name in ("step-000001", "step-000009"):
        with pytest.raises(UsageError, match=rf"{name} cannot be used.*there are step-000000, step-000001"):
            find_target(str(checkpoints / name))

    assert "steps is 3, not 4" in mistake(capsys, out, "--steps", "4")
    others = json.loads((out / "base-0.json").read_text())
    others["per_question"]["image"][0] += 1
    (out / "base-0.json").write_text(json.dumps(others))
    assert "base-0.json holds scores on other questions" in mistake(capsys, out)
    (out / "base-0.json").write_text("{")
    assert "base-0.json cannot be read" in mistake(capsys, out)


def test_every_arm_is_judged_by_the_same_metric(tmp_path: Path):
    settings = Settings(match="anls")
    for arm in ("base", "paper"):
        assert "--match=anls" in eval_command(tmp_path, settings, arm, 0)
    assert "or else anls" in legend({"settings": settings.model_dump(), "seeds": 1, "questions": 4, "images": 3,
                                     "measures": [], "cost_reference": None, "note": ""})  # fmt: skip


def test_scores_of_an_earlier_version_are_made_again_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    values = {name: [0.0, 1.0] for name in (*ACCURACIES, "image", "distinct_solutions")} | {"greedy_texts": ["", ""]}
    commands: list[list[str]] = []

    def score(command: list[str], *_: Any) -> Ended:
        commands.append(command)
        if command[0] == "eval":
            Path(command[-1].removeprefix("--json=")).write_text(json.dumps({"per_question": values}))
        return Ended(0)

    monkeypatch.setattr(ablation_jobs, "_start", score)
    monkeypatch.setattr(ablation_jobs, "POLL_SECONDS", 0)
    jobs = {f"paper-{seed}": [["train", str(seed)], ["eval", str(seed)]] for seed in range(4)}
    for seed, missing in enumerate(("greedy", "strict_greedy", "distinct_solutions")):
        kept = {name: of_name for name, of_name in values.items() if name != missing or not seed}
        (tmp_path / f"paper-{seed}.json").write_text(json.dumps({"per_question": kept}))
    with ArmsProgress(tmp_path, [*jobs], 3) as progress:
        scores = ablation_jobs.make_scores(tmp_path, jobs, 1, progress)
    assert [command[:2] for command in commands] == [
        ["train", "3"], ["eval", "3"], ["eval", "1"], ["eval", "2"],
    ]  # fmt: skip
    assert all(of_run["strict_greedy"].tolist() == [0.0, 1.0] for of_run in scores.values())


def scores_of(out: Path, name: str) -> dict[str, list[Any]]:
    return json.loads((out / f"{name}.json").read_text())["per_question"]


@pytest.mark.usefixtures("at_once", "no_report")
def test_an_ablation_of_ones_own(own: Path, capsys: pytest.CaptureFixture[str]):
    mine = ["--images", str(own / "pool"), "--data", str(own / "own.jsonl"), "--recipes", str(own / "mine.yaml")]
    out, scale = own / "out", [*SMALL[4:], "--steps", "1", "--max-solution-tokens", "9"]
    assert main(["ablate", str(out), *mine, "--seeds", "1", "--model", "tiny", *scale]) == 0
    printed = capsys.readouterr().out
    assert "step truth" not in printed
    result = json.loads((out / "ablation.json").read_text())
    assert list(result["arms"]) == ["base", "mine"]
    assert (result["questions"], result["images"]) == (2, 1)
    assert "2 questions about 1 images of" in printed
    assert max(scores_of(out, "base-0")["tokens"]) == 9  # the base is scored at the scale of the arms
    assert not (out / "data").exists()
    # What is asked about is not trained on.
    assert {e.image for e in read_episodes(out / "mine-0")} == {"c.png"}
    (own / "mine.yaml").write_text("reward: format\n")
    assert "reward is discrete, not format" in mistake(capsys, out)
    (own / "own.jsonl").write_text((own / "own.jsonl").read_text().replace("red", "blue"))
    assert "own.jsonl has changed" in mistake(capsys, out)


@pytest.mark.usefixtures("at_once")
def test_a_command_that_fails_is_quoted(own: Path, capsys: pytest.CaptureFixture[str]):
    out = own / "out"
    text = mistake(capsys, out, *own_arms(own, 1), "--lora-targets", "attention")
    assert "base-0 failed: LoRA target 'attention' matches no linear layer" in text
    assert f"(its output is in {out / 'base-0.log'})" in text


def test_eval_writes_its_scores_question_by_question(own: Path, capsys: pytest.CaptureFixture[str]):
    target = own / "scores.json"
    argv = ["--data", str(own / "own.jsonl"), "--device", "cpu", "--json", str(target)]
    assert main(["eval", "tiny", *argv]) == 0
    found = json.loads(target.read_text())
    columns = found["per_question"]
    others = {"answer_entropy", "greedy_well_formed", "well_formed", "tokens", "greedy_texts", "image"}
    assert columns.keys() == {*ACCURACIES, *others, "distinct_solutions"}
    assert all(len(values) == 2 for values in columns.values())
    assert np.mean(columns["mean@1"]) == found["scores"]["mean@1"]["mean"]
    assert main(["eval", "tiny", "tiny", *argv]) == 0
    assert json.loads(target.read_text())["per_question"] == {"before": columns, "after": columns}


# --- several arms at a time, in processes of their own ----------------------------------------------------------------


def own_arms(own: Path, steps: int) -> list[str]:
    mine = ["--images", str(own / "pool"), "--data", str(own / "own.jsonl"), "--recipes", "discrete", "paper"]
    scale = [*SMALL[4:], "--steps", str(steps), "--max-solution-tokens", "48"]
    return [*mine, "--seeds", "1", "--model", "tiny", *scale]


@pytest.mark.usefixtures("no_report")
@pytest.mark.slow
def test_two_jobs_make_what_one_makes(own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    torch.set_num_threads(1)  # each of two processes gets half of the threads, and rounding may depend on how many
    outs, printed = (own / "one", own / "two"), []
    with in_this_process():
        assert main(["ablate", str(outs[0]), *own_arms(own, 2)]) == 0
    printed.append(capsys.readouterr().out)
    outs[1].mkdir()
    for name in ("settings.json", "base-0.json", "base-0-blank.json"):  # the base is the same to both
        shutil.copy(outs[0] / name, outs[1])
    monkeypatch.setattr(ablation_jobs, "_start", ForkedJob)
    assert main(["ablate", str(outs[1]), *own_arms(own, 2), "--jobs", "2"]) == 0
    printed.append(capsys.readouterr().out)
    found = []
    for out, text in zip(outs, printed, strict=True):
        assert "paper-0: greedy" in text  # what a process found reaches the terminal
        scores = [(out / f"{name}.json").read_text() for name in ("discrete-0", "paper-0")]
        results = text[text.index("Scores") :]  # without the table that tells seconds
        results = re.sub("Cost of a training step.*?(?=Without looking)", "", results, flags=re.DOTALL)
        found.append([part.replace(str(out), "OUT") for part in (results, *scores)])
    assert found[0] == found[1]
    with in_this_process():
        assert main(["ablate", str(outs[1]), "--recipes", str(own / "mine.yaml"), "--jobs", "2"]) == 0
    (own / "mine.yaml").write_text("reward: format\n")
    assert "reward is discrete, not format" in mistake(capsys, outs[1], "--jobs", "2")


def given_by(out: Path, *options: str) -> dict[str, Any]:
    """The settings that a command line gives."""
    given = build_app().parse_args(["ablate", str(out), *options])[1].arguments
    chosen = {name: value for name, value in given.items() if name in Settings.model_fields}
    return {**absolute(chosen), "training": {name: given[name] for name in given.keys() - chosen.keys() - {"out"}}}


@contextmanager
def at_work(out: Path, *options: str) -> Iterator[Forked]:
    """An ablation with two arms, once both are training; the base is scored already, to save time."""
    stored(out, **given_by(out, *options))
    (out / "base-0.json").touch()
    with forked.start("ablate", out, "--jobs", "2", output=out / "printed") as ablation:
        ablation.wait_until(lambda: all((out / arm / "metrics.jsonl").exists() for arm in ("paper-0", "discrete-0")))
        children = psutil.Process(ablation.process.pid).children()
        assert len(children) == 2
        yield ablation
        assert not any(map(psutil.Process.is_running, children))


@pytest.mark.slow
def test_jobs_that_are_interrupted_save_and_go_on(own: Path, capsys: pytest.CaptureFixture[str]):
    out = own / "out"
    with at_work(out, *own_arms(own, 60), "--save-every", "50") as ablation:
        ablation.send(signal.SIGTERM)
        done = ablation.wait(90)
    assert (done.returncode, done.stderr) == (130, "")
    assert f"Continue with: ireasoner ablate {out} --jobs 2" in done.stdout
    for arm in ("discrete-0", "paper-0"):
        steps = len((out / arm / "metrics.jsonl").read_text().splitlines())
        assert 0 < steps < 60
        assert (out / arm / "checkpoints" / f"step-{steps:06d}").exists()
    shutil.rmtree(out / "discrete-0")
    (out / "discrete-0").mkdir()
    (out / "discrete-0" / "config.yaml").write_text("steps: many\n")
    assert "config.yaml" in mistake(capsys, out, "--jobs", "2")


@pytest.mark.usefixtures("at_once")
def test_an_arm_that_another_process_trains_is_left_to_it(own: Path, capsys: pytest.CaptureFixture[str]):
    out = own / "out"
    stored(out, **given_by(out, *own_arms(own, 1)))
    with writer_lock(out / "discrete-0"):  # as where an ablation was killed and its processes go on
        assert f"another process is training in {out / 'discrete-0'}" in mistake(capsys, out)


def sleepers(monkeypatch: pytest.MonkeyPatch, then: Callable[[int], None]) -> list[subprocess.Popen[bytes]]:
    """Processes that sleep, instead of commands; when there are two, `then` is called with the id of the first."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*_: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]))
        if len(started) == 2:
            threading.Timer(0.3, then, [started[0].pid]).start()
        return started[-1]

    monkeypatch.setattr(ablation_jobs, "_start", start)
    return started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_ablation_stops_every_job(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
):
    started = sleepers(monkeypatch, lambda _: os.kill(os.getpid(), number))
    assert main(["ablate", str(own / "out"), *own_arms(own, 1), "--jobs", "2"]) == 130
    assert f"Continue with: ireasoner ablate {own / 'out'} --jobs 2" in capsys.readouterr().out
    assert [process.poll() for process in started] == [-signal.SIGTERM, -signal.SIGTERM]


def test_a_job_that_is_killed_ends_the_ablation_with_a_message(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    started = sleepers(monkeypatch, lambda first: os.kill(first, signal.SIGKILL))
    text = mistake(capsys, own / "out", *own_arms(own, 1), "--jobs", "2")
    assert "base-0 was killed (signal 9; out of memory? try fewer --jobs)" in text
    assert [process.poll() for process in started] == [-signal.SIGKILL, -signal.SIGTERM]


def test_a_folder_of_somebody_elses_sets_the_scale_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its settings must not smuggle in what a recipe sets: a reward is code."""
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')\n")
    (tmp_path / "settings.json").write_text(Settings(training={"reward": f"{tmp_path}/evil.py:fn"}).model_dump_json())
    assert "does not take: reward" in mistake(capsys, tmp_path, "--recipes", "default")


def test_arms_of_one_reward_have_one_file(tmp_path: Path):
    (tmp_path / "own.py").write_text("def fn(group, context):\n    return [0.0] * len(group.texts)\n")
    (tmp_path / "own.yaml").write_text("reward: own.py:fn\n")
    settings = Settings(recipes=(str(tmp_path / "own.yaml"),))
    config = arm_config(tmp_path, settings, settings.recipes[0], 0)
    (tmp_path / "own-0").mkdir()
    stored = config.model_copy(update={"reward_sha256": sha256_of(config)})
    (tmp_path / "own-0" / "config.yaml").write_text(dump_config(stored))
    _check_run(tmp_path / "own-0", config)
    (tmp_path / "own.py").write_text("def fn(group, context):\n    return [1.0] * len(group.texts)\n")
    with pytest.raises(UsageError, match=r"own\.py:fn has changed"):
        _check_run(tmp_path / "own-0", config)


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("def function(group, context):\n    return 1\n", "own.py has no function fn"),
        ("def fn(:\n", "own.py cannot be imported: SyntaxError"),
        (None, "cannot read the reward file"),
    ],
)
def test_a_reward_that_cannot_be_is_named_before_anything_is_drawn_or_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str | None, named: str
):
    if code:
        (tmp_path / "own.py").write_text(f"raise SystemExit('it ran')\n{code}")
    (tmp_path / "own.yaml").write_text("reward: own.py:fn\n")
    assert named in mistake(capsys, tmp_path / "out", "--recipes", "default", str(tmp_path / "own.yaml"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "code", ["from helping import fn", "import helping as fn", "fn = print", "from helping import *"]
)
def test_a_reward_may_come_from_elsewhere(tmp_path: Path, code: str):
    (tmp_path / "own.py").write_text(code)
    check_reward(resolve({"images": "pool", "model": "tiny", "reward": f"{tmp_path}/own.py:fn"}))


# --- the field --------------------------------------------------------------------------------------------------------


def test_the_field_has_every_published_reward_between_its_controls(tmp_path: Path, capsys: Any):
    settings = ablate.settle(tmp_path / "out", ablate.field_suite({}))
    arms = {name: ablate.arm_config(tmp_path / "out", settings, name, 0) for name in settings.recipes}
    assert {config.recipe.reward for config in arms.values()} == {"agreement", "random", "oracle", *PUBLISHED}
    assert "evolmm" in arms  # which pays agreement, by its own constants
    assert (settings.seeds, settings.cooled) == (3, True)
    assert {name for name, config in arms.items() if config.labels} == {"oracle"}
    own = ablate.field_suite({"images": "photos"})
    assert "oracle" not in own["recipes"]
    assert not own["cooled"]
    assert main(["ablate", str(tmp_path / "both"), "--suite", "field", "--recipes", "paper"]) == 2
    assert "leave out --recipes" in capsys.readouterr().err
