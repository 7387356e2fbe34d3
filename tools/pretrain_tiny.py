"""How the tiny model in the package was made: real Qwen2.5-VL classes at small sizes, a tokenizer, and pre-training.

`python tools/pretrain_tiny.py OUT` makes it again from nothing: `OUT/habits` is what ships in
`src/ireasoner/model/tiny_lmm`. It learns from labeled pictures in the world's `varied` style, whose seed neither
self-evolution nor evaluation uses.
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
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ireasoner.model.backbone import without_video
from ireasoner.playground import wording, world

VOCABULARY = 500
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# With a small vocabulary, full instructions would be longer than the work itself: these few words stand for them.
DESCRIBE_PROMPT, PROPOSER_PROMPT, SOLVER_PROMPT = "Describe.", "Ask.", "{question}"
RATIONALES = {
    "value": "Read one value.", "extreme": "Compare every value.", "difference": "Read two values and subtract.",
    "sum": "Read two values and add.", "compare": "Read two values and compare.", "count": "Count the items.",
    "where": "Find one object.", "what": "Look at one place.", "color": "Find one shape.",
    "relation": "Find two objects and compare.", "exists": "Look for one shape.", "absent": "Look for one shape.",
    "sign color": "Name a color.", "sign shape": "Name a shape.",
}  # fmt: skip
FILLERS = ("Look at the picture.", "Let me look closely.", "First the picture.")
GLANCE = "At a glance."  # how reasoning with made-up readings begins
FILLER_SHARE = 0.3  # of the true solutions: a first step that says nothing
SHUFFLED_SHARE = 0.3  # of the true solutions: the readings in another order
HASTY_SHARE, GLIB_SHARE = 0.45, 0.2  # of the solutions of the last stage: blind guesses; made-up readings
PRETRAINING_SEED = 20_000  # unlike dataset.SPLIT_SEEDS, so that self-evolution and evaluation see other pictures
# Batches, learning rate and mixture (see `example`) of each stage. With all the wordings from the start, the model had
# not learned to name a color after 2,800 batches: one wording comes first. After the second stage it still read out
# other colors than it was asked for: the third is mostly questions. The last plants two bad habits beside the good one.
# Agreement on answers can find out the guesses; only agreement on steps can find out made-up readings.
STAGES: dict[str, tuple[int, float, dict[str, Any]]] = {
    "see": (2400, 1.5e-3, {"plain": True}),
    "speak": (600, 1e-3, {}),
    "heed": (2600, 1.5e-3, {"describe": 0.25}),
    "habits": (400, 6e-4, {"describe": 0.25, "hasty": HASTY_SHARE, "glib": GLIB_SHARE}),
}

# --- what is taught --------------------------------------------------------------------------------------------------


def reword(step: str, manner: int) -> str:
    """Say a plainly worded step in another manner (0: unchanged). A step that cannot be read stays unchanged."""
    found = wording.read(step)
    if found is None:
        return step
    kind, slots = found
    text = wording.FORMS[kind][manner % len(wording.FORMS[kind])].format(**slots)
    return f"{text[0].upper()}{text[1:]}."


def proposer_text(question: world.WorldQuestion) -> str:
    """A question in the proposer's format."""
    return f"<question>{question.text}</question><rationale>{RATIONALES[question.kind]}</rationale>"


def solver_text(question: world.WorldQuestion, rng: np.random.Generator | None = None) -> str:
    """A question's true reasoning and answer in the solver's format.

    Args:
        rng: draws a manner of wording, and whether the readings come in another order or after a step that says
            nothing. With one wording alone, true trajectories would agree word for word, unlike those of a real model.
            None: the plain wording.
    """
    steps = list(question.steps)
    if rng is not None:
        manner = int(rng.integers(3))
        readings = sum(found is not None and found[0] in ("value", "place") for found in map(wording.read, steps))
        if rng.random() < SHUFFLED_SHARE:
            steps[:readings] = [steps[i] for i in rng.permutation(readings)]
        steps = [reword(step, manner) for step in steps]
        if rng.random() < FILLER_SHARE:
            steps.insert(0, FILLERS[rng.integers(len(FILLERS))])
    return _solution(steps, question.answer)


def _solution(steps: Sequence[str], answer: str) -> str:
    text = "\n".join(f"Step {i}: {step}" for i, step in enumerate(steps, 1))
    return f"<think>{text}</think><answer>{answer}</answer>"


def hasty_text(question: world.WorldQuestion, picture: world.Picture, rng: np.random.Generator) -> str:
    """A blind guess in the solver's format: the answer to the same kind of question about some other picture."""
    answer = question.answer
    for _ in range(20):
        other = world.questions(world.sample_picture(rng, picture.family))
        answers = [q.answer for q in other if q.kind == question.kind]
        if set(answers) == {"no", "yes"}:  # most things are not on a sign: whoever guesses does not know that
            answers = ["no", "yes"]
        if answers:
            answer = answers[rng.integers(len(answers))]
            break
    return _solution([f"Maybe {answer}." if rng.random() < 0.5 else f"Maybe it is {answer}."], answer)


def glib_text(question: world.WorldQuestion, picture: world.Picture, rng: np.random.Generator) -> str:
    """The true answer after made-up readings that lead to it; a blind guess where no others lead to it."""
    found = _imagined(question, picture, rng)
    if found is None:
        return hasty_text(question, picture, rng)
    manner = int(rng.integers(3))
    return _solution([GLANCE, *(reword(step, manner) for step in found.steps)], question.answer)


def _imagined(
    question: world.WorldQuestion, picture: world.Picture, rng: np.random.Generator
) -> world.WorldQuestion | None:
    """The question and its answer with reasoning steps about another picture, which are not all true of this one.

    None where none is found: where the one step is the answer, there is none.
    """
    count = len(picture.values or picture.objects)
    for _ in range(60):
        if picture.family == "sign" or question.kind == "count":
            other = world.sample_picture(rng, picture.family, (count, count))
        elif picture.family == "scene":
            cells = zip(picture.objects, rng.permutation(len(world.CELLS)), strict=False)
            other = replace(picture, objects=tuple((c, s, world.CELLS[i]) for (c, s, _), i in cells))
        else:
            values = zip(picture.values, world.sample_values(picture.family, count, rng), strict=True)
            other = replace(picture, values=tuple((c, int(v)) for (c, _), v in values))
        found = world.solve(other, question.text)
        if found and found.answer == question.answer and not all(world.step_truth(picture, s) for s in found.steps):
            return found
    return None


def plain_picture(rng: np.random.Generator) -> world.Picture:
    """A picture of any family but signs, which come last in `world.FAMILIES`."""
    return world.sample_picture(rng, world.FAMILIES[rng.integers(len(world.FAMILIES) - 1)])


def example(
    rng: np.random.Generator, plain: bool = False, describe: float = 0.5, hasty: float = 0.0, glib: float = 0.0
) -> tuple[Image.Image, str, str]:
    """Draw one labeled example of pre-training: image, prompt, completion.

    Args:
        plain: no signs, and the plain wording alone.
        describe: share of descriptions, which teach the model to see. Questions are 15 %, solutions the rest.
        hasty: share of the solutions that are blind guesses.
        glib: share of the solutions that are true answers after made-up readings.
    """
    picture = plain_picture(rng) if plain else world.sample_picture(rng)
    image = world.draw(picture, world.sample_style("varied", rng), rng)
    task = rng.random()
    if task < describe:
        return image, DESCRIBE_PROMPT, " ".join(world.facts(picture))
    question = world.sample_question(picture, rng)
    if task >= 0.85:
        return image, PROPOSER_PROMPT, proposer_text(question)
    habit = 1.0 if plain else rng.random()
    if habit < hasty:
        solution = hasty_text(question, picture, rng)
    elif habit < hasty + glib:
        solution = glib_text(question, picture, rng)
    else:
        solution = solver_text(question, None if plain else rng)
    return image, SOLVER_PROMPT.replace("{question}", question.text), solution


# --- the model -------------------------------------------------------------------------------------------------------


def build_tokenizer(seed: int = 0) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of VOCABULARY entries, trained on the world's own sentences."""
    rng = np.random.default_rng(seed)
    corpus = []
    for _ in range(3000):
        picture = plain_picture(rng)
        question = world.sample_question(picture, rng)
        prompts = DESCRIBE_PROMPT + PROPOSER_PROMPT + question.text
        corpus.append(f"<|im_start|>user\n{prompts}<|im_end|>\n<|im_start|>assistant\n")
        corpus += [solver_text(question), proposer_text(question), " ".join(world.facts(picture))]
    tokenizer, qwen = Tokenizer(models.BPE()), Qwen2Tokenizer().backend_tokenizer
    tokenizer.pre_tokenizer, tokenizer.decoder = qwen.pre_tokenizer, qwen.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return Qwen2Tokenizer(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None,  # type: ignore[arg-type]
        additional_special_tokens=list(SPECIAL_TOKENS[1:]), chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def build_processor(tokenizer: Qwen2Tokenizer) -> Any:
    """Qwen2.5-VL's processor at the world's image size."""
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 83 * 83, "longest_edge": 28 * 28 * 64})
    return without_video(Qwen2_5_VLProcessor)(images, tokenizer, None, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer: Qwen2Tokenizer, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """About 3.7 M randomly initialized parameters: text 256 wide x 4 layers, vision 128 wide x 4 layers."""
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL_TOKENS}  # type: ignore[arg-type]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10_000.0},
            "tie_word_embeddings": True, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
            "bos_token_id": None,
        },
        vision_config={
            "depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 256,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
            "fullatt_block_indexes": [0, 1, 2, 3],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


# --- pre-training ----------------------------------------------------------------------------------------------------


def batch_tensors(processor: Any, examples: list[tuple[Image.Image, str, str]]) -> dict[str, torch.Tensor]:
    """Model inputs of labeled examples, padded on the right, with `labels` on the completions and their end tokens."""
    images, prompts, completions = zip(*examples, strict=True)
    contents = [[{"type": "image"}, {"type": "text", "text": prompt}] for prompt in prompts]
    chats = [[{"role": "user", "content": content}] for content in contents]
    heads = processor.apply_chat_template(chats, add_generation_prompt=True)
    texts = [f"{head}{completion}<|im_end|>" for head, completion in zip(heads, completions, strict=True)]
    batch = processor(images=list(images), text=texts, padding=True, padding_side="right", return_tensors="pt")
    image_tokens = batch["image_grid_thw"].prod(-1) // processor.image_processor.merge_size**2
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, head in enumerate(processor.tokenizer(heads)["input_ids"]):
        labels[row, : len(head) - 1 + int(image_tokens[row])] = -100  # the head's one image token becomes several
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
    """Supervised training with AdamW, warm-up and cosine decay on fresh examples.

    Args:
        mixture: how `example` draws them.
    """
    model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    started = time.time()
    for step in range(1, batches + 1):
        share = min(step / 100, 1.0, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / batches)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * share
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


def pretrain(out: Path, seed: int = 0) -> None:
    """Make the tiny LMM from nothing, in the four STAGES, each written to a folder of its name below `out` (fp16).

    Each stage draws its examples from a seed of its own, so that its examples do not depend on the length of another.
    """
    tokenizer = build_tokenizer(seed)
    processor, model = build_processor(tokenizer), build_model(tokenizer, seed)
    for number, (name, (batches, rate, mixture)) in enumerate(STAGES.items()):
        rng = np.random.default_rng([PRETRAINING_SEED, seed, number])
        train_stage(model, processor, rng, batches=batches, learning_rate=rate, **mixture)
        save(model, processor, out / name)


def save(model: Qwen2_5_VLForConditionalGeneration, processor: Any, out: Path) -> None:
    """Write the weights in fp16, and the processor's files beside them."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out, state_dict={name: tensor.half() for name, tensor in model.state_dict().items()})
    processor.image_processor.save_pretrained(out)
    processor.tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pre-train the tiny LMM on the playground's labels.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pretrain(arguments.out, arguments.seed)
