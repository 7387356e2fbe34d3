"""The state of a run: saving it, restoring it, and returning to an earlier checkpoint.

What a step does depends only on the config, the adapters, the optimizers, baselines and KL coefficients of the
learners, the position in the image pool, the memory of recent reasoning steps, what was sampled ahead for it, and the
records written so far. All of this survives a kill. Random draws are seeded anew for every step, so there is no
generator to save. This is why a resumed run ends bitwise like an uninterrupted one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ireasoner.method.types import ROLES, Episode, Role
from ireasoner.model.learner import Learner
from ireasoner.model.parallel import Processes
from ireasoner.model.policy import Policy
from ireasoner.model.views import filmstrip
from ireasoner.rollouts.engine import Engine
from ireasoner.training.card import find_base, model_card
from ireasoner.training.checkpoints import clear_remains, newest_checkpoint, prune, save_checkpoint
from ireasoner.training.config import MACHINE_OPTIONS, Config, dump_config, load_config
from ireasoner.training.energy import Meter
from ireasoner.training.items import LISTING, ImagePool, Item, labelled_items
from ireasoner.training.labelled import LabelledQuestion, StepTruth
from ireasoner.training.recorder import Recorder, RunError, read_episodes, read_records
from ireasoner.training.selfplay import Draft, SelfPlay
from ireasoner.training.trackers import Tracker, Trackers
from ireasoner.training.watch import Alarm, Signals, Watch

CONFIG = "config.yaml"
LARGEST_LISTING = 2**32  # bytes; a hundred million names have less
DRAFT = "draft.json"  # in a checkpoint, of a run that samples ahead
OPTIONS = "options.yaml"  # the same in a checkpoint, so that nothing but a deliberate extension changes it unnoticed


@dataclass
class Observer:
    """Functions that a run calls to report what it does, for example to the terminal display. By default, nothing.

    `verdict` says for the trackers, in a sentence, what to make of a finished run directory; `trackers` are others
    than those that the config names.
    """

    on_start: Callable[[Config, int], None] = lambda config, first_step: None
    on_step: Callable[[int, Mapping[str, float], Sequence[Episode]], None] = lambda step, metrics, episodes: None
    on_evaluation: Callable[[str, int, int], None] = lambda which, done, total: None
    on_message: Callable[[str], None] = lambda message: None
    verdict: Callable[[Path], str] = lambda out: ""
    trackers: Sequence[Tracker] = ()


@dataclass
class Run:
    """A run in memory.

    `labelled` are the images about which labelled questions are asked, if there are any. `step` is the last step that
    was taken, `draft` what was sampled ahead for the next one, and `elapsed` the duration of all steps in seconds.
    """

    config: Config
    out: Path
    recorder: Recorder
    observer: Observer
    processes: Processes
    pool: ImagePool
    labelled: ImagePool | None
    policy: Policy
    engine: Engine
    selfplay: SelfPlay
    learners: dict[Role, Learner]
    watch: Watch
    signals: Signals
    questions: list[LabelledQuestion]
    truth: StepTruth | None
    meter: Meter = field(default_factory=Meter)
    trackers: Trackers = field(default_factory=Trackers)
    stop_asked: Callable[[], bool] = lambda: False
    step: int = 0
    draft: Draft | None = None
    elapsed: float = 0.0
    shortages: list[str] = field(default_factory=list)  # of memory, in this process, that are still to be told
    news: list[str] = field(default_factory=list)  # of servers, told by this process, that are still to be recorded

    @property
    def alarm(self) -> Alarm | None:
        """Why the run ends early, or None."""
        return self.watch.alarm

    @property
    def pools(self) -> list[ImagePool]:
        """Where images are drawn from. A pool without a readable image has the length 0, and is one nevertheless."""
        return [pool for pool in (self.pool, self.labelled) if pool is not None]

    def draw(self, step: int) -> list[Item]:
        """The items of a step, in the order of the steps: first those about which a labelled question is asked."""
        count = self.config.schedule.images_per_step
        if self.labelled is None:
            return self.pool.take(count)
        asked = labelled_items(step, count, self.config.label_share)
        return [*self.labelled.take(asked), *self.pool.take(count - asked)]

    def due(self, every: int) -> bool:
        """Whether something that happens every `every` steps (0: never) is due after this step."""
        return every > 0 and self.step % every == 0

    def tell(self, text: str) -> None:
        """Record an event and report it to the observer."""
        self.recorder.event(self.step, text)
        self.observer.on_message(text)

    def report(self, metrics: Mapping[str, float], episodes: Sequence[Episode]) -> None:
        """Record the metrics of this step, and tell them to the observer and the trackers."""
        self.recorder.metrics(self.step, metrics)
        self.observer.on_step(self.step, metrics, episodes)
        self.trackers.step(self.step, metrics)
        if self.config.report_images and (self.step == 1 or self.due(self.config.schedule.save_every)):
            self.trackers.pictures(self.step, self.out, episodes)

    def moved(self, role: Role) -> bool:
        """Whether a role's adapter has changed since the run began."""
        began = self.config.init_adapters_sha256.get(role)
        return self.policy.adapter_sha256(role) != began if began else self.policy.largest_lora_b(role) > 0

    def thumbnail(self, item: Item) -> str:
        """Save a small copy of an item's image, or a filmstrip of several, in the run directory; its relative path."""
        return self.recorder.thumbnail(filmstrip(item.image), item.content_hash)


def record_extension(run: Run) -> None:
    """If a resumed run is to go on to a later last step than before, make its directory that of the longer run."""
    before = load_config(run.out / CONFIG).schedule.steps
    if before < run.config.schedule.steps:
        run.recorder.write_text(CONFIG, dump_config(run.config))
        run.tell(f"The run is extended from {before} to {run.config.schedule.steps} steps.")
    run.recorder.remove("summary.json")


def record_skips(run: Run) -> None:
    """Record the images that could not be used so far, except those that are recorded already."""
    for pool in run.pools:
        for name, reason in pool.skipped.items():
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
    for text in notes(skipped):
        run.tell(text)
    if checkpoint is None:
        raise RunError(f"the run ended itself, but {run.out} holds no sound checkpoint to go back to")
    run.policy.load_adapters(checkpoint)
    run.engine.refresh()
    return read_state(checkpoint)["step"]


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
    base = find_base(run.config.model, run.policy.commit)
    for role in ROLES:  # instead of PEFT's card, which has nothing to say
        card = model_card(run.config, {"best_step": run.step, "images": len(run.pool)}, base, role)
        (folder / role / "README.md").write_text(card, "utf-8")
    state: dict[str, Any] = {"step": run.step, "elapsed": run.elapsed, "pool": run.pool.state()}
    if run.labelled is not None:
        state["labelled"] = run.labelled.state()
    state |= {"memory": run.selfplay.memory.state(), "learners": {}}
    for role, learner in run.learners.items():
        tensors, state["learners"][role] = learner.state()
        save_file(tensors, folder / f"optimizer-{role}.safetensors")
    if run.draft:
        (folder / DRAFT).write_text(json.dumps(run.draft.state()), "utf-8")
    (folder / OPTIONS).write_text(dump_config(run.config), "ascii")
    (folder / "state.json").write_text(json.dumps(state), "utf-8")


def check_config(config: Config, checkpoint: Path) -> None:
    """Check that a run goes on with the options that its checkpoint was saved under.

    It may be extended, folders and files may have been moved, and it may do its work elsewhere.

    Raises:
        UsageError: an option was changed meanwhile, for example because a line of `config.yaml` was lost.
    """
    kept = load_config(checkpoint / OPTIONS)
    changed = config.differences(kept)
    for name in ("reward_sha256", "init_adapters_sha256"):
        if getattr(config, name) != getattr(kept, name):
            changed[name] = (getattr(config, name), getattr(kept, name))
    for name in ("images", "model", "labels", "eval_data", "held_out"):
        if all(changed.get(name, ())):  # moved, and neither lost nor added
            changed.pop(name, None)
    if config.model != kept.model:
        changed.pop("revision", None)  # of the copy on the hub
    for name in (*MACHINE_OPTIONS, "recipe"):  # of the recipe, the name; its options are compared
        changed.pop(name, None)
    if config.schedule.steps > kept.schedule.steps:
        del changed["steps"]
    if changed:
        told = "; ".join(f"{name} is {now}, and was {before}" for name, (now, before) in changed.items())
        raise RunError(
            f"config.yaml was changed since {checkpoint} was saved: {told}; the old ones are in its options.yaml"
        )


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text("utf-8"))


def restore(run: Run, checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Restore a checkpoint; the signals and the watch, which are not part of it, are rebuilt from the records."""
    run.policy.load_adapters(checkpoint)
    run.engine.refresh()
    for role, learner in run.learners.items():
        learner.restore(load_file(checkpoint / f"optimizer-{role}.safetensors"), state["learners"][role])
    changes = run.pool.restore(state["pool"], read_listing(run.out))
    if run.labelled is not None:
        run.labelled.restore(state["labelled"])
    run.selfplay.memory.restore(state["memory"])
    if (checkpoint / DRAFT).exists():
        draft = json.loads((checkpoint / DRAFT).read_text("utf-8"))
        run.draft = run.selfplay.restored(draft, [run.pools[i["labelled"]].again(i["name"]) for i in draft["items"]])
    for episode in read_episodes(run.out):
        run.signals.remember(episode)
    for record in read_records(run.out / "metrics.jsonl"):
        run.watch.recall(record)
    run.observer.on_message(f"Resumed after step {run.step}.")
    for change in changes:
        run.tell(change)


def read_listing(out: Path) -> bytes:
    """The names of the images that a run began with; none of a run from before they were kept."""
    path = out / LISTING
    try:
        return path.read_bytes() if path.is_file() and path.stat().st_size < LARGEST_LISTING else b""
    except OSError:  # the pool says what that means
        return b""


def notes(skipped: Sequence[tuple[Path, str]]) -> list[str]:
    return [f"Skipped the damaged checkpoint {path.name}: {reason}." for path, reason in skipped]
