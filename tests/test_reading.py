"""The doctor reads what a model writes, and says whether training can learn from such texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from ireasoner.app.cli import main
from ireasoner.app.display import print_episode
from ireasoner.method.scoring import Context, score_group
from ireasoner.method.types import Episode, FinishReason, Proposal, Question, Trajectory
from ireasoner.model.source import TINY_MODEL
from ireasoner.playground import dataset
from ireasoner.studies import reading
from ireasoner.studies.doctor import Finding
from ireasoner.training.checks import check_reading
from ireasoner.training.config import Config, resolve
from ireasoner.training.loop import start
from ireasoner.training.recorder import read_episodes
from runs import HOSTILE, episode, proposal


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six pictures of the embedded world."""
    folder = tmp_path_factory.mktemp("photos")
    dataset.write_unlabeled(folder, 6)
    return folder


@pytest.fixture(scope="module")
def babbling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with random weights, which hardly ever ends a text and never writes it in the form."""
    folder = tmp_path_factory.mktemp("babbling") / "model"
    shutil.copytree(TINY_MODEL, folder)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(TINY_MODEL))
    model.generation_config = GenerationConfig.from_pretrained(TINY_MODEL)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the checks of the parts, which `test_doctor` tests and which take most of the time."""
    monkeypatch.setattr("ireasoner.studies.doctor.examine", lambda *args, **options: iter(()))


def doctor(*argv: object) -> int:
    return main(["doctor", *map(str, argv), "--device", "cpu"])


# --- the whole, on models ---------------------------------------------------------------------------------------------


def test_the_shipped_model_can_learn_from_pictures_of_its_world(photos: Path, capsys: pytest.CaptureFixture[str]):
    assert doctor("tiny", "--images", photos) == 0
    out = capsys.readouterr().out
    assert out.count("ok  ") == 7 + 5
    assert "FAIL" not in out
    assert "its solutions can be read\n      20 of 20" in out
    assert out.splitlines()[-1] == "This model can learn here."
    assert out.count("  question: ") == 4
    assert out.count("  vote: ") == 4
    assert out.count("of 112 tokens, ended by itself; reward ") == 20
    assert "<think>Step 1: " in out
    assert "(compared as " in out


def test_what_is_read_is_what_the_first_step_of_training_sees(photos: Path, tmp_path: Path):
    config = resolve({"images": photos, "model": "tiny", "device": "cpu", "images_per_step": 4, "steps": 1})
    start(config, tmp_path / "run")

    def told(episodes: Sequence[Episode]) -> list[dict[str, Any]]:
        """What was written and paid, without what only a run adds: advantages and thumbnails."""
        records = [episode.model_dump(exclude={"thumbnail"}) for episode in episodes]
        for record in records:
            for written in (record["proposal"], *record["trajectories"]):
                del written["advantage"]
        return records

    assert told(reading.read(reading.draw(check_reading(config)))) == told(list(read_episodes(tmp_path / "run")))


def test_images_are_played_in_the_steps_of_the_run(photos: Path):
    config = resolve({"images": photos, "model": "tiny", "device": "cpu", "images_per_step": 3})
    assert [e.step for e in reading.read(reading.draw(check_reading(config)))] == [1, 1, 1, 2]


def test_solutions_that_are_cut_off(photos: Path, unchecked: None, capsys: pytest.CaptureFixture[str]):
    assert doctor("tiny", "--images", photos, "--max-solution-tokens", 8) == 1
    out = capsys.readouterr().out
    assert (
        "FAIL  its solutions can be read\n      0 of 20; what is wrong most often: cut off before the end token" in out
    )
    assert "FAIL  its texts end by themselves" in out
    assert "ok    its questions can be read" in out
    told = out[out.index("This model cannot learn here.") :]
    assert "cut off before it has said everything; raise --max-solution-tokens, which is 8." in told
    assert "max_solution_tokens is 8, not 112" in told


def test_a_model_that_never_writes_the_form(
    photos: Path, babbling: Path, unchecked: None, capsys: pytest.CaptureFixture[str]
):
    assert doctor(babbling, "--preset", "tiny", "--images", photos) == 1
    out = capsys.readouterr().out
    assert "FAIL  its questions can be read\n      0 of 4, so that nothing was answered; " in out
    assert "its solutions" not in out
    told = out[out.index("This model cannot learn here.") :]
    assert "not what --proposer-prompt asks for" in told
    assert "--max-question-tokens" not in told


def test_images_of_the_evaluation_data_are_counted(
    photos: Path, tmp_path: Path, unchecked: None, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.png") if path.name != "broken.png")
    rows = [{"image": f"photos/{name}", "question": "What?", "answer": "red"} for name in names[:3]]
    (tmp_path / "held-out.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept = tmp_path / "found.json"
    assert doctor("tiny", "--images", folder, "--eval-data", tmp_path / "held-out.jsonl", "--json", kept) == 0
    out = capsys.readouterr().out
    assert "Images of the evaluation data that are set aside and not trained on: 3." in out
    assert "Images that cannot be used: broken.png: " in out
    assert "the evaluation data, set aside" not in out
    found = json.loads(kept.read_text())
    assert (found["set_aside"], list(found["skipped"])) == (3, ["broken.png"])
    assert {e["image"] for e in found["episodes"]} == {str(name) for name in names[3:]}
    assert (found["can_learn"], found["verdict"]) == (True, ["This model can learn here."])
    assert found["episodes"][0]["trajectories"][0]["text"].endswith("</answer>")


def test_without_images_it_says_that_it_could_read(unchecked: None, capsys: pytest.CaptureFixture[str]):
    assert doctor("tiny") == 0
    assert "--images FOLDER" in capsys.readouterr().out
    assert doctor("tiny", "--group-size", "3") == 2
    assert "--group-size: only with --images FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", [("--group-size", "1"), ("--recipe", "none"), ("--eval-data", "/no/such.jsonl"), ("--images", "/no")]
)
def test_a_mistake_is_one_sentence_before_anything_is_checked(
    photos: Path, given: tuple[str, str], capsys: pytest.CaptureFixture[str]
):
    assert doctor("tiny", "--images", photos, *given) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)


# --- what is printed of a text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [*HOSTILE, "\x1b]0;owned\x07\x1b[2J\r\x9b31m red", "7\u2028\u202e" + "very long " * 999]
)
def test_what_the_model_wrote_cannot_reach_the_terminal(text: str, capsys: pytest.CaptureFixture[str]):
    config = resolve({"images": "photos", "model": "tiny"})
    hostile = Episode.model_validate(episode(text, question=f"{text}?"))
    solution = hostile.trajectories[0].model_copy(update={"reasoning_steps": (text, text), "answer": text})
    print_episode(hostile.model_copy(update={"trajectories": (solution, *hostile.trajectories[1:])}), config)
    out = capsys.readouterr().out
    assert all(c.isprintable() for c in out.replace("\n", ""))
    assert len(out.splitlines()) == 1 + 1 + 3 + 1 + 4 + 4 + 3
    assert len(out) < 5000


# --- the verdict, on texts made up ------------------------------------------------------------------------------------

GOOD = "<think>Step 1: The red bar is at {0}.</think><answer>{0}</answer>"


def group(
    texts: Sequence[str], finish: FinishReason = "stop", config: Config | None = None, question: str = "How many?"
) -> Episode:
    """The episode of a readable question and these solutions, scored as in self-play."""
    config = config or config_of()
    ends: list[FinishReason] = [finish] * len(texts)
    context = Context(
        form=config.sampling.solution_form, finish_reasons=ends, step_weight=config.recipe.step_weight_initial,
        recent_steps=[], image="a.png", seed=(0,),
        embed=lambda texts: np.ones((len(texts), 1)),
        tokens=[[text] for text in texts], logprobs=[[-0.5 if " red" in text else -0.8] for text in texts],
        blank_logprobs=lambda: [[-1.0]] * len(texts),
    )  # fmt: skip
    scored = score_group(question, texts, config.recipe, context)
    trajectories = [
        Trajectory(text=text, finish_reason=finish, num_tokens=9, mean_sampler_logprob=-1.0, **dict(one))
        for text, one in zip(texts, scored.trajectories, strict=True)
    ]
    return Episode(
        step=1, image="a.png", question=Question(question, "", None), proposal=proposal("?"), proposer_reward=0.5,
        prompt="", trajectories=tuple(trajectories), majority_answer=scored.vote.answer,
        majority_fraction=scored.vote.fraction, answer_entropy=scored.vote.entropy, step_weight=0.5, true_answer=None,
    )  # fmt: skip


def config_of(**options: Any) -> Config:
    return resolve({"images": "photos", "model": "tiny", **options})


def judged(episodes: Sequence[Episode], config: Config | None = None) -> tuple[set[str], str]:
    """The names of the checks that fail, and the verdict."""
    config = config or config_of()
    findings = reading.judge(config, episodes)
    return {finding.name for finding in findings if not finding.passed}, " ".join(reading.verdict(config, findings))


def test_answers_that_agree_in_part_can_be_learned_from():
    failed, told = judged([group([GOOD.format(n) for n in (7, 7, 7, 3, 4)])])
    assert failed == set()
    assert told == "This model can learn here."


def test_answers_that_never_agree():
    failed, told = judged([group([GOOD.format(n) for n in numbers]) for numbers in ((1, 2, 3), (4, 5, 6))])
    assert "its answers can be voted on" in failed
    assert "No two answers of a group agree" in told
    divided = group([GOOD.format(n) for n in (7, 7, 3)])
    assert judged([group([GOOD.format(n) for n in (1, 2, 3)]), divided])[0] == set()


def test_answers_that_always_agree_teach_only_by_their_reasoning_steps():
    texts = [GOOD.format(7), GOOD.format(7), GOOD.format(7).replace("red", "blue"), GOOD.format(7).replace("red", "no")]
    failed, told = judged([group(texts)])
    assert failed == set()
    assert "every group agrees, so that votes say nothing" in told.lower()
    long = GOOD.format(7).replace("The red", "The red " + "and the very same red " * 20)  # costs up to 5 %
    answers_only = config_of(recipe="answers-only", recurrence_window=0)
    same = group([GOOD.format(7), GOOD.format(7), long], config=answers_only)
    assert len(set(same.rewards)) == 2
    failed, told = judged([same], answers_only)
    assert failed == {"its rewards tell solutions apart"}
    assert "nothing to learn from" in told


def test_groups_that_a_gate_keeps_out_teach_nothing():
    gated = config_of(gate_low=0.9)
    assert judged([group([GOOD.format(n) for n in (7, 7, 3)])], gated)[0] == {"its rewards tell solutions apart"}


def test_a_vote_is_not_asked_for_where_it_is_not_paid_for():
    random = config_of(recipe="random-reward")
    assert judged([group([GOOD.format(n) for n in (1, 2, 3)], config=random)], random)[0] == set()


@pytest.mark.parametrize(
    ("text", "finish", "remedy"),
    [
        ("<think>Step 1: The red bar", "length", "raise --max-solution-tokens, which is 112"),
        (GOOD.format(7) + " And so it is.", "length", "goes on without ending its texts"),
        (GOOD.format(7) * 3, "length", "goes on without ending its texts"),
        ("<think>" + "the red bar is red and " * 99, "length", "goes on without ending its texts"),
        ("The red bar is the", "length", "not what --solver-prompt asks for"),
        ("The red bar is at 7.", "stop", "take a larger or an instruction-tuned model"),
        ("The red bar is at 7.\nSo it is \\boxed{7}", "stop", "with --solution-form boxed, 5 of 5 could be read"),
        ("The red bar is at 7.\nAnswer: 7", "stop", "with --solution-form answer-line, 5 of 5 could be read"),
    ],
)
def test_why_solutions_cannot_be_read_and_what_to_do(text: str, finish: FinishReason, remedy: str):
    failed, told = judged([group([text] * 5, finish)])
    assert "its solutions can be read" in failed
    assert ("its texts end by themselves" in failed) == (finish == "length")
    assert remedy in told
    assert told.count("Hardly any solution can be read, because ") == 1


@pytest.mark.parametrize(
    ("text", "finish", "remedy"),
    [
        ("<question>Which bar is", "length", "raise --max-question-tokens, which is 56"),
        ("<question>Which?</question><rationale>Compare", "length", "raise --max-question-tokens, which is 56"),
        ("<question>Which?</question><rationale>Compare.</rationale> And", "length", "goes on without ending"),
        ("What a nice picture", "length", "not what --proposer-prompt asks for"),
        ("Which bar is the tallest?", "stop", "not what --proposer-prompt asks for"),
    ],
)
def test_why_questions_cannot_be_read_and_what_to_do(text: str, finish: FinishReason, remedy: str):
    written = Proposal(text=text, finish_reason=finish, num_tokens=9, mean_sampler_logprob=-1.0, prompt="")
    unread = group(()).model_copy(update={"question": Question("", "", "as it may be"), "proposal": written})
    failed, told = judged([unread] * 4)
    assert "its questions can be read" in failed
    assert f"Hardly any question can be read, because {told.split('because ')[1]}" in told
    assert remedy in told


def test_a_part_that_cannot_be_read_is_told_and_no_fault():
    texts = [GOOD.format(7), GOOD.format(7), "7", "7", "7"]
    failed, told = judged([group(texts)])
    assert failed == set()
    assert told.startswith("This model can learn here. Most solutions cannot be read, because ")
    few = group([*[GOOD.format(7)] * 3, GOOD.format(3), "7"])
    assert judged([few])[1] == "This model can learn here."
    figures = [finding.figure for finding in reading.judge(config_of(), [few])]
    assert "4 of 5; what is wrong most often: no closed <think> (1)" in figures


def test_a_finding_from_elsewhere_counts_in_the_verdict():
    failing = Finding("an update shows in this dtype", False, "0", "Raise the learning rate.")
    told = reading.verdict(config_of(learning_rate=1e-9), [failing])
    assert told[:2] == ["This model cannot learn here.", "Raise the learning rate."]
    assert told[2].startswith("learning_rate is 1e-09, not 0.0006")
