"""Recipes x seeds beside the base and the controls: which is better, by how much, and how certain that is.

Below OUT, an arm is an ordinary run directory `ARM-SEED/`, made by `ireasoner train`, with its held-out scores in
`ARM-SEED.json`, made by `ireasoner eval`; what both print goes to `ARM-SEED.log`. Nothing is made twice: an ablation
that was stopped goes on where it was, and one that is given more recipes or seeds makes only what is missing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ireasoner.method.recipe import PUBLISHED
from ireasoner.method.types import Match, UsageError
from ireasoner.model.backbone import load_processor
from ireasoner.playground import dataset
from ireasoner.playground.truth import step_truth
from ireasoner.studies import ablation_tables as report
from ireasoner.studies.ablation_jobs import ArmsProgress, Columns, Jobs, make_scores, read_texts
from ireasoner.studies.ablation_numbers import run_numbers, summarize
from ireasoner.studies.forgetting import forgetting_columns, write_elsewhere
from ireasoner.training.checks import match_labels, open_pool
from ireasoner.training.config import PRESET_OPTIONS, Config, dump_config, load_config, names, options_in, resolve
from ireasoner.training.custom_reward import check_reward, names_a_file, sha256_of
from ireasoner.training.labelled import answer_prior, load_questions, prior_line
from ireasoner.training.recorder import replace_file, write_json
from ireasoner.training.sources.finding import pinned
from ireasoner.training.statistics import MEASURES, numbered

UNLABELED, VALIDATION = 512, 128
BISECTIONS = 6
IMAGE_OPTIONS = ("image_column", "max_image_pixels", "items", "images_per_item", "frame_rate")
MAY_CHANGE = ("recipes", "seeds", "cooled")
MOVABLE = ("images", "labels", "held_out", "model", "device", "recipe")  # options of an arm that another OUT changes
QUICK_JOBS = 2
QUICK: dict[str, Any] = {"seeds": 2, "questions": 256, "training": {"steps": "24"}}


class Settings(BaseModel):
    """What an ablation compares, and on what data; `settings.json` in OUT. Without images: on the embedded world."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "tiny"
    images: str | None = None
    data: str | None = None
    data_sha256: str | None = None
    match: Match = "exact"
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
    if settings.images and not stored:
        settings = settings.model_copy(update={"images": pinned(settings.images)})
    if stored and stored.data == settings.data and stored.data_sha256 != settings.data_sha256:
        raise UsageError(f"{settings.data} has changed since {out} was begun: choose another folder")
    if stored and (differing := _differing(_fixed(out, stored), _fixed(out, settings))):
        raise UsageError(f"{out} holds an ablation with other options ({differing}): choose another folder")
    # OUT may come from somebody else: it may set the scale and nothing that a recipe sets, such as code to run.
    if strangers := set(settings.training) - {"preset", "revision", "device", *IMAGE_OPTIONS, *PRESET_OPTIONS}:
        raise UsageError(
            f"{path} holds training options that an ablation does not take: {', '.join(sorted(strangers))}"
        )
    for recipe in () if "recipes" in given else settings.recipes:
        if names_a_file(config := arm_config(out, settings, recipe, 0)):
            own = f"the recipe {recipe} is paid by {config.recipe.reward}"
            raise UsageError(f"{own}, whose code is run only if you say so: name the recipes again with --recipes")
    return settings


def field_suite(given: Mapping[str, Any]) -> dict[str, Any]:
    """The published rewards beside ours, between random rewards and the oracle, and the base when it is cooled.

    Every recipe of the package that pays a published reward takes part, and EvoLMM, whose reward is the paper's with
    other constants. On the user's own images the oracle needs labels, and nothing is cooled.

    Args:
        given: settings by name; only those that were named on the command line.
    """
    published = [name for name in names("recipes") if options_in("recipes", name).get("reward") in PUBLISHED]
    oracle = [] if given.get("images") and not given.get("labels") else ["oracle"]
    recipes = ("default", "paper", "random-reward", *oracle, "evolmm", *published)
    return {"recipes": recipes, "seeds": 3, "cooled": not given.get("images")}


def _fixed(out: Path, settings: Settings) -> dict[str, Any]:
    """What must not change between two calls; training options as resolved, for 24 and 24.0 are the same."""
    config = arm_config(out, settings, "paper", 0).flat()
    training = {name: config[name] for name in (*PRESET_OPTIONS, "preset", "revision")}
    return settings.model_dump(exclude={*MAY_CHANGE, "training"}) | training


def _differing(kept: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    return "; ".join(f"{name} is {kept[name]}, not {given[name]}" for name in kept if kept[name] != given[name])


def arm_config(out: Path, settings: Settings, recipe: str, seed: int) -> Config:
    """The config of one arm's run. Only a recipe whose reward reads labels is given any.

    Images of the user's own questions are not trained on; the embedded world draws others for its questions anyway.
    """
    labels = settings.labels or (None if settings.images else str(out / "data" / "labels.jsonl"))
    flags = {"images": settings.images or str(out / "data" / "unlabeled"), "model": settings.model, "seed": seed}
    files = {"labels": labels, "held_out": settings.data}
    flags |= {name: path for name, path in files.items() if path}
    config = resolve({**settings.training, **flags, "recipe": recipe})
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
    dataset.write_labels(dataset.write_unlabeled(draft / "unlabeled", UNLABELED, settings.style))
    for split, count in {"validation": VALIDATION, settings.split: settings.questions}.items():
        dataset.write_questions(draft / split, count, settings.style, split)
    draft.rename(out / "data")


def prepare(out: Path, settings: Settings) -> None:
    """Check everything that was named before OUT is touched; then write the files that `train` and `eval` read.

    Raises:
        UsageError: whatever cannot be used, by name; an arm that was trained with other options.
    """
    configs = {arm: arm_config(out, settings, recipe, 0) for arm, recipe in arm_names(settings.recipes).items()}
    for config in configs.values():
        check_reward(config)
    load_processor(settings.model, revision=next(iter(configs.values())).revision)
    if settings.images:
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(settings.images)):
            raise UsageError(f"{out} lies inside the image folder {settings.images}: choose another folder")
        load_questions(questions_file(out, settings), settings.questions, step_truth)
        pool = open_pool(next(iter(configs.values())), [])
        for config in configs.values():
            if config.labels:
                match_labels(config, load_questions(config.labels), pool)
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
    if not settings.images and not elsewhere_file(out, settings).exists():
        # An ablation that was begun by an earlier version has no such questions yet.
        shutil.rmtree(draft := out / ".elsewhere", ignore_errors=True)
        write_elsewhere(draft, settings.questions, settings.style, settings.split)
        draft.rename(elsewhere_file(out, settings).parent)


def _check_run(run: Path, config: Config) -> None:
    """Refuse a run that was trained with other options, as when a recipe's file has changed since.

    Paths and the device may differ, for OUT may have been moved; an unfinished run then goes on with the new ones.
    """
    if not (run / "config.yaml").exists():
        return
    stored, wanted = load_config(run / "config.yaml"), config.flat()
    moved = stored.changed(**{name: wanted[name] for name in MOVABLE})
    if differing := _differing(moved.flat(), wanted):
        raise UsageError(f"{run} was trained with other options ({differing}): choose another folder")
    if stored.reward_sha256 not in (None, sha256_of(config)):
        raise UsageError(f"{config.recipe.reward} has changed since {run} was trained: choose another folder")
    if moved != stored and not (run / "summary.json").exists():
        replace_file(run / "config.yaml", dump_config(moved).encode())


def questions_file(out: Path, settings: Settings) -> Path:
    """The held-out questions: the user's own, or those of the embedded world."""
    return Path(settings.data or out / "data" / settings.split / f"{settings.split}.jsonl")


def elsewhere_file(out: Path, settings: Settings) -> Path:
    """The questions about pictures of the embedded world that are drawn otherwise than those of the training."""
    return out / "data" / "elsewhere" / f"{settings.split}.jsonl"


def train_command(out: Path, settings: Settings, recipe: str, run: Path, seed: int) -> list[str]:
    """The arguments of `ireasoner` that begin a run or resume it; resuming a finished run only writes its report."""
    config = arm_config(out, settings, recipe, seed)
    if (run / "config.yaml").exists():
        return ["train", f"--resume={run}", *([f"--reward={config.recipe.reward}"] if names_a_file(config) else [])]
    options = {"out": run, **settings.training, "images": config.images, "model": settings.model, "recipe": recipe}
    files = {"labels": config.labels, "held_out": config.held_out}
    options |= {"seed": seed, **{name: path for name, path in files.items() if path}}
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
    target = [str(out / f"{arm}-{seed}")]
    if arm == "base":
        target = [settings.model, f"--preset={out / 'preset.yaml'}"]
        target += [f"--revision={settings.training['revision']}"] if settings.training.get("revision") else []
    data = f"--data={questions_file(out, settings)}", f"--limit={settings.questions}", f"--match={settings.match}"
    return ["eval", *target, *data, f"--seed={seed}", f"--device={settings.training.get('device', 'auto')}", *options]


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
    arms, seeds, note = arm_names(settings.recipes), range(settings.seeds), ""
    score = partial(eval_command, out, settings)
    made = {f"base-{seed}": [score("base", seed)] for seed in seeds}
    runs = [f"{arm}-{seed}" for seed in seeds for arm in arms]
    for seed in seeds:
        for arm, recipe in arms.items():
            train = train_command(out, settings, recipe, out / f"{arm}-{seed}", seed)
            made[f"{arm}-{seed}"] = [train, score(arm, seed)]
    steps = arm_config(out, settings, settings.recipes[0], 0).schedule.steps
    with ArmsProgress(out, runs, steps) as progress:
        make = partial(make_scores, out, at_a_time=jobs, progress=progress)
        scores = make(made)
        found = {arm: [scores[f"{arm}-{seed}"] for seed in seeds] for arm in ("base", *arms)}
        if settings.cooled:
            first = next(iter(arms))
            heat = matching_temperature(out, settings, first, make)
            note = f" Base, cooled: sampled at temperature {heat:.2f}, where it is as sure of its answers as "
            note += f"{first} (equal answer entropy on validation questions)."
            cooled = make({f"base-{s}-at-{heat:.3f}": [score("base", s, f"--temperature={heat}")] for s in seeds})
            found = {"base": found.pop("base"), report.COOLED: [*cooled.values()], **found}
            scores |= cooled
        # An answer to a request for a description is right or wrong in no way: its share is told in the tables.
        elsewhere = _ask_elsewhere(out, settings, ("base", *arms), partial(make, tell_accuracy=False))
        blank_arms = [arm for arm in found if arm in ("base", "default")]
        blank = make({f"{arm}-0-blank": [score(arm, 0, "--blank")] for arm in blank_arms})
    if early := [run for run in runs if _ended_early(out / run)]:
        note += f" Runs that ended themselves early: {', '.join(early)}."
    questions = load_questions(questions_file(out, settings), settings.questions)
    image = numbered(question.image for question in questions)
    for name, of_run in scores.items():
        if not np.array_equal(of_run.get("image", ()), image):
            raise UsageError(f"{out / name}.json holds scores on other questions: remove it, and it is made again")
    columns = {
        arm: {name: np.stack([s[name] for s in of_arm]) for name in of_arm[0]} | elsewhere.get(arm, {})
        for arm, of_arm in found.items()
    }
    runs_of = {arm: [run_numbers(out / f"{arm}-{seed}") for seed in seeds] for arm in arms}
    result = {
        "settings": settings.model_dump(),
        "questions": len(questions),
        "images": len(set(image.tolist())),
        "seeds": settings.seeds,
        **summarize(columns, runs_of),
        "blank": {arm: {m: float(blank[f"{arm}-0-blank"][m].mean()) for m in MEASURES} for arm in blank_arms},
        "answer_prior": answer_prior(questions),
        "note": note,
    }
    _write(out, result, columns)
    return result


def _ask_elsewhere(
    out: Path, settings: Settings, arms: Sequence[str], make: Callable[[Jobs], dict[str, Columns]]
) -> dict[str, Columns]:
    """What is left of what training did not ask about, by arm; empty on the user's own images.

    Where the base describes nothing, as a model that was not pre-trained on the embedded world, descriptions are left
    out.
    """
    if settings.images:
        return {}
    data, seeds = elsewhere_file(out, settings), range(settings.seeds)
    asked = load_questions(data, truth=step_truth)
    options = f"--data={data}", f"--limit={len(asked)}"
    names = {arm: [f"{arm}-{seed}-elsewhere" for seed in seeds] for arm in arms}
    scores = make({
        name: [eval_command(out, settings, arm, seed, *options)]
        for arm, of_arm in names.items()
        for seed, name in zip(seeds, of_arm, strict=True)
    })  # fmt: skip
    found = {}
    for arm, of_arm in names.items():
        texts = [read_texts(out / f"{name}.json") for name in of_arm]
        if any(len(of_seed) != len(asked) for of_seed in texts):
            raise UsageError(f"{out} holds scores of {arm} on other questions: remove {arm}-*-elsewhere.json")
        found[arm] = forgetting_columns(np.stack([scores[name]["mean@1"] for name in of_arm]), texts, asked)
    if not found["base"]["described"].any():
        found = {arm: {n: v for n, v in of_arm.items() if "described" not in n} for arm, of_arm in found.items()}
    return found


def _ended_early(run: Path) -> bool:
    path = run / "summary.json"
    return path.exists() and bool(json.loads(path.read_text("utf-8")).get("stopped_early"))


def _write(out: Path, result: Mapping[str, Any], columns: Mapping[str, Columns]) -> None:
    """Write the results in every form, and the values of every question that they are made of."""
    per_question = {f"{arm}/{name}": values for arm, of_arm in columns.items() for name, values in of_arm.items()}
    np.savez_compressed(packed := io.BytesIO(), allow_pickle=False, **per_question)
    replace_file(out / "ablation.npz", packed.getvalue())
    replace_file(out / "ablation.json", write_json(result).encode())
    replace_file(out / "ablation.md", report.markdown(result, prior_line(result["answer_prior"])).encode())
    replace_file(out / "ablation.csv", report.csv_text(result).encode())
    report.draw_gains(result, out / "ablation.png")


def matching_temperature(out: Path, settings: Settings, arm: str, make: Callable[[Jobs], dict[str, Columns]]) -> float:
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
    target = np.mean([scores["answer_entropy"].mean() for scores in trained.values()])
    low, high = 0.05, 1.5
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        name = f"base-0-validation-at-{middle}"
        scores = make({name: [score("base", 0, *data, f"--temperature={middle}")]})[name]
        low, high = (middle, high) if scores["answer_entropy"].mean() < target else (low, middle)
    temperature = round((low + high) / 2, 3)
    replace_file(path, write_json({**key, "answer_entropy": float(target), "temperature": temperature}).encode())
    return temperature
