"""What surrounds an answer in the words of a model: markup, lead-ins such as "The answer is", reasons, hedges.

`bare` and `peel` take it off; `commits` says whether an answer names one thing at all. The phrases are in phrases.toml:
those of English, and the usual ones of German, French, Spanish, Italian, Portuguese, Russian, Chinese and Japanese.
"""

from __future__ import annotations

import html
import json
import re
import tomllib
from importlib import resources

from ireasoner.method.latex import plain_characters, without_latex

MAX_ANSWER_LENGTH = 256  # characters; a longer answer is compared as text without being parsed, to bound the time
MAX_QUESTION_LENGTH = 4096  # characters; of a longer question, the rest is not read

PHRASES = tomllib.loads(resources.files("ireasoner.method").joinpath("phrases.toml").read_text("utf-8"))


def _any(name: str, **parts: str) -> re.Pattern[str]:
    """A pattern of any of the phrases of a list, in which names stand for the given parts."""
    pattern = "|".join(PHRASES[name])
    for part, value in parts.items():
        pattern = pattern.replace(part, value)
    return re.compile(pattern, re.IGNORECASE)


# --- markup ----------------------------------------------------------------------------------------------------------

_WRAPPERS = re.compile(
    r"<\|[a-z_]+\|>|</?(?:b|i|u|em|strong|p|span|div|code|mark|sub|sup|answer|box)(?: [^<>]*)?/?>|<br ?/?>",
    re.IGNORECASE,
)
_FENCE = re.compile(r"^(`{3,}|~{3,})\w*\s+(?P<core>.*?)\s*\1$", re.DOTALL)


def bare(answer: str) -> str:
    """`answer` in plain characters, without markup and LaTeX, unless it is too long. Case stays: 5 M is not 5 m."""
    collapsed = " ".join(answer.split())
    if len(collapsed) > MAX_ANSWER_LENGTH:
        return collapsed
    text = _FENCE.sub(r"\g<core>", answer.strip())
    text = _WRAPPERS.sub(" ", _unescaped(" ".join(_from_json(text).split())))
    text = " ".join(plain_characters(text).split())
    text = " ".join(without_latex(text).split()) if len(text) <= MAX_ANSWER_LENGTH else collapsed
    return re.sub(r"\( ?(.*?) ?\)", r"(\1)", text) or collapsed


def _unescaped(text: str) -> str:
    """`text` with `<` for `&lt;` and the like."""
    return text if re.search(r"&#x?[0-9a-f]{9}", text, re.IGNORECASE) else html.unescape(text)


def _from_json(text: str) -> str:
    """The value of `{"answer": "4"}`; other texts as they are."""
    if not text.startswith("{") or len(text) > MAX_ANSWER_LENGTH:
        return text
    try:
        found = json.loads(text, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return text
    values = [v for k, v in found.items() if len(found) == 1 or "answer" in k.lower()]
    return values[0] if len(values) == 1 and isinstance(values[0], str) else text


# --- words around an answer ------------------------------------------------------------------------------------------

_LEAD_IN = _any("lead_in")
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|`{1,3})(?![\s*_`])(?P<core>.+?)(?<!\s)\1(?!\w)")
_QUOTED = re.compile(r"^(?:\"(?P<core>[^\"]+)\"|'(?P<single>[^']+)'|[«「『](?P<other>[^»」』]+)[»」』])$")
_TAIL = re.compile(r"(?: ?(?:[.,;:?]|(?<![\d)])(?<!\b\w)!))+$")  # "yes!" is yes, but 5! and n! are factorials
_YES_OR_NO = re.compile(
    r"^(?P<core>yes|no|ja|nein|oui|non|sí|si|sim|não|да|нет|是|不是|はい|いいえ|네|아니요)"
    r"(?:[,;:、]|\.(?! ?\d)| -|的) ?"
    r"(?!.*\b(?:yes|maybe|perhaps|but (?:no|not|maybe))\b|\W*no\W*$).*$",
    re.IGNORECASE,
)
_CORRECTED = re.compile(
    r"^(?P<core>[^,;]+?)"
    r"(?:,(?: and)? not| - not|,? rather than|,? instead of| \(not) [^()]+\)?$"
    r"|^not [^,;]+?,? but (?P<other>[^,;]+)$",
    re.IGNORECASE,
)
_FOREIGN_TAIL = re.compile(r"(?<=\w)(?:です|だ|입니다)$|(?<=[\u3400-\u9fff]{2})的$")
_ENGLISH_TAIL = re.compile(r" in (?:total|colou?r)$", re.IGNORECASE)
_REASON = re.compile(
    r",? (?:because|since|as shown|as can be seen|(?:even )?though|although|whereas|weil|parce que|porque) .*$",
    re.IGNORECASE,
)
_DECORATIONS = (
    (_LEAD_IN, ""),
    (_EMPHASIS, r"\g<core>"),
    (_QUOTED, r"\g<core>\g<single>\g<other>"),
    (_TAIL, ""),
    (_FOREIGN_TAIL, ""),
    (_ENGLISH_TAIL, ""),
    (_YES_OR_NO, r"\g<core>"),
    (_CORRECTED, r"\g<core>\g<other>"),
)


def peel(text: str) -> str:
    """`text` without its decoration, removed layer by layer. A text that is all decoration stays: "?" is an answer."""
    before = None
    while text != before:
        before = text
        for pattern, replacement in _DECORATIONS:
            text = pattern.sub(replacement, text).strip() or text
    return text


def without_reason(text: str) -> str:
    """`text` without a reason that follows the answer: "red because it is the longest bar" is red."""
    return _REASON.sub("", text) or text


# --- answers that do not commit themselves ---------------------------------------------------------------------------

_HEDGE = _any("hedge", LIMIT="|".join(PHRASES["limits"]), UNSURE="|".join(PHRASES["unsure"]))
_ASKS_FOR_WORDS = _any("asks_for_words")


def commits(answer: str, question: str) -> bool:
    """Whether an answer names one thing. An "or" may be part of a title, if one is asked for or it is in quotes."""
    answer = _YES_OR_NO.sub(r"\g<core>", without_reason(answer))
    return not _HEDGE.search(answer) or bool(_ASKS_FOR_WORDS.search(question) or _QUOTED.match(answer.rstrip(".")))
