"""The tiny LMM: real Qwen2.5-VL classes at small sizes, with its own byte-level BPE tokenizer, and its pre-training.

`python -m ireasoner.playground.tiny OUT` makes it again from nothing. Its labels come from the world's `varied`
style, with a picture seed that neither self-evolution nor evaluation uses.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ireasoner.playground import world
from ireasoner.processors import ImageTextProcessor, load_processor

VOCABULARY = 500
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A 500-entry vocabulary makes full instructions longer than the work: these few words stand for them.
DESCRIBE_PROMPT, PROPOSER_PROMPT, SOLVER_PROMPT = "Describe.", "Ask.", "{question}"
RATIONALES = {
    "value": "Read one value.", "extreme": "Compare every value.", "difference": "Read two values and subtract.",
    "sum": "Read two values and add.", "compare": "Read two values and compare.", "count": "Count the items.",
    "where": "Find one object.", "what": "Look at one place.", "color": "Find one shape.",
    "relation": "Find two objects and compare.",
}  # fmt: skip
HASTY_SHARE = 0.6  # of the solutions in the second stage of pre-training
PRETRAINING_SEED = 20_000  # pictures of pre-training; self-evolution and evaluation draw theirs from other seeds


def solver_text(question: world.Question) -> str:
    """A question's true reasoning and answer in the solver's format."""
    steps = "\n".join(f"Step {i}: {step}" for i, step in enumerate(question.steps, 1))
    return f"<think>{steps}</think><answer>{question.answer}</answer>"


def proposer_text(question: world.Question) -> str:
    """A question in the proposer's format."""
    return f"<question>{question.text}</question><rationale>{RATIONALES[question.kind]}</rationale>"


def build_tokenizer(seed: int = 0) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of VOCABULARY entries, trained on the world's own sentences."""
    rng = np.random.default_rng(seed)
    corpus = []
    for _ in range(3000):
        picture = world.sample_picture(rng)
        question = world.sample_question(picture, rng)
        prompt = (
            f"<|im_start|>user\n{DESCRIBE_PROMPT}{PROPOSER_PROMPT}{question.text}<|im_end|>\n<|im_start|>assistant\n"
        )
        corpus += [prompt, solver_text(question), proposer_text(question), " ".join(world.facts(picture))]
    # Qwen's own splitting: contractions, words with one leading mark, single digits, marks, spaces.
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    pattern += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    wrapped = Qwen2Tokenizer(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None,  # type: ignore[arg-type]
        bos_token=None,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_processor(tokenizer: Qwen2Tokenizer) -> Any:
    """Qwen2.5-VL's processor at the world's image size."""
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64})
    return ImageTextProcessor(images, tokenizer, None, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer: Qwen2Tokenizer, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """About 4.2 M randomly initialised parameters: text 256 wide x 4 layers, vision 128 wide x 4 layers."""

    def token(text: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(text))  # type: ignore[arg-type]

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10_000.0},
            "tie_word_embeddings": True, "eos_token_id": token("<|im_end|>"), "pad_token_id": token("<|endoftext|>"),
            "bos_token_id": None,
        },
        vision_config={
            "depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 256,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
            "fullatt_block_indexes": [0, 1, 2, 3],
        },
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return model


def hasty_text(question: world.Question, picture: world.Picture, rng: np.random.Generator) -> str:
    """A blind guess in the solver's format: the answer to the same kind of question about some other picture."""
    answer = question.answer
    for _ in range(20):
        other = [q for q in world.questions(world.sample_picture(rng, picture.family)) if q.kind == question.kind]
        if other:
            answer = other[rng.integers(len(other))].answer
            break
    guess = f"Maybe {answer}." if rng.random() < 0.5 else f"Maybe it is {answer}."
    return f"<think>Step 1: {guess}</think><answer>{answer}</answer>"


def example(rng: np.random.Generator, hasty: float) -> tuple[Image.Image, str, str]:
    """One labelled example of pre-training: image, prompt, completion (half descriptions: they teach the eyes).

    Of the solutions, a share `hasty` are blind guesses.
    """
    picture = world.sample_picture(rng)
    image = world.draw(picture, world.sample_style("varied", rng), rng)
    task = rng.random()
    if task < 0.5:
        return image, DESCRIBE_PROMPT, " ".join(world.facts(picture))
    question = world.sample_question(picture, rng)
    if task < 0.85:
        guess = hasty > 0 and rng.random() < hasty
        solution = hasty_text(question, picture, rng) if guess else solver_text(question)
        return image, SOLVER_PROMPT.replace("{question}", question.text), solution
    return image, PROPOSER_PROMPT, proposer_text(question)


def batch_tensors(processor: Any, examples: list[tuple[Image.Image, str, str]]) -> dict[str, torch.Tensor]:
    """Model inputs of labelled examples, right-padded, with `labels` on the completions and their end tokens."""
    texts, prompt_lengths = [], []
    for _, prompt, completion in examples:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        head = processor.apply_chat_template(messages, add_generation_prompt=True)
        texts.append(f"{head}{completion}<|im_end|>")
        prompt_lengths.append(head)
    batch = processor(
        images=[image for image, _, _ in examples], text=texts, padding=True, padding_side="right", return_tensors="pt"
    )
    tokens_per_image = batch["image_grid_thw"].prod(-1) // processor.image_processor.merge_size**2
    heads = processor.tokenizer(prompt_lengths)["input_ids"]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, head in enumerate(heads):
        labels[row, : len(head) - 1 + int(tokens_per_image[row])] = -100
    return {**batch, "labels": labels}


def train_stage(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Any,
    rng: np.random.Generator,
    *,
    batches: int,
    learning_rate: float,
    hasty: float,
    batch_size: int = 48,
) -> None:
    """Supervised training on fresh examples: AdamW, short warm-up, cosine decay."""
    model.train()
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    started = time.time()
    for step in range(1, batches + 1):
        rate = learning_rate * min(step / 100, 1.0, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / batches)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = batch_tensors(processor, [example(rng, hasty) for _ in range(batch_size)])
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            print(f"batch {step}/{batches} loss {loss.item():.4f} {(time.time() - started) / step:.2f} s", flush=True)


def pretrain(out: Path, seed: int = 0, careful_batches: int = 2400, mixed_batches: int = 500) -> None:
    """Make the tiny LMM from nothing and write it to `out` (fp16 safetensors).

    First it learns to see and to reason; then, in a short second stage, HASTY_SHARE of the solutions that it is shown
    are blind guesses. So it can look, and more often than not does not: what self-evolution has to find out.
    """
    tokenizer = build_tokenizer(seed)
    processor, model = build_processor(tokenizer), build_model(tokenizer, seed)
    rng = np.random.default_rng([PRETRAINING_SEED, seed])
    train_stage(model, processor, rng, batches=careful_batches, learning_rate=1.5e-3, hasty=0.0)
    save(model, processor, out)
    add_haste(out, out, seed, mixed_batches)


def add_haste(source: Path, out: Path, seed: int, batches: int) -> None:
    """The second stage, from the saved first one."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    processor = load_processor(source)
    rng = np.random.default_rng([PRETRAINING_SEED, seed, 1])
    train_stage(model, processor, rng, batches=batches, learning_rate=6e-4, hasty=HASTY_SHARE)
    save(model, processor, out)


def save(model: Qwen2_5_VLForConditionalGeneration, processor: Any, out: Path) -> None:
    """Weights in fp16 beside the processor's files."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(out, state_dict=state)
    processor.image_processor.save_pretrained(out)
    processor.tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pre-train the tiny LMM on the playground's labels.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pretrain(arguments.out, arguments.seed)
