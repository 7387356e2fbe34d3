"""An export and its base under the real lmms-eval, where it is installed: `make test-ecosystem`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

pytest.importorskip("lmms_eval")
from ireasoner.app.cli import main
from ireasoner.method.texts import SOLVER_PROMPT
from ireasoner.method.types import UsageError
from ireasoner.model.source import TINY_MODEL
from ireasoner.playground import dataset
from ireasoner.plugins.lmms_eval import IReasoner, in_prompt, read_sampling
from ireasoner.studies.compare import compare_logs
from ireasoner.studies.doctor import fill_adapters
from models import load
from runs import new_run

pytestmark = pytest.mark.filterwarnings("default")  # lmms-eval and what it imports warn of their own options

TASKS = Path(__file__).parents[1] / "examples" / "lmms_eval"
PROMPT = "Is it so? {question} Which color?"  # of words that the tiny model knows


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merged export of a run whose adapters change what the model says."""
    folder = tmp_path_factory.mktemp("trained")
    new_run(folder / "run", device="cpu", solver_prompt=PROMPT).write_text("summary.json", "{}")
    policy = load()
    fill_adapters(policy, 0.1, seed=1)
    policy.save_adapters(folder / "run")
    assert main(["export", str(folder / "run"), "--to", str(folder / "export"), "--merge"]) == 0
    return folder / "export"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset.write_questions(tmp_path_factory.mktemp("questions"), 8, "chalk").parent


def lmms_eval(questions: Path, logs: Path, *model: str) -> Path:
    """Run the command in the folder of the questions; the folder with its log."""
    command = [sys.executable, "-m", "lmms_eval", *model, "--device", "cpu", "--tasks", "labelled_questions"]
    command += ["--include_path", str(TASKS), "--batch_size", "1", "--log_samples", "--output_path", str(logs)]
    done = subprocess.run(
        command, cwd=questions, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    (found,) = logs.rglob("*_samples_labelled_questions.jsonl") if logs.is_dir() else ("",)
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    return Path(found).parent


def samples(folder: Path) -> list[dict[str, Any]]:
    (log,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()]


def reply(model: Any, processor: Any, image: Image.Image, text: str) -> str:
    """What the model card's code prints, in the dtype that lmms-eval loads models in."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=[image], text=[prompt], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=112, do_sample=False, repetition_penalty=1.0)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_export_and_its_base_are_asked_as_in_training_and_compared(export: Path, questions: Path, tmp_path: Path):
    """The base too, whatever its own files say of sampling and of the size of images."""
    base = tmp_path / "model"
    shutil.copytree(TINY_MODEL, base)
    for name, changes in (
        ("generation_config.json", {"repetition_penalty": 5.0}),
        ("preprocessor_config.json", {"size": {"shortest_edge": 784, "longest_edge": 6272}}),
    ):
        (base / name).write_text(json.dumps({**json.loads((base / name).read_text()), **changes}))
    asked = [json.loads(line) for line in (questions / "test.jsonl").read_text().splitlines()]
    folders = []
    for name, folder, more in (("base", base, f",prompt_of={export}"), ("trained", export, "")):
        arguments = f"pretrained={folder},device_map=cpu{more}"
        folders.append(lmms_eval(questions, tmp_path / name, "--model", "ireasoner", "--model_args", arguments))
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
        processor = AutoProcessor.from_pretrained(export)
        for row, logged in zip(asked, samples(folders[-1]), strict=True):
            assert (logged["input"], logged["target"]) == (row["question"], row["answer"])
            image = Image.open(questions / row["image"]).convert("RGB")
            expected = reply(model, processor, image, PROMPT.replace("{question}", row["question"]))
            whole = logged.get("resps", logged["filtered_resps"])
            assert whole.partition("</answer></think>")[0] == expected.removesuffix("</answer>")
            if "</answer></think>" in whole:  # which the benchmark judges by the answer alone
                assert logged["filtered_resps"] == whole.rpartition("</think>")[2]
    (row,) = compare_logs(*folders).rows
    assert (row.task, row.metric, row.documents) == ("labelled_questions", "exact_match", 8)


def test_an_export_is_loaded_by_lmms_evals_own_model(export: Path, questions: Path, tmp_path: Path):
    """With the prompts of the benchmarks, as any model."""
    arguments = f"pretrained={export},device_map=cpu,min_pixels=6889,max_pixels=50176"
    folder = lmms_eval(questions, tmp_path / "logs", "--model", "qwen2_5_vl", "--model_args", arguments)
    assert len(samples(folder)) == 8


def test_the_prompt_goes_around_what_a_benchmark_asks():
    def messages(*blocks: str) -> list[dict[str, Any]]:
        turn = [
            {"type": "image", "url": 1} if block == "image" else {"type": "text", "text": block} for block in blocks
        ]
        return [
            {"role": "system", "content": [{"type": "text", "text": "You are."}]}, {"role": "user", "content": turn}
        ]  # fmt: skip

    assert in_prompt(messages("image", "Q?"), "A {question} B {question}") == messages("image", "A Q? B Q?")
    spread = in_prompt(messages("Of", "image", "this?"), "A {question} B")
    assert spread == messages("A Of", "image", "this? B")
    asked = in_prompt(messages("image", "image", "Q?"), SOLVER_PROMPT)[1]["content"][2]["text"]
    assert asked.startswith("Look closely at the images and answer this question about them: Q?")
    with pytest.raises(UsageError, match="no text"):
        in_prompt(messages("image"), "A {question} B")


def test_what_is_no_export_is_told(tmp_path: Path, export: Path):
    with pytest.raises(UsageError, match=r"has no solver\.json that can be read .*prompt_of=FOLDER"):
        IReasoner.create_from_arg_string(f"pretrained={TINY_MODEL}", {"device": "cpu"})
    for backend in ("nothing", "from_log"):
        with pytest.raises(UsageError, match=f"has no model '{backend}' that takes chats: name one with backend=NAME"):
            IReasoner.create_from_arg_string(f"pretrained={export},backend={backend}", {"device": "cpu"})
    shutil.copytree(export, tmp_path / "damaged")
    (tmp_path / "damaged" / "solver.json").write_text('{"solver_prompt": 1}')
    with pytest.raises(UsageError, match="ValidationError"):
        read_sampling(str(tmp_path / "damaged"))
