"""The wheel and the sdist: they are built, pass the index's checks, hold what they should, and work when installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import ireasoner

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "ireasoner"


def run(*command: object, cwd: Path) -> str:
    """What a command prints; it must succeed, and finds nothing of this checkout by PYTHONPATH."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=kept, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def of_the_project() -> set[str]:
    """The files that git knows, or would take: not those that it ignores, such as runs."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    return {path for path in listed if (ROOT / path).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from what it holds."""
    place = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", place, cwd=ROOT)
    (sdist,) = place.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked", filter="data")
    (source,) = (place / "unpacked").iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", place, cwd=source)
    (wheel,) = place.glob("*.whl")
    return sdist, wheel


def test_the_index_would_take_them(built: tuple[Path, Path]):
    run(sys.executable, "-m", "twine", "check", "--strict", *built, cwd=ROOT)


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]):
    _, wheel = built
    sources = {path for path in of_the_project() if path.startswith("src/ireasoner/")}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {path.removeprefix("src/") for path in sources}
    for needed in ("method/quantities.toml", "training/recipes/default.yaml", "method/prompts/proposer.txt",
                   "model/tiny_lmm/model.safetensors", "page/templates/page.html"):  # fmt: skip
        assert f"ireasoner/{needed}" in held
    assert wheel.stat().st_size < 12e6


def test_the_sdist_holds_the_project_and_no_run(built: tuple[Path, Path]):
    sdist, _ = built
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2]: member.size for member in archive if member.isfile()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "docs/world.png", "tests/conftest.py"} <= set(files)
    assert set(files) <= of_the_project() | {"PKG-INFO"}
    assert max(files.values()) < 12e6
    assert sdist.stat().st_size < 20e6


def test_the_installed_wheel_works_in_a_clean_environment(built: tuple[Path, Path], tmp_path: Path):
    """Its dependencies come from this environment, for they are large; the package itself comes from the wheel."""
    venv.create(tmp_path / "clean", with_pip=False, symlinks=True)
    python = tmp_path / "clean" / "bin" / "python"
    (packages,) = (tmp_path / "clean" / "lib").glob("python*/site-packages")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[1], cwd=tmp_path)
    # A .pth file here would bring the editable install along; a plain path brings the dependencies alone.
    (packages / "dependencies.pth").write_text(str(Path(yaml.__file__).parents[1]))
    where = run(python, "-c", "import ireasoner; print(ireasoner.__file__, ireasoner.__version__)", cwd=tmp_path)
    assert where.split() == [str(packages / "ireasoner" / "__init__.py"), version("ireasoner")]
    assert "train" in run(tmp_path / "clean" / "bin" / "ireasoner", "--help", cwd=tmp_path)
    run(tmp_path / "clean" / "bin" / "ireasoner", "playground", "world", "--images", 2, "--questions", 2, cwd=tmp_path)
    assert len(list((tmp_path / "world" / "unlabeled").rglob("*.png"))) == 2


def test_every_place_names_the_same_version():
    stated = {
        "pyproject.toml": tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"],
        "CITATION.cff": yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"],
        "__init__.py": ireasoner.__version__,
    }
    assert len(set(stated.values())) == 1, stated
    assert f"\n## {ireasoner.__version__} " in (ROOT / "CHANGELOG.md").read_text("utf-8")
