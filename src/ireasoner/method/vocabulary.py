"""The words, numbers and signs of a reasoning step, with one name for each meaning.

This takes no model, only the word lists in words.toml and rules. Both are for English; in other languages, words and
numbers have their own names.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from fractions import Fraction
from importlib import resources

from ireasoner.method.latex import plain_characters, without_latex
from ireasoner.method.numerals import NUMBER_WORD, SCALES, cardinal
from ireasoner.method.quantities import UNITS

WORDS = tomllib.loads(resources.files("ireasoner.method").joinpath("words.toml").read_text("utf-8"))

MAX_CHARACTERS, MAX_TOKENS = 400, 96  # a longer step is read up to there, to bound the time

# --- vocabulary ------------------------------------------------------------------------------------------------------

# IGNORECASE matches "ı" and "İ" with "i", but lower() keeps them, so that a word that was matched would be in no table.
_SIGNS = str.maketrans(
    {">": " more than ", "<": " less than ", "≥": " atleast ", "≤": " atmost ", "≠": " not ", "⊥": " perpendicular "}
    | {"+": " plus ", "÷": " divide ", "∠": " angle ", "Ω": " ohm ", "ı": "i", "İ": "I"}
)


def _stem(word: str) -> str:
    """The first six letters of a word without plural, -ed, -ing, final e and doubled consonant at the end."""
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-3] + "y" if word.endswith("ies") else word[:-1]
    ending = next((e for e in ("ing", "ed") if word.endswith(e) and len(word) >= len(e) + 3), "")
    word = word.removesuffix(ending)
    if ending and word[-1] == word[-2] and word[-1] not in "lsz":
        word = word[:-1]
    return (word[:-1] if len(word) > 3 and word.endswith("e") else word)[:6]


_SYNONYMS, _POLAR, _DIRECTED, _EXCLUSIVE = (
    [group.split() for group in WORDS[table]] for table in ("synonyms", "polar", "directed", "exclusive")
)


def _meanings() -> dict[str, tuple[str, int]]:
    """From a word or stem to the name of its meaning and its pole: 1, -1 for the opposite, or 0 for a light word."""
    words = {word: (word, 0) for word in WORDS["light"].split()}  # in the order of words.toml: the last one counts
    words |= dict.fromkeys(WORDS["negations"].split(), ("not", 0))
    words |= {word: (word, 1) for group in _EXCLUSIVE for word in group}
    words |= {word: (group[0], 1) for group in _SYNONYMS for word in group}
    for axis in _DIRECTED + _POLAR:
        words |= {word: (axis[0], 1 if i < axis.index("|") else -1) for i, word in enumerate(axis) if word != "|"}
    # A word has precedence over a stem, and among words with the same stem the first one gives the stem its meaning.
    return {_stem(word): meaning for word, meaning in reversed(words.items())} | words


_MEANINGS = _meanings()
DIRECTED_NAMES = {axis[0] for axis in _DIRECTED} | {"from"}
AXES = DIRECTED_NAMES | {axis[0] for axis in _POLAR}
_PHRASES = {phrase: word for word, phrases in WORDS["phrases"].items() for phrase in phrases}
KIND = {word: kind for kind, words in enumerate(_EXCLUSIVE) for word in words}

# --- reading a step --------------------------------------------------------------------------------------------------

_ENUMERATOR = re.compile(r"\A[\s>•(-]*(?:step ?\d{1,3} ?[.:)-]|(?:\d{1,2}|[a-z])[.)](?=\s))\s*", re.IGNORECASE)
_DIGITS = r"\d+(?:,\d{3})*(?:\.\d+)?"
NUMBER = re.compile(rf"-?(?:{_DIGITS}|\.\d+)")
_TOKEN = re.compile(rf"\d\d?:\d\d\b|(?:{_DIGITS}|\.\d+)(?:/\d+)?(?: ?%)?|[^\W\d_]+|[-°$€£¢≈~=,;:.?!]")
_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
_ORDINAL = {word: n for n, word in enumerate(_ORDINALS, 1)}
_PART = {"half": 2, "halve": 2, "quarter": 4} | {word: n for word, n in _ORDINAL.items() if n > 2}
_FACTOR = {"pair": 2, "couple": 2, "dozen": 12, "twice": 2, "double": 2, "thrice": 3, "triple": 3}


def _spelled(match: re.Match[str]) -> str:
    """The digits of a number in words; words that are not one number, as in "one two", become a number each."""
    words = re.split("[ -]", match[0].lower())
    whole = cardinal(words)
    return str(whole) if whole is not None else " ".join(w if w == "and" else str(cardinal([w])) for w in words)


def _clock(match: re.Match[str]) -> str:
    """The time of day, such as 10:15 for "quarter past 10"."""
    part, past = match[1].lower(), match[2].lower() == "past"
    if part.isdigit() and not past and "clock" not in match.string.lower():
        return match[0]  # "20 to 10" may be a range
    minutes = {"half": 30, "quarter": 15}.get(part) or int(part)
    minutes = 60 * int(match[3]) + (minutes if past else -minutes)
    return f"{(minutes // 60 - 1) % 12 + 1}:{minutes % 60:02}"


# Rewrites to one spelling for each meaning, in the order in which they are applied: "no one" before the number words,
# which become digits before anything that looks for digits; times ("half past 2") before fractions, and fractions
# ("two thirds") before ordinals ("the third bar").
_REWRITES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"\bno (?:other|second|further|such|matter|doubt)\b|\bnot (?:only|just)\b", " "),  # they do not negate the claim
    (r"\bmost (?:likely|probably)\b|\b(?:definitely|certainly|clearly|obviously)\b", " "),
    (r"\bnobody\b|\bno one\b", "no person"),
    (rf"({_DIGITS}) ({'|'.join(SCALES)})\b", lambda m: str(Fraction(m[1].replace(",", "")) * SCALES[m[2].lower()])),
    (rf"\b{NUMBER_WORD}(?:(?: and)?[ -]{NUMBER_WORD})*", _spelled),
    (r"\b(?:an? )?(half|quarter|\d\d?) (past|to) (\d\d?)\b", _clock),
    (rf"([$€£]) ?({_DIGITS})", r"\2 \1"),
    (
        rf"\b(?:(\d\d?)[ -]|an? (?=\w+(?: (?:of|as|that)\b|[.,;:]|$)))({'|'.join(_PART)})s?\b|\b(?:a )?half\b",
        lambda m: f"{m[1] or 1}/{_PART[(m[2] or 'half').lower()]}",
    ),
    (r"\b(\d+) (?:and )?([1-9]/[2-9])\b", lambda m: str(int(m[1]) + Fraction(m[2]))),
    (rf"(?<!^)(?<!\d )\b({'|'.join(_ORDINAL)})\b", lambda m: str(_ORDINAL[m[1].lower()])),
    (r"\b(\d+)(?:st|nd|rd|th)\b", r"\1"),
    (r"(?:\b(\d\d?) |\ba )?\b(pair|couple|dozen)s?\b", lambda m: str(int(m[1] or 1) * _FACTOR[m[2].lower()])),
    (r"\b(twice|thrice|double|triple)[ds]?\b", lambda m: f"{_FACTOR[m[1].lower()]} times"),
    (r"\bper ?cent\b|\bpct\b", "%"),
    (r"(?<=[a-z]{2})(?: - |-)(?=\d)", " "),  # "red - 7" is not minus seven
    (r"(?<=\d) (?:is|equals?|gives?|makes?|leaves?)(?: to)? (?=-?\d)", " = "),
    (r"(?:\b(?:to|on|at) the )?(?:\bf[au]rther )?\b(left|right)(?:[- ]hand)?(?: side)? (?:of|than)\b", r" \1of "),
    (r"\blower(?=[- ](?:left|right|half|part|row|edge|corner|end|cent))", "bottom"),
    (r"\bright (?=after|before|next|above|below|away|now)|\bf[au]rther (?=above|below)|-hand\b|'s\b", " "),
    (r"(?<=\bin |\bof |\bby |\bto )may\b|(?<=\bfrom )may\b", "inmay"),
    (r"\b(?:switched|turned) on\b|\bon(?= ?[.,;]| ?$)", "activated"),
    (r"n't\b|(?<=can)not\b|\bno longer(?! than)", " not "),
    (r"(?<=\d) ?[×·x] ?(?=\d)", " multiply "),
    (rf"\b(?:{'|'.join(_PHRASES)})\b", lambda m: _PHRASES[m[0].lower()]),
]
_COMPILED = [(re.compile(pattern, re.IGNORECASE), new) for pattern, new in _REWRITES]


def _tokens(step: str) -> list[str]:
    """The words, numbers and signs of a step in lower case, except for names of one capital letter ("angle A")."""
    text = plain_characters(step)[:MAX_CHARACTERS]
    text = re.sub(r"(?<=\d) ?\* ?(?=\d)", "×", without_latex(text).replace("\\Omega", "Ω")).translate(_SIGNS)
    text = _ENUMERATOR.sub("", " ".join(re.sub(r"[*_`#]", "", text).split()))
    for pattern, new in _COMPILED:
        text = pattern.sub(new, text)
    tokens = _TOKEN.findall(text)[:MAX_TOKENS]
    # A step may begin with the article "A", which no light word follows: "A bar is red", but "A is red".
    article = len(tokens) > 1 and tokens[0] == "A" and _MEANINGS.get(tokens[1].lower(), ("", 1))[1]
    names = [len(t) == 1 and t.isupper() and t != "I" and not (i == 0 and article) for i, t in enumerate(tokens)]
    return [t if name else t.lower() for t, name in zip(tokens, names, strict=True)]


def read_items(step: str) -> list[tuple[str, int]]:
    """The tokens of a step as (name, pole), where a pole of 0 claims nothing but may negate or end a phrase."""
    tokens = ["", *_tokens(step), ""]
    found: list[tuple[str, int]] = []
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if token in ("-", "minus"):
            operands = [bool(NUMBER.match(t)) or t == "°" or (len(t) == 1 and t.isalpha()) for t in (before, after)]
            found += [("minus", 1)] if all(operands) else []
        elif token == "=":
            found.append(("=", int(all(NUMBER.match(t) for t in (before, after)))))
        elif ":" in token and len(token) > 1:
            found.append((token, 1))  # a time of day
        elif NUMBER.match(token):
            top, _, bottom = token.rstrip(" %").replace(",", "").partition("/")
            value = Fraction(top) / (int(bottom or 1) or 1) / (100 if token.endswith("%") else 1)
            if before in ("-", "minus") and found[-1:] != [("minus", 1)]:
                value = -value
            found.append((str(value), 1))
            if value.numerator == 1 < value.denominator:  # "A is half of B" relates as "B is twice A" does
                found.append(("times", -1))
        else:
            word = UNITS.get(token, token) if NUMBER.match(before) and token not in ("in", "per") else token
            found.append(_MEANINGS.get(word) or _MEANINGS.get(_stem(word)) or (_stem(word), int(word.isalpha())))
    return found
