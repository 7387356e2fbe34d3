"""The commands that use what a run has trained: ask it, export it, and put it on the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ireasoner.app.options import Count, Device, Seed
from ireasoner.method.types import UsageError

if TYPE_CHECKING:  # this imports torch
    from ireasoner.training.trained import Answer

ASKED = """The image, or several, which are shown together; or a clip: a video, an animation or a folder of frames. \
The question comes last."""
Trained = Annotated[str, Parameter(help="A run directory, or one of its checkpoints (RUN/checkpoints/step-000050).")]


def ask(
    run: Trained,
    asked: Annotated[list[str], Parameter(name="IMAGE... QUESTION", help=ASKED)],
    /,
    *,
    base: bool = False,
    votes: Count = 1,
    seed: Seed = 0,
    device: Device = "auto",
) -> int:
    """Ask the solver that a run has trained a question about an image, about several or about a clip, with the run's
    own prompt. A single reply is printed as it is written; of several that vote, the one that words the majority's
    answer. The last line is the answer.

    Args:
        base: Ask the model that the run started from as well.
        votes: Replies that vote on the answer, sampled at temperature 1 (1: a single greedy reply).
        seed: Seed of the sampled replies.
    """
    from ireasoner.app import display
    from ireasoner.training.targets import find_trained, load_target

    *images, question = asked
    if os.path.exists(question):
        raise UsageError(f"the question comes last, and {question} is there as a file: add what you want to know of it")
    if not images:
        raise UsageError(f"ask about an image: name it before the question {question!r:.200}")
    target = find_trained(run)
    from ireasoner.model.backbone import load_processor
    from ireasoner.model.inputs import check_several
    from ireasoner.model.pieces import out_of_memory_is_told
    from ireasoner.model.views import Pictures
    from ireasoner.training.trained import TrainedModel, load_asked

    config = target.config
    view = load_asked(images, config)  # before the model, which takes longer
    if isinstance(view, Pictures):
        check_several(load_processor(target.model, config.backbone.max_image_tokens), config.model)
    with out_of_memory_is_told():
        policy, _ = load_target(target, device, display.print_wait)
        model = TrainedModel(policy, config)
        for of_base in (True, False) if base else (False,):
            if base:
                display.print_text(f"Before training ({config.model}):" if of_base else "\nAfter training:")
            told = display.print_part if votes == 1 else None
            reply = model.ask(view, question, votes, base=of_base, seed=seed, on_text=told)
            if told:
                display.print_text("")
            _show(reply)
    return 0


def export(run: Trained, /, *, to: Path, merge: bool = False) -> int:
    """Write the trained solver of a run as a folder that other programs load, with its processor, chat template and
    model card: as a LoRA adapter for PEFT and `vllm serve --enable-lora`, or merged into a whole model. Nothing in the
    folder names a path or an image.

    Args:
        to: The folder to write, missing or empty.
        merge: Write a whole model instead of an adapter, merged in float32 and rounded to the dtype of the base.
    """
    from ireasoner.app import display
    from ireasoner.training.targets import find_trained

    target = find_trained(run)
    from ireasoner.training import export as exporting

    exporting.export(target, to, merge=merge, tell=display.print_wait)
    print(f"Written: {to} ({'the whole model' if merge else 'a LoRA adapter of its base'})")
    print(f"How to load it stands in {to}/README.md.")
    return 0


def push(run: Trained, name: str, /, *, private: bool = False, merge: bool = False, with_episodes: bool = False) -> int:
    """Put the trained solver of a run on the hub: the folder that `export` writes, and nothing else. The token is that
    of HF_TOKEN or of `hf auth login`. A repository that is there already gets a new commit.

    Args:
        name: The repository, OWNER/NAME.
        private: Make the repository private; one that is there already and public is refused.
        merge: Upload the whole model instead of a LoRA adapter.
        with_episodes: Upload the run's episodes as well: names and small copies of your images, questions and replies.
    """
    from ireasoner.training.targets import find_trained

    target = find_trained(run)
    from ireasoner.training import pushing

    print(f"On the hub: {pushing.push(target, name, private=private, merge=merge, with_episodes=with_episodes)}")
    return 0


def _show(reply: Answer) -> None:
    """Print the answer, and of several replies the reasoning steps of the one that words it; of one, all was printed.

    What a model writes may hold anything, so it is made plain.
    """
    from ireasoner.app import display

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
