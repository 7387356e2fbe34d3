"""The merged export on llama.cpp: its own converter takes it, and what it makes of it writes what transformers writes.

`make test-gguf` brings a converter, a runtime and Qwen2.5's tokenizer, which is one that the converter knows.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig, Qwen2_5_VLConfig

from ireasoner.app.cli import main
from ireasoner.model.backbone import load_processor
from ireasoner.model.source import TINY_MODEL
from ireasoner.studies.doctor import fill_adapters
from models import load
from runs import new_run

LLAMA_CPP, TOKENIZER = (os.environ.get(f"IREASONER_{name}", "") for name in ("LLAMA_CPP", "TOKENIZER"))
pytestmark = pytest.mark.skipif(not (LLAMA_CPP and TOKENIZER), reason="needs llama.cpp: make test-gguf")
QUESTION = "Which bar is the tallest?"
LENGTH = 16


def make_base(out: Path) -> None:
    """A random model of the tiny one's size, under the real tokenizer, whose vision tower has windows as real ones."""
    shutil.copy(Path(TOKENIZER) / "tokenizer.json", out)
    settings = json.loads((Path(TOKENIZER) / "tokenizer_config.json").read_text("utf-8"))
    del settings["chat_template"]  # which knows no images
    (out / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    for name in ("preprocessor_config.json", "chat_template.jinja"):
        shutil.copy(TINY_MODEL / name, out)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    config: Any = Qwen2_5_VLConfig.from_pretrained(TINY_MODEL)
    for name, token in {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start"}.items():
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|{token}|>"))
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    text, vision = config.text_config, config.vision_config
    text.vocab_size, text.eos_token_id, text.bos_token_id, text.pad_token_id = 151936, end, pad, pad
    vision.fullatt_block_indexes = [vision.depth - 1]
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():  # large weights, so that what it writes depends on all of them
        if "embed_tokens" in name or "lm_head" in name:
            parameter.data.normal_(0, 0.3)
        elif parameter.ndim == 2:
            parameter.data.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    model.save_pretrained(out)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gguf")
    (place / "base").mkdir()
    make_base(place / "base")
    policy = load(str(place / "base"))
    fill_adapters(policy, 0.08, seed=1)
    new_run(place / "run", model=str(place / "base")).write_text("summary.json", "{}")
    policy.save_adapters(place / "run")
    assert main(["export", str(place / "run"), "--to", str(place / "merged"), "--merge"]) == 0
    return place / "merged"


def converted(merged: Path, name: str, *options: str) -> Path:
    script, out = Path(LLAMA_CPP) / "convert_hf_to_gguf.py", merged.parent / name
    command = [sys.executable, str(script), str(merged), "--outfile", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_the_converters_weights_are_the_exports(merged: Path):
    from gguf import GGUFReader  # pyright: ignore[reportMissingImports]

    found = {
        tensor.name: tensor.data for tensor in GGUFReader(converted(merged, "weights.gguf", "--outtype", "f32")).tensors
    }
    expected = {name.split("layers.")[-1]: tensor for name, tensor in load_file(merged / "model.safetensors").items()}
    for ours, theirs in {"mlp.up_proj": "ffn_up", "self_attn.o_proj": "attn_output"}.items():
        weight = expected[f"1.{ours}.weight"].numpy()
        assert (found[f"blk.1.{theirs}.weight"].reshape(weight.shape) == weight).all()


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_llama_cpp_writes_what_transformers_writes(merged: Path, pictures: list[Image.Image], kind: str):
    import xllamacpp  # pyright: ignore[reportMissingImports]

    image = pictures[0].resize((84, 84))
    processor = load_processor(merged)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    model: Any = AutoModelForImageTextToText.from_pretrained(merged).eval()
    options = {"do_sample": False, "max_new_tokens": LENGTH, "output_logits": True, "return_dict_in_generate": True}
    written = model.generate(**inputs, **options)
    ids = written.sequences[0, inputs["input_ids"].shape[1] :]
    expected = torch.stack([logits[0].log_softmax(-1) for logits in written.logits])

    params: Any = xllamacpp.CommonParams()
    params.model.path = str(converted(merged, f"{kind}.gguf", "--outtype", kind))
    params.mmproj.path = str(converted(merged, "mmproj.gguf", "--outtype", "f32", "--mmproj"))
    params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 1024, 1, False, 1
    png = io.BytesIO()
    image.save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    content[0] = {"type": "image_url", "image_url": {"url": url}}  # type: ignore[dict-item]
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": LENGTH, "temperature": 0}
    reply = xllamacpp.Server(params).handle_chat_completions({**asked, "logprobs": True, "top_logprobs": 1})
    (choice,) = reply["choices"]
    found = [token["logprob"] for token in choice["logprobs"]["content"]]
    if kind == "f32":
        assert choice["message"]["content"] == processor.tokenizer.decode(ids)
        torch.testing.assert_close(torch.tensor(found), expected.max(-1).values, atol=0.05, rtol=0)
    assert abs(found[0] - expected[0].max().item()) < 0.3
