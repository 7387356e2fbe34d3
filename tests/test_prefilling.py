"""Prompts about one image, of which the beginning is run once, against prompts that are run as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.cache_utils import DynamicLayer

from ireasoner.model import prefilling
from ireasoner.model.forward import Prefix, prefill
from ireasoner.model.inputs import Prompts, build_prompts, encode_images
from ireasoner.model.policy import Policy
from ireasoner.model.prefilling import prefill_in_parts

IMAGE = {"type": "image"}


def chat(before: str, behind: str) -> list[dict[str, Any]]:
    """A prompt with words before and behind the image."""
    return [{"role": "user", "content": [{"type": "text", "text": before}, IMAGE, {"type": "text", "text": behind}]}]


BEHIND = [chat("Look.", f"What is {what}?") for what in ("red", "red and blue", "this", "blue", "it")]
# Each with the number of beginnings that are run for all of them, and for the first three and the last two.
CASES = {
    "questions": (BEHIND, (0, 1, 0, 0, 1), 2, 4),
    "one image has a single question": (BEHIND, (0, 1, 0, 0, 0), 2, 3),
    "one prompt begins like the whole of another": ([chat("", "red " * n) for n in range(1, 6)], (0, 0, 0, 1, 1), 2, 2),
}
WHOLE = {
    "an image each": (BEHIND, (0, 1, 2, 3, 4)),
    "questions before the image": ([chat(f"What is {n}?", "Look.") for n in range(5)], (0, 1, 0, 0, 1)),
    # Four of five images would wait in rows of padding for the ends of the fifth.
    "no work saved": (
        [chat("Look.", f"{word} " * n) for n, word in ((1, "red"), (1, "red"), (1, "red"), (80, "red"), (80, "blue"))],
        (0, 1, 2, 3, 3),
    ),
}


@pytest.fixture(scope="module")
def babbler(make_policy: Callable[..., Policy]) -> Policy:
    """Adapters that do something; not to be changed."""
    return make_policy(0.3)


@pytest.fixture
def images(pictures: list[Image.Image]) -> list[Image.Image]:
    """Of different size, so that there is padding."""
    return [image.resize((28 * (2 + n), 56)) for n, image in enumerate([*pictures, *pictures][:5])]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list[Prompts]:
    """The prompts, whole or not, that have been run."""
    given: list[Prompts] = []

    def watched(policy: Policy, prompts: Prompts) -> Prefix:
        given.append(prompts)
        return prefill(policy, prompts)

    monkeypatch.setattr(prefilling, "prefill", watched)
    return given


def ask(policy: Policy, images: list[Image.Image], case: Any) -> Prompts:
    chats, about, *_ = case
    encoded = encode_images(policy, [images[i] for i in about])
    return build_prompts(policy, encoded, chats)


@torch.no_grad()
def assert_equal_to_whole_prompts(policy: Policy, prompts: Prompts, size: int) -> None:
    with policy.acting_as("solver"):
        found, expected = prefill_in_parts(policy, prompts, size), prefill(policy, prompts)
    assert torch.equal(found.next_position_B, expected.next_position_B)
    torch.testing.assert_close(found.last_hidden_BD, expected.last_hidden_BD, atol=1e-5, rtol=1e-5)
    # Real tokens in their order: there may be other padding.
    real, expected_real = (prefix.mask_BP.bool() for prefix in (found, expected))
    for mine, theirs in zip(found.cache.layers, expected.cache.layers, strict=True):
        assert isinstance(mine, DynamicLayer)
        assert isinstance(theirs, DynamicLayer)
        for one, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert isinstance(one, torch.Tensor)
            assert isinstance(other, torch.Tensor)
            torch.testing.assert_close(
                one.transpose(1, 2)[real], other.transpose(1, 2)[expected_real], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("case", CASES.values(), ids=[*CASES])
def test_a_prompt_has_the_cache_that_it_has_alone(
    babbler: Policy, images: list[Image.Image], run: list[Prompts], case: Any
):
    prompts = ask(babbler, images, case)
    for size, expected in zip((5, 3), case[2:], strict=True):
        run.clear()
        assert_equal_to_whole_prompts(babbler, prompts, size)
        assert sum(map(len, run)) == expected


@pytest.mark.parametrize("case", WHOLE.values(), ids=[*WHOLE])
def test_prompts_without_a_beginning_worth_sharing_are_run_whole(
    babbler: Policy, images: list[Image.Image], run: list[Prompts], case: Any
):
    prompts = ask(babbler, images, case)
    assert_equal_to_whole_prompts(babbler, prompts, size=5)
    assert [each.mask_BP.shape for each in run] == [prompts.mask_BP.shape]


def test_a_beginning_ends_with_a_word(
    babbler: Policy, images: list[Image.Image], run: list[Prompts], monkeypatch: pytest.MonkeyPatch
):
    """As in a model whose images have no token that ends them, if the questions begin with different words."""
    end = babbler.processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    tokens = prefilling.image_tokens(babbler)
    monkeypatch.setattr(prefilling, "image_tokens", lambda _: torch.cat([tokens, torch.tensor([end])]))
    with torch.no_grad():
        prefill_in_parts(babbler, ask(babbler, images, ([chat("Look.", "Red?"), chat("Look.", "Blue?")], (0, 0))), 2)
    assert list(map(len, run)) == [2]


def test_where_words_see_later_words_prompts_are_run_whole(
    babbler: Policy, images: list[Image.Image], run: list[Prompts]
):
    """PaliGemma is told so by token types."""
    prompts = ask(babbler, images, CASES["questions"])
    prompts = replace(prompts, text={**prompts.text, "token_type_ids": torch.zeros_like(prompts.mask_BP)})
    with torch.no_grad():
        prefill_in_parts(babbler, prompts, 5)
    assert list(map(len, run)) == [5]
