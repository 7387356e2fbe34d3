"""Reads a run directory: finished or still growing, perhaps damaged, and never trusted.

Every episode is parsed once for the index, which keeps what filters, searches and averages need, and again whenever it
is shown. Lines that are not valid records are left out and counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ireasoner.method.answers import answer_key
from ireasoner.method.types import Episode, ProbeAnswer, Truth, UsageError
from ireasoner.training.config import Config, ConfigError, load_config
from ireasoner.training.recorder import is_locked, read_json
from ireasoner.training.watch import Watch

# A run directory may come from anywhere. Nothing that we record comes near these bounds.
LONGEST_LINE = 4_000_000  # bytes
LARGEST_PICTURE = 4_000_000  # bytes; a thumbnail has at most 768 pixels a side
MOST_TRAJECTORIES = 512  # of an episode
HEAT_MAP = (64, 64)  # most trajectories and reasoning steps that an averaged heat map shows

TAILS = ("metrics", "episodes", "probes", "skipped", "events")
State = Literal["finished", "ended itself", "running", "stopped"]
FindTruth = Callable[[Config], Truth | None]


@dataclass(frozen=True)
class Entry:
    """What the index keeps of an episode.

    `place` is the offset and the length of its line in `episodes.jsonl`; `number` tells the episodes of a step apart,
    from 1 on. `agreement` holds the leave-one-out
    similarity of each reasoning step [group_size, max_reasoning_steps], NaN where there is none. Trajectories have no
    order of their own: they are sorted by the mean of their row, highest first.
    """

    place: tuple[int, int]
    step: int
    number: int
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
    def name(self) -> str:
        """The step and the number, which name an episode in an address."""
        return f"{self.step}-{self.number}"

    @property
    def opening(self) -> str | None:
        """The question's first two words, which tell its kind."""
        return " ".join(self.question.lower().split()[:2]) if self.question else None


@dataclass
class _Tail:
    """The records of a file that is being appended to, and how far it has been read."""

    path: Path
    records: list[Any] = field(default_factory=list)
    offset: int = 0
    identity: tuple[int, int] | None = None
    damaged: int = 0
    generation: int = 0

    def restarted(self) -> bool:
        """Whether the file was replaced or cut, as when a run goes back; all of it is then read again.

        Raises:
            FileNotFoundError: the file was there before.
        """
        found = self.path.stat() if self.path.is_file() else None
        if found is None and self.identity is not None:
            raise FileNotFoundError(self.path)
        identity = (found.st_dev, found.st_ino) if found else None
        again = identity != self.identity or bool(found and found.st_size < self.offset)
        if again:
            self.records.clear()
            self.offset, self.damaged, self.identity, self.generation = 0, 0, identity, self.generation + 1
        return again

    def lines(self) -> Iterator[tuple[tuple[int, int], bytes]]:
        """New whole lines with their places; a last line that is still being written is left for the next time."""
        if self.identity is None:
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            # A line that is too long comes in pieces, none of which is a record.
            while (line := file.readline(LONGEST_LINE)).endswith(b"\n") or len(line) == LONGEST_LINE:
                place, self.offset = (self.offset, len(line)), self.offset + len(line)
                yield place, line


class RecordedRun:
    """What a run directory holds. `refresh` reads what is new; what was read stays when the directory is deleted.

    Args:
        path: the run directory, which is only read.
        find_truth: finds what is true of the images of a run; called again when another run takes the same place.
        files: which of `TAILS` to read.
    """

    def __init__(self, path: Path, find_truth: FindTruth | None, files: Sequence[str]) -> None:
        self.path, self.find_truth, self.files, self.gone = path, find_truth, files, False

    @classmethod
    def open(cls, path: Path, find_truth: FindTruth | None = None, files: Sequence[str] = TAILS) -> RecordedRun:
        """Read a run directory, or only some of its files of records.

        Raises:
            UsageError: this is no run directory, or its config or its truth cannot be read.
        """
        if not (path / "config.yaml").is_file():
            raise UsageError(f"{path} is not a run directory: it has no config.yaml")
        run = cls(path, find_truth, files)
        run._begin()
        run.refresh()
        return run

    def _begin(self) -> None:
        """Read the config, on which everything else depends, and forget what was read under another one."""
        identity = self._config_identity()
        try:
            config = load_config(self.path / "config.yaml")
        except ConfigError as error:
            raise UsageError(f"this run cannot be shown: {error}") from None
        self.truth = self.find_truth(config) if self.find_truth else None
        self.config, self._identity = config, identity  # only now: after an error, the next refresh tries again
        self.watch = Watch(self.config)
        self.measured: dict[str, None] = {}  # the names of all metrics, in the order in which they came
        self.summary: dict[str, Any] = {}
        self._tails = {name: _Tail(self.path / f"{name}.jsonl") for name in TAILS}
        self.metrics: list[dict[str, Any]] = self._tails["metrics"].records
        self.entries: list[Entry] = self._tails["episodes"].records
        self.probes: list[ProbeAnswer] = self._tails["probes"].records
        self.skipped: list[dict[str, Any]] = self._tails["skipped"].records
        self.events: list[dict[str, Any]] = self._tails["events"].records

    def _config_identity(self) -> tuple[int, int]:
        found = (self.path / "config.yaml").stat()
        return found.st_ino, found.st_mtime_ns

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def step(self) -> int:
        """The last recorded training step; 0 before the first."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def state(self) -> State:
        """What the run is doing."""
        return state_of(self.path, self.summary)

    @property
    def damaged(self) -> int:
        """How many lines are not valid records."""
        return sum(tail.damaged for tail in self._tails.values())

    @property
    def version(self) -> str:
        """Changes whenever there is something new to show."""
        read = "-".join(f"{tail.generation}.{tail.offset}" for tail in self._tails.values())
        return f"{self._identity[0]}-{read}-{self.state}{'-gone' * self.gone}".replace(" ", "-")

    def refresh(self) -> None:
        """Read what is new."""
        try:
            self.gone = not (self.path / "config.yaml").is_file()
            if not self.gone:
                if self._config_identity() != self._identity:  # another run took this place
                    self._begin()
                for name in self.files:
                    self._read(name, self._tails[name])
                self.summary = read_json(self.path / "summary.json", LONGEST_LINE)
        except (OSError, UsageError):  # deleted, unmounted, or replaced while it was being read
            self.gone = True

    def episode(self, entry: Entry) -> Episode | None:
        """An episode in full; None if the file no longer holds it."""
        try:
            with (self.path / "episodes.jsonl").open("rb") as file:
                file.seek(entry.place[0])
                return Episode.model_validate(json.loads(file.read(entry.place[1])))
        except (OSError, ValueError, RecursionError):
            return None

    def versions(self) -> dict[str, str]:
        """Versions of the packages that the run started with; empty if it did not record them."""
        return {str(key): str(value) for key, value in read_json(self.path / "versions.json", LONGEST_LINE).items()}

    def thumbnail(self, name: str) -> Path | None:
        """One of the run's own thumbnails by its recorded name; None for anything outside the run's image folder."""
        match = re.fullmatch(r"(?:images/)?([0-9a-f]{8,64}\.(?:png|webp))", name)
        if not match:
            return None
        folder = self.path / "images"
        path = folder / match[1]
        own = path.is_file() and not path.is_symlink() and not folder.is_symlink()
        return path if own and path.stat().st_size <= LARGEST_PICTURE else None

    def true_answer(self, image: str, question: str) -> str | None:
        """The true answer to a question about an image, where it is known."""
        return self.truth.answer(image, question) if self.truth else None

    def episode_truth(self, e: Episode) -> tuple[str | None, str | None]:
        """The true answer to an episode's question and its key, where they are known."""
        truth = e.true_answer or self.true_answer(e.image, e.question.text)
        return truth, answer_key(truth, e.question.text) if truth else None

    def step_truth(self, image: str, reasoning_step: str) -> bool | None:
        """Whether a reasoning step is true of an image, where that is known."""
        return self.truth.step(image, reasoning_step) if self.truth else None

    def _read(self, name: str, tail: _Tail) -> None:
        if tail.restarted() and name == "metrics":
            self.watch, self.measured = Watch(self.config), {}
        for place, line in tail.lines():
            try:
                tail.records.append(self._parse(name, place, json.loads(line)))
            except (ValueError, RecursionError):  # pydantic's ValidationError is a ValueError
                tail.damaged += 1
                continue
            if name == "metrics":
                self.watch.recall(tail.records[-1])
                self.measured |= dict.fromkeys(tail.records[-1])

    def _parse(self, name: str, place: tuple[int, int], record: Any) -> Any:
        if name == "episodes":
            return self._entry(place, Episode.model_validate(record))
        if name == "probes":
            return ProbeAnswer.model_validate(record)
        if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] <= 10**9:
            raise ValueError("not a record")
        if name == "metrics":
            return {key: value for key, value in record.items() if type(value) in (int, float) and abs(value) <= 1e9}
        return {key: str(value) for key, value in record.items() if key != "step"} | {"step": record["step"]}

    def _entry(self, place: tuple[int, int], e: Episode) -> Entry:
        count = len(e.trajectories)
        if count > MOST_TRAJECTORIES:
            raise ValueError("more trajectories than any group has")
        question = e.question.text if e.question.well_formed else None
        key = self.episode_truth(e)[1] if question else None
        before = self.entries[-1] if self.entries else None
        texts = [e.image, e.question.text, e.question.rationale, *(t.answer or "" for t in e.trajectories)]
        texts += [step for t in e.trajectories for step in t.reasoning_steps]
        texts += [t.text for t in e.trajectories if t.problem]
        texts += [e.proposal.text] if e.question.problem and e.proposal else []
        return Entry(
            place=place,
            step=e.step,
            number=before.number + 1 if before and before.step == e.step else 1,
            image=e.image,
            question=question,
            text="\n".join(texts).casefold(),
            answer_entropy=e.answer_entropy,
            reward=sum(t.reward for t in e.trajectories) / count if count else None,
            malformed=sum(not t.well_formed for t in e.trajectories) / count if count else 1.0,
            wrong=e.majority_answer != key if key and e.majority_answer else None,
            trajectories=count,
            agreement=self._agreement(e),
        )

    def _agreement(self, e: Episode) -> NDArray[np.float32]:
        height = min(self.config.sampling.group_size, HEAT_MAP[0])
        width = min(self.config.recipe.max_reasoning_steps, HEAT_MAP[1])
        rows = []
        for t in e.trajectories:
            if known := [s.similarity for s in t.step_scores if s.similarity is not None]:
                row = [np.nan if s.similarity is None else s.similarity for s in t.step_scores[:width]]
                rows.append((sum(known) / len(known), row))
        rows.sort(key=lambda pair: pair[0], reverse=True)
        found = np.full((height, width), np.nan, dtype=np.float32)
        for i, (_, row) in enumerate(rows[:height]):
            found[i, : len(row)] = row
        return found


def state_of(path: Path, summary: dict[str, Any]) -> State:
    """What the run in a directory is doing; `summary` is what it wrote at its end."""
    if summary:
        return "ended itself" if summary.get("stopped_early") else "finished"
    return "running" if is_locked(path) else "stopped"
