"""A run that begins with the adapters of another one: bitwise these, all else anew, and the origin is recorded."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ireasoner.app.cli import main
from ireasoner.method.types import ROLES
from ireasoner.model.source import TINY_MODEL
from ireasoner.playground import dataset
from ireasoner.training.config import load_config
from ireasoner.training.recorder import read_records
from ireasoner.training.watch import ENDED_ITSELF

pytestmark = pytest.mark.usefixtures("copied_models", "no_reports")

WEIGHTS = "adapter_model.safetensors"
SHORT = {
    "model": "tiny", "device": "cpu", "recipe": "paper", "images-per-step": 3, "group-size": 3, "steps": 2,
    "max-solution-tokens": 64, "save-every": 1, "keep-checkpoints": 0, "proposer-every": 1, "probe-every": 0,
    "learning-rate": "1e-2", "blank-every": 0,
}  # fmt: skip


def command(*argv: object) -> tuple[int, str]:
    """Exit code and everything printed, of a command run in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = main([str(argument) for argument in argv])
    return code, " ".join(out.getvalue().split())


def train(out: Path, **options: object) -> str:
    options = {**SHORT, "out": out, **{name.replace("_", "-"): value for name, value in options.items()}}
    code, printed = command("train", *(text for name, value in options.items() for text in (f"--{name}", value)))
    assert code == 0, printed
    return printed


def adapters(folder: Path) -> dict[str, bytes]:
    return {role: (folder / role / WEIGHTS).read_bytes() for role in ROLES if (folder / role).exists()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of images, and a finished run on the first one, in which both roles have learned."""
    place = tmp_path_factory.mktemp("place")
    dataset.write_unlabeled(place / "one", 3, "chalk", seed=1)
    dataset.write_unlabeled(place / "other", 3, "varied", seed=2)
    dataset.write_questions(place / "test", 2, "chalk")
    train(place / "first", images=place / "one")
    assert set(adapters(place / "first")) == set(ROLES)
    return place


@pytest.fixture(scope="module")
def second(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the second folder that goes on from a copy of the first run, which has been deleted since."""
    out = tmp_path_factory.mktemp("second") / "run"
    origin = Path(shutil.copytree(place / "first", out.with_name("origin")))
    given = {"eval_data": place / "test/test.jsonl", "eval_questions": 1}
    train(out, images=place / "other", seed=9, init_adapters=origin, **given)
    shutil.rmtree(origin)
    return out


@pytest.fixture
def stopped(second: Path, tmp_path: Path) -> Path:
    """The second run as it was when its first step had been saved."""
    out = Path(shutil.copytree(second, tmp_path / "stopped"))
    (out / "summary.json").unlink()
    for folder in (*ROLES, "checkpoints/step-000002"):
        shutil.rmtree(out / folder)
    return out


def origin(run: Path) -> Path:
    """The run whose adapters it began with."""
    path = load_config(run / "config.yaml").init_adapters
    assert path is not None
    return path


def test_it_begins_with_these_adapters_and_all_else_is_new(place: Path, second: Path):
    begins = second / "checkpoints" / "step-000000"
    assert adapters(begins) == adapters(place / "first")
    assert adapters(second) != adapters(place / "first")
    state = json.loads((begins / "state.json").read_text())
    for role in ROLES:
        assert load_file(begins / f"optimizer-{role}.safetensors") == {}
        assert state["learners"][role] == {"kl_coef": 1e-3, "baseline": None}


def test_where_they_came_from_is_recorded_by_a_hash(place: Path, second: Path):
    config = load_config(second / "config.yaml")
    assert config.init_adapters == second.with_name("origin")
    hashes = {role: hashlib.sha256(data).hexdigest() for role, data in adapters(place / "first").items()}
    assert config.init_adapters_sha256 == hashes
    card = (second / "solver" / "README.md").read_text()
    assert hashes["solver"] in card
    assert str(place) not in card
    summary = json.loads((second / "summary.json").read_text())
    assert summary["trained_roles"] == list(ROLES)


def test_before_is_the_model_without_adapters(place: Path, second: Path, tmp_path: Path):
    train(tmp_path / "new", images=place / "other", seed=9, eval_data=place / "test/test.jsonl", eval_questions=1)
    assert (second / "before.json").read_bytes() == (tmp_path / "new" / "before.json").read_bytes()


def test_the_kl_is_that_to_the_model_without_adapters(place: Path, second: Path):
    first = json.loads((place / "first" / "metrics.jsonl").read_text().splitlines()[0])
    then = json.loads((second / "metrics.jsonl").read_text().splitlines()[0])
    assert first["kl/solver"] == 0.0  # of new adapters, which add nothing
    assert then["kl/solver"] > 1e-3


def test_the_other_run_may_be_deleted_before_this_one_is_resumed(stopped: Path, second: Path):
    assert not origin(stopped).exists()
    code, printed = command("train", "--resume", stopped)
    assert code == 0, printed
    assert adapters(stopped) == adapters(second)


def test_killed_before_its_first_checkpoint_it_needs_the_very_same_adapters(place: Path, stopped: Path, second: Path):
    shutil.rmtree(stopped / "checkpoints")
    code, printed = command("train", "--resume", stopped)
    assert (code, "--init-adapters: " in printed) == (2, True)
    shutil.copytree(place / "first", origin(stopped))
    try:
        weights = origin(stopped) / "proposer" / WEIGHTS
        shutil.copyfile(place / "first" / "solver" / WEIGHTS, weights)
        code, printed = command("train", "--resume", stopped)
        assert (code, "has changed since the run was started" in printed) == (2, True)
        shutil.copyfile(place / "first" / "proposer" / WEIGHTS, weights)
        code, printed = command("train", "--resume", stopped)
        assert code == 0, printed
    finally:
        shutil.rmtree(origin(stopped))
    assert adapters(stopped) == adapters(second)


@pytest.mark.parametrize(
    ("given", "roles"),
    [("first/checkpoints/step-000001", ROLES), ("first/solver", ("solver",)), ("without-proposer", ("solver",))],
)
def test_checkpoints_and_peft_adapters_will_do(place: Path, tmp_path: Path, given: str, roles: tuple[str, ...]):
    if given == "without-proposer":  # as of a run with labels, which has trained no proposer
        shutil.copytree(place / "first", place / given, ignore=shutil.ignore_patterns("proposer"))
    out = tmp_path / "run"
    train(out, images=place / "other", init_adapters=place / given, steps=1)
    theirs = {"solver": (place / given / WEIGHTS).read_bytes()} if given == "first/solver" else adapters(place / given)
    begun = adapters(out / "checkpoints" / "step-000000")
    assert {role: begun[role] for role in roles} == theirs
    if roles == ("solver",):
        of_proposer = load_file(out / "checkpoints" / "step-000000" / "proposer" / WEIGHTS)
        assert not any(tensor.any() for name, tensor in of_proposer.items() if "lora_B" in name)


def test_what_did_not_move_is_not_called_learned(place: Path, tmp_path: Path):
    """Its adapters are published all the same, for they are not those of the model without adapters."""
    options = {**SHORT, "images": place / "other", "out": tmp_path / "run", "init-adapters": place / "first"}
    options |= {"learning-rate": "1e-60"}  # which float32 rounds to nothing
    code, printed = command("train", *(text for name, value in options.items() for text in (f"--{name}", value)))
    assert code == ENDED_ITSELF
    assert "Nothing was learned" in printed
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["trained_roles"] == []
    assert adapters(tmp_path / "run") == adapters(place / "first")
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert {record["watch/moved"] for record in records} == {0.0}


def test_it_is_asked_and_exported_like_any_run(place: Path, second: Path, tmp_path: Path):
    image = next((place / "other").rglob("*.png"))
    code, printed = command("ask", second, image, "How many circles are there?")
    assert code == 0, printed
    code, printed = command("export", second, "--to", tmp_path / "exported")
    assert code == 0, printed
    assert (tmp_path / "exported" / WEIGHTS).read_bytes() == adapters(second)["solver"]


@pytest.mark.parametrize(
    ("given", "options", "told"),
    [
        ("none", {}, "none is not a run directory, nor one of its checkpoints"),
        ("one", {}, "is not a run directory"),
        ("learned-nothing", {}, "learned nothing and has no adapter"),
        ("unfinished", {}, "is not finished: name one of its checkpoints"),
        ("first", {"lora_rank": 8}, "has rank 16 and alpha 32, and this run 8 and 32: add --lora-rank 16 --lora-alpha"),
        ("first/solver", {"lora_alpha": 8}, "has rank 16 and alpha 32, and this run 16 and 8"),
        ("first", {"lora_targets": "q_proj"}, "was trained with --lora-targets all layers: give this run the same"),
        ("first", {"model": "copy-of-tiny"}, "was trained on tiny, and this run is to be on "),
    ],
)
def test_adapters_of_another_kind_are_refused_before_anything_is_loaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, options: dict[str, object], told: str
):
    for name in ("learned-nothing", "unfinished"):
        if not (place / name).exists():
            left_out = [*ROLES, "checkpoints", *(["summary.json"] if name == "unfinished" else [])]
            shutil.copytree(place / "first", place / name, ignore=shutil.ignore_patterns(*left_out))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY_MODEL, tmp_path / "copy-of-tiny")
    monkeypatch.setattr("ireasoner.training.loop._run", None)
    options = {**SHORT, "images": place / "other", "out": "run", "init-adapters": place / given, **options}
    code, printed = command("train", *(text for n, v in options.items() for text in (f"--{n.replace('_', '-')}", v)))
    assert (code, printed.startswith("ireasoner: --init-adapters: ")) == (2, True), printed
    assert told in printed
    assert not (tmp_path / "run").exists()
