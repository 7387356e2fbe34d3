"""Agreement as a reward manager of verl (tested with verl 0.9.1, its v1 trainer's way); verl itself is not imported.

    python -m verl.trainer.main_ppo reward.num_workers=1 reward.reward_manager.source=importlib \
        reward.reward_manager.module.path=pkg://ireasoner.plugins.verl \
        reward.reward_manager.name=AgreementRewardManager +reward.reward_kwargs.recipe=answers-only ...

`examples/verl_grpo.sh` is a whole command. verl hands over every completion by itself, as soon as it is sampled, and to
a random one of `reward.num_workers` workers. So there must be one worker, which keeps every completion waiting until
all `rollout.n` of its prompt's `uid` are there, and then answers all of them. A part of a group is never judged: when
one of its completions does not come, the others fail after `group_seconds`. The prompts must ask for a form that can be
read, as `ireasoner.method.texts.SOLVER_PROMPT` does; a text in another form earns 0.

A reward manager has no model, so that recipes which ask how likely reasoning steps are, such as `default`, cannot be
paid here. `answers-only` pays for the answers alone: what the steps say earns nothing.

What was run: this manager in verl's own `RewardLoopManager` and its Ray worker, with `DataProto`s of the tiny model's
tokens, handed over as `AgentLoopWorkerTQ` does. What was not: a verl training, for which its rollout engines need GPUs.
verl 0.9.1 asks for a transformers older than 5.11, and this package for 5.17: it was installed with pip's `--no-deps`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ireasoner.method.matching import match_value
from ireasoner.method.scoring import RewardError, ScoredGroup
from ireasoner.method.types import ScoredTrajectory, Solution
from ireasoner.plugins.groups import Completions, GroupScorer, digest, last_question, pictures

OPTIONS = ("recipe", "form", "solver_prompt", "seed", "group_seconds")
WAITING = 1000  # calls that one of Ray's asynchronous actors works on at a time; the others are not even begun


@dataclass
class _Group:
    """The completions of one prompt that have come so far, and the future of all that wait for the rest."""

    scored: asyncio.Future[ScoredGroup]
    solutions: list[Solution] = field(default_factory=list)


class AgreementRewardManager:
    """Pays each completion for an answer that its group agrees on.

    The options are entries of `reward.reward_kwargs`: `recipe`, `form`, `solver_prompt` and `seed`, as for
    `ireasoner.plugins.trl.agreement_reward`, and `group_seconds`, how long a completion waits for the others of its
    group (3600). A row's question is `extra_info.question` where there is one, and otherwise what its last user turn
    says. Where it has a true answer, `acc` says whether the completion gives it; nothing is paid for that.

    Args:
        config: verl's whole configuration.
        tokenizer: of the model.
        compute_score: what verl would score a single completion with; not used.
        embed: texts to normalised embeddings [texts, width], for `paper` and its variants: make a subclass that hands
            it on, and name that one to verl.
        others: handles of a reward model; not used.

    Raises:
        RewardError: groups would be torn apart, completions could wait for each other for ever, or the recipe's reward
            cannot be computed here.
        ConfigError: there is no such recipe.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any = None,
        *,
        embed: Callable[[Sequence[str]], NDArray[np.floating]] | None = None,
        **others: Any,
    ) -> None:
        options: dict[str, Any] = dict(config.reward.get("reward_kwargs") or {})
        if unknown := sorted(options.keys() - OPTIONS):
            raise RewardError(f"reward.reward_kwargs has {', '.join(unknown)}, but may have {', '.join(OPTIONS)}")
        self._seconds = float(options.pop("group_seconds", 3600))
        self._scorer = GroupScorer(options.pop("recipe", "answers-only"), embed=embed, **options)
        if self._scorer.reads_likelihoods:
            raise RewardError(
                f"the recipe {self._scorer.recipe.name!r} asks how likely reasoning steps are, which verl tells no "
                "reward manager: set reward.reward_kwargs.recipe=answers-only, which reads the answers alone"
            )
        rollout = config.actor_rollout_ref.rollout
        self._size, self._longest = int(rollout.n), int(rollout.response_length)
        self._steps = int(config.trainer.get("total_training_steps") or 0)
        self._tokenizer = tokenizer
        self._groups: dict[str, _Group] = {}
        _check(config, self._size)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The reward of one completion, when all others of its group are there.

        Args:
            data: verl's `DataProto` of a trajectory, whose last row counts.

        Returns:
            `reward_score`, and in `reward_extra_info` what verl logs of it.

        Raises:
            RewardError: the others of its group did not come in time, or the group cannot be scored.
        """
        row = data[-1:][0]
        columns = row.non_tensor_batch
        if "uid" not in columns:
            raise RewardError("verl handed over no uid, without which groups are not known")
        uid = str(columns["uid"])
        group = self._groups.setdefault(uid, _Group(asyncio.get_running_loop().create_future()))
        place = len(group.solutions)
        group.solutions.append(self._read(row.batch))
        if group.scored.done():
            pass  # it came too late, and fails as the others did
        elif len(group.solutions) == self._size:
            self._score(group, columns)
            del self._groups[uid]
        else:
            await asyncio.wait([group.scored], timeout=self._seconds)
            if not group.scored.done():  # the group stays, so that what comes later begins no new one
                problem = f"only {len(group.solutions)} of {self._size} completions of a prompt came in"
                group.scored.set_exception(RewardError(f"{problem} {self._seconds:g} s: a part is not judged"))
        return _result(group.scored.result().trajectories[place], columns)

    def _read(self, batch: Any) -> Solution:
        """What stands in a completion; without an end token at its end it was cut off."""
        length = int(batch["attention_mask"][-len(batch["responses"]) :].sum())
        ids = batch["responses"][:length].tolist()
        ended = len(ids) < self._longest or ids[-1] == self._tokenizer.eos_token_id
        return self._scorer.read(self._tokenizer.decode(ids, skip_special_tokens=True), "stop" if ended else "length")

    def _score(self, group: _Group, columns: Any) -> None:
        """Score a group that is whole, for all that wait for it."""
        prompt = list(columns["raw_prompt"])
        asked = (columns.get("extra_info") or {}).get("question")
        completions = Completions(
            str(asked) if asked else last_question(prompt), digest(pictures(prompt) or prompt), group.solutions
        )
        step = columns.get("global_steps")
        try:
            (scored,) = self._scorer.score([completions], None if step is None else int(step), self._steps)
            group.scored.set_result(scored)
        except RewardError as error:
            group.scored.set_exception(error)


def _check(config: Any, size: int) -> None:
    """Check that groups come to one worker, all of the same size, and not more than can wait there.

    Raises:
        RewardError: they do not; the message says what to set.
    """
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    validates = trainer.val_before_train or trainer.test_freq > 0
    prompts = [("data.train_batch_size", config.data.train_batch_size)]
    if validates:
        prompts.append(("data.val_batch_size", config.data.val_batch_size))
    problem = None
    if size < 2:
        problem = f"actor_rollout_ref.rollout.n={size}, but agreement takes a group of at least 2"
    elif config.reward.num_workers != 1:
        problem = f"reward.num_workers={config.reward.num_workers} would tear groups apart: set it to 1"
    elif config.reward.reward_model.enable:
        problem = "reward.reward_model.enable=True is for a reward model: set it to False"
    elif config.reward.custom_reward_function.path is not None:
        problem = "reward.custom_reward_function.path names a function that would never be called: leave it out"
    elif validates and rollout.val_kwargs.n != size:
        problem = (
            f"actor_rollout_ref.rollout.val_kwargs.n={rollout.val_kwargs.n} differs from rollout.n={size}: set it to "
            "that, or validate nothing with trainer.val_before_train=False trainer.test_freq=-1"
        )
    for name, count in prompts:
        if problem is None and (count is None or count * (size - 1) >= WAITING):
            problem = (
                f"{name}={count} prompts of {size} completions may all wait for each other, because Ray works on "
                f"{WAITING} at a time: set it to at most {(WAITING - 1) // (size - 1)}"
            )
    if problem:
        raise RewardError(problem)


def _result(scored: ScoredTrajectory, columns: Any) -> dict[str, Any]:
    """A reward as verl takes it, with what it logs."""
    noted = {
        "readable": float(scored.well_formed),
        "in_majority": float(scored.in_majority),
        **{name: part.value for name, part in scored.parts.items()},
    }
    truth = (columns.get("reward_model") or {}).get("ground_truth")
    if truth is not None:
        question = str((columns.get("extra_info") or {}).get("question") or "")
        answer = scored.answer
        noted["acc"] = 0.0 if answer is None else match_value(answer, [str(truth)], question)
    return {"reward_score": scored.reward, "reward_extra_info": noted}
