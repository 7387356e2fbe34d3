"""The watch: silent on healthy runs, quick and right about sick ones; and what the signals measure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from ireasoner.method.types import Episode, Question, Trajectory
from ireasoner.training.config import Config, resolve
from ireasoner.training.floors import FLOORS, common_problem, floor_signals
from ireasoner.training.watch import RULES, Alarm, Signals, Watch, repeated_share

WINDOW = 10
Series = list[dict[str, float | None]]


@cache
def config(window: int = WINDOW, **options: Any) -> Config:
    return resolve({"model": "tiny", "images": "/pictures", "watch_window": window, **options})


# Where the signals of the tiny model's healthy runs begin, where they end, and their noise from step to step
# (16 images): agreement rises, entropies fall, and none of it is a failure.
HEALTHY = {
    "majority_fraction": (0.52, 0.72, 0.05),
    "answer_entropy": (1.02, 0.60, 0.10),
    "token_entropy": (0.125, 0.085, 0.012),
    "length": (31.0, 38.0, 2.5),
    "repetition": (0.01, 0.025, 0.006),
    "readable": (0.99, 0.99, 0.01),
    "distinct_questions": (0.68, 0.57, 0.03),
    "recurrence": (0.55, 0.65, 0.06),
    "blank_survival": (0.35, 0.40, 0.16),
}

UNBOUNDED = ("answer_entropy", "token_entropy", "length")


def only(name: str, values: Iterable[float]) -> Series:
    return [{name: value} for value in values]


def healthy_run(seed: int, steps: int = 45, noise: float = 1.0) -> Series:
    """The signals of a run that learns: a drift over its first 40 steps, and noise; blanked images every other step;
    sixteen labelled questions in each."""
    rng, labels = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    run: Series = []
    for step in range(1, steps + 1):
        signals: dict[str, float | None] = {}
        for name, (first, last, spread) in HEALTHY.items():
            value = first + (last - first) * min(1.0, step / 40) + noise * spread * rng.standard_normal()
            signals[name] = max(0.001, value if name in UNBOUNDED else min(1.0, value))
        signals["majority_right"] = float(labels.binomial(16, 0.5 + 0.15 * min(1.0, step / 40))) / 16
        if step % 2:
            del signals["blank_survival"]
        run.append(signals)
    return run


def fail(run: Series, name: str, value: float, begin: int, over: int) -> Series:
    """The same run, one signal of which goes to another value from one step on, over so many steps."""
    changed = []
    for step, signals in enumerate(run, 1):
        weight = min(1.0, max(0.0, (step - begin) / over))
        old = signals.get(name)
        changed.append(signals | ({} if old is None else {name: (1 - weight) * old + weight * value}))
    return changed


def watch(run: Series, window: int = WINDOW) -> tuple[Watch, int]:
    """The watch after the step at which it fired, or after the whole run; and that step."""
    watched, step = Watch(config(window)), 0
    for step, signals in enumerate(run, 1):
        watched.observe(step, signals)
        if watched.alarm:
            break
    return watched, step


def fired(run: Series, window: int = WINDOW) -> tuple[Alarm, int]:
    watched, step = watch(run, window)
    assert watched.alarm is not None
    return watched.alarm, step


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_it_is_silent_on_a_thousand_healthy_runs():
    assert [seed for seed in range(1000) if watch(healthy_run(seed))[0].alarm] == []


def test_it_is_silent_where_a_step_has_one_image_and_much_noise():
    assert [seed for seed in range(30) if watch(healthy_run(seed, 200, noise=4.0), 50)[0].alarm] == []


FAILURES = [
    ("majority_fraction", 0.93, "the group agrees whatever is asked"),
    ("majority_fraction", 0.45, "agreement that had been won is lost again"),
    ("answer_entropy", 0.15, "answers lose their diversity"),
    ("token_entropy", 0.01, "sampling has become deterministic"),
    ("token_entropy", 0.60, "sampling has become random"),
    ("length", 8.0, "solutions shrink"),
    ("length", 96.0, "solutions swell"),
    ("repetition", 0.5, "solutions repeat themselves"),
    ("readable", 0.6, "texts can no longer be read"),
    ("distinct_questions", 0.1, "the same questions come again and again"),
    ("recurrence", 0.86, "the same reasoning is given to every image"),
    ("majority_right", 0.02, "the group agrees on what the labels say is wrong"),
    ("blank_survival", 0.98, "majority answers no longer need the image"),
]


@pytest.mark.parametrize(("name", "value", "meaning"), FAILURES, ids=lambda x: str(x))
@pytest.mark.parametrize("over", [1, 20])
def test_each_failure_is_seen_by_its_name_and_undone(name: str, value: float, meaning: str, over: int):
    begin = 40
    for seed in range(5):
        alarm, step = fired(fail(healthy_run(seed, 100), name, value, begin, over))
        assert begin < step <= begin + over + 2 * WINDOW
        assert alarm.reason.startswith(f"{meaning} ({name.replace('_', ' ')} ")
        assert ";" not in alarm.reason  # nothing else was wrong
        assert begin - 2 * WINDOW <= alarm.healthy_step <= begin + over // 2


def test_every_rule_has_its_failure():
    assert {(rule.signal, rule.meaning) for rule in RULES} == {(name, meaning) for name, _, meaning in FAILURES}


def test_the_reason_has_the_numbers():
    run = only("majority_fraction", [0.5] * 20 + [0.9] * 40)
    # Reference: steps 3 to 12. The window of steps 17 to 26 is the first with a mean above 0.5 + 0.5 · 0.5: (4 · 0.5 +
    # 6 · 0.9) / 10 = 0.74 is not, that of 18 to 27, 0.78, is; 0.82 at step 28 is the first beyond 0.8, 5 of them in a
    # row end at 32, where every step of the window is 0.9. Step 27 − 10 was healthy.
    alarm, step = fired(run)
    assert step == 32
    assert alarm == Alarm("the group agrees whatever is asked (majority fraction from 0.5 to 0.9)", 17)


def test_a_short_scare_is_forgotten():
    run = healthy_run(0, 80)
    for step in range(40, 43):
        run[step]["majority_fraction"] = 0.95
    watched, _ = watch(run)
    assert watched.alarm is None
    assert watched.may_return_to() == {70}


def test_what_noise_explains_is_no_alarm():
    # Both fall from a mean of 13 to 5. Where the steps alternate between 1 and 25, ten of them say little.
    steady = only("length", [13.0] * 12 + [5.0] * 20)
    noisy = only("length", [1.0, 25.0] * 6 + [5.0] * 20)
    assert fired(steady)[0].reason == "solutions shrink (length from 13 to 5)"
    assert watch(noisy)[0].alarm is None


def test_what_could_not_be_measured_is_passed_over():
    run = fail(healthy_run(1, 80), "majority_fraction", 0.95, 40, 10)
    expected = fired(run)
    for step in (3, 30, 41):
        run[step] |= {"answer_entropy": None, "length": math.nan, "recurrence": math.inf}
    for step in (50, 51):  # no question could be read
        run[step] = {"readable": 0.99}
    alarm, step = fired(run)
    assert alarm.reason.split(" (")[0] == expected[0].reason.split(" (")[0]
    assert step <= expected[1] + 2


def test_a_run_without_signals_or_of_few_steps_has_no_alarm():
    assert watch([{}] * 100)[0].alarm is None
    assert watch(only("majority_fraction", [0.1] * 11 + [1.0] * 10))[0].alarm is None


def test_replayed_from_its_records_it_is_the_same():
    run = fail(healthy_run(2, 90), "token_entropy", 0.01, 50, 20)
    alarm, step = fired(run)
    replayed = [json.loads(json.dumps(signals)) for signals in run]
    assert fired(replayed) == (alarm, step)
    first, second = Watch(config(WINDOW)), Watch(config(WINDOW))
    for number, signals in enumerate(run, 1):
        first.observe(number, signals)
        second.observe(number, replayed[number - 1])
        assert first.may_return_to() == second.may_return_to()


def test_where_it_may_return_to_never_moves_back():
    for seed in range(20):
        watched, newest, kept = Watch(config(WINDOW)), 0, {0}
        for step, signals in enumerate(fail(healthy_run(seed, 90), "answer_entropy", 0.3, 45, 30), 1):
            watched.observe(step, signals)
            wanted = watched.may_return_to()
            assert wanted <= kept | set(range(newest, step)), "a checkpoint that was let go is wanted again"
            kept, newest = wanted, max(0, step - WINDOW)


def test_bounds_are_ordered():
    for rule in RULES:
        assert 0 < rule.alarm < rule.healthy < 1


# --- signals ----------------------------------------------------------------------------------------------------------


def trajectory(
    text: str, *steps: str, tokens: int = 1, surprise: float = 1.0, problem: str | None = None
) -> Trajectory:
    """`surprise` is the mean of −log p over the tokens."""
    answer = None if problem else "4"
    return Trajectory(
        text=text, finish_reason="stop", num_tokens=tokens, mean_sampler_logprob=-surprise, reasoning_steps=steps,
        answer=answer, words_before_answer=1, problem=problem, answer_key=answer, in_majority=not problem, reward=0.0,
        parts={}, step_scores=(),
    )  # fmt: skip


def episode(
    image: str,
    question: str,
    trajectories: Sequence[Trajectory],
    majority_fraction: float = 0.5,
    answer_entropy: float = 1.0,
) -> Episode:
    return Episode(
        step=1, image=image, question=Question(question, "", None if question else "none"), proposal=None,
        proposer_reward=0.0, prompt="", trajectories=tuple(trajectories), majority_answer="4",
        majority_fraction=majority_fraction, answer_entropy=answer_entropy, step_weight=0.5, true_answer=None,
    )  # fmt: skip


def test_signals_are_what_they_say():
    first = episode(
        "a.png",
        "How many?",
        [
            trajectory("a b c d", "Look.", "It is 4!", tokens=3, surprise=3.5 / 3),
            trajectory("a b c d a b c d", "look", surprise=0.5, problem="cut off"),
        ],
        majority_fraction=0.5,
        answer_entropy=0.25,
    )
    second = episode(
        "b.png",
        "Which?",
        [trajectory("x", "Look.", "It is red."), trajectory("y", "LOOK", "it is 5")],
        majority_fraction=1.0,
        answer_entropy=0.0,
    )
    unreadable = episode("c.png", "", [])
    found = Signals(2).measure([first, second, unreadable])
    assert found == pytest.approx(
        {
            "readable": (1 / 2 + 2 / 2 + 0) / 3,
            "majority_fraction": 0.75,
            "answer_entropy": 0.125,
            "token_entropy": 6.0 / 6,
            "length": 6 / 4,
            "repetition": (0 + 1 / 5 + 0 + 0) / 4,  # abcd bcda cdab dabc abcd: one of five came before
            "distinct_questions": 1.0,
            "recurrence": (1 / 2 + 1 + 1 / 2 + 1 / 2) / 4,  # every trajectory says "look", and nothing else that recurs
        }
    )


def test_steps_recur_only_across_other_images_with_other_questions():
    signals = Signals(2)
    say, said = [trajectory("x", "The bar is 4.")], [trajectory("y", "the bar is 4")]
    signals.remember(episode("a.png", "How tall?", said))
    assert signals.measure([episode("b.png", "How tall?", say)])["recurrence"] == 0  # the same question
    signals.remember(episode("a.png", "Which?", said))
    assert signals.measure([episode("a.png", "How tall?", say)])["recurrence"] == 0  # the same image
    signals.remember(episode("a.png", "Which?", said))
    assert signals.measure([episode("b.png", "How tall?", say)])["recurrence"] == 1


def test_questions_are_counted_among_the_last_groups_once_there_are_enough():
    signals = Signals(3)

    def ask(text: str) -> Episode:
        return episode("a.png", text, [trajectory("x", "s")])

    assert "distinct_questions" not in signals.measure([ask("A?"), ask("B?")])
    assert signals.measure([ask("B?")])["distinct_questions"] == pytest.approx(2 / 3)
    assert signals.measure([ask("B?")])["distinct_questions"] == pytest.approx(1 / 3)


def test_a_step_without_a_readable_question_says_only_that():
    assert Signals(1).measure([episode("a.png", "", [])]) == {"readable": 0.0}


@pytest.mark.parametrize(
    ("text", "share"), [("", 0.0), ("a b c", 0.0), ("a b c d", 0.0), ("Yes " * 8, 4 / 5), ("a b c d e f g h", 0.0)]
)
def test_repeated_share(text: str, share: float):
    assert repeated_share(text) == pytest.approx(share)


# --- floors -----------------------------------------------------------------------------------------------------------

SOUND = {
    "finite": 1.0, "readable_questions": 0.98, "readable": 0.98, "paid": 0.97, "advantage_std": 0.2, "kl": 0.01,
    "moved": 0.01, "mean_sampler_gap": 0.1,
}  # fmt: skip
DEATHS = [
    ("finite", 0.0, "gradients are not finite", True),
    ("readable_questions", 0.0, "hardly any question can be read", True),
    ("readable", 0.0, "hardly any solution can be read", True),
    ("paid", 0.0, "every reward is zero", True),
    ("advantage_std", 0.0, "the rewards of a step are all the same", False),
    ("kl", 3.0, "the model has moved very far", True),
    ("kl", 1e-7, "the model hardly moves", False),
    ("mean_sampler_gap", 0.5, "the sampler seems to be another model", False),
    ("moved", 0.0, "the solver's adapter is as it was at the start", True),
    ("majority_fraction", 1.0, "every group agrees", False),
    ("distinct_questions", 0.01, "nearly all questions are the same", False),
    ("token_entropy", 1e-4, "sampling is as good as deterministic", False),
    ("repetition", 0.95, "solutions are little but repetition", False),
]


@pytest.mark.parametrize(("name", "value", "meaning", "ends"), DEATHS, ids=lambda x: str(x))
@pytest.mark.parametrize("begin", [1, 16])
@pytest.mark.parametrize("window", [10, 50])
def test_a_dead_run_is_named_within_twenty_steps(
    name: str, value: float, meaning: str, ends: bool, begin: int, window: int
):
    """From the first step on, or after a crash: long before a window of 50 has anything to compare."""
    watched, told = Watch(config(window)), list[tuple[int, str]]()
    for step in range(1, begin + 60):
        values = SOUND | ({name: value} if step >= begin else {})
        if warning := watched.observe(step, values):
            told.append((step, warning))
        if watched.alarm:
            break
    ((named, warning),) = told
    assert named < begin + 20
    assert meaning in warning
    assert f"since step {begin}" in warning
    if ends:
        assert watched.alarm is not None
        assert name.replace("_", " ") in watched.alarm.reason  # a small window may compare before the floor ends it
        assert begin - 6 <= watched.alarm.healthy_step <= begin - 1
    else:
        assert watched.alarm is None
    assert any(sign.signal == name and sign.trouble for sign in watched.signs())


def test_every_floor_has_its_death():
    assert len(FLOORS) == len(DEATHS)
    assert all(any(meaning in floor.meaning for _, _, meaning, _ in DEATHS) for floor in FLOORS)


def test_the_cause_is_named_and_not_its_effects():
    watched, told = Watch(config()), list[str]()
    for step in range(1, 16):
        told += filter(None, [watched.observe(step, SOUND | {"readable": 0.0, "paid": 0.0, "advantage_std": 0.0})])
    assert told == ["Warning: hardly any solution can be read (readable 0, since step 1)."]
    assert watched.alarm is not None
    assert watched.alarm.reason == "hardly any solution can be read (readable 0)"


@pytest.mark.parametrize("options", [{"watch": False}, {"recipe": "random-reward"}, {"recipe": "format-only"}], ids=str)
def test_controls_and_unwatched_runs_are_warned_and_go_on(options: dict[str, Any]):
    watched = Watch(config(**options))
    told = [w for step in range(1, 80) if (w := watched.observe(step, SOUND | {"readable": 0.0}))]
    assert len(told) == 1
    assert watched.alarm is None


def test_floors_hold_on_labels_and_the_comparisons_do_not():
    under_labels = config(recipe="oracle", labels="/labels.jsonl")
    dead, sure = Watch(under_labels), Watch(under_labels)
    for step in range(1, 60):
        dead.observe(step, SOUND | {"paid": 0.0})
        sure.observe(step, SOUND | {"majority_fraction": 0.4 if step < 30 else 1.0})
    assert dead.alarm is not None
    assert "every reward is zero" in dead.alarm.reason
    assert sure.alarm is None


def test_a_floor_that_is_left_again_is_forgotten():
    watched = Watch(config())
    for step in range(1, 100):
        watched.observe(step, SOUND | {"readable": 0.0 if step % 14 else 0.9})
    assert watched.alarm is None
    assert 98 not in watched.floors.began()


def test_a_few_readable_texts_are_a_warning_and_no_end():
    watched = Watch(config())
    told = [w for step in range(1, 12) if (w := watched.observe(step, SOUND | {"readable": 0.08}))]
    assert len(told) == 1
    assert watched.alarm is None


def test_floor_signals_are_what_they_say():
    paid = episode("a.png", "How many?", [trajectory("x", "s"), trajectory("y", "s", problem="cut off")])
    first, second = paid.trajectories
    paid = paid.model_copy(update={"trajectories": (first.model_copy(update={"reward": 0.5}), second)})
    unasked = episode("b.png", "", [])
    learned = {
        "grad_norm/solver": math.nan, "grad_norm/proposer": 1.0, "kl/solver": 0.25, "advantage_std/solver": 0.5,
        "mean_sampler_gap/solver": 0.5, "mean_sampler_gap/proposer": 0.75,
    }  # fmt: skip
    assert floor_signals([paid, unasked], learned, 0.125) == {
        "readable_questions": 0.5, "paid": 0.5, "finite": 0.5, "kl": 0.25, "advantage_std": 0.5, "moved": 0.125,
        "mean_sampler_gap": 0.75,
    }  # fmt: skip
    assert floor_signals([unasked], {}, 0.0) == {"readable_questions": 0.0, "moved": 0.0}
    assert common_problem([paid, paid, unasked]) is None
    assert common_problem([unasked, unasked]) == "none"
