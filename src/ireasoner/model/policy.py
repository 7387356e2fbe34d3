"""A policy: the frozen backbone with a `proposer` and a `solver` adapter on its language model.

Any image-text-to-text model of transformers will do. `loading` makes a policy, `inputs` turns images and messages into
what it reads, `forward` runs it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import Tensor

from ireasoner.method.types import ROLES, Role
from ireasoner.model.backbone import module_name, scales_by_area
from ireasoner.model.footprint import Footprint
from ireasoner.model.lora import linear_in_float32
from ireasoner.model.options import Quantization
from ireasoner.model.parallel import ALONE, Processes
from ireasoner.model.source import ModelError


class Policy:
    """The parts of a loaded model, made by `ireasoner.model.loading`.

    Args:
        backbone: the model of transformers that `model` wraps.
        model: PEFT's model, with both adapters.
        processor: the one that belongs to the backbone.
        gradient_checkpointing: keep only each layer's input for the backward pass, and compute the rest again.
        quantization: how the linear layers of the language model are held; None: as all other weights.

    Attributes:
        shares_prompts: whether a prompt is run once for all of its completions in an update. README.md in this folder
            says for which models that is exact. False until `loading` has tried it out: not to share is always right.
        shares_attention: whether completions also share their prompt's cache in attention; only with `shares_prompts`.
        sharded_over: the processes among which the weights of the decoder layers are shared out (`sharding`), so that
            every pass through the language model is work of all of them. ALONE: this process has all weights.
        commit: the backbone's on the hub; None if it is not from there.
        footprint: the memory that it takes, as `ireasoner.model.counting` has counted it when it was loaded.
        sampling_bytes: most memory that sampling may take beside the weights; None: no limit is known. Requests that
            take more are sampled in several batches. Lowered where memory does not suffice.
        on_shortage: is told in a sentence where memory did not suffice and what was done instead.
    """

    def __init__(
        self,
        backbone: Any,
        model: PeftModel,
        processor: Any,
        gradient_checkpointing: bool = False,
        quantization: Quantization | None = None,
    ) -> None:
        self.backbone, self.model, self.processor = backbone, model, processor
        self.gradient_checkpointing = gradient_checkpointing
        self.quantization: Quantization | None = quantization
        self.base: Any = backbone.base_model  # all but the output layer
        self.decoder: Any = backbone.get_decoder()  # the language model
        self.device: torch.device = backbone.device
        ends = backbone.generation_config.eos_token_id
        ends = processor.tokenizer.eos_token_id if ends is None else ends
        self.end_tokens: tuple[int, ...] = tuple(ends) if isinstance(ends, list) else (ends,)
        pad = processor.tokenizer.pad_token_id
        self.pad_token: int = self.end_tokens[0] if pad is None else pad
        self.shares_prompts = self.shares_attention = False
        self.sharded_over: Processes = ALONE
        self.commit: str | None = None
        self.footprint: Footprint
        self.sampling_bytes: int | None = None
        self.on_shortage: Callable[[str], None] = partial(warnings.warn, stacklevel=2)

    @property
    def is_sharded(self) -> bool:
        """Whether other processes hold parts of the decoder layers."""
        return self.sharded_over.count > 1

    @contextmanager
    def acting_as(self, role: Role | None) -> Iterator[None]:
        """Run the forward passes inside under this role's adapter; None: under no adapter, as the reference."""
        if role is None:
            # Not by PEFT's `disable_adapter`, which asks all layers for their state and takes six times as long.
            tuner: Any = self.model.base_model  # which PyTorch's types take for a tensor
            tuner.disable_adapter_layers()
            try:
                yield
            finally:
                tuner.enable_adapter_layers()
        else:
            self.model.set_adapter(role)
            yield

    @contextmanager
    def without_sharing(self) -> Iterator[None]:
        """Inside, nothing of a prompt is shared by its completions: slower, and right for any model."""
        shares = self.shares_prompts, self.shares_attention
        self.shares_prompts = self.shares_attention = False
        try:
            yield
        finally:
            self.shares_prompts, self.shares_attention = shares

    @contextmanager
    def checkpointing(self, on: bool) -> Iterator[None]:
        """Inside, passes with gradients use gradient checkpointing or do not."""
        before, self.gradient_checkpointing = self.gradient_checkpointing, on
        try:
            yield
        finally:
            self.gradient_checkpointing = before

    def parameters(self, role: Role) -> dict[str, torch.nn.Parameter]:
        """A role's trainable tensors (float32), by name."""
        return {name: p for name, p in self.model.named_parameters() if f".{role}." in name}

    def output_layer(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] to logits [..., vocabulary], in float32 where the backbone is in half precision."""
        layer = self.backbone.get_output_embeddings()
        return (
            layer(hidden)
            if layer.weight.dtype == torch.float32
            else linear_in_float32(hidden, layer.weight, layer.bias)
        )

    def describe(self) -> str:
        """A sentence on what is trained, on experts that are not, on weights that are quantised, and on a limit of
        image tokens without effect.

        transformers keeps the experts of a mixture in one tensor for each product, and LoRA adapts linear layers. PEFT
        can adapt such tensors too (`target_parameters`), but adds the update to a copy of all weights in their own
        precision: in bfloat16, small updates would be lost, and the copy is as large as the layer.
        """
        parameters = self.parameters("solver")
        layers = [name.partition(".lora_A.")[0] for name in parameters if ".lora_A." in name]
        layer_names = sorted({name.rpartition(".")[2] for name in layers})
        sentence = (
            f"LoRA on {len(layers)} layers of {module_name(self.backbone, self.decoder)} ({', '.join(layer_names)}): "
            f"{sum(p.numel() for p in parameters.values()):,} parameters a role"
        )
        experts = [m for m in self.decoder.modules() if getattr(m, "num_experts", None)]
        frozen = [p for m in experts for p in m.parameters(recurse=False) if p.ndim == 3]
        if frozen:
            sentence += (
                f"; the experts ({sum(p.numel() for p in frozen):,} parameters) stay frozen, out of LoRA's reach"
            )
        if self.quantization:
            sentence += f"; the language model's linear layers are held in {self.quantization}"
        if not scales_by_area(self.processor):
            sentence += "; max_image_tokens has no effect: the model's processor decides how many tokens an image takes"
        return sentence

    def save_adapters(self, folder: Path) -> None:
        """Write `folder/proposer` and `folder/solver` as PEFT does, for `PeftModel.from_pretrained`."""
        self.model.save_pretrained(folder, selected_adapters=list(ROLES), save_embedding_layers=False)  # type: ignore[arg-type]

    def largest_lora_b(self, role: Role) -> float:
        """The largest entry of a role's matrices B, which start at 0: 0 means that the role is still the backbone."""
        entries = [p.detach().abs().amax() for name, p in self.parameters(role).items() if ".lora_B." in name]
        return torch.stack(entries).amax().item()

    def adapter_sha256(self, role: Role) -> str:
        """The SHA-256 of the file that `save_adapters` would write the tensors of a role to."""
        tensors = get_peft_model_state_dict(self.model, adapter_name=role, save_embedding_layers=False)
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return hashlib.sha256(serialized(on_cpu, {"format": "pt"})).hexdigest()

    def load_adapters(self, folder: Path, roles: Sequence[Role] = ROLES) -> None:
        """Read back what `save_adapters` wrote, for some roles or for all.

        Raises:
            ModelError: the adapters do not fit this backbone.
        """
        for role in roles:
            self.load_adapter(folder / role, role)

    def load_adapter(self, folder: Path, role: Role) -> None:
        """Read the adapter in a folder of PEFT's as that of a role.

        Raises:
            ModelError: it does not fit this backbone.
        """
        path = folder / "adapter_model.safetensors"
        try:
            if not path.is_file():  # opening a named pipe would wait for ever
                raise OSError(f"{path.name} is missing or is not a file")
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the adapter in {folder} cannot be read: {error}") from None
        expected = len(self.parameters(role))
        try:
            result = set_peft_model_state_dict(self.model, tensors, adapter_name=role)
        except RuntimeError as error:
            raise ModelError(f"the adapter in {folder} does not fit the model: {error}") from None
        if result.unexpected_keys or len(tensors) != expected:
            raise ModelError(f"the adapter in {folder} has {len(tensors)} tensors, the model {expected}")
