"""What becomes of a trained run: it is asked, and exported for other programs, which must find the same model."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

from hub import COMMIT as COMMIT_OF_HUB
from hub import OLDER, Hub, serving
from ireasoner.app.cli import main
from ireasoner.method.texts import SOLVER_PROMPT, solver_messages
from ireasoner.method.types import ROLES, Completion, Solution, UsageError
from ireasoner.model.backbone import load_backbone, load_processor
from ireasoner.model.policy import Policy
from ireasoner.model.source import TINY_MODEL
from ireasoner.model.views import Pictures
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training import trained
from ireasoner.training.card import HERE, Base, find_base, model_card
from ireasoner.training.checkpoints import save_checkpoint
from ireasoner.training.clips import ItemFiles
from ireasoner.training.config import Config, load_config, resolve
from ireasoner.training.evaluation import EvaluationOptions, evaluate
from ireasoner.training.labelled import LabelledQuestion
from ireasoner.training.statistics import MEASURES
from ireasoner.training.trained import TrainedModel, load_asked
from models import load, requests, sample
from plain import chosen, plain_logprobs
from runs import new_run, played_run

pytestmark = pytest.mark.usefixtures("copied_models")

QUESTION = "How many circles are there?"


@pytest.fixture(scope="module")
def policy(make_policy: Callable[..., Policy]) -> Policy:
    """The policy that the run below has trained: its solver differs from the base."""
    return make_policy(0.08)


@pytest.fixture(scope="module")
def picture(pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    pictures[0].save(path)
    return path


@pytest.fixture(scope="module")
def run(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its adapters."""
    path = tmp_path_factory.mktemp("runs") / "mine"
    recorder = new_run(path, solver_prompt="Look. {question}", device="cpu")
    policy.save_adapters(path)
    recorder.write_text("summary.json", json.dumps({"steps": 3, "stopped_early": False, "images": 12}))
    return path


@pytest.fixture(scope="module")
def model(run: Path) -> TrainedModel:
    return TrainedModel.from_run(run, device="cpu")


# --- asking -----------------------------------------------------------------------------------------------------------


def test_a_reply_is_what_the_evaluation_of_the_run_would_hear(
    model: TrainedModel, policy: Policy, run: Path, picture: Path
):
    asked = [LabelledQuestion(picture, QUESTION, "1")]
    sampling = load_config(run / "config.yaml").sampling
    for base in (False, True):
        heard = evaluate(policy, asked, None if base else "solver", sampling).greedy_texts[0]
        assert model.ask(picture, QUESTION, base=base).text == heard
    assert model.ask(picture, QUESTION).text != model.ask(picture, QUESTION, base=True).text


def test_a_picture_in_memory_is_the_same_as_its_file(model: TrainedModel, picture: Path):
    with Image.open(picture) as image:
        assert model.ask(image, QUESTION) == model.ask(picture, QUESTION)


@pytest.fixture(scope="module")
def several(pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four frames; beside it an animation of them, and a GIF of the first alone."""
    place = tmp_path_factory.mktemp("several")
    (place / "frames").mkdir()
    for i, frame in enumerate(pictures[:4]):
        frame.save(place / "frames" / f"{i}.png")
    pictures[0].save(place / "all.webp", save_all=True, append_images=pictures[1:4], duration=500, lossless=True)
    pictures[0].save(place / "one.gif")
    return place


class Listening(LiveEngine):
    """Keeps the prompts that it was asked."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.prompts: list[str] = []

    def sample(self, requests: Sequence[Request], role: Any, **options: Any) -> list[list[Completion]]:
        self.prompts += [request.prompt for request in requests]
        return super().sample(requests, role, **options)


def test_several_images_and_clips_are_what_the_evaluation_of_the_run_would_show(
    model: TrainedModel, policy: Policy, several: Path, pictures: list[Image.Image]
):
    """Of a clip as many frames as the run was shown. The prompt of the run is its own, and the one that is shipped
    speaks of what is shown."""
    frames = tuple(several / "frames" / f"{i}.png" for i in range(4))
    with_limits = model.config.changed(images_per_item=3, solver_prompt=SOLVER_PROMPT, max_solution_tokens=24)
    asked, engine = TrainedModel(policy, with_limits), Listening(policy)
    asked.engine = engine
    images, clip = (LabelledQuestion(f, QUESTION, "1") for f in (ItemFiles(frames[:2]), ItemFiles(frames, True)))
    options = EvaluationOptions(images_per_item=3)
    heard = evaluate(policy, [images, clip], "solver", with_limits.sampling, options, engine=engine).greedy_texts
    assert asked.ask(frames[:2], QUESTION).text == asked.ask([pictures[0], str(frames[1])], QUESTION).text == heard[0]
    assert asked.ask(several / "frames", QUESTION).text == asked.ask(several / "all.webp", QUESTION).text == heard[1]
    assert len(set(heard)) == 2
    for prompt, shown in zip(engine.prompts, ["images", "clip", "images", "images", "clip", "clip"], strict=True):
        assert f"Look closely at the {shown} and answer" in prompt
    shown = load_asked(several / "frames", with_limits)
    assert isinstance(shown, Pictures)
    assert (len(shown.images), shown.fps) == (3, 4 / 3)
    together = load_asked(several / "frames", with_limits.changed(items="folders", images_per_item=4))
    assert isinstance(together, Pictures)
    assert (len(together.images), together.fps) == (4, None)  # as such a run was shown a folder
    assert isinstance(load_asked([several / "one.gif"], with_limits), Image.Image)


def test_ask_shows_all_images_before_the_question(
    run: Path, model: TrainedModel, several: Path, capsys: pytest.CaptureFixture[str]
):
    paths = [str(several / "frames" / f"{i}.png") for i in (0, 3)]
    for shown, view in ((paths, paths), ([str(several / "all.webp")], several / "all.webp")):
        assert main(["ask", str(run), *shown, QUESTION, "--device", "cpu"]) == 0
        assert capsys.readouterr().out.startswith(model.ask(view, QUESTION).text)


@pytest.mark.parametrize("longest", [256, 6])
def test_a_single_reply_is_told_as_it_is_written(model: TrainedModel, picture: Path, longest: int):
    sampling = model.config.sampling.model_copy(update={"max_solution_tokens": longest})
    cut = TrainedModel(model.policy, model.config.model_copy(update={"sampling": sampling}))
    parts: list[str] = []
    reply = cut.ask(picture, QUESTION, on_text=parts.append)
    assert "".join(parts) == reply.text
    assert len(parts) > 1
    assert reply == cut.ask(picture, QUESTION)  # which is told to nobody, as before
    cut.ask(picture, QUESTION, votes=2, on_text=parts.append)
    assert "".join(parts) == reply.text


def test_votes_are_sampled_under_their_seed(model: TrainedModel, picture: Path):
    reply = model.ask(picture, QUESTION, votes=4, seed=1)
    assert reply.votes == 4
    assert reply == model.ask(str(picture), QUESTION, votes=4, seed=1)
    with pytest.raises(ValueError, match="at least 1"):
        model.ask(picture, QUESTION, votes=0)


def solution(answer: str | None) -> Solution:
    problem = None if answer else "no closed <think>"
    return Solution(reasoning_steps=("I look.",), answer=answer, words_before_answer=2, problem=problem)


@pytest.mark.parametrize(
    ("answers", "text", "answer", "agreeing"),
    [
        (["4", "three", "3", None], "1", "three", 2),
        ([None, None], "0", None, 0),
        (["A or B", "A or B"], "0", None, 0),  # they commit themselves to nothing
        (["A or B"], "0", "A or B", 0),  # of a single reply, whatever it says
    ],
)
def test_the_majority_answers_as_its_first_reply_words_it(
    answers: list[str | None], text: str, answer: str | None, agreeing: int
):
    texts = [str(i) for i in range(len(answers))]
    found = trained._voted(texts, [solution(a) for a in answers], QUESTION)
    assert (found.text, found.answer, found.agreeing, found.votes) == (text, answer, agreeing, len(answers))


def test_ask_prints_the_steps_and_the_answer(run: Path, picture: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["ask", str(run), str(picture), QUESTION, "--base", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Before training (tiny):\n<think>")
    before, after = printed.split("After training:")
    assert "\nAnswer: " in before
    assert "\nAnswer: " in after or "The reply has no answer" in after
    assert main(["ask", str(run), str(picture), QUESTION, "--votes", "3", "--device", "cpu"]) == 0
    assert " of 3 replies agree." in capsys.readouterr().out


def test_a_checkpoint_can_be_asked(policy: Policy, run: Path, picture: Path, model: TrainedModel, tmp_path: Path):
    new_run(tmp_path / "run", solver_prompt="Look. {question}", device="cpu")  # is not finished
    checkpoint = save_checkpoint(tmp_path / "run" / "checkpoints", 2, policy.save_adapters, keep=0)
    assert TrainedModel.from_run(checkpoint, device="cpu").ask(picture, QUESTION) == model.ask(picture, QUESTION)
    with pytest.raises(UsageError, match="not finished: name one of its checkpoints"):
        TrainedModel.from_run(tmp_path / "run")


def test_what_cannot_be_asked_is_one_sentence_before_the_model_is_loaded(
    run: Path,
    picture: Path,
    several: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("ireasoner.model.loading.load_policy", loads)
    nothing = new_run(tmp_path / "nothing")  # a run that ended itself before anything was learned
    nothing.write_text("summary.json", "{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for name in ("0.png", "1.png"):
        (tmp_path / "broken" / name).write_bytes(picture.read_bytes()[: None if name == "0.png" else -40])
    (tmp_path / "cut.gif").write_bytes((several / "one.gif").read_bytes()[:-40])
    (tmp_path / "text.mp4").write_bytes(b"no video")
    cases = {
        (run, tmp_path / "none.png", QUESTION): "none.png",
        (run, run / "config.yaml", QUESTION): "not a PNG",
        ("nowhere", picture, QUESTION): "nowhere is not a run directory",
        (tmp_path, picture, QUESTION): "neither a run nor a model",
        ("tiny", picture, QUESTION): "tiny is not a run directory",
        (run / "solver", picture, QUESTION): f"name {run}",
        (tmp_path / "nothing", picture, QUESTION): "learned nothing and has no adapter",
        (run, QUESTION): "name it before the question 'How many circles",
        (run, picture): f"the question comes last, and {picture} is there as a file",
        (run, picture, several / "frames"): "the question comes last, and ",
        (run, picture, tmp_path / "none.png", QUESTION): "Cannot read the image '.*none.png' .No such file",
        (run, picture, several / "frames", QUESTION): "frames' .not a regular file",
        (run, *[picture] * 9, QUESTION): r"9 images are over the limit of 8 .--images-per-item.\.",
        (run, tmp_path / "empty", QUESTION): "empty' .0 frames, of which at least 2 are needed",
        (run, tmp_path / "broken", QUESTION): "broken' .1.png: .*truncated",
        (run, tmp_path / "cut.gif", QUESTION): "cut.gif' .the clip ends early",
        (run, tmp_path / "text.mp4", QUESTION): "text.mp4' .*video",
    }
    for words, said in cases.items():
        assert main(["ask", *map(str, words)]) == 2
        told = capsys.readouterr().err
        assert told.startswith("ireasoner: ")
        assert told.count("\n") == 1
        assert re.search(said, told), told
    with pytest.raises(UsageError, match="cannot be asked: it has no image"):
        load_asked([], load_config(run / "config.yaml"))


def test_a_model_that_takes_one_image_is_asked_about_no_more(
    run: Path,
    picture: Path,
    model: TrainedModel,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """In the sentence of `train`, before the model is loaded; about one image it is asked as ever."""

    def one(processor: Any, view: Any) -> Any:
        raise ValueError("only one image")

    monkeypatch.setattr("ireasoner.model.inputs.SeenImage", one)
    monkeypatch.setattr("ireasoner.model.loading.load_policy", one)
    said = r"tiny cannot be shown several images in one prompt .*: give every item one image"
    assert main(["ask", str(run), str(picture), str(picture), QUESTION]) == 2
    assert re.search(said, capsys.readouterr().err)
    with pytest.raises(UsageError, match=said):
        model.ask([picture, picture], QUESTION)


# --- exporting --------------------------------------------------------------------------------------------------------


def same_model(policy: Policy, model: torch.nn.Module, pictures: list[Image.Image]) -> None:
    """The solver's own log-probabilities of what it says about two pictures are those of another program's model."""
    asked = requests(policy, pictures[:2], [solver_messages("Look. {question}", QUESTION)] * 2)
    for request, picture, (said,) in zip(
        asked, pictures, sample(LiveEngine(policy), asked, "solver", 1, 40), strict=False
    ):
        with torch.no_grad():
            found = chosen(plain_logprobs(model, picture, request.messages, said.token_ids), said.token_ids)
        torch.testing.assert_close(found, torch.tensor(said.logprobs), atol=1e-4, rtol=0)


def exported(run: Path, to: Path, *options: str) -> Path:
    assert main(["export", str(run), "--to", str(to), *options]) == 0
    return to


@pytest.fixture(scope="module")
def adapter(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(run, tmp_path_factory.mktemp("exports") / "adapter")


@pytest.fixture(scope="module")
def merged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(run, tmp_path_factory.mktemp("exports") / "merged", "--merge")


def with_adapter(folder: Path) -> torch.nn.Module:
    """An exported adapter on its base, as PEFT reads it."""
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 by a name that it has deprecated
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        base = AutoModelForImageTextToText.from_pretrained(TINY_MODEL)
        return PeftModel.from_pretrained(base, folder).eval()


def test_peft_loads_the_adapter_as_the_trained_solver(adapter: Path, policy: Policy, pictures: list[Image.Image]):
    same_model(policy, with_adapter(adapter), pictures)
    assert not (adapter / "config.json").exists()  # or it would be taken for a whole model


def test_transformers_loads_the_merged_model_as_the_trained_solver(
    merged: Path, policy: Policy, pictures: list[Image.Image]
):
    model, found = AutoModelForImageTextToText.from_pretrained(merged, output_loading_info=True)
    assert not any(found.values()), found
    same_model(policy, model.eval(), pictures)
    settings = GenerationConfig.from_pretrained(merged)
    assert (settings.do_sample, settings.repetition_penalty, settings.top_k) == (False, 1.0, None)
    assert settings.eos_token_id == list(policy.end_tokens)


def test_the_merged_model_is_evaluated_like_any_other(merged: Path, picture: Path, model: TrainedModel):
    sampling = model.config.sampling
    again = load(str(merged))
    heard = evaluate(again, [LabelledQuestion(picture, QUESTION, "1")], None, sampling).greedy_texts[0]
    assert heard == model.ask(picture, QUESTION).text


def test_a_checkpoint_is_exported_without_figures_of_the_finished_run(policy: Policy, run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run")
    checkpoint = save_checkpoint(tmp_path / "run" / "checkpoints", 2, policy.save_adapters, keep=0)
    card = (exported(checkpoint, tmp_path / "there") / "README.md").read_text("utf-8")
    assert "- steps: 2 of" in card
    assert "- images: 12, without labels" in card
    assert "Nothing of these weights" in card


def test_a_merge_in_half_precision_rounds_once(policy: Policy, tmp_path: Path):
    """What an adapter adds is below the precision of most weights: rounded by itself first, it would be another sum."""
    half = tmp_path / "half"
    shutil.copytree(TINY_MODEL, half)
    load_backbone("tiny").to(torch.bfloat16).save_pretrained(half)
    new_run(tmp_path / "run", model=str(half)).write_text("summary.json", "{}")
    policy.save_adapters(tmp_path / "run")
    found = load_file(exported(tmp_path / "run", tmp_path / "merged", "--merge") / "model.safetensors")
    before, delta = load_file(half / "model.safetensors"), load_file(tmp_path / "run/solver/adapter_model.safetensors")
    adapted = {name.split(".lora_A")[0].removeprefix("base_model.model.") for name in delta if ".lora_A" in name}
    for name in adapted:
        a, b = (delta[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        stored = next(key for key in found if key.endswith(name.removeprefix("model.language_model") + ".weight"))
        expected = (before[stored].float() + 2 * b @ a).bfloat16()
        torch.testing.assert_close(found[stored], expected, atol=0, rtol=2**-7)
        assert (found[stored] == expected).float().mean() > 0.999  # a product in another order may round otherwise
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_processor_of_an_export_is_the_one_that_was_trained_with(
    kind: str, request: pytest.FixtureRequest, policy: Policy, tmp_path: Path
):
    folder = request.getfixturevalue(kind)
    large = Image.effect_noise((900, 700), 50).convert("RGB")
    images, tokenizer = AutoImageProcessor.from_pretrained(folder, backend="pil"), AutoTokenizer.from_pretrained(folder)
    found, expected = images(large, return_tensors="pt"), policy.processor.image_processor(large, return_tensors="pt")
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["processor_class"] == "Qwen2_5_VLProcessor"  # without which AutoProcessor would take the tokenizer
    chat = solver_messages("Look. {question}", QUESTION)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == policy.processor.tokenizer.apply_chat_template(
        chat, chat_template=policy.processor.chat_template, tokenize=False
    )


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_an_export_tells_programs_how_the_solver_was_asked(
    kind: str, request: pytest.FixtureRequest, model: TrainedModel
):
    """As the plug-in for lmms-eval reads it; the card has its command where there is a whole model to evaluate."""
    folder, sampling = request.getfixturevalue(kind), model.config.sampling
    told = json.loads((folder / "solver.json").read_text())
    assert told["solver_prompt"] == sampling.solver_prompt
    assert (told["solution_form"], told["max_solution_tokens"]) == (
        sampling.solution_form,
        sampling.max_solution_tokens,
    )
    assert len(told) == 3
    assert ("lmms-eval --model ireasoner" in (folder / "README.md").read_text()) == (kind == "merged")


@pytest.mark.parametrize("older", [False, True])
def test_the_limit_of_image_tokens_goes_along(older: bool, policy: Policy, tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(TINY_MODEL, base)
    if older:  # as Qwen2.5-VL's own file has it
        path = base / "preprocessor_config.json"
        settings = json.loads(path.read_text())
        size = settings.pop("size")
        settings |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        path.write_text(json.dumps(settings))
    new_run(tmp_path / "run", model=str(base), max_image_tokens=16).write_text("summary.json", "{}")
    policy.save_adapters(tmp_path / "run")
    folder = exported(tmp_path / "run", tmp_path / "there")
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    large = Image.effect_noise((900, 700), 50).convert("RGB")
    assert 12 <= images(large, return_tensors="pt")["image_grid_thw"].prod() // 4 <= 16


def test_what_cannot_be_exported_is_one_sentence(
    run: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    (damaged / "solver" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    cases = {
        (run, adapter): "not an empty folder",
        (run, tmp_path / "file"): "not an empty folder",
        (run, tmp_path / "no" / "where"): "no is no folder",
        (damaged, tmp_path / "there"): "cannot be read",
        (tmp_path / "none", tmp_path / "there"): "is not a run directory",
    }
    for (where, to), said in cases.items():
        assert main(["export", str(where), "--to", str(to)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert said in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "file"]  # nothing is left half-written
    (tmp_path / "empty").mkdir()
    assert (exported(run, tmp_path / "empty") / "README.md").is_file()


# --- the model card ---------------------------------------------------------------------------------------------------


def card_of(text: str) -> tuple[dict[str, Any], str]:
    """The header and the text of a card, as the hub reads them."""
    card = ModelCard(text)
    return card.data.to_dict(), card.text


def scores(mean: float) -> dict[str, dict[str, float]]:
    return {name: {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "p": 0.0123} for name in MEASURES}


SUMMARY: dict[str, Any] = {
    "steps": 3, "best_step": 3, "stopped_early": False, "images": 2500,
    "before": {**scores(0.25), "questions": 64, "images": 32}, "after": scores(0.5), "difference": scores(0.25),
}  # fmt: skip
QWEN, COMMIT = "Qwen/Qwen2.5-VL-7B-Instruct", "c" * 40


def config_of_run(**options: Any) -> Config:
    return resolve({"images": "/home/me/photos", "model": QWEN, "steps": 3, **options})


def test_a_card_says_what_was_trained_and_measured():
    base = Base(QWEN, COMMIT, {"license": "apache-2.0"})
    header, text = card_of(model_card(config_of_run(preset="7b"), SUMMARY, base, form="adapter"))
    assert (header["base_model"], header["library_name"], header["license"]) == (QWEN, "peft", "apache-2.0")
    assert "lora" in header["tags"]
    for part in (
        f"at commit `{COMMIT}`", "recipe: default", "preset: 7b", "steps: 3 of 4 images each", "images: 2500, without",
        "On 64 held-out questions about 32 images",
        "| greedy | 25.0 [20.0, 30.0] | 50.0 [45.0, 55.0] | 25.0 [20.0, 30.0] | 0.0123 |",
        "What was not tested", f"from_pretrained('{QWEN}', revision='{COMMIT}'",
    ):  # fmt: skip
        assert part in text
    header, text = card_of(model_card(config_of_run(), {**SUMMARY, "stopped_early": True}, base, form="merged"))
    assert (header["library_name"], header["base_model_relation"]) == ("transformers", "finetune")
    assert "went back to this step" in text
    assert "PeftModel" not in text


def test_a_card_names_no_path_and_no_licence_that_nobody_gave(tmp_path: Path):
    (tmp_path / "my_rewards.py").write_text("def fn(texts): ...")
    recipe, preset = tmp_path / "my-recipe.yaml", tmp_path / "my-preset.yaml"
    recipe.write_text("reward: my_rewards.py:fn")
    preset.write_text("group_size: 4")
    data = tmp_path / "held-out.jsonl"
    given = {"recipe": str(recipe), "preset": str(preset), "eval_data": str(data), "model": str(tmp_path)}
    for role in ROLES:
        config = config_of_run(**given, proposer_prompt="My secret.")
        header, text = card_of(model_card(config, SUMMARY, find_base(str(tmp_path), None), role))
        assert not {"license", "base_model"} & header.keys()
        for name in (str(tmp_path), tmp_path.name, "photos", "my-", "my_", "held-out.jsonl", "secret"):
            assert name not in f"{header} {text}"
        assert ("How to use it" in text) == (role == "solver")


def test_the_base_is_named_as_others_find_it(tmp_path: Path):
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen2.5-VL-7B-Instruct" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: 7\n---\n# Q")
    assert find_base(str(snapshot), None) == Base(QWEN, COMMIT, {"license": "other", "license_name": "mine"})
    for damaged in ("---\nlicense: [\n---\n", "---\n- a\n---\n", "no header", "\udc80"):
        (snapshot / "README.md").write_text(damaged, "utf-8", "surrogateescape")
        assert find_base(str(snapshot), None) == Base(QWEN, COMMIT)
    assert find_base("tiny", None) == Base(None, None)
    assert find_base(QWEN, COMMIT) == Base(QWEN, COMMIT)  # which is not here, and the hub is not asked


@pytest.mark.parametrize("kind", ["adapter", "merged", "run"])
def test_the_code_on_the_card_gives_the_trained_solvers_reply(
    kind: str,
    request: pytest.FixtureRequest,
    picture: Path,
    model: TrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    folder = request.getfixturevalue(kind)
    if kind == "run":
        text = model_card(model.config, {}, Base(None, None))
        folder = folder / "solver"
    else:
        text = (folder / "README.md").read_text("utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    for said, meant in {
        "PATH OF THE BASE MODEL": str(TINY_MODEL), HERE: str(folder), "photo.jpg": str(picture),
        "What is in the picture?": QUESTION,
    }.items():  # fmt: skip
        code = code.replace(said, meant)
    # The plain class wants torchvision for videos.
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda path: processor_in(Path(path)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        capsys.readouterr()  # what the export printed
        exec(code, {})
    assert capsys.readouterr().out.strip() == model.ask(picture, QUESTION).text.strip()


def processor_in(folder: Path) -> Any:
    """The processor in a folder that may hold no model, as an exported adapter's does not."""
    processor = load_processor("tiny")
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    processor.tokenizer = AutoTokenizer.from_pretrained(folder)
    return processor


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def private_run(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a name, images, a model, texts and files that nobody else should hear of."""
    place = tmp_path_factory.mktemp("secret-place")
    shutil.copytree(TINY_MODEL, place / "secret-model")
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((place / "secret-model" / name).read_text())
        kept = {"_name_or_path": str(place), "name_or_path": str(place)}
        (place / "secret-model" / name).write_text(json.dumps({**settings, **kept}))
    (place / "secret-model" / "notes.txt").write_text("secret")
    played_run(place / "secret-run", steps=1)
    recorder = new_run(
        place / "secret-run", images=str(place / "photos"), model=str(place / "secret-model"), device="cpu",
        eval_data=str(place / "held-out.jsonl"), proposer_prompt="A secret.",
    )  # fmt: skip
    recorder.write_text("summary.json", json.dumps({**SUMMARY, "skipped_images": 1}))
    policy.model.peft_config["solver"].base_model_name_or_path = str(place / "secret-model")
    policy.save_adapters(place / "secret-run")
    return place / "secret-run"


def pushed(hub: Hub, home: Path, run: Path, *options: str, name: str = "owner/solver", **variables: str) -> str:
    """What a push prints, and its error."""
    done = hub.ireasoner(home, "push", str(run), name, *options, **variables)
    return done.stdout + done.stderr


def test_an_export_names_a_base_on_the_hub_with_its_commit_and_licence(hub: Hub, policy: Policy, tmp_path: Path):
    """Those of the commit that the run began with, although the branch has moved on."""
    for commit, licence in ((COMMIT_OF_HUB, "mit"), (OLDER, "apache-2.0")):
        shutil.copytree(TINY_MODEL, tmp_path / commit)
        (tmp_path / commit / "README.md").write_text(f"---\nlicense: {licence}\n---\n# Base")
    hub.models = {"org/model": {commit: tmp_path / commit for commit in (COMMIT_OF_HUB, OLDER)}}
    run = new_run(tmp_path / "run", model="org/model", preset="tiny", device="cpu")
    run.write_text("versions.json", json.dumps({"model": f"org/model@{OLDER}"}))
    run.write_text("summary.json", "{}")
    policy.save_adapters(tmp_path / "run")
    for name, options in {"adapter": [], "merged": ["--merge"]}.items():
        done = hub.ireasoner(tmp_path / "home", "export", str(tmp_path / "run"), "--to", str(tmp_path / name), *options)
        assert done.returncode == 0, done.stderr
        header, text = card_of((tmp_path / name / "README.md").read_text("utf-8"))
        assert (header["base_model"], header["license"]) == ("org/model", "apache-2.0")
        assert f"org/model at commit `{OLDER}`" in text
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/model", OLDER)


@pytest.mark.parametrize("merge", [False, True])
def test_a_push_uploads_the_export_and_nothing_of_the_users(hub: Hub, private_run: Path, tmp_path: Path, merge: bool):
    options = ["--merge"] if merge else []
    said = pushed(hub, tmp_path, private_run, "--private", *options, HF_TOKEN=hub.token)
    assert f"On the hub: {hub.address}/owner/solver" in said
    found = hub.uploaded["owner/solver"]
    folder = exported(private_run, tmp_path / "export", *options)
    assert found.keys() - {".gitattributes"} == {path.name for path in folder.iterdir()}
    for name, content in found.items():
        if name != "README.md":  # which names the repository
            assert content == (folder / name).read_bytes()
        for secret in (b"secret", b"photos", b"held-out.jsonl", str(tmp_path.parent).encode(), b".png"):
            assert secret not in content
    assert b"owner/solver" in found["README.md"]
    assert hub.private == {"owner/solver"}


def test_another_push_replaces_one_form_by_the_other(hub: Hub, run: Path, tmp_path: Path):
    hub.uploaded["owner/solver"] = {"mine.txt": b"", "config.json": b"{}", "model-00001-of-00002.safetensors": b""}
    pushed(hub, tmp_path, run, HF_TOKEN=hub.token)
    found = hub.uploaded["owner/solver"]
    assert {"mine.txt", "adapter_config.json", "adapter_model.safetensors"} <= found.keys()
    assert not {"config.json", "model-00001-of-00002.safetensors"} & found.keys()


def test_episodes_are_uploaded_where_they_are_asked_for(hub: Hub, private_run: Path, tmp_path: Path):
    pushed(hub, tmp_path, private_run, "--with-episodes", HF_TOKEN=hub.token)
    found = hub.uploaded["owner/solver"]
    assert found["episodes/episodes.jsonl"] == (private_run / "episodes.jsonl").read_bytes()
    thumbnails = {f"episodes/images/{path.name}" for path in (private_run / "images").iterdir()}
    assert thumbnails
    assert thumbnails <= found.keys()


def test_links_out_of_a_run_are_not_uploaded(hub: Hub, private_run: Path, tmp_path: Path):
    """A run may come from somebody else, who would like to know what is in a file of yours."""
    (tmp_path / "key").write_text("secret")
    for name in ("images", "images/0123456789abcdef.png", "episodes.jsonl", "solver/adapter_model.safetensors"):
        run = tmp_path / name.replace("/", "-") / "run"
        shutil.copytree(private_run, run)
        shutil.rmtree(run / name) if name == "images" else (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(tmp_path if name == "images" else tmp_path / "key")
        assert " a link" in pushed(hub, tmp_path, run, "--with-episodes", HF_TOKEN=hub.token)
    assert hub.uploaded == {}


def test_what_cannot_be_pushed_is_one_sentence(hub: Hub, run: Path, tmp_path: Path):
    hub.uploaded["owner/public"] = {}
    owner = {"HF_TOKEN": hub.token}
    for said, name, options, variables in (
        ("nobody is logged in to the hub", "owner/solver", [], {}),
        ("it does not accept the token", "owner/solver", [], {"HF_TOKEN": "hf_another"}),
        ("names no owner", "solver", [], owner),
        ("no model on the hub can have the name", "owner/sol ver", [], owner),
        ("it does not accept the token for this", "somebody/solver", [], owner),
        ("on the hub already and public", "owner/public", ["--private"], owner),
        ("the hub cannot be used", "owner/solver", [], {**owner, "HF_ENDPOINT": "http://127.0.0.1:9"}),
    ):
        told = pushed(hub, tmp_path, run, *options, name=name, **variables)
        assert said in told
        assert told.startswith("ireasoner: ")
        assert told.count("\n") == 1
    assert hub.uploaded == {"owner/public": {}}
