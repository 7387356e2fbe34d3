"""Opening a run: its model is loaded, and its directory is begun or taken back to its newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ireasoner.method.scoring import RewardFunction
from ireasoner.method.texts import with_domain
from ireasoner.method.types import ROLES, Role
from ireasoner.model.backbone import lacks_bfloat16, load_processor, most_image_tokens, resolve_device
from ireasoner.model.counting import limit_sampling
from ireasoner.model.inputs import check_several
from ireasoner.model.learner import Learner
from ireasoner.model.loading import load_policy
from ireasoner.model.parallel import ALONE, Processes
from ireasoner.model.policy import Policy
from ireasoner.model.source import Source, find_model
from ireasoner.rollouts.engine import Engine
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training.advice import drowned_in_rounding
from ireasoner.training.checkpoints import newest_checkpoint
from ireasoner.training.checks import Inputs
from ireasoner.training.closing import versions
from ireasoner.training.config import Config, dump_config
from ireasoner.training.energy import open_meter
from ireasoner.training.items import LISTING, set_aside_line
from ireasoner.training.labelled import LabelledQuestion, StepTruth, draw_questions
from ireasoner.training.recorder import VERSIONS, Recorder, RunError, write_json
from ireasoner.training.selfplay import SelfPlay
from ireasoner.training.state import Observer, Run, check_config, notes, read_listing, read_state, record_skips, restore
from ireasoner.training.watch import Signals, Watch


def prepare(
    config: Config,
    out: Path,
    inputs: Inputs,
    observer: Observer,
    processes: Processes = ALONE,
    truth: StepTruth | None = None,
) -> Run:
    """Load everything that a run needs. Nothing is written: a run that cannot start must leave no folder behind.

    Args:
        config: options of the run, which may have been fitted to the device since `inputs` were read.
        out: the run directory.
        inputs: what `checks` has read.
        observer, processes, truth: kept in the run.

    Raises:
        UsageError: something that the user named cannot be used.
    """
    # Every process takes the first one's commit: a branch may have moved on in between.
    commit = processes.gather([inputs.model.commit], processes.count)[0]
    model = inputs.model if commit == inputs.model.commit else find_model(config.model, commit)
    pool = inputs.pool
    pool.share(processes)
    news: list[str] = []

    def hear(text: str) -> None:
        observer.on_message(text)
        news.append(text)

    examples = [question for questions in inputs.labels.values() for question in questions]
    selfplay = open_selfplay(config, model, examples, inputs.reward, processes, observer.on_message, hear)
    policy = selfplay.policy
    observer.on_message(policy.describe() + ".")
    if config.shard and processes.count == 1:
        observer.on_message("--shard changes nothing here: there is one process, and it holds the whole model.")
    if (images := config.schedule.images_per_step) < processes.count:
        observer.on_message(
            f"{processes.count - images} of {processes.count} processes have nothing to play or to learn from: a step "
            f"has images_per_step {images}, shared out among them. Start fewer, or a run with more images a step."
        )
    if inputs.initial:
        config = _with_initial_adapters(config, policy, inputs.initial)
        selfplay.engine.refresh()
    run = Run(
        config=config,
        out=out,
        recorder=Recorder(out, writes=processes.is_main),
        observer=observer,
        processes=processes,
        pool=pool,
        labelled=pool.labelled(inputs.labels) if inputs.labels else None,
        policy=policy,
        engine=selfplay.engine,
        selfplay=selfplay,
        learners={role: Learner(policy, role, config.recipe, config.fitted_optimizer(), processes) for role in ROLES},
        watch=Watch(config),
        signals=Signals(config.watch.watch_window * config.schedule.images_per_step, config.labelled_alone),
        questions=draw_questions(inputs.questions, config.schedule.eval_questions),
        truth=truth,
        meter=open_meter(policy.device),
        news=news,
    )
    policy.on_shortage = run.shortages.append
    processes.wait()  # where one of them cannot load the model, the main one must not have begun to write
    return run


def _with_initial_adapters(config: Config, policy: Policy, folders: Mapping[Role, Path]) -> Config:
    """Load the adapters that a run begins with. The config says from now on which they are.

    Raises:
        UsageError: they do not fit the model, or are not those that the run began with before.
    """
    for role, folder in folders.items():
        policy.load_adapter(folder, role)
    found = {role: policy.adapter_sha256(role) for role in folders}
    if config.init_adapters_sha256 not in ({}, found):
        raise RunError(f"{config.init_adapters} has changed since the run was started: start a new run")
    return config.model_copy(update={"init_adapters_sha256": found})


def open_directory(run: Run) -> bool:
    """Make the directory of a new run, or take the run back to the newest sound checkpoint that its directory has.

    The records after that checkpoint are dropped.

    Returns:
        Whether there was a checkpoint.

    Raises:
        UsageError: every checkpoint is damaged or does not fit, the processes find different ones, or the directory
            cannot be written.
    """
    try:
        checkpoint, skipped = newest_checkpoint(run.out / "checkpoints")
    except OSError as error:
        raise RunError(f"the checkpoints of {run.out} cannot be read: {error}") from None
    if skipped and checkpoint is None:
        raise RunError(f"every checkpoint of {run.out} is damaged: {skipped[0][0].name}: {skipped[0][1]}")
    state = read_state(checkpoint) if checkpoint else {"step": 0, "elapsed": 0.0}
    run.step, run.elapsed = state["step"], state["elapsed"]
    if len(steps := set(run.processes.gather([run.step], run.processes.count))) > 1:
        found = ", ".join(map(str, sorted(steps)))
        raise RunError(
            f"the processes find {run.out} after different steps ({found}): it must be one folder that all hosts share"
        )
    if checkpoint:
        check_config(run.config, checkpoint)
    run.recorder.prepare()
    # Steps after the checkpoint are taken again and give the same records, so theirs are dropped. Without a checkpoint
    # (a new run, or one that was killed before its first) that holds for all records, those of step 0 included.
    dropped = run.recorder.rewind(run.step if checkpoint else -1)
    told = [f"Dropped a damaged record: {warning}." for warning in dropped]
    told += [f"Records are missing: {gap}." for gap in run.recorder.gaps(run.step)]
    for text in [*notes(skipped), *told]:
        run.tell(text)
    run.processes.wait()  # the others read the records below, so the main one must have finished rewinding them
    record_skips(run)
    if checkpoint:
        try:
            restore(run, checkpoint, state)
        except (KeyError, TypeError, ValueError) as error:  # a checkpoint that is whole, but not a run's
            raise RunError(f"{checkpoint} does not fit this run: {type(error).__name__}: {error}") from None
    else:
        if run.pool.set_aside or run.pool.compares_when_drawing:
            run.tell(set_aside_line(run.pool))
        if warning := drowned_in_rounding(run.config):
            run.tell(warning)
    if read_listing(run.out) != run.pool.names.text:
        run.recorder.write_text(LISTING, run.pool.names.text.decode())
    return checkpoint is not None


def begin_directory(run: Run, notes: Sequence[str]) -> None:
    """Write what the directory of a new run begins with, and tell these sentences about what was read."""
    run.recorder.write_text(VERSIONS, write_json(versions(run)))
    run.recorder.write_text("config.yaml", dump_config(run.config))  # which makes the directory a run
    for note in notes:
        run.tell(note)


def open_selfplay(
    config: Config,
    model: Source,
    examples: Sequence[LabelledQuestion] = (),
    reward: RewardFunction | None = None,
    processes: Processes = ALONE,
    tell: Callable[[str], None] = lambda line: None,
    tell_of_servers: Callable[[str], None] = lambda line: None,
) -> SelfPlay:
    """Load the model with new adapters, and make the self-play of a run on it.

    Args:
        config: options of the run.
        model: where the backbone is.
        examples: labelled questions, of which the proposer may be shown some.
        reward: the reward function if it is the user's own.
        processes: those that play together.
        tell: as for `load_policy`.
        tell_of_servers: as `tell` of `open_engine`.

    Raises:
        UsageError: the model or the engine cannot be used.
    """
    device = resolve_device(processes.device if processes.count > 1 else config.device)
    if config.backbone.dtype == "bfloat16" and lacks_bfloat16(device):
        raise RunError(
            f"{device} only emulates bfloat16, slowly: train with --dtype float16, or float32 if activations overflow"
        )
    sharded_over = processes if config.shard else ALONE
    if config.has_groups:
        check_several(load_processor(model, config.backbone.max_image_tokens), config.model)
    policy = load_policy(model, config.backbone, device=device, seed=config.seed, tell=tell, sharded_over=sharded_over)
    limit_sampling(policy, config.fitted_optimizer().tokens_per_batch)
    engine = open_engine(config, policy, processes, tell_of_servers)
    return SelfPlay(policy, engine, config, examples, reward, processes)


def open_engine(
    config: Config, policy: Policy, processes: Processes = ALONE, tell: Callable[[str], None] = lambda line: None
) -> Engine:
    """The engine that the config names: its servers if it names any. Every process must call this.

    Args:
        config: options of the run.
        policy: the model that is sampled from.
        processes: those of the run.
        tell: is told in a sentence when a server is lost, and when it is back.

    Raises:
        UsageError: it is not installed or cannot be used here, or a server cannot be used.
    """
    if config.servers:
        from ireasoner.rollouts.servers import ServersEngine  # imports an HTTP client

        longest, folder = longest_sequence(config, policy.processor), config.adapters_folder
        options: dict[str, Any] = {"patience": config.patience, "folder": folder, "processes": processes, "tell": tell}
        options["ahead"] = config.schedule.overlap
        return ServersEngine.open(policy, config.servers, longest, **options)
    if config.engine == "transformers":
        return LiveEngine(policy)
    from ireasoner.rollouts.vllm import VllmEngine  # imports vLLM, which is an optional dependency

    longest = longest_sequence(config, policy.processor)
    return VllmEngine.load(policy, config.model, longest, config.vllm_share, processes, config.most_images)


def longest_sequence(config: Config, processor: Any) -> int:
    """The most tokens of a prompt and its completion together: image, prompt, question, solution, and 128 for the chat
    template."""
    sampling = config.sampling
    image = most_image_tokens(processor, config.max_image_pixels, config.most_images)
    prompts = with_domain(sampling.proposer_prompt, sampling.domain), sampling.solver_prompt
    prompt = max(len(processor.tokenizer(text)["input_ids"]) for text in prompts)
    return image + prompt + sampling.max_question_tokens + sampling.max_solution_tokens + 128
