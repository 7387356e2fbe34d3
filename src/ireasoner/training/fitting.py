"""Making a run fit in memory: at its start what the device holds is counted, and a later shortage ends in no lost run.

How many tokens an update takes at a time is lowered to what the GPU holds at the start of a run, and stored in its
`config.yaml`, so that updates are cut in the same places when the run is resumed on another GPU. The size of all other
batches follows from it and from the memory that is free. Where memory does not suffice after all, batches are halved
until the process ends. Where batches are cut changes rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ireasoner.model.backbone import most_image_tokens, resolve_device
from ireasoner.model.counting import SPARE
from ireasoner.model.footprint import Footprint
from ireasoner.model.loading import meta_policy
from ireasoner.model.parallel import Processes
from ireasoner.model.pieces import DoesNotFitError, out_of_memory_is_told, release_memory
from ireasoner.training.config import Config
from ireasoner.training.evaluation import EvaluationOptions
from ireasoner.training.state import CONFIG, Observer, Run, save
from ireasoner.training.targets import model_revision


@contextmanager
def fitted(config: Config, out: Path, processes: Processes, observer: Observer) -> Iterator[Config]:
    """Gives the config of a run that is about to be loaded, with no more tokens in an update than its GPU holds.

    The config of a resumed run is not changed. On the CPU nothing is counted.

    Raises:
        DoesNotFitError: the GPU is too small for this model; or memory runs out inside, which otherwise ends in a
            traceback of torch's.
    """
    device = resolve_device(processes.device if processes.count > 1 else config.device)
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        for_vllm = config.vllm_share * total if config.engine == "vllm" and not config.servers else 0
        free = min(processes.gather([free - for_vllm], processes.count))  # every process must get the same config
        policy = meta_policy(config.model, config.backbone, model_revision(config, out))
        takes, image_tokens = policy.footprint, most_image_tokens(policy.processor, config.max_image_pixels)
        try:
            tokens = tokens_that_fit(config, takes, image_tokens, free)
        except DoesNotFitError as error:
            aside = f", or lower --vllm-share, which sets {for_vllm / 1e9:.1f} GB aside" if for_vllm else ""
            raise DoesNotFitError(f"{error}{aside}") from None
        if tokens < config.optimizer.tokens_per_batch and not (out / CONFIG).exists():
            config = config.model_copy(update={"fitted_tokens_per_batch": tokens})
            observer.on_message(_choice(config, takes, free))
    with out_of_memory_is_told():
        yield config


def tokens_that_fit(config: Config, takes: Footprint, image_tokens: int, free: float) -> int:
    """How many tokens an update may keep the activations of.

    Args:
        config: options of the run.
        takes: what the model takes.
        image_tokens: the most that an image takes in a prompt.
        free: bytes of the device that are free.

    Raises:
        DoesNotFitError: it does not hold a single completion, even with gradient checkpointing.
    """
    sampling = config.sampling
    images = EvaluationOptions.batch_size if config.eval_data else config.schedule.images_per_step
    held = takes.fixed + images * image_tokens * takes.feature
    # The longest sequence: image, instructions and question of about a question's length each, and solution.
    longest = image_tokens + 2 * sampling.max_question_tokens + sampling.max_solution_tokens
    least = held + longest * takes.update_per_token(True)
    usable = (1 - SPARE) * free
    if usable < least:
        raise DoesNotFitError(
            f"{config.model} does not fit: it takes {least / 1e9:.1f} GB to train ({takes.weights / 1e9:.1f} of them "
            f"weights) on one completion of {longest} tokens at a time, and {usable / 1e9:.1f} GB of the device's "
            f"memory can be used: lower --max-image-tokens (an image takes up to {image_tokens}), or use a smaller "
            f"model or a larger GPU"
        )
    return max(1, int((usable - held) / takes.update_per_token(False)))


def _choice(config: Config, takes: Footprint, free: float) -> str:
    return (
        f"Memory: {free / 1e9:.1f} GB are free, and {config.model} takes {takes.fixed / 1e9:.1f} GB and "
        f"{takes.update_per_token(False) / 1e6:.1f} MB for each token of an update, so "
        f"{config.fitted_tokens_per_batch} tokens are taken at a time, not the {config.optimizer.tokens_per_batch} of "
        "--tokens-per-batch: above it, activations are computed again in the backward pass."
    )


@contextmanager
def within_memory(run: Run) -> Iterator[None]:
    """Inside, a run takes a step. If not even the smallest part of it fits in memory, what came before is saved.

    Where several processes run, the others wait for this one elsewhere, so that the newest checkpoint has to do; so it
    has where one of the roles has been updated already.

    Raises:
        DoesNotFitError: as above; the message says what was saved.
    """
    step, pool, memory = run.step, run.pool.state(), run.selfplay.memory.state()
    updates = [learner.updates for learner in run.learners.values()]
    try:
        with out_of_memory_is_told():
            yield
    except DoesNotFitError as error:
        told = "--resume goes on from the newest checkpoint"
        if run.processes.count == 1 and updates == [learner.updates for learner in run.learners.values()]:
            run.step = step
            run.pool.restore(pool)
            run.selfplay.memory.restore(memory)
            release_memory()
            save(run)
            told = f"the run is saved after step {step}, and --resume goes on from there"
        raise DoesNotFitError(f"{error}; {told}") from None
    tell_shortages(run)


def tell_shortages(run: Run) -> None:
    """Record where memory did not suffice in any process since the last call. Every process must call this."""
    for told in run.processes.gather([run.shortages], run.processes.count):
        for text in told:
            tokens = run.config.fitted_optimizer().tokens_per_batch
            run.tell(f"{text} With a lower --tokens-per-batch ({tokens} here), less is tried at a time.")
    run.shortages.clear()
