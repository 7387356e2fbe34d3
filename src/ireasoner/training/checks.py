"""What a user can get wrong about a run is found out here, before torch is imported and a model is loaded.

What had to be read for that is handed on to the run as `Inputs`, so that nothing is read twice. Every error is one
sentence that names the option.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ireasoner.method.scoring import RewardFunction
from ireasoner.method.types import ROLES, Role, UsageError
from ireasoner.model.options import BackboneOptions
from ireasoner.model.source import Source, check_processor, find_model, with_weights
from ireasoner.training.clips import ItemFiles, Limits, files_of
from ireasoner.training.config import Config
from ireasoner.training.custom_reward import reward_to_resume, reward_to_start
from ireasoner.training.items import ImagePool, Labels
from ireasoner.training.labelled import LabelledQuestion, StepTruth, load_questions, true_key
from ireasoner.training.recorder import LARGEST, RunError, is_locked, read_json, refuse_links
from ireasoner.training.sources.finding import pinned
from ireasoner.training.sources.folder import Folder
from ireasoner.training.sources.groups import Groups
from ireasoner.training.targets import find_adapters, model_revision


@dataclass(frozen=True)
class Inputs:
    """What a run was given, as it was read.

    Attributes:
        config: its options.
        model: where the backbone is; its small files are on this machine.
        pool: the images, for a run of one process; `ImagePool.share` makes it that of several.
        questions: all of the evaluation data.
        labels: the labelled questions of --labels; none without it.
        notes: what the user should know about what was read, a sentence each.
        reward: the reward function if it is the user's own.
        initial: the folder of the adapter that each role begins with; none of a role whose adapter is new, and none at
            all where a run goes on from a checkpoint, which has them.
    """

    config: Config
    model: Source
    pool: ImagePool
    questions: Sequence[LabelledQuestion]
    labels: Labels
    notes: list[str]
    reward: RewardFunction | None
    initial: dict[Role, Path]


def check_start(
    config: Config, out: Path, truth: StepTruth | None = None, *, reward: RewardFunction | None = None
) -> Inputs:
    """Check what a new run was given.

    If the recipe names a reward of the user's own, its file is imported, which runs the code in it.

    Args:
        config: options of the run.
        out: the run directory, which is not touched.
        truth: must be able to read the pictures of the evaluation data.
        reward: a reward function, instead of the one that the recipe names.

    Raises:
        UsageError: something that the user named cannot be used, or the directory cannot be, or holds a run already.
    """
    check_out(config, out)
    with _naming("--images"):
        config = config.model_copy(update={"images": pinned(config.images)})
    with _naming("--reward"):
        config, reward = reward_to_start(config, reward)
    return _read(config, out, truth, reward)


def check_resume(
    config: Config,
    out: Path,
    truth: StepTruth | None = None,
    *,
    reward: RewardFunction | None = None,
    trusts_reward: bool = False,
) -> Inputs:
    """Check what a run that goes on needs.

    Args:
        config, out, truth: as for `check_start`.
        reward: the function that `check_start` was given, if it was.
        trusts_reward: whether a reward file that the run's config names may be imported, which runs its code.

    Raises:
        UsageError: something that the run needs cannot be used, or the reward file may not be imported or has changed.
    """
    return _read(config, out, truth, reward_to_resume(config, out, reward, trusts_reward))


def check_reading(config: Config) -> Inputs:
    """Check what a run would be given, for reading what a model writes about its images; a run directory takes no part.

    If the recipe names a reward of the user's own, its file is imported, which runs the code in it.

    Raises:
        UsageError: something that the user named cannot be used.
    """
    with _naming("--reward"):
        config, reward = reward_to_start(config, None)
    return _read(config, None, None, reward)


def finished(config: Config, out: Path) -> dict[str, Any] | None:
    """The summary of a run that has ended; None if it has not, or if it is being extended to more steps.

    Raises:
        RunError: the summary is damaged.
    """
    path = out / "summary.json"
    if not path.exists():
        return None
    try:
        summary = read_json(path, LARGEST)
        steps, ended_itself = int(summary["steps"]), bool(summary["stopped_early"])
    except (KeyError, TypeError, ValueError):
        raise RunError(f"{path} is damaged: remove it, and the run is finished anew") from None
    return summary if ended_itself or steps >= config.schedule.steps else None


def check_out(config: Config, out: Path) -> None:
    """Raises `RunError` unless a new run can be written to `out`: into a folder that is missing or holds no run."""
    try:
        if (out / "config.yaml").exists() or (out / "checkpoints").exists():
            raise RunError(f"{out} holds a run already: continue it with --resume {out}, or choose another --out")
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(config.images)):
            raise RunError(
                f"{out} lies inside the image folder {config.images}, so its thumbnails would be trained on: "
                "choose another --out"
            )
        there = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
        if not there.is_dir():
            raise RunError(f"--out {out} cannot be written: {there}: Not a directory")
        if not os.access(there, os.W_OK | os.X_OK):
            raise RunError(f"--out {out} cannot be written: {there}: Permission denied")
        refuse_links(out)
    except OSError as error:
        raise RunError(f"--out {out} cannot be written: {error.strerror or error}") from None
    if is_locked(out):
        raise RunError(f"another process is training in {out}: wait for it or stop it, or choose another --out")


def _read(config: Config, out: Path | None, truth: StepTruth | None, reward: RewardFunction | None) -> Inputs:
    """Read everything else that was named: what takes longest comes last."""
    resumes = out is not None and any((out / "checkpoints").glob("step-*"))
    check_packages(config)
    check_device(config.device)
    if config.servers:
        from ireasoner.rollouts.server import check_servers  # imports an HTTP client

        with _naming("--servers"):
            check_servers(config.servers, all_needed=not resumes)  # a run goes on without those that were lost
    questions = read_questions(config.eval_data, "--eval-data", truth)
    held_out, labelled = read_questions(config.held_out, "--held-out"), read_questions(config.labels, "--labels")
    with _naming("--model"):
        model = find_model(config.model, model_revision(config, out) if out else config.revision)
        check_processor(model)
        if model.commit is None:  # otherwise they may have to be downloaded first
            with_weights(model)
    with _naming("--init-adapters"):
        initial = initial_adapters(config, model) if config.init_adapters and not resumes else {}
    with _naming("--images"):
        pool = open_pool(config, [*questions, *held_out])
        pool.check_readable()
        check_clips(config, pool, questions)
    labels, notes = match_labels(config, labelled, pool) if config.labels else ({}, [])
    return Inputs(config, model, pool, questions, labels, notes, reward, initial)


def check_clips(config: Config, pool: ImagePool, questions: Sequence[LabelledQuestion]) -> None:
    """Raises `UsageError` for clips where vLLM samples, which is shown pictures alone."""
    asked = any(isinstance(question.image, ItemFiles) and question.image.is_clip for question in questions)
    shown = isinstance(pool.source, Groups) and pool.source.has_clips
    if (asked or shown) and (config.servers or config.engine == "vllm"):
        flag = "--servers" if config.servers else "--engine vllm"
        raise UsageError(f"clips are sampled by transformers alone: leave out {flag}, or name items of pictures")


def check_packages(config: Config) -> None:
    """Raises `UsageError` if a package that the config asks for is not installed."""
    if config.engine == "vllm" and not config.servers and not installed("vllm"):
        raise UsageError("--engine vllm needs vLLM: pip install 'ireasoner[vllm]', or leave it out")
    if (how := config.backbone.quantization) and not installed("bitsandbytes"):
        raise UsageError(
            f"--quantization {how} needs bitsandbytes: pip install 'ireasoner[quant]', or leave the option out"
        )
    for name in config.report_to:
        if not installed(name):
            raise UsageError(
                f"--report-to {name} needs the package {name}, which is not installed: pip install {name}, or leave "
                "it out"
            )


def installed(package: str) -> bool:
    """Whether a package can be imported. A folder of its name, such as wandb leaves where it ran, is no package."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def check_device(device: str) -> None:
    """Raises `UsageError` for what can be no device anywhere; only torch knows which devices are here."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device {device} is no device: name auto, cpu, cuda or cuda:N")


def read_questions(path: Path | None, flag: str, truth: StepTruth | None = None) -> list[LabelledQuestion]:
    """The labelled questions of the file that was given with a flag; none if none was.

    Raises:
        UsageError: the file cannot be used; the message names the flag.
    """
    if path is None:
        return []
    with _naming(flag):
        return load_questions(path, truth=truth)


def open_pool(config: Config, held_out: Sequence[LabelledQuestion]) -> ImagePool:
    """The images that the config names, without those of the held-out questions.

    Raises:
        ImageError: they cannot be used.
    """
    return ImagePool.scan(
        config.images,
        config.seed,
        config.max_image_pixels,
        held_out={path for question in held_out for path in files_of(question.image)},
        column=config.image_column,
        items=config.items,
        limits=Limits.of(config),
    )


def match_labels(config: Config, labelled: Sequence[LabelledQuestion], pool: ImagePool) -> tuple[Labels, list[str]]:
    """Labelled questions by the names of the pool's images, and a sentence about each kind that was left out.

    Left out are questions about images that are not in the pool, and those that have two different answers.

    Raises:
        RunError: none is left, or the pool's images are not in a folder here.
    """
    if not isinstance(pool.source, Folder | Groups):
        raise RunError(f"--labels: its rows name image files, and {pool.source.where} is no folder of them: name one")
    names = {tuple(path.resolve() for path in pool.source.paths(name)): name for name in pool.names}
    about = [row for row in labelled if files_of(row.image) in names]
    if not about:
        unless = " that is not set aside for evaluation" if config.eval_data or config.held_out else ""
        raise RunError(f"--labels: no question in {config.labels} is about an image in {config.images}{unless}")
    by_question: dict[tuple[tuple[Path, ...], str], list[LabelledQuestion]] = {}
    for row in about:
        by_question.setdefault((files_of(row.image), " ".join(row.question.casefold().split())), []).append(row)
    labels: dict[str, list[LabelledQuestion]] = {}
    notes = []
    if left := len(labelled) - len(about):
        notes.append(
            f"{left} of {len(labelled)} labelled questions are about images that are not trained on, and are left out."
        )
    for (image, _), rows in by_question.items():
        if len({true_key(row) for row in rows}) == 1:
            labels.setdefault(names[image], []).append(rows[0])
        else:
            answers = " and ".join(sorted({repr(row.answer) for row in rows}))
            notes.append(f"{rows[0].question!r:.200} about {names[image]} is left out: its labels say {answers:.200}.")
    if not labels:
        raise RunError(f"--labels: every question in {config.labels} has two answers that differ")
    return labels, notes


def initial_adapters(config: Config, model: Source) -> dict[Role, Path]:
    """The folders of the adapters of `config.init_adapters`, by role. They are of the same model and kind.

    A run has no adapter of a role that it did not train; such a role begins anew.

    Raises:
        UsageError: it is no run and no adapter, or one of another model or kind.
    """
    path, ours = config.init_adapters, config.backbone
    assert path is not None
    if (path / "adapter_config.json").is_file():
        return _peft_adapter(path, ours)
    run, its_config, adapters = find_adapters(path)
    if adapters is None:
        raise UsageError(f"{path} learned nothing and has no adapter")
    base, wanted = _base_of(its_config.model, model_revision(its_config, run)), _base_of(config.model, model.commit)
    if base != wanted:
        raise UsageError(f"{path} was trained on {base}, and this run is to be on {wanted}: name the same --model")
    theirs = its_config.backbone
    _same_lora(path, theirs.lora_rank, theirs.lora_alpha, ours)
    if set(theirs.lora_targets) != set(ours.lora_targets):
        told = " ".join(theirs.lora_targets) or "all layers"
        raise UsageError(f"{path} was trained with --lora-targets {told}: give this run the same")
    return {role: adapters / role for role in ROLES if (adapters / role).is_dir()}


def _peft_adapter(folder: Path, ours: BackboneOptions) -> dict[Role, Path]:
    """A PEFT adapter is the solver's. Whether it is of the same model and layers is only known by its tensors."""
    settings = read_json(folder / "adapter_config.json", 2**20)
    _same_lora(folder, settings.get("r"), settings.get("lora_alpha"), ours)
    return {"solver": folder}


def _same_lora(path: Path, rank: Any, alpha: Any, ours: BackboneOptions) -> None:
    if (rank, alpha) != (ours.lora_rank, ours.lora_alpha):
        raise UsageError(
            f"{path} has rank {rank} and alpha {alpha}, and this run {ours.lora_rank} and {ours.lora_alpha}: add "
            f"--lora-rank {rank} --lora-alpha {alpha}"
        )


def _base_of(model: str, commit: str | None) -> str:
    """A name for a model that is the same wherever it was found: its hub id and commit, or the place of its folder."""
    from ireasoner.training.card import find_base  # imports the hub's library, which takes half a second

    base = find_base(model, commit)
    if base.hub_id:
        return f"{base.hub_id} at {base.commit}"
    return model if model == "tiny" else os.path.realpath(os.path.expanduser(model))


@contextmanager
def _naming(flag: str) -> Iterator[None]:
    """Inside, an error is about what was given with this flag."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{flag}: {error}") from None
