"""What to know about the options of a run: those that differ from its recipe and preset, and what usually follows."""

from __future__ import annotations

from typing import Any

from ireasoner.training.config import Config, ConfigError, names, option, resolve

# What usually follows from a larger and from a smaller value.
LARGER_SMALLER = {
    "learning_rate": (
        "a larger one moves the model faster, and can spoil the form of its texts within a few steps",
        "a smaller one may not move the model at all, least of all in bfloat16 and float16",
    ),
    "max_grad_norm": ("larger updates get through", "updates become smaller"),
    "max_question_tokens": ("it takes more memory", "questions that are cut off cannot be read, and are not asked"),
    "max_solution_tokens": ("it takes more memory", "solutions that are cut off cannot be read, and earn nothing"),
    "max_image_tokens": ("it takes more memory", "details of the image are lost"),
    "group_size": ("a step takes longer", "votes and advantages become noisier"),
    "images_per_step": ("a step takes longer", "updates become noisier"),
    "kl_coef": ("the model is held closer to where it started", "nothing may hold the model back from collapsing"),
    "kl_target": ("β lets the model move further", "β holds the model closer to where it started"),
    "gate_low": ("fewer groups teach the solver, and maybe none", "more groups teach the solver"),
    "gate_high": ("more groups teach the solver", "fewer groups teach the solver, and maybe none"),
}
OTHER = {
    "solver_prompt": "if it does not ask for the solution form, what the model writes cannot be read",
    "proposer_prompt": "if it does not ask for <question>…</question>, no question can be read",
    "solution_form": "the model must write its answer in this form to be read",
    "dtype": "in bfloat16 and float16, small updates are hard to tell from rounding",
    "reward": "what it pays for is what the model learns",
}

LEAST_RATE = 1e-5  # below it, updates of a half-precision backbone drown in its rounding (docs/experiments.md)


def drowned_in_rounding(config: Config) -> str | None:
    """A warning if the learning rate is too small for the backbone's precision."""
    rate, dtype = config.optimizer.learning_rate, config.backbone.dtype
    if dtype == "float32" or rate >= LEAST_RATE:
        return None
    return (
        f"A learning rate of {rate:g} hardly moves a {dtype} model: its rounding is larger than what updates change. "
        f"The preset 7b has {option('learning_rate').default:g}; `ireasoner doctor` measures it."
    )


def differences(config: Config) -> list[tuple[str, Any, Any]] | None:
    """Each option whose value differs from recipe and preset, except those that name the run: name, value, usual value.

    None if recipe or preset is a file: a run directory may come from anywhere, so that no file it names is opened.
    """
    options = config.flat()
    named = {name: options[name] for name in ("images", "model", "recipe", "preset", "labels")}
    if named["recipe"] not in names("recipes") or named["preset"] not in names("presets"):
        return None
    try:
        usual = resolve(named)
    except ConfigError:
        return None
    return [(name, *values) for name, values in config.differences(usual).items() if name not in named]


def advice(config: Config) -> list[str]:
    """A sentence about each of these options that may explain why a run goes wrong."""
    changed = {name: (value, usual) for name, value, usual in differences(config) or ()}
    found = []
    for name, (larger, smaller) in LARGER_SMALLER.items():
        if name in changed:
            value, usual = changed[name]
            found.append(f"{name} is {value}, not {usual}: {larger if value > usual else smaller}.")
    return found + [f"{name} was changed: {why}." for name, why in OTHER.items() if name in changed]
