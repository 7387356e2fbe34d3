"""A run directory as it is read: whole or still growing, of this version or torn, and never trusted.

Episodes are indexed once and read one by one; of each, the index keeps what filters, searches and averages need.
Whatever does not have the form of a record is left out and counted.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ireasoner.method.answers import answer_key
from ireasoner.method.types import UsageError
from ireasoner.playground import dataset, world
from ireasoner.training.config import Config, ConfigError, load_config
from ireasoner.training.watch import Watch

LONGEST_LINE = 4_000_000  # bytes; no record of ours comes near
LARGEST_PICTURE = 4_000_000  # bytes; a thumbnail has 256 pixels a side
TAILS = ("metrics", "episodes", "probes", "skipped", "events")
MOST_TRAJECTORIES, MOST_STEPS = 64, 64  # of an episode, that are shown

State = Literal["finished", "ended itself", "running", "stopped"]


# No record of ours comes near these bounds, within which no sum overflows.
Number = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**9)]


class _Record(BaseModel):
    """Part of an episode, as `recorder.episode_record` writes it; other keys are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class StepScore(_Record):
    similarity: Number | None
    recurrence: Number
    score: Number | None


class Trajectory(_Record):
    reasoning_steps: list[str]
    answer: str | None
    answer_key: str | None
    in_majority: bool
    well_formed: bool
    problem: str | None
    text: str
    words_before_answer: Count
    num_tokens: Count
    finish_reason: str
    reward: Number
    reward_parts: dict[str, Number]
    step_scores: list[StepScore] = Field(default_factory=list)  # runs of version 0.1 before it have none

    @property
    def scored_steps(self) -> list[tuple[str, StepScore | None]]:
        """The reasoning steps to show, each with its score; None where it was not compared."""
        scores: list[StepScore | None] = [*self.step_scores, *[None] * len(self.reasoning_steps)]
        return list(zip(self.reasoning_steps, scores, strict=False))[:MOST_STEPS]


class Question(_Record):
    text: str
    rationale: str
    problem: str | None


class Proposal(_Record):
    text: str


class Episode(_Record):
    step: Count
    image: str
    question: Question
    question_completion: Proposal | None
    proposer_reward: Number
    majority_answer: str | None
    majority_fraction: Number
    answer_entropy: Number
    trajectories: list[Trajectory] = Field(max_length=MOST_TRAJECTORIES)
    step_weight: Number | None = None
    true_answer: str | None = None
    thumbnail: str = ""


class Probe(_Record):
    step: Count
    image: str
    question: str
    answer: str | None
    reasoning_steps: list[str]
    thumbnail: str = ""


@dataclass(frozen=True)
class Entry:
    """What is kept of an episode; `place` is where its line begins and how long it is.

    `agreement` holds the leave-one-out similarity of each reasoning step, NaN where there is none: a row for each of
    `group_size` trajectories, a column for each of `max_reasoning_steps` positions. Trajectories have no order of their
    own: they are ranked by the mean of their row, the most agreed first.
    """

    place: tuple[int, int]
    step: int
    image: str
    question: str | None
    text: str
    answer_entropy: float
    reward: float | None
    malformed: float
    wrong: bool | None
    trajectories: int
    agreement: NDArray[np.float32]

    @property
    def opening(self) -> str | None:
        """The question's first two words: what kind it is."""
        return " ".join(self.question.lower().split()[:2]) if self.question else None


@dataclass
class _Tail:
    """The lines of a file that is being appended to."""

    path: Path
    offset: int = 0
    identity: tuple[int, int] | None = None
    damaged: int = 0
    generation: int = 0

    def restarted(self) -> bool:
        """Whether the file is another one than before, as after a run went back: then it is read from its start.

        Raises:
            FileNotFoundError: it was there before.
        """
        found = self.path.stat() if self.path.is_file() else None
        if found is None and self.identity is not None:
            raise FileNotFoundError(self.path)
        identity = (found.st_dev, found.st_ino) if found else None
        again = identity != self.identity or bool(found and found.st_size < self.offset)
        if again:
            self.offset, self.damaged, self.identity, self.generation = 0, 0, identity, self.generation + 1
        return again

    def lines(self) -> Iterator[tuple[tuple[int, int], bytes]]:
        """New whole lines, each with its place; a last line that is still being written comes another time."""
        if self.identity is None:
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            # A longer one comes in pieces, of which none is a record.
            while (line := file.readline(LONGEST_LINE)).endswith(b"\n") or len(line) == LONGEST_LINE:
                place, self.offset = (self.offset, len(line)), self.offset + len(line)
                yield place, line


@dataclass
class Run:
    """A run directory; `refresh` reads what is new. After the directory is gone, what was read stays.

    Args:
        path: the run directory, which is only read.
        truth_file: what is true of the images, as `ireasoner playground` writes it; None: what lies inside the run.

    Raises:
        UsageError: no run, or a truth that cannot be read.
    """

    path: Path
    truth_file: Path | None = None
    gone: bool = field(default=False, init=False)
    metrics: list[dict[str, Any]] = field(init=False)
    entries: list[Entry] = field(init=False)
    probes: list[Probe] = field(init=False)
    skipped: list[dict[str, Any]] = field(init=False)
    events: list[dict[str, Any]] = field(init=False)
    summary: dict[str, Any] | None = field(init=False)

    def __post_init__(self) -> None:
        if not (self.path / "config.yaml").is_file():
            raise UsageError(f"{self.path} is not a run directory: it has no config.yaml")
        self._begin()
        self.refresh()

    def _begin(self) -> None:
        """Read the config, of which all else depends, and forget what was read under another one."""
        try:
            self._began = self._identity()
            self.config: Config = load_config(self.path / "config.yaml")
        except ConfigError as error:
            raise UsageError(f"this run cannot be shown: {error}") from None
        self.pictures = self._truth()
        self.watch = Watch(self.config.watch_window)
        self.metrics, self.entries, self.probes, self.skipped, self.events = [], [], [], [], []
        self.summary, self._tails = None, {name: _Tail(self.path / f"{name}.jsonl") for name in TAILS}

    def _identity(self) -> tuple[int, int]:
        found = (self.path / "config.yaml").stat()
        return found.st_ino, found.st_mtime_ns

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def step(self) -> int:
        """The last step that was recorded; 0 before the first."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def damaged(self) -> int:
        """Lines that are no records."""
        return sum(tail.damaged for tail in self._tails.values())

    @property
    def version(self) -> str:
        """Changes whenever there is something new to show."""
        read = "-".join(f"{tail.generation}.{tail.offset}" for tail in self._tails.values())
        return f"{self._began[0]}-{read}-{self.state()}{'-gone' * self.gone}".replace(" ", "-")

    def refresh(self) -> None:
        """Read what is new."""
        try:
            self.gone = not (self.path / "config.yaml").is_file()
            if not self.gone:
                if self._identity() != self._began:  # another run in the same place
                    self._begin()
                for name, tail in self._tails.items():
                    self._read(name, tail)
                self.summary = read_json(self.path / "summary.json")
        except (OSError, UsageError):  # deleted, or unmounted, or made anew while it was read
            self.gone = True

    def state(self) -> State:
        """What the run is doing."""
        return state_of(self.path, self.summary)

    def episode(self, entry: Entry) -> Episode | None:
        """An episode in full; None if the file no longer holds it."""
        try:
            with (self.path / "episodes.jsonl").open("rb") as file:
                file.seek(entry.place[0])
                return Episode.model_validate_json(_without_surrogates(file.read(entry.place[1])))
        except (OSError, ValueError, RecursionError):
            return None

    def versions(self) -> dict[str, str]:
        """Of the packages that the run began with; empty if it did not record them."""
        found = read_json(self.path / "versions.json") or (self.summary or {}).get("versions")
        return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}

    def thumbnail(self, name: str) -> Path | None:
        """A run's own thumbnail by its recorded name; None for anything outside the run's folder of images."""
        match = re.fullmatch(r"(?:images/)?([0-9a-f]{8,64}\.png)", name)
        if not match:
            return None
        folder = self.path / "images"
        path = folder / match[1]
        own = path.is_file() and not path.is_symlink() and not folder.is_symlink()
        return path if own and path.stat().st_size <= LARGEST_PICTURE else None

    def true_answer(self, image: str, question: str) -> str | None:
        """What is true, where that is known."""
        with suppress(KeyError, ValueError, TypeError):  # a picture that no world drew
            picture = self.pictures.get(image)
            solved = world.solve(picture, question) if picture else None
            return solved.answer if solved else None

    def step_truth(self, image: str, reasoning_step: str) -> bool | None:
        """Whether a reasoning step is true of its image; None where that is not known."""
        with suppress(KeyError, ValueError, TypeError):
            picture = self.pictures.get(image)
            return world.step_truth(picture, reasoning_step) if picture else None

    def _truth(self) -> dict[str, world.Picture]:
        if self.truth_file:
            try:
                return dataset.read_truth(self.truth_file)
            except OSError as error:
                raise UsageError(f"cannot read the truth in {self.truth_file}: {error.strerror}") from None
            except (ValueError, KeyError, TypeError, RecursionError):
                why = "lines of image and picture, as playground writes"
                raise UsageError(f"{self.truth_file} is no file of truth: {why}") from None
        # A run directory may come from anywhere: what it names is followed no further than itself.
        with suppress(OSError, RuntimeError, ValueError, KeyError, TypeError):
            beside = dataset.truth_path(self.config.images)
            if beside.resolve().is_relative_to(self.path.resolve()) and beside.is_file():
                return dataset.read_truth(beside)
        return {}

    def _read(self, name: str, tail: _Tail) -> None:
        kept: list[Any] = self.entries if name == "episodes" else getattr(self, name)
        if tail.restarted():
            kept.clear()
            self.watch = Watch(self.config.watch_window) if name == "metrics" else self.watch
        for place, line in tail.lines():
            try:
                kept.append(self._parse(name, place, line))
            except (ValueError, RecursionError):  # pydantic's error is a ValueError
                tail.damaged += 1
                continue
            if name == "metrics":
                self.watch.recall(kept[-1])

    def _parse(self, name: str, place: tuple[int, int], line: bytes) -> Any:
        line = _without_surrogates(line)
        if name == "episodes":
            return self._entry(place, Episode.model_validate_json(line))
        if name == "probes":
            return Probe.model_validate_json(line)
        record = json.loads(line)
        if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] <= 10**9:
            raise ValueError("not a record")
        if name == "metrics":
            return {key: value for key, value in record.items() if type(value) in (int, float) and abs(value) < 1e9}
        return {key: str(value) for key, value in record.items() if key != "step"} | {"step": record["step"]}

    def _entry(self, place: tuple[int, int], e: Episode) -> Entry:
        question = None if e.question.problem else e.question.text
        truth = e.true_answer or (self.true_answer(e.image, question) if question else None)
        key = answer_key(truth, question) if truth and question else None
        texts = [e.image, e.question.text, *(t.answer or "" for t in e.trajectories)]
        texts += [step for t in e.trajectories for step in t.reasoning_steps]
        texts += [t.text for t in e.trajectories if t.problem]
        texts += [e.question_completion.text] if e.question.problem and e.question_completion else []
        unreadable = sum(not t.well_formed for t in e.trajectories)
        return Entry(
            place=place,
            step=e.step,
            image=e.image,
            question=question,
            text="\n".join(texts).casefold(),
            answer_entropy=e.answer_entropy,
            reward=sum(t.reward for t in e.trajectories) / len(e.trajectories) if e.trajectories else None,
            malformed=unreadable / len(e.trajectories) if e.trajectories else 1.0,
            wrong=e.majority_answer != key if key and e.majority_answer else None,
            trajectories=len(e.trajectories),
            agreement=self._agreement(e),
        )

    def _agreement(self, e: Episode) -> NDArray[np.float32]:
        rows = [[s.similarity for s in t.step_scores if s.similarity is not None] for t in e.trajectories]
        compared = sorted((i for i, row in enumerate(rows) if row), key=lambda i: -sum(rows[i]) / len(rows[i]))
        shape = min(self.config.group_size, MOST_TRAJECTORIES), min(self.config.max_reasoning_steps, MOST_STEPS)
        found = np.full(shape, np.nan, dtype=np.float32)
        for row, i in zip(found, compared, strict=False):
            scores = [np.nan if s.similarity is None else s.similarity for s in e.trajectories[i].step_scores]
            row[: len(scores)] = scores[: len(row)]
        return found


def _without_surrogates(line: bytes) -> bytes:
    """Half of a character, as in the name of a file that is no UTF-8, becomes a question mark."""
    return json.dumps(json.loads(line), ensure_ascii=False).encode("utf-8", "replace") if b"\\ud" in line else line


def read_json(file: Path) -> dict[str, Any] | None:
    """What a small file holds; None if it is missing or something else."""
    try:
        found = json.loads(file.read_bytes()) if file.is_file() and file.stat().st_size < LONGEST_LINE else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def state_of(path: Path, summary: dict[str, Any] | None) -> State:
    """The lock that a trainer holds tells a running one from a stopped one."""
    if summary:
        return "ended itself" if summary.get("stopped_early") else "finished"
    try:
        if (path / ".lock").is_file():
            with (path / ".lock").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "running"
    except OSError:
        pass
    return "stopped"
