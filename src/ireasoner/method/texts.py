"""The prompts of the proposer and the solver, and the parsers of their replies (iReasoner, arXiv 2601.05877).

The parsers never raise an exception: if a reply cannot be read, the `problem` of the result says why. They take time
linear in the length of the reply, whatever it holds, as a model in training may write anything. For this, every
repetition in the patterns below is possessive (`*+` never gives characters back), bounded, or anchored to a line.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ireasoner.method.instructions import PROPOSER_PROMPT, SOLVER_PROMPTS, speaking_of
from ireasoner.method.instructions import SOLVER_PROMPT as SOLVER_PROMPT
from ireasoner.method.sentences import sentences
from ireasoner.method.steps import CLOSED, EMPHASIS, LIST_ITEM, reasoning_steps
from ireasoner.method.tags import LETTER_OR_DIGIT, MARKUP, TAG, after_thought, block, parts
from ireasoner.method.types import FinishReason, Form, Question, Shown, Solution

_CUT_OFF, _RECITES = "cut off before the end token", "recites the prompt"


def proposer_messages(
    prompt: str, domain: str | None = None, examples: Sequence[str] = (), shown: Shown = "image"
) -> list[dict[str, Any]]:
    """The proposer's prompt as chat messages for a processor's chat template: one user turn, image then text.

    Args:
        prompt: what the proposer is told.
        domain: such as "chest X-rays of adults", is put into the prompt as `with_domain` does it.
        examples: questions about other images, which are shown below the prompt. To repeat one is to recite the prompt.
        shown: what the question is to be about, of which the prompts that are shipped speak.
    """
    told = [f"<question>{question}</question>" for question in examples]
    below = ["", f"Questions about other {_many(shown)}, as examples:", *told] if told else []
    return _user_turn("\n".join([with_domain(speaking_of(prompt, shown), domain, shown), *below]))


def with_domain(prompt: str, domain: str | None, shown: Shown = "image") -> str:
    """The proposer's prompt with what the images show: in place of each literal `{domain}`, or else in a sentence
    before everything. Without a domain it is the same prompt."""
    if domain is None:
        return prompt
    if "{domain}" in prompt:
        return prompt.replace("{domain}", domain)  # not str.format: a domain and a prompt may hold braces
    return f"The {_many(shown)} are all of this kind: {domain}.\n{prompt}"


def _many(shown: Shown) -> str:
    return "clips" if shown == "clip" else "images"


def solver_messages(prompt: str, question: str, shown: Shown = "image") -> list[dict[str, Any]]:
    """The solver's prompt, with `question` in place of each literal `{question}`, as one user turn, image then text.

    The prompts that are shipped speak of what is `shown`.

    Raises:
        ValueError: the prompt has no `{question}`, so that the solver would never see the question.
    """
    if "{question}" not in prompt:
        raise ValueError("the solver's prompt must contain {question}")
    prompt = speaking_of(prompt, shown)
    return _user_turn(prompt.replace("{question}", question))  # not str.format: a question may hold braces


def _user_turn(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def opens_thought(prompt: str) -> bool:
    """Whether a prompt, as the model reads it, ends with `<think>`, so that the reply begins inside of a thought.

    Some thinking models have such chat templates. After `<think></think>` in the prompt, the thought is over.
    """
    return prompt.rstrip().lower().endswith("<think>")


# --- the proposer's replies -------------------------------------------------------------------------------------------


def parse_question(text: str, finish_reason: FinishReason = "stop", prompt: str | None = None) -> Question:
    """Read a proposer's reply, `<question>…</question><rationale>…</rationale>` (arXiv 2601.05877); never raises.

    A reply is well-formed if, after the thought that it may begin with, it has exactly one closed question. This must
    have a letter or digit, no markup, and not be the one that the prompt shows. The rationale is optional: "" if it is
    missing. The generation must have ended by itself, except that it may be cut off in the rationale, as the question
    is complete then. The text of a question that is not well-formed is for display only.

    Args:
        text: the reply as sampled, without its end token.
        finish_reason: "length" if it was cut off.
        prompt: as the model read it; None: the one that is shipped.
    """
    prompt = PROPOSER_PROMPT if prompt is None else prompt
    text = after_thought(text, opens_thought(prompt))
    question, problem = block(text, "question")
    rationale, _ = block(text, "rationale")
    if finish_reason != "stop" and (problem or not _ends_in_rationale(text[question.end :])):
        problem = _CUT_OFF
    elif problem is None and not LETTER_OR_DIGIT.search(question.inside):
        problem = "empty question"
    elif problem is None and (TAG.search(question.inside) or MARKUP.search(question.inside)):
        problem = "markup inside the question"  # the solver's prompt would pass a tag or special token on to the model
    elif problem is None and _is_said(question.inside, prompt):
        problem = _RECITES
    return Question(question.inside, rationale.inside, problem)


def _ends_in_rationale(rest: str) -> bool:
    """Whether nothing follows a question but a rationale, or the beginning of one."""
    rest = rest.strip()
    tags = list(TAG.finditer(rest))
    if not tags:
        return "<rationale>".startswith(rest.lower())
    names = [(tag["slash"], tag["name"].lower()) for tag in tags]
    closed = names[1:] == [("/", "rationale")] and tags[-1].end() == len(rest)
    return tags[0].start() == 0 and names[0] == ("", "rationale") and (closed or not names[1:])


# --- the solver's replies ---------------------------------------------------------------------------------------------


def parse_trajectory(
    text: str, finish_reason: FinishReason = "stop", form: Form = "tags", prompt: str | None = None
) -> Solution:
    r"""Read a solver's reply; never raises.

    A reply is well-formed if the generation ended by itself, it has at least one reasoning step with a letter or digit
    and an answer with a visible character, and it does not only recite its prompt. The form says where they are:

    - `tags` (arXiv 2601.05877): `<think>steps</think><answer>answer</answer>`, one closed block of each, in this order.
      The prompt may have opened the thought; then another one may follow it, which has the steps. An empty thought may
      come first, and tags may be mentioned in the thought. A second answer makes the text unreadable, even the same.
    - `boxed`: the answer is inside the last `\boxed{…}`, which must be closed. Braces inside it must balance, except
      escaped ones (`\{`). The steps are on the lines before the one with the box, because that line usually only
      announces the answer; if there are none, the step is what precedes the box. The signs of a formula or of emphasis
      around the box belong to it.
    - `answer-line`: the answer is on the last line that begins with "Answer:", "Final answer:" or "The answer is:" (or
      "Antwort:", "答案：" and the like), or on the next line with text if nothing follows the colon. The line may be a
      list item, a heading or emphasised. The steps are on the lines before it. No letter or digit may follow the
      answer, as it may be the rest of the answer.

    In the last two forms, a tag of the first one is read as a line break.

    Args:
        text: the reply as sampled, without its end token.
        finish_reason: "length" if it was cut off; then it is not well-formed.
        form: the form that the solver's prompt asks for.
        prompt: as the model read it, which is what an `Episode` records; None: the one that is shipped for the form.

    Returns:
        The steps, answer and problem. The answer is stripped but not normalised, and None if the reply is not
        well-formed; the steps are then what could be read, for display only. `words_before_answer` counts the words,
        separated by white space, before the `<answer>` tag, the box or the answer line, or all words if there is none.
        Tags count in the form `tags` only. Words with a letter or digit that come after the answer are added, so that
        they cost as much as if they came before it.
    """
    prompt = SOLVER_PROMPTS[form] if prompt is None else prompt
    steps, answer, before, after, problem = _READERS[form](text, opens_thought(prompt))
    if finish_reason != "stop":
        problem = _CUT_OFF
    elif problem is None and not any(map(LETTER_OR_DIGIT.search, steps)):
        problem = "no reasoning step"
    elif problem is None and not any(c.isprintable() and not c.isspace() for c in answer.strip(". …")):
        problem = "empty answer"  # a bare sign such as "+" is an answer, invisible characters and dots are none
    elif problem is None and _recites(steps, answer, prompt):
        problem = _RECITES
    words_after = MARKUP.sub(" ", TAG.sub(" ", after)).split()
    return Solution(
        reasoning_steps=steps,
        answer=answer if problem is None else None,
        words_before_answer=len(before.split()) + sum(LETTER_OR_DIGIT.search(word) is not None for word in words_after),
        problem=problem,
    )


class _Reading(NamedTuple):
    steps: tuple[str, ...]
    answer: str
    before: str  # the text before the answer
    after: str
    problem: str | None


_TAGS_ALONE = re.compile(rf"^(?:[ \t]*+(?:{TAG.pattern}|{MARKUP.pattern}))++[ \t]*+$", re.IGNORECASE | re.MULTILINE)


def _read_tags(text: str, opened: bool) -> _Reading:
    thoughts, answers, unclosed, problem = parts(text, opened)
    told = [thought for thought in thoughts if LETTER_OR_DIGIT.search(thought.inside)]
    answer = answers[0] if answers else block(text, "answer")[0]
    thought = (told or thoughts or [block(f"<think>{text}" if opened else text, "think")[0]])[-1]
    if unclosed == "think" or not thoughts:
        problem = "no closed <think>"
    elif problem is None and (unclosed == "answer" or not answers):
        problem = "<answer> before the end of <think>" if answer.start < thoughts[-1].end else "no closed <answer>"
    elif problem is None and len(told) > (2 if opened else 1):
        problem = "more than one <think>"
    elif problem is None and answer.start < thoughts[-1].end:
        problem = "<answer> before the end of <think>"
    elif problem is None and len(answers) > 1:
        problem = "more than one <answer>"
    steps = reasoning_steps(_TAGS_ALONE.sub("", thought.inside))
    return _Reading(steps, answer.inside, text[: answer.start], text[answer.end :], problem)


def _lines_without_tags(text: str) -> str:
    """`text` with "\\n" for each tag and for each other line break, so that "^" finds the start of every line."""
    return "\n".join(TAG.sub("\n", text).splitlines())


_BOX = re.compile(r"\\boxed\s*+\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # the first alternative skips escaped braces, and the second \ of \\
_AROUND_BOX = (("$$", "$$"), ("$", "$"), ("\\[", "\\]"), ("\\(", "\\)"), ("**", "**"))


def _read_boxed(text: str, opened: bool) -> _Reading:
    text = _lines_without_tags(text)
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return _Reading(reasoning_steps(text), "", text, "", "no closed \\boxed{…}")
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
    if not any(map(LETTER_OR_DIGIT.search, steps)):
        steps = reasoning_steps(before)
    return _Reading(steps, inside[:end].strip(), before, after, "no closed \\boxed{…}" if depth else None)


_ANSWER_LINE = re.compile(
    rf"{LIST_ITEM}{EMPHASIS}(?:(?:the|my)[ \t]++)?(?:(?:final|correct)[ \t]++)?"
    r"(?:answer(?:[ \t]++is)?|antwort|respuesta(?:[ \t]++final)?|réponse(?:[ \t]++finale)?|risposta|resposta|ответ|"
    rf"(?:最终)?答案|答え?)[ \t]*+{CLOSED}[ \t]*+[:：]",
    re.MULTILINE | re.IGNORECASE,
)


def _read_answer_line(text: str, opened: bool) -> _Reading:
    text = _lines_without_tags(text)
    lines = list(_ANSWER_LINE.finditer(text))
    if not lines:
        return _Reading(reasoning_steps(text), "", text, "", "no answer line")
    before, emphasis = text[: lines[-1].start()], lines[-1]["emphasis"] or ""
    # "**Answer:** 7" and "**Answer: 7**": what closes the emphasis of the marker is not part of the answer.
    after_colon = text[lines[-1].end() :].lstrip(string.whitespace + emphasis)
    answer, _, rest = after_colon.partition("\n")
    answer = answer.rstrip(string.whitespace + emphasis).strip()
    problem = "text after the answer line" if LETTER_OR_DIGIT.search(rest) else None
    return _Reading(reasoning_steps(before), answer, before, rest, problem)


_READERS: dict[Form, Callable[[str, bool], _Reading]] = {
    "tags": _read_tags,
    "boxed": _read_boxed,
    "answer-line": _read_answer_line,
}


# --- replies that recite their prompt ---------------------------------------------------------------------------------

# What stands for an answer in a prompt calls itself one: "the final answer", "[your answer]".
_ANSWER_WORD = re.compile(r"answer|antwort|réponse|respuesta|resposta|risposta|ответ|答案|答え|回答|답", re.IGNORECASE)


def _recites(steps: tuple[str, ...], answer: str, prompt: str) -> bool:
    """Whether all steps are those of the prompt, or the answer is the words that stand for it there.

    An answer alone may rightly be that of an example in the prompt.
    """
    stands_for_answer = _ANSWER_WORD.search(answer) and _plain(answer) in _plain(prompt)
    return bool(stands_for_answer) or _is_said("".join(steps), prompt)


def _is_said(text: str, prompt: str) -> bool:
    """Whether a text is made of sentences of the prompt, if only in other signs or in capital letters."""
    plain, said, start = _plain(TAG.sub("", text)), _said(prompt), 0
    while start < len(plain):
        sentence = next((sentence for sentence in said if plain.startswith(sentence, start)), "")
        if not sentence:
            return False
        start += len(sentence)
    return True


@lru_cache(maxsize=64)
def _said(prompt: str) -> list[str]:
    """The sentences of a prompt's lines, without tags and markers, as letters and digits alone; long ones first."""
    text = MARKUP.sub("\n", _BOX.sub("\n", _lines_without_tags(prompt)))
    lines = _ANSWER_LINE.sub("\n", text).split("\n")
    found = {_plain(part) for line in lines for step in reasoning_steps(line) for part in sentences(step)}
    return sorted(found - {""}, key=len, reverse=True)


def _plain(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))
