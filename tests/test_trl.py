"""The reward for TRL's GRPOTrainer: groups are found by their size, and a part of one is never judged as the whole."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ireasoner.method.scoring import Context, RewardError, score_group
from ireasoner.method.types import Completion
from ireasoner.model.inputs import encode_images, token_texts
from ireasoner.plugins.likelihoods import Likelihoods
from ireasoner.plugins.trl import agreement_reward
from ireasoner.rollouts.distributions import token_logprobs
from ireasoner.rollouts.engine import Request
from ireasoner.training.config import ConfigError, load_recipe
from ireasoner.training.selfplay import BlankImages
from models import load

EXAMPLE = Path(__file__).parents[1] / "examples" / "trl_grpo.py"
QUESTION = "How many circles are there?"
ANSWERS = load_recipe("answers-only")  # which needs the texts alone


def solution(answer: str, *steps: str) -> str:
    return f"<think>{' '.join(steps)}</think><answer>{answer}</answer>"


RED = solution("2", "A red circle is on the left.", "A blue circle is on the right.")
SAME = solution("2", "A red circle is on the left.", "A blue circle is on the right.")
OTHER = solution("3", "I count them all.", "There are green ones.")
BROKEN = "2"


def turns(*texts: str) -> list[Any]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def prompt(color: str, question: str = QUESTION) -> list[dict[str, Any]]:
    """A prompt as TRL hands it in: a new image object each time."""
    image = Image.new("RGB", (4, 4), color)
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def test_each_group_earns_what_score_group_pays():
    texts = [RED, SAME, OTHER, BROKEN], [OTHER, OTHER, RED, RED]
    prompts = [prompt("red") for _ in range(4)] + [prompt("blue") for _ in range(4)]
    reward = agreement_reward(ANSWERS, num_generations=4)
    given = reward(prompts=prompts, completions=turns(*texts[0], *texts[1]), question=[QUESTION] * 8)
    expected = [score_group(QUESTION, each, ANSWERS, Context(step_weight=0.0)).rewards for each in texts]
    assert given == pytest.approx([*expected[0], *expected[1]])
    assert given[0] == given[1] > given[2] > 0 == given[3]
    assert all(isinstance(number, float) for number in given)


def test_steps_that_are_said_of_every_image_earn_less():
    """Images are told apart by their pixels: each copy of a prompt has an image object of its own."""
    recipe = ANSWERS.model_copy(update={"recurrence_window": 128})
    reward = agreement_reward(recipe, num_generations=2)
    first = reward([prompt("red"), prompt("red")], turns(RED, SAME), question=[QUESTION] * 2)
    again = reward([prompt("red"), prompt("red")], turns(RED, SAME), question=[QUESTION] * 2)
    other = reward([prompt("blue"), prompt("blue")], turns(RED, SAME), question=[QUESTION] * 2)
    assert first == again
    assert other[0] < first[0]


def test_texts_of_plain_prompts_are_taken_too():
    reward = agreement_reward("discrete", num_generations=2)
    assert reward(["How many?"] * 2, [RED, SAME])[0] > 0


@pytest.mark.parametrize("handed_in", [3, 6])
def test_a_part_of_a_group_is_never_judged(handed_in: int):
    reward = agreement_reward(ANSWERS, num_generations=4)
    with pytest.raises(RewardError, match=r"no whole groups of num_generations=4.*per_device_train_batch_size"):
        reward([prompt("red") for _ in range(handed_in)], turns(*[RED] * handed_in), question=[QUESTION] * handed_in)


@pytest.mark.parametrize(("color", "question"), [("blue", QUESTION), ("red", "How many squares?")])
def test_completions_of_different_prompts_are_no_group(color: str, question: str):
    """With the same question about every image, only the pictures differ."""
    reward = agreement_reward(ANSWERS, num_generations=4)
    prompts = [prompt("red"), prompt("red"), prompt(color, question), prompt(color, question)]
    with pytest.raises(RewardError, match="answer different prompts"):
        reward(prompts, turns(RED, SAME, RED, SAME))


def test_halves_of_groups_are_not_taken_for_groups():
    reward = agreement_reward(ANSWERS, num_generations=2)
    with pytest.raises(RewardError, match="more than 2 completions in a row answer one prompt"):
        reward([prompt(c) for c in ("red",) * 4 + ("blue",) * 4], turns(*[RED] * 8))


def test_the_question_is_in_its_column_or_in_the_prompt():
    """Answers are compared by the options that it offers."""
    offering = "What is on the left? A) a red circle B) a green one"
    told, bare = prompt("red", offering), prompt("red")
    texts = turns(solution("A", "It is red."), solution("a red circle", "It is red."))
    reward = agreement_reward("discrete", num_generations=2)
    assert reward([told, told], texts) == [1, 1]
    assert reward([bare, bare], texts) == [1, 0]
    assert reward([bare, bare], texts, question=[offering] * 2) == [1, 1]
    named = agreement_reward("discrete", num_generations=2, question_column="asked")
    assert named([bare, bare], texts, asked=[offering] * 2) == [1, 1]
    with pytest.raises(RewardError, match="no column 'asked'"):
        named([bare, bare], texts)


def test_a_completion_that_was_cut_off_earns_nothing():
    reward = agreement_reward(ANSWERS, num_generations=2, eos_token_ids=[9])
    earned = reward([prompt("red")] * 2, turns(RED, SAME), completion_ids=[[1, 9], [1, 2]])
    assert earned[0] > 0
    assert earned[1] == 0


def test_the_weight_of_steps_follows_the_trainers_step():
    recipe = load_recipe("paper").model_copy(update={"step_weight_final": 1.0, "step_weight_warmup": 0.5})
    reward = agreement_reward(recipe, num_generations=2, embed=lambda texts: np.ones((len(texts), 1)))
    rows = [prompt("red")] * 2, turns(RED, OTHER)

    def at(step: int) -> float:
        return reward(*rows, trainer_state=SimpleNamespace(global_step=step, max_steps=10))[0]

    assert at(0) == at(2) > at(9) == reward(*rows)[0]


# --- how likely reasoning steps are -----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"model": "tiny", "processor": 1}, {"model": 1}])
def test_without_the_model_likelihoods_cannot_be_told(given: dict[str, Any]):
    with pytest.raises(RewardError, match=r"the recipe 'default' asks how likely .* hand in model .*'answers-only'"):
        agreement_reward(num_generations=2, **given)


def test_the_recipe_default_pays_for_what_the_image_makes_likelier():
    """As self-play computes it, from the same prompt: with the image, and with a gray one of its size."""
    policy = load()
    image = Image.new("RGB", (64, 48), "red")
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]
    ids = [policy.processor.tokenizer(text)["input_ids"] for text in (RED, OTHER)]
    completions = [Completion("", tuple(each), (), "stop") for each in ids]
    (encoded,) = encode_images(policy, [image])
    request = Request(encoded, [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}])
    policy.model.train()
    modes = [module.training for module in policy.model.modules()]
    likelihoods = Likelihoods(policy.backbone, policy.processor)
    seen, blind = likelihoods.of_tokens(chat, ids), likelihoods.without_image(chat, ids)
    for found, expected in (
        (seen, token_logprobs(policy, request, completions, None, 3072)),
        (blind, BlankImages(policy, 3072).logprobs(request, completions)),
    ):
        for each, other in zip(found, expected, strict=True):
            assert each == pytest.approx(other, abs=1e-4)
    assert seen[0] != pytest.approx(blind[0], abs=1e-3)
    assert [module.training for module in policy.model.modules()] == modes
    reward = agreement_reward(num_generations=2, model=policy.backbone, processor=policy.processor)
    paid = reward([chat, chat], turns(RED, OTHER), completion_ids=ids, question=[QUESTION] * 2)
    context = Context(
        step_weight=0.5, recent_steps=[], tokens=[token_texts(policy.processor, each) for each in ids],
        logprobs=seen, blank_logprobs=lambda: blind,
    )  # fmt: skip
    assert paid == pytest.approx(score_group(QUESTION, [RED, OTHER], load_recipe("default"), context).rewards)
    with pytest.raises(RewardError, match="the prompt has no image"):
        reward([[{"role": "user", "content": QUESTION}]] * 2, turns(RED, OTHER), completion_ids=ids)
    with pytest.raises(RewardError, match="without completion_ids"):
        reward([chat, chat], turns(RED, OTHER))


def test_mistakes_are_told_when_the_function_is_made():
    with pytest.raises(RewardError, match="num_generations is 1"):
        agreement_reward(ANSWERS, num_generations=1)
    with pytest.raises(ConfigError, match="there is no recipe 'defualt'"):
        agreement_reward("defualt", num_generations=4)


def test_a_recipe_that_needs_embeddings_says_so():
    with pytest.raises(RewardError, match="'paper' compares embeddings"):
        agreement_reward("paper", num_generations=2)
    embed = lambda texts: np.ones((len(texts), 1))  # noqa: E731
    reward = agreement_reward("paper", num_generations=2, embed=embed)
    assert reward([prompt("red")] * 2, turns(RED, SAME))[0] > 0


def test_a_reward_that_needs_more_than_texts_is_refused():
    recipe = load_recipe("default")
    with pytest.raises(RewardError, match=r"my_rewards\.py:fn is none of the texts alone"):
        agreement_reward(recipe.model_copy(update={"reward": "my_rewards.py:fn"}), num_generations=2)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
@pytest.mark.filterwarnings("default")  # TRL and what it imports warn of their own options
def test_the_example_trains_two_steps_with_the_real_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from ireasoner.playground import dataset

    dataset.write_unlabeled(tmp_path / "images", 3, "chalk")
    spec = importlib.util.spec_from_file_location("example_trl", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    trainers, make = [], example.trainer_for
    monkeypatch.setattr(example, "trainer_for", lambda asked: trainers.append(make(asked)) or trainers[-1])
    words = ["--images", str(tmp_path / "images"), "--questions", QUESTION, "--steps", "2", "--num-generations", "4"]
    words += ["--max-completion-length", "64", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["trl_grpo.py", *words])
    example.main()
    logged = [entry["rewards/ireasoner_default/mean"] for entry in trainers[0].state.log_history if "reward" in entry]
    assert len(logged) == 2
    assert min(logged) > 0
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["peft_type"] == "LORA"
