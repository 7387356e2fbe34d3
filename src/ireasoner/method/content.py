"""Which words of a reasoning step state something, and which only plan, announce, ask, or fit every image.

"Identify the bars" and "we need to find the difference" state nothing, however many trajectories say so. This takes
only the lists `plans` and `filler` of words.toml. They are for English; of other languages, only the usual beginnings
of a plan are known (German, French, Spanish and Chinese), and what fits every image is not told from a statement.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ireasoner.method.latex import plain_characters
from ireasoner.method.vocabulary import WORDS


def _inflected(words: Iterable[str], endings: str = "e|es|ed|ing|s|d") -> str:
    """A pattern of words with any of the endings; "y" and "e" at the end of a word may give way to them."""
    stems = (rf"{re.escape(w[:-1])}(?:{w[-1]}|{endings}|ies|ied|ying)" if w[-1] in "ey" else w for w in words)
    return rf"(?:{'|'.join(stems)})(?:{endings})?"


def _one_of(patterns: Iterable[str]) -> str:
    """A pattern of any of them, with spaces as a verbose pattern needs them."""
    return rf"(?:{'|'.join(patterns)})".replace(" ", r"\ ")


_PLANS = WORDS["plans"]
_VERBS, _CONNECTIVES = _PLANS["verbs"].split(), _PLANS["connectives"].split()
_PLAIN = rf"{_one_of(_VERBS)}\b(?! (?:is|are|was|were|of)\b)"  # "Count the bars", not "The count is 5"
_GERUND = rf"{_one_of(verb.removesuffix('e') for verb in _VERBS)}[a-z]?ing\b"
_DONE = rf"{_one_of(verb.removesuffix('e') for verb in _VERBS)}e?d\b"
_PERCEIVING = _one_of(["find", "read", "count", "get", "take", "think", "observe", "notice", "note"])
_ARTICLE = (
    "(?:the|an|(?-i:a)|each|every|both|all|any|it|its|their|his|her|my|your|our|this|these|those|what|how|whether)"
)
_PLAN = re.compile(
    rf"""\W*+(?:{_one_of(_CONNECTIVES)}(?![a-zà-ÿ])\W*+)*+
    (?: {_PLAIN}
      # Any other word before an article is an imperative: "Extract the figures".
      | (?!{_one_of(_PLANS["closed"].split())}\b|\w+(?:ing|ed|s|ly)\b)[a-z]+\ (?:(?:up|out|down|off)\ )?{_ARTICLE}\b
      | (?:in\ order\ )?to\ {_PLAIN}
      | (?:(?:by|after|when|while|before|upon|on)\ )?{_GERUND}
      | let(?:'s|\ us|\ me)?\b
      | (?:how|what|whether|why)\b
      # "We need to …", "I am going to …", "we can compare …", "we compare …", but not "we can see …".
      | (?:i|we|you|one)(?:'ll|\ (?:will|shall|should|must|need\ to|have\ to|want\ to|would|try\ to))\b
      | (?:i|we|you)(?:'m|'re|\ am|\ are)\ (?:going|asked|trying|looking|required|supposed)\b
      | (?:i|we|you|one)\ (?:(?:can|could|may|might|cannot)\ )?(?:then\ |now\ |first\ |also\ |\w+ly\ )?
        (?!{_PERCEIVING}\b){_PLAIN}
      | (?:i|we|you|one)\ (?:can|could|may|might|cannot)\ (?:then\ |now\ |also\ )?(?:find|read|count|get|answer)\b
      | (?:the|my|our)\ (?:(?:first|next|second|last|final)\ step|question|problem|task|goal|aim|prompt|user)\b
      | (?:it|\d+)\ is\ (?:\w+\ ){{0,2}}to\ {_PLAIN}
      | [^,]*\b(?:must|should|needs?\ to|ha(?:s|ve)\ to)\ be\ {_DONE}
      | [^,]*\bcan\ be\ (?:{_DONE}|found)\ (?:by|using|from|with|through)\b
      | (?:(?:ich|wir|je|nous)\ )?{_one_of(_PLANS["stems"].split())}(?:en|er|ez|ons|ar|a|emos|amos|os|e)?(?![a-zà-ÿ])
      | {_one_of(_PLANS["others"])}(?![a-zà-ÿ])
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_FILLER = re.compile(
    rf"\b(?:{_one_of(WORDS['filler']['phrases'])}|{_inflected(WORDS['filler']['words'].split() + _CONNECTIVES)})\b",
    re.IGNORECASE,
)
_FINDING = re.compile(rf"\b{_inflected(_VERBS)} that\b(.*)", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<=[?])|[,;:.!。、](?!\d)|\n")
_CLAUSE = re.compile(r"\b(?:and|but|so|because|since|while|although|where|which|who)\b", re.IGNORECASE)
_DIGITS = re.compile(r"\d[\d,]*(?:\.\d+)?")


def clauses(text: str) -> list[str]:
    """The clauses of a text."""
    return [clause for part in _SENTENCE.split(plain_characters(text)) for clause in _CLAUSE.split(part)]


def statements(step: str) -> list[str]:
    """The clauses of a step that state something, without filler.

    Of a plan only the numbers in digits are left, as in "Subtract 3 from 7"; in words, as in "compare the two bars", a
    number is no value. But "we find that the bar is red" states what follows. Of a question nothing is left.
    """
    found: list[str] = []
    for part in _SENTENCE.split(plain_characters(step)):
        if part.endswith("?"):
            continue
        stated = part
        if _PLAN.match(part):
            found.append(" ".join(_DIGITS.findall(part)))
            finding = _FINDING.search(part)
            stated = finding[1] if finding else ""
        found += [_FILLER.sub(" ", clause) for clause in _CLAUSE.split(stated)]
    return found
