"""Is it true of this model, on this machine, what training takes for granted? Each check with its verdict and figure.

The faults are those measured in the published code (numbers as in the README's table): an update that is blind to the
image, a reference that is the live policy, a role that never trains, a sampler that draws from another distribution
than the one that is trained, LoRA outside the language model. Pictures and completions are made up on the spot: what
is checked is how the parts fit, which does not depend on what the model knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ireasoner.method.seeds import uniforms
from ireasoner.method.texts import solver_messages
from ireasoner.method.types import ROLES, Completion, Role
from ireasoner.model.backbone import load_backbone, load_model_processor
from ireasoner.model.forward import completion_hidden
from ireasoner.model.inputs import Prompts, build_prompts, encode_images
from ireasoner.model.learner import Learner
from ireasoner.model.loss import token_statistics
from ireasoner.model.policy import Policy
from ireasoner.model.processors import render
from ireasoner.playground import world
from ireasoner.rollouts.live import LiveEngine

QUESTIONS = ("Which bar is the tallest?", "Is the red bar taller than the blue one, or can that not be told?")
COMPLETION = "<think>\nStep 1: The red bar reaches 7.\n</think>\n<answer>red</answer>"
REWARDS = [[1.0, 0.0], [0.0, 1.0]]
TOKENS = 24  # of each sampled completion
FILLS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)  # spreads of the made-up adapters, until they say something
SPEAKING_KL = 0.05  # nats a token: adapters that say something
EXACT = 1e-4  # nats: what is computed from the same logits, whatever the precision of the backbone


@dataclass(frozen=True)
class Finding:
    """One check: what must hold, whether it does, and the figure that says so."""

    name: str
    passed: bool
    figure: str


@dataclass(frozen=True)
class Tolerance:
    """How far two ways of computing one number may lie apart: rounding, by the backbone's precision.

    `logprob` for the mean over tokens of the difference, in nats; `kl` for KL, as a share of it.
    """

    logprob: float
    kl: float


TOLERANCES = {"float32": Tolerance(1e-4, 1e-3), "bfloat16": Tolerance(0.1, 0.25)}


def pictures(size: int = 336) -> list[Image.Image]:
    """Two pictures of the playground's world that differ in what they show and in nothing else."""
    rng = np.random.default_rng(0)
    drawn = [world.draw(world.sample_picture(rng, "bars"), world.sample_style("chalk", rng), rng) for _ in range(2)]
    return [image.resize((size, size)) for image in drawn]


@torch.no_grad()
def plain_logprobs(model: Any, processor: Any, image: Image.Image, question: str, ids: Sequence[int]) -> Tensor:
    """Log-probabilities [len(ids), V] of a completion by one forward pass of the whole model: no code of ours."""
    text = render(processor, solver_messages("{question}", question))
    inputs = processor(images=[image], text=[text], add_special_tokens=False, return_tensors="pt").to(model.device)
    extra = torch.tensor([list(ids)], device=model.device)
    length = inputs["input_ids"].shape[1]
    for name in [n for n in inputs if n == "attention_mask" or n.endswith("token_type_ids")]:
        added = torch.full_like(extra, int(name == "attention_mask"))
        inputs[name] = torch.cat([inputs[name], added], 1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], extra], 1)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return model(**inputs).logits[0, length - 1 : -1].float().log_softmax(-1)


def examine(model: str, *, dtype: str = "float32", device: str = "cpu") -> Iterator[Finding]:
    """Check a model, one finding after another; it is loaded twice, one after the other, and nothing is written.

    Args:
        model: 'tiny', a folder or a hub id.
        dtype: of the backbone, "float32" or "bfloat16".

    Raises:
        ModelError: the model cannot be used at all.
    """
    processor = load_model_processor(model)
    ids = processor.tokenizer(COMPLETION, add_special_tokens=False)["input_ids"]
    images = pictures()
    frozen = plain_logprobs(load_backbone(model, dtype, device), processor, images[0], QUESTIONS[0], ids)
    policy, limits = Policy(model, dtype=dtype, device=device), TOLERANCES[dtype]
    yield what_is_trainable(policy)
    yield equal_to_the_model(policy, images[0], ids, frozen, limits)
    yield reference(policy, images[0], ids, frozen, limits)
    yield sight(policy, images, ids)
    yield sampler_and_learner(policy, images, limits)
    for role in ROLES:
        yield training_of(policy, role, images)


def what_is_trainable(policy: Policy) -> Finding:
    """Fault 7: LoRA on the language model, on nothing else, and nothing else trainable."""
    tower = {id(module) for module in policy.decoder.modules()}
    adapted = [m for m in policy.model.modules() if "lora_A" in dict(m.named_children())]
    outside = sum(id(module) not in tower for module in adapted)
    ours = {id(p) for role in ROLES for p in policy.parameters(role).values()}
    strangers = sum(p.requires_grad and id(p) not in ours for p in policy.model.parameters())
    figure = f"{policy.describe()}; {outside} layers outside it, {strangers} other trainable tensors"
    return Finding("only the language model is trainable", bool(adapted) and not outside and not strangers, figure)


def _hidden(policy: Policy, image: Image.Image, ids: Sequence[int], role: Role | None) -> Tensor:
    """Hidden states [T, D] that predict a completion, by the path that an update takes."""
    prompts = build_prompts(policy, encode_images(policy, [image]), [solver_messages("{question}", QUESTIONS[0])])
    ids_BC = torch.tensor([list(ids)], device=policy.device)
    return completion_hidden(policy, prompts, ids_BC, torch.ones_like(ids_BC, dtype=torch.bool), role)


def _logprobs(policy: Policy, hidden: Tensor) -> Tensor:
    return policy.output_layer(hidden).float().log_softmax(-1)


def equal_to_the_model(
    policy: Policy, image: Image.Image, ids: Sequence[int], frozen: Tensor, limits: Tolerance
) -> Finding:
    """What we compute, the prompt shared and the image seen once, is what the model computes on the whole sequence."""
    with torch.no_grad():
        difference = _logprobs(policy, _hidden(policy, image, ids, None)) - frozen
    gap = difference[torch.arange(len(ids)), list(ids)].abs().mean().item()
    shared = (
        "shared among completions" if policy.shares_prompts else "not shared in the update (the model keeps states)"
    )
    figure = f"log-probabilities differ by {gap:.1e} nats a token (limit {limits.logprob:g}); prompts are {shared}"
    return Finding("log-probabilities are the model's own", gap <= limits.logprob, figure)


def reference(policy: Policy, image: Image.Image, ids: Sequence[int], frozen: Tensor, limits: Tolerance) -> Finding:
    """Fault 2: KL to the reference equals KL to a copy that was loaded apart, under adapters that say something."""
    kl, expected = 0.0, 0.0
    for spread in FILLS:
        fill_adapters(policy, spread)
        tokens = torch.tensor(list(ids), device=policy.device)
        with torch.no_grad():
            hidden, unadapted = (_hidden(policy, image, ids, role) for role in ("solver", None))
            kl = token_statistics(hidden, unadapted, tokens, policy.output_layer).kl_T.mean().item()
            logprobs = _logprobs(policy, hidden)
            expected = (logprobs.exp() * (logprobs - frozen)).sum(-1).mean().item()
        if expected > SPEAKING_KL:
            break
    figure = f"KL {kl:.4f} nats a token, to a copy loaded apart {expected:.4f}"
    passed = expected > SPEAKING_KL and abs(kl - expected) <= limits.kl * expected
    return Finding("the reference is the frozen model", passed, figure)


def fill_adapters(policy: Policy, spread: float, seed: int = 0) -> None:
    """Adapters as if trained: fresh ones change nothing, and half of each would get no gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in policy.model.named_parameters():
            if "lora_B" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)


def sight(policy: Policy, images: Sequence[Image.Image], ids: Sequence[int]) -> Finding:
    """Fault 1: another image, same question and completion: other log-probabilities and another gradient."""
    found = []
    for image in images:
        chosen = torch.tensor(list(ids), device=policy.device)[:, None]
        logprobs = _logprobs(policy, _hidden(policy, image, ids, "solver")).gather(-1, chosen)
        logprobs.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters("solver").values() if p.grad is not None])
        policy.model.zero_grad(set_to_none=True)
        found.append((logprobs.detach(), gradient))
    (one, gradient), (other, other_gradient) = found
    moved = (one - other).abs().max().item()
    turned = ((gradient - other_gradient).norm() / gradient.norm()).item()
    figure = (
        f"between two images log-probabilities move by up to {moved:.2g} nats, the gradient by {100 * turned:.3g} %"
    )
    return Finding("the update sees the image", moved > 1e-3 and turned > 1e-3, figure)


def _groups(policy: Policy, role: Role, images: Sequence[Image.Image]) -> tuple[Prompts, list[list[Completion]]]:
    prompts = build_prompts(
        policy, encode_images(policy, images), [solver_messages("{question}", q) for q in QUESTIONS]
    )
    draws = uniforms([[i] for i in range(len(images))], len(REWARDS[0]), TOKENS)
    return prompts, LiveEngine(policy).sample(prompts, role, draws)


def sampler_and_learner(policy: Policy, images: Sequence[Image.Image], limits: Tolerance) -> Finding:
    """Fault 4: the log-probabilities that samples were drawn with are those that the update computes.

    Two figures, since rounding hides in the first what a top-k or a penalty does: hidden states of sampler and learner
    may differ as far as the precision lets them; tokens are drawn from the softmax of the logits and nothing else.
    """
    prompts, groups = _groups(policy, "solver", images)
    gaps = []
    for row, group in enumerate(groups):
        longest = max(len(c.token_ids) for c in group)
        ids = torch.tensor([[*c.token_ids, *[policy.pad_token] * (longest - len(c.token_ids))] for c in group])
        mask = torch.tensor([[i < len(c.token_ids) for i in range(longest)] for c in group])
        ids, mask = ids.to(policy.device), mask.to(policy.device)
        with torch.no_grad():
            hidden = completion_hidden(policy, prompts[row : row + 1], ids, mask, "solver")
            logprobs = _logprobs(policy, hidden).gather(-1, ids[mask][:, None])[:, 0]
        gaps.append((logprobs.cpu() - torch.tensor([p for c in group for p in c.logprobs])).abs())
    gap, most = torch.cat(gaps).mean().item(), torch.cat(gaps).max().item()
    bent = max(_bent(policy, prompts[row : row + 1]) for row in range(len(prompts)))
    figure = f"over {len(torch.cat(gaps))} sampled tokens log-probabilities differ by {gap:.1e} nats a token "
    figure += f"(limit {limits.logprob:g}), {most:.1e} at most; "
    figure += f"from the softmax of their own logits by {bent:.1e} (limit {EXACT:g})"
    return Finding("sampler and learner agree", gap <= limits.logprob and bent <= EXACT, figure)


def _bent(policy: Policy, prompt: Prompts) -> float:
    """Between the log-probabilities of one completion's tokens and the softmax of the logits that they were drawn from.

    In nats, at most. Sampler and learner have different hidden states in bfloat16, and rounding there is as large as
    what top-k 50 does. With one row in the batch the logits of every step are known, and nothing is rounded in between.
    """
    seen: list[Tensor] = []
    output_layer = policy.output_layer

    def watched(hidden: Tensor) -> Tensor:
        logits = output_layer(hidden)
        seen.append(logits.clone())
        return logits

    policy.output_layer = watched  # type: ignore[method-assign]
    ((completion,),) = LiveEngine(policy).sample(prompt, "solver", uniforms([[0]], 1, TOKENS))
    del policy.output_layer  # the class's own again
    expected = torch.cat(seen).float().log_softmax(-1).cpu()
    expected = expected[torch.arange(len(expected)), list(completion.token_ids)]
    return (expected - torch.tensor(completion.logprobs)).abs().max().item()


def training_of(policy: Policy, role: Role, images: Sequence[Image.Image]) -> Finding:
    """Fault 3: one update of a role moves all of its own tensors and nothing else."""
    prompts, groups = _groups(policy, role, images)
    own = set(policy.parameters(role))
    before = _fingerprints(policy)
    Learner(policy, role, learning_rate=1e-4, weight_decay=0.0, advantage="rloo").update(prompts, groups, REWARDS)
    after = _fingerprints(policy)
    moved = {name for name in before if before[name] != after[name]}
    figure = f"{len(moved & own)} of {len(own)} own tensors moved, {len(moved - own)} others"
    return Finding(f"the {role} trains, and only it", moved == own, figure)


def _fingerprints(policy: Policy) -> dict[str, tuple[float, float]]:
    """Sum and norm of every tensor: what an update changes, it changes in these."""
    with torch.no_grad():
        return {
            name: (p.sum(dtype=torch.float64).item(), torch.linalg.vector_norm(p, dtype=torch.float64).item())
            for name, p in policy.model.named_parameters()
        }
