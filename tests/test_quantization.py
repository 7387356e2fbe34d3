"""A backbone in 4 or 8 bits: the numbers are those of the weights that it stands for, and a run is exact in all else.

What needs no bitsandbytes (plans, refusals) is tested without it. `make test-quantization` runs everything.
"""

from __future__ import annotations

import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from ireasoner.app.cli import main
from ireasoner.method.texts import solver_messages
from ireasoner.method.types import UsageError
from ireasoner.model.backbone import load_backbone
from ireasoner.model.inputs import build_prompts
from ireasoner.model.loading import meta_policy
from ireasoner.model.options import BackboneOptions
from ireasoner.model.policy import Policy
from ireasoner.model.quantization import quantised_bytes
from ireasoner.model.source import TINY_MODEL
from ireasoner.rollouts.live import LiveEngine
from ireasoner.studies import doctor, random_models
from ireasoner.studies.precision import changes
from ireasoner.training import planning
from ireasoner.training.checks import check_packages
from ireasoner.training.config import ConfigError, resolve
from ireasoner.training.loop import resume, start
from ireasoner.training.state import Observer
from models import load, padded, requests, sample, sampler_gap
from plain import chosen, plain_logprobs

HOWS = ("nf4", "int8")
CHAT = solver_messages("{question}", "Which bar is the tallest?")
pytestmark = pytest.mark.usefixtures("copied_models")
quantises = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def quantised(how: Any, **options: Any) -> Policy:
    """A policy whose adapters do something."""
    policy = load(quantization=how, **options)
    doctor.fill_adapters(policy, 0.2, seed=1)
    return policy


def linear_layers(policy: Policy) -> list[Any]:
    """The linear layers of the language model, without those of the adapters."""
    modules = policy.decoder.named_modules()
    return [module for name, module in modules if isinstance(module, torch.nn.Linear) and ".lora_" not in name]


# --- the numbers ------------------------------------------------------------------------------------------------------


@quantises
@pytest.mark.parametrize("how", HOWS)
def test_the_language_model_alone_is_quantised_and_takes_what_is_counted(how: Any):
    policy = load(quantization=how)
    whole = [module.weight for module in policy.backbone.modules() if type(module) is torch.nn.Linear]
    assert whole  # the vision tower, the output layer and the adapters
    assert all(weight.dtype == torch.float32 for weight in whole)
    for layer in linear_layers(policy):
        weight = layer.weight
        parts = [weight, weight.SCB] if how == "int8" else [weight, weight.quant_state.absmax, weight.quant_state.code]
        if how == "nf4":
            inner = weight.quant_state.state2
            parts += [inner.absmax, inner.code, weight.quant_state.offset]
        counted = quantised_bytes(how, layer.out_features, layer.in_features)
        assert sum(part.nbytes for part in parts) == counted
    stated = sum(t.nbytes for t in [*policy.model.parameters(), *policy.model.buffers()])
    scales = sum(quantised_bytes(how, m.out_features, m.in_features) - m.weight.nbytes for m in linear_layers(policy))
    assert policy.footprint.weights == stated + scales
    assert policy.footprint == meta_policy("tiny", BackboneOptions(dtype="float32", quantization=how)).footprint


@quantises
@pytest.mark.parametrize("targets", [(), ("q_proj",)])
@pytest.mark.parametrize("how", HOWS)
def test_log_probabilities_and_gradients_are_those_of_the_weights_at_full_size(
    how: Any, targets: tuple[str, ...], pictures: list[Image.Image], tmp_path: Path
):
    policy = quantised(how, lora_targets=targets)
    policy.save_adapters(tmp_path)
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 by a name that it has deprecated
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        backbone: Any = load_backbone("tiny", quantization=how).dequantize()
        plain = PeftModel.from_pretrained(backbone, tmp_path / "solver", is_trainable=True).eval()
    asked = requests(policy, pictures[:1], [CHAT])
    groups = sample(LiveEngine(policy), asked, "solver", 2, 24)
    assert sampler_gap(policy, asked, groups, "solver") < 1e-4
    seen = doctor.view(policy, build_prompts(policy, [asked[0].image], [CHAT]), groups)
    found = [chosen(plain_logprobs(plain, pictures[0], CHAT, c.token_ids), c.token_ids) for c in groups[0]]
    (found[0].mean() - found[1].mean()).backward()
    torch.testing.assert_close(seen.logprobs_T, torch.cat(found).detach(), atol=1e-4, rtol=0)
    expected = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
    assert (seen.gradient - expected).norm() < 1e-4 * expected.norm()


@quantises
def test_the_backward_pass_keeps_no_weight_at_full_size(pictures: list[Image.Image]):
    policy, saved = quantised("nf4"), []
    ids, _ = padded(policy, [[7] * 16])

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with policy.acting_as("solver"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.decoder(input_ids=ids, use_cache=False)
    assert saved
    assert not {(layer.out_features, layer.in_features) for layer in linear_layers(policy)} & {*map(tuple, saved)}


@quantises
@pytest.mark.parametrize("how", HOWS)
def test_the_reference_is_the_same_quantised_backbone(how: Any, pictures: list[Image.Image]):
    policy = load(quantization=how, dtype="bfloat16")  # whose new adapters add nothing
    asked = requests(policy, pictures[:1], [CHAT])
    groups = sample(LiveEngine(policy), asked, "solver", 2, 24)
    moved, kl = changes(policy, build_prompts(policy, [asked[0].image], [CHAT]), groups)
    assert not moved.any()
    assert kl == 0


# --- runs -------------------------------------------------------------------------------------------------------------


def options(pool: Path) -> dict[str, Any]:
    return {
        "model": "tiny", "images": str(pool), "recipe": "paper", "device": "cpu", "steps": 3, "images_per_step": 1,
        "group_size": 2, "max_solution_tokens": 48, "save_every": 1, "learning_rate": 3e-3, "probe_every": 0,
        "blank_every": 0, "proposer_every": 2, "watch": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def pool(pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    for index, picture in enumerate(pictures):
        picture.save(folder / f"{index}.png")
    return folder


@quantises
def test_a_quantised_run_that_was_stopped_goes_on_exactly_and_is_merged_into_whole_weights(pool: Path, tmp_path: Path):
    config = resolve({**options(pool), "quantization": "nf4"})
    start(config, tmp_path / "run")

    def die(step: int, *_: object) -> None:
        if step == 2:
            raise RuntimeError("as if killed")

    with pytest.raises(RuntimeError, match="as if killed"):
        start(config, tmp_path / "stopped", Observer(on_step=die))
    resume(config, tmp_path / "stopped")
    one, other = (load_file(tmp_path / name / "solver" / "adapter_model.safetensors") for name in ("run", "stopped"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "merged"), "--merge"]) == 0
    merged, base = load_file(tmp_path / "merged" / "model.safetensors"), load_file(TINY_MODEL / "model.safetensors")
    delta = load_file(tmp_path / "run" / "solver" / "adapter_model.safetensors")
    name = next(name for name in base if name.endswith("layers.0.mlp.up_proj.weight"))
    a, b = (
        next(t for n, t in delta.items() if n.endswith(f"layers.0.mlp.up_proj.lora_{side}.weight")) for side in "AB"
    )
    stored = next(key for key in merged if key.endswith(name.removeprefix("model.language_model.")))
    torch.testing.assert_close(merged[stored].float(), base[name].float() + 2 * b @ a, atol=1e-6, rtol=2**-7)
    card = (tmp_path / "merged" / "README.md").read_text("utf-8")
    assert "nf4" in card


@quantises
def test_the_doctor_says_what_quantisation_does(capsys: pytest.CaptureFixture[str]):
    gaps = []
    for how in HOWS:
        assert main(["doctor", "tiny", "--device", "cpu", "--quantization", how]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert f"tiny in float32, its language model in {how}, on cpu" in out
        found = re.search(rf"in {how} the log-probabilities of \d+ sampled tokens differ by (\S+) nats", out)
        assert found
        gaps.append(float(found[1]))
    assert 0.2 > gaps[0] > 3 * gaps[1] > 0


# --- plans and refusals -----------------------------------------------------------------------------------------------


def test_a_plan_counts_the_bits_and_a_server_gets_whole_weights():
    policy = random_models.meta_policy("random-200m", BackboneOptions())
    smaller = random_models.meta_policy("random-200m", BackboneOptions(quantization="nf4"))
    whole, four = policy.footprint, smaller.footprint
    linear = 14 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 3584)  # parameters of the language model's layers
    assert whole.weights - four.weights == pytest.approx((2 - 0.5 - 1 / 64) * linear, rel=2e-3)
    assert (whole.gathered, four.gathered) == (0, 2 * 896 * 3584)
    assert four.update_per_token(False) == whole.update_per_token(False)
    config = resolve({"model": "random-200m", "images": "."})
    assert planning.smallest_server(policy, config, 1280, 80e9) == planning.smallest_server(smaller, config, 1280, 80e9)
    helps = [planning.plan(policy, config, 1, memory).helps for memory in (0.83e9, 0.72e9)]
    assert [each[-1] for each in helps] == ["--quantization int8", "--quantization nf4"]
    planned = planning.plan(smaller, config, 2, 0.72e9)
    assert planned.best is not None
    assert [each.config.shard for each in planned.variants] == [False]


def test_the_command_that_a_plan_gives_names_the_bits(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "random-25m", "--quantization", "nf4"]) == 0
    out = capsys.readouterr().out
    assert "linear layers are held in nf4" in " ".join(out.split())
    assert "--quantization nf4" in out.split("ireasoner train")[1]


def test_refusals(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="--shard cannot share out"):
        resolve({**options(pool), "quantization": "nf4", "shard": True})
    monkeypatch.setattr("ireasoner.training.checks.installed", lambda _: False)
    with pytest.raises(UsageError, match=r"--quantization nf4 needs bitsandbytes: pip install 'ireasoner\[quant\]'"):
        check_packages(resolve({**options(pool), "quantization": "nf4"}))
    monkeypatch.setattr("ireasoner.model.quantization.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="needs bitsandbytes"):
        load_backbone("tiny", quantization="int8")
