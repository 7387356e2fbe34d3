"""The state of a run: how it is opened, saved, and taken back to an earlier checkpoint.

Everything that a step needs is a function of the config, the adapters, the learners' state, the image cursor and the
records written so far. All of these survive a kill, so a resumed run ends like one that was left alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ireasoner.method.scoring import RewardFunction
from ireasoner.method.types import ROLES, Episode, Role, UsageError
from ireasoner.model.learner import Learner
from ireasoner.model.loading import load_policy
from ireasoner.model.parallel import Processes
from ireasoner.model.policy import Policy
from ireasoner.rollouts.engine import Engine
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training.checkpoints import newest_checkpoint, save_checkpoint
from ireasoner.training.config import Config
from ireasoner.training.evaluation import LabelledQuestion, StepTruth, load_questions
from ireasoner.training.items import ImagePool
from ireasoner.training.recorder import Recorder, read_episodes, read_records
from ireasoner.training.selfplay import SelfPlay
from ireasoner.training.watch import Alarm, Signals, Watch


class RunError(UsageError):
    """A run cannot start or go on; the message says why and what to do."""


@dataclass
class Observer:
    """Where a run tells what it does; the command line shows it. Every call is optional to listen to."""

    on_start: Callable[[Config, int], None] = lambda config, first_step: None
    on_step: Callable[[int, Mapping[str, float], Sequence[Episode]], None] = lambda step, metrics, episodes: None
    on_evaluation: Callable[[str, int, int], None] = lambda which, done, total: None
    on_message: Callable[[str], None] = lambda message: None


@dataclass
class Run:
    """A run in memory. `step` is the last one that was played; `elapsed` the seconds that all of them took."""

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
    step: int = 0
    elapsed: float = 0.0

    @property
    def alarm(self) -> Alarm | None:
        """Why the run ends before its time, if it does. Under labels, agreement is no sign of collapse."""
        return self.watch.alarm if self.config.watch.watch and self.config.labels is None else None

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps (0: never) happens now."""
        return every > 0 and self.step % every == 0

    def tell(self, text: str) -> None:
        """Record an event, and show it."""
        self.recorder.event(self.step, text)
        self.observer.on_message(text)


def open_run(
    config: Config,
    out: Path,
    recorder: Recorder,
    observer: Observer,
    processes: Processes | None = None,
    reward: RewardFunction | None = None,
    truth: StepTruth | None = None,
) -> tuple[Run, bool]:
    """Load everything that a run needs and, if it has a checkpoint, take it up from there; whether it had one.

    Raises:
        RunError: every checkpoint is damaged, or the engine cannot be used.
        UsageError: whatever else the user named and cannot be used.
    """
    processes = processes or Processes()
    checkpoint, skipped = newest_checkpoint(out / "checkpoints")
    if skipped and checkpoint is None:
        raise RunError(f"every checkpoint of {out} is damaged: {skipped[0][0].name}: {skipped[0][1]}")
    state = _read_state(checkpoint) if checkpoint else {"step": 0, "elapsed": 0.0}
    step = state["step"]
    # Without a checkpoint nothing was earned yet: this is a new run, or one that was killed before its first.
    dropped = recorder.rewind(step if checkpoint else -1)
    for text in [*_notes(skipped), *(f"Dropped a damaged record: {warning}." for warning in dropped)]:
        recorder.event(step, text)
        observer.on_message(text)
    processes.wait()  # what the others read below must be as the writing process has left it
    pool = ImagePool.scan(config.images, config.seed)
    device = str(processes.device) if processes.count > 1 else config.device
    policy = load_policy(config.model, config.backbone, device=device, seed=config.seed)
    observer.on_message(policy.describe() + ".")
    engine = open_engine(config, policy, processes)
    labels = load_labels(config, pool) if config.labels else None
    run = Run(
        config=config,
        out=out,
        recorder=recorder,
        observer=observer,
        processes=processes,
        pool=pool,
        policy=policy,
        engine=engine,
        selfplay=SelfPlay(policy, engine, config, labels, reward, processes),
        learners={role: Learner(policy, role, config.recipe, config.optimizer, processes) for role in ROLES},
        watch=Watch(config.watch.watch_window),
        signals=Signals(config.watch.watch_window * config.schedule.images_per_step),
        questions=load_questions(config.eval_data, config.schedule.eval_questions, truth) if config.eval_data else [],
        truth=truth,
        step=step,
        elapsed=state["elapsed"],
    )
    record_skips(run)
    if checkpoint:
        _restore(run, checkpoint, state)
    return run, checkpoint is not None


def open_engine(config: Config, policy: Policy, processes: Processes) -> Engine:
    """The engine that a config names.

    Raises:
        UsageError: it is not installed, or cannot be used here.
    """
    if config.engine == "transformers":
        return LiveEngine(policy)
    if processes.count > 1:
        raise RunError("--engine vllm works in one process: leave it out, or start without the launcher")
    from ireasoner.rollouts.vllm import VllmEngine  # imports vLLM, which is an extra

    sampling, tokenizer = config.sampling, policy.processor.tokenizer
    prompts = (sampling.proposer_prompt, sampling.solver_prompt)
    written = max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts) + sampling.max_question_tokens
    room = 128  # for what the chat template puts around them
    longest = config.backbone.max_image_tokens + written + sampling.max_solution_tokens + room
    return VllmEngine(policy, config.model, longest)


def record_skips(run: Run) -> None:
    """Record the images that could not be used so far; those that are recorded already are left alone."""
    for name, reason in run.pool.skipped.items():
        run.recorder.skip(run.step, name, reason)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save(run: Run) -> None:
    """Save everything that the next step depends on."""
    run.recorder.sync()
    if run.processes.is_main:
        keep, spare = run.config.schedule.keep_checkpoints, _steps_to_return_to(run)
        save_checkpoint(run.out / "checkpoints", run.step, lambda folder: _write_state(run, folder), keep, spare)
    run.processes.wait()  # from here on all know that it is there


def go_back(run: Run) -> int:
    """Load the adapters of the newest sound checkpoint from before the alarm; the step it was saved at.

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
    """The last step up to this one to which a run may go back, however often it was interrupted.

    Such steps are at least a window of the watch apart, so that few checkpoints have to be kept for it.
    """
    save_every, window = config.schedule.save_every, config.watch.watch_window
    return step - step % (save_every * math.ceil(window / save_every)) if save_every else 0


def _steps_to_return_to(run: Run) -> set[int]:
    """The steps whose checkpoints must stay, because an alarm may still ask for them."""
    config = run.config
    if not config.watch.watch or config.labels is not None:
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
    (folder / "state.json").write_text(json.dumps(state), "utf-8")


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / "state.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{checkpoint} was not written by this program: {error}") from None


def _restore(run: Run, checkpoint: Path, state: Mapping[str, Any]) -> None:
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


def load_labels(config: Config, pool: ImagePool) -> dict[str, list[tuple[str, str]]]:
    """Labelled questions by the pool's image names, for the oracle recipe.

    Raises:
        RunError: none of them is about an image of the pool.
    """
    assert config.labels is not None
    names = {Path(pool.path(name)).resolve(): name for name in pool.names}
    labels: dict[str, list[tuple[str, str]]] = {}
    for row in load_questions(config.labels):
        if row.image in names:
            labels.setdefault(names[row.image], []).append((row.question, row.answer))
    if not labels:
        raise RunError(f"no question in {config.labels} is about an image in {config.images}")
    return labels
