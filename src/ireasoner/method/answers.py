"""When two answers are the same, and the majority vote of a group of answers (arXiv 2601.05877).

`answer_key` gives an answer its canonical, typed key (`number:1/2`, `number:5 cm`, `option:A`, `text:red`). Two answers
to a question are the same if and only if their keys are equal. This makes sameness transitive, as a vote needs it; a
comparison of pairs might not. In doubt two answers stay different: a lost vote is noise, but a wrong answer that is
merged with the right one earns its reward. An answer that does not commit itself, such as `A or B`, has no key.
"""

from __future__ import annotations

import html
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ireasoner.method.expressions import arithmetic, expression
from ireasoner.method.latex import plain_characters, without_latex
from ireasoner.method.options import marked_options, picked
from ireasoner.method.quantities import is_unit, quantity, tight, unit_name

MAX_ANSWER_LENGTH = 256  # characters; a longer answer is compared as text without being parsed, to bound the time


@dataclass(frozen=True, slots=True)
class Vote:
    """The majority vote of a group of N trajectories; see `majority`."""

    answer: str | None  # the key of the majority answer; None if no trajectory has a vote
    members: tuple[int, ...]  # G, the indices of the trajectories with this answer
    fraction: float  # |G| / N; N includes trajectories without a vote
    entropy: float  # H, in nats, of the distribution of the votes
    readable: int  # number of votes


def majority(keys: Sequence[str | None]) -> Vote:
    """The majority group G and the entropy H of a group's answers (arXiv 2601.05877).

    `keys` are the answer keys of the trajectories in the order of sampling. None stands for an unreadable one, or for an
    answer that does not commit itself; it counts in N but has no vote. A tie goes to the key that was sampled first. If
    there is no vote, there is no answer and no member, and fraction and entropy are 0.
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
    """p̂(a) = count(a) / N of each answer key, where N includes trajectories without a vote (None) (arXiv 2601.05877)."""
    return {key: count / len(keys) for key, count in Counter(key for key in keys if key is not None).items()}


@lru_cache(4096)
def answer_key(answer: str, question: str = "") -> str | None:
    """The canonical key of `answer`: two answers to one question are the same if and only if their keys are equal.

    Numbers, dates, times and formulas have one key for each exact value and unit: `12`, `12.0` and `twelve` share it,
    `50%`, `50` and `0.5` do not. Other answers are compared as text, without case, leading article, markup and final
    punctuation. If `question` offers options, `A`, `(A)`, `A. Red` and the text of option A share a key, and `A, C` and
    `C and A` do. What only repeats the question is left out: to "How many circles are there?", `5 circles` is `5`.

    Returns:
        The key, or None if the answer does not commit itself: `A or B`, `not A`, `3, maybe 4`, `I cannot tell`.
        Any string is read in bounded time, and none raises an error.
    """
    options = lettered_options(question)
    bare = _bare(answer)
    if len(bare) > MAX_ANSWER_LENGTH:
        return f"text:{bare.casefold()}"
    peeled = _peel(bare)
    value = _value_alone(peeled, question, options)
    offered = options or (_IN_THE_IMAGE if _ASKS_FOR_OPTION.search(question[:4096]) else {})
    for text in dict.fromkeys((peeled, value)) if offered else ():
        marks = picked(text, offered, _typed_key)
        if marks:
            return f"option:{marks}"
        if marks is None and options:
            return None
    if not _commits(bare, question):
        return None
    return _without_noun(_typed_key(value), question)


@lru_cache(256)
def lettered_options(question: str) -> dict[str, str]:
    """The options that a question offers: from letter or number to the key of the option's text, "" for one without.

    See `marked_options` for how options may be marked. Reads any text and never raises.
    """
    return {mark: _key_of_text(text) if text.strip(" .,;:?") else "" for mark, text in marked_options(question).items()}


def _key_of_text(text: str) -> str:
    return _typed_key(_peel(_bare(text)))


# --- decoration: what surrounds an answer without being part of it ---------------------------------------------------

_WRAPPERS = re.compile(r"<\|[a-z_]+\|>|</?(?:b|i|u|em|strong|p|span|div|code|mark|sub|sup|answer|box)(?: [^<>]*)?/?>|<br ?/?>", re.I)
_FENCE = re.compile(r"^(`{3,}|~{3,})\w*\s+(?P<core>.*?)\s*\1$", re.DOTALL)
_LEAD_IN = re.compile(
    r"^(?:(?:so|thus|hence|therefore|finally|well|okay),? )?(?:(?:the|my|our) )?(?:final |correct |right )?"
    r"(?:ans(?:wer)?|result|solution|option|choice)(?: ?[:=]| (?:is|would be|should be):?(?= )) ?"
    r"|^(?:(?:so|thus|hence|therefore),? )?(?:i (?:think|believe|guess|would say|say)(?: that)?|it is|it's|it was|this is|"
    r"that is|these are|they are|there (?:is|are|was|were)) (?=\S)"
    r"|^(?:(?:die|meine) )?(?:endgültige |richtige )?(?:antwort|lösung|ergebnis)(?: ?:| (?:ist|lautet):?(?= )) ?"
    r"|^(?:la |el )?(?:respuesta|resultado|risposta|resposta)(?: (?:final|correcta|finale|corretta|correta))?(?: ?:| (?:es|è|é):?(?= )) ?"
    r"|^(?:la )?(?:bonne )?(?:réponse|solution)(?: (?:finale|correcte))?(?: ?:| est:?(?= )) ?"
    r"|^(?:因此|所以|故)?,? ?(?:正确|最终|最後|最后)?(?:的)?(?:答案|答|結果|结果|答え)(?: ?:|应?该?(?:是|为|為)|は)[ :]*"
    r"|^(?:итоговый )?ответ(?: ?:| -| это|(?= \\d)) ?"
    r"|^(?:es (?:sind|ist|gibt)|das (?:ist|sind)|hay|es|son|il y (?:en )?a|c'est|ce sont|ci sono|c'è|há|são) (?=\S)|^(?:一?共)?有 ?(?=\S)"
    r"|^(?:it (?:could|might|may|must|should|would) be|maybe|probably|possibly|perhaps|most likely|likely) (?=\S)"
    r"|^(?:so|thus|hence|therefore)(?:,| (?=[\d$(])) ?"
    r"|^=+(?![=<>≤≥])",  # but not in "x = 7", which is another answer than "y = 7"
    re.IGNORECASE,
)
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|`{1,3})(?![\s*_`])(?P<core>.+?)(?<!\s)\1(?!\w)")
_QUOTED = re.compile(r"^(?:\"(?P<core>[^\"]+)\"|'(?P<single>[^']+)'|[«「『](?P<other>[^»」』]+)[»」』])$")
_TAIL = re.compile(r"(?: ?(?:[.,;:?]|(?<![\d)])(?<!\b\w)!))+$")  # "yes!" is yes, but 5! and n! are factorials
_YES_OR_NO = re.compile(
    r"^(?P<core>yes|no|ja|nein|oui|non|sí|si|sim|não|да|нет|是|不是|はい|いいえ)(?:[,;:、]|\.(?! ?\d)| -|的) ?"
    r"(?!.*\b(?:yes|but|maybe|perhaps|aber|mais|pero)\b).*$",
    re.IGNORECASE,
)
_CORRECTED = re.compile(
    r"^(?P<core>[^,;]+?)(?:, (?:and )?not|,? rather than|,? instead of| \(not) [^()]+\)?$|^not [^,;]+?,? but (?P<other>[^,;]+)$",
    re.IGNORECASE,
)
_JAPANESE_TAIL = re.compile(r"(?<=\w)(?:です|だ)$")
_DECORATIONS = (
    (_LEAD_IN, ""),
    (_EMPHASIS, r"\g<core>"),
    (_QUOTED, r"\g<core>\g<single>\g<other>"),
    (_TAIL, ""),
    (_JAPANESE_TAIL, ""),
    (_YES_OR_NO, r"\g<core>"),
    (_CORRECTED, r"\g<core>\g<other>"),
)
# "A" may be a name rather than an article: in "A and B", "A minus" or "A B C" it stays.
_ARTICLE = re.compile(r"^(?:the (?=\S)|an? (?!(?-i:and|or|to|is|plus|minus|than|vs)\b)(?=[^\W\d_]{2}))", re.IGNORECASE)


def _peel(text: str) -> str:
    """`text` without its decoration, removed layer by layer. A text that is all decoration stays: "?" is an answer."""
    before = None
    while text != before:
        before = text
        for pattern, replacement in _DECORATIONS:
            text = pattern.sub(replacement, text).strip() or text
    return text


def _bare(answer: str) -> str:
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


# --- answers that do not commit themselves ---------------------------------------------------------------------------

_LIMIT = (
    "more|less|fewer|greater|higher|lower|above|below|over|under|later|earlier|older|younger|so|not|equal|up|gates?|"
    "mehr|weniger|höher|älter|jünger|plus|moins|más|menos|mayor|mais|più|meno|больше|меньше|более|менее"
)
_UNSURE = r"maybe|perhaps|possibly|vielleicht|peut-être|quizás?|tal vez|forse|talvez|возможно|может быть"
_HEDGE = re.compile(
    rf"(?<!\bmore)(?<!\bwhether) (?:(?-i:or)|oder|ou|или|либо) (?!(?:{_LIMIT})\b)|(?<=\w) (?-i:o) (?!(?:{_LIMIT})\b)(?=\w)|^\w or \w$"
    r"|\w(?:还是|或者|或(?!以|更)|または)\w|(?<=[A-Z\d一-龯ァ-ヶ])か(?=[A-Z\d一-龯ァ-ヶ])|可能.*可能|要么|^(?:either|entweder|soit)\b.* (?:or|oder|soit) "
    rf"|(?:[,;.?]|\bor|\bbut) ?(?:or )?(?:(?:{_UNSURE}|actually)\b|(?:it )?(?:could|might|may) (?:also )?be\b)|^(?:{_UNSURE}|可能)$"
    r"|(?<=\w)[,;.] ?(?:no,|no wait|wait|sorry|rather|correction|i mean|nein,|non,)|^yes\W+no\W*$|^no\W+yes\W*$|^yes (?:or|and) no$"
    r"|\b(?:do not|don't|can ?not|can't|could not|couldn't) (?:be )?(?:know|tell|determined?|say|answer(?:ed)?|see|find|sure)\b"
    r"|^(?:i am |i'm )?(?:not sure|unsure|uncertain|unable to)\b|^no (?:idea|clue)\b|^(?:unclear|unknown)$|not enough information"
    r"|\?.*\?|^[^?]*\w\? \w"
    r"|^(?:ich weiß (?:es )?nicht|no (?:lo )?sé|non (?:lo )?so|não sei|je ne sais pas|не знаю|我?不(?:知道|确定|清楚)|我?无法确定|分?わか(?:りません|らない))",
    re.IGNORECASE,
)


_NAMED = re.compile(
    r"\b(?:say|says|said|written|printed|reads?|texts?|titled?|motto|slogan|tagline|headline|caption|label(?:led|ed)?|called|names?|"
    r"words?|phrase|quot(?:e|ed|ation)|brand|song|movie|film|book|album|gate)\b",
    re.IGNORECASE,
)


def _commits(answer: str, question: str) -> bool:
    """Whether an answer names one thing. An "or" may be part of a name, if one is asked for or the answer is in quotes."""
    answer = _YES_OR_NO.sub(r"\g<core>", _REASON.sub("", answer))
    return not _HEDGE.search(answer) or bool(_NAMED.search(question[:4096]) or _QUOTED.match(answer.rstrip(".")))


# --- what an answer says beside its value -----------------------------------------------------------------------------

_REASON = re.compile(r",? (?:because|since|as shown|as can be seen|weil|parce que|porque) .*$", re.IGNORECASE)
_BRACKETED = re.compile(r"(?P<head>[^()]+?) ?\((?P<inside>[^()]+)\)")
_COPULA = re.compile(
    r"(?P<subject>[^\W\d_][^=:]*?)(?: (?:is|are|was|were|equals?|es|ist|est|é|è|beträgt)(?: equal to)? | ?[=:] ?|等于|是|为)(?P<rest>.+)",
    re.IGNORECASE,
)
_GENERIC = frozenset(
    "the a an our my its total sum number value result area length width height perimeter circumference volume difference "
    "average mean median mode range ratio amount price cost count angle measure distance percentage percent probability "
    "answer final correct of in it this that year age speed temperature time date radius diameter".split()
)
_COUNTS = re.compile(
    r"\b(?:how (?:many|much)|number of|what (?:percent(?:age)?|fraction)|combien|wie ?viele?|cu[aá]nt[oa]s|quant[ie]|quant[oa]s)\b"
    r"|多少|几",
    re.IGNORECASE,
)


def _value_alone(text: str, question: str, options: Mapping[str, str]) -> str:
    """The value in an answer without its reason, a calculation that gives it, or a subject that the question names."""
    text = _REASON.sub("", text) or text
    if (match := _BRACKETED.fullmatch(text)) and _same_value(match["inside"], match["head"]):
        text = match["head"]
    *sides, last = text.split("=")
    if sides and all(_same_value(side, last) for side in sides):  # "60 - 45 = 15"
        text = last.strip()
    words = frozenset(re.findall(r"\w+", plain_characters(question[:4096]).casefold()))
    match = _COPULA.fullmatch(text)
    if not match:
        return text
    subject, rest = frozenset(re.findall(r"\w+", match["subject"].casefold())), _peel(match["rest"])
    if subject <= _GENERIC and _numeric(rest):
        return rest
    # To "Which bar is 20?", "the red bar is 20" is not "20".
    known = frozenset(re.findall(r"\w+", rest.casefold())) <= words and _typed_key(rest) not in options.values()
    return rest if subject <= words | _GENERIC and words and not known else text


def _same_value(calculation: str, value: str) -> bool:
    """Whether `60 - 45`, `= 60 - 45` and `60 - 45 = 15` give `15`, or "five" is `5`."""
    number = _numeric(value)
    results = [arithmetic(side) or _numeric(side.strip()) for side in calculation.split("=") if side.strip()]
    return number is not None and bool(results) and all(result == number for result in results)


def _without_noun(key: str, question: str) -> str:
    """`number:5` for `number:5 circles` if the question is how many circles there are."""
    if not key.startswith("number:") or " " not in key or not (asked := _COUNTS.search(question[:4096])):
        return key
    phrase = re.split(r"[?\n:;.]", question[asked.start() :], maxsplit=1)[0]
    words = re.findall(r"[^\W\d_]+", phrase)[:12]
    names = {unit_name(word) for word in words} | {word.casefold() for word in words}
    number, _, unit = key.partition(" ")
    nouns = re.findall(r"[^\W\d_]+|[^\w\s]", unit)
    return number if all({noun, noun + "s", noun.removesuffix("s")} & names for noun in nouns) else key


# Options that only the image shows have letters, but texts that are not known.
_IN_THE_IMAGE = dict.fromkeys("ABCDEFGH", "")
_ASKS_FOR_OPTION = re.compile(
    r"\b(?:options?|choices?|choose|select|which of the following|opci[óo]n(?:es)?|antwortmöglichkeit(?:en)?)\b|选项|选择|下列|以下",
    re.IGNORECASE,
)

# --- types -----------------------------------------------------------------------------------------------------------

# In two letters of which either case is a chemical symbol or a genotype, case tells: CO and Co, AA and Aa.
_CASED = re.compile(r"(?P<letter>[A-Za-z])(?i:(?P=letter))|CO|CS|CU|HF|HO|NI|NP|OS|PB|PO|SB|SC|SN|BI")
_BARE_PICK = re.compile(
    r"(?:option |choice )?[(\[]?([a-z])[)\]]?[.:]?(?: is (?:correct|right|the (?:correct |right )?(?:answer|option|choice)))?", re.IGNORECASE
)
_LIST = re.compile(r"(?P<open>[(\[{]?)(?P<items>[^()\[\]{}]*,[^()\[\]{}]*)(?P<close>[)\]}]?)")
_WITH_UNIT = re.compile(r"(?P<value>.*?[\dπ)]) ?(?P<unit>°|(?!π|pi\b)[^\W\d_]+(?:\^[23])?)")


def _numeric(text: str) -> str | None:
    """The canonical form of a text that is all number, quantity or formula, else None."""
    if re.search(r"sqrt|π|\bpi\b", text):
        if (match := _WITH_UNIT.fullmatch(text)) and is_unit(match["unit"]):
            value = expression(match["value"])
            return value and f"{value} {unit_name(match['unit'])}"
        return expression(text)
    measured = quantity(text)
    # `12x` is a product, but `12 m` is not.
    formula = measured is None or (re.search(r"\d[a-z]$", text) and text[-1] not in "mgshltdk")
    return (expression(text) if formula else None) or measured


def _typed_key(text: str) -> str:
    """The key of an answer from `_bare`, leaving options aside: as a number if all of it is one, else as text."""
    if len(text) > MAX_ANSWER_LENGTH:
        return f"text:{text.casefold()}"
    text = re.sub(r"(?<=\d) ?[xX*×] ?(?=\d)", "×", text)
    whole = _numeric(text)  # with its article: "a third" is no ordinal
    text = _peel(_ARTICLE.sub("", text))
    if (number := whole or _numeric(text)) is not None:
        return unicodedata.normalize("NFKC", f"number:{number}")
    if match := _LIST.fullmatch(text):
        items = [_numeric(item.strip()) or _plain(item.strip()) for item in match["items"].split(",")]
        return f"text:{match['open']}{','.join(items)}{match['close']}"
    if match := _BARE_PICK.fullmatch(text):
        text = match[1]  # an option that only the image shows
    return f"text:{_plain(text)}"


def _plain(text: str) -> str:
    folded = text if _CASED.fullmatch(text) else tight(text).casefold()
    return unicodedata.normalize("NFKC", folded)  # casefold may undo the normal form
