"""Whether an answer is right: each metric by the definition of its benchmark, with values by hand."""

from __future__ import annotations

import time

import pytest

from ireasoner.method.matching import match_value, same_answer

PAIRS_THAT_ARE_THE_SAME = [
    ("140", "140°"), ("140 degrees", "140"), ("140", r"140^\circ"), ("The answer is 140°.", "140"), ("**140°**", "140"),
    ("$45", "45"), ("45 dollars", "45"), ("€ 1,234.50", "1234.5"), ("-$5", "-5"), ("$1.2 million", "1.2 million"),
    ("50%", "50"), ("50 percent", "50"), ("12 apples", "12"), ("three apples", "3"), ("3 red bars", "3"),
    ("one hundred apples", "100"), ("5cm", "5"), ("25 m²", "25"), ("5 cm^{2}", "5"), ("10 m/s", "10"), ("9π", "9π cm"),
    ("240π", "240πcm^{2}"), ("25 °C", "25"), ("5 N", "5"), ("5\"", "5"), ("5厘米", "5"), ("5 Äpfel", "5"),
    ("5 pommes", "5"), ("1.3333333333", "4/3"), ("T-shirt", "t shirt"), ("dont walk", "don't walk"),
    ("on the table", "on table"), ("New York, USA", "New York USA"), ("Yes", "yes."),
]  # fmt: skip
PAIRS_THAT_DIFFER = [
    ("140 cm", "140 m"), ("50%", "0.5"), ("$5", "€5"), ("$5", "5%"), ("12 apples", "12 pears"), ("5x", "5"),
    ("2xy", "2"), ("3i", "3"), ("2π", "2"), ("2 pi", "2"), ("5 million", "5"), ("2 dozen", "2"), ("5 Millionen", "5"),
    ("5 lakh", "5"), ("5万", "5"), ("5个半", "5"), ("two thirds", "2"), ("20 squared", "20"), ("5th", "5"),
    ("3 PM", "3"), ("2000 BC", "2000"), ("12 or 13", "12"), ("140° or 150°", "140"), ("-5", "5"), ("<5", "5"),
    ("3.5", "35"), ("7.4", "7"), ("C++", "C"), ("a-b", "a/b"), ("x-y", "xy"), ("vitamin A", "vitamin"),
    ("room 5A", "room 5"), ("Level 3 heading", "Level 3"), ("1.3333", "4/3"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "true"), PAIRS_THAT_ARE_THE_SAME)
def test_what_only_one_side_writes_does_not_matter(answer: str, true: str):
    assert same_answer(answer, true)
    assert same_answer(true, answer)
    assert match_value(answer, ["something else", true]) == 1.0


@pytest.mark.parametrize(("answer", "true"), PAIRS_THAT_DIFFER)
def test_what_changes_the_value_does(answer: str, true: str):
    assert not same_answer(answer, true)
    assert not same_answer(true, answer)


def test_a_hedge_is_right_only_where_the_true_answer_says_the_same():
    assert not same_answer("red or blue", "red", "What color is it?")
    assert same_answer("Red  or blue", "red or blue", "What color is it?")
    assert not same_answer("red", "red or blue", "What color is it?")
    assert not same_answer("12 or 13 apples", "12")


# --- options ----------------------------------------------------------------------------------------------------------

ASKED = "How wide is the angle?\nA. 140°\nB. 40°\nC. 140 cm"


@pytest.mark.parametrize(
    ("answer", "true", "right"),
    [
        ("A", "A", True), ("(a)", "A", True), ("A. 140°", "A", True), ("140°", "A", True), ("A", "140°", True),
        ("40", "B", True), ("B", "40", True), ("40 degrees", "B", True), ("B. 40°", "40°", True),
        ("A", "B", False), ("40°", "A", False),
        ("140", "A", False),  # of two options it says as much
        ("D", "A", False), ("7", "B", False), ("A or B", "A", False), ("A and B", "A", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("choices", [(), ("140°", "40°", "140 cm")])
def test_an_option_is_picked_by_letter_or_by_text(answer: str, true: str, right: bool, choices: tuple[str, ...]):
    assert same_answer(answer, true, ASKED, choices) is right


def test_numbered_options_keep_their_numbers():
    asked, choices = "Which?\n1. 140°\n2. 40°", ("140°", "40°")
    assert same_answer("40", "2", asked, choices)
    assert same_answer("2", "40°", asked, choices)
    assert not same_answer("1", "2", asked, choices)


def test_options_that_are_near_each_other_stay_apart():
    asked = "How many?\nA. 100\nB. 102"
    assert match_value("102", ["A"], asked, "relaxed", ("100", "102")) == 0.0
    assert match_value("100", ["A"], asked, "relaxed", ("100", "102")) == 1.0


# --- ChartQA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "true", "right"),
    [
        ("105", "100", True), ("95", "100", True), ("105.1", "100", False), ("94.9", "100", False),
        ("100", "105", True), ("100", "95", False),  # 5 % of the true one: 5 of 95 are 5.3 %
        ("-105", "-100", True), ("105", "-100", False),
        ("0.52", "50%", True), ("52%", "50%", True), ("50%", "0.5", True), ("50", "50%", False), ("50%", "50", False),
        ("2010", "2015", True),  # a year is a number like any other
        ("0", "0", True), ("0.01", "0", False), ("0.0", "0", True),
        ("$1,020", "1000", True), ("1,020", "1000", True), ("102 cm", "100 cm", True), ("102 cm", "100 m", False),
        ("102 million", "100 million", True), ("102 apples", "100", True),
        ("Red", "red", True), ("blue", "red", False), ("nan", "5", False), ("inf", "inf", True), ("1e999", "5", False),
    ],
)  # fmt: skip
def test_chartqa_takes_numbers_within_five_percent(answer: str, true: str, right: bool):
    assert match_value(answer, [true], match="relaxed") == float(right)
    assert match_value(answer, ["no such thing", true], match="relaxed") == float(right)


# --- ANLS and VQA accuracy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "accepted", "value"),
    [
        ("Silver Creek", ["silver creek"], 1.0),
        ("  silver \n creek ", ["Silver  Creek"], 1.0),
        ("silver creak", ["silver creek"], 11 / 12),
        ("kitten", ["sitting"], 4 / 7),  # three edits of seven letters
        ("ab", ["abcd"], 0.5),  # the code of the competition keeps 0.5
        ("ab", ["abcde"], 0.0),
        ("abcd", ["efgh"], 0.0),
        ("", ["abc"], 0.0),
        ("kitten", ["dog", "sitting", "mitten"], 5 / 6),  # the largest counts
        ("140", ["140°"], 0.75),
        ("flaw", ["lawn"], 0.5),
        ("intention", ["execution"], 0.0),  # five of nine
    ],
)
def test_anls_by_hand(answer: str, accepted: list[str], value: float):
    assert match_value(answer, accepted, match="anls") == pytest.approx(value)


@pytest.mark.parametrize(("people", "value"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_people(people: int, value: float):
    """The official mean over the ten ways to leave one out: of 1 of 10, nine times 1/3; of 3, (3 · 2/3 + 7) / 10."""
    accepted = ["red"] * people + [f"other {i}" for i in range(10 - people)]
    assert match_value("The red.", accepted, match="vqa") == pytest.approx(value)


def test_vqa_accuracy_of_few_answers_is_sameness():
    assert match_value("red", ["red"], match="vqa") == match_value("red", ["blue", "red"], match="vqa") == 1.0


# --- any text at all --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("match", ["exact", "relaxed", "anls", "vqa"])
@pytest.mark.parametrize("unit", ["7 ", "a", "((", "5 a ", "$", "°", "9π", "\\frac{", "the ", "-1", "，", "1/"])
def test_any_text_is_judged_in_time(unit: str, match: str):
    text = unit * (100_000 // len(unit))
    began = time.perf_counter()
    value = match_value(text, ["140°"], "How wide?", match)  # type: ignore[arg-type]
    assert time.perf_counter() - began < 0.5  # 0.05 s on an idle machine
    assert value == 0.0


@pytest.mark.parametrize("length", [256, 2000, 2001])
def test_long_texts_are_compared_in_time(length: int):
    began = time.perf_counter()
    value = match_value("ab" * (length // 2), ["ba" * (length // 2)], match="anls")
    assert time.perf_counter() - began < 0.5
    assert value == pytest.approx(1 - 2 / (length // 2 * 2))
    assert match_value("x" * length, ["x" * length], match="anls") == 1.0
