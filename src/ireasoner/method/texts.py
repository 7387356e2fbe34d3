"""The prompts of the proposer and the solver, and the parsers of their replies (iReasoner, arXiv 2601.05877).

The parsers never raise an exception: if a reply cannot be read, the `problem` of the result says why. They take time
linear in the length of the reply, whatever it holds, as a model in training may write anything. For this, every
repetition in the patterns below is possessive (`*+` never gives characters back), bounded, or anchored to a line.
"""

from __future__ import annotations

import re
import string
from importlib import resources
from typing import Any, NamedTuple

from ireasoner.method.steps import CLOSED, EMPHASIS, LIST_ITEM, reasoning_steps
from ireasoner.method.types import FinishReason, Form, Question, Solution


def _prompt(name: str) -> str:
    return resources.files("ireasoner.method").joinpath("prompts", f"{name}.txt").read_text("utf-8").removesuffix("\n")


PROPOSER_PROMPT = _prompt("proposer")
SOLVER_PROMPT = _prompt("solver-tags")
SOLVER_PROMPTS: dict[Form, str] = {
    "tags": SOLVER_PROMPT,
    "boxed": _prompt("solver-boxed"),
    "answer-line": _prompt("solver-answer-line"),
}
_CUT_OFF = "cut off before the end token"


def proposer_messages(prompt: str) -> list[dict[str, Any]]:
    """The proposer's prompt as chat messages for a processor's chat template: one user turn, image then text."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]


def solver_messages(prompt: str, question: str) -> list[dict[str, Any]]:
    """The solver's prompt, with `question` in place of each literal `{question}`, as one user turn, image then text.

    Raises:
        ValueError: the prompt has no `{question}`, so that the solver would never see the question.
    """
    if "{question}" not in prompt:
        raise ValueError("the solver's prompt must contain {question}")
    return proposer_messages(prompt.replace("{question}", question))  # not str.format: a question may hold braces


# --- replies in tags -------------------------------------------------------------------------------------------------

_TAG = re.compile(r"<\s*+(?P<slash>/?)\s*+(?P<name>think|answer|question|rationale)\s*+>", re.ASCII | re.IGNORECASE)
# Any other tag, or a special token such as <|im_end|>; "3 < x and y > 2" is neither.
_MARKUP = re.compile(r"<(?:[|｜]|[/!]?[a-z])[^\s<>]*+(?:\s[^<>=]*+=[^<>]*+)?\s*+/?>", re.IGNORECASE)
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")


class _Block(NamedTuple):
    inside: str
    start: int  # of the opening tag
    end: int  # of the closing tag
    problem: str | None


def _block(text: str, name: str) -> _Block:
    """The first <name> block of `text`. Without a closing tag it ends at the next tag; without any, it is empty."""
    tags = list(_TAG.finditer(text))
    named = [tag for tag in tags if tag["name"].lower() == name]
    opening = next((tag for tag in named if not tag["slash"]), None)
    if opening is None:
        return _Block("", len(text), len(text), f"no closed <{name}>")
    later = [tag for tag in tags if tag.start() >= opening.end()]
    closing = next((tag for tag in later if tag["slash"] and tag["name"].lower() == name), None)
    if closing is None:
        end = later[0].start() if later else len(text)
        return _Block(text[opening.end() : end].strip(), opening.start(), end, f"no closed <{name}>")
    problem = f"more than one <{name}>" if len(named) > 2 else None
    return _Block(text[opening.end() : closing.start()].strip(), opening.start(), closing.end(), problem)


def parse_question(text: str, finish_reason: FinishReason = "stop") -> Question:
    """Read a proposer's reply, `<question>…</question><rationale>…</rationale>` (arXiv 2601.05877); never raises.

    A reply is well-formed if the generation ended by itself and it has exactly one closed question, with at least one
    letter or digit and without markup. The rationale is optional: "" if it is missing. The text of a question that is
    not well-formed is for display only.
    """
    question, rationale = _block(text, "question"), _block(text, "rationale")
    problem = question.problem
    if finish_reason != "stop":
        problem = _CUT_OFF
    elif problem is None and not _LETTER_OR_DIGIT.search(question.inside):
        problem = "empty question"
    elif problem is None and (_TAG.search(question.inside) or _MARKUP.search(question.inside)):
        problem = "markup inside the question"  # the solver's prompt would pass a tag or special token on to the model
    return Question(question.inside, rationale.inside, problem)


# --- the solver's replies --------------------------------------------------------------------------------------------


def parse_trajectory(text: str, finish_reason: FinishReason = "stop", form: Form = "tags") -> Solution:
    r"""Read a solver's reply; never raises.

    A reply is well-formed if the generation ended by itself, and it has at least one reasoning step with a letter or
    digit, and an answer with a visible character. The form says where they are:

    - `tags` (arXiv 2601.05877): `<think>steps</think><answer>answer</answer>`, one closed block of each, in this order.
      Other text around them is ignored.
    - `boxed`: the answer is inside the last `\boxed{…}`, which must be closed. Braces inside it must balance, except
      escaped ones (`\{`). The steps are on the lines before the one with the box, because that line usually only
      announces the answer; if there are none, the step is what precedes the box. The signs of a formula or of emphasis
      around the box belong to it. Other text after it is ignored.
    - `answer-line`: the answer is on the last line that begins with "Answer:", "Final answer:" or "The answer is:", or
      on the next line with text if nothing follows the colon. The line may be a list item, a heading or emphasised. The
      steps are on the lines before it. No letter or digit may follow the answer, as it may be the rest of the answer.

    In the last two forms, a tag of the first one is read as a line break.

    Args:
        text: the reply as sampled, without its end token.
        finish_reason: "length" if it was cut off; then it is not well-formed.
        form: the form that the solver's prompt asks for.

    Returns:
        The steps, answer and problem. The answer is stripped but not normalised, and None if the reply is not
        well-formed; the steps are then what could be read, for display only. `words_before_answer` counts the words,
        separated by white space, before the `<answer>` tag, the box or the answer line, or all words if there is none.
        Tags count in the form `tags` only.
    """
    steps, answer, before, problem = _READERS[form](text)
    if finish_reason != "stop":
        problem = _CUT_OFF
    elif problem is None and not any(map(_LETTER_OR_DIGIT.search, steps)):
        problem = "no reasoning step"
    elif problem is None and not any(c.isprintable() and not c.isspace() for c in answer):
        problem = "empty answer"  # a bare sign such as "+" is an answer, invisible characters are none
    return Solution(
        reasoning_steps=steps,
        answer=answer if problem is None else None,
        words_before_answer=len(before.split()),
        problem=problem,
    )


class _Reading(NamedTuple):
    steps: tuple[str, ...]
    answer: str
    before: str  # the text before the answer
    problem: str | None


def _read_tags(text: str) -> _Reading:
    think, answer = _block(text, "think"), _block(text, "answer")
    problem = think.problem or answer.problem
    if problem is None and answer.start < think.end:
        problem = "<answer> before the end of <think>"
    return _Reading(reasoning_steps(think.inside), answer.inside, text[: answer.start], problem)


def _lines_without_tags(text: str) -> str:
    """`text` with "\\n" for each tag and for each other line break, so that "^" finds the start of every line."""
    return "\n".join(_TAG.sub("\n", text).splitlines())


_BOX = re.compile(r"\\boxed\s*+\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # the first alternative skips escaped braces, and the second \ of \\
_AROUND_BOX = (("$$", "$$"), ("$", "$"), ("\\[", "\\]"), ("\\(", "\\)"), ("**", "**"))


def _read_boxed(text: str) -> _Reading:
    text = _lines_without_tags(text)
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return _Reading(reasoning_steps(text), "", text, "no closed \\boxed{…}")
    before, inside = text[: boxes[-1].start()], text[boxes[-1].end() :]
    depth, end = 1, len(inside)
    for brace in _BRACE.finditer(inside):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            end = brace.start()
            break
    after = inside[end + 1 :]
    for opening, closing in _AROUND_BOX:
        if before.rstrip().endswith(opening) and after.lstrip().startswith(closing):
            before, after = before.rstrip().removesuffix(opening), after.lstrip().removeprefix(closing)
    steps = reasoning_steps(before.rpartition("\n")[0])
    if not any(map(_LETTER_OR_DIGIT.search, steps)):
        steps = reasoning_steps(before)
    return _Reading(steps, inside[:end].strip(), before, "no closed \\boxed{…}" if depth else None)


_ANSWER_LINE = re.compile(
    rf"{LIST_ITEM}{EMPHASIS}(?:(?:the|my)[ \t]++)?(?:(?:final|correct)[ \t]++)?"
    rf"answer(?:[ \t]++is)?[ \t]*+{CLOSED}[ \t]*+[:：]",
    re.MULTILINE | re.IGNORECASE,
)


def _read_answer_line(text: str) -> _Reading:
    text = _lines_without_tags(text)
    lines = list(_ANSWER_LINE.finditer(text))
    if not lines:
        return _Reading(reasoning_steps(text), "", text, "no answer line")
    before, emphasis = text[: lines[-1].start()], lines[-1]["emphasis"] or ""
    # "**Answer:** 7" and "**Answer: 7**": what closes the emphasis of the marker is not part of the answer.
    after_colon = text[lines[-1].end() :].lstrip(string.whitespace + emphasis)
    answer, _, rest = after_colon.partition("\n")
    answer = answer.rstrip(string.whitespace + emphasis).strip()
    problem = "text after the answer line" if _LETTER_OR_DIGIT.search(rest) else None
    return _Reading(reasoning_steps(before), answer, before, problem)


_READERS = {"tags": _read_tags, "boxed": _read_boxed, "answer-line": _read_answer_line}
