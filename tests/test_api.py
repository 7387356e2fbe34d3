"""ireasoner from Python: what `__all__` names, and a run with a reward function of the user's own."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

import ireasoner
from ireasoner.app.cli import main
from ireasoner.app.display import Display
from ireasoner.playground import world
from ireasoner.training.config import resolve

pytestmark = pytest.mark.usefixtures("copied_models")

OPTIONS = {
    "images_per_step": 2, "group_size": 3, "max_question_tokens": 40, "max_solution_tokens": 48, "probe_every": 0,
    "save_every": 1, "device": "cpu",
}  # fmt: skip


def brief(group: ireasoner.Group, context: ireasoner.Context) -> dict[str, list[float | None]]:
    agreed = [float(key is not None and key == group.vote.answer) for key in group.answer_keys]
    return {"agreed": [*agreed], "brief": [0.1 if s.words_before_answer < 40 else None for s in group.solutions]}


def other(group: ireasoner.Group, context: ireasoner.Context) -> list[float]:
    return [0.0 for _ in group.solutions]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, folder = np.random.default_rng(2), tmp_path_factory.mktemp("pool")
    for name in "ab":
        picture = world.draw(world.sample_picture(rng), world.sample_style("varied", rng), rng)
        picture.save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def run(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> ireasoner.SavedRun:
    out = tmp_path_factory.mktemp("runs") / "mine"
    return ireasoner.train(pool, "tiny", out, reward=brief, steps=2, **OPTIONS)


def test_the_surface_is_there_and_costs_nothing_to_import():
    code = (
        "import sys, ireasoner\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(ireasoner.__all__) <= set(dir(ireasoner))\n"
        "from ireasoner import *\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'trane'"):
        ireasoner.trane  # noqa: B018
    assert files("ireasoner").joinpath("py.typed").is_file()


def test_type_checkers_see_what_is_imported():
    """The imports of a type checker, and the table by which names are imported when they are used, are the same."""
    (block,) = [node for node in ast.parse(inspect.getsource(ireasoner)).body if isinstance(node, ast.If)]
    seen = {
        (str(node.module).removeprefix("ireasoner."), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {(module, name) for module, names in ireasoner._MODULES.items() for name in names}
    assert {name for _, name in seen} == {*ireasoner.__all__} - {"__version__"}


def test_every_public_name_is_explained():
    for name in ireasoner.__all__:
        if inspect.isclass(found := getattr(ireasoner, name)) or inspect.isfunction(found):
            assert inspect.getdoc(found), name


def test_a_function_is_the_reward(run: ireasoner.SavedRun):
    assert run.summary["steps"] == 2
    metrics = run.metrics()
    assert [row["step"] for row in metrics] == [1, 2]
    assert {"reward/solver/agreed", "reward/solver/brief"} <= metrics[0].keys()
    trajectories = [t for episode in run.episodes() for t in episode.trajectories]
    assert {name for t in trajectories for name, part in t.parts.items() if part.weight} == {"agreed", "brief"}
    assert run.config.recipe.reward.startswith("python:")
    assert run.config.recipe.reward.endswith("test_api.brief")
    assert ireasoner.load_run(str(run.path)) == run
    assert (run.path / "report.html").is_file()


@pytest.mark.usefixtures("no_report")
def test_its_run_goes_on_with_the_same_function_alone(run: ireasoner.SavedRun, capsys: pytest.CaptureFixture[str]):
    (run.path / "summary.json").unlink()  # as if it had been killed
    with pytest.raises(ireasoner.UsageError, match=r"go on in Python, with ireasoner\.resume"):
        ireasoner.resume(run.path)
    assert main(["train", "--resume", str(run.path)]) == 2
    assert "test_api.brief, which was handed to ireasoner.train" in capsys.readouterr().err
    with pytest.raises(ireasoner.UsageError, match="not the function that"):
        ireasoner.resume(run.path, reward=other)
    with pytest.raises(ireasoner.UsageError, match="--steps is 2 in the run, not 1"):
        ireasoner.resume(run.path, reward=brief, steps=1)
    before = list(run.episodes())
    again = ireasoner.resume(run.path, reward=brief)
    assert again.summary["steps"] == 2
    assert list(again.episodes()) == before
    assert ireasoner.resume(run.path, reward=brief, steps=3).summary["steps"] == 3
    assert "step 3/3  reward" in capsys.readouterr().out


@pytest.mark.usefixtures("no_report")
def test_a_run_without_a_function_takes_none(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    told: list[int] = []
    observer = ireasoner.Observer(on_step=lambda step, metrics, episodes: told.append(step))
    run = ireasoner.train(pool, "tiny", observer=observer, reward="discrete", steps=1, **OPTIONS)
    assert run.path.parent == Path("runs")
    assert told == [1]
    (run.path / "summary.json").unlink()
    with pytest.raises(ireasoner.UsageError, match="leave it out"):
        ireasoner.resume(run.path, reward=brief)


def test_a_mistake_is_a_sentence(pool: Path, tmp_path: Path):
    for options, problem in (
        ({"stepz": 3}, "stepz is not an option"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"recipe": "papers"}, "no recipe 'papers'"),
        ({"reward": "python:os.system"}, "is handed to ireasoner.train"),
    ):
        with pytest.raises(ireasoner.UsageError, match=problem):
            ireasoner.train(pool, "tiny", tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ireasoner.UsageError, match="is not a run directory"):
        ireasoner.load_run(tmp_path)


def test_several_processes_need_a_name(pool: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ireasoner.UsageError, match="name its directory"):
        ireasoner.train(pool, "tiny")


def test_a_group_is_scored_without_a_model():
    texts = [f"<think>Step 1: I count {n}.</think><answer>{n}</answer>" for n in (3, 3, 4)]
    context = ireasoner.Context(step_weight=0.0)
    scored = ireasoner.score_group("How many?", texts, ireasoner.load_recipe("answers-only"), context)
    assert scored.vote.answer == ireasoner.answer_key("three", "How many?")
    assert scored.rewards[0] > scored.rewards[2] > 0


def test_progress_is_of_the_run_that_goes_on(pool: Path, tmp_path: Path):
    """An extended run has more steps than the config that it was opened with."""
    config = resolve({"images": str(pool), "model": "tiny", "steps": 2})
    with Display(config, tmp_path) as shown:
        shown.on_start(config.extended(5), 3)
        assert shown.progress.tasks[0].total == 5
        assert shown.progress.tasks[0].completed == 2
        assert shown._time_left(3, 1.0) == "0:00:02 left"
