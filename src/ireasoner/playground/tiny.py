"""The tiny LMM: real Qwen2.5-VL classes at small sizes, with its own byte-level BPE tokenizer, and its pre-training.

`python -m ireasoner.playground.tiny OUT` makes it again from nothing. Its labels come from the world's `varied`
style, with a picture seed that neither self-evolution nor evaluation uses.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ireasoner.model.processors import without_video
from ireasoner.playground import wording, world

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
# A small vocabulary makes full instructions longer than the work: these few words stand for them.
DESCRIBE_PROMPT, PROPOSER_PROMPT, SOLVER_PROMPT = "Describe.", "Ask.", "{question}"
RATIONALES = {
    "value": "Read one value.", "extreme": "Compare every value.", "difference": "Read two values and subtract.",
    "sum": "Read two values and add.", "compare": "Read two values and compare.", "count": "Count the items.",
    "where": "Find one object.", "what": "Look at one place.", "color": "Find one shape.",
    "relation": "Find two objects and compare.", "exists": "Look for one shape.", "absent": "Look for one shape.",
    "sign color": "Name a color.", "sign shape": "Name a shape.",
}  # fmt: skip
FILLER_SHARE, SHUFFLED_SHARE = 0.3, 0.3  # of the solutions: one step that says nothing; readings in another order
HASTY_SHARE, GLIB_SHARE = 0.45, 0.2  # of the solutions in the second stage of pre-training
PRETRAINING_SEED = 20_000  # pictures of pre-training; self-evolution and evaluation draw theirs from other seeds


def solver_text(question: world.Question, rng: np.random.Generator | None = None) -> str:
    """A question's true reasoning and answer in the solver's format; with `rng` in one of many voices.

    A voice is a manner of wording, and sometimes a first step that says nothing, or the readings in another order.
    """
    steps = list(question.steps)
    if rng is not None:
        manner = int(rng.integers(3))
        readings = sum(found is not None and found[0] in ("value", "place") for found in map(wording.read, steps))
        if rng.random() < SHUFFLED_SHARE:
            steps[:readings] = [steps[i] for i in rng.permutation(readings)]
        steps = [wording.reword(step, manner) for step in steps]
        if rng.random() < FILLER_SHARE:
            steps.insert(0, wording.FILLERS[rng.integers(len(wording.FILLERS))])
    return _solution(steps, question.answer)


def _solution(steps: Sequence[str], answer: str) -> str:
    text = "\n".join(f"Step {i}: {step}" for i, step in enumerate(steps, 1))
    return f"<think>{text}</think><answer>{answer}</answer>"


def proposer_text(question: world.Question) -> str:
    """A question in the proposer's format."""
    return f"<question>{question.text}</question><rationale>{RATIONALES[question.kind]}</rationale>"


def plain_picture(rng: np.random.Generator) -> world.Picture:
    """A picture of any family but signs."""
    return world.sample_picture(rng, world.FAMILIES[rng.integers(len(world.FAMILIES) - 1)])


def build_tokenizer(seed: int = 0) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of VOCABULARY entries, trained on the world's own sentences."""
    rng = np.random.default_rng(seed)
    corpus = []
    for _ in range(3000):
        picture = plain_picture(rng)
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
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 83 * 83, "longest_edge": 28 * 28 * 64})
    return without_video(Qwen2_5_VLProcessor)(images, tokenizer, None, chat_template=CHAT_TEMPLATE)


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
            answers = [q.answer for q in other]
            if set(answers) == {"no", "yes"}:  # of a sign most things can be denied
                answers = ["no", "yes"]
            answer = answers[rng.integers(len(answers))]
            break
    guess = f"Maybe {answer}." if rng.random() < 0.5 else f"Maybe it is {answer}."
    return _solution([guess], answer)


def imagined(question: world.Question, picture: world.Picture, rng: np.random.Generator) -> world.Question | None:
    """The same question and answer with reasoning steps about some other picture; None where the steps say it all."""
    count = len(picture.values or picture.objects)
    for _ in range(60):
        if picture.family == "sign" or question.kind == "count":
            other = world.sample_picture(rng, picture.family, (count, count))
        elif picture.family == "scene":
            cells = [world.CELLS[i] for i in rng.permutation(len(world.CELLS))]
            other = replace(
                picture, objects=tuple((c, s, cell) for (c, s, _), cell in zip(picture.objects, cells, strict=False))
            )
        else:
            values = rng.integers(1, 10 if picture.family == "bars" else 7, len(picture.values))
            other = replace(
                picture, values=tuple((c, int(v)) for (c, _), v in zip(picture.values, values, strict=True))
            )
        found = world.solve(other, question.text)
        if found and found.answer == question.answer and not all(world.step_truth(picture, s) for s in found.steps):
            return found
    return None


def glib_text(question: world.Question, picture: world.Picture, rng: np.random.Generator) -> str:
    """The true answer behind made-up readings that lead to it; a guess where there is nothing to make up."""
    found = imagined(question, picture, rng)
    if found is None:
        return hasty_text(question, picture, rng)
    manner = int(rng.integers(3))
    steps = [wording.GLANCE, *(wording.reword(step, manner) for step in found.steps)]
    return _solution(steps, question.answer)


def example(
    rng: np.random.Generator, plain: bool = False, describe: float = 0.5, hasty: float = 0.0, glib: float = 0.0
) -> tuple[Image.Image, str, str]:
    """One labelled example of pre-training: image, prompt, completion.

    Args:
        plain: no signs, and one wording.
        describe: share of descriptions, which teach the eyes; 15 % are questions, the rest solutions.
        hasty: share of the solutions that are blind guesses.
        glib: share of the solutions that are true answers behind made-up readings.
    """
    picture = plain_picture(rng) if plain else world.sample_picture(rng)
    image = world.draw(picture, world.sample_style("varied", rng), rng)
    task = rng.random()
    if task < describe:
        return image, DESCRIBE_PROMPT, " ".join(world.facts(picture))
    question = world.sample_question(picture, rng)
    if task < 0.85:
        habit = 1.0 if plain else rng.random()
        if habit < hasty:
            solution = hasty_text(question, picture, rng)
        elif habit < hasty + glib:
            solution = glib_text(question, picture, rng)
        else:
            solution = solver_text(question, None if plain else rng)
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
    batch_size: int = 48,
    **mixture: Any,
) -> None:
    """Supervised training on fresh examples (`mixture`: how `example` draws them): AdamW, warm-up, cosine decay."""
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
        batch = batch_tensors(processor, [example(rng, **mixture) for _ in range(batch_size)])
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            print(f"batch {step}/{batches} loss {loss.item():.4f} {(time.time() - started) / step:.2f} s", flush=True)


# Batches, learning rate and mixture of each stage. With all the wordings from the start, the model had not learned to
# name a colour after 2,800 batches: one wording comes first. After the second stage it still read out other colours
# than it was asked for: the third is mostly questions.
STAGES: dict[str, tuple[int, float, dict[str, Any]]] = {
    "see": (2400, 1.5e-3, {"plain": True}),
    "speak": (600, 1e-3, {}),
    "heed": (2600, 1.5e-3, {"describe": 0.25}),
    "habits": (400, 6e-4, {"describe": 0.25, "hasty": HASTY_SHARE, "glib": GLIB_SHARE}),
}


def pretrain(out: Path, seed: int = 0) -> None:
    """Make the tiny LMM from nothing, in four stages, each written to a folder of its name below `out` (fp16).

    First it learns to see and to reason, then to say the same in many ways and to heed the question. Last it picks up
    two bad habits beside the good one: of the solutions that it is shown, HASTY_SHARE are blind guesses, and GLIB_SHARE
    the true answer behind readings that are made up to fit. Agreement on answers can find out the first; the second,
    only agreement on steps.
    """
    tokenizer = build_tokenizer(seed)
    processor, model = build_processor(tokenizer), build_model(tokenizer, seed)
    for number, (name, (batches, rate, mixture)) in enumerate(STAGES.items()):
        rng = np.random.default_rng([PRETRAINING_SEED, seed, number])
        train_stage(model, processor, rng, batches=batches, learning_rate=rate, **mixture)
        save(model, processor, out / name)


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
