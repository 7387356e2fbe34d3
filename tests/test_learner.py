"""The update against a naive one through plain transformers and PEFT, and what an update must never do."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ireasoner.method.texts import solver_messages
from ireasoner.method.types import ROLES, Completion, Role
from ireasoner.model.forward import completion_hidden
from ireasoner.model.inputs import Prompts, build_prompts, encode_images
from ireasoner.model.learner import Learner
from ireasoner.model.loss import adapt_kl_coef
from ireasoner.model.policy import Policy
from ireasoner.rollouts.live import LiveEngine
from models import learner as make_learner
from models import requests, sample, teach
from plain import chosen, load_apart, plain_logprobs

MakePolicy = Callable[..., Policy]
Groups = list[list[Completion]]
QUESTIONS = ("Which bar is the tallest?", "Is red more than blue, or is there no telling?")
REWARDS = ((1.0, 0.25, 0.5), (0.0, 0.75, 0.125))


@dataclass
class Scene:
    """Two images of different size, a question and three sampled trajectories of different length for each."""

    policy: Policy
    images: list[Image.Image]
    prompts: Prompts
    groups: Groups

    def learner(self, role: Role = "solver", **options: Any) -> Learner:
        return make_learner(self.policy, role, **{"learning_rate": 1e-3, "advantage": "rloo", **options})


@pytest.fixture
def scene(make_policy: MakePolicy, pictures: list[Image.Image]) -> Scene:
    return make_scene(make_policy(0.2), pictures)


def make_scene(policy: Policy, pictures: list[Image.Image], role: Role = "solver") -> Scene:
    images = [pictures[0], pictures[1].resize((112, 56))]
    asked = requests(policy, images, [chat(q) for q in QUESTIONS], [1, 2])
    prompts = build_prompts(policy, [r.image for r in asked], [r.messages for r in asked])
    groups = []
    for i, group in enumerate(sample(LiveEngine(policy), asked, role, 24, 10)):
        whole, short, other = [c for c in group if len(c.token_ids) == 10][:3]
        ids = (*short.token_ids[: 5 + i], policy.end_tokens[0])
        logprob = logprobs_of(policy, prompts[i : i + 1], ids, role)[-1].item()
        text = policy.processor.tokenizer.decode(ids[:-1])
        ended = Completion(text, ids, (*short.logprobs[: 5 + i], logprob), "stop")
        groups.append([whole, ended, cut(other, 2 + i)])
    return Scene(policy, images, prompts, groups)


def cut(completion: Completion, length: int) -> Completion:
    ids, logprobs = completion.token_ids[:length], completion.logprobs[:length]
    return replace(completion, token_ids=ids, logprobs=logprobs, finish_reason="length")


@torch.no_grad()
def logprobs_of(policy: Policy, prompt: Prompts, ids: Sequence[int], role: Role = "solver") -> Tensor:
    row = torch.tensor([list(ids)])
    hidden = completion_hidden(policy, prompt, row, torch.ones_like(row, dtype=torch.bool), role)
    return chosen(policy.output_layer(hidden).float().log_softmax(-1), ids)


def chat(question: str) -> list[dict[str, Any]]:
    return solver_messages("{question}", question)


def weights(policy: Policy) -> dict[str, Tensor]:
    """Every tensor of the model, adapters, backbone and buffers, copied."""
    state = {**dict(policy.model.named_parameters()), **dict(policy.model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def descend(
    learner: Learner, prompts: Prompts, groups: Sequence[Sequence[Completion]], rewards: Sequence[Sequence[float]]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradient of an update and its metrics: plain descent at rate 1 in place of AdamW moves by the gradient."""
    learner.optimizer = torch.optim.SGD(learner.parameters.values(), lr=1.0)  # type: ignore[assignment]
    learner.options = learner.options.model_copy(update={"max_grad_norm": math.inf})
    before = {name: p.detach().clone() for name, p in learner.parameters.items()}
    metrics = teach(learner, prompts, groups, rewards)
    return {name: before[name] - p.detach() for name, p in learner.parameters.items()}, metrics


def assert_same_gradient(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    assert largest > 1e-3
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4 * largest, rtol=0.0)


def naive_update(
    scene: Scene, role: Role, advantages: Sequence[Sequence[float]], kl_coef: float, folder: Path, share: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradient, loss, KL and entropy of an update (arXiv 2601.05877): the whole model for one trajectory at a time."""
    models = load_apart(scene.policy, folder, trainable=True)
    loss, kl_mean, entropy_mean, count = torch.zeros(()), 0.0, 0.0, 0
    for image, question, group, row in zip(scene.images, QUESTIONS, scene.groups, advantages, strict=True):
        for completion, advantage in zip(group, row, strict=True):
            ids = completion.token_ids
            logprobs = plain_logprobs(models[role], image, chat(question), ids)
            with torch.no_grad():
                reference = plain_logprobs(models[None], image, chat(question), ids)
            kl = (logprobs.exp() * (logprobs - reference)).sum(-1).mean()
            entropies = -(logprobs.exp() * logprobs).sum(-1).detach()
            taught = entropies.topk(math.ceil(share * len(ids))).indices
            loss = loss + advantage * -chosen(logprobs, ids)[taught].mean() + kl_coef * kl
            kl_mean += kl.item()
            entropy_mean += entropies.mean().item()
            count += 1
    (loss / count).backward()
    gradient = {
        name.replace(".default.", f".{role}."): p.grad
        for name, p in models[role].named_parameters()
        if p.grad is not None
    }
    return gradient, {
        "loss": loss.item() / count,
        "kl": kl_mean / count,
        "token_entropy": entropy_mean / count,
    }


# --- the whole update ------------------------------------------------------------------------------------------------


# RLOO: (1 − 0.375, 0.25 − 0.75, 0.5 − 0.625) and (0 − 0.4375, 0.75 − 0.0625, 0.125 − 0.375).
# GRPO: differences from the group's mean, 7/12 and 7/24, by deviations with N − 1 of 0.381881 and 0.401819.
# Moving average, started at the mean 2.625 / 6 = 0.4375: r − 0.4375. A proposer's groups hold one completion each:
# rewards 0.25 and 0.75, mean 0.5.
UPDATES = {
    "solver rloo": ("solver", "rloo", REWARDS, ((0.625, -0.5, -0.125), (-0.4375, 0.6875, -0.25))),
    "solver grpo": ("solver", "grpo", REWARDS, ((1.091087, -0.872869, -0.218217), (-0.725864, 1.140644, -0.414780))),
    "solver ema": ("solver", "ema", REWARDS, ((0.5625, -0.1875, 0.0625), (-0.4375, 0.3125, -0.3125))),
    "proposer ema": ("proposer", "ema", ((0.25,), (0.75,)), ((-0.25,), (0.25,))),
}


@pytest.mark.parametrize("case", UPDATES)
def test_update_equals_a_naive_one(make_policy: MakePolicy, pictures: list[Image.Image], tmp_path: Path, case: str):
    """Loss, KL and every gradient: images, padding, ragged lengths, end tokens, caches and chunks all included."""
    role, advantage, rewards, advantages = UPDATES[case]
    scene = make_scene(make_policy(0.2), pictures, role)
    if role == "proposer":
        scene.groups = [[scene.groups[0][1]], [scene.groups[1][2]]]
    assert {c.finish_reason for group in scene.groups for c in group} == {"stop", "length"}
    expected, numbers = naive_update(scene, role, advantages, 0.5, tmp_path)
    # All tokens of a question learn, whatever share of a solver's do.
    learner = scene.learner(role, advantage=advantage, kl_coef=0.5, token_share=0.4 if role == "proposer" else 1.0)
    found, metrics = descend(learner, scene.prompts, scene.groups, rewards)
    assert_same_gradient(found, expected)
    for name, value in numbers.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert metrics["sampler_gap"] < 1e-4
    norm = math.sqrt(sum(tensor.pow(2).sum().item() for tensor in expected.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    spread = torch.tensor(advantages).flatten()
    assert metrics["advantage_std"] == pytest.approx(spread.sub(spread.mean()).pow(2).mean().sqrt().item(), rel=1e-5)


def test_only_the_most_uncertain_tokens_learn(make_policy: MakePolicy, pictures: list[Image.Image], tmp_path: Path):
    """Of each trajectory the share of tokens with the largest entropy; the KL is that of all of them."""
    role, advantage, rewards, advantages = UPDATES["solver grpo"]
    scene = make_scene(make_policy(0.2), pictures)
    expected, numbers = naive_update(scene, role, advantages, 0.5, tmp_path, share=0.4)
    learner = scene.learner(role, advantage=advantage, kl_coef=0.5, token_share=0.4)
    found, metrics = descend(learner, scene.prompts, scene.groups, rewards)
    assert_same_gradient(found, expected)
    assert metrics["loss"] == pytest.approx(numbers["loss"], rel=1e-4)
    assert metrics["kl"] == pytest.approx(numbers["kl"], rel=1e-4)


def test_no_update_blind_to_the_image(scene: Scene, pictures: list[Image.Image]):
    """The same question, completions, rewards and weights: another image gives another loss and another gradient."""
    found = []
    start = weights(scene.policy)
    for picture in (pictures[0], pictures[2]):
        scene.policy.model.load_state_dict(start, strict=False)
        prompts = build_prompts(scene.policy, encode_images(scene.policy, [picture]), [chat(QUESTIONS[0])])
        found.append(descend(scene.learner(), prompts, scene.groups[:1], REWARDS[:1]))
    (one, first), (other, second) = found
    assert abs(first["loss"] - second["loss"]) > 1e-4
    assert abs(first["kl"] - second["kl"]) > 1e-4
    for name in one:
        assert not torch.equal(one[name], other[name])
    difference = sum((one[name] - other[name]).pow(2).sum().item() for name in one)
    size = sum(tensor.pow(2).sum().item() for tensor in one.values())
    assert difference > 0.01 * size


@torch.no_grad()
def kl_to_frozen_copy(scene: Scene, role: Role, folder: Path) -> float:
    """KL(policy ‖ reference) from two models loaded from disk, by plain forwards."""
    models = load_apart(scene.policy, folder)
    means = []
    for image, question, group in zip(scene.images, QUESTIONS, scene.groups, strict=True):
        for completion in group:
            p, q = (plain_logprobs(models[who], image, chat(question), completion.token_ids) for who in (role, None))
            means.append((p.exp() * (p - q)).sum(-1).mean().item())
    return sum(means) / len(means)


@pytest.mark.parametrize("role", ROLES)
def test_no_live_policy_as_the_reference(
    make_policy: MakePolicy, pictures: list[Image.Image], tmp_path: Path, role: Role
):
    """The KL is that to a separately loaded frozen copy of the backbone, before and after the policy has moved."""
    scene = make_scene(make_policy(0.05), pictures, role)
    learner = scene.learner(role, learning_rate=3e-3)
    seen = []
    for step in range(2):
        expected = kl_to_frozen_copy(scene, role, tmp_path / str(step))
        seen.append(teach(learner, scene.prompts, scene.groups, REWARDS)["kl"])
        assert seen[-1] == pytest.approx(expected, rel=1e-3)
    assert seen[0] > 1e-4
    assert abs(seen[1] - seen[0]) > 1e-3


# --- whose tensors move ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("role", ROLES)
def test_no_role_left_untrained_and_no_tensor_of_another_moved(
    make_policy: MakePolicy, pictures: list[Image.Image], role: Role, weight_decay: float
):
    """Without weight decay only a gradient moves a tensor; with it, whatever an optimiser holds would move."""
    scene = make_scene(make_policy(0.05), pictures, role)
    learners = {r: scene.learner(r, weight_decay=weight_decay) for r in ROLES}  # both exist, as in a run
    before = weights(scene.policy)
    metrics = teach(learners[role], scene.prompts, scene.groups, REWARDS)
    after = weights(scene.policy)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == set(scene.policy.parameters(role))
    assert len(moved) == 4 * 7 * 2  # layers x targets x (A, B)
    assert metrics["grad_norm"] > 0


def test_roles_take_turns(scene: Scene):
    """Each role's update is the same whether or not the other was updated before."""
    start = weights(scene.policy)
    alone, _ = descend(scene.learner("solver"), scene.prompts, scene.groups, REWARDS)
    scene.policy.model.load_state_dict(start, strict=False)
    teach(scene.learner("proposer"), scene.prompts, scene.groups, REWARDS)
    after, _ = descend(scene.learner("solver"), scene.prompts, scene.groups, REWARDS)
    for name, tensor in alone.items():
        assert torch.equal(tensor, after[name])


def test_small_steps_do_not_vanish_beside_a_bfloat16_backbone(make_policy: MakePolicy, pictures: list[Image.Image]):
    """Steps of 1e-6 are below bfloat16's resolution: adapters and optimiser state are float32."""
    scene = make_scene(make_policy(dtype="bfloat16"), pictures)
    learner = scene.learner(learning_rate=1e-6, weight_decay=0.0)
    before = weights(scene.policy)
    teach(learner, scene.prompts, scene.groups, REWARDS)
    for name, tensor in learner.parameters.items():
        change = (tensor - before[name]).abs()
        assert (change > 0).double().mean() > 0.5
        assert change.max() < 2e-6
        assert all(value.dtype == torch.float32 for value in learner.optimizer.state[tensor].values())


# --- one step for each update ----------------------------------------------------------------------------------------


def test_no_second_optimiser_step_whatever_the_micro_batches(scene: Scene):
    """One step of AdamW for a role and update; how the batch is cut shows in rounding only."""
    start, found = weights(scene.policy), {}
    prompt_length = scene.prompts.mask_BP.shape[1]
    longest = max(len(c.token_ids) for group in scene.groups for c in group)
    # One trajectory at a time; two of the longest, or all of the group whose are short; a group; everything.
    limits = {1: 6, prompt_length + 2 * longest: 3, prompt_length + 3 * longest: 2, 10**6: 1}
    # As if checkpointing saved nothing: a group that would fit with it is not cut (tests/test_memory.py).
    scene.policy.footprint = replace(scene.policy.footprint, inputs=10**9)
    for limit, batches in limits.items():
        scene.policy.model.load_state_dict(start, strict=False)
        sizes = []
        hook = scene.policy.backbone.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs, sizes=sizes: sizes.append(kwargs["position_ids"].shape[-2:].numel()),
            with_kwargs=True,
        )
        gradient, metrics = descend(scene.learner(tokens_per_batch=limit), scene.prompts, scene.groups, REWARDS)
        hook.remove()
        assert max(sizes) <= max(limit, prompt_length)
        scene.policy.model.load_state_dict(start, strict=False)
        learner = scene.learner(tokens_per_batch=limit)
        teach(learner, scene.prompts, scene.groups, REWARDS)
        assert {int(state["step"]) for state in learner.optimizer.state.values()} == {1}
        assert len(sizes) == 4 * batches  # prompts and completions, policy and reference
        found[limit] = gradient, metrics
    gradient, metrics = found[10**6]
    for other_gradient, other_metrics in found.values():
        assert_same_gradient(other_gradient, gradient)
        for name, value in metrics.items():
            assert other_metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("limit", [1, 10**6])
def test_no_baseline_that_moves_within_a_step_or_starts_at_zero(scene: Scene, limit: int):
    """Read once, moved once by the whole batch's mean, started at the first one's: identical rewards teach nothing."""
    learner = scene.learner(advantage="ema", kl_coef=1e-8, kl_target=1e3, tokens_per_batch=limit)
    for _ in range(2):
        gradient, metrics = descend(learner, scene.prompts, scene.groups, [[0.7] * 3] * 2)
        assert metrics["advantage_std"] < 1e-6
        assert abs(metrics["loss"]) < 1e-5
        assert metrics["grad_norm"] < 1e-4
        assert all(tensor.abs().max() < 1e-4 for tensor in gradient.values())
        assert learner.baseline.value == pytest.approx(0.7)
    # 0.9 · 0.7 + 0.1 · 0.4375 = 0.67375; the advantages' spread is the rewards' own.
    _, metrics = descend(learner, scene.prompts, scene.groups, REWARDS)
    assert learner.baseline.value == pytest.approx(0.67375)
    spread = torch.tensor(REWARDS).flatten().std(correction=0).item()
    assert metrics["advantage_std"] == pytest.approx(spread, rel=1e-5)


def test_group_relative_advantages_need_no_history(scene: Scene):
    learner = scene.learner(advantage="rloo", kl_coef=1e-8)
    _, metrics = descend(learner, scene.prompts, scene.groups, [[0.9] * 3, [0.1] * 3])
    assert metrics["grad_norm"] < 1e-4  # groups of different level, none with a difference of its own
    assert learner.baseline.value is None


# --- the sampled distribution is the trained one ---------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_update_sees_the_logprobs_that_were_sampled(make_policy: MakePolicy, pictures: list[Image.Image], role: Role):
    scene = make_scene(make_policy(0.2), pictures, role)
    learner = scene.learner(role)
    assert teach(learner, scene.prompts, scene.groups, REWARDS)["sampler_gap"] < 1e-4
    # The same samples are off-policy now, and so are those whose log-probabilities were taken elsewhere.
    assert teach(learner, scene.prompts, scene.groups, REWARDS)["sampler_gap"] > 1e-3
    asked = requests(scene.policy, scene.images, [chat(q) for q in QUESTIONS], [5, 6])
    fresh = sample(LiveEngine(scene.policy), asked, role, 3, 6)
    first = fresh[0][0]
    fresh[0][0] = replace(first, logprobs=(first.logprobs[0] - 0.25, *first.logprobs[1:]))
    assert teach(learner, scene.prompts, fresh, REWARDS)["sampler_gap"] == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize("row", [0, 1])
def test_a_gap_that_is_no_number_is_shown(scene: Scene, row: int):
    """Whichever micro-batch it is in."""
    first = scene.groups[row][0]
    scene.groups[row][0] = replace(first, logprobs=(math.nan, *first.logprobs[1:]))
    metrics = teach(scene.learner(tokens_per_batch=1), scene.prompts, scene.groups, REWARDS)
    assert math.isnan(metrics["sampler_gap"])


def told(completion: Completion, less: float) -> Completion:
    """The completion of a sampler that found each of its tokens less likely, by so many nats."""
    return replace(completion, logprobs=tuple(logprob - less for logprob in completion.logprobs))


def test_tokens_that_the_sampler_found_less_likely_count_more(scene: Scene):
    """A trajectory all of whose tokens have a weight teaches as if its advantage were so many times as large."""
    first, *others = scene.groups[0]
    start, share = weights(scene.policy), len(first.token_ids) / sum(len(c.token_ids) for g in scene.groups for c in g)

    def update(completion: Completion, factor: float, cap: float) -> tuple[dict[str, Tensor], dict[str, float]]:
        scene.policy.model.load_state_dict(start, strict=False)
        learner = scene.learner(kl_coef=0.5, importance_cap=cap, tokens_per_batch=1)  # so that there are micro-batches
        advantages = learner.advantages(REWARDS)
        advantages[0, 0] *= factor
        learner.advantages = lambda rewards: advantages  # type: ignore[method-assign]
        return descend(learner, scene.prompts, [[completion, *others], scene.groups[1]], REWARDS)

    for less, weight in ((math.log(1.5), 1.5), (5.0, 2.0)):
        gradient, metrics = update(told(first, less), 1.0, 2.0)
        expected, plain = update(first, weight, 0.0)
        assert_same_gradient(gradient, expected)
        for name in ("loss", "kl", "token_entropy"):
            assert metrics[name] == pytest.approx(plain[name], rel=1e-4), name
        assert metrics["mean_sampler_gap"] == pytest.approx(abs(less) * share, abs=1e-4)
        assert metrics["importance_weight"] == pytest.approx(1 + share * (weight - 1), abs=1e-4)
        assert metrics["importance_capped"] == pytest.approx(share if less == 5.0 else 0.0)
        assert metrics["effective_tokens"] < 1 - 1e-3
        assert "importance_weight" not in plain


def test_without_log_probabilities_of_the_sampler_nothing_is_weighted(scene: Scene):
    """Bit for bit, as with weights that are 1."""
    start, found, broken = weights(scene.policy), [], (math.nan, math.inf, -math.inf)
    unknown = [
        [replace(c, logprobs=(value,) * len(c.token_ids)) for c, value in zip(group, broken, strict=True)]
        for group in scene.groups
    ]
    for groups, cap in ((scene.groups, None), (unknown, 2.0)):
        scene.policy.model.load_state_dict(start, strict=False)
        metrics = teach(scene.learner(importance_cap=cap), scene.prompts, groups, REWARDS)
        found.append((weights(scene.policy), metrics))
    (plain, metrics), (weighted, others) = found
    assert_same_bits(plain, weighted)
    assert (metrics["loss"], metrics["grad_norm"]) == (others["loss"], others["grad_norm"])
    assert (others["importance_weight"], others["importance_capped"], others["effective_tokens"]) == (1.0, 0.0, 1.0)
    assert math.isnan(others["mean_sampler_gap"])


def test_no_dropout_in_the_update(scene: Scene):
    start, found = weights(scene.policy), []
    for seed in (1, 2):
        scene.policy.model.load_state_dict(start, strict=False)
        torch.manual_seed(seed)
        found.append(descend(scene.learner(), scene.prompts, scene.groups, REWARDS))
        assert not any(module.training for module in scene.policy.model.modules())
    (one, first), (other, second) = found
    assert first == second
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_retokenised_text_is_trained(scene: Scene, tmp_path: Path):
    """Sampled ids are seldom those that the tokenizer would give the same text: letter by letter here."""
    tokenizer = scene.policy.processor.tokenizer
    text = "The red bar"
    ids = [i for letter in text for i in tokenizer(letter)["input_ids"]]
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text) > len(tokenizer(text)["input_ids"])
    ids.append(scene.policy.end_tokens[0])
    with torch.no_grad():
        model = load_apart(scene.policy, tmp_path)["solver"]
        logprobs = plain_logprobs(model, scene.images[0], chat(QUESTIONS[0]), ids)
    spelled = Completion(text, tuple(ids), tuple(chosen(logprobs, ids).tolist()), "stop")
    metrics = teach(scene.learner(), scene.prompts[:1], [[spelled, scene.groups[0][0]]], [[1.0, 0.0]])
    assert metrics["sampler_gap"] < 1e-4
    after = logprobs_of(scene.policy, scene.prompts[:1], ids)
    assert (after - chosen(logprobs, ids)).mean() > 0.1  # toward the ids that were sampled


def test_no_end_token_left_untrained(scene: Scene):
    """A completion that is nothing but the end token is trained like any other: rewarded, it grows more likely."""
    end = scene.policy.end_tokens[0]
    stop, go_on = Completion("", (end,), (0.0,), "stop"), Completion("x", (5,), (0.0,), "length")

    def logprob() -> float:
        return logprobs_of(scene.policy, scene.prompts[:1], [end]).item()

    before = logprob()
    teach(scene.learner(), scene.prompts[:1], [[stop, go_on]], [[1.0, 0.0]])
    raised = logprob()
    assert raised > before + 0.1
    teach(scene.learner(), scene.prompts[:1], [[stop, go_on]], [[0.0, 1.0]])
    assert logprob() < raised - 0.1


def test_the_end_token_weighs_as_much_as_any_other(scene: Scene):
    """With the same first tokens, the gradient of a trajectory that ended is not that of the one that was cut off."""
    ended = scene.groups[0][1]
    unended = cut(ended, len(ended.token_ids) - 1)
    start, found = weights(scene.policy), []
    for completion in (ended, unended):
        scene.policy.model.load_state_dict(start, strict=False)
        found.append(descend(scene.learner(), scene.prompts[:1], [[completion, scene.groups[0][0]]], [[1.0, 0.0]])[0])
    size = sum(tensor.pow(2).sum().item() for tensor in found[0].values())
    assert sum((found[0][n] - found[1][n]).pow(2).sum().item() for n in found[0]) > 0.01 * size


# --- memory and repeated work ----------------------------------------------------------------------------------------


def test_no_logits_of_prompt_positions_or_padding(scene: Scene, monkeypatch: pytest.MonkeyPatch):
    rows: list[int] = []
    output_layer = scene.policy.output_layer

    def counted(hidden: Tensor) -> Tensor:
        rows.append(hidden[..., 0].numel())
        return output_layer(hidden)

    monkeypatch.setattr(scene.policy, "output_layer", counted)
    teach(scene.learner(), scene.prompts, scene.groups, REWARDS)
    tokens = sum(len(c.token_ids) for group in scene.groups for c in group)
    assert max(rows) == tokens
    assert sum(rows) <= 4 * tokens + 1  # policy and reference, each again in the backward pass; one to ask the width


# --- the rest of a step ----------------------------------------------------------------------------------------------


def test_kl_coef_moves_after_the_update(scene: Scene):
    learner = scene.learner(kl_coef=0.01, kl_target=0.5)
    metrics = teach(learner, scene.prompts, scene.groups, REWARDS)
    assert metrics["kl_coef"] == 0.01
    assert learner.kl_coef == adapt_kl_coef(0.01, metrics["kl"], 0.5) != 0.01
    moved = learner.kl_coef
    assert teach(learner, scene.prompts, scene.groups, REWARDS)["kl_coef"] == moved


def test_kl_coef_stays_where_its_rate_is_0(scene: Scene):
    learner = scene.learner(kl_coef=0.01, kl_target=0.5, kl_rate=0.0)
    teach(learner, scene.prompts, scene.groups, REWARDS)
    assert learner.kl_coef == 0.01


def test_gradients_are_clipped_to_their_norm(scene: Scene):
    learner = scene.learner(max_grad_norm=0.01)
    learner.optimizer = torch.optim.SGD(learner.parameters.values(), lr=1.0)  # type: ignore[assignment]
    before = weights(scene.policy)
    metrics = teach(learner, scene.prompts, scene.groups, REWARDS)
    change = math.sqrt(sum((p - before[n]).pow(2).sum().item() for n, p in learner.parameters.items()))
    assert metrics["grad_norm"] > 0.01
    assert change == pytest.approx(0.01, rel=1e-2)


def test_a_step_without_a_finite_gradient_changes_no_weight(scene: Scene):
    learner, before = scene.learner(), weights(scene.policy)
    metrics = teach(learner, scene.prompts, scene.groups, [[math.inf, 0.0, 0.0], [0.0] * 3])
    assert not math.isfinite(metrics["grad_norm"])
    after = weights(scene.policy)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert teach(learner, scene.prompts, scene.groups, REWARDS)["grad_norm"] > 0


def test_a_step_that_teaches_nothing_changes_no_weight(make_policy: MakePolicy, pictures: list[Image.Image]):
    """The gradient of a KL of 0 is rounding, and AdamW would make a step of ordinary size out of it."""
    scene = make_scene(make_policy(0.0), pictures)
    before = weights(scene.policy)
    metrics = teach(scene.learner(), scene.prompts, scene.groups, [[0.5] * 3] * 2)
    assert metrics["kl"] == 0
    assert metrics["grad_norm"] > 0
    assert_same_bits(weights(scene.policy), before)


def test_what_earns_more_grows_more_likely(scene: Scene):
    def means() -> list[float]:
        return [
            logprobs_of(scene.policy, scene.prompts[i : i + 1], c.token_ids).mean().item()
            for i, group in enumerate(scene.groups)
            for c in group
        ]

    before = means()
    rewards = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    learner = scene.learner(kl_coef=1e-8, kl_target=1e3)
    for _ in range(3):
        teach(learner, scene.prompts, scene.groups, rewards)
    gains = [after - b for b, after in zip(before, means(), strict=True)]
    assert gains[0] > max(gains[1:3])
    assert gains[4] > max(gains[3], gains[5])


# --- saving and resuming ---------------------------------------------------------------------------------------------


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def saved(learner: Learner, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The learner's state, written to files and read back as a checkpoint does it."""
    tensors, numbers = learner.state()
    save_file(tensors, folder / "optimizer.safetensors")
    return load_file(folder / "optimizer.safetensors"), json.loads(json.dumps(numbers))


@pytest.mark.parametrize("acting", [*ROLES, None])
def test_training_goes_on_bitwise_as_if_never_interrupted(scene: Scene, tmp_path: Path, acting: Role | None):
    """Whichever adapter is switched on while the state is saved: PEFT freezes the parameters of the other."""
    learner = scene.learner(advantage="ema")
    for _ in range(2):
        teach(learner, scene.prompts, scene.groups, REWARDS)
    with scene.policy.acting_as(acting):
        tensors, numbers = saved(learner, tmp_path)
    middle = weights(scene.policy)
    for _ in range(2):
        last = teach(learner, scene.prompts, scene.groups, REWARDS)
    end = weights(scene.policy)

    scene.policy.model.load_state_dict(middle, strict=False)
    resumed = scene.learner(advantage="ema")
    teach(resumed, scene.prompts[:1], scene.groups[:1], [[0.0, 0.0, 1.0]])  # something else, to be forgotten
    scene.policy.model.load_state_dict(middle, strict=False)
    resumed.restore(tensors, numbers)
    assert_same_bits(resumed.state()[0], tensors)
    assert resumed.state()[1] == numbers
    for _ in range(2):
        found = teach(resumed, scene.prompts, scene.groups, REWARDS)
    assert found == last
    assert_same_bits(weights(scene.policy), end)
    assert_same_bits(resumed.state()[0], learner.state()[0])
    names = {name.partition("/")[2] for name in tensors}
    assert names == set(scene.policy.parameters("solver"))  # nothing of an adapter that is not trained
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_what_was_copied_out_does_not_change_with_the_optimizer(scene: Scene):
    learner = scene.learner()
    teach(learner, scene.prompts, scene.groups, REWARDS)
    tensors, numbers = learner.state()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    learner.restore(tensors, numbers)
    teach(learner, scene.prompts, scene.groups, REWARDS)
    assert_same_bits(tensors, before)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in learner.state()[0].items())


def test_an_optimizer_that_has_not_stepped(scene: Scene, tmp_path: Path):
    learner, other = scene.learner(), scene.learner()
    tensors, numbers = saved(learner, tmp_path)
    assert tensors == {}
    assert numbers == {"kl_coef": 1e-3, "baseline": None}
    teach(other, scene.prompts, scene.groups, REWARDS)
    other.restore(tensors, numbers)
    assert not other.optimizer.state
    assert not learner.optimizer.state


Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.solver.weight"


def rename(tensors: dict[str, Tensor]) -> None:
    tensors["exp_avg/other.weight"] = tensors.pop(f"exp_avg/{Q}")


def leave_out(tensors: dict[str, Tensor]) -> None:
    for key in ("exp_avg", "exp_avg_sq", "step"):
        del tensors[f"{key}/{Q}"]


def other_role(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace(".solver.", ".proposer.")] = tensors.pop(name)


def foreign_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["exp_avg/c.weight"] = torch.zeros(5, 5)


def other_shape(tensors: dict[str, Tensor]) -> None:
    tensors[f"exp_avg/{Q}"] = tensors[f"exp_avg/{Q}"][:, :1]  # would be broadcast


def other_dtype(tensors: dict[str, Tensor]) -> None:
    tensors[f"exp_avg_sq/{Q}"] = tensors[f"exp_avg_sq/{Q}"].double()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename, f"exp_avg/{Q}, exp_avg/other.weight"),
        (leave_out, f"exp_avg/{Q}, exp_avg_sq/{Q}, step/{Q}"),
        (other_role, None),
        (foreign_tensor, "exp_avg/c.weight"),
        (other_shape, f"exp_avg/{Q}"),
        (other_dtype, f"exp_avg_sq/{Q}"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(
    scene: Scene, change: Callable[[dict[str, Tensor]], None], said: str | None
):
    learner = scene.learner()
    teach(learner, scene.prompts, scene.groups, REWARDS)
    (tensors, numbers), kept = learner.state(), learner.state()
    assert f"exp_avg/{Q}" in tensors
    change(tensors)
    end = f"{re.escape(said)}$" if said else ""  # of another role's state, every tensor is named
    with pytest.raises(ValueError, match=f"the solver's optimizer and the state for it differ in {end}"):
        learner.restore(tensors, {**numbers, "kl_coef": 7.0})
    assert_same_bits(learner.state()[0], kept[0])
    assert learner.state()[1] == kept[1]
