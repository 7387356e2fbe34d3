"""What a reasoning step claims, how similar two claims are, and how far the trajectories of a group agree.

The published step agreement (arXiv 2601.05877) compares steps by the cosine of mean token embeddings, which cannot see
numbers. Here, the similarity of two steps is the overlap of their words and numbers, and next to nothing if they
contradict each other: by another number, colour or place, by a negation or an opposite, or by exchanging the sides of
a relation. This takes no model, only the names that `ireasoner.method.vocabulary` gives to words and numbers.
Steps that state nothing of their own (`ireasoner.method.content`) do not count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, islice

import numpy as np
from numpy.typing import NDArray

from ireasoner.method.content import clauses, statements
from ireasoner.method.latex import plain_characters
from ireasoner.method.vocabulary import AXES, DIRECTED_NAMES, KIND, MAX_CHARACTERS, NUMBER, read_items

MAX_QUESTION = 2000  # characters; the time to read a question is bounded
CACHED = 4096  # claims, and similarities of two; enough for the groups of a step, and below 200 MB for any text
CONFLICT = 0.1  # what remains of the overlap of two steps that contradict each other
DOUBTFUL_CONFLICT = 0.25  # if they are also built differently, so that the contradiction may be a misreading
REPLACED_WORD = 0.5  # if they differ in a single word, which may be a synonym or another thing

# --- reading a step --------------------------------------------------------------------------------------------------

_PREPOSITIONS = frozenset(["of", "to", "in", "on", "at", "for", "from", "with", "as", "into", "onto", "by"])
_BREAKS = frozenset([*",;:.?!", "so", "but", "and", "because", "since", "while", "although", "though", "which", "who"])
_OPENERS = frozenset(["is", "are", "was", "were", "there", "we", "has", "have", "from", ","])  # end a fronted phrase


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
        return Counter(name for name, _ in self.terms if NUMBER.match(name))

    @cached_property
    def order(self) -> list[tuple[str, int]]:
        """The terms in order, except that neighbours of one kind, as in "7 + 3" or "red, blue", are sorted."""
        terms = [term for term in dict.fromkeys(self.terms) if term[0] not in ("plus", "multiply")]
        runs = groupby(terms, key=lambda term: "number" if term[0] in self.numbers else KIND.get(term[0], term))
        return [term for _, run in runs for term in sorted(run)]


def claim(step: str) -> Claim:
    """The content of a step, of which the first 400 characters are read. Any text has one; takes bounded time."""
    return _claim(step.strip()[:MAX_CHARACTERS])


@lru_cache(maxsize=CACHED)
def _claim(step: str) -> Claim:
    items = _negated(read_items(step))
    terms = tuple((name, pole) for name, pole in items if pole and name != "times")
    light = not terms
    if light:
        words = [name for name, _ in items if name.isalpha()]
        terms = tuple((word, 1) for word in words or plain_characters(step).split())
    relations = tuple(_relation(items, i) for i, (name, _) in enumerate(items) if name in DIRECTED_NAMES)
    return Claim(terms, relations, tuple(sorted(name for name, _ in items if name in _PREPOSITIONS)), light)


def _negated(items: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """`items`, where each "not" turns a pole in its phrase: that of the first opposite, else that of the first word."""
    items = list(items)
    for i, (name, _) in enumerate(items):
        if name == "not":  # in "not (to be) the tallest" it turns "tallest"
            end = next((j for j in range(i + 1, len(items)) if items[j][0] in _BREAKS), len(items))
            scope = [j for j in range(i + 1, end) if items[j][1]]
            for j in ([j for j in scope if items[j][0] in AXES] or scope)[:1]:
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
        before, after = [j for j in before if NUMBER.match(names[j])][-1:], after[:1]
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
    shared = (a.poles.keys() & b.poles.keys()) - DIRECTED_NAMES
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
    kinds_a, kinds_b = ({KIND[name] for name in only & KIND.keys()} for only in (only_a, only_b))
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


# --- which steps count ------------------------------------------------------------------------------------------------

# The announcement of an answer, such as "Therefore, the correct option is".
_ANNOUNCEMENT = re.compile(
    r"\A\W*(?:(?:so|thus|hence|therefore|then|finally|and)\b\W*)*(?:(?:the|my|our) )?(?:(?:correct|final|right|best) )*"
    r"(?:answer|option|choice|result|solution|conclusion)\b(?: (?:is|would be|must be|should be)\b| ?[:=])+\W*",
    re.IGNORECASE,
)
_OPTIONS = re.compile(r"[(\[]?\bA[).:、]")  # where the options of a question begin
_LETTERS = frozenset("ABCDEFGHIJ")

# What a clause says: the names of its terms, and the axis of each of its relations with the terms on its sides. Poles
# are left out: "it is no circle" repeats the question whether it is one as much as "it is a circle" does.
Content = tuple[frozenset[str], frozenset[tuple[str, frozenset[str], frozenset[str]]]]


def beyond_answer(reasoning_steps: Iterable[str], answer: str, question: str = "") -> tuple[str, ...]:
    """The steps that state a value, name, attribute or relation beyond the answer and beyond the question.

    The others are no reasoning: "Maybe 7." and "So the answer is 7 cm." only repeat the answer 7, "There are red
    circles." the question how many there are, and plans state nothing (`ireasoner.method.content.statements`).
    """
    of_answer = claim(answer)
    asks, *options = _OPTIONS.split(question[:MAX_QUESTION], 1)
    asked = [_content(clause) for clause in clauses(asks)]
    # To choose one of the things that the question offers is a statement, but a letter alone says nothing of the image.
    known_names = [names - of_answer.poles.keys() for names, _ in asked] + ([_LETTERS] if options else [])
    known_relations = {relation for _, relations in asked for relation in relations}

    def is_new(clause: str) -> bool:
        names, relations = _content(clause)
        return bool(names) and not (any(names <= known for known in known_names) and relations <= known_relations)

    def goes_beyond(step: str) -> bool:
        rest, announced = _ANNOUNCEMENT.subn("", step[:MAX_CHARACTERS])
        content = claim(rest)
        new = set(content.terms) - set(of_answer.terms)
        if content.light or (announced and len(new) <= 1 and not content.numbers - of_answer.numbers):
            return False  # nothing, or the answer with its unit or noun
        beyond = new or set(content.relations) - set(of_answer.relations)
        return bool(beyond) and any(map(is_new, statements(rest)))

    return tuple(step for step in reasoning_steps if goes_beyond(step))


def _content(clause: str) -> Content:
    """What a clause says; nothing if no word of it claims anything."""
    said = claim(clause)
    if said.light:
        return frozenset(), frozenset()
    return frozenset(said.poles), frozenset((r.axis, r.before, r.after) for r in said.relations if r.before or r.after)


# --- a group's agreement ---------------------------------------------------------------------------------------------


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
