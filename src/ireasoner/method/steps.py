"""How a thought is divided into its reasoning steps (iReasoner, arXiv 2601.05877), in the ways that models write them.

The strongest structure that a thought has decides: "Step N" in its language, then numbers that count from 1, then
lines, then sentences. The work is linear in the length of the text, whatever it holds: every repetition in the patterns
below is possessive (`*+` never gives characters back), bounded, or anchored to a line.
"""

from __future__ import annotations

import re
from itertools import pairwise

from ireasoner.method.sentences import CONCLUDING, DISPLAYED, sentences

# Pieces of the patterns for the start of a reasoning step, and of an answer line (`ireasoner.method.texts`).
LIST_ITEM = r"^[ \t]*+(?:\#{1,6}[ \t]*+|(?:[-*•>]|\d{1,3}[.)])[ \t]++){0,3}+"
EMPHASIS = r"(?P<emphasis>[*_]{1,3}+)?+"
CLOSED = r"(?(emphasis)(?P<closed>(?P=emphasis))?)"  # matches in **Step 1**: but not in **Step 1:**

_SPACE = r"[ \t\u00a0\u202f\u3000]"  # French puts a space before a colon that does not break
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
# "Step" in English, German, French, Spanish, Portuguese, Italian, Russian, Dutch, Swedish, Polish, Turkish, Vietnamese,
# Indonesian, Japanese, Korean, Chinese, Hindi and Arabic.
_STEP_WORDS = (
    "step|schritt|étape|etape|paso|passo|etapa|passaggio|fase|шаг|stap|steg|krok|adım|bước|langkah|tahap|ステップ|手順|단계"
    "|步骤|步驟|चरण|الخطوة"
)
_INITIALS = "".join({word[0] for word in _STEP_WORDS.split("|")})
_COUNTED = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_CHINESE = "一二三四五六七八九十"
_STEP_MARK = re.compile(
    rf"(?:(?P<line>{LIST_ITEM})|(?<=[ \t])[-–—•*→|]{{1,2}}[ \t]{{1,3}})?"  # at the start of a line, or within one
    rf"{EMPHASIS}[(（]?+(?=[{_INITIALS}第\d])(?<![^\W\d_])"  # not "footstep 1"; the first sign is looked at for speed
    rf"(?:(?:{_STEP_WORDS}){_SPACE}{{0,3}}(?P<number>\d{{1,3}}|{'|'.join(_COUNTED)})(?![^\W_]|\.\d)"  # not "Step 1.5"
    rf"|第{_SPACE}?(?P<counted>\d{{1,3}}|[{_CHINESE}]){_SPACE}?(?:步骤|步驟|步|ステップ|段階|단계)"
    rf"|(?P<korean>\d{{1,3}}){_SPACE}?단계){CLOSED}"
    rf"(?:{_SPACE}{{0,3}}(?:(?P<delimiter>[)）]?[:：]|[.)．）]|[-–—]{{1,2}}(?!\d))|(?P<comma>[,，、])))?",
    re.MULTILINE | re.IGNORECASE,  # "Step 1 -2.5" starts with a number
)
_CIRCLED = "①②③④⑤⑥⑦⑧⑨⑩⑪⑫⑬⑭⑮⑯⑰⑱⑲⑳"
_NUMBER_MARK = re.compile(
    rf"(?P<line>^[ \t]*+(?:\#{{1,6}}[ \t]*+|[-*•>][ \t]++){{0,3}}+)?{EMPHASIS}[(（]?+"
    rf"(?:(?<![\w.,])(?P<number>\d{{1,3}}){CLOSED}(?:[.．)）:：]{{1,2}}(?=[\s*_{_CJK}]|$)|[、](?=\S))|(?<![{_CIRCLED}])(?P<circled>[{_CIRCLED}]))",
    re.MULTILINE,
)
# What comes before a mark within a line: the end of a sentence, or a word that refers to the mark ("from Step 1").
_SENTENCE_ENDS = (".", "!", "?", ";", ":", "…", "。", "！", "？", "；", "：", "।")
_REFERRING = re.compile(
    r"\b(?:and|as|at|by|for|from|in|of|on|or|see|than|the|to|use|using|with|und|aus|von|nach|siehe|laut|de|du|voir|dans"
    r"|del|en|ver|do|da|nel|из|в|см|по)$",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(rf"[*_]{{0,3}}(?:{CONCLUDING})")
_PROSE = re.compile(r"[*_\"“(]{0,3}[^\W\d_]{2}|[*_\"“(]{0,3}(?:I|A)\b")
_BLANK_LINE = re.compile(r"\n[ \t]*+\n\s*+")

# --- layout: lines that are no step, and formulas that belong to the step before them
_RULE = re.compile(r"^[ \t]*+[-*_=`]{3,}+[ \t]*+$", re.MULTILINE)  # a line that only separates
_BULLET = re.compile(r"^\s*+(?:[-*–◦▪‣](?=\s|$)|•|\#{1,6}+(?=\s|$))")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
_LAYOUT = re.compile(r"[`~]{3,}+\w{0,20}+|\\(?:begin|end)\{\w{1,20}+\*?\}")
_FORMULA = re.compile(DISPLAYED)
_CONTINUING = re.compile(r"\\\[|\$\$|\\begin\{|[=≈]")  # how a line of a formula begins


def reasoning_steps(thought: str) -> tuple[str, ...]:
    """Split the text of `<think>` into its steps, without their markers (arXiv 2601.05877).

    Steps are separated by "Step N", in any of the languages that are known here; if there is none, by numbers that
    count from 1; else by lines, without their bullets; and a thought of a single line by sentences. Weaker structure
    inside a step is its content, and so are its further lines. Two exceptions: what is said in a paragraph after the
    last numbered step, such as the conclusion, is a step of its own, and so is each line before the first one. A
    numbered step without text keeps its position as "". Lines that only separate or set out are no step, and a formula
    on lines of its own belongs to the step before it.
    """
    thought = _RULE.sub("", "\n".join(thought.splitlines())).strip()
    marks = _step_marks(thought) or _number_marks(thought)
    if not marks:
        return tuple(_lines(thought))
    starts = [mark.start() for mark in marks] + [len(thought)]
    steps = []
    for mark, (_, end) in zip(marks, pairwise(starts), strict=True):
        step, emphasis = thought[mark.end() : end], mark["emphasis"] or ""
        # The marker may have opened an emphasis that closes in the step: "**Step 1:** text", "**1. The title.** text".
        if emphasis and not mark["closed"] and (len(emphasis) > 1 or step.lstrip().startswith(emphasis)):
            step = step.replace(emphasis, "", 1)
        steps.append(step.strip())
    return (*_lines(thought[: starts[0]], divide=False), *steps[:-1], *_without_conclusion(steps, "\n" not in thought))


def _step_marks(thought: str) -> list[re.Match[str]]:
    """The "Step N" that begin a step, without those that only mention one, as in "found in Step 1, the bar".

    A mark with a delimiter begins a step at the start of a line; within a line, only if its number is higher than the
    last one and it is no mention. A mark without a delimiter must start a line and have the next number, and the line
    must hold nothing else, be a list item, be the first one or follow other marks. A comma is a delimiter only between
    sentences.
    """
    marks: list[re.Match[str]] = []
    last = 0
    for mark in _STEP_MARK.finditer(thought):
        number, delimited = _number(mark), bool(mark["delimiter"] or mark["closed"])
        if mark["line"] is not None:
            alone = thought[mark.end() : mark.end() + 1] in "\n"  # also at the end of the text
            set_off = alone or marks or mark["line"].strip() or mark.start() == 0
            begins = delimited or (number == last + 1 and set_off)
        elif mark["comma"] and not delimited:
            begins = bool(marks) and number == last + 1 and _follows_sentence(mark, thought)
        else:
            begins = delimited and number > last and not _is_mention(mark, thought, marks)
        if begins:
            marks.append(mark)
            last = number
    return marks


def _number(mark: re.Match[str]) -> int:
    """The number of a step's mark, in digits or in words."""
    written = (mark["number"] or mark["counted"] or mark["korean"]).lower()
    if written in _COUNTED:
        return _COUNTED.index(written) + 1
    return _CHINESE.index(written) + 1 if written in _CHINESE else int(written)


def _before(mark: re.Match[str], thought: str) -> str:
    """The end of what comes before a mark within a line, without spaces and closing signs."""
    return thought[max(0, mark.start() - 12) : mark.start()].rstrip(" \t\"'”)]*_")


def _follows_sentence(mark: re.Match[str], thought: str) -> bool:
    return _before(mark, thought).endswith(_SENTENCE_ENDS)


def _is_mention(mark: re.Match[str], thought: str, marks: list[re.Match[str]]) -> bool:
    """Whether a mark within a line belongs to the sentence before it, as in "from Step 1: …" or "(see Step 2)"."""
    if _follows_sentence(mark, thought):
        return False
    bracketed = "(" in mark[0] and not (marks and "(" in marks[-1][0])
    return not marks or bracketed or _REFERRING.search(_before(mark, thought)) is not None


def _number_marks(thought: str) -> list[re.Match[str]]:
    """The "N.", "N)", "(N)", "N:", "N、" and circled numbers that count 1, 2, 3, …: "2.5" and "1990:" do not.

    They begin lines. Only where fewer than two lines begin with one, they may also follow the end of a sentence within
    a line, and with a bracket any word that does not refer to them; then there must be two of them at least.
    """
    on_lines: list[re.Match[str]] = []
    within: list[re.Match[str]] = []
    for mark in _NUMBER_MARK.finditer(thought):
        written = mark["number"]
        number = int(written) if written else _CIRCLED.index(mark["circled"]) + 1
        starts_line = mark["line"] is not None
        if starts_line and number == len(on_lines) + 1:
            on_lines.append(mark)
        if number == len(within) + 1 and (starts_line or _may_begin(mark, thought, within)):
            within.append(mark)
    return within if len(on_lines) < 2 <= len(within) else on_lines


def _may_begin(mark: re.Match[str], thought: str, marks: list[re.Match[str]]) -> bool:
    """Whether a number within a line can begin a step: "7. 2. Blue", "7 2) blue", but not "is 2. Then", "see (2)"."""
    if _follows_sentence(mark, thought):
        return True
    bracketed = bool(mark["circled"]) or mark[0].endswith((")", "）", "、"))
    return bool(marks) and bracketed and not _REFERRING.search(_before(mark, thought))


def _without_conclusion(steps: list[str], one_line: bool) -> list[str]:
    """The last of the numbered steps, and what is said after it as steps of their own.

    That is each paragraph of prose, where no other step has several paragraphs. Elsewhere, and for lines, or sentences
    if all steps are on one line, it is what begins as a conclusion does ("So 7.").
    """
    *others, last = steps
    first, *paragraphs = _BLANK_LINE.split(last)
    uniform = not any(_BLANK_LINE.search(step) for step in others)
    for i, paragraph in enumerate(paragraphs):
        if _CONCLUSION.match(paragraph) or (uniform and _PROSE.match(paragraph)):
            return ["\n\n".join([first, *paragraphs[:i]]).strip(), *paragraphs[i:]]
    parts, joint = (sentences(last), " ") if one_line else (last.split("\n"), "\n")
    if any(len(sentences(step) if one_line else step.split("\n")) > 1 for step in others):
        return [last]
    for i, part in enumerate(parts[1:], 1):
        if _CONCLUSION.match(part):
            return [joint.join(parts[:i]).strip(), joint.join(parts[i:])]
    return [last]


def _lines(text: str, divide: bool = True) -> list[str]:
    """The steps of text without marks: its lines, or their sentences where they are to be divided.

    A single line is divided; of several, those that hold three sentences or more and are therefore paragraphs.
    """
    text = _FORMULA.sub(lambda formula: formula[0].replace("\n", "\r"), text)  # no other "\r" is left in the text
    steps: list[str] = []
    bullets: set[int] = set()
    for line in filter(None, map(str.strip, text.split("\n"))):
        if line[0].isalnum():  # most lines
            steps.append(line)
        elif not _LETTER_OR_DIGIT.search(line) or _LAYOUT.fullmatch(line):
            continue
        elif steps and _CONTINUING.match(line) and not _CONTINUING.match(steps[-1]):
            steps[-1] += f"\n{line}"
        else:
            if bullet := _BULLET.match(line):
                bullets.add(len(steps))
            steps.append(line[bullet.end() :].lstrip() if bullet else line)
    if divide:
        enough = 2 if len(steps) == 1 else 3
        # The shortest sentence has two signs. Without this, a text of many short lines would take twice as long.
        parts = [[step] if i in bullets or len(step) < 2 * enough else sentences(step) for i, step in enumerate(steps)]
        steps = [s for step, p in zip(steps, parts, strict=True) for s in (p if len(p) >= enough else [step])]
    return [step.replace("\r", "\n") for step in steps] if "\r" in text else steps
