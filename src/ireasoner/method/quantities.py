"""Numbers with their units, money, ranges and ordinals: `quantity` writes each of them in one canonical form.

The names and prefixes of units come from pint; quantities.toml adds what it does not know.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from ireasoner.method.dates import date, time_of_day
from ireasoner.method.numerals import (
    SCALES,
    TABLES,
    any_of,
    chinese_cardinal,
    in_digits,
    ordinal_in_digits,
    with_points,
)

if TYPE_CHECKING:
    import pint

MAX_EXPONENT = 300  # with a larger one, such as 1e999999999, the number stays text: its digits would fill the memory

# --- units -----------------------------------------------------------------------------------------------------------

CURRENCIES = {name: sign for sign, names in TABLES["currencies"].items() for name in (sign, *names)}  # in lower case
UNITS = {name: unit for unit, names in TABLES["units"].items() for name in names} | CURRENCIES
_MEASURES = frozenset(TABLES["measures"].split())  # pint's names of units; it also knows bushels (`bus`) and dots
# In these letters case tells milli from mega and metre from molar; the others mean the same, as in `5 a` and `5 A`.
_CASED = frozenset("mMgGsSkKtT")

# Words between a number and a noun, which count nothing themselves: 三个 is 3.
_COUNTERS = "个個只隻條条張张本名位辆輛棵朵块塊件次杯匹头頭根把座种種枚台つ人개명"


@cache
def _registry() -> pint.UnitRegistry:
    """pint's units, which take half a second to load: when the first one is read."""
    import pint

    return pint.UnitRegistry()


@lru_cache(4096)
def unit_name(word: str) -> str:
    """The canonical name of a unit in one word: `kilometres` and `KM` are `km`, but `mW` and `MW` differ.

    A word that is no unit is returned in lower case; a plural is then another word than its singular.
    """
    lower = word.casefold()
    if lower in UNITS:
        return UNITS[lower]
    if len(word) == 1 and word not in _CASED:
        return lower.upper() if lower in "vwnjacfω" else lower
    if len(word) > 32 or lower.startswith("pound"):  # of money or of mass
        return lower
    registry = _registry()
    # `Nm` is no nanometre, but `KM` and `Kg` are what they look like.
    spelled = [word] + [lower] * (len(word) > 2 or word.isupper() or word[0] in "KC")
    for name in spelled:
        known = {prefix + unit for prefix, unit, _ in registry.parse_unit_name(name) if unit in _MEASURES}
        if len(known) == 1:
            return str(registry.get_symbol(known.pop()))
    return word if len(word) == 2 and registry.parse_unit_name(word) else lower  # `5 Mb` and `5 MB`


def is_unit(word: str) -> bool:
    """Whether a word is the name of a unit or a currency."""
    name = unit_name(word)
    return name in UNITS.values() or any(unit in _MEASURES for _, unit, _ in _registry().parse_unit_name(name))


def _unit(text: str) -> str:
    """The canonical form of a unit, such as `cm^2` for "square centimetres" and `m/s` for "metres per second"."""
    text = UNITS.get(text.casefold(), re.sub(rf"^[{_COUNTERS}] ?", "", text))
    text = re.sub(r"(?i:p(?:er|our) cent|por ciento)\b|(?i:us\$)|[^\W\d_]+", lambda m: unit_name(m[0]), text)
    text = tight(re.sub(r" ?[×*] ?", " ", text))
    text = re.sub(r"\bcubic (\w+)", r"\1^3", re.sub(r"\b(?:square|sq\.?) (\w+)", r"\1^2", text))
    text = re.sub(r"\b(\w+) squared\b", r"\1^2", re.sub(r"\b(\w+) cubed\b", r"\1^3", text))
    text = re.sub(r"(?<=[^\W\d_])([23])\b", r"^\1", text)
    text = re.sub(r"(?<=\w) ?([^\W\d_]+)\^-(\d)", lambda m: f"/{m[1]}" + (f"^{m[2]}" if m[2] != "1" else ""), text)
    return re.sub(r"° ?°? ?", "°", text)


def tight(text: str) -> str:
    """`text` without spaces that have no meaning: `x = 7` becomes `x=7`, but `A+ B` stays different from `A + B`."""
    return re.sub(r"(?<=\w) ([+-]) (?=\w)", r"\1", re.sub(r" ?([=,;:/|^()<>≤≥≠≈±×]) ?", r"\1", text))


# --- one quantity ----------------------------------------------------------------------------------------------------


def quantity(text: str) -> str | None:
    """The canonical form of a number, measure, sum of money, date, time, range or ordinal; None if it is none.

    Equal values have equal forms: `1/2` for `0.5`, `5 cm` for "five centimetres", `2021-03-05` for "March 5, 2021".
    Units are not converted into each other. `text` has no LaTeX and a bounded length; no text raises an error.
    """
    return date(text) or time_of_day(text) or _ordinal(text) or _measure(text) or _range(text) or _compound(text)


_SCALE_WORDS = SCALES | {name: 10 ** int(power) for power, names in TABLES["scales"].items() for name in names}
_CASED_SCALES = {"mn", "bn", "tn"}  # `MN` and `mN` are newtons
_SCALE = f"{any_of(_SCALE_WORDS.keys() - _CASED_SCALES)}|(?-i:{any_of(_CASED_SCALES)})"
_LETTERS = {"k": "thousand", "m": "million", "mm": "million", "b": "billion", "t": "trillion"}
_MONEY = rf"(?:{any_of(CURRENCIES)})(?:(?<=\w)(?![^\W\d_])\.?|(?<=\W))"
_INTEGER = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?:\ \d{3}){2,}|\d+)"  # groups of three only: 3,5 may be 3.5
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)"
_QUANTITY = re.compile(
    rf"""(?P<relation>[<>≤≥≠≈±]?)\ ?(?:(?P<minus>-|minus\ |negative\ )|\+)?\ ?(?P<money>{_MONEY})?\ ?
    (?: (?:(?P<whole>{_INTEGER})\ )?(?P<top>{_DECIMAL})\ ?/\ ?(?P<bottom>{_DECIMAL})
      | (?:(?P<factor>{_DECIMAL})×)?10\^\(?(?P<power>[+-]?\d+)\)?
      | (?P<decimal>{_DECIMAL})(?:e(?P<exponent>[+-]?\d+))?
    )(?:\ ?(?P<scale>{_SCALE})(?!(?<=[a-z])\w))?
    \ ?(?P<unit>(?!(?:to|or|and)\ )
        (?:(?:[^\W\d_]|[%‰°$€£¥₹¢₩₽'"]|/(?=[^\W\d]))(?:[^\d^]|\^-?\d|(?<=[^\W\d_])[23](?!\d))*)?)""",
    re.IGNORECASE | re.VERBOSE,
)
_SHORT = re.compile(
    rf"(?P<before>-?{_MONEY} ?)?(?P<number>{_DECIMAL}) ?(?P<letter>k|mm?|b|t)(?P<after> ?{_MONEY})?", re.IGNORECASE
)


def _measure(text: str) -> str | None:
    """The canonical form of a number with or without a unit, as in `≥5 cm`, `1.2 million dollars` or "two thirds"."""
    relation, text = _relation(text)
    if (short := _SHORT.fullmatch(text)) and (
        short["before"] or short["after"] or (text[-2:-1].isdigit() and text[-1] in "kK")
    ):
        text = f"{short['before'] or ''}{short['number']} {_LETTERS[short['letter'].lower()]}{short['after'] or ''}"
    match = _QUANTITY.fullmatch(with_points(in_digits(text)))
    value = _value(match) if match else None
    if not match or value is None or (relation and match["relation"]):
        return None
    unit = _unit(" ".join(filter(None, ((match["money"] or "").rstrip("."), match["unit"]))))
    return f"{relation or match['relation']}{value} {unit}".strip()


def _value(match: re.Match[str]) -> Fraction | None:
    """The exact value of a match of `_QUANTITY`; None if it has none (1/0) or is too large to write."""
    scale = _SCALE_WORDS[match["scale"].lower()] if match["scale"] else 1
    exponent = int(match["power"] or match["exponent"] or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    whole, top, bottom, plain = (
        Fraction((text or "0").replace(",", "").replace(" ", ""))
        for text in (match["whole"], match["top"], match["bottom"], match["decimal"] or match["factor"] or "1")
    )
    if match["bottom"] and not bottom:
        return None
    value = whole + top / bottom if match["bottom"] else plain
    return value * scale * Fraction(10) ** exponent * (-1 if match["minus"] else 1)


_RELATIONS = {name: sign for sign, names in TABLES["relations"].items() for name in names}
_FIRST = re.compile(rf"(?:{any_of(_RELATIONS)})(?:(?<=\W)|(?![a-z])) ?(?=[^ ])", re.IGNORECASE)
_LAST = {
    "≥": re.compile(
        r",? (?:or|and) (?:more|greater|higher|above|over|later|older|up|taller|longer|larger|bigger|heavier|"
        r"wider)$|(?<=\d)\+$|"
        r" oder mehr$| ou plus$| o más$| ou mais$|"
        r" o più$| или (?:больше|более)$|[个岁]?(?:或|及)?(?:以上|更多)$",
        re.IGNORECASE,
    ),
    "≤": re.compile(
        r",? (?:or|and) (?:less|fewer|lower|below|under|earlier|younger|shorter|smaller|lighter)$|"
        r" oder weniger$| ou moins$| o menos$| ou menos$|"
        r" o meno$| или (?:меньше|менее)$|[个岁]?(?:或|及)?(?:以下|更少)$",
        re.IGNORECASE,
    ),
    "≈": re.compile(r" or so$", re.IGNORECASE),
}


def _relation(text: str) -> tuple[str, str]:
    """The sign of a relation in words, such as "≥" for "at least 5" and "5 or more", and the text without it."""
    for sign, last in _LAST.items():
        if match := last.search(text):
            return sign, text[: match.start()]
    match = _FIRST.match(text)
    return (_RELATIONS[match[0].strip().lower()], text[match.end() :]) if match else ("", text)


# --- ordinals, ranges and compounds ----------------------------------------------------------------------------------

_ORDINAL_WORD = re.compile(
    r"(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|\w+teenth|\w+tieth|"
    r"\w+ty-(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth))(?!\w)",
    re.IGNORECASE,
)
_ORDINAL = re.compile(r"0*(\d+) ?(?:st|nd|rd|th)(?P<rest>(?:[ -][^\d]*)?)", re.IGNORECASE)


def _ordinal(text: str) -> str | None:
    """`1st` for "first", `1st place` for "first place"."""
    if match := _ORDINAL_WORD.match(text):
        text = f"{ordinal_in_digits(match[0])}{text[match.end() :]}"
    elif match := re.match(r"第 ?(\d+|[一二三四五六七八九十百]+) ?[个名位]?", text):
        text = f"{match[1] if match[1].isdigit() else chinese_cardinal(match[1])}th{text[match.end() :]}"
    match = _ORDINAL.fullmatch(text)
    if not match:
        return None
    number = int(match[1])
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}{match['rest'].casefold()}"


_TO = re.compile(r" ?(?:-|~|→|至|到) ?| (?:to|through|bis|à|a|al|and|und|et|y) ", re.IGNORECASE)


def _range(text: str) -> str | None:
    """`10..20 cm` for "10-20 cm", "10 to 20 cm", "10 cm - 20 cm" and "between 10 and 20 cm"."""
    bare = re.sub(r"^(?:from|between|von|zwischen|de|entre|从|從) ", "", text, flags=re.IGNORECASE)
    first, separator, last = (
        (bare[: m.start()], m[0].strip(), bare[m.end() :]) if (m := _TO.search(bare, 1)) else ("", "", "")
    )
    if not first or (separator in ("and", "und", "et", "y") and bare == text):
        return None
    times = [time_of_day(end) for end in (first, last)]
    if None not in times:
        return f"{times[0]}..{times[1]}"
    ends = [_measure(end) for end in (first, last)]
    if None in ends or any(end[0] in "<>≤≥≠≈±" for end in ends if end):
        return None
    (low, _, unit), (high, _, other) = (end.partition(" ") for end in ends if end)
    if (
        Fraction(low) >= Fraction(high)
        or (unit and other and unit != other)
        or (unit and not other and unit not in CURRENCIES.values())
    ):
        return None
    return f"{low}..{high} {unit or other}".strip()


_PAIR = re.compile(r"(\d+(?:\.\d+)?) ?([^\W\d_]+|['\"°])(?:,? and |,? |$|(?=\d))")


def _compound(text: str) -> str | None:
    """`2 h 30 min` for "2 hours and 30 minutes", and the like in feet and inches or degrees and minutes."""
    pairs = _PAIR.findall(text)
    if not 2 <= len(pairs) <= 3 or _PAIR.sub("", text) or not all(is_unit(unit) for _, unit in pairs):
        return None
    return " ".join(f"{Fraction(number)} {unit_name(unit)}" for number, unit in pairs)
