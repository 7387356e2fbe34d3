"""What lmms-eval calls for `labelled_questions.yaml`."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ireasoner.method.matching import match_value


def image(document: Mapping[str, Any]) -> list[Image.Image]:
    return [Image.open(document["image"]).convert("RGB")]


def question(document: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
    prompts = lmms_eval_specific_kwargs
    return f"{prompts['pre_prompt']}{document['question']}{prompts['post_prompt']}"


def judge(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """As `ireasoner eval` judges: "two" is 2, and "a blue circle" is "blue circle"."""
    return {"exact_match": match_value(results[0].strip(), [document["answer"]], document["question"], "exact")}
