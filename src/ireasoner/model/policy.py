"""The backbone with its two LoRA adapters: encode images and prompts, hidden states under a role or the reference.

Any image-text-to-text model of transformers will do: prompts are read by the model's own forward pass on its own
processor's tensors, with the image features, once made, handed to it; completions go through its language model.

Shape suffixes: B prompts, N trajectories of each, P prompt positions (left-padded), C completion positions
(right-padded), D width.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ireasoner.method.types import ROLES, Role
from ireasoner.model.attention import attending
from ireasoner.model.backbone import (
    ModelError,
    language_targets,
    load_backbone,
    load_model_processor,
    module_name,
    resolve_device,
)
from ireasoner.model.inputs import EncodedImage, Prefix, Prompts, is_text, joined
from ireasoner.model.processors import SeenImage, render, scales_by_area
from ireasoner.training.config import Config

_INNER = ("last_hidden_state", "hidden_states", "attentions")  # of the vision tower: nothing reads them later


class Policy:
    """A frozen image-text-to-text backbone with a `proposer` and a `solver` adapter on its language model."""

    def __init__(
        self,
        model: str,
        *,
        lora_rank: int = 16,
        lora_alpha: int = 32,
        lora_targets: Sequence[str] = (),
        max_image_tokens: int | None = None,
        gradient_checkpointing: bool = False,
        dtype: str = "float32",
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        """Load `model` ('tiny', a folder or a hub id) and add fresh adapters (drawn from `seed`; their product is 0).

        Args:
            lora_targets: names of linear layers of the language model; empty: all that it has.
            gradient_checkpointing: keep only each layer's input for the backward pass and compute the rest again.

        Raises:
            ModelError: no such model, no vision, another architecture, or a LoRA target that matches nothing.
        """
        backbone = load_backbone(model, dtype, device)
        self.backbone: Any = backbone  # transformers annotates less than it offers
        self.base: Any = backbone.base_model  # all but the output layer
        self.decoder: Any = backbone.get_decoder()  # the language model
        self.device = torch.device(device)
        self.processor = load_model_processor(model, max_image_tokens)
        self.ignores_limit = max_image_tokens is not None and not scales_by_area(self.processor)
        self.targets = language_targets(backbone, lora_targets)
        config = LoraConfig(
            r=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=0.0,  # dropout in the update would train another policy than the one that sampled
            target_modules=self.targets,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(seed)
        with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 by a name that it has deprecated
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            self.model: PeftModel = get_peft_model(backbone, config, adapter_name=ROLES[0])  # type: ignore[assignment]
            self.model.add_adapter(ROLES[1], config)
        self.model.eval()  # no dropout anywhere, in sampling or in the update
        ends = backbone.generation_config.eos_token_id  # type: ignore[union-attr]
        ends = self.processor.tokenizer.eos_token_id if ends is None else ends
        self.end_tokens: tuple[int, ...] = tuple(ends) if isinstance(ends, list) else (ends,)
        pad = self.processor.tokenizer.pad_token_id
        self.pad_token: int = self.end_tokens[0] if pad is None else pad
        self.gradient_checkpointing = gradient_checkpointing
        # A cache that is only ever appended to may be shared by a prompt's completions with gradients; states that are
        # overwritten (linear attention, convolutions) may not.
        self.shares_prompts = all(isinstance(layer, DynamicLayer) for layer in self._cache().layers)
        self._check_output_layer()
        self.shares_attention = self._can_share_attention()

    @classmethod
    def from_config(cls, config: Config, device: str | None = None) -> Policy:
        """The policy of a run, adapters as they are at step 0; on the config's device if none is named.

        Raises:
            ModelError: as above, or a device that is not there.
        """
        return cls(
            config.model,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_targets=config.lora_targets,
            max_image_tokens=config.max_image_tokens,
            gradient_checkpointing=config.gradient_checkpointing,
            dtype=config.dtype,
            device=device or resolve_device(config.device),
            seed=config.seed,
        )

    # --- adapters ----------------------------------------------------------------------------------------------------

    @contextmanager
    def acting_as(self, role: Role | None) -> Iterator[None]:
        """Forward passes inside run under this role's adapter, or under none: the reference."""
        if role is None:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(role)
            yield

    def parameters(self, role: Role) -> dict[str, torch.nn.Parameter]:
        """A role's trainable tensors (float32), by name."""
        return {name: p for name, p in self.model.named_parameters() if f".{role}." in name}

    def describe(self) -> str:
        """What is trained, and a limit that has no effect, in a sentence."""
        pattern = re.compile(self.targets)
        layers = [n for n, m in self.model.named_modules() if "lora_A" in dict(m.named_children())]
        layers = [name.removeprefix("base_model.model.") for name in layers]
        kinds = sorted({match[1] for name in layers if (match := pattern.fullmatch(name))})
        count = sum(p.numel() for p in self.parameters("solver").values())
        tower = module_name(self.backbone, self.decoder)
        said = f"LoRA on {len(layers)} layers of {tower} ({', '.join(kinds)}): {count:,} parameters a role"
        if self.ignores_limit:
            said += "; max_image_tokens has no effect: the model's processor decides how many tokens an image takes"
        return said

    def save_adapters(self, folder: Path) -> None:
        """Write `folder/proposer` and `folder/solver` as PEFT does, for `PeftModel.from_pretrained`."""
        self.model.save_pretrained(folder, selected_adapters=list(ROLES), save_embedding_layers=False)  # type: ignore[arg-type]

    def load_adapters(self, folder: Path) -> None:
        """Read back what `save_adapters` wrote.

        Raises:
            ModelError: the adapters do not fit this backbone.
        """
        for role in ROLES:
            tensors = load_file(folder / role / "adapter_model.safetensors")
            expected = len(self.parameters(role))
            try:
                result = set_peft_model_state_dict(self.model, tensors, adapter_name=role)
            except RuntimeError as error:
                raise ModelError(f"the adapter in {folder / role} does not fit the model: {error}") from None
            if result.unexpected_keys or len(tensors) != expected:
                raise ModelError(f"the adapter in {folder / role} has {len(tensors)} tensors, the model {expected}")

    # --- encoding ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> list[EncodedImage]:
        """Each image through the processor and the vision tower, once, on its own: no other image changes anything."""
        wanted = inspect.signature(self.base.get_image_features).parameters
        encoded = []
        for image in images:
            seen = SeenImage(self.processor, image)
            inputs = seen.inputs(self.processor.image_token)
            tensors = {name: tensor.to(self.device) for name, tensor in inputs.items() if name in wanted}
            tensors["pixel_values"] = tensors["pixel_values"].to(self.backbone.dtype)
            output = self.base.get_image_features(**tensors, return_dict=True)
            features = {name: value for name, value in output.items() if name not in _INNER and value is not None}
            encoded.append(EncodedImage(seen, features))
        return encoded

    def prompts(self, images: Sequence[EncodedImage], messages: Sequence[list[dict[str, Any]]]) -> Prompts:
        """Chat messages, one image each, as left-padded prompts.

        Raises:
            ValueError: a prompt whose text holds image tokens of its own.
        """
        token = self.processor.image_token
        taken = inspect.signature(self.base.forward).parameters
        rendered = tuple(render(self.processor, chat) for chat in messages)
        texts, extras = [], []
        for image, text in zip(images, rendered, strict=True):
            if text.count(token) != 1:
                raise ValueError(f"a prompt must hold exactly one image, not {text.count(token)}")
            inputs = image.seen.inputs(text)
            texts.append({name: inputs[name][0] for name in inputs if is_text(name)})
            # Pixels were seen already; how large the image is may still decide on positions.
            extra = [n for n in inputs if n in taken and not is_text(n) and not n.startswith("pixel")]
            extras.append({name: inputs[name].to(self.device) for name in extra})
        padding = {"input_ids": self.pad_token}
        batch = {
            name: pad_sequence([text[name] for text in texts], True, padding.get(name, 0), padding_side="left").to(
                self.device
            )
            for name in texts[0]
        }
        return Prompts(rendered, batch, tuple(images), tuple(extras))

    def embed_texts(self, texts: Sequence[str], max_tokens: int) -> NDArray[np.float64]:
        """Normalised mean of the backbone's input embeddings of each text's tokens, no special tokens: [texts, D].

        An empty text is a row of zeros.
        """
        table = self.backbone.get_input_embeddings().weight
        rows = np.zeros((len(texts), table.shape[1]))
        for row, text in zip(rows, texts, strict=True):
            ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"][:max_tokens]
            if ids:
                mean = table[torch.tensor(ids, device=self.device)].detach().double().mean(0)
                row[:] = (mean / mean.norm()).cpu().numpy()
        return rows

    # --- forward passes ----------------------------------------------------------------------------------------------

    def output_layer(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] to logits [..., vocabulary]."""
        return self.backbone.get_output_embeddings()(hidden)

    def read(
        self, prompts: Prompts, cache: Cache | None = None, written: tuple[Tensor, Tensor] | None = None
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
            embeddings = self.backbone.get_input_embeddings()(ids_BC)
            # Nothing keeps a model from writing its image token; that must not be taken for the place of an image.
            signs = [*self.processor.image_token_ids, self.backbone.config.to_dict().get("image_token_id", -1)]
            is_image = torch.isin(ids_BC, torch.tensor(signs, device=self.device))
            prompts = prompts.followed_by(ids_BC.masked_fill(is_image, self.pad_token), mask_BC)
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

        hook = self.decoder.register_forward_pre_hook(place, with_kwargs=True)
        self.base.get_image_features = handed_over
        try:
            output = self.base(
                **prompts.text,
                **extras,
                pixel_values=torch.zeros(1, device=self.device),  # only its presence is looked at
                past_key_values=cache,
                use_cache=cache is not None,
            )
        finally:
            del self.base.get_image_features  # the class's own again
            hook.remove()
        if not looked:
            raise ModelError(
                f"{self.backbone.config.model_type} models do not ask for their image features by that name"
            )
        positions = used[0] if used[0].ndim == 2 else used[0][-1]
        return output.last_hidden_state, positions

    def prefill(self, prompts: Prompts) -> Prefix:
        """Run the prompts, once, under whichever adapter is active; gradients flow if they are enabled."""
        cache = self._cache()
        hidden, positions = self.read(prompts, cache)
        return Prefix(cache, prompts.mask_BP, hidden[:, -1], positions[:, -1] + 1)

    def extend(self, prefix: Prefix, ids_BC: Tensor, mask: Tensor | None, first_position_B: Tensor) -> Tensor:
        """Hidden states [B, C, D] of more tokens after a prefix; the prefix's cache grows by them.

        To be called within `attending` to that cache.

        Args:
            prefix: what was run before.
            ids_BC: the tokens.
            mask: [B, cached + C], 1 at real tokens; None: a shared cache knows them.
            first_position_B: the position of each row's first new token.
        """
        positions = first_position_B[:, None] + torch.arange(ids_BC.shape[1], device=ids_BC.device)
        return self.decoder(
            input_ids=ids_BC,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=prefix.cache,
            use_cache=True,
        ).last_hidden_state

    def completion_hidden(self, prompts: Prompts, ids_BC: Tensor, mask_BC: Tensor, role: Role | None) -> Tensor:
        """Hidden states that predict each completion token, the prompt run once for all trajectories of its group.

        Args:
            prompts: B prompts.
            ids_BC: [B·N, C] completion token ids, the N of one prompt together, right-padded.
            mask_BC: True at completion tokens.
            role: whose adapter, or None for the reference.

        Returns:
            [completion tokens, D], row by row, aligned with `ids_BC[mask_BC]`.
        """
        if not self.shares_prompts:
            return self.plain_completion_hidden(prompts, ids_BC, mask_BC, role)
        with self.acting_as(role), self._recomputing():
            prefix = self.prefill(prompts)
            if self.shares_attention:
                return self._packed_hidden(prefix, ids_BC, mask_BC)
            prefix = prefix.repeat(len(ids_BC) // len(prompts))
            # The last token is predicted, never read: its own hidden state predicts nothing that was sampled.
            mask = torch.cat([prefix.mask_BP, mask_BC[:, :-1].to(prefix.mask_BP.dtype)], dim=1)
            hidden = prefix.last_hidden_BD[:, None]
            if ids_BC.shape[1] > 1:
                hidden = torch.cat([hidden, self.extend(prefix, ids_BC[:, :-1], mask, prefix.next_position_B)], dim=1)
        return hidden[mask_BC]

    def _packed_hidden(self, prefix: Prefix, ids_BC: Tensor, mask_BC: Tensor) -> Tensor:
        """As `completion_hidden`: the completions of a prompt one behind another, kept apart by the attention mask.

        So the prompt's cache is neither repeated nor are completions padded to the longest. T: packed positions.
        """
        prompts, width = len(prefix.mask_BP), ids_BC.shape[1] - 1
        read_BX = mask_BC[:, 1:].reshape(prompts, -1)  # all but a completion's last token, which nothing follows
        order_BT = read_BX.logical_not().sort(dim=1, stable=True).indices[:, : int(read_BX.sum(1).max())]
        used_BT, row_BT, place_BT = read_BX.gather(1, order_BT), order_BT // max(width, 1), order_BT % max(width, 1)
        before = (row_BT[:, :, None] == row_BT[:, None]) & (place_BT[:, :, None] >= place_BT[:, None])
        seen = [prefix.mask_BP.bool()[:, None].expand(-1, order_BT.shape[1], -1), before & used_BT[:, None]]
        mask = torch.zeros((), dtype=self.backbone.dtype, device=self.device)
        mask = mask.masked_fill(~torch.cat(seen, 2)[:, None], torch.finfo(mask.dtype).min)
        table = prefix.last_hidden_BD
        if order_BT.shape[1]:
            hidden_BTD = self.decoder(
                input_ids=ids_BC[:, :-1].reshape(prompts, -1).gather(1, order_BT),
                attention_mask=mask,
                position_ids=prefix.next_position_B[:, None] + place_BT,
                past_key_values=prefix.cache,
                use_cache=True,
            ).last_hidden_state
            table = torch.cat([table, hidden_BTD.flatten(0, 1)])
        # Where each token's predecessor stands in the table: the prompt's end, or its place in the pack.
        starts_B = prompts + order_BT.shape[1] * torch.arange(prompts, device=self.device)
        packed_BX = torch.zeros_like(read_BX, dtype=torch.long).scatter_(
            1, order_BT, starts_B[:, None] + torch.arange(order_BT.shape[1], device=self.device)
        )
        first = torch.arange(prompts, device=self.device).repeat_interleave(len(ids_BC) // prompts)[:, None]
        return table[torch.cat([first, packed_BX.view(len(ids_BC), width)], 1)[mask_BC]]

    def plain_completion_hidden(self, prompts: Prompts, ids_BC: Tensor, mask_BC: Tensor, role: Role | None) -> Tensor:
        """The same by the model's own forward pass over every whole sequence: slower, and right for any attention."""
        count = len(ids_BC) // len(prompts)
        whole = prompts[[row for row in range(len(prompts)) for _ in range(count)]]
        with self.acting_as(role), self._recomputing():
            hidden, _ = self.read(whole, written=(ids_BC[:, :-1], mask_BC[:, :-1]))
        return hidden[:, prompts.mask_BP.shape[1] - 1 :][mask_BC]

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Forward passes inside keep each layer's input only, if gradients and checkpointing are on.

        transformers' own checkpointing turns the cache off, through which completions share their prompt.
        """
        layers = list(self.decoder.layers) if self.gradient_checkpointing and torch.is_grad_enabled() else []
        for index, layer in enumerate(layers):
            layer.forward = partial(_checkpointed, layer.forward, index)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward  # the class's own again

    def _cache(self) -> DynamicCache:
        return DynamicCache(config=self.backbone.config.get_text_config(decoder=True))

    @torch.no_grad()
    def _can_share_attention(self) -> bool:
        """Whether packed completions, and decoding from a shared cache, give what repeated caches give: tried out."""
        if any(type(layer) is not DynamicLayer for layer in self._cache().layers):
            return False  # windows and states
        ids_BC = torch.arange(5, 21, device=self.device).view(4, 4)  # two completions of each of two prompts
        prompts = ids_BC[::2]
        mask = torch.ones_like(prompts)
        mask[0, 0] = 0
        positions = mask.cumsum(1)

        def prefill() -> Prefix:
            cache = self._cache()
            hidden = self.decoder(
                input_ids=prompts, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state
            return Prefix(cache, mask, hidden[:, -1], positions[:, -1] + 1)

        repeated, shared = prefill().repeat(2), prefill().repeat(2, room=3)
        whole = torch.cat([repeated.mask_BP, torch.ones_like(ids_BC)], 1)
        expected = self.extend(repeated, ids_BC[:, :-1], whole[:, :-1], repeated.next_position_B)
        try:
            packed = self._packed_hidden(prefill(), ids_BC, torch.ones_like(ids_BC, dtype=torch.bool))
            steps = []
            with attending(self.decoder, shared.cache):
                for t in range(3):
                    steps.append(self.extend(shared, ids_BC[:, t : t + 1], None, shared.next_position_B + t))
                    shared.cache.advance()  # type: ignore[attr-defined]
        except torch.OutOfMemoryError:  # a RuntimeError too, and says nothing about the model
            raise
        except (RuntimeError, AssertionError):  # attention of another kind: shapes do not fit
            return False
        # Each layer rounds anew, and independent errors add up like the square root of their number. Measured in
        # bfloat16 on random models of 3 to 80 layers: 0.2 to 0.8 times eps times this root (0.008 to 0.04 of the norm);
        # if padding is seen, 0.19 of the norm and more. In float32 the sums within a product round as well.
        limit = max(1.5 * torch.finfo(self.backbone.dtype).eps * len(self.decoder.layers) ** 0.5, 1e-4)
        gaps = [packed.view(4, 4, -1)[:, 1:] - expected, torch.cat(steps, 1) - expected]
        return all(bool(gap.float().norm() < limit * expected.float().norm()) for gap in gaps)

    @torch.no_grad()
    def _check_output_layer(self) -> None:
        """Some models do more to their logits than the output layer does (caps, scales): refuse them."""
        ids = torch.tensor([[self.end_tokens[0]]], device=self.device)
        logits = self.backbone(input_ids=ids).logits
        ours = self.output_layer(self.base(input_ids=ids).last_hidden_state)
        if not torch.allclose(logits.float(), ours.float(), atol=1e-3):
            kind = self.backbone.config.model_type
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
