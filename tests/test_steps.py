"""Reasoning steps beyond the forms of `test_texts`: one line, several languages, sentences, conclusions and layout."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ireasoner.method.sentences import sentences
from ireasoner.method.steps import reasoning_steps

# --- one line

ONE_LINE = {  # of two steps
    "sentences": "Red is 7. Blue is 3.",
    "numbers": "1. Red is 7. 2. Blue is 3.",
    "numbers in brackets": "(1) Red is 7 (2) Blue is 3",
    "numbers with a bracket": "1) Red is 7; 2) Blue is 3.",
    "circled numbers": "①Red is 7②Blue is 3",
    "step words": "Step 1: Red is 7. Step 2: Blue is 3.",
    "numbers in words": "Step one: Red is 7. Step two: Blue is 3.",
    "comma": "Step 1, Red is 7. Step 2, Blue is 3.",
    "ordinals": "First, Red is 7. Second, Blue is 3.",
    "ordinals within a sentence": "First, Red is 7; second, Blue is 3.",
    "Chinese": "第一步：红是7。第二步：蓝是3。",
    "Chinese, one sentence": "第一步：红是7，第二步：蓝是3",
    "Chinese, digits": "第1步：红是7。第2步：蓝是3。",
    "Chinese, step before the number": "步骤1：红是7。步骤2：蓝是3。",
    "Chinese, commas": "第一步，红是7。第二步，蓝是3。",
    "Chinese numbers": "1、红是7 2、蓝是3",
    "Chinese sentences": "红是7。蓝是3。",
    "Chinese ordinals": "首先，红是7；其次，蓝是3。",
    "Japanese": "ステップ1：赤は7です。ステップ2：青は3です。",
    "Japanese, numbers": "手順1：赤は7です。手順2：青は3です。",
    "Japanese sentences": "赤は7です。青は3です。",
    "Korean": "1단계: 빨강은 7이다. 2단계: 파랑은 3이다.",
    "Korean, number behind": "단계 1: 빨강은 7이다. 단계 2: 파랑은 3이다.",
    "Korean sentences": "빨강은 7이다. 파랑은 3이다.",
    "German": "Schritt 1: Rot ist 7. Schritt 2: Blau ist 3.",
    "German sentences": "Rot ist 7. Blau ist 3.",
    "German ordinals": "Erstens, Rot ist 7; zweitens, Blau ist 3.",
    "French": "Étape 1 : Le rouge est 7. Étape 2 : Le bleu est 3.",
    "French, spaces that do not break": "Étape\u00a01\u00a0: Le rouge est 7. Étape\u00a02\u202f: Le bleu est 3.",
    "French sentences": "Le rouge est 7. Le bleu est 3.",
    "French ordinals": "D'abord, le rouge est 7 ; ensuite, le bleu est 3.",
    "Spanish": "Paso 1: Rojo es 7. Paso 2: Azul es 3.",
    "Spanish sentences": "¿Es 7? ¡Es 3!",
    "Spanish ordinals": "Primero, rojo es 7; luego, azul es 3.",
    "Portuguese": "Passo 1: O vermelho é 7. Passo 2: O azul é 3.",
    "Portuguese, another word": "Etapa 1: O vermelho é 7. Etapa 2: O azul é 3.",
    "Italian": "Passaggio 1: Il rosso è 7. Passaggio 2: Il blu è 3.",
    "Russian": "Шаг 1: Красный 7. Шаг 2: Синий 3.",
    "Russian sentences": "Красный 7. Синий 3.",
    "Hindi sentences": "लाल 7 है। नीला 3 है।",
    "Arabic sentences": "هل الأحمر 7؟ الأزرق 3.",
    "Dutch": "Stap 1: Rood is 7. Stap 2: Blauw is 3.",
    "Polish": "Krok 1: Czerwony to 7. Krok 2: Niebieski to 3.",
    "Turkish": "Adım 1: Kırmızı 7. Adım 2: Mavi 3.",
    "Vietnamese": "Bước 1: Đỏ là 7. Bước 2: Xanh là 3.",
    "question and exclamation": "Is red 7? It is!",
    "emphasis": "**Red** is 7. **Blue** is 3.",
    "quotation": 'It says "7." It is red.',
    "variables": "a is 3. b is 4.",
    "formulas": "$a = 3$. $b = 4$.",
}


@pytest.mark.parametrize("thought", ONE_LINE.values(), ids=ONE_LINE.keys())
def test_a_thought_on_one_line_has_its_two_steps(thought: str) -> None:
    for written in (thought, f"\n{thought}\n"):
        first, second = reasoning_steps(written)
        assert "7" in first or "3" in first
        assert first in thought
        assert second in thought


@pytest.mark.parametrize(
    "line",
    [
        "Red is 2.5 and blue is 3. 5 of it",  # a decimal that was written with a space
        "We add them, e.g. Red and Blue.",
        "Red vs. Blue, i.e. Seven.",
        "It is 7 in Fig. 3 and in Eq. 5.",
        "See no. 7 and p. 12 of it",
        "Dr. Smith and Mrs. Jones have 7.",
        "It was J. R. R. Tolkien, or George W. Bush.",
        "The U.S. Army has 7.",
        "At 3 p.m. in St. Louis",
        "It is approx. Seven.",
        "Wait... Red is 7",
        "Hmm … Red is 7",
        "It is at https://a.b/c.d?x=1.2&y=U.S.",
        "We have $x = 3. Y = 4$ in it",
        "We have \\(x. Y\\) and \\[x. Y\\] and $$x. Y$$ in it",
        "Der 2. Balken ist am 3. Mai höher.",
        "Das ist z. B. Rot, d. h. Blau, bzw. Gelb.",
        "C'est 3, c.-à-d. Rouge",
        "Son 3, p. ej. Rojo",
        "Это 3, т.е. Красный, см. Рис. 5",
        "Red is 7.5.Blue",
        "(a) and (b) give 3",
        "From (1) and (2) we get 3",
        "From equation 1. and from 2. we get 3",
        "1990. Then",
        "2. is not the first",
        "A.B. and C.D.",
        "Red is 7.",
        "7.",
        "红是7，蓝是3",
        "见第一步，红是7",
        "wie in Schritt 1: so",
        "comme à l'étape 1 : ainsi",
    ],
)
def test_a_line_that_is_one_sentence_is_one_step(line: str) -> None:
    assert reasoning_steps(line) == (line,)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("See Fig. 3. It is 7.", ("See Fig. 3.", "It is 7.")),
        ("The answer is no. The bar is 7.", ("The answer is no.", "The bar is 7.")),
        ("AB is parallel to line A. Therefore B is 3.", ("AB is parallel to line A.", "Therefore B is 3.")),
        ("It is at 3 p.m. Then it is 7.", ("It is at 3 p.m.", "Then it is 7.")),
        ("We take red, blue, etc. The sum is 7.", ("We take red, blue, etc.", "The sum is 7.")),
        ("It costs $5. The other is $6.", ("It costs $5.", "The other is $6.")),
        ("It is 2.5. It is 7.", ("It is 2.5.", "It is 7.")),
        ("Red is 7. (Blue is 3.) So 4.", ("Red is 7.", "(Blue is 3.)", "So 4.")),
        ("Is it 7? Yes! It is.", ("Is it 7?", "Yes!", "It is.")),
        ("He said “7.” So it is.", ("He said “7.”", "So it is.")),
        ("他说：“红是7。”蓝是3。", ("他说：“红是7。”", "蓝是3。")),
        ("真的吗？是7！", ("真的吗？", "是7！")),
        ("1990. Then 1991. Then 1992.", ("1990. Then 1991.", "Then 1992.")),
        ("We get this from Step 1. The bar is 7", ("We get this from Step 1.", "The bar is 7")),
        ("Red is 7. …", ("Red is 7. …",)),
        ("First, a is 3, second, b is 4, and finally, 7.", ("First, a is 3,", "second, b is 4,", "and finally, 7.")),
        ("Blue is 3, second, red.", ("Blue is 3, second, red.",)),  # nothing was first
        ("1. Look. Red is 7. 2. So 7.", ("Look. Red is 7.", "So 7.")),
        ("We see: 1. Red is 7. 2. Blue is 3.", ("We see:", "Red is 7.", "Blue is 3.")),
        ("1. The value is 2. Then 3.", ("The value is 2. Then 3.",)),
    ],
)
def test_where_a_sentence_ends(line: str, parts: tuple[str, ...]) -> None:
    assert reasoning_steps(line) == parts


# --- several lines


@pytest.mark.parametrize(
    ("thought", "steps"),
    [
        ("Red is 7. It is tall.\nBlue is 3.", ("Red is 7. It is tall.", "Blue is 3.")),
        ("Red is 7. Blue is 3. So 4.\nYes.", ("Red is 7.", "Blue is 3.", "So 4.", "Yes.")),  # a paragraph
        ("Red is 7. Blue is 3.\n\nSo 4. Yes. Good.", ("Red is 7. Blue is 3.", "So 4.", "Yes.", "Good.")),
        ("- Red is 7. It is. It is.\n- Blue is 3.", ("Red is 7. It is. It is.", "Blue is 3.")),
        ("- Red is 7. It is. It is.", ("Red is 7. It is. It is.",)),
        ("Step 1: Red is 7. It is. It is.\nStep 2: b", ("Red is 7. It is. It is.", "b")),
        ("第一步：红是7。很高。\n第二步：蓝是3。", ("红是7。很高。", "蓝是3。")),
        ("1、红是7\n2、蓝是3", ("红是7", "蓝是3")),
        ("1.红是7\n2.蓝是3", ("红是7", "蓝是3")),
        ("（1）红是7\n（2）蓝是3", ("红是7", "蓝是3")),
        ("① a\n② b", ("a", "b")),
        ("**Schritt 1:** a\n**Schritt 2:** b", ("a", "b")),
        ("### Étape 1\na\n\n### Étape 2\nb", ("a", "b")),
        ("1. a. 2. b.\n3. c.", ("a.", "b.", "c.")),
    ],
)
def test_lines_are_steps_and_paragraphs_of_three_sentences_are_divided(thought: str, steps: tuple[str, ...]) -> None:
    assert reasoning_steps(thought) == steps


# --- conclusions


@pytest.mark.parametrize(
    ("thought", "last"),
    [
        ("Step 1: a is 3.\nStep 2: b is 4.\n\nSo 7.", "So 7."),
        ("Step 1: a is 3.\nStep 2: b is 4.\nSo 7.", "So 7."),
        ("Step 1: a is 3. Step 2: b is 4. So 7.", "So 7."),
        ("1. a is 3.\n2. b is 4.\n\nTherefore, it is 7.", "Therefore, it is 7."),
        ("1. a is 3.\n2. b is 4.\n\nIt is 7 in total.", "It is 7 in total."),
        ("1. a is 3.\n2. b is 4.\n---\nIt is 7 in total.", "It is 7 in total."),
        ("**Step 1:** a is 3.\n\n**Step 2:** b is 4.\n\n**Conclusion:** 7.", "**Conclusion:** 7."),
        ("### Step 1: Look\n\na is 3.\n\n### Step 2: Look\n\nb is 4.\n\nSo 7.", "So 7."),
        ("第一步：红是3。\n第二步：蓝是4。\n\n所以是7。", "所以是7。"),
        ("第一步：红是3。第二步：蓝是4。因此是7。", "因此是7。"),
        ("Schritt 1: a ist 3.\nSchritt 2: b ist 4.\n\nAlso 7.", "Also 7."),
        ("Étape 1 : a est 3.\nÉtape 2 : b est 4.\nDonc 7.", "Donc 7."),
        ("Paso 1: a es 3.\nPaso 2: b es 4.\nPor lo tanto, 7.", "Por lo tanto, 7."),
        ("Шаг 1: a 3.\nШаг 2: b 4.\nСледовательно, 7.", "Следовательно, 7."),
        ("ステップ1：赤は3。\nステップ2：青は4。\nよって7。", "よって7。"),
        ("1단계: 빨강은 3.\n2단계: 파랑은 4.\n따라서 7.", "따라서 7."),
    ],
)
def test_a_conclusion_after_the_last_numbered_step_is_a_step_of_its_own(thought: str, last: str) -> None:
    steps = reasoning_steps(thought)
    assert len(steps) == 3
    assert steps[-1] == last


@pytest.mark.parametrize(
    ("thought", "last"),
    [
        ("Step 1: a\nSo b.\nStep 2: c\nSo d.", "c\nSo d."),  # every step ends like this
        ("Step 1: a\n\nmore\n\nStep 2: c\n\nIt is d.", "c\n\nIt is d."),
        ("Step 1: a. So b. Step 2: c. So d.", "c. So d."),
        ("Step 1: a\nStep 2: b\n\n\\[\nx = 7\n\\]", "b\n\n\\[\nx = 7\n\\]"),
        ("Step 1: a\nStep 2: b\n\n1.5 + 2 = 3.5", "b\n\n1.5 + 2 = 3.5"),
        ("Step 1: a\nStep 2: add\n\n- red\n- blue", "add\n\n- red\n- blue"),
        ("Step 1: a\nStep 2: see\nred and blue", "see\nred and blue"),
    ],
)
def test_further_lines_of_the_last_step_are_no_conclusion(thought: str, last: str) -> None:
    steps = reasoning_steps(thought)
    assert len(steps) == 2
    assert steps[-1] == last


# --- layout


@pytest.mark.parametrize(
    "layout",
    ["\\[", "\\]", "$", "|---|---|", "| :--- | ---: |", "|:-:|", "```", "```python", "~~~", "---", "***", "===", "___",
     "\\begin{aligned}", "\\end{align*}", "…", "**", "|", "}"],
)  # fmt: skip
def test_a_line_of_layout_is_no_step(layout: str) -> None:
    assert reasoning_steps(f"Red is 7.\n{layout}\nBlue is 3.") == ("Red is 7.", "Blue is 3.")
    assert reasoning_steps(f"{layout}\nRed is 7.\n\n  {layout}  \nBlue is 3.\n{layout}") == ("Red is 7.", "Blue is 3.")
    assert reasoning_steps(layout) == ()


@pytest.mark.parametrize(
    ("formula", "after"),
    [
        ("\\[\nx = 7\n\\]", "So 7."),
        ("$$\nx = 7\n$$", "So 7."),
        ("\\[ x = 7 \\]", "So 7."),
        ("$$x = 7$$", "So 7."),
        ("\\begin{align}\nx &= 3 + 4 \\\\\n&= 7\n\\end{align}", "So 7."),
        ("\\[\n\\begin{aligned}\nx &= 3 + 4 \\\\\n&= 7\n\\end{aligned}\n\\]", "So 7."),
        ("\\[\nx = 3 + 4\n\\]\n\\[\nx = 7\n\\]", "So 7."),
        ("= 3 + 4\n= 7", "So 7."),
    ],
)
def test_a_formula_on_lines_of_its_own_belongs_to_the_step_before_it(formula: str, after: str) -> None:
    assert reasoning_steps(f"The sum is\n{formula}\n{after}") == (f"The sum is\n{formula}", after)
    assert reasoning_steps(f"The sum is\n\n{formula}\n\n{after}") == (f"The sum is\n{formula}", after)
    assert len(reasoning_steps(f"{formula}\n{after}")) >= 2


def test_rows_of_a_table_are_steps_and_its_rule_is_none() -> None:
    assert reasoning_steps("| a | b |\n|---|---|\n| 1 | 2 |") == ("| a | b |", "| 1 | 2 |")


# --- any text at all

# fmt: off
PIECES = st.sampled_from([
    " ", "  ", "\n", "\n\n", ".", "!", "?", "。", "！", "...", "…", ",", ";", "；", "，", ":", "7", "3.5", "$", "\\(",
    "\\)",
    "\\[", "\\]", "$$", "`", "```", "|---|", "(", ")", "“", "”", "*", "**", "A", "a", "Red", "is", "So", "First",
    "second",
    "e.g.", "U.S.", "Fig.", "Dr.", "der", "z.", "B.", "Step 1:", "Schritt 2:", "第一步", "第二步：", "1단계", "1.",
    "2.",
    "(1)", "2)",
    "①", "②", "红", "是", "-", "#", "=", "\u00a0", "\u2028", "\r", "İ", "ß", "\\begin{align}", "\\end{align}",
])
HOSTILE = [
    ".", "。", "! ", "... ", "… ", ". ", "a. ", "A. ", "J. R. ", "e.g. ", "U.S. ", "Fig. 3. ", "3. 5 ", "der 2. ",
    "1. ", "(1) ",
    "1) ", "1、", "①", "②", "一、", "第一步", "第一步：", "步骤", "Step one ", "Schritt 1 : ", "단계 ", "1단계",
    "红是7。",
    "，其次",
    "; second, ",
    "First, ", "So 7.\n", "So 7. ", "\n\n", "a\n\n", "$", "$$", "$$\n", "$a. B$ ", "\\(", "\\)", "\\[", "\\[\n",
    "\\]\n", "\\begin{a}",
    "\\begin{a}\n", "\\end{a}", "```\n", "`", "|---|\n", "| a |\n", "= 3\n", "\u00a0", "\u00a0:", "**", "_", "(",
    "). ", "\"a.\" ",
]
# fmt: on


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join) | st.lists(PIECES, max_size=40).map(" ".join))
def test_sentences_lose_nothing_but_space(text: str) -> None:
    found = sentences(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(sentence == sentence.strip() for sentence in found)
    assert found == [text.strip()] or all(any(c.isalnum() or c in "$\\" for c in sentence) for sentence in found)
    for step in reasoning_steps(text):
        assert step == step.strip()
        assert "".join(filter(str.isalnum, step)) in "".join(filter(str.isalnum, text))


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_text_of_100_kb_is_divided_in_linear_time(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    for thought in (text, f"Step 1: Red. {text}", f"1. Red. {text}", f"First, a; {text}", f"Red\n{text}\n\nSo 7."):
        begun = time.process_time()
        reasoning_steps(thought)
        assert time.process_time() - begun < 5.0  # measured: under 0.1 on a busy machine; quadratic time takes longer
