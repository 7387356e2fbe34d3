"""Choosing a checkpoint by one half of labelled questions and judging it by the other: `ireasoner eval --select`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from ireasoner.app.cli import main
from ireasoner.method.types import UsageError
from ireasoner.model.policy import Policy
from ireasoner.playground import dataset
from ireasoner.training.checkpoints import save_checkpoint
from ireasoner.training.config import dump_config, load_config
from ireasoner.training.evaluation import ACCURACIES, Scores, evaluate
from ireasoner.training.labelled import LabelledQuestion, load_questions
from ireasoner.training.selection import halves, select_checkpoint, whole_checkpoints
from runs import new_run

pytestmark = pytest.mark.usefixtures("copied_models")


def asked(images: int, each: int = 3) -> list[LabelledQuestion]:
    """Questions about images, those about one image not in a row."""
    return [LabelledQuestion(Path(f"/{i}.png"), f"Question {n}?", "1") for n in range(each) for i in range(images)]


def scores(accuracy: float, questions: Sequence[LabelledQuestion]) -> Scores:
    values = np.full(len(questions), accuracy)
    others = dict.fromkeys(
        ("answer_entropy", "greedy_well_formed", "well_formed", "tokens", "distinct_solutions"), values
    )
    texts = tuple("" for _ in questions)
    return Scores(dict.fromkeys(ACCURACIES, values), **others, greedy_texts=texts, image=np.arange(len(questions)))


@pytest.mark.parametrize("images", [2, 3, 10, 31])
def test_halves_share_no_image_and_lose_no_question(images: int):
    questions = asked(images)
    first, second = halves(questions)
    assert len({q.image for q in first}) == images // 2
    assert {q.image for q in first}.isdisjoint(q.image for q in second)
    assert sorted([*first, *second], key=questions.index) == questions
    assert [q for q in questions if q in first] == first  # in their order
    assert halves(questions) == (first, second)


def test_questions_about_one_image_cannot_be_halved():
    with pytest.raises(UsageError, match="two images"):
        halves(asked(1, 5))


def selected(choosing: Sequence[float], judging: Sequence[float]) -> tuple[Path | None, dict[str, int]]:
    """What is chosen of the base and its checkpoints, by their accuracies on both halves; how often each is scored."""
    steps = [Path(f"step-{n:06d}") for n in range(1, len(choosing))]
    questions, candidates, times = asked(6), [None, *steps], dict.fromkeys(["None", *map(str, steps)], 0)
    first, second = halves(questions)

    def score(candidate: Path | None, given: Sequence[LabelledQuestion]) -> Scores:
        times[str(candidate)] += 1
        assert given in (first, second)
        return scores((choosing if given == first else judging)[candidates.index(candidate)], given)

    found = select_checkpoint(steps, questions, score)
    assert list(found.choosing) == candidates
    assert found.questions == second
    for candidate, judged in found.judging.items():
        assert judged.measures["greedy"][0] == judging[candidates.index(candidate)]
    return found.chosen, times


def test_only_the_choosing_half_chooses():
    chosen, times = selected([0.4, 0.5, 0.7, 0.6], [0.4, 0.9, 0.1, 0.9])
    assert chosen == Path("step-000002")
    assert times == {"None": 2, "step-000001": 1, "step-000002": 2, "step-000003": 2}  # the last one is told too


def test_of_equals_the_earliest_is_chosen_and_the_base_before_all():
    assert selected([0.4, 0.5, 0.5], [0, 0, 0])[0] == Path("step-000001")
    chosen, times = selected([0.5, 0.5, 0.4], [0, 1, 1])
    assert chosen is None
    assert times == {"None": 2, "step-000001": 1, "step-000002": 2}


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    return dataset.write_questions(folder / "test", 12, "chalk", "test")


@pytest.fixture(scope="module")
def run(make_policy: Callable[..., Policy], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unfinished run with three checkpoints beside that of step 0, ever further from the base; one is damaged."""
    path = tmp_path_factory.mktemp("runs") / "mine"
    new_run(path, solver_prompt="{question}", device="cpu", max_solution_tokens=112, max_image_tokens=64)
    for step, filled in ((0, 0.0), (9, 0.02), (10, 0.03), (1000000, 0.1)):
        save_checkpoint(path / "checkpoints", step, make_policy(filled).save_adapters, keep=0)
    (path / "checkpoints" / "step-000010" / "solver" / "adapter_config.json").write_text("{}")
    return path


def test_checkpoints_come_in_the_order_of_their_steps_and_damaged_ones_are_told(run: Path, tmp_path: Path):
    told: list[str] = []
    found = whole_checkpoints(run, told.append)
    assert [path.name for path in found] == ["step-000009", "step-1000000"]
    began_with_adapters = tmp_path / "run"
    shutil.copytree(run, began_with_adapters)
    config = load_config(run / "config.yaml").model_copy(update={"init_adapters": str(run)})
    (began_with_adapters / "config.yaml").write_text(dump_config(config))
    assert whole_checkpoints(began_with_adapters, told.append)[0].name == "step-000000"
    assert ["step-000010" in line and "adapter_config.json" in line for line in told] == [True, True]


def test_what_is_chosen_is_reported_on_the_other_half(
    run: Path, held_out: Path, make_policy: Callable[..., Policy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "scores.json"
    assert main(["eval", str(run), "--data", str(held_out), "--select", "--device", "cpu", "--json", str(file)]) == 0
    printed, found = capsys.readouterr(), json.loads(file.read_text())
    first, second = halves(load_questions(held_out))
    sampling = load_config(run / "config.yaml").sampling

    def mean(filled: float | None, questions: Sequence[LabelledQuestion]) -> float:
        policy = make_policy(filled or 0.02)
        return float(
            evaluate(policy, questions, None if filled is None else "solver", sampling).measures["mean@1"].mean()
        )

    names = {"tiny": None, "step-000009": 0.02, "step-1000000": 0.1}
    by = {Path(name).name: summary["mean@1"]["mean"] for name, summary in found["chosen_by"].items()}
    assert by == {name: mean(filled, first) for name, filled in names.items()}
    best = max(by, key=lambda name: by[name])
    assert Path(found["chosen"]).name == best
    assert [row["question"] for row in found["asked"]] == [q.question for q in second]
    assert found["before"]["mean@1"]["mean"] == mean(None, second)
    after = names[Path(found["models"][1]).name]
    assert found["after"]["mean@1"]["mean"] == mean(after, second)
    assert "step-000010 is left out" in printed.err
    assert "Chosen by: accuracy" in printed.out


def test_what_cannot_be_selected_is_said_in_a_sentence(
    run: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def mistake(*argv: object) -> str:
        assert main(["eval", *map(str, argv), "--data", str(held_out), "--select"]) == 2
        return capsys.readouterr().err

    for argv in (["tiny"], [run, "tiny"], [run / "checkpoints" / "step-000009"]):
        assert "one run directory" in mistake(*argv)
    new_run(tmp_path / "new")
    assert "no run with checkpoints" in mistake(tmp_path / "new")
