"""When two answers are the same, and the majority vote of a group of answers (arXiv 2601.05877).

`answer_key` gives an answer its canonical, typed key (`number:1/2`, `number:5 cm`, `option:A`, `text:red`). Two answers
to a question are the same if and only if their keys are equal. This makes sameness transitive, as a vote needs it; a
comparison of pairs might not. In doubt two answers stay different: a lost vote is noise, but a wrong answer that is
merged with the right one earns its reward. An answer that does not commit itself, such as `A or B`, has no key.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ireasoner.method.expressions import arithmetic, expression
from ireasoner.method.numerals import TABLES
from ireasoner.method.options import marked_options, picked
from ireasoner.method.quantities import is_unit, quantity, tight, unit_name
from ireasoner.method.wording import MAX_ANSWER_LENGTH, MAX_QUESTION_LENGTH, bare, commits, peel, without_reason


@dataclass(frozen=True, slots=True)
class Vote:
    """The majority vote of a group of N trajectories; see `majority`."""

    answer: str | None  # the key of the majority answer; None if no trajectory has a vote
    members: tuple[int, ...]  # G, the indices of the trajectories with this answer
    fraction: float  # |G| / N; N includes trajectories without a vote
    entropy: float  # H, in nats, of the distribution of the votes
    readable: int  # number of votes


def majority(keys: Sequence[str | None]) -> Vote:
    """The majority group G and the entropy H of a group's answers (arXiv 2601.05877).

    `keys` are the answer keys of the trajectories in the order of sampling. None stands for an unreadable one, or for
    an answer that does not commit itself; it counts in N but has no vote. A tie goes to the key that was sampled
    first. If there is no vote, there is no answer and no member, and fraction and entropy are 0.
    """
    counts = Counter(key for key in keys if key is not None)
    if not counts:
        return Vote(answer=None, members=(), fraction=0.0, entropy=0.0, readable=0)
    answer = max(counts, key=counts.__getitem__)  # max takes the first, and counts are in the order of sampling
    members = tuple(i for i, key in enumerate(keys) if key == answer)
    readable = counts.total()
    entropy = math.fsum(count / readable * math.log(readable / count) for count in counts.values())
    return Vote(answer, members, len(members) / len(keys), entropy, readable)


def vote_shares(keys: Sequence[str | None]) -> dict[str, float]:
    """p̂(a) = count(a) / N of each answer key, where N includes those without a vote (None) (arXiv 2601.05877)."""
    return {key: count / len(keys) for key, count in Counter(key for key in keys if key is not None).items()}


@lru_cache(4096)
def answer_key(answer: str, question: str = "") -> str | None:
    """The canonical key of `answer`: two answers to one question are the same if and only if their keys are equal.

    Numbers, dates, times and formulas have one key for each exact value and unit: `12`, `12.0` and `twelve` share it,
    `50%`, `50` and `0.5` do not. Other answers are compared as text, without case, leading article, markup and final
    punctuation. If `question` offers options, `A`, `(A)`, `A. Red` and the text of option A share a key, and `A, C` and
    `C and A` do. What only repeats the question is left out: to "How many circles are there?", `5 circles` is `5`.

    Returns:
        The key, or None if the answer does not commit itself: `A or B`, `not A`, `3, maybe 4`, `I cannot tell`.
        Any string is read in bounded time, and none raises an error.
    """
    plain = bare(answer)
    if len(plain) > MAX_ANSWER_LENGTH:
        return f"text:{plain.casefold()}"
    options, asked = lettered_options(question), question[:MAX_QUESTION_LENGTH]
    peeled = without_reason(peel(plain))
    value = _value_alone(peeled, asked, options)
    offered = options or (_IN_THE_IMAGE if _ASKS_FOR_OPTION.search(asked) else {})
    for text in dict.fromkeys((peeled, value)) if offered else ():
        marks = picked(text, offered, _typed_key)
        if marks:
            return f"option:{marks}"
        if marks is None and options:
            return None
    key = _typed_key(value)
    counted = _without_noun(key, asked)
    return counted if counted != key or commits(plain, asked) else None


@lru_cache(256)
def lettered_options(question: str) -> dict[str, str]:
    """The options that a question offers: from letter or number to the key of the option's text, "" for one without.

    See `marked_options` for how options may be marked. Reads any text and never raises.
    """
    return {mark: _key_of_text(text) if text.strip(" .,;:?") else "" for mark, text in marked_options(question).items()}


def _key_of_text(text: str) -> str:
    return _typed_key(peel(bare(text)))


# --- what an answer says beside its value -----------------------------------------------------------------------------

_BRACKETED = re.compile(r"(?P<head>[^()]+?) ?\((?P<inside>[^()]+)\)")
_COPULA = re.compile(
    r"(?P<subject>[^\W\d_][^=:]*?)"
    r"(?: (?:is|are|was|were|equals?|es|ist|est|é|è|beträgt)(?: equal to)? | ?[=:] ?|等于|是|为)(?P<rest>.+)",
    re.IGNORECASE,
)
_GENERIC = frozenset(TABLES["generic"].split())
_IN_UNIT = re.compile(r"\bin ((?:square |cubic )?[^\W\d_]+)\s*[?.]?$", re.IGNORECASE)
_COUNTS = re.compile(
    r"\b(?:how (?:many|much)|number of|what (?:percent(?:age)?|fraction)|combien|wie ?viele?|cu[aá]nt[oa]s|"
    r"quant[ie]|quant[oa]s)\b|多少|几",
    re.IGNORECASE,
)


def _value_alone(text: str, question: str, options: Mapping[str, str]) -> str:
    """The value in an answer without a calculation that gives it, or a subject that the question names."""
    if (match := _BRACKETED.fullmatch(text)) and _same_value(match["inside"], match["head"]):
        text = match["head"]
    *sides, last = text.split("=")
    if sides and all(_same_value(side, last) for side in sides):  # "60 - 45 = 15"
        return last.strip()
    match = _COPULA.fullmatch(text)
    if not match:
        return text
    subject, rest = _words(match["subject"]), peel(match["rest"])
    if subject <= _GENERIC and _numeric(rest):
        return rest
    # To "Which bar is 20?", "the red bar is 20" is not "20".
    chosen = re.search(rf"(?i)\b(?:or (?:the |an? )?{re.escape(rest)}|{re.escape(rest)} or)\b", question)
    repeats = _words(rest) <= _words(question) and not chosen and _typed_key(rest) not in options.values()
    return rest if _asks_for(match["subject"], question) and not repeats else text


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.casefold()))


def _asks_for(subject: str, question: str) -> bool:
    """Whether a question is about this subject: "the car", but not one of two ("the car or the bus") or a bare name."""
    name = re.escape(re.sub(r"^(?:the|an?) ", "", subject.strip(), flags=re.IGNORECASE))
    if not name.isascii() and subject in question:
        return True
    if not re.search(rf"(?i)(?<!\w){name}(?!\w)", question):
        return _words(subject) <= _words(question) | _GENERIC and len(_words(subject)) > 1
    if re.search(
        rf"(?i)\b(?:and|or|than|between|vs\.?) (?:the )?{name}(?!\w)|(?<!\w){name},? (?:and|or|than|vs)\b", question
    ):
        return False
    return (
        len(subject) > 3
        or re.search(rf"(?i)(?:find|is|of|for|determine|calculate|=) (?:the )?{name}(?!\w)", question) is not None
    )


def _same_value(calculation: str, value: str) -> bool:
    """Whether `60 - 45`, `= 60 - 45` and `60 - 45 = 15` give `15`, or "five" is `5`."""
    number = _numeric(value)
    results = [arithmetic(side) or _numeric(side.strip()) for side in calculation.split("=") if side.strip()]
    return number is not None and bool(results) and all(result == number for result in results)


def _without_noun(key: str, question: str) -> str:
    """`number:5` for `number:5 circles` if the question is how many circles there are, or asks for it in circles."""
    number, _, unit = key.partition(" ")
    if not key.startswith("number:") or not unit:
        return key
    if (measured := _IN_UNIT.search(question)) and _typed_key(f"1 {measured[1]}") == f"number:1 {unit}":
        return number
    if not (asked := _COUNTS.search(question)):
        return key
    phrase = re.split(r"[?\n:;.]", question[asked.start() :], maxsplit=1)[0]
    words = re.findall(r"[^\W\d_]+", phrase)[:12]
    names = {unit_name(word) for word in words} | {word.casefold() for word in words}
    nouns = re.findall(r"[^\W\d_]+|[^\w\s]", unit)
    known = all(
        {noun, noun + "s", noun.removesuffix("s")} & names or (not noun.isascii() and noun in phrase) for noun in nouns
    )
    return number if known else key


# Options that only the image shows have letters, but texts that are not known.
_IN_THE_IMAGE = dict.fromkeys("ABCDEFGH", "")
_ASKS_FOR_OPTION = re.compile(
    r"\b(?:options?|choices?|choose|select|which of the following|opci[óo]n(?:es)?|"
    r"antwortmöglichkeit(?:en)?)\b|选项|选择|下列|以下",
    re.IGNORECASE,
)

# --- types -----------------------------------------------------------------------------------------------------------

# "A" may be a name rather than an article: in "A and B", "A minus" or "A B C" it stays.
_ARTICLE = re.compile(
    r"^(?:the (?=\S)|(?:el|la|los|las|le|les|der|die|das|il|lo) (?=\d)|"
    r"an? (?!(?-i:and|or|to|is|plus|minus|than|vs)\b)(?=[^\W\d_]{2}))",
    re.IGNORECASE,
)
# In two letters of which either case is a chemical symbol or a genotype, case tells: CO and Co, AA and Aa.
_CASED = re.compile(r"(?P<letter>[A-Za-z])(?i:(?P=letter))|CO|CS|CU|HF|HO|NI|NP|OS|PB|PO|SB|SC|SN|BI")
_BARE_PICK = re.compile(
    r"(?:option |choice |故?[选選]择? ?)?[(\[]?([a-z])[)\]]?[.:]?"
    r"(?: is (?:correct|right|the (?:correct |right )?(?:answer|option|choice)))?",
    re.IGNORECASE,
)
_LIST = re.compile(r"(?P<open>[(\[{]?)(?P<items>[^()\[\]{}]*,[^()\[\]{}]*)(?P<close>[)\]}]?)")
_WITH_UNIT = re.compile(r"(?P<value>.*?[\dπ)]) ?(?P<unit>°|(?!π|pi\b)[^\W\d_]+(?:\^[23])?)")


def _numeric(text: str) -> str | None:
    """The canonical form of a text that is all number, quantity or formula, else None."""
    if re.search(r"sqrt|π|\bpi\b", text):
        if (match := _WITH_UNIT.fullmatch(text)) and is_unit(match["unit"]):
            value = expression(match["value"])
            return value and f"{value} {unit_name(match['unit'])}"
        return expression(text)
    measured = quantity(text)
    # `12x` is a product, but `12 m` is not.
    formula = measured is None or (re.search(r"\d[a-z]$", text) and text[-1] not in "mgshltdk")
    return (expression(text) if formula else None) or measured


def _typed_key(text: str) -> str:
    """The key of an answer from `bare`, leaving options aside: as a number if all of it is one, else as text."""
    if len(text) > MAX_ANSWER_LENGTH:
        return f"text:{text.casefold()}"
    text = re.sub(r"(?<=\d) ?[xX*×] ?(?=\d)", "×", text)
    whole = _numeric(text)  # with its article: "a third" is no ordinal
    text = peel(_ARTICLE.sub("", text))
    if (number := whole or _numeric(text)) is not None:
        return unicodedata.normalize("NFKC", f"number:{number}")
    if match := _LIST.fullmatch(text):
        items = [_numeric(item.strip()) or _plain(item.strip()) for item in match["items"].split(",")]
        return f"text:{match['open']}{','.join(items)}{match['close']}"
    if match := _BARE_PICK.fullmatch(text):
        text = match[1]  # an option that only the image shows
    return f"text:{_plain(text)}"


def _plain(text: str) -> str:
    folded = text if _CASED.fullmatch(text) else tight(text).casefold()
    return unicodedata.normalize("NFKC", folded)  # casefold may undo the normal form
