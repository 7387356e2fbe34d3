"""What becomes of a trained run: it is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ireasoner.app.cli import main
from ireasoner.method.types import Solution, UsageError
from ireasoner.model.policy import Policy
from ireasoner.training import trained
from ireasoner.training.config import load_config
from ireasoner.training.evaluation import evaluate
from ireasoner.training.labelled import LabelledQuestion
from ireasoner.training.trained import TrainedModel
from runs import new_run

QUESTION = "How many circles are there?"


@pytest.fixture(scope="module")
def policy(make_policy: Callable[..., Policy]) -> Policy:
    """The policy that the run below has trained: its solver differs from the base."""
    return make_policy(0.08)


@pytest.fixture(scope="module")
def picture(pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    pictures[0].save(path)
    return path


@pytest.fixture(scope="module")
def run(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its adapters."""
    path = tmp_path_factory.mktemp("runs") / "mine"
    recorder = new_run(path, solver_prompt="Look. {question}", device="cpu")
    policy.save_adapters(path)
    recorder.write_text("summary.json", json.dumps({"steps": 3, "stopped_early": False, "images": 12}))
    return path


@pytest.fixture(scope="module")
def model(run: Path) -> TrainedModel:
    return TrainedModel.from_run(run, device="cpu")


# --- asking -----------------------------------------------------------------------------------------------------------


def test_a_reply_is_what_the_evaluation_of_the_run_would_hear(
    model: TrainedModel, policy: Policy, run: Path, picture: Path
):
    asked = [LabelledQuestion(picture, QUESTION, "1")]
    sampling = load_config(run / "config.yaml").sampling
    for base in (False, True):
        heard = evaluate(policy, asked, None if base else "solver", sampling).greedy_texts[0]
        assert model.ask(picture, QUESTION, base=base).text == heard
    assert model.ask(picture, QUESTION).text != model.ask(picture, QUESTION, base=True).text


def test_a_picture_in_memory_is_the_same_as_its_file(model: TrainedModel, picture: Path):
    with Image.open(picture) as image:
        assert model.ask(image, QUESTION) == model.ask(picture, QUESTION)


def test_votes_are_sampled_under_their_seed(model: TrainedModel, picture: Path):
    reply = model.ask(picture, QUESTION, votes=4, seed=1)
    assert reply.votes == 4
    assert reply == model.ask(str(picture), QUESTION, votes=4, seed=1)
    with pytest.raises(ValueError, match="at least 1"):
        model.ask(picture, QUESTION, votes=0)


def solution(answer: str | None) -> Solution:
    problem = None if answer else "no closed <think>"
    return Solution(reasoning_steps=("I look.",), answer=answer, words_before_answer=2, problem=problem)


@pytest.mark.parametrize(
    ("answers", "text", "answer", "agreeing"),
    [
        (["4", "three", "3", None], "1", "three", 2),
        ([None, None], "0", None, 0),
        (["A or B", "A or B"], "0", None, 0),  # they commit themselves to nothing
        (["A or B"], "0", "A or B", 0),  # of a single reply, whatever it says
    ],
)
def test_the_majority_answers_as_its_first_reply_words_it(
    answers: list[str | None], text: str, answer: str | None, agreeing: int
):
    texts = [str(i) for i in range(len(answers))]
    found = trained._voted(texts, [solution(a) for a in answers], QUESTION)
    assert (found.text, found.answer, found.agreeing, found.votes) == (text, answer, agreeing, len(answers))


def test_ask_prints_the_steps_and_the_answer(run: Path, picture: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["ask", str(run), str(picture), QUESTION, "--base", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Before training (tiny):\n1. ")
    before, after = printed.split("After training:")
    assert "\nAnswer: " in before
    assert "1. " in after or "The reply has no answer" in after
    assert main(["ask", str(run), str(picture), QUESTION, "--votes", "3", "--device", "cpu"]) == 0
    assert " of 3 replies agree." in capsys.readouterr().out


def test_a_checkpoint_can_be_asked(policy: Policy, run: Path, picture: Path, model: TrainedModel, tmp_path: Path):
    from ireasoner.training.checkpoints import save_checkpoint

    new_run(tmp_path / "run", solver_prompt="Look. {question}", device="cpu")  # is not finished
    checkpoint = save_checkpoint(tmp_path / "run" / "checkpoints", 2, policy.save_adapters, keep=0)
    assert TrainedModel.from_run(checkpoint, device="cpu").ask(picture, QUESTION) == model.ask(picture, QUESTION)
    with pytest.raises(UsageError, match="not finished: name one of its checkpoints"):
        TrainedModel.from_run(tmp_path / "run")


def test_what_cannot_be_asked_is_one_sentence_before_the_model_is_loaded(
    run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("ireasoner.model.loading.load_policy", loads)
    nothing = new_run(tmp_path / "nothing")  # a run that ended itself before anything was learned
    nothing.write_text("summary.json", "{}")
    cases = {
        (run, tmp_path / "none.png"): "none.png",
        (run, run / "config.yaml"): "not a PNG",
        ("nowhere", picture): "nowhere is not a run directory",
        (tmp_path, picture): "neither a run nor a model",
        ("tiny", picture): "tiny is not a run directory",
        (run / "solver", picture): f"name {run}",
        (tmp_path / "nothing", picture): "learned nothing and has no adapter",
    }
    for (where, image), said in cases.items():
        assert main(["ask", str(where), str(image), QUESTION]) == 2
        told = capsys.readouterr().err
        assert told.startswith("ireasoner: ")
        assert told.count("\n") == 1
        assert said in told
