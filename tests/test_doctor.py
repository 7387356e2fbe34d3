"""The doctor names each fault of the published code when it is put back, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners import lora

from ireasoner.app.cli import main
from ireasoner.method.types import Role
from ireasoner.model import loading
from ireasoner.model.inputs import EncodedImage
from ireasoner.model.learner import Learner
from ireasoner.model.lora import Float32SumLinear
from ireasoner.model.options import BackboneOptions
from ireasoner.model.policy import Policy
from ireasoner.rollouts import live
from ireasoner.rollouts.live import LiveEngine
from ireasoner.studies import doctor
from recorded import recorded


def failures(dtype: Any = "float32", **options: Any) -> Iterator[str]:
    findings = doctor.examine("tiny", BackboneOptions(dtype=dtype), **options)
    return (finding.name for finding in findings if not finding.passed)


def failed(dtype: Any = "float32", **options: Any) -> set[str]:
    return set(failures(dtype, **options))


def test_a_sound_model_passes(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "tiny", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "tiny in float32 on cpu" in out
    assert out.count("ok  ") == 7
    assert "FAIL" not in out
    assert "262,144 parameters a role; 0 layers outside it" in out
    assert "56 of 56 own tensors moved, 0 others" in out


def test_an_update_that_is_blind_to_the_image(monkeypatch: pytest.MonkeyPatch):
    encode = doctor.encode_images

    def blind(policy: Policy, images: Any) -> list[EncodedImage]:
        found = encode(policy, images)
        return [
            replace(e, features={n: [torch.zeros_like(t) for t in v] for n, v in e.features.items()}) for e in found
        ]

    monkeypatch.setattr(doctor, "encode_images", blind)
    assert "the update sees the image" in failures()


def test_a_reference_that_is_the_live_policy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    acting_as = Policy.acting_as

    @contextmanager
    def never_without(self: Policy, role: Role | None) -> Iterator[None]:
        with acting_as(self, role or "solver"):
            yield

    monkeypatch.setattr(Policy, "acting_as", never_without)
    assert main(["doctor", "tiny", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  the reference is the frozen model" in out
    assert "KL 0.0000 nats a token" in out
    assert "do not train on this" in out


def test_a_role_that_never_trains(monkeypatch: pytest.MonkeyPatch):
    init = Learner.__init__

    def frozen(self: Learner, policy: Policy, role: Role, *options: Any) -> None:
        init(self, policy, role, *options)
        if role == "proposer":
            self.optimizer.step = lambda: None  # type: ignore[method-assign, assignment]

    monkeypatch.setattr(Learner, "__init__", frozen)
    assert failed() == {"the proposer trains, and only it"}


def test_a_role_that_trains_the_other_too(monkeypatch: pytest.MonkeyPatch):
    update = Learner.update

    def meddling(self: Learner, *args: Any, **kwargs: Any) -> dict[str, float]:
        with torch.no_grad():
            next(iter(self.policy.parameters("proposer").values())).mul_(1.001)
        return update(self, *args, **kwargs)

    monkeypatch.setattr(Learner, "update", meddling)
    assert failed() == {"the solver trains, and only it"}


# Both types pass without a fault: see the first test and the last.
@pytest.mark.parametrize(
    ("fault", "dtype"), [("top-k", "float32"), ("repetition penalty", "float32"), ("top-k", "bfloat16")]
)
def test_a_sampler_of_another_distribution(monkeypatch: pytest.MonkeyPatch, fault: str, dtype: str):
    """As mild as checkpoints ask for: in bfloat16 rounding alone moves log-probabilities as far."""
    draw = live._draw

    def other(logits: torch.Tensor, uniforms: torch.Tensor, temperatures: torch.Tensor) -> Any:
        if fault == "top-k":
            logits = logits.masked_fill(logits < logits.topk(50).values[:, -1:], -torch.inf)
        else:
            logits = logits.clone()
            logits[:, :100] /= 1.05
        return draw(logits, uniforms, temperatures)

    monkeypatch.setattr(live, "_draw", other)
    assert failed(dtype) == {"sampler and learner agree"}


def test_a_sound_model_passes_where_decoding_is_captured(monkeypatch: pytest.MonkeyPatch):
    init = LiveEngine.__init__

    def capturing(self: LiveEngine, policy: Policy) -> None:
        init(self, policy)
        self.capture = recorded

    monkeypatch.setattr(LiveEngine, "__init__", capturing)
    assert failed() == set()


def test_lora_in_the_vision_tower(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "language_targets", lambda *_: r".*\.(q_proj|qkv)")
    assert "only the language model is trainable" in failures()


def test_a_model_that_is_none(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "no/such/model"]) == 2
    assert "cannot load" in capsys.readouterr().err


def test_the_pictures_differ_and_say_nothing_else():
    one, other = (np.asarray(image) for image in doctor.pictures())
    assert one.shape == other.shape == (336, 336, 3)
    assert 0.1 < (one != other).any(-1).mean() < 0.5


@pytest.mark.parametrize(
    ("learning_rate", "forward", "fails"),
    [
        (2e-5, None, set()),
        (2e-5, lora.Linear.forward, {"small updates survive rounding"}),
        pytest.param(1e-7, None, {"small updates survive rounding"}, marks=pytest.mark.slow),
    ],
    ids=["the default", "sums rounded twice, as PEFT does", "a rate that drowns in rounding"],
)
def test_whether_small_updates_survive_rounding(
    learning_rate: float, forward: Any, fails: set[str], monkeypatch: pytest.MonkeyPatch
):
    if forward:
        monkeypatch.setattr(Float32SumLinear, "forward", forward)
    assert failed("bfloat16", learning_rate=learning_rate) == fails
