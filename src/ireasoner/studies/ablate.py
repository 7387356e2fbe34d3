"""Recipes x seeds beside the base and the controls: who is better, by how much, and how sure that is.

Below OUT, an arm is an ordinary run `ARM-SEED/` with its held-out scores in `ARM-SEED.json`. Both are made once: an
ablation that was stopped goes on, and one that is given more recipes or seeds makes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import queue
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import connection
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from ireasoner.app.display import JobDisplay, Relay, prior_line, quiet_libraries
from ireasoner.method.types import UsageError
from ireasoner.model.policy import Policy
from ireasoner.page import write_report
from ireasoner.playground import dataset, world
from ireasoner.studies.ablation_tables import (
    COOLED,
    csv_text,
    distinct_questions,
    draw_differences,
    markdown,
    summarize,
)
from ireasoner.training.config import Config, Preset, load_config, names, resolve
from ireasoner.training.evaluation import MEASURES, LabelledQuestion, Scores, answer_prior, evaluate, load_questions
from ireasoner.training.items import ImagePool
from ireasoner.training.loop import Observer, load_labels, resume, start
from ireasoner.training.recorder import replace_file, write_json

UNLABELED, VALIDATION, LABELS_PER_IMAGE = 512, 128, 4
BISECTIONS = 6
SCORING = 0.014  # what scoring one question takes, in training steps; for the time left
FREE = ("recipes", "seeds", "cooled")  # what a later call may change
QUICK_JOBS = 2
QUICK: dict[str, Any] = {"seeds": 2, "questions": 256, "training": {"steps": "24"}}


class Settings(BaseModel):
    """What an ablation compares, on what; `settings.json` in OUT. No images: the embedded world's."""

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
    """The settings of an ablation in OUT: what it holds, and else what is given.

    Raises:
        UsageError: options that contradict each other or what OUT holds; a folder of something else.
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
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from None
    if (settings.images is None) != (settings.data is None):
        raise UsageError("your own images and questions belong together: give both --images and --data, or neither")
    if settings.images and (given.keys() & {"style", "split"} or settings.cooled):
        raise UsageError("--style, --split and --cooled are for the embedded world: leave them out with --images")
    if stored and stored.data == settings.data and stored.data_sha256 != settings.data_sha256:
        raise UsageError(f"{settings.data} has changed since {out} was begun: choose another folder")
    if stored and (differing := _differing(_fixed(out, stored), _fixed(out, settings))):
        raise UsageError(f"{out} holds an ablation with other options ({differing}): choose another folder")
    return settings


def _fixed(out: Path, settings: Settings) -> dict[str, Any]:
    """What must not change between two calls; training options as they resolve, whatever way they were written."""
    config = arm_config(out, settings, "paper", 0).model_dump(include={*Preset.model_fields, "preset"})
    return settings.model_dump(exclude={*FREE, "training"}) | config


def _differing(kept: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    return "; ".join(f"{name} is {kept[name]}, not {given[name]}" for name in kept if kept[name] != given[name])


def arm_config(out: Path, settings: Settings, recipe: str, seed: int) -> Config:
    """The config of one arm's run. Labels go to a recipe that is paid by them and to no other."""
    labels = settings.labels or (None if settings.images else str(out / "data" / "labels.jsonl"))
    flags = {"images": settings.images or str(out / "data" / "unlabeled"), "model": settings.model, "seed": seed}
    config = resolve({**settings.training, **flags, "recipe": recipe, **({"labels": labels} if labels else {})})
    return config if config.reward == "oracle" else config.model_copy(update={"labels": None})


def arm_names(recipes: Sequence[str]) -> dict[str, str]:
    """Recipes by the name of their arm: a recipe's own, or that of its file."""
    found = {recipe if recipe in names("recipes") else Path(recipe).stem: recipe for recipe in recipes}
    if len(found) < len(recipes) or found.keys() & {"base", "data"}:
        raise UsageError(f"each recipe needs a name of its own, other than base and data: {', '.join(recipes)}")
    return found


def draw_world(out: Path, settings: Settings) -> None:
    """The embedded world as files in OUT/data, all or nothing: unlabeled images, labels for the oracle, questions."""
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


@dataclass(frozen=True)
class Scored:
    """An arm's per-question scores under one seed, by measure, and the share of distinct questions it asked."""

    columns: dict[str, NDArray[np.float64]]
    distinct_questions: float | None


class Ablation:
    """One ablation at work: trains and scores what OUT does not hold yet."""

    def __init__(self, out: Path, settings: Settings, display: JobDisplay | None = None) -> None:
        """Check all that was named before OUT is touched; then draw the world, if it is the embedded one.

        Args:
            display: hears of the progress, in a process of `share_out`, which finds all in place; None: the terminal.

        Raises:
            UsageError: whatever cannot be used, by name.
        """
        self.out, self.settings, self.arms = out, settings, arm_names(settings.recipes)
        self.first, self.seeds = next(iter(self.arms)), range(settings.seeds)
        configs = [arm_config(out, settings, recipe, 0) for recipe in self.arms.values()]
        data = Path(settings.data or out / "data" / settings.split / f"{settings.split}.jsonl")
        if settings.images:
            if out.resolve().is_relative_to(Path(settings.images).resolve()):
                raise UsageError(f"{out} lies inside the image folder {settings.images}: choose another folder")
            load_questions(data, settings.questions)
            pool = ImagePool(settings.images, 0)
            for config in configs:
                if config.labels:
                    load_labels(config, pool)
        self.policy: Policy | None = Policy.from_config(configs[0])
        if display is None:
            with _writing(out):
                out.mkdir(parents=True, exist_ok=True)
                replace_file(out / "settings.json", settings.model_dump_json(indent=2).encode())
                if not settings.images and not (out / "data").exists():
                    print(f"Drawing {UNLABELED} unlabeled pictures and the questions into {out / 'data'}.")
                    draw_world(out, settings)
        self.questions = load_questions(data, settings.questions)
        scored = (settings.seeds * (1 + len(self.arms) + settings.cooled) + 2) * len(self.questions)
        scored += settings.cooled * (settings.seeds + BISECTIONS) * VALIDATION
        self.display = display or JobDisplay(settings.seeds * len(self.arms) * configs[0].steps + SCORING * scored)

    def run(self, jobs: int = 1) -> dict[str, Any] | None:
        """Everything, seed by seed; returns and writes the results. None if training was interrupted.

        Args:
            jobs: arms that are trained and scored at a time, each by a process of its own; a script that asks for more
                than one must guard its start by `if __name__ == "__main__"`.

        Raises:
            UsageError: a run directory that cannot be used; what was made stays.
        """
        found: dict[str, list[Scored]] = {}
        tasks = [(arm, seed) for seed in self.seeds for arm in ("base", *self.arms)]
        with self.display:
            if not (self.share_out(tasks, jobs) if jobs > 1 else all(self.make(*task) for task in tasks)):
                return None
            for arm, seed in tasks:
                found.setdefault(arm, []).append(self.kept(self.path(arm, seed)))
            note = ""
            if self.settings.cooled:
                heat = self.matching_temperature()
                note = f" Base, cooled: sampled at temperature {heat:.2f}, where it is as sure of its answers as "
                note += f"{self.first} (equal answer entropy on validation questions)."
                cooled = [self.score("base", seed, heat) for seed in self.seeds]
                found = {"base": found.pop("base"), COOLED: cooled, **found}
            blank = {arm: self.score(arm, 0, blank=True) for arm in ("base", "default") if arm in found}
        if early := [name for arm in self.arms for seed in self.seeds if self.ended_early(name := f"{arm}-{seed}")]:
            note += f" Runs that ended themselves early: {', '.join(early)}."
        columns = {
            arm: {name: np.stack([s.columns[name] for s in scored]) for name in scored[0].columns}
            for arm, scored in found.items()
        }
        result = {
            "settings": self.settings.model_dump(),
            "questions": len(self.questions),
            "seeds": self.settings.seeds,
            **summarize(columns, {arm: [s.distinct_questions for s in scored] for arm, scored in found.items()}),
            "blank": {arm: {m: float(s.columns[m].mean()) for m in MEASURES} for arm, s in blank.items()},
            "answer_prior": answer_prior(self.questions),
            "note": note,
        }
        with _writing(self.out):
            replace_file(self.out / "ablation.json", write_json(result).encode())
            replace_file(self.out / "ablation.md", markdown(result, prior_line(result["answer_prior"])).encode())
            replace_file(self.out / "ablation.csv", csv_text(result).encode())
            draw_differences(result, self.out / "ablation.png")
        return result

    def make(self, arm: str, seed: int) -> bool:
        """Train and score an arm, unless that is done; False if it was interrupted."""
        made = arm == "base" or self.train(arm, seed)
        if made:
            self.score(arm, seed)
        return made

    def share_out(self, tasks: Sequence[tuple[str, int]], jobs: int) -> bool:
        """`make` every task, `jobs` at a time; False if that was interrupted, once all have saved and stopped."""
        left = [task for task in tasks if not self.path(*task).exists()]
        for task in set(tasks) - set(left):
            self.make(*task)  # which only looks whether it was made with these options
        self.policy = None
        context = multiprocessing.get_context("spawn")  # a fork would inherit locks that its threads do not release
        waiting, told, stop = context.Queue(), context.Queue(), context.Event()
        jobs = min(jobs, len(left))
        for task in (*left, *[None] * jobs):
            waiting.put(task)
        arguments = (self.out, self.settings, waiting, told, stop, max(1, torch.get_num_threads() // max(jobs, 1)))
        workers: list[Any] = []
        try:
            with _interrupted_by(signal.SIGTERM, signal.SIGHUP):
                for _ in range(jobs):
                    worker = context.Process(target=_work, args=arguments, daemon=True)
                    worker.start()
                    workers.append(worker)
                self._listen(workers, told)
        except KeyboardInterrupt:
            return False
        finally:
            stop.set()
            for worker in workers:
                worker.terminate()  # asks it to save after its step, if it is at work
            for worker in workers:
                worker.join()
        return all(self.path(*task).exists() for task in tasks)

    def _listen(self, workers: Sequence[Any], told: Queue[Any]) -> None:
        """Hand on what workers tell until all have ended. Raises `UsageError` where one fails."""
        while True:
            ended = not any(worker.is_alive() for worker in workers)  # then all that they told is on the queue
            try:
                call, details = told.get(timeout=0.2)
            except queue.Empty:
                if ended:
                    return
            else:
                if call == "fail":
                    raise UsageError(*details)
                self.display.hear(call, details)
            if code := next((worker.exitcode for worker in workers if worker.exitcode), 0):
                why = f"was killed (signal {-code}; out of memory? try fewer --jobs)" if code < 0 else "failed"
                raise UsageError(f"one of the ablation's processes {why}; what was saved stays")

    def config(self, arm: str, seed: int) -> Config:
        """The config of an arm; the base has the scale that all of them share."""
        return arm_config(self.out, self.settings, self.arms.get(arm, self.arms[self.first]), seed)

    def train(self, arm: str, seed: int) -> bool:
        """Train an arm to its end, from wherever it is; False if that was interrupted."""
        config, folder = self.config(arm, seed), self.out / f"{arm}-{seed}"
        begun = (folder / "config.yaml").exists()
        if begun:  # a recipe's file may have changed since; where things lie may change freely
            kept, wanted = load_config(folder / "config.yaml").model_dump(), config.model_dump()
            wanted |= {name: kept[name] for name in ("images", "labels", "model", "device", "recipe")}
            if differing := _differing(kept, wanted):
                raise UsageError(f"{folder} was trained with other options ({differing}): choose another folder")
        if (folder / "report.html").exists() or self.path(arm, seed).exists():
            self.display.skip(config.steps)
            return True
        if self.policy is not None and self.policy.device.type != "cpu":
            self.policy = None  # a GPU may have no room for a second backbone
        observer = Observer(
            on_start=lambda _, first_step: self.display.skip(first_step - 1),
            on_step=lambda step, *_: self.display.work(f"{folder.name}: step {step}/{config.steps}"),
            on_message=self.display.say,
        )
        outcome = (resume if begun else start)(config, folder, observer)
        if outcome.complete:
            self.display.skip(config.steps - outcome.step)  # it may have ended early
            with _writing(folder):
                write_report(folder)
        return outcome.complete

    def ended_early(self, run: str) -> bool:
        path = self.out / run / "summary.json"
        return path.exists() and json.loads(path.read_text("utf-8")).get("stopped_early", False)

    def path(self, arm: str, seed: int, temperature: float = 1.0, blank: bool = False) -> Path:
        """Where the scores of an arm are kept."""
        how = "-blank" * blank + (f"-at-{temperature:.3f}" if temperature != 1 else "")
        return self.out / f"{arm}-{seed}{how}.json"

    def kept(self, path: Path) -> Scored:
        """Scores that OUT holds."""
        try:
            record = json.loads(path.read_text("utf-8"))
            columns = {column: np.array(values, dtype=np.float64) for column, values in record["columns"].items()}
            return Scored(columns, record["distinct_questions"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{path} cannot be read: remove it, and it is made again") from None

    def score(self, arm: str, seed: int, temperature: float = 1.0, blank: bool = False) -> Scored:
        """An arm's held-out scores, from OUT if they are there. The sampling seed is the arm's."""
        path = self.path(arm, seed, temperature, blank)
        if path.exists():
            self.display.skip(SCORING * len(self.questions))
            return self.kept(path)
        scores = self.evaluate(arm, seed, self.questions, temperature, blank)
        others = {column: values for column, values in vars(scores).items() if isinstance(values, np.ndarray)}
        distinct = None if arm == "base" else distinct_questions(self.out / f"{arm}-{seed}")
        found = Scored({**scores.measures, **others}, distinct)
        with _writing(path):
            record = {**asdict(found), "greedy_texts": scores.greedy_texts}
            replace_file(path, json.dumps(record, default=np.ndarray.tolist).encode())
        self.display.say(f"{path.stem}: " + "  ".join(f"{m} {100 * v.mean():.1f}" for m, v in scores.measures.items()))
        return found

    def evaluate(
        self, arm: str, seed: int, questions: Sequence[LabelledQuestion], temperature: float = 1.0, blank: bool = False
    ) -> Scores:
        """Score an arm's solver, or the base, on one backbone that stays loaded."""
        config, told = self.config(arm, seed), 0
        if self.policy is None:
            self.policy = Policy.from_config(config)
        if arm != "base":
            self.policy.load_adapters(self.out / f"{arm}-{seed}")

        def tell(done: int, total: int) -> None:
            nonlocal told
            self.display.work(f"{arm}-{seed}: scoring {done}/{total}", SCORING * (done - told))
            told = done

        return evaluate(
            self.policy, questions, None if arm == "base" else "solver", prompt=config.solver_prompt,
            max_tokens=config.max_solution_tokens, seed=seed, temperature=temperature, blank=blank, on_progress=tell,
        )  # fmt: skip

    def matching_temperature(self) -> float:
        """Where the base's answers are as sure as the first recipe's: equal entropy, by bisection on validation."""
        path, key = self.out / "cooled.json", {"recipe": self.first, "seeds": self.settings.seeds}
        kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if kept.items() >= key.items():
            return kept["temperature"]
        questions = load_questions(self.out / "data" / "validation" / "validation.jsonl", VALIDATION)
        target = np.mean([self.evaluate(self.first, seed, questions).answer_entropy.mean() for seed in self.seeds])
        low, high = 0.05, 1.5
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            found = self.evaluate("base", 0, questions, middle).answer_entropy.mean()
            low, high = (middle, high) if found < target else (low, middle)
        temperature = round((low + high) / 2, 3)
        with _writing(path):
            replace_file(
                path, write_json({**key, "answer_entropy": float(target), "temperature": temperature}).encode()
            )
        return temperature


def _work(out: Path, settings: Settings, waiting: Queue[Any], told: Queue[Any], stop: Any, threads: int) -> None:
    """A process of `share_out`: makes tasks until it takes a None or is asked to stop, or until its parent is gone."""
    os.setsid()  # a terminal's Ctrl-C is for the parent, which then asks
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent.sentinel, told), daemon=True).start()
    quiet_libraries()
    torch.set_num_threads(threads)
    try:
        ablation = Ablation(out, settings, Relay(told.put))
        while (task := waiting.get()) and not stop.is_set() and ablation.make(*task):
            pass
    except UsageError as error:
        told.put(("fail", (str(error),)))


def _follow(parent: int, told: Queue[Any]) -> None:
    """Stop this process, as if it were asked to, when its parent is gone."""
    connection.wait([parent])
    told.cancel_join_thread()  # nobody will read what is on it
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _interrupted_by(*numbers: signal.Signals) -> Iterator[None]:
    """These signals interrupt as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
