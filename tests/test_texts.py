"""What the roles are told, and how their text is read back: every form, every malformed case, hostile text."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ireasoner.method.texts import (
    PROPOSER_PROMPT,
    SOLVER_PROMPT,
    parse_question,
    parse_trajectory,
    proposer_messages,
    reasoning_steps,
    solver_messages,
)
from ireasoner.method.types import FinishReason

GOOD_QUESTION = "<question>Which bar is tallest?</question><rationale>Compare the heights.</rationale>"
GOOD_TRAJECTORY = "<think>Step 1: Red is 7.\nStep 2: Blue is 3.</think> <answer>red</answer>"
CUT_OFF = "cut off before the end token"

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<question>", "</question>", "<rationale>", "</rationale>"]
# Text made of the parts that the readers look for, where random characters would never find the corners.
# fmt: off
PIECES = st.sampled_from([
    *TAGS, "<", ">", "</", "<THINK>", "< think >", "<|im_end|>", " ", "\n", "\r\n", "\t", "\u2028", "\u200b", "\ud800",
    "Step", "step", "Step1:", "Step 1:", "Step 2:", "**Step", "(Step 2)", "1", "2", "3", "1.", "2.", "1)", "(1)", "1:",
    ":", ".", ")", "(", "-", "*", "**", "_", "__", "#", "###", "•", "---", "2.5", "12:30", "1990:", "see", "word",
    "é", "½", "٣", "ſ", "：", ",",
])
HOSTILE = [
    "<think>", "<answer>", "</answer>", "<think><answer>", "<question>", "<", "< ", "</", "< / think", "<a ", "<a =",
    "<!", "<|", "<|im_end|>",
    "\n", "\r", "\t", "  \n", " ", " | ", "•", "\u2028", "#", "# ", "*", "* ", "- ", "---\n", "> ",
    "Step 1:", "Step 1: ", "Step 1:\n", "Step 1 a\n", "step ", "- Step 2 ", "(Step 2) ", "**Step 1", "**Step 1: ",
    "1", "1.", "1. ", "1.\n", "1)\n", "_", "(", "=", "`", "/",
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
        (solver_messages("Q: {question}", "How many?"), "Q: How many?"),
        (
            solver_messages("{a} {question}{}", "f({x}) at {0}, {question}, \\1?"),
            "{a} f({x}) at {0}, {question}, \\1?{}",
        ),
    ],
)
def test_messages_are_one_user_turn_of_image_then_text(messages: list[dict], text: str) -> None:
    assert messages == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


@pytest.mark.parametrize("prompt", ["", "Answer.", "{Question}", "{ question }"])
def test_a_solver_prompt_without_its_placeholder_is_an_error(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"\{question\}"):
        solver_messages(prompt, "How many?")


def test_the_default_prompts_show_the_forms_that_are_read() -> None:
    asked = PROPOSER_PROMPT[PROPOSER_PROMPT.index("<question>") :]
    assert parse_question(asked).well_formed
    assert parse_question(asked).rationale
    solved = parse_trajectory(SOLVER_PROMPT[SOLVER_PROMPT.index("<think>\n") :])
    assert solved.well_formed
    assert solved.reasoning_steps == ("what you see first", "what follows from it")
    assert SOLVER_PROMPT.count("{question}") == 1


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


def test_an_unreadable_question_still_shows_what_was_written() -> None:
    assert parse_question("<question>How many?<rationale>why").text == "How many?"
    assert parse_question(GOOD_QUESTION, "length").text == "Which bar is tallest?"


# --- trajectories


@pytest.mark.parametrize(
    ("text", "steps", "answer", "words"),
    [
        (GOOD_TRAJECTORY, ("Red is 7.", "Blue is 3."), "red", 10),
        ("<think>Step 1: a</think><answer>7</answer>", ("a",), "7", 3),
        ("< THINK >\n- a\n- b\n</ Think > so < Answer > 3.50 cm </ANSWER> bye", ("a", "b"), "3.50 cm", 11),
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
        ("<think><think>a</think><answer>7</answer>", "more than one <think>"),
        ("<think>a</think><answer>7</think></answer>", "more than one <think>"),
        ("<think>a</think><answer>7</answer><answer>8</answer>", "more than one <answer>"),
        ("<think>a <answer></think><answer>7</answer>", "more than one <answer>"),
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
        ("<answer>7</answer><think>- a</think>", ("a",), 0),
        ("no tags at all", (), 4),
    ],
)
def test_an_unreadable_trajectory_still_shows_what_could_be_read(text: str, steps: tuple[str, ...], words: int) -> None:
    read = parse_trajectory(text)
    assert not read.well_formed
    assert (read.reasoning_steps, read.words_before_answer) == (steps, words)


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
        assert parse_question(whole, "length").problem == CUT_OFF


def test_no_proper_beginning_of_a_trajectory_is_well_formed() -> None:
    assert parse_trajectory(GOOD_TRAJECTORY).well_formed
    assert not any(parse_trajectory(GOOD_TRAJECTORY[:cut]).well_formed for cut in range(len(GOOD_TRAJECTORY)))


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
        "1990. Then 1991. Then 1992.",
        "2. is not the first",
        "-2.5 is below zero",
        "*a* is in italics",
        "First, the bar is 7.",
        "as found in Step 1, the bar is 7",
        "as found in Step 1: the bar is 7",
        "The bar (see Step 1) is 7",
        "We get this from Step 1. The bar is 7",
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
        question, trajectory = parse_question(whole, finish_reason), parse_trajectory(whole, finish_reason)
        assert question.well_formed == (question.problem is None)
        assert not (question.well_formed and "<|im_end|>" in question.text)
        assert trajectory.well_formed == (trajectory.problem is None) == (trajectory.answer is not None)
        assert 0 <= trajectory.words_before_answer <= len(whole.split())
        assert trajectory.answer is None or trajectory.answer == trajectory.answer.strip() != ""


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
def test_hostile_text_of_100_kb_finishes(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    assert not parse_trajectory(text).well_formed
    assert not parse_question(text).well_formed
    parse_question(f"<question><a{text}</question>")
    parse_trajectory(f"<think>Step 1: a {text}</think><answer>7</answer>")
    reasoning_steps(text)


def test_many_numbered_steps_are_all_read() -> None:
    assert len(reasoning_steps("".join(f"Step {number}: a " for number in range(1, 1000)))) == 999
    assert len(reasoning_steps("\n".join(f"**{number}. a" for number in range(1, 1000)))) == 999
