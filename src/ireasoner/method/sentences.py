"""Where a sentence ends, only where that is safe: in doubt, two sentences stay one.

Rules of our own, because those of libraries are no better for texts with numbers and formulas, and cost more. Of
sentencex 1.0.32 and pysbd 0.3.4, both divide "3. 5", "$x = 3. Y$" and "Der 2. Balken" and have to be told the language;
on 20 kB of Chinese or of "a. " pysbd takes 4 to 7 s, and on 100 kB of Chinese sentencex takes 2 s.
"""

from __future__ import annotations

import re
from itertools import islice, pairwise

MAX_SENTENCES = 1000

# How a conclusion begins, in English, German, French, Spanish, Portuguese, Italian, Russian, Chinese, Japanese, Korean.
CONCLUDING = (
    r"(?:So|Thus|Hence|Therefore|Consequently|Finally|Overall|In (?:conclusion|summary|total)|To conclude|Conclusion"
    r"|(?:The |My )?(?:[Ff]inal |[Cc]orrect )?[Aa]nswer|Also|Daher|Deshalb|Folglich|Somit|Damit|Insgesamt"
    r"|Donc|Ainsi|Par conséquent|En conclusion|Finalement|Por (?:lo )?tanto|Entonces|Así que|En conclusión|Finalmente"
    r"|Portanto|Logo|Assim|Quindi|Dunque|Pertanto|Perciò|Infine|Следовательно|Значит|Итак|Поэтому|Таким образом)\b"
    r"|所以|因此|故|综上|最后|最後|よって|したがって|ゆえに|따라서|그러므로|그래서"
)
# A full stop ends no sentence before a number after these, …
_BEFORE_NUMBERS = re.compile(
    r"figs?|figure|eqs?|nos?|vol|ch|sec|pp?|art|nr|abb|tab|kap|bd|núm|pág|cap|рис|стр|табл|гл", re.IGNORECASE
)
# … never after these, …
_NEVER_LAST = re.compile(
    r"e\.?g|i\.?e|vs|cf|viz|dr|mrs?|ms|prof|mt|gen|rev|hon|srt?a?|c\.-à-d|approx|ca|resp|incl|bzw|z\.b|d\.h|u\.a|ggf|evtl"
    r"|vgl|sog|bspw|(?:p\.)?ej|т\.е|напр|см|им",
    re.IGNORECASE,
)
# … and after these, dotted ones ("U.S.", "p.m.") and initials only before a word that begins sentences.
_RARELY_LAST = re.compile(r"etc|al|jr|st|inc|ltd|co|corp|min|max|avg|usw|т\.д|др", re.IGNORECASE)
_DOTTED = re.compile(r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,2}")
_BEGINNING = re.compile(
    rf"(?:The|This|That|These|Those|There|Then|It|Its|We|I|He|She|They|You|In|On|At|If|As|Since|Because|And|But|Now|Next"
    rf"|First|Second|Third|However|Here|Given|From|For|By|Looking|Let|Each|Both|Is|Are|Was|What|Which|How)\b|{CONCLUDING}"
)
_GERMAN_ORDINAL = re.compile(
    r"\b(?:der|die|das|den|dem|des|im|am|vom|zum|zur|beim|ein|eine|einen|einem|einer|jede[rsnm]?)\s\d{1,3}$",
    re.IGNORECASE,
)
_LETTER, _LETTER_OR_DIGIT = re.compile(r"[^\W\d_]"), re.compile(r"[^\W_]")
DISPLAYED = (  # a formula that is set out
    r"\\\[(?:[^\\]|\\(?![\[\]]))*+\\\]|\$\$[^$]*+\$\$"
    r"|\\begin\{\w{1,20}+\*?\}(?:[^\\]|\\(?!begin|end))*+\\end\{\w{1,20}+\*?\}"
)
_INLINE = r"\$(?!\s)[^$\n]*+(?<!\s)\$(?!\d)|\\\((?:[^\\]|\\(?![()]))*+\\\)"  # "$5 or $6" is none
_FORMULA = re.compile(f"{DISPLAYED}|{_INLINE}")
_CLOSING = r"[\"'”’»)\]*_」』）]*+"
_END = re.compile(rf"(?<![.!?؟।۔。！？])(?:(?P<stop>[.!?؟।۔]++){_CLOSING}\s++|[。！？]++{_CLOSING}\s*+)(?=\S)")
_OPENING = "\"'“‘«([{*_「『（\\$¿¡"
_VARIABLE = re.compile(r"[^\W\d_](?:_\w|\d)?\s")
_INITIAL = re.compile(r"[^\W\d_]\.")
# "First, …; second, …" is divided as well, within one sentence.
_FIRST = re.compile(
    r"(?:first(?:ly)?|erstens|zuerst|premièrement|d'abord|primero|primeiro|primo|in primo luogo|во-первых|сначала)\b"
    r"|首先|第一|まず|첫째|먼저",
    re.IGNORECASE,
)
_ORDINAL = re.compile(
    r"(?:[;,]\s++(?=(?:and |then |und |et |y |e |и )?(?:second(?:ly)?|third(?:ly)?|fourth(?:ly)?|next|then|finally"
    r"|lastly|zweitens|drittens|schließlich|deuxièmement|troisièmement|ensuite|enfin|segundo|tercero|terceiro|luego|después"
    r"|depois|finalmente|por último|por fim|secondo|terzo|poi|infine|во-вторых|в-третьих|затем|наконец),)"
    r"|[;；，、]\s*+(?=其次|然后|接着|再次|最后|最後|第二|第三|次に|둘째|다음))",
    re.IGNORECASE,
)


def sentences(text: str) -> list[str]:
    """Divide a line into its sentences. Nothing is lost but white space between them; linear in the text's length.

    What comes after the first `MAX_SENTENCES` signs that may end one stays undivided.
    """
    masked = text
    if "$" in text or "\\" in text:  # a formula is a word that begins with a capital letter, for what follows
        masked = _FORMULA.sub(lambda formula: "X" * len(formula[0]), text)
    ends: list[tuple[int, re.Match[str] | None]] = [
        (end.end(), end) for end in islice(_END.finditer(masked), MAX_SENTENCES)
    ]
    if _FIRST.match(masked.lstrip("*_ ")):
        ends = sorted(
            ends + [(end.end(), None) for end in islice(_ORDINAL.finditer(masked), MAX_SENTENCES)],
            key=lambda end: end[0],
        )
    if not ends:
        return [text.strip()]
    cuts, seen, has_word = [0], 0, False
    for end, stop in ends:
        has_word, seen = has_word or _LETTER.search(masked, seen, end) is not None, end
        if has_word and (stop is None or _ends_sentence(masked, cuts[-1], stop)):  # a number alone is none: "2. is"
            cuts.append(end)
            has_word = False
    if len(cuts) > 1 and not _LETTER_OR_DIGIT.search(text, cuts[-1]):
        cuts.pop()  # signs at the end belong to the last sentence
    return [text[start:end].strip() for start, end in pairwise([*cuts, len(text)])]


def _ends_sentence(text: str, start: int, end: re.Match[str]) -> bool:
    """Whether a sentence that begins at `start` ends with a sign of punctuation."""
    stop = end["stop"]
    if stop is None:
        return True  # "。" has no other meaning
    if len(stop) > 1 and set(stop) == {"."}:
        return False  # an ellipsis goes on, or seems to
    begin = max(start, end.start() - 40, text.rfind(" ", start, end.start()) + 1)
    word = text[begin : end.start()].lstrip(_OPENING)
    following = text[end.end() : end.end() + 20].lstrip(_OPENING)
    first, after_number = following[:1], word[-1:].isdigit()
    if first.isdigit() and after_number:
        return False  # "3. 5"
    if first.islower() and not (after_number and _VARIABLE.match(following)):
        return False  # of small letters, only a variable begins a sentence: "a is 3. b is 4."
    if stop != ".":
        return True
    if first.isdigit() and _BEFORE_NUMBERS.fullmatch(word):
        return False
    if _NEVER_LAST.fullmatch(word) or _INITIAL.match(following):
        return False
    if after_number:
        return not _GERMAN_ORDINAL.search(text, max(start, end.start() - 20), end.start())
    initial = False
    if len(word) == 1:  # "J. Smith", "Mary J. Smith", "z. B. Rot", but not "is parallel to A. So"
        previous = (text[max(start, begin - 20) : begin].split() or [word])[-1]
        initial = _INITIAL.fullmatch(previous) is not None or (word.isupper() and previous[0].isupper())
    if initial or _RARELY_LAST.fullmatch(word) or _DOTTED.fullmatch(word):
        return _BEGINNING.match(following) is not None
    return True
