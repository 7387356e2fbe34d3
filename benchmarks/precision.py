"""What ten small updates change in bfloat16, as a share of what they change in float32: ours, and with PEFT's sums.

    python tools/real_text_model.py --out smolvlm-real-text
    python benchmarks/precision.py --model smolvlm-real-text

The updates are made in bfloat16 from new adapters, on what the model has just written. PEFT rounds what a layer and its
adapter give to the backbone's dtype one after the other; we sum in float32 and round once (`ireasoner.model.lora`).
"""

from __future__ import annotations

import argparse

from peft.tuners import lora

from ireasoner.model.inputs import build_prompts, encode_images
from ireasoner.model.loading import load_policy
from ireasoner.model.lora import Float32SumLinear
from ireasoner.model.options import BackboneOptions
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.studies.doctor import CHATS, pictures
from ireasoner.studies.precision import UPDATES, measure_precision


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="folder, hub id, or 'tiny' (%(default)s)")
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[1e-6, 1e-5, 2e-5, 5e-5], help="(%(default)s)"
    )
    parser.add_argument("--completions", type=int, default=8, help="of each of two prompts (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of a completion, at most (%(default)s)")
    given = parser.parse_args()
    policy = load_policy(given.model, BackboneOptions(), device="cpu")
    images = encode_images(policy, pictures())
    asked = [Request(image, chat, (i,)) for i, (image, chat) in enumerate(zip(images, CHATS, strict=True))]
    groups = LiveEngine(policy).sample(asked, "solver", n=given.completions, max_tokens=given.tokens)
    prompts = build_prompts(policy, images, CHATS)
    print(
        f"{UPDATES} updates of {given.model} in bfloat16, on {sum(len(c.token_ids) for g in groups for c in g)} tokens"
    )
    ours = Float32SumLinear.forward
    for rate in given.learning_rates:
        for name, forward in (("ours", ours), ("PEFT", lora.Linear.forward)):
            Float32SumLinear.forward = forward
            found = measure_precision(policy, prompts, groups, rate)
            print(
                f"{rate:g}  {name}  slope {found.slope:.2f} ± {found.error:.2f}  changed {found.moved:.1e} nats, "
                f"rounding {found.rounding:.1e}  KL {found.kl:.1e}, by rounding {found.kl_floor:+.1e}",
                flush=True,
            )
        Float32SumLinear.forward = ours


if __name__ == "__main__":
    main()
