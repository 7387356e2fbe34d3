"""Where models come from: the backbone, its processor, its device, and the layers of it that can be adapted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from ireasoner.method.types import UsageError
from ireasoner.model.options import Quantization
from ireasoner.model.quantization import settings_for
from ireasoner.model.source import ModelError, Source, brief, find_model, with_weights

SHAPES = (1, 4 / 3, 3 / 2, 2, 3, 4, 6, 12)  # widths of images over their heights, or the other way round
LARGEST_TRIAL = 2**23  # pixels: more than the largest grid of tiles that processors cut, of 36 times 384 x 384


def read_config(model: str | Path | Source, revision: str | None = None) -> Any:
    """The model's config.json.

    Raises:
        ModelError: no such model, or one without vision.
    """
    source = find_model(model, revision)
    with _told(f"cannot load the model {str(model)!r}"):
        config = AutoConfig.from_pretrained(str(source.folder), trust_remote_code=False)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(f"{model} is a {config.model_type} model: a model for images and text is needed")
    return config


def load_backbone(
    model: str | Path | Source,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    revision: str | None = None,
    attention: str | None = None,
    quantization: Quantization | None = None,
    stays_in_files: bool = False,
) -> PreTrainedModel:
    """Load a model without adapters, frozen, in eval mode; from safetensors only, and without running code it brings.

    On a GPU its weights go there one after another, so that they never lie in the process's memory as a whole.

    Args:
        model: 'tiny', a folder or a hub id.
        dtype: of the weights.
        device: 'cpu', 'cuda' or 'cuda:N'.
        revision: a branch, tag or commit of a model on the hub; None: the newest.
        attention: transformers' name of a way to compute attention; None: its own choice.
        quantization: hold the linear layers of the language model in 4 or 8 bits.
        stays_in_files: leave the weights on the CPU, mapped from their files, for someone who moves them to the device
            in parts.

    Raises:
        ModelError: no such model, files that are damaged or incomplete, no vision, an architecture that does not
            continue its prompt, or attention or quantization that is not to be had here.
    """
    check_attention(attention, dtype, device)
    source = find_model(model, revision)
    config = read_config(source)
    with_weights(source)
    more: dict[str, Any] = {}
    if quantization:  # with a device map, or a GPU would be taken wherever there is one
        more = {"quantization_config": settings_for(quantization, dtype, config), "device_map": device}
    elif device != "cpu" and not stays_in_files:
        # On the CPU they are mapped from the file, and PEFT would take a device map as a wish to offload.
        more = {"device_map": device}
    with _told(f"cannot load the model {str(model)!r}", device):
        backbone, found = AutoModelForImageTextToText.from_pretrained(  # type: ignore[call-arg]
            str(source.folder),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below
            attn_implementation=attention,
            **more,
        )
    # What is missing or of another shape, transformers would have drawn at random.
    unfit = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if unfit:
        raise source.damaged(f"{len(unfit)} of its weights are missing or of another shape, such as {unfit[0]}")
    if source.commit is not None:
        backbone.name_or_path = source.name  # what PEFT writes beside an adapter, which may go to other machines
    if config.is_encoder_decoder or backbone.get_output_embeddings() is None:
        raise ModelError(f"{model} is a {config.model_type} model: one that continues its prompt is needed")
    if not hasattr(backbone.base_model, "get_image_features"):  # of whatever class the checkpoint names
        raise ModelError(f"{model} is a {config.model_type} model: one with image features in its prompt is needed")
    return backbone.requires_grad_(False).eval()


@contextmanager
def _told(problem: str, device: str = "cpu") -> Iterator[None]:
    """Turn whatever transformers raises while it reads a model's files into a `ModelError`.

    These files are the user's: each kind of damage to them ends in another exception, and hardly any is made for it.
    """
    try:
        yield
    except UsageError:
        raise
    except torch.OutOfMemoryError:
        raise ModelError(f"{problem}: its weights do not fit in the free memory of {device}") from None
    except Exception as error:
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise ModelError(f"{problem}: {kind}{brief(error)}") from None


def without_video(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor class for images and text only: its processors of video and sound may be None.

    Most processors of vision-language models require a video processor, which requires torchvision. Images alone need
    neither.
    """

    class ImageTextProcessor(processor_class):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is None:
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    return ImageTextProcessor


def load_processor(
    model: str | Path | Source, max_image_tokens: int | None = None, *, revision: str | None = None
) -> Any:
    """Load the model's processor, without its video processor.

    The image processor is always the one on Pillow: it and torchvision's differ by up to 0.25 in pixel values, and a
    run must not depend on what happens to be installed.

    Args:
        model: 'tiny', a folder or a hub id.
        max_image_tokens: images are scaled down until they take at most so many tokens, if the model's processor
            scales images by area (Qwen's do; others fix the number, or cut tiles). The model's own limit holds as well.
        revision: as for `load_backbone`.

    Raises:
        ModelError: there is no processor that can be used, or it has no chat template, or it needs another package.
    """
    source = find_model(model, revision)
    folder = str(source.folder)
    with _told(f"cannot load the processor of {str(model)!r}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if type(config) not in PROCESSOR_MAPPING:
            raise ValueError(f"transformers has no processor for the model type {config.model_type!r}")
        processor_class = without_video(PROCESSOR_MAPPING[type(config)])  # type: ignore[arg-type]
        settings, _ = processor_class.get_processor_dict(folder)
        parts = {
            "image_processor": AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False),
            "tokenizer": AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        }
        arguments = [parts.get(name) for name in processor_class.get_attributes()]
        processor: Any = processor_class.from_args_and_dict(arguments, settings)
    if not any((source.folder / name).is_file() for name in processor.tokenizer.vocab_files_names.values()):
        raise source.damaged(f"{folder} has no tokenizer")  # transformers would make one without words
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if not processor.chat_template:
        raise ModelError(f"{model} has no chat template: an instruction-tuned model is needed")
    if max_image_tokens is not None and scales_by_area(processor):
        images = processor.image_processor
        size, limit = dict(images.size), max_image_tokens * (images.patch_size * images.merge_size) ** 2
        size["longest_edge"] = min(size["longest_edge"], limit)
        size["shortest_edge"] = min(size["shortest_edge"], size["longest_edge"])
        images.size = size
    return processor


def scales_by_area(processor: Any) -> bool:
    """Whether `max_image_tokens` has an effect: whether the edges in the processor's `size` are areas in pixels."""
    images = processor.image_processor
    return "merge_size" in images.to_dict() and "longest_edge" in dict(images.size)


def most_image_tokens(processor: Any, max_pixels: int, count: int = 1) -> int:
    """The most tokens that `count` images of at most `max_pixels` each take in a prompt.

    Where images are scaled by area, several together take as many as one (`processors.sharing_tokens`). Where the
    processor cuts tiles, that depends on the image's shape in a way of its own, so it is asked about images of many
    shapes.
    """
    images = processor.image_processor
    if scales_by_area(processor):
        return dict(images.size)["longest_edge"] // (images.patch_size * images.merge_size) ** 2
    pixels, found = min(max_pixels, LARGEST_TRIAL), 0
    for ratio in (*SHAPES, *(1 / ratio for ratio in SHAPES)):
        height = max(1, int((pixels / ratio) ** 0.5))
        image = Image.new("RGB", (max(1, pixels // height), height))
        read = processor(images=[image], text=[processor.image_token], add_special_tokens=False)
        found = max(found, len(read["input_ids"][0]))
    return found * count


def resolve_device(device: str) -> str:
    """The device that is meant; 'auto' is the first GPU if there is one, else the CPU.

    Raises:
        ModelError: no such device here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.cuda.device_count()
    here = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if device not in here:
        raise ModelError(f"torch sees no device {device!r} here: use auto or one of {', '.join(here)}")
    return device


def lacks_bfloat16(device: str) -> bool:
    """Whether this is a GPU from before compute capability 8.0 (V100, T4), which computes in float16 but emulates
    bfloat16."""
    if not device.startswith("cuda"):
        return False
    with torch.cuda.device(device):
        return not torch.cuda.is_bf16_supported(including_emulation=False)


def check_attention(attention: str | None, dtype: str, device: str) -> None:
    """Refuse flash attention where it cannot work, before anything is loaded.

    transformers would look for its kernels on the hub, and run them from there, if the package is missing.

    Raises:
        ModelError: the package, the device or the precision is missing.
    """
    if attention != "flash_attention_2":
        return
    problem = None
    if device == "cpu" or dtype not in ("float16", "bfloat16"):
        problem = f"works on a GPU in bfloat16 or float16, not in {dtype} on {device}"
    elif not is_flash_attn_2_available():
        problem = "needs the package flash-attn, which is not installed"
    if problem:
        raise ModelError(f"--attention flash_attention_2 {problem}: use sdpa or eager, or leave the option out")


def module_name(root: torch.nn.Module, module: torch.nn.Module) -> str:
    """The name of `module` below `root`."""
    return next(name for name, descendant in root.named_modules() if descendant is module)


def language_targets(backbone: PreTrainedModel, targets: Sequence[str] = ()) -> str:
    """A pattern for PEFT that matches linear layers of the language model, and nothing else.

    Args:
        targets: names of layers, or the ends of names; empty: all layers.

    Raises:
        ModelError: a target that matches nothing.
    """
    decoder = backbone.get_decoder()
    linear = [name for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)]
    layer_names = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ModelError(
                f"LoRA target {target!r} matches no linear layer of the language model; it has {', '.join(layer_names)}"
            )
    within = re.escape(module_name(backbone, decoder)) + r"\.(?:.*\.)?"
    return f"{within}({'|'.join(map(re.escape, targets or layer_names))})"
