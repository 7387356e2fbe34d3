"""The reward manager for verl: a completion waits for its whole group, and a part of one is never judged."""

from __future__ import annotations

import asyncio
import importlib.util
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from ireasoner.method.scoring import Context, RewardError, score_group
from ireasoner.model.source import TINY_MODEL
from ireasoner.plugins.verl import AgreementRewardManager
from ireasoner.training.config import ConfigError, load_recipe

EXAMPLE = Path(__file__).parents[1] / "examples" / "verl_grpo.sh"
QUESTION = "How many bars are there?"
TEXTS = (
    "<think>The bars are red, blue.</think><answer>2</answer>",
    "<think>The bars are red, blue.</think><answer>2</answer>",
    "<think>I count three bars.</think><answer>3</answer>",
    "2",
)


class Settings(dict[str, Any]):
    """A configuration as verl's, whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def settings(**changes: Any) -> Settings:
    """What the manager reads of verl's configuration; changes by dotted names with __ for dots."""
    config = Settings(
        reward=Settings(
            num_workers=1, reward_kwargs={}, reward_model=Settings(enable=False),
            custom_reward_function=Settings(path=None),
        ),
        actor_rollout_ref=Settings(rollout=Settings(n=4, response_length=64, val_kwargs=Settings(n=1))),
        trainer=Settings(val_before_train=False, test_freq=-1, total_training_steps=10),
        data=Settings(train_batch_size=8, val_batch_size=None),
    )  # fmt: skip
    for name, value in changes.items():
        *path, last = name.split("__")
        found = config
        for part in path:
            found = found[part]
        found[last] = value
    return config


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_MODEL)


class OneRow(list[Any]):
    """A `DataProto` of one completion, of which a part is another."""

    def __getitem__(self, key: Any) -> Any:
        return OneRow(super().__getitem__(key)) if isinstance(key, slice) else super().__getitem__(key)


def columns(uid: str, question: str | None = QUESTION, **more: Any) -> dict[str, Any]:
    block = {"type": "image", "image": f"{uid}.png"}
    turn = {"role": "user", "content": [block, {"type": "text", "text": f"Please: {QUESTION}"}]}
    return {
        "uid": uid,
        "raw_prompt": np.array([turn]),
        "extra_info": {"question": question} if question else {},
        **more,
    }


def row(tokenizer: Any, text: str, *, ended: bool = True, longest: int = 64, **of_row: Any) -> OneRow:
    """A completion as verl hands it over: after a prompt of 3 tokens, padded on the right."""
    ids = tokenizer.encode(text)[: longest - ended] + [tokenizer.eos_token_id] * ended
    if not ended:
        ids = (ids * longest)[:longest]
    pad = [0] * (longest - len(ids))
    mask = [1, 1, 1] + [1] * len(ids) + pad
    batch = {"responses": torch.tensor(ids + pad), "attention_mask": torch.tensor(mask)}
    return OneRow([SimpleNamespace(batch=batch, non_tensor_batch=of_row)])


def judge(manager: AgreementRewardManager, rows: Sequence[OneRow]) -> list[Any]:
    """What the manager says to all of them, or the error that it raises, in the order of the rows."""

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(manager.run_single(each) for each in rows), return_exceptions=True)

    return asyncio.run(all_of_them())


def expected(texts: Sequence[str]) -> list[float]:
    return list(score_group(QUESTION, texts, load_recipe("answers-only"), Context(step_weight=0.0)).rewards)


def test_groups_earn_what_score_group_pays_in_whatever_order_they_come(tokenizer: Any):
    rows = {name: [row(tokenizer, text, **columns(name)) for text in TEXTS] for name in ("a", "b")}
    mixed = [rows["a"][0], rows["b"][3], rows["b"][2], rows["a"][1], rows["a"][2], rows["b"][1], rows["a"][3]]
    found = judge(AgreementRewardManager(settings(), tokenizer), [*mixed, rows["b"][0]])
    earned = [each["reward_score"] for each in found]
    assert [earned[i] for i in (0, 3, 4, 6)] == pytest.approx(expected(TEXTS))
    assert earned[0] == earned[3] > earned[4] > 0 == earned[6]
    assert [earned[i] for i in (7, 5, 2, 1)] == pytest.approx(expected(TEXTS))
    # With a memory, all that the other group says was said of the first one's image too.
    recipe = load_recipe("answers-only").model_copy(update={"recurrence_window": 128})
    manager = AgreementRewardManager(settings(reward__reward_kwargs={"recipe": recipe}), tokenizer)
    earned = [each["reward_score"] for each in judge(manager, [*mixed, rows["b"][0]])]
    assert [earned[i] for i in (0, 3, 4, 6)] == pytest.approx(expected(TEXTS))
    assert [earned[i] for i in (7, 5, 2, 1)] == [0, 0, 0, 0]


def test_what_verl_logs(tokenizer: Any):
    labelled = {"reward_model": {"ground_truth": "two"}}
    found = judge(AgreementRewardManager(settings(), tokenizer), [
        row(tokenizer, text, **columns("a", **labelled)) for text in TEXTS
    ])  # fmt: skip
    logged = [each["reward_extra_info"] for each in found]
    assert [each["acc"] for each in logged] == [1, 1, 0, 0]
    assert [each["readable"] for each in logged] == [1, 1, 1, 0]
    assert [each["in_majority"] for each in logged] == [1, 1, 0, 0]
    assert logged[0].keys() == logged[3].keys() >= {"outcome", "step_agreement"}
    unlabelled = judge(AgreementRewardManager(settings(), tokenizer), [
        row(tokenizer, text, **columns("a", reward_model={"ground_truth": None})) for text in TEXTS
    ])  # fmt: skip
    assert "acc" not in unlabelled[0]["reward_extra_info"]


def test_a_part_of_a_group_is_never_judged(tokenizer: Any):
    manager = AgreementRewardManager(settings(reward__reward_kwargs={"group_seconds": 0.1}), tokenizer)
    rows = [row(tokenizer, text, **columns("a")) for text in TEXTS]
    late = judge(manager, rows[:3])
    assert all(isinstance(each, RewardError) for each in late)
    assert "only 3 of 4 completions of a prompt came in 0.1 s: a part is not judged" in str(late[0])
    (last,) = judge(manager, rows[3:])  # which begins no new group
    assert isinstance(last, RewardError)


def test_a_group_whose_reward_cannot_be_computed_fails_as_a_whole(tokenizer: Any):
    def embed(texts: Sequence[str]) -> Any:
        raise RewardError("no embeddings")

    manager = AgreementRewardManager(settings(reward__reward_kwargs={"recipe": "paper"}), tokenizer, embed=embed)
    found = judge(manager, [row(tokenizer, text, **columns("a")) for text in TEXTS])
    assert [str(each) for each in found] == ["no embeddings"] * 4


def test_a_completion_that_was_cut_off_earns_nothing(tokenizer: Any):
    """It fills the response length without an end token; one that ends exactly there was not cut off."""
    longest = len(tokenizer.encode(TEXTS[0])) + 1
    manager = AgreementRewardManager(
        settings(actor_rollout_ref__rollout__response_length=longest, actor_rollout_ref__rollout__n=2), tokenizer
    )
    whole = row(tokenizer, TEXTS[0], longest=longest, **columns("a"))
    cut = row(tokenizer, TEXTS[0], longest=longest, **columns("a"))
    cut[0].batch["responses"][-1] = tokenizer.encode(">")[-1]
    earned = [each["reward_score"] for each in judge(manager, [whole, cut])]
    assert earned[0] > 0
    assert earned[1] == 0


def test_the_question_is_in_extra_info_or_in_the_prompt(tokenizer: Any):
    """Answers are compared by the options that it offers."""
    offering = "How many bars are there? A) 2 B) 4"
    texts = ("<think>I see red, blue.</think><answer>A</answer>", *TEXTS[1:])
    plain = judge(AgreementRewardManager(settings(), tokenizer), [
        row(tokenizer, text, **columns("a", None)) for text in texts
    ])  # fmt: skip
    told = judge(AgreementRewardManager(settings(), tokenizer), [
        row(tokenizer, text, **columns("a", offering)) for text in texts
    ])  # fmt: skip
    assert plain[0]["reward_score"] < told[0]["reward_score"] == told[1]["reward_score"]


def test_the_weight_of_steps_follows_the_trainers_step(tokenizer: Any):
    def embed(texts: Sequence[str]) -> Any:
        return np.array([["red" in text, "red" not in text] for text in texts], dtype=float)

    def paid(**step: int) -> float:
        manager = AgreementRewardManager(settings(reward__reward_kwargs={"recipe": "paper"}), tokenizer, embed=embed)
        return judge(manager, [row(tokenizer, text, **columns("a", **step)) for text in TEXTS])[2]["reward_score"]

    recipe = load_recipe("paper")
    assert recipe.step_weight_initial != recipe.step_weight_final
    assert paid(global_steps=1) != paid(global_steps=10) == paid()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward__num_workers": 8}, r"reward\.num_workers=8 would tear groups apart: set it to 1"),
        ({"actor_rollout_ref__rollout__n": 1}, "at least 2"),
        ({"reward__reward_model__enable": True}, "is for a reward model"),
        ({"reward__custom_reward_function__path": "mine.py"}, "would never be called"),
        ({"trainer__test_freq": 5}, r"val_kwargs\.n=1 differs from rollout\.n=4"),
        ({"data__train_batch_size": 334}, r"data\.train_batch_size=334 .* set it to at most 333"),
        ({"reward__reward_kwargs": {"reciep": "default"}}, "has reciep, but may have recipe, form"),
        ({"reward__reward_kwargs": {"form": "json"}}, "form is 'json'"),
        ({"reward__reward_kwargs": {"recipe": "paper"}}, "'paper' compares embeddings"),
        (
            {"reward__reward_kwargs": {"recipe": "default"}},
            "'default' asks how likely reasoning steps are, which verl tells no reward manager",
        ),
    ],
)
def test_a_configuration_that_cannot_work_is_told_at_once(tokenizer: Any, changes: dict[str, Any], said: str):
    AgreementRewardManager(settings(data__train_batch_size=333), tokenizer)
    with pytest.raises(RewardError, match=said):
        AgreementRewardManager(settings(**changes), tokenizer)


def test_validation_needs_whole_groups_that_fit(tokenizer: Any):
    validates = {"trainer__val_before_train": True, "actor_rollout_ref__rollout__val_kwargs__n": 4}
    with pytest.raises(RewardError, match=r"data\.val_batch_size=None"):
        AgreementRewardManager(settings(**validates), tokenizer)
    AgreementRewardManager(settings(**validates, data__val_batch_size=100), tokenizer)


def test_an_unknown_recipe_is_told(tokenizer: Any):
    with pytest.raises(ConfigError, match="there is no recipe 'defualt'"):
        AgreementRewardManager(settings(reward__reward_kwargs={"recipe": "defualt"}), tokenizer)


@pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed")
@pytest.mark.filterwarnings("default")  # verl, Ray and what they import warn of their own options
def test_the_example_in_verls_own_reward_loop(tokenizer: Any):
    """Its config is composed as verl composes it, and its worker is handed completions as by the agent loop."""
    import ray
    from hydra import compose, initialize_config_module
    from tensordict import TensorDict
    from verl import DataProto
    from verl.experimental.reward_loop import RewardLoopManager

    words = shlex.split(EXAMPLE.read_text("utf-8").replace("\\\n", " ").replace('"$1"', str(TINY_MODEL)), comments=True)
    overrides = [word for word in words if "=" in word]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", [*overrides, "actor_rollout_ref.rollout.n=4"])

    def handed_over(text: str, uid: str) -> Any:
        ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
        asked = torch.tensor(tokenizer.encode(QUESTION))
        parts = {"prompts": asked, "responses": torch.tensor(ids), "input_ids": torch.cat([asked, torch.tensor(ids)])}
        parts["attention_mask"] = torch.ones_like(parts["input_ids"])
        image = Image.new("RGB", (28, 28), "red" if uid == "a" else "blue")
        turn = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}
        of_row = {"uid": uid, "raw_prompt": [turn], "extra_info": {}, "reward_model": {"ground_truth": "2"}}
        return DataProto(
            batch=TensorDict({name: ids[None] for name, ids in parts.items()}, batch_size=1),
            non_tensor_batch={name: np.array([value]) for name, value in of_row.items()},
        )

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    try:
        (worker,) = RewardLoopManager(config).reward_loop_worker_handles
        early = [worker.compute_score.remote(handed_over(text, "b")) for text in TEXTS[:3]]
        whole = [worker.compute_score.remote(handed_over(text, "a")) for text in TEXTS]
        found = ray.get(whole, timeout=120)
        assert not ray.wait(early, timeout=0)[0]  # they wait for the last one of their group
        found += ray.get([*early, worker.compute_score.remote(handed_over(TEXTS[3], "b"))], timeout=120)
    finally:
        ray.shutdown()
    assert [each["reward_score"] for each in found[:4]] == pytest.approx(expected(TEXTS))
    assert [each["reward_extra_info"]["acc"] for each in found] == [1, 1, 0, 0, 1, 1, 0, 0]
