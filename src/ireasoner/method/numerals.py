"""Numbers as they are written in words, in several languages, and with the separators of other countries.

Words are read by text2num (English, German, French, Spanish, Portuguese, Italian, Dutch); Chinese and Japanese
characters and small Russian numbers are read here.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Any

TABLES = tomllib.loads(resources.files("ireasoner.method").joinpath("quantities.toml").read_text("utf-8"))
MAX_WORDS = 12  # of a number that is spelled out


def any_of(names: Iterable[str]) -> str:
    """A pattern of any of these names, the longest one first."""
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))


SCALES = {"trillion": 10**12, "billion": 10**9, "million": 10**6, "thousand": 1000, "hundred": 100}
NUMBER_WORD = (
    "(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    f"(?:twen|thir|for|fif|six|seven|eigh|nine)ty|{'|'.join(SCALES)})(?!\\w)"
)
_LANGUAGES = ("de", "fr", "es", "pt", "it", "nl")
_OTHER_WORDS = frozenset(TABLES["no_numbers"].split())
_MULTIPLES = {"十": 10, "拾": 10, "百": 100, "千": 1000, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}


def cardinal(words: Sequence[str]) -> int | None:
    """The value of an English number in lower case, `one hundred and five`; None if it is not one, as in "one two"."""
    text = " ".join(words[1:] if words[:1] == ["a"] else words)
    if re.search(rf"\band (?:{'|'.join(SCALES)})\b|\bzero .|^and ", text):  # text2num takes these
        return None
    return _read(text, "en")


def _foreign_cardinal(text: str) -> int | None:
    """The value of a number in words of another language, in lower case; None if it is not one."""
    if text in _OTHER_WORDS or not text[0].isalpha() or (text.isascii() and len(text) > 80):
        return None
    if not text.isascii() and (value := chinese_cardinal(text)) is not None:
        return value
    if text in TABLES["russian"]:
        return TABLES["russian"].index(text)
    return next((value for value in (_read(text, language) for language in _LANGUAGES) if value is not None), None)


@cache
def _library() -> Any:
    """text2num, imported when the first word is read: what reads digits alone starts sooner without it."""
    import text_to_num

    return text_to_num


def _read(text: str, language: str) -> int | None:
    try:
        return _library().text2num(text, language)
    except ValueError:
        return None


def ordinal_in_digits(word: str) -> str:
    """`21st` for "twenty-first"; other words as they are."""
    return _library().alpha2digit(word.lower(), "en", 0)


def chinese_cardinal(text: str) -> int | None:
    """The value of a number in Chinese or Japanese characters, such as 三十五 or 两百零五; None if it is not one."""
    total, section, digit = 0, 0, None
    for character in text[:40].replace("两", "二").replace("兩", "二"):
        multiple = _MULTIPLES.get(character, 0)
        if multiple >= 10**4:
            total, section, digit = (total + section + (digit or 0)) * multiple, 0, None
        elif multiple:
            section, digit = section + (1 if digit is None else digit) * multiple, None
        elif digit:
            return None  # two digits side by side
        elif character in "〇零一二三四五六七八九":
            digit = int(unicodedata.numeric(character))
        else:
            return None
    return total + section + (digit or 0) if text else None


_PARTS = ("half", "third", "quarter", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")  # denominators from 2
_SPELLED = re.compile(rf"{NUMBER_WORD}(?:(?: and)?[ -]{NUMBER_WORD})*", re.IGNORECASE)
_FRACTION = re.compile(rf"(?P<count>\d+|an?)?[ -]?(?P<part>{'|'.join(_PARTS)}|fourth|halve)s?", re.IGNORECASE)
_AND_A_PART = re.compile(rf"(\d+) and (?:an?|one|(\d+)) ({'|'.join(_PARTS)})s?(?!\w)", re.IGNORECASE)
_CHINESE_NUMBER = re.compile(rf"[〇零一二两兩三四五六七八九{''.join(_MULTIPLES)}]+")


def in_digits(text: str) -> str:
    """`text` with a number in words at its start in digits: "two thirds of it" is "2/3 of it"; else as it is."""
    sign, text = re.fullmatch(r"(minus |negative |-)?(.*)", text, re.IGNORECASE | re.DOTALL).groups("")  # pyright: ignore
    text = re.sub(r"^百分之(.+)", r"\1%", text)
    if match := re.fullmatch(rf"({_CHINESE_NUMBER.pattern})分之({_CHINESE_NUMBER.pattern})", text):
        text = f"{chinese_cardinal(match[2])}/{chinese_cardinal(match[1])}"
    text = re.sub(r"^([12]\d{3})年$", r"\1", text)  # a year, not so many years
    if match := _SPELLED.match(text):
        value = cardinal(re.split("[ -]", match[0].lower()))
        text = f"{value}{text[match.end() :]}" if value is not None else text
    elif match := _CHINESE_NUMBER.match(text):
        value = chinese_cardinal(match[0])
        text = f"{value} {text[match.end() :]}" if value is not None else text
    elif text[:1].isalpha():
        words = text.lower().split(" ")
        for count in range(min(len(words), MAX_WORDS), 0, -1):
            if (value := _foreign_cardinal(" ".join(words[:count]))) is not None:
                text = " ".join([str(value), *text.split(" ")[count:]])
                break
    if (match := _FRACTION.fullmatch(text)) and (match["count"] or match["part"].lower() == "half"):
        text = f"{match['count'] if (match['count'] or '').isdigit() else 1}/{_part(match['part'])}"
    text = _AND_A_PART.sub(lambda m: f"{m[1]} {m[2] or 1}/{_part(m[3])}", text)
    return sign + text.rstrip()


def _part(name: str) -> int:
    name = {"fourth": "quarter", "halve": "half"}.get(name.lower(), name.lower())
    return _PARTS.index(name) + 2


# A comma or point that can be read in one way only. `3,5` alone may be two numbers; `1,250` is left to English.
_GROUPED = re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}|\d{1,3}(?: \d{3})+,\d+)(?![\d.,])")
_DECIMAL_COMMA = re.compile(r"(?<![\d.,])(\d+),(\d{1,2}|\d{4,})(?= ?[%‰°€]| ?[^\W\d_])")
_EITHER = re.compile(r"\d[.,]\d{3} ?(?:€|eur)|(?:€|eur) ?\d{1,3}\.\d{3}(?!\d)", re.IGNORECASE)


def with_points(text: str) -> str:
    """`text` with decimal points for commas where nothing else can be meant; "" for `1.250 €`, which is either."""
    text = re.sub(r"(?<=[€£$¥₹])( ?\d+),(\d\d)(?!\d)", r"\1.\2", text)
    text = _GROUPED.sub(lambda m: re.sub(r"[. ]", "", m[1]).replace(",", "."), text)
    return "" if _EITHER.search(text) else _DECIMAL_COMMA.sub(r"\1.\2", text)
