"""Self-play: what a recipe pays for hand-written groups, and what a played step does and costs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ireasoner.method import rewards
from ireasoner.method.texts import parse_trajectory
from ireasoner.method.types import Completion, Episode, FinishReason, Question, Trajectory
from ireasoner.model.inputs import embed_texts
from ireasoner.model.learner import Learner
from ireasoner.model.policy import Policy
from ireasoner.page import run as recorded
from ireasoner.page.terms import proposer_term, solver_terms
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training.config import Config, names, resolve
from ireasoner.training.recorder import episode_record
from ireasoner.training.selfplay import ClaimMemory, SelfPlay, step_weight
from models import load

MakePolicy = Callable[..., Policy]
RECIPES = [name for name in names("recipes") if name != "oracle"]
QUESTION = Question("How tall is the red bar?", "", None)
LAST = 10  # steps of the runs below


def config_of(recipe: str = "paper", **flags: Any) -> Config:
    scale = {"steps": LAST, "group_size": 3, "max_question_tokens": 24, "max_solution_tokens": 40}
    labels = {"labels": "labels.jsonl"} if recipe == "oracle" else {}
    return resolve({"images": "images", "model": "tiny", "recipe": recipe, **scale, **labels, **flags})


def selfplay(policy: Policy, config: Config | None = None, labels: Any = None) -> SelfPlay:
    return SelfPlay(policy, LiveEngine(policy), config or config_of(), labels)


@pytest.fixture(scope="module")
def policy() -> Policy:
    """The model as it ships, not to be changed: it writes well-formed questions and trajectories."""
    return load()


@pytest.fixture(scope="module")
def babbler(make_policy: MakePolicy) -> Policy:
    """Never well-formed, never twice the same."""
    return make_policy(0.2)


def written(text: str, finish_reason: FinishReason = "stop") -> Completion:
    return Completion(text, (1,), (0.0,), finish_reason)


def solution(answer: str, *steps: str) -> str:
    lines = "\n".join(f"Step {i}: {step}" for i, step in enumerate(steps or ("The red bar reaches 7.",), 1))
    return f"<think>{lines}</think><answer>{answer}</answer>"


def read(completions: Sequence[Completion]) -> tuple[Trajectory, ...]:
    return tuple(parse_trajectory(c.text, c.finish_reason) for c in completions)


def pay(
    policy: Policy, config: Config, texts: Sequence[str | Completion], step: int = LAST, truth: str | None = None
) -> Episode:
    completions = [written(text) if isinstance(text, str) else text for text in texts]
    return selfplay(policy, config).reward(step, ("a.png", 0), QUESTION, None, completions, read(completions), truth)


# --- recipes ---------------------------------------------------------------------------------------------------------

DIFFERENCES_FROM_PAPER: dict[str, dict[str, Any]] = {
    "default": {
        "advantage": "rloo", "step_measure": "claims", "recurrence_window": 128, "step_weight_initial": 0.5,
        "step_weight_final": 0.5, "kl_coef": 0.03, "kl_rate": 0.0,
    },
    "answers-only": {"advantage": "rloo", "step_weight_final": 0.0, "kl_coef": 0.03, "kl_rate": 0.0},
    "discrete": {"reward": "discrete"},
    "format-only": {"reward": "format"},
    "frozen-proposer": {"train_proposer": False},
    "no-density": {"density_exponent": 0.0},
    "no-position-decay": {"position_decay": 0.0},
    "no-warmup": {"step_weight_warmup": 0.0},
    "oracle": {"reward": "oracle", "advantage": "rloo", "train_proposer": False},
    "outcome-only": {"step_weight_final": 0.0},
    "paper": {},
    "random-reward": {"reward": "random"},
    "step-only": {"step_weight_initial": 1.0, "step_weight_final": 1.0},
}  # fmt: skip


def test_the_paper_recipe_is_the_published_run():
    paper = config_of("paper").model_dump()
    published = {
        "reward": "agreement", "outcome_exponent": 0.7, "length_penalty": 0.05, "target_words": 64,
        "density_exponent": 0.7, "position_decay": 0.15, "max_reasoning_steps": 8, "max_step_tokens": 64,
        "step_weight_initial": 0.0, "step_weight_final": 0.7, "step_weight_warmup": 0.3, "target_entropy": 0.90,
        "entropy_width": 0.35, "advantage": "ema", "baseline_momentum": 0.9, "train_proposer": True,
        "kl_coef": 1e-3, "kl_target": 0.02, "kl_rate": 0.1,
    }  # fmt: skip
    assert {name: paper[name] for name in published} == published


@pytest.mark.parametrize("recipe", names("recipes"))
def test_recipes_differ_from_the_paper_in_the_keys_they_name_and_no_others(recipe: str):
    paper, other = config_of("paper").model_dump(), config_of(recipe).model_dump()
    differences = {name: value for name, value in other.items() if value != paper[name]}
    for of_the_run in ("recipe", "labels"):
        differences.pop(of_the_run, None)
    assert differences == DIFFERENCES_FROM_PAPER[recipe]
    named = yaml.safe_load(resources.files("ireasoner").joinpath("recipes", f"{recipe}.yaml").read_text("utf-8"))
    assert set(differences) <= set(named)
    assert named.items() <= other.items()


# --- what is said of every image ------------------------------------------------------------------------------------


def group_of(*texts: str) -> list[Trajectory]:
    return [parse_trajectory(text) for text in texts]


def test_recurrence_is_the_share_of_other_images_groups_with_the_claim():
    memory = ClaimMemory(3)
    memory.add([("a", group_of(solution("7", "The red bar reaches 7."), solution("6", "The red bar reaches 6.")))])
    memory.add([("b", group_of(solution("7", "the red bar reaches 7")))])
    memory.add([("c", group_of("<answer>7</answer>", "Step 1: The red bar reaches 7."))])  # unreadable: claims nothing
    assert memory.recurrence("d", ["The red bar reaches 7.", "The red bar reaches 6."]).tolist() == [1.0, 0.5]
    assert memory.recurrence("a", ["The red bar reaches 7.", "The red bar reaches 6."]).tolist() == [1.0, 0.0]
    memory.add(("e", group_of(solution("1", f"The blue bar reaches {i}."))) for i in range(2))
    assert memory.recurrence("d", ["The red bar reaches 6."]).tolist() == [0.0]  # a is forgotten: 3 are remembered
    assert ClaimMemory(0).recurrence("d", ["The red bar reaches 7."]).tolist() == [0.0]


def test_a_memory_survives_its_state():
    memory = ClaimMemory(3)
    memory.add((name, group_of(solution("7", "The red bar reaches 7."))) for name in "ab")
    again = ClaimMemory(3)
    again.restore(json.loads(json.dumps(memory.state())))
    assert again.groups == memory.groups
    assert again.recurrence("c", ["The red bar reaches 7."]).tolist() == [1.0]


def test_boilerplate_with_a_constant_answer_does_not_pay(policy: Policy):
    """Said of every image, it earns nothing; the same group of true readings earns nearly all."""
    config = config_of("default")
    player = selfplay(policy, config)
    boilerplate = [solution("yes", "I look at the image carefully.", "Therefore the answer follows.")] * 3
    readings = [solution("7", "The red bar reaches 7."), solution("7", "Red is at 7."), solution("6", "Red is at 6.")]
    for i in range(64):
        player.memory.add([(f"{i}.png", group_of(*boilerplate))])

    def earned(texts: list[str]) -> tuple[float, ...]:
        group = tuple(group_of(*texts))
        player.memory.add([("new.png", group)])
        written_ = [written(text) for text in texts]
        return player.reward(LAST, ("new.png", 0), QUESTION, None, written_, group, None).rewards

    assert max(earned(boilerplate)) < 0.05
    honest = earned(readings)
    assert min(honest[:2]) > 0.5
    assert min(honest[:2]) > honest[2]


# λ at steps 1 to 10. The paper: 0 for the first 3 (30 %), then 0.7 · (t − 3)/7 = 0.1 · (t − 3).
SCHEDULES = {
    "paper": [0.0, 0.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
    "no-warmup": [0.07, 0.14, 0.21, 0.28, 0.35, 0.42, 0.49, 0.56, 0.63, 0.7],
    "step-only": [1.0] * 10,
    "outcome-only": [0.0] * 10,
    "answers-only": [0.0] * 10,
    "default": [0.5] * 10,
}


@pytest.mark.parametrize("recipe", names("recipes"))
def test_weight_of_step_agreement_over_training(recipe: str):
    config = config_of(recipe)
    assert [step_weight(config, t) for t in range(1, LAST + 1)] == pytest.approx(
        SCHEDULES.get(recipe, SCHEDULES["paper"])
    )


# --- what a group earns ----------------------------------------------------------------------------------------------

# Three of five answer 7, one 3, one cannot be read; all readable ones reason alike, so that s = 1.
# r_out = 0.6^0.7 = 0.699368 and 0.2^0.7 = 0.324131; r_step = 0.6^0.7 and 0. At the last step λ = 0.7:
# default: λ = 0.5, and every readable step is said by all the others: 0.5 · 0.699368 + 0.5 and 0.5 · 0.324131 + 0.5.
# 7: 0.3 · 0.699368 + 0.7 · 0.699368; 3: 0.3 · 0.324131 = 0.097239. No density: 0.3 · 0.699368 + 0.7 = 0.909810.
GROUP = [solution("7"), solution("3"), "I say 7", solution("7"), solution("7.0")]
PAPER_PAY = (0.699368, 0.097239)
EARNED = {
    "answers-only": (0.699368, 0.324131),
    "default": (0.849684, 0.662066),
    "discrete": (1.0, 0.0),
    "format-only": (1.0, 1.0),
    "frozen-proposer": PAPER_PAY,
    "no-density": (0.909810, 0.097239),
    "no-position-decay": PAPER_PAY,
    "no-warmup": PAPER_PAY,
    "outcome-only": (0.699368, 0.324131),
    "paper": PAPER_PAY,
    "step-only": (0.699368, 0.0),
}


@pytest.mark.parametrize("recipe", EARNED)
def test_rewards_of_a_group_by_hand(policy: Policy, recipe: str):
    episode = pay(policy, config_of(recipe), GROUP)
    most, few = EARNED[recipe]
    assert episode.rewards == pytest.approx([most, few, 0.0, most, most], abs=1e-6)
    # The parts are told apart, whatever the recipe makes of them.
    density = 1.0 if recipe == "no-density" else 0.699368
    assert episode.reward_parts["outcome"] == pytest.approx([0.699368, 0.324131, 0, 0.699368, 0.699368], abs=1e-6)
    agreement = [1, 1, 0, 1, 1] if recipe == "default" else [density, 0, 0, density, density]
    assert episode.reward_parts["step_agreement"] == pytest.approx(agreement, abs=1e-6)
    assert episode.answer_keys == ("number:7", "number:3", None, "number:7", "number:7")
    assert (episode.majority_answer, episode.majority_fraction) == ("number:7", pytest.approx(0.6))
    # H over the four readable votes, 3–1: −¾ ln ¾ − ¼ ln ¼ = 0.562335;
    # proposer: (0.562335 − 0.90)² / 0.245 = 0.114018 / 0.245 = 0.465378, e^−0.465378 = 0.627898.
    assert episode.answer_entropy == pytest.approx(0.562335, abs=1e-6)
    assert episode.proposer_reward == pytest.approx(0.627898, abs=1e-5)


def test_rewards_before_the_end_of_the_warm_up_are_the_outcome(policy: Policy):
    assert pay(policy, config_of(), GROUP, step=3).rewards == pytest.approx(
        [0.699368, 0.324131, 0, 0.699368, 0.699368], abs=1e-6
    )


def test_every_constant_of_a_recipe_reaches_its_equation(policy: Policy):
    texts = [
        solution("7", "The red bar reaches 7.", "So it is 7.", "That is all."),
        solution("7", "The blue bar reaches 3.", "The red bar reaches 7.", "Nothing more is there."),
        solution("3", "The red bar reaches 3."),
    ]
    config = config_of(
        outcome_exponent=1.3, length_penalty=0.5, target_words=4, density_exponent=0.4, position_decay=0.9,
        max_reasoning_steps=2, max_step_tokens=3, step_weight_final=0.6, target_entropy=0.2, entropy_width=0.5,
    )  # fmt: skip
    episode = pay(policy, config, texts)
    keys = ["number:7", "number:7", "number:3"]
    words = [len(text.partition("<answer>")[0].split()) for text in texts]
    outcome = rewards.outcome_rewards(keys, words, exponent=1.3, length_penalty=0.5, target_words=4)
    steps = [embed_texts(policy, t.reasoning_steps, max_tokens=3) for t in episode.trajectories]
    agreement = rewards.step_agreement_rewards(
        keys, steps, density_exponent=0.4, position_decay=0.9, max_reasoning_steps=2
    )
    assert 0 < agreement[0] < 0.999 * (2 / 3) ** 0.4  # the two reason differently
    assert episode.reward_parts["outcome"] == pytest.approx(outcome)
    assert episode.reward_parts["step_agreement"] == pytest.approx(agreement)
    assert episode.rewards == pytest.approx(0.4 * outcome + 0.6 * agreement)
    assert episode.proposer_reward == pytest.approx(
        rewards.proposer_reward(episode.answer_entropy, target=0.2, width=0.5)
    )


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_step_scores_explain_the_step_agreement(policy: Policy, recipe: str):
    texts = [
        solution("7", "The red bar reaches 7.", "The red bar reaches 7.", "So the answer is 7."),
        solution("7", "The blue bar reaches 3.", "The red bar reaches 7."),
        solution("3", "The red bar reaches 3."),
        "nothing",
    ]
    config = config_of(recipe)
    episode = pay(policy, config, texts)
    assert list(map(len, episode.step_scores)) == [3, 2, 1, 0]
    for i, scores in enumerate(episode.step_scores):
        counted = [(j, s.score) for j, s in enumerate(scores) if s.score is not None]
        if recipe == "default":  # r_step = mean of s (1 − f); what repeats the answer is not counted
            assert all(s.score == pytest.approx(s.similarity * (1 - s.recurrence)) for s in scores if s.score)
            expected = np.mean([score for _, score in counted]) if counted else 0.0
        else:  # r_step = (|G|/N)^γd Σ ω s / Σ ω
            weights = [math.exp(-config.position_decay * j) for j, _ in counted]
            expected = (
                0.5**config.density_exponent * np.average([s for _, s in counted], weights=weights) if counted else 0
            )
        assert episode.reward_parts["step_agreement"][i] == pytest.approx(expected)
    if recipe == "default":
        assert [s.score is None for s in episode.step_scores[0]] == [False, False, True]
        # Said twice here and once there: aligned one to one, in order, so the second of the two finds its like.
        assert [s.similarity for s in episode.step_scores[0][:2]] != [s.similarity for s in episode.step_scores[0][1:]]
    else:
        assert [s.score for s in episode.step_scores[2]] == [None]  # outside the majority
        assert episode.step_scores[2][0].similarity is not None
    assert episode.step_weight == step_weight(config, episode.step)


@pytest.mark.parametrize("recipe", [*RECIPES, "oracle"])
@pytest.mark.parametrize("step", [1, LAST])
def test_the_page_takes_every_reward_apart(policy: Policy, recipe: str, step: int):
    """Whatever a recipe pays, its terms add up to it; and to nothing else."""
    texts = [
        solution("7", "The red bar reaches 7.", "So it is 7.", "That is all of it.", *["And more."] * 6),
        solution("7", "The blue bar reaches 3.", "The red bar reaches 7.", "Nothing more is there."),
        solution("7", "The red bar reaches 7."),
        solution("3", "The red bar reaches 3."),
        "nothing",
    ]
    config = config_of(recipe, target_words=9, length_penalty=0.3, target_entropy=0.6)
    record = episode_record(pay(policy, config, texts, step, truth="7"))
    for changed in (False, True):
        if changed:
            for t in record["trajectories"]:
                t["reward"] -= 1.5
                t["reward_parts"] = {name: value + 0.01 for name, value in t["reward_parts"].items()}
        read = recorded.Episode.model_validate(record | {"proposer_reward": record["proposer_reward"] + 0.01 * changed})
        lines = [line for t in read.trajectories for line in solver_terms(config, read, t)]
        assert len(lines) == 5 * (3 if config.reward == "agreement" else 1)
        assert {line.adds_up for line in [*lines, proposer_term(config, read)]} == {not changed}


@pytest.mark.parametrize("option", ["length_penalty", "outcome_exponent", "density_exponent", "position_decay"])
def test_a_term_with_another_constant_does_not_add_up(policy: Policy, option: str):
    texts = [
        solution("7", "The red bar reaches 7.", "It is so."),
        solution("7", "The red bar reaches 7.", "Look at it."),
    ]
    texts.append(solution("3", "The red bar reaches 3."))
    config = config_of("paper", target_words=5)
    read = recorded.Episode.model_validate(episode_record(pay(policy, config, texts)))
    other = config.model_copy(update={option: getattr(config, option) + 0.2})
    lines = [line for t in read.trajectories for line in solver_terms(other, read, t)]
    assert not all(line.adds_up for line in lines)


MALFORMED = {
    "empty": written(""),
    "blank": written(" \n"),
    "no tags": written("7"),
    "yes": written("yes"),
    "answer only": written("<answer>7</answer>"),
    "think only": written("<think>Step 1: The red bar reaches 7.</think>"),
    "empty think": written("<think></think><answer>7</answer>"),
    "step without text": written("<think>Step 1:</think><answer>7</answer>"),
    "empty answer": written("<think>Step 1: The red bar reaches 7.</think><answer></answer>"),
    "open think": written("<think>Step 1: The red bar reaches 7.<answer>7</answer>"),
    "open answer": written("<think>Step 1: The red bar reaches 7.</think><answer>7"),
    "answer first": written("<answer>7</answer><think>Step 1: The red bar reaches 7.</think>"),
    "two answers": written(solution("7") + "<answer>7</answer>"),
    "cut off": written("<think>Step 1: The red bar", "length"),
    "cut off after the answer": written(solution("7"), "length"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_reward_for_malformed_empty_or_truncated_text(policy: Policy, recipe: str):
    """However many agree on it and whatever it would answer, it earns 0; a well-formed trajectory never earns less."""
    config = config_of(recipe)
    good = written(solution("7"))
    for what, bad in MALFORMED.items():
        for step in (1, LAST):
            for malformed in range(1, 6):
                episode = pay(policy, config, [bad] * malformed + [good] * (5 - malformed), step)
                assert set(episode.rewards[:malformed]) == {0.0}, what
                assert not any(reward[i] for reward in episode.reward_parts.values() for i in range(malformed)), what
                assert min(episode.rewards[malformed:], default=0.0) >= 0.0
                if 5 - malformed >= 2:
                    assert min(episode.rewards[malformed:]) > 0.0, what
                # N counts the unreadable ones too: their silence is no agreement.
                assert episode.majority_fraction == pytest.approx((5 - malformed) / 5)
                assert (episode.proposer_reward > 0) == (5 - malformed >= 2), what


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_reward_for_a_malformed_answer_that_would_have_voted(policy: Policy, recipe: str):
    """Three cut off at 7 against two readable ones at 3: the 7s cast no vote, so 3 is the majority."""
    cut = written(solution("7"), "length")
    episode = pay(policy, config_of(recipe), [cut, cut, cut, solution("3"), solution("3")])
    assert episode.majority_answer == "number:3"
    assert episode.rewards[:3] == (0.0, 0.0, 0.0)
    assert min(episode.rewards[3:]) > 0


def test_fewer_than_two_readable_trajectories_earn_the_proposer_nothing(policy: Policy):
    # H would be 0 in both cases, and exp(−0.81 / 0.245) = 0.036659 is what unanimity earns.
    assert pay(policy, config_of(), ["?", "?", solution("7")]).proposer_reward == 0.0
    assert pay(policy, config_of(), ["?", solution("7"), solution("7")]).proposer_reward == pytest.approx(
        0.036659, abs=1e-6
    )


def test_an_unreadable_question_earns_nothing(policy: Policy):
    """Even with a group that would have paid: and its group is empty."""
    bad = Question("How tall?", "", "no closed <question>")
    player = selfplay(policy)
    group = [written(t) if isinstance(t, str) else t for t in GROUP]
    assert player.reward(LAST, ("a", 0), bad, None, group, read(group), None).proposer_reward == 0.0
    episode = player.reward(LAST, ("a", 0), bad, written("How tall?"), [], (), None)
    assert (episode.proposer_reward, episode.rewards, episode.trajectories) == (0.0, (), ())
    assert (episode.majority_answer, episode.majority_fraction, episode.answer_entropy) == (None, 0.0, 0.0)


def test_lettered_options_of_the_question_count(policy: Policy):
    question = Question("Which is tallest? A) red B) blue", "", None)
    completions = [written(solution(answer)) for answer in ("A", "A. red", "blue")]
    episode = selfplay(policy).reward(1, ("a", 0), question, None, completions, read(completions), None)
    assert episode.answer_keys == ("option:A", "option:A", "option:B")


def test_a_random_reward_does_not_read_the_text(policy: Policy):
    config = config_of("random-reward")
    first = pay(policy, config, [solution("7"), solution("7"), solution("3")]).rewards
    other = pay(policy, config, [solution("yes", "One."), solution("no", "Two.", "Three."), solution("blue")]).rewards
    assert first == other
    assert len(set(first)) == 3
    assert all(0 < reward < 1 for reward in first)
    # The unreadable one earns 0, and the others what they would have earned beside a readable one.
    assert pay(policy, config, [solution("7"), "?", solution("3")]).rewards == (first[0], 0.0, first[2])
    assert set(pay(policy, config, [solution("7")] * 3, step=2).rewards).isdisjoint(first)
    assert set(pay(policy, config_of("random-reward", seed=1), [solution("7")] * 3).rewards).isdisjoint(first)


def test_the_oracle_pays_for_the_truth(policy: Policy):
    config = config_of("oracle")
    texts = [solution("3"), solution("3"), solution("7.0"), "7"]
    assert pay(policy, config, texts, truth="7").rewards == (0.0, 0.0, 1.0, 0.0)
    assert pay(policy, config, texts, truth="three").rewards == (1.0, 1.0, 0.0, 0.0)
    assert pay(policy, config, texts, truth=None).rewards == (0.0, 0.0, 0.0, 0.0)


# --- a played step ---------------------------------------------------------------------------------------------------


def named(pictures: Sequence[Image.Image]) -> list[tuple[str, Image.Image]]:
    return [(f"{i}.png", picture) for i, picture in enumerate(pictures)]


def test_a_played_step_is_complete_and_repeats(policy: Policy, pictures: list[Image.Image]):
    play = selfplay(policy).play(1, named(pictures[:3]))
    asked = [e for e in play.episodes if e.question.well_formed]
    assert len(play.episodes) == 3
    assert asked, "the shipped model wrote no readable question for any of three images"
    assert play.proposer_prompts is not None
    assert play.solver_prompts is not None
    assert (len(play.proposer_prompts), len(play.solver_prompts)) == (3, len(asked))
    for i, episode in enumerate(play.episodes):
        assert (episode.step, episode.image) == (1, f"{i}.png")
        assert episode.question_completion is not None
        size = 3 if episode.question.well_formed else 0
        for parallel in (episode.trajectories, episode.completions, episode.answer_keys, episode.rewards):
            assert len(parallel) == size
        assert [len(part) for part in episode.reward_parts.values()] == [size, size]
        assert all(0 <= reward <= 1 for reward in (*episode.rewards, episode.proposer_reward))
    # Nothing is carried: not by the player, not by torch's or numpy's generators.
    torch.manual_seed(123)
    np.random.seed(123)
    again = selfplay(load()).play(1, named(pictures[:3]))
    assert again.episodes == play.episodes
    other = selfplay(policy).play(2, named(pictures[:3]))
    assert [e.question_completion for e in other.episodes] != [e.question_completion for e in play.episodes]


def test_an_image_plays_the_same_alone_and_with_others(policy: Policy, pictures: list[Image.Image]):
    batch = named([pictures[0], pictures[1].resize((112, 56)), pictures[2]])
    player = selfplay(policy)
    together = player.play(1, batch).episodes
    turned = player.play(1, batch[::-1]).episodes[::-1]
    for i, item in enumerate(batch):
        alone = player.play(1, [item]).episodes[0]
        for other in (together[i], turned[i]):
            assert alone.question == other.question
            assert [c.text for c in alone.completions] == [c.text for c in other.completions]
            assert alone.rewards == pytest.approx(other.rewards)


def test_what_was_sampled_is_what_is_trained(policy: Policy, pictures: list[Image.Image]):
    """Prompts and completions stay side by side, from play to update, where some questions went unanswered."""
    labels = {"0.png": [("How many objects are there?", "3")], "2.png": [("Which row is the longest?", "red")]}
    play = selfplay(policy, config_of("oracle"), labels).play(1, named(pictures[:3]))
    groups = [e.completions for e in play.episodes if e.completions]
    assert [e.image for e in play.episodes if e.completions] == ["0.png", "2.png"]
    assert play.solver_prompts is not None
    learner = Learner(policy, "solver", learning_rate=1e-3)
    learner.max_grad_norm = 0.0  # look, but do not touch
    learner.optimizer = torch.optim.SGD(learner.parameters.values(), lr=0.0)  # type: ignore[assignment]
    rewards_of = [e.rewards for e in play.episodes if e.completions]
    assert learner.update(play.solver_prompts, groups, rewards_of)["sampler_gap"] < 1e-4
    assert learner.update(play.solver_prompts, groups[::-1], rewards_of)["sampler_gap"] > 1e-2


def test_no_repeated_work_in_a_step(make_policy: MakePolicy, pictures: list[Image.Image], monkeypatch: Any):
    """Each image once through the image processor and the vision tower, each prompt run once for each role.

    The update adds one pass over the prompts for the policy and one for the reference, and no look at the images.
    """
    policy = make_policy()
    calls: Counter[str] = Counter()
    prompt_rows: list[int] = []
    processor = type(policy.processor.image_processor)
    run_processor = processor.__call__

    def counted_processor(self: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        calls["processor"] += 1
        calls["images"] += len(images)
        return run_processor(self, images, *args, **kwargs)

    def count_vision(module: Any, args: Any) -> None:
        calls["vision"] += 1

    def count_prompts(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows, width = kwargs["position_ids"].shape[-2:]
        mask = kwargs["attention_mask"]  # None: a shared cache has its own
        if mask is not None and width == mask.shape[1]:  # nothing is cached yet
            prompt_rows.append(rows)

    monkeypatch.setattr(processor, "__call__", counted_processor)
    policy.backbone.model.visual.register_forward_pre_hook(count_vision)
    policy.backbone.model.language_model.register_forward_pre_hook(count_prompts, with_kwargs=True)
    play = selfplay(policy).play(1, named(pictures[:3]))
    groups = [e.completions for e in play.episodes if e.completions]
    assert groups
    assert calls == {"processor": 3, "images": 3, "vision": 3}
    assert prompt_rows == [3, len(groups)]  # the proposer's, then the solver's: rows are prompts, not trajectories
    prompt_rows.clear()
    assert play.solver_prompts is not None
    Learner(policy, "solver", learning_rate=1e-4).update(
        play.solver_prompts, groups, [e.rewards for e in play.episodes if e.completions]
    )
    assert prompt_rows == [len(groups), len(groups)]  # policy, reference
    assert calls == {"processor": 3, "images": 3, "vision": 3}


def test_an_image_played_twice_in_a_step_draws_differently(babbler: Policy, pictures: list[Image.Image]):
    twice = [("a.png", pictures[0]), ("a.png", pictures[0])]
    first, second = selfplay(babbler).play(1, twice).episodes
    assert first.question_completion is not None
    assert second.question_completion is not None
    assert first.question_completion.token_ids != second.question_completion.token_ids
    labels = {"a.png": [("How many objects are there?", "3")]}
    first, second = selfplay(babbler, config_of("oracle"), labels).play(1, twice).episodes
    assert len({c.token_ids for c in (*first.completions, *second.completions)}) == 6
    # The first of the two is still what it is alone.
    alone = selfplay(babbler, config_of("oracle"), labels).play(1, twice[:1]).episodes[0]
    assert [c.text for c in alone.completions] == [c.text for c in first.completions]


def test_draws_differ_by_seed_step_image_and_purpose(policy: Policy):
    player, other = selfplay(policy), selfplay(policy, config_of(seed=1))
    seeds = [tuple(player.seed(step, key, purpose)) for step in (1, 2) for key in (("a", 0), ("a", 1), ("b", 0))
             for purpose in range(4)]  # fmt: skip
    seeds.append(tuple(other.seed(1, ("a", 0), 0)))
    seeds.append(tuple(player.seed(1, ("\udcff", 0), 0)))  # a file name that is not UTF-8
    assert len(set(seeds)) == len(seeds)


def test_unreadable_questions_are_not_solved(policy: Policy, pictures: list[Image.Image]):
    play = selfplay(policy, config_of(max_question_tokens=2)).play(1, named(pictures[:2]))  # all cut off
    assert play.solver_prompts is None
    for episode in play.episodes:
        assert episode.question.problem == "cut off before the end token"
        assert (episode.completions, episode.rewards, episode.proposer_reward) == ((), (), 0.0)


def test_labels_replace_the_proposer(policy: Policy, pictures: list[Image.Image]):
    labels = {
        "0.png": [("How many objects are there?", "3"), ("How many bars are there?", "4")],
        "2.png": [("Which row is the longest?", "red")],
    }
    player = selfplay(policy, config_of("oracle"), labels)
    play = player.play(1, named(pictures[:3]))
    assert play.proposer_prompts is None
    assert play.solver_prompts is not None
    assert len(play.solver_prompts) == 2
    zero, one, two = play.episodes
    assert one.question.problem == "no label for this image"
    assert (one.completions, one.rewards, one.proposer_reward) == ((), (), 0.0)
    assert zero.question.text in {text for text, _ in labels["0.png"]}
    assert two.question.text == "Which row is the longest?"
    for episode in (zero, two):
        assert episode.question_completion is None
        assert len(episode.completions) == 3
        truth = "text:red" if episode is two else f"number:{dict(labels['0.png'])[episode.question.text]}"
        assert episode.rewards == tuple(float(key == truth) for key in episode.answer_keys)
    # Which label is asked is drawn anew at each step, and all of them are asked in time.
    picked = {player.pick_label(step, ("0.png", 0))[0].text for step in range(1, 20)}
    assert picked == {text for text, _ in labels["0.png"]}
    assert player.pick_label(1, ("0.png", 0)) == player.pick_label(1, ("0.png", 0))


def test_records_of_an_episode_do_not_change(policy: Policy):
    episode = pay(policy, config_of(), GROUP)
    with pytest.raises(AttributeError):
        episode.proposer_reward = 1.0  # type: ignore[misc]
    assert replace(episode, proposer_reward=1.0).proposer_reward == 1.0


def test_a_question_with_an_image_token_is_unreadable(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch):
    """Some models' image token is no markup; pasted into a prompt it would stand for a second image."""
    policy = make_policy()
    monkeypatch.setattr(policy.processor, "image_token", "[IMG]")
    completion = Completion("<question>What is in [IMG]?</question>", (1,), (0.0,), "stop")
    question = selfplay(policy).read_question(completion)
    assert question.problem == "an image token inside the question"
    other = Completion("<question>What is in IMG?</question>", (1,), (0.0,), "stop")
    assert selfplay(policy).read_question(other).well_formed
