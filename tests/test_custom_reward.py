"""A reward of the user's own: it trains, it is recorded, and looking at somebody's run never runs their code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ireasoner.app.cli import main
from ireasoner.method.scoring import RewardError
from ireasoner.playground import world
from ireasoner.training.config import load_config, resolve
from ireasoner.training.custom_reward import load_reward
from ireasoner.training.recorder import read_episodes, read_records

pytestmark = pytest.mark.usefixtures("copied_models")

# Pays short answers, and what the group says too; whoever imports the file leaves a mark beside it.
REWARD = """
from pathlib import Path

with Path(__file__).with_name("imported").open("a") as marks:
    marks.write("x")

def fn(group, context):
    votes = [group.answer_keys.count(key) / len(group.answer_keys) for key in group.answer_keys]
    return {"vote": votes, "short": [0.1 if s.answer and len(s.answer) < 3 else None for s in group.solutions]}

def broken(group, context):
    return 1 / 0
"""
TINY = ("--model", "tiny", "--steps", "2", "--images-per-step", "2", "--group-size", "3", "--save-every", "1")
SHORT = ("--max-question-tokens", "40", "--max-solution-tokens", "48", "--probe-every", "0", "--device", "cpu")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two pictures and a reward file, to be in."""
    rng = np.random.default_rng(2)
    (tmp_path / "pool").mkdir()
    for name in "ab":
        picture = world.draw(world.sample_picture(rng), world.sample_style("varied", rng), rng)
        picture.save(tmp_path / "pool" / f"{name}.png")
    (tmp_path / "my_rewards.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*more: str) -> int:
    return main(["train", "--images", "pool", *TINY, *SHORT, *more])


def imports(place: Path) -> int:
    return len((place / "imported").read_text()) if (place / "imported").exists() else 0


@pytest.mark.usefixtures("no_report")
def test_it_trains_and_is_recorded_under_its_own_names(place: Path, capsys: pytest.CaptureFixture[str]):
    assert train("--out", "run", "--reward", "my_rewards.py:fn") == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    assert f"recipe default, paid by {place}/my_rewards.py:fn" in printed
    assert "vote 0." in printed or "vote 1." in printed
    assert "step agreement" not in printed  # which is recorded and not paid
    episodes = [e for e in read_episodes(place / "run") if e.trajectories]
    assert episodes
    for t in (t for e in episodes for t in e.trajectories):
        assert {name for name, part in t.parts.items() if part.weight} == {"vote", "short"}
        assert t.reward == pytest.approx(sum(part.weight * part.value for part in t.parts.values()))
        assert t.well_formed or t.reward == 0.0
    assert any(t.reward for e in episodes for t in e.trajectories)
    records = list(read_records(place / "run" / "metrics.jsonl"))
    assert all({"reward/solver/vote", "reward/solver/short"} <= set(record) for record in records)
    config = load_config(place / "run" / "config.yaml")
    assert config.recipe.reward == f"{place}/my_rewards.py:fn"
    assert config.reward_sha256 is not None
    assert len(config.reward_sha256) == 64


def test_a_recipe_may_name_it_from_its_own_folder(place: Path):
    (place / "recipes").mkdir()
    (place / "my_rewards.py").rename(place / "recipes" / "my_rewards.py")
    (place / "recipes" / "mine.yaml").write_text("reward: my_rewards.py:fn\nadvantage: rloo\n")
    config = resolve({"images": "pool", "model": "tiny", "recipe": "recipes/mine.yaml"})
    assert config.recipe.reward == f"{place}/recipes/my_rewards.py:fn"
    assert imports(place / "recipes") == 0  # resolving a config imports nothing
    function, _ = load_reward(config)
    assert callable(function)
    assert imports(place / "recipes") == 1


def test_only_train_imports_it_and_on_resume_only_when_it_is_named_again(
    place: Path, capsys: pytest.CaptureFixture[str]
):
    row = json.dumps({"image": "pool/a.png", "question": "What?", "answer": "red"})
    (place / "data.jsonl").write_text(row)
    assert train("--out", "run", "--reward", "my_rewards.py:fn") == 0
    once = imports(place)
    assert main(["report", "run"]) == 0
    assert main(["runs", "."]) == 0
    assert main(["eval", "run", "--data", "data.jsonl", "--device", "cpu"]) == 0
    main(["validity", "run"])
    assert imports(place) == once
    # A run that is not done, as after a kill.
    (place / "run" / "summary.json").unlink()
    capsys.readouterr()
    assert main(["train", "--resume", "run"]) == 2
    assert f"--reward {place}/my_rewards.py:fn" in capsys.readouterr().err
    assert imports(place) == once
    assert main(["train", "--resume", "run", "--reward", "my_rewards.py:other"]) == 2
    assert imports(place) == once
    assert main(["train", "--resume", "run", "--reward", "my_rewards.py:fn"]) == 0
    assert imports(place) > once
    (place / "run" / "summary.json").unlink()
    (place / "my_rewards.py").write_text(REWARD + "\n# changed\n")
    capsys.readouterr()
    assert main(["train", "--resume", "run", "--reward", "my_rewards.py:fn"]) == 2
    assert "has changed since" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reward", "named"),
    [
        ("nowhere.py:fn", "cannot read the reward file"),
        ("my_rewards.py:nothing", "has no function nothing"),
        ("my_rewards.py:Path.x", "choose agreement"),
        ("bad.py:fn", "cannot be imported: SyntaxError"),
        ("my_rewards.py:broken", "failed: ZeroDivisionError"),
    ],
)
def test_what_is_wrong_with_it_is_said_in_a_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], reward: str, named: str
):
    (place / "bad.py").write_text("def fn(:\n")
    assert train("--out", "run", "--reward", reward) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_a_published_reward_by_the_name_of_its_recipe_is_told_from_one(place: Path, capsys: pytest.CaptureFixture[str]):
    assert train("--out", "run", "--reward", "r-zero") == 2
    assert "chosen by --recipe r-zero" in capsys.readouterr().err


def test_the_file_is_a_module_like_others(place: Path):
    """It may hold dataclasses, and import a file that lies beside it."""
    (place / "helping.py").write_text("def help_out(n):\n    return [0.5] * n\n")
    (place / "other.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from helping import help_out\n"
        "@dataclass\nclass Weight:\n    value: float = 1.0\n"
        "def fn(group, context):\n    return help_out(len(group.texts))\n"
    )
    function, _ = load_reward(resolve({"images": "pool", "model": "tiny", "reward": f"{place}/other.py:fn"}))
    assert callable(function)


def test_a_file_that_is_not_there_is_named(place: Path):
    config = resolve({"images": "pool", "model": "tiny", "reward": "nowhere.py:fn"})
    with pytest.raises(RewardError, match="cannot read the reward file"):
        load_reward(config)
