"""The published procedure beside one training step of ours, phase by phase, with the options of `ireasoner bench`.

    python benchmarks/published_step.py --model random-25m --group-size 8 --tokens 64 --image-tokens 1024
    python benchmarks/published_step.py --images-per-step 1 16

The published side keeps the structure of the authors' code (`authors_step.py` checks that it does as much work as
theirs). For each image, the processor and `generate` run once for the question and once for each trajectory, one sample
at a time. Then each trajectory has an update of its own: the processor runs twice more, policy and reference run over
the whole sequence (without the image, as published), and the log-softmax covers every position.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from PIL import Image
from transformers.utils import logging

from ireasoner.app.cli import build_app
from ireasoner.app.display import print_table, print_text
from ireasoner.app.options import keep
from ireasoner.method.recipe import Recipe
from ireasoner.method.scoring import Context, score_group
from ireasoner.method.texts import proposer_messages, solver_messages
from ireasoner.method.types import Completion
from ireasoner.model.inputs import embed_texts, render
from ireasoner.model.learner import Learner
from ireasoner.studies.bench import (
    QUESTION,
    QUESTION_TOKENS,
    Bench,
    Phases,
    heading,
    load_bench,
    measure,
    readable,
    table,
)


class Published:
    """The published procedure on the model, the prompts and the lengths of a `Bench`."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.policy, self.recipe = bench, bench.policy, Recipe()

    def step(self, phases: Phases, images: Sequence[Image.Image]) -> None:
        """Play and update one image after another."""
        policy, sampling = self.policy, self.bench.config.sampling
        learner = self.bench.learner()
        ask = render(policy.processor, proposer_messages(sampling.proposer_prompt))
        solve = render(policy.processor, solver_messages(sampling.solver_prompt, QUESTION))
        for image in images:
            with phases.timed("propose"), policy.acting_as("proposer"):
                self._generate(image, ask, QUESTION_TOKENS)
            with phases.timed("solve"), policy.acting_as("solver"):
                group = [self._generate(image, solve, self.bench.tokens) for _ in range(sampling.group_size)]
            with phases.timed("read and reward"):
                earned = self._reward([completion.text for completion in group])
            for completion, reward in zip(group, earned, strict=True):
                with phases.timed("update"):
                    self._update(learner, image, solve, completion, reward)

    def _reward(self, texts: Sequence[str]) -> Sequence[float]:
        context = Context(
            step_weight=0.5, embed=lambda steps: embed_texts(self.policy, steps, self.recipe.max_step_tokens)
        )
        return score_group(QUESTION, [readable(text) for text in texts], self.recipe, context).rewards

    def _generate(self, image: Image.Image, prompt: str, length: int) -> Completion:
        processor = self.policy.processor
        inputs = processor(images=[image], text=[prompt], return_tensors="pt").to(self.policy.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.policy.backbone.dtype)
        with torch.no_grad():
            output = self.policy.model.generate(
                **inputs, do_sample=True, temperature=1.0, top_p=1.0, min_new_tokens=length, max_new_tokens=length
            )
        ids = output[0, inputs["input_ids"].shape[1] :].tolist()
        return Completion(processor.tokenizer.decode(ids, skip_special_tokens=True), tuple(ids), (), "length")

    def _update(self, learner: Learner, image: Image.Image, prompt: str, completion: Completion, reward: float) -> None:
        policy = self.policy
        inputs = policy.processor(images=[image], text=[prompt], return_tensors="pt")
        policy.processor(images=[image], text=[prompt + completion.text], return_tensors="pt")
        # They read the tokens from that text again; the sampled ones are used here, so that all sides are as long.
        ids = torch.cat([inputs["input_ids"], torch.tensor([completion.token_ids])], 1).to(policy.device)
        seen, targets = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids[:, 1:]
        with policy.acting_as("solver"):
            logprobs = policy.model(**seen).logits[:, :-1].float().log_softmax(-1)
        with torch.no_grad(), policy.acting_as(None):
            reference = policy.model(**seen).logits[:, :-1].float().log_softmax(-1)
        written = torch.arange(targets.shape[1], device=policy.device)[None] >= inputs["input_ids"].shape[1] - 1
        kl = (logprobs.exp() * (logprobs - reference)).sum(-1)[written].mean()
        nll = -logprobs.gather(-1, targets[..., None])[..., 0][written].mean()
        (reward * nll + learner.kl_coef * kl).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters.values(), learner.options.max_grad_norm)
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    _, given, _ = build_app().parse_args(["bench", *sys.argv[1:]])
    given.apply_defaults()
    asked = given.arguments
    logging.disable_progress_bar()
    bench = load_bench(asked["model"], asked["tokens"], asked["group_size"], asked["image_tokens"], asked["device"])
    known = {"ours": bench.ours, "plain": bench.plain}
    sides = {name: known[name] for name in known if name in asked["sides"]} | {"published": Published(bench).step}
    result = measure(bench, sides, asked["images_per_step"], asked["repetitions"])
    print_text(heading(result))
    for row in result["sizes"]:
        print_table(*table(row))
    keep(asked["json"], result)


if __name__ == "__main__":
    main()
