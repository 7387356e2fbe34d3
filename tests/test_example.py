"""The example that tells the whole method in one file does what `train` does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ireasoner.playground import world
from ireasoner.training.config import resolve
from ireasoner.training.loop import start
from ireasoner.training.recorder import read_records

EXAMPLE = Path(__file__).parents[1] / "examples" / "loop.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("example_loop", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_learns_what_train_learns(example: Any, tmp_path: Path):
    """Same pictures, same seed: the same rewards at every step, after updates of both roles."""
    rng = np.random.default_rng(4)
    (tmp_path / "pool").mkdir()
    for i in range(4):
        picture = world.draw(world.sample_picture(rng), world.sample_style("varied", rng), rng)
        picture.save(tmp_path / "pool" / f"{i}.png")
    options = {
        "images": str(tmp_path / "pool"), "model": "tiny", "recipe": "paper", "steps": 3, "images_per_step": 2,
        "group_size": 3, "proposer_every": 2, "probe_every": 0, "blank_every": 0, "device": "cpu",
    }  # fmt: skip
    config = resolve(options)
    example.train(config, tmp_path / "example")
    start(config, tmp_path / "run")
    told = [json.loads(line) for line in (tmp_path / "example" / "metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(told, read_records(tmp_path / "run" / "metrics.jsonl"), strict=True):
        assert ours["reward"] == pytest.approx(theirs["reward/solver/total"], abs=1e-9)
        assert ours["majority_fraction"] == pytest.approx(theirs["answers/majority_fraction"])
        assert ours["learned"]["solver"]["loss"] == pytest.approx(theirs["loss/solver"], abs=1e-7)
        assert ("proposer" in ours["learned"]) == ("loss/proposer" in theirs)
    assert (tmp_path / "example" / "solver" / "adapter_model.safetensors").is_file()


def test_the_example_fits_on_a_few_screens():
    assert len(EXAMPLE.read_text("utf-8").splitlines()) < 250


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its cells in their order, with fewer pictures and steps; no outputs are committed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((EXAMPLE.parent / "quickstart.ipynb").read_text("utf-8"))
    assert notebook["nbformat"] == 4
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            source = "".join(cell["source"]).replace("64", "4").replace("steps=10", "steps=1, images_per_step=4")
            exec(compile(source, cell["id"], "exec"), names)
    assert [row["step"] for row in names["run"].metrics()] == [1]
    assert names["after"].votes == 5
