"""The options that a question offers, and which of them an answer picks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from ireasoner.method.latex import plain_characters

MAX_QUESTION_LENGTH = 4096  # characters; a longer question is not searched for options

# How options are marked: within a line, then at the start of a line or after a sign. All options are marked alike. A
# marker in brackets may follow a word, `(A)cat(B)dog`, but not a letter: `f(a)`.
_START = r"(?:^|(?<=[\n,;?.:!|])|(?<=\n )|(?<=[,;?.:!|] )|(?<=  ))"
_MARKERS = [
    re.compile(form, re.MULTILINE)
    for form in (
        r"(?<![(\[])(?<!\b[^\W\d_])[(\[](?P<mark>[A-Za-z])[)\]]",
        r"(?<![\w(])(?P<mark>[A-Za-z])\)",
        r"(?<![\w(])(?P<mark>[A-Z])(?:[.:](?=\s)|、)",
        rf"{_START}(?P<mark>[A-Za-z])[.:](?! ?[A-Za-z]\.)",
        rf"{_START}(?P<mark>[A-Z]) ?(?:-|\|) ",
        r"(?<![\w(])[(\[](?P<mark>\d{1,2})[)\]]",
        rf"{_START}(?P<mark>\d{{1,2}})(?:[.)](?!\d)|、)",
        r"(?<![\w(.])(?P<mark>\d{1,2})[.)](?=\s)",
    )
]


def marked_options(question: str) -> dict[str, str]:
    """The options that a question offers: from letter, or number, to the text of the option, which may be "".

    Options are at least two, counted from A or 1, all marked in the same way, such as `A) red B) blue`, `(A)red(B)blue`
    or `1. red`, `2. blue` on lines of their own. Reads any text and never raises.
    """
    if len(question) > MAX_QUESTION_LENGTH:
        return {}
    question = re.sub(r"(?<!\w)\*\*|\*\*(?!\w)", "", plain_characters(question))  # `**A)** red`, but not `2**3`
    for marker in _MARKERS:
        run: list[re.Match[str]] = []
        for match in marker.finditer(question):
            mark = match["mark"].upper()
            if mark == _nth(len(run), mark):
                run.append(match)
            elif mark == _nth(0, mark) and len(run) == 1:  # restart: "Look at (A). Which is it? (A) red (B) blue"
                run = [match]
        if len(run) >= 2:
            ends = [*(match.start() for match in run[1:]), len(question)]
            return {m["mark"].upper(): _text(question[m.end() : end]) for m, end in zip(run, ends, strict=True)}
    return {}


def _nth(position: int, like: str) -> str:
    """The mark of the option at a position, counted from 0: a number if `like` is one, else a letter."""
    return str(position + 1) if like.isdigit() else chr(ord("A") + position)


def _text(text: str) -> str:
    words = text.strip().partition("\n")[0].split()
    if words and words[-1].casefold() in ("and", "or"):  # "A) red, B) blue or C) green"
        words.pop()
    return " ".join(words).strip(" ;,|")


# --- what an answer picks --------------------------------------------------------------------------------------------

_WORD = r"(?:option|choice|answer|letter|antwort|opción|respuesta|réponse|选项|答案)"
_PICK = re.compile(
    rf"(?:(?:the )?(?:correct )?{_WORD}(?: is)?:? ?)?[(\[]?(?P<mark>[a-z]|\d{{1,2}})"
    r"(?:[)\].:、]*|(?:[)\]][.:]? ?|[.:] |[.:、]|\ [-|] )(?P<rest>.+))",
    re.IGNORECASE,
)
# Words around a letter that only say that it is picked.
_FILLER = re.compile(
    rf"\b(?:i(?:'d)?|would|we|choose|chose|pick|select|go|with|for|it|is|it's|this|that|so|thus|hence|therefore|the|my|final|"
    rf"correct|right|true|best|most likely|likely|probably|answer|option|choice|letter|be|must|should|as|because .*|since .*|"
    rf"la|el|es|correcta|correcto|opción|respuesta|die|das|der|ist|richtig|richtige|antwort|est|bonne|correcte|réponse)\b"
    r"|[选選故应應为為是的项項答案正确正確填本题題因此所以]|[\s.,:;!'\"*()\[\]。，]",
    re.IGNORECASE,
)
_DENIAL = re.compile(
    r"\b(?:not|isn't|wrong|incorrect|false|neither|nor|except|nicht|falsch|kein|pas|faux|fausse|no es|incorrect[oa]|fals[oa])\b"
    r"|n't\b|[不错錯误誤非]|\?",
    re.IGNORECASE,
)
_JOINED = re.compile(r"(?:[\s,;&+/()\[\].:、]|\b(?:and|und|y|e|et|both|options?|choices?|answers?|are|the|correct)\b|[和与及以选選])*", re.I)
_OR = re.compile(r"\b(?:or|oder|o|ou|либо|или)\b|/|或|还是|\?", re.IGNORECASE)


def picked(answer: str, key: str | None, options: Mapping[str, str | None], key_of: Callable[[str], str | None]) -> str | None:
    """Which options an answer picks: `A`, or `A,C` for several; "" for none of them; None if it does not commit itself.

    `options` maps each mark to the key of its text, `key` is that of the answer alone, and `key_of` gives others.
    """
    by_text = [mark for mark, option in options.items() if option and option == key]
    if len(by_text) == 1 and not re.fullmatch(r"\W*\w\W*", answer):
        return by_text[0]
    match = _PICK.fullmatch(answer)
    mark = match["mark"].upper() if match else ""
    if match and mark in options:
        rest = match["rest"]
        if not rest:
            return mark
        rest_key = key_of(rest)
        if rest_key and rest_key == options[mark]:
            return mark
        others = set(_mentioned(rest, options)) - {mark}
        if not others and not _DENIAL.search(rest) and rest_key not in options.values():
            return mark  # "A. The red bar" picks A although the option is "red"; "A. Blue" contradicts itself
    elif len(by_text) == 1:
        return by_text[0]
    return _several(answer, options, key_of)


def _mentioned(answer: str, options: Mapping[str, str | None]) -> list[str]:
    """The marks of options in an answer, in order: capital letters that stand alone, and marks in brackets."""
    found = re.findall(r"[(\[]([A-Za-z]|\d{1,2})[)\]]|(?<![A-Za-z0-9'.])([A-Z])(?![A-Za-z0-9'])", answer)
    if re.fullmatch(r"[a-z](?:(?:,| and| or|/|&)+ ?[a-z])+", answer):
        found = [(letter, "") for letter in re.findall(r"\b[a-z]\b", answer)]
    if answer[:2] == "A " and not re.match(r"A (?:or|and|is|&|,)", answer):  # an article
        found = found[1:]
    return [mark for mark in dict.fromkeys((one or other).upper() for one, other in found) if mark in options]


def _several(answer: str, options: Mapping[str, str | None], key_of: Callable[[str], str | None]) -> str | None:
    marks = _mentioned(answer, options)
    # The texts of the options stand for their letters: "(A) red and (B) blue", "red or blue".
    if not marks:
        parts = [key_of(part) for part in _OR.split(answer) if part.strip()]
        return None if len(set(parts)) > 1 and set(parts) <= {o for o in options.values() if o} else ""
    if _DENIAL.search(answer) or (len(marks) > 1 and _OR.search(answer)):
        return None
    if len(marks) == 1:
        mark = marks[0]
        left = _FILLER.sub("", re.sub(rf"[(\[]?(?<![A-Za-z0-9]){mark}(?![A-Za-z0-9])[)\]]?", "", answer))
        return mark if not left or key_of(left) == options[mark] else ""
    rest = re.sub(r"(?<![A-Za-z0-9])[A-Za-z](?![A-Za-z0-9])", "", answer)
    return ",".join(sorted(marks)) if _JOINED.fullmatch(rest) else ""
