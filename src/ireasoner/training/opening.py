"""Opening a run: everything that it needs is loaded here, and it continues from its newest checkpoint if it has one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ireasoner.method.scoring import RewardFunction
from ireasoner.method.types import ROLES
from ireasoner.model.backbone import lacks_bfloat16, most_image_tokens, resolve_device
from ireasoner.model.counting import limit_sampling
from ireasoner.model.learner import Learner
from ireasoner.model.loading import load_policy
from ireasoner.model.parallel import ALONE, Processes
from ireasoner.model.policy import Policy
from ireasoner.model.source import find_model
from ireasoner.rollouts.engine import Engine
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training.advice import drowned_in_rounding
from ireasoner.training.checkpoints import newest_checkpoint
from ireasoner.training.config import Config
from ireasoner.training.items import ImagePool, set_aside_line
from ireasoner.training.labelled import LabelledQuestion, StepTruth, draw_questions, load_questions
from ireasoner.training.recorder import Recorder, read_json
from ireasoner.training.selfplay import SelfPlay
from ireasoner.training.state import (
    VERSIONS,
    Observer,
    Run,
    RunError,
    check_config,
    notes,
    read_state,
    record_skips,
    restore,
)
from ireasoner.training.watch import Signals, Watch


def open_run(
    config: Config,
    out: Path,
    recorder: Recorder,
    observer: Observer,
    processes: Processes = ALONE,
    reward: RewardFunction | None = None,
    truth: StepTruth | None = None,
) -> tuple[Run, bool]:
    """Load everything that a run needs, and restore its newest sound checkpoint if there is one.

    The records that `recorder` has written after that checkpoint are dropped. `reward` is the reward function if it is
    the user's own; the other arguments are kept in the run.

    Returns:
        The run, and whether it was restored from a checkpoint.

    Raises:
        UsageError: every checkpoint is damaged, or something that the user named cannot be used.
    """
    try:
        checkpoint, skipped = newest_checkpoint(out / "checkpoints")
    except OSError as error:
        raise RunError(f"the checkpoints of {out} cannot be read: {error}") from None
    if skipped and checkpoint is None:
        raise RunError(f"every checkpoint of {out} is damaged: {skipped[0][0].name}: {skipped[0][1]}")
    state = read_state(checkpoint) if checkpoint else {"step": 0, "elapsed": 0.0}
    if checkpoint:
        check_config(config, checkpoint)
    # Steps after the checkpoint are taken again and give the same records, so theirs are dropped. Without a checkpoint
    # (a new run, or one that was killed before its first) that holds for all records, those of step 0 included.
    dropped = recorder.rewind(state["step"] if checkpoint else -1)
    told = [f"Dropped a damaged record: {warning}." for warning in dropped]
    told += [f"Records are missing: {gap}." for gap in recorder.gaps(state["step"])]
    for text in [*notes(skipped), *told]:
        recorder.event(state["step"], text)
        observer.on_message(text)
    processes.wait()  # the other processes read the records below, so the main one must have finished rewinding them
    questions = load_questions(config.eval_data, truth=truth) if config.eval_data else []
    # Before the images are read, so that a mistyped name is told at once. Every process takes the first one's commit.
    found = find_model(config.model, model_revision(config, out))
    commit = processes.gather([found.commit], processes.count)[0]
    pool = open_pool(config, questions, processes)
    selfplay = open_selfplay(config, pool, processes, reward, commit)
    policy = selfplay.policy
    observer.on_message(policy.describe() + ".")
    if (images := config.schedule.images_per_step) < processes.count:
        observer.on_message(
            f"{processes.count - images} of {processes.count} processes have nothing to play or to learn from: a step "
            f"has images_per_step {images}, shared out among them. Start fewer, or a run with more images a step."
        )
    run = Run(
        config=config,
        out=out,
        recorder=recorder,
        observer=observer,
        processes=processes,
        pool=pool,
        policy=policy,
        engine=selfplay.engine,
        selfplay=selfplay,
        learners={role: Learner(policy, role, config.recipe, config.fitted_optimizer(), processes) for role in ROLES},
        watch=Watch(config),
        signals=Signals(config.watch.watch_window * config.schedule.images_per_step),
        questions=draw_questions(questions, config.schedule.eval_questions),
        truth=truth,
        step=state["step"],
        elapsed=state["elapsed"],
    )
    policy.on_shortage = run.shortages.append
    record_skips(run)
    if checkpoint:
        try:
            restore(run, checkpoint, state)
        except (KeyError, TypeError, ValueError) as error:  # a checkpoint that is whole, but not a run's
            raise RunError(f"{checkpoint} does not fit this run: {type(error).__name__}: {error}") from None
    else:
        if pool.set_aside:
            run.tell(set_aside_line(pool.set_aside))
        if warning := drowned_in_rounding(config):
            run.tell(warning)
    return run, checkpoint is not None


def model_revision(config: Config, run_dir: Path) -> str | None:
    """The revision of a run's model: the commit that it began with, once that is recorded, for branches move on."""
    model, at, commit = str(read_json(run_dir / VERSIONS, 2**20).get("model")).rpartition("@")
    return commit if at and model == config.model else config.revision


def open_pool(config: Config, questions: Sequence[LabelledQuestion], processes: Processes = ALONE) -> ImagePool:
    """The images of the config's folder, without those of the evaluation data.

    Args:
        config: names the folder, and maybe a file of further questions whose images are held out.
        questions: those of the evaluation data, which have been read already.
        processes: those that draw together.

    Raises:
        UsageError: the folder or the file cannot be used.
    """
    held_out = {q.image for q in (*questions, *(load_questions(config.held_out) if config.held_out else ()))}
    return ImagePool.scan(config.images, config.seed, config.max_image_pixels, processes, held_out)


def open_selfplay(
    config: Config,
    pool: ImagePool,
    processes: Processes = ALONE,
    reward: RewardFunction | None = None,
    revision: str | None = None,
) -> SelfPlay:
    """Load the model with new adapters, and make the self-play of a run on it.

    Args:
        config: options of the run.
        pool: the run's images; labelled questions are about these.
        processes: those that play together.
        reward: the reward function if it is the user's own.
        revision: a branch, tag or commit of a model on the hub; None: the newest.

    Raises:
        UsageError: the model, the engine or the labels cannot be used.
    """
    device = resolve_device(processes.device if processes.count > 1 else config.device)
    if config.backbone.dtype == "bfloat16" and lacks_bfloat16(device):
        raise RunError(
            f"{device} only emulates bfloat16, slowly: train with --dtype float16, or float32 if activations overflow"
        )
    policy = load_policy(config.model, config.backbone, revision=revision, device=device, seed=config.seed)
    limit_sampling(policy, config.fitted_optimizer().tokens_per_batch)
    engine = open_engine(config, policy, processes)
    labels = load_labels(config, pool) if config.labels else None
    return SelfPlay(policy, engine, config, labels, reward, processes)


def open_engine(config: Config, policy: Policy, processes: Processes) -> Engine:
    """The engine that the config names. Raises `UsageError` if it is not installed or cannot be used here."""
    if config.engine == "transformers":
        return LiveEngine(policy)
    if processes.count > 1:
        raise RunError("--engine vllm works in one process: leave it out, or start without the launcher")
    from ireasoner.rollouts.vllm import VllmEngine  # imports vLLM, which is an optional dependency

    sampling, tokenizer = config.sampling, policy.processor.tokenizer
    # The longest sequence that vLLM has to hold: image, prompt, question, solution, and 128 for the chat template.
    image = most_image_tokens(policy.processor, config.max_image_pixels)
    prompt = max(len(tokenizer(text)["input_ids"]) for text in (sampling.proposer_prompt, sampling.solver_prompt))
    written = sampling.max_question_tokens + sampling.max_solution_tokens
    return VllmEngine.load(policy, config.model, image + prompt + written + 128, config.vllm_share)


def load_labels(config: Config, pool: ImagePool) -> dict[str, list[tuple[str, str]]]:
    """Labelled questions and their answers by the names of the pool's images, for the oracle recipe.

    Raises:
        RunError: none of them is about an image of the pool.
    """
    assert config.labels is not None
    names = {Path(pool.paths[name]).resolve(): name for name in pool.names}
    labels: dict[str, list[tuple[str, str]]] = {}
    for row in load_questions(config.labels):
        if row.image in names:
            labels.setdefault(names[row.image], []).append((row.question, row.answer))
    if not labels:
        unless = " that is not set aside for evaluation" if config.eval_data or config.held_out else ""
        raise RunError(f"no question in {config.labels} is about an image in {config.images}{unless}")
    return labels
