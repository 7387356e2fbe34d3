"""Forward passes of a policy: prompts, and completions behind prompts that are computed once for their whole group.

README.md in this folder explains how completions share a prompt, why that is exact, and what happens where it is not.

Shape suffixes: B prompts, R rows, one for each completion (those of one prompt are neighbours), P prompt positions
(left-padded), C completion positions (right-padded), T packed positions, D width of the model.
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
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache

from ireasoner.method.types import Role
from ireasoner.model.attention import SharedCache
from ireasoner.model.inputs import Prompts, image_tokens, join_features
from ireasoner.model.policy import Policy
from ireasoner.model.source import ModelError

# By whether a prompt shows a video: what the model is given for its pixels, and what it asks for their features.
_PIXELS = {False: "pixel_values", True: "pixel_values_videos"}
_METHODS = {False: "get_image_features", True: "get_video_features"}


@dataclass
class Prefix:
    """Prompts after their forward pass: the cache, and what is needed to go on behind them."""

    cache: Cache
    mask_BP: Tensor
    last_hidden_BD: Tensor
    next_position_B: Tensor

    def select(self, rows: Tensor) -> Prefix:
        """Keep some of the rows, or repeat some of them. The cache is changed in place."""
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]  # works for every kind of cache layer
        return self._with_cache(self.cache, rows)

    def repeat(self, count: int) -> Prefix:
        """Copy every prompt's cache for `count` completions, neighbours together. Any kind of cache can be copied."""
        return self.select(self._repeated_rows(count))

    def share(self, count: int, *, room: int, fixed: bool = False) -> Prefix:
        """Keep every prompt's cache once, for `count` completions to decode from; for `SharedCache`, see there.

        Args:
            count: completions of each prompt, neighbours together.
            room: positions that a completion may take behind its prompt.
            fixed: every step is to be the same work on the same memory.
        """
        cache = SharedCache(self.cache, self.mask_BP, count, room, fixed)
        return self._with_cache(cache, self._repeated_rows(count))

    def _repeated_rows(self, count: int) -> Tensor:
        return torch.arange(len(self.mask_BP), device=self.mask_BP.device).repeat_interleave(count)

    def _with_cache(self, cache: Cache, rows: Tensor) -> Prefix:
        return Prefix(cache, self.mask_BP[rows], self.last_hidden_BD[rows], self.next_position_B[rows])


def new_cache(policy: Policy) -> DynamicCache:
    """An empty cache with the kinds of layers that the language model needs."""
    return DynamicCache(config=policy.backbone.config.get_text_config(decoder=True))


def run_backbone(
    policy: Policy, prompts: Prompts, cache: Cache | None = None, completions: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Run the model's own forward pass over prompts, with the image features that were computed before.

    Args:
        prompts: B prompts.
        cache: is filled, if given.
        completions: ids and mask [B, C] of right-padded completions that follow the prompts.

    Returns:
        Hidden states [B, P + C, D] under whichever adapter is active, and the text positions [B, P + C] that were used.
    """
    start, embeddings = prompts.mask_BP.shape[1], None
    if completions is not None:
        embeddings = policy.backbone.get_input_embeddings()(completions[0])
        prompts = prompts.followed_by(_without_image_tokens(policy, completions[0]), completions[1])
    text_positions = (prompts.mask_BP.cumsum(-1) - 1).clamp(min=0)
    positions_used: list[Tensor] = []

    def before_decoder(decoder: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # Models with positions of several dimensions (M-RoPE) have computed them from the mask by now. The others
        # would count padding, and a token's position would depend on what else is in its batch.
        if kwargs.get("position_ids") is None or kwargs["position_ids"].ndim == 2:
            kwargs["position_ids"] = text_positions
        positions_used.append(kwargs["position_ids"])
        if embeddings is not None:  # of the completions as they are, image tokens among them
            kwargs["inputs_embeds"] = torch.cat([kwargs["inputs_embeds"][:, :start], embeddings], dim=1)
        return args, kwargs

    hook = policy.decoder.register_forward_pre_hook(before_decoder, with_kwargs=True)
    try:
        with _features_at_hand(policy, prompts):
            extras = dict.fromkeys(name for image in prompts.images for name in image.extras)
            output = policy.base(
                **prompts.text,
                **{n: torch.cat([i.extras[n] for i in prompts.images if n in i.extras]) for n in extras},
                # Models only look whether there are any.
                **{_PIXELS[i.seen.is_video]: torch.zeros(1, device=policy.device) for i in prompts.images},
                past_key_values=cache,
                use_cache=cache is not None,
            )
    finally:
        hook.remove()
    positions = positions_used[0]
    return output.last_hidden_state, positions if positions.ndim == 2 else positions[-1]  # in text, all are the same


def _without_image_tokens(policy: Policy, ids_BC: Tensor) -> Tensor:
    """Completion tokens with padding in place of image tokens, which a model may write: no image belongs there."""
    return ids_BC.masked_fill(torch.isin(ids_BC, image_tokens(policy)), policy.pad_token)


@contextmanager
def _features_at_hand(policy: Policy, prompts: Prompts) -> Iterator[None]:
    """Let the model's `get_image_features` return the features of these prompts, so that no image is seen twice.

    Those of videos are returned by `get_video_features`.

    Raises:
        ModelError: the model's forward pass did not call it.
    """
    calls: list[str] = []
    methods = {_METHODS[image.seen.is_video]: image.seen.is_video for image in prompts.images}

    def at_hand(name: str, is_video: bool) -> Callable[..., SimpleNamespace]:
        features = join_features([i.features for i in prompts.images if i.seen.is_video == is_video])

        def features_at_hand(*_: Any, **__: Any) -> SimpleNamespace:
            calls.append(name)
            return SimpleNamespace(**features)

        return features_at_hand

    for name, is_video in methods.items():
        setattr(policy.base, name, at_hand(name, is_video))  # an attribute of the instance hides the class's method
    try:
        yield
    finally:
        for name in methods:
            delattr(policy.base, name)
    if set(calls) != set(methods):
        raise ModelError(f"{policy.backbone.config.model_type} models do not ask for their image features by that name")


def prefill(policy: Policy, prompts: Prompts) -> Prefix:
    """Run the prompts, once, under whichever adapter is active. Gradients flow if they are enabled."""
    cache = new_cache(policy)
    hidden, positions = run_backbone(policy, prompts, cache)
    return Prefix(cache, prompts.mask_BP, hidden[:, -1], positions[:, -1] + 1)


def prefill_text(policy: Policy, ids_BP: Tensor, mask_BP: Tensor) -> Prefix:
    """As `prefill`, for left-padded prompts of text alone."""
    cache, positions_BP = new_cache(policy), mask_BP.cumsum(1)
    hidden = run_decoder(policy, cache, ids_BP, mask_BP, positions_BP)
    return Prefix(cache, mask_BP, hidden[:, -1], positions_BP[:, -1] + 1)


def run_decoder(policy: Policy, cache: Cache, ids_RC: Tensor, mask: Tensor | None, positions_RC: Tensor) -> Tensor:
    """Run more tokens through the language model, behind those in a cache, which grows by them.

    Args:
        policy: under whichever adapter is active.
        cache: of R rows. If it is a `SharedCache`, this must be called within `attending` to it.
        ids_RC: the tokens.
        mask: [R, cached + C], 1 at real tokens, or [R, 1, C, cached + C], to be added to the attention scores. None:
            the cache is a `SharedCache`, which knows what is padding.
        positions_RC: the tokens' positions in the text.

    Returns:
        Hidden states [R, C, D].
    """
    return policy.decoder(
        input_ids=ids_RC, attention_mask=mask, position_ids=positions_RC, past_key_values=cache, use_cache=True
    ).last_hidden_state


def decode(policy: Policy, prefix: Prefix, ids_R: Tensor) -> Tensor:
    """Run one more token of each row behind its prefix, which grows by it in place.

    If the prefix has a `SharedCache`, this must be called within `attending` to it. The step is then the same work on
    the same memory every time, if the cache is `fixed`.

    Returns:
        Hidden states [R, D].
    """
    cache, positions_RC = prefix.cache, prefix.next_position_B[:, None]
    if isinstance(cache, SharedCache):
        hidden = run_decoder(policy, cache, ids_R[:, None], None, positions_RC)
        cache.advance()
    else:
        prefix.mask_BP = torch.cat([prefix.mask_BP, prefix.mask_BP.new_ones(len(ids_R), 1)], dim=1)
        hidden = run_decoder(policy, cache, ids_R[:, None], prefix.mask_BP, positions_RC)
    prefix.next_position_B.add_(1)
    return hidden[:, 0]


def completion_hidden(policy: Policy, prompts: Prompts, ids_RC: Tensor, mask_RC: Tensor, role: Role | None) -> Tensor:
    """Hidden states that predict each completion token. Each prompt is run once for all of its completions.

    Args:
        prompts: B prompts.
        ids_RC: completion token ids, the same number for each prompt, right-padded to the longest.
        mask_RC: True at completion tokens.
        role: whose adapter; None: the reference.

    Returns:
        [completion tokens, D], row by row, aligned with `ids_RC[mask_RC]`.
    """
    if not policy.shares_prompts:
        return plain_completion_hidden(policy, prompts, ids_RC, mask_RC, role)
    if policy.is_sharded and mask_RC.shape[1] == 1:  # every micro-batch must make the same passes: here two
        ids_RC, mask_RC = (pad(each, (0, 1)) for each in (ids_RC, mask_RC))
    count = len(ids_RC) // len(prompts)
    with policy.acting_as(role), _recomputing(policy):
        prefix = prefill(policy, prompts)
        # The prompt's last token predicts the first completion token, and each token the one behind it. The last one
        # predicts nothing that was sampled, and is not run.
        hidden = [prefix.last_hidden_BD.repeat_interleave(count, dim=0)[:, None]]
        if mask_RC.shape[1] > 1:
            run = packed_hidden if policy.shares_attention else repeated_hidden
            hidden.append(run(policy, prefix, ids_RC[:, :-1], mask_RC[:, 1:]))
    return torch.cat(hidden, dim=1)[mask_RC]


def idle_hidden(policy: Policy, role: Role | None) -> Tensor:
    """Make the passes of `completion_hidden`, the same in number and order, on two tokens that mean nothing.

    For a process that has no completions left while others, which share the decoder layers with it, have some.

    Returns:
        [1, tokens, D], which depends on the last layer of each pass.
    """
    ids = torch.full((1, 1), policy.pad_token, device=policy.device)
    mask = torch.ones_like(ids)
    with policy.acting_as(role):
        if not policy.shares_prompts:
            return policy.decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        prefix = prefill_text(policy, ids, mask)
        run = packed_hidden if policy.shares_attention else repeated_hidden
        return torch.cat([prefix.last_hidden_BD[:, None], run(policy, prefix, ids, mask.bool())], dim=1)


def repeated_hidden(policy: Policy, prefix: Prefix, ids_RC: Tensor, mask_RC: Tensor) -> Tensor:
    """As `packed_hidden`, with a copy of the prompt's cache for each completion."""
    prefix = prefix.repeat(len(ids_RC) // len(prefix.mask_BP))
    mask = torch.cat([prefix.mask_BP, mask_RC.to(prefix.mask_BP.dtype)], dim=1)
    positions_RC = prefix.next_position_B[:, None] + torch.arange(ids_RC.shape[1], device=ids_RC.device)
    return run_decoder(policy, prefix.cache, ids_RC, mask, positions_RC)


def packed_hidden(policy: Policy, prefix: Prefix, ids_RC: Tensor, mask_RC: Tensor) -> Tensor:
    """Run completions behind their prompts, all of one prompt one after another in a single row.

    So the prompt's cache is not repeated, and completions are not padded to the longest. The attention mask keeps them
    apart: a token sees its prompt and the earlier tokens of its own completion.

    Args:
        prefix: B prompts.
        ids_RC: the tokens.
        mask_RC: True at those that are to be run; where there are none, one place is run for nothing.

    Returns:
        Hidden states [R, C, D]; 0 where `mask_RC` is False.
    """
    prompts, longest = len(prefix.mask_BP), ids_RC.shape[1]
    # A prompt's completions as one line of places; real tokens are sorted to its front, which keeps their order, and
    # the padding behind the longest line is cut off.
    real = mask_RC.reshape(prompts, -1)
    place_BT = real.logical_not().sort(dim=1, stable=True).indices[:, : max(1, int(real.sum(1).max()))]
    real_BT = real.gather(1, place_BT)
    completion_BT, offset_BT = place_BT // longest, place_BT % longest
    same_BTT = completion_BT[:, :, None] == completion_BT[:, None]
    earlier_BTT = offset_BT[:, :, None] >= offset_BT[:, None]
    prompt_BTP = prefix.mask_BP.bool()[:, None].expand(-1, place_BT.shape[1], -1)
    # Padding at the end of a shorter line is hidden as a key; what it becomes as a query is not used.
    visible = torch.cat([prompt_BTP, same_BTT & earlier_BTT & real_BT[:, None]], dim=2)[:, None]
    # Four dimensions and ready to be added to the scores: transformers would make a mask of two causal over the whole
    # line, and a completion would see those before it.
    mask = torch.zeros((), dtype=policy.backbone.dtype, device=policy.device)
    mask = mask.masked_fill(~visible, torch.finfo(mask.dtype).min)
    ids_BT = ids_RC.reshape(prompts, -1).gather(1, place_BT)
    # Positions count from the prompt's end in each completion, as if it were alone.
    hidden_BTD = run_decoder(policy, prefix.cache, ids_BT, mask, prefix.next_position_B[:, None] + offset_BT)
    hidden_RCD = hidden_BTD.new_zeros(*ids_RC.shape, hidden_BTD.shape[-1])
    hidden_RCD[mask_RC] = hidden_BTD[real_BT]  # both in the same order: prompt, completion, offset
    return hidden_RCD


def plain_completion_hidden(
    policy: Policy, prompts: Prompts, ids_RC: Tensor, mask_RC: Tensor, role: Role | None
) -> Tensor:
    """As `completion_hidden`, by the model's own forward pass over whole sequences: slower, right for any model."""
    count = len(ids_RC) // len(prompts)
    whole = prompts[[row for row in range(len(prompts)) for _ in range(count)]]
    with policy.acting_as(role), _recomputing(policy):
        # As in `completion_hidden`, the last token is not run; the prompt's last position predicts the first token.
        hidden, _ = run_backbone(policy, whole, completions=(ids_RC[:, :-1], mask_RC[:, :-1]))
    return hidden[:, prompts.mask_BP.shape[1] - 1 :][mask_RC]


@contextmanager
def _recomputing(policy: Policy) -> Iterator[None]:
    """Inside, the language model's layers are checkpointed, if the policy says so and gradients are enabled.

    transformers' own checkpointing cannot be used: it turns off the cache, through which completions see their prompt.
    """
    layers = list(policy.decoder.layers) if policy.gradient_checkpointing and torch.is_grad_enabled() else []
    for index, layer in enumerate(layers):
        layer.forward = partial(_checkpointed, layer.forward, index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own method shows again


def _checkpointed(
    forward: Callable[..., Tensor], index: int, hidden: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
) -> Tensor:
    """The forward pass of the decoder layer with this index, under activation checkpointing.

    The layer runs again in the backward pass and must find the cache as it was: with keys and values added twice, it
    would attend to too much. So each run works on a copy of the cache from before the layer, and only the first run's
    cache layer is put into the real one. `run` keeps no reference to the real cache: that holds what the layer made,
    which holds the graph, which holds `run`, and such a circle is not freed when no backward pass comes.
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
