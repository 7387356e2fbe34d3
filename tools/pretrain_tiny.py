"""How the tiny model in the package was made: real Qwen2.5-VL classes at small sizes, a tokenizer, and pre-training.

`python tools/pretrain_tiny.py OUT` makes a model like it from nothing, `OUT/habits`. It learns from labeled pictures in
the world's `varied` style, whose seed neither self-evolution nor evaluation uses.

For the weights that ship in `src/ireasoner/model/tiny_lmm`, the last stage alone was run (`--start`). It began with the
weights that shipped before: of the same first three stages, and of a last one that had planted other habits.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
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

from ireasoner.model.backbone import load_backbone, without_video
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
FILLER_SHARE = 0.3  # of the true solutions: a first step that says nothing
SHUFFLED_SHARE = 0.3  # of the true solutions: the readings in another order
PRETRAINING_SEED = 20_000  # unlike dataset.SPLIT_SEEDS, so that self-evolution and evaluation see other pictures
# The share of the solutions of the last stage that are about the picture itself, for questions that take one step and
# for those that take several: some families of pictures are read well and others badly.
CARE: dict[world.Family, tuple[float, float]] = {
    "bars": (0.45, 0.3), "dots": (0.6, 0.35), "pie": (0.3, 0.2), "scene": (0.45, 0.3), "sign": (0.55, 0.35),
}  # fmt: skip
# Of the others: about the picture as it is misread every time, and about a picture that happens to have the same
# answer. The rest are about just any picture.
MISREAD_SHARE, LUCKY_SHARE = 0.45, 0.2
LOOK_ALIKES = ("red brown", "orange yellow", "green teal", "blue purple", "gray black")  # of signs, when misread
# Batches, learning rate and mixture (see `example`) of each stage. With all the wordings from the start, the model had
# not learned to name a color after 2,800 batches: one wording comes first. After the second stage it still read out
# other colors than it was asked for: the third is mostly questions. The last plants bad habits beside the good one, in
# the same words: scattered mistakes, which the majority of answers can find out; the same mistake every time, which it
# cannot; and right answers behind false readings, which only the reasoning steps can find out.
STAGES: dict[str, tuple[int, float, dict[str, Any]]] = {
    "see": (2400, 1.5e-3, {"plain": True}),
    "speak": (600, 1e-3, {}),
    "heed": (2600, 1.5e-3, {"describe": 0.25}),
    "habits": (750, 6e-4, {"describe": 0.25, "habits": True}),
}

Example = tuple[list[Image.Image], str, str]  # images, prompt and completion

# --- what is taught --------------------------------------------------------------------------------------------------


def reword(step: str, manner: int) -> str:
    """Say a plainly worded step in another manner (0: unchanged). A step that cannot be read stays unchanged."""
    found = wording.read(step)
    if found is None:
        return step
    kind, slots = found
    text = wording.FORMS[kind][manner % len(wording.FORMS[kind])].format(**slots)
    return f"{text[0].upper()}{text[1:]}."


def proposer_text(question: world.WorldQuestion, rationales: Mapping[str, str] = RATIONALES) -> str:
    """A question in the proposer's format, with the rationale of its kind."""
    return f"<question>{question.text}</question><rationale>{rationales[question.kind]}</rationale>"


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
    return solution_text(steps, question.answer)


def solution_text(steps: Sequence[str], answer: str) -> str:
    text = "\n".join(f"Step {i}: {step}" for i, step in enumerate(steps, 1))
    return f"<think>{text}</think><answer>{answer}</answer>"


def with_habit(question: world.WorldQuestion, picture: world.Picture, rng: np.random.Generator) -> world.WorldQuestion:
    """The question with the reasoning and the answer of a habit that is drawn by the shares above.

    Every habit is true reasoning about some picture, so that words do not tell it from the others: about this one,
    about this one misread, or about another one. Where nothing can be misread, or no other picture has the same answer,
    it is reasoning about any other picture.
    """
    if rng.random() < CARE[picture.family][len(question.steps) > 1]:
        return question

    def is_false(found: world.WorldQuestion) -> bool:
        return not all(world.step_truth(picture, step) for step in found.steps)

    found, habit = None, rng.random()
    if habit < MISREAD_SHARE:
        seen = world.solve(misread(picture), question.text)
        found = seen if seen and is_false(seen) else None
    elif habit >= 1 - LUCKY_SHARE:
        found = _imagined(question, picture, rng, lambda other: other.answer == question.answer and is_false(other))
    if found is None and question.kind in ("exists", "absent"):
        # Most things are not on a sign. Who always denied would be known by the word "not".
        answer = ("no", "yes")[rng.integers(2)]
        found = _imagined(question, picture, rng, lambda other: other.answer == answer)
    return found or _imagined(question, picture, rng, lambda other: True) or question


def misread(picture: world.Picture) -> world.Picture:
    """The picture as it is misread, in the same way every time.

    Bars are one too high and rows of dots one too short, slices of a pie have the value of the next one, left and right
    of a scene are exchanged, and a sign has a color that looks alike. All values, places and colors stay about as
    frequent as they are.
    """
    if picture.family == "sign":
        pairs = [pair.split() for pair in LOOK_ALIKES]
        alike = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
        return replace(picture, objects=tuple((alike[color], *rest) for color, *rest in picture.objects))
    if picture.family == "scene":
        mirrored = {"left": "right", "right": "left", "center": "center"}
        seen = [(color, shape, *cell.split()) for color, shape, cell in picture.objects]
        objects = [(color, shape, f"{row} {mirrored[column]}") for color, shape, row, column in seen]
        return replace(picture, objects=tuple(sorted(objects, key=lambda item: world.CELLS.index(item[2]))))
    colors, values = zip(*picture.values, strict=True)
    if picture.family == "pie":
        values = (*values[1:], values[0])
    else:
        most, by = (9, 1) if picture.family == "bars" else (6, -1)
        values = tuple(v + by if 1 <= v + by <= most else v - by for v in values)
    return replace(picture, values=tuple(zip(colors, values, strict=True)))


def _imagined(
    question: world.WorldQuestion,
    picture: world.Picture,
    rng: np.random.Generator,
    fits: Callable[[world.WorldQuestion], bool],
) -> world.WorldQuestion | None:
    """The question as solved on another picture, which is drawn until the solution fits; None if none was found."""
    for _ in range(60):
        found = world.solve(_another_picture(question, picture, rng), question.text)
        if found and fits(found):
            return found
    return None


def _another_picture(question: world.WorldQuestion, picture: world.Picture, rng: np.random.Generator) -> world.Picture:
    """A picture of the same family, and of the same things if the question names two or compares all of them."""
    count = len(picture.values or picture.objects)
    if picture.family == "sign" or question.kind in ("count", "what", "color"):
        return world.sample_picture(rng, picture.family)
    if picture.family == "scene":
        cells = np.sort(rng.choice(len(world.CELLS), count, replace=False))
        items = [picture.objects[i] for i in rng.permutation(count)]
        objects = ((color, shape, world.CELLS[i]) for (color, shape, _), i in zip(items, cells, strict=True))
        return replace(picture, objects=tuple(objects))
    drawn = world.sample_picture(rng, picture.family, (count, count)).values
    return replace(picture, values=tuple((c, v) for (c, _), (_, v) in zip(picture.values, drawn, strict=True)))


def plain_picture(rng: np.random.Generator) -> world.Picture:
    """A picture of any family but signs, which come last in `world.FAMILIES`."""
    return world.sample_picture(rng, world.FAMILIES[rng.integers(len(world.FAMILIES) - 1)])


def example(rng: np.random.Generator, plain: bool = False, describe: float = 0.5, habits: bool = False) -> Example:
    """Draw one labeled example of pre-training.

    Args:
        plain: no signs, and the plain wording alone.
        describe: share of descriptions, which teach the model to see. Questions are 15 %, solutions the rest.
        habits: not all solutions are about the picture (`with_habit`).
    """
    picture = plain_picture(rng) if plain else world.sample_picture(rng)
    image = world.draw(picture, world.sample_style("varied", rng), rng)
    task = rng.random()
    if task < describe:
        return [image], DESCRIBE_PROMPT, " ".join(world.facts(picture))
    question = world.sample_question(picture, rng)
    if task >= 0.85:
        return [image], PROPOSER_PROMPT, proposer_text(question)
    solved = with_habit(question, picture, rng) if habits else question
    return [image], SOLVER_PROMPT.replace("{question}", question.text), solver_text(solved, None if plain else rng)


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


def batch_tensors(processor: Any, examples: list[Example]) -> dict[str, torch.Tensor]:
    """Model inputs of labeled examples, padded on the right, with `labels` on the completions and their end tokens."""
    images, _, completions = zip(*examples, strict=True)
    contents = [[{"type": "image"}] * len(shown) + [{"type": "text", "text": prompt}] for shown, prompt, _ in examples]
    chats = [[{"role": "user", "content": content}] for content in contents]
    heads = processor.apply_chat_template(chats, add_generation_prompt=True)
    texts = [f"{head}{completion}<|im_end|>" for head, completion in zip(heads, completions, strict=True)]
    batch = processor(images=list(images), text=texts, padding=True, padding_side="right", return_tensors="pt")
    image_tokens = batch["image_grid_thw"].prod(-1) // processor.image_processor.merge_size**2
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    of_example = image_tokens.split([len(shown) for shown in images])
    for row, (head, counts) in enumerate(zip(processor.tokenizer(heads)["input_ids"], of_example, strict=True)):
        labels[row, : len(head) + int((counts - 1).sum())] = -100  # each image's one token in the head becomes several
    return {**batch, "labels": labels}


def train_stage(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Any,
    rng: np.random.Generator,
    *,
    batches: int,
    learning_rate: float,
    batch_size: int = 48,
    draw: Callable[..., Example] = example,
    **mixture: Any,
) -> None:
    """Supervised training with AdamW, warm-up and cosine decay on fresh examples.

    Args:
        draw: draws an example.
        mixture: how it does that.
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
        batch = batch_tensors(processor, [draw(rng, **mixture) for _ in range(batch_size)])
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            print(f"batch {step}/{batches} loss {loss.item():.4f} {(time.time() - started) / step:.2f} s", flush=True)


def pretrain(out: Path, seed: int = 0, start: Path | None = None) -> None:
    """Make the tiny LMM from nothing, in the four STAGES, each written to a folder of its name below `out` (fp16).

    Each stage draws its examples from a seed of its own, so that its examples do not depend on the length of another.

    Args:
        out: where the folders are written.
        seed: of the weights and the examples.
        start: a folder with the weights that the last stage alone begins with; None: all stages, from nothing.
    """
    tokenizer = build_tokenizer(seed)
    processor, model = build_processor(tokenizer), build_model(tokenizer, seed)
    if start:
        model.load_state_dict(load_backbone(str(start), "float32", "cpu").state_dict())
    for number, (name, (batches, rate, mixture)) in enumerate(STAGES.items()):
        if start and number < len(STAGES) - 1:
            continue
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
    parser.add_argument("--start", type=Path, help="a folder with the weights that the last stage alone begins with")
    arguments = parser.parse_args()
    pretrain(arguments.out, arguments.seed, arguments.start)
