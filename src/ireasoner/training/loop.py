"""The loop: play, update, record. No maths here.

Everything a step needs is a function of the config, the adapters, the learners' state and the image cursor; all of
these are in a checkpoint, so a run that was killed and resumed ends like one that was left alone.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ireasoner import __version__
from ireasoner.method.answers import answer_key
from ireasoner.method.texts import parse_question, parse_trajectory, proposer_messages, solver_messages
from ireasoner.method.types import ROLES, Completion, Episode, Role, Trajectory, UsageError
from ireasoner.model.inputs import EncodedImage
from ireasoner.model.learner import Learner
from ireasoner.model.parallel import Processes, joined
from ireasoner.model.policy import Policy
from ireasoner.rollouts.engine import Engine
from ireasoner.rollouts.live import TransformersEngine, uniforms
from ireasoner.training.checkpoints import load_optimizer, newest_checkpoint, optimizer_tensors, save_checkpoint
from ireasoner.training.config import Config, dump_config
from ireasoner.training.evaluation import GRAY, Scores, compare, evaluate, load_questions
from ireasoner.training.items import ImagePool, content_hash
from ireasoner.training.recorder import (
    NoRecorder,
    Recorder,
    RunDirectoryError,
    episode_record,
    read_records,
    write_json,
)
from ireasoner.training.selfplay import Play, SelfPlay, step_weight
from ireasoner.training.watch import Alarm, Signals, Watch

BLANK_QUESTIONS = 8  # of a step, at most, are asked again with the image blanked
PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "pillow")


class RunError(UsageError):
    """A run cannot start or go on; the message says why and what to do."""


@dataclass
class Observer:
    """Where a run tells what it does; the command line shows it. Every call is optional to listen to."""

    on_start: Callable[[Config, int], None] = lambda config, first_step: None
    on_step: Callable[[int, Mapping[str, float], Sequence[Episode]], None] = lambda step, metrics, episodes: None
    on_evaluation: Callable[[str, int, int], None] = lambda which, done, total: None
    on_message: Callable[[str], None] = lambda message: None


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after which step, whether it is complete, and its `summary.json` if it is."""

    step: int
    complete: bool
    summary: dict[str, Any] | None


def start(config: Config, out: Path, observer: Observer | None = None) -> Outcome:
    """Begin a run in a new or empty folder.

    Raises:
        RunError: the folder holds a run already.
        RunDirectoryError, ImageError, ModelError, DataError, ConfigError: what they say.
    """
    if (out / "config.yaml").exists() or (out / "checkpoints").exists():
        raise RunError(f"{out} holds a run already: continue it with --resume {out}, or choose another --out")
    if out.resolve().is_relative_to(config.images.resolve()):
        raise RunError(
            f"{out} lies inside the image folder {config.images}, whose images it would join: choose another --out"
        )
    return _run(config, out, observer or Observer())


def resume(config: Config, out: Path, observer: Observer | None = None) -> Outcome:
    """Continue a run from its newest sound checkpoint, as if it had never stopped.

    Raises:
        RunError: nothing to resume from.
    """
    summary = out / "summary.json"
    if summary.exists():
        found = json.loads(summary.read_text("utf-8"))
        return Outcome(found["steps"], True, found)
    return _run(config, out, observer or Observer())


def _run(config: Config, out: Path, observer: Observer) -> Outcome:
    with ExitStack() as stack:
        stop = stack.enter_context(_stop_on_interrupt())
        processes = stack.enter_context(joined(config.device))
        if processes.is_main:
            stack.enter_context(_only_writer(out))
        recorder = Recorder(out) if processes.is_main else NoRecorder(out)
        run = Run(config, out, recorder, observer, processes)
        observer.on_start(config, run.step + 1)
        before = run.evaluate_before()
        while run.step < config.steps and run.alarm is None:
            if processes.any(stop.is_set()):
                run.save()
                return Outcome(run.step, False, None)
            run.advance()
        return Outcome(run.step, True, run.finish(before))


class Run:
    """The state of a run and what one step does to it."""

    def __init__(
        self, config: Config, out: Path, recorder: Recorder, observer: Observer, processes: Processes | None = None
    ) -> None:
        self.config, self.out, self.recorder, self.observer = config, out, recorder, observer
        self.processes = processes or Processes()
        checkpoint, skipped = self._newest_checkpoint()
        state = _load_state(checkpoint) if checkpoint else {"step": 0, "elapsed": 0.0}
        self.step, self.elapsed = state["step"], state["elapsed"]
        # Without a checkpoint nothing was earned yet: a fresh run, or one killed before its first.
        dropped = recorder.rewind(self.step if checkpoint else -1)
        for text in [*skipped, *(f"Dropped a damaged record: {warning}." for warning in dropped)]:
            self._tell(text)
        self.processes.wait()  # what the others read below is as the one that writes has left it
        self.pool = ImagePool(config.images, config.seed, on_skip=lambda name, why: recorder.skip(self.step, name, why))
        several = self.processes.count > 1
        self.policy = Policy.from_config(config, str(self.processes.device) if several else None)
        observer.on_message(self.policy.describe() + ".")
        self.engine = self._engine()
        labels = load_labels(config, self.pool) if config.labels else None
        self.selfplay = SelfPlay(self.policy, self.engine, config, labels, self.processes)
        self.watch, self.signals = Watch(config.watch_window), Signals(config.watch_window * config.images_per_step)
        self.learners = {role: self._learner(role) for role in ROLES}
        self.questions = load_questions(config.eval_data, config.eval_questions) if config.eval_data else []
        if checkpoint:
            self._restore(checkpoint, state)
        else:
            # Only now, when everything that the user named has proved usable, does the folder become a run.
            recorder.write_text("versions.json", write_json(versions()))
            recorder.write_text("config.yaml", dump_config(config))
            self.probe()
            self.save()

    def _engine(self) -> Engine:
        if self.config.engine == "transformers":
            return TransformersEngine(self.policy)
        if self.processes.count > 1:
            raise RunError("--engine vllm works in one process: leave it out, or start without the launcher")
        from ireasoner.rollouts.vllm import VllmEngine

        config, tokenizer = self.config, self.policy.processor.tokenizer
        prompts = (config.proposer_prompt, config.solver_prompt)
        written = max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts) + config.max_question_tokens
        room = 128  # for what the chat template puts around them
        longest = config.max_image_tokens + written + config.max_solution_tokens + room
        return VllmEngine(self.policy, config.model, longest)

    def _learner(self, role: Role) -> Learner:
        config = self.config
        return Learner(
            self.policy,
            role,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            kl_coef=config.kl_coef,
            kl_target=config.kl_target,
            kl_rate=config.kl_rate,
            # A question has no group: its reward is measured against the moving average in every recipe.
            advantage=config.advantage if role == "solver" else "ema",
            baseline_momentum=config.baseline_momentum,
            tokens_per_batch=config.tokens_per_batch,
            processes=self.processes,
        )

    # --- one step ----------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Play, update, record; save and probe when due."""
        started = time.perf_counter()
        self.step += 1
        batch = self.pool.take(self.config.images_per_step)
        play = self.selfplay.play(self.step, batch)
        played = time.perf_counter()
        signals = {**self.signals.measure(play.episodes), **self.blank_survival(play, [image for _, image in batch])}
        watched = time.perf_counter()
        metrics = {**play_metrics(play, self.config, self.step), **self.update(play)}
        metrics |= {f"watch/{name}": value for name, value in signals.items()}
        updated = time.perf_counter()
        for episode, (name, image) in zip(play.episodes, batch, strict=True):
            picture = self.recorder.thumbnail(image, content_hash(self.pool.path(name)))
            self.recorder.episode({**episode_record(episode), "thumbnail": picture})
        metrics |= {"time/play_seconds": played - started, "time/watch_seconds": watched - played}
        metrics["time/update_seconds"] = updated - watched
        metrics["time/step_seconds"] = time.perf_counter() - started
        self.recorder.metrics(self.step, metrics)
        self.elapsed += metrics["time/step_seconds"]
        self.watch.observe(self.step, signals)
        self.observer.on_step(self.step, metrics, play.episodes)
        if self.alarm:
            best = self._regular_step(self.alarm.healthy_step)
            self._tell(f"The run ends itself and goes back to step {best}: {self.alarm.reason}.")
        if self._due(self.config.probe_every):
            self.probe()
        if self._due(self.config.save_every) or self.step == self.config.steps:
            self.save()

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def update(self, play: Play) -> dict[str, float]:
        """Each role's learner, once: the solver at every step, the proposer at every `proposer_every`-th."""
        kept, metrics = self.gate([episode for episode in play.episodes if episode.completions])
        if kept:
            groups = [play.episodes[i] for i in play.own if play.episodes[i].completions]
            kept, _ = self.gate(groups)
            prompts = play.solver_prompts[kept] if play.solver_prompts is not None and kept else None
            taught = [groups[i] for i in kept]
            found = self.learners["solver"].update(
                prompts, [e.completions for e in taught], [e.rewards for e in taught]
            )
            metrics |= {f"{name}/solver": value for name, value in found.items()}
        due = self.config.train_proposer and self.step % self.config.proposer_every == 0
        if due and self.config.labels is None:
            own = [play.episodes[i] for i in play.own]
            proposals = [[e.question_completion] for e in own if e.question_completion is not None]
            found = self.learners["proposer"].update(
                play.proposer_prompts, proposals, [[e.proposer_reward] for e in own]
            )
            metrics |= {f"{name}/proposer": value for name, value in found.items()}
        self.engine.refresh()
        return metrics

    def gate(self, groups: Sequence[Episode]) -> tuple[list[int], dict[str, float]]:
        """Which groups update the solver: those neither hopeless nor unanimous; with their shares as metrics."""
        shares = [e.majority_fraction for e in groups]
        hopeless = sum(share < self.config.gate_low for share in shares)
        unanimous = sum(share > self.config.gate_high for share in shares)
        kept = [i for i, share in enumerate(shares) if self.config.gate_low <= share <= self.config.gate_high]
        counts = {"kept": len(kept), "hopeless": hopeless, "unanimous": unanimous}
        return kept, {f"gate/{name}": count / len(groups) for name, count in counts.items() if groups}

    # --- watching ----------------------------------------------------------------------------------------------------

    @property
    def alarm(self) -> Alarm | None:
        """Why the run ends before its time, if it does. Under labels, agreement is no sign of collapse."""
        return self.watch.alarm if self.config.watch and self.config.labels is None else None

    def blank_survival(self, play: Play, images: Sequence[Image.Image]) -> dict[str, float]:
        """Share of majority answers that the solver also gives, greedily, to a gray image of the same size."""
        rows = [i for i, e in enumerate(play.episodes) if e.majority_answer is not None][:BLANK_QUESTIONS]
        if not rows or not self._due(self.config.blank_every):
            return {}
        own = [rows[n] for n in self.processes.share(len(rows))]
        encoded = self.policy.encode_images([Image.new("RGB", images[i].size, GRAY) for i in own])
        asked = [play.episodes[i] for i in own]
        answers = [t.answer for _, t in self._solve_greedily(encoded, [e.question.text for e in asked])]
        survived = [
            answer is not None and answer_key(answer, e.question.text) == e.majority_answer
            for answer, e in zip(answers, asked, strict=True)
        ]
        survived = self.processes.gather(survived, len(rows))
        return {"blank_survival": float(np.mean(survived))}

    def _regular_step(self, step: int) -> int:
        """The last step up to this one to which a run may go back, however often it was interrupted.

        These are a window or more apart, so that few checkpoints have to be kept for it.
        """
        save, window = self.config.save_every, self.config.watch_window
        return step - step % (save * math.ceil(window / save)) if save else 0

    def _may_return_to(self) -> set[int]:
        """The steps whose checkpoints must stay: an alarm may still ask for them."""
        if not self.config.watch or self.config.labels is not None:
            return set()
        recent = range(max(0, self.step - self.config.watch_window), self.step + 1)
        return {self._regular_step(step) for step in (*self.watch.may_return_to(), *recent)}

    def _go_back(self, step: int) -> int:
        """Take the adapters of the newest sound checkpoint up to this step; after which one it was."""
        checkpoint, skipped = newest_checkpoint(self.out / "checkpoints", self._regular_step(step))
        for text in _skip_notes(skipped):
            self._tell(text)
        if checkpoint is None:
            raise RunError(f"the run ended itself, but {self.out} holds no sound checkpoint to go back to")
        self.policy.load_adapters(checkpoint)
        self.engine.refresh()
        return _load_state(checkpoint)["step"]

    def _tell(self, text: str) -> None:
        self.recorder.event(self.step, text)
        self.observer.on_message(text)

    # --- looking back ------------------------------------------------------------------------------------------------

    def probe(self) -> None:
        """Answer the probe questions greedily. The untrained proposer asks them, once, at step 0."""
        if self.config.probe_every == 0 or self.config.probe_images == 0:
            return
        images = self.pool.peek(self.config.probe_images)
        encoded = self.policy.encode_images([image for _, image in images])
        asked = {r["image"]: r["question"] for r in read_records(self.out / "probes.jsonl") if r["step"] == 0}
        if self.step == 0:
            prompts = self.policy.prompts(encoded, [proposer_messages(self.config.proposer_prompt)] * len(images))
            draws = uniforms([[self.config.seed, 0, i] for i in range(len(images))], 1, self.config.max_question_tokens)
            proposals = [group[0] for group in self.engine.sample(prompts, None, draws)]
            readings = [parse_question(c.text, c.finish_reason) for c in proposals]
            asked = {name: q.text for (name, _), q in zip(images, readings, strict=True) if q.well_formed}
        rows = [i for i, (name, _) in enumerate(images) if name in asked]
        if not rows:
            return
        texts = [asked[images[i][0]] for i in rows]
        for i, text, (completion, read) in zip(
            rows, texts, self._solve_greedily([encoded[i] for i in rows], texts), strict=True
        ):
            name, image = images[i]
            record = {
                "step": self.step,
                "image": name,
                "question": text,
                "text": completion.text,
                "answer": read.answer,
            }
            record["reasoning_steps"] = list(read.reasoning_steps)
            record["thumbnail"] = self.recorder.thumbnail(image, content_hash(self.pool.path(name)))
            self.recorder.probe(record)

    def _solve_greedily(
        self, images: Sequence[EncodedImage], questions: Sequence[str]
    ) -> list[tuple[Completion, Trajectory]]:
        """What the solver says to a question about each image, and how it reads."""
        if not questions:
            return []
        prompts = self.policy.prompts(images, [solver_messages(self.config.solver_prompt, text) for text in questions])
        zeros = np.zeros((len(questions), 1, self.config.max_solution_tokens))
        completions = [group[0] for group in self.engine.sample(prompts, "solver", zeros, temperature=0)]
        return [(c, parse_trajectory(c.text, c.finish_reason)) for c in completions]

    def evaluate(self, which: str, role: Role | None) -> Scores:
        """Held-out accuracy of a role (None: the backbone)."""
        return evaluate(
            self.policy,
            self.questions,
            role,
            prompt=self.config.solver_prompt,
            max_tokens=self.config.max_solution_tokens,
            seed=self.config.seed,
            on_progress=lambda done, total: self.observer.on_evaluation(which, done, total),
            processes=self.processes,
            engine=self.engine,
        )

    def evaluate_before(self) -> Scores | None:
        """How the backbone does on the held-out questions, if there are any."""
        return self.evaluate("before", None) if self.questions else None

    # --- keeping -----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of everything that the next step depends on."""
        self.recorder.sync()
        keep = self.config.keep_checkpoints
        if self.processes.is_main:
            save_checkpoint(self.out / "checkpoints", self.step, self._write_state, keep, self._may_return_to())
        self.processes.wait()  # all know that it is there

    def _write_state(self, folder: Path) -> None:
        self.policy.save_adapters(folder)
        state: dict[str, Any] = {"step": self.step, "elapsed": self.elapsed, "pool": self.pool.state()}
        state |= {"memory": self.selfplay.memory.state(), "learners": {}}
        for role, learner in self.learners.items():
            tensors, optimizer = optimizer_tensors(learner.optimizer, learner.parameters)
            save_file(tensors, folder / f"optimizer-{role}.safetensors")
            kept = {"optimizer": optimizer, "kl_coef": learner.kl_coef, "baseline": learner.baseline.value}
            state["learners"][role] = kept
        (folder / "state.json").write_text(json.dumps(state), "utf-8")

    def _newest_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The checkpoint to go on from, and a sentence on each that was skipped."""
        checkpoint, skipped = newest_checkpoint(self.out / "checkpoints")
        if skipped and checkpoint is None:
            raise RunError(f"every checkpoint of {self.out} is damaged: {skipped[0][0].name}: {skipped[0][1]}")
        return checkpoint, _skip_notes(skipped)

    def _restore(self, checkpoint: Path, state: Mapping[str, Any]) -> None:
        self.policy.load_adapters(checkpoint)
        self.engine.refresh()
        for role, learner in self.learners.items():
            kept = state["learners"][role]
            tensors = load_file(checkpoint / f"optimizer-{role}.safetensors")
            load_optimizer(learner.optimizer, tensors, kept["optimizer"], learner.parameters)
            learner.kl_coef, learner.baseline.value = kept["kl_coef"], kept["baseline"]
        self.pool.restore(state["pool"])
        self.selfplay.memory.restore(state["memory"])
        for record in read_records(self.out / "episodes.jsonl"):
            if group := record["trajectories"]:
                steps = [text for trajectory in group for text in trajectory["reasoning_steps"]]
                self.signals.remember(record["image"], record["question"]["text"], steps)
        for record in read_records(self.out / "metrics.jsonl"):
            self.watch.recall(record)
        self.observer.on_message(f"Resumed after step {self.step}.")

    def _publish_adapters(self) -> None:
        staging = self.out / ".adapters"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            self.policy.save_adapters(staging)
            for role in ROLES:
                shutil.rmtree(self.out / role, ignore_errors=True)
                (staging / role).rename(self.out / role)
        except (OSError, SafetensorError) as error:
            raise RunDirectoryError(f"the adapters could not be written to {self.out}: {error}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def finish(self, before: Scores | None) -> dict[str, Any]:
        """Go back if the run ended itself, evaluate, write `solver/`, `proposer/` and `summary.json`."""
        best_step = self._go_back(self.alarm.healthy_step) if self.alarm else self.step
        after = self.evaluate("after", "solver") if before is not None else None
        if self.processes.is_main:
            self._publish_adapters()
        summary: dict[str, Any] = {
            "steps": self.step,
            "stopped_early": self.alarm is not None,
            "reason": self.alarm.reason if self.alarm else None,
            "best_step": best_step,
            "images": len(self.pool),
            "skipped_images": len(self.pool.skipped),
            "before": before.summary() if before else None,
            "after": after.summary() if after else None,
            "difference": compare(before, after) if before and after else None,
            "training_seconds": self.elapsed,
            "versions": versions(),
        }
        self.recorder.sync()
        self.recorder.write_text("summary.json", write_json(summary))
        return summary


def versions() -> dict[str, str]:
    """Of this package and of those that a run's numbers depend on."""
    return {"ireasoner": __version__, **{name: metadata.version(name) for name in PACKAGES}}


def _load_state(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / "state.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{checkpoint} was not written by this program: {error}") from None


def play_metrics(play: Play, config: Config, step: int) -> dict[str, float]:
    """What a step's episodes say about the run, by metric name; means over what there is."""
    episodes = play.episodes
    groups = [e for e in episodes if e.trajectories]
    trajectories = [t for e in groups for t in e.trajectories]
    completions = [c for e in groups for c in e.completions]
    proposals = [e.question_completion for e in episodes if e.question_completion is not None]
    asked = [e.question.text for e in groups]

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values)) if values else 0.0

    return {
        "reward/solver/total": mean([r for e in groups for r in e.rewards]),
        "reward/solver/outcome": mean([r for e in groups for r in e.reward_parts["outcome"]]),
        "reward/solver/step_agreement": mean([r for e in groups for r in e.reward_parts["step_agreement"]]),
        "reward/proposer/total": mean([e.proposer_reward for e in episodes]),
        "answers/majority_fraction": mean([e.majority_fraction for e in groups]),
        "answers/entropy": mean([e.answer_entropy for e in groups]),
        "well_formed/solver": mean([t.well_formed for t in trajectories]),
        "well_formed/proposer": mean([e.question.well_formed for e in episodes]),
        "length/solver": mean([len(c.token_ids) for c in completions]),
        "length/proposer": mean([len(c.token_ids) for c in proposals]),
        "truncated/solver": mean([c.finish_reason == "length" for c in completions]),
        "questions/distinct": len(set(asked)) / len(asked) if asked else 0.0,
        "step_weight": step_weight(config, step),
    }


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


def _skip_notes(skipped: Sequence[tuple[Path, str]]) -> list[str]:
    return [f"Skipped the damaged checkpoint {path.name}: {reason}." for path, reason in skipped]


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Hold the run directory; the lock goes with the process, however that ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("a")  # never to be emptied: it may be a link to something else
    except OSError as error:
        raise RunDirectoryError(f"the run directory cannot be used: {out}: {error.strerror}") from None
    with file:
        for _ in range(10):  # whoever looks at the run holds the lock for a moment
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.05)
        else:
            raise RunError(f"another process is training in {out}: wait for it or stop it")
        yield


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C (or SIGTERM) asks the loop to stop after its step; a second one ends it at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: object) -> None:
        stop.set()
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in previous:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
