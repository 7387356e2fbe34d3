"""Every family of models by the same code: tiny random models of their real classes with their real processors.

What is compared with is transformers and PEFT alone: the model class itself on the processor's own tensors, one
sequence at a time, pixels included, and no cache.
"""

from __future__ import annotations

import functools
import socket
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.utils import is_torchvision_available
from transformers.video_utils import VideoMetadata

from families import FAMILIES
from ireasoner.method.texts import solver_messages
from ireasoner.method.types import ROLES, Completion, Role
from ireasoner.model.backbone import load_backbone, load_processor
from ireasoner.model.forward import completion_hidden, plain_completion_hidden
from ireasoner.model.inputs import SeenImage, build_prompts, encode_images, render
from ireasoner.model.loading import make_policy
from ireasoner.model.options import BackboneOptions
from ireasoner.model.policy import Policy
from ireasoner.model.source import ModelError
from ireasoner.model.views import Pictures
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.studies import doctor
from ireasoner.training.config import resolve
from ireasoner.training.export import export
from ireasoner.training.items import Item
from ireasoner.training.labelled import LabelledQuestion
from ireasoner.training.selfplay import SelfPlay
from ireasoner.training.targets import find_trained
from models import learner, load, load_anew, requests, sample, sampler_gap, teach
from plain import chosen
from recorded import recorded
from runs import new_run

QUESTIONS = ("Which bar is the tallest?", "Is red more than blue, or is there no telling which of them is?", "Where?")
WINDOWS = "gemma3"  # sliding windows: completions share the prompt's computation, but each has a copy of its cache
OWN_STATE = "qwen3_5"  # linear attention: no completion can share its prompt's state with gradients


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(family)
    FAMILIES[family](out)
    return out


@pytest.fixture(scope="session")
def sized(pictures: list[Image.Image]) -> list[Image.Image]:
    return [pictures[0], pictures[1].resize((112, 56)), pictures[2].resize((56, 90))]


def filled(folder: Path) -> Policy:
    """A policy whose adapters do something: fresh ones leave the backbone as it is."""
    policy = load(str(folder))
    doctor.fill_adapters(policy, 0.3, seed=1)
    return policy


def load_plain(folder: Path, adapter: Path | None) -> torch.nn.Module:
    """What a stranger would load, without this package."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def plain_logprobs(model: Any, processor: Any, image: Image.Image, question: str, ids: Sequence[int]) -> Tensor:
    """Log-probabilities of `ids` by one forward pass of the whole model on the processor's own tensors."""
    return chosen(doctor.plain_logprobs(model, processor, image, question, ids), ids)


def asking(policy: Policy, images: Sequence[Image.Image], questions: Sequence[str], seeds: Sequence[int]) -> Any:
    return requests(policy, images, [solver_messages("{question}", q) for q in questions], seeds)


def ask(policy: Policy, images: Sequence[Image.Image], questions: Sequence[str] = QUESTIONS) -> Any:
    return build_prompts(policy, encode_images(policy, images), [solver_messages("{question}", q) for q in questions])


def scene(policy: Policy, images: Sequence[Image.Image]) -> tuple[Any, Tensor, Tensor]:
    """Prompts of different length with two completions each, of different length too."""
    rng = np.random.default_rng(0)
    lengths = [7, 1, 3, 12, 5, 2]
    ids = torch.tensor([[*rng.integers(0, 400, n), *[policy.pad_token] * (12 - n)] for n in lengths])
    mask = torch.arange(12)[None] < torch.tensor(lengths)[:, None]
    return ask(policy, images), ids, mask


@pytest.mark.parametrize("role", [None, *ROLES])
def test_logprobs_are_those_of_the_model_itself(
    family: str, folder: Path, sized: list[Image.Image], role: Role | None, tmp_path: Path
):
    """Ours, batched and with shared prompts, against one sequence at a time under plain transformers and PEFT."""
    policy = filled(folder)
    prompts, ids, mask = scene(policy, sized)
    with torch.no_grad():
        hidden = completion_hidden(policy, prompts, ids, mask, role)
        found = policy.output_layer(hidden).log_softmax(-1).gather(-1, ids[mask][:, None])[:, 0]
    policy.save_adapters(tmp_path)
    model, processor = load_plain(folder, tmp_path / role if role else None), load_processor(folder)
    rows = [(sized[i // 2], QUESTIONS[i // 2], ids[i][mask[i]].tolist()) for i in range(6)]
    expected = torch.cat([plain_logprobs(model, processor, *row) for row in rows])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert policy.shares_prompts == (family != OWN_STATE)
    assert policy.shares_attention == (family not in (OWN_STATE, WINDOWS))


def test_questions_about_one_image_run_it_once(family: str, folder: Path, sized: list[Image.Image]):
    """Questions of different length about images of different size, in no order; what each sampled token had for a
    probability is what an update finds, which runs every prompt as a whole."""
    policy = filled(folder)
    one, other = encode_images(policy, sized[:2])
    texts = [*QUESTIONS, "Which bar is the tallest one?", "Which?"]
    images = [one, other, one, other, one]
    asked = [
        Request(image, solver_messages("Look. {question} Go.", text), (i,))
        for i, (image, text) in enumerate(zip(images, texts, strict=True))
    ]
    run = 0

    def count(decoder: torch.nn.Module, args: Any, given: dict[str, Any]) -> None:
        nonlocal run
        run += given["inputs_embeds"].shape[:2].numel() if "inputs_embeds" in given else 0  # as prompts with images are

    with policy.decoder.register_forward_pre_hook(count, with_kwargs=True):
        groups = sample(LiveEngine(policy), asked, "solver", n=2, longest=6)
    assert sampler_gap(policy, asked, groups, "solver") < 1e-4
    prompts = build_prompts(policy, images, [r.messages for r in asked])
    assert (run < prompts.mask_BP.numel() / 2) == policy.shares_attention


def test_exports_are_the_trained_solver_to_a_stranger(folder: Path, sized: list[Image.Image], tmp_path: Path):
    """Its adapter on its base, and the whole model; with the processor that goes along."""
    policy, ids = filled(folder), list(range(20, 32))
    policy.save_adapters(tmp_path / "run")
    new_run(tmp_path / "run", model=str(folder), dtype="float32").write_text("summary.json", "{}")
    target = find_trained(str(tmp_path / "run"))
    export(target, tmp_path / "adapter")
    export(target, tmp_path / "merged", merge=True)
    whole, processor = load_plain(tmp_path / "merged", None), load_processor(tmp_path / "merged")
    on_base = load_plain(folder, tmp_path / "adapter")
    found = plain_logprobs(whole, processor, sized[1], QUESTIONS[0], ids)
    expected = plain_logprobs(on_base, load_processor(folder), sized[1], QUESTIONS[0], ids)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert (plain_logprobs(load_plain(folder, None), processor, sized[1], QUESTIONS[0], ids) - found).abs().max() > 0.1


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_shared_prompts_have_the_plain_paths_gradients(
    folder: Path, sized: list[Image.Image], monkeypatch: pytest.MonkeyPatch, recompute: bool
):
    """In float64, so that what differs is the mathematics and not rounding; activations kept, and recomputed."""
    backbone = load_backbone(str(folder), "float64")
    policy = make_policy(backbone, load_processor(folder), BackboneOptions())
    doctor.fill_adapters(policy, 0.3, seed=1)
    policy.model.double()  # the adapters too
    # Norms, softmax and positions cast to float32 whatever the model's own type.
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    prompts, ids, mask = scene(policy, sized)
    ids[1:, 1] = policy.backbone.config.image_token_id  # written by the model, and no image
    weights = torch.randn(int(mask.sum()), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradient(path: Any) -> dict[str, Tensor | None]:
        hidden = path(policy, prompts, ids, mask, "solver")
        with torch.no_grad():
            completion_hidden(policy, prompts, ids, mask, None)  # as in an update: the reference, before `backward`
        logprobs = policy.output_layer(hidden).log_softmax(-1).gather(-1, ids[mask][:, None])[:, 0]
        (logprobs * weights).sum().backward()
        found = {name: p.grad for name, p in policy.parameters("solver").items()}
        policy.model.zero_grad(set_to_none=True)
        return found

    expected = gradient(plain_completion_hidden)
    policy.gradient_checkpointing = recompute
    passes: list[int] = []
    hook = policy.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    for path in (completion_hidden, plain_completion_hidden):
        passes.clear()
        for name, found in gradient(path).items():
            assert found is not None
            assert found.abs().max() > 0, name
            torch.testing.assert_close(found, expected[name], atol=1e-9, rtol=1e-9)
        # Each of a path's passes once more in the backward pass, the reference's not.
        here = 2 if policy.shares_prompts and path is completion_hidden else 1
        assert len(passes) == here * (1 + recompute) + (2 if policy.shares_prompts else 1)
    hook.remove()


def test_a_step_of_self_play_and_an_update_of_each_role(folder: Path, sized: list[Image.Image], tmp_path: Path):
    """Play, update, save, read back with PEFT alone; sampler and learner agree; each role trains its own tensors."""
    policy = filled(folder)
    config = resolve({"model": str(folder), "images": ".", "preset": "tiny", "max_solution_tokens": 10})
    labels = [(LabelledQuestion(Path(str(i)), q, "1"),) for i, q in enumerate(QUESTIONS)]
    items = [Item(str(i), image, "0" * 16) for i, image in enumerate(sized)]
    engine = LiveEngine(policy)
    proposed = SelfPlay(policy, engine, config).play(1, items).proposer
    labelled = [item._replace(labels=questions) for item, questions in zip(items, labels, strict=True)]
    solved = SelfPlay(policy, engine, config).play(1, labelled).solver
    for role, taught in (("proposer", proposed), ("solver", solved)):
        assert [sample.episode for sample in taught] == [0, 1, 2]
        requests, groups = [sample.request for sample in taught], [sample.completions for sample in taught]
        prompts = build_prompts(policy, [r.image for r in requests], [r.messages for r in requests])
        rewards = [[float((i + j) % 2) for j in range(len(group))] for i, group in enumerate(groups)]
        before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
        trained = learner(policy, role, learning_rate=1e-3, weight_decay=0.0)
        metrics = teach(trained, prompts, groups, rewards)
        assert metrics["sampler_gap"] < 1e-4
        assert metrics["kl"] > 0
        moved = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == set(policy.parameters(role))
    policy.save_adapters(tmp_path)
    processor = load_processor(folder)
    for role in ROLES:
        asked = asking(policy, sized, QUESTIONS, range(3))
        completion: Completion = sample(LiveEngine(policy), asked, role, 1, 6)[1][0]
        expected = plain_logprobs(
            load_plain(folder, tmp_path / role), processor, sized[1], QUESTIONS[1], completion.token_ids
        )
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_step_of_decoding_can_be_captured(folder: Path, pictures: list[Image.Image]):
    policy = filled(folder)
    if not policy.shares_attention:
        pytest.skip("decodes from a cache that grows")
    engine, asked = LiveEngine(policy), asking(policy, pictures[:2], QUESTIONS[:2], [1, 2])
    expected = sample(engine, asked, "solver", 3, 12)
    engine.capture = recorded
    found = sample(engine, asked, "solver", 3, 12)
    assert engine.capture is not None  # nothing in the step waited for the host
    assert [[c.token_ids for c in group] for group in found] == [[c.token_ids for c in group] for group in expected]


def test_another_image_other_logprobs(folder: Path, pictures: list[Image.Image]):
    policy = filled(folder)
    prompts = ask(policy, pictures[:2], [QUESTIONS[0]] * 2)
    ids = torch.tensor([[11, 12, 13, 14]] * 2)
    with torch.no_grad():
        hidden = completion_hidden(policy, prompts, ids, torch.ones_like(ids).bool(), "solver").view(2, 4, -1)
    assert (hidden[0] - hidden[1]).abs().amax(-1).min() > 1e-3


def test_lora_on_every_linear_layer_of_the_language_model_and_nowhere_else(folder: Path):
    policy = load(str(folder))
    tower = {id(m) for m in policy.decoder.modules()}
    adapted = [m for m in policy.model.modules() if "lora_A" in dict(m.named_children())]
    assert adapted
    assert all(id(m) in tower for m in adapted)
    linear = [m for m in load_backbone(str(folder)).get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    assert len(adapted) == len(linear)
    assert f"LoRA on {len(linear)} layers of model." in policy.describe()
    with pytest.raises(ModelError, match="matches no linear layer of the language model"):
        load(str(folder), lora_targets=["patch_embed"])


def test_small_images_of_one_shape_see_nothing_of_each_other_in_the_vision_tower(
    folder: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
):
    policy = load(str(folder))
    images = [pictures[0], pictures[1].resize((56, 90)), pictures[1], pictures[2].resize((56, 90)), pictures[2]]
    see, batches = policy.base.get_image_features, []

    @functools.wraps(see)
    def counted(**kwargs: Any) -> Any:
        batches.append(kwargs)
        return see(**kwargs)

    monkeypatch.setattr(policy.base, "get_image_features", counted)
    found = encode_images(policy, images)
    assert len(batches) <= 2
    for image, encoded in zip(images, found, strict=True):
        (alone,) = encode_images(policy, [image])
        assert encoded.features.keys() == alone.features.keys()
        assert encoded.extras.keys() == alone.extras.keys()
        torch.testing.assert_close(encoded.features, alone.features, atol=1e-5, rtol=1e-5)


def test_special_tokens_in_a_question_are_left_out(folder: Path, pictures: list[Image.Image]):
    """Many data sets write `<image>` before a question, and what a model writes may hold any token."""
    policy = load(str(folder))
    special = {token.content for token in policy.processor.tokenizer.added_tokens_decoder.values() if token.special}
    plain, *others = ("Where?", *(f"{token}Where?" for token in sorted(special | {policy.processor.image_token})))
    images = encode_images(policy, pictures[:1])
    expected, *rest = (
        build_prompts(policy, images, [solver_messages("{question}", asked)]) for asked in (plain, *others)
    )
    assert rest
    for prompts in rest:
        assert torch.equal(prompts.text["input_ids"], expected.text["input_ids"])


def test_a_limit_of_image_tokens_that_has_no_effect_is_told(folder: Path, pictures: list[Image.Image]):
    large = pictures[0].resize((560, 560))
    free, limited = load(str(folder)), load(str(folder), max_image_tokens=4)
    less, more = (len(encode_images(policy, [large])[0].pooled) for policy in (limited, free))
    for policy in (limited, free):  # both have a limit: there is a default
        assert ("max_image_tokens has no effect" in policy.describe()) == (less == more)


def test_the_doctor_finds_nothing_wrong(folder: Path):
    findings = list(doctor.examine(str(folder)))
    assert len(findings) == 7
    assert [f.name for f in findings if not f.passed] == []


def test_a_local_model_makes_no_network_call(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a connection was tried: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_anew(str(folder))


def test_several_images_of_a_prompt_are_what_the_model_itself_sees(family: str, folder: Path, sized: list[Image.Image]):
    """Two prompts of one batch, of three images and of one; and that the last image counts."""
    policy, model, ids = filled(folder), load_plain(folder, None), [11, 12, 13, 14]
    three, chat = Pictures(tuple(sized)), solver_messages("{question}", QUESTIONS[0])
    found = {}
    for view in (three, Pictures((*sized[:2], sized[0]))):
        prompts = build_prompts(policy, encode_images(policy, [view, sized[1]]), [chat, chat])
        with torch.no_grad():
            hidden = completion_hidden(policy, prompts, torch.tensor([ids] * 2), torch.ones(2, 4).bool(), None)
        found[view] = policy.output_layer(hidden).log_softmax(-1).unflatten(0, (2, 4))[:, range(4), ids]
    processor = load_processor(folder)
    told = [{"role": "user", "content": [{"type": "image"}] * 3 + chat[0]["content"][1:]}]
    text = processor.tokenizer.apply_chat_template(
        told, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
    )
    inputs = processor(images=[sized], text=[text], add_special_tokens=False, return_tensors="pt")
    expected = continued(model, inputs, ids)
    torch.testing.assert_close(found[three][0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        found[three][1], plain_logprobs(model, processor, sized[1], QUESTIONS[0], ids), atol=1e-4, rtol=0
    )
    one, other = found.values()
    assert (one[0] - other[0]).abs().max() > 1e-3


def continued(model: Any, inputs: Any, ids: Sequence[int]) -> Tensor:
    """The log-probabilities of `ids` behind a processor's tensors, by one forward pass of the whole model."""
    length, added = inputs["input_ids"].shape[1], torch.tensor([list(ids)])
    for name in [n for n in inputs if n == "attention_mask" or n.endswith("token_type_ids")]:
        inputs[name] = torch.cat([inputs[name], torch.full_like(added, int(name == "attention_mask"))], 1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], added], 1)
    with torch.no_grad():
        logits = model(**inputs).logits[0, length - 1 : -1]
    return chosen(logits.log_softmax(-1), ids)


def test_a_clip_is_shown_as_the_family_shows_clips(family: str, folder: Path, sized: list[Image.Image]):
    """Qwen's models have a place for videos: five frames are three pairs, the last frame twice. The others see images.

    Beside a clip there is an image in the batch, and what was sampled has the probabilities that an update finds.
    """
    policy, chat = filled(folder), solver_messages("{question}", QUESTIONS[0])
    frames = [sized[0], *[sized[i].resize((84, 84)) for i in (1, 2)]]
    clip = Pictures((*frames, frames[0], frames[2]), fps=2.0)
    asked = [Request(view, chat, (i,)) for i, view in enumerate(encode_images(policy, [clip, sized[1]]))]
    assert sampler_gap(policy, asked, sample(LiveEngine(policy), asked, "solver", 2, 6), "solver") < 1e-4
    (first, backward) = encode_images(policy, [clip, Pictures(clip.images[::-1], fps=2.0)])
    ids = torch.tensor([[11, 12, 13, 14]] * 2)
    with torch.no_grad():
        hidden = completion_hidden(policy, build_prompts(policy, [first, backward], [chat] * 2), ids, ids > 0, None)
    found = policy.output_layer(hidden).log_softmax(-1).unflatten(0, (2, 4))[:, range(4), ids[0]]
    assert (found[0] - found[1]).abs().max() > 1e-3  # which way it goes
    assert first.seen.is_video == family.startswith("qwen")
    if not first.seen.is_video:
        return
    # By hand: the patches of two frames behind one another, as the vision tower is made for them.
    inputs = first.seen.inputs(render(policy.processor, chat, clip))
    of_image, size = policy.processor.image_processor, policy.processor.image_processor.patch_size
    own = [of_image(images=[frame], return_tensors="pt")["pixel_values"] for frame in (*clip.images, clip.images[-1])]
    shaped = [each.view(len(each), 3, 2, size, size) for each in own]
    pairs = [
        torch.stack([a[:, :, 0], b[:, :, 1]], 2).flatten(1) for a, b in zip(shaped[::2], shaped[1::2], strict=True)
    ]
    inputs["pixel_values_videos"] = torch.cat(pairs)
    assert inputs["video_grid_thw"].tolist()[0][0] == 3
    expected = continued(load_plain(folder, None), dict(inputs), ids[0].tolist())
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=0)


def test_clips_are_processed_as_the_family_s_own_video_processor_does(folder: Path, family: str):
    """Up to the rounding of pixels and the way of resizing, which these frames do not need."""
    if not family.startswith("qwen") or not is_torchvision_available():
        pytest.skip("needs a family with a video processor, and torchvision")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    processor, rng = load_processor(folder), np.random.default_rng(0)
    side = processor.image_processor.patch_size * processor.image_processor.merge_size
    frames = [Image.fromarray(rng.integers(0, 256, (2 * side, 3 * side, 3), dtype=np.uint8)) for _ in range(5)]
    seen, chat = SeenImage(processor, Pictures(tuple(frames), fps=2.0)), solver_messages("{question}", QUESTIONS[0])
    text = render(processor, chat, seen.view)
    names = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    options = {name: getattr(processor.image_processor, name) for name in names}
    processor.video_processor = Qwen2VLVideoProcessor(
        **options, size=dict(processor.image_processor.size), do_sample_frames=False
    )
    metadata = [VideoMetadata(5, 2.0, frames_indices=[0, 1, 2, 3, 4])]
    expected = processor(
        videos=[frames], text=[text], add_special_tokens=False, return_tensors="pt", video_metadata=metadata
    )
    found = seen.inputs(text)
    assert set(found) == set(expected)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)
