"""The commands about held-out answers: `eval`; `compare`, of what it or lmms-eval wrote about two models; and `label`,
with which a person makes evaluation data."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ireasoner.app.options import WHOLE, Count, Device, JsonFile, Seed, keep
from ireasoner.method.types import Match, UsageError
from ireasoner.training.config import ImagePixels, option

if TYPE_CHECKING:  # these import torch
    from ireasoner.training.evaluation import EvaluationOptions
    from ireasoner.training.labelled import LabelledQuestion

MATCH, MOST_PIXELS = option("match").default, option("max_image_pixels").default


def evaluate(
    models: list[str],
    /,
    *,
    data: Path,
    limit: Count | None = None,
    match: Match = MATCH,
    preset: str | None = None,
    revision: str | None = None,
    temperature: Annotated[float, Field(ge=0, lt=100)] = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
    blank: bool = False,
    select: bool = False,
    max_image_pixels: Annotated[ImagePixels, WHOLE] = MOST_PIXELS,
    json: JsonFile = None,
) -> int:
    """Greedy, mean@1, maj@5 and pass@5 accuracy with 95 % intervals on labelled questions. The file that --json names
    also holds the scores of each question.

    Args:
        models: Run, checkpoint or model. Two are compared: the second with the first, what was trained with its base.
        data: JSONL of image, question, answer.
        limit: Ask only so many questions, drawn from as many images as possible.
        match: How answers are judged where a question names no metric: sameness, ChartQA's 5 %, ANLS, VQA's ten people.
        preset: Preset for plain models: prompts and lengths (7b; tiny for the tiny model).
        revision: Branch, tag or commit of plain models on the hub; a run has its own (the newest commit).
        temperature: Temperature of the sampled answers.
        seed: Seed of the sampled answers.
        blank: Show gray images instead of the true ones: how much is answered unseen?
        select: Choose a run's best checkpoint by the questions about half of the images, and report it on the others.
        max_image_pixels: Most pixels of an image.
    """
    from ireasoner.app import display
    from ireasoner.app.targets import evaluate_target
    from ireasoner.training.labelled import answer_prior, load_questions, prior_line
    from ireasoner.training.targets import find_target

    if len(models) > 2:
        raise UsageError("eval takes one run or model, or two to compare")
    if select and (len(models) > 1 or not (Path(models[0]) / "config.yaml").is_file()):
        raise UsageError("--select takes one run directory, and chooses among its checkpoints")
    # The base comes first in whatever order they are named, so that the difference is what training changed.
    targets = [] if select else [find_target(name, preset, revision) for name in models]
    targets.sort(key=lambda target: target.run is not None)
    from ireasoner.playground.truth import step_truth

    questions = load_questions(data, limit, step_truth)
    from ireasoner.training.evaluation import EvaluationOptions

    options = EvaluationOptions(
        match=match,
        seed=seed,
        temperature=temperature,
        blank=blank,
        max_image_pixels=max_image_pixels,
    )
    if select:
        keep(json, {"match": match, **_selected(Path(models[0]), questions, options, device)})
        return 0
    scores = [evaluate_target(target, questions, options, device=device, truth=step_truth) for target in targets]
    named = [f"{target.name}, images blanked" if blank else target.name for target in targets]
    result = {"match": match, **display.evaluation_table(named, scores)}
    columns = [found.per_question() for found in scores]
    result["per_question"] = columns[0] if len(columns) == 1 else {"before": columns[0], "after": columns[1]}
    result["asked"] = _asked(questions)
    if blank:
        result["answer_prior"] = answer_prior(questions)
        display.print_text(prior_line(result["answer_prior"]))
    keep(json, result)
    return 0


def _selected(
    run: Path, questions: Sequence[LabelledQuestion], options: EvaluationOptions, device: str
) -> dict[str, Any]:
    """Choose among the checkpoints of a run, print what chose and how the choice does; returns it, ready for JSON."""
    from ireasoner.app import display
    from ireasoner.app.targets import select_target
    from ireasoner.playground.truth import step_truth

    target, found = select_target(run, questions, options, device=device, truth=step_truth)
    last, base = Path(target.name), target.config.model
    names = {candidate: candidate.name if candidate else base for candidate in found.choosing}
    display.selection_table({names[c]: scores for c, scores in found.choosing.items()}, names[found.chosen])
    # Where nothing is better than the base, the last checkpoint is shown beside it: what would be lost?
    after = found.chosen or last
    result = display.evaluation_table([base, names[after]], [found.judging[None], found.judging[after]])
    if found.chosen is None:
        display.print_text(f"No checkpoint was better than {display.plain(base)} by the first half: keep the base.")
    elif found.chosen != last:
        display.print_text("The last checkpoint beside the chosen one, on the same questions:")
        display.evaluation_table([names[last], names[after]], [found.judging[last], found.judging[after]])
    if found.chosen:
        display.print_text(f"To use it, name it in place of the run: ireasoner ask {shlex.quote(str(found.chosen))} …")
    return {
        **result,
        "chosen": str(found.chosen or base),
        "chosen_by": {names[candidate]: scores.summary() for candidate, scores in found.choosing.items()},
        "last": {"checkpoint": names[last], "scores": found.judging[last].summary()},
        "per_question": {"before": found.judging[None].per_question(), "after": found.judging[after].per_question()},
        "asked": _asked(found.questions),
    }


def _asked(questions: Sequence[LabelledQuestion]) -> list[dict[str, str]]:
    return [{"image": str(q.image), "question": q.question, "answer": q.answer} for q in questions]


def compare(a: Path, b: Path, /, *, metric: str | None = None, json: JsonFile = None) -> int:
    """Compare two models, document by document, by the sample logs that lmms-eval wrote of them with --log_samples, or
    by what eval wrote with --json. The difference is B - A, with a 95 % interval and a paired test: McNemar's exact one
    where every score is 0 or 1 and no two documents are known to be about one image, and otherwise random sign flips,
    all documents about an image together.

    Args:
        a: A sample log (*_samples_*.jsonl), the folder with the logs of one model, or a file that eval --json wrote.
        b: The same of the other model.
        metric: Compare by this metric alone (by all that both have).
    """
    from ireasoner.app.display import comparison_table
    from ireasoner.studies.compare import compare_logs

    found = compare_logs(a, b, metric)
    comparison_table(found)
    keep(json, asdict(found))
    return 0


def label(
    run: Path,
    /,
    *,
    questions: Count = 50,
    out: Path | None = None,
    seed: Seed = 0,
    viewer: bool = True,
) -> int:
    """Answer some of a run's own questions about its images, and learn how often its majority answered as you do. Your
    answers are written as evaluation data. Enter alone skips a question and q stops; every answer is saved at once, and
    the same command goes on where it was stopped.

    Args:
        run: A run directory, finished or not.
        questions: How many questions to answer, one an image, spread over the training steps.
        out: The file to write or to go on with (RUN/labelled.jsonl).
        seed: Seed of the draw of questions.
        viewer: Open each image on the desktop; its path is printed in any case.
    """
    from ireasoner.app import display, labelling
    from ireasoner.training.config import load_config

    config = load_config(run / "config.yaml")
    out = out or run / "labelled.jsonl"
    show = display.open_on_desktop if viewer else None
    if not labelling.label(run, config, out, questions, seed, show):
        print("Nothing was answered.")
        return 0
    print(f"\nYour answers: {out}   (the same command goes on)")
    display.print_text(labelling.agreement(out))
    print("What the model answers before and after training:")
    revision = ("--revision", config.revision) if config.revision else ()
    _print_command("eval", config.model, run, "--data", out, *revision)
    display.print_text(
        "The run has trained on these images, though without answers. Held-out accuracy takes a new run, which "
        "sets them aside (add the options of this one):"
    )
    given = ("--images", config.images, "--model", config.model, *revision, "--out", "NEW", "--eval-data", out)
    _print_command("train", *given)
    return 0


def _print_command(*words: object) -> None:
    """A command to copy. What a config says is quoted, because a run may come from anywhere."""
    from ireasoner.app.display import plain

    print(f"  {plain(shlex.join(['ireasoner', *map(str, words)]), 2000)}")
