"""A recipe: what a trajectory is paid for, and how rewards become updates. It is what a comparison varies."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

# What `reward` may name beside a file: agreement and the keys of `ireasoner.method.scoring.BUILT_IN`, which cannot be
# imported here because it reads recipes; and the modules of `ireasoner.method.published`.
OWN = ("agreement", "discrete", "random", "format", "oracle")
PUBLISHED = tuple(sorted(path.stem for path in Path(__file__).with_name("published").glob("[a-z]*.py")))
REWARDS = (*OWN, *PUBLISHED)
AGREEMENT_PARTS = ("outcome", "step_agreement")  # of a reward; recorded beside other rewards too, which do not pay them
REWARD = "reward/solver/"  # begins the names of the metrics of the solver's reward and its parts
IN_PYTHON = "python:"  # what stands before the name of a function that was handed over in Python


class Options(BaseModel):
    """A group of options: each field is stated once, with its default, its bounds and a sentence for the help."""

    # Validators are built when they are first used, because --help needs none.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, defer_build=True)


class Recipe(Options):
    """Rewards, advantages and the pull towards the reference. The defaults are the paper's (arXiv 2601.05877)."""

    name: str = "paper"
    """Name of a recipe, or a YAML file of recipe options (default)."""
    reward: str = "agreement"
    """What a readable trajectory earns: agreement on answers and reasoning steps (agreement, the paper's), 1 for the
    majority answer (discrete), a random number (random, a control), 1 for being readable (format, a control), 1 for
    the true answer (oracle, a ceiling; needs --labels), a published reward by its name, such as ttrl (the page 'Add a
    reward' lists them), or your own function, as my_rewards.py:function."""
    outcome_exponent: NonNegative = 0.7
    """γ: the outcome reward is the answer's share to this power."""
    length_penalty: Share = 0.05
    """η: most that is taken off the outcome reward for length."""
    target_words: Count = 64
    """w*: words before the answer from which length costs."""
    step_measure: Literal["embedding", "likelihood", "grounding"] = "embedding"
    """How reasoning steps are judged: by their mean token embeddings beside those of the majority (the paper), by how
    likely they were when they were sampled (likelihood), or by how much likelier the image makes them (grounding)."""
    recurrence_window: Annotated[int, Field(ge=0)] = 0
    """A reasoning step that recurs among so many latest groups of other images earns less, and nothing if it is in
    all of them (0: off)."""
    density_exponent: NonNegative = 0.7
    """γd: step agreement is scaled by |G|/N to this power."""
    position_decay: NonNegative = 0.15
    """δ: reasoning step j counts exp(−δ j)."""
    max_reasoning_steps: Count = 8
    """Reasoning steps after this one are not compared."""
    max_step_tokens: Count = 64
    """Tokens of a reasoning step that its embedding reads."""
    step_weight_initial: Share = 0.0
    """λ during the warm-up."""
    step_weight_final: Share = 0.7
    """λ at the last step."""
    step_weight_warmup: Share = 0.3
    """Share of training before λ begins to move."""
    target_entropy: NonNegative = 0.90
    """μ: answer entropy, in nats, of the question that earns most."""
    entropy_width: Positive = 0.35
    """σ: how fast the proposer's reward falls off around μ."""
    advantage: Literal["ema", "rloo", "grpo"] = "ema"
    """Solver's baseline: a moving average (the paper), the mean of the group's others (RLOO), or the group's mean, with
    the difference divided by the group's standard deviation (GRPO)."""
    token_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a solver's tokens, those with the largest entropy, that learn from the advantage (1: all)."""
    other_view: bool = False
    """Whether the solver also answers N times about a lightly changed view of each image, for rewards that read that
    vote (co_rewarding). It samples twice as much; only answers about the image itself are rewarded and learned from."""
    baseline_momentum: Share = 0.9
    """Momentum of the moving-average baseline."""
    kl_coef: Annotated[float, Field(ge=1e-8, le=1e2)] = 1e-3
    """β: weight of the KL to the reference, at the first step, for each role."""
    kl_target: Positive = 0.02
    """τ: the KL to the reference that β steers for, in nats a token."""
    kl_rate: NonNegative = 0.1
    """How fast β moves, by exp(rate · (KL − τ)/τ) after each update (0: β stays as it is)."""
    gate_low: Share = 0.0
    """Groups whose majority fraction is below this (hopeless) do not update the solver."""
    gate_high: Share = 1.0
    """Groups whose majority fraction is above this (unanimous) do not update the solver."""
    train_proposer: bool = True
    """Whether the proposer is updated at all."""

    @field_validator("step_measure", mode="before")
    @classmethod
    def _still_there(cls, measure: object) -> object:
        if measure == "claims":  # of `default` up to version 0.2
            raise ValueError("this measure was removed: choose embedding, likelihood or grounding")
        return measure

    @field_validator("reward")
    @classmethod
    def _known_or_in_a_file(cls, reward: str) -> str:
        in_file = re.fullmatch(r".+\.py:[A-Za-z_]\w*", reward, re.DOTALL)
        if reward not in REWARDS and not in_file and not reward.startswith(IN_PYTHON):
            recipe = f"; the recipe of that name is chosen by --recipe {reward}"
            raise ValueError(
                f"choose {', '.join(REWARDS)}, or a function in a file, as my_rewards.py:function"
                + (recipe if reward.replace("-", "_") in PUBLISHED else "")
            )
        return reward

    @property
    def title(self) -> str:
        """Its name, and the function of the user's own that takes the place of its reward."""
        return self.name if self.reward in REWARDS else f"{self.name}, paid by {self.reward.removeprefix(IN_PYTHON)}"


def paid_rewards(names: Iterable[str], recipe: Recipe) -> list[str]:
    """Of the names of metrics, those of the solver's reward and of the parts that it is made of.

    Beside another reward, agreement is only recorded.
    """
    unpaid = () if recipe.reward == "agreement" else tuple(f"{REWARD}{part}" for part in AGREEMENT_PARTS)
    return [name for name in names if name.startswith(REWARD) and name not in unpaid]


PAPER = Recipe.model_construct()  # of the defaults, which need no validator
