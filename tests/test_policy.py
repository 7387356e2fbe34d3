"""The policy and its sampler against plain transformers and PEFT: the same log-probabilities, whatever the batch."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ireasoner.method.seeds import uniforms
from ireasoner.method.texts import proposer_messages, solver_messages
from ireasoner.method.types import ROLES, Completion, Role
from ireasoner.model import loading
from ireasoner.model.attention import SharedCache
from ireasoner.model.backbone import language_targets, load_backbone
from ireasoner.model.forward import completion_hidden
from ireasoner.model.inputs import build_prompts, embed_texts, encode_images
from ireasoner.model.policy import Policy
from ireasoner.model.source import ModelError
from ireasoner.rollouts import distributions, live
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.rollouts.vllm import completion_seeds
from models import load, load_anew, padded, requests, sample
from plain import chosen, load_apart, plain_logprobs
from recorded import recorded

MakePolicy = Callable[..., Policy]
QUESTIONS = ("Which bar is the tallest?", "Is red more than blue, or is there no telling which of them is?", "Where?")
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


def ask(policy: Policy, images: Sequence[Image.Image], questions: Sequence[str] = QUESTIONS):
    return build_prompts(policy, encode_images(policy, images), [solver_messages("{question}", q) for q in questions])


def asking(
    policy: Policy,
    images: Sequence[Image.Image],
    questions: Sequence[str] = QUESTIONS,
    seeds: Sequence[int] = (1, 2, 3),
) -> list[Request]:
    return requests(policy, images, [solver_messages("{question}", q) for q in questions], seeds[: len(images)])


@pytest.fixture(scope="module")
def babbler(make_policy: MakePolicy) -> Policy:
    """Adapters so large that the first token already has an entropy of nats; not to be changed."""
    return make_policy(0.3)


@pytest.fixture(scope="module")
def sized(pictures: list[Image.Image]) -> list[Image.Image]:
    """Three pictures of different size and shape: 9, 8 and 2 image tokens."""
    return [pictures[0], pictures[1].resize((112, 56)), pictures[2].resize((56, 28))]


@pytest.fixture(scope="module")
def plain(babbler: Policy, tmp_path_factory: pytest.TempPathFactory) -> dict[Role | None, torch.nn.Module]:
    return load_apart(babbler, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def policy_logprobs(policy: Policy, prompts: Any, groups: Sequence[Sequence[Sequence[int]]], role: Role | None):
    """Log-probabilities of groups of token ids by the path that an update takes; one [tokens, V] for each."""
    flat = [ids for group in groups for ids in group]
    hidden = completion_hidden(policy, prompts, *padded(policy, flat), role)
    return policy.output_layer(hidden).log_softmax(-1).split([len(row) for row in flat])


# --- one path for everything -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [None, *ROLES])
def test_batched_logprobs_equal_plain_ones_one_at_a_time(
    babbler: Policy, sized: list[Image.Image], plain: dict[Role | None, torch.nn.Module], role: Role | None
):
    """Left padding, prompts of different length, images of different size, ragged groups: none of it shows."""
    rng = np.random.default_rng(0)
    prompts = ask(babbler, sized)
    assert len(set(prompts.mask_BP.sum(1).tolist())) == 3
    groups = [[rng.integers(0, 400, length).tolist() for length in row] for row in ((7, 1), (3, 12), (5, 2))]
    found = iter(policy_logprobs(babbler, prompts, groups, role))
    for image, question, group in zip(sized, QUESTIONS, groups, strict=True):
        for ids in group:
            expected = plain_logprobs(plain[role], image, solver_messages("{question}", question), ids)
            torch.testing.assert_close(next(found), expected, **TOLERANCE)


def test_token_distributions_are_those_of_the_whole_vocabulary(
    babbler: Policy, sized: list[Image.Image], plain: dict[Role | None, torch.nn.Module], monkeypatch: Any
):
    """Entropy and distance from uniform of each token of a group of ragged completions, in chunks of a few logits; and
    how likely these tokens are. Of the three completions, the last two go through the model together."""
    request = asking(babbler, sized)[1]
    vocabulary = plain[None].get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    monkeypatch.setattr(distributions, "CHUNK_LOGITS", 3 * vocabulary)
    group = [Completion("", ids, (), "stop") for ids in ((5, 6, 7, 8, 9), (11,), (12, 13, 14))]
    run, sizes = distributions.completion_hidden, []

    def counted(policy: Policy, prompts: Any, ids_RC: torch.Tensor, *others: Any) -> torch.Tensor:
        sizes.append(ids_RC.shape)
        return run(policy, prompts, ids_RC, *others)

    monkeypatch.setattr(distributions, "completion_hidden", counted)
    found = distributions.token_distributions(babbler, request, group, "solver", 9)
    likely = distributions.token_logprobs(babbler, request, group, "solver", 9)
    assert sizes == [(1, 5), (2, 3)] * 2
    for completion, of_tokens, own in zip(group, found, likely, strict=True):
        logprobs = plain_logprobs(plain["solver"], sized[1], request.messages, completion.token_ids)
        torch.testing.assert_close(torch.tensor(own), chosen(logprobs, completion.token_ids), **TOLERANCE)
        uniform = torch.full_like(logprobs, 1 / vocabulary)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        certainties = (uniform * (uniform.log() - logprobs)).sum(-1)
        torch.testing.assert_close(torch.tensor(of_tokens.entropies), entropies, **TOLERANCE)
        torch.testing.assert_close(torch.tensor(of_tokens.certainties), certainties, **TOLERANCE)


def test_the_likelihood_of_any_text_behind_any_text(
    babbler: Policy, sized: list[Image.Image], plain: dict[Role | None, torch.nn.Module], monkeypatch: Any
):
    """In several batches and in chunks of a few logits; a text without tokens has none."""
    request = asking(babbler, sized)[1]
    monkeypatch.setattr(distributions, "CHUNK_LOGITS", 3 * 500)
    texts = [("Red is at 5.", "</think><answer>5"), ("", "Blue is"), ("Red", ""), ("The blue bar is at 3", " and 7")]
    tokenizer = babbler.processor.tokenizer
    found = distributions.text_logprobs(babbler, request, texts, "solver", 20)
    assert found[2] == []
    for (said, follows), logprobs in zip(texts, found, strict=True):
        before, after = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (said, follows))
        whole = plain_logprobs(plain["solver"], sized[1], request.messages, before + after)
        expected = whole[len(before) :].gather(-1, torch.tensor(after, dtype=torch.long)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, **TOLERANCE)


def test_a_slice_of_prompts_is_those_prompts(babbler: Policy, sized: list[Image.Image]):
    ids = [[[5, 6, 7]], [[8, 9]], [[10]]]
    prompts = ask(babbler, sized)
    whole = policy_logprobs(babbler, prompts, ids, "solver")
    part = policy_logprobs(babbler, prompts[1:3], ids[1:], "solver")
    for a, b in zip(whole[1:], part, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_no_logprobs_blind_to_the_image(babbler: Policy, pictures: list[Image.Image]):
    """Same question, same completion, two images of one size: only the pixels differ."""
    prompts = ask(babbler, pictures[:2], [QUESTIONS[0]] * 2)
    assert prompts.mask_BP.all()
    ids = [11, 12, 13, 14]
    one, other = policy_logprobs(babbler, prompts, [[ids], [ids]], "solver")
    assert (chosen(one, ids) - chosen(other, ids)).abs().min() > 1e-3


def test_fresh_adapters_are_the_reference_and_are_drawn_from_the_seed(pictures: list[Image.Image]):
    policy, same, other = load(seed=3), load(seed=3), load(seed=4)
    ids = [[[5, 6, 7]]]
    prompts = ask(policy, pictures[:1], QUESTIONS[:1])
    reference = policy_logprobs(policy, prompts, ids, None)[0]
    for role in ROLES:
        assert torch.equal(policy_logprobs(policy, prompts, ids, role)[0], reference)
        for (name, a), b, c in zip(
            policy.parameters(role).items(),
            same.parameters(role).values(),
            other.parameters(role).values(),
            strict=True,
        ):
            assert torch.equal(a, b)
            assert torch.equal(a, c) == ("lora_B" in name)


def test_a_prompt_with_two_images_is_refused(babbler: Policy, pictures: list[Image.Image]):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]}]
    with pytest.raises(ValueError, match="exactly one image, not 2"):
        build_prompts(babbler, encode_images(babbler, pictures[:1]), [chat])


def test_images_are_scaled_down_to_the_limit(pictures: list[Image.Image]):
    large = pictures[0].resize((280, 196))  # 10 x 7 tokens of 28 x 28 pixels
    assert len(encode_images(load(), [large])[0].pooled) > 12
    assert len(encode_images(load(max_image_tokens=12), [large])[0].pooled) <= 12


def test_embed_texts_is_the_normalised_mean_of_input_embeddings(babbler: Policy):
    table = load_backbone("tiny").get_input_embeddings().weight.detach().double().numpy()
    texts = ["The red bar reaches 7.", "", "7"]
    rows = embed_texts(babbler, texts, max_tokens=64)
    for text, row in zip(texts, rows, strict=True):
        ids = babbler.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            assert not row.any()
            continue
        mean = sum(table[i] for i in ids) / len(ids)
        np.testing.assert_allclose(row, mean / math.sqrt(sum(x * x for x in mean)), atol=1e-12)
    assert rows.shape == (3, table.shape[1])
    assert not rows[1].any()
    # Only the first tokens are read, and an adapter changes nothing: the table is the backbone's.
    first_two = babbler.processor.tokenizer.decode(babbler.processor.tokenizer(texts[0])["input_ids"][:2])
    np.testing.assert_array_equal(
        embed_texts(babbler, texts[:1], max_tokens=2), embed_texts(babbler, [first_two], max_tokens=64)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_are_shared_only_where_that_changes_nothing(monkeypatch: pytest.MonkeyPatch, dtype: str):
    """Scores a tenth too large move the hidden states by 4 %, bfloat16's own rounding by 1 %."""
    assert load_anew(dtype=dtype).shares_attention
    to_grid = SharedCache.to_grid
    monkeypatch.setattr(SharedCache, "to_grid", lambda self, rows: to_grid(self, rows) * 1.1)
    assert not load_anew(dtype=dtype).shares_attention


def test_memory_that_runs_out_is_no_sign_of_another_attention(monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loading, "packed_hidden", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_anew()


@pytest.mark.parametrize("backward", [False, True])
def test_recomputing_keeps_nothing_alive(
    make_policy: MakePolicy, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch, backward: bool
):
    """Also where no backward pass comes to free what it would have needed."""
    policy = make_policy(gradient_checkpointing=True)
    cached: list[weakref.ref[Tensor]] = []
    update = DynamicLayer.update

    def watched(self: DynamicLayer, *args: Any, **kwargs: Any) -> Any:
        keys, values = update(self, *args, **kwargs)
        cached.append(weakref.ref(keys))
        return keys, values

    monkeypatch.setattr(DynamicLayer, "update", watched)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.enable_grad():
        prompts = ask(policy, pictures[:1], QUESTIONS[:1])
        hidden = completion_hidden(policy, prompts, ids, torch.ones_like(ids).bool(), "solver")
        if backward:
            hidden.sum().backward()
    del hidden
    gc.collect()
    assert cached
    assert all(keys() is None for keys in cached)


# --- what is trained -------------------------------------------------------------------------------------------------


def test_no_lora_in_the_vision_tower():
    policy = load()
    names = [name for name, _ in policy.model.named_parameters() if "lora" in name]
    assert len(names) == 2 * 4 * 7 * 2  # roles x layers x targets x (A, B)
    assert not [name for name in names if "visual" in name]
    assert all("language_model.layers" in name for name in names)
    for role in ROLES:
        with policy.acting_as(role):
            trainable = {name for name, p in policy.model.named_parameters() if p.requires_grad}
        assert trainable == set(policy.parameters(role))
    assert set(names) == set(policy.parameters("proposer")) | set(policy.parameters("solver"))


@pytest.mark.parametrize("target", ["mm_projector", "qkv", "visual.merger.mlp.0", "q_pro", "proj", ".*"])
def test_no_silent_lora_target(target: str):
    """`mm_projector` is nowhere; `qkv` and the merger are linear layers, but of the vision tower."""
    backbone = load_backbone("tiny")
    with pytest.raises(ModelError) as error:
        language_targets(backbone, ["q_proj", target])
    assert f"{target!r} matches no linear layer of the language model" in str(error.value)
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(error.value)
    with pytest.raises(ModelError):
        load(lora_targets=["q_proj", target])


def test_a_target_may_be_a_single_layer():
    policy = load(lora_targets=["layers.0.self_attn.q_proj"])
    assert all("layers.0.self_attn.q_proj" in name for name in policy.parameters("solver"))
    assert len(policy.parameters("solver")) == 2


def test_unusable_models_say_why(tmp_path: Path):
    with pytest.raises(ModelError, match="cannot load the model"):
        load_backbone(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="is a bert model: a model for images and text"):
        load_backbone(str(tmp_path))


# --- saving ----------------------------------------------------------------------------------------------------------


def test_adapters_come_back_bitwise(make_policy: MakePolicy, tmp_path: Path):
    saved, loaded = make_policy(seed=1), load(seed=2)
    saved.save_adapters(tmp_path)
    loaded.load_adapters(tmp_path)
    for role in ROLES:
        theirs = saved.parameters(role)
        assert all(tensor.any() for tensor in theirs.values())
        assert theirs.keys() == loaded.parameters(role).keys()
        for name, tensor in loaded.parameters(role).items():
            assert torch.equal(tensor, theirs[name])


def test_adapters_of_another_shape_are_refused(tmp_path: Path):
    load(lora_rank=4).save_adapters(tmp_path)
    with pytest.raises(ModelError, match="does not fit"):
        load(lora_rank=8).load_adapters(tmp_path)
    with pytest.raises(ModelError, match="has 56 tensors, the model 16"):
        load(lora_rank=4, lora_targets=["q_proj", "v_proj"]).load_adapters(tmp_path)


def test_a_bfloat16_backbone_keeps_its_adapters_in_float32(
    make_policy: MakePolicy, pictures: list[Image.Image], tmp_path: Path
):
    policy = make_policy(dtype="bfloat16")
    assert {p.dtype for n, p in policy.model.named_parameters() if "lora" not in n} == {torch.bfloat16}
    prompts = ask(policy, pictures[:1], QUESTIONS[:1])
    assert prompts.images[0].pooled.dtype == torch.bfloat16
    group = sample(LiveEngine(policy), asking(policy, pictures[:1], QUESTIONS[:1]), "solver", 2, 8)[0]
    for completion, logprobs in zip(
        group, policy_logprobs(policy, prompts, [[c.token_ids for c in group]], "solver"), strict=True
    ):
        found = chosen(logprobs.float(), completion.token_ids)
        torch.testing.assert_close(found, torch.tensor(completion.logprobs), atol=0.1, rtol=0.0)
    policy.save_adapters(tmp_path)
    loaded = load(dtype="bfloat16")
    loaded.load_adapters(tmp_path)
    for role in ROLES:
        for name, tensor in policy.parameters(role).items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, loaded.parameters(role)[name])
            assert loaded.parameters(role)[name].dtype == torch.float32


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_sampler_logprobs_are_those_of_plain_transformers_and_peft(
    babbler: Policy, sized: list[Image.Image], plain: dict[Role | None, torch.nn.Module], role: Role
):
    groups = sample(LiveEngine(babbler), asking(babbler, sized), role, 3, 12)
    gaps = [
        (chosen(plain_logprobs(plain[role], image, solver_messages("{question}", q), c.token_ids), c.token_ids))
        - torch.tensor(c.logprobs)
        for image, q, group in zip(sized, QUESTIONS, groups, strict=True)
        for c in group
    ]
    assert torch.cat(gaps).abs().max() < 1e-4
    # Not for want of uncertainty: these are samples of a broad distribution.
    assert np.mean([p for group in groups for c in group for p in c.logprobs]) < -0.5


def ids_and_logprobs(groups: Sequence[Sequence[Any]]) -> tuple[list[tuple[int, ...]], Tensor]:
    flat = [completion for group in groups for completion in group]
    return [c.token_ids for c in flat], torch.tensor([p for c in flat for p in c.logprobs])


@pytest.mark.parametrize(("role", "options"), [("solver", {}), ("proposer", {"temperature": 0.0}), (None, {})], ids=str)
def test_a_captured_step_of_decoding_is_right_at_every_step(
    make_policy: MakePolicy, pictures: list[Image.Image], role: Role | None, options: Any
):
    """What a GPU replays may depend on numbers in tensors alone, and on none that Python must ask for.

    Completions of the tiny model end at different lengths, so that rows are dropped and the step is captured anew.
    """
    policy = make_policy()
    engine, captured = LiveEngine(policy), []
    asked = asking(policy, pictures, [QUESTIONS[i % 3] for i in range(len(pictures))], range(len(pictures)))

    def capture(step: Any) -> Any:
        replay = recorded(step)
        captured.append(0)

        def counted() -> None:
            captured[-1] += 1
            replay()

        return counted

    expected_ids, expected_logprobs = ids_and_logprobs(sample(engine, asked, role, 5, 112, **options))
    engine.capture = capture
    ids, logprobs = ids_and_logprobs(sample(engine, asked, role, 5, 112, **options))
    assert ids == expected_ids
    torch.testing.assert_close(logprobs, expected_logprobs, atol=1e-5, rtol=0.0)
    assert len({len(each) for each in ids}) > 1
    assert len(captured) > 1
    assert sum(captured) > 10


def test_a_step_that_cannot_be_captured_is_run_as_it_is(babbler: Policy, pictures: list[Image.Image]):
    engine, asked = LiveEngine(babbler), asking(babbler, pictures[:2], QUESTIONS[:2])
    expected = sample(engine, asked, "solver", 2, 8)
    engine.capture = recorded

    def ask_for_a_number(*args: Any) -> None:
        args[-1].sum().item()

    hook = babbler.decoder.norm.register_forward_hook(ask_for_a_number)
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph and will be slower: .*waits for the host"):
        found = sample(engine, asked, "solver", 2, 8)
    hook.remove()
    assert engine.capture is None
    assert ids_and_logprobs(found)[0] == ids_and_logprobs(expected)[0]


def test_a_cache_that_grows_is_not_captured(make_policy: MakePolicy, pictures: list[Image.Image]):
    policy = make_policy()
    asked = asking(policy, pictures[:2], QUESTIONS[:2])
    expected = sample(LiveEngine(policy), asked, "solver", 3, 12)
    engine, policy.shares_attention = LiveEngine(policy), False

    def capture(_: Any) -> Any:
        raise AssertionError("captured")

    engine.capture = capture
    found = sample(engine, asked, "solver", 3, 12)
    assert ids_and_logprobs(found)[0] == ids_and_logprobs(expected)[0]


@pytest.mark.parametrize("shares", [True, False])
def test_each_completion_of_a_group_may_have_its_own_temperature(
    babbler: Policy, pictures: list[Image.Image], shares: bool, monkeypatch: pytest.MonkeyPatch
):
    """As an evaluation asks for five samples and the greedy reply at once."""
    monkeypatch.setattr(babbler, "shares_attention", shares)
    asked, engine = asking(babbler, pictures[:2], QUESTIONS[:2], [7, 8]), LiveEngine(babbler)
    drawn = sample(engine, asked, "solver", 3, 12, temperature=2.0)
    greedy = sample(engine, asked, "solver", 1, 12, temperature=0.0)
    found = sample(engine, asked, "solver", 4, 12, temperature=[2.0, 2.0, 2.0, 0.0])
    for together, apart in zip(found, [a + b for a, b in zip(drawn, greedy, strict=True)], strict=True):
        assert [c.token_ids for c in together] == [c.token_ids for c in apart]
        for a, b in zip(together, apart, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_first_tokens_are_drawn_as_often_as_the_softmax_says(
    babbler: Policy,
    pictures: list[Image.Image],
    plain: dict[Role | None, torch.nn.Module],
    temperature: float,
    monkeypatch: pytest.MonkeyPatch,
):
    question, draws = QUESTIONS[0], 800
    logprobs = plain_logprobs(plain["solver"], pictures[0], solver_messages("{question}", question), [0])[0]
    expected = (logprobs / temperature).softmax(-1).double()
    assert -(expected * expected.log()).sum() > 1.0  # a distribution worth the name
    assert (expected > 0).all()
    asked = asking(babbler, pictures[:1], [question], [7])

    def counts() -> Tensor:
        group = sample(LiveEngine(babbler), asked, "solver", draws, 1, temperature=temperature)[0]
        ids = [c.token_ids[0] for c in group]
        for completion in group[:20]:
            assert completion.logprobs[0] == pytest.approx(expected[completion.token_ids[0]].log().item(), abs=1e-4)
        return torch.bincount(torch.tensor(ids), minlength=len(expected)).double()

    # Chi-square over the tokens that are expected five times or more, the others as one.
    common = expected * draws >= 5
    found = counts()
    observed = torch.cat([found[common], found[~common].sum()[None]])
    hoped = draws * torch.cat([expected[common], expected[~common].sum()[None]])
    freedom = len(hoped) - 1
    assert ((observed - hoped) ** 2 / hoped).sum() < freedom + 4 * math.sqrt(2 * freedom)
    # At evenly spread numbers chance is out of it: every count is right to one draw, the rare tokens' too.
    monkeypatch.setattr(live, "uniforms", lambda *_: ((np.arange(draws) + 0.5) / draws)[None, :, None])
    assert (counts() - draws * expected).abs().max() <= 1.0 + 0.05


def test_no_sampling_by_the_checkpoints_generation_config(make_policy: MakePolicy, pictures: list[Image.Image]):
    """Checkpoints ship top-k, top-p, temperatures and a repetition penalty: none of them is in the update."""
    policy = make_policy(0.2)
    engine, asked = LiveEngine(policy), asking(policy, pictures[:2], QUESTIONS[:2])
    before = sample(engine, asked, "solver", 2, 12)
    for holder in (policy.model, policy.backbone):
        settings = holder.generation_config
        settings.top_k, settings.top_p, settings.temperature, settings.repetition_penalty = 1, 0.1, 0.2, 5.0
        settings.do_sample, settings.max_new_tokens, settings.min_new_tokens = True, 3, 2
    assert sample(engine, asked, "solver", 2, 12) == before
    assert len({c.token_ids for group in before for c in group}) == 4


def test_what_is_drawn_does_not_depend_on_the_rest_of_the_batch(babbler: Policy, sized: list[Image.Image]):
    """Alone or with others, of different lengths and ends: a trajectory follows from its own seed.

    To rounding: a number that lies within 1e-6 of a boundary between two tokens may fall on either side, and under
    these broad distributions of 500 tokens one in a few hundred does.
    """
    engine = LiveEngine(babbler)
    together = sample(engine, asking(babbler, sized), "solver", 8, 24)
    lengths = [len(c.token_ids) for group in together for c in group]
    assert min(lengths) < 12  # some end early, so that rows were dropped on the way
    assert max(lengths) == 24
    for i, image in enumerate(sized):
        alone = sample(engine, asking(babbler, [image], QUESTIONS[i : i + 1], [i + 1]), "solver", 8, 24)[0]
        assert sum(a.token_ids != b.token_ids for a, b in zip(alone, together[i], strict=True)) <= 1
        for a, b in zip(alone, together[i], strict=True):
            assert a.token_ids[0] == b.token_ids[0]
            if a.token_ids == b.token_ids:
                assert a.text == b.text
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    other = sample(engine, asking(babbler, sized[:1], QUESTIONS[:1], [99]), "solver", 8, 24)[0]
    assert [c.text for c in other] != [c.text for c in together[0]]


def test_seeds_for_vllm_follow_from_the_request_and_the_completions_number():
    seeds = completion_seeds((7, 1), 8)
    assert completion_seeds((7, 1), 3) == seeds[:3]
    assert len({*seeds, *completion_seeds((7, 2), 8)}) == 16
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_completions_hold_the_end_token_and_text_without_it(babbler: Policy, sized: list[Image.Image]):
    (end,) = babbler.end_tokens
    groups = sample(LiveEngine(babbler), asking(babbler, sized), "solver", 8, 24)
    found: list[Completion] = [c for g in groups for c in g]
    assert {c.finish_reason for c in found} == {"stop", "length"}
    for c in found:
        assert len(c.token_ids) == len(c.logprobs) <= 24
        assert (c.token_ids[-1] == end) == (c.finish_reason == "stop")
        assert end not in c.token_ids[:-1]
        assert c.finish_reason == "stop" or len(c.token_ids) == 24
        written = [i for i in c.token_ids if i != end]
        assert c.text == babbler.processor.tokenizer.decode(written, skip_special_tokens=False)


def test_temperature_zero_is_greedy(
    babbler: Policy, pictures: list[Image.Image], plain: dict[Role | None, torch.nn.Module]
):
    groups, others = (
        sample(LiveEngine(babbler), asking(babbler, pictures[:1], QUESTIONS[:1], [seed]), "solver", 2, 8, temperature=0)
        for seed in (1, 2)
    )
    assert groups == others
    completion = groups[0][0]
    assert completion == groups[0][1]
    logprobs = plain_logprobs(
        plain["solver"], pictures[0], solver_messages("{question}", QUESTIONS[0]), completion.token_ids
    )
    assert logprobs.argmax(-1).tolist() == list(completion.token_ids)
    assert list(completion.logprobs) == pytest.approx(logprobs.amax(-1).tolist(), abs=1e-4)


def test_without_an_end_token_every_completion_is_cut_off(
    babbler: Policy, sized: list[Image.Image], monkeypatch: pytest.MonkeyPatch
):
    engine, asked = LiveEngine(babbler), asking(babbler, sized)
    assert min(len(c.token_ids) for g in sample(engine, asked, "solver", 8, 12) for c in g) < 12
    monkeypatch.setattr(babbler, "end_tokens", ())
    endless = [c for g in sample(engine, asked, "solver", 8, 12) for c in g]
    assert {(len(c.token_ids), c.finish_reason) for c in endless} == {(12, "length")}


def test_each_prompt_and_place_has_its_own_numbers():
    one, both = uniforms([[1, 2]], 3, 4), uniforms([[1, 2], [1, 3]], 3, 4)
    assert one.shape == (1, 3, 4)
    assert ((both >= 0) & (both < 1)).all()
    assert (one[0] == both[0]).all()
    assert len(np.unique(both)) == both.size


def test_the_reference_samples_as_the_backbone(babbler: Policy, pictures: list[Image.Image]):
    asked = requests(babbler, pictures[:1], [proposer_messages("Ask.")], [5])
    expected = sample(LiveEngine(load()), asked, "proposer", 2, 8)  # fresh adapters change nothing
    found, adapted = (sample(LiveEngine(babbler), asked, role, 2, 8) for role in (None, "solver"))
    assert [c.token_ids for c in found[0]] == [c.token_ids for c in expected[0]]
    assert [c.token_ids for c in adapted[0]] != [c.token_ids for c in expected[0]]
