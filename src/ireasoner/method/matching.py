"""Whether an answer is right, as the benchmarks judge it.

The vote takes two answers for the same only if their keys are equal (`ireasoner.method.answers`): in doubt they stay
apart. A benchmark is more lenient with an answer beside the true one, and this module judges as it does. Such a
judgement need not be transitive, so that no vote is made of it: training uses it where a label says what is true.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from string import ascii_uppercase

import numpy as np

from ireasoner.method.answers import answer_key, lettered_options
from ireasoner.method.latex import plain_characters, without_latex
from ireasoner.method.quantities import is_unit
from ireasoner.method.types import Match
from ireasoner.method.wording import MAX_ANSWER_LENGTH

TOLERANCE = 0.05  # of ChartQA
ROUNDING = 1e-6  # numbers that agree to six digits are the same, as in Math-Verify
ANLS_THRESHOLD = 0.5
MAX_WORDS = 12  # of a number with its unit, of which
MAX_UNIT_WORDS = 4  # are the unit
LONGEST_EDITED = 2000  # characters; longer texts are compared as a whole, because edits take quadratic time


def match_value(
    answer: str, accepted: Sequence[str], question: str = "", match: Match = "exact", choices: Sequence[str] = ()
) -> float:
    """How right an answer is, in [0, 1]; never raises.

    - `exact`: 1 for the same answer as one of those accepted, by the rules of `same_answer`.
    - `relaxed`: of a number, 1 if it differs from an accepted one by at most 5 % of that, as in ChartQA (Masry et al.
      2022, arXiv 2203.10244, section 5.1). As in the code that evaluates it (google-research/pix2struct, which
      lmms-eval and VLMEvalKit copy), `50%` is the number 0.5, and a year is a number like any other. Otherwise `exact`.
    - `anls`: the largest normalised Levenshtein similarity to an accepted answer, and 0 if that is below 0.5, without
      regard to case and to the width of blanks, as in DocVQA and InfographicVQA (Biten et al. 2019, arXiv 1905.13648).
    - `vqa`: of the n of ten people who gave this answer, the mean of min(1, n / 3) over all ways to leave one person
      out, as in VQA and TextVQA (Antol et al. 2015, arXiv 1505.00468). With fewer than four people it is `exact`.

    Args:
        answer: as it was read in a trajectory.
        accepted: the answers that are right, for `vqa` one for each person.
        question: may offer lettered options.
        match: the metric.
        choices: the texts of the options, in the order of their letters, where they are known; otherwise they are
            looked for in the question.
    """
    if match == "anls":
        return max(_edit_similarity(answer, true) for true in accepted)
    right = [same_answer(answer, true, question, choices, within=match == "relaxed") for true in accepted]
    count, people = sum(right), len(right)
    if match != "vqa" or people < 4:
        return float(count > 0)
    return (count * min(1.0, (count - 1) / 3) + (people - count) * min(1.0, count / 3)) / people


def same_answer(
    answer: str, true: str, question: str = "", choices: Sequence[str] = (), *, within: bool = False
) -> bool:
    """Whether an answer is the true one, leniently.

    Answers with the same key are. Beyond that, a unit, sign of currency or noun that only one of them writes does not
    matter (`140°` and `140`, but neither `140 cm` and `140 m` nor `50 %` and `0.5`), and neither do articles and
    punctuation within a text, nor the seventh digit of a number. Of several options, an answer picks the only one that
    it is the same as. A hedge between answers is right only where the true answer has the same words.

    Args:
        within: take numbers that differ by at most 5 % of the true one for the same, unless the question offers
            options.
    """
    key, true_key = answer_key(answer, question), answer_key(true, question)
    if key is None:
        return answer.casefold().split() == true.casefold().split()
    if key == true_key:
        return True
    if options := _options(question, choices):
        picked, right = (_picked(text, of, options) for text, of in ((answer, key), (true, true_key)))
        if picked or right:
            return picked == right
    near = _near(answer, true, TOLERANCE) if within else None
    return _alike(answer, true) if near is None else near


def _options(question: str, choices: Sequence[str]) -> Mapping[str, str]:
    """The texts of the options by letter; of those that the question alone offers, as they are in their keys."""
    offered = lettered_options(question)
    if choices and len(offered) in (0, len(choices)):  # a long question is not searched for options
        return dict(zip(offered or ascii_uppercase, choices, strict=False))
    return {letter: key.partition(":")[2] for letter, key in offered.items()}


def _picked(text: str, key: str | None, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer picks by its key, or else of the only one that it is like."""
    if key is not None and key.startswith("option:"):
        return key.removeprefix("option:")
    like = [letter for letter, option in options.items() if option and _alike(text, option)]
    return like[0] if len(like) == 1 else None


# --- what only one of two answers writes -----------------------------------------------------------------------------

_CURRENCY = re.compile(r"^(?P<minus>-?) ?(?:us\$|(?:usd|eur|gbp|inr|rs\.?)(?!\w)|[$€£¥₹]) ?(?=[\d.])", re.IGNORECASE)
_SIGN = re.compile(r"(?<=[^\W_]|[)}%]) ?[°%‰$€£¥₹¢'\"]$")
_NAME = r"°?[^\W\d_π]+(?:\^?-?\d)?"
_UNIT = re.compile(rf"{_NAME}(?:[ /·*-]{_NAME})*")
_GLUED = re.compile(rf"(.*[\d)}}π])({_NAME}(?:[/·*-]{_NAME})*)")
_PI = re.compile(r"(?<![^\W\d_])pi(?![^\W\d_])")
_FORMULA = re.compile(r"(?=.*\d)(?:sqrt|[π\W\d_])+")  # such as 2*sqrt(3), without variables
# Words after a number that change its value, or join it with something else.
_CHANGING = (
    "hundred thousand million billion trillion dozen hundreds thousands millions billions bn mn tn mio mrd lakh lakhs "
    "crore crores hundert tausend millionen milliarde milliarden mil mille millones milliard milliards миллион "
    "миллиона миллионов тысяча тысячи тысяч pi sqrt root squared cubed factorial half halves third thirds quarter "
    "quarters fourth fourths fifth fifths sixth sixths eighth eighths tenth tenths hundredth hundredths thousandth "
    "thousandths st nd rd th am pm bc bce minus plus and or to by not no nor und oder bis et ou y o e и или до sin cos "
    "tan log ln below ago before after over medio media demi halb"
)
_NO_UNITS = frozenset(_CHANGING.split())
_NO_UNITS_WITHIN = re.compile("[十百千万萬亿億兆半以或至到多余上下만억천백]")
_VARIABLES = re.compile(r"[A-Za-zΑ-ω]{1,3}")
_PUNCTUATION = re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_])|(?<=[^\W\d_])-(?=[^\W\d_]{2})|[.,;:!?\"](?![\d!])")
_VALUE = re.compile(r"number:(-?\d+(?:/\d+)?)")
_INNER_ARTICLE = re.compile(r"\b(?:a|an|the|An|The) (?=\w\w)")


def _alike(answer: str, true: str) -> bool:
    """`same_answer` of two answers for themselves, without options."""
    key, true_key = answer_key(answer), answer_key(true)
    if key is not None and key == true_key:
        return True
    if max(len(answer), len(true)) > MAX_ANSWER_LENGTH:
        return False
    (number, unit), (true_number, true_unit) = _without_unit(answer), _without_unit(true)
    if bool(unit) != bool(true_unit):
        bare = answer_key(number)
        return (bare is not None and bare == answer_key(true_number)) or _near(number, true_number, ROUNDING) is True
    near = _near(answer, true, ROUNDING)
    if near is not None or _is_number(answer) or _is_number(true):
        return near is True
    words = answer_key(_words_alone(answer))
    return words is not None and words == answer_key(_words_alone(true))


def _without_unit(answer: str) -> tuple[str, str]:
    """A number or formula without its unit, and the unit; the answer itself and "" if there is none."""
    text = without_latex(plain_characters(" ".join(answer.split()))).strip(" .,;:`*_")
    text = _PI.sub("π", text)
    if match := _CURRENCY.match(text):
        return match["minus"] + text[match.end() :], match[0].strip("- ")
    if match := _SIGN.search(text):
        return text[: match.start()], match[0].strip()
    words = text.split()
    if len(words) > MAX_WORDS:
        return text, ""
    splits = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(len(words) - 1, 0, -1)]
    glued = _GLUED.fullmatch(text)
    for number, unit in [glued.groups()] if glued else splits[:MAX_UNIT_WORDS]:
        if _is_unit(unit, glued is not None) and (_is_number(number) or _FORMULA.fullmatch(number)):
            return number, unit
    return text, ""


def _is_number(text: str) -> bool:
    return (answer_key(text) or "").startswith("number:")


def _is_unit(unit: str, glued: bool) -> bool:
    """Whether words after a number, or letters at once after it, say what it counts or measures, and do not change it.

    Few letters at once after a number may be variables, as in 2xy, and so may a single one after a blank.
    """
    words = re.split(r"\W", unit.casefold())
    if not _UNIT.fullmatch(unit) or _NO_UNITS.intersection(words) or _NO_UNITS_WITHIN.search(unit):
        return False
    name = re.sub(r"\^?-?\d$", "", unit)
    if not _VARIABLES.fullmatch(name):
        return True
    if len(name) == 1:
        return name in "mgshlLΩ" or (not glued and name in "NVAWJKCF")
    return not glued or is_unit(name)


def _words_alone(answer: str) -> str:
    """An answer without its articles, and without punctuation except in numbers, as VQA's evaluation removes them."""
    text = _PUNCTUATION.sub(" ", plain_characters(answer).replace("n't", "nt"))
    return " ".join(_INNER_ARTICLE.sub("", " ".join(text.split())).split())


# --- ChartQA's tolerance ---------------------------------------------------------------------------------------------


def _near(answer: str, true: str, tolerance: float) -> bool | None:
    """Whether two numbers differ by at most so much of the true one; None if they cannot be compared.

    That is if one of them is no number, or both write a unit, and not the same. By ChartQA's tolerance, a percentage is
    compared as a share.
    """
    (found, unit), (expected, true_unit) = (_number(text, tolerance == TOLERANCE) for text in (answer, true))
    if found is None or not expected:  # a share of nothing is nothing
        return None
    if unit != true_unit and unit and true_unit and answer_key(f"1 {unit}") != answer_key(f"1 {true_unit}"):
        return None
    return abs(found - expected) <= tolerance * abs(expected)


def _number(text: str, as_share: bool) -> tuple[float | None, str]:
    """The number that a text is, or None, and its unit; a percentage, if asked, as a share without a unit."""
    number, unit = _without_unit(text) if len(text) <= MAX_ANSWER_LENGTH else (text, "")
    match = _VALUE.fullmatch(answer_key(number) or "")
    try:
        value = float(Fraction(match[1])) if match else None
    except OverflowError:
        return None, unit
    return (value / 100, "") if value is not None and as_share and unit == "%" else (value, unit)


# --- edits -----------------------------------------------------------------------------------------------------------


def _edit_similarity(answer: str, true: str) -> float:
    """1 minus the Levenshtein distance over the length of the longer text, or 0 if that is below 0.5.

    The code of the competition, as lmms-eval and VLMEvalKit copy it, gives 0.5 for a text of which half is edited; the
    paper would give 0.
    """
    answer, true = (" ".join(text.lower().split()) for text in (answer, true))
    shorter, longer = sorted((answer, true), key=len)
    if answer == true:
        return 1.0
    if len(shorter) < ANLS_THRESHOLD * len(longer) or len(longer) > LONGEST_EDITED:
        return 0.0
    similarity = 1 - _edits(shorter, longer) / len(longer)
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def _edits(one: str, other: str) -> int:
    """The Levenshtein distance between two texts: the fewest insertions, deletions and substitutions of characters."""
    letters, places = np.array(list(other)), np.arange(len(other) + 1)
    row = places
    for count, letter in enumerate(one, 1):
        kept_or_replaced = np.minimum(row[1:] + 1, row[:-1] + (letters != letter))
        # Insertions add one for each place that they move on, which is a running minimum once the places are taken off.
        row = np.minimum.accumulate(np.concatenate([[count], kept_or_replaced]) - places) + places
    return int(row[-1])
