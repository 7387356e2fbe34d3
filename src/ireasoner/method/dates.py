"""Dates and times of day in one canonical form.

dateutil and dateparser were tried in place of this: they read `5`, `may` and `10-20` as dates, and fill in what a date
leaves out from today's, so that a vote would depend on the clock.
"""

from __future__ import annotations

import re

from ireasoner.method.numerals import TABLES, any_of, cardinal, chinese_cardinal

_CLOCK = re.compile(r"(?P<hour>\d{1,2})(?:[:.](?P<minute>\d\d))? ?(?P<half>[ap])\.? ?m\.?", re.IGNORECASE)
_CLOCK_24 = re.compile(
    r"(?P<hour>1[3-9]|2[0-3])(?::| ?h ?)(?P<minute>[0-5]\d)(?: ?(?:h|uhr|hrs|hours))?", re.IGNORECASE
)
_GERMAN = re.compile(r"(?P<hour>\d{1,2})(?:[:.](?P<minute>\d\d))? uhr", re.IGNORECASE)
_PART_OF_DAY = re.compile(r"(?P<time>.+) (?:in the (?P<half>morning|afternoon|evening)|at night)", re.IGNORECASE)
_NAMED_TIMES = {"noon": "12:00", "midday": "12:00", "midnight": "00:00"}
_SPOKEN = re.compile(
    r"(?:(?P<part>half|a? ?quarter|\d\d?|[a-z-]+)(?: minutes)? (?P<way>past|to) )?"
    r"(?P<hour>[a-z]+|\d\d?)(?P<sharp> o'clock)?"
)


def time_of_day(text: str) -> str | None:
    """`15:30` for "3:30 PM" and "15:30"; `3:30` for "3:30" and "half past three", of either half of the day."""
    if match := _CLOCK.fullmatch(re.sub(r"^at ", "", text)):
        hour, minute = int(match["hour"]), int(match["minute"] or 0)
        if not 1 <= hour <= 12 or minute > 59:
            return None
        return f"{hour % 12 + 12 * (match['half'].lower() == 'p'):02}:{minute:02}"
    if match := _CLOCK_24.fullmatch(text):
        return f"{match['hour']}:{match['minute']}"
    if match := _GERMAN.fullmatch(text):
        return f"{int(match['hour']):02}:{match['minute'] or '00'}"
    if match := _PART_OF_DAY.fullmatch(text):
        half = "AM" if (match["half"] or "").lower() == "morning" else "PM"
        spoken = _spoken_time(match["time"].lower()) or match["time"]
        return time_of_day(f"{spoken} {half}") if spoken[0].isdigit() else None
    return _NAMED_TIMES.get(text.lower().removeprefix("12 ")) or _spoken_time(text.lower())


_EAST_ASIAN = re.compile(
    r"(?P<half>上午|早上|凌晨|下午|晚上|午前|午後|오전|오후)? ?"
    r"(?P<hour>\d{1,2}|[一二两三四五六七八九十]{1,3}) ?[点點時时시]"
    r"(?:(?P<sharp>整|钟)|(?P<thirty>半)|(?P<minute>\d{1,2})[分분]?)?"
)


def _east_asian_time(match: re.Match[str]) -> str | None:
    hour = int(match["hour"]) if match["hour"].isdigit() else chinese_cardinal(match["hour"])
    minutes = 30 if match["thirty"] else int(match["minute"] or 0)
    if hour is None or hour > 24 or minutes > 59:
        return None
    afternoon = match["half"] in ("下午", "晚上", "午後", "오후")
    return f"{hour % 12 + 12 * afternoon:02}:{minutes:02}" if match["half"] else f"{hour}:{minutes:02}"


def _spoken_time(text: str) -> str | None:
    """`3:30` for "half past three" and "3点半"; None for what is no time of day."""
    if re.fullmatch(r"\d{1,2}:[0-5]\d", text):
        return text
    if match := _EAST_ASIAN.fullmatch(text):
        return _east_asian_time(match)
    match = _SPOKEN.fullmatch(text)
    if not match or not (match["part"] or match["sharp"]):
        return None
    if match["way"] == "to" and not re.search(r"half|quarter|minutes", text):  # "three to five" is a range
        return None
    hour = int(match["hour"]) if match["hour"].isdigit() else cardinal([match["hour"]])
    part = {"half": 30, "quarter": 15, "a quarter": 15, None: 0}.get(match["part"], match["part"])
    minutes = part if isinstance(part, int) else int(part) if part.isdigit() else cardinal([part])
    if hour is None or minutes is None or not 1 <= hour <= 12 or minutes > 59:
        return None
    total = 60 * hour + (minutes if match["way"] != "to" else -minutes)
    return f"{(total // 60 - 1) % 12 + 1}:{total % 60:02}"


_MONTHS = {name: number for number, names in enumerate(TABLES["months"], 1) for name in names.split()}
_MONTH = rf"(?P<month>{any_of(_MONTHS)})(?![^\W\d_])\.?"
_ENGLISH_MONTH = (
    r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|"
    r"nov(?:ember)?|dec(?:ember)?)(?![^\W\d_])\.?"
)
_DAY, _YEAR = r"(?P<day>\d{1,2})(?:st|nd|rd|th|er|\.)?", r"(?P<year>\d{4})"
_DATES = [
    re.compile(form, re.IGNORECASE)
    for form in (
        rf"(?:(?:the|el|le|il|am|den) )?{_DAY}[ -](?:of |de )?{_MONTH}(?:(?:,? |-)(?:de |del )?{_YEAR})?(?: года)?",
        rf"{_ENGLISH_MONTH}[ -](?:the )?{_DAY}(?:,? {_YEAR})?",
        rf"{_MONTH}(?:,? (?:of |de |del )?|-){_YEAR}",
        rf"{_YEAR},? {_MONTH}(?: {_DAY})?",
        rf"{_YEAR}(?P<sign>[-/.])(?P<number>\d{{1,2}})(?P=sign){_DAY}",
        rf"{_DAY}(?P<sign>[-/.])(?P<number>\d{{1,2}})(?P=sign){_YEAR}",
        rf"(?P<number>\d{{1,2}})(?P<sign>[-/.]){_DAY}(?P=sign){_YEAR}",
        rf"{_YEAR} ?[年년] ?(?P<number>\d{{1,2}}) ?[月월](?: ?{_DAY} ?[日号일])?",
    )
]
_WEEKDAY = re.compile(r"^(?:mon|tues|wednes|thurs|fri|satur|sun)day,? (?=.*\d)", re.IGNORECASE)


def date(text: str) -> str | None:
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
