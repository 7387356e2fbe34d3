"""The prompts of the proposer and the solver. They are here and not in `texts` because every option's default is read
for `--help`, which should not wait for the parsers of replies."""

from __future__ import annotations

from pathlib import Path

from ireasoner.method.types import Form, Shown


def _prompt(name: str) -> str:
    return (Path(__file__).parent / "prompts" / f"{name}.txt").read_text("utf-8").removesuffix("\n")


PROPOSER_PROMPT = _prompt("proposer")
SOLVER_PROMPT = _prompt("solver-tags")
SOLVER_PROMPTS: dict[Form, str] = {
    "tags": SOLVER_PROMPT,
    "boxed": _prompt("solver-boxed"),
    "answer-line": _prompt("solver-answer-line"),
}
_SHIPPED = {PROPOSER_PROMPT, *SOLVER_PROMPTS.values()}
_WORDS: dict[Shown, dict[str, str]] = {
    "image": {},
    "images": {"the image": "the images", "images shows": "images show", "about it": "about them"},
    "clip": {"the image": "the clip"},
}


def speaking_of(prompt: str, shown: Shown) -> str:
    """A prompt that is shipped here, which speaks of the image, as it speaks of several images or of a clip. Any other
    prompt is the user's own and stays as it is."""
    if prompt in _SHIPPED:
        for words, instead in _WORDS[shown].items():
            prompt = prompt.replace(words, instead)
    return prompt
