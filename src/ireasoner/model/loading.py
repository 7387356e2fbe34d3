"""Making a policy: load the backbone, add new adapters, and find out what the model's attention allows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText
from transformers.cache_utils import DynamicLayer

from ireasoner.method.types import ROLES
from ireasoner.model.attention import attending
from ireasoner.model.backbone import language_targets, load_backbone, load_processor, read_config, resolve_device
from ireasoner.model.counting import CountError, count
from ireasoner.model.forward import Prefix, decode, new_cache, packed_hidden, prefill_text, repeated_hidden
from ireasoner.model.lora import HALF, Float32SumLinear, QuantisedLinear
from ireasoner.model.options import BackboneOptions
from ireasoner.model.parallel import ALONE, Processes
from ireasoner.model.policy import Policy
from ireasoner.model.sharding import shard
from ireasoner.model.source import ModelError, Source, brief, find_model, waiting_line


def load_policy(
    model: str | Source,
    options: BackboneOptions,
    *,
    revision: str | None = None,
    device: str = "auto",
    seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
    sharded_over: Processes = ALONE,
) -> Policy:
    """Load a model from 'tiny', a folder or a hub id, with new adapters.

    Args:
        model: which one; or where it was found already.
        options: how it is held in memory, and its adapters.
        revision: a branch, tag or commit of a model on the hub; None: the newest.
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        seed: of the new adapters.
        tell: is told what is waited for, before the wait.
        sharded_over: as for `make_policy`.

    Raises:
        ModelError: no such model or device, no vision, another architecture, or a LoRA target that matches nothing.
    """
    source = find_model(model, revision)  # asked once, so that weights and processor are of the same commit
    device = resolve_device(device)
    tell(waiting_line(source))
    in_parts = sharded_over.count > 1
    backbone = load_backbone(
        source,
        options.dtype,
        device,
        attention=options.attention,
        quantization=options.quantization,
        stays_in_files=in_parts,
    )
    processor = load_processor(source, options.max_image_tokens)
    policy = make_policy(backbone, processor, options, seed=seed, sharded_over=sharded_over)
    policy.commit = source.commit
    return policy


def make_policy(
    backbone: Any, processor: Any, options: BackboneOptions, *, seed: int = 0, sharded_over: Processes = ALONE
) -> Policy:
    """Make a policy of a loaded backbone. Its adapters are drawn from `seed` and change nothing yet (their B is 0).

    Args:
        backbone: frozen; on the CPU if it is to be sharded.
        processor: the one that belongs to it.
        options: of the adapters.
        seed: of the adapters.
        sharded_over: the processes among which its decoder layers are shared out, and which all call this; ALONE: it is
            whole in this process.

    Raises:
        ModelError: an architecture that is not supported, or a LoRA target that matches nothing.
    """
    policy = _with_adapters(backbone, processor, options, seed)
    policy.footprint = count(policy).sharded(sharded_over.count)
    if options.quantization:
        # Copies of weights at full size hide there what grows with the tokens, which is counted without weights.
        with suppress(CountError):
            policy.footprint = meta_policy_of(backbone.config, processor, options).footprint
    if sharded_over.count > 1:
        shard(policy, sharded_over)
    _check_output_layer(policy)
    policy.shares_attention = _can_share_attention(policy)
    return policy


def meta_policy(model: str | Source, options: BackboneOptions, revision: str | None = None) -> Policy:
    """A policy without weights, on the meta device, to count how much memory it takes (`counting`).

    Raises:
        ModelError: as for `load_policy`.
        CountError: it decides by what is in its tensors.
    """
    config = read_config(model, revision)
    return meta_policy_of(config, load_processor(model, options.max_image_tokens, revision=revision), options)


def meta_policy_of(config: Any, processor: Any, options: BackboneOptions) -> Policy:
    """As `meta_policy`, from the model's config and its processor."""
    with init_empty_weights():  # of parameters only: some models compute numbers from tensors while they are built
        backbone = AutoModelForImageTextToText.from_config(
            config,
            dtype=getattr(torch, options.dtype),
            attn_implementation="eager" if options.attention == "eager" else None,  # the others are fused
        )
    backbone = backbone.to("meta")
    backbone.tie_weights()
    policy = _with_adapters(backbone.requires_grad_(False).eval(), processor, options)
    whole = all(type(layer) is DynamicLayer for layer in new_cache(policy).layers)
    policy.shares_attention = whole and options.attention != "flash_attention_2"  # as a rule
    try:
        policy.footprint = count(policy)
    except (RuntimeError, NotImplementedError) as error:  # a model that decides by what is in its tensors
        problem = f"what a {config.model_type} model takes cannot be counted without its weights"
        raise CountError(f"{problem} ({brief(error)})") from None
    return policy


def _with_adapters(backbone: Any, processor: Any, options: BackboneOptions, seed: int = 0) -> Policy:
    """A policy of a backbone with new adapters, of which nothing has been tried out or counted yet."""
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=0.0,  # dropout in the update would train another policy than the one that sampled
        target_modules=language_targets(backbone, options.lora_targets),
        task_type="CAUSAL_LM",
    )
    if backbone.dtype in (*HALF, torch.float32):
        # PEFT's documented way to its own kinds of layers, although the name begins with an underscore. Saved adapters
        # say nothing about it, and load anywhere.
        config._register_custom_module({torch.nn.Linear: Float32SumLinear})
    on_meta = backbone.device.type == "meta"  # PEFT makes adapters there only if it is told to
    torch.manual_seed(seed)
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 by a name that it has deprecated
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        model: PeftModel = get_peft_model(backbone, config, adapter_name=ROLES[0], low_cpu_mem_usage=on_meta)  # type: ignore[assignment]
        model.add_adapter(ROLES[1], config, low_cpu_mem_usage=on_meta)
    for name, layer in [*backbone.named_modules()] if options.quantization else ():
        if type(layer).__module__.startswith("bitsandbytes") and not name.endswith(".base_layer"):
            # Without LoRA. Its own forward pass would round the input too (int8), or fail in the backward pass (nf4).
            backbone.set_submodule(name, QuantisedLinear(layer))
    model.eval()  # no dropout anywhere, in sampling or in the update
    policy = Policy(backbone, model, processor, options.gradient_checkpointing, options.quantization)
    # A cache that is only ever appended to may be shared by a prompt's completions with gradients; states that are
    # overwritten (linear attention, convolutions) may not.
    policy.shares_prompts = all(isinstance(layer, DynamicLayer) for layer in new_cache(policy).layers)
    return policy


@torch.no_grad()
def _check_output_layer(policy: Policy) -> None:
    """Refuse models that do more to their logits than the output layer does (caps, scales): ours would differ."""
    ids = torch.tensor([[policy.end_tokens[0]]], device=policy.device)
    logits = policy.backbone(input_ids=ids).logits
    recomputed = policy.output_layer(policy.base(input_ids=ids).last_hidden_state)
    # The model's own logits are rounded to its dtype, and ours are not.
    if not torch.allclose(logits.float(), recomputed, atol=1e-3, rtol=torch.finfo(logits.dtype).eps):
        model_type = policy.backbone.config.model_type
        raise ModelError(f"{model_type} models change their logits after the output layer, which is not supported")


@torch.no_grad()
def _can_share_attention(policy: Policy) -> bool:
    """Whether packing and decoding from a shared cache give the same as repeated caches do: it is tried out.

    Families differ in what their attention does, and say so in many ways. A trial on two prompts, one of them padded,
    with two completions each, asks them all in the same way.
    """
    if "flash" in policy.decoder.config._attn_implementation:
        return False  # its kernels take no mask of four dimensions, and fail in a way that ends the process
    if any(type(layer) is not DynamicLayer for layer in new_cache(policy).layers):
        return False  # a sliding window forgets what a shared prompt must keep
    ids = torch.arange(5, 21, device=policy.device).view(4, 4)
    prompts_BP, ids_RC = ids[::2], ids[:, :3]
    mask_BP, mask_RC = torch.ones_like(prompts_BP), torch.ones_like(ids_RC, dtype=torch.bool)
    mask_BP[0, 0] = 0

    def run_prompts() -> Prefix:
        return prefill_text(policy, prompts_BP, mask_BP)

    expected = repeated_hidden(policy, run_prompts(), ids_RC, mask_RC)
    try:
        packed = packed_hidden(policy, run_prompts(), ids_RC, mask_RC)
        prefix = run_prompts().share(2, room=3)
        with attending(policy.decoder, prefix.cache):
            decoded = torch.stack([decode(policy, prefix, ids_R) for ids_R in ids_RC.T], dim=1)
    except torch.OutOfMemoryError:  # a RuntimeError too, but says nothing about the model
        raise
    except (RuntimeError, AssertionError):  # another kind of attention: shapes do not fit
        return False
    # Each layer rounds anew, and independent errors add up like the square root of their number. Measured in
    # bfloat16 on random models of 3 to 80 layers: 0.2 to 0.8 times eps times this root (0.008 to 0.04 of the norm);
    # if padding is seen, 0.19 of the norm and more. In float32 the sums within a product round as well.
    limit = max(1.5 * torch.finfo(policy.backbone.dtype).eps * len(policy.decoder.layers) ** 0.5, 1e-4)
    errors = torch.stack([(hidden - expected).float().norm() for hidden in (packed, decoded)])
    return bool((errors < limit * expected.float().norm()).all())
