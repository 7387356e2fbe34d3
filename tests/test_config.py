"""Options: preset < recipe < flags, and every mistake is an error that names the option."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ireasoner.app.cli import main
from ireasoner.method.texts import SOLVER_PROMPTS
from ireasoner.method.types import UsageError
from ireasoner.training.advice import drowned_in_rounding
from ireasoner.training.config import (
    MACHINE_OPTIONS,
    PATHS,
    PRESET_OPTIONS,
    RECIPE_OPTIONS,
    Config,
    ConfigError,
    as_flag,
    conflicts,
    continued,
    dump_config,
    load_config,
    names,
    option,
    resolve,
)

NEEDED = {"images": "/pictures", "model": "tiny"}


def written(folder: Path, text: str, name: str = "own.yaml") -> str:
    (folder / name).write_text(text, "utf-8")
    return str(folder / name)


def mistake(**flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve({**NEEDED, **flags})
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- where a value comes from -----------------------------------------------------------------------------------------


def test_the_papers_constants():
    config = resolve({**NEEDED, "recipe": "paper", "preset": "7b-paper"})
    assert (config.recipe.outcome_exponent, config.recipe.length_penalty, config.recipe.target_words) == (0.7, 0.05, 64)
    assert (config.recipe.density_exponent, config.recipe.position_decay) == (0.7, 0.15)
    assert (config.recipe.max_reasoning_steps, config.recipe.max_step_tokens) == (8, 64)
    assert (config.recipe.step_weight_initial, config.recipe.step_weight_final, config.recipe.step_weight_warmup) == (
        0.0,
        0.7,
        0.3,
    )
    assert (config.recipe.target_entropy, config.recipe.entropy_width) == (0.9, 0.35)
    assert (config.recipe.reward, config.recipe.advantage, config.recipe.baseline_momentum) == ("agreement", "ema", 0.9)
    assert (config.sampling.group_size, config.sampling.max_solution_tokens, config.sampling.max_question_tokens) == (
        5,
        256,
        128,
    )
    assert (
        config.backbone.lora_rank,
        config.backbone.lora_alpha,
        config.optimizer.learning_rate,
        config.optimizer.weight_decay,
    ) == (16, 32, 1e-6, 0.01)
    assert (config.recipe.kl_coef, config.recipe.kl_target, config.recipe.kl_rate) == (1e-3, 0.02, 0.1)
    assert (config.optimizer.max_grad_norm, config.schedule.proposer_every) == (1.0, 5)
    assert (config.schedule.steps, config.schedule.images_per_step) == (2500, 1)


def test_the_default_scale_goes_as_far_as_the_papers_with_as_many_images():
    ours, papers = resolve({**NEEDED, "preset": "7b"}), resolve({**NEEDED, "preset": "7b-paper"})
    assert ours.differences(papers).keys() == {"preset", "steps", "images_per_step", "learning_rate"}
    images = [config.schedule.steps * config.schedule.images_per_step for config in (ours, papers)]
    assert images == [2500, 2500]
    updates = 5  # optimizer steps on each group in the published run; here there is one
    way = papers.schedule.steps * updates * papers.optimizer.learning_rate
    assert ours.schedule.steps * ours.optimizer.learning_rate == pytest.approx(way)


@pytest.mark.parametrize(
    ("preset", "options", "warns"),
    [
        ("7b", {}, False),
        ("7b-paper", {}, True),
        ("7b-paper", {"dtype": "float32"}, False),
        ("7b", {"learning_rate": "3e-6"}, True),
        ("tiny", {}, False),
    ],
)
def test_a_learning_rate_that_drowns_in_rounding_is_named(preset: str, options: dict[str, str], warns: bool):
    warning = drowned_in_rounding(resolve({**NEEDED, "preset": preset, **options}))
    assert (warning is not None) == warns
    if warning:
        assert "hardly moves a bfloat16 model" in warning
        assert "The preset 7b has 2e-05" in warning


def test_preset_then_recipe_then_flags(tmp_path: Path):
    preset = written(tmp_path, "steps: 7\ngroup_size: 3\nlearning_rate: 1e-4\n", "preset.yaml")
    recipe = written(tmp_path, "length_penalty: 0.2\ntarget_entropy: 0.5\n", "recipe.yaml")
    config = resolve({**NEEDED, "preset": preset, "recipe": recipe, "group_size": "4", "target_entropy": "0.6"})
    flat = config.flat()
    assert (flat["steps"], flat["learning_rate"], flat["length_penalty"]) == (7, 1e-4, 0.2)  # from the files
    assert (flat["group_size"], flat["target_entropy"]) == (4, 0.6)  # flags win over both
    assert flat["density_exponent"] == 0.7  # neither: the default
    assert (flat["preset"], flat["recipe"]) == (preset, recipe)


@pytest.mark.parametrize(("model", "preset"), [("tiny", "tiny"), ("/models/other", "7b")])
def test_the_preset_follows_the_model_unless_named(model: str, preset: str):
    assert resolve({"images": "/x", "model": model}).preset == preset
    assert resolve({"images": "/x", "model": model, "preset": "7b"}).preset == "7b"


def test_recipe_and_preset_options_are_apart_and_together_with_the_runs_own_are_all():
    assert not set(RECIPE_OPTIONS) & set(PRESET_OPTIONS)
    own = {
        "images",
        "image_column",
        "max_image_pixels",
        "items",
        "images_per_item",
        "frame_rate",
        "model",
        "recipe",
        "preset",
        "seed",
        "labels",
        "label_share",
        "label_examples",
        "eval_data",
        "held_out",
        "match",
        "engine",
        "revision",
        "init_adapters",
        "report_to",
        "report_images",
    }
    assert set(PATHS) == set(RECIPE_OPTIONS) | set(PRESET_OPTIONS) | set(MACHINE_OPTIONS) | own
    assert all(option(name).description for name in PATHS)
    assert set(resolve(NEEDED).flat()) == set(PATHS)


def test_a_resumed_run_may_work_elsewhere_and_in_nothing_else_be_another(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(dump_config(resolve({**NEEDED, "servers": ["http://a:1"]})))
    elsewhere = {"device": "cpu", "shard": True, "servers": "http://b:1,http://c:2", "patience": 20}
    config, _ = continued(tmp_path, elsewhere)
    assert config.flat() == resolve(NEEDED).flat() | elsewhere | {"servers": ("http://b:1", "http://c:2")}
    assert continued(tmp_path, {})[0].servers == ("http://a:1",)
    with pytest.raises(ConfigError, match="--seed is 0 in the run, not 1"):
        continued(tmp_path, {"seed": 1, "device": "cpu"})
    with pytest.raises(ConfigError, match="patience: input should be greater than 0"):
        continued(tmp_path, {"patience": 0})
    with pytest.raises(ConfigError, match="patience: input should be less than or equal to"):  # which torch can add up
        continued(tmp_path, {"patience": 1e20})


def test_importance_weights_are_for_samplers_that_are_not_the_learner():
    assert resolve(NEEDED).fitted_optimizer().importance_cap == 0
    for elsewhere in ({"engine": "vllm"}, {"servers": "http://a:1"}):
        config = resolve({**NEEDED, **elsewhere})
        assert config.fitted_optimizer().importance_cap == 2
        assert config.changed(importance_cap=0).fitted_optimizer().importance_cap == 0
        assert config.optimizer.importance_cap is None  # a resumed run decides anew
    assert resolve({**NEEDED, "importance_cap": 3}).fitted_optimizer().importance_cap == 3
    with pytest.raises(ConfigError, match="--importance-cap: must be at least 1, or 0 for no weights"):
        resolve({**NEEDED, "importance_cap": 0.5})


def test_an_option_changes_and_nothing_else_does():
    config = resolve(NEEDED)
    changed = config.changed(kl_coef=0.5, steps=7)
    assert changed.flat() == config.flat() | {"kl_coef": 0.5, "steps": 7}
    with pytest.raises(ConfigError, match="flavour"):
        config.changed(flavour="sweet")


@pytest.mark.parametrize("form", ["tags", "boxed", "answer-line"])
def test_the_solvers_prompt_is_the_forms_unless_it_is_given(form: str):
    config = resolve({**NEEDED, "preset": "7b", "solution_form": form})
    assert config.sampling.solver_prompt == SOLVER_PROMPTS[form]
    given = resolve({**NEEDED, "preset": "7b", "solution_form": form, "solver_prompt": "{question}!"})
    assert given.sampling.solver_prompt == "{question}!"


def test_another_form_takes_its_own_prompt_and_not_the_presets():
    assert resolve({**NEEDED, "solution_form": "boxed"}).sampling.solver_prompt == SOLVER_PROMPTS["boxed"]
    assert resolve({**NEEDED, "solution_form": "tags"}).sampling.solver_prompt == "{question}"  # the tiny preset's


@pytest.mark.parametrize("reward", ["my_rewards.py:fn", "/some where/r.py:_fn2"])
def test_a_reward_may_be_a_function_in_a_file(reward: str):
    assert resolve({**NEEDED, "reward": reward}).recipe.reward == reward


# --- what ships -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", names("presets"))
@pytest.mark.parametrize("recipe", names("recipes"))
def test_every_shipped_recipe_resolves_with_every_preset(recipe: str, preset: str):
    labels = {"labels": "/labels.jsonl"} if recipe == "oracle" else {}
    config = resolve({**NEEDED, "recipe": recipe, "preset": preset, **labels})
    plain = resolve({**NEEDED, "preset": preset}).flat()
    assert all(config.flat()[name] == plain[name] for name in PRESET_OPTIONS)  # a recipe leaves the scale alone


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", "many"),
        ("steps", "0"),
        ("steps", "2.5"),
        ("group_size", "1"),
        ("learning_rate", "0"),
        ("learning_rate", "nan"),
        ("length_penalty", "1.5"),
        ("step_weight_final", "-0.1"),
        ("entropy_width", "0"),
        ("kl_coef", "1e-9"),
        ("save_every", "-1"),
        ("seed", "-1"),
        ("dtype", "float8"),
        ("advantage", "ppo"),
        ("reward", "accuracy"),
        ("reward", "my_rewards.py"),
        ("reward", "my_rewards.py:no-name"),
        ("solution_form", "xml"),
        ("train_proposer", "perhaps"),
        ("solver_prompt", "Answer."),
        ("domain", " . "),
        ("domain", 201 * "x"),
        ("domain", "X-rays\x1b[2J"),
        ("proposer_prompt", "Ask about {domain}."),
    ],
)
def test_a_bad_value_is_an_error_that_names_the_option(name: str, value: str):
    assert as_flag(name) in mistake(**{name: value})


def test_a_domain_is_one_line_without_a_full_stop():
    assert resolve(NEEDED | {"domain": " chest X-rays\n of adults. "}).sampling.domain == "chest X-rays of adults"


def test_all_bad_values_are_named_at_once():
    text = mistake(steps="0", seed="x")
    assert "steps" in text
    assert "seed" in text


def test_an_unknown_option_is_named():
    assert "temperature" in mistake(temperature="1")


@pytest.mark.parametrize("missing", ["images", "model"])
def test_a_missing_option_is_named(missing: str):
    with pytest.raises(ConfigError, match=f"{missing} is missing"):
        resolve({name: value for name, value in NEEDED.items() if name != missing})


@pytest.mark.parametrize("kind", ["recipe", "preset"])
def test_an_unknown_recipe_or_preset_is_named_with_those_that_there_are(kind: str):
    text = mistake(**{kind: "papre"})
    assert "papre" in text
    assert all(name in text for name in names(f"{kind}s"))


@pytest.mark.parametrize(
    ("kind", "text", "named"),
    [
        ("recipe", "steps: 3\n", "steps"),  # scale is no business of a recipe
        ("recipe", "seed: 3\n", "seed"),
        ("recipe", "outcom_exponent: 1\n", "outcom_exponent"),
        ("recipe", "length_penalty: 7\n", "length_penalty"),
        ("recipe", "- reward\n", "mapping"),
        ("recipe", "just words\n", "mapping"),
        ("recipe", "reward: [\n", "not YAML"),
        ("recipe", "reward: !!python/object/apply:os.getcwd []\n", "not YAML"),
        ("preset", "advantage: rloo\n", "advantage"),  # nor are rewards of a preset
        ("preset", "images: /x\n", "images"),
        ("preset", "steps: lots\n", "steps"),
        ("preset", "steps: {a: 1\n", "not YAML"),
    ],
)
def test_a_bad_file_is_an_error_that_names_the_file_or_the_key(tmp_path: Path, kind: str, text: str, named: str):
    assert named in mistake(**{kind: written(tmp_path, text)})


def test_a_recipe_that_is_not_text_is_named(tmp_path: Path):
    (tmp_path / "own.yaml").write_bytes(b"advantage: \xff\xfe\n")
    assert "own.yaml" in mistake(recipe=str(tmp_path / "own.yaml"))


def test_keys_that_are_not_names_are_unknown_options(tmp_path: Path):
    assert "nonsense" in mistake(recipe=written(tmp_path, "1: 2\nnonsense: 3\n"))


def test_an_empty_file_changes_nothing(tmp_path: Path):
    empty = written(tmp_path, "# nothing yet\n")
    assert resolve({**NEEDED, "recipe": empty}).recipe.advantage == "ema"


def test_the_oracle_needs_labels():
    assert "--labels" in mistake(recipe="oracle")
    assert resolve({**NEEDED, "recipe": "oracle", "labels": "/l.jsonl"}).labels == Path("/l.jsonl")


def test_a_mistake_is_the_users():
    assert issubclass(ConfigError, UsageError)


def test_a_config_cannot_be_changed_under_a_run():
    with pytest.raises(ValueError, match="frozen"):
        resolve(NEEDED).schedule.steps = 3


# --- to disk and back -------------------------------------------------------------------------------------------------


def round_trip(config: Config, folder: Path) -> Config:
    (folder / "config.yaml").write_text(dump_config(config), "utf-8")
    return load_config(folder / "config.yaml")


@pytest.mark.parametrize("recipe", names("recipes"))
def test_what_is_dumped_loads_the_same(tmp_path: Path, recipe: str):
    flags = {"recipe": recipe, "labels": "/l.jsonl", "learning_rate": "1e-6", "lora_targets": ["q_proj", "v_proj"]}
    config = resolve({**NEEDED, **flags, "model": "some/model"})
    assert round_trip(config, tmp_path) == config
    assert all(f"{name}:" in dump_config(config) for name in PATHS)  # every option, spelled out


@settings(deadline=None, max_examples=50)
@given(
    prompt=st.text(st.characters(codec="utf-8", exclude_characters="\x85")),
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    path=st.text(st.characters(codec="utf-8", exclude_characters="\0\x85")),
)
def test_any_text_and_number_survive_the_disk(tmp_path_factory: pytest.TempPathFactory, prompt: str, rate: float, path):
    flags = {"solver_prompt": prompt + "{question}", "learning_rate": rate, "images": f"/{path}"}
    config = resolve({"model": "tiny", **flags})
    assert round_trip(config, tmp_path_factory.mktemp("config")) == config


def test_the_next_line_character_survives_the_disk(tmp_path: Path):
    config = resolve({**NEEDED, "solver_prompt": "Look.\x85{question}"})
    assert round_trip(config, tmp_path) == config


def test_a_path_that_is_not_utf_8_survives_the_disk(tmp_path: Path):
    config = resolve({**NEEDED, "images": os.fsdecode(b"/pictures/\xff")})
    assert round_trip(config, tmp_path) == config


def test_a_folder_without_a_config_is_no_run(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"not a run directory.*config\.yaml"):
        load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("format: 2\nmodel: tiny\n", "images is missing"),
        ("format: 2\nimages: /x\nmodel: tiny\nschedule: {steps: none}\n", "steps"),
        ("format: 2\nimages: /x\nmodel: tiny\nflavour: sweet\n", "flavour is not an option"),
        ("format: 2\nimages: /x\nmodel: tiny\nschedule: {flavour: sweet}\n", "flavour is not an option"),
        ("format: 3\nimages: /x\nmodel: tiny\n", "format"),
        (
            "format: 2\nimages: /x\nmodel: tiny\nrecipe: {step_measure: claims}\n",
            "step_measure: this measure was removed: choose embedding, likelihood or grounding, not 'claims'",
        ),
        ("images: /x\nmodel: tiny\nsteps: 3\n", "written by ireasoner 0.1, which this version cannot read"),
        ("images: [\n", "cannot be read"),
        ("", "cannot be read"),
        ("- 1\n", "cannot be read"),
    ],
)
def test_a_config_of_another_make_is_refused(tmp_path: Path, text: str, named: str):
    written(tmp_path, text, "config.yaml")
    with pytest.raises(ConfigError, match=named) as caught:
        load_config(tmp_path / "config.yaml")
    assert "config.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_named_pipe_is_no_config(tmp_path: Path):
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="not a regular file"):
        load_config(tmp_path / "config.yaml")


def test_a_binary_config_is_refused(tmp_path: Path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "config.yaml")


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_conflicts_name_every_option_that_differs():
    stored = resolve({**NEEDED, "learning_rate": "3e-4", "seed": "1"})
    found = conflicts(stored, {"learning_rate": "1e-4", "seed": "2", "steps": str(stored.schedule.steps)})
    assert len(found) == 2
    assert "--learning-rate" in found[0]
    assert "0.0003" in found[0]
    assert "0.0001" in found[0]
    assert "seed" in found[1]


@pytest.mark.parametrize(
    "flags",
    [
        {"learning_rate": "0.0003"},
        {"learning_rate": "3e-4"},
        {"learning_rate": "3.00E-04"},
        {"steps": "060"},
        {"train_proposer": "yes"},
        {"train_proposer": "1"},
        {"images": "/pictures/"},
        {"lora_targets": ["q_proj", "v_proj"]},
        {"eval_data": None},
        {},
    ],
)
def test_the_same_value_in_another_spelling_is_no_conflict(flags: dict):
    stored = resolve({**NEEDED, "learning_rate": 3e-4, "steps": 60, "lora_targets": ("q_proj", "v_proj")})
    assert conflicts(stored, flags) == []


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("tensorboard", ("tensorboard",)),
        ("tensorboard,wandb", ("tensorboard", "wandb")),
        (["tensorboard", "wandb, mlflow", "wandb"], ("tensorboard", "wandb", "mlflow")),
        ("none", ()),
        ([], ()),
    ],
)
def test_trackers_are_named_in_a_list_or_between_commas(given: object, names: tuple[str, ...]):
    assert resolve({**NEEDED, "report_to": given}).report_to == names


def test_a_tracker_that_is_not_known_is_named():
    with pytest.raises(ConfigError, match=r"report-to.*'tensorbord'"):
        resolve({**NEEDED, "report_to": "tensorbord"})


def test_a_bad_value_on_resuming_names_the_option():
    with pytest.raises(ConfigError, match="steps"):
        conflicts(resolve(NEEDED), {"steps": "many"})


# --- the command line -------------------------------------------------------------------------------------------------


def test_every_option_is_in_the_help_of_train(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["train", "--help"]) == 0
    printed = "".join(word for word in capsys.readouterr().out.split() if not set(word) <= set("│╭╰╮╯─"))
    for name in PATHS:
        assert f"--{name.replace('_', '-')}" in printed, name
        described = "".join((option(name).description or "").split())
        assert described in printed, name
    assert "--learning-rateFLOATAdamWlearningrate,constant.[default:2e-05;" in printed
