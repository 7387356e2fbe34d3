"""Counting the memory that a model takes, from the tensors that it makes.

What a pass keeps depends on shapes and types alone, so the count is the same on the meta device, where a model of any
size takes no memory. It follows the model and its adapters by itself, whatever they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface

from ireasoner.method.types import ROLES
from ireasoner.model.footprint import Footprint
from ireasoner.model.forward import new_cache
from ireasoner.model.pieces import release_memory
from ireasoner.model.policy import Policy
from ireasoner.model.quantization import quantised_bytes
from ireasoner.model.source import ModelError

NAME = "ireasoner_counting"
GROUPED_PRODUCT = vars(torch)["_grouped_mm"]  # what torch.nn.functional.grouped_mm calls
TRIAL = 64  # tokens of a trial; another one has twice as many
SPARE = 0.1  # of the free memory: allocators leave gaps, and libraries have buffers of their own


class CountError(ModelError):
    """What a model takes cannot be counted without its weights."""


def limit_sampling(policy: Policy, tokens_per_batch: int) -> None:
    """Let sampling take as much memory as an update of so many tokens would, and no more than the device has free."""
    policy.sampling_bytes = tokens_per_batch * policy.footprint.update_per_token(False)
    if policy.device.type == "cuda":
        release_memory()  # what an earlier model left behind for reuse does not count as free
        free, _ = torch.cuda.mem_get_info(policy.device)
        policy.sampling_bytes = min(policy.sampling_bytes, int((1 - SPARE) * free))


class _Fused(torch.autograd.Function):
    """Keeps for the backward pass what fused attention keeps: what goes in and what comes out. Computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        rows, heads, length, _ = query.shape
        output = value.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _output = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """In place of fused kernels where these cannot run: on the meta device, and flash attention with a mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) if groups > 1 else each for each in (key, value))
    output: Any = _Fused.apply(query, key, value)
    return output.transpose(1, 2), None


AttentionInterface.register(NAME, _fused_attention)


class _AnyGroupedProduct(TorchFunctionMode):
    """Multiplies all tokens with the first expert, which makes tensors of the same sizes.

    The product of many experts is refused on the meta device in float32 (torch 2.13), although it works elsewhere.
    """

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is GROUPED_PRODUCT and args[1].ndim == 3:
            return args[0] @ args[1][0]
        return function(*args, **(kwargs or {}))


def count(policy: Policy) -> Footprint:
    """What a policy takes, from running a few tokens of text."""
    vocabulary, width = policy.backbone.get_output_embeddings().weight.shape
    itemsize = policy.backbone.dtype.itemsize
    held, largest = _quantised(policy)

    def size(tensor: Tensor) -> int:
        return held.get(tensor) or tensor.nbytes

    weights = sum(map(size, [*policy.model.parameters(), *policy.model.buffers()]))
    adapters = [sum(p.nbytes for p in policy.parameters(role).values()) for role in ROLES]
    layers = [dict(layer.named_parameters()) for layer in policy.decoder.layers]
    frozen = [sum(size(p) for name, p in layer.items() if ".lora_" not in name) for layer in layers]
    with _Countable(policy) as running:
        once, twice = _saved(policy, TRIAL), _saved(policy, 2 * TRIAL)
        cached, cached_twice = _cached(policy, TRIAL), _cached(policy, 2 * TRIAL)
    # What grows with the square of the tokens, the scores of attention that is not fused, is told apart.
    kept = [2 * one / TRIAL - two / (2 * TRIAL) for one, two in zip(once, twice, strict=True)]
    scores = [(two - 2 * one) / (2 * TRIAL**2) for one, two in zip(once, twice, strict=True)]
    keys, values = (
        round(running.sum([(two - one) / TRIAL for one, two in zip(*both, strict=True)]))
        for both in ((cached.keys, cached_twice.keys), (cached.values, cached_twice.values))
    )
    peaks = [each.peak - sum(each.keys) - sum(each.values) for each in (cached, cached_twice)]
    return Footprint(
        weights=weights,
        adapters=sum(adapters),
        layers=sum(frozen),
        widest=max(frozen),
        gathered=largest,
        optimizer=2 * sum(adapters) + 2 * max(adapters),
        kept=round(running.sum(kept)),
        layer=round(max(kept)),
        scores=round(running.sum(scores)),
        passing=(peaks[1] - peaks[0]) // TRIAL,
        inputs=len(layers) * width * itemsize,
        cache=keys + values,
        shared=max(keys, keys * 4 // itemsize) + values,
        state=round(running.sum(cached.keys) + running.sum(cached.values)) - TRIAL * (keys + values),
        logits=4 * vocabulary,
        feature=(1 + _inner_features(policy)) * width * itemsize,
    )


def _quantised(policy: Policy) -> tuple[dict[Tensor, int], int]:
    """The bytes of each quantised weight, and those of the largest one while it is whole; a policy on the meta device
    has whole weights in place of those that it stands for."""
    how = policy.quantization
    if how is None:
        return {}, 0
    linear = [
        (module.weight, module.out_features, module.in_features)
        for name, module in policy.decoder.named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name
    ]
    held = {weight: quantised_bytes(how, outputs, inputs) for weight, outputs, inputs in linear}
    return held, max(outputs * inputs for _, outputs, inputs in linear) * policy.backbone.dtype.itemsize


def _inner_features(policy: Policy) -> int:
    """How many layers of the vision tower have their features go to layers of the language model, beside the last."""
    vision = policy.backbone.config.to_dict().get("vision_config") or {}
    return len(vision.get("deepstack_visual_indexes") or ())


def forward_flops(policy: Policy) -> int:
    """Operations that the language model and its output layer take for a token, of which only the experts that a token
    is sent to count. Attention, whose share grows with the text, is left out."""
    counter, at = FlopCounterMode(display=False), list[int]()
    with _Countable(policy) as running, torch.no_grad(), policy.acting_as("solver"), counter:
        with _before_layers(policy, lambda _: at.append(counter.get_total_flops())):
            hidden = policy.decoder(**_inputs(policy, TRIAL), use_cache=False).last_hidden_state
        at.append(counter.get_total_flops())
        policy.output_layer(hidden)
        output = counter.get_total_flops() - at[-1]
    return round(running.sum([after - before for before, after in pairwise(at)]) + output) // TRIAL


class _Countable:
    """Inside, a policy's language model can run where it is, and has as few layers as show what all of them take.

    Large models have up to a hundred layers, of one or two kinds. The first layer keeps less than others, whose input
    needs a gradient, and what comes behind the last one is counted with it. So a kind is known by a layer in between.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self.before = policy, policy.decoder.config._attn_implementation
        self.layers = policy.decoder.layers
        self.on_meta = policy.device.type == "meta"
        self.products = _AnyGroupedProduct()
        types = getattr(policy.decoder.config, "layer_types", None) or [None] * len(self.layers)
        shapes = [tuple((name, p.shape) for name, p in layer.named_parameters()) for layer in self.layers]
        self.kinds = [*zip(types, shapes, strict=True)]
        self.known: dict[Any, int] = {}
        for index, kind in enumerate(self.kinds[1:], 1):
            self.known.setdefault(kind, index)

    def sum(self, values: Sequence[float]) -> float:
        """The sum over all layers of a value that is known of those that were run."""
        return sum(values) + sum(values[self.known[kind]] for kind in self.kinds[len(values) :])

    def __enter__(self) -> _Countable:
        # The first layers, so that each keeps its number, by which some models look up its kind.
        self.policy.decoder.layers = self.layers[: max([*self.known.values(), 0]) + 2]
        if "flash" in self.before or (self.on_meta and self.before != "eager"):
            self.policy.decoder.set_attn_implementation(NAME)
        if self.on_meta:
            self.products.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.on_meta:
            self.products.__exit__(*error)
        self.policy.decoder.set_attn_implementation(self.before)
        self.policy.decoder.layers = self.layers
        self.policy.model.set_adapter(ROLES[0])  # as it is in a new policy


@contextmanager
def _before_layers(policy: Policy, call: Callable[[int], None]) -> Iterator[None]:
    """Inside, `call` is called before each layer of the language model runs, with its number."""
    hooks = [
        layer.register_forward_pre_hook(lambda *_, index=index: call(index))
        for index, layer in enumerate(policy.decoder.layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _saved(policy: Policy, tokens: int) -> list[int]:
    """Bytes that the backward pass needs of each layer that runs, after a pass over so many tokens."""
    inputs = _inputs(policy, tokens)
    there = [*policy.model.parameters(), *policy.model.buffers(), *inputs.values()]
    held = {tensor.untyped_storage()._cdata for tensor in there}
    saved: list[list[Any]] = [[] for _ in policy.decoder.layers]
    place: list[Any] = []  # what comes before the first layer is apart

    def enter(index: int) -> None:
        nonlocal place
        place = saved[index]

    def keep(tensor: Tensor) -> None:  # no backward pass follows; what a node saved of its own output would be a circle
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            held.add(storage._cdata)
            place.append(storage)  # kept alive, or another one might get its address

    with (
        _before_layers(policy, enter),
        torch.enable_grad(),
        policy.acting_as("solver"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        policy.decoder(**inputs, use_cache=False)
    return [sum(storage.nbytes() for storage in storages) for storages in saved]


class Held(TorchDispatchMode):
    """Follows the bytes of all tensors that are made inside, until nothing refers to them.

    Attributes:
        peak: the most that was held at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            # A view has the storage of what it was given; whatever was there before is not counted.
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in (given | self.alive):
                storage = tensor.untyped_storage()
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _gone(self, storage: int, size: int) -> None:
        self.alive.discard(storage)
        self.now -= size


@dataclass(frozen=True)
class _Cached:
    """Bytes after a pass: of each layer's keys, and of its values and everything else in its cache; and the most that
    was held at a time, the cache included."""

    keys: list[int]
    values: list[int]
    peak: int


@torch.no_grad()
def _cached(policy: Policy, tokens: int) -> _Cached:
    """What a pass over so many tokens holds, and leaves in the cache of each layer that runs."""
    cache, inputs, held = new_cache(policy), _inputs(policy, tokens), Held()
    with policy.acting_as("solver"), held:
        policy.decoder(**inputs, past_key_values=cache, use_cache=True)
    made = [
        {name: each.nbytes for name, each in vars(layer).items() if isinstance(each, Tensor)}
        for layer in cache.layers[: len(policy.decoder.layers)]
    ]
    keys = [layer.pop("keys", 0) for layer in made]
    return _Cached(keys, [sum(layer.values()) for layer in made], held.peak)


def _inputs(policy: Policy, tokens: int) -> dict[str, Tensor]:
    """One sequence of text with a mask, as packed completions have; with none, a model would look into tensors to make
    one, which the meta device does not have."""
    ids = torch.full((1, tokens), policy.pad_token, dtype=torch.long, device=policy.device)
    mask = torch.zeros(1, 1, tokens, tokens, dtype=policy.backbone.dtype, device=policy.device)
    return {"input_ids": ids, "attention_mask": mask}
