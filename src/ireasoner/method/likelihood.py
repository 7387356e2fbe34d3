"""How likely reasoning steps are, and how much of that is owed to the image: scores that know no language."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ireasoner.method.rewards import FloatArray


def step_tokens(reasoning_steps: Sequence[str], tokens: Sequence[str]) -> list[slice | None]:
    """The tokens that wrote each reasoning step; None for one that they do not hold.

    Steps are looked for in order, by their letters and digits alone, because their markers, emphasis and line breaks
    are lost when they are read. A token that ends one step and begins the next belongs to both.

    Args:
        reasoning_steps: as they were read in the text.
        tokens: the text of each token. One that ends within a character has none; the next one has the character.
    """
    written, owners = [], []  # the letters and digits, and the token that each of them is from
    start = 0
    for number, token in enumerate(tokens):
        letters = _letters(token)
        written.append(letters)
        # The first letter of a token was begun by those before it that have no text of their own.
        owners += [(start if i == 0 else number, number) for i in range(len(letters))]
        start = start if token == "" else number + 1
    text, place = "".join(written), 0
    found: list[slice | None] = []
    for step in reasoning_steps:
        letters = _letters(step)
        at = text.find(letters, place) if letters else -1
        if at < 0:
            found.append(None)
            continue
        place = at + len(letters)
        found.append(slice(owners[at][0], owners[place - 1][1] + 1))
    return found


def step_likelihoods(
    reasoning_steps: Sequence[str], tokens: Sequence[str], logprobs: Sequence[float] | FloatArray
) -> FloatArray:
    """exp of the mean log-probability of each reasoning step's tokens, in [0, 1]; array [reasoning steps].

    NaN for a step that is not found among the tokens, and for one that says again what an earlier one of the same text
    says, which is likely whatever it says.
    """
    return _means(_tokens_of_new_steps(reasoning_steps, tokens), logprobs)


def step_grounding(
    reasoning_steps: Sequence[str],
    tokens: Sequence[str],
    logprobs: Sequence[float] | FloatArray,
    blank_logprobs: Sequence[float] | FloatArray,
) -> FloatArray:
    """How much likelier the image makes each reasoning step, max(0, p(step | image) − p(step | gray image)), in [0, 1].

    p is `step_likelihoods`, as are the steps that are NaN. What fits every image, repeats what is said or follows from
    the text alone is as likely without the image, and scores 0; so does what is unlikely with it.

    Args:
        reasoning_steps: as they were read in the text.
        tokens: the text of each token.
        logprobs: of each token, about the image.
        blank_logprobs: of the same tokens, about a uniformly gray image of the same size.

    Returns:
        Array [reasoning steps].
    """
    spans = _tokens_of_new_steps(reasoning_steps, tokens)
    return np.maximum(_means(spans, logprobs) - _means(spans, blank_logprobs), 0.0)


def _tokens_of_new_steps(reasoning_steps: Sequence[str], tokens: Sequence[str]) -> list[slice | None]:
    """As `step_tokens`; None also for a step that says again what an earlier one says."""
    spans = step_tokens(reasoning_steps, tokens)
    said = [_letters(step) for step in reasoning_steps]
    return [None if letters in said[:place] else spans[place] for place, letters in enumerate(said)]


def _means(spans: Sequence[slice | None], logprobs: Sequence[float] | FloatArray) -> FloatArray:
    """The geometric mean of the probabilities of each span's tokens; NaN where there is none."""
    means = [np.nan if span is None else np.exp(np.mean(logprobs[span])) for span in spans]
    return np.array(means, dtype=np.float64)


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text)).casefold()
