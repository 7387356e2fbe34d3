"""How the world's statements are worded: one claim in several ways, read back from each.

`FORMS` is the one table: `reword` writes from it and `read` reads with it, so whatever is said is also understood.
"""

from __future__ import annotations

import re

# The first form of each kind is the plain one. A slot's pattern is in `_SLOTS`.
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
FILLERS = ("Look at the picture.", "Let me look closely.", "First the picture.")
GLANCE = "At a glance."  # how a made-up line of reasoning begins
VERBS = {"bar": "reaches", "row": "has", "slice": "takes"}
_SLOTS = {
    "c": r"\w+", "s": r"\w+", "n": "bar|row|slice", "k": "bar|row|slice|object", "verb": "reaches|has|takes",
    "m": "tallest|longest|biggest|shortest|smallest", "p": r"\w+ \w+", "w": r"\w+", "u": r"\w+", "rel": "above|left of",
    "no": "not |", "l": r"[\w, ]+", "x": r"\w+ shape|\w+",
    "v": r"\d{1,3}", "a": r"\d{1,3}", "b": r"\d{1,3}", "r": r"\d{1,3}",
}  # fmt: skip


def _pattern(form: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", form)
    text = "".join(re.escape(p) if i % 2 == 0 else f"(?P<{p}>{_SLOTS[p]})" for i, p in enumerate(parts))
    return re.compile(text, re.IGNORECASE)


_PATTERNS = tuple((kind, _pattern(form)) for kind, forms in FORMS.items() for form in forms)


def read(step: str) -> tuple[str, dict[str, str]] | None:
    """The claim of a written step, as its kind and lower-case slots; None where it is worded in no way of the world's.

    The last full stop may be missing; case and spacing do not matter. A chart's verb must fit its noun.
    """
    text = " ".join(step.split()).rstrip(".")
    for kind, pattern in _PATTERNS:
        if m := pattern.fullmatch(text):
            slots = {name: value.lower() for name, value in m.groupdict().items()}
            return (kind, slots) if VERBS.get(slots.get("n", ""), slots.get("verb")) == slots.get("verb") else None
    return None


def reword(step: str, manner: int) -> str:
    """A plainly worded step in another manner (0: as it is); a step that cannot be read stays as it is."""
    found = read(step)
    if found is None:
        return step
    kind, slots = found
    text = FORMS[kind][manner % len(FORMS[kind])].format(**slots)
    return f"{text[0].upper()}{text[1:]}."
