"""When two answers are the same, and what a group of answers votes for.

`answer_key` gives an answer's canonical, typed key (`number:1/2`, `number:5 cm`, `option:A`, `text:red`); answers are
the same iff their keys are equal, so that sameness is transitive. In doubt two answers stay apart: a lost vote is
noise, but merging a right answer with a wrong one rewards the wrong one. Source of the vote: arXiv 2601.05877.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_ANSWER_LENGTH = 256  # characters; a longer answer is compared as text, unparsed, so that any input is quick
MAX_QUESTION_LENGTH = 4096  # characters; no options are looked for in a longer question
MAX_EXPONENT = 300  # 1e999999999 stays text: written out it would fill the memory


@dataclass(frozen=True, slots=True)
class Vote:
    """What a group of N trajectories answered; see `majority`."""

    answer: str | None  # the majority key; None: no readable vote
    members: tuple[int, ...]  # G, the indices of the trajectories that gave it
    fraction: float  # |G| / N, unreadable trajectories in N
    entropy: float  # H, in nats, of the shares among readable votes
    readable: int


def majority(keys: Sequence[str | None]) -> Vote:
    """The vote of a group, given each trajectory's answer key (None: unreadable, in N but casting no vote).

    Ties go to the key sampled first. No readable vote: answer None, no members, fraction and entropy 0.
    Source: the majority group G and the entropy H of arXiv 2601.05877.
    """
    counts = Counter(key for key in keys if key is not None)
    if not counts:
        return Vote(answer=None, members=(), fraction=0.0, entropy=0.0, readable=0)
    answer = max(counts, key=counts.__getitem__)  # counts keep the order of sampling and max takes the first
    members = tuple(i for i, key in enumerate(keys) if key == answer)
    readable = counts.total()
    entropy = math.fsum(count / readable * math.log(readable / count) for count in counts.values())
    return Vote(answer, members, len(members) / len(keys), entropy, readable)


def vote_shares(keys: Sequence[str | None]) -> dict[str, float]:
    """p̂(a) = count(a) / N for each answer key, unreadable trajectories (None) in N (arXiv 2601.05877)."""
    return {key: count / len(keys) for key, count in Counter(key for key in keys if key is not None).items()}


def answer_key(answer: str, question: str = "") -> str:
    """The canonical key of `answer`: two answers to one question are the same iff their keys are equal.

    Numbers are compared by exact value and unit (`12`, `12.0`, `twelve`; `50%` is neither 50 nor 0.5), the rest as
    text without case, leading article, markup or final punctuation. Only where `question` offers lettered options do
    `A`, `(A)`, `A. Red` and option A's text share a key. Any string has a key: never raises, bounded time.
    """
    bare = _bare(answer)
    key = _typed_key(bare)
    letter = _picked_letter(bare, key, lettered_options(question))
    return f"option:{letter}" if letter else key


# Characters: one for each meaning.

_LOOKALIKES = str.maketrans("‐‑‒–—―−‘’‚‛′ʼ“”„‟″⁄∕⋅∙✕✖º˚", "-------''''''\"\"\"\"\"//××××°°")


def _plain_characters(text: str) -> str:
    """NFKC, but x², 2½ and 10₂ do not become x2, 21/2 and 102; no invisible characters."""
    text = "".join(c for c in text if unicodedata.category(c) != "Cf").translate(_LOOKALIKES)
    text = re.sub(r"([⁰¹²³⁴-⁹⁺⁻ⁿ]+)", r"^\1", text)
    text = re.sub(r"([¼-¾⅐-⅞])", r" \1 ", text)
    text = re.sub(r"(?<=\d)([₀-₉]+)", r"_\1", text)
    text = unicodedata.normalize("NFKC", text).translate(_LOOKALIKES)
    return text.replace(">=", "≥").replace("<=", "≤").replace("!=", "≠")


# LaTeX: `\boxed{\frac{1}{2}}` is 1/2. Unknown commands stay, so that they keep telling answers apart.

_ESCAPED = str.maketrans("${}", "＄｛｝")  # stand-ins for \$ \{ \}, not to be read as syntax; NFKC left no others
_UNESCAPED = str.maketrans("＄｛｝", "${}")
_SYMBOL_NAMES = "times× cdot× div÷ pm± approx≈ piπ infty∞ circ° degree° le≤ leq≤ ge≥ geq≥ lt< gt> ne≠ neq≠"
_SYMBOLS = {name[:-1]: name[-1] for name in _SYMBOL_NAMES.split()} | {"left": "", "right": "", "quad": " "}
_WRAPPER = re.compile(r"boxed|fbox|mbox|emph|operatorname|(?:text|math)(?:bf|it|rm|sf|tt|normal)?")
# A dollar sign opens maths only as in pandoc, so that "$5 and $10" and "$5-$10" stay money.
_MATHS = re.compile(r"^\$ ?([^$]+?) ?\$$|\$(?! )([^$]+)(?<! )\$(?!\d)")
_FRACTION = re.compile(r"\\[dtc]?frac *(?:\{([^{}]*)\}|(\d)) *(?:\{([^{}]*)\}|(\d))")
_POWER = re.compile(r"(?<=[\^_])\{([^{}]*)\}(?!\d)")
_COMMAND = re.compile(r"\\(?![dtc]?frac)([A-Za-z]+) *\{([^{}]*)\}")


def _without_latex(text: str) -> str:
    def grouped(content: str) -> str:
        return content if re.fullmatch(r".|-?[\d.,]+", content) else f"({content})"

    text = re.sub(r"\\([;: ])|\\[,!()\[\]]", lambda m: " " if m[1] else "", text)
    text = re.sub(r"\\([${}%#&_])", lambda m: m[1].translate(_ESCAPED), text)
    text = _MATHS.sub(lambda m: m[1] or m[2], text.replace("$$", "$"))
    text = re.sub(r"\\([A-Za-z]+)", lambda m: _SYMBOLS.get(m[1], m[0]), text.replace("{,}", ","))
    before = None
    while text != before:  # innermost braces first; every round removes a pair
        before = text
        text = _FRACTION.sub(lambda m: f" {grouped(m[1] or m[2] or '')}/{grouped(m[3] or m[4] or '')} ", text)
        text = _POWER.sub(lambda m: grouped(m[1]), text)
        text = _COMMAND.sub(lambda m: m[2] if _WRAPPER.fullmatch(m[1]) else f"{m[1]}({m[2]})", text)
    text = re.sub(r"√ ?(?:\((\w+)\)|(\d+|\w))", lambda m: f"sqrt({m[1] or m[2]})", text).translate(_UNESCAPED)
    return re.sub(r"(?<=[A-Za-z])_(?=\d)", "", text).replace("^°", "°")  # CO_2 is CO₂ is CO2


# Decoration: what surrounds an answer without being part of it.

_LEAD_IN = re.compile(
    r"^(?:(?:so|thus|hence|therefore),? )?(?:(?:the|my|our) )?(?:final |correct )?ans(?:wer)?(?: ?[:=]| is:?(?= )) ?"
    r"|^=+(?![=<>≤≥])",  # but "x = 7" stays: it names what is 7, and "y = 7" is another answer
    re.IGNORECASE,
)
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|`{1,3})(?![\s*_`])(?P<core>.+?)(?<!\s)\1(?!\w)")
_QUOTED = re.compile(r"^(?:\"(?P<core>[^\"]+)\"|'(?P<single>[^']+)')$")
_TAIL = re.compile(r"(?: ?(?:[.,;:?]|(?<![\d)])(?<!\b\w)!))+$")  # "yes!" is yes, but 5! and n! are factorials
_DECORATIONS = ((_LEAD_IN, ""), (_EMPHASIS, r"\g<core>"), (_QUOTED, r"\g<core>\g<single>"), (_TAIL, ""))
# "A" may be a name rather than an article: in "A and B", "A minus" or "A B C" it stays.
_ARTICLE = re.compile(r"^(?:the (?=\S)|an? (?!(?:and|or|to|is|plus|minus|than|vs)\b)(?=[^\W\d_]{2}))", re.IGNORECASE)


def _peel(text: str) -> str:
    """The text without decoration; what is all decoration stays, for "?" is an answer."""
    before = None
    while text != before:
        before = text
        for pattern, replacement in _DECORATIONS:
            text = pattern.sub(replacement, text).strip() or text
    return text


def _bare(answer: str) -> str:
    """The answer without typography, letter case kept (5 M is not 5 m); too long to parse: only white space goes."""
    collapsed = " ".join(answer.split())
    if len(collapsed) > MAX_ANSWER_LENGTH:
        return collapsed
    text = " ".join(_plain_characters(collapsed).split())
    return _peel(" ".join(_without_latex(text).split())) if len(text) <= MAX_ANSWER_LENGTH else collapsed


# Numbers and units.

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_TENS = "ten twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL = {word: 10 * n for n, word in enumerate(_TENS.split(), 1)}
_SMALL |= {word: n for n, word in enumerate(f"{_ONES} seventeen eighteen nineteen".split())}
_SCALES = {"trillion": 10**12, "billion": 10**9, "million": 10**6, "thousand": 1000, "hundred": 100}

_UNIT_NAMES = """% percent pct; $ dollar dollars usd us$; € euro euros eur; ¢ cent cents; / per; π pi; mi/h mph
    ° degree degrees deg; °c celsius centigrade; °f fahrenheit; in inch inches "; ft foot feet '; yd yard yards
    mi mile miles; km/h kph kmh; s second seconds sec secs; min minute minutes mins; h hour hours hr hrs
    yr year years yrs; lb lbs; oz ounce ounces; l liter liters litre litres
    ml milliliter milliliters millilitre millilitres
    g gram grams; mg milligram milligrams; kg kilogram kilograms; m meter meters metre metres
    mm millimeter millimeters millimetre millimetres; cm centimeter centimeters centimetre centimetres
    km kilometer kilometers kilometre kilometres"""
_UNITS = {name: unit for unit, *names in map(str.split, re.split("[;\n]", _UNIT_NAMES)) for name in names}
_CAPITALS = {"M", "G", "MW", "MV", "MJ", "MPa", "Mb", "Gb"}  # in lower case these are other units: metre, gram, milli-

_INTEGER = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)"  # only proper groups of three: 3,5 is no number here
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)"
_WORD = rf"(?:{'|'.join([*_SMALL, *_SCALES])})(?!\w)"
_QUANTITY = re.compile(
    rf"""(?P<relation>[<>≤≥≠≈±~]?)\ ?(?:(?P<minus>-|minus\ |negative\ )|\+)?\ ?(?P<money>us\$|usd(?!\w)|[$€£¥₹])?\ ?
    (?: (?:(?P<whole>{_INTEGER})\ )?(?P<top>\d+)\ ?/\ ?(?P<bottom>\d+)
      | (?:(?P<factor>{_DECIMAL})×)?10\^\(?(?P<power>[+-]?\d+)\)?
      | (?P<decimal>{_DECIMAL})(?:e(?P<exponent>[+-]?\d+))?
      | (?P<words>{_WORD}(?:(?:\ and)?[\ -]{_WORD})*)
    )(?:\ ?(?P<scale>{"|".join(_SCALES)})(?!\w))?
    \ ?(?P<unit>(?:(?:[^\W\d_]|[%‰°$€£¥₹¢'"]|/(?=[^\W\d]))(?:[^\d^]|\^-?\d|(?<=m)[23])*)?)""",
    re.IGNORECASE | re.VERBOSE,
)


def _cardinal(words: Sequence[str]) -> int | None:
    """`one hundred and five` → 105; None where the words are not one well-formed English number ("one two")."""
    for word, scale in _SCALES.items():
        if word in words:
            at = words.index(word)
            tail = words[at + 1 :]
            count = _cardinal(words[:at]) if at else 1  # "a hundred", its article gone
            if not count or count >= min(scale, 1000):
                return None
            if not tail:
                return count * scale
            tail = tail[1:] if tail[0] == "and" else tail
            rest = _cardinal(tail) if tail and tail[0] not in _SCALES else None
            return count * scale + rest if rest and rest < scale else None
    values = [_SMALL.get(word, -1) for word in words]
    if len(values) == 2 and values[0] >= 20 and 1 <= values[1] <= 9:
        return sum(values)
    return values[0] if len(values) == 1 and values[0] >= 0 else None


def _value(match: re.Match[str]) -> Fraction | None:
    """The exact number in a match of `_QUANTITY`; None where it is none (1/0, "one two") or too large to write."""
    scale = _SCALES.get(match["scale"].casefold()) if match["scale"] else 1
    exponent = int(match["power"] or match["exponent"] or 0)
    if scale is None or abs(exponent) > MAX_EXPONENT:
        return None
    if match["words"]:
        value = _cardinal(re.split("[ -]", match["words"].casefold()))
        if value is None:
            return None
    elif match["bottom"]:
        if int(match["bottom"]) == 0:
            return None
        value = int((match["whole"] or "0").replace(",", "")) + Fraction(int(match["top"]), int(match["bottom"]))
    else:
        value = Fraction((match["decimal"] or match["factor"] or "1").replace(",", ""))
    return value * scale * Fraction(10) ** exponent * (-1 if match["minus"] else 1)


def _unit(text: str) -> str:
    def canonical(match: re.Match[str]) -> str:
        name = match[0] if match[0] in _CAPITALS else match[0].casefold().replace(" ", "")
        return _UNITS.get(name, name)

    unit = _tight(_UNITS.get(text.casefold()) or re.sub(r"(?i:per cent\b|us\$)|[^\W\d_]+", canonical, text))
    unit = re.sub(r"\b(?:square|sq\.?) (\w+)", r"\1^2", re.sub(r"\bcubic (\w+)", r"\1^3", unit))
    return re.sub(r"° ?°? ?", "°", re.sub(r"m([23])\b", r"m^\1", unit))


def _tight(text: str) -> str:
    """Without the spaces that carry no meaning: `x = 7` is `x=7`, but `A+ B` is not `A + B`."""
    return re.sub(r"(?<=\w) ([+-]) (?=\w)", r"\1", re.sub(r" ?([=,;:/^()<>≤≥≠≈±×]) ?", r"\1", text))


def _typed_key(bare: str) -> str:
    if len(bare) > MAX_ANSWER_LENGTH:
        return f"text:{bare.casefold()}"
    bare = _peel(_ARTICLE.sub("", re.sub(r"(?<=\d) ?[xX*×] ?(?=\d)", "×", bare)))
    match = _QUANTITY.fullmatch(bare)
    value = _value(match) if match else None
    if match and value is not None:
        unit = _unit(" ".join(filter(None, (match["money"], match["unit"]))))
        return unicodedata.normalize("NFKC", f"number:{match['relation']}{value} {unit}".strip())
    return f"text:{unicodedata.normalize('NFKC', _tight(bare).casefold())}"


# Lettered options.

_MARKERS = [re.compile(rf"(?<![\w(]){form}") for form in (r"\(([A-Za-z])\)", r"([A-Za-z])\)", r"([A-Z])[.:](?=\s)")]
_PICK = re.compile(
    r"(?:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?:? )?[(\[]?(?P<letter>[a-z])"
    r"(?:[)\].:]*|(?:[)\]][.:]? ?|[.:] | - )(?P<rest>.+))",
    re.IGNORECASE,
)
_SEVERAL = re.compile(r"(?:and|or|&)(?!\w)|.*(?<!\w)[a-z][).:]", re.IGNORECASE)


def lettered_options(question: str) -> dict[str, str]:
    """The options a question offers, as letter → key of the option's text ("" where it has none); {}: none offered.

    Options are the letters from A on, at least two, all marked one way: `A) red B) blue`, `(A) red (B) blue` or
    `A. red` / `A: red`. Reads any text and never raises.
    """
    if len(question) > MAX_QUESTION_LENGTH:
        return {}
    question = re.sub(r"(?<!\w)\*\*|\*\*(?!\w)", "", _plain_characters(question))  # `**A)** red`, but not `2**3`
    for marker in _MARKERS:
        run: list[re.Match[str]] = []
        for match in marker.finditer(question):
            if match[1].upper() == chr(ord("A") + len(run)):
                run.append(match)
            elif match[1].upper() == "A" and len(run) == 1:  # the first was no option: "Look at (A). (A) red (B) blue"
                run = [match]
        if len(run) >= 2:
            ends = [*(match.start() for match in run[1:]), len(question)]
            return {m[1].upper(): _option_key(question[m.end() : end]) for m, end in zip(run, ends, strict=True)}
    return {}


def _option_key(text: str) -> str:
    words = text.strip().partition("\n")[0].split()
    if words and words[-1].casefold() in ("and", "or"):  # "A) red, B) blue or C) green"
        words.pop()
    text = " ".join(words)
    return _typed_key(_bare(text)) if text.strip(" .,;:?") else ""


def _picked_letter(bare: str, key: str, options: dict[str, str]) -> str | None:
    """The option an answer picks, by letter (`A`, `(a)`, `Option A`, `A. Red`) or by exactly one option's text."""
    match = _PICK.fullmatch(bare) if len(bare) <= MAX_ANSWER_LENGTH else None
    letter = match["letter"].upper() if match else ""
    by_text = [other for other, option in options.items() if option == key]
    if not match or letter not in options or (match["rest"] and by_text):
        return by_text[0] if len(by_text) == 1 else None
    if not match["rest"]:
        return letter
    rest_key = _typed_key(_peel(match["rest"]))
    # "A. Blue" where blue is B, and "(A) and (B)", pick no one option; "A. The red bar" still picks A.
    contradicts = _SEVERAL.match(match["rest"]) or rest_key in options.values()
    return letter if rest_key == options[letter] or not contradicts else None
