"""The whole method in one file, from the public parts of ireasoner: play, score, update, record.

    python examples/loop.py --images photos/ --model tiny --steps 20

Every step takes some images. For each, the proposer asks a question; the solver answers it N times, step by step; the
group's own agreement is the reward (iReasoner, arXiv 2601.05877); both adapters get one REINFORCE update.

Left out, and part of `ireasoner.training`: checkpoints and exact resume, the watch that ends a run that collapses,
probes, held-out evaluation, several processes, the gate on hopeless and unanimous groups, labelled questions, the run
directory that `ireasoner view` shows. Nothing here is needed by `ireasoner train`; it is meant to be read and changed.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import fmean

from ireasoner.method.memory import RecentSteps
from ireasoner.method.scoring import Context, ScoredGroup, score_solutions, step_weight
from ireasoner.method.seeds import PROPOSE, SOLVE, draw_seed
from ireasoner.method.texts import parse_question, parse_trajectory, proposer_messages, solver_messages
from ireasoner.method.types import Completion, Question
from ireasoner.model.inputs import EncodedImage, build_prompts, embed_texts, encode_images, token_texts
from ireasoner.model.learner import Learner
from ireasoner.model.loading import load_policy
from ireasoner.model.policy import Policy
from ireasoner.rollouts.engine import Engine, Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training.config import Config, resolve
from ireasoner.training.items import ImagePool, Item
from ireasoner.training.selfplay import BlankImages


def main() -> None:
    parser = argparse.ArgumentParser(description="Self-evolution in one file.")
    parser.add_argument("--images", required=True, help="folder of unlabeled images")
    parser.add_argument("--model", default="tiny", help="folder, hub id, or 'tiny' (%(default)s)")
    parser.add_argument("--recipe", default="default", help="what is rewarded (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="training steps (%(default)s)")
    parser.add_argument("--images-per-step", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/loop"), help="for the adapters (%(default)s)")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    train(resolve(arguments), out)


def train(config: Config, out: Path) -> None:
    """Self-evolve a model; the adapters, and a line of numbers for every step, end up in `out`."""
    policy = load_policy(
        config.model, config.backbone, revision=config.revision, device=config.device, seed=config.seed
    )
    engine: Engine = LiveEngine(policy)
    proposer = Learner(policy, "proposer", config.recipe, config.optimizer)
    solver = Learner(policy, "solver", config.recipe, config.optimizer)
    pool = ImagePool.scan(config.images, config.seed, config.max_image_pixels)
    memory = RecentSteps(config.recipe.recurrence_window)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "metrics.jsonl").open("w") as log:
        for step in range(1, config.schedule.steps + 1):
            # Play. An image goes through the vision tower once; whatever is asked about it reuses its features.
            items = pool.take(config.schedule.images_per_step)
            images = encode_images(policy, [item.image for item in items])
            asking, proposals, questions = ask(config, engine, step, items, images)
            asked = [i for i, question in enumerate(questions) if question.well_formed]
            solving, groups = solve(config, engine, step, items, images, questions, asked)
            # Score. An unreadable question was not asked, and earns its proposer nothing.
            scored = score(config, policy, memory, step, items, questions, asked, solving, groups)
            worth = [0.0] * len(items)
            for i, group in zip(asked, scored, strict=True):
                worth[i] = group.proposer_reward
            # Update: the solver at every step, the proposer at every `proposer_every`-th (by default, every fifth).
            learned: dict[str, dict[str, float]] = {}
            if groups:
                learned["solver"] = update(policy, solver, solving, groups, [list(group.rewards) for group in scored])
            if config.recipe.train_proposer and step % config.schedule.proposer_every == 0:
                learned["proposer"] = update(policy, proposer, asking, proposals, [[reward] for reward in worth])
            engine.refresh()
            # Record.
            rewards = [reward for group in scored for reward in group.rewards]
            record = {
                "step": step,
                "reward": fmean(rewards) if rewards else 0.0,
                "majority_fraction": fmean(group.vote.fraction for group in scored) if scored else 0.0,
                "learned": learned,
            }
            log.write(json.dumps(record) + "\n")
            print(f"step {step}: reward {record['reward']:.3f}, majority {record['majority_fraction']:.3f}", flush=True)
    policy.save_adapters(out)


def ask(
    config: Config, engine: Engine, step: int, items: list[Item], images: list[EncodedImage]
) -> tuple[list[Request], list[list[Completion]], list[Question]]:
    """One question about each image, sampled from the proposer and read."""
    messages = proposer_messages(config.sampling.proposer_prompt, config.sampling.domain)
    requests = [
        Request(image, messages, draw_seed(config.seed, step, item.name, 0, PROPOSE))
        for item, image in zip(items, images, strict=True)
    ]
    proposals = engine.sample(requests, "proposer", max_tokens=config.sampling.max_question_tokens)
    prompt = requests[0].prompt  # all of them have the same messages
    return requests, proposals, [parse_question(c.text, c.finish_reason, prompt) for (c,) in proposals]


def solve(
    config: Config,
    engine: Engine,
    step: int,
    items: list[Item],
    images: list[EncodedImage],
    questions: list[Question],
    asked: list[int],
) -> tuple[list[Request], list[list[Completion]]]:
    """A group of N solutions of each readable question, sampled from the solver."""
    prompt = config.sampling.solver_prompt
    requests = [
        Request(
            images[i],
            solver_messages(prompt, questions[i].text),
            draw_seed(config.seed, step, items[i].name, 0, SOLVE),
        )
        for i in asked
    ]
    if not requests:
        return [], []
    sampling = config.sampling
    return requests, engine.sample(requests, "solver", n=sampling.group_size, max_tokens=sampling.max_solution_tokens)


def score(
    config: Config,
    policy: Policy,
    memory: RecentSteps,
    step: int,
    items: list[Item],
    questions: list[Question],
    asked: list[int],
    requests: list[Request],
    groups: list[list[Completion]],
) -> list[ScoredGroup]:
    """What each group earned: agreement on the answer, and how much likelier the image makes what leads to it."""
    recipe, form = config.recipe, config.sampling.solution_form
    solutions = [
        [parse_trajectory(c.text, c.finish_reason, form, request.prompt) for c in group]
        for group, request in zip(groups, requests, strict=True)
    ]
    for i, group in zip(asked, solutions, strict=True):  # all of the step's groups are remembered before any is scored
        memory.add(items[i].name, group)
    scored, blank = [], BlankImages(policy, config.optimizer.tokens_per_batch)
    for i, group, request, completions in zip(asked, solutions, requests, groups, strict=True):
        context = Context(
            step_weight=step_weight(recipe, step, config.schedule.steps),
            embed=lambda texts: embed_texts(policy, texts, recipe.max_step_tokens),
            logprobs=[c.logprobs for c in completions],
            tokens=[token_texts(policy.processor, c.token_ids) for c in completions],
            blank_logprobs=partial(blank.logprobs, request, completions),
            recent_steps=memory.of_others(items[i].name),
            seed=(config.seed, step, i),
        )
        scored.append(score_solutions(questions[i].text, group, recipe, context))
    return scored


def update(
    policy: Policy,
    learner: Learner,
    requests: list[Request],
    groups: list[list[Completion]],
    rewards: list[list[float]],
) -> dict[str, float]:
    """One REINFORCE step with exact KL to the frozen backbone, on the very token ids that were sampled."""
    advantages = learner.advantages(rewards)
    prompts = build_prompts(policy, [r.image for r in requests], [r.messages for r in requests])
    return learner.update(prompts, groups, advantages, rewards)


if __name__ == "__main__":
    main()
