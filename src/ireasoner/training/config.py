"""Every option once: its default, its bounds and a sentence on what it does.

Two files feed a run. A *recipe* holds what a comparison varies: rewards, advantages, KL. A *preset* holds the scale,
which is the same for every arm: learning rate, steps, lengths, prompts, batch. Command-line flags win over both.
"""

from __future__ import annotations

import reprlib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ireasoner.method.texts import PROPOSER_PROMPT, SOLVER_PROMPT
from ireasoner.method.types import UsageError

Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class ConfigError(UsageError):
    """A bad recipe, preset or option; the message names the key and says what would be right."""


class Recipe(BaseModel):
    """Rewards, advantages and the pull to the reference: what tells one arm of a comparison from another."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reward: Literal["agreement", "discrete", "random", "format", "oracle"] = Field(
        "agreement",
        description="what a readable trajectory earns: agreement on answers and reasoning steps (the paper), 1 for the "
        "majority answer (discrete), a random number (control), 1 for being readable (control), or 1 for the true "
        "answer (ceiling; needs --labels)",
    )
    outcome_exponent: NonNegative = Field(0.7, description="γ: the outcome reward is the answer's share to this power")
    length_penalty: Share = Field(0.05, description="η: most that is taken off the outcome reward for length")
    target_words: Count = Field(64, description="w*: words before the answer from which length costs")
    step_measure: Literal["embedding", "claims"] = Field(
        "embedding",
        description="how reasoning steps are compared: mean token embeddings within the majority (the paper), or what "
        "they claim, aligned in order, with every other trajectory of the group (claims)",
    )
    recurrence_window: Annotated[int, Field(ge=0)] = Field(
        0,
        description="a reasoning step that recurs among so many latest groups of other images earns less, and nothing "
        "if it is in all of them (0: off)",
    )
    density_exponent: NonNegative = Field(0.7, description="γd: step agreement is scaled by |G|/N to this power")
    position_decay: NonNegative = Field(0.15, description="δ: reasoning step j counts exp(−δ j)")
    max_reasoning_steps: Count = Field(8, description="reasoning steps after this one are not compared")
    max_step_tokens: Count = Field(64, description="tokens of a reasoning step that its embedding reads")
    step_weight_initial: Share = Field(0.0, description="λ during the warm-up")
    step_weight_final: Share = Field(0.7, description="λ at the last step")
    step_weight_warmup: Share = Field(0.3, description="share of training before λ begins to move")
    target_entropy: NonNegative = Field(0.90, description="μ: answer entropy, in nats, of the question that earns most")
    entropy_width: Positive = Field(0.35, description="σ: how fast the proposer's reward falls off around μ")
    advantage: Literal["ema", "rloo"] = Field(
        "ema", description="solver's baseline: a moving average (the paper) or the mean of the group's others (RLOO)"
    )
    baseline_momentum: Share = Field(0.9, description="momentum of the moving-average baseline")
    kl_coef: Annotated[float, Field(ge=1e-8, le=1e2)] = Field(
        1e-3, description="β: weight of the KL to the reference, at the first step, for each role"
    )
    kl_target: Positive = Field(0.02, description="τ: the KL to the reference that β steers for, in nats a token")
    kl_rate: NonNegative = Field(
        0.1, description="how fast β moves, by exp(rate · (KL − τ)/τ) after each update (0: β stays as it is)"
    )
    gate_low: Share = Field(
        0.0, description="groups whose majority fraction is below this (hopeless) do not update the solver"
    )
    gate_high: Share = Field(
        1.0, description="groups whose majority fraction is above this (unanimous) do not update the solver"
    )
    train_proposer: bool = Field(True, description="whether the proposer is updated at all")


class Preset(BaseModel):
    """Scale: the same for every arm of a comparison."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: Count = Field(2500, description="training steps")
    images_per_step: Count = Field(1, description="images played in each step")
    group_size: Annotated[int, Field(ge=2)] = Field(5, description="N: trajectories for each question")
    max_question_tokens: Count = Field(128, description="longest proposer completion")
    max_solution_tokens: Count = Field(256, description="longest solver completion")
    max_image_tokens: Count = Field(
        1280, description="images are scaled down to at most so many tokens, where the model's processor scales by area"
    )
    proposer_prompt: str = Field(PROPOSER_PROMPT, description="what the proposer is told")
    solver_prompt: str = Field(SOLVER_PROMPT, description="what the solver is told; {question} stands for the question")
    lora_rank: Count = Field(16, description="rank of both adapters")
    lora_alpha: Count = Field(32, description="LoRA's scale is alpha / rank")
    lora_targets: tuple[str, ...] = Field((), description="linear layers of the language model that get LoRA (all)")
    learning_rate: Positive = Field(1e-6, description="AdamW learning rate, constant")
    weight_decay: NonNegative = Field(0.01, description="AdamW weight decay")
    max_grad_norm: Positive = Field(1.0, description="gradients are clipped to this norm, for each role")
    proposer_every: Count = Field(5, description="the proposer is updated every so many steps")
    tokens_per_batch: Count = Field(
        3072, description="most tokens in one forward pass of the update; larger batches are split"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass instead of keeping them: less memory"
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="backbone weights; adapters stay in float32")
    save_every: Annotated[int, Field(ge=0)] = Field(
        50, description="steps between checkpoints (0: first and last only)"
    )
    keep_checkpoints: Annotated[int, Field(ge=0)] = Field(3, description="newest checkpoints to keep (0: all)")
    probe_every: Annotated[int, Field(ge=0)] = Field(50, description="steps between answers to the probes (0: off)")
    probe_images: Annotated[int, Field(ge=0)] = Field(8, description="images whose first questions are asked again")
    watch: bool = Field(
        True, description="end a run whose signals collapse and go back to its best checkpoint (never with --labels)"
    )
    watch_window: Annotated[int, Field(ge=2)] = Field(
        50, description="steps that the watch averages over and compares with as many early ones"
    )
    blank_every: Annotated[int, Field(ge=0)] = Field(
        5,
        description="steps between checks whether majority answers survive with the image blanked (0: off); the watch "
        "needs two of them in watch_window",
    )
    eval_questions: Count = Field(256, description="labelled questions used for before and after, at most")


class Config(Recipe, Preset):
    """A whole run, as written to `config.yaml`."""

    images: Path = Field(description="folder of unlabeled images, searched through and through")
    model: str = Field(description="folder or hub id of an image-text-to-text model; 'tiny' is the one that ships here")
    recipe: str = Field("default", description="name of a recipe, or a YAML file of recipe options")
    preset: str = Field("7b", description="name of a preset, or a YAML file of preset options")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="every random draw derives from it")
    labels: Path | None = Field(
        None, description="JSONL of image, question, answer to play instead of proposing (oracle)"
    )
    eval_data: Path | None = Field(None, description="held-out JSONL of image, question, answer for before and after")
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="who samples: transformers on the live policy, or vLLM beside it, where installed"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")


def names(kind: Literal["recipes", "presets"]) -> list[str]:
    """The recipes or presets that ship with the package."""
    return sorted(
        p.name.removesuffix(".yaml")
        for p in resources.files("ireasoner.training").joinpath(kind).iterdir()
        if p.name.endswith(".yaml")
    )


def _load_part(kind: Literal["recipes", "presets"], name: str, part: type[BaseModel]) -> dict[str, Any]:
    if name in names(kind):
        path = resources.files("ireasoner.training").joinpath(kind, f"{name}.yaml")
    elif Path(name).is_file():
        path = Path(name)
    else:
        raise ConfigError(f"no {kind[:-1]} {name!r}: neither a file nor one of {', '.join(names(kind))}")
    try:
        values = yaml.safe_load(path.read_text("utf-8")) or {}
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{kind[:-1]} {name!r} is not YAML text: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{kind[:-1]} {name!r} must be a mapping of options to values")
    if strangers := sorted(map(str, set(values) - set(part.model_fields))):
        raise ConfigError(f"{kind[:-1]} {name!r} has unknown options: {', '.join(strangers)}")
    return values


def resolve(flags: dict[str, Any]) -> Config:
    """The config of a run: preset, then recipe, then flags.

    Args:
        flags: only the options that were given; their names are the fields of `Config`.

    Raises:
        ConfigError: an unknown option or a bad value, by name.
    """
    recipe = str(flags.get("recipe", Config.model_fields["recipe"].default))
    default_preset = "tiny" if flags.get("model") == "tiny" else Config.model_fields["preset"].default
    preset = str(flags.get("preset", default_preset))
    values = {
        **_load_part("presets", preset, Preset),
        **_load_part("recipes", recipe, Recipe),
        **flags,
        "recipe": recipe,
        "preset": preset,
    }
    try:
        config = Config(**values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    if "{question}" not in config.solver_prompt:
        raise ConfigError("solver_prompt must contain {question}, which stands for the question")
    if config.gate_low > config.gate_high:
        raise ConfigError(f"gate_low {config.gate_low} is above gate_high {config.gate_high}: no group would be kept")
    if config.reward == "oracle" and config.labels is None:
        raise ConfigError("the oracle recipe needs --labels FILE.jsonl with the true answers")
    return config


def load_config(path: Path) -> Config:
    """The config of an existing run, from its `config.yaml`.

    Raises:
        ConfigError: missing, or not a config that this version understands.
    """
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
        return Config(**values)
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} is not a run directory: it has no {path.name}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from None
    except (yaml.YAMLError, TypeError, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def dump_config(config: Config) -> str:
    """The config as YAML, every option spelled out; in ASCII, for YAML reads some line ends in text as blanks."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def conflicts(stored: Config, flags: dict[str, Any]) -> list[str]:
    """Which of the given flags differ from a stored config, as sentences; what a resumed run refuses."""
    found = []
    for name, value in flags.items():
        try:
            given = Config.model_validate({**stored.model_dump(), name: value}).model_dump()[name]
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None
        if given != (kept := stored.model_dump()[name]):
            found.append(f"{name} is {kept} in the run, not {given}")
    return found


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring = 2, 200  # a few lines of YAML can stand for a value of any size


def _explain(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        name = ".".join(map(str, item["loc"])) or "config"
        if item["type"] == "missing":
            parts.append(f"{name} is missing")
        elif item["type"] == "extra_forbidden":
            parts.append(f"{name} is not an option")
        else:
            parts.append(f"{name}: {item['msg'].lower()}, not {_SHORT.repr(item['input'])}")
    return "; ".join(parts)
