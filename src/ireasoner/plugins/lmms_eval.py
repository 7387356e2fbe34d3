"""A model of lmms-eval (tested with 0.7.3) that is asked with the prompt that a run trained its solver with.

    lmms-eval --model ireasoner --model_args pretrained=EXPORT --tasks chartqa --log_samples --output_path logs
    lmms-eval --model ireasoner --model_args pretrained=BASE,prompt_of=EXPORT --tasks chartqa ...

EXPORT is what `ireasoner export --merge` wrote, or its hub id. Every question of a benchmark, with the benchmark's own
instructions, is put into the run's prompt. The reply may be as long as in training (most benchmarks allow 16 tokens, in
which no reasoning fits), and the benchmark judges the answer alone: the reply is handed on with a `</think>` and the
answer behind it, and lmms-eval strips what precedes that before it scores (`--reasoning_tags`, on by default). The log
has the whole reply in `resps`. A reply without an answer that can be read is judged as it is.

Images have the size, and sampling the settings, of the export, also for the base. What loads and runs the model is
lmms-eval's own model for its type, if that is one that takes chats, as for Qwen2.5-VL, Qwen3-VL and Qwen3.5;
`backend=NAME` chooses another one that loads it by transformers, and further arguments are handed on to it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
from lmms_eval.utils import simple_parse_args_string  # pyright: ignore[reportMissingImports]
from pydantic import ValidationError
from transformers import AutoConfig, AutoImageProcessor, GenerationConfig

from ireasoner.method.instructions import speaking_of
from ireasoner.method.texts import parse_trajectory
from ireasoner.method.types import UsageError
from ireasoner.training.config import SamplingOptions
from ireasoner.training.export import SOLVER

MANIFEST = ModelManifest(model_id="ireasoner", chat_class_path="ireasoner.plugins.lmms_eval.IReasoner")
Messages = Sequence[Mapping[str, Any]]


class IReasoner(lmms):
    """Makes another model of lmms-eval, whose requests and replies are those of a run's solver."""

    is_simple = False

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Any:
        """What lmms-eval calls with the text after `--model_args`, and with the options `--batch_size` and `--device`.

        Raises:
            UsageError: the export has no `solver.json`, or lmms-eval has no model for this type that takes chats.
        """
        from lmms_eval.models import get_model  # pyright: ignore[reportMissingImports]  # which itself imports MANIFEST

        arguments = {**simple_parse_args_string(arg_string)}
        arguments |= {name: value for name, value in (additional_config or {}).items() if value is not None}
        pretrained = str(arguments.get("pretrained", ""))
        export = str(arguments.pop("prompt_of", pretrained))
        sampling = read_sampling(export)
        backend = arguments.pop("backend", None) or AutoConfig.from_pretrained(pretrained).model_type
        try:
            backend_class = get_model(backend)
        except ValueError:
            backend_class = None
        if backend_class is None or backend_class.is_simple:
            raise UsageError(f"lmms-eval has no model {backend!r} that takes chats: name one with backend=NAME")
        options = inspect.signature(backend_class).parameters
        if "max_pixels" in options:
            size = AutoImageProcessor.from_pretrained(export).size
            arguments = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]} | arguments
        if "enable_thinking" in options:  # as in training; the reasoning is asked for by the prompt
            arguments = {"enable_thinking": False} | arguments
        model = _prompted(backend_class, sampling)(**arguments)
        model.model.generation_config = GenerationConfig.from_pretrained(export)
        return model


def read_sampling(export: str) -> SamplingOptions:
    """How a solver was asked in training, from an export's `solver.json`.

    Args:
        export: a folder or a hub id.

    Raises:
        UsageError: it has none that can be read.
    """
    try:
        path = Path(export) / SOLVER if Path(export).is_dir() else Path(hf_hub_download(export, SOLVER))
        return SamplingOptions(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, ValidationError) as error:
        raise UsageError(
            f"{export or 'pretrained='} has no {SOLVER} that can be read ({type(error).__name__}): name a folder that "
            "ireasoner export --merge wrote, or add prompt_of=FOLDER"
        ) from None


def _prompted(backend: Any, sampling: SamplingOptions) -> Any:
    """A model class of lmms-eval that asks as a run asked its solver, and hands on what it answered."""

    class Prompted(backend):
        def generate_until(self, requests: Sequence[Any]) -> list[Any]:
            replies = super().generate_until([_asked(request, sampling) for request in requests])
            return [_answered(reply, sampling) for reply in replies]

    return Prompted


def _asked(request: Any, sampling: SamplingOptions) -> Any:
    """A request with the run's prompt around its question, and with room for the reasoning."""
    context, messages, options, *rest = request.args
    room = {name: value for name, value in options.items() if name != "until"}
    room["max_new_tokens"] = max(sampling.max_solution_tokens, options.get("max_new_tokens", 0))
    put: Callable[..., Messages] = lambda document: in_prompt(messages(document), sampling.solver_prompt)  # noqa: E731
    return dataclasses.replace(request, arguments=(context, put, room, *rest))


def in_prompt(messages: Messages, prompt: str) -> list[dict[str, Any]]:
    """The messages of a benchmark, with a solver's prompt around what they ask.

    Where images stand between several texts, what precedes `{question}` goes before the first text, and what follows it
    behind the last one.

    Raises:
        UsageError: there is no text, or there are several, and the prompt repeats the question.
    """
    turns = [{**turn, "content": [dict(block) for block in turn["content"]]} for turn in messages]
    kinds = [block["type"] for turn in turns for block in turn["content"]]
    prompt = speaking_of(prompt, "clip" if "video" in kinds else "images" if kinds.count("image") > 1 else "image")
    asked = [block for turn in turns if turn["role"] == "user" for block in turn["content"] if block["type"] == "text"]
    if len(asked) == 1:
        asked[0]["text"] = prompt.replace("{question}", asked[0]["text"])
        return turns
    if not asked or prompt.count("{question}") > 1:
        raise UsageError("a document has no text, or images between its texts, which fit no prompt with two questions")
    before, _, after = prompt.partition("{question}")
    asked[0]["text"] = before + asked[0]["text"]
    asked[-1]["text"] += after
    return turns


def _answered(reply: Any, sampling: SamplingOptions) -> Any:
    """A reply with its answer behind a `</think>`, or as it is where no answer can be read."""
    text = reply if isinstance(reply, str) else reply.text
    answer = parse_trajectory(text, "stop", sampling.solution_form, sampling.solver_prompt).answer
    if answer is None:
        return reply
    text = f"{text}</think>{answer}"
    return text if isinstance(reply, str) else dataclasses.replace(reply, text=text)
