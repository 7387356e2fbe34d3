"""Numbers, units, money, dates, times, ranges and ordinals: `quantity` writes each of them in one canonical form.

The names and prefixes of units come from pint, and numbers in words of eight languages from text2num; words.toml adds
what they do not know. dateutil and dateparser were tried for dates: they read `5`, `may` and `10-20` as dates, and fill
in what is missing from today's, so that a vote would depend on the clock.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache, lru_cache
from importlib import resources

import pint
from text_to_num import alpha2digit, text2num

WORDS = tomllib.loads(resources.files("ireasoner.method").joinpath("words.toml").read_text("utf-8"))
MAX_EXPONENT = 300  # with a larger one, such as 1e999999999, the number stays text: its digits would fill the memory
MAX_WORDS = 12  # of a number that is spelled out

# --- numbers in words ------------------------------------------------------------------------------------------------

SCALES = {"trillion": 10**12, "billion": 10**9, "million": 10**6, "thousand": 1000, "hundred": 100}
NUMBER_WORD = (
    "(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    f"(?:twen|thir|for|fif|six|seven|eigh|nine)ty|{'|'.join(SCALES)})(?!\\w)"
)
_LANGUAGES = ("de", "fr", "es", "pt", "it", "nl")
_OTHER_WORDS = frozenset(
    "cent cents once dix elf due dos mil miles set sei one me die on non o un une um uma una ein null nul prim centos".split()
)  # numbers in one language only
_MULTIPLES = {"十": 10, "拾": 10, "百": 100, "千": 1000, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}


def cardinal(words: Sequence[str]) -> int | None:
    """The value of an English number in lower case, `one hundred and five`; None if it is not one, as in "one two"."""
    text = " ".join(words[1:] if words[:1] == ["a"] else words)
    if re.search(rf"\band (?:{'|'.join(SCALES)})\b|\bzero .|^and ", text):  # text2num takes these
        return None
    try:
        return text2num(text, "en")
    except ValueError:
        return None


def _foreign_cardinal(text: str) -> int | None:
    """The value of a number in words of another language, in lower case; None if it is not one."""
    if text in _OTHER_WORDS or not text[0].isalpha() or text.isascii() and len(text) > 80:
        return None
    if not text.isascii() and (value := _chinese_cardinal(text)) is not None:
        return value
    if text in WORDS["russian"]:
        return WORDS["russian"].index(text)
    for language in _LANGUAGES:
        try:
            return text2num(text, language)
        except ValueError:
            continue
    return None


def _chinese_cardinal(text: str) -> int | None:
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


# --- units -----------------------------------------------------------------------------------------------------------

CURRENCIES = {name: sign for sign, names in WORDS["currencies"].items() for name in (sign, *names)}  # in lower case
UNITS = {name: unit for unit, names in WORDS["units"].items() for name in names} | CURRENCIES
_MEASURES = frozenset(WORDS["measures"].split())  # pint's names of units; it also knows bushels (`bus`) and dots
# Other single letters mean the same in either case: `5 a` and `5 A`. In these it tells milli from mega, metre from molar.
_CASED = frozenset("mMgGsSkKtT")


_COUNTERS = "个個只隻条條张張本名位辆輛棵朵块塊件次杯匹头頭根把座种種枚台つ人"  # between a number and a noun: 三个 is 3


@cache
def _registry() -> pint.UnitRegistry:
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
    return _date(text) or _time(text) or _ordinal(text) or _measure(text) or _range(text) or _compound(text)


def _any_of(names: Iterable[str]) -> str:
    """A pattern of any of these names; `mn` and `bn` are millions and billions, but `MN` and `mN` are newtons."""
    longest_first = sorted(names, key=len, reverse=True)
    return "|".join(f"(?-i:{name})" if name in ("mn", "bn", "tn") else re.escape(name) for name in longest_first)


_SCALE_WORDS = SCALES | {name: 10 ** int(power) for power, names in WORDS["scales"].items() for name in names}
_LETTERS = {"k": "thousand", "m": "million", "mm": "million", "b": "billion", "t": "trillion"}
_MONEY = rf"(?:{_any_of(CURRENCIES)})(?:(?<=\w)(?![^\W\d_])\.?|(?<=\W))"
_INTEGER = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?:\ \d{3}){2,}|\d+)"  # groups of three only: 3,5 may be 3.5
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)"
_QUANTITY = re.compile(
    rf"""(?P<relation>[<>≤≥≠≈±]?)\ ?(?:(?P<minus>-|minus\ |negative\ )|\+)?\ ?(?P<money>{_MONEY})?\ ?
    (?: (?:(?P<whole>{_INTEGER})\ )?(?P<top>{_DECIMAL})\ ?/\ ?(?P<bottom>{_DECIMAL})
      | (?:(?P<factor>{_DECIMAL})×)?10\^\(?(?P<power>[+-]?\d+)\)?
      | (?P<decimal>{_DECIMAL})(?:e(?P<exponent>[+-]?\d+))?
    )(?:\ ?(?P<scale>{_any_of(_SCALE_WORDS)})(?!(?<=[a-z])\w))?
    \ ?(?P<unit>(?:(?:[^\W\d_]|[%‰°$€£¥₹¢₩₽'"]|/(?=[^\W\d]))(?:[^\d^]|\^-?\d|(?<=[^\W\d_])[23](?!\d))*)?)""",
    re.IGNORECASE | re.VERBOSE,
)
_SHORT = re.compile(
    rf"(?P<before>-?{_MONEY} ?)?(?P<number>{_DECIMAL}) ?(?P<letter>k|mm?|b|t)(?P<after> ?{_MONEY})?", re.IGNORECASE
)


def _measure(text: str) -> str | None:
    """The canonical form of a number with or without a unit, as in `≥5 cm`, `1.2 million dollars` or "two thirds"."""
    relation, text = _relation(text)
    if (short := _SHORT.fullmatch(text)) and (short["before"] or short["after"] or text[-2:-1].isdigit() and text[-1] in "kK"):
        text = f"{short['before'] or ''}{short['number']} {_LETTERS[short['letter'].lower()]}{short['after'] or ''}"
    match = _QUANTITY.fullmatch(_with_points(_in_digits(text)))
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


_RELATIONS = {name: sign for sign, names in WORDS["relations"].items() for name in names}
_FIRST = re.compile(rf"(?:{_any_of(_RELATIONS)})(?:(?<=\W)|(?![a-z])) ?(?=[^ ])", re.IGNORECASE)
_LAST = {
    "≥": re.compile(
        r",? (?:or|and) (?:more|greater|higher|above|over|later|older|up)$|(?<=\d)\+$| oder mehr$| ou plus$| o más$| ou mais$|"
        r" o più$| или (?:больше|более)$|[个岁]?(?:或|及)?(?:以上|更多)$",
        re.IGNORECASE,
    ),
    "≤": re.compile(
        r",? (?:or|and) (?:less|fewer|lower|below|under|earlier|younger)$| oder weniger$| ou moins$| o menos$| ou menos$|"
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


# --- numbers as they are written in words and in other countries -----------------------------------------------------

_PARTS = "half third quarter fifth sixth seventh eighth ninth tenth".split()  # the denominator, from 2
_SPELLED = re.compile(rf"{NUMBER_WORD}(?:(?: and)?[ -]{NUMBER_WORD})*", re.IGNORECASE)
_FRACTION = re.compile(rf"(?P<count>\d+|an?)?[ -]?(?P<part>{'|'.join(_PARTS)}|fourth|halve)s?", re.IGNORECASE)
_AND_A_PART = re.compile(rf"(\d+) and (?:an?|one|(\d+)) ({'|'.join(_PARTS)})s?(?!\w)", re.IGNORECASE)
_CHINESE_NUMBER = re.compile(rf"[〇零一二两兩三四五六七八九{''.join(_MULTIPLES)}]+")


def _in_digits(text: str) -> str:
    """`text` with a number in words at its start in digits: "two thirds of it" is "2/3 of it"; else as it is."""
    sign, text = re.fullmatch(r"(minus |negative |-)?(.*)", text, re.IGNORECASE | re.DOTALL).groups("")  # pyright: ignore
    text = re.sub(r"^百分之(.+)", r"\1%", text)
    if match := _SPELLED.match(text):
        value = cardinal(re.split("[ -]", match[0].lower()))
        text = f"{value}{text[match.end() :]}" if value is not None else text
    elif match := _CHINESE_NUMBER.match(text):
        value = _chinese_cardinal(match[0])
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


# A comma or point of which only one reading is possible. `3,5` alone may be two numbers, and `1,250` is left to English.
_GROUPED = re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}|\d{1,3}(?: \d{3})+,\d+)(?![\d.,])")
_DECIMAL_COMMA = re.compile(r"(?<![\d.,])(\d+),(\d{1,2}|\d{4,})(?= ?[%‰°€]| ?[^\W\d_])")
_EITHER = re.compile(r"\d[.,]\d{3} ?(?:€|eur)|(?:€|eur) ?\d{1,3}\.\d{3}(?!\d)", re.IGNORECASE)


def _with_points(text: str) -> str:
    """`text` with decimal points instead of commas where nothing else can be meant; "" for `1.250 €`, which is either."""
    text = _GROUPED.sub(lambda m: re.sub(r"[. ]", "", m[1]).replace(",", "."), text)
    return "" if _EITHER.search(text) else _DECIMAL_COMMA.sub(r"\1.\2", text)


# --- ordinals, ranges, times and dates -------------------------------------------------------------------------------

_ORDINAL_WORD = re.compile(
    r"(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|\w+teenth|\w+tieth|"
    r"\w+ty-(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth))(?!\w)",
    re.IGNORECASE,
)
_ORDINAL = re.compile(r"0*(\d+) ?(?:st|nd|rd|th)(?P<rest>(?:[ -][^\d]*)?)", re.IGNORECASE)


def _ordinal(text: str) -> str | None:
    """`1st` for "first", `1st place` for "first place"."""
    if match := _ORDINAL_WORD.match(text):
        text = f"{alpha2digit(match[0].lower(), 'en', 0)}{text[match.end() :]}"
    elif match := re.match(r"第 ?(\d+|[一二三四五六七八九十百]+) ?[个名位]?", text):
        text = f"{match[1] if match[1].isdigit() else _chinese_cardinal(match[1])}th{text[match.end() :]}"
    match = _ORDINAL.fullmatch(text)
    return f"{int(match[1])}th{match['rest'].casefold()}" if match else None


_TO = re.compile(r" ?(?:-|~|→|至|到) ?| (?:to|through|bis|à|a|al|and|und|et|y) ", re.IGNORECASE)


def _range(text: str) -> str | None:
    """`10..20 cm` for "10-20 cm", "10 to 20 cm", "10 cm - 20 cm" and "between 10 and 20 cm"."""
    bare = re.sub(r"^(?:from|between|von|zwischen|de|entre|从|從) ", "", text, flags=re.IGNORECASE)
    first, separator, last = (bare[: m.start()], m[0].strip(), bare[m.end() :]) if (m := _TO.search(bare, 1)) else ("", "", "")
    if not first or (separator in ("and", "und", "et", "y") and bare == text):
        return None
    ends = [_measure(end) for end in (first, last)]
    if None in ends or any(end[0] in "<>≤≥≠≈±" for end in ends if end):
        return None
    (low, _, unit), (high, _, other) = (end.partition(" ") for end in ends if end)
    unit_before = _measure(first + " " + other) if other and not unit else None
    if Fraction(low) >= Fraction(high) or (unit and other and unit != other) or (unit and not other and unit not in CURRENCIES.values()):
        return None
    return f"{low}..{high} {unit or other}".strip()


_PAIR = re.compile(r"(\d+(?:\.\d+)?) ?([^\W\d_]+|['\"°])(?:,? and |,? |$|(?=\d))")


def _compound(text: str) -> str | None:
    """`2 h 30 min` for "2 hours and 30 minutes", and the like in feet and inches or degrees and minutes."""
    pairs = _PAIR.findall(text)
    if not 2 <= len(pairs) <= 3 or _PAIR.sub("", text) or not all(is_unit(unit) for _, unit in pairs):
        return None
    return " ".join(f"{Fraction(number)} {unit_name(unit)}" for number, unit in pairs)


_CLOCK = re.compile(r"(?P<hour>\d{1,2})(?:[:.](?P<minute>\d\d))? ?(?P<half>[ap])\.? ?m\.?", re.IGNORECASE)
_CLOCK_24 = re.compile(r"(?P<hour>1[3-9]|2[0-3])[:h](?P<minute>[0-5]\d)(?: ?(?:h|uhr|hrs|hours))?", re.IGNORECASE)
_NAMED_TIMES = {"noon": "12:00", "midday": "12:00", "midnight": "00:00"}
_SPOKEN = re.compile(r"(?:(?P<part>half|a? ?quarter|\d\d?|[a-z-]+)(?: minutes)? (?P<way>past|to) )?(?P<hour>[a-z]+|\d\d?)(?P<sharp> o'clock)?")


def _time(text: str) -> str | None:
    """`15:30` for "3:30 PM" and "15:30"; `3:30` for "3:30" and "half past three", of either half of the day."""
    if match := _CLOCK.fullmatch(re.sub(r"^at ", "", text)):
        hour, minute = int(match["hour"]), int(match["minute"] or 0)
        if not 1 <= hour <= 12 or minute > 59:
            return None
        return f"{hour % 12 + 12 * (match['half'].lower() == 'p'):02}:{minute:02}"
    if match := _CLOCK_24.fullmatch(text):
        return f"{match['hour']}:{match['minute']}"
    return _NAMED_TIMES.get(text.lower().removeprefix("12 ")) or _spoken_time(text.lower())


def _spoken_time(text: str) -> str | None:
    if re.fullmatch(r"\d{1,2}:[0-5]\d", text):
        return text
    match = _SPOKEN.fullmatch(text)
    if not match or not (match["part"] or match["sharp"]):
        return None
    hour = int(match["hour"]) if match["hour"].isdigit() else cardinal([match["hour"]])
    part = {"half": 30, "quarter": 15, "a quarter": 15, None: 0}.get(match["part"], match["part"])
    minutes = part if isinstance(part, int) else int(part) if part.isdigit() else cardinal([part])
    if hour is None or minutes is None or not 1 <= hour <= 12 or minutes > 59:
        return None
    total = 60 * hour + (minutes if match["way"] != "to" else -minutes)
    return f"{(total // 60 - 1) % 12 + 1}:{total % 60:02}"


_MONTHS = {name: number for number, names in enumerate(WORDS["months"], 1) for name in names.split()}
_MONTH = rf"(?P<month>{_any_of(_MONTHS)})(?![^\W\d_])\.?"
_ENGLISH_MONTH = (
    r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|"
    r"nov(?:ember)?|dec(?:ember)?)(?![^\W\d_])\.?"
)
_DAY, _YEAR = r"(?P<day>\d{1,2})(?:st|nd|rd|th|er|\.)?", r"(?P<year>\d{4})"
_DATES = [
    re.compile(form, re.IGNORECASE)
    for form in (
        rf"(?:the )?{_DAY}[ -](?:of |de )?{_MONTH}(?:(?:,? |-)(?:de |del )?{_YEAR})?",
        rf"{_ENGLISH_MONTH}[ -](?:the )?{_DAY}(?:,? {_YEAR})?",
        rf"{_MONTH}(?:,? (?:of |de |del )?|-){_YEAR}",
        rf"{_YEAR},? {_MONTH}(?: {_DAY})?",
        rf"{_YEAR}(?P<sign>[-/.])(?P<number>\d{{1,2}})(?P=sign){_DAY}",
        rf"{_DAY}(?P<sign>[-/.])(?P<number>\d{{1,2}})(?P=sign){_YEAR}",
        rf"(?P<number>\d{{1,2}})(?P<sign>[-/.]){_DAY}(?P=sign){_YEAR}",
        rf"{_YEAR} ?年 ?(?P<number>\d{{1,2}}) ?月(?: ?{_DAY} ?[日号])?",
    )
]
_WEEKDAY = re.compile(r"^(?:mon|tues|wednes|thurs|fri|satur|sun)day,? (?=.*\d)", re.IGNORECASE)


def _date(text: str) -> str | None:
    """`2021-03-05` for "March 5, 2021", "5th of March 2021" or "2021/3/5"; `2021-03` and `--03-05` for parts of a date.

    `03/05/2021` is the third of May or the fifth of March and stays text.
    """
    readings = {_read_date(match) for form in _DATES if (match := form.fullmatch(_WEEKDAY.sub("", text)))} - {None}
    return readings.pop() if len(readings) == 1 else None


def _read_date(match: re.Match[str]) -> str | None:
    found = {"year": "", "day": "", "number": "", "month": ""} | {k: v or "" for k, v in match.groupdict().items()}
    month, day = int(found["number"] or _MONTHS[found["month"].lower()]), int(found["day"] or 1)
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return None
    return f"{found['year'] or '-'}-{month:02}" + (f"-{day:02}" if found["day"] else "")
