"""The options of a run in groups, the recipes and presets that set them, and the `config.yaml` that stores them.

A *recipe* is a YAML file with the options that a comparison varies: rewards, advantages, KL. A *preset* is one with the
scale, which stays the same in a comparison: learning rate, steps, lengths, prompts, batch. Flags of the command line
override both. In all three an option has its own, unique name; only `config.yaml` and Python use the groups.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ireasoner.method.instructions import PROPOSER_PROMPT, SOLVER_PROMPTS
from ireasoner.method.recipe import IN_PYTHON, Count, Options, Positive, Recipe
from ireasoner.method.types import Form, Match, Role, UsageError
from ireasoner.model.options import BackboneOptions, OptimizerOptions

_FOLDER = Path(__file__).parent  # with the recipes and the presets
TrackerName = Literal["tensorboard", "trackio", "wandb", "mlflow"]
ItemKind = Literal["images", "folders", "clips"]
ImagePixels = Annotated[int, Field(ge=1, le=178_956_970)]  # Pillow itself refuses more


class ConfigError(UsageError):
    """A bad recipe, preset or option; the message names it and says what is wrong."""


def _separated(value: Any) -> Any:
    """Names or addresses, of which several may stand in one text between commas; `none`, as transformers has it for
    trackers, is no name."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return value
    found = [name.strip() for text in texts for name in text.split(",")]
    return [name for name in dict.fromkeys(found) if name not in ("", "none")]


def _problem_with_server(address: str) -> str | None:
    """What is wrong with the address of a server, or None. The config is stored, so it may hold no password."""
    try:
        parts = urlsplit(address)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port, or of brackets
        return f"{address!r:.200} is no address"
    if parts.username is not None or parts.password is not None:
        return "an address holds a user or a password: leave that out, and put the key in IREASONER_SERVER_KEY"
    if not named or parts.query or parts.fragment or not re.fullmatch(r"[!-~]+", address):
        return f"{address!r:.200} is no address such as http://gpu2:8000"
    return None


def _phrase(text: str) -> str:
    """What the images show, on one line and without the full stop that the prompt sets.

    Raises:
        ValueError: it is empty, longer than 200 characters, or holds signs that cannot be seen.
    """
    text = " ".join(text.split()).rstrip(".")
    if not 1 <= len(text) <= 200 or not text.isprintable():
        raise ValueError("must be a phrase of 1 to 200 characters")
    return text


def is_dataset_id(images: str) -> bool:
    """Whether this is the id of a data set on the hub: OWNER/NAME, maybe with a version behind an @.

    A path of this form is mistyped rather than an id where there is a folder OWNER.
    """
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", images) is not None
    return is_id and ("@" in images or not os.path.exists(images.split("/")[0])) and not os.path.exists(images)


def is_manifest(images: str) -> bool:
    """Whether this is a file of this machine that lists items, each of which may be several images or a clip."""
    return images.lower().endswith(".jsonl") and "://" not in images


def is_elsewhere(images: str) -> bool:
    """Whether images are behind an address or on the hub, and not at a path of this machine."""
    return "://" in images or is_dataset_id(images)


def _place(value: Any) -> Any:
    """A place of images as text; a path of this machine in its usual form."""
    text = os.fspath(value) if isinstance(value, Path) else value
    return str(Path(text)) if isinstance(text, str) and "://" not in text else text


class SamplingOptions(Options):
    """What both roles are told, and how much they may write."""

    group_size: Annotated[int, Field(ge=2)] = 5
    """N: trajectories for each question."""
    max_question_tokens: Count = 128
    """Longest proposer completion."""
    max_solution_tokens: Count = 256
    """Longest solver completion."""
    solution_form: Form = "tags"
    """Where a solver's text gives its answer: in tags, as <think>…</think><answer>…</answer>; in a last \\boxed{…}; or
    on a last line, as 'Answer: …'."""
    proposer_prompt: str = PROPOSER_PROMPT
    """What the proposer is told. The default prompts of both roles speak of the image, or, where an item is several
    images or a clip, of the images or the clip."""
    solver_prompt: str = Field(default_factory=lambda options: SOLVER_PROMPTS[options["solution_form"]])
    """What the solver is told; {question} stands for the question (instructions for the solution form)."""
    domain: Annotated[str, AfterValidator(_phrase)] | None = None
    """What the images show, such as 'chest X-rays of adults'. The proposer is told this, in place of {domain} in its
    prompt or else in a sentence before it (nothing)."""


class ScheduleOptions(Options):
    """How long a run is, and what happens how often."""

    steps: Count = 625
    """Training steps."""
    images_per_step: Count = 4
    """Images played in each step."""
    proposer_every: Count = 5
    """The proposer is updated every so many steps."""
    overlap: bool = False
    """Sample the next step on the servers while this one is learned from, so that it is one update behind."""
    save_every: NonNegativeInt = 50
    """Steps between checkpoints (0: first and last only)."""
    keep_checkpoints: NonNegativeInt = 3
    """Newest checkpoints to keep (0: all)."""
    probe_every: NonNegativeInt = 50
    """Steps between answers to the probes (0: off)."""
    probe_images: NonNegativeInt = 8
    """Images whose first questions are asked again."""
    eval_questions: Count = 256
    """Labelled questions used for before and after, at most."""


class WatchOptions(Options):
    """When a run that is collapsing is ended."""

    watch: bool = True
    """End a run whose signals collapse and go back to its best checkpoint (never with --labels alone)."""
    watch_window: Annotated[int, Field(ge=2)] = 50
    """Steps that the watch averages over and compares with as many early ones."""
    blank_every: NonNegativeInt = 5
    """Steps between checks whether majority answers stay the same when the image is blank (0: off); the watch needs
    two checks in a watch_window."""


class Config(Options):
    """All options of a run, as written to `config.yaml`."""

    format: Literal[2] = 2
    """Version of the run directory's format."""
    images: Annotated[str, BeforeValidator(_place)]
    """Unlabeled images: a folder with its subfolders; Parquet, Arrow or tar files or a folder of those; a data set of
    the hub; an address of any of them, such as s3://...; or a JSONL file that lists items of several images, and
    clips."""
    items: ItemKind = "images"
    """What one item is in a folder: an image; all images of a subfolder, shown together; or a clip, which is a
    subfolder of frames, a GIF, an animated WebP or a video (with PyAV)."""
    images_per_item: Annotated[int, Field(ge=2, le=256)] = 8
    """Most images that are shown together: an item with more is skipped, and of a clip so many frames are shown, evenly
    spread. Together they take no more tokens than max_image_tokens, where images are scaled down."""
    frame_rate: Annotated[Positive, Field(le=1000)] | None = None
    """Frames of a clip that are shown for each second of it, up to images_per_item (as many as that)."""
    image_column: str | None = None
    """Column of a table's images (the only one that holds images)."""
    max_image_pixels: ImagePixels = 25_000_000
    """Larger images are skipped, as decoding takes up to 24 bytes of memory a pixel."""
    model: str
    """Folder or hub id of an image-text-to-text model; 'tiny' is the one that ships here."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub (the newest commit)."""
    preset: str = "7b"
    """Name of a preset, or a YAML file of preset options; tiny for the model tiny."""
    seed: NonNegativeInt = 0
    """Seed of all random draws."""
    labels: Path | None = None
    """JSONL file of image, question, answer: where these questions are asked, the truth replaces the vote (oracle)."""
    label_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the images of a run that are asked a labelled question; the proposer asks about the others."""
    label_examples: Annotated[int, Field(ge=0, le=20)] = 0
    """Labelled questions that the proposer is shown as examples, drawn anew for each image."""
    eval_data: Path | None = None
    """JSONL file of held-out image, question, answer, to evaluate on before and after training; its images are not
    trained on."""
    match: Match = "exact"
    """How held-out answers are judged, where a question names no metric: by sameness, ChartQA's 5 %, ANLS, or VQA's
    agreement with ten people."""
    held_out: Path | None = None
    """Another file of such questions, whose images are not trained on either, and which is not evaluated on."""
    init_adapters: Path | None = None
    """A run, one of its checkpoints, or a PEFT adapter of the solver on the same model: begin with these adapters. All
    else begins anew; the KL, and the accuracy before training, stay those of the model without adapters (new ones)."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Who samples: transformers on the live policy, or vLLM beside it, where installed."""
    vllm_share: Annotated[float, Field(gt=0, lt=1)] = 0.45
    """Share of a GPU's memory for vLLM; the learner's own copy of the weights and its activations need the rest."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda or cuda:N."""
    shard: bool = False
    """Share the frozen language model out among the processes, so that each holds a part of it."""
    servers: Annotated[tuple[str, ...], BeforeValidator(_separated)] = ()
    """Addresses of vLLM servers that sample, such as http://gpu2:8000; ireasoner serve says how to start one (none)."""
    adapters_folder: Path | None = None
    """Folder that this machine and the servers share, through which adapters reach them (they are sent over HTTP)."""
    patience: Annotated[Positive, Field(le=1e7)] = 600
    """Seconds to wait for another process, or for a server, before the run gives up; it can then be resumed."""
    report_to: Annotated[tuple[TrackerName, ...], BeforeValidator(_separated)] = ()
    """Trackers that are told every number of metrics.jsonl and the verdict, where installed (none)."""
    report_images: bool = False
    """Show four episodes with their pictures to the trackers, at the first step and every save_every steps."""
    reward_sha256: str | None = None
    """SHA-256 of the file with the reward function, if the recipe names one of your own."""
    init_adapters_sha256: dict[Role, str] = Field(default_factory=dict)
    """SHA-256 of the adapter files that the run began with, by role, where they are not new."""
    planned_steps: int | None = None
    """Steps that the run was planned for before it was extended; λ moves over these and then stays."""
    fitted_tokens_per_batch: int | None = None
    """What the GPU of the run's beginning holds, where that is less than tokens_per_batch."""
    recipe: Recipe = Field(default_factory=Recipe)
    sampling: SamplingOptions = Field(default_factory=SamplingOptions)
    backbone: BackboneOptions = Field(default_factory=BackboneOptions)
    optimizer: OptimizerOptions = Field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = Field(default_factory=ScheduleOptions)
    watch: WatchOptions = Field(default_factory=WatchOptions)

    @model_validator(mode="after")
    def _options_fit_together(self) -> Config:
        low, high = self.recipe.gate_low, self.recipe.gate_high
        if "{question}" not in self.sampling.solver_prompt:
            raise ValueError("--solver-prompt must contain {question}, which stands for the question")
        if "{domain}" in self.sampling.proposer_prompt and self.sampling.domain is None:
            raise ValueError("--proposer-prompt has {domain}: say with --domain what that is")
        if low > high:
            raise ValueError(f"--gate-low {low} is above --gate-high {high}: no group would be kept")
        if self.recipe.reward == "oracle" and self.labels is None:
            raise ValueError("the oracle recipe needs --labels FILE.jsonl with the true answers")
        if self.recipe.reward == "co_rewarding" and not self.recipe.other_view:
            raise ValueError("the reward co_rewarding reads the vote on another view of the image: add --other-view")
        if self.labels is None and (self.label_share < 1 or self.label_examples):
            raise ValueError("--label-share and --label-examples need --labels FILE.jsonl")
        if self.label_examples and self.label_share == 1:
            raise ValueError("--label-examples are for the proposer, which asks nothing with a --label-share of 1")
        if self.backbone.quantization and self.shard:
            raise ValueError("--shard cannot share out weights that --quantization holds: leave one of them out")
        if self.frame_rate is not None and not self.has_groups:
            raise ValueError("--frame-rate is for clips: add --items clips, or name a JSONL file that lists some")
        if self.schedule.overlap and not self.servers:
            raise ValueError("--overlap needs --servers, which sample while this machine learns")
        if problem := next(filter(None, map(_problem_with_server, self.servers)), None):
            raise ValueError(f"--servers: {problem}")
        return self

    @property
    def has_groups(self) -> bool:
        """Whether an item may be more than one image."""
        return self.items != "images" or is_manifest(self.images)

    @property
    def most_images(self) -> int:
        """The most images that a prompt shows."""
        return self.images_per_item if self.has_groups else 1

    @property
    def labelled_alone(self) -> bool:
        """Whether nothing but labelled questions are asked, so that the proposer has nothing to do."""
        return self.labels is not None and self.label_share == 1

    def flat(self) -> dict[str, Any]:
        """Every option by its own name, without the groups."""
        values = self.model_dump()
        return {name: values[group][field] if group else values[field] for name, (group, field) in PATHS.items()}

    def differences(self, other: Config) -> dict[str, tuple[Any, Any]]:
        """The options that differ, by their own names, with the value here and the value there."""
        here, there = self.flat(), other.flat()
        return {name: (here[name], there[name]) for name in here if here[name] != there[name]}

    def changed(self, **options: Any) -> Config:
        """A copy with other values of some options, by their own names. Raises `ConfigError` as `config_of` does."""
        kept = {name: getattr(self, name) for name in UNNAMED}
        return config_of({**self.flat(), **options}).model_copy(update=kept)

    def fitted_optimizer(self) -> OptimizerOptions:
        """The optimizer's options, with the tokens of a batch that fit on the GPU, and importance weights where they
        are needed unless they are asked for or refused."""
        asked, cap = self.optimizer.tokens_per_batch, self.optimizer.importance_cap
        fitting = min(asked, self.fitted_tokens_per_batch or asked)
        if cap is None:  # decided anew by a resumed run, which may sample elsewhere
            cap = IMPORTANCE_CAP if self.engine == "vllm" or self.servers else 0.0
        return self.optimizer.model_copy(update={"tokens_per_batch": fitting, "importance_cap": cap})

    def extended(self, steps: int) -> Config:
        """The same run, to go on to a later last step. Raises `ConfigError` if this is not later than its own."""
        if steps <= self.schedule.steps:
            raise ConfigError(f"a run of {self.schedule.steps} steps cannot be extended to {steps}: name a later step")
        planned = self.planned_steps or self.schedule.steps
        return self.changed(steps=steps).model_copy(update={"planned_steps": planned})


# In config.yaml, but no options.
UNNAMED = ("format", "reward_sha256", "init_adapters_sha256", "planned_steps", "fitted_tokens_per_batch")
# Where a run does its work. A resumed run may be given others, and stays the same run.
MACHINE_OPTIONS = ("device", "vllm_share", "shard", "servers", "adapters_folder", "patience")
# The bound on importance weights where vLLM samples; verl has the same. Rounding alone hardly ever reaches it.
IMPORTANCE_CAP = 2.0
# The group of each option ("" for those of no group) and its name there. The option `recipe` is the name of a recipe.
GROUPS: dict[str, type[Options]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Options)
}
PATHS = {name: ("", name) for name in Config.model_fields if name not in (*GROUPS, *UNNAMED)}
PATHS |= {name: (group, name) for group, options in GROUPS.items() for name in options.model_fields if name != "name"}
PATHS["recipe"] = ("recipe", "name")
RECIPE_OPTIONS = [name for name, (group, field) in PATHS.items() if group == "recipe" and field != "name"]
PRESET_OPTIONS = [name for name, (group, _) in PATHS.items() if group not in ("", "recipe")]


def option(name: str) -> FieldInfo:
    """The declaration of an option: its default, bounds and description."""
    group, field = PATHS[name]
    return (GROUPS[group] if group else Config).model_fields[field]


def config_of(options: Mapping[str, Any], flags: Collection[str] = ()) -> Config:
    """A config from options by their own names.

    Args:
        options: the values.
        flags: the options that were given on the command line, and are named so in an error.

    Raises:
        ConfigError: an option is unknown or its value is bad; the message names all of them.
    """
    values: dict[str, Any] = {group: {} for group in GROUPS}
    for name, value in options.items():
        group, field = PATHS.get(name, ("", name))
        (values[group] if group else values)[field] = value
    try:
        return Config(**values)
    except ValidationError as error:
        raise ConfigError(explain(error, flags)) from None


def names(kind: Literal["recipes", "presets"]) -> list[str]:
    """The names of the recipes or presets in the package."""
    return sorted(path.stem for path in (_FOLDER / kind).glob("*.yaml"))


def options_in(kind: Literal["recipes", "presets"], name: str) -> dict[str, Any]:
    """The options that a recipe or preset sets, given by its name or by the path of a YAML file.

    Raises:
        ConfigError: there is none of this name, or its file cannot be read or has options that it may not set.
    """
    what, known = f"{kind[:-1]} {name!r}", RECIPE_OPTIONS if kind == "recipes" else PRESET_OPTIONS
    if name in names(kind):
        path = _FOLDER / kind / f"{name}.yaml"
    elif Path(name).is_file():
        path = Path(name)
    else:
        raise ConfigError(
            f"there is no {what}{meant(name, names(kind))}; name a YAML file, or one of {', '.join(names(kind))}"
        )
    values = _read_mapping(path, what)
    if strangers := sorted(map(str, set(values) - set(known))):
        raise ConfigError(
            f"{what} has unknown options: {', '.join(f'{each}{meant(each, known)}' for each in strangers)}"
        )
    if ".py:" in str(values.get("reward")):
        values["reward"] = os.path.abspath(path.parent / values["reward"])  # relative to the recipe's folder
    return values


def _read_mapping(path: Path, what: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text("utf-8")) or {}
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} is not YAML text: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{what} must be a mapping of options to values")
    return values


def meant(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` about the nearest of the known names; nothing if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def resolve(flags: Mapping[str, Any]) -> Config:
    """The config of a new run, in which flags override the recipe, and the recipe overrides the preset.

    Args:
        flags: the options that were given, by their own names.

    Raises:
        ConfigError: a recipe, a preset or an option is unknown, or a value is bad.
    """
    recipe = str(flags.get("recipe", "default"))
    preset = str(flags.get("preset", "tiny" if flags.get("model") == "tiny" else option("preset").default))
    parts = options_in("presets", preset) | options_in("recipes", recipe)
    if str(reward := {**parts, **flags}.get("reward")).startswith(IN_PYTHON):
        raise ConfigError(f"--reward {reward}: a function that is not in a file is handed to ireasoner.train")
    if flags.get("solution_form") not in (None, parts.get("solution_form", "tags")):
        parts.pop("solver_prompt", None)  # the preset's prompt asks for another form; the default one asks for this
    return config_of({**parts, **flags, "recipe": recipe, "preset": preset}, flags)


def load_recipe(name: str) -> Recipe:
    """A recipe by its name, or from a YAML file of recipe options.

    Raises:
        ConfigError: there is no such recipe, or the file is not one.
    """
    return resolve({"recipe": name, "images": ".", "model": "tiny"}).recipe


def with_options_of(path: Path, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a YAML file, by their own names or in the groups of a run's `config.yaml`, and the given flags.

    A flag comes before the file. So does what a recipe or preset sets that is named among the flags: all options that
    recipes (or presets) may set are then left out of the file.

    Raises:
        ConfigError: the file cannot be read, or has an unknown option or a bad value; or it is that of a run that was
            paid by a function in a file, which the flags do not name. A run may come from anywhere, and with it code.
    """
    values = _read_mapping(path, str(path))
    groups = {name: value for name, value in values.items() if name in GROUPS and isinstance(value, dict)}
    found = {name: value for name, value in values.items() if name not in (*groups, *UNNAMED)}
    for group, options in groups.items():
        found |= {group if name == "name" else name: value for name, value in options.items()}
    if strangers := [str(name) for name in found if name not in PATHS]:
        raise ConfigError(f"{path}: {', '.join(f'{name} is not an option{meant(name, PATHS)}' for name in strangers)}")
    replaced = [*(RECIPE_OPTIONS if "recipe" in flags else ()), *(PRESET_OPTIONS if "preset" in flags else ())]
    options = {name: value for name, value in found.items() if name not in replaced} | dict(flags)
    if "recipe" in groups and ".py:" in str(options.get("reward")) and "reward" not in flags:
        own = f"{path} is of a run that was paid by {options['reward']}"
        raise ConfigError(f"{own}, whose code is run only if you say so: name it again with --reward")
    try:
        config_of({"images": ".", "model": "tiny", **options}, flags)
    except ConfigError as error:
        raise ConfigError(f"with {path}: {error}") from None
    return options


def load_config(path: Path) -> Config:
    """Read the `config.yaml` of a run.

    Raises:
        ConfigError: the file is missing, or this version cannot read it.
    """
    try:
        if path.exists() and not path.is_file():  # reading a named pipe would wait for ever
            raise ConfigError(f"{path} cannot be read: it is not a regular file")
        values = yaml.safe_load(path.read_text("utf-8"))
        if isinstance(values, dict) and "images" in values and "format" not in values:
            raise ConfigError(
                f"{path} was written by ireasoner 0.1, which this version cannot read, but the run's solver/ and "
                "proposer/ are plain PEFT adapters and still load with PEFT"
            )
        return Config(**values)
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} is not a run directory: it has no {path.name}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from None
    except (yaml.YAMLError, TypeError, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def dump_config(config: Config) -> str:
    """The config as YAML with every option. It is ASCII, because YAML would read some line breaks in text as blanks."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def conflicts(stored: Config, flags: Mapping[str, Any]) -> list[str]:
    """A sentence about each flag that differs from a stored config. Such flags cannot be given to a resumed run."""
    differing = stored.differences(config_of({**stored.flat(), **flags}, flags))
    told = ((as_flag(name), *differing[name]) for name in flags if name in differing)
    return [f"{flag} is {kept} in the run, not {given}" for flag, kept, given in told]


def continued(run_dir: Path, flags: dict[str, Any]) -> tuple[Config, int | None]:
    """The config of a run that is to go on, and the later last step that `flags` ask for, if they do.

    Raises:
        ConfigError: the config cannot be read, or flags differ from it in more than where the run does its work.
    """
    config = load_config(run_dir / "config.yaml")
    config = config.changed(**{name: value for name, value in flags.items() if name in MACHINE_OPTIONS})
    planned = config.schedule.steps
    steps = config.changed(steps=flags.get("steps", planned)).schedule.steps
    extend_to = steps if steps > planned else None
    if differing := conflicts(config, {**flags, "steps": planned} if extend_to else flags):
        raise ConfigError(f"cannot resume with other options: {'; '.join(differing)}")
    return config, extend_to


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring = 2, 200  # with YAML aliases, a few lines can expand to a value of any size


def as_flag(name: str) -> str:
    """An option as it is typed on the command line."""
    return f"--{name.replace('_', '-')}"


def explain(error: ValidationError, flags: Collection[str] = ()) -> str:
    """Pydantic's errors in one line, with the options by their own names, or as typed where they are `flags`."""
    parts = []
    for item in error.errors():
        inside = item["loc"][1:] if item["loc"] and item["loc"][0] in GROUPS else ()  # `watch` names an option as well
        where = [str(part) for part in inside or item["loc"]]
        name = ".".join(where)
        if where and where[0] in flags:
            name = as_flag(where[0])
        if not name:  # the error of `_options_fit_together`
            parts.append(item["msg"].removeprefix("Value error, "))
        elif item["type"] == "missing":
            parts.append(f"{name} is missing")
        elif item["type"] == "extra_forbidden":
            parts.append(f"{name} is not an option")
        else:
            parts.append(f"{name}: {problem(item)}")
    return "; ".join(parts)


def problem(item: ErrorDetails) -> str:
    """One of pydantic's errors as the end of a sentence."""
    text = item["msg"].removeprefix("Value error, ")
    return f"{text[0].lower()}{text[1:]}, not {_SHORT.repr(item['input'])}"
