"""Reward validity: hand-worked groups whose truth and agreement are known, and runs written by the recorder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ireasoner.app.cli import main
from ireasoner.method.answers import majority
from ireasoner.method.recipe import Recipe
from ireasoner.method.types import Episode, Part, Question, Solution, Trajectory, UsageError
from ireasoner.playground import world
from ireasoner.playground.truth import WorldTruth
from ireasoner.studies import validity as study
from ireasoner.studies.perturbations import PERTURBATIONS
from ireasoner.studies.validity import (
    SAMPLE,
    ReadGroup,
    exact,
    measures,
    pair_validity,
    pairs_line,
    partial_correlation,
    read_groups,
    sensitivity,
    sentences,
    statistics,
    step_agreement,
    tables,
    validity,
)
from ireasoner.training.config import Config, dump_config, resolve
from ireasoner.training.recorder import Recorder
from models import load

pytestmark = pytest.mark.usefixtures("copied_models")

NAN = float("nan")
RED_AND_BLUE = world.Picture("bars", values=(("red", 7), ("blue", 3)))


def group(
    keys: Sequence[str | None],
    truth: Sequence[float] = (),
    steps: Sequence[Sequence[str]] = (),
    question: str = "What is the value of the red bar?",
    words: Sequence[float] = (),
    image: str = "image.png",
) -> ReadGroup:
    count = len(keys)
    said = steps or ((),) * count
    return ReadGroup(
        question=(image, question),
        keys=tuple(keys),
        solutions=tuple(solution(key, own) for key, own in zip(keys, said, strict=True)),
        words=np.array(words or [5.0] * count),
        truth=np.array(truth or [NAN] * count, dtype=np.float64),
        recorded=np.full(count, NAN),
    )


def solution(answer: str | None, steps: Sequence[str]) -> Solution:
    problem = "no answer" if answer is None else None
    return Solution(reasoning_steps=tuple(steps), answer=answer, words_before_answer=5, problem=problem)


def episode(
    solutions: Sequence[tuple[str, Sequence[str]] | None],
    image: str = "image.png",
    step: int = 1,
    parts: Sequence[float] = (),
    question: str = "What is the value of the red bar?",
) -> Episode:
    """(answer, steps) for each trajectory; None is an unreadable one."""
    keys = tuple(None if s is None else s[0] for s in solutions)
    vote = majority(keys)
    paid = parts or [0.5] * len(keys)
    return Episode(
        step=step,
        image=image,
        question=Question(question, "", None),
        proposal=None,
        proposer_reward=0.0,
        prompt="",
        trajectories=tuple(
            Trajectory(
                text="",
                finish_reason="stop",
                num_tokens=1,
                mean_sampler_logprob=0.0,
                reasoning_steps=() if s is None else tuple(s[1]),
                answer=key,
                words_before_answer=0 if s is None else sum(len(text.split()) for text in s[1]),
                problem="no answer" if s is None else None,
                answer_key=key,
                in_majority=key is not None and key == vote.answer,
                reward=0.0,
                parts={"step_agreement": Part(value=value)},
                step_scores=(),
            )
            for s, key, value in zip(solutions, keys, paid, strict=True)
        ),
        majority_answer=vote.answer,
        majority_fraction=vote.fraction,
        answer_entropy=vote.entropy,
        step_weight=0.5,
        true_answer=None,
    )


def write_run(run: Path, episodes: Sequence[Episode], **flags: Any) -> Config:
    """A run directory whose model is not there, unless `flags` say otherwise."""
    config = resolve({"images": str(run / "images_played"), "model": str(run / "no-model"), "preset": "tiny", **flags})
    recorder = Recorder.open(run)
    recorder.write_text("config.yaml", dump_config(config))
    for each in episodes:
        recorder.episode(each)
    return config


def write_truth(path: Path, pictures: dict[str, world.Picture]) -> Path:
    rows = [{"image": image, "picture": world.picture_record(picture)} for image, picture in pictures.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


SAID_TWICE = [  # the red bar is 7: two say so, one guesses, all with the same answer
    ("7", ["The red bar reaches 7.", "Red is at 7."]),
    ("7", ["I read 7 for red.", "The red bar reaches 7."]),
    ("7", ["The red bar reaches 4.", "Blue is at 9."]),
]


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_of_one_answer_by_hand() -> None:
    # Pairs of "a": (0, 1) the truer is higher: 1; (0, 2) the truer is lower: 0; (1, 2) equally true: no pair.
    # "b" has one trajectory of known truth; the unreadable two, of whatever truth, are no pair.
    first = group(["a", "a", "a", "b", "b", None, None], [1.0, 0.5, 0.5, 1.0, NAN, 1.0, 0.0])
    second = group(["c", "c"], [0.0, 1.0], question="another")  # tied but for rounding: ½
    scores = [np.array([0.6, 0.2, 0.9, 0.1, 0.2, 0.9, 0.1]), np.array([0.3, 0.3 - 1e-12])]
    rate, low, high, pairs, questions = pair_validity([first, second], scores)
    assert (rate, pairs, questions) == (pytest.approx(1.5 / 3), 3, 2)
    assert (low, high) == (0.5, 0.5)  # ½ in both questions: no resample differs
    assert pair_validity([first, second], [-s for s in scores])[0] == pytest.approx(0.5)
    assert pair_validity([first], [np.array([1.0, 0.2, 0.1, 0, 0, 0, 0])])[0] == 1.0
    unscored = np.array([NAN, 0.2, 0.1, 0, 0, 0, 0])
    assert pair_validity([first], [unscored])[3:] == (0, 0)


def test_the_bootstrap_resamples_images_and_repeats_itself() -> None:
    rng = np.random.default_rng(5)
    groups = [group(["a"] * 4, [1.0, 1.0, 0.0, 0.0], image=f"{i}.png") for i in range(60)]
    scores = [np.array([good, good, 0.5, 0.5]) for good in rng.random(60)]  # an image is all right or all wrong
    apart = pair_validity(groups, scores)
    assert apart == pair_validity(groups, scores)
    share = np.mean([s[0] > 0.5 for s in scores])
    assert apart[0] == pytest.approx(share)
    spread = np.sqrt(share * (1 - share) / 60)  # as of 60 coins, not of 240
    assert apart[2] - apart[1] == pytest.approx(2 * 1.96 * spread, rel=0.1)
    twice = pair_validity([*groups, *(replace(g, question=(g.question[0], "more")) for g in groups)], scores * 2)
    assert twice == (*apart[:3], 480, 120)  # another question about each image, and no more certain
    together = pair_validity([replace(g, question=("image.png", "one")) for g in groups], scores)
    assert together[:1] == apart[:1]
    assert together[1:] == (apart[0], apart[0], 240, 1)  # one image: nothing to resample


@pytest.mark.parametrize("groups", [[], [group(["a", "b"], [1.0, 0.0])]])
def test_without_pairs_there_is_no_rate(groups: list[ReadGroup]) -> None:
    rate, low, high, pairs, questions = pair_validity(groups, [np.zeros(2)] * len(groups))
    assert np.isnan([rate, low, high]).all()
    assert (pairs, questions) == (0, 0)


# --- correlations -----------------------------------------------------------------------------------------------------


def test_partial_correlation_by_hand() -> None:
    one_each = np.arange(4)
    x, y, z = np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4]), np.array([1.0, 1, 2, 2])
    assert partial_correlation(x, y, [], one_each)[0] == pytest.approx(0.8)
    # r_xz = 2/√5, r_yz = 1/√5: (0.8 − 0.4) / √((1 − 0.8)(1 − 0.2)) = 1
    assert partial_correlation(x, y, [z], one_each)[0] == pytest.approx(1.0)
    assert np.isnan(partial_correlation(x, y, [2 * x + 1], one_each)[0])  # nothing of x is left
    assert np.isnan(partial_correlation(x, np.ones(4), [], one_each)).all()
    assert np.isnan(partial_correlation(np.zeros(0), np.zeros(0), [], np.zeros(0, dtype=np.int64))).all()


def test_partial_correlation_is_that_of_residuals_with_an_interval_that_covers() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 400))
    x, y = a + b + rng.normal(size=400), a - b + rng.normal(size=400)
    design = np.stack([a, b, np.ones(400)], axis=1)
    rest = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    value, low, high = partial_correlation(x, y, [a, b], np.arange(400))
    assert value == pytest.approx(np.corrcoef(*rest)[0, 1])
    assert low < value < high
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(400), rel=0.15)


def test_statistics_take_off_what_answer_agreement_says_and_each_group_s_mean() -> None:
    rng = np.random.default_rng(2)
    groups, echoes, eyes = [], [], []
    for i in range(200):
        truth = rng.random(5)
        keys = ["a", "a", "a", "b", "c"]
        shares = np.array([0.6, 0.6, 0.6, 0.2, 0.2])
        groups.append(group(keys, truth.tolist(), question=f"question {i}", words=[5.0, 6, 7, 8, 9]))
        echoes.append(shares + rng.normal() * 10)  # answer agreement, and something of the question
        eyes.append(truth + 3 * shares)
    echo, eye = statistics(groups, echoes), statistics(groups, eyes)
    assert np.isnan(echo["truth_given_answer"]["r"])  # nothing beyond answer agreement
    assert echo["answer_within"]["r"] == pytest.approx(1.0)
    assert abs(echo["answer"]["r"]) < 0.2
    assert echo["pairs"]["rate"] == 0.5  # the same share, a tie
    assert eye["truth_given_answer"]["r"] == pytest.approx(1.0)
    assert eye["pairs"]["rate"] == eye["majority_pairs"]["rate"] == 1.0
    assert eye["majority_pairs"]["pairs"] == eye["pairs"]["pairs"] == 200 * 3  # "b" and "c" have one each
    lengthy = statistics(groups, [g.words for g in groups])
    assert lengthy["answer_within"]["r"] < -0.8
    assert np.isnan(lengthy["answer_given_length"]["r"])


def test_the_majority_s_pairs_leave_out_other_answers() -> None:
    groups = [group(["a", "a", "a", "b", "b"], [1.0, 1.0, 0.5, 1.0, 0.0])]
    found = statistics(groups, [np.array([0.5, 0.6, 0.1, 0.0, 0.0])])
    assert (found["pairs"]["rate"], found["pairs"]["pairs"]) == (pytest.approx(2.5 / 3), 3)
    assert (found["majority_pairs"]["rate"], found["majority_pairs"]["pairs"]) == (1.0, 2)


# --- measures ---------------------------------------------------------------------------------------------------------


def test_exact_counts_the_claims_that_the_world_reads_alike() -> None:
    said = [
        ["Look at the picture.", "The red bar reaches 7.", "I count red, blue."],
        ["Red is at 7.", "The bars are blue, red."],  # the same two claims
        ["The red bar reaches 4.", "Nonsense.", "I count blue, red."],  # one of them
        ["I count red, blue.", "I read 7 for red."],  # both in another order: one can be aligned
        ["Nonsense."],
        [],
    ]
    found = exact(group(["a", "a", "a", "a", "b", None], steps=said))
    # Each against the four other readable ones; of 0: with 1 both, with 2 one, with 3 one, with 4 none.
    assert found[:4] == pytest.approx([(1 + 0.5 + 0.5) / 4, (1 + 0.5 + 0.5) / 4, 1.5 / 4, 1.5 / 4])
    assert np.isnan(found[4:]).all()
    repeating = exact(group(["a", "a"], steps=[["Red is at 7."], ["Red is at 7.", "I read 7 for red."]]))
    assert repeating.tolist() == [1.0, 0.5]  # what is said once backs one step of the other


def in_letters(steps: Sequence[str]) -> np.ndarray:
    """Embeddings [steps, 26]: normalised counts of letters."""
    counts = np.array([[step.lower().count(chr(c)) for c in range(97, 123)] for step in steps], dtype=float)
    return counts.reshape(-1, 26) / np.maximum(1e-9, np.linalg.norm(counts.reshape(-1, 26), axis=1, keepdims=True))


def test_the_published_step_agreement_prefers_those_that_agree() -> None:
    by_color = lambda steps: np.array([["red" in s.lower(), "red" not in s.lower()] for s in steps]).reshape(-1, 2)  # noqa: E731
    found = step_agreement(Recipe(), by_color)(
        group(["7", "7", "7", None], steps=[*(steps for _, steps in SAID_TWICE), ()])
    )
    assert found.shape == (4,)
    assert found[0] > found[2] < found[1]
    assert found[3] == 0.0
    assert ((found >= 0) & (found <= 1)).all()
    # Whatever else a run pays for, the measure is the same.
    otherwise = step_agreement(Recipe(reward="random", step_measure="grounding", recurrence_window=128), by_color)
    assert (
        otherwise(group(["7", "7", "7", None], steps=[*(steps for _, steps in SAID_TWICE), ()])).tolist()
        == found.tolist()
    )


def test_a_run_scored_anew_from_its_texts_has_the_step_agreement_that_was_paid(
    tmp_path: Path, pictures: list[Image.Image], capsys: pytest.CaptureFixture[str]
) -> None:
    from ireasoner.rollouts.live import LiveEngine
    from ireasoner.training.items import Item
    from ireasoner.training.selfplay import SelfPlay

    config = write_run(tmp_path, [], model="tiny", recipe="paper")
    policy, recorder = load(), Recorder.open(tmp_path)
    play = SelfPlay(policy, LiveEngine(policy), config)
    for each in play.play(1, [Item(f"{i}.png", image, "0" * 16) for i, image in enumerate(pictures)]).episodes:
        recorder.episode(each)
    notes: list[str] = []
    embedding = measures(config, notes, truth=False)["embedding"]
    groups = list(read_groups(tmp_path, config))
    assert groups
    assert not notes
    assert any(g.recorded.any() for g in groups)
    for each in groups:
        assert embedding(each) == pytest.approx(each.recorded, abs=1e-12)
    out = tmp_path / "validity.json"
    assert main(["validity", str(tmp_path), "--json", str(out)]) == 0
    report = json.loads(out.read_text(), parse_constant=pytest.fail)
    found = report["measures"]
    assert list(found) == ["embedding", "recorded"]
    assert found["embedding"]["answer"]["r"] == pytest.approx(found["recorded"]["answer"]["r"])
    assert found["embedding"]["pairs"]["rate"] is None
    assert list(report["sensitivity"]) == list(PERTURBATIONS)
    assert list(report["sensitivity"]["negated"]) == ["embedding"]
    printed = capsys.readouterr().out
    assert "embedding" in printed
    assert "truer" not in printed.lower()  # nothing is known of these pictures


# --- edits ------------------------------------------------------------------------------------------------------------


def edited(edit: str, *steps: str, others: Sequence[str] = (), seed: int = 0) -> tuple[str, ...] | None:
    return PERTURBATIONS[edit](steps, np.random.default_rng(seed), others)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("The red circle is above the cross.", "The red circle is below the cross."),
        ("Left of the cross.", "Right of the cross."),
        ("Revenue rose in May.", "Revenue fell in May."),
        ("The Tallest is red.", "The Shortest is red."),
        ("There are fewer cats.", "There are more cats."),
        ("It is behind the tree.", "It is in front of the tree."),
        ("It sits at the top of the page.", "It sits at the bottom of the page."),
        ("Most of them have a right angle and no longer fit.", None),
        ("Two are left over.", None),
    ],
)
def test_a_relation_is_swapped(before: str, after: str | None) -> None:
    assert edited("relation swapped", before) == (None if after is None else (after,))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Red is at 7.", "Red is not at 7."),
        ("3 is not more than 4.", "3 is more than 4."),
        ("The red bar reaches 7.", "The red bar does not reach 7."),
        ("The row has 6.", "The row does not have 6."),
        ("Sales have doubled.", "Sales have not doubled."),
        ("I see a red circle.", "I do not see a red circle."),
        ("It isn't red.", "It is red."),
        ("We can't tell, as it cannot be read.", "We can tell, as it cannot be read."),
        ("It won't fall.", "It will fall."),
        ("There is no bar for May.", "There is a bar for May."),
        ("Nobody is there.", "Somebody is there."),
        ("3 + 4 = 7.", None),
    ],
)
def test_a_step_is_negated_or_its_negation_removed(before: str, after: str | None) -> None:
    assert edited("negated", before) == (None if after is None else (after,))


def test_a_number_is_changed_to_another() -> None:
    for seed in range(30):
        (step,) = edited("number changed", "In B2 the 3rd of 10 bars is at 45.", seed=seed) or ("",)
        ten, value = (int(w) for w in step.removeprefix("In B2 the 3rd of ").removesuffix(".").split(" bars is at "))
        assert (ten, value) != (10, 45)
        assert ten == 10 or value == 45
        assert (len(str(ten)), len(str(value))) == (2, 2)
        (step,) = edited("number changed", "Three of them.", seed=seed) or ("",)
        assert step.split()[0] in ("Two", "Four", "Five", "Six", "Seven", "Eight", "Nine")
    assert edited("number changed", "Figure B2, the 2nd one.") is None


def test_one_step_is_edited_and_the_others_stay() -> None:
    before = ("Look closely.", "Red is at 7.", "Blue is at 3.")
    seen = set()
    for seed in range(20):
        after = edited("number changed", *before, seed=seed)
        assert after is not None
        seen.add(tuple(a != b for a, b in zip(before, after, strict=True)))
    assert seen == {(False, True, False), (False, False, True)}


def test_shuffling_and_inserting() -> None:
    for seed in range(20):
        shuffled = edited("steps shuffled", "a", "b", "b", seed=seed)
        assert shuffled is not None
        assert sorted(shuffled) == ["a", "b", "b"]
        assert shuffled != ("a", "b", "b")
        inserted = edited("step inserted", "a", "b", others=["b", "new"], seed=seed)
        assert inserted in (("new", "a", "b"), ("a", "new", "b"), ("a", "b", "new"))
    assert edited("steps shuffled", "a") is None
    assert edited("steps shuffled", "a", "a") is None
    assert edited("step inserted", "a", others=["a"]) is None
    assert edited("rephrased (same claim)", "The red bar reaches 7.") == ("We can see that the red bar reaches 7.",)
    assert edited("rephrased (same claim)", "I see it.") == ("We can see that I see it.",)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=30), max_size=4), st.sampled_from(sorted(PERTURBATIONS)), st.integers(0, 9))
def test_any_text_is_edited_into_another_or_not_at_all(steps: list[str], edit: str, seed: int) -> None:
    assert edited(edit, *steps, others=["new"], seed=seed) != tuple(steps)


def test_sensitivity_edits_one_trajectory_of_the_majority_in_its_group() -> None:
    texts = [["Red is at 7.", "Blue is at 3."], ["Red is at 7.", "Blue is at 3."], ["Maybe."]]
    sample = [replace(group(["a", "a", "b"], steps=texts), question=(f"{i}.png", "")) for i in range(40)]
    untouched = sample[0].solutions

    def length(g: ReadGroup) -> np.ndarray:
        assert sum(a != b for a, b in zip(g.solutions, untouched, strict=True)) <= 1
        assert g.solutions[2] == solution("b", ["Maybe."])
        return np.array([-len(s.reasoning_steps) / 10 for s in g.solutions])

    found = sensitivity(sample, {"length": length, "blind": lambda g: np.zeros(3)})
    assert found["step inserted"]["length"]["edited"] <= 40  # some donors have nothing new
    assert found["step inserted"]["length"] == {
        "edited": found["step inserted"]["blind"]["edited"],
        "change": pytest.approx(-0.1),
        "fell": 1.0,
    }
    assert found["number changed"]["length"] == {"edited": 40, "change": 0.0, "fell": 0.0}
    assert np.isnan(found["relation swapped"]["blind"]["change"])
    one_image = [replace(g, question=("0.png", str(i))) for i, g in enumerate(sample)]
    assert sensitivity(one_image, {"length": length})["step inserted"]["length"]["edited"] == 0
    again = sensitivity(sample, {"length": length, "blind": lambda g: np.zeros(3)})
    assert json.dumps(again) == json.dumps(found)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_the_truer_trajectory_earns_more_of_the_oracle(tmp_path: Path) -> None:
    run = tmp_path / "run"
    lies = [("7", steps) if i != 2 else ("7", ["The red bar reaches 9."]) for i, (_, steps) in enumerate(SAID_TWICE)]
    episodes = [
        episode([*SAID_TWICE, None], parts=[0.2, 0.2, 0.9, 0.0]),  # the liar is paid most
        episode(lies, image="two.png", step=2, parts=[0.8, 0.1, 0.5]),
        episode(SAID_TWICE, image="unknown.png", step=3),
    ]
    config = write_run(run, episodes)
    known = {"image.png": RED_AND_BLUE, "two.png": RED_AND_BLUE}
    write_truth(Path(config.images).with_name("images_played.truth.jsonl"), known)
    report = validity(run)
    assert [g.truth.tolist() for g in read_groups(run, config, WorldTruth(known), (2, 2))] == [[1.0, 1.0, 0.0]]
    assert (report["groups"], report["trajectories"], report["readable"], report["with_truth"]) == (3, 10, 9, 6)
    (note,) = report["notes"]
    assert "embedding" in note
    assert list(report["measures"]) == ["recorded", "exact"]
    rates = {name: found["pairs"] for name, found in report["measures"].items()}
    assert rates["recorded"]["rate"] == 0.25  # 0 of 2 in the first, 1 of 2 in the second
    assert rates["exact"]["rate"] == 1.0
    assert all((found["pairs"], found["questions"]) == (4, 2) for found in rates.values())
    assert report["sensitivity"]["negated"] == {}  # no measure follows the text
    ((_, rows),) = tables(report)
    assert rows[0] == ["", "recorded", "exact"]
    assert "truer" in rows[1][0]
    assert rows[1][1] == "25.0 [0.0, 50.0]"
    assert sentences(report)[1:] == [note]
    assert "of 4 pairs" in pairs_line(report)
    assert "from 2 questions; 4 of these pairs gave the majority answer." in pairs_line(report)
    elsewhere = write_truth(tmp_path / "truth.jsonl", {"two.png": RED_AND_BLUE})
    assert validity(run, elsewhere)["with_truth"] == 3
    assert validity(run, steps=(2, 3))["groups"] == 2


def test_a_torn_last_line_and_unreadable_questions_are_passed_over(tmp_path: Path) -> None:
    write_run(
        tmp_path, [episode(SAID_TWICE), episode([]).model_copy(update={"question": Question("", "", "no question")})]
    )
    whole = validity(tmp_path)
    with (tmp_path / "episodes.jsonl").open("a") as file:
        file.write('{"step": 3, "image": "torn')
    assert validity(tmp_path)["groups"] == whole["groups"] == 1


def test_edits_are_tried_on_a_fair_sample_of_a_long_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "embedder", lambda config: in_letters)
    early, late = [("7", ["Red is at 7."])] * 3, [("no", ["Top is above bottom."])] * 3
    said = [early] * SAMPLE + [late] * SAMPLE
    write_run(tmp_path, [episode(each, image=f"{i}.png", step=i + 1) for i, each in enumerate(said)])
    found = validity(tmp_path)["sensitivity"]
    numbers, relations = found["number changed"]["embedding"], found["relation swapped"]["embedding"]
    assert numbers["edited"] + relations["edited"] == found["negated"]["embedding"]["edited"] == SAMPLE
    assert 120 < numbers["edited"] < 180
    assert (numbers["fell"], relations["fell"]) == (0.0, 1.0)  # of a number, these embeddings see nothing
    assert found["steps shuffled"]["embedding"]["edited"] == 0


def test_what_the_user_can_put_right_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: object) -> str:
        assert main(["validity", *map(str, arguments)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    run = tmp_path / "run"
    assert "is not a run directory" in told(tmp_path)
    write_run(run, [])
    assert "no readable trajectory: nothing to measure" in told(run)
    Recorder.open(run).episode(episode([None, None]))
    assert "no readable trajectory" in told(run)
    Recorder.open(run).episode(episode(SAID_TWICE, step=4))
    assert "in these steps" in told(run, "--steps", 5, 9)
    assert "FIRST not after LAST" in told(run, "--steps", 3, 2)
    assert "from 1 on" in told(run, "--steps", 0, 2)
    assert "cannot read the truth" in told(run, "--truth", tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"image": "image.png", "picture": {"family": "faces"}}\n')
    assert "does not hold lines of image and picture" in told(run, "--truth", tmp_path / "bad.jsonl")
    other = write_truth(tmp_path / "other.jsonl", {"other.png": RED_AND_BLUE})
    assert "says nothing of" in told(run, "--truth", other)
    with (run / "episodes.jsonl").open("a") as file:
        file.write('{"step": 5, "image": "image.png"}\n')
    assert "a record of step 5 is no episode" in told(run)
    with pytest.raises(UsageError):
        validity(run)


def test_reading_and_measuring_import_no_torch(tmp_path: Path) -> None:
    code = "import sys, ireasoner.studies.validity; print(sorted(set(sys.modules) & {'torch', 'transformers', 'peft'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
