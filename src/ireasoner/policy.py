"""The backbone with its two LoRA adapters: encode images and prompts, hidden states under a role or the reference.

Shape suffixes: B prompts, N trajectories of each, P prompt positions (left-padded), C completion positions
(right-padded), D width.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, Cache, DynamicCache, Qwen2_5_VLForConditionalGeneration

from ireasoner.config import Config
from ireasoner.processors import load_processor
from ireasoner.types import ROLES, Role, UsageError

TINY_MODEL = Path(__file__).parent / "playground" / "tiny_lmm"


class ModelError(UsageError):
    """The model cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class EncodedImages:
    """What the frozen vision tower made of some images, once: features [tokens, D] and grids [3] by image."""

    features: tuple[Tensor, ...]
    grids: tuple[Tensor, ...]

    def __getitem__(self, index: Sequence[int]) -> EncodedImages:
        return EncodedImages(tuple(self.features[i] for i in index), tuple(self.grids[i] for i in index))


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts with the image features in place; the same for every adapter, since none touches them."""

    embeddings_BPD: Tensor
    mask_BP: Tensor
    positions_3BP: Tensor

    def __len__(self) -> int:
        return len(self.mask_BP)

    def __getitem__(self, rows: slice | list[int]) -> Prompts:
        return Prompts(self.embeddings_BPD[rows], self.mask_BP[rows], self.positions_3BP[:, rows])


@dataclass
class Prefix:
    """Prompts after the forward pass: their cache, and what the first completion token needs."""

    cache: Cache
    mask_BP: Tensor
    last_hidden_BD: Tensor
    next_position_B: Tensor

    def repeat(self, count: int) -> Prefix:
        """Every prompt `count` times over, neighbours together; the cache is expanded in place."""
        self.cache.batch_repeat_interleave(count)
        return Prefix(
            self.cache,
            self.mask_BP.repeat_interleave(count, 0),
            self.last_hidden_BD.repeat_interleave(count, 0),
            self.next_position_B.repeat_interleave(count, 0),
        )


class Policy:
    """A Qwen2.5-VL backbone, frozen, with a `proposer` and a `solver` adapter on its language model."""

    def __init__(
        self,
        model: str,
        *,
        lora_rank: int = 16,
        lora_alpha: int = 32,
        lora_targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        max_image_tokens: int | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        """Load `model` ('tiny', a folder or a hub id) and add fresh adapters (drawn from `seed`; their product is 0).

        Raises:
            ModelError: no such model, no vision, another architecture, or a LoRA target that matches nothing.
        """
        backbone = load_backbone(model, dtype, device)
        self.processor = _load_processor(model, max_image_tokens)
        config = LoraConfig(
            r=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=0.0,  # dropout in the update would train another policy than the one that sampled
            target_modules=language_targets(backbone, lora_targets),
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(seed)
        with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 by a name that it has deprecated
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            self.model: PeftModel = get_peft_model(backbone, config, adapter_name=ROLES[0])  # type: ignore[assignment]
            self.model.add_adapter(ROLES[1], config)
        self.model.eval()  # no dropout anywhere, in sampling or in the update
        self.backbone: Any = backbone  # transformers annotates less than it offers
        self.device = torch.device(device)
        self.end_token: int = self.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")  # type: ignore[assignment]
        self.pad_token: int = self.processor.tokenizer.pad_token_id  # type: ignore[assignment]

    @classmethod
    def from_config(cls, config: Config) -> Policy:
        """The policy of a run, adapters as they are at step 0.

        Raises:
            ModelError: as above, or a device that is not there.
        """
        return cls(
            config.model,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_targets=config.lora_targets,
            max_image_tokens=config.max_image_tokens,
            dtype=config.dtype,
            device=resolve_device(config.device),
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
    def encode_images(self, images: Sequence[Image.Image]) -> EncodedImages:
        """One processor call and one pass of the vision tower for all the images."""
        batch = self.processor.image_processor(list(images), return_tensors="pt").to(self.device)
        grids = batch["image_grid_thw"]
        output = self.backbone.model.get_image_features(batch["pixel_values"].to(self.backbone.dtype), grids)
        return EncodedImages(tuple(output.pooler_output), tuple(grids))

    def prompts(self, images: EncodedImages, messages: Sequence[list[dict[str, Any]]]) -> Prompts:
        """Chat messages, one image each, as left-padded embeddings with 3-D positions.

        Raises:
            ValueError: a prompt whose text holds image tokens of its own.
        """
        token = self.processor.image_token
        texts = []
        for features, chat in zip(images.features, messages, strict=True):
            text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
            if text.count(token) != 1:
                raise ValueError(f"a prompt must hold exactly one image, not {text.count(token)}")
            texts.append(text.replace(token, token * len(features)))
        batch = self.processor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").to(self.device)
        ids_BP, mask_BP = batch["input_ids"], batch["attention_mask"]
        is_image_BP = ids_BP == self.processor.image_token_id
        with torch.no_grad():
            embeddings = self.backbone.get_input_embeddings()(ids_BP)
            features = torch.cat(images.features).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(is_image_BP[..., None], features)
        # Explicit positions: without token types Qwen2.5-VL silently falls back to text-only ones.
        positions, _ = self.backbone.model.get_rope_index(
            ids_BP,
            mm_token_type_ids=is_image_BP.int(),
            image_grid_thw=torch.stack(images.grids),
            attention_mask=mask_BP,
        )
        return Prompts(embeddings, mask_BP, positions)

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

    def prefill(self, prompts: Prompts) -> Prefix:
        """Run the prompts, once, under whichever adapter is active; gradients flow if they are enabled."""
        output = self.backbone.model.language_model(
            inputs_embeds=prompts.embeddings_BPD,
            attention_mask=prompts.mask_BP,
            position_ids=prompts.positions_3BP,
            past_key_values=DynamicCache(config=self.backbone.config.text_config),
            use_cache=True,
        )
        return Prefix(
            output.past_key_values,
            prompts.mask_BP,
            output.last_hidden_state[:, -1],
            prompts.positions_3BP[0, :, -1] + 1,
        )

    def extend(self, prefix: Prefix, ids_BC: Tensor, mask: Tensor, first_position_B: Tensor) -> Tensor:
        """Hidden states [B, C, D] of more tokens after a prefix; the prefix's cache grows by them.

        Args:
            prefix: what was run before.
            ids_BC: the tokens.
            mask: [B, cached + C], 1 at real tokens.
            first_position_B: the position of each row's first new token.
        """
        positions = first_position_B[:, None] + torch.arange(ids_BC.shape[1], device=ids_BC.device)
        return self.backbone.model.language_model(
            inputs_embeds=self.backbone.get_input_embeddings()(ids_BC),
            attention_mask=mask,
            position_ids=positions.expand(3, -1, -1),
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
        with self.acting_as(role):
            prefix = self.prefill(prompts).repeat(len(ids_BC) // len(prompts))
            # The last token is predicted, never read: its own hidden state predicts nothing that was sampled.
            mask = torch.cat([prefix.mask_BP, mask_BC[:, :-1].to(prefix.mask_BP.dtype)], dim=1)
            hidden = prefix.last_hidden_BD[:, None]
            if ids_BC.shape[1] > 1:
                later = self.extend(prefix, ids_BC[:, :-1], mask, prefix.next_position_B)
                hidden = torch.cat([hidden, later], dim=1)
        return hidden[mask_BC]


def language_targets(backbone: torch.nn.Module, targets: Sequence[str]) -> str:
    """A pattern for PEFT that matches the named linear layers of the language model and of nothing else.

    Raises:
        ModelError: a target that matches nothing.
    """
    tower = r".*\blanguage_model\.(?:.*\.)?"
    linear = [name for name, module in backbone.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in targets:
        if not any(re.fullmatch(tower + re.escape(target), name) for name in linear):
            near = sorted({name.rsplit(".", 1)[-1] for name in linear if re.fullmatch(tower + ".*", name)})
            raise ModelError(
                f"LoRA target {target!r} matches no linear layer of the language model; it has {', '.join(near)}"
            )
    return f"{tower}({'|'.join(map(re.escape, targets))})"


def resolve_model(model: str) -> str:
    """'tiny' is the model that ships with the package; anything else is a folder or a hub id."""
    return str(TINY_MODEL) if model == "tiny" else model


def load_backbone(model: str, dtype: str = "float32", device: str = "cpu") -> Qwen2_5_VLForConditionalGeneration:
    """The plain model, frozen, in eval mode; safetensors only.

    Raises:
        ModelError: no such model, no vision, or an architecture other than Qwen2.5-VL's.
    """
    path = resolve_model(model)
    try:
        kind = AutoConfig.from_pretrained(path).model_type
        if kind != "qwen2_5_vl":
            raise ModelError(f"{model} is a {kind} model: a vision-language model of the Qwen2.5-VL class is needed")
        backbone = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the model {model!r}: {' '.join(str(error).split())[:300]}") from None
    return backbone.requires_grad_(False).eval().to(device)  # type: ignore[arg-type]


def _load_processor(model: str, max_image_tokens: int | None) -> Any:
    try:
        return load_processor(resolve_model(model), max_image_tokens)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the processor of {model!r}: {' '.join(str(error).split())[:300]}") from None


def resolve_device(device: str) -> str:
    """'auto' is the first GPU if there is one.

    Raises:
        ModelError: no such device here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise ModelError(f"no device {device!r}: use auto, cpu, cuda or cuda:N")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device {device} was asked for, but torch sees {torch.cuda.device_count()} GPUs: use --device cpu"
        )
    return device
