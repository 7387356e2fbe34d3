"""`ireasoner doctor`: can this model be trained on this machine, and can it learn from these images?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cyclopts import Group

from ireasoner.app.options import Device, JsonFile, Revision, keep
from ireasoner.app.training_options import with_training_options
from ireasoner.method.types import UsageError
from ireasoner.model.options import Dtype, Quantization
from ireasoner.training import config as configs

if TYPE_CHECKING:  # these import torch, or other packages that take long
    from ireasoner.studies.doctor import Finding
    from ireasoner.studies.reading import Drawn
    from ireasoner.training.checks import Inputs

READ_WITH = (
    "recipe", "preset", "seed", "eval_data", "held_out", "labels", "reward", "group_size", "max_question_tokens",
    "max_solution_tokens", "solution_form", "proposer_prompt", "solver_prompt", "max_image_tokens", "max_image_pixels",
    "image_column", "items", "images_per_item", "frame_rate", "learning_rate", "domain",
)  # fmt: skip


@with_training_options({Group.create_ordered("What train would be given (with --images)"): READ_WITH})
def doctor(
    model: str,
    /,
    *,
    images: str | None = None,
    device: Device = "auto",
    dtype: Dtype | None = None,
    quantization: Quantization | None = None,
    revision: Revision = None,
    json: JsonFile = None,
    **flags: Any,
) -> int:
    """Check a model, in about a minute: that the update sees the image, that the reference is the frozen model, that
    updating a role changes that role's adapter and nothing else, that sampler and learner agree, and that only the
    language model is trainable. Each check comes with its figure. With --images, the model then asks and answers about
    the first images that a run would draw, four at most, as train would have it do with the same options: every text
    is shown with how it was read and what it earned, and whether training can learn from such texts. The exit code is
    1 if a check fails or the model cannot learn; nothing is trained, and nothing is written but the file that --json
    names, which holds all texts in full.

    Args:
        model: A folder, a hub id, or 'tiny'.
        images: Your unlabeled images, as train takes them: read what the model asks and answers about some of them.
        dtype: Of the backbone (with --images the preset's; else float32 on a CPU, bfloat16 or float16 on a GPU).
        quantization: As train takes it; then what it does to log-probabilities and to an update is measured too.
    """
    if images is None and flags:
        raise UsageError(f"{', '.join(map(configs.as_flag, flags))}: only with --images FOLDER")
    from ireasoner.training.checks import check_reading

    inputs = None
    if images is not None:  # the config that train would have
        given = {"dtype": dtype, "quantization": quantization, "revision": revision}
        flags |= {name: value for name, value in given.items() if value}
        config = configs.resolve({**flags, "model": model, "images": images, "device": device})
        inputs = check_reading(config)  # now, so that a mistake need not wait for imports and checks
    from ireasoner.model.pieces import out_of_memory_is_told

    with out_of_memory_is_told():
        result = _examine(model, inputs, device, dtype, quantization, revision)
    keep(json, result)
    healthy = all(check["passed"] for check in result["checks"]) and result.get("can_learn", True)
    return 0 if healthy else 1


def _examine(
    model: str,
    inputs: Inputs | None,
    device: str,
    dtype: Dtype | None,
    quantization: Quantization | None,
    revision: str | None,
) -> dict[str, Any]:
    """Make the checks, and read what the model writes about images if there are any; the results, for JSON."""
    from ireasoner.app.display import print_wait
    from ireasoner.model.backbone import lacks_bfloat16, resolve_device
    from ireasoner.model.options import BackboneOptions
    from ireasoner.model.source import find_model, waiting_line
    from ireasoner.studies import reading
    from ireasoner.studies.doctor import examine
    from ireasoner.studies.random_models import SIZES

    config = inputs.config if inputs else None
    device = resolve_device(device)
    of_device: Dtype = "float32" if device == "cpu" else "float16" if lacks_bfloat16(device) else "bfloat16"
    backbone = config.backbone if config else BackboneOptions(dtype=dtype or of_device, quantization=quantization)
    held = f", its language model in {backbone.quantization}," if backbone.quantization else ""
    print(f"{model} in {backbone.dtype}{held} on {device}")
    if model not in SIZES:
        print_wait(waiting_line(find_model(model, revision)))
    rate = {"learning_rate": config.optimizer.learning_rate} if config else {}
    checks = _shown(examine(model, backbone, device=device, revision=revision, **rate))
    failed = sum(not finding.passed for finding in checks)
    print(f"{failed} of the checks failed: do not train on this." if failed else "All checks passed.")
    result: dict[str, Any] = {"model": model, "dtype": backbone.dtype, "quantization": backbone.quantization}
    result["checks"] = [asdict(check) for check in checks]
    if inputs is None:
        print("What this model would write about your images was not looked at: name some with --images FOLDER.")
        return result
    return result | _read_and_judge(reading.draw(inputs), checks)


def _shown(findings: Iterable[Finding]) -> list[Finding]:
    """The doctor's findings, each printed as soon as it is made."""
    from ireasoner.app import display

    found = []
    for finding in findings:
        display.print_finding(finding)
        found.append(finding)
    return found


def _read_and_judge(drawn: Drawn, checks: Sequence[Finding]) -> dict[str, Any]:
    """Show what the model writes about some images and whether it can learn here, for which the checks count as well.

    Returns:
        The result, ready for JSON.
    """
    from ireasoner.app import display
    from ireasoner.studies import reading
    from ireasoner.training.items import first_skips, set_aside_line

    config, pool = drawn.inputs.config, drawn.inputs.pool
    episodes = reading.read(drawn)
    display.print_text(
        f"\nWhat it writes about {len(episodes)} images of {display.plain(str(config.images))}: recipe "
        f"{display.plain(config.recipe.name)}, preset {display.plain(config.preset)}, {config.sampling.group_size} "
        "solutions of a question"
    )
    for episode in episodes:
        display.print_episode(episode, config)
    display.print_text("")
    if drawn.skipped:
        display.print_text(f"Images that cannot be used: {display.plain(first_skips(drawn.skipped), 1000)}.")
    if config.eval_data or config.held_out:
        display.print_text(set_aside_line(pool))
    findings = _shown(reading.judge(config, episodes))
    sentences = reading.verdict(config, [*checks, *findings])
    display.print_text("")
    for sentence in sentences:
        display.print_text(display.plain(sentence, 1000))
    return {
        "can_learn": all(finding.passed for finding in (*checks, *findings)),
        "verdict": sentences,
        "findings": [asdict(finding) for finding in findings],
        "set_aside": pool.set_aside,
        "skipped": drawn.skipped,
        "episodes": [episode.model_dump(mode="json") for episode in episodes],
    }
