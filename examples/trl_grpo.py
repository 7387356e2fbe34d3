"""Agreement as the reward of TRL's GRPOTrainer: your TRL script, our reward, no labels.

    pip install 'ireasoner[trl]'
    python examples/trl_grpo.py --images photos/ --questions "How many circles are there?" --steps 20

Every question is asked about every image. TRL samples and updates; `agreement_reward` pays a completion for an answer
that its group agrees on, and for reasoning steps that the image makes likelier.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset, Image
from peft import LoraConfig
from transformers import AutoModelForImageTextToText
from trl import GRPOConfig, GRPOTrainer

from ireasoner.model.backbone import load_processor
from ireasoner.model.source import TINY_MODEL
from ireasoner.plugins.trl import agreement_reward
from ireasoner.training.config import resolve

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def main() -> None:
    parser = argparse.ArgumentParser(description="Agreement as the reward of TRL's GRPOTrainer.")
    parser.add_argument("--images", type=Path, required=True, help="folder of unlabeled images")
    parser.add_argument("--questions", nargs="+", required=True, help="asked about every image")
    parser.add_argument("--model", default="tiny", help="folder, hub id, or 'tiny' (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="training steps (%(default)s)")
    parser.add_argument("--num-generations", type=int, default=8, help="completions of a prompt (%(default)s)")
    parser.add_argument("--max-completion-length", type=int, default=256, help="tokens (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/trl"), help="for the adapter (%(default)s)")
    asked = parser.parse_args()
    trainer = trainer_for(asked)
    trainer.train()
    trainer.model.save_pretrained(str(asked.out))


def trainer_for(asked: argparse.Namespace) -> GRPOTrainer:
    """TRL's trainer with our reward."""
    name = str(TINY_MODEL) if asked.model == "tiny" else asked.model
    solver_prompt = resolve({"model": asked.model, "images": str(asked.images)}).sampling.solver_prompt
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(name)
    processor.tokenizer.padding_side = "left"  # which generation in batches takes
    config = GRPOConfig(
        str(asked.out),
        max_steps=asked.steps,
        num_generations=asked.num_generations,
        # A multiple of num_generations, so that every group is whole on one device.
        per_device_train_batch_size=asked.num_generations,
        max_completion_length=asked.max_completion_length,
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
    )
    reward = agreement_reward(
        num_generations=asked.num_generations,
        question_column="question",
        solver_prompt=solver_prompt,
        eos_token_ids=[processor.tokenizer.eos_token_id],
        model=model,  # which the trainer puts its adapter into
        processor=processor,
    )
    data = questions_about(asked.images, asked.questions, solver_prompt)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", exclude_modules=".*visual.*")
    return GRPOTrainer(model, reward, config, data, processing_class=processor, peft_config=lora)


def questions_about(images: Path, questions: list[str], solver_prompt: str) -> Dataset:
    """Every question about every image of a folder, in the prompt that asks for the form which the reward reads."""
    paths = sorted(str(path) for path in images.rglob("*") if path.suffix.lower() in SUFFIXES)
    rows = [
        {
            "prompt": [{"role": "user", "content": solver_prompt.replace("{question}", question)}],
            "image": path,
            "question": question,
        }
        for path in paths
        for question in questions
    ]
    return Dataset.from_list(rows).cast_column("image", Image())


if __name__ == "__main__":
    main()
