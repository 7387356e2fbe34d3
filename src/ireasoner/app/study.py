"""The commands that study a model or a method: `ablate`, `validity`, `bench`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import Field

from ireasoner.app.options import WHOLE, Count, Device, JsonFile, Revision, Split, Style, keep, whole
from ireasoner.app.paths import absolute
from ireasoner.app.training_options import SCALE, with_training_options
from ireasoner.method.types import Match, UsageError
from ireasoner.training.config import PRESET_OPTIONS

SCALE_OPTIONS = (
    "revision",
    "preset",
    "device",
    "image_column",
    "max_image_pixels",
    "items",
    "images_per_item",
    "frame_rate",
    *(name for name in PRESET_OPTIONS if name != "eval_questions"),
)

AtLeastTwo = Annotated[int, Field(ge=2), WHOLE]


@with_training_options({SCALE: SCALE_OPTIONS})
def ablate(
    out: Path,
    /,
    *,
    recipes: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    suite: Literal["field"] | None = None,
    seeds: Count | None = None,
    quick: bool = False,
    cooled: bool | None = None,
    jobs: Count | None = None,
    questions: Count | None = None,
    style: Style | None = None,
    split: Split | None = None,
    model: str | None = None,
    images: str | None = None,
    data: Path | None = None,
    match: Match | None = None,
    labels: Path | None = None,
    **training: Any,
) -> int:
    """Train every recipe under every seed, score all of them and the base on the same held-out questions, and write
    OUT/ablation.md, .csv, .png, .json and .npz. Stopped, it goes on with: ireasoner ablate OUT. More recipes or seeds
    may be named later; what OUT holds is not made again.

    Args:
        out: Folder to write, or to go on in.
        recipes: Names or YAML files (paper outcome-only answers-only random-reward default).
        suite: Instead of recipes: paper, default and the published rewards, with controls, under 3 seeds (field).
        seeds: Runs of each recipe, seeds 0 to N - 1 (5).
        quick: 2 seeds, 256 questions, 24 steps and 2 jobs: a first look.
        cooled: Add a control: the base at the temperature at which its answer entropy equals the first recipe's.
        jobs: Arms that run at a time, sharing the cores (1).
        questions: Held-out questions, at most (512).
        style: How the embedded world is drawn (chalk).
        split: Which of the embedded world's questions (test).
        model: A folder, a hub id, or 'tiny' (tiny).
        images: Your own unlabeled images, as train takes them; needs --data.
        data: JSONL of your own held-out questions: image, question, answer.
        match: How answers are judged, where a question names no metric (exact).
        labels: JSONL of labelled questions on your images, for the oracle.
    """
    from ireasoner.app import display
    from ireasoner.studies import ablate as study
    from ireasoner.studies.ablation_tables import legend, tables
    from ireasoner.training.labelled import prior_line

    named = {
        "recipes": recipes,
        "seeds": seeds,
        "cooled": cooled,
        "questions": questions,
        "style": style,
        "split": split,
        "model": model,
        "images": images,
        "data": data,
        "match": match,
        "labels": labels,
    }
    given = absolute({name: value for name, value in named.items() if value is not None}) | {"training": training}
    if suite and recipes:
        raise UsageError("--suite names the recipes: leave out --recipes")
    jobs = jobs or (study.QUICK_JOBS if quick else 1)
    assumed = {**(study.field_suite(given) if suite else {}), **(study.QUICK if quick else {})}
    given = {**assumed, **given, "training": {**assumed.get("training", {}), **given["training"]}}
    for number in (signal.SIGTERM,) if sys.platform == "win32" else (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup, SIGHUP stays ignored
            signal.signal(number, signal.default_int_handler)  # interrupt as Ctrl-C does
    try:
        with display.as_progress():
            result = study.ablate(out.absolute(), study.settle(out.absolute(), given), jobs)
    except OSError as error:
        raise UsageError(f"the ablation in {out} cannot go on: {error}") from None
    except KeyboardInterrupt:
        more = f" --jobs {jobs}" if jobs > 1 else ""
        print(f"Stopped and saved. Continue with: ireasoner ablate {out}{more}")
        return 130
    for title, rows in tables(result):
        display.print_table(title, rows)
    display.print_text(prior_line(result["answer_prior"]))
    display.print_text(legend(result))
    print(f"Written: {out}/ablation.md, ablation.csv, ablation.png, ablation.json, ablation.npz")
    return 0


def validity(
    run: Path,
    /,
    *,
    truth: Path | None = None,
    steps: Annotated[tuple[int, int] | None, WHOLE] = None,
    json: JsonFile = None,
) -> int:
    """Test, on a run's episodes, whether step agreement prefers the truer of two trajectories with the same answer,
    what it adds to answer agreement, and how it reacts to edited reasoning steps. The run is only read; its model is
    loaded for the token embeddings.

    Args:
        run: A run directory, finished or not; it is only read.
        truth: Lines of image and picture, as playground writes them (FOLDER.truth.jsonl beside the run's images).
        steps: First and last training step to read (all).
    """
    if steps and not 1 <= steps[0] <= steps[1]:
        raise UsageError("--steps takes FIRST and LAST, from 1 on, FIRST not after LAST")
    from ireasoner.app import display
    from ireasoner.studies import validity as study

    report = study.validity(run, truth, steps)
    for sentence in study.sentences(report):
        display.print_text(display.plain(sentence, 300))
    agreement, *edits = study.tables(report)
    display.print_table(*agreement)
    if pairs := study.pairs_line(report):
        display.print_text(f"{pairs}\n")
    for table in edits:
        display.print_table(*table)
    keep(json, report)
    return 0


def _timed_here(kind: Any, tokens: Sequence[Any]) -> tuple[str, ...]:
    sides = tuple(token.value for token in tokens)
    if "published" in sides:
        raise UsageError("--sides published: benchmarks/published_step.py in a checkout of the source times that one")
    return sides


def bench(
    *,
    model: Annotated[str, Parameter(alias="--model-name-or-path")] = "tiny",
    sides: Annotated[tuple[Literal["ours", "plain"], ...], Parameter(consume_multiple=True, converter=_timed_here)] = (
        "ours",
        "plain",
    ),
    group_size: Annotated[AtLeastTwo | None, Parameter(alias="--num-generations")] = None,
    image_tokens: Count | None = None,
    images_per_step: Annotated[tuple[Count, ...], Parameter(consume_multiple=True, converter=whole)] = (1, 16),
    tokens: AtLeastTwo = 40,
    repetitions: Count = 5,
    device: Device = "auto",
    revision: Revision = None,
    json: JsonFile = None,
) -> int:
    """Time one training step as train does it (ours) and the same work without shared prompts (plain), on one model,
    with completions of a fixed length, in turns. Also prints the limits that this machine's compute and memory
    bandwidth set.

    Args:
        model: A folder, a hub id, 'tiny', or a size with random weights: 'random-25m', 'random-7b'.
        sides: What to time.
        group_size: Trajectories of a question (the preset's).
        image_tokens: Tokens of each picture, about (a small picture's).
        images_per_step: Batch sizes to measure.
        tokens: Tokens of each solver completion.
        repetitions: Repetitions of each measurement.
    """
    from ireasoner.app import display
    from ireasoner.model.pieces import out_of_memory_is_told
    from ireasoner.studies.bench import heading, load_bench, measure, table

    with out_of_memory_is_told():
        loaded = load_bench(model, tokens, group_size, image_tokens, device, revision)
        known = {"ours": loaded.ours, "plain": loaded.plain}
        result = measure(loaded, {name: known[name] for name in sides}, images_per_step, repetitions)
    display.print_text(heading(result))
    for row in result["sizes"]:
        display.print_table(*table(row))
    keep(json, result)
    return 0
