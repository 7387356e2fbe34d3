"""The commands that use what a run has trained: ask it, export it, and put it on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ireasoner.app import display
from ireasoner.app.command import Command
from ireasoner.method.recipe import Count
from ireasoner.training.targets import find_trained, load_target

if TYPE_CHECKING:  # this imports torch
    from ireasoner.training.trained import Answer


class Ask(Command):
    """Ask the solver that a run has trained a question about an image, with the run's own prompt. A single reply is
    printed as it is written; of several that vote, the one that words the majority's answer. The last line is the
    answer."""

    summary: ClassVar = "ask a trained model about an image"
    positional: ClassVar = ("run_dir", "image", "question")
    run_dir: str
    """A run directory, or one of its checkpoints (RUN/checkpoints/step-000050)."""
    image: Path
    """The image."""
    question: str
    """The question."""
    base: bool = False
    """Ask the model that the run started from as well."""
    votes: Count = 1
    """Replies that vote on the answer, sampled at temperature 1 (1: a single greedy reply)."""
    seed: int = 0
    """Seed of the sampled replies."""
    device: str = "auto"
    """One of auto, cpu, cuda and cuda:N."""

    def run(self) -> int:
        target = find_trained(self.run_dir)
        from ireasoner.model.pieces import out_of_memory_is_told
        from ireasoner.training.images import load_image
        from ireasoner.training.trained import TrainedModel

        image = load_image(self.image, target.config.max_image_pixels)  # before the model, which takes longer
        with out_of_memory_is_told():
            policy, _ = load_target(target, self.device)
            model = TrainedModel(policy, target.config)
            for base in (True, False) if self.base else (False,):
                if self.base:
                    display.print_text(f"Before training ({target.config.model}):" if base else "\nAfter training:")
                told = display.print_part if self.votes == 1 else None
                reply = model.ask(image, self.question, self.votes, base=base, seed=self.seed, on_text=told)
                if told:
                    display.print_text("")
                _show(reply)
        return 0


class Export(Command):
    """Write the trained solver of a run as a folder that other programs load, with its processor, chat template and
    model card: as a LoRA adapter for PEFT and `vllm serve --enable-lora`, or merged into a whole model. Nothing in the
    folder names a path or an image."""

    summary: ClassVar = "write a trained model as a folder for transformers, PEFT and vLLM"
    positional: ClassVar = ("run_dir",)
    run_dir: str
    """A run directory, or one of its checkpoints (RUN/checkpoints/step-000050)."""
    to: Path
    """The folder to write, missing or empty."""
    merge: bool = False
    """Write a whole model instead of an adapter, merged in float32 and rounded to the dtype of the base."""

    def run(self) -> int:
        target = find_trained(self.run_dir)
        from ireasoner.training.export import export

        export(target, self.to, merge=self.merge)
        print(f"Written: {self.to} ({'the whole model' if self.merge else 'a LoRA adapter of its base'})")
        print(f"How to load it stands in {self.to}/README.md.")
        return 0


class Push(Command):
    """Put the trained solver of a run on the hub: the folder that `export` writes, and nothing else. The token is that
    of HF_TOKEN or of `hf auth login`. A repository that is there already gets a new commit."""

    summary: ClassVar = "put a trained model on the hub"
    positional: ClassVar = ("run_dir", "name")
    run_dir: str
    """A run directory, or one of its checkpoints (RUN/checkpoints/step-000050)."""
    name: str
    """The repository, OWNER/NAME."""
    private: bool = False
    """Make the repository private; one that is there already and public is refused."""
    merge: bool = False
    """Upload the whole model instead of a LoRA adapter."""
    with_episodes: bool = False
    """Upload the run's episodes as well: names and small copies of your images, questions and replies."""

    def run(self) -> int:
        target = find_trained(self.run_dir)
        from ireasoner.training.pushing import push

        options = {"private": self.private, "merge": self.merge, "with_episodes": self.with_episodes}
        print(f"On the hub: {push(target, self.name, **options)}")
        return 0


def _show(reply: Answer) -> None:
    """Print the answer, and of several replies the reasoning steps of the one that words it; of one, all was printed.

    What a model writes may hold anything, so it is made plain.
    """
    if reply.votes > 1:
        for number, step in enumerate(reply.reasoning_steps, 1):
            display.print_text(f"{number}. {display.plain(step, 2000)}")
    if reply.problem is not None:
        display.print_text(f"The reply has no answer that could be read ({reply.problem}).")
    elif reply.answer is None:
        display.print_text("No reply commits itself to an answer.")
    else:
        display.print_text(f"Answer: {display.plain(reply.answer, 2000)}")
    if reply.votes > 1:
        display.print_text(f"{reply.agreeing} of {reply.votes} replies agree.")
