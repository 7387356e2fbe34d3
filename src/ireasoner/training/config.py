"""Every option of a run, in groups; recipes and presets as YAML; `config.yaml`.

Two files feed a run. A *recipe* holds what a comparison varies: rewards, advantages, KL. A *preset* holds the scale,
which is the same for every arm: learning rate, steps, lengths, prompts, batch. Command-line flags win over both. In
all three an option goes by its own name, which is unique; only `config.yaml` and Python show the groups.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from ireasoner.method.recipe import Count, Options, Recipe
from ireasoner.method.texts import PROPOSER_PROMPT, SOLVER_PROMPTS
from ireasoner.method.types import UsageError
from ireasoner.model.options import BackboneOptions, OptimizerOptions

Cadence = Annotated[int, Field(ge=0)]


class ConfigError(UsageError):
    """A bad recipe, preset or option; the message names the key and says what would be right."""


class SamplingOptions(Options):
    """What both roles are told and how much they may write."""

    group_size: Annotated[int, Field(ge=2)] = 5
    """N: trajectories for each question."""
    max_question_tokens: Count = 128
    """Longest proposer completion."""
    max_solution_tokens: Count = 256
    """Longest solver completion."""
    solution_form: Literal["tags", "boxed", "answer-line"] = "tags"
    """Where a solver's text gives its answer: in tags, as <think>…</think><answer>…</answer>; in a last \\boxed{…}; or
    on a last line, as 'Answer: …'."""
    proposer_prompt: str = PROPOSER_PROMPT
    """What the proposer is told."""
    solver_prompt: str = Field(default_factory=lambda options: SOLVER_PROMPTS[options["solution_form"]])
    """What the solver is told; {question} stands for the question (instructions for the solution form)."""


class ScheduleOptions(Options):
    """How long a run is, and what happens how often."""

    steps: Count = 2500
    """Training steps."""
    images_per_step: Count = 1
    """Images played in each step."""
    proposer_every: Count = 5
    """The proposer is updated every so many steps."""
    save_every: Cadence = 50
    """Steps between checkpoints (0: first and last only)."""
    keep_checkpoints: Cadence = 3
    """Newest checkpoints to keep (0: all)."""
    probe_every: Cadence = 50
    """Steps between answers to the probes (0: off)."""
    probe_images: Cadence = 8
    """Images whose first questions are asked again."""
    eval_questions: Count = 256
    """Labelled questions used for before and after, at most."""


class WatchOptions(Options):
    """When a run that eats itself is ended."""

    watch: bool = True
    """End a run whose signals collapse and go back to its best checkpoint (never with --labels)."""
    watch_window: Annotated[int, Field(ge=2)] = 50
    """Steps that the watch averages over and compares with as many early ones."""
    blank_every: Cadence = 5
    """Steps between checks whether majority answers survive with the image blanked (0: off); the watch needs two of
    them in watch_window."""


class Config(Options):
    """A whole run, as written to `config.yaml`."""

    format: Literal[2] = 2
    """The version of run directories that this one follows."""
    images: Path
    """Folder of unlabeled images, searched through and through."""
    model: str
    """Folder or hub id of an image-text-to-text model; 'tiny' is the one that ships here."""
    preset: str = "7b"
    """Name of a preset, or a YAML file of preset options (7b; tiny for the model tiny)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Every random draw derives from it."""
    labels: Path | None = None
    """JSONL of image, question, answer to play instead of proposing (oracle)."""
    eval_data: Path | None = None
    """Held-out JSONL of image, question, answer for before and after."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Who samples: transformers on the live policy, or vLLM beside it, where installed."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda or cuda:N."""
    reward_sha256: str | None = None
    """Digest of the file that holds the reward, where the recipe names one of your own."""
    recipe: Recipe = Recipe()
    sampling: SamplingOptions = SamplingOptions()
    backbone: BackboneOptions = BackboneOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    watch: WatchOptions = WatchOptions()

    @model_validator(mode="after")
    def _options_fit_together(self) -> Config:
        low, high = self.recipe.gate_low, self.recipe.gate_high
        if "{question}" not in self.sampling.solver_prompt:
            raise ValueError("solver_prompt must contain {question}, which stands for the question")
        if low > high:
            raise ValueError(f"gate_low {low} is above gate_high {high}: no group would be kept")
        if self.recipe.reward == "oracle" and self.labels is None:
            raise ValueError("the oracle recipe needs --labels FILE.jsonl with the true answers")
        return self

    def flat(self) -> dict[str, Any]:
        """Every option by its own name, without the groups."""
        own = {name: getattr(self, name) for name in Config.model_fields}
        return {name: getattr(own[group], field) if group else own[field] for name, (group, field) in PATHS.items()}

    def changed(self, **options: Any) -> Config:
        """The same with other values for some options, by their own names.

        Raises:
            ConfigError: an unknown option or a bad value, by name.
        """
        return config_of({**self.flat(), **options}).model_copy(update={"reward_sha256": self.reward_sha256})


# Where each option stands: its group ("" for the run's own) and its name there. `recipe` names the group of that name.
GROUPS: dict[str, type[Options]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Options)
}
PATHS = {name: ("", name) for name in Config.model_fields if name not in (*GROUPS, "format", "reward_sha256")}
PATHS |= {name: (group, name) for group, options in GROUPS.items() for name in options.model_fields if name != "name"}
PATHS["recipe"] = ("recipe", "name")
RECIPE_OPTIONS = [name for name, (group, field) in PATHS.items() if group == "recipe" and field != "name"]
PRESET_OPTIONS = [name for name, (group, _) in PATHS.items() if group not in ("", "recipe")]


def option(name: str) -> FieldInfo:
    """The declaration of an option: its default, bounds and description."""
    group, field = PATHS[name]
    return (GROUPS[group] if group else Config).model_fields[field]


def config_of(options: Mapping[str, Any]) -> Config:
    """A config from options by their own names.

    Raises:
        ConfigError: an unknown option or a bad value, by name.
    """
    values: dict[str, Any] = {group: {} for group in GROUPS}
    for name, value in options.items():
        group, field = PATHS.get(name, ("", name))
        (values[group] if group else values)[field] = value
    try:
        return Config(**values)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def names(kind: Literal["recipes", "presets"]) -> list[str]:
    """The recipes or presets that ship with the package."""
    folder = resources.files("ireasoner.training").joinpath(kind)
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def _read_part(kind: Literal["recipes", "presets"], name: str, known: Sequence[str]) -> dict[str, Any]:
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
    if strangers := sorted(map(str, set(values) - set(known))):
        raise ConfigError(f"{kind[:-1]} {name!r} has unknown options: {', '.join(strangers)}")
    if isinstance(path, Path) and ".py:" in str(values.get("reward")):
        values["reward"] = str(path.parent.absolute() / values["reward"])  # as it is written, from the recipe's folder
    return values


def resolve(flags: Mapping[str, Any]) -> Config:
    """The config of a run: preset, then recipe, then flags.

    Args:
        flags: only the options that were given, by their own names.

    Raises:
        ConfigError: an unknown option or a bad value, by name.
    """
    recipe = str(flags.get("recipe", "default"))
    preset = str(flags.get("preset", "tiny" if flags.get("model") == "tiny" else option("preset").default))
    return config_of(
        {
            **_read_part("presets", preset, PRESET_OPTIONS),
            **_read_part("recipes", recipe, RECIPE_OPTIONS),
            **flags,
            "recipe": recipe,
            "preset": preset,
        }
    )


def load_config(path: Path) -> Config:
    """The config of an existing run, from its `config.yaml`.

    Raises:
        ConfigError: missing, or not a config that this version understands.
    """
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
        if isinstance(values, dict) and "images" in values and "format" not in values:
            raise ConfigError(f"{path} was written by ireasoner 0.1, which this version cannot read: start a new run")
        return Config(**values)
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} is not a run directory: it has no {path.name}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from None
    except (yaml.YAMLError, TypeError, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def dump_config(config: Config) -> str:
    """The config as YAML, every option spelled out; in ASCII, for YAML reads some line ends in text as blanks."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def conflicts(stored: Config, flags: Mapping[str, Any]) -> list[str]:
    """Which of the given flags differ from a stored config, as sentences; what a resumed run refuses."""
    kept, given = stored.flat(), stored.changed(**flags).flat()
    return [f"{name} is {kept[name]} in the run, not {given[name]}" for name in flags if given[name] != kept[name]]


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring = 2, 200  # a few lines of YAML can stand for a value of any size


def explain(error: ValidationError) -> str:
    """What is wrong with options, by their names, in one line."""
    parts = []
    for item in error.errors():
        where = [str(part) for part in item["loc"] if part not in GROUPS or len(item["loc"]) == 1]
        name, problem = ".".join(where), item["msg"].removeprefix("Value error, ")
        if not name:  # the options do not fit together
            parts.append(problem)
        elif item["type"] == "missing":
            parts.append(f"{name} is missing")
        elif item["type"] == "extra_forbidden":
            parts.append(f"{name} is not an option")
        else:
            parts.append(f"{name}: {problem[0].lower()}{problem[1:]}, not {_SHORT.repr(item['input'])}")
    return "; ".join(parts)
