"""Forward passes of a policy: prompts, and completions behind prompts that are computed once for their whole group.

Shape suffixes: B prompts, N trajectories of each, P prompt positions (left-padded), C completion positions
(right-padded), T packed positions, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ireasoner.method.types import Role
from ireasoner.model.attention import SharedCache, attending
from ireasoner.model.backbone import ModelError
from ireasoner.model.inputs import Prompts, joined
from ireasoner.model.policy import Policy


@dataclass
class Prefix:
    """Prompts after the forward pass: their cache, and what the first completion token needs."""

    cache: Cache
    mask_BP: Tensor
    last_hidden_BD: Tensor
    next_position_B: Tensor

    def select(self, rows: Tensor) -> Prefix:
        """Some of the rows, or some of them several times; the cache is changed in place."""
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]  # for every kind of layer: index_select along the batch
        return Prefix(self.cache, self.mask_BP[rows], self.last_hidden_BD[rows], self.next_position_B[rows])

    def repeat(self, count: int, *, room: int | None = None, fixed: bool = False) -> Prefix:
        """Every prompt `count` times over, neighbours together.

        Its cache is repeated too; or kept once for all, with `room` for so many further positions of each (`fixed`: as
        in `SharedCache`).
        """
        rows = torch.arange(len(self.mask_BP), device=self.mask_BP.device).repeat_interleave(count)
        if room is None:
            return self.select(rows)
        cache = SharedCache(self.cache, self.mask_BP, count, room, fixed)
        return Prefix(cache, self.mask_BP[rows], self.last_hidden_BD[rows], self.next_position_B[rows])


def read(
    policy: Policy, prompts: Prompts, cache: Cache | None = None, written: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The model's own forward pass over prompts, image features handed to it; gradients flow if they are enabled.

    Args:
        prompts: B prompts.
        cache: filled, if given.
        written: ids and mask [B, C] of right-padded completions behind the prompts.

    Returns:
        Hidden states [B, P + C, D] under whichever adapter is active, and the text positions [B, P + C] used.
    """
    start, embeddings = prompts.mask_BP.shape[1], None
    if written is not None:
        ids_BC, mask_BC = written
        embeddings = policy.backbone.get_input_embeddings()(ids_BC)
        # Nothing keeps a model from writing its image token; that must not be taken for the place of an image.
        signs = [*policy.processor.image_token_ids, policy.backbone.config.to_dict().get("image_token_id", -1)]
        is_image = torch.isin(ids_BC, torch.tensor(signs, device=policy.device))
        prompts = prompts.followed_by(ids_BC.masked_fill(is_image, policy.pad_token), mask_BC)
    text_positions = (prompts.mask_BP.cumsum(-1) - 1).clamp(min=0)
    used: list[Tensor] = []

    def place(decoder: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # Models with positions of their own (M-RoPE) have made them by now; all others would count the padding.
        if kwargs.get("position_ids") is None or kwargs["position_ids"].ndim == 2:
            kwargs["position_ids"] = text_positions
        used.append(kwargs["position_ids"])
        if embeddings is not None:
            kwargs["inputs_embeds"] = torch.cat([kwargs["inputs_embeds"][:, :start], embeddings], dim=1)
        return args, kwargs

    features = joined([image.features for image in prompts.images])
    extras = {name: torch.cat([extra[name] for extra in prompts.extras]) for name in prompts.extras[0]}
    looked: list[bool] = []

    def handed_over(*_: Any, **__: Any) -> SimpleNamespace:
        looked.append(True)
        return SimpleNamespace(**features)

    hook = policy.decoder.register_forward_pre_hook(place, with_kwargs=True)
    policy.base.get_image_features = handed_over
    try:
        output = policy.base(
            **prompts.text,
            **extras,
            pixel_values=torch.zeros(1, device=policy.device),  # only its presence is looked at
            past_key_values=cache,
            use_cache=cache is not None,
        )
    finally:
        del policy.base.get_image_features  # the class's own again
        hook.remove()
    if not looked:
        raise ModelError(f"{policy.backbone.config.model_type} models do not ask for their image features by that name")
    positions = used[0] if used[0].ndim == 2 else used[0][-1]
    return output.last_hidden_state, positions


def prefill(policy: Policy, prompts: Prompts) -> Prefix:
    """Run the prompts, once, under whichever adapter is active; gradients flow if they are enabled."""
    cache = new_cache(policy)
    hidden, positions = read(policy, prompts, cache)
    return Prefix(cache, prompts.mask_BP, hidden[:, -1], positions[:, -1] + 1)


def extend(policy: Policy, prefix: Prefix, ids_BC: Tensor, mask: Tensor | None, first_position_B: Tensor) -> Tensor:
    """Hidden states [B, C, D] of more tokens after a prefix; the prefix's cache grows by them.

    To be called within `attending` to that cache.

    Args:
        prefix: what was run before.
        ids_BC: the tokens.
        mask: [B, cached + C], 1 at real tokens; None: a shared cache knows them.
        first_position_B: the position of each row's first new token.
    """
    positions = first_position_B[:, None] + torch.arange(ids_BC.shape[1], device=ids_BC.device)
    return policy.decoder(
        input_ids=ids_BC,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=prefix.cache,
        use_cache=True,
    ).last_hidden_state


def completion_hidden(policy: Policy, prompts: Prompts, ids_BC: Tensor, mask_BC: Tensor, role: Role | None) -> Tensor:
    """Hidden states that predict each completion token, the prompt run once for all trajectories of its group.

    Args:
        prompts: B prompts.
        ids_BC: [B·N, C] completion token ids, the N of one prompt together, right-padded.
        mask_BC: True at completion tokens.
        role: whose adapter, or None for the reference.

    Returns:
        [completion tokens, D], row by row, aligned with `ids_BC[mask_BC]`.
    """
    if not policy.shares_prompts:
        return plain_completion_hidden(policy, prompts, ids_BC, mask_BC, role)
    with policy.acting_as(role), _recomputing(policy):
        prefix = prefill(policy, prompts)
        if policy.shares_attention:
            return _packed_hidden(policy, prefix, ids_BC, mask_BC)
        prefix = prefix.repeat(len(ids_BC) // len(prompts))
        # The last token is predicted, never read: its own hidden state predicts nothing that was sampled.
        mask = torch.cat([prefix.mask_BP, mask_BC[:, :-1].to(prefix.mask_BP.dtype)], dim=1)
        hidden = prefix.last_hidden_BD[:, None]
        if ids_BC.shape[1] > 1:
            hidden = torch.cat([hidden, extend(policy, prefix, ids_BC[:, :-1], mask, prefix.next_position_B)], dim=1)
    return hidden[mask_BC]


def _packed_hidden(policy: Policy, prefix: Prefix, ids_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """As `completion_hidden`: the completions of a prompt one behind another, kept apart by the attention mask.

    So the prompt's cache is neither repeated nor are completions padded to the longest. T: packed positions.
    """
    prompts, width = len(prefix.mask_BP), ids_BC.shape[1] - 1
    read_BX = mask_BC[:, 1:].reshape(prompts, -1)  # all but a completion's last token, which nothing follows
    order_BT = read_BX.logical_not().sort(dim=1, stable=True).indices[:, : int(read_BX.sum(1).max())]
    used_BT, row_BT, place_BT = read_BX.gather(1, order_BT), order_BT // max(width, 1), order_BT % max(width, 1)
    before = (row_BT[:, :, None] == row_BT[:, None]) & (place_BT[:, :, None] >= place_BT[:, None])
    seen = [prefix.mask_BP.bool()[:, None].expand(-1, order_BT.shape[1], -1), before & used_BT[:, None]]
    mask = torch.zeros((), dtype=policy.backbone.dtype, device=policy.device)
    mask = mask.masked_fill(~torch.cat(seen, 2)[:, None], torch.finfo(mask.dtype).min)
    table = prefix.last_hidden_BD
    if order_BT.shape[1]:
        hidden_BTD = policy.decoder(
            input_ids=ids_BC[:, :-1].reshape(prompts, -1).gather(1, order_BT),
            attention_mask=mask,
            position_ids=prefix.next_position_B[:, None] + place_BT,
            past_key_values=prefix.cache,
            use_cache=True,
        ).last_hidden_state
        table = torch.cat([table, hidden_BTD.flatten(0, 1)])
    # Where each token's predecessor stands in the table: the prompt's end, or its place in the pack.
    starts_B = prompts + order_BT.shape[1] * torch.arange(prompts, device=policy.device)
    packed_BX = torch.zeros_like(read_BX, dtype=torch.long).scatter_(
        1, order_BT, starts_B[:, None] + torch.arange(order_BT.shape[1], device=policy.device)
    )
    first = torch.arange(prompts, device=policy.device).repeat_interleave(len(ids_BC) // prompts)[:, None]
    return table[torch.cat([first, packed_BX.view(len(ids_BC), width)], 1)[mask_BC]]


def plain_completion_hidden(
    policy: Policy, prompts: Prompts, ids_BC: Tensor, mask_BC: Tensor, role: Role | None
) -> Tensor:
    """The same by the model's own forward pass over every whole sequence: slower, and right for any attention."""
    count = len(ids_BC) // len(prompts)
    whole = prompts[[row for row in range(len(prompts)) for _ in range(count)]]
    with policy.acting_as(role), _recomputing(policy):
        hidden, _ = read(policy, whole, written=(ids_BC[:, :-1], mask_BC[:, :-1]))
    return hidden[:, prompts.mask_BP.shape[1] - 1 :][mask_BC]


@contextmanager
def _recomputing(policy: Policy) -> Iterator[None]:
    """Forward passes inside keep each layer's input only, if gradients and checkpointing are on.

    transformers' own checkpointing turns the cache off, through which completions share their prompt.
    """
    layers = list(policy.decoder.layers) if policy.gradient_checkpointing and torch.is_grad_enabled() else []
    for index, layer in enumerate(layers):
        layer.forward = partial(_checkpointed, layer.forward, index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def new_cache(policy: Policy) -> DynamicCache:
    return DynamicCache(config=policy.backbone.config.get_text_config(decoder=True))


@torch.no_grad()
def can_share_attention(policy: Policy) -> bool:
    """Whether packed completions, and decoding from a shared cache, give what repeated caches give: tried out."""
    if any(type(layer) is not DynamicLayer for layer in new_cache(policy).layers):
        return False  # windows and states
    ids_BC = torch.arange(5, 21, device=policy.device).view(4, 4)  # two completions of each of two prompts
    prompts = ids_BC[::2]
    mask = torch.ones_like(prompts)
    mask[0, 0] = 0
    positions = mask.cumsum(1)

    def prefill() -> Prefix:
        cache = new_cache(policy)
        hidden = policy.decoder(
            input_ids=prompts, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return Prefix(cache, mask, hidden[:, -1], positions[:, -1] + 1)

    repeated, shared = prefill().repeat(2), prefill().repeat(2, room=3)
    whole = torch.cat([repeated.mask_BP, torch.ones_like(ids_BC)], 1)
    expected = extend(policy, repeated, ids_BC[:, :-1], whole[:, :-1], repeated.next_position_B)
    try:
        packed = _packed_hidden(policy, prefill(), ids_BC, torch.ones_like(ids_BC, dtype=torch.bool))
        steps = []
        with attending(policy.decoder, shared.cache):
            for t in range(3):
                steps.append(extend(policy, shared, ids_BC[:, t : t + 1], None, shared.next_position_B + t))
                shared.cache.advance()  # type: ignore[attr-defined]
    except torch.OutOfMemoryError:  # a RuntimeError too, and says nothing about the model
        raise
    except (RuntimeError, AssertionError):  # attention of another kind: shapes do not fit
        return False
    # Each layer rounds anew, and independent errors add up like the square root of their number. Measured in
    # bfloat16 on random models of 3 to 80 layers: 0.2 to 0.8 times eps times this root (0.008 to 0.04 of the norm);
    # if padding is seen, 0.19 of the norm and more. In float32 the sums within a product round as well.
    limit = max(1.5 * torch.finfo(policy.backbone.dtype).eps * len(policy.decoder.layers) ** 0.5, 1e-4)
    gaps = [packed.view(4, 4, -1)[:, 1:] - expected, torch.cat(steps, 1) - expected]
    return all(bool(gap.float().norm() < limit * expected.float().norm()) for gap in gaps)


@torch.no_grad()
def check_output_layer(policy: Policy) -> None:
    """Some models do more to their logits than the output layer does (caps, scales): refuse them."""
    ids = torch.tensor([[policy.end_tokens[0]]], device=policy.device)
    logits = policy.backbone(input_ids=ids).logits
    ours = policy.output_layer(policy.base(input_ids=ids).last_hidden_state)
    if not torch.allclose(logits.float(), ours.float(), atol=1e-3):
        kind = policy.backbone.config.model_type
        raise ModelError(f"{kind} models change their logits after the output layer, which is not supported")


def _checkpointed(
    forward: Callable[..., Tensor],
    index: int,
    hidden: Tensor,
    *args: Any,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Tensor:
    """A decoder layer's forward pass under activation checkpointing: computing it again leaves the cache as it was.

    What the backward pass would call holds the cache as it was before the layer, never what the layer made of it: that
    would hold the backward pass in turn, and a forward pass that is never followed by one would never be freed.
    """
    if past_key_values is None:
        return checkpoint(forward, hidden, *args, use_reentrant=False, **kwargs)
    before = copy.copy(past_key_values)
    before.layers = [*past_key_values.layers]

    def run(hidden: Tensor) -> tuple[Tensor, Any]:
        cache = copy.copy(before)
        cache.layers = [*before.layers]
        cache.layers[index] = copy.copy(before.layers[index])
        return forward(hidden, *args, past_key_values=cache, **kwargs), cache.layers[index]

    output, past_key_values.layers[index] = checkpoint(run, hidden, use_reentrant=False)  # type: ignore[misc]
    return output
