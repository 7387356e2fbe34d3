"""How likely reasoning steps were: where their tokens are, in any language, and what they earn for it."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from ireasoner.method.likelihood import step_grounding, step_likelihoods, step_tokens
from ireasoner.method.memory import step_digest
from ireasoner.method.recipe import Recipe
from ireasoner.method.scoring import Context, RewardError, score_group
from ireasoner.method.texts import parse_trajectory
from ireasoner.model.inputs import token_texts
from models import load

THOUGHTS = {
    "English": "<think>Step 1: The red bar reaches 7.\nStep 2: The blue bar\nreaches 3.</think><answer>10</answer>",
    "German": "<think>1. Der grüne Balken endet bei **2,5 m**.\n2. Größer ist keiner.</think><answer>2,5 m</answer>",
    "Chinese": "<think>步骤1：红色柱子的高度是7。\n步骤2：蓝色柱子的高度是3🙂。</think><answer>10</answer>",
    "emphasised": "<think>**Step 1:** The *red* bar is 7.\n\n**Step 2: So 7.**</think><answer>7</answer>",
}


@pytest.mark.parametrize("language", THOUGHTS)
def test_a_steps_tokens_are_those_that_wrote_it(language: str):
    policy = load()
    tokenizer = policy.processor.tokenizer
    text = THOUGHTS[language]
    ids = tokenizer(text)["input_ids"]
    tokens = token_texts(policy.processor, ids)
    assert "".join(tokens) == text
    steps = parse_trajectory(text).reasoning_steps
    assert len(steps) == 2
    spans = step_tokens(steps, tokens)
    for step, span in zip(steps, spans, strict=True):
        assert span is not None
        assert only_letters(tokenizer.decode(ids[span])) == only_letters(step)
    assert spans[0].stop <= spans[1].start  # type: ignore[union-attr]


def only_letters(text: str) -> str:
    return "".join(filter(str.isalnum, text))


def test_equal_steps_are_found_in_their_own_places():
    tokens = ["1. ", "red", " 7\n", "2. ", "red", " 7\n", "3. ", "red", " 7"]
    assert step_tokens(["red 7", "red 7", "red 7", "red 7"], tokens) == [slice(1, 3), slice(4, 6), slice(7, 9), None]
    assert step_tokens(["", "red 7"], tokens) == [None, slice(1, 3)]  # an empty step was written by no token


def test_a_character_in_pieces_belongs_to_its_first_piece():
    assert step_tokens(["红色", "b"], ["a", " ", "", "", "红", "", "色", "b"]) == [slice(2, 7), slice(7, 8)]


def test_the_likelihood_of_a_step_is_the_geometric_mean_of_its_tokens():
    tokens, logprobs = ["1. ", "red", " 7\n", "2. ", "blue"], np.log([0.1, 0.5, 0.125, 0.2, 0.9]).tolist()
    assert step_likelihoods(["red 7", "blue"], tokens, logprobs) == pytest.approx([0.25, 0.9])


def test_what_a_text_says_again_does_not_count():
    """A repetition is likely whatever it says, in other signs too."""
    tokens = ["red", " 7", "\n", "Red", ":", " 7!"]
    values = step_likelihoods(["red 7", "Red: 7!"], tokens, [math.log(0.5)] * 6)
    assert values[0] == pytest.approx(0.5)
    assert np.isnan(values[1])


def test_grounding_is_what_the_image_adds_to_the_likelihood_of_a_step():
    """ "look" is as likely without the image, "red 7" less so, and "blue" more so, which earns nothing less than 0."""
    tokens, steps = ["look", "\n", "red", " 7", "\n", "blue"], ["look", "red 7", "blue"]
    seen, blind = np.log([0.9, 1, 0.5, 0.125, 1, 0.3]), np.log([0.9, 1, 0.1, 0.1, 1, 0.6])
    assert step_grounding(steps, tokens, seen.tolist(), blind.tolist()) == pytest.approx([0, 0.25 - 0.1, 0])


def test_a_group_is_paid_for_its_grounding():
    recipe = LIKELIHOOD.model_copy(update={"step_measure": "grounding"})
    blind = np.log([[0.9, 0.1, 0.1, 0.9], [0.9, 0.8, 0.8, 0.9]]).tolist()
    context = Context(step_weight=1.0, recent_steps=(), logprobs=LOGPROBS, tokens=TOKENS, blank_logprobs=lambda: blind)
    scored = score_group("q", (RED, BLUE), recipe, context)
    assert scored.rewards == pytest.approx([0.5, 0.0])


@pytest.mark.parametrize("piece", ["a", "1 ", "Step 1: ", "红", "\n", "ß", "\u0301", "."])
def test_hostile_text_takes_bounded_time(piece: str):
    """100 kB in one-character tokens, with as many steps as are compared, each of them repeated throughout."""
    text = piece * (100_000 // len(piece))
    steps = [text[: 1000 * n] for n in range(1, 9)]
    start = time.process_time()
    values = step_grounding(steps, list(text), [-1.0] * len(text), [-2.0] * len(text))
    assert time.process_time() - start < 5
    assert len(values) == 8


LIKELIHOOD = Recipe(reward="agreement", step_measure="likelihood", recurrence_window=8, step_weight_final=1.0)
RED, BLUE = "<think>Step 1: red 7</think><answer>7</answer>", "<think>Step 1: blue 3</think><answer>3</answer>"
TOKENS = [["<think>Step 1: ", "red", " 7", "</think><answer>7</answer>"], ["<think>Step 1: ", "blue", " 3", "…"]]
LOGPROBS = np.log([[0.9, 0.4, 0.9, 0.9], [0.9, 0.8, 0.8, 0.9]]).tolist()


def paid(texts: tuple[str, str] = (RED, BLUE), recent: tuple[frozenset[str], ...] = ()) -> list[float]:
    context = Context(step_weight=1.0, recent_steps=recent, logprobs=LOGPROBS, tokens=TOKENS)
    return [t.parts["step_agreement"].value for t in score_group("q", texts, LIKELIHOOD, context).trajectories]


def test_likelier_steps_earn_more():
    assert paid() == pytest.approx([0.6, 0.8])


def test_likely_words_that_fit_every_image_earn_nothing():
    others = tuple(frozenset({step_digest("blue 3")}) for _ in range(4))
    assert paid(recent=others) == pytest.approx([0.6, 0.0])


def test_an_unreadable_text_earns_nothing_however_likely_it_was():
    assert paid((RED, "<think>Step 1: blue 3")) == pytest.approx([0.6, 0.0])


def test_without_the_log_probabilities_nothing_can_be_paid():
    with pytest.raises(RewardError, match=r"needs context\.tokens"):
        score_group("q", (RED, BLUE), LIKELIHOOD, Context(step_weight=1.0, recent_steps=(), logprobs=LOGPROBS))
