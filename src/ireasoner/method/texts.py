"""What the proposer and the solver are told, and how their text is read back (iReasoner, arXiv 2601.05877).

A text that cannot be read is a value, never an exception: its record names the `problem`. Reading takes time linear in
the text: every repetition in the patterns below is possessive, bounded, or anchored to the start of a line.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any, NamedTuple

from ireasoner.method.types import FinishReason, Question, Trajectory

PROPOSER_PROMPT = """\
Look closely at the image and write one question about it. The question must
- be answerable from the image alone, without outside knowledge or guessing;
- need some reasoning: combine, compare, count or compute at least two things that the image shows;
- have exactly one correct answer, and a short one: a number, a word, a name, or yes or no;
- make sense on its own, and not give its answer away.

Reply in exactly this form, with nothing before or after it:
<question>the question</question><rationale>what to read off the image, and how the answer follows</rationale>"""

SOLVER_PROMPT = """\
Look closely at the image and answer this question about it: {question}

First reason inside <think> and </think>, in short numbered steps, one on each line. Each step states one fact that you
read off the image, or one conclusion from earlier steps, with the values it uses. Then give the final answer inside
<answer> and </answer>: only a number, a word or a short phrase. Reply in exactly this form:
<think>
Step 1: what you see first
Step 2: what follows from it
</think>
<answer>the final answer</answer>"""

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


def parse_trajectory(text: str, finish_reason: FinishReason = "stop") -> Trajectory:
    """Read a solver's text, `<think>…</think>` then `<answer>…</answer>` (arXiv 2601.05877); never raises.

    Well-formed: one closed think block with at least one reasoning step with a letter or digit, then one closed answer
    block that is not empty, in a generation that was not cut off. The answer is stripped, not normalised.
    `words_before_answer` counts whitespace-separated words before `<answer>`, tags included. Of an unreadable text the
    answer is None and the reasoning steps are what could be read, for display only.
    """
    think, answer = _block(text, "think"), _block(text, "answer")
    steps = reasoning_steps(think.inside)
    problem = think.problem or answer.problem
    if finish_reason != "stop":
        problem = _CUT_OFF
    elif problem is None and answer.start < think.end:
        problem = "<answer> before the end of <think>"
    elif problem is None and not any(map(_LETTER_OR_DIGIT.search, steps)):
        problem = "no reasoning step"
    elif problem is None and not any(c.isprintable() and not c.isspace() for c in answer.inside):
        problem = "empty answer"  # an answer may be a bare sign such as "+", but not only invisible characters
    words = len(text[: answer.start].split())
    return Trajectory(steps, answer.inside if problem is None else None, words, problem)


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
