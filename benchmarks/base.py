"""How much a base has to learn from itself, and whether its words give its habits away. On the CPU.

    python benchmarks/base.py                       # the tiny model that ships here
    python benchmarks/base.py --model FOLDER --json base.json

Five answers to each validation question of the embedded world, in the demo's style: mean@1, maj@5 and pass@5, by family
and by number of reasoning steps, and the share of reasoning steps that are true. A solution is *careful* if it has
steps that can be checked and all of them are true, *made up* if its answer is right although one of them is false, and
a *guess* otherwise.

Then a logistic regression on the counts of words and pairs of words tells careful solutions from guesses, and from
made-up ones. It learns on four fifths of the questions and is judged on the others, on pairs of solutions of the same
question, of which it should rank the careful one higher: in half of them (an AUC of 50 %) if words give nothing away.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from ireasoner.method.answers import answer_key, majority
from ireasoner.method.texts import parse_trajectory, solver_messages
from ireasoner.model.inputs import encode_images
from ireasoner.model.loading import load_policy
from ireasoner.playground import dataset, world
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training.config import resolve

SAMPLES = 5
FOLDS = 5
PENALTY = 0.02  # on the squared weights of the classifier, beside the mean loss
MASKS = {
    "all words": r"(?!)",
    "numbers masked": r"\d+",
    "colors and numbers masked": rf"\d+|{'|'.join(world.SIGN_COLORS)}",
}
RESAMPLES = 1000


@dataclass(frozen=True)
class Sample:
    """One solution of a question: its text, and what is true of it.

    `checked` is how many of its steps can be checked, and `true` how many of these are true.
    """

    text: str
    reasoning: tuple[str, ...]
    answer: str | None
    key: str | None
    right: bool
    checked: int
    true: int
    habit: str


@dataclass(frozen=True)
class Asked:
    """A question, the greedy solution and the sampled ones."""

    text: str
    family: str
    kind: str
    steps: int
    greedy: Sample
    samples: tuple[Sample, ...]


class Interval(NamedTuple):
    """A share in %, with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


def ask(model: str, style: str, count: int, seed: int, batch: int = 64) -> list[Asked]:
    """Sample the solutions of `count` validation questions."""
    config = resolve({"images": "none", "model": "tiny"})
    policy = load_policy(model, config.backbone, device="cpu")
    engine, sampling, found = LiveEngine(policy), config.sampling, []
    with tempfile.TemporaryDirectory() as folder:
        path = dataset.write_questions(Path(folder), count, style, "validation", seed)
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for first in range(0, count, batch):
            part = rows[first : first + batch]
            encoded = encode_images(policy, [Image.open(path.parent / row["image"]) for row in part])
            requests = [
                Request(image, solver_messages(sampling.solver_prompt, row["question"]), (seed, first + i))
                for i, (image, row) in enumerate(zip(encoded, part, strict=True))
            ]
            heats = [*[1.0] * SAMPLES, 0.0]
            drawn = engine.sample(
                requests, None, n=len(heats), max_tokens=sampling.max_solution_tokens, temperature=heats
            )
            for row, group in zip(part, drawn, strict=True):
                picture = world.picture_from_record(row["picture"])
                question = world.solve(picture, row["question"])
                assert question is not None
                *samples, greedy = (judged(picture, question, c.text, c.finish_reason) for c in group)
                found.append(
                    Asked(question.text, picture.family, question.kind, len(question.steps), greedy, tuple(samples))
                )
    return found


def judged(picture: world.Picture, question: world.WorldQuestion, text: str, finish_reason: str) -> Sample:
    """What is true of a solution."""
    read = parse_trajectory(text, "stop" if finish_reason == "stop" else "length")
    key = answer_key(read.answer, question.text) if read.answer is not None else None
    right = key is not None and key == answer_key(question.answer, question.text)
    verdicts = [world.step_truth(picture, step) for step in read.reasoning_steps] if read.well_formed else []
    checked, true = sum(v is not None for v in verdicts), sum(v is True for v in verdicts)
    habit = "guess"
    if checked and (right or true == checked):
        habit = "careful" if true == checked else "made up"
    return Sample(text, read.reasoning_steps, read.answer, key, right, checked, true, habit)


def scores(asked: Sequence[Asked]) -> dict[str, float]:
    """Shares in % over the questions and all of their samples."""
    samples = [sample for one in asked for sample in one.samples]
    votes = [(one, majority([s.key for s in one.samples])) for one in asked]
    shares = {
        "greedy": np.mean([one.greedy.right for one in asked]),
        "mean@1": np.mean([s.right for s in samples]),
        f"maj@{SAMPLES}": np.mean([bool(v.members) and one.samples[v.members[0]].right for one, v in votes]),
        f"pass@{SAMPLES}": np.mean([any(s.right for s in one.samples) for one in asked]),
        "true steps": sum(s.true for s in samples) / max(sum(s.checked for s in samples), 1),
        **{h: np.mean([s.habit == h for s in samples]) for h in ("careful", "guess", "made up")},
        "no step": np.mean([not s.checked for s in samples]),
    }
    return {name: round(100 * float(share), 1) for name, share in shares.items()}


def share_of_pairs(won: NDArray[np.float64], pairs: NDArray[np.int64], rng: np.random.Generator) -> Interval | None:
    """The share of the pairs that are won, with an interval from resampled questions."""
    if not pairs.sum():
        return None
    drawn = rng.integers(len(won), size=(RESAMPLES, len(won)))
    low, high = np.quantile(won[drawn].sum(1) / pairs[drawn].sum(1), [0.025, 0.975])
    return Interval(*(100 * float(x) for x in (won.sum() / pairs.sum(), low, high)))


# --- do words give the habits away? -----------------------------------------------------------------------------------


def words(text: str, mask: str) -> Counter[str]:
    """Counts of the words and signs of a text, and of pairs of neighbors; what the mask matches is one word."""
    found = re.findall(r"\w+|[^\w\s]", re.sub(rf"\b(?:{mask})\b", "X", text))
    return Counter(found) + Counter(f"{a} {b}" for a, b in pairwise(found))


def habit_auc(asked: Sequence[Asked], habits: Sequence[str], mask: str, seed: int = 0) -> Interval | None:
    """How often the classifier ranks a careful solution above another one of the same question that has other habits.

    Args:
        asked: the questions.
        habits: what else a solution may be.
        mask: the words that the classifier is not shown.
        seed: of the folds and of the resampled questions.

    Returns:
        The share over all pairs, with an interval from resampled questions; None where there are no pairs.
    """
    groups = []
    for one in asked:
        kept = [(s.habit == "careful", words(s.text, mask)) for s in one.samples if s.habit in (*habits, "careful")]
        if len({careful for careful, _ in kept}) == 2:
            groups.append(kept)
    if len(groups) < FOLDS:
        return None
    names = {name: i for i, name in enumerate(sorted({name for kept in groups for _, row in kept for name in row}))}
    centered, labels = [], []
    for kept in groups:
        counts = torch.zeros(len(kept), len(names))
        for i, (_, row) in enumerate(kept):
            for name, number in row.items():
                counts[i, names[name]] = min(number, 3)
        centered.append(counts - counts.mean(0))  # what all solutions of a question share tells nothing
        labels.append(torch.tensor([float(careful) for careful, _ in kept]))
    rng = np.random.default_rng(seed)
    fold = rng.permutation(len(groups)) % FOLDS
    won, pairs = np.zeros(len(groups)), np.zeros(len(groups), dtype=np.int64)
    for held_out in range(FOLDS):
        train = [i for i in range(len(groups)) if fold[i] != held_out]
        weights = _fitted(torch.cat([centered[i] for i in train]), torch.cat([labels[i] for i in train]))
        for i in np.flatnonzero(fold == held_out):
            value = centered[i] @ weights
            margins = (value[labels[i] == 1][:, None] - value[labels[i] == 0][None]).flatten()
            won[i] = float((margins > 1e-6).sum() + 0.5 * (margins.abs() <= 1e-6).sum())
            pairs[i] = len(margins)
    return share_of_pairs(won, pairs, rng)


def _fitted(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The weights [F] of a logistic regression, with both labels weighing the same."""
    weights = torch.zeros(features.shape[1], requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    balance = torch.where(labels == 1, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(features @ weights + bias, labels, weight=balance)
        loss = loss + PENALTY * (weights**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return weights.detach()


# --- tables -----------------------------------------------------------------------------------------------------------


def table(asked: Sequence[Asked], name: str, group: Callable[[Asked], str]) -> list[dict[str, float | str]]:
    """The scores of each group of questions."""
    groups: dict[str, list[Asked]] = defaultdict(list)
    for one in asked:
        groups[group(one)].append(one)
    return [{name: key, "questions": len(groups[key]), **scores(groups[key])} for key in sorted(groups)]


def printed(rows: Iterable[dict[str, float | str]]) -> None:
    """Print rows as a Markdown table."""
    rows = list(rows)
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(str, row.values()))} |")
    print()


def main(argv: Sequence[str] | None = None) -> None:
    """Print three tables and the classifier's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, or a folder")
    parser.add_argument("--questions", type=int, default=640)
    parser.add_argument("--style", default="chalk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the samples are written")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    asked = ask(options.model, options.style, options.questions, options.seed)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in asked]), "utf-8")
    printed(table(asked, "all", lambda one: "all"))
    printed(table(asked, "family, steps", lambda one: f"{one.family}, {'one' if one.steps == 1 else 'several'}"))
    printed(table(asked, "kind", lambda one: one.kind))
    pooled = {"a guess": ("guess",), "a made-up one": ("made up",), "either": ("guess", "made up")}
    for against, habits in pooled.items():
        for mask, pattern in MASKS.items():
            print(f"words tell careful from {against}, {mask}: {habit_auc(asked, habits, pattern)} %")


if __name__ == "__main__":
    main()
