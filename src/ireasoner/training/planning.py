"""What a run takes, from its config and the model's alone: `ireasoner plan` shows it, and `train` refuses by it.

The model is built on the meta device, where a tensor has a shape and no memory, and its tensors are counted there
(`ireasoner.model.counting`). This module adds them up for the largest piece of work of each kind.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass

from ireasoner.model.backbone import most_image_tokens, scales_by_area
from ireasoner.model.batching import Batching
from ireasoner.model.counting import SPARE, count
from ireasoner.model.footprint import Footprint
from ireasoner.model.options import Quantization
from ireasoner.model.pieces import DoesNotFitError, Piece
from ireasoner.model.policy import Policy
from ireasoner.training.config import Config
from ireasoner.training.evaluation import EvaluationOptions
from ireasoner.training.statistics import SAMPLES

# A vLLM server takes nine tenths of its GPU, of which about so many bytes are for activations, graphs and libraries.
VLLM_SHARE, VLLM_OWN = 0.9, 3e9


@dataclass(frozen=True)
class Needs:
    """Bytes that a process of a run takes on its device at most, part by part.

    Attributes:
        weights: of the backbone and both adapters, or a process's part of them.
        optimizer: AdamW's state of both roles, and gradients.
        images: the features of the images that are at hand.
        update: activations and logits of the largest micro-batch.
        sampling: caches and activations while a step is played.
        evaluation: the same while held-out questions are asked.
    """

    weights: int
    optimizer: int
    images: int
    update: int
    sampling: int
    evaluation: int

    @property
    def total(self) -> int:
        """The peak: updates, sampling and evaluation come one after another."""
        return self.weights + self.optimizer + self.images + max(self.update, self.sampling, self.evaluation)


def longest_prompt(config: Config, image_tokens: int) -> int:
    """Tokens of the longest prompt: an image, a question, and instructions of about a question's length."""
    return image_tokens + 2 * config.sampling.max_question_tokens


def group_tokens(policy: Policy, config: Config, image_tokens: int) -> int:
    """Tokens of the longest group in an update, whose completions share their prompt if the model allows it."""
    prompt, n = longest_prompt(config, image_tokens), config.sampling.group_size
    return prompt * (1 if policy.shares_prompts else n) + n * config.sampling.max_solution_tokens


def footprint(policy: Policy, config: Config, image_tokens: int, processes: int) -> Footprint:
    """What the model takes on the device of each of a run's processes."""
    takes = policy.footprint.among(group_tokens(policy, config, image_tokens))
    return takes.sharded(processes) if config.shard else takes


def whole_weights(policy: Policy) -> int:
    """Bytes of a backbone whose weights are not quantised, as vLLM loads it, of a policy without weights."""
    tensors = [*policy.model.parameters(), *policy.model.buffers()]
    return sum(tensor.nbytes for tensor in tensors) - policy.footprint.adapters


def images_at_a_time(config: Config, processes: int) -> tuple[int, int]:
    """How many images a process has at hand: of a step, and of the questions that an evaluation asks together."""
    asked = min(EvaluationOptions.batch_size, math.ceil(config.schedule.eval_questions / processes))
    return math.ceil(config.schedule.images_per_step / processes), asked if config.eval_data else 0


def features(config: Config, takes: Footprint, image_tokens: int, processes: int) -> int:
    """Bytes of the features of the images that a process has at hand at most."""
    of_step, asked = images_at_a_time(config, processes)
    # The next step's are there already, and so are other views of what is sampled. Gray images are gone before an
    # update, which takes more than they do.
    each = 1 + config.schedule.overlap + config.recipe.other_view
    return max(each * of_step, asked) * image_tokens * takes.feature


def needs(policy: Policy, config: Config, image_tokens: int, processes: int = 1) -> Needs:
    """What a process of a run takes on its device, where every text is as long as it may be.

    Args:
        policy: one without weights will do (`meta_policy`).
        config: options of the run, fitted or not.
        image_tokens: the most that an image takes in a prompt.
        processes: how many there are.
    """
    takes, sampling = footprint(policy, config, image_tokens, processes), config.sampling
    prompt, n, solution = longest_prompt(config, image_tokens), sampling.group_size, sampling.max_solution_tokens
    tokens = config.fitted_optimizer().tokens_per_batch
    images, asked = images_at_a_time(config, processes)
    batching, lengths = Batching(policy, tokens), [(prompt, solution)] * images

    def update(piece: Piece) -> int:
        written, group = piece.size * solution, prompt + (piece.columns.stop - piece.columns.start) * solution
        # Of completions that share a prompt, each token has a mask of what it sees in its group.
        mask = written * group * policy.backbone.dtype.itemsize if policy.shares_prompts else 0
        return takes.update(batching.tokens(lengths, piece), written, piece.recomputed) + mask

    def sampled(prompts: int, count: int, room: int) -> int:
        if not prompts or config.engine != "transformers" or config.servers:
            return 0
        least, whole = (
            takes.sampling(rows, prompt, room, each, at_a_time=rows, shares=policy.shares_attention)
            for rows, each in ((1, 1), (prompts, count))
        )
        # `limit_sampling` sets a limit, above which there are several batches, of one completion at least.
        return max(least, min(whole, tokens * takes.update_per_token(False)))

    return Needs(
        weights=takes.weights,
        optimizer=takes.optimizer,
        images=features(config, takes, image_tokens, processes),
        update=max(map(update, batching.pieces(lengths, n))),
        # Groups about other views are sampled together with those about the images themselves.
        sampling=max(
            sampled(images * (1 + config.recipe.other_view), n, solution),
            sampled(images, 1, sampling.max_question_tokens),
        ),
        evaluation=sampled(asked, SAMPLES + 1, solution),  # and the greedy reply, which is drawn with them
    )


def tokens_that_fit(config: Config, takes: Footprint, image_tokens: int, free: float, processes: int = 1) -> int:
    """How many tokens an update may keep the activations of.

    Args:
        config: options of the run.
        takes: what the model takes on the device.
        image_tokens: the most that an image takes in a prompt.
        free: bytes of the device that are free.
        processes: how many there are.

    Raises:
        DoesNotFitError: it does not hold a single completion, even with gradient checkpointing.
    """
    of_images = features(config, takes, image_tokens, processes)
    solution = config.sampling.max_solution_tokens
    longest = longest_prompt(config, image_tokens) + solution
    least = takes.weights + takes.optimizer + of_images + takes.update(longest, solution, recomputed=True)
    usable = (1 - SPARE) * free
    if usable < least:
        raise DoesNotFitError(
            f"{config.model} does not fit: it takes {least / 1e9:.1f} GB to train ({takes.weights / 1e9:.1f} of them "
            f"weights) on one completion of {longest} tokens at a time, and {usable / 1e9:.1f} GB of the device's "
            f"memory can be used: lower --max-image-tokens (an image takes up to {image_tokens}), share it out among "
            "more processes with --shard, hold it in fewer bits with --quantization, use a smaller model or a larger "
            "device, or go on regardless with --force"
        )
    return max(1, takes.tokens_in(usable - of_images))


def fit(policy: Policy, config: Config, image_tokens: int, free: float, processes: int = 1) -> Config:
    """The config, with no more tokens in an update than `free` bytes hold.

    Raises:
        DoesNotFitError: as for `tokens_that_fit`.
    """
    takes = footprint(policy, config, image_tokens, processes)
    tokens = tokens_that_fit(config, takes, image_tokens, free, processes)
    if tokens >= config.optimizer.tokens_per_batch:
        return config
    return config.model_copy(update={"fitted_tokens_per_batch": tokens})


@dataclass(frozen=True)
class Variant:
    """A run with the model whole in every process, or shared out among them.

    Attributes:
        config: with as many tokens in an update as fit.
        needs: what it takes on each device.
        problem: why it does not fit; None if it does.
    """

    config: Config
    needs: Needs
    problem: str | None

    @property
    def tokens(self) -> int:
        """Tokens that an update keeps the activations of at a time."""
        return self.config.fitted_optimizer().tokens_per_batch


def variants(policy: Policy, config: Config, image_tokens: int, devices: int, memory: float) -> list[Variant]:
    """The run on so many devices of `memory` bytes, whole and, on several, sharded unless it is quantised."""
    return [
        variant(policy, config.model_copy(update={"shard": shard}), image_tokens, devices, memory)
        for shard in ((False, True) if devices > 1 and policy.quantization is None else (False,))
    ]


def variant(policy: Policy, config: Config, image_tokens: int, devices: int, memory: float) -> Variant:
    """The run as the config says, on so many devices of `memory` bytes."""
    own_vllm = config.engine == "vllm" and not config.servers
    for_vllm, weights = config.vllm_share * memory * own_vllm, whole_weights(policy)
    problem = None
    try:
        config = fit(policy, config, image_tokens, memory - for_vllm, devices)
    except DoesNotFitError as error:
        problem = str(error)
    if own_vllm and for_vllm < weights + VLLM_OWN:
        problem = (
            f"--vllm-share {config.vllm_share} is {for_vllm / 1e9:.1f} GB of each device, and vLLM's own copy of the "
            f"weights takes {weights / 1e9:.1f}: sample on --servers, which share a model out among GPUs"
        )
    return Variant(config, needs(policy, config, image_tokens, devices), problem)


def what_would_help(policy: Policy, config: Config, image_tokens: int, devices: int, memory: float) -> list[str]:
    """What to change about a run that does not fit, each by itself."""
    found = []
    sharded = config.model_copy(update={"shard": True})
    for more in (2, 4, 8, 16, 32, 64, 128) if policy.quantization is None else ():
        if more > devices and variant(policy, sharded, image_tokens, more, memory).problem is None:
            found.append(f"{more} GPUs with --shard")
            break
    for fewer in (1024, 768, 512, 256, 128):
        images = max(v.problem is None for v in variants(policy, config, fewer, devices, memory))
        if fewer < image_tokens and images and scales_by_area(policy.processor):
            found.append(f"--max-image-tokens {fewer}")
            break
    smaller: tuple[Quantization, ...] = ("int8", "nf4")
    for quantization in smaller if policy.quantization is None else ():
        held = copy(policy)
        held.quantization = quantization
        held.footprint = count(held)
        if variant(held, config.model_copy(update={"shard": False}), image_tokens, devices, memory).problem is None:
            found.append(f"--quantization {quantization}")
            break
    return found


@dataclass(frozen=True)
class Server:
    """A vLLM server of a model.

    Attributes:
        gpus: that its weights are shared out among (`--tensor-parallel-size`).
        weights: bytes of the weights on each.
        cached: tokens that the cache of all of them holds.
        completions: of the longest kind, that it can write at a time.
    """

    gpus: int
    weights: int
    cached: int
    completions: int


def smallest_server(policy: Policy, config: Config, image_tokens: int, memory: float) -> Server | None:
    """The server on the fewest GPUs of `memory` bytes that writes a whole step at a time; None: 16 are not enough.

    vLLM shares out attention by heads, so that their number must be a multiple of that of the GPUs.
    """
    takes, heads, sampling = policy.footprint, policy.decoder.config.num_attention_heads, config.sampling
    # The prompt is kept once for its group.
    group = longest_prompt(config, image_tokens) + sampling.group_size * sampling.max_solution_tokens
    groups = config.schedule.images_per_step * (1 + config.recipe.other_view)
    weights = whole_weights(policy)
    for gpus in (gpus for gpus in (1, 2, 4, 8, 16) if heads % gpus == 0):
        cached = int((gpus * (VLLM_SHARE * memory - VLLM_OWN) - weights) / takes.cache)
        if cached >= groups * group:
            return Server(gpus, weights // gpus, cached, cached * sampling.group_size // group)
    return None


def checkpoint_bytes(policy: Policy, config: Config) -> tuple[int, int]:
    """Bytes on disk of a checkpoint, which holds adapters and AdamW's two moments of each, and of all that are kept."""
    each, schedule = 3 * policy.footprint.adapters, config.schedule
    taken = 1 + (math.ceil(schedule.steps / schedule.save_every) if schedule.save_every else 1)
    kept = min(taken, schedule.keep_checkpoints or taken)
    spare = 2 if config.watch.watch else 0  # that the watch may go back to
    return each, min(taken, kept + spare + 1) * each  # one more while it is written


@dataclass(frozen=True)
class Step:
    """The work of one step of all processes, where every text is as long as it may be.

    Attributes:
        sampled: tokens that both roles write.
        read: tokens of prompts that are computed to sample.
        scored: tokens that the learner's model reads once more to judge reasoning steps, about a gray image.
        trained: tokens of the updates; the proposer's, which comes every few steps only, by its share.
    """

    sampled: int
    read: int
    scored: int
    trained: int


def step_of(policy: Policy, config: Config, image_tokens: int) -> Step:
    """The work of one step."""
    sampling, images, groups = config.sampling, config.schedule.images_per_step, 1 + config.recipe.other_view
    question, prompt = sampling.max_question_tokens, longest_prompt(config, image_tokens)
    group = group_tokens(policy, config, image_tokens)
    return Step(
        sampled=images * (question + groups * sampling.group_size * sampling.max_solution_tokens),
        read=images * (1 + groups) * prompt,
        scored=images * group * (config.recipe.step_measure == "grounding"),
        trained=images * (group + (prompt + question) // config.schedule.proposer_every),
    )


@dataclass(frozen=True)
class Plan:
    """Everything that is known about a run before it begins.

    Attributes:
        policy: without weights.
        config: the run that was asked about.
        image_tokens: the most that an image takes in a prompt.
        devices: how many processes there are, each on a device of its own.
        memory: bytes of each device.
        variants: whole and, on several devices, sharded.
        best: the variant to choose; None if none fits.
        server: the smallest vLLM server on such devices; None if it takes more than 16.
        helps: what to change if nothing fits, each by itself.
    """

    policy: Policy
    config: Config
    image_tokens: int
    devices: int
    memory: float
    variants: list[Variant]
    best: Variant | None
    server: Server | None
    helps: list[str]


def plan(policy: Policy, config: Config, devices: int, memory: float) -> Plan:
    """Plan a run on so many devices of `memory` bytes.

    Args:
        policy: without weights (`meta_policy`).
        config: the run.
        devices: at least 1.
        memory: of each.
    """
    image_tokens = most_image_tokens(policy.processor, config.max_image_pixels, config.most_images)
    given = policy, config, image_tokens, devices, memory
    found = variants(*given)
    fitting = [each for each in found if each.problem is None]
    # Whole, unless more tokens fit when it is shared out: sharding sends every layer around in every pass.
    best = max(fitting, key=lambda each: (config.shard and each.config.shard, each.tokens), default=None)
    helps = [] if fitting else what_would_help(*given)
    return Plan(*given, found, best, smallest_server(policy, config, image_tokens, memory), helps)
