"""Edits of ordinary English reasoning steps that change what a trajectory claims, and one that does not.

An edit takes a trajectory's steps, a random generator and the steps of another question's trajectories. It returns the
edited steps, or None where it does not apply. One step is edited, drawn among those that the edit can change. The edits
are rules over a table of words: an edited sentence may be clumsy, but it says something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

Steps = tuple[str, ...]
Perturbation = Callable[[Steps, np.random.Generator, Sequence[str]], Steps | None]

_FLAGS = re.IGNORECASE | re.ASCII
_NUMBER_WORDS = [  # a number word is replaced by another one of the same line
    line.split()
    for line in (
        "two three four five six seven eight nine",
        "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen",
        "twenty thirty forty fifty sixty seventy eighty ninety",
    )
]
_NUMBER = re.compile(  # digits that are not part of a name (B2) or of an ordinal (2nd)
    rf"(?<![A-Za-z_\d])\d+(?!\d|st\b|nd\b|rd\b|th\b)|\b(?:{'|'.join(word for row in _NUMBER_WORDS for word in row)})\b",
    _FLAGS,
)
_PAIRS = """above/below left/right top/bottom upper/lower more/less most/least taller/shorter tallest/shortest
    longer/shorter longest/shortest larger/smaller largest/smallest bigger/smaller biggest/smallest higher/lower
    highest/lowest greater/less greatest/least fewer/more fewest/most wider/narrower older/younger earlier/later
    before/after inside/outside behind/in_front_of maximum/minimum north/south east/west increase/decrease
    increases/decreases increased/decreased increasing/decreasing rise/fall rises/falls rising/falling rose/fell"""
_OPPOSITE: dict[str, str] = {}
for _a, _b in (pair.replace("_", " ").split("/") for pair in _PAIRS.split()):
    _OPPOSITE.setdefault(_a, _b)
    _OPPOSITE.setdefault(_b, _a)
_RELATION = re.compile(  # but not "most of", "no longer", "left over", "right angle", "right answer", "right now"
    rf"(?<!\bno )\b(?!(?:most|least) of\b)(?:{'|'.join(_OPPOSITE)})\b"
    r"(?! over\b|[ -](?:angle|triangle|answer|option|choice|now|away))",
    _FLAGS,
)
# Negations: a match is replaced by the name of the group that matches, or by nothing.
_DENIAL = re.compile(
    r"\b(?P<can>can(?:not|['’]t))\b|\b(?P<will>won['’]t)\b|(?<=\w)n['’]t\b|\bnot "
    r"|\b(?P<some>no)(?=body\b|thing\b| one\b)|\b(?P<a>no)(?= (?!longer|more|less|fewer|later)[a-z])",
    _FLAGS,
)
_VERBS = """reach take show contain equal give make represent increase decrease rise fall lie mean appear hold go come
    get need stay remain start cover include connect lead cross meet bisect intersect divide touch drop grow form"""
_THIRD = {v + ("es" if v.endswith(("ch", "ss", "o")) else "s"): v for v in _VERBS.split()} | {"has": "have"}
_NEGATABLE = re.compile(
    r"\b(?:(?P<auxiliary>is|are|was|were|can|could|will|would|should|must|may|might"
    r"|(?:has|have|had)(?= (?:been|\w+ed)\b))"
    rf"|(?P<third>{'|'.join(_THIRD)})|(?P<who>I|we|you|they) (?P<base>see|read|count|find|get|have|need|know))\b",
    _FLAGS,
)


def _number_changed(step: str, rng: np.random.Generator) -> str:
    def other(word: str) -> str:
        if word.isdigit():
            at = int(rng.integers(len(word)))
            digits = [d for d in "0123456789" if d != word[at] and (d != "0" or at > 0)]
            return word[:at] + digits[rng.integers(len(digits))] + word[at + 1 :]
        row = next(row for row in _NUMBER_WORDS if word.lower() in row)
        return [w for w in row if w != word.lower()][rng.integers(len(row) - 1)]

    return _replace_one(_NUMBER, other, step, rng)


def _relation_swapped(step: str, rng: np.random.Generator) -> str:
    return _replace_one(_RELATION, lambda word: _OPPOSITE[word.lower()], step, rng)


def _negated(step: str, rng: np.random.Generator) -> str:
    if m := _DENIAL.search(step):
        return _put(m, m.lastgroup or "")
    m = _NEGATABLE.search(step)
    if m is None:
        return step
    if m["auxiliary"]:
        return _put(m, f"{m[0]} not")
    return _put(m, f"does not {_THIRD[m['third'].lower()]}" if m["third"] else f"{m['who']} do not {m['base']}")


def _replace_one(pattern: re.Pattern[str], other: Callable[[str], str], step: str, rng: np.random.Generator) -> str:
    found = list(pattern.finditer(step))
    if not found:
        return step
    m = found[rng.integers(len(found))]
    return _put(m, other(m[0]))


def _put(m: re.Match[str], words: str) -> str:
    """The text with a match replaced by other words, which begin with a capital letter if the match did."""
    first = words[:1].upper() if m[0][:1].isupper() else words[:1]
    return m.string[: m.start()] + first + words[1:] + m.string[m.end() :]


def _rephrased(step: str, rng: np.random.Generator) -> str:
    sentence = step[1:2].islower() or step.startswith("A ")
    return f"We can see that {step[:1].lower() if sentence else step[:1]}{step[1:]}"


def _one_step(change: Callable[[str, np.random.Generator], str]) -> Perturbation:
    def edit(steps: Steps, rng: np.random.Generator, others: Sequence[str]) -> Steps | None:
        for at in rng.permutation(len(steps)):
            if (changed := change(steps[at], rng)) != steps[at]:
                return (*steps[:at], changed, *steps[at + 1 :])
        return None

    return edit


def _shuffled(steps: Steps, rng: np.random.Generator, others: Sequence[str]) -> Steps | None:
    order = steps
    while order == steps and len(set(steps)) > 1:
        order = tuple(steps[i] for i in rng.permutation(len(steps)))
    return None if order == steps else order


def _inserted(steps: Steps, rng: np.random.Generator, others: Sequence[str]) -> Steps | None:
    new = [step for step in others if step not in steps]
    at = int(rng.integers(len(steps) + 1))
    return (*steps[:at], new[rng.integers(len(new))], *steps[at:]) if new else None


PERTURBATIONS: dict[str, Perturbation] = {
    "number changed": _one_step(_number_changed),
    "relation swapped": _one_step(_relation_swapped),
    "negated": _one_step(_negated),
    "steps shuffled": _shuffled,
    "step inserted": _inserted,
    "rephrased (same claim)": _one_step(_rephrased),
}
