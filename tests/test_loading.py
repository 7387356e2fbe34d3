"""Loading: from a stand-in for the hub, from damaged folders, in float16, and with another way to compute attention."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from families import FAMILIES
from hub import COMMIT, OLDER, Hub, serving
from ireasoner.app.cli import main
from ireasoner.method.types import UsageError
from ireasoner.model import backbone as backbones
from ireasoner.model import loading
from ireasoner.model.backbone import load_backbone, load_processor, most_image_tokens
from ireasoner.model.inputs import SeenImage, build_prompts
from ireasoner.model.loading import load_policy
from ireasoner.model.options import BackboneOptions
from ireasoner.model.parallel import ALONE
from ireasoner.model.source import INDEX, SINGLE, TINY_MODEL, ModelError, Source, find_model, waiting_line
from ireasoner.playground import dataset
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training.config import load_config, resolve
from ireasoner.training.opening import open_engine
from ireasoner.training.recorder import read_records
from models import learner, load, requests, sample, teach


def load_each(models: Sequence[tuple[str, str | None]]) -> int:
    """Print for each model and revision the commit that was loaded, or what was wrong."""
    for model, revision in models:
        try:
            print(load_policy(model, BackboneOptions(dtype="float32"), revision=revision, device="cpu").commit)
        except UsageError as error:
            print(error)
    return 0


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny model, to do with as one likes."""
    return Path(shutil.copytree(TINY_MODEL, tmp_path / "model"))


def told(hub: Hub, home: Path, *models: tuple[str, str | None], **variables: str) -> list[str]:
    """For each model and revision the commit that was loaded, or what was wrong; nothing else is printed."""
    done = hub.call(home, partial(load_each, models), **variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_model_on_the_hub_is_one_sentence(hub: Hub, tmp_path: Path):
    hub.models = {f"org/{name}": {COMMIT: TINY_MODEL} for name in ("good", "gated", "broken", "cut")}
    hub.gated, hub.broken, hub.cut = {"org/gated"}, {"org/broken"}, {"org/cut"}
    asked = ["good", "gated", "missing", "broken", "cut"]
    good, gated, missing, broken, cut, revision = told(
        hub, tmp_path, *((f"org/{name}", None) for name in asked), ("org/good", "v9")
    )
    assert good == COMMIT
    assert "cannot load the model 'org/gated': it is only for those who accepted its terms" in gated
    assert "no such public model on the hub" in missing
    assert "could not be downloaded from the hub (Server error '500 Internal Server Error'" in broken
    assert "peer closed connection" in cut
    assert "the hub has no version v9 of it" in revision
    assert sum("/org/broken" in path for path in hub.asked) == 1  # it is not asked again and again
    # Without a network what was downloaded whole is used, and the rest is told.
    models = [("org/good", None), ("org/good", COMMIT), ("org/cut", None), ("org/missing", None)]
    by_name, by_commit, half, none = told(hub, tmp_path, *models, HF_HUB_OFFLINE="1")
    assert (by_name, by_commit) == (COMMIT, COMMIT)
    for sentence in (half, none):
        assert "not all of it is on this machine, and HF_HUB_OFFLINE forbids to download it" in sentence
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    by_name, by_commit, none = told(hub, tmp_path, *models[:2], models[3], **unreachable)
    assert (by_name, by_commit) == (COMMIT, COMMIT)
    assert "Connection refused): check the network and start again" in none


def test_a_hub_that_does_not_answer_is_not_waited_for(hub: Hub, tmp_path: Path):
    hub.models = {"org/here": {COMMIT: TINY_MODEL}}
    assert told(hub, tmp_path, ("org/here", None)) == [COMMIT]
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never says anything
        silence = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_ETAG_TIMEOUT": "1"}
        began = time.monotonic()
        here, missing = told(hub, tmp_path, ("org/here", None), ("org/missing", None), **silence)
    assert time.monotonic() - began < 40
    assert here == COMMIT
    assert "timed out): check the network and start again" in missing


def test_nothing_but_text_and_safetensors_is_downloaded(hub: Hub, folder: Path, tmp_path: Path):
    for name in ("pytorch_model.bin", "modeling.py", "consolidated.safetensors"):
        (folder / name).write_bytes(b"")
    hub.models = {"org/model": {COMMIT: folder}}
    assert told(hub, tmp_path / "home", ("org/model", None)) == [COMMIT]
    fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert fetched == {path.name for path in TINY_MODEL.iterdir()}


def test_a_run_keeps_the_commit_that_it_began_with(hub: Hub, folder: Path, tmp_path: Path):
    """The main branch moves on while a run is stopped; a revision that is named is that of `eval`, too."""
    change(folder, lambda tensor: 1.01 * tensor)
    dataset.write_unlabeled(tmp_path / "images", 4, "chalk")
    dataset.write_questions(tmp_path / "test", 2, "chalk")
    hub.models = {"org/model": {COMMIT: TINY_MODEL, OLDER: folder}}
    home, run = tmp_path / "home", tmp_path / "run"
    start = ["train", "--model", "org/model", "--images", str(tmp_path / "images"), "--preset", "tiny"]
    start += ["--device", "cpu", "--steps", "1", "--images-per-step", "2", "--probe-every", "0"]
    start += ["--max-solution-tokens", "64"]
    done = hub.ireasoner(home, *start, "--out", str(run))
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "versions.json").read_text())["model"] == f"org/model@{COMMIT}"
    assert load_config(run / "config.yaml").revision is None
    adapter = json.loads((run / "solver" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "org/model"
    hub.main = OLDER
    hub.asked.clear()
    done = hub.ireasoner(home, "train", "--resume", str(run), "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert not [path for path in hub.asked if OLDER in path or path.endswith("/main")]
    named = tmp_path / "named"
    done = hub.ireasoner(home, *start, "--out", str(named), "--revision", OLDER)
    assert done.returncode == 0, done.stderr
    assert load_config(named / "config.yaml").revision == OLDER
    assert json.loads((named / "versions.json").read_text())["model"] == f"org/model@{OLDER}"
    hub.main = COMMIT
    hub.asked.clear()
    done = hub.ireasoner(home, "eval", str(named), "--data", str(tmp_path / "test/test.jsonl"), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert not [path for path in hub.asked if COMMIT in path or path.endswith("/main")]


@pytest.mark.parametrize("name", ["./none", "../none", "/none", "~/none", "a/b/c", "data/none", "here/none"])
def test_the_hub_is_not_asked_for_what_can_only_be_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "qwen").mkdir(parents=True)
    (tmp_path / "data" / "qwen" / "config.json").write_text("{}")
    (tmp_path / "here").mkdir()
    monkeypatch.setattr("ireasoner.model.source._download", None)
    with pytest.raises(ModelError, match="there is no such folder") as caught:
        find_model(name)
    assert ("the models in data are qwen" in str(caught.value)) == (name == "data/none")
    assert ("because there is a folder" in str(caught.value)) == (name in ("data/none", "here/none"))


@pytest.mark.parametrize("model", ["tiny", "folder"])
def test_a_revision_is_for_the_hub(model: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "tiny" if model == "tiny" else str(folder), "--revision", "main"]) == 2
    assert "--revision is for models on the hub" in capsys.readouterr().err


# --- damaged folders --------------------------------------------------------------------------------------------------


def in_shards(folder: Path, keep: int = 2, **index: Any) -> None:
    """Cut the weights into two files, of which `keep` stay, and name both in an index, or what is given."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    held = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in list(held.items())[:keep]:
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    places = {name: file for file, part in held.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places, **index}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(folder: Path, of: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace one of the weights, or remove it."""
    tensors = load_file(folder / SINGLE)
    name = next(name for name in sorted(tensors) if "down_proj" in name)
    changed = of(tensors.pop(name))
    save_file({**tensors, **({} if changed is None else {name: changed})}, folder / SINGLE, metadata={"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is missing": (
        lambda f: in_shards(f, keep=1),
        "of its 2 files with weights 1 are missing",
    ),
    "the index names nothing": (lambda f: in_shards(f, weight_map={}), "names no files with weights"),
    "the index leads elsewhere": (lambda f: in_shards(f, weight_map={"a": "../a"}), "names no files with weights"),
    "the index is a list": (lambda f: in_shards(f, weight_map=[1]), "names no files with weights"),
    "weights end early": (lambda f: cut(f / SINGLE), "model.safetensors is damaged or not complete"),
    "weights are a pointer": (lambda f: (f / SINGLE).write_text("version https://git-lfs"), "damaged or not complete"),
    "a weight is missing": (lambda f: change(f, lambda _: None), "1 of its weights are missing or"),
    "a weight is cut": (
        lambda f: change(f, lambda t: t[:1].clone()),
        "1 of its weights are missing or",
    ),
    "no config.json": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config.json ends early": (lambda f: cut(f / "config.json"), "config.json cannot be read"),
    "config.json is a list": (lambda f: (f / "config.json").write_text("[]"), "holds no options of a model"),
    "a config of another kind": (lambda f: (f / "config.json").write_text("{}"), "Unrecognized model"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    "the tokenizer ends early": (lambda f: cut(f / "tokenizer.json"), "cannot load the processor"),
    "no image processor": (lambda f: (f / "preprocessor_config.json").unlink(), "Can't load image processor"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_sentence(damage: str, folder: Path):
    do, sentence = DAMAGE[damage]
    do(folder)
    with pytest.raises(ModelError, match="cannot load the") as caught:
        load(str(folder))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_in_shards_are_read(folder: Path):
    in_shards(folder)
    ours, theirs = (load_backbone(model).state_dict() for model in (str(folder), "tiny"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_waited_for_is_told_with_its_size_where_that_is_known(folder: Path):
    megabytes = (TINY_MODEL / SINGLE).stat().st_size / 1e6
    assert waiting_line(find_model("tiny")) == f"Loading tiny ({megabytes:.1f} MB) …"
    of_hub = Source("org/model", folder, COMMIT)
    assert waiting_line(of_hub) == f"Loading org/model ({megabytes:.1f} MB) …"
    in_shards(folder, keep=1, metadata={"total_size": 16_584_333_312})
    assert waiting_line(of_hub) == "Downloading and loading org/model (16.6 GB) …"
    (folder / INDEX).unlink()
    assert waiting_line(of_hub) == "Downloading and loading org/model …"


# --- device, precision, attention -------------------------------------------------------------------------------------


def test_weights_go_to_their_device_as_they_are_read(monkeypatch: pytest.MonkeyPatch):
    """The meta device stands for a GPU: what lay in the process's memory first would have to be moved there."""
    monkeypatch.setattr(torch.nn.Module, "to", None)
    assert {p.device.type for p in load_backbone("tiny", device="meta").parameters()} == {"meta"}
    on_cpu = load_backbone("tiny")
    assert not hasattr(on_cpu, "hf_device_map")
    saved = load_file(TINY_MODEL / SINGLE)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in on_cpu.state_dict().items() if name in saved)


def test_a_model_that_does_not_fit_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **options: Any) -> Any:
        assert options["device_map"] == "cuda:1"
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    monkeypatch.setattr(backbones.AutoModelForImageTextToText, "from_pretrained", full)
    with pytest.raises(ModelError, match="its weights do not fit in the free memory of cuda:1"):
        load_backbone("tiny", "bfloat16", "cuda:1")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return dataset.write_unlabeled(tmp_path / "images", 4, "chalk")


@pytest.mark.usefixtures("no_report")
def test_a_run_in_float16(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    more = ["--steps", "2", "--images-per-step", "2", "--group-size", "3", "--max-solution-tokens", "64"]
    more += ["--probe-every", "0", "--dtype", "float16", "--device", "cpu", "--attention", "eager"]
    assert main(["train", "--images", str(images), "--model", "tiny", "--out", str(tmp_path / "run"), *more]) == 0
    config = load_config(tmp_path / "run" / "config.yaml").backbone
    assert (config.dtype, config.attention) == ("float16", "eager")
    for record in read_records(tmp_path / "run" / "metrics.jsonl"):
        assert 0 < record["grad_norm/solver"] < float("inf")
        assert record["sampler_gap/solver"] < 0.1
    solver = load_file(tmp_path / "run" / "solver" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in solver.values()} == {torch.float32}
    assert main(["doctor", "tiny", "--device", "cpu", "--dtype", "float16"]) == 0


def test_small_gradients_are_not_lost_in_float16(make_policy: Any, pictures: Any):
    """With advantages of 1e-4, float16 would lose all of the gradient if the loss were not scaled."""
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]] * 2
    policy = make_policy()
    groups = sample(LiveEngine(policy), requests(policy, pictures[:2], chats), "solver", 4, 40)

    def gradient(dtype: str) -> torch.Tensor:
        policy = make_policy(dtype=dtype)
        prompts = build_prompts(policy, [r.image for r in requests(policy, pictures[:2], chats)], chats)
        solver = learner(policy, "solver", kl_coef=1e-8, max_grad_norm=1e9)
        found: list[torch.Tensor] = []

        def keep() -> None:
            found.extend(p.grad.flatten() for p in solver.parameters.values() if p.grad is not None)

        solver.optimizer.step = keep  # type: ignore[method-assign, assignment]
        solver.baseline.value = 0.0
        teach(solver, prompts, groups, [[1e-4, -1e-4, 5e-5, -5e-5]] * 2)
        return torch.cat(found)

    exact, half = gradient("float32"), gradient("float16")
    assert (half - exact).norm() < 0.01 * exact.norm()


def test_bfloat16_on_a_gpu_without_it(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr("ireasoner.training.opening.lacks_bfloat16", lambda device: True)
    arguments = ["train", "--images", str(images), "--model", "tiny", "--device", "cpu", "--steps", "1"]
    assert main([*arguments, "--dtype", "bfloat16", "--out", str(tmp_path / "run")]) == 2
    assert "only emulates bfloat16, slowly: train with --dtype float16" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_attention_can_be_chosen(monkeypatch: pytest.MonkeyPatch):
    for attention in ("eager", "sdpa"):
        policy = load(attention=attention)
        assert policy.decoder.config._attn_implementation == attention
        assert policy.shares_attention
    # Its kernels are not to be tried with a mask that they cannot read.
    monkeypatch.setattr(policy.decoder.config, "_attn_implementation_internal", "flash_attention_2")
    monkeypatch.setattr(loading, "packed_hidden", None)
    assert not loading._can_share_attention(policy)


@pytest.mark.parametrize(
    ("dtype", "device", "why"),
    [("bfloat16", "cuda", "flash-attn, which is not installed"), ("float32", "cuda", "not in float32 on cuda"),
     ("bfloat16", "cpu", "not in bfloat16 on cpu")],
)  # fmt: skip
def test_attention_that_is_not_to_be_had(dtype: str, device: str, why: str, monkeypatch: pytest.MonkeyPatch):
    """Before anything is loaded: transformers would fetch kernels from the hub, and run them."""
    monkeypatch.setattr(backbones, "find_model", None)
    monkeypatch.setattr(backbones, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ModelError, match=why):
        load_backbone("tiny", dtype, device, attention="flash_attention_2")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_image_takes_more_tokens_than_expected(family: str, tmp_path: Path):
    processor = load_processor(FAMILIES[family](tmp_path), 40)
    most, found = most_image_tokens(processor, 10**6), []
    for width, height in ((1000, 1000), (1500, 600), (500, 2000), (300, 300), (64, 640), (1200, 100), (40, 40)):
        seen = SeenImage(processor, Image.new("RGB", (width, height)))
        found.append(seen.inputs(processor.image_token)["input_ids"].shape[1])
    assert 0.9 * most <= max(found) <= most


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_what_vllm_is_told(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its share of the GPU, and a context that holds the largest image; nothing here is vLLM's but the name."""
    told: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda **options: told.update(options)))
    folder = FAMILIES[family](tmp_path)
    policy = load(folder, max_image_tokens=40)
    policy.device = torch.device("cuda")
    flags = {"images": ".", "model": folder, "engine": "vllm", "vllm_share": 0.3, "max_image_tokens": 40}
    flags |= {"max_image_pixels": 10**6}  # images of the default size take seconds to be cut
    config = resolve(flags)
    open_engine(config, policy, ALONE)
    assert told["gpu_memory_utilization"] == 0.3
    assert told["model"] == folder
    written = config.sampling.max_question_tokens + config.sampling.max_solution_tokens
    image = most_image_tokens(policy.processor, config.max_image_pixels)
    assert (image > 40) == (family == "llava_onevision")
    texts = (config.sampling.proposer_prompt, config.sampling.solver_prompt)
    prompt = max(len(policy.processor.tokenizer(text)["input_ids"]) for text in texts)
    assert told["max_model_len"] == image + prompt + written + 128  # for the chat template
