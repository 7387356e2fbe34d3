"""When two answers are the same, and the majority vote of a group of answers (arXiv 2601.05877).

`answer_key` gives an answer its canonical, typed key (`number:1/2`, `number:5 cm`, `option:A`, `text:red`). Two answers
to a question are the same if and only if their keys are equal. This makes sameness transitive, as a vote needs it; a
comparison of pairs might not. In doubt two answers stay different: a lost vote is noise, but a wrong answer that is
merged with the right one earns its reward.
"""

from __future__ import annotations

import math
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources

WORDS = tomllib.loads(resources.files("ireasoner.method").joinpath("words.toml").read_text("utf-8"))
MAX_ANSWER_LENGTH = 256  # characters; a longer answer is compared as text without being parsed, to bound the time
MAX_QUESTION_LENGTH = 4096  # characters; a longer question is not searched for options
MAX_EXPONENT = 300  # with a larger one, such as 1e999999999, the number stays text: its digits would fill the memory


@dataclass(frozen=True, slots=True)
class Vote:
    """The majority vote of a group of N trajectories; see `majority`."""

    answer: str | None  # the key of the majority answer; None if no trajectory is readable
    members: tuple[int, ...]  # G, the indices of the trajectories with this answer
    fraction: float  # |G| / N; N includes unreadable trajectories
    entropy: float  # H, in nats, of the distribution of the readable answers
    readable: int  # number of readable trajectories


def majority(keys: Sequence[str | None]) -> Vote:
    """The majority group G and the entropy H of a group's answers (arXiv 2601.05877).

    `keys` are the answer keys of the trajectories in the order of sampling. None stands for an unreadable one, which
    counts in N but has no vote. A tie goes to the key that was sampled first. If no trajectory is readable, there is no
    answer and no member, and fraction and entropy are 0.
    """
    counts = Counter(key for key in keys if key is not None)
    if not counts:
        return Vote(answer=None, members=(), fraction=0.0, entropy=0.0, readable=0)
    answer = max(counts, key=counts.__getitem__)  # max takes the first, and counts are in the order of sampling
    members = tuple(i for i, key in enumerate(keys) if key == answer)
    readable = counts.total()
    entropy = math.fsum(count / readable * math.log(readable / count) for count in counts.values())
    return Vote(answer, members, len(members) / len(keys), entropy, readable)


def vote_shares(keys: Sequence[str | None]) -> dict[str, float]:
    """p̂(a) = count(a) / N of each answer key, where N includes unreadable trajectories (None) (arXiv 2601.05877)."""
    return {key: count / len(keys) for key, count in Counter(key for key in keys if key is not None).items()}


def answer_key(answer: str, question: str = "") -> str:
    """The canonical key of `answer`: two answers to one question are the same if and only if their keys are equal.

    Numbers have one key for each exact value and unit: `12`, `12.0` and `twelve` share it, `50%`, `50` and `0.5` do
    not. Other answers are compared as text, without case, leading article, markup and final punctuation. If `question`
    offers lettered options, `A`, `(A)`, `A. Red` and the text of option A share a key. Any string has a key; this
    function never raises and takes bounded time.
    """
    bare = _bare(answer)
    key = _typed_key(bare)
    letter = _picked_letter(bare, key, lettered_options(question))
    return f"option:{letter}" if letter else key


# --- characters: one for each meaning --------------------------------------------------------------------------------

_LOOKALIKES = str.maketrans("‐‑‒–—―−‘’‚‛′ʼ“”„‟″⁄∕⋅∙✕✖º˚", "-------''''''\"\"\"\"\"//××××°°")


def plain_characters(text: str) -> str:
    """`text` in Unicode form NFKC without invisible characters, and with one character for those that look alike.

    NFKC alone would make x2, 21/2 and 102 of x², 2½ and 10₂, so these are rewritten before it: x^2, 2 ½ and 10_2.
    """
    text = "".join(c for c in text if unicodedata.category(c) != "Cf").translate(_LOOKALIKES)
    text = re.sub(r"([⁰¹²³⁴-⁹⁺⁻ⁿ]+)", r"^\1", text)
    text = re.sub(r"([¼-¾⅐-⅞])", r" \1 ", text)
    text = re.sub(r"(?<=\d)([₀-₉]+)", r"_\1", text)
    text = unicodedata.normalize("NFKC", text).translate(_LOOKALIKES)
    return text.replace(">=", "≥").replace("<=", "≤").replace("!=", "≠")


# --- LaTeX: `\boxed{\frac{1}{2}}` is 1/2 ---------------------------------------------------------------------------

_ESCAPED = str.maketrans("${}", "＄｛｝")  # stand-ins for \$ \{ \} while $ { } are read as syntax; NFKC left no others
_UNESCAPED = str.maketrans("＄｛｝", "${}")
_SYMBOL_NAMES = "times× cdot× div÷ pm± approx≈ piπ infty∞ circ° degree° le≤ leq≤ ge≥ geq≥ lt< gt> ne≠ neq≠"
_SYMBOLS = {name[:-1]: name[-1] for name in _SYMBOL_NAMES.split()} | {"left": "", "right": "", "quad": " "}
_WRAPPER = re.compile(r"boxed|fbox|mbox|emph|operatorname|(?:text|math)(?:bf|it|rm|sf|tt|normal)?")
# Dollar signs enclose maths by the rules of pandoc, so that "$5 and $10" and "$5-$10" stay money.
_MATHS = re.compile(r"^\$ ?([^$]+?) ?\$$|\$(?! )([^$]+)(?<! )\$(?!\d)")
_FRACTION = re.compile(r"\\[dtc]?frac *(?:\{([^{}]*)\}|(\d)) *(?:\{([^{}]*)\}|(\d))")
_POWER = re.compile(r"(?<=[\^_])\{([^{}]*)\}(?!\d)")
_COMMAND = re.compile(r"\\(?![dtc]?frac)([A-Za-z]+) *\{([^{}]*)\}")


def without_latex(text: str) -> str:
    """`text`, from `plain_characters`, with LaTeX as plain text. Unknown commands stay: they tell answers apart."""

    def grouped(content: str) -> str:
        return content if re.fullmatch(r".|-?[\d.,]+", content) else f"({content})"

    text = re.sub(r"\\([;: ])|\\[,!()\[\]]", lambda m: " " if m[1] else "", text)
    text = re.sub(r"\\([${}%#&_])", lambda m: m[1].translate(_ESCAPED), text)
    text = _MATHS.sub(lambda m: m[1] or m[2], text.replace("$$", "$"))
    text = re.sub(r"\\([A-Za-z]+)", lambda m: _SYMBOLS.get(m[1], m[0]), text.replace("{,}", ","))
    before = None
    while text != before:  # from the innermost braces outwards; each round removes some
        before = text
        text = _FRACTION.sub(lambda m: f" {grouped(m[1] or m[2] or '')}/{grouped(m[3] or m[4] or '')} ", text)
        text = _POWER.sub(lambda m: grouped(m[1]), text)
        text = _COMMAND.sub(lambda m: m[2] if _WRAPPER.fullmatch(m[1]) else f"{m[1]}({m[2]})", text)
    text = re.sub(r"√ ?(?:\((\w+)\)|(\d+|\w))", lambda m: f"sqrt({m[1] or m[2]})", text).translate(_UNESCAPED)
    return re.sub(r"(?<=[A-Za-z])_(?=\d)", "", text).replace("^°", "°")  # CO_2 is CO₂ is CO2


# --- decoration: what surrounds an answer without being part of it ---------------------------------------------------

_LEAD_IN = re.compile(
    r"^(?:(?:so|thus|hence|therefore),? )?(?:(?:the|my|our) )?(?:final |correct )?ans(?:wer)?(?: ?[:=]| is:?(?= )) ?"
    r"|^=+(?![=<>≤≥])",  # but not in "x = 7", which is another answer than "y = 7"
    re.IGNORECASE,
)
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|`{1,3})(?![\s*_`])(?P<core>.+?)(?<!\s)\1(?!\w)")
_QUOTED = re.compile(r"^(?:\"(?P<core>[^\"]+)\"|'(?P<single>[^']+)')$")
_TAIL = re.compile(r"(?: ?(?:[.,;:?]|(?<![\d)])(?<!\b\w)!))+$")  # "yes!" is yes, but 5! and n! are factorials
_DECORATIONS = ((_LEAD_IN, ""), (_EMPHASIS, r"\g<core>"), (_QUOTED, r"\g<core>\g<single>"), (_TAIL, ""))
# "A" may be a name rather than an article: in "A and B", "A minus" or "A B C" it stays.
_ARTICLE = re.compile(r"^(?:the (?=\S)|an? (?!(?:and|or|to|is|plus|minus|than|vs)\b)(?=[^\W\d_]{2}))", re.IGNORECASE)


def _peel(text: str) -> str:
    """`text` without its decoration, removed layer by layer. A text that is all decoration stays: "?" is an answer."""
    before = None
    while text != before:
        before = text
        for pattern, replacement in _DECORATIONS:
            text = pattern.sub(replacement, text).strip() or text
    return text


def _bare(answer: str) -> str:
    """`answer` without LaTeX and decoration, unless it is too long to be parsed. Case stays: 5 M is not 5 m."""
    collapsed = " ".join(answer.split())
    if len(collapsed) > MAX_ANSWER_LENGTH:
        return collapsed
    text = " ".join(plain_characters(collapsed).split())
    return _peel(" ".join(without_latex(text).split())) if len(text) <= MAX_ANSWER_LENGTH else collapsed


# --- numbers and units -----------------------------------------------------------------------------------------------

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_TENS = "ten twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL = {word: 10 * n for n, word in enumerate(_TENS.split(), 1)}
_SMALL |= {word: n for n, word in enumerate(f"{_ONES} seventeen eighteen nineteen".split())}
SCALES = {"trillion": 10**12, "billion": 10**9, "million": 10**6, "thousand": 1000, "hundred": 100}

UNITS = {name: unit for unit, names in WORDS["units"].items() for name in names}  # in lower case
_CAPITALS = {"M", "G", "MW", "MV", "MJ", "MPa", "Mb", "Gb"}  # their lower case is another unit: metre, gram, milli-

_INTEGER = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)"  # with commas in groups of three only: 3,5 may be 3.5
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)"
NUMBER_WORD = rf"(?:{'|'.join([*_SMALL, *SCALES])})(?!\w)"
_QUANTITY = re.compile(
    rf"""(?P<relation>[<>≤≥≠≈±~]?)\ ?(?:(?P<minus>-|minus\ |negative\ )|\+)?\ ?(?P<money>us\$|usd(?!\w)|[$€£¥₹])?\ ?
    (?: (?:(?P<whole>{_INTEGER})\ )?(?P<top>\d+)\ ?/\ ?(?P<bottom>\d+)
      | (?:(?P<factor>{_DECIMAL})×)?10\^\(?(?P<power>[+-]?\d+)\)?
      | (?P<decimal>{_DECIMAL})(?:e(?P<exponent>[+-]?\d+))?
      | (?P<words>{NUMBER_WORD}(?:(?:\ and)?[\ -]{NUMBER_WORD})*)
    )(?:\ ?(?P<scale>{"|".join(SCALES)})(?!\w))?
    \ ?(?P<unit>(?:(?:[^\W\d_]|[%‰°$€£¥₹¢'"]|/(?=[^\W\d]))(?:[^\d^]|\^-?\d|(?<=m)[23])*)?)""",
    re.IGNORECASE | re.VERBOSE,
)


def cardinal(words: Sequence[str]) -> int | None:
    """The value of an English number in lower case, `one hundred and five`; None if it is not one, as in "one two"."""
    for word, scale in SCALES.items():  # the largest scale in it is between its count and the rest
        if word in words:
            at = words.index(word)
            tail = words[at + 1 :]
            count = cardinal(words[:at]) if at else 1  # the article of "a hundred" has been removed
            if not count or count >= min(scale, 1000):
                return None
            if not tail:
                return count * scale
            tail = tail[1:] if tail[0] == "and" else tail
            rest = cardinal(tail) if tail and tail[0] not in SCALES else None
            return count * scale + rest if rest and rest < scale else None
    values = [_SMALL.get(word, -1) for word in words]
    if len(values) == 2 and values[0] >= 20 and 1 <= values[1] <= 9:
        return sum(values)
    return values[0] if len(values) == 1 and values[0] >= 0 else None


def _value(match: re.Match[str]) -> Fraction | None:
    """The exact value of a match of `_QUANTITY`; None if it has none (1/0, "one two") or is too large to write."""
    scale = SCALES.get(match["scale"].casefold()) if match["scale"] else 1
    exponent = int(match["power"] or match["exponent"] or 0)
    if scale is None or abs(exponent) > MAX_EXPONENT:
        return None
    if match["words"]:
        value = cardinal(re.split("[ -]", match["words"].casefold()))
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
    """The canonical form of a unit, such as `cm^2` for "square centimetres"; a unit that is not in the table stays."""

    def canonical(match: re.Match[str]) -> str:
        name = match[0] if match[0] in _CAPITALS else match[0].casefold().replace(" ", "")
        return UNITS.get(name, name)

    unit = _tight(UNITS.get(text.casefold()) or re.sub(r"(?i:per cent\b|us\$)|[^\W\d_]+", canonical, text))
    unit = re.sub(r"\b(?:square|sq\.?) (\w+)", r"\1^2", re.sub(r"\bcubic (\w+)", r"\1^3", unit))
    return re.sub(r"° ?°? ?", "°", re.sub(r"m([23])\b", r"m^\1", unit))


def _tight(text: str) -> str:
    """`text` without spaces that have no meaning: `x = 7` becomes `x=7`, but `A+ B` stays different from `A + B`."""
    return re.sub(r"(?<=\w) ([+-]) (?=\w)", r"\1", re.sub(r" ?([=,;:/^()<>≤≥≠≈±×]) ?", r"\1", text))


def _typed_key(bare: str) -> str:
    """The key of an answer from `_bare`, leaving options aside: as a number if all of it is one, else as text."""
    if len(bare) > MAX_ANSWER_LENGTH:
        return f"text:{bare.casefold()}"
    bare = _peel(_ARTICLE.sub("", re.sub(r"(?<=\d) ?[xX*×] ?(?=\d)", "×", bare)))
    match = _QUANTITY.fullmatch(bare)
    value = _value(match) if match else None
    if match and value is not None:
        unit = _unit(" ".join(filter(None, (match["money"], match["unit"]))))
        return unicodedata.normalize("NFKC", f"number:{match['relation']}{value} {unit}".strip())
    return f"text:{unicodedata.normalize('NFKC', _tight(bare).casefold())}"  # casefold may undo the normal form


# --- lettered options ------------------------------------------------------------------------------------------------

_MARKERS = [re.compile(rf"(?<![\w(]){form}") for form in (r"\(([A-Za-z])\)", r"([A-Za-z])\)", r"([A-Z])[.:](?=\s)")]
_PICK = re.compile(
    r"(?:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?:? )?[(\[]?(?P<letter>[a-z])"
    r"(?:[)\].:]*|(?:[)\]][.:]? ?|[.:] | - )(?P<rest>.+))",
    re.IGNORECASE,
)
_SEVERAL = re.compile(r"(?:and|or|&)(?!\w)|.*(?<!\w)[a-z][).:]", re.IGNORECASE)


def lettered_options(question: str) -> dict[str, str]:
    """The options that a question offers: from letter to the key of the option's text, "" for an option without text.

    Options are at least two letters, counted from A, all marked in the same way: `A) red B) blue`, `(A) red (B) blue`,
    or `A. red` and `A: red`. Reads any text and never raises.
    """
    if len(question) > MAX_QUESTION_LENGTH:
        return {}
    question = re.sub(r"(?<!\w)\*\*|\*\*(?!\w)", "", plain_characters(question))  # `**A)** red`, but not `2**3`
    for marker in _MARKERS:
        run: list[re.Match[str]] = []
        for match in marker.finditer(question):
            if match[1].upper() == chr(ord("A") + len(run)):
                run.append(match)
            elif match[1].upper() == "A" and len(run) == 1:  # restart: "Look at (A). Which is it? (A) red (B) blue"
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
    """The letter of the one option that an answer picks by letter (`A`, `(a)`, `Option A`, `A. Red`) or by its text."""
    match = _PICK.fullmatch(bare) if len(bare) <= MAX_ANSWER_LENGTH else None
    letter = match["letter"].upper() if match else ""
    by_text = [other for other, option in options.items() if option == key]
    if not match or letter not in options or (match["rest"] and by_text):
        return by_text[0] if len(by_text) == 1 else None
    if not match["rest"]:
        return letter
    rest_key = _typed_key(_peel(match["rest"]))
    # "(A) and (B)" and, if blue is option B, "A. Blue" contradict themselves; "A. The red bar" picks A.
    contradicts = _SEVERAL.match(match["rest"]) or rest_key in options.values()
    return letter if rest_key == options[letter] or not contradicts else None
