"""The rooms of the package: which may import which, and which work without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "ireasoner"
# What a room may import of the others: rooms, or single modules of them. The toy world knows the
# package; the package does not know the toy world.
ALLOWED = {
    "method": (),
    "model": ("method.types", "method.recipe"),
    "rollouts": ("method", "model"),
    "training": ("method", "model", "rollouts"),
    "page": (
        "method",
        "training.config",
        "training.recorder",
        "training.watch",
        "training.statistics",
        "training.advice",
        "training.energy",
    ),
    "playground": ("method.types",),
    "plugins": ("method", "model.inputs", "training"),
    "studies": ("method", "model", "rollouts", "training", "page", "playground"),
    "app": ("method", "model", "rollouts", "training", "page", "playground", "studies"),
}
NO_TORCH = ("method", "page", "playground", "plugins")
HOSTED = ("plugins.lmms_eval", "plugins.likelihoods")  # imported where the program that they are for has its model
LIGHT = (
    "training.config", "training.recorder", "training.watch", "training.statistics", "training.advice",
    "training.energy", "training.checks", "training.targets", "model.source", "model.parallel", "studies.compare",
    "app.cli", "app.display",
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the package by its name below `ireasoner`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name not in ("__init__", "__main__"):
            found[name] = path
    return found


def imported(name: str, path: Path) -> Iterator[tuple[str, bool]]:
    """The modules of the package that a module imports, late or not; whether late."""
    known, tree = modules(), ast.parse(path.read_text("utf-8"))
    at_top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            named = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        own = [each.removeprefix("ireasoner.") for each in named if each.startswith("ireasoner.")]
        yield from ((each, id(node) not in at_top) for each in own if each in known and each not in ALLOWED)


def test_the_rooms_are_these():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_what_it_may(room: str):
    for name, path in modules().items():
        if name.split(".")[0] != room:
            continue
        for other, _ in imported(name, path):
            allowed = (room, *ALLOWED[room])
            assert any(other == each or other.startswith(f"{each}.") for each in allowed), f"{name} imports {other}"


def test_no_module_imports_itself_by_way_of_others():
    """Late imports count too: a circle is hard to hold in the head whenever it closes."""
    arrows = {name: {other for other, _ in imported(name, path)} - {name} for name, path in modules().items()}
    left = dict(arrows)
    while ends := [name for name, others in left.items() if not others & left.keys()]:
        for name in ends:
            del left[name]
    assert left == {}


def test_rooms_without_torch():
    names = [name for name in modules() if name.split(".")[0] in NO_TORCH and name not in HOSTED] + list(LIGHT)
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(f"ireasoner.{{name}}")
    heavy = sorted(set(sys.modules) & {{"torch", "transformers", "peft", "accelerate", "safetensors"}})
    assert not heavy, (name, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_loop_is_short():
    """It is read from top to bottom: what is not play, update or record lives elsewhere."""
    assert len((PACKAGE / "training" / "loop.py").read_text("utf-8").splitlines()) < 200
