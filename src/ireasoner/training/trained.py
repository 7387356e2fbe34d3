"""A trained model to be asked: the solver of a run under the run's own prompt, in the form that it was trained in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import TextStreamer

from ireasoner.method.answers import answer_key, majority
from ireasoner.method.texts import parse_trajectory, solver_messages
from ireasoner.method.types import Role, Solution
from ireasoner.model.inputs import encode_images
from ireasoner.model.policy import Policy
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training.config import Config
from ireasoner.training.images import load_image
from ireasoner.training.targets import find_trained, load_target


@dataclass(frozen=True)
class Answer:
    """What a model replied to a question.

    Attributes:
        text: the reply in full; of several, the first one that gives the majority answer.
        reasoning_steps: those in the text.
        answer: None if the text could not be read, or if no reply committed itself to an answer.
        problem: why the text could not be read; None: it could.
        votes: how many replies were sampled; 1: a single greedy one.
        agreeing: how many of them give this answer.
    """

    text: str
    reasoning_steps: tuple[str, ...]
    answer: str | None
    problem: str | None
    votes: int
    agreeing: int


class TrainedModel:
    """A policy with the config that it was trained under. `TrainedModel.from_run` loads both."""

    def __init__(self, policy: Policy, config: Config) -> None:
        self.policy, self.config = policy, config
        self.engine = LiveEngine(policy)

    @classmethod
    def from_run(cls, path: str | os.PathLike[str], *, device: str = "auto") -> TrainedModel:
        """Load the trained solver of a run.

        Args:
            path: a finished run directory, or a checkpoint of any run (`RUN/checkpoints/step-000040`).
            device: one of auto, cpu, cuda and cuda:N.

        Raises:
            UsageError: it is not a run, it has no trained solver, or its model cannot be loaded.
        """
        target = find_trained(os.fspath(path))
        policy, _ = load_target(target, device)
        return cls(policy, target.config)

    def ask(
        self,
        image: Image.Image | str | os.PathLike[str],
        question: str,
        votes: int = 1,
        *,
        base: bool = False,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Ask one question about one image, as the run's solver was asked in training.

        Args:
            image: a picture, or the path of one.
            question: the question alone; the run's prompt is put around it.
            votes: 1: the greedy reply; more: so many are sampled at temperature 1, and the majority answers.
            base: ask the model that the run started from, with the same prompt.
            seed: of the sampled replies.
            on_text: is told a single reply as it is written, a few words at a time; of several, nothing.

        Raises:
            ImageError: the image cannot be read.
            ValueError: less than one vote.
        """
        if votes < 1:
            raise ValueError(f"votes must be at least 1, not {votes}")
        if isinstance(image, Image.Image):
            picture = image.convert("RGB")
        else:
            picture = load_image(image, self.config.max_image_pixels)
        sampling = self.config.sampling
        role: Role | None = None if base else "solver"
        (encoded,) = encode_images(self.policy, [picture])
        request = Request(encoded, solver_messages(sampling.solver_prompt, question), (seed,))
        temperature = 0.0 if votes == 1 else 1.0
        with self._streamed_to(on_text if votes == 1 else None):
            (replies,) = self.engine.sample(
                [request], role, n=votes, max_tokens=sampling.max_solution_tokens, temperature=temperature
            )
        read = [parse_trajectory(c.text, c.finish_reason, sampling.solution_form, request.prompt) for c in replies]
        return _voted([reply.text for reply in replies], read, question)

    @contextmanager
    def _streamed_to(self, on_text: Callable[[str], None] | None) -> Iterator[None]:
        """Tell the text of a single completion as it is drawn."""
        if on_text is None:
            yield
            return
        streamer = _Streamer(self.policy, on_text)
        self.engine.on_token = streamer.token
        try:
            yield
            streamer.end()
        finally:
            self.engine.on_token = None


class _Streamer(TextStreamer):
    """Hands the text of a completion on, in parts that later tokens do not change."""

    def __init__(self, policy: Policy, on_text: Callable[[str], None]) -> None:
        super().__init__(policy.processor.tokenizer)
        self._end_tokens, self._on_text = policy.end_tokens, on_text

    def token(self, drawn: int) -> None:
        if drawn not in self._end_tokens:
            self.put(torch.tensor([drawn]))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


def _voted(texts: list[str], read: list[Solution], question: str) -> Answer:
    """The majority's answer as the first reply that gives it words it; of a single reply, whatever it says."""
    vote = majority([None if s.answer is None else answer_key(s.answer, question) for s in read])
    first = vote.members[0] if vote.members else 0
    said = read[first]
    answer = said.answer if vote.members or len(read) == 1 else None
    return Answer(texts[first], said.reasoning_steps, answer, said.problem, len(read), len(vote.members))
