"""Where the parts of a reply in tags are: its thoughts, its answers, its question.

As for every reader of replies, the work is linear in the length of the text: every repetition in the patterns is
possessive (`*+` never gives characters back), bounded, or anchored to a line.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

TAG = re.compile(r"<\s*+(?P<slash>/?)\s*+(?P<name>think|answer|question|rationale)\s*+>", re.ASCII | re.IGNORECASE)
# Any other tag, or a special token such as <|im_end|>; "3 < x and y > 2" is neither.
MARKUP = re.compile(r"<(?:[|｜]|[/!]?[a-z])[^\s<>]*+(?:\s[^<>=]*+=[^<>]*+)?\s*+/?>", re.IGNORECASE)
LETTER_OR_DIGIT = re.compile(r"[^\W_]")
# A code block, code that begins and ends with a tag, or a tag in quotation marks.
_QUOTED = re.compile(
    r"```(?:[^`]|`(?!``))*+```|`<[^`\n]*+(?<=>)`|[\"'“‘«][ ]?</?think>[ ]?[\"'”’»]", re.ASCII | re.IGNORECASE
)


class Span(NamedTuple):
    """A part of a text: what its tags enclose, where the opening one starts, and where the closing one ends."""

    inside: str
    start: int
    end: int


class Parts(NamedTuple):
    """The closed thoughts and answers of a reply; `unclosed` is the name of the tag that it ends in."""

    thoughts: list[Span]
    answers: list[Span]
    unclosed: str | None
    problem: str | None


def block(text: str, name: str) -> tuple[Span, str | None]:
    """The first <name> of `text` and what is wrong with it.

    Without a closing tag it ends at the next tag, and without any it is empty.
    """
    tags = list(TAG.finditer(text))
    named = [tag for tag in tags if tag["name"].lower() == name]
    opening = next((tag for tag in named if not tag["slash"]), None)
    if opening is None:
        return Span("", len(text), len(text)), f"no closed <{name}>"
    later = [tag for tag in tags if tag.start() >= opening.end()]
    closing = next((tag for tag in later if tag["slash"] and tag["name"].lower() == name), None)
    if closing is None:
        end = later[0].start() if later else len(text)
        return Span(text[opening.end() : end].strip(), opening.start(), end), f"no closed <{name}>"
    problem = f"more than one <{name}>" if len(named) > 2 else None
    return Span(text[opening.end() : closing.start()].strip(), opening.start(), closing.end()), problem


def parts(text: str, opened: bool = False) -> Parts:
    """Find the thoughts and the answers of a reply.

    A tag inside a thought is mentioned there. So is a `</think>` that is quoted, or that a `</think>` follows as the
    next tag, with text in between; unless all are, the thought ends at the first other one. A `</think>` that closes
    nothing is passed over.

    Args:
        text: the reply.
        opened: whether it begins inside of a thought, which its prompt has opened.
    """
    tags = [tag for tag in TAG.finditer(text) if tag["name"].lower() in ("think", "answer")]
    ends = {tag.start() for tag in tags if tag["slash"] and tag["name"].lower() == "think"}
    mentions = {tag.start() for quote in _QUOTED.finditer(text) for tag in TAG.finditer(text, *quote.span())}
    for tag, following in pairwise(tags):
        if {tag.start(), following.start()} <= ends and _first_letter(text, tag.end()) < following.start():
            mentions.add(tag.start())
    last = max(ends - mentions, default=-1)
    found = Parts([], [], None, None)
    within, start, inside = ("think", 0, 0) if opened else (None, 0, 0)  # the tag that is open, and where
    first = _first_letter(text, inside)
    for tag in tags:
        name, closes = tag["name"].lower(), bool(tag["slash"])
        if within is None and not closes:
            within, start, inside = name, tag.start(), tag.end()
            first = _first_letter(text, inside)
        elif within == "think" and name == "think" and not closes and first >= tag.start():
            start, inside = tag.start(), tag.end()  # opened twice, with nothing said in between
            first = _first_letter(text, inside)
        elif within == "think" and name == "think" and closes and (tag.start() not in mentions or tag.start() > last):
            found.thoughts.append(Span(text[inside : tag.start()], start, tag.end()))
            within = None
        elif within == "answer" and name == "answer" and closes:
            found.answers.append(Span(text[inside : tag.start()].strip(), start, tag.end()))
            within = None
        elif within == "answer":
            return found._replace(unclosed=within, problem=f"more than one <{name}>")
        elif within is None and name == "answer" and found.answers:
            return found._replace(problem="more than one <answer>")  # the answer could go on up to here
    return found._replace(unclosed=within)


def _first_letter(text: str, start: int) -> int:
    """Where the first letter or digit from `start` on is."""
    letter = LETTER_OR_DIGIT.search(text, start)
    return letter.start() if letter else len(text)


def after_thought(text: str, opened: bool) -> str:
    """What follows the thoughts that a reply begins with."""
    end = 0
    for thought in parts(text, opened).thoughts:
        if text[end : thought.start].strip():
            break
        end = thought.end
    return text[end:]
