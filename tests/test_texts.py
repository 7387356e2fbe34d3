"""Prompts and the parsers of replies: every form, every malformed case, hostile text."""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ireasoner.method.texts import (
    PROPOSER_PROMPT,
    SOLVER_PROMPTS,
    opens_thought,
    parse_question,
    parse_trajectory,
    proposer_messages,
    reasoning_steps,
    solver_messages,
)
from ireasoner.method.types import FinishReason, Form, Shown

GOOD_QUESTION = "<question>Which bar is tallest?</question><rationale>Compare the heights.</rationale>"
GOOD_TRAJECTORY = "<think>Step 1: Red is 7.\nStep 2: Blue is 3.</think> <answer>red</answer>"
CUT_OFF, RECITES = "cut off before the end token", "recites the prompt"
ALL_FORMS: tuple[Form, ...] = ("tags", "boxed", "answer-line")

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<question>", "</question>", "<rationale>", "</rationale>"]
# Text made of the parts that the readers look for, where random characters would never find the corners.
# fmt: off
PIECES = st.sampled_from([
    *TAGS, "<", ">", "</", "<THINK>", "< think >", "<|im_end|>", " ", "\n", "\r\n", "\t", "\u2028", "\u200b", "\ud800",
    "Step", "step", "Step1:", "Step 1:", "Step 2:", "**Step", "(Step 2)", "1", "2", "3", "1.", "2.", "1)", "(1)", "1:",
    ":", ".", ")", "(", "-", "*", "**", "_", "__", "#", "###", "•", "---", "2.5", "12:30", "1990:", "see", "word",
    "é", "½", "٣", "ſ", "：", ",",
    "\\boxed{", "\\boxed {", "{", "}", "\\{", "\\", "$", "\\[", "Answer:", "answer",
    "Final answer: ", "The answer is: ",
])
HOSTILE = [
    "<think>", "<answer>", "</answer>", "<think><answer>", "<question>", "<", "< ", "</", "< / think", "<a ", "<a =",
    "<!", "<|", "<|im_end|>",
    "\n", "\r", "\t", "  \n", " ", " | ", "•", "\u2028", "#", "# ", "*", "* ", "- ", "---\n", "> ",
    "Step 1:", "Step 1: ", "Step 1:\n", "Step 1 a\n", "step ", "- Step 2 ", "(Step 2) ", "**Step 1", "**Step 1: ",
    "1", "1.", "1. ", "1.\n", "1)\n", "_", "(", "=", "`", "/",
    "{", "}", "{}", "}{", "\\", "\\{", "\\}", "\\boxed", "\\boxed ", "\\boxed{", "\\boxed{}", "\\boxed{7}\n",
    "\\boxed{\\boxed{7}", "Answer", "Answer: ", "Answer:\n", "Answer: 7\n", "**Answer:** 7\n", "the ", "the answer ",
]
MARKUP = [
    "<answer>", "</answer>", "<think>", "<THINK>", "</Think>", "<rationale>", "< answer >", "</ think>", "<\n/answer>",
    "<image>", "<video>", "</s>", "<s>", "<unk>", "<!doctype>", "<br/>", "<br />", '<img src="a.png">', '<a b="c d" />',
    "<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|vision_start|>", "<｜end▁of▁sentence｜>", "<start_of_turn>",
]
# fmt: on
TEXTS = st.text(max_size=60) | st.builds(str.join, st.sampled_from(["", " "]), st.lists(PIECES, max_size=40))
FINISHES: st.SearchStrategy[FinishReason] = st.sampled_from(["stop", "length"])
WORDS = st.lists(st.sampled_from(["red", "bar", "half", "than", "more"]), min_size=1, max_size=6).map(" ".join)


# --- what the roles are told


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (proposer_messages("Ask."), "Ask."),
        (proposer_messages("Ask about {domain}."), "Ask about {domain}."),
        (proposer_messages("Ask.", "X-rays"), "The images are all of this kind: X-rays.\nAsk."),
        (
            proposer_messages("Ask {domain} {x}.", "{0} {question} {domain}"),
            "Ask {0} {question} {domain} {x}.",
        ),
        (solver_messages("Q: {question}", "How many?"), "Q: How many?"),
        (
            solver_messages("{a} {question}{}", "f({x}) at {0}, {question}, \\1?"),
            "{a} f({x}) at {0}, {question}, \\1?{}",
        ),
    ],
)
def test_messages_are_one_user_turn_of_image_then_text(messages: list[dict], text: str) -> None:
    assert messages == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


@pytest.mark.parametrize("prompt", [PROPOSER_PROMPT, *SOLVER_PROMPTS.values()])
def test_the_prompts_that_are_shipped_speak_of_what_is_shown(prompt: str) -> None:
    """All words but those about what is shown stay the same, those of the question included."""
    question = "What is the image about it?"

    def told(prompt: str, shown: Shown) -> str:
        solves = "{question}" in prompt
        (turn,) = solver_messages(prompt, question, shown) if solves else proposer_messages(prompt, shown=shown)
        return turn["content"][1]["text"]

    one, images, clip = told(prompt, "image"), told(prompt, "images"), told(prompt, "clip")
    assert one == prompt.replace("{question}", question)
    assert images.startswith("Look closely at the images and ")
    assert clip.startswith("Look closely at the clip and ")
    assert ("two things that the images show;" in images) == ("two things that the image shows;" in one)
    assert images.split("\n")[0].count(" about them") == clip.split("\n")[0].removesuffix(question).count(" about it")
    for text in (images, clip):
        assert text.count(question) == one.count(question)
        assert "the image " not in text.replace(question, "")
        assert len(text.split()) == len(one.split())
    for own in (f"{prompt} ", "Look at the image. {question}"):
        assert told(own, "clip") == told(own, "images") == told(own, "image")


def test_a_domain_and_examples_are_of_images_or_clips() -> None:
    (turn,) = proposer_messages("Ask.", "X-rays", ["How many?"], "clip")
    assert turn["content"][1]["text"] == (
        "The clips are all of this kind: X-rays.\nAsk.\n\n"
        "Questions about other clips, as examples:\n<question>How many?</question>"
    )


@pytest.mark.parametrize("prompt", ["", "Answer.", "{Question}", "{ question }"])
def test_a_solver_prompt_without_its_placeholder_is_an_error(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"\{question\}"):
        solver_messages(prompt, "How many?")


def test_the_proposer_prompt_shows_the_form_that_is_read() -> None:
    asked = PROPOSER_PROMPT[PROPOSER_PROMPT.index("<question>") :]
    assert parse_question(asked).problem == RECITES
    assert parse_question(asked.replace("the question", "How many?")).well_formed
    assert parse_question(asked).rationale


def test_there_is_a_solver_prompt_for_each_form() -> None:
    assert list(SOLVER_PROMPTS) == list(get_args(Form)) == list(ALL_FORMS)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_the_solver_prompt_shows_the_form_that_is_read(form: Form) -> None:
    prompt = SOLVER_PROMPTS[form]
    _, _, example = prompt.partition("Reply in exactly this form:\n")
    solved = parse_trajectory(example, form=form)
    assert solved.problem == RECITES
    assert solved.reasoning_steps == ("what you see first", "what follows from it")
    assert prompt.count("{question}") == 1
    filled = parse_trajectory(
        example.replace("what you see first", "Red is 7.")
        .replace("what follows from it", "So red is tallest.")
        .replace("the final answer", "7.5 cm"),
        form=form,
    )
    assert (filled.reasoning_steps, filled.answer) == (("Red is 7.", "So red is tallest."), "7.5 cm")
    others = [parse_trajectory(example, form=other, prompt="") for other in ALL_FORMS if other != form]
    assert not any(other.well_formed for other in others)


# --- questions


@pytest.mark.parametrize(
    ("text", "question", "rationale"),
    [
        (GOOD_QUESTION, "Which bar is tallest?", "Compare the heights."),
        ("<question>How many?</question>", "How many?", ""),
        ("Sure!\n< Question >\n How many? \n</ QUESTION >\n<RATIONALE> why </rationale>", "How many?", "why"),
        ("<rationale>why</rationale><question>How many?</question>", "How many?", "why"),
        ("<question>Which?\nA. Red\nB. Blue</question><rationale>unclosed", "Which?\nA. Red\nB. Blue", "unclosed"),
        ("<question>Is 3 < x and y > 2, a<b, {x} or 5 <= 7?</question>", "Is 3 < x and y > 2, a<b, {x} or 5 <= 7?", ""),
        ("<question>哪个最高？</question>", "哪个最高？", ""),
    ],
)
def test_a_question_is_read(text: str, question: str, rationale: str) -> None:
    read = parse_question(text)
    assert (read.text, read.rationale, read.problem) == (question, rationale, None)
    assert read.well_formed


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no closed <question>"),
        ("How many?", "no closed <question>"),
        ("<question>How many?", "no closed <question>"),
        ("How many?</question>", "no closed <question>"),
        ("</question>How many?<question>", "no closed <question>"),
        ("<question>How many?<rationale>why</rationale>", "no closed <question>"),
        ("<question></question>", "empty question"),
        ("<question> \n\u200b </question><rationale>why</rationale>", "empty question"),
        ("<question>…?</question>", "empty question"),
        ("<question>a?</question><question>b?</question>", "more than one <question>"),
        ("<question>a <question>b?</question>", "more than one <question>"),
        ("<question>a?</question> or </question>", "more than one <question>"),
    ],
)
def test_a_malformed_question_is_a_problem(text: str, problem: str) -> None:
    read = parse_question(text)
    assert read.problem == problem
    assert not read.well_formed


@pytest.mark.parametrize("markup", MARKUP)
def test_markup_inside_a_question_is_a_problem(markup: str) -> None:
    """The question is pasted into the solver's prompt, where a tag or a special token would act."""
    assert parse_question(f"<question>How {markup} many?</question>").problem == "markup inside the question"
    assert parse_question(f"<question>How many?</question> {markup}").well_formed


@pytest.mark.parametrize(
    "rest",
    ["<rationale>Compare the hei", "<rationale>", "\n<rationale>\nCompare </ratio", "<rationale>why</rationale>\n",
    "<rat", "",
     "\n\n", "< Rationale >Zuerst die Höhe", "<rationale>比较"],
)  # fmt: skip
def test_a_question_whose_rationale_was_cut_off_is_asked(rest: str) -> None:
    for question in ("How many?", "哪个最高？", "Wie viele?"):
        read = parse_question(f"<question>{question}</question>{rest}", "length")
        assert (read.text, read.problem) == (question, None)


@pytest.mark.parametrize(
    "text",
    ["<question>How many?", "<question>How many?</quest", "<question>How many?</question> and so on, and so on",
     "<question>How many?</question><rationale>why</rationale> and so on", "<question>How many?</question><ratios",
     "<question>How many?</question><rationale>why <question>", "<question></question><rationale>why",
     "<question>a?</question><question>b?</question><rationale>why", "<rationale>why</rationale><question>How"],
)  # fmt: skip
def test_a_question_that_was_cut_off_elsewhere_is_not_asked(text: str) -> None:
    assert not parse_question(text, "length").well_formed


def test_an_unreadable_question_still_shows_what_was_written() -> None:
    assert parse_question("<question>How many?<rationale>why").text == "How many?"
    assert parse_question(GOOD_QUESTION, "length").text == "Which bar is tallest?"


# --- trajectories


@pytest.mark.parametrize(
    ("text", "steps", "answer", "words"),
    [
        (GOOD_TRAJECTORY, ("Red is 7.", "Blue is 3."), "red", 10),
        ("<think>Step 1: a</think><answer>7</answer>", ("a",), "7", 3),
        ("< THINK >\n- a\n- b\n</ Think > so < Answer > 3.50 cm </ANSWER> bye", ("a", "b"), "3.50 cm", 12),
        ("Sure. <think>a</think>\n\n<answer>\nC++\n</answer>\n<|im_end|>", ("a",), "C++", 2),
        ("<think>Step 1:\nStep 2: b</think><answer>+</answer>", ("", "b"), "+", 5),
        ("<think>3 < 5</think><answer>x < y</answer>", ("3 < 5",), "x < y", 3),
    ],
)
def test_a_trajectory_is_read(text: str, steps: tuple[str, ...], answer: str, words: int) -> None:
    read = parse_trajectory(text)
    assert read.problem is None
    assert (read.reasoning_steps, read.answer, read.words_before_answer) == (steps, answer, words)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no closed <think>"),
        ("yes", "no closed <think>"),
        ("<answer>yes</answer>", "no closed <think>"),
        ("Step 1: a</think><answer>7</answer>", "no closed <think>"),
        ("<think>Step 1: a<answer>7</answer>", "no closed <think>"),
        ("</think>Step 1: a<think><answer>7</answer>", "no closed <think>"),
        ("<think>Step 1: a</think>", "no closed <answer>"),
        ("<think>Step 1: a</think>7", "no closed <answer>"),
        ("<think>Step 1: a</think><answer>7", "no closed <answer>"),
        ("<think>Step 1: a</think>7</answer>", "no closed <answer>"),
        ("<think>Step 1: a</think></answer>7<answer>", "no closed <answer>"),
        ("<think>a</think><think>b</think><answer>7</answer>", "more than one <think>"),
        ("<think>a</think><answer>7</think></answer>", "more than one <think>"),
        ("<think>a</think><answer>7</answer><answer>8</answer>", "more than one <answer>"),
        ("<think>a</think><answer>7</answer> or 8</answer>", "more than one <answer>"),
        ("<think>a</think><answer>7</answer><answer>", "no closed <answer>"),
        ("<think>a</think><answer>7 <answer>8</answer>", "more than one <answer>"),
        ("<think>a</think><answer>7</answer><think>b</think><answer>8</answer>", "more than one <think>"),
        ("<think>a</think><answer>7</answer><think></think>", "<answer> before the end of <think>"),
        ("<answer>7</answer><answer>8</answer>", "no closed <think>"),
        ("<think>a</think><answer>7</answer></answer>", "more than one <answer>"),
        ("<answer>7</answer><think>a</think>", "<answer> before the end of <think>"),
        ("<think>a<answer>7</answer></think>", "<answer> before the end of <think>"),
        ("<think>a<answer></think>7</answer>", "<answer> before the end of <think>"),
        ("<think></think><answer>7</answer>", "no reasoning step"),
        ("<think> \n </think><answer>7</answer>", "no reasoning step"),
        ("<think>Step 1:\nStep 2:</think><answer>7</answer>", "no reasoning step"),
        ("<think>1.\n2.</think><answer>7</answer>", "no reasoning step"),
        ("<think>Step 1: …\n- ***\n---</think><answer>7</answer>", "no reasoning step"),
        ("<think>a</think><answer></answer>", "empty answer"),
        ("<think>a</think><answer>...</answer>", "empty answer"),
        ("<think>a</think><answer>…</answer>", "empty answer"),
        ("<think>a</think><answer> \n\u200b\u00a0</answer>", "empty answer"),
    ],
)
def test_a_malformed_trajectory_is_a_problem_and_has_no_answer(text: str, problem: str) -> None:
    read = parse_trajectory(text)
    assert (read.problem, read.answer) == (problem, None)
    assert not read.well_formed


@pytest.mark.parametrize(
    ("text", "steps", "words"),
    [
        ("<think>Step 1: a Step 2: b", ("a", "b"), 6),
        ("<think>Step 1: a<answer>7</answer>", ("a",), 3),
        ("<think>Step 1: a</think> so 7", ("a",), 5),
        ("<answer>7</answer><think>- a</think>", ("a",), 1),
        ("no tags at all", (), 4),
    ],
)
def test_an_unreadable_trajectory_still_shows_what_could_be_read(text: str, steps: tuple[str, ...], words: int) -> None:
    read = parse_trajectory(text)
    assert not read.well_formed
    assert (read.reasoning_steps, read.words_before_answer) == (steps, words)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        # An empty thought first.
        ("<think>\n\n</think>\n\n<think>Four.</think><answer>4</answer>", ("Four.",)),
        ("<think></think><think>Four.</think><answer>4</answer>", ("Four.",)),
        ("<think>\n</think>\n<think>\n</think>\n<think>Four.</think><answer>4</answer>", ("Four.",)),
        ("<think>Four.</think><think>\n</think><answer>4</answer>", ("Four.",)),
        ("<think>\n<think>\nFour.\n</think>\n<answer>4</answer>", ("Four.",)),  # opened twice
        # Tags that are mentioned.
        ("<think>The <answer> tag takes the 4.</think><answer>4</answer>", ("The <answer> tag takes the 4.",)),
        ("<think>In `<think>` I count 4.</think><answer>4</answer>", ("In `<think>` I count 4.",)),
        ("<think>In <think> and </answer> 4.</think><answer>4</answer>", ("In <think> and </answer> 4.",)),
        ("<think>I end with `</think>`: 4.</think><answer>4</answer>", ("I end with `</think>`: 4.",)),
        ("<think>I end with \"</think>\": 4.</think><answer>4</answer>", ("I end with \"</think>\": 4.",)),
        ("<think>I end with “</think>”: 4.</think><answer>4</answer>", ("I end with “</think>”: 4.",)),
        ("<think>It goes in <answer> and </answer>: 4</think><answer>4</answer>",
         ("It goes in <answer> and </answer>: 4",)),
        ("<think>写在<answer>里：4。</think><answer>4</answer>", ("写在<answer>里：4。",)),
        ("<think>Use `<think>x</think><answer>y</answer>`: 4</think><answer>4</answer>",
         ("Use `<think>x</think><answer>y</answer>`: 4",)),
        ("<think>\nLike this:\n```\n<think>\nx\n</think>\n<answer>\ny\n</answer>\n```\nI see 4.\n</think>\n"
         "<answer>4</answer>",
         ("Like this:", "x", "y", "I see 4.")),
        ("```\n<think>Four.</think>\n<answer>4</answer>\n```", ("Four.",)),
        ("<think>Four.</think>\n`<answer>4</answer>`", ("Four.",)),
        ("<think>\nFour, it\n<think>\nseems.\n</think>\n<answer>4</answer>", ("Four, it", "seems.")),
        ("<think>I write <think> and </think>. I see 4.</think><answer>4</answer>",
         ("I write <think> and </think>.", "I see 4.")),
        # Tags alone on a line, ours and others.
        ("<think>\n<ref>\nFour.\n</ref> <br/>\n<answer>\n</think>\n<answer>4</answer>", ("Four.",)),
        # Strays.
        ("<think>Four.</think><answer>4</answer></think>", ("Four.",)),
        ("<think>Four.</think></think><answer>4</answer>\n</think>\n", ("Four.",)),
        ("</think><think>Four.</think><answer>4</answer>", ("Four.",)),
    ],
)  # fmt: skip
def test_tags_that_are_empty_mentioned_or_left_over_hide_no_answer(text: str, steps: tuple[str, ...]) -> None:
    read = parse_trajectory(text)
    assert (read.problem, read.answer, read.reasoning_steps) == (None, "4", steps)


@pytest.mark.parametrize(
    "ending",
    ["<answer>7</answer><answer>8</answer>", "<answer>7</answer><answer>7</answer>",
     "<answer>7</answer> No: <answer>8</answer>",
    "<answer>7<answer>8</answer></answer>",
     "<answer>7</answer>\n```\n<answer>8</answer>\n```", "<answer>7</answer> or 8</answer>",
     "<answer>7</answer></think><answer>8</answer>", "<answer>7</answer><think></think><answer>8</answer>",
     "<answer>7</answer><answer></answer>", "<answer>7</answer><answer>7 or 8</answer>",
     "<answer>A</answer><answer>B</answer>"],
)  # fmt: skip
def test_a_text_with_two_answers_gives_none(ending: str) -> None:
    for opened in ("", "…<think>\n"):
        text = "Seven." if opened else "<think>Seven."
        read = parse_trajectory(f"{text}</think>{ending}", prompt=opened)
        assert read.answer is None
        assert not read.well_formed


# --- thoughts that the prompt has opened

OPENED = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n"


@pytest.mark.parametrize(
    ("text", "steps", "words"),
    [
        ("7.\n</think>\n<answer>7</answer>", ("7.",), 2),
        ("Red is 7. Blue is 0.\n</think>\n\n<answer>7</answer>", ("Red is 7.", "Blue is 0."), 7),
        ("红是7。蓝是0。</think><answer>7</answer>", ("红是7。", "蓝是0。"), 1),
        ("<think>\nStep 1: a\nStep 2: b\n</think>\n<answer>7</answer>", ("a", "b"), 8),  # opened again
        ("Let me see.\n</think>\n\n<think>\nStep 1: a\nStep 2: b\n</think>\n<answer>7</answer>", ("a", "b"), 12),
        ("\n\n</think>\n\n<think>a</think><answer>7</answer>", ("a",), 2),
        ("I write <answer> later. So 7.</think><answer>7</answer>", ("I write <answer> later.", "So 7."), 6),
        ("Step 1: a\nStep 2: b\n</think>\n<answer>7</answer>\n</think>", ("a", "b"), 7),
    ],
)
def test_a_thought_that_the_prompt_has_opened_is_read(text: str, steps: tuple[str, ...], words: int) -> None:
    for prompt in (OPENED, OPENED.rstrip(), "…<THINK>\n\n"):
        assert opens_thought(prompt)
        read = parse_trajectory(text, prompt=prompt)
        assert (read.problem, read.reasoning_steps, read.answer) == (None, steps, "7")
        assert read.words_before_answer == words
        assert parse_trajectory(text, "length", prompt=prompt).problem == CUT_OFF


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("7", "no closed <think>"),
        ("<answer>7</answer>", "no closed <think>"),
        ("</think><answer>7</answer>", "no reasoning step"),
        ("a</think>7", "no closed <answer>"),
        ("a</think><think>b</think><think>c</think><answer>7</answer>", "more than one <think>"),
        ("a</think><answer>7</answer><think>b</think>", "<answer> before the end of <think>"),
        ("a<answer>7</answer></think>", "<answer> before the end of <think>"),
    ],
)
def test_a_malformed_reply_to_a_prompt_that_has_opened_a_thought(text: str, problem: str) -> None:
    assert parse_trajectory(text, prompt=OPENED).problem == problem


def test_a_thought_that_the_prompt_has_closed_is_over() -> None:
    for closed in (OPENED + "\n</think>\n\n", "…<think></think>", "…</think>", "…"):
        assert not opens_thought(closed)
        assert parse_trajectory(GOOD_TRAJECTORY, prompt=closed).answer == "red"
        assert parse_trajectory("Red is 7.</think><answer>red</answer>", prompt=closed).problem == "no closed <think>"


@pytest.mark.parametrize("form", ["boxed", "answer-line"])
def test_the_other_forms_need_no_thought_and_read_one_that_the_prompt_has_opened(form: Form) -> None:
    ending = {"boxed": "\\boxed{7}", "answer-line": "Answer: 7"}[form]
    read = parse_trajectory(f"Step 1: a\nStep 2: b\n</think>\n\n{ending}", form=form, prompt=OPENED)
    assert (read.problem, read.reasoning_steps, read.answer) == (None, ("a", "b"), "7")


@pytest.mark.parametrize(
    ("text", "opened"),
    [
        (f"I write a <question> first.\n</think>\n\n{GOOD_QUESTION}", True),
        (f"<think>I write a <question> first.</think>\n{GOOD_QUESTION}", False),
        (f"<think>\n\n</think>\n\n<think>Or <question>this</question>?</think>{GOOD_QUESTION}", False),
        (f"Native.</think><think>Or <question>this</question>?</think>{GOOD_QUESTION}", True),
        (GOOD_QUESTION, True),  # without an end of the thought
        (GOOD_QUESTION, False),
        (f"{GOOD_QUESTION}<think>Was it good?</think>", False),
    ],
)
def test_a_question_is_read_after_the_thought(text: str, opened: bool) -> None:
    read = parse_question(text, prompt=OPENED if opened else "Ask.")
    assert (read.text, read.rationale, read.problem) == ("Which bar is tallest?", "Compare the heights.", None)


# --- replies that recite their prompt

OWN_PROMPT = """Answer {question}. For example:
<think>
Schritt 1: Hier steht, was man sieht.
Schritt 2: Und hier, was folgt. Auch das.
</think>
<answer>[deine Antwort]</answer><|im_end|>
<|im_start|>assistant
"""


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("rendered", [False, True])
def test_a_reply_that_recites_its_prompt_is_unreadable(form: Form, rendered: bool) -> None:
    frame = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n" if rendered else "{}"
    prompt = frame.format(SOLVER_PROMPTS[form].replace("{question}", "How many?"))
    whole = {
        "tags": "<think>\n{}\n</think>\n<answer>{}</answer>",
        "boxed": "{}\n\\boxed{{{}}}",
        "answer-line": "{}\nAnswer: {}",
    }[form]
    shown = "Step 1: what you see first\nStep 2: what follows from it"
    for steps, answer, problem in [
        (shown, "the final answer", RECITES),
        (shown, "7", RECITES),
        ("What you see first.", "7", RECITES),
        ("1. What you see first!\n2. WHAT FOLLOWS FROM IT", "7", RECITES),
        ("- what follows from it", "7", RECITES),
        (next(line for line in prompt.splitlines() if "First reason" in line), "7", RECITES),
        ("Step 1: Red is 7.", "the final answer", RECITES),
        ("Step 1: Red is 7.", "The final answer.", RECITES),
        ("Step 1: Red is 7.", "final answer", RECITES),
        ("Step 1: what you see first is red\nStep 2: so 7", "7", None),
        ("Step 1: Red is 7.", "7", None),
        ("Step 1: Red is 7.", "final", None),
        ("Step 1: How many bars?\nStep 2: Red is 7.", "a short phrase", None),
    ]:
        for told in (None, prompt):
            assert parse_trajectory(whole.format(steps, answer), form=form, prompt=told).problem == problem


def test_what_is_a_recital_follows_from_the_prompt_that_was_used() -> None:
    def problem(steps: str, answer: str, prompt: str | None = OWN_PROMPT) -> str | None:
        return parse_trajectory(f"<think>{steps}</think><answer>{answer}</answer>", prompt=prompt).problem

    shown = "Schritt 1: Hier steht, was man sieht.\nSchritt 2: Und hier, was folgt. Auch das."
    assert problem(shown, "[deine Antwort]") == problem(shown, "7") == RECITES
    assert problem("Hier steht, was man sieht. Auch das.", "7") == RECITES
    assert problem("Rot ist 7.", "deine Antwort") == RECITES
    assert problem("Rot ist 7.", "7") is None
    assert problem(shown, "7", prompt=None) is None
    assert problem("what you see first", "7") is None
    example = "For example: <think>Red is 7.</think><answer>C</answer>"  # its answer may be right elsewhere too
    assert problem("Red is 7.", "C", example) == RECITES
    assert problem("Blue is 7.", "C", example) is None


@pytest.mark.parametrize(
    ("question", "prompt"),
    [
        ("the question", None),
        ("The question?", None),
        ("the question", PROPOSER_PROMPT),
        ("the question", f"<|im_start|>user\n{PROPOSER_PROMPT}<|im_end|>\n<|im_start|>assistant\n<think>\n"),
        ("your question here", "Write <question>your question here</question>"),
        ("deine Frage", "<question>deine Frage</question><rationale>…</rationale>"),
        ("问题", "格式：<question>问题</question>"),
    ],
)
def test_a_question_that_recites_the_prompt_is_unreadable(question: str, prompt: str | None) -> None:
    assert (
        parse_question(f"<question>{question}</question><rationale>It is so.</rationale>", "stop", prompt).problem
        == RECITES
    )
    assert parse_question("<question>What is the question?</question>", "stop", prompt).well_formed


# --- text after the answer


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("tags", "<think>Red is 7.</think> {before}<answer>7</answer>{after}"),
        ("boxed", "Red is 7.\n{before}\\boxed{{7}}{after}"),
    ],
)
def test_words_after_the_answer_cost_as_much_as_before_it(form: Form, text: str) -> None:
    praise = " great work" * 500
    plain, early, late = (
        parse_trajectory(text.format(before=before, after=after), form=form)
        for before, after in (("", ""), (praise, ""), ("", praise))
    )
    assert plain.well_formed
    assert late.words_before_answer == early.words_before_answer == plain.words_before_answer + 1000
    for nothing in (".", " \n", "</answer>"[:0], "\n</think>\n", "<|im_end|>", " 🎉 !!", "\n---\n"):
        read = parse_trajectory(text.format(before="", after=nothing), form=form)
        assert read.words_before_answer == plain.words_before_answer
    assert not parse_trajectory(f"Red is 7.\nAnswer: 7\n{praise}", form="answer-line").well_formed


@pytest.mark.parametrize("text", ["yes", "", " ", "7", "Step 1: a\nStep 2: b", "<think>Step 1: The bar", "\\boxed{7}"])
def test_fault_10_text_without_the_form_is_unreadable(text: str) -> None:
    assert parse_trajectory(text).answer is None
    assert parse_trajectory(text, "length").answer is None
    assert not parse_question(text).well_formed


def test_fault_10_identical_truncation_is_unreadable() -> None:
    group = [parse_trajectory(GOOD_TRAJECTORY[:cut], "length") for cut in (20, len(GOOD_TRAJECTORY))]
    assert [(read.problem, read.answer) for read in group] == [(CUT_OFF, None)] * 2


@given(TEXTS)
def test_a_text_that_was_cut_off_is_never_well_formed(text: str) -> None:
    for whole in (text, GOOD_TRAJECTORY + text, GOOD_QUESTION + text):
        assert parse_trajectory(whole, "length").problem == CUT_OFF
        if parse_question(whole, "length").well_formed:  # in its rationale
            assert parse_question(whole).well_formed
            assert not text.strip() or not parse_question(GOOD_QUESTION + " More.", "length").well_formed


def test_no_proper_beginning_of_a_trajectory_is_well_formed() -> None:
    assert parse_trajectory(GOOD_TRAJECTORY).well_formed
    assert not any(parse_trajectory(GOOD_TRAJECTORY[:cut]).well_formed for cut in range(len(GOOD_TRAJECTORY)))


# --- the other forms of a reply


@pytest.mark.parametrize(
    ("text", "steps", "answer", "words"),
    [
        ("Step 1: a\nStep 2: b\n\\boxed{7}", ("a", "b"), "7", 6),
        ("Step 1: a\nThe answer is $\\boxed{7}$.", ("a",), "7", 6),  # an announcement is no step
        ("Step 1: a\n**Answer:** **\\boxed{7}**\n", ("a",), "7", 4),
        ("Step 1: a\n\\[\n\\boxed{7}\n\\]", ("a",), "7", 3),
        ("Step 1: a\n$$\n  \\boxed{7}\n$$", ("a",), "7", 3),
        ("a\nb\n**$\\boxed{7}$**", ("a", "b"), "7", 2),
        ("Step 1: $x = 7$\n\\boxed{7}", ("$x = 7$",), "7", 5),
        ("Step 1: it is 7$\n$\\boxed{7}", ("it is 7$",), "7", 6),
        ("Step 1: so\n$$\nx = 7\n$$\n\\boxed{7}", ("so\n$$\nx = 7\n$$",), "7", 8),
        ("Step 1: a\n\\boxed{\\frac{1}{2}}", ("a",), "\\frac{1}{2}", 3),
        ("Step 1: a\n\\boxed{\\text{x} \\text{y}}}", ("a",), "\\text{x} \\text{y}", 3),
        ("Step 1: a\n\\boxed {\n 7 cm \n}", ("a",), "7 cm", 3),
        ("Step 1: a\n\\boxed{\\{1, 2\\}}", ("a",), "\\{1, 2\\}", 3),
        ("Step 1: a\n\\boxed{\\{}", ("a",), "\\{", 3),  # escaped braces need not balance
        ("Step 1: a\n\\boxed{1 \\\\}", ("a",), "1 \\\\", 3),  # the brace after \\ is not escaped
        ("Step 1: a\n\\boxed{7} and not 8, because } it is", ("a",), "7", 9),  # what follows costs
        ("Step 1: \\boxed{5}\nStep 2: b\n\\boxed{7}", ("\\boxed{5}", "b"), "7", 6),  # the last box counts
        ("Step 1: a\n\\boxed{5} or \\boxed{7}", ("a",), "7", 5),
        ("Step 1: a\n\\boxed{1 + \\boxed{7}}", ("a",), "7", 5),
        ("Step 1: a\n\\boxed{5\n\\boxed{7}", ("a\n\\boxed{5",), "7", 4),
        ("Red is 7, blue is 3, so it is $\\boxed{4}$", ("Red is 7, blue is 3, so it is",), "4", 9),
        ("Step 1: 7 - 3 = \\boxed{4}", ("7 - 3 =",), "4", 6),
        ("Step 1:\n7 - 3 = \\boxed{4}", ("7 - 3 =",), "4", 6),
        ("<think>\nStep 1: a\n</think>\n\\boxed{7}", ("a",), "7", 3),
        ("<THINK>Step 1: a</ think ><answer>\\boxed{7}</answer>", ("a",), "7", 3),
        ("a\r\nb\u2028\\boxed{+}", ("a", "b"), "+", 2),
    ],
)
def test_a_boxed_answer_is_read(text: str, steps: tuple[str, ...], answer: str, words: int) -> None:
    read = parse_trajectory(text, form="boxed")
    assert read.problem is None
    assert (read.reasoning_steps, read.answer, read.words_before_answer) == (steps, answer, words)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no closed \\boxed{…}"),
        ("Step 1: a\n7", "no closed \\boxed{…}"),
        ("Step 1: a\n\\boxed 7", "no closed \\boxed{…}"),
        ("Step 1: a\n\\boxed{7", "no closed \\boxed{…}"),
        ("Step 1: a\n\\boxed{\\frac{1}{2}", "no closed \\boxed{…}"),
        ("Step 1: a\n\\boxed{7\\}", "no closed \\boxed{…}"),
        ("Step 1: a\n\\boxed{5}\n\\boxed{7", "no closed \\boxed{…}"),
        ("Step 1: a\nboxed{7}", "no closed \\boxed{…}"),
        (GOOD_TRAJECTORY, "no closed \\boxed{…}"),
        ("Step 1: a\nAnswer: 7", "no closed \\boxed{…}"),
        ("\\boxed{7}", "no reasoning step"),
        ("\\boxed{7}\nStep 1: a", "no reasoning step"),
        ("Step 1:\n$\\boxed{7}$", "no reasoning step"),
        ("<think></think>\\boxed{7}", "no reasoning step"),
        ("Step 1: a\n\\boxed{}", "empty answer"),
        ("Step 1: a\n\\boxed{ \u200b\n}", "empty answer"),
        ("Step 1: a\n\\boxed{7}\nIt is in \\boxed{}.", "empty answer"),
    ],
)
def test_a_malformed_boxed_reply_is_a_problem_and_has_no_answer(text: str, problem: str) -> None:
    read = parse_trajectory(text, form="boxed")
    assert (read.problem, read.answer, read.well_formed) == (problem, None, False)


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("Answer: 7", "7"),
        ("Answer:7", "7"),
        ("Answer : 7", "7"),
        ("Answer：7", "7"),
        ("answer: 7", "7"),
        ("  ANSWER:\t7  ", "7"),
        ("Final answer: 7", "7"),
        ("The answer is: 7", "7"),
        ("My final answer: 7", "7"),
        ("The correct answer is: 7", "7"),
        ("**Answer:** 7", "7"),
        ("**Answer: 7**", "7"),
        ("**Answer**: 7", "7"),
        ("**Answer:**7", "7"),
        ("**Answer:** **7**", "7"),
        ("**Answer:**\n\n**7**", "7"),
        ("**The final answer is:** 7", "7"),
        ("*Answer:* 7", "7"),
        ("*Answer: 7*", "7"),
        ("__Answer:__ 7", "7"),
        ("### Answer: 7", "7"),
        ("- Answer: 7", "7"),
        ("> Answer: 7", "7"),
        ("* **Answer:** 7", "7"),
        ("3. Answer: 7", "7"),
        ("Answer: **7**", "**7**"),  # not normalised
        ("Answer: \\boxed{7}", "\\boxed{7}"),
        ("Answer: a: b", "a: b"),
        ("Answer: 2**3", "2**3"),
        ("Answer: _", "_"),
        ("Answer:\n7", "7"),
        ("Answer:\n\n 7 cm \n", "7 cm"),
        ("Answer:\r\n7\r\n", "7"),
        ("Answer: 7\n\n---\n***\n", "7"),
        ("Answer: 7</think>", "7"),
        ("Answer: 7\n</think>\n", "7"),
        ("</think>Answer: 7", "7"),
        ("</think>\n<answer>Answer: 7</answer>", "7"),
        ("Answer:\nAnswer: 7", "7"),
        ("Antwort: 7", "7"),
        ("**Respuesta:** 7", "7"),
        ("Réponse : 7", "7"),
        ("Risposta: 7", "7"),
        ("Resposta: 7", "7"),
        ("Ответ: 7", "7"),
        ("答案：7", "7"),
        ("答え：7", "7"),
    ],
)
def test_an_answer_line_is_read(line: str, answer: str) -> None:
    read = parse_trajectory(f"Step 1: a\nStep 2: b\n{line}", form="answer-line")
    assert read.problem is None
    assert (read.reasoning_steps[0], read.answer) == ("a", answer)
    assert read.reasoning_steps[1].partition("\n")[0] == "b"


@pytest.mark.parametrize(
    ("text", "steps", "words"),
    [
        ("Step 1: a\nStep 2: b\nAnswer: 7", ("a", "b"), 6),
        ("a\n- b c\n**The answer is:** 7 cm", ("a", "b c"), 4),
        ("Answer: 5\nStep 1: a\nAnswer: 7", ("Answer: 5", "a"), 5),  # the last line counts
        ("<think>\nStep 1: a\n</think>\nAnswer: 7", ("a",), 3),
    ],
)
def test_the_steps_are_on_the_lines_before_the_answer_line(text: str, steps: tuple[str, ...], words: int) -> None:
    read = parse_trajectory(text, form="answer-line")
    assert read.well_formed
    assert (read.reasoning_steps, read.words_before_answer) == (steps, words)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no answer line"),
        ("Step 1: a\n7", "no answer line"),
        ("Step 1: a\nThe answer is 7", "no answer line"),
        ("Step 1: a\nSo the answer: 7", "no answer line"),
        ("Step 1: a Answer: 7", "no answer line"),
        ("Step 1: a\nStep 2: Answer: 7", "no answer line"),
        ("Step 1: a\nAnswers: 7", "no answer line"),
        ("Step 1: a\n\\boxed{7}", "no answer line"),
        (GOOD_TRAJECTORY, "no answer line"),
        ("Step 1: a\nAnswer: 7\nStep 2: b", "text after the answer line"),
        ("Step 1: a\nAnswer: 7\n\nIt is 7.", "text after the answer line"),
        ("Step 1: a\nAnswer:\n7\n8", "text after the answer line"),
        ("Step 1: a\nAnswer: 7\u20288", "text after the answer line"),
        ("Step 1: a</think>\nAnswer: 7</think> because", "text after the answer line"),
        ("Answer: 7", "no reasoning step"),
        ("Step 1:\nAnswer: 7", "no reasoning step"),
        ("<think>\n---\n</think>\nAnswer: 7", "no reasoning step"),
        ("Step 1: a\nAnswer:", "empty answer"),
        ("Step 1: a\n**Answer:**", "empty answer"),
        ("Step 1: a\nAnswer: 7\nAnswer: ", "empty answer"),
        ("Step 1: a\nAnswer: \u200b", "empty answer"),
    ],
)
def test_a_malformed_answer_line_is_a_problem_and_has_no_answer(text: str, problem: str) -> None:
    read = parse_trajectory(text, form="answer-line")
    assert (read.problem, read.answer, read.well_formed) == (problem, None, False)


@pytest.mark.parametrize("form", ["boxed", "answer-line"])
def test_an_unreadable_reply_without_an_answer_shows_all_of_its_steps(form: Form) -> None:
    read = parse_trajectory("<think>Step 1: a\nStep 2: b c", form=form)
    assert (read.reasoning_steps, read.words_before_answer) == (("a", "b c"), 7)


@pytest.mark.parametrize(
    ("form", "text"),
    [("tags", GOOD_TRAJECTORY), ("boxed", "Step 1: a\n\\boxed{7}"), ("answer-line", "Step 1: a\nAnswer: 7")],
)
def test_a_reply_that_was_cut_off_is_unreadable_in_every_form(form: Form, text: str) -> None:
    assert parse_trajectory(text, form=form).well_formed
    read = parse_trajectory(text, "length", form)
    assert (read.problem, read.answer) == (CUT_OFF, None)
    assert read.reasoning_steps == parse_trajectory(text, form=form).reasoning_steps
    assert parse_trajectory("", "length", form).problem == CUT_OFF


@given(WORDS, WORDS, st.sampled_from(ALL_FORMS))
def test_a_reply_written_in_a_form_is_read_back(step: str, answer: str, form: Form) -> None:
    ending = {"tags": "</think><answer>{}</answer>", "boxed": "\\boxed{{{}}}", "answer-line": "Answer: {}"}[form]
    opening = "<think>" if form == "tags" else ""
    read = parse_trajectory(f"{opening}Step 1: {step}\nStep 2: {step}\n{ending.format(answer)}", form=form)
    assert (read.reasoning_steps, read.answer, read.problem) == ((step, step), answer, None)


# --- reasoning steps

FORMS = {  # of two steps: "A." and "B."
    "colon": "Step 1: A.\nStep 2: B.",
    "period": "Step 1. A.\nStep 2. B.",
    "dash": "Step 1 - A.\nStep 2 - B.",
    "long dash": "Step 1 — A.\nStep 2 – B.",
    "parenthesis": "Step 1) A.\nStep 2) B.",
    "parentheses": "(Step 1) A.\n(Step 2): B.",
    "no delimiter": "\nStep 1 A.\nStep 2 B.",
    "comma": "Step 1, A.\nStep 2, B.",
    "any case, spaces": "  step 1 : A.\n\tSTEP  2: B.",
    "no spaces": "Step1:A.\nStep2:B.",
    "bold, colon inside": "**Step 1:** A.\n**Step 2:** B.",
    "bold, colon outside": "**Step 1**: A.\n**Step 2**: B.",
    "bold, no colon": "**Step 1** A.\n**Step 2** B.",
    "bold, no space": "**Step 1:**A.\n**Step 2:**B.",
    "bold to the end": "**Step 1: A.**\n**Step 2: B.**",
    "italics": "*Step 1:* A.\n*Step 2*: B.",
    "underscores": "__Step 1:__ A.\n_Step 2:_ B.",
    "hyphen bullet": "- Step 1: A.\n- Step 2: B.",
    "star bullet": "* Step 1 A.\n* Step 2 B.",
    "star bullet, bold": "* **Step 1:** A.\n* **Step 2:** B.",
    "heading": "### Step 1: A.\n### Step 2: B.",
    "heading, bold, text below": "### **Step 1**\nA.\n\n### **Step 2**\nB.",
    "text below": "Step 1\nA.\nStep 2\nB.",
    "numbered steps": "1. Step 1: A.\n2. Step 2: B.",
    "fullwidth colon": "Step 1：A.\nStep 2：B.",
    "rule between": "Step 1: A.\n---\nStep 2: B.\n***",
    "windows lines": "Step 1: A.\r\nStep 2: B.\r\n",
    "carriage returns": "A.\rB.\r",
    "inline": "Step 1: A. Step 2: B.",
    "inline, periods": "Step 1. A. Step 2. B.",
    "inline, dashes": "Step 1 - A. Step 2 - B.",
    "inline, parentheses": "(Step 1) A. (Step 2) B.",
    "inline, bold": "**Step 1:** A. **Step 2:** B.",
    "inline, bold, colon outside": "**Step 1**: A. **Step 2**: B.",
    "inline, bold, no colon": "**Step 1** A. **Step 2** B.",
    "inline, bullets": "- Step 1: A. - Step 2: B.",
    "number, period": "1. A.\n2. B.",
    "number, parenthesis": "1) A.\n2) B.",
    "number, parentheses": "(1) A.\n(2) B.",
    "number, colon": "1: A.\n2: B.",
    "number, indented": "  1. A.\n  2. B.",
    "number, bold": "**1.** A.\n**2**. B.",
    "number, bold to the end": "**1. A.**\n**2. B.**",
    "number, heading": "## 1. A.\n## 2. B.",
    "number, text below": "1.\nA.\n2.\nB.",
    "hyphens": "- A.\n- B.",
    "stars": "* A.\n* B.",
    "bullets": "• A.\n•B.",
    "headings": "# A.\n# B.",
    "lines": "A.\nB.",
    "blank lines": "\n A. \n\n\n B.\n\n",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_of_steps_is_read(form: str) -> None:
    assert reasoning_steps(form) == ("A.", "B.")
    decimals = form.replace("A.", "2.5 is the value").replace("B.", "1.5 + 2 = 3.5 at 12:30")
    assert reasoning_steps(decimals) == ("2.5 is the value", "1.5 + 2 = 3.5 at 12:30")


@pytest.mark.parametrize(
    ("thought", "steps"),
    [
        ("**Step 1:** a\n**Step 2:** b", ("a", "b")),
        ("- Step 1: a\n- Step 2: b", ("a", "b")),
        ("Step 1: the bar is 7 Step 2: so it is tallest", ("the bar is 7", "so it is tallest")),
        ("2.5 is the value", ("2.5 is the value",)),
    ],
)
def test_fault_9_forms_that_merged_or_lost_digits(thought: str, steps: tuple[str, ...]) -> None:
    assert reasoning_steps(thought) == steps
    for tags in ("<think>{}</think>", "<THINK>{}</Think>", "< think >{}</ think >"):
        read = parse_trajectory(tags.format(thought) + "<ANSWER>7</answer>")
        assert (read.reasoning_steps, read.answer) == (steps, "7")


@pytest.mark.parametrize(
    "line",
    [
        "2.5 is the value",
        "1.5 + 2 = 3.5",
        "3.14",
        "1.0",
        "12:30",
        "1:30 is the time",
        "1990: the sales rose",
        "2. is not the first",
        "-2.5 is below zero",
        "*a* is in italics",
        "First, the bar is 7.",
        "as found in Step 1, the bar is 7",
        "as found in Step 1: the bar is 7",
        "The bar (see Step 1) is 7",
        "We get this from Step 1 and the bar is 7",
        "What our Step 1: shows is 7",
        "Steps 1-2 say so",
        "Step 1.5: half way",
        "a footstep 1: loud",
        "Stepping 1: no",
    ],
)
def test_a_line_without_a_marker_is_untouched(line: str) -> None:
    assert reasoning_steps(line) == (line,)
    assert reasoning_steps(f"Red.\n{line}") == ("Red.", line)


@pytest.mark.parametrize(
    "second",
    [
        "b, as found in Step 1, the bar",
        "as found in Step 1: the bar",
        "Step 1 gave 7, so 3",
        "b. Step 1. It gave 7",
        "b. Step 3 will show why",
        "hear the footstep 3: loud",
        "b (see Step 3) c",
        "b (Step 3). C",
        "we need it in Step 3. C",
        "from Step 1 - Step 2 it follows",
        "add:\n1. red\n2. blue\n3. green\nso 7",
        "add:\n- red\n- blue",
        "b\n  more\n\n1.5 + 2 = 3.5",
        "b\nStep 1 gave 7",
    ],
)
def test_mentions_and_lists_within_a_numbered_step_are_its_content(second: str) -> None:
    assert reasoning_steps(f"Step 1: a\nStep 2: {second}\nStep 3: c") == ("a", second, "c")
    assert reasoning_steps(f"Step 1: a Step 2: {second}") == ("a", second)


@pytest.mark.parametrize(
    ("thought", "steps"),
    [
        ("Step 1: a\nStep 2:\nStep 3: c", ("a", "", "c")),
        ("Step 1: a Step 2: Step 3: c", ("a", "", "c")),
        ("1. a\n2.\n3. c", ("a", "", "c")),
        ("**Step 1:**\n\n**Step 2:** b", ("", "b")),
        ("Step 1:\nStep 2:", ("", "")),
        ("- a\n-\n- c", ("a", "c")),
        ("", ()),
        (" \n\t\n", ()),
        ("---\n***", ()),
    ],
)
def test_an_empty_step_keeps_its_position_where_it_is_numbered(thought: str, steps: tuple[str, ...]) -> None:
    assert reasoning_steps(thought) == steps


@pytest.mark.parametrize(
    ("thought", "steps"),
    [
        ("Let us see.\nStep 1: a\nStep 2: b", ("Let us see.", "a", "b")),
        ("Let us see. Step 1: a Step 2: b", ("Let us see.", "a", "b")),
        ("**Look.** Step 1: a Step 2: b", ("**Look.**", "a", "b")),
        ("Look.\nStep 1\na\nStep 2\nb", ("Look.", "a", "b")),
        ("Look.\n- Step 1 a\n- Step 2 b", ("Look.", "a", "b")),
        ("Look.\nStep 1 and Step 2 give 4", ("Look.", "Step 1 and Step 2 give 4")),
        ("Step 1)2.5 is a\nStep 2.b", ("2.5 is a", "b")),
        ("Step 1 -2.5 is a\nStep 2 b", ("-2.5 is a", "b")),
        ("*Step 1: 3*4 = 12", ("3*4 = 12",)),
        ("1.**Title** a\n2.**Next** b", ("**Title** a", "**Next** b")),
        ("- Look.\n\n1. a\n2. b", ("Look.", "a", "b")),
        ("1. a\n2. b\nStep 1 and Step 2 give 4", ("a", "b\nStep 1 and Step 2 give 4")),
        ("Step 1: a.Step 2: b", ("a.", "b")),
        ("Step 1: a 7Step 2: b", ("a 7", "b")),
        ("1. a\n1.5 is more\n3. x\n2. b", ("a\n1.5 is more\n3. x", "b")),
        ("Step 1: a\nStep 1: a\nStep 4: b", ("a", "a", "b")),
        ("**Step 1: Title.** a **7**\n**Step 2: Next**", ("Title. a **7**", "Next")),
        ("**Step 1:** **7** is a\n**Step 2**: **8**", ("**7** is a", "**8**")),
        ("Step 1: it is **7** Step 2: **8** is b", ("it is **7**", "**8** is b")),
    ],
)
def test_mixed_forms(thought: str, steps: tuple[str, ...]) -> None:
    assert reasoning_steps(thought) == steps


@given(st.lists(WORDS, min_size=1, max_size=12), st.sampled_from(["Step {}: ", "**Step {}:** ", "{}. ", "({}) ", "- "]))
def test_steps_written_in_a_form_are_read_back(texts: list[str], form: str) -> None:
    written = "\n".join(form.format(number) + text for number, text in enumerate(texts, 1))
    assert reasoning_steps(written) == tuple(texts)


@given(st.decimals(0, 9999, places=2), st.integers(0, 23), st.integers(0, 59), WORDS)
def test_numbers_at_the_start_of_a_line_are_untouched(decimal: object, hour: int, minute: int, words: str) -> None:
    for line in (f"{decimal} {words}", f"{decimal}", f"{hour}:{minute:02} {words}", f"{1900 + hour}: {words}"):
        assert reasoning_steps(line) == (line,)
        assert reasoning_steps(f"Step 1: {line}\nStep 2: {line}") == (line, line)
        assert reasoning_steps(f"1. {line}\n2. {line}") == (line, line)


# --- any text at all


@settings(max_examples=500, deadline=None)
@given(TEXTS, FINISHES)
def test_any_text_is_read_without_an_exception(text: str, finish_reason: FinishReason) -> None:
    for whole in (text, f"<question>{text}</question>", f"<think>{text}</think><answer>{text}</answer>"):
        question = parse_question(whole, finish_reason)
        assert question.well_formed == (question.problem is None)
        assert not (question.well_formed and "<|im_end|>" in question.text)
    endings = ("", f"\n\\boxed{{{text}}}", f"\nAnswer: {text}", f"<think>{text}</think><answer>{text}</answer>")
    for whole in (text + ending for ending in endings):
        for form in ALL_FORMS:
            solution = parse_trajectory(whole, finish_reason, form)
            assert solution.well_formed == (solution.problem is None) == (solution.answer is not None)
            assert 0 <= solution.words_before_answer <= len(whole.replace("<", " <").replace(">", "> ").split())
            assert solution.answer is None or solution.answer == solution.answer.strip() != ""
            assert not solution.well_formed or any(map(str.isalnum, "".join(solution.reasoning_steps)))


@settings(max_examples=500, deadline=None)
@given(TEXTS)
def test_steps_lose_nothing_but_their_markers(text: str) -> None:
    steps = reasoning_steps(text)
    assert all(step == step.strip() for step in steps)
    lost = Counter(filter(str.isalnum, text.casefold())) - Counter(filter(str.isalnum, "".join(steps).casefold()))
    assert all(character in "step" or character.isdigit() for character in lost)
    letters = "".join(filter(str.isalnum, text))
    assert all("".join(filter(str.isalnum, step)) in letters for step in steps)


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_text_of_100_kb_is_read_in_linear_time(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    calls = [
        lambda: parse_question(text),
        lambda: parse_question(f"<question><a{text}</question>"),
        lambda: parse_trajectory(f"<think>Step 1: a {text}</think><answer>7</answer>"),
        lambda: reasoning_steps(text),
    ]
    wholes = (text, f"Step 1: a {text}\n\\boxed{{7}}", f"Step 1: a\n\\boxed{{{text}", f"Step 1: a\n\\boxed {text}{{")
    wholes += (f"Step 1: a\n{text}\nAnswer: 7", f"Step 1: a\nAnswer: {text}", f"Step 1: a\nAnswer:\n7{text}")
    calls += [partial(parse_trajectory, whole, "stop", form) for whole in wholes for form in ALL_FORMS]
    for call in calls:
        begun = time.process_time()  # of this process alone, whatever else the machine does
        call()
        assert time.process_time() - begun < 5.0  # measured: under 0.06; quadratic time would take minutes
    assert not parse_trajectory(text).well_formed
    assert not parse_question(text).well_formed


def test_many_numbered_steps_are_all_read() -> None:
    assert len(reasoning_steps("".join(f"Step {number}: a " for number in range(1, 1000)))) == 999
    assert len(reasoning_steps("\n".join(f"**{number}. a" for number in range(1, 1000)))) == 999
