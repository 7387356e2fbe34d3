"""What `--overlap` costs in learning, and what it gains in time.

    python benchmarks/overlap.py learning --seeds 0 1 2
    python benchmarks/overlap.py time --servers http://127.0.0.1:8001,http://127.0.0.1:8002 --model FOLDER

*Learning*: the embedded model trains on the embedded world with and without, under the same seeds, and is scored on
validation questions. No servers are needed: a step is sampled before the update instead of beside it, which is the same
for the model. *Time*: the same run in both ways by turns on servers that were started with `ireasoner serve`. They need
other cores than the learner's (`taskset`), as they would have other GPUs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ireasoner import Observer
from ireasoner.app import api
from ireasoner.playground import dataset
from ireasoner.playground.truth import step_truth
from ireasoner.training.checks import check_start
from ireasoner.training.closing import evaluate_role
from ireasoner.training.config import resolve
from ireasoner.training.opening import prepare
from ireasoner.training.selfplay import Draft, at_once
from ireasoner.training.state import Run
from ireasoner.training.statistics import half_width, numbered
from ireasoner.training.teaching import update

SHOWN = ("mean@1", "maj@5", "pass@5")
PARTS = ("step", "play", "ahead", "wait", "update", "refresh")


def trained(folder: Path, recipe: str, seed: int, cap: float, *, ahead: bool) -> Run:
    """A run of the preset's length whose steps were sampled one update ahead, or not."""
    options = {
        "images": str(folder / "unlabeled"), "eval_data": str(folder / "validation" / "validation.jsonl"),
        "model": "tiny", "recipe": recipe, "seed": seed, "eval_questions": 512, "device": "cpu", "importance_cap": cap,
    }  # fmt: skip
    config = resolve(options)
    run = prepare(config, folder / "run", check_start(config, folder / "run"), Observer(), truth=step_truth)
    count = config.schedule.images_per_step

    def sampled(step: int) -> Draft:
        return run.selfplay.begin(step, run.pool.take(count), at_once)()

    draft, gaps = sampled(1), []
    for run.step in range(1, config.schedule.steps + 1):
        play = run.selfplay.score(draft)
        if ahead:
            draft = sampled(run.step + 1)
        _, metrics = update(run, play)
        gaps.append(metrics.get("mean_sampler_gap/solver", 0.0))
        if not ahead:
            draft = sampled(run.step + 1)
    print(f"  mean gap {statistics.fmean(gaps):.3f} nats a token", end="")
    return run


def learning(arguments: argparse.Namespace) -> None:
    scores: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset.write_unlabeled(folder / "unlabeled", 512, "chalk")
        dataset.write_questions(folder / "validation", 512, "chalk", "validation")
        ways = {"one update behind": (2.0, True), "not behind": (0.0, False)}
        if arguments.uncorrected:
            ways["behind, not weighted"] = (0.0, True)
        for seed in arguments.seeds:
            for way, (cap, ahead) in ways.items():
                print(f"seed {seed}, {way}:", end="", flush=True)
                run = trained(folder, arguments.recipe, seed, cap, ahead=ahead)
                found = evaluate_role(run, "after", "solver")
                scores.setdefault(way, []).append(found.per_question())
                told = (f"{each} {100 * np.mean(found.per_question()[each]):.1f}" for each in SHOWN)
                print(",", ", ".join(told), f", true steps {100 * (found.step_truth or 0):.1f}", flush=True)
    images_Q = numbered(range(512))
    for way in list(ways)[:1] + list(ways)[2:]:
        for measure in SHOWN:
            behind, beside = (np.array([row[measure] for row in scores[each]]) for each in (way, "not behind"))
            mean, half = (behind - beside).mean(), half_width(behind - beside, images_Q)
            print(f"{way} less not behind, {measure}: {100 * mean:+.1f} [{100 * (mean - half):+.1f}, "
                  f"{100 * (mean + half):+.1f}]")  # fmt: skip


def times(arguments: argparse.Namespace) -> None:
    found: dict[bool, dict[str, list[float]]] = {way: {part: [] for part in PARTS} for way in (True, False)}
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset.write_unlabeled(folder / "images", 64, "chalk")
        for turn in range(arguments.turns):
            steps: dict[bool, list[float]] = {}
            for overlap in (True, False):
                rows: list[dict[str, float]] = []
                observer = Observer(on_step=lambda step, metrics, *_, rows=rows: rows.append(dict(metrics)))
                api.train(
                    folder / "images", arguments.model, folder / f"run-{turn}-{overlap}", observer=observer,
                    servers=arguments.servers, overlap=overlap, steps=arguments.steps, preset="tiny", probe_every=0,
                    images_per_step=arguments.images_per_step, blank_every=0, watch=False, save_every=0, device="cpu",
                    max_solution_tokens=arguments.tokens, gate_low=0, gate_high=1, proposer_every=1,
                )  # fmt: skip
                for row in rows[1:-1]:  # the first step is sampled on its own, and nothing is sampled beside the last
                    for part in PARTS:
                        found[overlap][part].append(row.get(f"time/{part}_seconds", 0.0))
                steps[overlap] = [row["time/step_seconds"] for row in rows[1:-1]]
            ratios.append(statistics.median(steps[False]) / statistics.median(steps[True]))
    for overlap, parts in found.items():
        told = ", ".join(f"{part} {statistics.median(values):.2f}" for part, values in parts.items())
        print(f"{'overlapped' if overlap else 'in turn'}: {told} (median seconds)")
    print(f"in turn / overlapped: {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    learns = parts.add_parser("learning", help="is as much learned?")
    learns.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs (%(default)s)")
    learns.add_argument("--recipe", default="default", help="(%(default)s)")
    learns.add_argument("--uncorrected", action="store_true", help="also without importance weights")
    learns.set_defaults(measure=learning)
    timed = parts.add_parser("time", help="how much faster is a step?")
    timed.add_argument("--servers", required=True, help="addresses, between commas")
    timed.add_argument("--model", default="tiny", help="'tiny' or a folder (%(default)s)")
    timed.add_argument("--turns", type=int, default=3, help="(%(default)s)")
    timed.add_argument("--steps", type=int, default=6, help="of each run (%(default)s)")
    timed.add_argument("--images-per-step", type=int, default=4, help="(%(default)s)")
    timed.add_argument("--tokens", type=int, default=64, help="longest solution (%(default)s)")
    timed.set_defaults(measure=times)
    arguments = parser.parse_args()
    arguments.measure(arguments)


if __name__ == "__main__":
    main()
