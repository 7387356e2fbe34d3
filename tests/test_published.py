"""The published rewards: each with numbers worked out by hand, and as an example of a reward of the user's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ireasoner.method.published import covo, evol_rl, r_zero, sarl
from ireasoner.method.recipe import PUBLISHED, Recipe
from ireasoner.method.scoring import Context, RewardError, ScoredGroup, published_reward, read_group, score_group
from ireasoner.method.texts import parse_trajectory
from ireasoner.method.types import TokenDistributions
from ireasoner.training.config import ConfigError, load_recipe, names, resolve
from ireasoner.training.custom_reward import load_reward

QUESTION = "How tall is the red bar?"


def solution(answer: str, step: str = "The red bar was read.") -> str:
    return f"<think>Step 1: {step}</think><answer>{answer}</answer>"


# Three of five answer 7, one 3, and one cannot be read. Shares: 0.6 and 0.2, of the readable 3/4 and 1/4.
GROUP = [solution("7", "a"), solution("3", "a"), "I say 7", solution("7.0", "ab"), solution("seven", "b")]
LOGPROBS = [(-1.0, -0.5), (-2.0, -1.0, -1.0), (0.0,), (-0.25, -0.25), (-3.0,)]
# Two tokens of the first text, one of each other: H in nats, and KL(U ‖ π).
DISTRIBUTIONS = [
    TokenDistributions((0.5, 1.0), (2.0, 3.0)), TokenDistributions((0.25,), (1.0,)), TokenDistributions((9.0,), (9.0,)),
    TokenDistributions((2.0,), (0.5,)), TokenDistributions((0.0,), (4.0,)),
]  # fmt: skip
BLIND = [(-2.0, -1.5), (-2.0, -1.0, -1.0), (-9.0,), (-0.75, -0.25), (-2.5,)]  # of the tokens, about a gray image
# Two tokens of each text, about the image and about a masked one.
MASKED = {
    GROUP[0]: ((-1.0, -0.5), (-2.0, -1.5)), GROUP[1]: ((-2.0, -1.0), (-2.0, -1.0)), GROUP[2]: ((0.0,), (-9.0,)),
    GROUP[3]: ((-0.25, -0.25), (-0.75, -0.25)), GROUP[4]: ((-3.0,), (-2.5,)),
}  # fmt: skip
# How likely each answer is after each step.
AFTER = {("a", "7"): (-1.0,), ("a", "3"): (-2.0,), ("ab", "7"): (-3.0, -3.0), ("ab", "3"): (-2.0,),
         ("b", "7"): (-1.5, -0.5), ("b", "3"): (-2.0,)}  # fmt: skip
DIRECTIONS = {"a": (1.0, 0.0), "ab": (0.6, 0.8), "b": (0.0, 1.0)}


def likelihoods(texts: Sequence[tuple[str, str]], view: str = "same") -> list[tuple[float, ...]]:
    found = []
    for said, follows in texts:
        if said:
            step = said.removeprefix("<think>Step 1: ").removesuffix("</think><answer>")
            found.append(AFTER[step, follows])  # the answer as the first who gave it wrote it
        else:
            found.append(MASKED[follows][view == "masked"])
    return found


def embed(texts: Any) -> np.ndarray:
    return np.array([DIRECTIONS[text] for text in texts]).reshape(-1, 2)


# About another view of the image, three say 3.
OTHER_VIEW = read_group(QUESTION, [parse_trajectory(solution(answer)) for answer in ("7", "3", "3", "I say 7", "3")])
GIVEN: dict[str, Any] = {
    "logprobs": LOGPROBS, "embed": embed, "questions": [QUESTION], "distributions": lambda: DISTRIBUTIONS,
    "other_view": OTHER_VIEW, "likelihoods": likelihoods, "blank_logprobs": lambda: BLIND,
}  # fmt: skip


def pay(name: str, texts: list[str] = GROUP, **context: Any) -> ScoredGroup:
    return score_group(QUESTION, texts, Recipe(reward=name), Context(**{**GIVEN, **context}))


# EMPO and TTRV: 0.6 and 0.2. TTRV adds 0.75 (1 − H / ln 2), H = −¾ ln ¾ − ¼ ln ¼ = 0.562335: 0.75 · 0.188722.
# EM: log-probabilities −1.5, −4, −0.5 and −3 of the readable; the least is −4: 1 + 2.5, 1, 1 + 3.5 and 1 + 1.
# EM by tokens: entropies of 1.5, 0.25, 2 and 0; the largest is 2: 1 + 0.5, 1 + 1.75, 1 and 1 + 2.
# RESTRAIN: g = e^(−0.16/0.5) = 0.726149 and e^(−0.64/0.5) = 0.278037; w = 0.723122 and 0.276878 after division by their
# sum 1.004186; √(0.6 · 0.4) = 0.489898 and √(0.2 · 0.8) = 0.4, so that 1.476066 and 0.692195 are earned.
# EVOL-RL: the majority's directions a, ab and b have the cosines a–ab 0.6, ab–b 0.8, a–b 0, and the 3 is a as well.
# Mean and largest similarity: a: 0.3 and 1 (to the 3); ab: 0.7 and 0.8; b: 0.4 and 0.8. u = 1 − half of the two:
# 0.35, 0.25 and 0.4. From 0.25 to 0.4: ũ = 2/3, 0, 1. Earned: 1.5 + ũ/2. The 3 is alone on its side: 0.5.
# PAPO: the image makes the readable texts 1, 0, 0.25 and −0.5 nats a token likelier; 0.02 · (1.5, 0.5, 0.75 and 0) are
# added to the votes.
# CoVo: after "a" and "b", 7 is nearer (1 < 2), and after "ab", 3 is (2 < 3). So of those who say 7, two have Con = 1
# and Vol = 0, and one has Con = 0: (1 + 0 + 1)/3. The one who says 3 thinks "a": Con = 0.
EARNED = {
    "ttrl": (1.0, 0.0, 0.0, 1.0, 1.0),
    "sarl": (1.0, 1.0, 0.0, 1.0, 1.0),  # each has a single step
    "papo": (1.03, 0.01, 0.0, 1.015, 1.0),
    "covo": (2 / 3, 0.0, 0.0, 2 / 3, 2 / 3),
    "co_rewarding": (0.0, 1.0, 0.0, 0.0, 0.0),
    "r_zero": (1.0, 0.0, 0.0, 1.0, 1.0),
    "empo": (0.6, 0.2, 0.0, 0.6, 0.6),
    "ttrv": (0.741541, 0.341541, 0.0, 0.741541, 0.741541),
    "em_sequence": (3.5, 1.0, 0.0, 4.5, 2.0),
    "em_token": (1.5, 2.75, 0.0, 1.0, 3.0),
    "intuitor": (2.5, 1.0, 0.0, 0.5, 4.0),
    "restrain": (1.476066, 0.692195, 0.0, 1.476066, 1.476066),
    "evol_rl": (1.833333, 0.5, 0.0, 1.5, 2.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_rewards_by_hand(name: str):
    assert name in EARNED, f"work out by hand what each text of GROUP earns by {name}, and add it to EARNED"
    assert pay(name).rewards == pytest.approx(EARNED[name], abs=2e-6)


def test_answers_that_all_differ_or_all_agree():
    different, same = [solution(str(i), "a") for i in range(5)], [solution("7", "a")] * 5
    assert pay("empo", different).rewards == (0.0,) * 5
    assert pay("empo", same).rewards == (1.0,) * 5
    assert pay("restrain", different).rewards == (0.0,) * 5  # no answer has two votes
    assert pay("restrain", same).rewards == (1.0,) * 5
    assert pay("ttrv", different).rewards == pytest.approx([0.2] * 5)  # H = ln M: certain of nothing
    assert pay("ttrv", same).rewards == (1.75,) * 5
    assert pay("covo", same).rewards == (1.0,) * 5  # there is no other answer to lead to
    assert pay("evol_rl", same).rewards == (1.75,) * 5  # all equally new


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_unreadable_trajectory_earns_more_than_a_readable_one(name: str):
    rng = np.random.default_rng(0)
    for _ in range(20):
        texts = [solution(str(answer), str(rng.choice(["a", "ab", "b"]))) for answer in rng.integers(3, size=5)]
        texts[rng.integers(5)] = "?"
        logprobs = [-rng.exponential(size=rng.integers(1, 5)) for _ in texts]
        distributions = [TokenDistributions(tuple(-each), tuple(rng.exponential(size=len(each)))) for each in logprobs]
        paid = pay(
            name,
            texts,
            logprobs=logprobs,
            distributions=lambda found=distributions: found,
            blank_logprobs=lambda found=logprobs: [each - rng.exponential(size=len(each)) for each in found],
            likelihoods=lambda texts, view="same": [-rng.exponential(size=2) for _ in texts],
        )
        assert all(t.reward >= 0.0 if t.well_formed else t.reward == 0.0 for t in paid.trajectories)
        assert paid.proposer_reward >= 0.0


def test_restrain_pays_what_makes_the_weighted_losses():
    """The difference from the group's mean is Σ_j w_j A_ij, with the advantages A_ij that GRPO has for each label j."""
    paid = np.array(pay("restrain").rewards)
    labels = np.array([[1, 0, 0, 1, 1], [0, 1, 0, 0, 0]], dtype=float)
    advantages = (labels - labels.mean(1, keepdims=True)) / labels.std(1, keepdims=True)
    assert paid - paid.mean() == pytest.approx(np.array([0.723122, 0.276878]) @ advantages, abs=2e-6)


def test_novelty_is_ranked_on_its_own_side():
    texts = np.array([DIRECTIONS[name] for name in ("a", "a", "b", "a", "ab")])
    majority = np.array([True, True, True, False, False])
    # Majority: a, a, b: mean similarity 0.5, 0.5, 0, largest 1, 1, 0.8 (to ab): u = 0.25, 0.25, 0.6.
    # Others: a, ab: mean 0.6 and 0.6, largest 1 and 0.8: u = 0.2 and 0.3.
    assert evol_rl.novelty(texts, majority) == pytest.approx([0.0, 0.0, 1.0, 0.0, 1.0])
    # Two that are equally new, and one alone on its side.
    assert evol_rl.novelty(texts[:3], majority[1:4]) == pytest.approx([0.5, 0.5, 1.0])


def test_a_path_by_hand():
    """The second of three states is nearer to another answer: Con = 2/3, and Vol = 2/3, for it is the last such one."""
    own, others = [1.0, 3.0, 1.0], [[2.0, 9.0], [2.0, 4.0], [5.0, 2.0]]
    distances = np.column_stack([np.array(others)[:, 0], own, np.array(others)[:, 1]])
    assert covo.path(distances, 1) == pytest.approx((2 / 3, 2 / 3))
    assert covo.path(distances[[0, 2]], 1) == (1.0, 0.0)
    assert covo.path(np.zeros((0, 3)), 1) == (0.0, 0.0)


def test_paths_of_one_answer_are_added_as_vectors():
    """Con = 2/3 at the angle 2/3 and Con = 1 at 0: |(1 + 2/3 cos 2/3, 2/3 sin 2/3)| / 2 = |(1.523925, 0.412247)| / 2.

    The states are those of the text, each with what comes between the last step and the answer.
    """
    texts = [
        "<think>Step 1: a\nStep 2: **ab**\nStep 3: b</think>\n<answer>7</answer>",
        "<think>Step 1: b</think><answer>7</answer>",
        "<think>Step 1: c</think><answer>3</answer>",
    ]
    asked: list[str] = []

    def likely(texts: Sequence[tuple[str, str]], view: str = "same") -> list[tuple[float, ...]]:
        asked.extend(said for said, answer in texts if answer == "7")
        astray = [said.endswith("ab**</think>\n<answer>") for said, _ in texts]
        return [(-1.5 if answer == "3" else -1.0 - led,) for (_, answer), led in zip(texts, astray, strict=True)]

    assert pay("covo", texts, likelihoods=likely).rewards == pytest.approx((0.789350, 0.789350, 0.0), abs=2e-6)
    assert asked[:3] == [
        "<think>Step 1: a</think>\n<answer>",
        "<think>Step 1: a\nStep 2: **ab**</think>\n<answer>",
        "<think>Step 1: a\nStep 2: **ab**\nStep 3: b</think>\n<answer>",
    ]


def test_many_steps_are_fifteen_states():
    """The last one is the end of the reasoning; before it, every third of 45 steps."""
    text = "<think>" + "\n".join(f"Step {i}: x{i}." for i in range(1, 46)) + "</think><answer>7</answer>"
    asked: list[str] = []

    def likely(texts: Sequence[tuple[str, str]], view: str = "same") -> list[tuple[float, ...]]:
        asked.extend(said for said, answer in texts if answer == "7")
        return [(-1.0,)] * len(texts)

    pay("covo", [text, solution("3")], likelihoods=likely)
    ends = [said.removesuffix("</think><answer>").rpartition(" ")[2] for said in asked]
    assert ends == [*(f"x{3 * i}." for i in range(1, 16)), "read."]


@pytest.mark.parametrize(
    ("visited", "expected"),
    [
        ([], 0.0),
        ([0, 0, 0], 0.0),  # one kind
        ([0, 1], 0.5),  # L = 1
        ([0, 1, 2], 3 / 7),  # L = (1 + 1 + 2)/3
        ([0, 1, 2, 0], 1.0),  # a triangle: C = 1 and L = 1
        ([0, 0, 1, 2, 2, 0, 1], 1.0),  # how often it is walked makes no difference
        # A triangle with a tail: C = (1/3 + 1 + 1 + 0)/4, L = (4 · 1 + 2 · 2)/6.
        ([0, 1, 2, 0, 3], 7 / 24 + 3 / 7),
    ],
)
def test_small_worlds_by_hand(visited: list[int], expected: float):
    assert sarl.small_world(visited) == pytest.approx(expected)


def test_steps_that_are_alike_are_of_one_kind():
    """(0.8, 0.6) has the cosine 0.8 to (1, 0), and their mean 0.822192 to (0.6, 0.8), which has 0.8 to (0, 1)."""
    steps = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.8, 0.6], [0.6, 0.8], [-1.0, 0.0]])
    assert sarl.kinds(steps) == [0, 1, 0, 0, 2]
    text = solution("7").replace("The red bar was read.", "a\nStep 2: b\nStep 3: a")
    assert pay("sarl", [text] * 2).rewards == (1.5, 1.5)


def test_a_label_takes_the_place_of_the_other_views_vote():
    paid = pay("co_rewarding", judge=lambda answer: float(answer == "seven"))
    assert paid.rewards == (0.0, 0.0, 0.0, 0.0, 1.0)


def test_where_nobody_can_be_read_about_the_other_view_nothing_is_earned():
    unread = read_group(QUESTION, [parse_trajectory("?")] * 5)
    assert pay("co_rewarding", other_view=unread).rewards == (0.0,) * 5


def test_the_vote_on_another_view_cannot_be_paid_for_without_asking_about_it():
    with pytest.raises(ConfigError, match="add --other-view"):
        resolve({"images": "pool", "model": "tiny", "reward": "co_rewarding"})


# --- the proposer of R-Zero -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "questions", "expected"),
    [
        ("77733", [QUESTION], 0.0),  # p̂ = 0.6: 0.8 − 1, but not below 0
        ("77733", [QUESTION, *"abc"], 0.55),  # 0.8 − 1/4
        ("77733", [QUESTION, QUESTION, *"ab"], 0.3),  # 0.8 − 2/4
        ("77777", [QUESTION, *"abc"], 0.0),  # nothing is uncertain: 0 − 1/4
        ("77???", [QUESTION, *"abcdefg"], 0.675),  # p̂ = 0.4: 0.8 − 1/8
        ("7????", [QUESTION, *"abcdefg"], 0.0),  # one answer says nothing about the question
        ("77733", None, 0.8),  # nothing is known of other questions
    ],
)
def test_the_proposer_is_paid_for_uncertainty_without_repetition(answers: str, questions: Any, expected: float):
    texts = [solution(answer) if answer.isdigit() else "?" for answer in answers]
    assert pay("r_zero", texts, questions=questions).proposer_reward == pytest.approx(expected)


def test_bleu_by_hand():
    assert r_zero.bleu(QUESTION, QUESTION) == pytest.approx(1.0)
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 quadruples: (5/6 · 3/5 · 1/2 · 1/3)^(1/4) = (1/12)^(1/4).
    assert r_zero.bleu("How tall is the red bar?", "How tall is the blue bar?") == pytest.approx((1 / 12) ** 0.25)
    # Two words only: no longer sequences are compared; two of three words are brief: e^(1 − 3/2).
    assert r_zero.bleu("How tall", "How tall then") == pytest.approx(math.exp(-0.5))
    # Both words, but the pair is none of the reference's: 0.1 counts for 0, (1 · 0.1)^(1/2).
    assert r_zero.bleu("tall How", "How tall") == pytest.approx(math.sqrt(0.1))
    assert r_zero.bleu("Which colour?", "How tall") == 0.0


def test_clusters_join_by_the_mean_distance():
    red, blue, other = "How tall is the red bar?", "How tall is the blue bar?", "Which colour is missing here?"
    # 1 − BLEU of red and blue is 1 − 0.537285 = 0.462715, below 0.5.
    assert r_zero.cluster_shares((red, other, blue, red)) == (0.75, 0.25, 0.75, 0.75)
    assert r_zero.cluster_shares((other, red)) == (0.5, 0.5)


# --- recipes and examples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_reward_has_a_recipe_a_source_and_says_what_is_left_out(name: str):
    recipe = load_recipe(name.replace("_", "-"))
    assert recipe.reward == name
    assert recipe.advantage != "ema"
    told = inspect.getdoc(inspect.getmodule(published_reward(name))) or ""
    assert "Source: " in told
    assert "arXiv " in told
    assert "Left out: " in told


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_reward_is_an_example_of_a_reward_of_ones_own(name: str, tmp_path: Path):
    """Copied to a file of the user's, it is paid the same."""
    copied = tmp_path / "my_rewards.py"
    copied.write_text(Path(inspect.getfile(published_reward(name))).read_text("utf-8"), "utf-8")
    config = resolve({"images": "pool", "model": "tiny", "reward": f"{copied}:reward"})
    function, _ = load_reward(config)
    assert score_group(QUESTION, GROUP, config.recipe, Context(**GIVEN, reward=function)).rewards == pytest.approx(
        EARNED[name], abs=2e-6
    )


def test_evolmm_is_the_outcome_reward_with_its_own_constants():
    evolmm, paper = load_recipe("evolmm"), load_recipe("paper")
    changed = {"name": "evolmm", "step_weight_final": 0.0, "length_penalty": 0.1, "target_words": 6}
    assert evolmm == paper.model_copy(update=changed)
    assert "evolmm" in names("recipes")


LACKING = {
    "em_sequence": "logprobs", "em_token": "distributions", "intuitor": "distributions", "evol_rl": "embed",
    "co_rewarding": "other_view", "papo": "likelihoods", "covo": "likelihoods",
    "sarl": "embed",
}  # fmt: skip


@pytest.mark.parametrize(("name", "field"), LACKING.items())
def test_a_published_reward_says_what_it_lacks(name: str, field: str):
    without: dict[str, Any] = {field: None}
    with pytest.raises(RewardError, match=rf"{name} needs context\.{field}"):
        pay(name, **without)
