"""Does self-evolution help on the playground? Recipes x seeds on held-out questions, with paired intervals.

`python -m ireasoner.playground.study OUT` writes `study.json` (every number) and `study.md` (the table). Each arm is
an ordinary run below OUT; an arm that is complete is not trained again, one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.utils import logging

from ireasoner.config import Config, resolve
from ireasoner.evaluate import MEASURES, RESAMPLES, Scores, evaluate, load_questions
from ireasoner.playground import dataset
from ireasoner.policy import Policy
from ireasoner.recorder import write_json
from ireasoner.train import Observer, resume, start


def arm_config(out: Path, recipe: str, seed: int, flags: dict[str, Any]) -> Config:
    """The config of one arm: the tiny preset on OUT's unlabeled pictures."""
    return resolve(
        {"model": "tiny", "images": str(out / "data" / "unlabeled"), "recipe": recipe, "seed": seed, **flags}
    )


def train_arm(config: Config, folder: Path) -> None:
    """Train one arm to its end, from wherever it is."""
    observer = Observer(on_step=lambda step, metrics, episodes: print(f"{folder.name} {step}/{config.steps}", end="\r"))
    (resume if (folder / "config.yaml").exists() else start)(config, folder, observer)


def run_scores(folder: Path, config: Config, questions: list[Any], role: Any, temperature: float = 1.0) -> Scores:
    """Held-out scores of an arm's solver (role) or of the base (None); the sampling seed is the arm's."""
    policy = Policy.from_config(config)
    if role is not None:
        policy.load_adapters(folder)
    return evaluate(
        policy,
        questions,
        role,
        prompt=config.solver_prompt,
        max_tokens=config.max_solution_tokens,
        seed=config.seed,
        temperature=temperature,
    )


def matching_temperature(config: Config, questions: list[Any], entropy: float) -> float:
    """The temperature at which the base's answers have the given mean entropy (bisection on validation questions)."""
    low, high = 0.05, 1.5
    for _ in range(6):
        middle = (low + high) / 2
        found = run_scores(Path(), config, questions, None, middle).answer_entropy.mean()
        low, high = (middle, high) if found < entropy else (low, middle)
    return (low + high) / 2


def paired_interval(differences_SQ: NDArray[np.float64], seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95 % interval of a difference [seeds, questions], resampling seeds and questions alike."""
    rng = np.random.default_rng(seed)
    seeds, questions = differences_SQ.shape
    rows = rng.integers(seeds, size=(RESAMPLES, seeds))
    weights = rng.multinomial(questions, np.full(questions, 1 / questions), size=RESAMPLES) / questions
    seed_weights = np.stack([(rows == s).mean(1) for s in range(seeds)], axis=1)
    means = np.einsum("rs,sq,rq->r", seed_weights, differences_SQ, weights, optimize=True)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(differences_SQ.mean()), float(low), float(high)


def study(
    out: Path, recipes: Sequence[str], seeds: int, style: str, questions: int, split: str, flags: dict[str, Any]
) -> dict[str, Any]:
    """Train and score every arm; returns and writes the results."""
    data = out / "data"
    if not (data / "complete").exists():
        dataset.write_unlabeled(data / "unlabeled", 512, style)
        for name in {split, "validation"}:
            dataset.write_questions(data / name, questions, style, name)
        (data / "complete").touch()
    held_out = load_questions(data / split / f"{split}.jsonl")
    validation = load_questions(data / "validation" / "validation.jsonl", 128)
    scores: dict[str, list[Scores]] = {"base": []}
    for seed in range(seeds):
        scores["base"].append(run_scores(out, arm_config(out, "default", seed, flags), held_out, None))
    for recipe in recipes:
        scores[recipe] = []
        for seed in range(seeds):
            config, folder = arm_config(out, recipe, seed, flags), out / f"{recipe}-{seed}"
            train_arm(config, folder)
            scores[recipe].append(run_scores(folder, config, held_out, "solver"))
            print(f"{folder.name}: " + "  ".join(f"{m} {scores[recipe][-1].measures[m].mean():.3f}" for m in MEASURES))
    target = float(np.mean([s.answer_entropy.mean() for s in scores[recipes[0]]]))
    base_config = arm_config(out, "default", 0, flags)
    temperature = matching_temperature(base_config, validation, target)
    cooled = f"base at temperature {temperature:.2f}"
    scores[cooled] = []
    for seed in range(seeds):
        config = arm_config(out, "default", seed, flags)
        scores[cooled].append(run_scores(out, config, held_out, None, temperature))
    result = {
        "style": style, "split": split, "questions": len(held_out), "seeds": seeds, "flags": flags,
        "arms": {name: _arm_row(found, scores["base"]) for name, found in scores.items()},
    }  # fmt: skip
    first, others = recipes[0], [name for name in scores if name != recipes[0]]
    result["differences"] = {f"{first} − {name}": _differences(scores[first], scores[name]) for name in others}
    (out / "study.json").write_text(write_json(result), "utf-8")
    (out / "study.md").write_text(table(result), "utf-8")
    return result


def _arm_row(scores: Sequence[Scores], base: Sequence[Scores]) -> dict[str, Any]:
    return {
        "mean": {m: float(np.mean([s.measures[m].mean() for s in scores])) for m in MEASURES},
        "by_seed": {m: [float(s.measures[m].mean()) for s in scores] for m in MEASURES},
        "answer_entropy": float(np.mean([s.answer_entropy.mean() for s in scores])),
        "well_formed": float(np.mean([s.well_formed.mean() for s in scores])),
        "minus_base": _differences(scores, base),
    }


def _differences(scores: Sequence[Scores], base: Sequence[Scores]) -> dict[str, list[float]]:
    return {
        m: list(paired_interval(np.stack([a.measures[m] - b.measures[m] for a, b in zip(scores, base, strict=True)])))
        for m in MEASURES
    }


def table(result: dict[str, Any]) -> str:
    """The results as Markdown, in percent, differences from the base with their 95 % intervals."""
    lines = [
        f"{result['questions']} {result['split']} questions, style {result['style']}, {result['seeds']} seeds. "
        "Accuracy in %; in brackets the paired difference from the base, 95 % interval over seeds and questions.",
        "",
        "| arm | " + " | ".join(MEASURES) + " | answer entropy | well-formed |",
        "|---" * (len(MEASURES) + 3) + "|",
    ]
    for name, row in result["arms"].items():
        cells = []
        for measure in MEASURES:
            mean, low, high = (100 * x for x in row["minus_base"][measure])
            change = "" if name == "base" else f" ({mean:+.1f} [{low:+.1f}, {high:+.1f}])"
            cells.append(f"{100 * row['mean'][measure]:.1f}{change}")
        lines.append(f"| {name} | {' | '.join(cells)} | {row['answer_entropy']:.2f} | {100 * row['well_formed']:.1f} |")
    lines += ["", "| paired difference | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for name, row in result["differences"].items():
        cells = ["{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in row[measure])) for measure in MEASURES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Recipes x seeds on the playground, with paired intervals.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["default", "random-reward"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--style", default="chalk")
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--flags", type=json.loads, default={}, help='training options as JSON, {"steps": 30}')
    a = parser.parse_args()
    logging.disable_progress_bar()
    print(table(study(a.out, a.recipes, a.seeds, a.style, a.questions, a.split, a.flags)))


if __name__ == "__main__":
    main()
