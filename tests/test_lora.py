"""LoRA in half precision: summed in float32 and rounded once, so that small updates come through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners import lora
from PIL import Image
from torch import Tensor

from families import FAMILIES
from ireasoner.method.types import Completion
from ireasoner.model.inputs import Prompts, build_prompts
from ireasoner.model.lora import Float32SumLinear, linear_in_float32
from ireasoner.model.policy import Policy
from ireasoner.rollouts.live import LiveEngine
from ireasoner.studies import doctor
from ireasoner.studies.precision import changes, in_float32, measure_precision
from models import load, requests, sample
from plain import chosen, load_apart, plain_logprobs

DEFAULT_RATE = 2e-5  # of the preset 7b


def plainly(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The layer by its formula."""
    result = x @ weight.T + scaling * (x @ a.T) @ b.T
    return result if bias is None else result + bias


@pytest.mark.parametrize("biased", [True, False])
def test_layer_and_gradients_are_those_of_the_formula(biased: bool):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 8), "weight": (5, 8), "bias": (5,), "a": (4, 8), "b": (5, 4)}
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    drawn = tensors.pop("bias")
    bias = drawn if biased else None
    target = torch.randn(2, 3, 5, generator=generator)
    found = {name: tensor.clone().requires_grad_(name != "weight") for name, tensor in tensors.items()}
    exact = {name: tensor.double().requires_grad_(name != "weight") for name, tensor in tensors.items()}
    result = linear_in_float32(found["x"], found["weight"], bias, found["a"], found["b"], 2.0)
    expected = plainly(**exact, bias=None if bias is None else bias.double(), scaling=2.0)
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0)
    (result * target).sum().backward()
    (expected * target.double()).sum().backward()
    for name in ("x", "a", "b"):
        gradient = exact[name].grad
        assert gradient is not None
        torch.testing.assert_close(found[name].grad, gradient.float(), atol=1e-5, rtol=0)
    assert found["weight"].grad is None


def test_the_sum_is_rounded_once(make_policy: Callable[..., Policy]):
    """A part of the adapter far below bfloat16's resolution moves the rounded sum on average by what it is."""
    policy = make_policy(dtype="bfloat16")
    layer = next(module for module in policy.model.modules() if isinstance(module, Float32SumLinear))
    weight = layer.get_base_layer().weight
    x = torch.randn(4096, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    a, b = layer.lora_A["solver"].weight, layer.lora_B["solver"].weight
    with torch.no_grad(), policy.acting_as("solver"):
        b.copy_(torch.randn(b.shape, generator=torch.Generator().manual_seed(1)) * 1e-5)
        part = (x.float() @ a.T) @ b.T * layer.scaling["solver"]
        moved = layer(x).float() - linear_in_float32(x, weight, layer.get_base_layer().bias).bfloat16().float()
        by_peft = lora.Linear.forward(layer, x).float() - layer.get_base_layer()(x).float()
    assert part.abs().mean() < 0.1 * moved[moved != 0].abs().mean()  # far below the distance of neighbours
    assert 0.9 < (moved * part).sum() / part.square().sum() < 1.1
    assert (by_peft * part).sum() / part.square().sum() < 0.5


def test_new_adapters_change_nothing_at_all(pictures: list[Image.Image]):
    policy = load(dtype="bfloat16")
    prompts, groups = played(policy, pictures)
    moved, kl = changes(policy, prompts, groups)
    assert not moved.any()
    assert kl == 0


def played(policy: Policy, pictures: list[Image.Image], n: int = 6) -> tuple[Prompts, list[list[Completion]]]:
    asked = requests(policy, pictures[:2], doctor.CHATS)
    groups = sample(LiveEngine(policy), asked, "solver", n, 40)
    return build_prompts(policy, [request.image for request in asked], doctor.CHATS), groups


@pytest.mark.parametrize("family", ["tiny", *FAMILIES])
def test_updates_of_the_default_size_come_through_in_bfloat16(
    family: str, tmp_path: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
):
    policy = load(family if family == "tiny" else FAMILIES[family](tmp_path), dtype="bfloat16")
    before = {name: tensor.clone() for name, tensor in policy.parameters("solver").items()}
    prompts, groups = played(policy, pictures)
    found = measure_precision(policy, prompts, groups, DEFAULT_RATE)
    assert found.slope + 2 * found.error > 0.9
    assert abs(found.kl_floor) < 0.002
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.parameters("solver").items())
    if family in ("tiny", "qwen2_5_vl"):
        monkeypatch.setattr(Float32SumLinear, "forward", lora.Linear.forward)  # rounds the sum, as PEFT does
        by_peft = measure_precision(policy, prompts, groups, DEFAULT_RATE)
        assert by_peft.slope + 2 * by_peft.error < 0.9


def test_what_is_compared_with_is_the_model_in_float32(pictures: list[Image.Image]):
    """`in_float32` gives what a model in float32 with these weights gives, and leaves the weights as they were."""
    policy, wide = load(dtype="bfloat16"), load()
    weights = {name: tensor.clone() for name, tensor in policy.backbone.state_dict().items() if "lora" not in name}
    doctor.fill_adapters(policy, 0.03)
    wide.backbone.load_state_dict(policy.backbone.state_dict())
    prompts, groups = played(wide, pictures)
    # The image features stay in bfloat16 inside: both take those.
    narrow, _ = played(policy, pictures)
    for ours, theirs in zip(narrow.images, prompts.images, strict=True):
        theirs.features.update({n: [t.float() for t in value] for n, value in ours.features.items()})
    expected, kl = changes(wide, prompts, groups)
    with in_float32(policy):
        found, found_kl = changes(policy, narrow, groups)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert found_kl == pytest.approx(kl, rel=1e-3)
    after = policy.backbone.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())


def test_weights_are_put_back_where_a_forward_pass_fails(pictures: list[Image.Image]):
    policy = load(dtype="bfloat16")
    prompts, groups = played(policy, pictures)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = policy.decoder.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"), in_float32(policy):
        changes(policy, prompts, groups)
    hook.remove()
    assert {p.dtype for n, p in policy.model.named_parameters() if "lora" not in n} == {torch.bfloat16}
    assert "output_layer" not in vars(policy)


def test_saved_adapters_are_plain_ones_of_peft(tmp_path: Path, pictures: list[Image.Image]):
    policy = load(dtype="bfloat16")
    doctor.fill_adapters(policy, 0.03)
    apart = load_apart(policy, tmp_path)
    assert not any(isinstance(module, Float32SumLinear) for module in apart["solver"].modules())
    prompts, groups = played(policy, pictures)
    ids = groups[0][0].token_ids
    with torch.no_grad():
        expected, unadapted = (
            chosen(plain_logprobs(apart[role], pictures[0], doctor.CHATS[0], ids), ids) for role in ("solver", None)
        )
    found, _ = changes(policy, prompts[:1], groups[:1])
    assert (found[: len(ids)] - (expected - unadapted)).abs().mean() < 0.1


def test_less_is_kept_for_the_backward_pass_than_peft_keeps(monkeypatch: pytest.MonkeyPatch):
    policy = load(dtype="bfloat16")
    layer = next(module for module in policy.model.modules() if isinstance(module, Float32SumLinear))
    width = layer.get_base_layer().weight.shape[1]

    def kept() -> int:
        seen: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter) and tensor.ndim == 2 and len(tensor) == 100:
                seen[tensor.data_ptr()] = tensor.nbytes
            return tensor

        x = torch.ones(100, width, dtype=torch.bfloat16, requires_grad=True)
        with policy.acting_as("solver"), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            layer(x), layer(x)  # two layers that read the same, as queries and keys do
        return sum(seen.values())

    ours = kept()
    monkeypatch.setattr(Float32SumLinear, "forward", lora.Linear.forward)
    assert ours < 0.5 * kept()
