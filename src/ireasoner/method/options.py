"""The options that a question offers, and which of them an answer picks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from ireasoner.method.latex import plain_characters
from ireasoner.method.wording import MAX_QUESTION_LENGTH

# How options may be marked, the surest way first; all options of a question are marked alike. A marker in brackets may
# follow a word, `(A)cat(B)dog`, but not a single letter, `f(a)`.
_MARKERS = [
    re.compile(form, re.MULTILINE)
    for form in (
        r"^[ \t]*[-*]? ?[(\[]?(?P<mark>[A-Z])(?:[)\]][.:]?|[.:、])",
        r"^[ \t]*(?P<mark>[A-Z]) ?[-|] ",
        r"(?<![(\[])(?<!\b[A-Za-z])[(\[](?P<mark>[A-Za-z])[)\]]",
        r"(?<![\w(])(?P<mark>[A-Za-z])\)",
        r"(?<![A-Za-z0-9_(])(?P<mark>[A-Z])(?:[.:](?=\s)|、)",
        r"(?<![A-Za-z0-9_(.:])(?P<mark>[A-Z])\.(?![A-Z]\.)",
        r"(?:^|(?<=[,;:?]) ?)(?P<mark>[a-z])[.:] ?",
        r"(?:^|(?<=[,;?:|]) ?)(?P<mark>[A-Z]) ?[-|=] ",
        r"^[ \t]*[(\[]?(?P<mark>I{1,3}|IV|VI{0,3})(?:[)\]]|[.:]\s)",
        r"^[ \t]*[(\[]?(?P<mark>\d{1,2})(?:[)\]]|[.、:](?!\d))",
        r"(?<![\w(])[(\[](?P<mark>\d{1,2})[)\]]",
        r"(?<![\w(.])(?P<mark>\d{1,2})[.)](?=\s)",
    )
]
_ROMAN = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII")


def marked_options(question: str) -> dict[str, str]:
    """The options that a question offers: from letter, or number, to the text of the option, which may be "".

    Options are at least two, counted from A or 1, all marked in the same way, such as `A) red B) blue`, `(A)red(B)blue`
    or `1. red`, `2. blue` on lines of their own. A question beyond `MAX_QUESTION_LENGTH` is not searched. Reads any
    text and never raises.
    """
    if len(question) > MAX_QUESTION_LENGTH:
        return {}
    question = plain_characters(question)
    question = re.sub(r"(?<!\w)\*\*|\*\*(?!\w)", "", question)  # `**A)** red`, but not `2**3`
    for marker in _MARKERS:
        run: list[re.Match[str]] = []
        for match in marker.finditer(question):
            mark = match["mark"].upper()
            first = run[0]["mark"].upper() if run else mark
            if mark == _nth(len(run), first):
                run.append(match)
            elif mark == _nth(0, mark) and len(run) == 1:  # restart: "Look at (A). Which is it? (A) red (B) blue"
                run = [match]
        if len(run) >= 2:
            ends = [*(match.start() for match in run[1:]), len(question)]
            found = {m["mark"].upper(): _text(question[m.end() : end]) for m, end in zip(run, ends, strict=True)}
            texts = [text.strip(" .,;:?") for text in found.values()]
            without_texts = not any(texts) and run[0][0][0] in "(["  # "(A), (B) or (C)"
            if all(texts) or without_texts:  # but not "by A. B. Smith" or "figures (a) and (b) show"
                return found
    return {}


def _nth(position: int, like: str) -> str:
    """The mark of the option at a position, counted from 0: a number, a Roman one or a letter, as `like` is one."""
    if like.isdigit():
        return str(position + 1)
    return _ROMAN[position] if like in _ROMAN and position < len(_ROMAN) else chr(ord("A") + position)


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
# What may stand around a mark and only says that it is picked.
_FILLER = re.compile(
    r"\b(?:i(?:'d)?|we|would|will|choose|chose|pick|select|go|with|for|it|it's|is|this|that|so|"
    r"thus|hence|therefore|the|my|final|correct|right|true|only|both|all|of|are|also|too|"
    r"statements?|options|choices|answers|best|most|visible|shown|present|correctas|correctes|corrette|sont|sono|son|sind|"
    r"sowohl|als|auch|respuestas|réponses|risposte|antworten|les|las|"
    r"likely|probably|must|should|be|as|one|because .*|since .*|"
    r"die|das|der|ist|richtige?|la|el|es|correct[oae]|est|bonne|elijo|wähle|ich|je|choisis|"
    r"option|choice|answer|letter|antwort|opción|respuesta|réponse)\b"
    r"|[选選择擇故应應为為是的项項正确正確填本题題因此所以]|答案|\W",
    re.IGNORECASE,
)
_DENIAL = re.compile(
    r"\b(?:not|wrong|incorrect|false|neither|nor|except|nicht|falsch|kein|pas|faux|fausse|no es|incorrect[oa]|"
    r"fals[oa]|não|non|не)\b"
    r"|n't\b|[不错錯误誤非]|ではない|아니|아닙|\?",
    re.IGNORECASE,
)
_AND = r"and|und|y|e|et|и"
_JOINED = re.compile(
    rf"(?:[\s,;&+(){{}}\[\].:、]|\b(?:{_AND}|both|options?|choices?|answers?|are|the|correct)\b|[和与與及以选選とがは와과])*",
    re.IGNORECASE,
)
_OR = re.compile(r"\b(?:or|oder|o|ou|либо|или)\b|[/|?]|或|还是|要么|または|(?<=\w)か(?=\w)", re.IGNORECASE)
_ABOUT_OTHERS = re.compile(r"[(\[]?[A-Z][)\]]?(?:,? (?:and )?[(\[]?[A-Z][)\]]?)* (?:is|are|was|were|has|have) ")
_ALSO = re.compile(rf"[,;、&+]|\b(?:{_AND}|as well as|sowie|plus)\b|[和与與及と와과]", re.IGNORECASE)
_ARTICLE = re.compile(rf"A (?!(?:{_AND}|or|oder|o|ou|plus|is|ist|es|est)\b)(?=[a-z])")


def picked(answer: str, options: Mapping[str, str], key_of: Callable[[str], str]) -> str | None:
    """Which options an answer picks: `A`, or `A,C` for several; "" for none of them; None if it does not commit itself.

    Args:
        answer: without decoration.
        options: the options that the question offers, from mark to the key of the text.
        key_of: gives the key of a text.
    """
    key = key_of(answer)
    by_text = [mark for mark, option in options.items() if option == key]
    match = _PICK.fullmatch(answer)
    mark, rest = (match["mark"].upper(), match["rest"]) if match else ("", None)
    if mark not in options or (rest and by_text):
        if by_text:
            return by_text[0] if len(by_text) == 1 else ""
        return _mentioned_only(answer, options, key_of)
    if not rest or key_of(rest) == options[mark]:
        return mark
    if _ABOUT_OTHERS.match(rest) and not _OR.search(rest):
        return mark  # "B. A and C are shorter" says why
    contradicted = _DENIAL.search(rest) or key_of(rest) in options.values() or set(_mentioned(rest, options)) - {mark}
    # "A. The red bar" picks A although the option says "red"; "A. Blue" contradicts itself.
    return _mentioned_only(answer, options, key_of) if contradicted else mark


def _mentioned(answer: str, options: Mapping[str, str]) -> list[str]:
    """The marks of options in an answer, in order: capital letters that stand alone, and marks in brackets."""
    answer = _ARTICLE.sub("", answer)
    plain = "I{1,3}|IV|VI{0,3}" if "II" in options else "[A-Z]"
    found = re.findall(rf"[(\[]([A-Za-z]|\d{{1,2}})[)\]]|(?<![A-Za-z0-9'.])({plain})(?![A-Za-z0-9'])", answer)
    if re.fullmatch(r"[a-z](?:[ ,/&|]|\b(?:and|or)\b|\b[a-z]\b)*", answer):
        found = [(letter, "") for letter in re.findall(r"\b[a-z]\b", answer)]
    if "1" in options and re.fullmatch(rf"\d{{1,2}}(?:[ ,;、/&|]|\b(?:{_AND}|or)\b|[和与]|\b\d{{1,2}}\b)*", answer):
        found = [(number, "") for number in re.findall(r"\d+", answer)]
    return [mark for mark in dict.fromkeys((one or other).upper() for one, other in found) if mark in options]


def _mentioned_only(answer: str, options: Mapping[str, str], key_of: Callable[[str], str]) -> str | None:
    """What `picked` says of an answer that mentions the marks of options, or their texts, in a sentence."""
    marks = _mentioned(answer, options)
    together = re.sub(r"[选選择擇故应應为為是的项項正确正確填答案 :]", "", answer)  # "正确选项为AC"
    if "II" not in options and re.fullmatch(r"[A-Z]+", together) and 1 < len(together) < len(options):
        answer, letters = together, sorted(set(together))
        return ",".join(letters) if "".join(letters) == answer and set(letters) <= options.keys() else ""
    if not marks:
        texts = {key_of(part) for part in _OR.split(answer) if part.strip(" ,")}
        if len(texts) > 1 and texts <= set(options.values()):
            return None
        return _named(answer, options, key_of)
    if _DENIAL.search(answer) or (len(marks) > 1 and _OR.search(answer)):
        return None
    said = re.split(rf"[(\[]?(?<![A-Za-z0-9])(?:{'|'.join(marks)})(?![A-Za-z0-9])[)\].:]*", answer, flags=re.IGNORECASE)
    # What follows a mark may be the text of its option, as in "A. red and C. blue".
    named = [
        mark.upper()
        for mark in re.findall(rf"(?<![A-Za-z0-9])(?:{'|'.join(marks)})(?![A-Za-z0-9])", answer, re.IGNORECASE)
    ]
    left = [
        said[0],
        *(text for mark, text in zip(named, said[1:], strict=True) if not _is_text(text, options[mark], key_of)),
    ]
    if not _JOINED.sub("", _FILLER.sub("", " ".join(left))):
        return ",".join(sorted(marks))
    return "" if len(marks) == 1 else None


def _named(answer: str, options: Mapping[str, str], key_of: Callable[[str], str]) -> str:
    """The marks of the options whose texts an answer lists, as in "red and blue"; "" if it says anything else."""
    marks = {text: mark for mark, text in options.items() if text}
    keys = [key_of(part) for part in _ALSO.split(answer) if part.strip()]
    listed = len(keys) > 1 and len(marks) == len(options) and all(key in marks for key in keys)
    return ",".join(sorted({marks[key] for key in keys})) if listed else ""


def _is_text(text: str, option: str, key_of: Callable[[str], str]) -> bool:
    bare = re.sub(rf"[ ,;、()]*(?:\b(?:{_AND})\b)?[ ,;(]*$", "", text).strip(" :-.")
    return bool(bare) and key_of(bare) == option
