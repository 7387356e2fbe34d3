"""The documentation builds without a warning, its links lead somewhere, and its commands and Python code work."""

from __future__ import annotations

import ast
import importlib
import os
import posixpath
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

import ireasoner
from ireasoner.app import cli
from ireasoner.playground import world
from ireasoner.training import config as configs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = "<!-- not run:"  # before a block of Python that the test does not run, with the reason
BLOCK = re.compile(r"(?P<before>[^\n]*)\n```(?P<language>\w+)\n(?P<code>.*?)\n```", re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[str, bool]]:
    """The blocks of code in a page, and whether each is to be run."""
    found = BLOCK.finditer("\n" + page.read_text("utf-8"))
    return [(m["code"], not m["before"].startswith(NOT_RUN)) for m in found if m["language"] == language]


# --- the pages --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The places of a page that links can lead to, its links, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("img", "script") and "src" in given:
            self.loads.append(given["src"])
        if tag == "link" and "stylesheet" in given.get("rel", ""):
            self.loads.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """The built pages by their paths. A warning of the generator fails the build."""
    place = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", place / "docs")
    for path in (*ROOT.glob("*.md"), ROOT / "mkdocs.yml"):
        shutil.copy(path, place)
    (place / "src").symlink_to(ROOT / "src")
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tools'}:{ROOT / 'src'}", "COLUMNS": "100"}
    command = [sys.executable, "-W", "error", "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    built = place / "build" / "docs"
    for name in ("world.png", "page-working.png", "page-episode.png"):
        assert (built / name).is_file()
    pages = built.rglob("*.html")
    return {path.relative_to(built).as_posix(): Page(path.read_text("utf-8")) for path in pages}


def test_every_page_is_built(site: dict[str, Page]):
    sources = [page.relative_to(ROOT / "docs") for page in PAGES[1:]]
    assert {source.with_suffix(".html").as_posix() for source in sources} <= set(site)


def test_every_link_leads_to_a_place_on_a_page(site: dict[str, Page]):
    missing = []
    for name, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), parts.path)) if parts.path else name
            if parts.netloc or name == "404.html" or not target.endswith(".html"):
                continue
            if target not in site or (parts.fragment and unquote(parts.fragment) not in site[target].places):
                missing.append(f"{name}: {link}")
    assert not missing


def test_nothing_is_loaded_from_elsewhere_and_every_picture_is_there(site: dict[str, Page]):
    for name, page in site.items():
        for load in page.loads:
            assert not urlsplit(load).netloc, f"{name} loads {load}"
            if load.endswith(".png"):
                assert (ROOT / "docs" / name).parent.joinpath(load).is_file(), f"{name}: {load}"


def test_the_table_of_options_has_every_option(site: dict[str, Page]):
    assert {name.replace("_", "-") for name in configs.PATHS} <= site["options.html"].places


def test_the_reference_of_the_api_has_every_public_name(site: dict[str, Page]):
    assert {f"ireasoner.{name}" for name in ireasoner.__all__} - site["api.html"].places == {"ireasoner.__version__"}


def test_the_reference_shows_every_command():
    shown = [code for code, _ in blocks(ROOT / "docs" / "commands.md", "command")]
    assert shown == list(cli.COMMANDS)


# --- README -----------------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = ROOT / parts.path
        assert target.is_file(), link
        if parts.fragment:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert parts.fragment in {_slug(heading) for heading in headings}, link


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# --- commands and code ------------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every line of a block of shell commands, with its words and the page that it is on."""
    for page in PAGES:
        for code, _ in blocks(page, "sh"):
            for line in code.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield page.name, words


def test_the_documented_commands_can_be_given():
    app, checked = cli.build_app(), 0
    for page, words in commands():
        line = f"{page}: {shlex.join(words)}"
        if words[0] in ("ireasoner", "ssh") or "-m ireasoner " in line:
            given = words[words.index("ireasoner") + 1 :]
            _, bound, _ = app.parse_args(given, exit_on_error=False, print_error=False)
            named = {name: bound.arguments[name] for name in configs.PATHS if name in bound.arguments}
            options = {name: value for name, value in named.items() if not isinstance(value, bool)}
            configs.config_of({"images": "photos", "model": "tiny", **options})
            checked += 1
        elif words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text("utf-8"), line
        elif words[0] == "python" and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), line
    assert checked >= 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the code in the documentation names: pictures, a reward, and a short run."""
    from ireasoner.training.loop import start

    folder, rng = tmp_path_factory.mktemp("code"), np.random.default_rng(0)
    (folder / "photos").mkdir()
    for name in (*(f"photos/{i}.png" for i in range(4)), "photo.jpg", "left.png", "right.png"):
        world.draw(world.sample_picture(rng), world.sample_style("varied", rng), rng).save(folder / name)
    (reward,) = (code for code, _ in blocks(ROOT / "docs" / "rewards.md", "python") if code.startswith("# my_rewards"))
    (folder / "my_rewards.py").write_text(reward, "utf-8")
    options = {"steps": 1, "images_per_step": 4, "device": "cpu", "probe_every": 0, "blank_every": 0}
    config = configs.resolve({"images": str(folder / "photos"), "model": "tiny", **options})
    start(config, folder / "runs" / "mine")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
@pytest.mark.usefixtures("no_report")
def test_the_documented_code_runs(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch):
    """In the order of the page, with the tiny model and one small step in the place of large ones."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    names: dict[str, object] = {"__name__": "documentation"}
    for code, run in blocks(page, "python"):
        code = code.replace("Qwen/Qwen2.5-VL-7B-Instruct", "tiny").replace("runs/new", f"runs/{page.stem}")
        code = re.sub(r"\bsteps=\d+", "steps=1, images_per_step=1, max_solution_tokens=48, probe_every=0", code)
        if run:
            exec(compile(code, page.name, "exec"), names)
        else:
            _check_imports(code)


def _check_imports(code: str) -> None:
    """That code which is not run is Python, and imports nothing of ours that is not there."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ireasoner":
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
