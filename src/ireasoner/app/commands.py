"""The commands. Each checks its options, calls the package and prints the result.

Modules that need torch are imported when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from ireasoner.app import display
from ireasoner.app.api import continued, follow
from ireasoner.app.command import Command
from ireasoner.app.paths import absolute, find_truth
from ireasoner.app.targets import evaluate_target
from ireasoner.app.using import Ask, Export, Push
from ireasoner.method.matching import Match
from ireasoner.method.recipe import Count
from ireasoner.method.types import UsageError
from ireasoner.model.options import Dtype
from ireasoner.training import config as configs
from ireasoner.training.advice import advice
from ireasoner.training.labelled import answer_prior, load_questions, prior_line
from ireasoner.training.recorder import write_json
from ireasoner.training.targets import find_target
from ireasoner.training.watch import ENDED_ITSELF

if TYPE_CHECKING:  # these import torch
    from ireasoner.studies.doctor import Finding
    from ireasoner.studies.reading import Drawn

PROGRAM = "ireasoner"
Style = Literal["chalk", "varied", "plain"]
Split = Literal["validation", "test"]
Seed = Annotated[int, Field(ge=0)]
READ_WITH = (
    "recipe", "preset", "seed", "eval_data", "held_out", "labels", "reward", "group_size", "max_question_tokens",
    "max_solution_tokens", "solution_form", "proposer_prompt", "solver_prompt", "max_image_tokens", "max_image_pixels",
    "learning_rate",
)  # fmt: skip
SCALE = (
    "revision",
    "preset",
    "device",
    "max_image_pixels",
    *(name for name in configs.PRESET_OPTIONS if name != "eval_questions"),
)


def _writable(path: Path) -> Path:
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written")
    return path


def _timed_here(side: Any) -> Any:
    if side == "published":
        raise UsageError("--sides published: benchmarks/published_step.py in a checkout of the source times that one")
    return side


Writable = Annotated[Path, AfterValidator(_writable)]  # found out now rather than after hours of work


class Measurement(Command):
    """A command whose results can be kept."""

    json_file: Annotated[Writable | None, Field(alias="json")] = None
    """Write the results here too."""

    def keep(self, results: Any) -> None:
        """Write the results to the file that was named, if any."""
        if self.json_file is not None:
            try:
                self.json_file.write_text(write_json(results), "utf-8")
            except OSError as error:
                raise UsageError(f"the results cannot be written to {self.json_file}: {error}") from None


class OfRun(Command):
    """A command that shows a run."""

    positional: ClassVar = ("run_dir",)
    run_dir: Path
    """A run directory, finished or not."""
    truth: Path | None = None
    """Truth about the images, as playground writes it, to mark wrong majorities (the file inside RUN, if any)."""


class Train(Command):
    """Self-evolve a model on a folder of unlabeled images, or continue a run."""

    model_config = ConfigDict(extra="allow")  # the options of a run, which `resolve` checks
    summary: ClassVar = "self-evolve a model on a folder of images"
    training_options: ClassVar = {
        "run": [name for name in configs.PATHS if name not in (*configs.RECIPE_OPTIONS, *configs.PRESET_OPTIONS)],
        "scale (a preset sets these)": configs.PRESET_OPTIONS,
        "rewards, advantages, KL (a recipe sets these)": configs.RECIPE_OPTIONS,
    }
    out: Path | None = None
    """The run directory to write."""
    resume: Path | None = None
    """Continue the run in this directory."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Save and stop after so many hours, as Ctrl-C does; --resume continues."""

    def run(self) -> int:
        flags = absolute(self.model_extra or {})
        if self.resume is not None:
            if self.out is not None:
                raise UsageError("--resume RUN continues RUN in place: leave out --out")
            config, extend_to = continued(self.resume, flags)
            return _follow(
                config,
                self.resume,
                resuming=True,
                trusts_reward="reward" in flags,
                max_hours=self.max_hours,
                extend_to=extend_to,
            )
        missing = [name for name in ("images", "model") if name not in flags] + ["out"] * (self.out is None)
        if missing or self.out is None:
            raise UsageError(f"train needs {', '.join('--' + name for name in missing)} (or --resume RUN)")
        return _follow(configs.resolve(flags), self.out, resuming=False, max_hours=self.max_hours)


class Demo(Command):
    """Write a folder of unlabeled pictures, self-evolve the tiny model that ships here on it, and show its accuracy on
    held-out questions before and after."""

    summary: ClassVar = "watch the tiny model improve itself, in minutes, on a CPU"
    out: Path = Path("runs/demo")
    """The run directory to write."""
    recipe: str = "default"
    """Name of a recipe, or a YAML file."""
    style: Style = "chalk"
    """How the pictures are drawn."""
    seed: Seed = 0
    """Seed of training."""
    steps: Count | None = None
    """Training steps (as many as the preset says)."""

    def run(self) -> int:
        from ireasoner.playground import dataset

        data = self.out / "data"
        style = data / "style"
        flags = {
            "images": str((data / "unlabeled").absolute()),
            "eval_data": str((data / "test" / "test.jsonl").absolute()),
            "eval_questions": 512,
            "model": "tiny",
            "recipe": self.recipe,
            "seed": self.seed,
            **({"steps": self.steps} if self.steps else {}),
        }
        config = configs.resolve(flags)
        if (self.out / "config.yaml").exists():
            differing = configs.conflicts(configs.load_config(self.out / "config.yaml"), flags)
            drawn = style.read_text("utf-8") if style.is_file() else self.style
            if drawn != self.style:
                differing.append(f"--style is {drawn[:20]!r} in the run, not {self.style!r}")
            if differing:
                problem = f"{self.out} holds a run with other options ({'; '.join(differing)})"
                raise UsageError(f"{problem}: choose another --out")
            finished = (self.out / "summary.json").exists()
            state = ", finished: choose another --out for a new one" if finished else ": going on"
            print(f"{self.out} holds this run{state}.")
            return _follow(config, self.out, resuming=True)
        print(f"Drawing 512 pictures into {data}/unlabeled and 512 others, a held-out question each, into {data}/test.")
        try:
            dataset.write_unlabeled(data / "unlabeled", 512, self.style)
            dataset.write_questions(data / "test", 512, self.style)
            style.write_text(self.style, "utf-8")
        except OSError as error:
            raise UsageError(f"cannot write to {data}: {error.strerror}") from None
        return _follow(config, self.out, resuming=False)


class Eval(Measurement):
    """Greedy, mean@1, maj@5 and pass@5 accuracy with 95 % intervals on labelled questions. The file that --json names
    also holds the scores of each question."""

    summary: ClassVar = "held-out accuracy of a run or a model; two are compared on the same questions"
    positional: ClassVar = ("models",)
    models: list[str]
    """Run, checkpoint or model; of two, the second is compared with the first, and what was trained with what was
    not."""
    data: Path
    """JSONL of image, question, answer."""
    limit: Count | None = None
    """Ask only so many questions, drawn from as many images as possible."""
    match: Match = configs.option("match").default
    """How answers are judged, where a question names no metric: by sameness, ChartQA's 5 %, ANLS, or VQA's agreement
    with ten people."""
    preset: str | None = None
    """Preset for plain models: prompts and lengths (7b; tiny for the tiny model)."""
    revision: str | None = None
    """Branch, tag or commit of plain models on the hub; a run has its own (the newest commit)."""
    temperature: Annotated[float, Field(ge=0, lt=100)] = 1.0
    """Temperature of the sampled answers."""
    seed: Seed = 0
    """Seed of the sampled answers."""
    device: str = "auto"
    """One of auto, cpu, cuda and cuda:N."""
    blank: bool = False
    """Show gray images instead of the true ones: how much is answered unseen?"""
    max_image_pixels: configs.ImagePixels = configs.option("max_image_pixels").default
    """Most pixels of an image."""

    def run(self) -> int:
        if len(self.models) > 2:
            raise UsageError("eval takes one run or model, or two to compare")
        # The base comes first in whatever order they are named, so that the difference is what training changed.
        targets = [find_target(name, self.preset, self.revision) for name in self.models]
        targets.sort(key=lambda target: target.run is not None)
        from ireasoner.playground.truth import step_truth

        questions = load_questions(self.data, self.limit, step_truth)
        from ireasoner.training.evaluation import EvaluationOptions

        options = EvaluationOptions(
            match=self.match,
            seed=self.seed,
            temperature=self.temperature,
            blank=self.blank,
            max_image_pixels=self.max_image_pixels,
        )
        scores = [
            evaluate_target(target, questions, options, device=self.device, truth=step_truth) for target in targets
        ]
        named = [f"{target.name}, images blanked" if self.blank else target.name for target in targets]
        result = {"match": self.match, **display.evaluation_table(named, scores)}
        columns = [found.per_question() for found in scores]
        result["per_question"] = columns[0] if len(columns) == 1 else {"before": columns[0], "after": columns[1]}
        if self.blank:
            result["answer_prior"] = answer_prior(questions)
            display.print_text(prior_line(result["answer_prior"]))
        self.keep(result)
        return 0


class Label(Command):
    """Answer some of a run's own questions about its images, and learn how often its majority answered as you do. Your
    answers are written as evaluation data. Enter alone skips a question and q stops; every answer is saved at once, and
    the same command goes on where it was stopped."""

    summary: ClassVar = "answer a run's own questions yourself, as evaluation data"
    positional: ClassVar = ("run_dir",)
    run_dir: Path
    """A run directory, finished or not."""
    questions: Count = 50
    """How many questions to answer, one an image, spread over the training steps."""
    out: Path | None = None
    """The file to write or to go on with (RUN/labelled.jsonl)."""
    seed: Seed = 0
    """Seed of the draw of questions."""
    no_viewer: bool = False
    """Only print the paths of the images, without opening them on the desktop."""

    def run(self) -> int:
        from ireasoner.app.labelling import agreement, label

        config = configs.load_config(self.run_dir / "config.yaml")
        out = self.out or self.run_dir / "labelled.jsonl"
        show = None if self.no_viewer else display.open_on_desktop
        if not label(self.run_dir, config, out, self.questions, self.seed, show):
            print("Nothing was answered.")
            return 0
        print(f"\nYour answers: {out}   (the same command goes on)")
        display.print_text(agreement(out))
        print("What the model answers before and after training:")
        revision = ("--revision", config.revision) if config.revision else ()
        _print_command("eval", config.model, self.run_dir, "--data", out, *revision)
        display.print_text(
            "The run has trained on these images, though without answers. Held-out accuracy takes a new run, which "
            "sets them aside (add the options of this one):"
        )
        given = ("--images", config.images, "--model", config.model, *revision, "--out", "NEW", "--eval-data", out)
        _print_command("train", *given)
        return 0


class Ablate(Command):
    """Train every recipe under every seed, score all of them and the base on the same held-out questions, and write
    OUT/ablation.md, .csv, .png, .json and .npz. Stopped, it goes on with: ireasoner ablate OUT. More recipes or seeds
    may be named later; what OUT holds is not made again."""

    model_config = ConfigDict(extra="allow")  # scale, which `settle` checks
    summary: ClassVar = "recipes x seeds beside the base and the controls: one table with intervals"
    positional: ClassVar = ("out",)
    training_options: ClassVar = {"scale (a preset sets these; the same for every arm)": SCALE}
    out: Path
    """Folder to write, or to go on in."""
    recipes: list[str] | None = None
    """Names or YAML files (paper outcome-only answers-only random-reward default)."""
    seeds: Count | None = None
    """Runs of each recipe, seeds 0 to N - 1 (5)."""
    quick: bool = False
    """2 seeds, 256 questions, 24 steps and 2 jobs: a first look."""
    cooled: bool = False
    """Add a control: the base, sampled at the temperature at which its answer entropy equals the first recipe's."""
    jobs: Count | None = None
    """Arms that run at a time, sharing the cores (1)."""
    questions: Count | None = None
    """Held-out questions, at most (512)."""
    style: Style | None = None
    """How the embedded world is drawn (chalk)."""
    split: Split | None = None
    """Which of the embedded world's questions (test)."""
    model: str | None = None
    """A folder, a hub id, or 'tiny' (tiny)."""
    images: Path | None = None
    """Folder of your own unlabeled images; needs --data."""
    data: Path | None = None
    """JSONL of your own held-out questions: image, question, answer."""
    match: Match | None = None
    """How answers are judged, where a question names no metric (exact)."""
    labels: Path | None = None
    """JSONL of labelled questions on your images, for the oracle."""

    def run(self) -> int:
        from ireasoner.studies.ablate import QUICK, QUICK_JOBS, Settings, ablate, settle
        from ireasoner.studies.ablation_tables import legend, tables

        given = self.model_dump(mode="json", exclude_unset=True, include=set(Settings.model_fields))
        given = {**absolute(given), "training": dict(self.model_extra or {})}
        jobs = self.jobs or (QUICK_JOBS if self.quick else 1)
        if self.quick:
            given = {**QUICK, **given, "training": {**QUICK["training"], **given["training"]}}
        for number in (signal.SIGTERM,) if sys.platform == "win32" else (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup, SIGHUP stays ignored
                signal.signal(number, signal.default_int_handler)  # interrupt as Ctrl-C does
        out = self.out.absolute()
        try:
            result = ablate(out, settle(out, given), jobs)
        except OSError as error:
            raise UsageError(f"the ablation in {self.out} cannot go on: {error}") from None
        except KeyboardInterrupt:
            more = f" --jobs {jobs}" if jobs > 1 else ""
            print(f"Stopped and saved. Continue with: {PROGRAM} ablate {self.out}{more}")
            return 130
        for title, rows in tables(result):
            display.print_table(title, rows)
        display.print_text(prior_line(result["answer_prior"]))
        display.print_text(legend(result))
        print(f"Written: {self.out}/ablation.md, ablation.csv, ablation.png, ablation.json, ablation.npz")
        return 0


class View(OfRun):
    """Show a run on a local page: is it working, what does it ask and answer, how do the reasoning steps agree, how did
    it change, what ran. Follows a run that goes on. Ctrl-C ends it."""

    summary: ClassVar = "look at a run in the browser, while it goes or afterwards"
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port on 127.0.0.1 (0: any that is free)."""
    no_browser: bool = False
    """Only print the address."""

    def run(self) -> int:
        from ireasoner.page.server import serve

        def ready(address: str) -> None:
            print(f"{self.run_dir}: {address}   (Ctrl-C ends it)", flush=True)
            if not self.no_browser:
                display.open_on_desktop(address)

        with suppress(KeyboardInterrupt):  # how a viewer ends
            serve(self.run_dir, self.port, ready, find_truth(self.run_dir, self.truth))
        return 0


class Report(OfRun):
    """Write the page about a run, with its pictures, as one HTML file that needs nothing else."""

    summary: ClassVar = "write that page as one file that can be mailed"
    out: Writable | None = None
    """The file to write (RUN/report.html)."""

    def run(self) -> int:
        from ireasoner.page import write_report

        try:
            path = write_report(self.run_dir, self.out, find_truth(self.run_dir, self.truth))
        except OSError as error:
            raise UsageError(f"the report could not be written: {error}") from None
        print(f"Written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
        return 0


class Runs(Command):
    """List the runs in a folder and below it, the latest last."""

    summary: ClassVar = "list runs with their state and results"
    positional: ClassVar = ("folder",)
    folder: Path = Path("runs")
    """Where to look."""

    def run(self) -> int:
        from ireasoner.page.overview import overview

        rows = overview(self.folder)
        if len(rows) == 1:
            print(f"No run in {self.folder}. Start one with: {PROGRAM} demo")
            return 0
        display.print_table(
            f"Runs in {display.plain(str(self.folder))}", [[display.plain(cell) for cell in row] for row in rows]
        )
        return 0


class Validity(Measurement):
    """Test, on a run's episodes, whether step agreement prefers the truer of two trajectories with the same answer,
    what it adds to answer agreement, and how it reacts to edited reasoning steps. The run is only read; its model is
    loaded for the token embeddings."""

    summary: ClassVar = "test whether step agreement is worth being a reward, without training"
    positional: ClassVar = ("run_dir",)
    run_dir: Path
    """A run directory, finished or not; it is only read."""
    truth: Path | None = None
    """Lines of image and picture, as playground writes them (FOLDER.truth.jsonl beside the run's images)."""
    steps: tuple[int, int] | None = None
    """Training steps to read (all)."""

    def run(self) -> int:
        if self.steps and not 1 <= self.steps[0] <= self.steps[1]:
            raise UsageError("--steps takes FIRST and LAST, from 1 on, FIRST not after LAST")
        from ireasoner.studies.validity import pairs_line, sentences, tables, validity

        report = validity(self.run_dir, self.truth, self.steps)
        for sentence in sentences(report):
            display.print_text(display.plain(sentence, 300))
        agreement, edits = tables(report)
        display.print_table(*agreement)
        if pairs := pairs_line(report):
            display.print_text(f"{pairs}\n")
        display.print_table(*edits)
        self.keep(report)
        return 0


class Doctor(Measurement):
    """Check a model, in about a minute: that the update sees the image, that the reference is the frozen model, that
    updating a role changes that role's adapter and nothing else, that sampler and learner agree, and that only the
    language model is trainable. Each check comes with its figure. With --images, the model then asks and answers about
    the first images that a run would draw, four at most, as train would have it do with the same options: every text
    is shown with how it was read and what it earned, and whether training can learn from such texts. The exit code is
    1 if a check fails or the model cannot learn; nothing is trained, and nothing is written but the file that --json
    names, which holds all texts in full."""

    model_config = ConfigDict(extra="allow")  # the options of a run, which `resolve` checks
    summary: ClassVar = "check that this model can be trained correctly on this machine, and can learn from your images"
    positional: ClassVar = ("model",)
    training_options: ClassVar = {"what train would be given (with --images)": READ_WITH}
    model: str
    """A folder, a hub id, or 'tiny'."""
    images: Path | None = None
    """Folder of your unlabeled images: read what the model asks and answers about some of them."""
    device: str = "auto"
    """One of auto, cpu, cuda and cuda:N."""
    dtype: Dtype | None = None
    """Of the backbone (with --images the preset's; otherwise float32 on a CPU, bfloat16 on a GPU, or float16 where it
    has none)."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub (the newest commit)."""

    def run(self) -> int:
        config = self._config()
        from ireasoner.model.pieces import out_of_memory_is_told

        with out_of_memory_is_told():
            return self._examine(config)

    def _examine(self, config: configs.Config | None) -> int:
        from ireasoner.model.backbone import lacks_bfloat16, resolve_device
        from ireasoner.model.options import BackboneOptions
        from ireasoner.studies import reading
        from ireasoner.studies.doctor import examine

        drawn = reading.draw(config) if config else None  # now, so that a mistake need not wait for the checks
        device = resolve_device(self.device)
        of_device: Dtype = "float32" if device == "cpu" else "float16" if lacks_bfloat16(device) else "bfloat16"
        backbone = config.backbone if config else BackboneOptions(dtype=self.dtype or of_device)
        dtype = backbone.dtype
        print(f"{self.model} in {dtype} on {device}")
        rate = {"learning_rate": config.optimizer.learning_rate} if config else {}
        checks = _shown(examine(self.model, backbone, device=device, revision=self.revision, **rate))
        failed = sum(not finding.passed for finding in checks)
        print(f"{failed} of the checks failed: do not train on this." if failed else "All checks passed.")
        result: dict[str, Any] = {"model": self.model, "dtype": dtype, "checks": [asdict(check) for check in checks]}
        if config is None or drawn is None:
            print("What this model would write about your images was not looked at: name some with --images FOLDER.")
        else:
            result |= _read_and_judge(config, drawn, checks)
            failed += not result["can_learn"]
        self.keep(result)
        return 1 if failed else 0

    def _config(self) -> configs.Config | None:
        """The config that train would have; None without images."""
        given = self.model_extra or {}
        if self.images is None:
            if given:
                raise UsageError(f"{', '.join(map(configs.as_flag, given))}: only with --images FOLDER")
            return None
        given |= {name: getattr(self, name) for name in ("dtype", "revision") if getattr(self, name)}
        return configs.resolve({**given, "model": self.model, "images": str(self.images), "device": self.device})


class Bench(Measurement):
    """Time one training step as train does it (ours) and the same work without shared prompts (plain), on one model,
    with completions of a fixed length, in turns. Also prints the limits that this machine's compute and memory
    bandwidth set."""

    summary: ClassVar = "time one training step by phases, with and without shared prompts"
    model: str = "tiny"
    """A folder, a hub id, 'tiny', or a size with random weights: 'random-25m', 'random-7b'."""
    sides: tuple[Annotated[Literal["ours", "plain"], BeforeValidator(_timed_here)], ...] = ("ours", "plain")
    """What to time."""
    group_size: Annotated[int, Field(ge=2)] | None = None
    """Trajectories of a question (the preset's)."""
    image_tokens: Count | None = None
    """Tokens of each picture, about (a small picture's)."""
    images_per_step: tuple[Count, ...] = (1, 16)
    """Batch sizes to measure."""
    tokens: Annotated[int, Field(ge=2)] = 40
    """Tokens of each solver completion."""
    repetitions: Count = 5
    """Repetitions of each measurement."""
    device: str = "auto"
    """One of auto, cpu, cuda and cuda:N."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub (the newest commit)."""

    def run(self) -> int:
        from ireasoner.model.pieces import out_of_memory_is_told
        from ireasoner.studies.bench import heading, load_bench, measure, table

        with out_of_memory_is_told():
            bench = load_bench(self.model, self.tokens, self.group_size, self.image_tokens, self.device, self.revision)
            known = {"ours": bench.ours, "plain": bench.plain}
            result = measure(bench, {name: known[name] for name in self.sides}, self.images_per_step, self.repetitions)
        display.print_text(heading(result))
        for row in result["sizes"]:
            display.print_table(*table(row))
        self.keep(result)
        return 0


class Playground(Command):
    """Write unlabeled pictures (OUT/unlabeled) and held-out questions (OUT/SPLIT) of the embedded world."""

    summary: ClassVar = "write the embedded world's pictures and questions as files"
    positional: ClassVar = ("out",)
    out: Path
    """Folder to write."""
    style: Style = "chalk"
    """How the pictures are drawn."""
    images: Count = 512
    """Unlabeled pictures."""
    questions: Count = 512
    """Labelled questions."""
    split: Split = "test"
    """Which split the questions are of."""
    items: tuple[int, int] = (2, 4)
    """Fewest and most items in a picture."""
    seed: Seed = 0
    """Seed of the pictures."""

    def run(self) -> int:
        from ireasoner.playground import dataset

        if not 2 <= self.items[0] <= self.items[1] <= 6:
            raise UsageError("--items takes LEAST and MOST between 2 and 6, FIRST not above LAST")
        try:
            unlabeled = self.out / "unlabeled"
            dataset.write_unlabeled(unlabeled, self.images, self.style, self.seed, self.items)
            folder = self.out / self.split
            path = dataset.write_questions(folder, self.questions, self.style, self.split, self.seed, self.items)
        except OSError as error:
            raise UsageError(f"cannot write to {self.out}: {error.strerror}") from None
        print(f"Unlabeled pictures: {unlabeled}   labelled questions: {path}")
        return 0


COMMANDS: dict[str, type[Command]] = {
    command.__name__.lower(): command
    for command in (
        Train,
        Demo,
        Eval,
        Ask,
        Export,
        Push,
        Label,
        Ablate,
        View,
        Report,
        Runs,
        Validity,
        Doctor,
        Bench,
        Playground,
    )
}


def _shown(findings: Iterable[Finding]) -> list[Finding]:
    """The doctor's findings, each printed as soon as it is made."""
    found = []
    for finding in findings:
        display.print_finding(finding)
        found.append(finding)
    return found


def _read_and_judge(config: configs.Config, drawn: Drawn, checks: Sequence[Finding]) -> dict[str, Any]:
    """Show what the model writes about some images and whether it can learn here, for which the checks count as well.

    Returns:
        The result, ready for JSON.
    """
    from ireasoner.studies import reading
    from ireasoner.training.items import first_skips, set_aside_line

    episodes = reading.read(config, drawn)
    display.print_text(
        f"\nWhat it writes about {len(episodes)} images of {display.plain(str(config.images))}: recipe "
        f"{display.plain(config.recipe.name)}, preset {display.plain(config.preset)}, {config.sampling.group_size} "
        "solutions of a question"
    )
    for episode in episodes:
        display.print_episode(episode, config)
    display.print_text("")
    if drawn.skipped:
        display.print_text(f"Images that cannot be used: {display.plain(first_skips(drawn.skipped), 1000)}.")
    if config.eval_data or config.held_out:
        display.print_text(set_aside_line(drawn.pool.set_aside))
    findings = _shown(reading.judge(config, episodes))
    sentences = reading.verdict(config, [*checks, *findings])
    display.print_text("")
    for sentence in sentences:
        display.print_text(display.plain(sentence, 1000))
    return {
        "can_learn": all(finding.passed for finding in (*checks, *findings)),
        "verdict": sentences,
        "findings": [asdict(finding) for finding in findings],
        "set_aside": drawn.pool.set_aside,
        "skipped": drawn.skipped,
        "episodes": [episode.model_dump(mode="json") for episode in episodes],
    }


def _print_command(*words: object) -> None:
    """A command to copy. What a config says is quoted, because a run may come from anywhere."""
    print(f"  {display.plain(shlex.join([PROGRAM, *map(str, words)]), 2000)}")


def _follow(
    config: configs.Config,
    out: Path,
    *,
    resuming: bool,
    trusts_reward: bool = False,
    max_hours: float | None = None,
    extend_to: int | None = None,
) -> int:
    """Run or resume with a display; the exit code."""
    outcome = follow(
        config,
        out,
        resuming=resuming,
        max_hours=max_hours,
        trusts_reward=trusts_reward,
        extend_to=extend_to,
    )
    if os.environ.get("RANK", "0") != "0":
        return 0 if outcome.complete else 130  # the first process tells how the run ended
    if not outcome.complete:
        print(f"Stopped after step {outcome.step}, saved. Continue with: {PROGRAM} train --resume {out}")
        return 130
    summary = outcome.summary or {}
    if summary.get("before") and summary.get("after"):
        display.results_table(summary)
    trained = summary.get("trained_roles", [])
    print(f"Run directory: {out}   adapters: {', '.join(f'{out}/{role}' for role in trained) or 'none'}")
    if "solver" not in trained:
        print("Nothing was learned: the solver is still the model that the run started from.")
    else:
        print(f"Use it: {PROGRAM} ask {out} IMAGE QUESTION   or {PROGRAM} export {out} --to FOLDER")
    if ended := summary.get("stopped_early") or "solver" not in trained:
        for sentence in advice(config):
            print(sentence)
    print(f"Look at it: {PROGRAM} view {out}   or open {out}/report.html")
    return ENDED_ITSELF if ended else 0
