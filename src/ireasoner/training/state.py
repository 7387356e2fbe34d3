"""The state of a run: opening it, saving it, and returning to an earlier checkpoint.

What a step does depends only on the config, the adapters, the optimizers, baselines and KL coefficients of the
learners, the position in the image pool, the memory of recent claims, and the records written so far. All of this
survives a kill. Random draws are seeded anew for every step, so there is no generator to save. This is why a resumed
run ends bitwise like an uninterrupted one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ireasoner.method.scoring import RewardFunction
from ireasoner.method.types import ROLES, Episode, Role, UsageError
from ireasoner.model.backbone import lacks_bfloat16, most_image_tokens, resolve_device
from ireasoner.model.counting import limit_sampling
from ireasoner.model.learner import Learner
from ireasoner.model.loading import load_policy
from ireasoner.model.parallel import ALONE, Processes
from ireasoner.model.policy import Policy
from ireasoner.model.source import find_model
from ireasoner.rollouts.engine import Engine
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training.advice import drowned_in_rounding
from ireasoner.training.checkpoints import clear_remains, newest_checkpoint, prune, save_checkpoint
from ireasoner.training.config import Config, dump_config, load_config
from ireasoner.training.items import ImagePool, Item, set_aside_line
from ireasoner.training.labelled import LabelledQuestion, StepTruth, draw_questions, load_questions
from ireasoner.training.recorder import Recorder, read_episodes, read_json, read_records
from ireasoner.training.selfplay import SelfPlay
from ireasoner.training.watch import Alarm, Signals, Watch

CONFIG = "config.yaml"
OPTIONS = "options.yaml"  # the same in a checkpoint, so that nothing but a deliberate extension changes it unnoticed


VERSIONS = "versions.json"  # what the run began with: packages, and the commit of a model on the hub


class RunError(UsageError):
    """A run cannot start or continue; the message says why and what to do."""


@dataclass
class Observer:
    """Functions that a run calls to report what it does, for example to the terminal display. By default, nothing."""

    on_start: Callable[[Config, int], None] = lambda config, first_step: None
    on_step: Callable[[int, Mapping[str, float], Sequence[Episode]], None] = lambda step, metrics, episodes: None
    on_evaluation: Callable[[str, int, int], None] = lambda which, done, total: None
    on_message: Callable[[str], None] = lambda message: None


@dataclass
class Run:
    """A run in memory. `step` is the last step that was taken; `elapsed` is the duration of all steps in seconds."""

    config: Config
    out: Path
    recorder: Recorder
    observer: Observer
    processes: Processes
    pool: ImagePool
    policy: Policy
    engine: Engine
    selfplay: SelfPlay
    learners: dict[Role, Learner]
    watch: Watch
    signals: Signals
    questions: list[LabelledQuestion]
    truth: StepTruth | None
    stop_asked: Callable[[], bool] = lambda: False
    step: int = 0
    elapsed: float = 0.0
    shortages: list[str] = field(default_factory=list)  # of memory, in this process, that are still to be told

    @property
    def alarm(self) -> Alarm | None:
        """Why the run ends early, or None."""
        return self.watch.alarm

    def due(self, every: int) -> bool:
        """Whether something that happens every `every` steps (0: never) is due after this step."""
        return every > 0 and self.step % every == 0

    def tell(self, text: str) -> None:
        """Record an event and report it to the observer."""
        self.recorder.event(self.step, text)
        self.observer.on_message(text)

    def thumbnail(self, item: Item) -> str:
        """Save a small copy of an item's image in the run directory and return its relative path."""
        return self.recorder.thumbnail(item.image, item.content_hash)


def open_run(
    config: Config,
    out: Path,
    recorder: Recorder,
    observer: Observer,
    processes: Processes = ALONE,
    reward: RewardFunction | None = None,
    truth: StepTruth | None = None,
) -> tuple[Run, bool]:
    """Load everything that a run needs, and restore its newest sound checkpoint if there is one.

    The records that `recorder` has written after that checkpoint are dropped. `reward` is the reward function if it is
    the user's own; the other arguments are kept in the run.

    Returns:
        The run, and whether it was restored from a checkpoint.

    Raises:
        UsageError: every checkpoint is damaged, or something that the user named cannot be used.
    """
    try:
        checkpoint, skipped = newest_checkpoint(out / "checkpoints")
    except OSError as error:
        raise RunError(f"the checkpoints of {out} cannot be read: {error}") from None
    if skipped and checkpoint is None:
        raise RunError(f"every checkpoint of {out} is damaged: {skipped[0][0].name}: {skipped[0][1]}")
    state = _read_state(checkpoint) if checkpoint else {"step": 0, "elapsed": 0.0}
    if checkpoint:
        _check_config(config, checkpoint)
    # Steps after the checkpoint are taken again and give the same records, so theirs are dropped. Without a checkpoint
    # (a new run, or one that was killed before its first) that holds for all records, those of step 0 included.
    dropped = recorder.rewind(state["step"] if checkpoint else -1)
    told = [f"Dropped a damaged record: {warning}." for warning in dropped]
    told += [f"Records are missing: {gap}." for gap in recorder.gaps(state["step"])]
    for text in [*_notes(skipped), *told]:
        recorder.event(state["step"], text)
        observer.on_message(text)
    processes.wait()  # the other processes read the records below, so the main one must have finished rewinding them
    questions = load_questions(config.eval_data, truth=truth) if config.eval_data else []
    # Before the images are read, so that a mistyped name is told at once. Every process takes the first one's commit.
    found = find_model(config.model, model_revision(config, out))
    commit = processes.gather([found.commit], processes.count)[0]
    pool = open_pool(config, questions, processes)
    selfplay = open_selfplay(config, pool, processes, reward, commit)
    policy = selfplay.policy
    observer.on_message(policy.describe() + ".")
    if (images := config.schedule.images_per_step) < processes.count:
        observer.on_message(
            f"{processes.count - images} of {processes.count} processes have nothing to play or to learn from: a step "
            f"has images_per_step {images}, shared out among them. Start fewer, or a run with more images a step."
        )
    run = Run(
        config=config,
        out=out,
        recorder=recorder,
        observer=observer,
        processes=processes,
        pool=pool,
        policy=policy,
        engine=selfplay.engine,
        selfplay=selfplay,
        learners={role: Learner(policy, role, config.recipe, config.optimizer, processes) for role in ROLES},
        watch=Watch(config),
        signals=Signals(config.watch.watch_window * config.schedule.images_per_step),
        questions=draw_questions(questions, config.schedule.eval_questions),
        truth=truth,
        step=state["step"],
        elapsed=state["elapsed"],
    )
    policy.on_shortage = run.shortages.append
    record_skips(run)
    if checkpoint:
        try:
            _restore(run, checkpoint, state)
        except (KeyError, TypeError, ValueError) as error:  # a checkpoint that is whole, but not a run's
            raise RunError(f"{checkpoint} does not fit this run: {type(error).__name__}: {error}") from None
    else:
        if pool.set_aside:
            run.tell(set_aside_line(pool.set_aside))
        if warning := drowned_in_rounding(config):
            run.tell(warning)
    return run, checkpoint is not None


def model_revision(config: Config, run_dir: Path) -> str | None:
    """The revision of a run's model: the commit that it began with, once that is recorded, for branches move on."""
    model, at, commit = str(read_json(run_dir / VERSIONS, 2**20).get("model")).rpartition("@")
    return commit if at and model == config.model else config.revision


def open_pool(config: Config, questions: Sequence[LabelledQuestion], processes: Processes = ALONE) -> ImagePool:
    """The images of the config's folder, without those of the evaluation data.

    Args:
        config: names the folder, and maybe a file of further questions whose images are held out.
        questions: those of the evaluation data, which have been read already.
        processes: those that draw together.

    Raises:
        UsageError: the folder or the file cannot be used.
    """
    held_out = {q.image for q in (*questions, *(load_questions(config.held_out) if config.held_out else ()))}
    return ImagePool.scan(config.images, config.seed, config.max_image_pixels, processes, held_out)


def open_selfplay(
    config: Config,
    pool: ImagePool,
    processes: Processes = ALONE,
    reward: RewardFunction | None = None,
    revision: str | None = None,
) -> SelfPlay:
    """Load the model with new adapters, and make the self-play of a run on it.

    Args:
        config: options of the run.
        pool: the run's images; labelled questions are about these.
        processes: those that play together.
        reward: the reward function if it is the user's own.
        revision: a branch, tag or commit of a model on the hub; None: the newest.

    Raises:
        UsageError: the model, the engine or the labels cannot be used.
    """
    device = resolve_device(processes.device if processes.count > 1 else config.device)
    if config.backbone.dtype == "bfloat16" and lacks_bfloat16(device):
        raise RunError(
            f"{device} only emulates bfloat16, slowly: train with --dtype float16, or float32 if activations overflow"
        )
    policy = load_policy(config.model, config.backbone, revision=revision, device=device, seed=config.seed)
    limit_sampling(policy, config.optimizer.tokens_per_batch)
    engine = open_engine(config, policy, processes)
    labels = load_labels(config, pool) if config.labels else None
    return SelfPlay(policy, engine, config, labels, reward, processes)


def open_engine(config: Config, policy: Policy, processes: Processes) -> Engine:
    """The engine that the config names. Raises `UsageError` if it is not installed or cannot be used here."""
    if config.engine == "transformers":
        return LiveEngine(policy)
    if processes.count > 1:
        raise RunError("--engine vllm works in one process: leave it out, or start without the launcher")
    from ireasoner.rollouts.vllm import VllmEngine  # imports vLLM, which is an optional dependency

    sampling, tokenizer = config.sampling, policy.processor.tokenizer
    # The longest sequence that vLLM has to hold: image, prompt, question, solution, and 128 for the chat template.
    image = most_image_tokens(policy.processor, config.max_image_pixels)
    prompt = max(len(tokenizer(text)["input_ids"]) for text in (sampling.proposer_prompt, sampling.solver_prompt))
    written = sampling.max_question_tokens + sampling.max_solution_tokens
    return VllmEngine.load(policy, config.model, image + prompt + written + 128, config.vllm_share)


def load_labels(config: Config, pool: ImagePool) -> dict[str, list[tuple[str, str]]]:
    """Labelled questions and their answers by the names of the pool's images, for the oracle recipe.

    Raises:
        RunError: none of them is about an image of the pool.
    """
    assert config.labels is not None
    names = {Path(pool.paths[name]).resolve(): name for name in pool.names}
    labels: dict[str, list[tuple[str, str]]] = {}
    for row in load_questions(config.labels):
        if row.image in names:
            labels.setdefault(names[row.image], []).append((row.question, row.answer))
    if not labels:
        unless = " that is not set aside for evaluation" if config.eval_data or config.held_out else ""
        raise RunError(f"no question in {config.labels} is about an image in {config.images}{unless}")
    return labels


def record_extension(run: Run) -> None:
    """If a resumed run is to go on to a later last step than before, make its directory that of the longer run."""
    before = load_config(run.out / CONFIG).schedule.steps
    if before < run.config.schedule.steps:
        run.recorder.write_text(CONFIG, dump_config(run.config))
        run.tell(f"The run is extended from {before} to {run.config.schedule.steps} steps.")
    run.recorder.remove("summary.json")


def record_skips(run: Run) -> None:
    """Record the images that could not be used so far, except those that are recorded already."""
    for name, reason in run.pool.skipped.items():
        run.recorder.skip(run.step, name, reason)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save(run: Run) -> None:
    """Save a checkpoint: everything that the next step depends on."""
    run.recorder.sync()  # first, because a resumed run reads the records up to its checkpoint
    if run.processes.is_main:
        keep, spare = run.config.schedule.keep_checkpoints, _steps_to_return_to(run)
        save_checkpoint(run.out / "checkpoints", run.step, lambda folder: _write_state(run, folder), keep, spare)
    run.processes.wait()  # no process may rely on the checkpoint before it is complete


def tidy_checkpoints(run: Run) -> None:
    """Remove what the last save would have removed, had it not been interrupted."""
    root = run.out / "checkpoints"
    clear_remains(root)
    prune(root, run.step, run.config.schedule.keep_checkpoints, _steps_to_return_to(run))


def go_back(run: Run) -> int:
    """Load the adapters of the newest sound checkpoint from before the alarm, and return its step.

    Raises:
        RunError: there is no such checkpoint.
    """
    assert run.alarm is not None
    step = regular_step(run.config, run.alarm.healthy_step)
    checkpoint, skipped = newest_checkpoint(run.out / "checkpoints", step)
    for text in _notes(skipped):
        run.tell(text)
    if checkpoint is None:
        raise RunError(f"the run ended itself, but {run.out} holds no sound checkpoint to go back to")
    run.policy.load_adapters(checkpoint)
    run.engine.refresh()
    return _read_state(checkpoint)["step"]


def regular_step(config: Config, step: int) -> int:
    """The last step, no later than `step`, that a run may go back to.

    These are every n-th of the regularly saved steps, at least a window of the watch apart, so that few checkpoints
    have to be kept. Where a run was interrupted does not matter, or it would end differently from an uninterrupted one.
    """
    save_every, window = config.schedule.save_every, config.watch.watch_window
    return step - step % (save_every * math.ceil(window / save_every)) if save_every else 0


def _steps_to_return_to(run: Run) -> set[int]:
    """The steps whose checkpoints must stay, because an alarm may still ask for them.

    The recent steps are among them because the healthy step of a later alarm may be any of them.
    """
    config = run.config
    if not config.watch.watch:
        return set()
    recent = range(max(0, run.step - config.watch.watch_window), run.step + 1)
    return {regular_step(config, step) for step in (*run.watch.may_return_to(), *recent)}


def _write_state(run: Run, folder: Path) -> None:
    run.policy.save_adapters(folder)
    state: dict[str, Any] = {"step": run.step, "elapsed": run.elapsed, "pool": run.pool.state()}
    state |= {"memory": run.selfplay.memory.state(), "learners": {}}
    for role, learner in run.learners.items():
        tensors, state["learners"][role] = learner.state()
        save_file(tensors, folder / f"optimizer-{role}.safetensors")
    (folder / OPTIONS).write_text(dump_config(run.config), "ascii")
    (folder / "state.json").write_text(json.dumps(state), "utf-8")


def _check_config(config: Config, checkpoint: Path) -> None:
    """Check that a run goes on with the options that its checkpoint was saved under.

    It may be extended, folders and files may have been moved, and the device and vLLM's share of it may be others.

    Raises:
        UsageError: an option was changed meanwhile, for example because a line of `config.yaml` was lost.
    """
    kept = load_config(checkpoint / OPTIONS)
    changed = config.differences(kept)
    if config.reward_sha256 != kept.reward_sha256:
        changed["reward_sha256"] = (config.reward_sha256, kept.reward_sha256)
    for name in ("images", "model", "labels", "eval_data", "held_out"):
        if all(changed.get(name, ())):  # moved, and neither lost nor added
            changed.pop(name, None)
    if config.model != kept.model:
        changed.pop("revision", None)  # of the copy on the hub
    for name in ("device", "vllm_share", "recipe"):  # of the recipe, the name; its options are compared
        changed.pop(name, None)
    if config.schedule.steps > kept.schedule.steps:
        del changed["steps"]
    if changed:
        told = "; ".join(f"{name} is {now}, and was {before}" for name, (now, before) in changed.items())
        raise RunError(
            f"config.yaml was changed since {checkpoint} was saved: {told}; the old ones are in its options.yaml"
        )


def _read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text("utf-8"))


def _restore(run: Run, checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Restore a checkpoint; the signals and the watch, which are not part of it, are rebuilt from the records."""
    run.policy.load_adapters(checkpoint)
    run.engine.refresh()
    for role, learner in run.learners.items():
        learner.restore(load_file(checkpoint / f"optimizer-{role}.safetensors"), state["learners"][role])
    run.pool.restore(state["pool"])
    run.selfplay.memory.restore(state["memory"])
    for episode in read_episodes(run.out):
        run.signals.remember(episode)
    for record in read_records(run.out / "metrics.jsonl"):
        run.watch.recall(record)
    run.observer.on_message(f"Resumed after step {run.step}.")


def _notes(skipped: Sequence[tuple[Path, str]]) -> list[str]:
    return [f"Skipped the damaged checkpoint {path.name}: {reason}." for path, reason in skipped]
