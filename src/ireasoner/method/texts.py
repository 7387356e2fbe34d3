"""What the proposer and the solver are told, and how their text is read back (iReasoner, arXiv 2601.05877).

A text that cannot be read is a value, never an exception: its record names the `problem`. Reading takes time linear in
the text: every repetition in the patterns below is possessive, bounded, or anchored to the start of a line.
"""

from __future__ import annotations

import re
from importlib import resources
from itertools import pairwise
from typing import Any, NamedTuple

from ireasoner.method.types import FinishReason, Form, Question, Solution

FORMS: tuple[Form, ...] = ("tags", "boxed", "answer-line")


def _prompt(name: str) -> str:
    return resources.files("ireasoner.method").joinpath("prompts", f"{name}.txt").read_text("utf-8").removesuffix("\n")


PROPOSER_PROMPT = _prompt("proposer")
SOLVER_PROMPTS = {form: _prompt(f"solver-{form}") for form in FORMS}

_CUT_OFF = "cut off before the end token"


def _image_then_text(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def proposer_messages(prompt: str) -> list[dict[str, Any]]:
    """The proposer's prompt as chat messages for a processor's chat template: one user turn, image then text."""
    return _image_then_text(prompt)


def solver_messages(prompt: str, question: str) -> list[dict[str, Any]]:
    """The solver's prompt, with `question` in place of each literal `{question}`, as one user turn, image then text.

    Raises:
        ValueError: the prompt has no `{question}`, so that the solver would never see the question.
    """
    if "{question}" not in prompt:
        raise ValueError("the solver's prompt must contain {question}")
    return _image_then_text(prompt.replace("{question}", question))  # not str.format: a question may hold braces


# --- reading tagged text --------------------------------------------------------------------------------------------

_TAG = re.compile(r"<\s*+(?P<slash>/?)\s*+(?P<name>think|answer|question|rationale)\s*+>", re.ASCII | re.IGNORECASE)
# Any other tag, or a special token such as <|im_end|>; "3 < x and y > 2" is neither.
_MARKUP = re.compile(r"<(?:[|｜]|[/!]?[a-z])[^\s<>]*+(?:\s[^<>=]*+=[^<>]*+)?\s*+/?>", re.IGNORECASE)
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")


class _Block(NamedTuple):
    inside: str
    start: int
    end: int
    problem: str | None


def _block(text: str, name: str) -> _Block:
    """The first <name> block of `text`; without its closing tag it reaches up to the next tag. No block: at the end."""
    tags = list(_TAG.finditer(text))
    own = [tag for tag in tags if tag["name"].lower() == name]
    opening = next((tag for tag in own if not tag["slash"]), None)
    if opening is None:
        return _Block("", len(text), len(text), f"no closed <{name}>")
    later = [tag for tag in tags if tag.start() >= opening.end()]
    closing = next((tag for tag in later if tag["slash"] and tag["name"].lower() == name), None)
    if closing is None:
        end = later[0].start() if later else len(text)
        return _Block(text[opening.end() : end].strip(), opening.start(), end, f"no closed <{name}>")
    problem = f"more than one <{name}>" if len(own) > 2 else None
    return _Block(text[opening.end() : closing.start()].strip(), opening.start(), closing.end(), problem)


def parse_question(text: str, finish_reason: FinishReason = "stop") -> Question:
    """Read a proposer's text, `<question>…</question><rationale>…</rationale>` (arXiv 2601.05877); never raises.

    Well-formed: one closed question with a letter or digit and holds no markup, and a generation that was not cut off.
    The rationale is optional: "" where it is missing. An unreadable question's `text` is for display only.
    """
    question, rationale = _block(text, "question"), _block(text, "rationale")
    problem = question.problem
    if finish_reason != "stop":
        problem = _CUT_OFF
    elif problem is None and not _LETTER_OR_DIGIT.search(question.inside):
        problem = "empty question"
    elif problem is None and (_TAG.search(question.inside) or _MARKUP.search(question.inside)):
        problem = "markup inside the question"  # it is pasted into the solver's prompt, where a tag would act
    return Question(question.inside, rationale.inside, problem)


def parse_trajectory(text: str, finish_reason: FinishReason = "stop", form: Form = "tags") -> Solution:
    """Read a solver's text; never raises. Of an unreadable text the answer is None.

    Well-formed: at least one reasoning step with a letter or digit, then an answer with something visible in it, in a
    generation that was not cut off. Where they stand depends on the form:

    - `tags` (arXiv 2601.05877): one closed `<think>` block with the steps, then one closed `<answer>` block.
    - `boxed`: the last `\\boxed{…}`, whose braces must be closed; the steps stand before the line that it is on, or
      before the box itself where nothing else does. Think tags around the steps are dropped.
    - `answer-line`: the last line that begins with "Answer:" or "Final answer:"; the steps stand before it, and nothing
      may follow it. Think tags around the steps are dropped.

    The answer is stripped, not normalised. `words_before_answer` counts whitespace-separated words before `<answer>`,
    the box or the answer line, tags included. The reasoning steps of an unreadable text are what could be read, for
    display only.
    """
    thought, answer, words, problem = _READERS[form](text)
    steps = reasoning_steps(thought)
    if finish_reason != "stop":
        problem = _CUT_OFF
    elif problem is None and not any(map(_LETTER_OR_DIGIT.search, steps)):
        problem = "no reasoning step"
    elif problem is None and not any(c.isprintable() and not c.isspace() for c in answer):
        problem = "empty answer"  # an answer may be a bare sign such as "+", but not only invisible characters
    return Solution(steps, answer if problem is None else None, words, problem)


class _Read(NamedTuple):
    thought: str
    answer: str
    words: int
    problem: str | None


def _read_tags(text: str) -> _Read:
    think, answer = _block(text, "think"), _block(text, "answer")
    problem = think.problem or answer.problem
    if problem is None and answer.start < think.end:
        problem = "<answer> before the end of <think>"
    return _Read(think.inside, answer.inside, len(text[: answer.start].split()), problem)


def _read_boxed(text: str) -> _Read:
    boxes = list(re.finditer(r"\\boxed\s*+\{", text))
    if not boxes:
        return _Read(_without_think_tags(text), "", len(text.split()), "no \\boxed{…}")
    start, inside = boxes[-1].start(), boxes[-1].end()
    depth, end = 1, inside
    while end < len(text) and depth:  # an answer may hold braces of its own: \boxed{\frac{1}{2}}
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    line = text.rfind("\n", 0, start) + 1
    thought = _without_think_tags(text[:line])
    thought = thought if _LETTER_OR_DIGIT.search(thought) else _without_think_tags(text[:start])
    problem = "an open \\boxed{" if depth else None
    return _Read(thought, text[inside : end - 1].strip(), len(text[:start].split()), problem)


_ANSWER_LINE = re.compile(
    r"^[ \t]*+[*_#>]{0,3}+[ \t]*+(?:(?:the|my)[ \t]++)?(?:final[ \t]++)?answer[ \t]*+(?:is[ \t]*+)?[*_]{0,3}+[ \t]*+[:：]",
    re.MULTILINE | re.IGNORECASE,
)


def _read_answer_line(text: str) -> _Read:
    lines = list(_ANSWER_LINE.finditer(text))
    if not lines:
        return _Read(_without_think_tags(text), "", len(text.split()), "no line 'Answer: …'")
    start = lines[-1].start()
    answer, _, rest = text[lines[-1].end() :].strip().partition("\n")
    problem = "text after the answer line" if _LETTER_OR_DIGIT.search(_TAG.sub("", rest)) else None
    thought = _without_think_tags(text[:start])
    return _Read(
        thought, answer.strip().removeprefix("**").removesuffix("**").strip(), len(text[:start].split()), problem
    )


def _without_think_tags(text: str) -> str:
    return re.sub(r"</?think>", "\n", text, flags=re.IGNORECASE)


_READERS = {"tags": _read_tags, "boxed": _read_boxed, "answer-line": _read_answer_line}


# --- reasoning steps ------------------------------------------------------------------------------------------------

_RULE = re.compile(r"^[ \t]*+[-*_=`]{3,}+[ \t]*+$", re.MULTILINE)  # a line that only separates
_BULLET = re.compile(r"^\s*+(?:[-*–◦▪‣](?=\s|$)|•|\#{1,6}+(?=\s|$))")
_POINTER = re.compile(r"\b(?:and|as|at|by|for|from|in|of|on|or|see|than|the|to|use|using|with)$", re.IGNORECASE)
_EMPHASIS = r"(?P<emphasis>[*_]{1,3})?"
_CLOSED = r"(?(emphasis)(?P<closed>(?P=emphasis))?)"  # as in **Step 1**: and not yet in **Step 1:**
_STEP_MARK = re.compile(
    r"(?:(?P<line>^[ \t]*+(?:\#{1,6}[ \t]*+|(?:[-*•>]|\d{1,3}[.)])[ \t]++){0,3}+)"
    r"|(?<=[ \t])[-–—•*→|]{1,2}[ \t]{1,3})?"
    rf"{_EMPHASIS}\(?(?<![^\W\d_])step[ \t]{{0,3}}(?P<number>\d{{1,3}})(?![^\W_]|\.\d){_CLOSED}"
    r"(?:[ \t]{0,3}(?:(?P<delimiter>\)?[:：]|[.)]|[-–—]{1,2}(?!\d))|,))?",
    re.MULTILINE | re.IGNORECASE,
)
_NUMBER_MARK = re.compile(
    rf"^[ \t]*+(?:\#{{1,6}}[ \t]*+|[-*•>][ \t]++){{0,3}}+{_EMPHASIS}\(?(?P<number>\d{{1,3}}){_CLOSED}"
    r"[.):：]{1,2}(?=[\s*_]|$)",
    re.MULTILINE,
)


def _step_marks(thought: str) -> list[re.Match[str]]:
    """The "Step N" that begin a step; the others are mentions, as in "found in Step 1, the bar" or "(see Step 2)"."""
    marks: list[re.Match[str]] = []
    last = 0
    for mark in _STEP_MARK.finditer(thought):
        number, delimited = int(mark["number"]), bool(mark["delimiter"] or mark["closed"])
        if mark["line"] is not None:
            alone = thought[mark.end() : mark.end() + 1] in "\n"
            set_off = alone or marks or mark["line"].strip() or mark.start() == 0
            begins = delimited or (number == last + 1 and set_off)
        else:  # within a line, a mark must count on, and follow a sentence or at least not be pointed at
            before = thought[max(0, mark.start() - 12) : mark.start()].rstrip(" \t\"'”)]*_")
            sentence_ended = before.endswith((".", "!", "?", ";", ":", "…", "。"))
            bracketed = "(" in mark[0] and not (marks and "(" in marks[-1][0])
            pointed_at = not marks or bracketed or _POINTER.search(before)
            begins = delimited and number > last and (sentence_ended or not pointed_at)
        if begins:
            marks.append(mark)
            last = number
    return marks


def _number_marks(thought: str) -> list[re.Match[str]]:
    """The "N.", "N)", "(N)" and "N:" at the start of a line that count 1, 2, 3, …: "2.5" and "1990:" do not."""
    marks: list[re.Match[str]] = []
    for mark in _NUMBER_MARK.finditer(thought):
        if int(mark["number"]) == len(marks) + 1:
            marks.append(mark)
    return marks


def reasoning_steps(thought: str) -> tuple[str, ...]:
    """The steps of what is inside `<think>`, their markers removed and their text kept (arXiv 2601.05877).

    The strongest marker present decides, and weaker ones are then content: "Step N", else bare numbers in sequence
    from 1, else each line that is not blank is a step, its bullet removed; so are lines before the first marker. A
    numbered step keeps its further lines; where nothing follows its marker, it keeps its position as "".
    """
    thought = _RULE.sub("", "\n".join(thought.splitlines())).strip()
    marks = _step_marks(thought) or _number_marks(thought)
    starts = [mark.start() for mark in marks] + [len(thought)]
    steps = [step for line in thought[: starts[0]].split("\n") if (step := _BULLET.sub("", line).strip())]
    for mark, (_, end) in zip(marks, pairwise(starts), strict=True):
        step, emphasis = thought[mark.end() : end], mark["emphasis"] or ""
        if emphasis and not mark["closed"] and (len(emphasis) > 1 or step.lstrip().startswith(emphasis)):
            step = step.replace(emphasis, "", 1)  # the marker opened it: "**Step 1:** text", "**1. The title.** text"
        steps.append(step.strip())
    return tuple(steps)
