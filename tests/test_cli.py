"""The command line and what it prints: help without heavy imports, one sentence for every mistake, a safe display."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ireasoner import __version__
from ireasoner.app.cli import COMMANDS, build_app, main
from ireasoner.app.display import Display, evaluation_table, plain, results_table, set_verbosity, vote_line
from ireasoner.method.types import Episode, Part, Question, Trajectory
from ireasoner.training.config import PATHS, Config, dump_config, names, resolve
from ireasoner.training.evaluation import ACCURACIES, Scores, compare
from ireasoner.training.statistics import MEASURES

# --- what is imported -------------------------------------------------------------------------------------------------


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_of_every_command_imports_nothing_that_takes_long():
    heavy = {"torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "PIL", "sympy", "pint", "rich.live"}
    code = f"""
import contextlib, io, sys
from ireasoner.app.cli import main
for argv in (["--help"], ["--version"], *([name, "--help"] for name in {list(COMMANDS)!r})):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(argv) == 0, argv
    assert out.getvalue().strip(), argv
print(sorted(set(sys.modules) & {heavy!r}))
"""
    assert fresh(code).strip() == "[]"


def test_drawing_the_playground_imports_no_torch(tmp_path: Path):
    code = f"""
import sys
import time
from ireasoner.app.cli import main
assert main(["playground", {str(tmp_path)!r}, "--images", "1", "--questions", "1"]) == 0
print("torch" in sys.modules)
"""
    assert fresh(code).splitlines()[-1] == "False"


def test_help_names_every_command_and_version_the_version(capsys: pytest.CaptureFixture[str]):
    for argv, expected in ((["--help"], COMMANDS), (["--version"], (f"ireasoner {__version__}",))):
        assert main(argv) == 0
        printed = capsys.readouterr().out
        assert all(text in printed for text in expected)


def test_torchrun_can_say_what_was_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It ends with the contents of this file, below a traceback of its own."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert main(["train"]) == 2
    told = json.loads((tmp_path / "error.json").read_text())
    assert told["message"] == "train needs --images, --model, --out (or --resume RUN)"
    assert abs(told["timestamp"] - time.time()) < 60


def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str, columns: int = 100) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([*argv, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_is_explained(command: str):
    arguments = build_app()[command].assemble_argument_collection(parse_docstring=True)
    told = {argument.name: argument.parameter.help or "" for argument in arguments if argument.show}
    assert [name for name, text in told.items() if not text or "\n" in text] == []  # breaks would be shown


HELP_OF_TRAIN = """
Usage: ireasoner train [OPTIONS]
─ The run ─
--images STR
--model --model-name-or-path STR
--out --output-dir PATH The run directory to write
--resume PATH Continue the run in this directory
--config PATH
--recipe STR
--preset STR
--engine CHOICE
--report-to CHOICE...
--report-images --no-report-images
─ Scale: a preset sets these ─
--group-size --num-generations INT N: trajectories
--solution-form CHOICE
--proposer-prompt STR
--lora-targets STR...
--gradient-checkpointing
--learning-rate FLOAT AdamW
--steps --max-steps INT Training steps. [default: 625; preset 7b-paper: 2500; preset
--save-every --save-steps INT
--watch --no-watch End a run
─ Rewards, advantages, KL: a recipe sets these ─
--reward STR What a readable trajectory earns
--step-measure CHOICE
--advantage CHOICE
--kl-coef --beta FLOAT
--train-proposer
""".strip().splitlines()


def test_the_help_of_train_shows_groups_and_what_each_option_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    lines = (" ".join(line.strip("│╭╰").split()) for line in help_of(capsys, monkeypatch, "train").splitlines())
    for expected in HELP_OF_TRAIN:  # in this order, with other options between them
        assert any(line.startswith(expected) for line in lines), expected


def flowing(help_text: str) -> str:
    """A help text without the frames and the breaks of its lines."""
    return " ".join(word for word in help_text.split() if not set(word) <= set("│╭╰╮╯─"))


def test_the_help_of_train_shows_defaults_choices_and_the_names_of_recipes_and_presets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    text = flowing(help_of(capsys, monkeypatch, "train"))
    for expected in (
        f"[recipes: {', '.join(names('recipes'))}] [default: default]",
        f"[presets: {', '.join(names('presets'))}] [default: 7b]",
        "[default: 0.03; recipe paper: 0.001]",  # β of the recipe that is taken if none is named
        "[choices: transformers, vllm] [default: transformers]",
        "[choices: ema, rloo, grpo] [default: rloo; recipe paper: ema]",
        "--no-train-proposer",
    ):
        assert expected in text
    for name in PATHS:
        assert f"--{name.replace('_', '-')} " in text


def test_the_options_of_every_command_may_stand_anywhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    described = "List the runs in a folder and below it"
    for argv in (("runs",), ("--verbosity", "debug", "runs"), ("runs", "--verbosity=quiet")):
        assert described in help_of(capsys, monkeypatch, *argv)


def test_the_help_of_other_commands_shows_what_they_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    expected = {
        "eval": ("eval --data PATH [OPTIONS] MODELS", "--blank --no-blank", "--temperature FLOAT", "[default: 1.0]"),
        "playground": (
            "[OPTIONS] OUT",
            "--items INT INT",
            "picture. [default: 2 4]",
            "[choices: chalk, varied, plain]",
        ),
        "validity": ("[OPTIONS] RUN", "--steps INT INT"),
        "runs": ("FOLDER", "Where to look. [default: runs]"),
        "bench": ("--sides CHOICE...", "[choices: ours, plain] [default: ours plain]", "[default: 1 16]"),
        "demo": ("--out --output-dir PATH", "--steps --max-steps INT"),
        "label": ("--viewer --no-viewer",),
    }
    for command, texts in expected.items():
        text = flowing(help_of(capsys, monkeypatch, command))
        assert all(each in text for each in (*texts, "--verbosity")), command


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (["--model_name_or_path", "tiny"], ("model", "tiny")),
        (["--output_dir", "runs/x"], ("out", Path("runs/x"))),
        (["--max_steps=7"], ("steps", "7")),
        (["--num_generations", "4"], ("group_size", "4")),
        (["--beta", "0.1"], ("kl_coef", "0.1")),
        (["--save_steps", "5"], ("save_every", "5")),
        (["--max_solution_tokens", "9"], ("max_solution_tokens", "9")),
        (["--report_to", "wandb"], ("report_to", ["wandb"])),
        (["--report-to", "wandb,mlflow"], ("report_to", ["wandb,mlflow"])),
        (["--report-to", "wandb", "--report-to", "mlflow"], ("report_to", ["wandb", "mlflow"])),
        (["--report-to", "wandb", "mlflow"], ("report_to", ["wandb", "mlflow"])),
        (["--no-watch"], ("watch", False)),
        (["--watch", "--no-watch"], ("watch", False)),  # the last one holds
        (["--steps", "1", "--max-steps=2"], ("steps", "2")),
        (["--watch=false"], ("watch", False)),
        (["--report_images"], ("report_images", True)),
        (["--solver-prompt=a_b {question}"], ("solver_prompt", "a_b {question}")),
    ],
)
def test_options_go_by_the_fields_own_names_too(written: list[str], meant: tuple[str, object]):
    _, given, _ = build_app().parse_args(["train", *written])
    assert given.arguments == dict([meant])


# --- how much is said -------------------------------------------------------------------------------------------------


@pytest.fixture
def _normal_verbosity():
    yield
    set_verbosity("normal")


@pytest.mark.usefixtures("_normal_verbosity")
def test_quiet_leaves_out_progress_and_keeps_what_needs_attention(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ireasoner.app.train.follow", lambda *_, **__: 0)
    drawn = ("write_unlabeled", "write_questions")
    for name in drawn:
        monkeypatch.setattr(f"ireasoner.playground.dataset.{name}", lambda *_: (tmp_path / "data").mkdir(exist_ok=True))
    said = {}
    for level in ("normal", "quiet"):
        assert main(["demo", "--out", str(tmp_path), "--verbosity", level]) == 0
        show(resolve({"images": "/pictures", "model": "tiny", "steps": 2}), [episode()])
        said[level] = capsys.readouterr().out
    assert all(text in said["normal"] for text in ("Drawing 512", "step 1/2", "evaluated before", "Resumed after"))
    assert said["quiet"] == "Resumed after [step] 2.\n"


@pytest.mark.usefixtures("_normal_verbosity")
def test_debug_shows_where_a_mistake_was_found_and_lets_libraries_speak(tmp_path: Path):
    code = f"""
import os
from ireasoner.app.cli import main
assert main(["--verbosity", "debug", "train", "--resume", {str(tmp_path)!r}]) == 2
print("TRANSFORMERS_VERBOSITY" in os.environ)
assert main(["train", "--resume", {str(tmp_path)!r}]) == 2
print("TRANSFORMERS_VERBOSITY" in os.environ)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["False", "True"], done.stderr
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert done.stderr.count("ireasoner: ") == 2


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things to get wrong."""
    place = tmp_path_factory.mktemp("place")
    for folder in ("pool", "empty", "corrupt", "unfinished", "no-model", "other-run"):
        (place / folder).mkdir()
    Image.new("RGB", (84, 84), "red").save(place / "pool" / "a.png")
    for name in ("a.png", "b.jpg", "c.webp"):
        (place / "corrupt" / name).write_bytes(b"nothing to see")
    (place / "file").write_text("in the way")
    (place / "unfinished" / "config.yaml").write_text(dump_config(resolve({"images": "/x", "model": "tiny"})))
    row = json.dumps({"image": "pool/a.png", "question": "What?", "answer": "red"})
    (place / "good.jsonl").write_text(row)
    (place / "bad-line.jsonl").write_text(f"{row}\n{row}\n{{not json\n")
    (place / "no-answer.jsonl").write_text(f'{row}\n\n{{"image": "pool/a.png", "question": "What?"}}\n')
    (place / "no-image.jsonl").write_text('{"image": "pool/z.png", "question": "What?", "answer": "red"}\n')
    (place / "corrupt.jsonl").write_text('{"image": "corrupt/a.png", "question": "What?", "answer": "red"}\n')
    (place / "empty.jsonl").write_text("\n\n")
    (place / "elsewhere.jsonl").write_text('{"image": "other.png", "question": "What?", "answer": "red"}\n')
    Image.new("RGB", (84, 84), "red").save(place / "other.png")
    return place


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that cannot see."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("text-model")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def mistake(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a mistaken command answers with."""
    code = main([str(argument) for argument in argv])
    printed = capsys.readouterr()
    assert code == 2, printed
    assert printed.err.startswith("ireasoner: ")
    assert printed.err.endswith("\n")
    assert printed.err.count("\n") == 1, printed.err
    assert "Traceback" not in printed.out + printed.err
    return printed.err


def train(place: Path, out: Path, **changes: object) -> list[object]:
    options = {"images": place / "pool", "model": "tiny", "steps": 1, "device": "cpu", **changes}
    return ["train", "--out", out, *(f"--{name}={value}" for name, value in options.items())]


def test_images_that_are_not_there(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path):
    assert "No image in the folder" in mistake(capsys, *train(place, tmp_path / "1", images=place / "empty"))
    assert "nowhere" in mistake(capsys, *train(place, tmp_path / "2", images=place / "nowhere"))
    text = mistake(capsys, *train(place, tmp_path / "3", images=place / "corrupt"))
    assert "None of the 3 images" in text
    assert "a.png" in text


def test_a_run_directory_that_cannot_be(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path):
    assert "Not a directory" in mistake(capsys, *train(place, place / "file" / "run"))
    assert mistake(capsys, *train(place, place / "file"))  # the file itself
    assert (place / "file").read_text() == "in the way"
    text = mistake(capsys, *train(place, place / "unfinished"))
    assert "holds a run already" in text
    assert f"--resume {place / 'unfinished'}" in text


def test_a_run_directory_among_its_own_images(capsys: pytest.CaptureFixture[str], place: Path):
    text = mistake(capsys, *train(place, place / "pool" / "run"))
    assert "inside the image folder" in text
    assert not (place / "pool" / "run").exists()


@pytest.mark.parametrize("wrong", [{"images": "empty"}, {"model": "no-model"}, {"eval-data": "bad-line.jsonl"}])
def test_after_a_mistake_the_same_folder_can_be_used(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, wrong: dict[str, str]
):
    wrong = {name: str(place / value) for name, value in wrong.items()}
    mistake(capsys, *train(place, tmp_path / "run", **wrong))
    # Another mistake, made later than the check of the folder, so that nothing needs to be trained here.
    assert "holds a run" not in mistake(capsys, *train(place, tmp_path / "run", images=place / "corrupt"))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_an_engine_that_is_not_installed(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path):
    assert "--engine vllm needs vLLM" in mistake(capsys, *train(place, tmp_path / "run", engine="vllm"))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_model_that_cannot_be_used(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, text_model: str):
    assert "no/such/model" in mistake(capsys, *train(place, tmp_path / "1", model=tmp_path / "no/such/model"))
    assert "no-model" in mistake(capsys, *train(place, tmp_path / "2", model=place / "no-model"))
    text = mistake(capsys, *train(place, tmp_path / "3", model=text_model))
    assert "qwen2" in text
    assert "a model for images and text is needed" in text
    assert "qwen2" in mistake(capsys, "eval", text_model, "--data", place / "good.jsonl")
    assert "'attention'" in mistake(capsys, *train(place, tmp_path / "4", **{"lora-targets": "attention"}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": "many"}, "--steps: "),
        ({"learning-rate": "-1"}, "--learning-rate: "),
        ({"group-size": "1"}, "--group-size: "),
        ({"watch": "maybe"}, "--watch: "),
        ({"solver-prompt": "Answer!"}, "--solver-prompt must contain"),
        ({"gate-low": "0.9", "gate-high": "0.1"}, "--gate-low 0.9 is above --gate-high 0.1"),
        ({"recipe": "papre"}, "papre"),
        ({"preset": "8b"}, "8b"),
        ({"recipe": "oracle"}, "--labels"),
    ],
)
def test_options_that_cannot_be(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, changes: dict[str, str], named: str
):
    assert named in mistake(capsys, *train(place, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], 'unknown command "trian". Did you mean "train"?'),
        (["train", "--stepz", "5"], "unknown option: --stepz. Did you mean --steps?"),
        (["train", "--step", "5"], "unknown option: --step. Did you mean --steps?"),  # no abbreviations
        (["train", "--engine", "vlm"], 'Did you mean "vllm"?'),
        (["train", "--watch", "false"], "'false' belongs to no option; what is on or off is --NAME or --no-NAME"),
        (["demo", "--steps", "2.5"], "invalid value for --steps: a whole number is needed, not 2.5"),
        (["demo", "--recipe", "defualt"], "there is no recipe 'defualt' (did you mean default?)"),
        (["eval", "tiny", "--data", "x", "--preset", "tinny"], "there is no preset 'tinny' (did you mean tiny?)"),
    ],
)
def test_a_slip_of_the_pen_is_told_with_what_may_be_meant(
    capsys: pytest.CaptureFixture[str], argv: list[str], said: str
):
    assert said in mistake(capsys, *argv)


def test_an_error_tells_a_flag_from_a_line_of_a_recipe(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("kl_rate: -1\n")
    text = mistake(capsys, *train(place, tmp_path / "run", recipe=tmp_path / "mine.yaml", **{"kl-target": "0"}))
    assert "--kl-target: " in text
    assert "kl_rate: " in text
    assert "--kl-rate" not in text


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["playground", "world", "--images", "0"], "--images: "),
        (["bench", "--images-per-step", "1", "0"], "--images-per-step: "),
        (["validity", "run", "--json", "no/such/file"], "for --json. no/such/file cannot be written"),
        (["view", "run", "--port", "-1"], "--port: "),
    ],
)
def test_an_error_of_a_commands_own_option_names_the_flag(
    capsys: pytest.CaptureFixture[str], argv: list[str], named: str
):
    assert named in mistake(capsys, *argv)


def test_options_that_are_missing(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path):
    text = mistake(capsys, "train", "--images", place / "pool")
    assert "--model, --out" in text
    assert "--images" not in text
    assert "leave out --out" in mistake(capsys, "train", "--resume", place / "unfinished", "--out", tmp_path)
    assert "not a run directory" in mistake(capsys, "train", "--resume", tmp_path)
    assert mistake(capsys, "train", "--resume", place / "file" / "run")


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--flavour", "sweet"],
        ["fly"],
        [],
        ["demo", "--steps", "many"],
        ["train", "--images"],
        ["eval", "tiny"],
    ],
)
def test_what_no_command_knows(capsys: pytest.CaptureFixture[str], argv: list[str]):
    assert "--help" in mistake(capsys, *argv)


# --- options in a file ------------------------------------------------------------------------------------------------


def given_with(file: Path, text: str, *flags: str, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The config of a run whose options stand in a file and among the flags."""
    file.write_text(text)
    found: list[Config] = []
    monkeypatch.setattr("ireasoner.app.train.follow", lambda config, out, **_: found.append(config) or 0)
    assert main(["train", "--config", str(file), "--out", "unused", *flags]) == 0
    return found[0]


def test_options_may_stand_in_a_file_and_flags_come_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = "images: pictures\nmodel: tiny\nsteps: 7\nwatch: false\nreport_to: [wandb]\nkl_coef: 0.5\n"
    config = given_with(tmp_path / "mine.yaml", text, "--max-steps", "9", monkeypatch=monkeypatch)
    assert config == resolve({
        "images": tmp_path / "pictures", "model": "tiny", "steps": 9, "watch": False, "report_to": ["wandb"],
        "kl_coef": 0.5,
    })  # fmt: skip


def test_the_config_of_a_run_gives_the_same_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = resolve({"images": "/x", "model": "tiny", "recipe": "paper", "steps": 3, "watch": False, "seed": 4})
    again = given_with(tmp_path / "config.yaml", dump_config(config), monkeypatch=monkeypatch)
    assert again == config


def test_a_recipe_or_a_preset_that_is_named_replaces_that_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = resolve({"images": "/x", "model": "tiny", "recipe": "paper", "kl_rate": 0.5, "steps": 3})
    flags = ("--recipe", "default", "--gate-low", "0.1")
    again = given_with(tmp_path / "config.yaml", dump_config(config), *flags, monkeypatch=monkeypatch)
    assert again == resolve({"images": "/x", "model": "tiny", "steps": 3, "gate_low": 0.1})
    again = given_with(tmp_path / "config.yaml", dump_config(config), "--preset", "7b", monkeypatch=monkeypatch)
    assert again == resolve({"images": "/x", "model": "tiny", "recipe": "paper", "kl_rate": 0.5, "preset": "7b"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepz: 5", "stepz is not an option (did you mean steps?)"),
        ("sampling: {groupsize: 5}", "groupsize is not an option (did you mean group_size?)"),
        ("samplign: {group_size: 5}", "samplign is not an option"),
        ("recipe: {reward: '/x/evil.py:pay'}", "whose code is run only if you say so: name it again with --reward"),
        ("- steps", "must be a mapping of options to values"),
        ("steps: [", "is not YAML text"),
        ("model: tiny\nimages: x\nsteps: many", "steps: input should be a valid integer"),
    ],
)
def test_a_file_of_options_that_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, said: str):
    (tmp_path / "mine.yaml").write_text(text)
    told = mistake(capsys, "train", "--config", tmp_path / "mine.yaml", "--out", tmp_path / "run")
    assert said in told
    assert "mine.yaml" in told
    assert "nowhere.yaml" in mistake(capsys, "train", "--config", tmp_path / "nowhere.yaml")


def test_ctrl_c_is_told_in_a_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ireasoner.page.overview.overview", interrupted)
    assert main(["runs"]) == 130
    assert capsys.readouterr().err == "\nireasoner: interrupted; nothing saved so far is lost\n"


# --- what cannot be found or used -------------------------------------------------------------------------------------


def test_an_unknown_device(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path):
    assert "banana" in mistake(capsys, *train(place, tmp_path / "run", device="banana"))


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, device: str):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert device in mistake(capsys, *train(place, tmp_path / "run", device=device))


def test_labels_that_cannot_be_used(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path):
    out, oracle = iter(tmp_path / str(i) for i in range(9)), {"recipe": "oracle"}
    assert "nowhere" in mistake(capsys, *train(place, next(out), labels=place / "nowhere.jsonl", **oracle))
    assert "line 3" in mistake(capsys, *train(place, next(out), labels=place / "bad-line.jsonl", **oracle))
    text = mistake(capsys, *train(place, next(out), labels=place / "elsewhere.jsonl", **oracle))
    assert "is about an image in" in text
    assert "line 3" in mistake(capsys, *train(place, next(out), **{"eval-data": place / "no-answer.jsonl"}))
    assert "a.png" in mistake(capsys, *train(place, next(out), **{"eval-data": place / "corrupt.jsonl"}))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ("nowhere.jsonl", "nowhere.jsonl"),
        ("pool", "pool"),
        ("bad-line.jsonl", "line 3"),
        ("no-answer.jsonl", "line 3"),
        ("no-image.jsonl", "line 1"),
        ("empty.jsonl", "no questions"),
        ("corrupt.jsonl", "corrupt/a.png"),
    ],
)
def test_eval_of_data_that_cannot_be(capsys: pytest.CaptureFixture[str], place: Path, data: str, named: str):
    assert named in mistake(capsys, "eval", "tiny", "--data", place / data)


def test_eval_of_models_that_cannot_be(capsys: pytest.CaptureFixture[str], place: Path):
    data = ("--data", place / "good.jsonl")
    text = mistake(capsys, "eval", place / "unfinished", *data)
    assert "not finished" in text
    assert f"--resume {place / 'unfinished'}" in text
    assert "two" in mistake(capsys, "eval", "tiny", "tiny", "tiny", *data)
    assert "no-model" in mistake(capsys, "eval", place / "no-model", *data)
    assert "neither a run nor a model: name a run directory" in mistake(capsys, "eval", place / "pool", *data)
    assert "8b" in mistake(capsys, "eval", "tiny", *data, "--preset", "8b")
    text = mistake(capsys, "eval", "tiny", *data, "--match", "bleu")
    assert 'invalid value "bleu" for --match. Choose from: "exact", "relaxed", "anls", "vqa"' in text


def test_eval_of_an_adapter_names_its_run_before_anything_is_loaded(place: Path, tmp_path: Path):
    run = tmp_path / "run"
    for folder in (run, run / "checkpoints" / "step-000002"):
        (folder / "solver").mkdir(parents=True)
        (folder / "solver" / "adapter_config.json").write_text("{}")
    (run / "config.yaml").write_text((place / "unfinished" / "config.yaml").read_text())
    code = f"""
import sys
import time
from ireasoner.app.cli import main
for folder in {[str(path.parent) for path in run.rglob("solver")]!r}:
    assert main(["eval", "tiny", folder + "/solver", "--data", {str(place / "good.jsonl")!r}]) == 2
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n"
    assert done.stderr.splitlines() == [
        f"ireasoner: the folder {path} is neither a run nor a model: name {path.parent}" for path in run.rglob("solver")
    ]


def test_eval_results_that_cannot_be_written(capsys: pytest.CaptureFixture[str], place: Path):
    mistake(capsys, "eval", "tiny", "--data", place / "good.jsonl", "--json", place / "file" / "x.json")


@pytest.mark.parametrize("argv", [["eval", "tiny", "--data", "good.jsonl"], ["playground", "out"]])
def test_a_negative_seed(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str]
):
    monkeypatch.chdir(place)
    assert "seed" in mistake(capsys, *argv, "--seed", "-1")


def test_a_playground_that_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    text = mistake(capsys, "playground", tmp_path / "world", "--style", "oil")
    assert 'invalid value "oil" for --style. Choose from: "chalk", "varied", "plain"' in text
    assert "--items takes LEAST and MOST" in mistake(capsys, "playground", tmp_path / "world", "--items", "5", "2")
    assert "--items" in mistake(capsys, "playground", tmp_path / "world", "--items", "1", "9")
    assert not (tmp_path / "world").exists()


def test_a_demo_in_a_style_that_is_not(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert '"oil" for --style' in mistake(capsys, "demo", "--out", tmp_path / "demo", "--style", "oil")


@pytest.mark.parametrize("command", [["playground"], ["demo", "--out"]])
def test_the_playground_where_a_file_is_in_the_way(capsys: pytest.CaptureFixture[str], place: Path, command: list[str]):
    assert "Not a directory" in mistake(capsys, *command, place / "file" / "x")


def test_a_demo_that_cannot_be_draws_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert "papre" in mistake(capsys, "demo", "--out", tmp_path / "demo", "--recipe", "papre")
    assert not (tmp_path / "demo").exists()


def test_a_demo_where_another_run_lies(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path):
    (tmp_path / "config.yaml").write_text((place / "unfinished" / "config.yaml").read_text())
    (tmp_path / "summary.json").write_text("{}")
    assert "other options" in mistake(capsys, "demo", "--out", tmp_path)


def test_a_demo_in_another_style_than_the_one_that_is_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def begin(config: Config, out: Path, **_: object) -> int:
        return (out / "config.yaml").write_text(dump_config(config)) * 0

    out = tmp_path / "demo"
    monkeypatch.setattr("ireasoner.app.train.follow", begin)
    assert main(["demo", "--out", str(out), "--steps", "1", "--style", "plain"]) == 0
    assert "--style is 'plain' in the run, not 'chalk'" in mistake(capsys, "demo", "--out", out, "--steps", "1")


# --- commands that work -----------------------------------------------------------------------------------------------


def test_playground_writes_pictures_and_questions(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    argv = ["playground", str(tmp_path), "--images", "3", "--questions", "4", "--split", "validation", "--seed", "2"]
    assert main(argv) == 0
    assert str(tmp_path / "unlabeled") in capsys.readouterr().out
    assert len(list((tmp_path / "unlabeled").rglob("*.png"))) == 3
    rows = (tmp_path / "validation" / "validation.jsonl").read_text().splitlines()
    assert len(rows) == 4
    assert {"image", "question", "answer", "picture"} == set(json.loads(rows[0]))


def test_eval_of_one_model_and_of_two(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path):
    target = tmp_path / "scores.json"
    common = ["--data", str(place / "good.jsonl"), "--device", "cpu", "--json", str(target)]
    assert main(["eval", "tiny", *common]) == 0
    printed, found = capsys.readouterr().out, json.loads(target.read_text())
    assert all(measure in printed for measure in MEASURES)
    assert all(told in printed for told in ("strictly", "readable", "of these"))
    assert (found["models"], found["match"]) == (["tiny"], "exact")
    assert set(MEASURES) <= set(found["scores"])
    assert main(["compare", str(target), str(target)]) == 0
    assert "greedy" in capsys.readouterr().out
    assert main(["eval", "tiny", "tiny", *common]) == 0
    printed, found = capsys.readouterr().out, json.loads(target.read_text())
    assert "difference" in printed
    assert found["before"] == found["after"]  # the same model under the same seed
    assert all(change["mean"] == 0 and change["p"] == 1 for change in found["difference"].values())


def test_eval_compares_what_was_trained_with_its_base_in_whatever_order(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path
):
    run, target = tmp_path / "run", tmp_path / "scores.json"
    (run / "solver").mkdir(parents=True)
    (run / "config.yaml").write_text((place / "unfinished" / "config.yaml").read_text())
    accuracy = {"tiny": 0.25, str(run): 0.75}
    monkeypatch.setattr(
        "ireasoner.app.targets.evaluate_target", lambda target, *rest, **options: scores(accuracy[target.name])
    )
    for models in ([str(run), "tiny"], ["tiny", str(run)]):
        assert main(["eval", *models, "--data", str(place / "good.jsonl"), "--json", str(target)]) == 0
        found = json.loads(target.read_text())
        assert found["models"] == ["tiny", str(run)]
        assert found["difference"]["greedy"]["mean"] == 0.5
        assert (found["before"]["greedy"]["mean"], found["after"]["greedy"]["mean"]) == (0.25, 0.75)
        printed = capsys.readouterr().out
        assert printed.index("tiny") < printed.index("difference") < printed.index("25.0 [") < printed.index("75.0 [")


def test_eval_of_blank_images_names_the_answer_prior(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path):
    target = tmp_path / "scores.json"
    argv = ["eval", "tiny", "--data", str(place / "good.jsonl"), "--device", "cpu", "--blank", "--json", str(target)]
    assert main(argv) == 0
    printed, found = capsys.readouterr().out, json.loads(target.read_text())
    assert "blanked" in printed
    assert "Answer prior" in printed
    assert "upper bound" in printed
    assert found["answer_prior"] == {"overall": 1.0, "by_first_words": 1.0}  # of a single question


# --- the display ------------------------------------------------------------------------------------------------------

NASTY = "\x1b[31mred\x1b[0m\x07\r\n[bold red]loud[/bold red] [/nope] \x9b31m\u202e"


def episode(question: str = NASTY, answers: tuple[str | None, ...] = (NASTY, NASTY, None)) -> Episode:
    group = tuple(
        Trajectory(
            text=answer or "", finish_reason="stop", num_tokens=2, mean_sampler_logprob=-0.15, reasoning_steps=("one",),
            answer=answer, words_before_answer=3, problem=None if answer is not None else "cut off",
            answer_key=answer, in_majority=answer == NASTY, reward=1.0, parts={"outcome": Part(value=1.0)},
            step_scores=(),
        )
        for answer in answers
    )  # fmt: skip
    return Episode(
        step=1, image=f"{NASTY}.png", question=Question(question, "", None if question else "empty question"),
        proposal=None, proposer_reward=0.5, prompt="", trajectories=group, majority_answer=NASTY,
        majority_fraction=2 / 3, answer_entropy=0.0, step_weight=0.5, true_answer=None,
    )  # fmt: skip


def test_plain_text_holds_no_control_characters():
    text = plain(NASTY)
    assert text.isprintable()
    assert "\x1b" not in text
    assert "[bold red]loud[/bold red] [/nope]" in text
    assert plain("fünf € 五 😀") == "fünf € 五 😀"
    assert plain("") == ""


def test_plain_text_is_cut_at_the_limit():
    assert plain("a" * 120) == "a" * 120
    assert plain("a" * 121) == "a" * 119 + "…"
    assert len(plain("a" * 500, 24)) == 24


def test_a_vote_is_told_in_one_printable_line():
    line = vote_line(episode("How many?", ("7", "7", None)))
    assert "How many?" in line
    assert "7 x2" in line
    assert "(unreadable) x1" in line
    assert vote_line(episode()).isprintable()
    unreadable = vote_line(episode("", ()))
    assert "unreadable question" in unreadable
    assert "empty question" in unreadable


METRICS = {"reward/solver/total": 0.5, "answers/answer_entropy": 0.25, "kl/solver": 0.001, "length/solver": 12.0}


def show(config: Config, episodes: list[Episode]) -> None:
    with Display(config, Path("runs/[red]x[/red]")) as display:
        observer = display.observer()
        observer.on_start(config, 1)
        observer.on_evaluation("before", 1, 2)
        observer.on_evaluation("before", 2, 2)
        observer.on_step(1, METRICS, episodes)
        observer.on_step(2, METRICS, episodes)
        observer.on_message("Resumed after [step] 2.")


def test_the_display_where_output_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    show(resolve({"images": "/pictures", "model": "tiny", "steps": 2}), [episode(), episode("", ())])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "step 1/2" in printed
    assert "step 2/2" in printed
    assert "reward 0.500" in printed
    assert "evaluated before: 2 held-out questions" in printed
    assert "[bold red]loud[/bold red] [/nope]" in printed  # shown, not obeyed
    assert "runs/[red]x[/red]" in printed
    assert "Resumed after [step] 2." in printed


def test_the_display_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color"), ("COLUMNS", "200"), ("LINES", "50")):
        monkeypatch.setenv(name, value)
    show(resolve({"images": "/pictures", "model": "tiny", "steps": 2}), [episode(), episode("", ())])
    printed = capsys.readouterr().out
    assert "\x1b[?25h" in printed  # the cursor is given back
    assert "0:00:00 left" in printed
    assert "[bold red]loud[/bold red] [/nope]" in printed
    assert "\x1b[31mred" not in printed
    assert "\x07" not in printed
    assert "\x9b" not in printed
    assert "\u202e" not in printed


def test_the_display_leaves_the_terminal_in_order_after_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    config = resolve({"images": "/pictures", "model": "tiny"})
    with pytest.raises(RuntimeError, match="in the middle"), Display(config, Path("run")):
        raise RuntimeError("in the middle")
    printed = capsys.readouterr().out
    assert printed.rfind("\x1b[?25h") > printed.rfind("\x1b[?25l")  # the cursor is shown again


@pytest.mark.parametrize("first", [1, 5])
def test_the_time_left_is_told_from_the_first_step_on(capsys: pytest.CaptureFixture[str], first: int):
    with Display(resolve({"images": "/pictures", "model": "tiny", "steps": 10}), Path("run")) as display:
        display.on_start(display.config, first)
        display.on_step(first, METRICS | {"time/step_seconds": 40.0}, [episode()])
        display.on_step(first + 1, METRICS | {"time/step_seconds": 20.0}, [episode()])
    told = re.findall(r"(\d:\d\d:\d\d) left", capsys.readouterr().out)
    expected = {1: ["0:06:00", "0:04:00"], 5: ["0:03:20", "0:02:00"]}  # of 40 s a step, then of 30 s
    assert told == expected[first]


def test_a_log_keeps_its_lines_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    out = Path("/a/rather/long/path") / ("folder" * 12) / "run"
    with Display(resolve({"images": "/pictures", "model": "tiny"}), out) as display:
        display.say(f"Resumed {out}.")
    assert f"{out}." in capsys.readouterr().out


def scores(accuracy: float, questions: int = 64) -> Scores:
    values = (np.arange(questions) < accuracy * questions).astype(float)
    entropy = np.full(questions, 1.2345)
    ones, image = np.ones(questions), np.arange(questions) // 2
    return Scores(dict.fromkeys(ACCURACIES, values), entropy, ones, ones, ones, ones, ("",) * questions, image)


def table_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, first: float, second: float
) -> list[str]:
    """What `results_table` prints on 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    before, after = scores(first), scores(second)
    summary = {"before": before.summary(), "after": after.summary(), "difference": compare(before, after)}
    results_table(summary)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("first", "second"), [(0.0, 1.0), (1.0, 0.0), (0.43, 0.57), (1.0, 1.0)])
def test_the_table_of_results_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, first: float, second: float
):
    rows = table_rows(capsys, monkeypatch, first, second)
    assert max(map(len, rows)) <= 80
    assert "…" not in "".join(rows)
    assert "64 held-out questions about 32 images" in "".join(rows)
    for measure in MEASURES:
        assert sum(measure in row for row in rows) == 1
    numbers = re.findall(r"-?\d+\.\d+", "".join(rows[rows.index(rows[0]) + 1 :]))
    # Measures, lenient and strict, of before, after and difference with an interval each, and p; of before and after, 2
    # rows below greedy and mean@1 each, and 2 more at the end.
    assert len(numbers) == 2 * len(MEASURES) * 10 + (2 * 2 + 2) * 2
    labels = [row.split()[0] for row in rows if re.match(r" *[a-z]", row)]
    first_rows = ["greedy", "strictly", "readable", "of", "mean@1", "strictly", "readable", "of"]
    assert labels[labels.index("greedy") :] == [
        *first_rows, "maj@5", "strictly", "pass@5", "strictly", "entropy", "tokens"
    ]  # fmt: skip


def test_no_interval_is_broken_over_two_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    for row in table_rows(capsys, monkeypatch, 0.43, 0.57):
        assert row.count("[") == row.count("]")


def test_the_table_of_two_models_is_headed_by_their_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    found = evaluation_table(["Qwen/Qwen2.5-VL-7B-Instruct", "runs/[red]mine"], [scores(0.25), scores(0.75)])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    heads, numbers = printed.index("Qwen/Qwen2.5-VL-7B-"), printed.index("25.0 [")
    assert heads < printed.index("runs/[red]mine") < numbers < printed.index("75.0 [") < printed.index("50.0 [")
    assert found["difference"]["greedy"]["mean"] == 0.5


def test_the_table_of_one_model_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    found = evaluation_table(["tiny"], [scores(0.25)])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "25.0 [" in printed
    assert " ".join(printed.split()).count("64 held-out questions about 32 images") == 1  # the title may be broken
    assert json.loads(json.dumps(found))["scores"]["greedy"]["mean"] == 0.25


@pytest.mark.parametrize("name", ["runs/[red]", "runs/[/x]"])
def test_a_models_name_is_shown_as_it_is(capsys: pytest.CaptureFixture[str], name: str):
    evaluation_table([name], [scores(0.25)])
    assert name in capsys.readouterr().out


def test_nothing_is_printed_to_a_closed_pipe_but_output_is_text():
    """The tables go to whatever standard output is when they are printed, and in its encoding."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    stdout, sys.stdout = sys.stdout, stream
    try:
        evaluation_table(["tiny"], [scores(0.25)])
    finally:
        sys.stdout = stdout
    stream.flush()
    assert "accuracy" in stream.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]
