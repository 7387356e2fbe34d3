"""A trained model to be asked: the solver of a run under the run's own prompt, in the form that it was trained in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import TextStreamer

from ireasoner.method.answers import answer_key, majority
from ireasoner.method.texts import parse_trajectory, solver_messages
from ireasoner.method.types import Role, Solution
from ireasoner.model.inputs import check_several, encode_images
from ireasoner.model.policy import Policy
from ireasoner.model.views import Pictures, View
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training.clips import Limits, load_path
from ireasoner.training.config import Config
from ireasoner.training.images import ImageError, load_image
from ireasoner.training.targets import find_trained, load_target

OneImage = Image.Image | str | os.PathLike[str]


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
        image: OneImage | Pictures | Sequence[OneImage],
        question: str,
        votes: int = 1,
        *,
        base: bool = False,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Ask one question about an image, several images or a clip, as the run's solver was asked in training.

        Args:
            image: a picture or the path of one; a list of those, which are shown together; or the path of a clip: a
                video, an animation, or a folder of frames. In a run on `items="folders"`, the images in a folder are
                shown together instead. The limits are those of the run: `images_per_item` and `frame_rate`.
            question: the question alone; the run's prompt is put around it.
            votes: 1: the greedy reply; more: so many are sampled at temperature 1, and the majority answers.
            base: ask the model that the run started from, with the same prompt.
            seed: of the sampled replies.
            on_text: is told a single reply as it is written, a few words at a time; of several, nothing.

        Raises:
            ImageError: an image cannot be read, there is none, or there are too many.
            ModelError: the model cannot be shown several images.
            ValueError: less than one vote.
        """
        if votes < 1:
            raise ValueError(f"votes must be at least 1, not {votes}")
        view = load_asked(image, self.config)
        if isinstance(view, Pictures):
            check_several(self.policy.processor, self.config.model)
        sampling = self.config.sampling
        role: Role | None = None if base else "solver"
        (encoded,) = encode_images(self.policy, [view])
        request = Request(encoded, solver_messages(sampling.solver_prompt, question, encoded.shown), (seed,))
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


def load_asked(image: OneImage | Pictures | Sequence[OneImage], config: Config) -> View:
    """What `TrainedModel.ask` is asked about, within the limits of a run. Raises `ImageError` as it does."""
    if isinstance(image, Pictures):
        return image
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, str | os.PathLike):
        return load_path(Path(image), Limits.of(config), config.items)
    if len(image) == 1:
        return load_asked(image[0], config)
    if problem := Limits.of(config).problem(len(image)):
        raise ImageError(f"The question cannot be asked: {problem}.")
    return Pictures(tuple(_picture(each, config) for each in image))


def _picture(image: OneImage, config: Config) -> Image.Image:
    return image.convert("RGB") if isinstance(image, Image.Image) else load_image(image, config.max_image_pixels)


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
