"""Making a run fit in memory: at its start what the device holds is counted, and a later shortage ends in no lost run.

How many tokens an update takes at a time is lowered to what the device holds at the start of a run, and stored in its
`config.yaml`, so that updates are cut in the same places when the run is resumed on another one. The size of all other
batches follows from it and from the memory that is free. Where a GPU's memory does not suffice after all, batches are
halved until the process ends. Where batches are cut changes rounding alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ireasoner.model.backbone import most_image_tokens, resolve_device
from ireasoner.model.counting import CountError
from ireasoner.model.loading import meta_policy
from ireasoner.model.memory import free_memory
from ireasoner.model.parallel import Processes
from ireasoner.model.pieces import DoesNotFitError, out_of_memory_is_told, release_memory
from ireasoner.model.source import Source, weight_bytes
from ireasoner.training.config import Config
from ireasoner.training.planning import fit, footprint
from ireasoner.training.state import CONFIG, Observer, Run, save

SMALL = 50  # times a model's weights: where so much memory is free, nothing needs to be counted


@contextmanager
def fitted(
    config: Config, model: Source, out: Path, processes: Processes, observer: Observer, *, force: bool = False
) -> Iterator[Config]:
    """Gives the config of a run that is about to be loaded, with no more tokens in an update than its device holds.

    The config of a resumed run is not changed. Small models on a CPU are not counted, which would take a second.

    Args:
        config: options of the run.
        model: where its files are; weights are not needed yet.
        out: the run directory.
        processes: those of the run.
        observer: is told if the config was changed, or should have been refused.
        force: whether a run that does not fit is begun nevertheless.

    Raises:
        DoesNotFitError: the device is too small for this model; or memory runs out inside, which otherwise ends in a
            traceback of torch's.
    """
    device = resolve_device(processes.device if processes.count > 1 else config.device)
    free, total = free_memory(device)
    vllm_here = device.startswith("cuda") and config.engine == "vllm" and not config.servers
    for_vllm = config.vllm_share * total if vllm_here else 0
    if not device.startswith("cuda"):
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", processes.count))  # they share this machine's memory
    free = min(processes.gather([free - for_vllm], processes.count))  # every process must get the same config
    size = max(processes.gather([weight_bytes(model) or free], processes.count))
    if device.startswith("cuda") or SMALL * size > free:
        try:
            fitting, told = _fitting(config, model, free, processes.count)
        except CountError as error:
            fitting, told = config, ""
            observer.on_message(f"Memory was not counted: {error}.")
        except DoesNotFitError as error:
            aside = f"; or lower --vllm-share, which sets {for_vllm / 1e9:.1f} GB aside" if for_vllm else ""
            if not force:
                raise DoesNotFitError(f"{error}{aside}") from None
            fitting, told = config, ""
            observer.on_message(f"Begun all the same: {error}{aside}.")
        if fitting != config and not (out / CONFIG).exists():
            observer.on_message(told)
            config = fitting
    with out_of_memory_is_told():
        yield config


def _fitting(config: Config, model: Source, free: float, processes: int) -> tuple[Config, str]:
    """The config with as many tokens as fit, and a sentence on what they are fitted to.

    Raises:
        CountError: the model cannot be counted.
        DoesNotFitError: not even one completion fits.
    """
    policy = meta_policy(model, config.backbone)
    image_tokens = most_image_tokens(policy.processor, config.max_image_pixels, config.most_images)
    takes, fitting = (
        footprint(policy, config, image_tokens, processes),
        fit(policy, config, image_tokens, free, processes),
    )
    return fitting, (
        f"Memory: {free / 1e9:.1f} GB are free, and {config.model} takes {(takes.weights + takes.optimizer) / 1e9:.2f} "
        f"GB, and {takes.update_per_token(False) / 1e6:.1f} MB and logits for each token of an update, so "
        f"{fitting.fitted_tokens_per_batch} tokens are taken at a time, not the {config.optimizer.tokens_per_batch} of "
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
    step, memory = run.step, run.selfplay.memory.state()
    pools = [(pool, pool.state()) for pool in run.pools]
    updates = [learner.updates for learner in run.learners.values()]
    try:
        with out_of_memory_is_told():
            yield
    except DoesNotFitError as error:
        told = "--resume goes on from the newest checkpoint"
        if run.processes.count == 1 and updates == [learner.updates for learner in run.learners.values()]:
            run.step = step
            for pool, state in pools:
                pool.restore(state)
            run.selfplay.memory.restore(memory)
            release_memory()
            save(run)
            told = f"the run is saved after step {step}, and --resume goes on from there"
        raise DoesNotFitError(f"{error}; {told}") from None
    tell_shortages(run)


def tell_shortages(run: Run) -> None:
    """Record what any process has lacked since the last call: memory, or a server. Every process must call this."""
    own = list(run.news)  # a thread that samples may add to them meanwhile
    found = run.processes.gather([(run.shortages, own)], run.processes.count)
    for shortages, _ in found:
        for text in shortages:
            tokens = run.config.fitted_optimizer().tokens_per_batch
            run.tell(f"{text} With a lower --tokens-per-batch ({tokens} here), less is tried at a time.")
    told: list[str] = []
    for _, news in found:
        known = {text.partition(" (")[0] for text in told}  # several processes lose a server, each for its own reason
        told += [text for text in news if text.partition(" (")[0] not in known]
    for text in told:
        run.recorder.event(run.step, text)
        if text not in own:  # which the observer has been told at once
            run.observer.on_message(text)
    run.shortages.clear()
    del run.news[: len(own)]
