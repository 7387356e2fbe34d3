"""What a user can get wrong is told in a sentence with the option, before torch is imported, and leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ireasoner.app.cli import main
from ireasoner.method.types import UsageError
from ireasoner.model.source import TINY_MODEL
from ireasoner.training import checks, loop
from ireasoner.training.checks import check_start
from ireasoner.training.config import resolve
from ireasoner.training.recorder import writer_lock
from ireasoner.training.state import Observer

# By the option that is wrong: its value in the folder `place`, and what is said.
WRONG = {
    "images none": ({"images": "none"}, "--images: Cannot read the image folder"),
    "images empty": ({"images": "empty"}, "--images: No image in the folder"),
    "images unreadable": ({"images": "junk"}, "--images: None of the 1 images"),
    "images set aside": ({"eval-data": "every.jsonl"}, "--images: All 2 images in the folder"),
    "eval-data none": ({"eval-data": "none.jsonl"}, "--eval-data: cannot read"),
    "eval-data empty": ({"eval-data": "empty.jsonl"}, "--eval-data: "),
    "eval-data malformed": ({"eval-data": "malformed.jsonl"}, "malformed.jsonl, line 1: "),
    "held-out none": ({"held-out": "none.jsonl"}, "--held-out: cannot read"),
    "labels none": ({"labels": "none.jsonl"}, "--labels: cannot read"),
    "labels elsewhere": ({"labels": "elsewhere.jsonl"}, "--labels: no question in"),
    "model none": ({"model": "models/none"}, "--model: cannot load the model"),
    "model no config": ({"model": "empty"}, "has no config.json"),
    "model no processor": ({"model": "half"}, "with neither preprocessor_config.json nor processor_config.json"),
    "model no weights": ({"model": "weightless"}, "it has neither model.safetensors nor"),
    "model no hub": ({"model": "owner/name"}, "--model: cannot load the model 'owner/name': it could"),
    "recipe none": ({"recipe": "none.yaml"}, "there is no recipe"),
    "recipe broken": ({"recipe": "malformed.jsonl"}, "recipe"),
    "preset none": ({"preset": "none.yaml"}, "there is no preset"),
    "reward none": ({"reward": "none.py:fn"}, "--reward: cannot read the reward file"),
    "reward broken": ({"reward": "malformed.py:fn"}, "--reward: the reward file"),
    "device": ({"device": "gpu"}, "--device gpu is no device"),
    "tracker": ({"report-to": "mlflow"}, "--report-to mlflow needs the package mlflow"),
    "out is a file": ({"out": "malformed.py"}, "--out "),
    "out below a file": ({"out": "malformed.py/run"}, "Not a directory"),
    "out with a run": ({"out": "other-run"}, "holds a run already"),
    "out among images": ({"out": "pool/run"}, "lies inside the image folder"),
}  # fmt: skip
PATHS = ("images", "eval-data", "held-out", "labels", "recipe", "preset", "out", "reward")
# Makes each of the mistakes in one process, in which none of the packages below may be imported.
MAKE_MISTAKES = """
import json, sys
from ireasoner.app.cli import main
for name, arguments in json.load(sys.stdin).items():
    print(f"=== {name}", file=sys.stderr)
    code = main(arguments)
    assert code == 2, (name, code)
    heavy = sorted(set(sys.modules) & {"torch", "transformers", "peft", "accelerate"})
    assert not heavy, (name, heavy)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two images, and things to get wrong."""
    place = tmp_path_factory.mktemp("place")
    for folder in ("pool", "empty", "junk", "models", "half", "weightless", "other-run/checkpoints"):
        (place / folder).mkdir(parents=True)
    rows = []
    for name in ("red", "blue"):
        Image.new("RGB", (84, 84), name).save(place / "pool" / f"{name}.png")
        rows.append(json.dumps({"image": f"pool/{name}.png", "question": "Which colour?", "answer": name}))
    Image.new("RGB", (84, 84), "green").save(place / "green.png")
    (place / "every.jsonl").write_text("\n".join(rows))
    (place / "elsewhere.jsonl").write_text(rows[0].replace("pool/red", "green"))
    (place / "empty.jsonl").write_text("")
    for name in ("malformed.jsonl", "malformed.py"):
        (place / name).write_text("{: not this\n")
    (place / "junk" / "a.png").write_bytes(b"junk")
    shutil.copyfile(TINY_MODEL / "config.json", place / "half" / "config.json")
    for file in TINY_MODEL.iterdir():
        if file.suffix == ".json":
            shutil.copyfile(file, place / "weightless" / file.name)
    return place


def options(place: Path, **changes: object) -> list[str]:
    given = {"images": "pool", "model": "tiny", "steps": "1", "device": "cpu", **changes}
    values = {name: place / str(value) if name in PATHS else value for name, value in given.items()}
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def said(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is said of each mistake in WRONG."""
    out = tmp_path_factory.mktemp("out")
    new = out / "new" / "run"
    arguments = {name: ["train", *options(place, **{"out": str(new), **wrong})] for name, (wrong, _) in WRONG.items()}
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(out / "home")}
    done = subprocess.run(
        [sys.executable, "-c", MAKE_MISTAKES], input=json.dumps(arguments), env={**os.environ, **unreachable},
        cwd=place, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (out / "new").exists()
    lines = iter(done.stderr.splitlines())
    return {line.removeprefix("=== "): next(lines) for line in lines}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_one_sentence_before_torch_is_imported(mistake: str, said: dict[str, str]):
    assert said.keys() == WRONG.keys()  # a second line would stand in the place of the next one
    assert WRONG[mistake][1] in said[mistake]


def test_what_is_checked_is_not_read_twice(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = resolve({"images": str(place / "pool"), "model": "tiny", "steps": 1, "device": "cpu"})
    inputs = check_start(config, tmp_path / "run")
    monkeypatch.setattr(checks, "check_start", None)
    monkeypatch.setattr("ireasoner.training.items.open_source", None)
    monkeypatch.setattr("ireasoner.model.source._read_json", None)
    with pytest.raises(KeyboardInterrupt):
        loop.start(config, tmp_path / "run", Observer(on_message=interrupt), inputs=inputs)


def test_the_wait_for_the_model_is_told_first(place: Path, tmp_path: Path):
    config = resolve({"images": str(place / "pool"), "model": "tiny", "steps": 1, "device": "cpu"})
    said: list[str] = []

    def tell(message: str) -> None:
        said.append(message)
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        loop.start(config, tmp_path / "run", Observer(on_message=tell))
    assert said[0].startswith("Loading tiny (")


# --- what leaves no folder --------------------------------------------------------------------------------------------


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def no_memory(*_: Any, **__: Any) -> Any:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("fault", [interrupt, no_memory])
@pytest.mark.parametrize("where", ["loading.load_backbone", "loading.load_processor", "loading.make_policy"])
def test_a_run_that_cannot_be_loaded_leaves_no_folder(
    where: str, fault: Callable[..., Any], there: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "runs" / "new"
    if there:
        out.mkdir(parents=True)
        (out / "note.txt").write_text("mine")
    before = files(tmp_path)
    monkeypatch.setattr(f"ireasoner.model.{where}", fault)
    assert main(["train", *options(place, out=out)]) == (130 if fault is interrupt else 2)
    assert files(tmp_path) == before
    assert out.exists() == (tmp_path / "runs").exists() == there


def test_an_option_that_only_the_loaded_model_refuses_leaves_no_folder(place: Path, tmp_path: Path):
    assert main(["train", *options(place, **{"out": tmp_path / "run", "lora-targets": "attention"})]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_run_has_begun_in_the_meantime_is_left_alone(place: Path, tmp_path: Path):
    """Two starts into one folder: the one that has loaded its model first has it."""
    out = tmp_path / "run"
    config = resolve({"images": str(place / "pool"), "model": "tiny", "steps": 1, "device": "cpu"})

    def begin(message: str) -> None:
        out.mkdir(exist_ok=True)
        (out / "config.yaml").write_text("that of another run")

    with pytest.raises(UsageError, match="holds a run already"):
        loop.start(config, out, Observer(on_message=begin))
    assert files(out) == {"config.yaml": b"that of another run"}


def test_a_folder_in_which_a_run_is_just_beginning_is_refused(place: Path, tmp_path: Path):
    config = resolve({"images": str(place / "pool"), "model": "tiny"})
    with writer_lock(tmp_path), pytest.raises(UsageError, match="another process is training"):
        check_start(config, tmp_path)
