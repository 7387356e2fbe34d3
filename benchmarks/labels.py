"""What a few labels add to self-play, beside training on the same labels alone.

    python benchmarks/labels.py OUT --jobs 2
    python -m ireasoner.playground.easyvqa EASY --labels
    python benchmarks/labels.py OUT --images EASY/unlabeled --labels EASY/labels.jsonl --data EASY/test/test.jsonl
    ireasoner playground CLIPS --kind clips --labels
    python benchmarks/labels.py OUT --images CLIPS/unlabeled --labels CLIPS/labels.jsonl --data CLIPS/test/test.jsonl \
        --items clips --model models/tiny_several

Without files of one's own, on the embedded world. Under every seed, so many images are drawn that have a label, and of
each of them one question; fewer labels are some of the more. Where a model plays with labels, they are asked in a
quarter of the items. Stopped, it goes on where it was. The values of every question are in OUT/labels.npz.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ireasoner.studies.ablate import Settings, draw_world, eval_command
from ireasoner.studies.ablation_jobs import ArmsProgress, make_scores
from ireasoner.studies.ablation_numbers import summarize
from ireasoner.training.clips import ItemFiles
from ireasoner.training.labelled import LabelledQuestion, load_questions
from ireasoner.training.recorder import replace_file, write_json

SHARE = 0.25
TOLD = ("greedy", "mean@1", "maj@5", "pass@5", "step_truth")


def draw_labels(labels: Sequence[LabelledQuestion], count: int, seed: int, out: Path) -> Path:
    """Write one question about each of `count` images to `out`."""
    by_image: dict[str, list[dict[str, object]]] = {}
    for question in labels:
        row = {"question": question.question, "answer": question.answer, **_shown(question.image)}
        by_image.setdefault(str(question.image), []).append(row)
    rng = np.random.default_rng(seed)
    images = rng.permutation(sorted(by_image)).tolist()
    rows = [by_image[image][rng.integers(len(by_image[image]))] for image in images][:count]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return out


def _shown(image: Path | ItemFiles) -> dict[str, object]:
    """How a row names what it is about."""
    if isinstance(image, Path):
        return {"image": str(image)}
    return {"clip" if image.is_clip else "images": list(map(str, image.paths))}


def arms(counts: list[int]) -> dict[str, tuple[int, list[str]]]:
    """By name, how many labels an arm has and the options of its runs. Without labels, it is `default`."""
    found: dict[str, tuple[int, list[str]]] = {"default": (0, [])}
    for count in counts:
        found[f"default and {count} labels"] = count, [f"--label-share={SHARE}"]
    return found | {f"{count} labels alone": (count, []) for count in counts}


def main(out: Path, settings: Settings, labels: Path | None, counts: list[int], steps: int, jobs: int) -> None:
    if settings.images is None and not (out / "data").exists():
        draw_world(out, settings)
    out.mkdir(parents=True, exist_ok=True)
    images = settings.images or str(out / "data" / "unlabeled")
    known, seeds = load_questions(labels or out / "data" / "labels.jsonl"), range(settings.seeds)
    chosen, commands = arms(counts), {}
    for seed in seeds:
        score = eval_command(out, settings, "base", seed)
        score[2] = "--preset=tiny"  # in place of the file that an ablation writes
        commands[f"base-{seed}"] = [score]
    for seed in seeds:
        for arm, (count, options) in chosen.items():
            run = out / f"{arm.replace(' ', '-')}-{seed}"
            given = [f"--labels={draw_labels(known, count, seed, out / f'{count}-{seed}.jsonl')}"] if count else []
            train = ["train", f"--out={run}", f"--images={images}", f"--model={settings.model}", f"--seed={seed}"]
            train += [f"--steps={steps}", "--preset=tiny", f"--items={settings.training['items']}", *given, *options]
            resumed = ["train", f"--resume={run}"]
            score = eval_command(out, settings, arm.replace(" ", "-"), seed)
            commands[run.name] = [resumed if (run / "config.yaml").exists() else train, score]
    with ArmsProgress(out, [name for name in commands if not name.startswith("base")], steps) as progress:
        scores = make_scores(out, commands, jobs, progress)
    columns = {
        arm: {
            name: np.stack([scores[f"{arm.replace(' ', '-')}-{seed}"][name] for seed in seeds])
            for name in scores["base-0"]
        }
        for arm in ("base", *chosen)
    }
    result = {"questions": columns["base"]["image"].shape[1], "steps": steps, "share": SHARE, **summarize(columns, {})}
    values = {f"{arm}/{name}": array for arm, of_arm in columns.items() for name, array in of_arm.items()}
    np.savez_compressed(out / "labels.npz", allow_pickle=False, **values)
    replace_file(out / "labels.json", write_json(result).encode())
    for arm, found in result["arms"].items():
        told = [f"{name} {100 * found['mean'][name]:.1f}" for name in TOLD if name in found["mean"]]
        print(f"{arm}: {'  '.join(told)}")
        for reference, changes in found["minus"].items():
            shown = [f"{name} {_percent(changes[name])}" for name in TOLD if changes.get(name)]
            print(f"    less {reference}: {'  '.join(shown)}")


def _percent(change: list[float]) -> str:
    mean, low, high = (100 * value for value in change)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What a few labels add to self-play.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", help="a folder of unlabeled images, in place of the embedded world")
    parser.add_argument("--labels", type=Path, help="JSONL of labelled questions about them")
    parser.add_argument("--data", type=Path, help="JSONL of held-out questions about others")
    parser.add_argument("--items", default="images", help="what an item of the images is, as `train` takes it")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--counts", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    own = {"images": str(Path(given.images).absolute()), "data": str(given.data.absolute())} if given.images else {}
    told = {"model": given.model, "training": {"items": given.items}}
    where = Settings(**own, **told, questions=given.questions, seeds=given.seeds)
    main(given.out.absolute(), where, given.labels, given.counts, given.steps, given.jobs)
