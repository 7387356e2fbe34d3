"""How the world's statements and questions are worded, and how the wordings are read back.

`FORMS` words a claim in several ways; `read` reads with it what the tiny model learned to write from it.
`SIGN_QUESTIONS` does the same for questions about signs; other questions have one wording each.
"""

from __future__ import annotations

import re

# How each kind of chart is spoken of: noun, verb, and the words for the most and the least.
CHART_WORDS = {
    "bars": ("bar", "reaches", "tallest", "shortest"),
    "dots": ("row", "has", "longest", "shortest"),
    "pie": ("slice", "takes", "biggest", "smallest"),
}
_VERBS = {noun: verb for noun, verb, _, _ in CHART_WORDS.values()}
# The first form of each kind is the plain one. `_SLOTS` says what each slot may hold.
FORMS: dict[str, tuple[str, ...]] = {
    "value": ("the {c} {n} {verb} {v}", "{c} is at {v}", "I read {v} for {c}"),
    "place": ("the {c} {s} is at the {p}", "at the {p} is the {c} {s}", "I see the {c} {s} at the {p}"),
    "extreme": ("the {m} is {c}", "{c} is the {m}"),
    "sum": ("{a} + {b} = {r}", "{a} plus {b} is {r}"),
    "difference": ("{a} - {b} = {r}", "{a} minus {b} is {r}"),
    "more": ("{a} is {no}more than {b}", "{a} is {no}larger than {b}"),
    "relation": ("{w} is {no}{rel} {u}", "{w} is {no}further {rel} {u}"),
    "list": ("the {k}s are {l}", "I count {l}"),
    "sign": ("the shape is a {c} {s}", "I see a {c} {s}", "this is a {c} {s}"),
    "kind": ("it is {no}a {x}", "that is {no}a {x}"),
}
# {x} is a shape or "<color> shape". Each question may also be written in small letters.
SIGN_QUESTIONS = {
    "exists": (
        "Is there a {x} here?", "Is a {x} present in the image?", "Does the image contain any {x}?",
        "Can you see a {x}?", "Does the picture show a {x}?",
    ),
    "absent": (
        "Is there no {x}?", "Is there not any {x}?", "Is no {x} present in the image?",
        "Does the image not contain any {x}?", "Does the picture not show a {x}?",
    ),
    "sign color": (
        "Which color is the {x}?", "What color does the {x} have?", "What is the color of the {x} here?",
        "Name the color of the {x}.",
    ),
    "sign shape": (
        "Which shape is in the image?", "What shape do you see?", "Which shape is present?",
        "What kind of shape is there?", "Which shape does the image contain?",
    ),
}  # fmt: skip
_SLOTS = {
    "c": r"\w+", "s": r"\w+", "n": "bar|row|slice", "k": "bar|row|slice|object", "verb": "reaches|has|takes",
    "m": "tallest|longest|biggest|shortest|smallest", "p": r"\w+ \w+", "w": r"\w+", "u": r"\w+", "rel": "above|left of",
    "no": "not |", "l": r"[\w, ]+", "x": r"\w+ shape|\w+",
    "v": r"\d{1,3}", "a": r"\d{1,3}", "b": r"\d{1,3}", "r": r"\d{1,3}",
}  # fmt: skip


def _patterns(table: dict[str, tuple[str, ...]]) -> tuple[tuple[str, re.Pattern[str]], ...]:
    """The kind and the pattern of every form."""
    found = []
    for kind, form in ((kind, form) for kind, forms in table.items() for form in forms):
        parts = re.split(r"\{(\w+)\}", form)  # text and names of slots in turn
        text = "".join(re.escape(p) if i % 2 == 0 else f"(?P<{p}>{_SLOTS[p]})" for i, p in enumerate(parts))
        found.append((kind, re.compile(text, re.IGNORECASE)))
    return tuple(found)


_STATEMENTS, _SIGN_QUESTIONS = _patterns(FORMS), _patterns(SIGN_QUESTIONS)


def read(step: str) -> tuple[str, dict[str, str]] | None:
    """The kind and the slots, in small letters, of the claim in a reasoning step; None where no form fits.

    The last full stop may be missing; case and spacing do not matter. A chart's verb must fit its noun.
    """
    text = " ".join(step.split()).rstrip(".")
    for kind, pattern in _STATEMENTS:
        if m := pattern.fullmatch(text):
            slots = {name: value.lower() for name, value in m.groupdict().items()}
            return (kind, slots) if _VERBS.get(slots.get("n", ""), slots.get("verb")) == slots.get("verb") else None
    return None


def read_sign_question(text: str) -> tuple[str, str] | None:
    """The kind of a question about a sign, and the thing that it asks about, if any; None where no form fits."""
    found = ((kind, m) for kind, pattern in _SIGN_QUESTIONS if (m := pattern.fullmatch(text)))
    return next(((kind, m.groupdict().get("x", "").lower()) for kind, m in found), None)
