"""Answers: same ones share a key, different ones do not, any text is read in bounded time, votes count by hand."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ireasoner.method.answers import Vote, answer_key, lettered_options, majority, vote_shares

SAME = [
    # numbers
    ["12", "12.0", "12.", "+12", "twelve", "Twelve.", "１２", "24/2", "1.2e1"],
    ["1,000", "1000", "1,000.00", "1e3", "1E+3", "10^3", "10³", "one thousand", "a thousand", "1 thousand"],
    ["-5", "−5", "–5", "- 5", "minus five", "negative 5", "-5.0", "$-5$", r"\(-5\)"],
    ["0", "-0", "0.00", "zero", "0/7"],
    ["21", "twenty-one", "twenty one", "Twenty-One"],
    ["105", "one hundred and five", "one hundred five", "a hundred and five"],
    ["1,234", "one thousand two hundred and thirty-four"],
    ["1200", "twelve hundred", "one thousand two hundred"],
    ["2,500,000", "2.5 million", "two million five hundred thousand"],
    ["5000", "5 × 10^3", "5e3", "5x10^3", "5 * 10^3", "5×10³", r"5 \times 10^{3}", r"$5 \cdot 10^3$"],
    ["0.001", "1e-3", "10^-3", "10⁻³", "10^{-3}", "1/1000"],
    [r"\frac{1}{2}", r"\dfrac{1}{2}", r"\frac12", "1/2", "1 / 2", "0.5", ".5", "½", "1⁄2", "2/4", r"$\frac{1}{2}$"],
    ["2.5", "2½", "2 1/2", r"2\frac{1}{2}", "5/2"],
    ["2.5%", "2½%", "2 1/2 percent"],
    ["-1/2", "-½", r"-\frac{1}{2}", "-.5"],
    ["47", r"\boxed{47}", "$47$", "$$47$$", "$ 47 $", r"\(47\)", r"\[ 47 \]", r"$\boxed{47}$.", r"\boxed{\text{47}}"],
    ["100000000000000000000000000000001", "100000000000000000000000000000001.0"],
    # units
    ["50%", "50 %", "50 percent", "50 per cent", "fifty percent", "50.0%", r"50\%", r"$50\%$", "50 pct"],
    ["5 cm", "5cm", "5 CM", "5 centimeters", "5 centimetres", "five cm", "5.0 cm.", r"5\,\text{cm}", "$5$ cm"],
    ["5 cm²", "5 cm^2", "5 cm2", "5 sq cm", "5 square centimeters", r"5\text{ cm}^2", r"5 cm^{2}"],
    ["$5", "5 dollars", "5 USD", "$5.00", "US$5", "USD 5", "five dollars", r"\$5", r"$\$5$", "5 $"],
    ["$2.5 million", "2500000 dollars", "2.5 million dollars"],
    ["$5 per hour", "5 dollars per hour", "$5/hour"],
    ["-$5", "-5 dollars", "minus 5 dollars"],
    ["60 mph", "60 miles per hour", "60 mi/h"],
    ["20°C", "20 °C", "20 ℃", "20 degrees Celsius", r"20^\circ C", r"20^{\circ}\text{C}"],
    ["90°", "90 degrees", "90º", r"90^\circ", r"90^{\circ}"],
    ["<5", "< 5", "<5.0", "$<5$", r"\lt 5", "＜5"],
    ["≥5", ">=5", ">= 5", r"\geq 5", r"$\ge 5$"],
    ["2π", "2 pi", r"2\pi"],
    # text
    [
        "Red",
        "the red",
        "red.",
        "RED",
        " red ",
        r"\text{Red}",
        r"$\text{red}$",
        '"Red"',
        "“red.”",
        "‘red’",
        "`red`",
        "a red",
    ],
    [
        "red",
        "**Red**",
        "**Red.**",
        "The answer is red.",
        "Answer: Red",
        "**Answer:** red",
        "So, the final answer is: red",
    ],
    ["yes", "Yes.", "yes!", "YES!!", "Yes ."],
    ["7", "**7**", "*7*", "__7__", "_7_", "**_7_**", "the answer is 7", "Answer: 7", "= 7", "=7", "answer is **7**"],
    ["x = 7", "x=7", "$x = 7$", "X=7"],
    ["x^2", "x²", "x^{2}", "$x^2$"],
    ["CO2", "CO₂", "CO_2", r"\text{CO}_2", r"$CO_{2}$"],
    [r"5\sqrt{3}", "5√3", "5√(3)", "5sqrt(3)"],
    ["3 x 4", "3×4", "3 * 4", "3x4", r"3 \times 4"],
    ["(3, 4)", "(3,4)", r"\left(3, 4\right)"],
    ["red, blue", "red,blue", "Red , Blue"],
    ["café", "cafe\u0301", "CAFÉ"],
    ["don't know", "don’t know"],
    ["red\u200b", "\ufeffred", "re\u00add"],
    ["5!", r"$5!$", "**5!**"],
    # as models of other countries write them
    ["D", "(D)", "D)", "Option D", "选D", "D is correct"],
    ["1st", "first", "the first", "1^{st}"],
    ["22nd", "twenty-second", "第22"],
]

DIFFERENT = [
    [
        "-5",
        "5",
        "<5",
        ">5",
        "≤5",
        "≥5",
        "±5",
        "~5",
        "--5",
        "5!",
        "5%",
        "5 cm",
        "5 m",
        "5 M",
        "$5",
        "€5",
        "£5",
        "5°",
        "5th",
    ],
    [".5", "5", "50%", "50", "500", "0.05"],
    ["50%", "50", "0.5", "1/2%"],
    ["3,5", "35", "3.5", "3,500", "3, 500", "3,50"],
    ["1,0000", "10000", "1,00,000", "100000", "0,500", "500", "0.5"],
    ["C++", "C", "C#", "+C", "C+"],
    ["A+", "A", "A-", "a a", "A B", "A and B", "and B", "B", "A or B"],
    ["not red", "red", "no red", "infrared"],
    ["2:30", "230", "2.30", "2 30", "2:3"],
    ["1/2", "1-2", "12", "1:2", "1,2", "1 2", "1/0", "1/2/3", "2 1/2", "21/2"],
    ["x^2", "x2", "2x", "x^3", "x^{2y}", "x^2y"],
    ["x^{2}3", "x^23"],
    ["x²", "x2"],
    ["10₂", "102", "10²"],
    ["½2", "1/22"],
    ["2**3", "23", "2*3"],
    ["3-5", "35", "-2", "3+5", "8"],
    ["no", "none", "0", "n/a"],
    ["10 to 20", "10", "1020", "10-21", "10 20"],
    ["one two", "12", "3", "one and two", "1"],
    ["twenty twelve", "32", "2012"],
    ["one hundred and million", "100", "100000000"],
    ["two thousand hundred", "2100", "200000"],
    ["ten", "tennis", "often"],
    ["blue and red", "red and blue", "blue", "red"],
    ["A", "the", "an", "", ".", "...", "?", "!", "-", "+", "*", "**", "***", "=", "(", "()", "$", "%"],
    ["x = 7", "7", "y = 7"],
    ["=> 7", "> 7", "7"],
    ["$5 and $10", "5 and 10"],
    ["$5-$10", "5-10"],
    ["5 MW", "5 mW", "5 W"],
    ["5 pounds", "£5", "5 lb"],
    ["1. Red", "1 red", "red"],
    ["1e3", "1e-3", "e3", "103"],
    ["1e999999999", "1e999999998", "0"],
    [r"\frac{1}{2}", r"\frac{2}{1}", "12"],
    [r"\frac{x+1}{2}", "x+1/2"],
    [r"\overline{AB}", "AB"],
    ["n!", "n"],
    ["A + B", "A +B", "AB"],
    ["the answer is not red", "red"],
    ["0.1", "0.1000000000000000055511151231257827"],  # equal as floats
    ["9007199254740993", "9007199254740992"],  # equal as floats
    ["A. Red", "A", "Red", "B. Red"],  # no options offered: no letters
    ["((A))", "A"],
]

OPTION_QUESTIONS = [
    "Which colour? A) red B) blue",
    "Which colour? a) red, b) blue",
    "Which colour? (A) red (B) blue",
    "Which colour?\n(A)red\n(B)blue\nAnswer with the letter.",
    "Which colour?\nA. red\nB. blue",
    "Is it A. red or B. blue?",
    "A: red; B: blue",
    "Which? **A)** red **B)** blue",
    "Look at (A). Which colour? (A) red (B) blue",
]

NO_OPTION_QUESTIONS = ["", "What colour is the bar?", "What is f(a) + f(b)?", "Is plot (a) rising?", "B) red C) blue"]
NO_OPTION_QUESTIONS += ["Vitamin A. Why?", "What is the ratio A:B:C?", "Who is J. A. Smith?", "A bar and a bus?"]

LETTER_FORMS = [
    "A",
    "a",
    "(A)",
    "(a)",
    "A.",
    "A)",
    "a)",
    "[A]",
    "Option A",
    "option (a)",
    "**A**",
    r"\boxed{A}",
    "(A).",
]
LETTER_FORMS += ["The answer is A.", "The correct option is A", "Answer: (A)"]
LETTER_AND_TEXT_FORMS = [
    "A. Red",
    "(A) Red",
    "A) red",
    "(A)Red",
    "A: red",
    "A - Red",
    r"\text{(A) Red}",
    "Option A: red",
]
LETTER_AND_TEXT_FORMS += ["Answer: (A) red.", "A. The red bar", "**A.** Red"]
TEXT_FORMS = ["Red", "the red", "red.", "The answer is red"]


def pairs(groups: list[list[str]]) -> list[tuple[str, str]]:
    return [pair for group in groups for pair in combinations(group, 2)]


@pytest.mark.parametrize(("one", "other"), pairs(SAME))
def test_the_same_answers_share_a_key(one: str, other: str) -> None:
    assert answer_key(one) == answer_key(other)


@pytest.mark.parametrize(("one", "other"), pairs(DIFFERENT))
def test_different_answers_have_different_keys(one: str, other: str) -> None:
    assert answer_key(one) != answer_key(other)


def test_each_row_of_same_answers_is_its_own_answer() -> None:
    keys = [answer_key(row[0]) for row in SAME]
    twice = {key for key in keys if keys.count(key) > 1}
    assert twice == {"text:red"}  # its row is split in three for length


def test_keys_are_typed() -> None:
    assert [answer_key(text) for text in ("½", "5cm", "Red.", "<5", "$5", "50%", "")] == [
        "number:1/2",
        "number:5 cm",
        "text:red",
        "number:<5",
        "number:5 $",
        "number:50 %",
        "text:",
    ]


@pytest.mark.parametrize("question", OPTION_QUESTIONS)
@pytest.mark.parametrize("answer", [*LETTER_FORMS, *LETTER_AND_TEXT_FORMS, *TEXT_FORMS])
def test_an_option_is_picked_by_letter_or_by_text(question: str, answer: str) -> None:
    assert answer_key(answer, question) == "option:A"


@pytest.mark.parametrize("question", OPTION_QUESTIONS)
@pytest.mark.parametrize("answer", ["A. Blue", "C", "C. green", "Red and taupe", "", "AB"])
def test_an_answer_that_picks_no_option_keeps_its_own_key(question: str, answer: str) -> None:
    assert answer_key(answer, question) == answer_key(answer)


@pytest.mark.parametrize("question", OPTION_QUESTIONS)
@pytest.mark.parametrize(
    "answer",
    [
        "A, B",
        "B, A",
        "A and B",
        "(A) and (B)",
        "Both A and B.",
        "a & b",
        "Options A and B",
        "A. red, B. blue",
        "Red and blue",
    ],
)
def test_several_options_are_a_set(question: str, answer: str) -> None:
    assert answer_key(answer, question) == "option:A,B"


HEDGES = ["A or B", "A) or B)", "A/B", "either A or B", "red or blue", "Is it A? Or B?", "A, maybe B", "not A"]
HEDGES += ["(A) is wrong; B", "A. No, B.", "A is incorrect", "A or perhaps B", "A oder B", "A或B"]


@pytest.mark.parametrize("question", OPTION_QUESTIONS)
@pytest.mark.parametrize("answer", HEDGES)
def test_an_answer_that_does_not_commit_itself_has_no_key(question: str, answer: str) -> None:
    assert answer_key(answer, question) is None


def test_option_b_may_begin_with_an_article() -> None:
    assert answer_key("B. a blue car", OPTION_QUESTIONS[0]) == "option:B"


def test_options_are_compared_as_answers() -> None:
    question = "How long? A) 5 cm B) 10 cm C) 0.5 m"
    assert answer_key("ten centimetres", question) == answer_key("B", question) == "option:B"
    assert answer_key("C. 1/2 m", question) == "option:C"
    assert answer_key("5 m", question) == "number:5 m"


def test_a_letter_wins_over_an_option_that_reads_like_a_letter() -> None:
    question = "Which letter? A) B B) A"
    assert answer_key("A", question) == "option:A"
    assert answer_key("A. B", question) == "option:A"


def test_two_options_with_one_text_are_picked_by_letter_only() -> None:
    question = "Which? A) red B) red"
    assert answer_key("red", question) == "text:red"
    assert answer_key("B", question) == "option:B"


def test_lettered_options_are_read() -> None:
    assert lettered_options("Pick a) red, b) blue, or c) 12.0?") == {
        "A": "text:red",
        "B": "text:blue",
        "C": "number:12",
    }
    assert lettered_options("Which is larger, (A), (B) or (C)?") == {"A": "", "B": "", "C": ""}


@pytest.mark.parametrize("question", NO_OPTION_QUESTIONS)
def test_other_questions_offer_no_options(question: str) -> None:
    assert lettered_options(question) == {}
    assert answer_key("A. Red", question) != answer_key("A", question)


# Any text

FRAGMENTS = [*"()[]{}$\\*_`\"'.,;:?!+-−/^%°059eExX×=<>~≤½²₂ \n\tAaBİıſßΐ٣１㊿ﷺ\x00\ud800\u0301\u200b"]
FRAGMENTS += [
    "\\frac",
    "\\boxed{",
    "\\text{",
    "\\sqrt{",
    "one",
    "hundred",
    " and ",
    " thousand",
    " million",
    " mİllion",
]
FRAGMENTS += [
    "the ",
    "a ",
    "answer: ",
    "the answer is ",
    "10^",
    " per cent",
    "cm",
    "US$",
    "1,000",
    "A) ",
    "(B) ",
    "e999999",
]
ANY_TEXT = st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS), max_size=60).map("".join))
PLAIN_TEXT = st.lists(
    st.sampled_from([*"abcdxyz0123456789.,:%$+-/()<>", "the", "red", "twelve", "percent", "answer"]), max_size=12
).map(" ".join)


@settings(max_examples=400, deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_any_text_has_a_typed_key(answer: str, question: str) -> None:
    for key in (answer_key(answer), answer_key(answer, question), answer_key(answer, f"A) red B) {question}")):
        assert key is None or (key.startswith(("text:", "number:", "option:")) and "\n" not in key)


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_white_space_around_and_between_does_not_matter(answer: str) -> None:
    assert answer_key(f" \n{answer.replace(' ', '  ')}\t") == answer_key(answer)


@settings(max_examples=200, deadline=None)
@given(PLAIN_TEXT)
def test_letter_case_does_not_matter(answer: str) -> None:
    assert answer_key(answer.upper()) == answer_key(answer) == answer_key(answer.title())


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_a_number_has_one_key_however_written(numerator: int, denominator: int) -> None:
    assert answer_key(f"{numerator}") == answer_key(f"{numerator:,}") == answer_key(f"{numerator}.00")
    assert answer_key(f"{numerator}/{denominator}") == answer_key(rf"$\frac{{{numerator}}}{{{denominator}}}$")
    assert answer_key(f"{numerator}/{denominator}") == answer_key(f"{7 * numerator}/{7 * denominator}")


def spelled(n: int) -> str:
    for word, scale in (("million", 10**6), ("thousand", 1000), ("hundred", 100)):
        if n >= scale:
            rest = f" and {spelled(n % scale)}" if n % scale else ""
            return f"{spelled(n // scale)} {word}{rest}"
    teens = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    ones = f"{teens} seventeen eighteen nineteen".split(" ")
    tens = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    return ones[n] if n < 20 else tens[n // 10] + (f"-{ones[n % 10]}" if n % 10 else "")


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.integers(0, 1000), st.integers(0, 10**9 - 1)))
def test_a_number_may_be_spelled_out(n: int) -> None:
    assert answer_key(spelled(n)) == answer_key(spelled(n).replace(" and ", " ").title()) == f"number:{n}"


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(["one", "ten", "twenty", "zero", "hundred", "thousand", "million", "and", "5"])))
def test_any_number_words_are_read_or_left(words: list[str]) -> None:
    for text in (" ".join(words), "-".join(words), "minus " + " ".join(words)):
        assert answer_key(text).startswith(("text:", "number:"))


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_two_numbers_have_two_keys(one: int, other: int) -> None:
    assume(one != other)
    assert answer_key(f"{one}") != answer_key(f"{other}")
    assert answer_key(f"{one} cm") != answer_key(f"{other} cm")


HUNDRED_KB = 100_000
KILLERS = [
    *("(", "[", "{", "$", "\\", "*", "_", "`", "1", "9,", "1,000,", ". ", "!", "-", "1/", "^", "a", "a ", " ", "\n"),
    *("\\frac{", "\\boxed{", "\\text{x}", "{}", "**a", "*a*", "'\"", "one hundred and ", "twenty-", "the ", "answer: "),
    *(
        "\u0301",
        "\u0301\u0323",
        "ﷺ",
        "½",
        "²",
        "\u200b",
        "🎉",
        "\ud800",
        "A) ",
        "(A) (B) ",
        "A. B. ",
        "=",
        "5 cm ",
        "10^",
        "1e9",
    ),
]


@pytest.mark.parametrize("unit", KILLERS)
def test_huge_and_hostile_text_finishes(unit: str) -> None:
    huge = (unit * HUNDRED_KB)[:HUNDRED_KB]
    for length in (200, 255, 256, 257, 4096, HUNDRED_KB):  # around both caps, where parsing is at its most expensive
        text = huge[: length - 1] + "x"
        key = answer_key(text, text)
        assert key is None or key.startswith(("text:", "number:", "option:"))
        assert answer_key("7" + text, "X) 1 Y) 2") == answer_key("7" + text)


def test_beyond_the_cap_answers_are_compared_as_text() -> None:
    assert answer_key("Red  " * 1000) == answer_key("red " * 1000) != answer_key("red " * 999)
    assert answer_key("1" * 5000) != answer_key("1" * 5000 + ".0")  # int() refuses so many digits
    assert answer_key(" " * HUNDRED_KB + "12") == "number:12"


@pytest.mark.parametrize("text", ["1e999999999", "1e-999999999", "10^999999999", "5 × 10^" + "9" * 200, "-1e301 cm"])
def test_powers_too_large_to_write_stay_text(text: str) -> None:
    assert answer_key(text).startswith("text:")


def test_the_largest_numbers_are_written_exactly() -> None:
    assert answer_key("1e300") == f"number:{10**300}"
    assert answer_key("9" * 240 + "e300 trillion").startswith("number:")


# Votes


def test_majority_of_five_with_one_unreadable() -> None:
    vote = majority(["b", "a", None, "a", "a"])
    assert vote.answer == "a"
    assert vote.members == (1, 3, 4)
    assert vote.fraction == pytest.approx(3 / 5)  # N counts the unreadable one
    assert vote.entropy == pytest.approx(-(3 / 4) * math.log(3 / 4) - (1 / 4) * math.log(1 / 4))  # H does not
    assert vote.entropy == pytest.approx(0.5623351446)
    assert vote.readable == 4


def test_ties_go_to_the_answer_sampled_first() -> None:
    assert majority(["b", "a", "a", "b"]).answer == "b"
    assert majority([None, "z", "y", "x"]).members == (1,)
    assert majority(["c", "a", "b", "b", "a"]).answer == "a"


def test_one_voice() -> None:
    assert majority(["a", "a"]) == Vote("a", (0, 1), 1.0, 0.0, 2)
    assert majority([None, "a"]) == Vote("a", (1,), 0.5, 0.0, 1)
    assert math.copysign(1, majority(["a"]).entropy) == 1  # not -0.0


@pytest.mark.parametrize("keys", [[], [None], [None, None, None]])
def test_no_readable_vote(keys: list[str | None]) -> None:
    assert majority(keys) == Vote(None, (), 0.0, 0.0, 0)
    assert vote_shares(keys) == {}


def test_entropy_of_five_answers_two_two_one() -> None:
    # 2 · (2/5) ln(5/2) + (1/5) ln 5 = 0.8 · 0.9162907 + 0.2 · 1.6094379
    assert majority(["a", "b", "a", "b", "c"]).entropy == pytest.approx(1.0549201680)


def test_shares_are_of_all_trajectories() -> None:
    assert vote_shares(["b", "a", None, "a"]) == {"b": 0.25, "a": 0.5}


@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=9))
def test_vote_and_shares_agree(keys: list[str | None]) -> None:
    vote, shares = majority(keys), vote_shares(keys)
    assert vote.fraction == max(shares.values(), default=0.0)
    assert shares.get(vote.answer or "", 0.0) == vote.fraction
    assert {keys[i] for i in vote.members} <= {vote.answer}
    assert 0.0 <= vote.entropy <= math.log(max(len(shares), 1)) + 1e-12


def test_a_group_votes_by_meaning() -> None:
    group = ["12", "the answer is **12.0**", "thirteen", r"\boxed{12}", None]
    vote = majority([None if text is None else answer_key(text) for text in group])
    assert (vote.answer, vote.members) == ("number:12", (0, 1, 3))
