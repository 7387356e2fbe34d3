"""What SECURITY.md promises: every test that it names exists, and the promises that no other file holds."""

from __future__ import annotations

import ast
import errno
import json
import os
import pickle
import re
import shutil
import socket
from pathlib import Path

import pytest

from ireasoner.app.cli import main
from ireasoner.app.display import Display
from ireasoner.method.types import UsageError
from ireasoner.model.backbone import load_backbone, load_processor
from ireasoner.model.source import TINY_MODEL, ModelError
from ireasoner.page.server import serve
from ireasoner.training.config import load_config
from models import load
from runs import new_run

TESTS = Path(__file__).parent
SECURITY = TESTS.parent / "SECURITY.md"


def test_every_test_that_is_named_exists():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", SECURITY.read_text("utf-8"))
    assert len(named) > 30
    held = {
        path.name: {node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}
        for path in TESTS.glob("test_*.py")
    }
    assert [f"{file}::{test}" for file, test in named if test not in held.get(file, ())] == []


def test_every_promise_names_a_test():
    rows = [line for line in SECURITY.read_text("utf-8").splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith("| What is done")]
    assert len(promises) > 20
    assert [row for row in promises if "`test_" not in row] == []


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.sprung),)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny model, to do with as one likes."""
    return Path(shutil.copytree(TINY_MODEL, tmp_path / "model"))


def test_pickled_weights_are_not_loaded(model: Path, tmp_path: Path):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(trap)
    with pytest.raises(ModelError, match="cannot load the model"):
        load_backbone(str(model))
    policy = load()
    (tmp_path / "solver").mkdir()
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        (tmp_path / "solver" / name).write_bytes(trap)
        with pytest.raises(ModelError, match="cannot be read"):
            policy.load_adapters(tmp_path, ["solver"])
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()  # so it is one


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "its_own"])
def test_code_that_a_model_brings_is_not_run(model: Path, tmp_path: Path, kind: str):
    (model / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\nclass Own: ...\n")
    own = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
    for path in model.glob("*config.json"):
        found = json.loads(path.read_text())
        found["auto_map"] = dict.fromkeys(own, "code.Own")
        path.write_text(json.dumps(found | ({"model_type": kind} if path.name == "config.json" else {})))
    for loads in (load_backbone, load_processor):
        if kind == "its_own":
            with pytest.raises(ModelError, match="cannot load the"):
                loads(str(model))
        else:
            loads(str(model))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("option", ["images", "reward"])
def test_a_foreign_run_sends_no_control_characters_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], option: str
):
    run = new_run(tmp_path / "run").run_dir
    config = (run / "config.yaml").read_text()
    value = {"images": '"/no/\\e[31m\\x9b31m"', "reward": '"\\e[31m\\x9b31m.py:fn"'}[option]
    config, changed = re.subn(rf"(?m)^( *){option}: .*$", lambda found: f"{found[1]}{option}: {value}", config)
    assert changed == 1
    (run / "config.yaml").write_text(config)
    assert main(["train", "--resume", str(run)]) == 2
    Display(load_config(run / "config.yaml"), run).say("Skipped \x1b[31m\x9b31m.")
    printed = "".join(capfd.readouterr())
    assert "31m" in printed
    assert all(c.isprintable() or c == "\n" for c in printed)


def test_the_page_is_served_on_the_loopback_address_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, int]] = []

    def create_server(address: tuple[str, int], **options: object) -> socket.socket:
        asked.append(address)
        raise OSError(errno.EADDRINUSE, "")

    monkeypatch.setattr("ireasoner.page.server.socket.create_server", create_server)
    with pytest.raises(UsageError, match="port 0 cannot be used"):
        serve([new_run(tmp_path / "run").run_dir], 0, print)
    assert asked == [("127.0.0.1", 0)]
