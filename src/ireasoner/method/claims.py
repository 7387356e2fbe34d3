"""What a reasoning step claims, how far two steps claim the same, and how far a group of trajectories agrees.

The published step agreement (arXiv 2601.05877) compares steps by the cosine of mean token embeddings, which cannot see
numbers. Here two steps agree as far as their words and numbers overlap, and next to not at all where they conflict:
another number, colour or place, one of them negated or the opposite, or the two sides of a relation exchanged. No
model: tables of words, and rules that can be read. They know English; of other languages, words and numbers alone.
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

from ireasoner.method.answers import _SCALES, _UNITS, _WORD, _cardinal, _plain_characters, _without_latex

MAX_CHARACTERS, MAX_TOKENS = 400, 96  # the rest of a longer step is not read, so that any text takes bounded time
# What is left of the overlap where two steps conflict; where they are built differently as well, so that the conflict
# may be a misreading; and where they differ in a single word, which may be a synonym or another thing.
CONFLICT, DOUBTFUL_CONFLICT, REPLACED_WORD = 0.1, 0.25, 0.5

# --- vocabulary ------------------------------------------------------------------------------------------------------

_NEGATIONS = "not no never none nothing nowhere neither nor without lack cannot"
_LIGHT = """
a an the this that these those such it its is are was were be been being am has have had having do does did doing will
would shall should can could may might must i we you they them their there here he she him his her us our my your one
of to in on at for from with as into onto than by if then so thus hence therefore also just only exactly about very too
and or but because since while although though even when where which who whom whose what how me many much some any all
both every each other another else own out single picture image photo photograph chart figure graph diagram drawing
shown show see seen look read find found locate reach take make made give get got come came go become value number
amount equal equals appear seem count stand lie sit mean say tell note notice finally next step answer accord closely
roughly approximately around nearly almost ≈ ~ let maybe perhaps probably possibly likely guess think believe suppose
result solution conclude conclusion final
"""  # these claim nothing
# One meaning to a group: its first word stands for the others.
_SYNONYMS = """
bar column; circle disc disk; middle center centre; gray grey; purple violet; stage phase; label tag; man guy gentleman;
person people human somebody someone; woman lady; kid child; part piece portion section segment slice; kind type sort;
beside adjacent near nearby; item product object thing; symbol icon sign; shop store; student pupil; road street;
car automobile vehicle; plus add sum total altogether overall combine; wear dress; choose chose pick select; cost price;
represent correspond; river stream; bike bicycle; door entrance;
income revenue earnings takings; dollar $; degree °; cent ¢
"""
# Phrases and signs that act as a word.
_PHRASES = """
infront: in front of, ahead of; above: on top of; beside: next to, close to; precede: followed by; follow: preceded by;
atleast: at least, greater than or equal to, more than or equal to; atmost: at most, less than or equal to;
subtracted: subtracted from, taken from, taken away from; divide: divided by; multiply: multiplied by; not: fails to;
plus: add up, adds up, adding up; than: compared to, compared with, relative to; perpendicular: right angle;
rise: go up, goes up, went up; fall: go down, goes down, went down
"""
_SIGNS = str.maketrans(
    {">": " more than ", "<": " less than ", "≥": " atleast ", "≤": " atmost ", "≠": " not ", "⊥": " perpendicular "}
    | {"+": " plus ", "÷": " divide ", "∠": " angle ", "Ω": " ohm ", "ı": "i", "İ": "I"}  # re takes ı for a kind of i
)
# Opposites: one pole | the other; the first word names the axis. Directed ones relate what stands on their two sides.
_DIRECTED = """
more greater larger bigger higher taller longer above over exceed surpass outnumber beat atleast
| less fewer smaller lower shorter below under beneath underneath atmost;
leftof | rightof; infront | behind; inside within | outside contain; closer nearer | farther further; times | halved;
before earlier precede sooner prior | after later follow; older | younger newer; faster quicker | slower; divide | ;
heavier | lighter; warmer hotter | colder cooler; wider broader thicker | narrower thinner; brighter | darker;
stronger better | weaker worse; minus subtract | subtracted
"""
_POLAR = """
most highest largest biggest tallest longest maximum greatest peak majority
| least lowest smallest shortest fewest minimum minority;
rise rose risen increase grow grew climb gain | fall fell fallen decrease decline drop shrink; win | lose; buy | sell;
open | closed shut closing; activated | off; top upper | bottom; left | right; inner | outer; front | back; wet | dry;
same identical alike | different unequal differ; true correct | false incorrect wrong untrue; full | empty;
large big tall high long | small short low little; positive | negative; horizontal | vertical; import | export;
parallel | perpendicular series; clockwise | anticlockwise counterclockwise; present visible | absent missing hidden;
light bright | dark; old | young new; hot warm | cold cool; fast quick | slow; solid filled | dashed dotted hollow;
convex | concave; indoors | outdoors; male | female; begin start | end finish
"""
# One thing is not two of a group.
_EXCLUSIVE = """
red blue green yellow orange purple pink brown black white gray cyan magenta teal gold silver beige; top left middle;
circle square triangle rectangle pentagon hexagon cross star diamond oval; north south east west;
monday tuesday wednesday thursday friday saturday sunday; plus minus multiply divide;
january february march april inmay june july august september october november december
"""


def _groups(table: str) -> list[list[str]]:
    return [group.split() for group in table.split(";")]


def _stem(word: str) -> str:
    """A light stem: without plural, -ed, -ing and final e, doubled consonants single, six letters at most."""
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-3] + "y" if word.endswith("ies") else word[:-1]
    ending = next((e for e in ("ing", "ed") if word.endswith(e) and len(word) >= len(e) + 3), "")
    word = word.removesuffix(ending)
    if ending and word[-1] == word[-2] and word[-1] not in "lsz":
        word = word[:-1]
    return (word[:-1] if len(word) > 3 and word.endswith("e") else word)[:6]


def _meanings() -> dict[str, tuple[str, int]]:
    """Word, or stem → (name of its meaning, pole); the pole is 1, -1 for the opposite, or 0 for a light word."""
    words = {word: (word, 0) for word in _LIGHT.split()} | dict.fromkeys(_NEGATIONS.split(), ("not", 0))
    words |= {word: (word, 1) for group in _groups(_EXCLUSIVE) for word in group}
    words |= {word: (group[0], 1) for group in _groups(_SYNONYMS) for word in group}
    for axis in _groups(_DIRECTED) + _groups(_POLAR):
        words |= {word: (axis[0], 1 if i < axis.index("|") else -1) for i, word in enumerate(axis) if word != "|"}
    return {_stem(word): meaning for word, meaning in reversed(words.items())} | words


_MEANINGS = _meanings()
_DIRECTED_NAMES = {axis[0] for axis in _groups(_DIRECTED)} | {"from"}
_PHRASE = {p: word for word, *phrases in (re.split(": |, ", g.strip()) for g in _PHRASES.split(";")) for p in phrases}
_AXES = _DIRECTED_NAMES | {axis[0] for axis in _groups(_POLAR)}
_KIND = {word: kind for kind, words in enumerate(_groups(_EXCLUSIVE)) for word in words}
_PREPOSITIONS = frozenset(["of", "to", "in", "on", "at", "for", "from", "with", "as", "into", "onto", "by"])
_BREAKS = frozenset([*",;:.?!", "so", "but", "and", "because", "since", "while", "although", "though", "which", "who"])
_OPENERS = frozenset(["is", "are", "was", "were", "there", "we", "has", "have", "from", ","])  # end a fronted phrase

# --- reading a step: characters, then numbers and phrases rewritten as one word, then tokens -------------------------

_ENUMERATOR = re.compile(r"\A[\s>•(-]*(?:step ?\d{1,3} ?[.:)-]|(?:\d{1,2}|[a-z])[.)](?=\s))\s*", re.IGNORECASE)
_DIGITS = r"\d+(?:,\d{3})*(?:\.\d+)?"
_NUMBER = re.compile(rf"-?(?:{_DIGITS}|\.\d+)")
_TOKEN = re.compile(rf"\d\d?:\d\d\b|(?:{_DIGITS}|\.\d+)(?:/\d+)?(?: ?%)?|[^\W\d_]+|[-°$€£¢≈~=,;:.?!]")
_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
_ORDINAL = {word: n for n, word in enumerate(_ORDINALS, 1)}
_PART = {"half": 2, "halve": 2, "quarter": 4} | {word: n for word, n in _ORDINAL.items() if n > 2}
_FACTOR = {"pair": 2, "couple": 2, "dozen": 12, "twice": 2, "double": 2, "thrice": 3, "triple": 3}


def _spelled(match: re.Match[str]) -> str:
    words = re.split("[ -]", match[0].lower())
    whole = _cardinal(words)
    return str(whole) if whole is not None else " ".join(w if w == "and" else str(_cardinal([w])) for w in words)


def _clock(match: re.Match[str]) -> str:
    part, past = match[1].lower(), match[2].lower() == "past"
    if part.isdigit() and not past and "clock" not in match.string.lower():
        return match[0]  # "twenty to ten" may be a range
    minutes = {"half": 30, "quarter": 15}.get(part) or int(part)
    minutes = 60 * int(match[3]) + (minutes if past else -minutes)
    return f"{(minutes // 60 - 1) % 12 + 1}:{minutes % 60:02}"


# How an answer is announced: "Therefore, the correct option is".
_ANNOUNCEMENT = re.compile(
    r"\A\W*(?:(?:so|thus|hence|therefore|then|finally|and)\b\W*)*(?:(?:the|my|our) )?(?:(?:correct|final|right|best) )*"
    r"(?:answer|option|choice|result|solution|conclusion)\b(?: (?:is|would be|must be|should be)\b| ?[:=])+\W*",
    re.IGNORECASE,
)

_REWRITES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"\bno (?:other|second|further|such|matter|doubt)\b|\bnot (?:only|just)\b", " "),  # these deny something else
    (r"\bmost (?:likely|probably)\b|\b(?:definitely|certainly|clearly|obviously)\b", " "),
    (r"\bnobody\b|\bno one\b", "no person"),
    (r"\bhalf a dozen\b", "6"),
    (rf"({_DIGITS}) ({'|'.join(_SCALES)})\b", lambda m: str(Fraction(m[1].replace(",", "")) * _SCALES[m[2].lower()])),
    (rf"\b{_WORD}(?:(?: and)?[ -]{_WORD})*", _spelled),
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
    (r"\b(?:square|cubic) (?=\w*met|[ckm]?m\b|inch|feet)|(?<=m)\^[23]\b", ""),  # the unit will do
    (r"(?<=\bin |\bof |\bby |\bto )may\b|(?<=\bfrom )may\b", "inmay"),
    (r"\b(?:switched|turned) on\b|\bon(?= ?[.,;]| ?$)", "activated"),
    (r"n't\b|(?<=can)not\b|\bno longer(?! than)", " not "),
    (r"(?<=\d) ?[×·x] ?(?=\d)", " multiply "),
    (rf"\b(?:{'|'.join(_PHRASE)})\b", lambda m: _PHRASE[m[0].lower()]),
]
_COMPILED = [(re.compile(pattern, re.IGNORECASE), new) for pattern, new in _REWRITES]


def _tokens(step: str) -> list[str]:
    text = _plain_characters(step.strip()[:MAX_CHARACTERS])[:MAX_CHARACTERS]
    text = re.sub(r"(?<=\d) ?\* ?(?=\d)", "×", _without_latex(text).replace("\\Omega", "Ω")).translate(_SIGNS)
    text = _ENUMERATOR.sub("", " ".join(re.sub(r"[*_`#]", "", text).split()))
    for pattern, new in _COMPILED:
        text = pattern.sub(new, text)
    tokens = _TOKEN.findall(text)[:MAX_TOKENS]
    # A single capital is a name ("angle A"), but for the pronoun and for the article that opens a step.
    article = len(tokens) > 1 and tokens[0] == "A" and _MEANINGS.get(tokens[1].lower(), ("", 1))[1]
    names = [len(t) == 1 and t.isupper() and t != "I" and not (i == 0 and article) for i, t in enumerate(tokens)]
    return [t if name else t.lower() for t, name in zip(tokens, names, strict=True)]


def _items(step: str) -> list[tuple[str, int]]:
    """The tokens of a step as (name, pole); a pole of 0 claims nothing, but may end a phrase or negate."""
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
            word = _UNITS.get(token, token) if _NUMBER.match(before) and token not in ("in", "per") else token
            items.append(_MEANINGS.get(word) or _MEANINGS.get(_stem(word)) or (_stem(word), int(word.isalpha())))
    return items


@dataclass(frozen=True, slots=True)
class Relation:
    """A directed relation: the name of its axis, its pole (1 or -1), and the terms on one of its sides alone."""

    axis: str
    pole: int
    before: frozenset[str]
    after: frozenset[str]


@dataclass(frozen=True)
class Claim:
    """The content of a step. Steps that differ only in dressing have equal claims.

    terms: names of meanings, and numbers as exact fractions, in order; each with a pole: 1, or -1 where it is negated
        or the opposite is said. Empty for an empty step only.
    relations: the directed relations among them.
    frame: the prepositions, sorted; equal where two steps are built alike.
    light: whether no word of it claims anything; the terms are these words then.
    """

    terms: tuple[tuple[str, int], ...]
    relations: tuple[Relation, ...]
    frame: tuple[str, ...]
    light: bool

    @cached_property
    def poles(self) -> dict[str, set[int]]:
        """Each term's name → the poles it occurs with; an "=" among others only shows their order."""
        names = {name for name, _ in self.terms}
        return {name: {pole for other, pole in self.terms if other == name} for name in names - {"="} or names}

    @cached_property
    def numbers(self) -> Counter[str]:
        return Counter(name for name, _ in self.terms if _NUMBER.match(name))

    @cached_property
    def order(self) -> list[tuple[str, int]]:
        """The terms in order, but sorted where order means nothing: in "7 + 3", in "red, blue"."""
        terms = [term for term in dict.fromkeys(self.terms) if term[0] not in ("plus", "multiply")]
        runs = groupby(terms, key=lambda term: "number" if term[0] in self.numbers else _KIND.get(term[0], term))
        return [term for _, run in runs for term in sorted(run)]


@lru_cache(maxsize=1 << 16)
def claim(step: str) -> Claim:
    """The content of a step, read from its first 400 characters: any text has one, in bounded time."""
    items = _items(step)
    for i, (name, _) in enumerate(items):
        if name == "not":  # denies the first opposite in its phrase, else the first word: "not (to be) the tallest"
            end = next((j for j in range(i + 1, len(items)) if items[j][0] in _BREAKS), len(items))
            scope = [j for j in range(i + 1, end) if items[j][1]]
            for j in ([j for j in scope if items[j][0] in _AXES] or scope)[:1]:
                items[j] = (items[j][0], -items[j][1])
    terms = tuple((name, pole) for name, pole in items if pole and name != "times")
    light = not terms
    if light:  # light words alone, or signs
        words = [name for name, _ in items if name.isalpha()]
        terms = tuple((word, 1) for word in words or _plain_characters(step.strip()[:MAX_CHARACTERS]).split())
    relations = tuple(_relation(items, i) for i, (name, _) in enumerate(items) if name in _DIRECTED_NAMES)
    return Claim(terms, relations, tuple(sorted(name for name, _ in items if name in _PREPOSITIONS)), light)


def _relation(items: list[tuple[str, int]], i: int) -> Relation:
    """The relation at item i: the terms before it against those behind it, or behind the pivot ("than") it has."""
    names = [name for name, _ in items]
    content = [j for j, (name, pole) in enumerate(items) if pole and name != "times" and j != i]
    if names[i] == "times":  # "twice as many as", "three times that of"; "doubled" alone relates nothing
        bare = i if names[max(i - 2, 0)] in _OPENERS else len(items)  # "is twice B"
        pivot = max((j for j in range(i, len(items)) if names[j] in ("as", "that", "than")), default=bare)
    else:
        pivot = next((j for j in range(i, len(items)) if names[j] == ("to" if names[i] == "from" else "than")), i)
    before, after = [j for j in content if j < pivot], [j for j in content if j > pivot]
    if names[i] == "from":
        before = [j for j in content if i < j < pivot]
    elif names[i] == "minus" and items[i][1] > 0 and before:  # "180 - 70 - 45"
        before, after = [j for j in before if _NUMBER.match(names[j])][-1:], after[:1]
    elif not before:  # "above the square is a circle"
        opener = next((j for j in range(pivot + 1, len(items)) if names[j] in _OPENERS), len(items))
        before, after = [j for j in after if j > opener], [j for j in after if j < opener]
    if names[i + 1 : i + 2] == ["by"]:  # "is exceeded by"
        before, after = after, before
    left, right = frozenset(names[j] for j in before), frozenset(names[j] for j in after)
    return Relation(names[i], items[i][1] or 1, left - right, right - left)


# --- comparing -------------------------------------------------------------------------------------------------------


def similarity(a: str, b: str) -> float:
    """How far two steps claim the same, in [0, 1]: symmetric, 1 for the same claim, 0 where either step is empty.

    The Dice overlap of their terms, times what a conflict leaves of it.
    """
    return _similarity(claim(a), claim(b))


@lru_cache(maxsize=1 << 16)
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
    """Whether two claims contradict each other, however much of their wording they share."""
    only_a, only_b = a.poles.keys() - b.poles.keys(), b.poles.keys() - a.poles.keys()
    # Where all words are the same, small differences are meant: how often a number comes, every negation, the order.
    same_words = a.frame == b.frame and (only_a | only_b) <= (a.numbers.keys() | b.numbers.keys())
    same = same_words and not only_a | only_b

    # A number or an attribute replaced: each side has one that the other lacks. One side alone may leave some out.
    numbers_a, numbers_b = a.numbers, b.numbers
    if all(any(relation.axis == "times" for relation in c.relations) for c in (a, b)):  # "half of" and "twice"
        numbers_a, numbers_b = (
            Counter(name.removeprefix("1/") for name in n.elements()) for n in (a.numbers, b.numbers)
        )
    left_a, left_b = (numbers_a - numbers_b).keys(), (numbers_b - numbers_a).keys()
    if left_a and left_b if same_words else left_a - numbers_b.keys() and left_b - numbers_a.keys():
        return True
    if {_KIND[name] for name in only_a & _KIND.keys()} & {_KIND[name] for name in only_b & _KIND.keys()}:
        return True

    # A word negated, or its opposite.
    for name in (a.poles.keys() & b.poles.keys()) - _DIRECTED_NAMES:
        if a.poles[name] != b.poles[name] if same else not a.poles[name] & b.poles[name]:
            return True

    # A directed relation reversed, or its two sides exchanged, but not both: "A above B" is "B below A".
    # Where only one of them says its other side ("A is taller", "B is shorter than A") that cannot be told.
    pairs = [(r, s) for r in a.relations for s in b.relations if r.axis == s.axis]
    pairs = [(r, s) for r, s in pairs if same or bool(r.after) == bool(s.after)]
    turn = -1 if any(r.before & s.after and r.after & s.before for r, s in pairs) else 1
    for axis in {r.axis for r, _ in pairs}:
        said_a, said_b = ({r.pole for r in c.relations if r.axis == axis} for c in (a, b))
        said_b = {turn * pole for pole in said_b}
        if said_a != said_b if same else not said_a & said_b:
            return True
    return same and turn == 1 and _crossed(a.order, b.order)


def _crossed(a: Sequence[tuple[str, int]], b: Sequence[tuple[str, int]]) -> bool:
    """Whether three terms stand in reverse order, as where two of them changed places around the third.

    Moving a phrase to the front reverses no three: "the circle is at the top left", "at the top left is the circle".
    """
    place = {term: i for i, term in enumerate(b)}
    order = [place[term] for term in a if term in place]
    longest: list[int] = []  # falling run that ends at each position
    for i, p in enumerate(order):
        longest.append(1 + max((longest[j] for j in range(i) if order[j] > p), default=0))
    return max(longest, default=0) >= 3


# --- a group's agreement ---------------------------------------------------------------------------------------------


def beyond_answer(reasoning_steps: Iterable[str], answer: str) -> tuple[str, ...]:
    """The steps that claim something other than the answer itself.

    "Look closely." claims nothing; "Maybe 7." and "So the answer is 7 cm." only repeat a 7: none of these is reasoning.
    """
    said = claim(answer)

    def goes_beyond(step: str) -> bool:
        rest, announced = _ANNOUNCEMENT.subn("", step[:MAX_CHARACTERS])
        own = claim(rest)
        new = set(own.terms) - set(said.terms)
        if announced and len(new) <= 1 and not own.numbers - said.numbers:
            return False  # the answer with its unit or noun
        return not own.light and bool(new or set(own.relations) - set(said.relations))

    return tuple(step for step in reasoning_steps if goes_beyond(step))


def agreement(group: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
    """How far each step is supported by the other trajectories of its question.

    A step's support is the mean, over the other trajectories that have steps, of its similarity to the step that it is
    aligned with there, 0 where it is aligned with none. Two trajectories are aligned in order, one step with one step
    at most, for the greatest total similarity, so that an extra step shifts nothing.

    Args:
        group: the reasoning steps of each trajectory of one question; a trajectory may have none.

    Returns:
        One array [reasoning steps] for each trajectory, in [0, 1]; zeros where fewer than two have steps.
    """
    claims: dict[Claim, int] = {}
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
    """What each row and each column of similarities gets from the order-preserving alignment of greatest total."""
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
