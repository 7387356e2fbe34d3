"""Recipes x seeds beside the base and the controls: which is better, by how much, and how certain that is.

Below OUT, an arm is an ordinary run directory `ARM-SEED/`, made by `ireasoner train`, with its held-out scores in
`ARM-SEED.json`, made by `ireasoner eval`; what both print goes to `ARM-SEED.log`. Nothing is made twice: an ablation
that was stopped goes on where it was, and one that is given more recipes or seeds makes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ireasoner.method.types import UsageError
from ireasoner.model.backbone import load_processor
from ireasoner.playground import dataset, world
from ireasoner.playground.truth import step_truth
from ireasoner.studies import ablation_tables as report
from ireasoner.training.config import PRESET_OPTIONS, Config, dump_config, load_config, names, resolve
from ireasoner.training.custom_reward import names_a_file, sha256_of
from ireasoner.training.items import ImagePool
from ireasoner.training.labelled import answer_prior, load_questions, prior_line
from ireasoner.training.recorder import replace_file, write_json
from ireasoner.training.state import load_labels
from ireasoner.training.statistics import MEASURES
from ireasoner.training.watch import ENDED_ITSELF

UNLABELED, VALIDATION, LABELS_PER_IMAGE = 512, 128, 4
BISECTIONS = 6
POLL_SECONDS, QUIET_SECONDS = 0.25, 30.0
MAY_CHANGE = ("recipes", "seeds", "cooled")
QUICK_JOBS = 2
QUICK: dict[str, Any] = {"seeds": 2, "questions": 256, "training": {"steps": "24"}}
Columns = dict[str, NDArray[np.float64]]  # by measure, a value for each question
Jobs = Mapping[str, Sequence[list[str]]]  # by the name of scores in OUT, the commands that make them, an eval last


class Settings(BaseModel):
    """What an ablation compares, and on what data; `settings.json` in OUT. Without images: on the embedded world."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "tiny"
    images: str | None = None
    data: str | None = None
    data_sha256: str | None = None
    labels: str | None = None
    style: str = "chalk"
    split: Literal["validation", "test"] = "test"
    questions: int = 512
    recipes: tuple[str, ...] = ("paper", "outcome-only", "answers-only", "random-reward", "default")
    seeds: int = 5
    cooled: bool = False
    training: dict[str, Any] = {}


def settle(out: Path, given: Mapping[str, Any]) -> Settings:
    """The settings of an ablation in OUT: those that OUT holds already, and the given ones.

    Args:
        out: the folder of the ablation.
        given: settings by name; only those that were named on the command line.

    Raises:
        UsageError: options that contradict each other or what OUT holds; a folder of something else; a reward of the
            user's own, where `given` does not name the recipes again.
        OSError: a file that cannot be read.
    """
    path = out / "settings.json"
    try:
        stored = Settings.model_validate_json(path.read_bytes()) if path.exists() else None
        if stored is None and out.exists() and any(out.iterdir()):
            raise UsageError(f"{out} is not empty and holds no ablation: choose another folder")
        kept = stored or Settings()
        settings = Settings(**{**dict(kept), **given, "training": kept.training | given.get("training", {})})
        if settings.data is not None:
            digest = hashlib.sha256(Path(settings.data).read_bytes()).hexdigest()
            settings = settings.model_copy(update={"data_sha256": digest})
    except ValidationError as error:
        raise UsageError(f"{path} holds no settings of an ablation: {error.errors()[0]['msg']}") from None
    if (settings.images is None) != (settings.data is None):
        raise UsageError("your own images and questions belong together: give both --images and --data, or neither")
    if settings.images and (given.keys() & {"style", "split"} or settings.cooled):
        raise UsageError("--style, --split and --cooled are for the embedded world: leave them out with --images")
    if stored and stored.data == settings.data and stored.data_sha256 != settings.data_sha256:
        raise UsageError(f"{settings.data} has changed since {out} was begun: choose another folder")
    if stored and (differing := _differing(_fixed(out, stored), _fixed(out, settings))):
        raise UsageError(f"{out} holds an ablation with other options ({differing}): choose another folder")
    # OUT may come from somebody else: it may set the scale and nothing that a recipe sets, such as code to run.
    if strangers := set(settings.training) - {"preset", "device", *PRESET_OPTIONS}:
        raise UsageError(
            f"{path} holds training options that an ablation does not take: {', '.join(sorted(strangers))}"
        )
    for recipe in () if "recipes" in given else settings.recipes:
        if names_a_file(config := arm_config(out, settings, recipe, 0)):
            own = f"the recipe {recipe} is paid by {config.recipe.reward}"
            raise UsageError(f"{own}, whose code is run only if you say so: name the recipes again with --recipes")
    return settings


def _fixed(out: Path, settings: Settings) -> dict[str, Any]:
    """What must not change between two calls; training options as resolved, for 24 and 24.0 are the same."""
    config = arm_config(out, settings, "paper", 0).flat()
    return settings.model_dump(exclude={*MAY_CHANGE, "training"}) | {n: config[n] for n in (*PRESET_OPTIONS, "preset")}


def _differing(kept: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    return "; ".join(f"{name} is {kept[name]}, not {given[name]}" for name in kept if kept[name] != given[name])


def arm_config(out: Path, settings: Settings, recipe: str, seed: int) -> Config:
    """The config of one arm's run. Only a recipe whose reward reads labels is given any."""
    labels = settings.labels or (None if settings.images else str(out / "data" / "labels.jsonl"))
    flags = {"images": settings.images or str(out / "data" / "unlabeled"), "model": settings.model, "seed": seed}
    config = resolve({**settings.training, **flags, "recipe": recipe, **({"labels": labels} if labels else {})})
    return config if config.recipe.reward == "oracle" else config.model_copy(update={"labels": None})


def arm_names(recipes: Sequence[str]) -> dict[str, str]:
    """Recipes by the name of their arm: a recipe's own, or that of its file."""
    found = {recipe if recipe in names("recipes") else Path(recipe).stem: recipe for recipe in recipes}
    if len(found) < len(recipes) or found.keys() & {"base", "data", "step"}:  # step-0 would be read as a checkpoint
        raise UsageError(f"each recipe needs a name of its own, other than base, data and step: {', '.join(recipes)}")
    return found


def draw_world(out: Path, settings: Settings) -> None:
    """Draw the embedded world into OUT/data, all or nothing: unlabeled images, labels for the oracle, questions."""
    draft = out / ".data"
    shutil.rmtree(draft, ignore_errors=True)
    folder = dataset.write_unlabeled(draft / "unlabeled", UNLABELED, settings.style)
    rng = np.random.default_rng(0)
    rows = [
        {"image": f"{folder.name}/{name}", "question": question.text, "answer": question.answer}
        for name, picture in dataset.load_truth(folder).items()
        for question in (world.sample_question(picture, rng) for _ in range(LABELS_PER_IMAGE))
    ]
    dataset.write_rows(draft / "labels.jsonl", rows)
    for split, count in {"validation": VALIDATION, settings.split: settings.questions}.items():
        dataset.write_questions(draft / split, count, settings.style, split)
    draft.rename(out / "data")


def prepare(out: Path, settings: Settings) -> None:
    """Check everything that was named before OUT is touched; then write the files that `train` and `eval` read.

    Raises:
        UsageError: whatever cannot be used, by name; an arm that was trained with other options.
    """
    configs = {arm: arm_config(out, settings, recipe, 0) for arm, recipe in arm_names(settings.recipes).items()}
    load_processor(settings.model)
    if settings.images:
        if out.resolve().is_relative_to(Path(settings.images).resolve()):
            raise UsageError(f"{out} lies inside the image folder {settings.images}: choose another folder")
        load_questions(questions_file(out, settings), settings.questions, step_truth)
        pool = ImagePool.scan(settings.images, 0)
        for config in configs.values():
            if config.labels:
                load_labels(config, pool)
    for arm, config in configs.items():
        for seed in range(settings.seeds):
            _check_run(out / f"{arm}-{seed}", config.changed(seed=seed))
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "settings.json", settings.model_dump_json(indent=2).encode())
    options = next(iter(configs.values())).flat()
    # The base is evaluated with the prompts and lengths that all arms share.
    replace_file(out / "preset.yaml", yaml.safe_dump({name: options[name] for name in PRESET_OPTIONS}).encode())
    if not settings.images and not (out / "data").exists():
        print(f"Drawing {UNLABELED} unlabeled pictures and the questions into {out / 'data'}.")
        draw_world(out, settings)


def _check_run(run: Path, config: Config) -> None:
    """Refuse a run that was trained with other options, as when a recipe's file has changed since.

    Paths and the device may differ, for OUT may have been moved; an unfinished run then goes on with the new ones.
    """
    if not (run / "config.yaml").exists():
        return
    stored, wanted = load_config(run / "config.yaml"), config.flat()
    moved = stored.changed(**{name: wanted[name] for name in ("images", "labels", "model", "device", "recipe")})
    if differing := _differing(moved.flat(), wanted):
        raise UsageError(f"{run} was trained with other options ({differing}): choose another folder")
    if stored.reward_sha256 not in (None, sha256_of(config)):
        raise UsageError(f"{config.recipe.reward} has changed since {run} was trained: choose another folder")
    if moved != stored and not (run / "summary.json").exists():
        replace_file(run / "config.yaml", dump_config(moved).encode())


def questions_file(out: Path, settings: Settings) -> Path:
    """The held-out questions: the user's own, or those of the embedded world."""
    return Path(settings.data or out / "data" / settings.split / f"{settings.split}.jsonl")


def train_command(out: Path, settings: Settings, recipe: str, run: Path, seed: int) -> list[str]:
    """The arguments of `ireasoner` that begin a run or resume it; resuming a finished run only writes its report."""
    config = arm_config(out, settings, recipe, seed)
    if (run / "config.yaml").exists():
        return ["train", f"--resume={run}", *([f"--reward={config.recipe.reward}"] if names_a_file(config) else [])]
    options = {"out": run, **settings.training, "images": config.images, "model": settings.model, "recipe": recipe}
    options |= {"seed": seed, **({"labels": config.labels} if config.labels else {})}
    command = ["train"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag, *value] if isinstance(value, list) else [f"{flag}={value}"]
    return command


def eval_command(out: Path, settings: Settings, arm: str, seed: int, *options: str) -> list[str]:
    """The arguments of `ireasoner` that evaluate an arm or the base; its sampled answers have the arm's seed.

    Args:
        options: further options, which override those given here.
    """
    target = [settings.model, f"--preset={out / 'preset.yaml'}"] if arm == "base" else [str(out / f"{arm}-{seed}")]
    data = f"--data={questions_file(out, settings)}", f"--limit={settings.questions}"
    return ["eval", *target, *data, f"--seed={seed}", f"--device={settings.training.get('device', 'auto')}", *options]


class ArmsProgress(Progress):
    """Progress of all arms together, with the time left: a bar on a terminal, otherwise a line now and then.

    It counts training steps, which it reads from the run directories. Evaluation is not counted: it takes about the
    same share of each arm's time.

    Args:
        out: the folder of the ablation.
        arms: the names of the run directories in it.
        steps: how many training steps each of them takes.
    """

    def __init__(self, out: Path, arms: Sequence[str], steps: int) -> None:
        self.left = TimeRemainingColumn()
        columns = BarColumn(), TimeElapsedColumn(), TextColumn("left"), self.left
        description = TextColumn("{task.description}", markup=False)
        # The speed is averaged over an hour, because steps of a large model take minutes.
        super().__init__(description, *columns, transient=True, speed_estimate_period=3600)
        self.disable = not self.console.is_terminal
        self.out, self.arms, self.steps, self.told = out, arms, steps, self.get_time()
        self.add_task("", total=steps * len(arms))

    def steps_of(self, arm: str) -> int:
        """How many steps an arm has trained: each is a line of its metrics. A run may end early, but then is scored."""
        if (self.out / f"{arm}.json").exists():
            return self.steps
        metrics = self.out / arm / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def tell(self, running: Sequence[str]) -> None:
        """Show what the running arms and evaluations are doing."""
        done = {arm: self.steps_of(arm) for arm in self.arms}
        states = {arm: f"step {step}/{self.steps}" for arm, step in done.items() if step < self.steps}
        doing = "; ".join(f"{name}: {states.get(name, 'scoring')}" for name in running)
        (task,) = self.tasks
        self.update(task.id, description=doing, completed=sum(done.values()))
        if self.disable and self.get_time() - self.told >= QUIET_SECONDS:
            self.told = self.get_time()
            print(f"{doing}, {self.left.render(task)} left", flush=True)


def make_scores(out: Path, jobs: Jobs, at_a_time: int, progress: ArmsProgress) -> list[Columns]:
    """Make the scores that OUT does not hold yet, at most so many at a time; return all of them, in order.

    Each command is a process in a session of its own, so that Ctrl-C in a terminal does not reach it: this process asks
    it to stop, once. If this process is killed with SIGKILL, the commands at work run to their end; while one of them
    trains, another ablation in OUT finds its run directory locked and says so.

    Raises:
        UsageError: a command failed.
        KeyboardInterrupt: Ctrl-C. In both cases the other commands have been stopped, and training was saved.
    """
    waiting = [(name, list(commands)) for name, commands in jobs.items() if not (out / f"{name}.json").exists()]
    running: dict[subprocess.Popen[bytes], tuple[str, list[list[str]]]] = {}
    threads = max(1, torch.get_num_threads() // at_a_time)
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                name, commands = waiting.pop(0)
                command = commands.pop(0)
                print(f"{name}: {'training' if commands else 'scoring'}", flush=True)
                if not commands:  # the file gets its name when it is complete, for a kill may leave half of it
                    command = [*command, f"--json={out / f'.{name}.json'}"]
                running[_start(command, out / f"{name}.log", threads)] = name, commands
            progress.tell([name for name, _ in running.values()])
            time.sleep(POLL_SECONDS)
            for process in [process for process in running if process.poll() is not None]:
                name, commands = running.pop(process)
                if process.returncode not in (0, ENDED_ITSELF):
                    raise UsageError(f"{name} {_failure(process.returncode, out / f'{name}.log')}")
                if commands:
                    waiting.insert(0, (name, commands))
                    continue
                (out / f".{name}.json").rename(out / f"{name}.json")
                scores = read_scores(out / f"{name}.json")
                print(f"{name}: " + "  ".join(f"{m} {100 * scores[m].mean():.1f}" for m in MEASURES), flush=True)
    finally:
        if running:
            print(f"Stopping {', '.join(name for name, _ in running.values())}.", flush=True)
        for process in running:
            process.terminate()  # `train` saves after its step, and ends
        for process in running:
            process.wait()
    return [read_scores(out / f"{name}.json") for name in jobs]


def _start(command: Sequence[str], log: Path, threads: int) -> subprocess.Popen[bytes]:
    """Start `ireasoner` with these arguments; its output is appended to the log."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    program = [sys.executable, "-m", "ireasoner", *command]
    with log.open("ab") as file:
        return subprocess.Popen(
            program, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def _failure(code: int, log: Path) -> str:
    """Why a command failed: the last line of its output."""
    if code < 0:
        return f"was killed (signal {-code}; out of memory? try fewer --jobs); what was saved stays; see {log}"
    last = log.read_text("utf-8", "replace").strip().rpartition("\n")[2]
    return f"failed: {last.removeprefix('ireasoner: ')} (its output is in {log})"


def read_scores(path: Path) -> Columns:
    """Scores that OUT holds.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        columns = json.loads(path.read_text("utf-8"))["per_question"]
        return {n: np.array(values, dtype=np.float64) for n, values in columns.items() if n != "greedy_texts"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} cannot be read: remove it, and it is made again") from None


def ablate(out: Path, settings: Settings, jobs: int = 1) -> dict[str, Any]:
    """Make what OUT does not hold yet; return the results, and write them as tables, CSV, figure and JSON.

    Args:
        out: the folder of the ablation.
        settings: as `settle` returned them.
        jobs: how many arms are trained and scored at a time.

    Raises:
        UsageError: something that cannot be used, or a command that failed; what was made stays.
        KeyboardInterrupt: Ctrl-C; the runs at work have been saved.
        OSError: OUT cannot be written.
    """
    prepare(out, settings)
    arms, seeds = arm_names(settings.recipes), range(settings.seeds)
    score, note = partial(eval_command, out, settings), ""
    made = {f"base-{seed}": [score("base", seed)] for seed in seeds}
    runs = {f"{arm}-{seed}": (arm, seed) for seed in seeds for arm in arms}
    for run, (arm, seed) in runs.items():
        made[run] = [train_command(out, settings, arms[arm], out / run, seed), score(arm, seed)]
    blank_arms = [arm for arm in ("base", "default") if arm in ("base", *arms)]
    with ArmsProgress(out, list(runs), arm_config(out, settings, settings.recipes[0], 0).schedule.steps) as progress:
        make = partial(make_scores, out, at_a_time=jobs, progress=progress)
        scores = dict(zip(made, make(made), strict=True))
        found = {arm: [scores[f"{arm}-{seed}"] for seed in seeds] for arm in ("base", *arms)}
        if settings.cooled:
            first = next(iter(arms))
            heat = matching_temperature(out, settings, first, make)
            note = f" Base, cooled: sampled at temperature {heat:.2f}, where it is as sure of its answers as "
            note += f"{first} (equal answer entropy on validation questions)."
            cooled = make({f"base-{s}-at-{heat:.3f}": [score("base", s, f"--temperature={heat}")] for s in seeds})
            found = {"base": found.pop("base"), report.COOLED: cooled, **found}
        blank = make({f"{arm}-0-blank": [score(arm, 0, "--blank")] for arm in blank_arms})
    summaries = {run: path for run in runs if (path := out / run / "summary.json").exists()}
    if early := [run for run, path in summaries.items() if json.loads(path.read_text("utf-8")).get("stopped_early")]:
        note += f" Runs that ended themselves early: {', '.join(early)}."
    columns = {arm: {name: np.stack([s[name] for s in of_arm]) for name in of_arm[0]} for arm, of_arm in found.items()}
    distinct = {arm: [report.distinct_questions(out / f"{arm}-{seed}") for seed in seeds] for arm in arms}
    questions = load_questions(questions_file(out, settings), settings.questions)
    result = {
        "settings": settings.model_dump(),
        "questions": len(questions),
        "seeds": settings.seeds,
        **report.summarize(columns, distinct),
        "blank": {a: {m: float(s[m].mean()) for m in MEASURES} for a, s in zip(blank_arms, blank, strict=True)},
        "answer_prior": answer_prior(questions),
        "note": note,
    }
    replace_file(out / "ablation.json", write_json(result).encode())
    replace_file(out / "ablation.md", report.markdown(result, prior_line(result["answer_prior"])).encode())
    replace_file(out / "ablation.csv", report.csv_text(result).encode())
    report.draw_differences(result, out / "ablation.png")
    return result


def matching_temperature(out: Path, settings: Settings, arm: str, make: Callable[[Jobs], list[Columns]]) -> float:
    """The temperature at which the base's answer entropy on validation questions is that of an arm, by bisection.

    The result is kept in `cooled.json`.
    """
    path, key = out / "cooled.json", {"recipe": arm, "seeds": settings.seeds}
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if kept.items() >= key.items():
        return kept["temperature"]
    score = partial(eval_command, out, settings)
    data = f"--data={out / 'data' / 'validation' / 'validation.jsonl'}", f"--limit={VALIDATION}"
    trained = make({f"{arm}-{s}-validation": [score(arm, s, *data)] for s in range(settings.seeds)})
    target = np.mean([scores["answer_entropy"].mean() for scores in trained])
    low, high = 0.05, 1.5
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        command = score("base", 0, *data, f"--temperature={middle}")
        (scores,) = make({f"base-0-validation-at-{middle}": [command]})
        low, high = (middle, high) if scores["answer_entropy"].mean() < target else (low, middle)
    temperature = round((low + high) / 2, 3)
    replace_file(path, write_json({**key, "answer_entropy": float(target), "temperature": temperature}).encode())
    return temperature
