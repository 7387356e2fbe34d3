"""Does what training takes for granted hold for this model on this machine? One finding for each check.

The faults are those measured in the published code (docs/published-code.md): an update that is blind to the image, a
reference that is the live policy, a role that never trains, a sampler that draws from another distribution than the one
that is trained, LoRA outside the language model. Pictures and completions are made up: the checks are about how the
parts fit together, which does not depend on what the model knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.utils.integrations import dequantize_module_weight
from PIL import Image
from torch import Tensor
from torch.nn.functional import linear

from ireasoner.method.recipe import Recipe
from ireasoner.method.texts import solver_messages
from ireasoner.method.types import ROLES, Completion, Role
from ireasoner.model.forward import completion_hidden
from ireasoner.model.inputs import Prompts, build_prompts, encode_images, render, right_padded
from ireasoner.model.learner import Learner
from ireasoner.model.loss import token_statistics
from ireasoner.model.options import BackboneOptions, OptimizerOptions
from ireasoner.model.pieces import release_memory
from ireasoner.model.policy import Policy
from ireasoner.model.source import ModelError, brief
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.studies.precision import UPDATES, measure_precision
from ireasoner.studies.quantised import View, difference, view
from ireasoner.studies.random_models import find_commit, load_backbone, load_policy, load_processor

QUESTIONS = ("Which bar is the tallest?", "Is the red bar taller than the blue one, or can that not be told?")
CHATS = [solver_messages("{question}", question) for question in QUESTIONS]
COMPLETION = "<think>\nStep 1: The red bar reaches 7.\n</think>\n<answer>red</answer>"
ADVANTAGES = [[1.0, -1.0], [-1.0, 1.0]]  # of two completions for each question
TOKENS = 24  # of each sampled completion
SPREADS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)  # of made-up adapters, tried until they change what the model says
CLEAR_KL = 0.05  # nats a token: adapters that clearly change what the model says
EXACT = 1e-4  # nats: what is computed from the same logits, whatever the precision of the backbone
# How far two ways of computing the same number may differ by rounding, in the backbone's precision: log-probabilities
# in nats, as a mean over tokens, and KL divergences, as a share of them.
LOGPROB_LIMITS = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
KL_LIMITS = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
IN_FLOAT32 = BackboneOptions(dtype="float32")
LEAST_COSINE = 0.5  # of a quantised model's gradient with the whole one's
LEAST_SLOPE = 0.9  # of what updates change in float32, this much must be seen in the backbone's precision


@dataclass(frozen=True)
class Finding:
    """One check: what must hold, whether it does, the figure that shows it; and what to do about it, where known."""

    name: str
    passed: bool
    figure: str
    remedy: str = ""


def pictures(size: int = 336) -> list[Image.Image]:
    """Two pictures of a red and a blue bar, which differ in the heights of the bars alone."""
    width, drawn = size // 5, []
    for red, blue in ((0.7, 0.3), (0.2, 0.9)):
        pixels = np.full((size, size, 3), 255, dtype=np.uint8)
        pixels[round(size * (1 - red)) :, width : 2 * width] = (200, 30, 30)
        pixels[round(size * (1 - blue)) :, 3 * width : 4 * width] = (30, 30, 200)
        drawn.append(Image.fromarray(pixels))
    return drawn


def examine(
    model: str,
    options: BackboneOptions = IN_FLOAT32,
    *,
    device: str = "cpu",
    revision: str | None = None,
    learning_rate: float = OptimizerOptions().learning_rate,
) -> Iterator[Finding]:
    """Check a model, one finding after another. It is loaded twice, one after the other (three times if it is to be
    quantised), and nothing is written.

    Args:
        model: 'tiny', a size of `random_models`, a folder or a hub id.
        options: how the backbone is held, and its adapters.
        device: 'cpu', 'cuda' or 'cuda:N'.
        revision: a branch, tag or commit of a model on the hub; None: the newest.
        learning_rate: of the run that is meant; the precision is checked for updates of its size.

    Raises:
        ModelError: the model cannot be used at all.
    """
    revision, dtype = find_commit(model, revision), options.dtype
    processor = load_processor(model, options.max_image_tokens, revision)
    ids = processor.tokenizer(COMPLETION, add_special_tokens=False)["input_ids"]
    images = pictures()
    alone = load_backbone(model, dtype, device, revision, options.quantization)
    if options.quantization:
        compute_plainly(alone)
    frozen = plain_logprobs(alone, processor, images[0], QUESTIONS[0], ids)
    del alone  # before the model is loaded again
    policy = load_policy(model, options, device, revision)
    encoded = encode_images(policy, images)
    prompts = build_prompts(policy, encoded, CHATS[:1] * 2)  # the same question about both pictures
    requests = [Request(encoded[i], CHATS[i], (i,)) for i in range(2)]
    yield what_is_trainable(policy)
    yield equal_to_the_model(policy, prompts[:1], ids, frozen, LOGPROB_LIMITS[dtype])
    chats = build_prompts(policy, encoded, CHATS)
    # While the adapters are new, as those of the whole model will be.
    groups = sampled(policy, requests) if options.quantization else []
    seen = view(policy, chats, groups) if groups else None
    if dtype != "float32":
        yield from survives_rounding(policy, requests, learning_rate)  # while the adapters are new, and add nothing
    yield reference(policy, prompts[:1], ids, frozen, KL_LIMITS[dtype])
    yield sight(policy, prompts, ids)
    yield sampler_and_learner(policy, requests, LOGPROB_LIMITS[dtype])
    for role in ROLES:
        yield training_of(policy, role, requests)
    if seen is not None:
        del policy  # before the model is loaded again
        release_memory()
        yield against_the_whole_model(seen, model, options, device, revision, chats, groups)


def compute_plainly(quantised: Any) -> None:
    """Let a quantised model multiply with its weights as PEFT brings them back to full size, one layer after another.
    bitsandbytes' own layers of 8 bits would round what goes into them as well."""
    for module in quantised.modules():
        if type(module).__module__.startswith("bitsandbytes"):
            module.forward = partial(_plain_product, module)


def _plain_product(layer: Any, x: Tensor) -> Tensor:
    return linear(x, dequantize_module_weight(layer).to(x.dtype), layer.bias)


@torch.no_grad()
def plain_logprobs(model: Any, processor: Any, image: Image.Image, question: str, ids: Sequence[int]) -> Tensor:
    """Log-probabilities [len(ids), V] of a completion, by one forward pass of the whole model: no code of ours."""
    text = render(processor, solver_messages("{question}", question))
    inputs = processor(images=[image], text=[text], add_special_tokens=False, return_tensors="pt").to(model.device)
    completion = torch.tensor([list(ids)], device=model.device)
    length = inputs["input_ids"].shape[1]
    for name in [n for n in inputs if n == "attention_mask" or n.endswith("token_type_ids")]:
        added = torch.full_like(completion, int(name == "attention_mask"))
        inputs[name] = torch.cat([inputs[name], added], 1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], completion], 1)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return model(**inputs).logits[0, length - 1 : -1].float().log_softmax(-1)


def what_is_trainable(policy: Policy) -> Finding:
    """Fault 7: LoRA is on layers of the language model only, and nothing else is trainable."""
    tower = {id(module) for module in policy.decoder.modules()}
    adapted = [m for m in policy.model.modules() if "lora_A" in dict(m.named_children())]
    outside = sum(id(module) not in tower for module in adapted)
    ours = {id(p) for role in ROLES for p in policy.parameters(role).values()}
    strangers = sum(p.requires_grad and id(p) not in ours for p in policy.model.parameters())
    figure = f"{policy.describe()}; {outside} layers outside it, {strangers} other trainable tensors"
    return Finding("only the language model is trainable", bool(adapted) and not outside and not strangers, figure)


def _hidden(
    policy: Policy, prompt: Prompts, texts: Sequence[Sequence[int]], role: Role | None
) -> tuple[Tensor, Tensor]:
    """The hidden states [T, D] from which an update predicts the tokens of a prompt's completions; these tokens [T]."""
    ids_NC, mask_NC = right_padded(policy, texts)
    return completion_hidden(policy, prompt, ids_NC, mask_NC, role), ids_NC[mask_NC]


def _logprobs(policy: Policy, hidden: Tensor) -> Tensor:
    return policy.output_layer(hidden).log_softmax(-1)


@torch.no_grad()
def equal_to_the_model(policy: Policy, prompt: Prompts, ids: Sequence[int], frozen: Tensor, limit: float) -> Finding:
    """Sharing the prompt and encoding the image once gives what the model computes on the whole sequence."""
    hidden, tokens = _hidden(policy, prompt, [ids], None)
    gap = (_logprobs(policy, hidden) - frozen).gather(-1, tokens[:, None]).abs().mean().item()
    shared = "shared among completions"
    if not policy.shares_prompts:
        shared = "not shared in the update (the model keeps states)"
    figure = f"log-probabilities differ by {gap:.1e} nats a token (limit {limit:g}); prompts are {shared}"
    return Finding("log-probabilities are the model's own", gap <= limit, figure)


@torch.no_grad()
def reference(policy: Policy, prompt: Prompts, ids: Sequence[int], frozen: Tensor, limit: float) -> Finding:
    """Fault 2: KL to the reference equals KL to a copy that was loaded separately, under adapters that change much."""
    kl, expected = 0.0, 0.0
    for spread in SPREADS:
        fill_adapters(policy, spread)
        (hidden, tokens), (unadapted, _) = (_hidden(policy, prompt, [ids], role) for role in ("solver", None))
        kl = token_statistics(hidden, unadapted, tokens, policy.output_layer).kl_T.mean().item()
        logprobs = _logprobs(policy, hidden)
        expected = (logprobs.exp() * (logprobs - frozen)).sum(-1).mean().item()
        if expected > CLEAR_KL:
            break
    figure = f"KL {kl:.4f} nats a token, to a copy loaded apart {expected:.4f}"
    passed = expected > CLEAR_KL and abs(kl - expected) <= limit * expected
    return Finding("the reference is the frozen model", passed, figure)


@torch.no_grad()
def fill_adapters(policy: Policy, spread: float, seed: int = 0) -> None:
    """Make adapters as if trained: B matrices from N(0, spread²). Fresh ones are 0, and A would get no gradient."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in policy.model.named_parameters():
        if "lora_B" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)


def sight(policy: Policy, prompts: Prompts, ids: Sequence[int]) -> Finding:
    """Fault 1: with another image, the same question and completion have other log-probabilities and gradients."""
    found = []
    for row in range(len(prompts)):
        hidden, tokens = _hidden(policy, prompts[row : row + 1], [ids], "solver")
        logprobs = _logprobs(policy, hidden).gather(-1, tokens[:, None])
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


def _sample(policy: Policy, role: Role, requests: Sequence[Request]) -> tuple[Prompts, list[list[Completion]]]:
    prompts = build_prompts(policy, [request.image for request in requests], CHATS)
    return prompts, LiveEngine(policy).sample(requests, role, n=len(ADVANTAGES[0]), max_tokens=TOKENS)


@torch.no_grad()
def sampler_and_learner(policy: Policy, requests: Sequence[Request], limit: float) -> Finding:
    """Fault 4: samples were drawn with the log-probabilities that the update computes.

    Two figures, because rounding hides in the first what a top-k or a penalty does: hidden states of sampler and
    learner differ as far as the precision lets them, while tokens must be drawn from the softmax of the logits exactly.
    """
    prompts, groups = _sample(policy, "solver", requests)
    gaps = []
    for row, group in enumerate(groups):
        hidden, tokens = _hidden(policy, prompts[row : row + 1], [c.token_ids for c in group], "solver")
        logprobs = _logprobs(policy, hidden).gather(-1, tokens[:, None])[:, 0].cpu()
        gaps.append((logprobs - torch.tensor([p for c in group for p in c.logprobs])).abs())
    gap, most = torch.cat(gaps).mean().item(), torch.cat(gaps).max().item()
    off = max(_off_softmax(policy, request) for request in requests)
    figure = f"over {len(torch.cat(gaps))} sampled tokens log-probabilities differ by {gap:.1e} nats a token "
    figure += f"(limit {limit:g}), {most:.1e} at most; "
    figure += f"from the softmax of their own logits by {off:.1e} (limit {EXACT:g})"
    return Finding("sampler and learner agree", gap <= limit and off <= EXACT, figure)


def _off_softmax(policy: Policy, request: Request) -> float:
    """The largest difference, in nats, of a completion's log-probabilities from the softmax of the very logits used.

    With one completion in the batch, the logits of every step can be watched, and nothing is rounded in between.
    """
    seen: list[Tensor] = []
    output_layer, engine = policy.output_layer, LiveEngine(policy)
    engine.capture = None  # a captured step would call no Python, and nothing could be watched

    def watched(hidden: Tensor) -> Tensor:
        logits = output_layer(hidden)
        seen.append(logits.clone())
        return logits

    policy.output_layer = watched  # type: ignore[method-assign]
    ((completion,),) = engine.sample([request], "solver", max_tokens=TOKENS)
    del policy.output_layer  # the class's own again
    expected = torch.cat(seen).float().log_softmax(-1).cpu()
    expected = expected[torch.arange(len(expected)), list(completion.token_ids)]
    return (expected - torch.tensor(completion.logprobs)).abs().max().item()


def sampled(policy: Policy, requests: Sequence[Request]) -> list[list[Completion]]:
    """Enough completions of the solver to measure small differences on."""
    return LiveEngine(policy).sample(requests, "solver", n=8, max_tokens=2 * TOKENS)


def against_the_whole_model(
    seen: View,
    model: str,
    options: BackboneOptions,
    device: str,
    revision: str | None,
    prompts: Prompts,
    groups: Sequence[Sequence[Completion]],
) -> Finding:
    """A quantised model writes nearly what the whole one would, and learns in nearly the same direction."""
    name = "a quantised model learns as the whole one"
    try:
        whole = load_policy(model, options.model_copy(update={"quantization": None}), device, revision)
        found = difference(seen, view(whole, prompts, groups))
    except (ModelError, torch.OutOfMemoryError) as error:
        return Finding(name, True, f"not measured, as the whole model cannot be loaded beside it ({brief(error)})")
    figure = (
        f"in {options.quantization} the log-probabilities of {len(seen.logprobs_T)} sampled tokens differ by "
        f"{found.gap:.2g} nats a token, a KL of {found.kl:.2g} to the whole model; the gradient of an update has a "
        f"cosine of {found.cosine:.3f} with the whole model's (at least {LEAST_COSINE:g} is needed) and "
        f"{found.length:.2f} times its length"
    )
    learns = found.cosine >= LEAST_COSINE
    return Finding(name, learns, figure, "" if learns else "Take --quantization int8, or leave it out.")


def survives_rounding(policy: Policy, requests: Sequence[Request], learning_rate: float) -> Iterator[Finding]:
    """Updates of this size change in the backbone's precision what they change in float32, and the KL shows them."""
    prompts = build_prompts(policy, [request.image for request in requests], CHATS)
    groups = sampled(policy, requests)
    found, target = measure_precision(policy, prompts, groups, learning_rate), Recipe().kl_target
    figure = (
        f"{UPDATES} updates at a learning rate of {learning_rate:g} change log-probabilities by {found.moved:.1e} "
        f"nats; of that, {found.slope:.2f} ± {found.error:.2f} is found in this precision (at least {LEAST_SLOPE:g} "
        f"is needed), beside {found.rounding:.1e} nats of rounding"
    )
    shows = found.moved > found.rounding and found.slope + 2 * found.error >= LEAST_SLOPE
    remedy = "" if shows else "Rounding hides updates of this size: raise --learning-rate, or take --dtype float32."
    yield Finding("small updates survive rounding", shows, figure, remedy)
    figure = (
        f"KL {found.kl:.1e} nats a token in float32, {found.kl_floor:+.1e} by rounding "
        f"(at most half of the target {target:g} is bearable)"
    )
    yield Finding("the KL is that of the policy, not of rounding", abs(found.kl_floor) <= target / 2, figure)


def training_of(policy: Policy, role: Role, requests: Sequence[Request]) -> Finding:
    """Fault 3: one update of a role moves all of its own tensors and nothing else."""
    prompts, groups = _sample(policy, role, requests)
    own, before = set(policy.parameters(role)), _fingerprints(policy)
    learner = Learner(policy, role, Recipe(), OptimizerOptions(learning_rate=1e-4, weight_decay=0.0))
    learner.update(prompts, groups, torch.tensor(ADVANTAGES), rewards=ADVANTAGES)
    after = _fingerprints(policy)
    moved = {name for name in before if before[name] != after[name]}
    figure = f"{len(moved & own)} of {len(own)} own tensors moved, {len(moved - own)} others"
    return Finding(f"the {role} trains, and only it", moved == own, figure)


@torch.no_grad()
def _fingerprints(policy: Policy) -> dict[str, tuple[float, float]]:
    """Sum and norm of every tensor: an update that changes a tensor changes these."""
    return {
        name: (p.sum(dtype=torch.float64).item(), torch.linalg.vector_norm(p, dtype=torch.float64).item())
        for name, parameter in policy.model.named_parameters()
        for p in [parameter if parameter.is_floating_point() else parameter.float()]  # quantised weights are integers
    }
