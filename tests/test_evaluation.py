"""Held-out accuracy: intervals, the paired comparison, labelled questions, and the tiny LMM on its own world."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ireasoner.app.targets import evaluate_target
from ireasoner.method.texts import parse_trajectory, solver_messages
from ireasoner.method.types import UsageError
from ireasoner.model.policy import Policy
from ireasoner.playground import dataset, world
from ireasoner.playground.truth import step_truth
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training.config import SamplingOptions
from ireasoner.training.evaluation import ACCURACIES, EvaluationOptions, Scores, compare, evaluate
from ireasoner.training.images import ImageError, load_image
from ireasoner.training.labelled import DataError, LabelledQuestion, answer_prior, load_questions
from ireasoner.training.statistics import MEASURES, STRICT, difference_interval, half_width, share_interval, t_quantile
from ireasoner.training.targets import find_target
from models import load, requests

# --- intervals --------------------------------------------------------------------------------------------------------


def of_shares(values: np.ndarray, image: np.ndarray | None = None) -> tuple[float, float, float]:
    """The interval of a mean of shares, of questions with an image each unless said otherwise."""
    return share_interval(values, np.arange(len(values)) if image is None else image)


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.4])
def test_differences_without_spread_have_a_point_for_an_interval(value: float):
    assert difference_interval(np.full(20, value), np.arange(20)) == pytest.approx((value, value, value))


def test_of_one_image_the_interval_is_all_that_can_be():
    assert of_shares(np.array([0.4])) == (0.4, 0.0, 1.0)
    assert of_shares(np.array([1.0, 0.0, 1.0, 1.0]), np.zeros(4, dtype=int)) == (0.75, 0.0, 1.0)
    assert difference_interval(np.array([0.4]), np.zeros(1, dtype=int)) == (0.4, -1.0, 1.0)


def test_that_all_are_right_is_no_certainty():
    """Wilson's interval of n right of n begins at n / (n + z²); here with the quantile of Student's t."""
    assert of_shares(np.ones(20)) == pytest.approx((1.0, 20 / (20 + t_quantile(19) ** 2), 1.0))
    assert of_shares(np.ones(20), np.repeat(np.arange(5), 4)) == pytest.approx((1.0, 5 / (5 + t_quantile(4) ** 2), 1.0))
    assert of_shares(np.zeros(20)) == pytest.approx((0.0, 0.0, t_quantile(19) ** 2 / (20 + t_quantile(19) ** 2)))


@pytest.mark.parametrize(("right", "questions"), [(50, 100), (300, 400), (64, 512)])
def test_of_many_questions_the_interval_is_the_normal_one(right: int, questions: int):
    mean, low, high = of_shares((np.arange(questions) < right).astype(float))
    share = right / questions
    half = 1.96 * np.sqrt(share * (1 - share) / questions)
    assert mean == share
    assert low == pytest.approx(share - half, abs=0.08 * half + 1 / questions)
    assert high == pytest.approx(share + half, abs=0.08 * half + 1 / questions)


def test_the_interval_of_a_difference_ends_where_it_must():
    mean, low, high = difference_interval(np.array([1.0] * 9 + [0.0]), np.arange(10))
    assert mean == 0.9
    assert low == pytest.approx(0.9 - 2.262 * 0.1, abs=1e-4)  # the deviation is √0.1, over √10
    assert high == 1.0


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.30265), (2.5, 3.57468), (9, 2.26216), (11, 2.20099), (99, 1.98422), (10_000, 1.96020)],
)
def test_the_quantiles_are_students(freedom: float, quantile: float):
    assert t_quantile(freedom) == pytest.approx(quantile, rel=1e-5)


@pytest.mark.parametrize(
    ("by_seed", "half"),
    [
        ([0.3], np.inf),
        ([0.2, 0.2, 0.2], 0.0),
        ([0.1, 0.3], 12.706 * 0.1),  # deviation √0.02, over √2
        ([0.1, 0.2, 0.3], 4.303 * 0.1 / 3**0.5),
        ([0.1, 0.2] * 6, 2.201 * (0.0025 * 12 / 11) ** 0.5 / 12**0.5),
    ],
)
def test_where_only_seeds_differ_the_interval_is_students_over_them(by_seed: list[float], half: float):
    values = np.array(by_seed)[:, None]
    assert half_width(values, np.zeros(1, dtype=int)) == pytest.approx(half, rel=1e-4, abs=1e-12)
    assert half_width(np.tile(values, 50), np.arange(50)) == pytest.approx(half if len(by_seed) > 1 else 0, rel=1e-4)


def test_questions_about_an_image_that_are_all_right_or_all_wrong_count_once():
    images = np.array([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    once = half_width(images[None], np.arange(7))
    assert half_width(np.repeat(images, 9)[None], np.repeat(np.arange(7), 9)) == pytest.approx(once)
    assert half_width(np.tile(images, 9)[None], np.tile(np.arange(7), 9)) == pytest.approx(once)  # in any order
    assert half_width(np.repeat(images, 9)[None], np.arange(63)) < once / 3


def test_images_with_unequal_numbers_of_questions_by_hand():
    values, image = np.array([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]), np.array([0, 0, 1, 1, 1, 2])
    without = np.array([1 / 4, 2 / 3, 3 / 5]) - 1 / 2  # how the mean differs without each of the images: the jackknife
    half = t_quantile(2) * np.sqrt(2 / 3 * (without**2).sum())
    assert half_width(values[None], image) == pytest.approx(half)


def test_seeds_and_images_by_hand():
    values = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    # Means 1/4 and 3/4: their deviation is √(1/8), over √2: variance 1/16. Images 1, 1/2, 1/2 and 0: deviation √(1/6),
    # over √4: 1/24. Off both, ±1/4 in each: sum of squares 8/16 over (2 - 1)(4 - 1) and 2 · 4: 1/48.
    by_seed, by_image, shared = 1 / 16, 1 / 24, 1 / 48
    variance = by_seed + by_image - shared
    freedom = variance**2 / (by_seed**2 / 1 + by_image**2 / 3)
    assert freedom > 1
    both, seeds_alone = t_quantile(freedom) * variance**0.5, t_quantile(1) * by_seed**0.5
    assert half_width(values, np.arange(4)) == pytest.approx(max(both, seeds_alone))
    # Images that differ ten times as much: now they decide, with more degrees of freedom.
    values = np.array([[10.0, 0.0, 0.0, 0.0], [10.0, 1.0, 1.0, 0.0]])
    by_seed, by_image, shared = 1 / 16, np.var([10, 0.5, 0.5, 0], ddof=1) / 4, 1 / 48
    variance = by_seed + by_image - shared
    freedom = variance**2 / (by_seed**2 / 1 + by_image**2 / 3)
    assert half_width(values, np.arange(4)) == pytest.approx(t_quantile(freedom) * variance**0.5)


@pytest.mark.parametrize(("images", "share"), [(30, 0.5), (30, 0.95), (100, 0.95), (100, 0.02)])
def test_95_percent_are_95_percent_of_one_model(images: int, share: float):
    rng = np.random.default_rng(0)
    worlds = [share_interval((rng.random(images) < share).astype(float), np.arange(images)) for _ in range(1000)]
    assert 0.93 < np.mean([low <= share <= high for _, low, high in worlds]) < 0.99


@pytest.mark.parametrize(
    ("seeds", "images", "each", "of_seeds"),  # the last: variance of the mean from seeds, with that from images as 1
    [(1, 40, 4, 0.0), (3, 60, 1, 4.0), (3, 60, 6, 0.0), (3, 60, 6, 1.0), (5, 60, 1, 1.0), (5, 60, 6, 4.0)],
)
def test_95_percent_are_95_percent(seeds: int, images: int, each: int, of_seeds: float):
    rng, worlds, held = np.random.default_rng(0), 700, 0
    image = np.repeat(np.arange(images), rng.integers(each, 2 * each, size=images))
    for _ in range(worlds):
        skill = rng.standard_normal(images)[image] + rng.standard_normal((seeds, len(image)))
        skill += np.sqrt(of_seeds * seeds / images) * rng.standard_normal((seeds, 1))
        right = (skill > 0).astype(float)
        held += abs(right.mean() - 0.5) <= half_width(right, image)
    assert 0.93 < held / worlds < 0.99  # with seeds and questions resampled it was as low as 0.67


# --- without looking --------------------------------------------------------------------------------------------------


def test_the_answer_prior_by_hand():
    rows = [("How many bars?", "3"), ("how  many dots?", "three"), ("How many rows?", "4"), ("Is it red?", "4"),
            ("Is it blue?", "no"), ("Is it low?", "no"), ("Why?", "yes")]  # fmt: skip
    found = answer_prior([LabelledQuestion(Path("a.png"), question, answer) for question, answer in rows])
    # Of all: 3 (twice), 4 (twice) or no (twice), of 7. By words: 2 of the 3 how many, 2 of the 3 is it, 1 of 1 why.
    assert found == {"overall": pytest.approx(2 / 7), "by_first_words": pytest.approx(5 / 7)}


# --- the comparison ---------------------------------------------------------------------------------------------------


def scores(values: np.ndarray, image: np.ndarray | None = None) -> Scores:
    values = np.asarray(values, dtype=np.float64)
    ones, image = np.ones(len(values)), np.arange(len(values)) if image is None else image
    return Scores(dict.fromkeys(ACCURACIES, values), 0 * ones, ones, ones, 20 * ones, ones, ("",) * len(values), image)


def one(before: np.ndarray, after: np.ndarray, image: np.ndarray | None = None) -> dict[str, float]:
    found = compare(scores(before, image), scores(after, image))
    assert set(found) == set(ACCURACIES)
    return found["greedy"]


def test_equal_scores_differ_by_nothing():
    values = np.random.default_rng(1).integers(0, 2, 64)
    assert one(values, values) == {"mean": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


def test_the_difference_is_after_minus_before():
    worse, better = np.zeros(40), np.concatenate([np.ones(10), np.zeros(30)])
    up, down = one(worse, better), one(better, worse)
    assert up["mean"] == 0.25
    assert up["low"] > 0
    assert down["mean"] == -0.25
    assert down["high"] < 0
    assert up["p"] == down["p"]


def test_a_strong_paired_effect_is_told_from_chance_and_none_is_not():
    rng = np.random.default_rng(2)
    before = rng.integers(0, 2, 200).astype(float)
    gained = before.copy()
    gained[np.flatnonzero(before == 0)[:30]] = 1  # 30 of 200 gained, none lost
    assert one(before, gained)["p"] < 0.001
    shuffled = before.copy()
    shuffled[np.flatnonzero(before == 0)[:15]] = 1
    shuffled[np.flatnonzero(before == 1)[:15]] = 0  # 15 gained, 15 lost
    assert one(before, shuffled)["mean"] == 0
    assert one(before, shuffled)["p"] == 1.0


@pytest.mark.parametrize(
    ("gained", "lost", "exact"),
    # Two-sided sign test: the chance that of n fair flips at least `gained`, or at most `lost`, are heads.
    [(3, 0, 0.25), (5, 0, 0.0625), (6, 4, 0.754), (9, 1, 0.0215), (8, 2, 0.109)],
)
def test_p_is_that_of_the_exact_sign_test(gained: int, lost: int, exact: float):
    difference = np.array([1.0] * gained + [-1.0] * lost + [0.0] * 7)
    assert one(np.zeros(len(difference)), difference)["p"] == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize(("images", "exact"), [(1, 1.0), (5, 0.0625)])
def test_questions_about_an_image_change_sides_together(images: int, exact: float):
    found = one(np.zeros(3 * images), np.ones(3 * images), np.repeat(np.arange(images), 3))
    assert found["p"] == pytest.approx(exact, abs=0.01)
    assert (found["low"], found["high"]) == ((1.0, 1.0) if images > 1 else (-1.0, 1.0))  # of one image nothing is known


def test_p_is_never_zero():
    assert 0 < one(np.zeros(400), np.ones(400))["p"] <= 2e-4


def test_a_summary_is_json_and_has_every_measure():
    summary = json.loads(json.dumps(scores(np.array([1.0, 0.0, 1.0, 1.0])).summary()))
    assert (summary["questions"], summary["images"]) == (4, 4)
    values, image = np.array([1.0, 0.0, 0.0, 1.0] * 9), np.repeat(np.arange(9), 4)
    image[2:4] = 1
    found = scores(values, image).summary()
    assert (found["questions"], found["images"]) == (36, 9)
    assert found["greedy"]["high"] == share_interval(values, image)[2]
    for name in MEASURES:
        assert summary[name]["mean"] == 0.75
        assert summary[name]["low"] <= 0.75 <= summary[name]["high"]
    assert summary["well_formed"] == 1.0
    assert summary["tokens"] == 20.0
    assert summary["step_truth"] is summary["checkable_steps"] is None  # no question came with its picture


# --- labelled questions -----------------------------------------------------------------------------------------------

ROW = {"image": "a.png", "question": "How many?", "answer": "7"}


def lines(folder: Path, *rows: object) -> Path:
    """A data file beside one picture, `a.png`; rows are texts or values to write as JSON."""
    Image.new("RGB", (84, 84), "red").save(folder / "a.png")
    path = folder / "data.jsonl"
    texts = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes("\n".join(texts).encode("utf-8", "surrogatepass"))
    return path


def test_questions_are_read_with_images_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = lines(tmp_path, ROW, "", "   ", {**ROW, "answer": 7}, {**ROW, "answer": 2.5, "note": "kept out"})
    monkeypatch.chdir("/")
    found = load_questions(path)
    assert [q.answer for q in found] == ["7", "7", "2.5"]
    assert all(q.image == (tmp_path / "a.png").resolve() and q.image.is_absolute() for q in found)
    assert found[0].question == "How many?"


def test_an_absolute_image_path_is_taken_as_it_is(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (84, 84)).save(tmp_path / "elsewhere" / "b.png")
    path = lines(tmp_path, {**ROW, "image": str(tmp_path / "elsewhere" / "b.png")})
    assert load_questions(path)[0].image.name == "b.png"


def test_under_a_limit_as_many_images_as_possible_are_asked_about(tmp_path: Path):
    """Files are often sorted by image, as easy-vqa's: the first questions would show a few images alone."""
    for name in "abcd":
        _picture(tmp_path / f"{name}.png")
    rows = [{**ROW, "image": f"{name}.png", "answer": i} for name in "abcd" for i in range(5 if name < "d" else 1)]
    path = lines(tmp_path, *rows)
    every = load_questions(path)

    def images(limit: int) -> list[int]:
        """How many questions about each image are drawn."""
        return sorted(Counter(q.image for q in load_questions(path, limit)).values())

    assert images(3) == [1, 1, 1]
    assert images(4) == [1, 1, 1, 1]
    assert images(6) == [1, 1, 2, 2]  # of the fourth image there is no second question
    assert images(10) == [1, 3, 3, 3]
    assert load_questions(path, 16) == load_questions(path, 99) == every
    drawn = load_questions(path, 7)
    assert drawn == load_questions(path, 7)  # every model and seed is asked the same
    assert drawn == [q for q in every if q in drawn]  # in the order of the file
    assert any(q.answer != "0" for q in load_questions(path, 3))  # not always an image's first


def _picture(path: Path) -> Path:
    Image.new("RGB", (84, 84)).save(path)
    return path


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "7",
        "null",
        '"text"',
        '["a.png", "q", "1"]',
        "{}",
        {"image": "a.png", "question": "q"},
        {**ROW, "image": 3},
        {**ROW, "question": ["q"]},
        {**ROW, "answer": None},
        {**ROW, "answer": ["1", ["2"]]},
        {**ROW, "image": "b.png"},
        {**ROW, "image": "."},
        {**ROW, "image": ""},
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: object):
    path = lines(tmp_path, ROW, "", bad, ROW)
    with pytest.raises(DataError, match=r"data\.jsonl, line 3: ") as caught:
        load_questions(path)
    assert isinstance(caught.value, UsageError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param({**ROW, "image": "data:image/png;base64," + "A" * 5000}, id="image-in-the-line"),
        pytest.param({**ROW, "image": "a\0.png"}, id="null-character"),
        pytest.param("[" * 100_000, id="nested-too-deep"),
    ],
)
def test_a_very_bad_line_is_named(tmp_path: Path, bad: object):
    with pytest.raises(DataError, match=r"data\.jsonl, line 1: "):
        load_questions(lines(tmp_path, bad))


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\u2029"])
def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path: Path, mark: str):
    (question,) = load_questions(lines(tmp_path, {**ROW, "question": f"one{mark}two"}))
    assert question.question == f"one{mark}two"


@pytest.mark.parametrize("content", [b"", b"\n\n \n", None, b"\xff\xfe{}"])
def test_a_file_without_questions_is_named(tmp_path: Path, content: bytes | None):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.jsonl"):
        load_questions(path)


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_a_mistake(tmp_path: Path, limit: int):
    with pytest.raises(UsageError, match="limit"):
        load_questions(lines(tmp_path, ROW, ROW), limit)


# --- rows of the public sets ------------------------------------------------------------------------------------------

OPTIONS = {"choices": ("red", "blue"), "question": "Which?\nA. red\nB. blue"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param({"image_path": "./a.png", "question": "How wide?", "ground_truth": "140°"},
                     {"question": "How wide?", "answer": "140°"}, id="R1-V"),
        pytest.param({"images": ["a.png"], "problem": "<image>How many?", "answer": "48"},
                     {"answer": "48"}, id="EasyR1"),
        pytest.param({"images": [{"bytes": None, "path": "a.png"}], "problem": "How many?", "answer": 7},
                     {"answer": "7"}, id="datasets"),
        pytest.param({"id": 1, "image": "a.png", "conversations": [
            {"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "<answer> 7 </answer>"}]},
            {"answer": "7"}, id="VLM-R1"),
        pytest.param({"image": "a.png", "problem": "How many?", "solution": "<think>So.</think>\n<answer>7</answer>"},
                     {"answer": "7"}, id="VLM-R1 with a thought"),
        pytest.param({"doc_id": 0, "image": "a.png", "doc": {"question": "How many?"}, "target": "7", "resps": [["7"]]},
                     {"answer": "7"}, id="lmms-eval sample"),
        pytest.param({"image": "a.png", "query": "How many?", "label": ["7"], "human_or_machine": 0},
                     {"answer": "7"}, id="ChartQA"),
        pytest.param({"image": "a.png", "question": "How many?", "answer": "7", "type": "human_test"},
                     {"answer": "7", "match": None}, id="ChartQA of lmms-eval"),
        pytest.param({"image": "a.png", "question": "How many?", "answers": ["7", "seven"], "metric": "anls"},
                     {"answer": "7", "others": ("seven",), "match": "anls"}, id="DocVQA"),
        pytest.param({"image": "a.png", "question": "How many?", "metric": "vqa_score",
                      "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(["7", "7", "8"])]},
                     {"answer": "7", "others": ("7", "8"), "match": "vqa"}, id="VQAv2"),
        pytest.param({"image": "AAAA", "image_path": "a.png", "question": "Which?", "A": "red", "B": "blue",
                      "C": float("nan"), "D": None, "answer": "B"}, {**OPTIONS, "answer": "B"}, id="VLMEvalKit"),
        pytest.param({"image": "a.png", "question": "Which?", "choices": ["red", "blue"], "answer": 1, "hint": ""},
                     {**OPTIONS, "answer": "B"}, id="ScienceQA"),
        pytest.param({"image": "a.png", "question": "Which?", "options": ["red", "blue"], "answer": "0"},
                     {**OPTIONS, "answer": "A"}, id="AI2D"),
        pytest.param({"image": "a.png", "question": "Which?", "options": "['red', 'blue']", "answer": "B"},
                     {**OPTIONS, "answer": "B"}, id="MMMU"),
        pytest.param({"image": "a.png", "question": "Which?", "choices": ["(A) red", "(B) blue"], "answer": "blue"},
                     {**OPTIONS, "answer": "blue"}, id="MathVista"),
        pytest.param({"image": "a.png", "prompt": "Which?", "options": {"A": "red", "B": "blue"}, "target": "A"},
                     {**OPTIONS, "answer": "A"}, id="options by letter"),
        pytest.param({"image": "a.png", "question": "How many?", "choices": ["7", "8", "9"], "answer": "7"},
                     {"question": "How many?\nA. 7\nB. 8\nC. 9", "answer": "7"}, id="options that are digits"),
        pytest.param({"image": "a.png", "question": "(A) red or (B) blue?", "choices": ["red", "blue"], "answer": "B"},
                     {"question": "(A) red or (B) blue?", "choices": ("red", "blue")}, id="options that are shown"),
        pytest.param({"image": "a.png", "question": "Is (A) over (B)?", "choices": ["yes", "no"], "answer": "A"},
                     {"question": "Is (A) over (B)?\nA. yes\nB. no"}, id="letters that are no options"),
        pytest.param({**ROW, "choices": None, "metric": None, "options": []},
                     {"choices": (), "match": None}, id="none of them"),
    ],
)  # fmt: skip
def test_rows_of_the_public_sets_are_read(tmp_path: Path, row: dict[str, object], expected: dict[str, object]):
    (found,) = load_questions(lines(tmp_path, row))
    assert found.image == (tmp_path / "a.png").resolve()
    for name, value in {"question": "How many?", "others": (), **expected}.items():
        assert getattr(found, name) == value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": None}, "has no question: it may be named question, problem, query, prompt"),
        ({"answer": None}, "has no answer: it may be named answer, answers, solution"),
        ({"image": None}, "has no image: it may be named image_path, image, images"),
        ({"image": None, "images": ["a.png", "b.png"]}, "images names no image: 'b.png'"),
        ({"image": "b.png"}, "image names no image: 'b.png'"),
        ({"image": None, "image_path": {"path": 7}}, "image_path must be the path of an image"),
        ({"choices": ["one"]}, "choices must be 2 to 26 options, not 1"),
        ({"options": {"B": "x", "A": "y"}}, "options must have the letters A, B, C and so on as keys, in this order"),
        ({"choices": [["a"], "b"]}, "choices must be text or a number"),
        ({"choices": ["a", "b"], "answer": 2}, "answer is 2, but there are only 2 choices, counted from 0"),
        ({"choices": ["1", "2"], "answer": 1}, "answer is 1, which one choice says and another one has as its place"),
        ({"answer": None, "answers": [{"text": "7"}]}, "answers must be text or a number"),
        ({"metric": "bleu"}, "metric must be one of exact, exact_match,"),
        ({"match": ["anls"]}, "match must be one of exact,"),
    ],
)
def test_a_bad_field_is_named_with_its_line(tmp_path: Path, change: dict[str, object], said: str):
    with pytest.raises(DataError, match=r"data\.jsonl, line 2: ") as caught:
        load_questions(lines(tmp_path, ROW, {**ROW, **change}))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


PICTURE = world.picture_record(world.sample_picture(np.random.default_rng(0)))


@pytest.mark.parametrize(("given", "kept"), [(PICTURE, True), ("a photo", False), (None, False)])
def test_a_picture_of_the_world_is_kept(tmp_path: Path, given: object, kept: bool):
    (question,) = load_questions(lines(tmp_path, {**ROW, "picture": given}))
    assert (question.picture is not None) == kept
    if question.picture is not None:
        assert world.picture_record(world.picture_from_record(question.picture)) == PICTURE


@pytest.mark.parametrize("bad", [{}, {"family": "oil"}, {**PICTURE, "values": 3}, {"bytes": "", "path": "a.png"}])
def test_a_picture_that_is_none_is_named(tmp_path: Path, bad: object):
    with pytest.raises(DataError, match=r"data\.jsonl, line 2: .*picture"):
        load_questions(lines(tmp_path, ROW, {**ROW, "picture": bad}), truth=step_truth)


# --- a model on questions ---------------------------------------------------------------------------------------------

LOOKING = ("value", "where", "what", "color", "extreme", "count")  # the kinds that can be answered only by looking


def asked(longest: int) -> SamplingOptions:
    """The question alone as the prompt, and the longest solution."""
    return SamplingOptions(solver_prompt="{question}", max_solution_tokens=longest)


@pytest.fixture(scope="module")
def tiny() -> Policy:
    return load(max_image_tokens=64)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[LabelledQuestion]:
    """Questions in the style that the tiny LMM was pre-trained on, about pictures of a seed that it never saw."""
    folder = tmp_path_factory.mktemp("questions")
    rng = np.random.default_rng(987_654)
    found = []
    while len(found) < 60:
        picture = world.sample_picture(rng)
        question = world.sample_question(picture, rng)
        if question.kind in LOOKING:
            path = folder / f"{len(found)}.png"
            world.draw(picture, world.sample_style("varied", rng), rng).save(path)
            found.append(LabelledQuestion(path, question.text, question.answer, world.picture_record(picture)))
    return found


def knowing_blindly() -> float:
    """Accuracy of who knows the world, and the kind of a question, but does not look."""
    rng = np.random.default_rng(5)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _ in range(1500):
        question = world.sample_question(world.sample_picture(rng), rng)
        if question.kind in LOOKING:
            answers[question.kind][question.answer] += 1
    return sum(max(count.values()) for count in answers.values()) / sum(map(Counter.total, answers.values()))


def test_the_tiny_model_looks_at_its_world(tiny: Policy, questions: list[LabelledQuestion]):
    told: list[tuple[int, int]] = []
    options = EvaluationOptions(batch_size=30)
    found = evaluate(
        tiny,
        questions,
        None,
        asked(96),
        truth=step_truth,
        on_progress=lambda done, total: told.append((done, total)),
        options=options,
    )
    assert told == [(30, 60), (60, 60)]
    # The tiny LMM can look, but more often than not it does something else; its mistakes seldom agree.
    accuracy = found.measures["maj@5"].mean()
    assert accuracy > knowing_blindly() + 0.12
    assert found.well_formed.mean() > 0.8
    assert all(set(values) <= {k / 5 for k in range(6)} for values in found.measures.values())
    others = [LabelledQuestion(questions[i - 1].image, q.question, q.answer) for i, q in enumerate(questions)]
    swapped = evaluate(tiny, others, None, asked(96), truth=step_truth)
    assert swapped.measures["maj@5"].mean() < accuracy - 0.1  # it was the picture


def test_scores_depend_on_the_seed_alone_and_not_on_the_batches(tiny: Policy, questions: list[LabelledQuestion]):
    def of(seed: int, batch_size: int) -> Scores:
        options = EvaluationOptions(seed=seed, batch_size=batch_size)
        return evaluate(tiny, questions[:6], None, asked(64), truth=step_truth, options=options)

    first, again, other = of(0, 64), of(0, 4), of(1, 64)
    assert first.greedy_texts == again.greedy_texts == other.greedy_texts  # greedy draws nothing
    for name in MEASURES:
        assert np.array_equal(first.measures[name], again.measures[name])
    assert np.array_equal(first.answer_entropy, again.answer_entropy)
    assert not np.array_equal(first.answer_entropy, other.answer_entropy)


def test_any_right_sample_passes(tiny: Policy, questions: list[LabelledQuestion]):
    found = evaluate(tiny, questions[:20], None, asked(64), truth=step_truth).measures
    assert np.array_equal(found["pass@5"], found["mean@1"] > 0)
    assert found["pass@5"].mean() > found["mean@1"].mean()


def test_the_truth_of_steps_is_that_of_the_sampled_steps(tiny: Policy, questions: list[LabelledQuestion]):
    some = questions[:8]
    found = evaluate(tiny, some, None, asked(64), truth=step_truth, options=EvaluationOptions(seed=3))
    chats = [solver_messages("{question}", q.question) for q in some]
    sent = requests(tiny, [load_image(q.image) for q in some], chats, [(3, i) for i in range(8)])
    groups = LiveEngine(tiny).sample(sent, None, n=5, max_tokens=64)
    checkable, true = np.zeros(8), np.zeros(8)
    for i, (question, group) in enumerate(zip(some, groups, strict=True)):
        assert question.picture is not None
        picture = world.picture_from_record(question.picture)
        for read in (parse_trajectory(c.text, c.finish_reason) for c in group):
            for step in read.reasoning_steps if read.well_formed else ():
                verdict = world.step_truth(picture, step)
                checkable[i] += verdict is not None
                true[i] += verdict is True
    assert 0 < true.sum() < checkable.sum()
    assert found.checkable_steps == pytest.approx(checkable / 5)
    assert found.true_steps == pytest.approx(true / 5)
    assert found.step_truth == pytest.approx(true.sum() / checkable.sum())
    assert found.summary()["step_truth"] == found.step_truth
    assert found.image.tolist() == list(range(8))
    assert found.tokens == pytest.approx([np.mean([len(c.token_ids) for c in group]) for group in groups])
    assert found.distinct_solutions.tolist() == [len({c.text for c in group}) / 5 for group in groups]
    assert len(set(found.distinct_solutions.tolist())) > 1


def test_without_every_picture_there_is_no_truth(tiny: Policy, questions: list[LabelledQuestion]):
    mixed = [questions[0], replace(questions[1], picture=None), questions[0]]
    found = evaluate(tiny, mixed, None, asked(32), truth=step_truth)
    assert found.image.tolist() == found.per_question()["image"] == [0, 1, 0]
    assert found.checkable_steps is found.true_steps is found.step_truth is None
    assert evaluate(tiny, questions[:1], None, asked(32)).step_truth is None  # nor where nobody says what is true
    cut = evaluate(tiny, questions[:2], None, asked(3), truth=step_truth)  # nothing readable, so nothing checked
    assert cut.checkable_steps is not None
    assert not cut.checkable_steps.any()
    assert cut.step_truth is None


def test_blank_images_tell_nothing(tiny: Policy, questions: list[LabelledQuestion]):
    same = [LabelledQuestion(q.image, "How many bars are there?", "3") for q in questions[:6]]
    blank = evaluate(tiny, same, None, asked(64), truth=step_truth, options=EvaluationOptions(blank=True)).greedy_texts
    assert len(set(blank)) == 1
    assert len(set(evaluate(tiny, same, None, asked(64), truth=step_truth).greedy_texts)) > 1


def test_a_truncated_answer_is_wrong(tiny: Policy, questions: list[LabelledQuestion]):
    found = evaluate(tiny, questions[:2], None, asked(3), truth=step_truth)
    assert not any(values.any() for values in found.measures.values())
    assert not found.well_formed.any()
    assert not found.answer_entropy.any()


def test_a_cold_sample_is_the_greedy_answer(tiny: Policy, questions: list[LabelledQuestion]):
    found = evaluate(tiny, questions[:4], None, asked(64), truth=step_truth, options=EvaluationOptions(temperature=0.0))
    assert np.array_equal(found.measures["greedy"], found.measures["mean@1"])
    assert np.array_equal(found.measures["greedy"], found.measures["maj@5"])
    assert not found.answer_entropy.any()
    assert found.distinct_solutions.tolist() == [1 / 5] * 4


def test_an_answer_that_is_the_same_in_other_words_is_right(tiny: Policy, questions: list[LabelledQuestion]):
    count = next(q for q in questions if q.question.startswith("How many"))
    first = evaluate(tiny, [count], None, asked(64), truth=step_truth, options=EvaluationOptions(temperature=0.0))
    said = first.greedy_texts[0].partition("<answer>")[2].partition("</answer>")[0]
    again = [LabelledQuestion(count.image, count.question, f"{float(said)}")]  # "3.0" for "3"
    assert evaluate(tiny, again, None, asked(64), truth=step_truth).measures["greedy"].tolist() == [1.0]


def test_what_the_benchmark_accepts_is_right_and_strictly_wrong(tiny: Policy, questions: list[LabelledQuestion]):
    count = next(q for q in questions if q.question.startswith("How many"))
    cold = EvaluationOptions(temperature=0.0)

    def measured(answer: str, options: EvaluationOptions = cold, **fields: Any) -> dict[str, float]:
        """The measures of the one question, if this were its true answer."""
        found = evaluate(tiny, [replace(count, answer=answer, **fields)], None, asked(64), options=options)
        assert found.greedy_well_formed.tolist() == found.well_formed.tolist() == [1.0]
        assert found.of_readable("greedy") == found.measures["greedy"][0]
        return {name: float(values[0]) for name, values in found.measures.items()}

    text = evaluate(tiny, [count], None, asked(64), options=cold).greedy_texts[0]
    said = text.partition("<answer>")[2].partition("</answer>")[0]
    lenient, strict = dict.fromkeys(MEASURES, 1.0), dict.fromkeys(STRICT, 1.0)
    wrong, strictly_wrong = dict.fromkeys(MEASURES, 0.0), dict.fromkeys(STRICT, 0.0)
    assert measured(said) == lenient | strict
    assert measured(f"{said} bars") == lenient | strictly_wrong
    assert measured("none at all", others=(said,)) == lenient | strictly_wrong
    near = str(1.04 * float(said))
    assert measured(near) == wrong | strictly_wrong
    assert measured(near, replace(cold, match="relaxed")) == lenient | strictly_wrong
    assert measured(near, match="relaxed") == lenient | strictly_wrong  # the question's own metric
    assert measured(near, replace(cold, match="relaxed"), match="exact") == wrong | strictly_wrong
    half = said + "x" * len(said)
    assert measured(half, match="anls") == dict.fromkeys(MEASURES, 0.5) | strictly_wrong


def test_accuracy_among_readable_texts_by_hand():
    right, read = np.array([1.0, 0.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0, 0.0])
    found = replace(scores(right), greedy_well_formed=read, well_formed=np.zeros(4))
    assert found.of_readable("greedy") == pytest.approx(2 / 3)
    assert found.of_readable("mean@1") is None
    summary = json.loads(json.dumps(found.summary()))
    assert summary["greedy_of_readable"] == pytest.approx(2 / 3)
    assert summary["greedy_well_formed"] == 0.75
    assert summary["mean@1_of_readable"] is None
    assert summary["strict_greedy"]["mean"] == 0.5


def test_an_image_that_cannot_be_decoded_is_named(tiny: Policy, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(ImageError, match=r"a\.png"):
        evaluate(tiny, [LabelledQuestion(tmp_path / "a.png", "What?", "1")], None, asked(4), truth=step_truth)


def test_a_plain_model_gets_the_prompt_and_lengths_of_its_preset(questions: list[LabelledQuestion]):
    found = evaluate_target(find_target("tiny"), questions[:4], device="cpu")
    assert found.well_formed.mean() > 0.5  # under the 7b preset's long prompt the tiny LMM would not even be readable
    assert found.greedy_texts == evaluate_target(find_target("tiny", "tiny"), questions[:4], device="cpu").greedy_texts


def test_the_held_out_files_of_the_world_can_be_evaluated(tmp_path: Path):
    path = dataset.write_questions(tmp_path / "test", 4, "varied")
    found = evaluate_target(find_target("tiny"), load_questions(path), device="cpu")
    assert len(found.greedy_texts) == 4


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("questions", [1, 2, 3, 7, 50])
def test_the_interval_of_a_share_stays_between_0_and_1(value: float, questions: int):
    mean, low, high = share_interval(np.full(questions, value), np.arange(questions))
    assert mean == value
    assert 0.0 <= low <= mean <= high <= 1.0
    assert not str(low).startswith("-")
