"""What a reasoning step claims, how similar two claims are, and how far the trajectories of a group agree.

The published step agreement (arXiv 2601.05877) compares steps by the cosine of mean token embeddings, which cannot see
numbers. Here, the similarity of two steps is the overlap of their words and numbers, and next to nothing if they
contradict each other: by another number, colour or place, by a negation or an opposite, or by exchanging the sides of
a relation. This takes no model, only the word lists in words.toml and rules. Both are for English; in other languages,
words and numbers are compared without them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import groupby, islice

import numpy as np
from numpy.typing import NDArray

from ireasoner.method.answers import NUMBER_WORD, SCALES, UNITS, WORDS, cardinal, plain_characters, without_latex
from ireasoner.method.content import clauses, statements

MAX_CHARACTERS, MAX_TOKENS = 400, 96  # a longer step is read up to there, to bound the time
MAX_QUESTION = 2000
CACHED = 4096  # claims, and similarities of two; enough for the groups of a step, and below 200 MB for any text
CONFLICT = 0.1  # what remains of the overlap of two steps that contradict each other
DOUBTFUL_CONFLICT = 0.25  # if they are also built differently, so that the contradiction may be a misreading
REPLACED_WORD = 0.5  # if they differ in a single word, which may be a synonym or another thing

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
_DIRECTED_NAMES = {axis[0] for axis in _DIRECTED} | {"from"}
_AXES = _DIRECTED_NAMES | {axis[0] for axis in _POLAR}
_PHRASES = {phrase: word for word, phrases in WORDS["phrases"].items() for phrase in phrases}
_KIND = {word: kind for kind, words in enumerate(_EXCLUSIVE) for word in words}
_PREPOSITIONS = frozenset(["of", "to", "in", "on", "at", "for", "from", "with", "as", "into", "onto", "by"])
_BREAKS = frozenset([*",;:.?!", "so", "but", "and", "because", "since", "while", "although", "though", "which", "who"])
_OPENERS = frozenset(["is", "are", "was", "were", "there", "we", "has", "have", "from", ","])  # end a fronted phrase

# --- reading a step --------------------------------------------------------------------------------------------------

_ENUMERATOR = re.compile(r"\A[\s>•(-]*(?:step ?\d{1,3} ?[.:)-]|(?:\d{1,2}|[a-z])[.)](?=\s))\s*", re.IGNORECASE)
_DIGITS = r"\d+(?:,\d{3})*(?:\.\d+)?"
_NUMBER = re.compile(rf"-?(?:{_DIGITS}|\.\d+)")
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


# The announcement of an answer, such as "Therefore, the correct option is".
_ANNOUNCEMENT = re.compile(
    r"\A\W*(?:(?:so|thus|hence|therefore|then|finally|and)\b\W*)*(?:(?:the|my|our) )?(?:(?:correct|final|right|best) )*"
    r"(?:answer|option|choice|result|solution|conclusion)\b(?: (?:is|would be|must be|should be)\b| ?[:=])+\W*",
    re.IGNORECASE,
)

# Rewrites to one spelling for each meaning, in the order in which they are applied: "no one" before the number words,
# which become digits before anything that looks for digits; times ("half past 2") and "half a dozen" before fractions,
# and fractions ("two thirds") before ordinals ("the third bar").
_REWRITES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"\bno (?:other|second|further|such|matter|doubt)\b|\bnot (?:only|just)\b", " "),  # they do not negate the claim
    (r"\bmost (?:likely|probably)\b|\b(?:definitely|certainly|clearly|obviously)\b", " "),
    (r"\bnobody\b|\bno one\b", "no person"),
    (r"\bhalf a dozen\b", "6"),
    (rf"({_DIGITS}) ({'|'.join(SCALES)})\b", lambda m: str(Fraction(m[1].replace(",", "")) * SCALES[m[2].lower()])),
    (rf"\b{NUMBER_WORD}(?:(?: and)?[ -]{NUMBER_WORD})*", _spelled),
    (r"\b(?:an? )?(half|quarter|\d\d?) (past|to) (\d\d?)\b", _clock),
    (r"\b(\d+) dollars? and (\d\d) cents?\b", r"$\1.\2"),
    (rf"([$€£]) ?({_DIGITS})", r"\2 \1"),
    (
        rf"\b(?:(\d\d?)[ -]|an? (?=\w+(?: (?:of|as|that)\b|[.,;:]|$)))({'|'.join(_PART)})s?\b|\b(?:a )?half\b",
        lambda m: f"{m[1] or 1}/{_PART[(m[2] or 'half').lower()]}",
    ),
    (r"\b(\d+) (?:and )?([1-9]/[2-9])\b", lambda m: str(int(m[1]) + Fraction(m[2]))),
    (rf"(?<!^)(?<!\d )\b({'|'.join(_ORDINAL)})\b", lambda m: str(_ORDINAL[m[1].lower()])),
    (r"\b(\d+)(?:st|nd|rd|th)\b", r"\1"),
    (r"\b1 (?:in|out of) (?=\d{1,3}\b)", "1/"),
    (r"(?:\b(\d\d?) |\ba )?\b(pair|couple|dozen)s?\b", lambda m: str(int(m[1] or 1) * _FACTOR[m[2].lower()])),
    (r"\b(twice|thrice|double|triple)[ds]?\b", lambda m: f"{_FACTOR[m[1].lower()]} times"),
    (r"\bhalve[ds]\b", "2 halved"),
    (r"\bper ?cent\b|\bpct\b", "%"),
    (r"(?<=[a-z]{2})(?: - |-)(?=\d)", " "),  # "red - 7" is not minus seven
    (r"(?<=\d) (?:is|equals?|gives?|makes?|leaves?)(?: to)? (?=-?\d)", " = "),
    (r"(?:\b(?:to|on|at) the )?(?:\bf[au]rther )?\b(left|right)(?:[- ]hand)?(?: side)? (?:of|than)\b", r" \1of "),
    (r"\blower(?=[- ](?:left|right|half|part|row|edge|corner|end|cent))", "bottom"),
    (r"\bright (?=after|before|next|above|below|away|now)|\bf[au]rther (?=above|below)|-hand\b|'s\b", " "),
    (r"\b(?:square|cubic) (?=\w*met|[ckm]?m\b|inch|feet)|(?<=m)\^[23]\b", ""),  # "5 m²" is read as "5 m"
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


def _items(step: str) -> list[tuple[str, int]]:
    """The tokens of a step as (name, pole), where a pole of 0 claims nothing but may negate or end a phrase."""
    tokens = ["", *_tokens(step), ""]
    items: list[tuple[str, int]] = []
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if token in ("-", "minus"):
            operands = [bool(_NUMBER.match(t)) or t == "°" or (len(t) == 1 and t.isalpha()) for t in (before, after)]
            items += [("minus", 1)] if all(operands) else []
        elif token == "=":
            items.append(("=", int(all(_NUMBER.match(t) for t in (before, after)))))
        elif ":" in token and len(token) > 1:
            items.append((token, 1))  # a time of day
        elif _NUMBER.match(token):
            top, _, bottom = token.rstrip(" %").replace(",", "").partition("/")
            value = Fraction(top) / (int(bottom or 1) or 1) / (100 if token.endswith("%") else 1)
            if before in ("-", "minus") and items[-1:] != [("minus", 1)]:
                value = -value
            items.append((str(value), 1))
            if value.numerator == 1 < value.denominator:  # "A is half of B" relates as "B is twice A" does
                items.append(("times", -1))
        else:
            word = UNITS.get(token, token) if _NUMBER.match(before) and token not in ("in", "per") else token
            items.append(_MEANINGS.get(word) or _MEANINGS.get(_stem(word)) or (_stem(word), int(word.isalpha())))
    return items


@dataclass(frozen=True, slots=True)
class Relation:
    """A directed relation: its axis, its pole on it (1 or -1), and the terms that only one of its sides has."""

    axis: str
    pole: int
    before: frozenset[str]
    after: frozenset[str]


@dataclass(frozen=True)
class Claim:
    """The content of a step; equal for steps that differ only in wording that claims nothing.

    Attributes:
        terms: (name, pole) of each word that claims something, in order. The name is its meaning, or a number as a
            fraction. The pole is 1, or -1 if the word is negated or an opposite. Only an empty step has no terms.
        relations: the directed relations among the terms.
        frame: the prepositions, sorted; steps that are built alike have the same.
        light: True if no word of the step claims anything; then the terms are all of its words.
    """

    terms: tuple[tuple[str, int], ...]
    relations: tuple[Relation, ...]
    frame: tuple[str, ...]
    light: bool

    @cached_property
    def poles(self) -> dict[str, set[int]]:
        """From the name of each term to the poles it occurs with. "=" is left out unless it is the only term."""
        names = {name for name, _ in self.terms}
        return {name: {pole for other, pole in self.terms if other == name} for name in names - {"="} or names}

    @cached_property
    def numbers(self) -> Counter[str]:
        return Counter(name for name, _ in self.terms if _NUMBER.match(name))

    @cached_property
    def order(self) -> list[tuple[str, int]]:
        """The terms in order, except that neighbours of one kind, as in "7 + 3" or "red, blue", are sorted."""
        terms = [term for term in dict.fromkeys(self.terms) if term[0] not in ("plus", "multiply")]
        runs = groupby(terms, key=lambda term: "number" if term[0] in self.numbers else _KIND.get(term[0], term))
        return [term for _, run in runs for term in sorted(run)]


def claim(step: str) -> Claim:
    """The content of a step, of which the first 400 characters are read. Any text has one; takes bounded time."""
    return _claim(step.strip()[:MAX_CHARACTERS])


@lru_cache(maxsize=CACHED)
def _claim(step: str) -> Claim:
    items = _negated(_items(step))
    terms = tuple((name, pole) for name, pole in items if pole and name != "times")
    light = not terms
    if light:
        words = [name for name, _ in items if name.isalpha()]
        terms = tuple((word, 1) for word in words or plain_characters(step).split())
    relations = tuple(_relation(items, i) for i, (name, _) in enumerate(items) if name in _DIRECTED_NAMES)
    return Claim(terms, relations, tuple(sorted(name for name, _ in items if name in _PREPOSITIONS)), light)


def _negated(items: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """`items`, where each "not" turns a pole in its phrase: that of the first opposite, else that of the first word."""
    items = list(items)
    for i, (name, _) in enumerate(items):
        if name == "not":  # in "not (to be) the tallest" it turns "tallest"
            end = next((j for j in range(i + 1, len(items)) if items[j][0] in _BREAKS), len(items))
            scope = [j for j in range(i + 1, end) if items[j][1]]
            for j in ([j for j in scope if items[j][0] in _AXES] or scope)[:1]:
                items[j] = (items[j][0], -items[j][1])
    return items


def _relation(items: list[tuple[str, int]], i: int) -> Relation:
    """The relation of item i between the terms before and after its pivot: a "than" or the like, or the item itself.

    In "the red bar is taller than the blue bar", item i is "taller", the pivot "than", and the sides are red and blue.
    What both sides name, here the bar, is left out: it does not tell which side is which.
    """
    names = [name for name, _ in items]
    # The places of what a side may consist of: all terms but the relation itself.
    content = [j for j, (name, pole) in enumerate(items) if pole and name != "times" and j != i]
    if names[i] == "times":  # "twice as many as", "three times that of", "is twice B"; "doubled" alone relates nothing
        # Before "times" is its number, and before that, in "is twice B", the verb. A pivot at the end leaves one side.
        bare = i if names[max(i - 2, 0)] in _OPENERS else len(items)
        pivot = max((j for j in range(i, len(items)) if names[j] in ("as", "that", "than")), default=bare)
    else:
        pivot = next((j for j in range(i, len(items)) if names[j] == ("to" if names[i] == "from" else "than")), i)
    # In the usual order, the sides are before and after the pivot; the following kinds of sentences are exceptions.
    before, after = [j for j in content if j < pivot], [j for j in content if j > pivot]
    if names[i] == "from":  # "from 3 to 7"
        before = [j for j in content if i < j < pivot]
    elif names[i] == "minus" and items[i][1] > 0 and before:  # "180 - 70 - 45": only the numbers beside the sign
        before, after = [j for j in before if _NUMBER.match(names[j])][-1:], after[:1]
    elif not before:  # "above the square is a circle": the sides change places around the verb
        opener = next((j for j in range(pivot + 1, len(items)) if names[j] in _OPENERS), len(items))
        before, after = [j for j in after if j > opener], [j for j in after if j < opener]
    if names[i + 1 : i + 2] == ["by"]:  # "is exceeded by"
        before, after = after, before
    left, right = frozenset(names[j] for j in before), frozenset(names[j] for j in after)
    # A light word, such as "from", has no pole of its own; it relates in its usual direction.
    return Relation(names[i], items[i][1] or 1, left - right, right - left)


# --- comparing -------------------------------------------------------------------------------------------------------


def similarity(a: str, b: str) -> float:
    """How far two steps claim the same, in [0, 1]: 1 for equal claims, 0 if either step is empty; symmetric.

    It is the Dice overlap of their terms, reduced if they contradict each other or differ in a single word.
    """
    return _similarity(claim(a), claim(b))


@lru_cache(maxsize=CACHED)
def _similarity(a: Claim, b: Claim) -> float:
    shared = len(a.poles.keys() & b.poles.keys())
    if not shared or a == b:
        return float(shared > 0)
    overlap = 2 * shared / (len(a.poles) + len(b.poles))
    if _conflict(a, b):
        return overlap * (CONFLICT if a.frame == b.frame else DOUBTFUL_CONFLICT)
    replaced = a.frame == b.frame and len(a.order) == len(b.order) >= 4
    replaced = replaced and sum(x != y for x, y in zip(a.order, b.order, strict=True)) == 1
    return overlap * (REPLACED_WORD if replaced else 1.0)


def _conflict(a: Claim, b: Claim) -> bool:
    """Whether two claims contradict each other, however many words they share."""
    # If all words but numbers are the same, small differences are meant: a repeated number, any negation, the order.
    different = a.poles.keys() ^ b.poles.keys()
    same_words = a.frame == b.frame and different <= (a.numbers.keys() | b.numbers.keys())
    same = same_words and not different
    shared = (a.poles.keys() & b.poles.keys()) - _DIRECTED_NAMES
    opposite = any(_opposed(a.poles[name], b.poles[name], same) for name in shared)
    return opposite or _replaced(a, b, same_words) or _reversed(a, b, same)


def _opposed(poles_a: set[int], poles_b: set[int], same: bool) -> bool:
    """Whether a term is negated in one of two claims, or its opposite is said; `same` if all other terms are shared."""
    return poles_a != poles_b if same else not poles_a & poles_b


def _replaced(a: Claim, b: Claim, same_words: bool) -> bool:
    """Whether a number or an attribute is replaced: each claim has one that the other lacks.

    If only one claim has more of them than the other, the other may have left something out.
    """
    numbers_a, numbers_b = a.numbers, b.numbers
    # "A is half of B" and "B is twice A" claim the same, although one says 1/2 and the other 2: their relations are
    # compared by `_reversed`, and here a fraction counts as the number below its line.
    if all(any(relation.axis == "times" for relation in c.relations) for c in (a, b)):
        numbers_a, numbers_b = (Counter(name.removeprefix("1/") for name in c.numbers.elements()) for c in (a, b))
    left_a, left_b = set(numbers_a - numbers_b), set(numbers_b - numbers_a)
    # Where all words are the same, "3 + 3" and "3 + 4" differ in a number. Between other sentences, one may only say a
    # number once more than the other, which replaces nothing.
    if not same_words:
        left_a, left_b = left_a - set(numbers_b), left_b - set(numbers_a)
    if left_a and left_b:
        return True
    # The same for attributes that exclude each other: "red" for "blue", but not "red" for "left".
    only_a, only_b = a.poles.keys() - b.poles.keys(), b.poles.keys() - a.poles.keys()
    kinds_a, kinds_b = ({_KIND[name] for name in only & _KIND.keys()} for only in (only_a, only_b))
    return bool(kinds_a & kinds_b)


def _reversed(a: Claim, b: Claim, same: bool) -> bool:
    """Whether a relation is reversed or its sides are exchanged, but not both: "A above B" means "B below A".

    A relation of which only one claim says the other side, as "A is taller" and "B is shorter than A", is left out:
    whether its sides are exchanged cannot be told.
    """
    pairs = [(r, s) for r in a.relations for s in b.relations if r.axis == s.axis]
    pairs = [(r, s) for r, s in pairs if same or bool(r.after) == bool(s.after)]
    turn = -1 if any(r.before & s.after and r.after & s.before for r, s in pairs) else 1
    for axis in {r.axis for r, _ in pairs}:
        poles_a, poles_b = ({r.pole for r in c.relations if r.axis == axis} for c in (a, b))
        if _opposed(poles_a, {turn * pole for pole in poles_b}, same):
            return True
    return same and turn == 1 and _crossed(a.order, b.order)


def _crossed(a: Sequence[tuple[str, int]], b: Sequence[tuple[str, int]]) -> bool:
    """Whether three terms are in reverse order, as when two of them change places around a third.

    Moving a phrase to the front does not do this: "the circle is at the top left", "at the top left is the circle".
    """
    place = {term: i for i, term in enumerate(b)}
    order = [place[term] for term in a if term in place]
    longest: list[int] = []  # length of the longest falling subsequence that ends at each position
    for i, p in enumerate(order):
        longest.append(1 + max((longest[j] for j in range(i) if order[j] > p), default=0))
    return max(longest, default=0) >= 3


# --- what counts ----------------------------------------------------------------------------------------------------

Sides = tuple[str, frozenset[str], frozenset[str]]  # the axis of a relation and the terms before and after it
_LETTERS = frozenset("ABCDEFGHIJ")
_OPTIONS = re.compile(r"[(\[]?\bA[).:、]")


# --- a group's agreement ---------------------------------------------------------------------------------------------


def beyond_answer(reasoning_steps: Iterable[str], answer: str, question: str = "") -> tuple[str, ...]:
    """The steps that state a value, name, attribute or relation beyond the answer and the question; others are no reasoning.

    "Maybe 7." and "So the answer is 7 cm." only repeat the answer 7, "there are red circles" the question how many
    there are, and "compare the heights" states nothing (`ireasoner.method.content.statements`).
    """
    of_answer = claim(answer)
    # An option is a statement about the image, not about the question. So is the answer where the question offers it.
    asks, *options = _OPTIONS.split(question[:MAX_QUESTION], 1)
    asked = _said(tuple(clauses(asks)))
    asked_names = [names - of_answer.poles.keys() for names, _ in asked] + [_LETTERS] * bool(options)
    asked_relations = frozenset[Sides]().union(*(relations for _, relations in asked))

    def beyond_question(text: str) -> bool:
        return any(
            not any(names <= known for known in asked_names) or not relations <= asked_relations
            for names, relations in _said(tuple(statements(text)))
            if names
        )

    def goes_beyond(step: str) -> bool:
        rest, announced = _ANNOUNCEMENT.subn("", step[:MAX_CHARACTERS])
        content = claim(rest)
        new = set(content.terms) - set(of_answer.terms)
        if announced and len(new) <= 1 and not content.numbers - of_answer.numbers:
            return False  # the answer with its unit or noun
        further = bool(new or set(content.relations) - set(of_answer.relations))
        return not content.light and further and beyond_question(rest)

    return tuple(step for step in reasoning_steps if goes_beyond(step))


@lru_cache(maxsize=CACHED)
def _said(clauses: tuple[str, ...]) -> tuple[tuple[frozenset[str], frozenset[Sides]], ...]:
    """The names of each clause that claims something, and its relations, whatever their poles."""
    contents = [content for content in map(claim, clauses) if not content.light]
    return tuple(
        (frozenset(c.poles), frozenset((r.axis, r.before, r.after) for r in c.relations if r.before or r.after))
        for c in contents
    )


def agreement(group: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
    """The support of each step by the other trajectories of its question.

    It is the mean, over the other trajectories that have steps, of the step's similarity to the one that it is aligned
    with, or 0 if there is none. Two trajectories are aligned in order, each step with at most one of the other, for the
    greatest total similarity; so an additional step does not shift the others.

    Args:
        group: the reasoning steps of each trajectory of one question; a trajectory may have none.

    Returns:
        For each trajectory an array [reasoning steps] in [0, 1]; zeros if fewer than two trajectories have steps.
    """
    claims: dict[Claim, int] = {}
    # Equal claims, and trajectories of equal claims, are compared once and counted as often as they occur.
    rows = [tuple(claims.setdefault(claim(step), len(claims)) for step in steps) for steps in group]
    copies = Counter(row for row in rows if row)
    totals = {row: np.zeros(len(row)) for row in rows}
    table = [[_similarity(a, b) for b in islice(claims, i + 1)] for i, a in enumerate(claims)]
    distinct = list(copies)
    for i, row in enumerate(distinct):
        for other in distinct[: i + 1]:
            of_row, of_other = _aligned([[table[max(x, y)][min(x, y)] for y in other] for x in row])
            totals[row] += np.multiply(of_row, copies[other] - (row == other))
            if row != other:
                totals[other] += np.multiply(of_other, copies[row])
    others = max(copies.total() - 1, 1)
    return [totals[row] / others for row in rows]


def _aligned(block: list[list[float]]) -> tuple[list[float], list[float]]:
    """The similarity of each row and column in the alignment in order of greatest total; 0 if it is not aligned."""
    m, n = len(block), len(block[0])
    best = [[0.0] * (n + 1) for _ in range(m + 1)]  # greatest total of the first i rows and j columns
    for i, row in enumerate(block):
        for j, value in enumerate(row):
            best[i + 1][j + 1] = max(best[i][j] + value, best[i][j + 1], best[i + 1][j])
    of_row, of_column = [0.0] * m, [0.0] * n
    while m and n:
        if best[m][n] == best[m - 1][n]:
            m -= 1
        elif best[m][n] == best[m][n - 1]:
            n -= 1
        else:
            m, n = m - 1, n - 1
            of_row[m] = of_column[n] = block[m][n]
    return of_row, of_column
