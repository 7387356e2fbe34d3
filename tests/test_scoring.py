"""What texts earn: every recipe on hand-written groups, through `score_group`, the one place that rewards."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import pytest
import yaml

from ireasoner.method import rewards
from ireasoner.method.answers import majority
from ireasoner.method.memory import RecentSteps, step_digest
from ireasoner.method.recipe import PUBLISHED, REWARDS, Recipe
from ireasoner.method.scoring import (
    BUILT_IN,
    Context,
    Group,
    RewardError,
    RewardFunction,
    ScoredGroup,
    read_group,
    score_group,
    step_weight,
)
from ireasoner.method.texts import parse_trajectory
from ireasoner.method.types import Completion, FinishReason, Solution, TokenDistributions
from ireasoner.model.inputs import embed_texts
from ireasoner.model.policy import Policy
from ireasoner.training.config import Config, names, resolve
from models import load

RECIPES = [name for name in names("recipes") if name != "oracle"]
QUESTION = "How tall is the red bar?"
LAST = 10  # steps of the runs below
SEEN, BLIND = 0.75, 0.25  # the probability of every token with the image and without it, unless a test says otherwise


def config_of(recipe: str = "paper", **flags: Any) -> Config:
    labels = {"labels": "labels.jsonl"} if recipe == "oracle" else {}
    return resolve({"images": "images", "model": "tiny", "recipe": recipe, "steps": LAST, **labels, **flags})


@pytest.fixture(scope="module")
def policy() -> Policy:
    """The model as it ships, of which the embeddings are read."""
    return load()


def written(text: str, finish_reason: FinishReason = "stop") -> Completion:
    return Completion(text, (1,), (0.0,), finish_reason)


def solution(answer: str, *steps: str) -> str:
    lines = "\n".join(f"Step {i}: {step}" for i, step in enumerate(steps or ("The red bar reaches 7.",), 1))
    return f"<think>{lines}</think><answer>{answer}</answer>"


def words_of(text: str) -> list[str]:
    """A text in tokens: its words."""
    return re.findall(r"\S+\s*", text) or [""]


def values(paid: ScoredGroup, part: str) -> list[float]:
    """What each trajectory has as a part of its reward."""
    return [t.parts[part].value for t in paid.trajectories]


def pay(
    policy: Policy,
    config: Config,
    texts: Sequence[str | Completion],
    step: int = LAST,
    question: str = QUESTION,
    **context: Any,
) -> ScoredGroup:
    """`score_group` with the context that self-play would give it."""
    completions = [written(text) if isinstance(text, str) else text for text in texts]
    tokens = [words_of(c.text) for c in completions]
    given: dict[str, Any] = {
        "finish_reasons": [c.finish_reason for c in completions],
        "step_weight": step_weight(config.recipe, step, LAST),
        "embed": lambda texts: embed_texts(policy, texts, config.recipe.max_step_tokens),
        "recent_steps": [],
        "seed": (config.seed, step),
        "tokens": tokens,
        "logprobs": [[math.log(SEEN)] * len(each) for each in tokens],
        "blank_logprobs": lambda: [[math.log(BLIND)] * len(each) for each in tokens],
        "distributions": lambda: [TokenDistributions((0.5,), (1.5,))] * len(completions),
        # The later a text comes, the likelier it is, and masked images make all less likely.
        "likelihoods": lambda texts, view="same": [(-1.0 / (1 + i) - (view == "masked"),) for i in range(len(texts))],
        **context,
    }
    if config.recipe.other_view:  # in which all answer as they do here
        solutions = [parse_trajectory(c.text, c.finish_reason) for c in completions]
        given.setdefault("other_view", read_group(question, solutions))
    return score_group(question, [c.text for c in completions], config.recipe, Context(**given))


# --- answers without a vote -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("answer", ["A or B", "(A) is wrong; B", "not A", "red, or maybe blue", "I cannot tell."])
def test_hedges_and_denials_cast_no_vote_and_earn_nothing(policy: Policy, recipe: str, answer: str) -> None:
    question = "Which colour is the bar? A. red B. blue C. green"
    hedges = [solution(answer, "The bar is red.", "The bar may be blue.")] * 5
    paid = pay(policy, config_of(recipe), hedges, question=question)
    assert paid.vote == majority([None] * 5)
    assert paid.rewards == (0.0,) * 5
    assert paid.proposer_reward == 0.0
    assert {t.problem for t in paid.trajectories} == {"the answer does not commit itself"}


def test_a_hedge_leaves_the_votes_of_the_others_alone(policy: Policy) -> None:
    texts = [solution("7"), solution("7 or 8"), solution("7"), solution("8"), solution("7, maybe 8")]
    paid = pay(policy, config_of("discrete"), texts)
    assert (paid.vote.answer, paid.vote.members, paid.vote.readable) == ("number:7", (0, 2), 3)
    assert paid.rewards == (1.0, 0.0, 1.0, 0.0, 0.0)


# --- recipes ---------------------------------------------------------------------------------------------------------

DEFAULT_KL = {"kl_coef": 0.03, "kl_rate": 0.0}
DIFFERENCES_FROM_PAPER: dict[str, dict[str, Any]] = {
    "covo": {"reward": "covo", "advantage": "rloo", **DEFAULT_KL},
    "default": {
        "advantage": "rloo", "step_measure": "grounding", "recurrence_window": 128, "step_weight_initial": 0.5,
        "step_weight_final": 0.5, "kl_coef": 0.03, "kl_rate": 0.0,
    },
    "answers-only": {"advantage": "rloo", "step_weight_final": 0.0, "kl_coef": 0.03, "kl_rate": 0.0},
    "co-rewarding": {"reward": "co_rewarding", "other_view": True, "advantage": "grpo", **DEFAULT_KL},
    "discrete": {"reward": "discrete"},
    "em-sequence": {"reward": "em_sequence", "advantage": "rloo", **DEFAULT_KL},
    "em-token": {"reward": "em_token", "advantage": "rloo", **DEFAULT_KL},
    "empo": {"reward": "empo", "advantage": "grpo", **DEFAULT_KL},
    "evol-rl": {"reward": "evol_rl", "advantage": "grpo", **DEFAULT_KL},
    "evolmm": {"step_weight_final": 0.0, "length_penalty": 0.1, "target_words": 6},
    "format-only": {"reward": "format"},
    "frozen-proposer": {"train_proposer": False},
    "intuitor": {"reward": "intuitor", "advantage": "grpo", **DEFAULT_KL},
    "no-density": {"density_exponent": 0.0},
    "no-position-decay": {"position_decay": 0.0},
    "no-warmup": {"step_weight_warmup": 0.0},
    "oracle": {"reward": "oracle", "advantage": "rloo", "train_proposer": False},
    "outcome-only": {"step_weight_final": 0.0},
    "paper": {},
    "papo": {"reward": "papo", "advantage": "rloo", **DEFAULT_KL},
    "r-zero": {"reward": "r_zero", "advantage": "grpo", "gate_low": 0.25, "gate_high": 0.75, **DEFAULT_KL},
    "random-reward": {"reward": "random"},
    "restrain": {"reward": "restrain", "advantage": "rloo", **DEFAULT_KL},
    "sarl": {"reward": "sarl", "advantage": "grpo", **DEFAULT_KL},
    "spine": {"reward": "ttrl", "advantage": "grpo", "token_share": 0.2, **DEFAULT_KL},
    "step-only": {"step_weight_initial": 1.0, "step_weight_final": 1.0},
    "ttrl": {"reward": "ttrl", "advantage": "grpo", **DEFAULT_KL},
    "ttrv": {"reward": "ttrv", "advantage": "grpo", **DEFAULT_KL},
}  # fmt: skip


def test_the_paper_recipe_is_the_published_run():
    paper = config_of("paper").flat()
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
    paper, other = config_of("paper").flat(), config_of(recipe).flat()
    differences = {name: value for name, value in other.items() if value != paper[name]}
    for of_the_run in ("recipe", "labels"):
        differences.pop(of_the_run, None)
    assert differences == DIFFERENCES_FROM_PAPER[recipe]
    named = yaml.safe_load(
        resources.files("ireasoner.training").joinpath("recipes", f"{recipe}.yaml").read_text("utf-8")
    )
    assert set(differences) <= set(named)
    assert named.items() <= other.items()


# --- what is said of every image ------------------------------------------------------------------------------------


def group_of(*texts: str) -> list[Solution]:
    return [parse_trajectory(text) for text in texts]


def recurrence(memory: RecentSteps, image: str, steps: Sequence[str]) -> list[float]:
    return rewards.recurrence([step_digest(step) for step in steps], memory.of_others(image)).tolist()


def test_recurrence_is_the_share_of_other_images_groups_that_say_the_same():
    memory = RecentSteps(3)
    memory.add("a", group_of(solution("7", "The red bar reaches 7."), solution("6", "The red bar reaches 6.")))
    memory.add("b", group_of(solution("7", "the red bar reaches 7")))
    memory.add("c", group_of("<answer>7</answer>", "Step 1: The red bar reaches 7."))  # unreadable: says nothing
    assert recurrence(memory, "d", ["The red bar reaches 7.", "The red bar reaches 6."]) == [1.0, 0.5]
    assert recurrence(memory, "a", ["The red bar reaches 7.", "The red bar reaches 6."]) == [1.0, 0.0]
    for i in range(2):
        memory.add("e", group_of(solution("1", f"The blue bar reaches {i}.")))
    assert recurrence(memory, "d", ["The red bar reaches 6."]) == [0.0]  # a is forgotten: 3 are remembered
    assert recurrence(RecentSteps(0), "d", ["The red bar reaches 7."]) == [0.0]


def test_a_memory_survives_its_state():
    memory = RecentSteps(3)
    for name in "ab":
        memory.add(name, group_of(solution("7", "The red bar reaches 7.")))
    again = RecentSteps(3)
    again.restore(json.loads(json.dumps(memory.state())))
    assert again.state() == memory.state()
    assert again.of_others("") == memory.of_others("")
    assert recurrence(again, "c", ["The red bar reaches 7."]) == [1.0]


def test_boilerplate_with_a_constant_answer_does_not_pay(policy: Policy):
    """Said of every image, it earns nothing; the same group of true readings earns nearly all."""
    config, memory = config_of("default"), RecentSteps(128)
    boilerplate = [solution("yes", "I look at the image carefully.", "Therefore the answer follows.")] * 3
    readings = [solution("7", "The red bar reaches 7."), solution("7", "Red is at 7."), solution("6", "Red is at 6.")]
    for i in range(64):
        memory.add(f"{i}.png", group_of(*boilerplate))

    def earned(texts: list[str]) -> tuple[float, ...]:
        memory.add("new.png", group_of(*texts))
        return pay(policy, config, texts, recent_steps=memory.of_others("new.png")).rewards

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
    "evolmm": [0.0] * 10,
    "default": [0.5] * 10,
}


@pytest.mark.parametrize("recipe", names("recipes"))
def test_weight_of_step_agreement_over_training(recipe: str):
    config = config_of(recipe)
    assert [step_weight(config.recipe, t, LAST) for t in range(1, LAST + 1)] == pytest.approx(
        SCHEDULES.get(recipe, SCHEDULES["paper"])
    )


# --- what a group earns ----------------------------------------------------------------------------------------------

# Three of five answer 7, one 3, one cannot be read; all readable ones reason alike, so that s = 1.
# r_out = 0.6^0.7 = 0.699368 and 0.2^0.7 = 0.324131; r_step = 0.6^0.7 and 0. At the last step λ = 0.7:
# default: λ = 0.5, and the image makes every step likelier by 0.75 − 0.25: 0.5 · 0.699368 + 0.25 and the like.
# 7: 0.3 · 0.699368 + 0.7 · 0.699368; 3: 0.3 · 0.324131 = 0.097239. No density: 0.3 · 0.699368 + 0.7 = 0.909810.
GROUP = [solution("7"), solution("3"), "I say 7", solution("7"), solution("7.0")]
PAPER_PAY = (0.699368, 0.097239)
EARNED = {
    "answers-only": (0.699368, 0.324131),
    "default": (0.599684, 0.412066),
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
    paid = pay(policy, config_of(recipe), GROUP)
    most, few = EARNED[recipe]
    assert paid.rewards == pytest.approx([most, few, 0.0, most, most], abs=1e-6)
    # The parts are told apart, whatever the recipe makes of them.
    density = 1.0 if recipe == "no-density" else 0.699368
    assert values(paid, "outcome") == pytest.approx([0.699368, 0.324131, 0, 0.699368, 0.699368], abs=1e-6)
    agreement = [0.5, 0.5, 0, 0.5, 0.5] if recipe == "default" else [density, 0, 0, density, density]
    assert values(paid, "step_agreement") == pytest.approx(agreement, abs=1e-6)
    assert [t.answer_key for t in paid.trajectories] == ["number:7", "number:3", None, "number:7", "number:7"]
    assert (paid.vote.answer, paid.vote.fraction) == ("number:7", pytest.approx(0.6))
    # H over the four readable votes, 3–1: −¾ ln ¾ − ¼ ln ¼ = 0.562335;
    # proposer: (0.562335 − 0.90)² / 0.245 = 0.114018 / 0.245 = 0.465378, e^−0.465378 = 0.627898.
    assert paid.vote.entropy == pytest.approx(0.562335, abs=1e-6)
    assert paid.proposer_reward == pytest.approx(0.627898, abs=1e-5)


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
    paid = pay(policy, config, texts)
    keys = ["number:7", "number:7", "number:3"]
    words = [len(text.partition("<answer>")[0].split()) for text in texts]
    outcome = rewards.outcome_rewards(keys, words, exponent=1.3, length_penalty=0.5, target_words=4)
    steps = [embed_texts(policy, t.reasoning_steps, max_tokens=3) for t in paid.trajectories]
    agreement = rewards.step_agreement_rewards(
        keys, steps, density_exponent=0.4, position_decay=0.9, max_reasoning_steps=2
    )
    assert 0 < agreement[0] < 0.999 * (2 / 3) ** 0.4  # the two reason differently
    assert values(paid, "outcome") == pytest.approx(outcome)
    assert values(paid, "step_agreement") == pytest.approx(agreement)
    assert paid.rewards == pytest.approx(0.4 * outcome + 0.6 * agreement)
    assert paid.proposer_reward == pytest.approx(rewards.proposer_reward(paid.vote.entropy, target=0.2, width=0.5))


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_step_scores_explain_the_step_agreement(policy: Policy, recipe: str):
    texts = [
        solution("7", "The red bar reaches 7.", "The red bar reaches 7.", "So the answer is 7."),
        solution("7", "The blue bar reaches 3.", "The red bar reaches 7."),
        solution("3", "The red bar reaches 3."),
        "nothing",
    ]
    config = config_of(recipe)
    paid = pay(policy, config, texts)
    assert [len(t.step_scores) for t in paid.trajectories] == [3, 2, 1, 0]
    for i, trajectory in enumerate(paid.trajectories):
        scores = trajectory.step_scores
        counted = [(j, s.score) for j, s in enumerate(scores) if s.score is not None]
        if recipe == "default":  # r_step = mean of s (1 − f); what is said again is not counted
            assert all(s.score == pytest.approx(s.similarity * (1 - s.recurrence)) for s in scores if s.score)
            expected = np.mean([score for _, score in counted]) if counted else 0.0
        else:  # r_step = (|G|/N)^γd Σ ω s / Σ ω
            weights = [math.exp(-config.recipe.position_decay * j) for j, _ in counted]
            expected = (
                0.5**config.recipe.density_exponent * np.average([s for _, s in counted], weights=weights)
                if counted
                else 0
            )
        assert values(paid, "step_agreement")[i] == pytest.approx(expected)
    if recipe == "default":
        first = paid.trajectories[0].step_scores
        assert [s.score is None for s in first] == [False, True, False]
    else:
        assert [s.score for s in paid.trajectories[2].step_scores] == [None]  # outside the majority
        assert paid.trajectories[2].step_scores[0].similarity is not None


BARS = "How much taller is the red bar than the blue bar?"
SHOWN = ("7", "3")  # the heights that the image shows
READING = solution("4", "The red bar reaches 7.", "The blue bar reaches 3.", "7 - 3 = 4.")
WRONG = solution("4", "The red bar reaches 8.", "The blue bar reaches 5.")
PLAN = solution("4", "Identify the bars.", "Compare the heights.")


def seen_and_blind(text: str) -> tuple[list[float], list[float]]:
    """How likely the words of a text are to a model that sees the heights, and to one that does not.

    A height that the image shows, and no other one, is likelier with it. What was said before, in the text or in the
    question, and all other words are as likely without it.
    """
    seen, blind, said = [], [], text[:0]
    for word in words_of(text):
        number = "".join(filter(str.isdigit, word.partition("<")[0]))
        new = bool(number) and number not in said and not word.endswith(": ")  # not "Step 1: "
        seen.append((0.75 if number in SHOWN else 0.05) if new else 0.75)
        blind.append(0.15 if new else 0.75)
        said += number
    return [math.log(p) for p in seen], [math.log(p) for p in blind]


def pay_sighted(policy: Policy, texts: Sequence[str]) -> ScoredGroup:
    """What `default` pays texts about the two bars if the model sees them."""
    found = [seen_and_blind(text) for text in texts]
    seen, blind = [each for each, _ in found], [each for _, each in found]
    return pay(policy, config_of("default"), texts, question=BARS, logprobs=seen, blank_logprobs=lambda: blind)


@pytest.mark.parametrize(
    "vague",
    [
        PLAN,
        solution("4", "Let me look at the chart.", "The image shows a chart with data.", "Now find the answer."),
        solution("4", "Schauen wir uns das Bild genau an.", "Alle Werte stehen an der Achse."),
        solution("4", "There are a red bar and a blue bar."),
    ],
    ids=["plan", "boilerplate", "German", "question"],
)
def test_what_fits_every_image_earns_no_step_agreement(policy: Policy, vague: str):
    """However many say it: it is as likely without the image. Beside it, a reading earns what it earns alone."""
    paid, alone = pay_sighted(policy, [vague, vague, vague, READING]), pay_sighted(policy, [READING])
    assert values(paid, "step_agreement") == pytest.approx([0, 0, 0, values(alone, "step_agreement")[0]])
    assert values(paid, "step_agreement")[3] > 0.1
    assert paid.rewards[:3] == pytest.approx([0.5] * 3)  # half of the outcome, on which all of them agree
    assert paid.rewards[3] > 0.55


def test_a_wrong_number_earns_no_step_agreement(policy: Policy):
    """Nor does it where all say it, whose words are those of the right one."""
    paid = pay_sighted(policy, [WRONG, WRONG, WRONG, READING])
    assert values(paid, "step_agreement")[:3] == [0.0, 0.0, 0.0]
    assert paid.rewards[3] > max(paid.rewards[:3])


def test_what_repeats_or_follows_earns_nothing_more(policy: Policy):
    """A reading that is said again, and the answer announced at the end."""
    red = "The red bar reaches 7."
    texts = [solution("7", red), solution("7", red, red, red), solution("7", red, "So the answer is 7.")]
    once, again, announced = values(pay_sighted(policy, texts), "step_agreement")
    assert once == pytest.approx(0.75 - (0.75**4 * 0.15) ** (1 / 5))
    assert again == pytest.approx(once)
    assert announced == pytest.approx(once / 2)


def test_a_plan_that_was_said_of_other_images_earns_nothing_at_all(policy: Policy):
    said = [frozenset(step_digest(step) for step in ("Identify the bars.", "Compare the heights."))]
    assert pay(policy, config_of("default"), [PLAN] * 5, question=BARS, recent_steps=said).rewards == (0.0,) * 5


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_notes_say_what_each_factor_was_computed_from(policy: Policy, recipe: str):
    red, blue = "The red bar reaches 7.", "The blue bar reaches 3."
    paid = pay(
        policy, config_of(recipe), [solution("7", red, blue), solution("7", red, blue), solution("3"), "nothing"]
    )
    outcome, agreement = ([t.parts[name] for t in paid.trajectories] for name in ("outcome", "step_agreement"))
    votes = ["(2/4)^0.7", "(2/4)^0.7", "(1/4)^0.7", "unreadable, no vote"]
    assert [part.notes["share of the vote"] for part in outcome] == votes
    assert outcome[0].factors["share of the vote"] == pytest.approx((2 / 4) ** 0.7)
    assert outcome[3].notes["length"] == "words before the answer: 1"
    assert agreement[3].notes["mean of its steps"] == "no step that counts"
    if recipe == "default":
        assert agreement[0].notes == {"mean of its steps": "of 0.5000, 0.5000"}
        assert agreement[0].factors == {"mean of its steps": pytest.approx(0.5)}
    else:
        weighed = "of 1.0000 (weight 1), 1.0000 (weight 0.8607)"
        assert agreement[0].notes == {"share of the majority": "(2/4)^0.7", "mean of its steps": weighed}
        assert agreement[2].notes["mean of its steps"] == "no step that counts"  # outside the majority


@pytest.mark.parametrize("recipe", [*RECIPES, "oracle"])
@pytest.mark.parametrize("step", [1, LAST])
def test_every_reward_is_the_sum_of_its_recorded_parts(policy: Policy, recipe: str, step: int):
    """Whatever a recipe pays, its parts add up to it, and a part with factors is their product."""
    texts = [
        solution("7", "The red bar reaches 7.", "So it is 7.", "That is all of it.", *["And more."] * 6),
        solution("7", "The blue bar reaches 3.", "The red bar reaches 7.", "Nothing more is there."),
        solution("7", "The red bar reaches 7."),
        solution("3", "The red bar reaches 3."),
        "nothing",
    ]
    config = config_of(recipe, target_words=9, length_penalty=0.3, target_entropy=0.6)
    truth = {"true_answer": "7"} if recipe == "oracle" else {}
    paid = pay(policy, config, texts, step, recent_steps=[frozenset({step_digest("And more.")})], **truth)
    for t in paid.trajectories:
        assert t.reward == pytest.approx(sum(part.weight * part.value for part in t.parts.values()), abs=1e-12)
        for part in t.parts.values():
            assert not part.factors or part.value == pytest.approx(math.prod(part.factors.values()), abs=1e-12)
        assert {"outcome", "step_agreement"} <= set(t.parts)  # recorded under every recipe
        if config.recipe.reward != "agreement":
            assert (t.parts["outcome"].weight, t.parts["step_agreement"].weight) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("recipe", "equation"),
    [
        ("paper", "outcome_rewards"),
        ("paper", "step_agreement_rewards"),
        ("paper", "prototype_rewards"),
        ("paper", "solver_rewards"),
        ("default", "outcome_rewards"),
        ("default", "novelty_factors"),
        ("default", "supported_step_rewards"),
        ("default", "solver_rewards"),
        ("format-only", "readable_rewards"),
        ("random-reward", "random_rewards"),
        ("oracle", "true_answer_rewards"),
    ],
)
def test_the_equations_are_those_that_train(policy: Policy, monkeypatch: Any, recipe: str, equation: str):
    """Whoever edits one of them changes what is paid: here each is made to give half of what it gives."""
    before = pay(policy, config_of(recipe), PLAIN, true_answer="7").rewards
    whole = getattr(rewards, equation)
    monkeypatch.setattr(rewards, equation, lambda *args, **kwargs: 0.5 * whole(*args, **kwargs))
    after = pay(policy, config_of(recipe), PLAIN, true_answer="7").rewards
    assert after[0] < 0.9 * before[0]


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
                paid = pay(policy, config, [bad] * malformed + [good] * (5 - malformed), step)
                assert set(paid.rewards[:malformed]) == {0.0}, what
                assert not any(part.value for t in paid.trajectories[:malformed] for part in t.parts.values()), what
                assert min(paid.rewards[malformed:], default=0.0) >= 0.0
                if 5 - malformed >= 2:
                    assert min(paid.rewards[malformed:]) > 0.0, what
                # N counts the unreadable ones too: their silence is no agreement.
                assert paid.vote.fraction == pytest.approx((5 - malformed) / 5)
                assert (paid.proposer_reward > 0) == (5 - malformed >= 2), what


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_reward_for_a_malformed_answer_that_would_have_voted(policy: Policy, recipe: str):
    """Three cut off at 7 against two readable ones at 3: the 7s cast no vote, so 3 is the majority."""
    cut = written(solution("7"), "length")
    paid = pay(policy, config_of(recipe), [cut, cut, cut, solution("3"), solution("3")])
    assert paid.vote.answer == "number:3"
    assert paid.rewards[:3] == (0.0, 0.0, 0.0)
    assert min(paid.rewards[3:]) > 0


def test_fewer_than_two_readable_trajectories_earn_the_proposer_nothing(policy: Policy):
    # H would be 0 in both cases, and exp(−0.81 / 0.245) = 0.036659 is what unanimity earns.
    assert pay(policy, config_of(), ["?", "?", solution("7")]).proposer_reward == 0.0
    assert pay(policy, config_of(), ["?", solution("7"), solution("7")]).proposer_reward == pytest.approx(
        0.036659, abs=1e-6
    )


@pytest.mark.parametrize("recipe", [*RECIPES, "oracle"])
def test_no_texts_earn_nothing(policy: Policy, recipe: str):
    """As of an unreadable question, which is not asked."""
    paid = pay(policy, config_of(recipe), [])
    assert (paid.proposer_reward, paid.rewards, paid.trajectories) == (0.0, (), ())
    assert (paid.vote.answer, paid.vote.fraction, paid.vote.entropy) == (None, 0.0, 0.0)


def test_lettered_options_of_the_question_count(policy: Policy):
    texts = [solution(answer) for answer in ("A", "A. red", "blue")]
    paid = pay(policy, config_of(), texts, 1, "Which is tallest? A) red B) blue")
    assert [t.answer_key for t in paid.trajectories] == ["option:A", "option:A", "option:B"]


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
    assert pay(policy, config, texts, true_answer="7").rewards == (0.0, 0.0, 1.0, 0.0)
    assert pay(policy, config, texts, true_answer="three").rewards == (1.0, 1.0, 0.0, 0.0)
    with pytest.raises(RewardError, match=r"context\.true_answer"):
        pay(policy, config, texts, true_answer=None)
    # The truth is read as the answers are: as one of the question's options.
    options = "What colour is the bar? A) red B) blue"
    assert pay(policy, config, [solution("blue"), solution("A")], question=options, true_answer="B").rewards == (
        1.0,
        0.0,
    )


# --- what a recipe needs, and rewards of the user's own ---------------------------------------------------------------

PLAIN = [solution("7"), solution("7", "Red is at 7."), solution("3", "Red is at 3.")]


@pytest.mark.parametrize(
    ("recipe", "given", "lacking"),
    [
        ("paper", {}, "step_weight"),
        ("paper", {"step_weight": 0.5}, "embed"),
        ("default", {"step_weight": 0.5}, "recent_steps"),
        ("default", {"step_weight": 0.5, "recent_steps": []}, "logprobs"),
        ("random-reward", {}, "seed"),
        ("oracle", {}, "true_answer"),
    ],
)
def test_a_recipe_says_what_it_lacks(recipe: str, given: dict[str, Any], lacking: str):
    with pytest.raises(RewardError, match=rf"context\.{lacking}"):
        score_group(QUESTION, PLAIN, config_of(recipe).recipe, Context(**given))


def test_where_steps_weigh_nothing_answers_alone_are_enough():
    scored = score_group(QUESTION, GROUP, config_of("answers-only").recipe, Context(step_weight=0.0))
    most, few = EARNED["answers-only"]
    assert scored.rewards == pytest.approx([most, few, 0.0, most, most], abs=1e-6)
    assert values(scored, "step_agreement") == [0.0] * 5
    assert scored.trajectories[0].step_scores[0].score is None


@pytest.mark.parametrize("reward", ["discrete", "format"])
def test_a_reward_that_reads_only_texts_needs_no_context(reward: str):
    scored = score_group(QUESTION, PLAIN, Recipe(reward=reward))
    assert scored.rewards == ((1.0, 1.0, 0.0) if reward == "discrete" else (1.0, 1.0, 1.0))
    assert all(len(t.parts) == 1 for t in scored.trajectories)  # agreement could not be known


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("tags", "<think>Step 1: The red bar reaches 7.</think><answer>7</answer>"),
        ("boxed", "Step 1: The red bar reaches 7.\nThe answer is \\boxed{7}."),
        ("answer-line", "Step 1: The red bar reaches 7.\nAnswer: 7"),
    ],
)
def test_texts_are_read_in_the_contexts_form(form: Any, text: str):
    scored = score_group(QUESTION, [text, "nothing"], Recipe(reward="format"), Context(form=form))
    assert scored.rewards == (1.0, 0.0)
    assert [t.answer_key for t in scored.trajectories] == ["number:7", None]
    cut = score_group(QUESTION, [text], Recipe(reward="format"), Context(form=form, finish_reasons=["length"]))
    assert cut.rewards == (0.0,)


OWN = Recipe(reward="my_rewards.py:fn")


def pay_by(function: RewardFunction, texts: Sequence[str] = (*PLAIN, "nothing"), **context: Any) -> Any:
    return score_group(QUESTION, texts, OWN, Context(reward=function, **context))


def test_a_reward_of_ones_own_is_paid_and_recorded_under_its_own_names():
    def fn(group: Group, context: Context) -> dict[str, list[float | None]]:
        assert group.question == QUESTION
        assert group.answer_keys == ("number:7", "number:7", "number:3", None)
        assert group.texts == (*PLAIN, "nothing")
        return {"short": [0.5, 0.25, None, 9.0], "sure": [1.0, 1.0, 0.0, 9.0]}

    scored = pay_by(fn, step_weight=0.5, embed=lambda texts: np.ones((len(texts), 2)) / 2**0.5, recent_steps=[])
    assert scored.rewards == (1.5, 1.25, 0.0, 0.0)  # None: nothing; unreadable: nothing, whatever was given
    assert [{name: p.value for name, p in t.parts.items() if p.weight} for t in scored.trajectories] == [
        {"short": 0.5, "sure": 1.0}, {"short": 0.25, "sure": 1.0}, {"short": 0.0, "sure": 0.0},
        {"short": 0.0, "sure": 0.0},
    ]  # fmt: skip
    assert scored.trajectories[0].parts["outcome"].weight == 0.0  # known, but not paid


def test_a_reward_of_ones_own_may_say_what_the_question_earns():
    scored = pay_by(lambda group, context: {"a": [0.5] * 4, "proposer": 0.25})
    assert (scored.rewards, scored.proposer_reward) == ((0.5, 0.5, 0.5, 0.0), 0.25)
    assert set(scored.trajectories[0].parts) == {"a"}
    # Of fewer than two readable answers nothing can be said about the question, whoever says it.
    one = pay_by(lambda group, context: {"a": [0.5] * 2, "proposer": 0.25}, [PLAIN[0], "nothing"])
    assert one.proposer_reward == 0.0


def test_a_reward_of_ones_own_may_be_plain_numbers():
    scored = pay_by(lambda group, context: np.arange(len(group.solutions), dtype=np.float64))
    assert scored.rewards == (0.0, 1.0, 2.0, 0.0)
    assert set(scored.trajectories[0].parts) == {"reward"}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([1.0], "1 numbers as reward for 4 texts"),
        ([1.0, math.nan, 0.0, 0.0], "finite"),
        ([1.0, math.inf, 0.0, 0.0], "finite"),
        ([1.0, 1e300, 0.0, 0.0], "finite"),
        (["much", 0.0, 0.0, 0.0], "a number for each text"),
        (None, "a number for each text"),
        (7, "a number for each text"),
        ({"a": [0.0] * 4, "b": [0.0] * 3}, "3 numbers as b"),
        ("1234", "a number for each text"),
        ({0.0, 1.0, 2.0, 3.0}, "a number for each text"),
        ({"outcome": [0.0] * 4}, "called outcome, which has another meaning"),
        ({"total": [0.0] * 4}, "total"),
        ({}, "no part for the trajectories"),
        ({"proposer": 0.5}, "no part for the trajectories"),
        ({"a": [0.0] * 4, "proposer": [0.5] * 4}, "as proposer: it must be one number"),
        ({"a": [0.0] * 4, "proposer": math.nan}, "as proposer: it must be one number"),
        ({"a": [0.0] * 4, "proposer": 1e7}, "at most a million"),
    ],
)
def test_a_reward_of_ones_own_that_cannot_be_is_named(given: Any, named: str):
    with pytest.raises(RewardError, match=named) as caught:
        pay_by(lambda group, context: given)
    assert "my_rewards.py:fn" in str(caught.value)


def test_an_error_in_a_reward_of_ones_own_is_named():
    with pytest.raises(RewardError, match=r"my_rewards\.py:fn failed: ZeroDivisionError: division by zero$"):
        pay_by(lambda group, context: 1 / 0)
    with pytest.raises(RewardError, match=r"not iterable \(not known here: context\.logprobs, context\.tokens, "):
        pay_by(lambda group, context: [sum(each) for each in context.logprobs])


@pytest.mark.parametrize(
    ("texts", "context", "named"),
    [
        ("one text", {}, "a group of texts"),
        (PLAIN, {"finish_reasons": ["stop"]}, "1 entries for 3 texts"),
        (PLAIN, {"step_weight": 2.0}, "between 0 and 1"),
        (PLAIN, {"step_weight": math.nan}, "between 0 and 1"),
    ],
)
def test_odd_inputs_are_named(texts: Any, context: dict[str, Any], named: str):
    with pytest.raises(RewardError, match=named):
        score_group(QUESTION, texts, Recipe(reward="format"), Context(**context))


def test_texts_may_come_one_by_one():
    scored = score_group(QUESTION, (text for text in PLAIN), Recipe(reward="format"))  # type: ignore[arg-type]
    assert scored.rewards == (1.0, 1.0, 1.0)


def test_a_reward_in_a_file_is_not_opened_by_scoring():
    with pytest.raises(RewardError, match=r"my_rewards\.py:fn.*context\.reward"):
        score_group(QUESTION, PLAIN, OWN)


def test_every_reward_that_a_recipe_may_name_is_paid(policy: Policy):
    assert ("agreement", *BUILT_IN, *PUBLISHED) == REWARDS
    for reward in REWARDS:
        flags: dict[str, Any] = {"recipe": "oracle"} if reward == "oracle" else {"reward": reward}
        flags |= {"other_view": True} if reward == "co_rewarding" else {}
        paid = pay(policy, config_of(**flags), PLAIN, true_answer="7")
        assert len(paid.rewards) == len(PLAIN)
        assert any(paid.rewards)
