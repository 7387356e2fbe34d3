"""Does a model with real text weights follow its reward at the default scale, in bfloat16 as in float32?

    python tools/real_text_model.py --out smolvlm-real-text
    python benchmarks/real_text.py --model smolvlm-real-text --dtype bfloat16 --out bf16.json
    python benchmarks/real_text.py --model smolvlm-real-text --dtype float32 --out fp32.json

The solver answers questions, each beside a picture, and earns 1 for an answer that ends by itself within the tokens it
may write, else 0. Learning rate, images a step and size of groups are those of the preset `7b`. The reward is so plain
because a model of 135 million parameters cannot write in the forms that `train` reads. What is shown is that the update
works on real text, not that anything is learned about images.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import fmean

from ireasoner.method.texts import solver_messages
from ireasoner.model.inputs import build_prompts, encode_images
from ireasoner.model.learner import Learner
from ireasoner.model.loading import load_policy
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.studies.doctor import pictures
from ireasoner.studies.precision import compare_precision
from ireasoner.training.config import resolve

QUESTIONS = (
    "What is two plus five?", "Name a fruit.", "What is the capital of France?", "How many legs has a dog?",
    "Which animal barks?", "What colour is the sky?", "Name a planet.", "What do bees make?", "What is ten minus four?",
    "How many days has a week?", "What is ice made of?", "Who flies an aeroplane?", "Name a tool.", "What is a violin?",
    "Where do fish live?", "Which is larger, a cat or a cow?", "What is the opposite of hot?", "Name a vegetable.",
    "What falls in winter?", "What is three times three?", "What do we read?", "Name a colour.", "What is a bridge?",
    "How many wheels has a bicycle?",
)  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder that tools/real_text_model.py wrote, or another model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=12, help="that an answer may take (%(default)s)")
    parser.add_argument("--learning-rate", type=float, help="(that of the preset 7b)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for every step and the precision at the end")
    given = parser.parse_args()
    options = {"model": given.model, "images": ".", "dtype": given.dtype, "steps": given.steps}
    options |= {"learning_rate": given.learning_rate} if given.learning_rate else {}
    config = resolve(options)
    policy = load_policy(given.model, config.backbone, device="cpu")
    engine, learner = LiveEngine(policy), Learner(policy, "solver", config.recipe, config.optimizer)
    images = encode_images(policy, pictures())
    found: dict = {"learning_rate": config.optimizer.learning_rate, "dtype": given.dtype, "steps": []}
    count, started = config.schedule.images_per_step, time.monotonic()
    for step in range(1, given.steps + 1):
        numbers = [(step * count + i) % len(QUESTIONS) for i in range(count)]
        asked = [
            Request(images[i % 2], solver_messages("{question}", QUESTIONS[number]), (step, i))
            for i, number in enumerate(numbers)
        ]
        groups = engine.sample(asked, "solver", n=config.sampling.group_size, max_tokens=given.tokens)
        rewards = [[float(c.finish_reason == "stop") for c in group] for group in groups]
        prompts = build_prompts(policy, [r.image for r in asked], [r.messages for r in asked])
        metrics = learner.update(prompts, groups, learner.advantages(rewards), rewards)
        found["steps"].append({"reward": fmean(r for group in rewards for r in group), **metrics})
        if step % 10 == 0:
            last = found["steps"][-10:]
            print(
                f"step {step}, {time.monotonic() - started:.0f} s: reward {fmean(s['reward'] for s in last):.3f}, "
                f"KL {fmean(s['kl'] for s in last):.2e}, sampler gap {max(s['sampler_gap'] for s in last):.1e}",
                flush=True,
            )
        if step in (10, 50, 100, given.steps):  # of the adapter so far, on what it has just written
            found[f"precision after {step}"] = vars(compare_precision(policy, prompts, groups))
            print(f"step {step}: {found[f'precision after {step}']}", flush=True)
        given.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
