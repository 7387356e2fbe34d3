"""How far a sampler's log-probabilities are from the learner's: by rounding, and where it is another model.

    python benchmarks/sampler_gap.py --model tiny
    python benchmarks/sampler_gap.py --model smolvlm-real-text --tokens 32     # of tools/real_text_model.py

The learner is in bfloat16 and its adapters are not new. Completions are sampled by the same model in each precision,
then by the model without adapters, and last by the same one that looks at other images.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from PIL import Image

from ireasoner.method.recipe import Recipe
from ireasoner.method.texts import solver_messages
from ireasoner.method.types import Role
from ireasoner.model.inputs import build_prompts, encode_images
from ireasoner.model.learner import Learner
from ireasoner.model.loading import load_policy
from ireasoner.model.options import BackboneOptions, Dtype, OptimizerOptions
from ireasoner.model.policy import Policy
from ireasoner.playground import world
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.live import LiveEngine

IMAGES, GROUP_SIZE = 4, 4
REWARDS = [[0.0, 1.0] * (GROUP_SIZE // 2)] * IMAGES
SHOWN = ("kl", "token_entropy", "sampler_gap", "mean_sampler_gap", "importance_weight", "importance_capped")


def load(model: str, dtype: Dtype, moved: float) -> Policy:
    """The model with a solver whose matrices B are random, of this standard deviation."""
    policy = load_policy(model, BackboneOptions(dtype=dtype), device="cpu", seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.parameters("solver").items():
        if "lora_B" in name:
            parameter.data.normal_(0, moved, generator=generator)
    return policy


def ask(policy: Policy, images: list[Image.Image]) -> list[Request]:
    messages = solver_messages("{question}", "What is shown here?")
    return [Request(image, messages, (i,)) for i, image in enumerate(encode_images(policy, images))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="'tiny' or a folder (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="longest completion (%(default)s)")
    parser.add_argument("--moved", type=float, default=0.02, help="size of the solver's matrices B (%(default)s)")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    images = [world.draw(world.sample_picture(rng), world.sample_style("varied", rng), rng) for _ in range(IMAGES)]
    others = [*images[1:], images[0]]
    cases: list[tuple[str, Dtype, Role | None, list[Image.Image]]] = [
        ("bfloat16, as the learner", "bfloat16", "solver", images),
        ("float16", "float16", "solver", images),
        ("float32", "float32", "solver", images),
        ("bfloat16, without adapters", "bfloat16", None, images),
        ("bfloat16, other images", "bfloat16", "solver", others),
    ]
    print("sampler", *SHOWN, sep=" | ")
    for name, dtype, role, seen in cases:
        policy, sampler = (load(arguments.model, each, arguments.moved) for each in ("bfloat16", dtype))
        groups = LiveEngine(sampler).sample(ask(sampler, seen), role, n=GROUP_SIZE, max_tokens=arguments.tokens)
        requests = ask(policy, images)
        prompts = build_prompts(policy, [r.image for r in requests], [r.messages for r in requests])
        learner = Learner(policy, "solver", Recipe(), OptimizerOptions(importance_cap=2))
        metrics = learner.update(prompts, groups, learner.advantages(REWARDS), REWARDS)
        print(name, *(f"{metrics[key]:.2g}" for key in SHOWN), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
