"""Which score of reasoning steps tells the truer of two solutions with the same answer? On the CPU, without training.

    python benchmarks/step_scores.py                              # the tiny model that ships here
    python benchmarks/step_scores.py --adapters OUT/solver --json scores.json

Five answers to each validation question of the embedded world. A solution is scored by the mean over its reasoning
steps of

- the published cosine of embeddings (`embedding`), and true claims compared exactly (`exact`, an oracle);
- how likely the step was when it was sampled (`likelihood`: exp of its mean log-probability), its mean log-probability
  itself, its least likely token, and the same under the reference where adapters are given;
- its likelihood less that behind a gray image (`grounding`, of the recipe `default`), and the same for mean
  log-probabilities (`gain by the image`);
- how likely the others of the group would have written it after their own earlier steps (`after the others' steps`).

For each: of two solutions of a question with the same answer and unequal truth of their steps, how often the truer one
has the higher score (ties count half); the share of questions whose vote is right when solutions weigh as much as their
score. All are measured on the same solutions, with 95 % intervals from
resampled questions.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from base import SAMPLES, Interval, share_of_pairs
from numpy.typing import NDArray
from PIL import Image

from ireasoner.method import rewards
from ireasoner.method.answers import answer_key, majority
from ireasoner.method.likelihood import step_grounding, step_likelihoods, step_tokens
from ireasoner.method.rewards import FloatArray
from ireasoner.method.texts import parse_trajectory, solver_messages
from ireasoner.method.types import Completion, Role, Solution
from ireasoner.model.forward import completion_hidden
from ireasoner.model.inputs import EncodedImage, build_prompts, embed_texts, encode_images, right_padded, token_texts
from ireasoner.model.loading import load_policy
from ireasoner.model.policy import Policy
from ireasoner.playground import dataset, world
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.studies import validity
from ireasoner.training.config import resolve

GRAY = (128, 128, 128)


@dataclass(frozen=True)
class Asked:
    """A question about an image and its group of solutions; `truth` is the share of their true steps, NaN if none can
    be checked."""

    image: EncodedImage
    gray: EncodedImage
    question: str
    messages: list[dict[str, object]]
    answer: str
    completions: Sequence[Completion]
    solutions: Sequence[Solution]
    keys: tuple[str | None, ...]
    truth: FloatArray


def ask(policy: Policy, role: Role | None, style: str, count: int, seed: int, batch: int = 64) -> list[Asked]:
    """Sample five solutions of each of `count` validation questions."""
    sampling, engine, found = resolve({"images": "none", "model": "tiny"}).sampling, LiveEngine(policy), []
    with tempfile.TemporaryDirectory() as folder:
        path = dataset.write_questions(Path(folder), count, style, "validation", seed)
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for first in range(0, count, batch):
            part = rows[first : first + batch]
            images = [Image.open(path.parent / row["image"]).convert("RGB") for row in part]
            grays = encode_images(policy, [Image.new("RGB", image.size, GRAY) for image in images])
            messages = [solver_messages(sampling.solver_prompt, row["question"]) for row in part]
            encoded = encode_images(policy, images)
            requests = [
                Request(e, m, (seed, first + i)) for i, (e, m) in enumerate(zip(encoded, messages, strict=True))
            ]
            drawn = engine.sample(requests, role, n=SAMPLES, max_tokens=sampling.max_solution_tokens)
            for row, image, gray, message, group in zip(part, encoded, grays, messages, drawn, strict=True):
                found.append(judged(row, image, gray, message, group))
    return found


def judged(
    row: Mapping[str, Any],
    image: EncodedImage,
    gray: EncodedImage,
    messages: list[dict[str, object]],
    group: Sequence[Completion],
) -> Asked:
    """Read a group and say what is true of it."""
    picture, question = world.picture_from_record(row["picture"]), str(row["question"])
    solutions = [parse_trajectory(c.text, c.finish_reason) for c in group]
    solutions = [s if s.well_formed else s.model_copy(update={"reasoning_steps": ()}) for s in solutions]
    keys = tuple(answer_key(s.answer, question) if s.answer is not None else None for s in solutions)
    checked = [[world.step_truth(picture, step) for step in s.reasoning_steps] for s in solutions]
    known = [[verdict for verdict in own if verdict is not None] for own in checked]
    truth = np.array([np.mean(own) if own else np.nan for own in known])
    return Asked(image, gray, question, messages, str(row["answer"]), group, solutions, keys, truth)


@torch.no_grad()
def logprobs(
    policy: Policy,
    image: EncodedImage,
    messages: list[dict[str, object]],
    ids: Sequence[Sequence[int]],
    role: Role | None,
) -> list[NDArray[np.float64]]:
    """The log-probability of every token of some texts behind one prompt."""
    prompts = build_prompts(policy, [image], [messages])
    ids_RC, mask_RC = right_padded(policy, ids)
    logits_TV = policy.output_layer(completion_hidden(policy, prompts, ids_RC, mask_RC, role))
    found_T = logits_TV.log_softmax(-1).gather(-1, ids_RC[mask_RC][:, None])[:, 0]
    return [part.double().numpy() for part in found_T.split([len(each) for each in ids])]


def scores(policy: Policy, asked: Asked, role: Role | None) -> dict[str, FloatArray]:
    """Every score of a group's solutions, arrays [N]; NaN where a solution has no step."""
    steps = [s.reasoning_steps for s in asked.solutions]
    tokens = [token_texts(policy.processor, c.token_ids) for c in asked.completions]
    spans = [step_tokens(own, texts) for own, texts in zip(steps, tokens, strict=True)]
    ids = [c.token_ids for c in asked.completions]
    sampled = [np.array(c.logprobs) for c in asked.completions]
    blind = logprobs(policy, asked.gray, asked.messages, ids, role)
    group = validity.ReadGroup(
        ("", asked.question), asked.keys, tuple(asked.solutions), np.zeros(len(ids)), asked.truth, np.zeros(len(ids))
    )
    recipe = resolve({"images": "none", "model": "tiny"}).recipe
    embed = lambda texts: embed_texts(policy, texts, recipe.max_step_tokens)  # noqa: E731
    likely = [step_likelihoods(*each) for each in zip(steps, tokens, sampled, strict=True)]

    def over_steps(values: Sequence[NDArray[np.float64]], of: str) -> list[FloatArray]:
        """A number for each step from those of its tokens."""
        reduce = {"mean": np.mean, "least": np.min}[of]
        return [
            np.array([np.nan if span is None else reduce(own[span]) for span in places])
            for own, places in zip(values, spans, strict=True)
        ]

    found = {
        "embedding": validity.step_agreement(recipe.model_copy(update={"density_exponent": 0.0}), embed)(group),
        "exact": validity.exact(group),
        "likelihood": rewards.step_means(likely),
        "mean log-probability": _means(over_steps(sampled, "mean")),
        "least likely token": _means([np.exp(own) for own in over_steps(sampled, "least")]),
        "grounding": rewards.step_means([step_grounding(*e) for e in zip(steps, tokens, sampled, blind, strict=True)]),
        "gain by the image": _means(
            [own - other for own, other in zip(over_steps(sampled, "mean"), over_steps(blind, "mean"), strict=True)]
        ),
        "after the others' steps": _means(_after_others(policy, asked, spans, role)),
        "whole text": np.array([own.mean() for own in sampled]),
        "few words": -np.array([s.words_before_answer for s in asked.solutions], dtype=np.float64),
    }
    if role:
        reference = logprobs(policy, asked.image, asked.messages, ids, None)
        found["likelihood, reference"] = _means([np.exp(own) for own in over_steps(reference, "mean")])
    readable = np.array([bool(own) for own in steps])
    return {name: np.where(readable, values, np.nan) for name, values in found.items()}


def _means(of_steps: Sequence[FloatArray]) -> FloatArray:
    """The mean of each solution's known steps; NaN without any."""
    return np.array([own[np.isfinite(own)].mean() if np.isfinite(own).any() else np.nan for own in of_steps])


def _after_others(
    policy: Policy, asked: Asked, spans: Sequence[Sequence[slice | None]], role: Role | None
) -> list[FloatArray]:
    """How likely each step is after the earlier steps of each other solution, exp of mean log-probabilities, mean over
    the others that have as many earlier steps."""
    texts: list[tuple[int, ...]] = []
    wanted: list[tuple[int, int, slice]] = []
    for i, own in enumerate(spans):
        for j, span in enumerate(own):
            for k, other in enumerate(spans):
                if span is None or k == i or j >= len(other) or (start := other[j]) is None:
                    continue
                step = asked.completions[i].token_ids[span]
                before = asked.completions[k].token_ids[: start.start]
                texts.append((*before, *step))
                wanted.append((i, j, slice(len(before), len(before) + len(step))))
    found = [np.full(len(own), np.nan) for own in spans]
    if not texts:
        return found
    values: dict[tuple[int, int], list[float]] = {}
    for (i, j, place), own in zip(wanted, logprobs(policy, asked.image, asked.messages, texts, role), strict=True):
        values.setdefault((i, j), []).append(float(np.exp(own[place].mean())))
    for (i, j), each in values.items():
        found[i][j] = np.mean(each)
    return found


def pairs(
    asked: Sequence[Asked], values: Sequence[FloatArray], rng: np.random.Generator
) -> tuple[Interval | None, int]:
    """How often the truer of two solutions with the same answer has the higher score, and of how many pairs."""
    won, counts = np.zeros(len(asked)), np.zeros(len(asked), dtype=np.int64)
    for n, (one, score) in enumerate(zip(asked, values, strict=True)):
        for i in range(len(score)):
            for j in range(i):
                truer, higher = one.truth[i] - one.truth[j], score[i] - score[j]
                if one.keys[i] is None or one.keys[i] != one.keys[j] or not truer or not np.isfinite(truer + higher):
                    continue
                counts[n] += 1
                won[n] += 0.5 if abs(higher) < 1e-9 else float(truer * higher > 0)
    return share_of_pairs(won, counts, rng), int(counts.sum())


def vote(asked: Sequence[Asked], values: Sequence[FloatArray] | None, rng: np.random.Generator) -> Interval | None:
    """The share of questions whose answer with the largest sum of scores is right; without scores, the majority's."""
    right = np.zeros(len(asked))
    for n, one in enumerate(asked):
        if values is None:
            members = majority(one.keys).members
            chosen = one.keys[members[0]] if members else None
        else:
            known = values[n][np.isfinite(values[n])]
            score = np.nan_to_num(values[n] - min(known.min(initial=0), 0))  # no weight is negative
            sums = {key: score[[k == key for k in one.keys]].sum() for key in one.keys if key is not None}
            chosen = max(sums, key=sums.__getitem__) if sums else None
        right[n] = chosen is not None and chosen == answer_key(one.answer, one.question)
    return share_of_pairs(right, np.ones(len(asked), dtype=np.int64), rng)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, or a folder")
    parser.add_argument("--adapters", type=Path, help="a run's folder of adapters of the solver, such as RUN/solver")
    parser.add_argument("--questions", type=int, default=640)
    parser.add_argument("--style", default="chalk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the table is written")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    policy = load_policy(options.model, resolve({"images": "none", "model": "tiny"}).backbone, device="cpu")
    role: Role | None = None
    if options.adapters:
        policy.load_adapter(options.adapters, "solver")
        role = "solver"
    asked = ask(policy, role, options.style, options.questions, options.seed)
    groups = [scores(policy, one, role) for one in asked]
    rows = []
    for name in groups[0]:
        values = [group[name] for group in groups]
        truer, count = pairs(asked, values, np.random.default_rng(0))
        rows.append({"score": name, "truer is higher, %": str(truer), "pairs": count})
        rows[-1]["vote weighted by it is right, %"] = str(vote(asked, values, np.random.default_rng(0)))
    plain = str(vote(asked, None, np.random.default_rng(0)))
    rows.append({"score": "plain vote", "truer is higher, %": "", "pairs": 0, "vote weighted by it is right, %": plain})
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(str, row.values()))} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), "utf-8")


if __name__ == "__main__":
    main()
