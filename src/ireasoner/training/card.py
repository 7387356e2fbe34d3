"""The model card (README.md) of an adapter or a merged model: what it is, how it was made, what was measured.

A card may be published, so it names no path, no image, and no text of the user's but the solver's prompt, without which
the model cannot be used as it was trained.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any, Literal

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.repocard import metadata_load

from ireasoner import __version__
from ireasoner.method.recipe import REWARDS
from ireasoner.method.types import Role
from ireasoner.model.source import TINY_MODEL, is_folder_name
from ireasoner.training.config import Config, names
from ireasoner.training.statistics import MEASURES

Form = Literal["run", "adapter", "merged"]
LICENCE = ("license", "license_name", "license_link")
HERE = "PATH OR HUB ID OF THIS MODEL"


@dataclass(frozen=True)
class Base:
    """The model that a run started from, as others can find it: its hub id and commit where they are known, and what
    its own card says about its licence."""

    hub_id: str | None
    commit: str | None
    licence: Mapping[str, str] = field(default_factory=dict)


def find_base(model: str, commit: str | None) -> Base:
    """Find out how others can name a model that is here already. The hub is not asked.

    Args:
        model: 'tiny', a folder or a hub id.
        commit: of a model on the hub.
    """
    if model != "tiny" and not is_folder_name(model):
        card = try_to_load_from_cache(model, "README.md", revision=commit)
        return Base(model, commit, _licence(Path(card)) if isinstance(card, str) else {})
    folder = TINY_MODEL if model == "tiny" else Path(model).expanduser()
    in_cache = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$", Path(os.path.realpath(folder)).as_posix())
    licence = _licence(folder / "README.md")
    return Base(in_cache[1].replace("--", "/", 1), in_cache[2], licence) if in_cache else Base(None, None, licence)


def _licence(card: Path) -> dict[str, str]:
    """What a card says about the licence; nothing if it is missing or cannot be read."""
    try:
        found = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {name: found[name] for name in LICENCE if isinstance(found.get(name), str)} if found else {}


def model_card(
    config: Config,
    summary: Mapping[str, Any],
    base: Base,
    role: Role = "solver",
    form: Form = "run",
    here: str = HERE,
) -> str:
    """The card of what a run has trained.

    Args:
        config: of the run.
        summary: its `summary.json`, or as much of it as is known and holds for these weights.
        base: the model that it started from.
        role: whose adapter it is.
        form: the adapter in the run directory, which has no processor beside it; an exported adapter; or a whole model.
        here: what it is loaded by: its hub id, where it has one.
    """
    header: dict[str, Any] = {"library_name": "transformers" if form == "merged" else "peft"}
    if base.hub_id:
        header |= {"base_model": base.hub_id, "base_model_relation": "finetune" if form == "merged" else "adapter"}
    header |= {**base.licence, "pipeline_tag": "image-text-to-text"}
    header["tags"] = ["ireasoner", "self-play", "visual-reasoning", *(["lora"] if form != "merged" else [])]
    name = base.hub_id or ("the tiny model of ireasoner" if config.model == "tiny" else "a model from a local folder")
    kind = "model with the solver merged into it" if form == "merged" else f"LoRA adapter of the {role}"
    at = f" at commit `{base.commit}`" if base.commit else ""
    paragraphs = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {base.hub_id.rpartition('/')[2] if base.hub_id else 'A vision-language model'}, {role} of a self-play run",
        f"A {kind}: {name}{at}, trained by self-play on unlabeled images with ireasoner {__version__} (an "
        "implementation of iReasoner, [arXiv 2601.05877](https://arxiv.org/abs/2601.05877)). A proposer asks a "
        "question about each image, a solver answers it several times, and the answers' agreement with each other is "
        "the reward.",
        "## Training",
        _training(config, summary, role),
        "## What was measured",
        _measured(summary),
        "## What was not tested",
        "Images and questions of other kinds, other languages, safety and bias. The reward is the model's "
        "agreement with itself, so that answers can become consistent without being right.",
    ]
    if role == "solver":
        paragraphs += ["## How to use it", _usage(config, base, form, here)]
    return "\n\n".join(paragraphs) + "\n"


def _training(config: Config, summary: Mapping[str, Any], role: Role) -> str:
    """How it was trained, as a list. Recipes, presets and rewards of the user's own may be paths and are not named."""
    recipe = config.recipe.name if config.recipe.name in names("recipes") else "of its own"
    preset = config.preset if config.preset in names("presets") else "of its own"
    steps, images = summary.get("best_step", config.schedule.steps), summary.get("images")
    rows = [
        f"recipe: {recipe}" + ("" if config.recipe.reward in REWARDS else "; a reward function of its own"),
        f"preset: {preset}",
        f"steps: {steps} of {config.schedule.images_per_step} images each"
        + ("; the run ended itself later and went back to this step" if summary.get("stopped_early") else ""),
        f"images: {images if isinstance(images, int) else 'not known'}, "
        + (f"{100 * config.label_share:g} % of them with labelled questions" if config.labels else "without labels"),
        f"LoRA: rank {config.backbone.lora_rank}, alpha {config.backbone.lora_alpha}, on the language model",
        f"learning rate: {config.optimizer.learning_rate:g}",
        f"seed: {config.seed}",
    ]
    if how := config.backbone.quantization:
        rows.append(f"trained and measured on a backbone whose language model is held in {how}")
    if began := config.init_adapters_sha256.get(role):
        rows.insert(0, f"began with: an adapter that was trained before, of SHA-256 `{began}`")
    return "\n".join(f"- {row}" for row in rows)


def _measured(summary: Mapping[str, Any]) -> str:
    """Accuracy before and after with 95 % intervals, as a table."""
    before, after, difference = (summary.get(name) for name in ("before", "after", "difference"))
    if not (before and after and difference):
        return "Nothing of these weights: their accuracy on held-out questions is not known."
    rows = ["| accuracy in % | before | after | difference | p |", "|---|---|---|---|---|"]
    for name in MEASURES:
        cells = [_interval(part[name]) for part in (before, after, difference)]
        rows.append(f"| {name} | {' | '.join(cells)} | {difference[name]['p']:.4f} |")
    about = f"{before['questions']} held-out questions about {before['images']} images that were not trained on"
    return f"On {about}, with 95 % intervals; the difference is paired.\n\n" + "\n".join(rows)


def _interval(values: Mapping[str, float]) -> str:
    mean, low, high = (100 * values[name] for name in ("mean", "low", "high"))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


USAGE = Template("""\
```python
$imports
from transformers import AutoModelForImageTextToText, AutoProcessor

$load
prompt = $prompt.replace("{question}", "What is in the picture?")
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)
image = Image.open("photo.jpg").convert("RGB")
inputs = processor(images=[image], text=[text], add_special_tokens=False, return_tensors="pt").to(model.device)
reply = model.generate(**inputs, max_new_tokens=$longest, do_sample=False, repetition_penalty=1.0)
print(processor.decode(reply[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

The answer stands $where. The prompt above is the one that it was trained with.""")
EVALUATION = Template("""\
lmms-eval asks it with this prompt too, which stands in `solver.json`, where ireasoner is installed
(`pip install 'ireasoner[eval]'`):

```bash
lmms-eval --model ireasoner --model_args "pretrained=$here" --tasks chartqa --log_samples --output_path logs
```""")
WHERE = {
    "tags": "between `<answer>` and `</answer>`, after the reasoning steps between `<think>` and `</think>`",
    "boxed": "in the last `\\boxed{}`, after the reasoning steps",
    "answer-line": "on the last line, after `Answer:` and the reasoning steps",
}


def _usage(config: Config, base: Base, form: Form, here: str) -> str:
    """Python code that loads it with plain libraries and asks it under the prompt of its training."""
    start = repr(here if form == "merged" else base.hub_id or "PATH OF THE BASE MODEL")
    at = f", revision={base.commit!r}" if base.commit and form != "merged" else ""
    load = [f'model = AutoModelForImageTextToText.from_pretrained({start}{at}, dtype="auto")']
    if form != "merged":
        load.append(f"model = PeftModel.from_pretrained(model, {here!r})")
    load.append(f"processor = AutoProcessor.from_pretrained({f'{start}{at}' if form == 'run' else repr(here)})")
    peft = [] if form == "merged" else ["from peft import PeftModel"]
    usage = USAGE.substitute(
        imports="\n".join([*peft, "from PIL import Image"]),
        load="\n".join(load),
        prompt=repr(config.sampling.solver_prompt),
        longest=config.sampling.max_solution_tokens,
        where=WHERE[config.sampling.solution_form],
    )
    return usage if form != "merged" else f"{usage}\n\n{EVALUATION.substitute(here=here)}"
