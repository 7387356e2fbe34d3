"""The prompts of the proposer and the solver. They are here and not in `texts` because every option's default is read
for `--help`, which should not wait for the parsers of replies."""

from __future__ import annotations

from pathlib import Path

from ireasoner.method.types import Form


def _prompt(name: str) -> str:
    return (Path(__file__).parent / "prompts" / f"{name}.txt").read_text("utf-8").removesuffix("\n")


PROPOSER_PROMPT = _prompt("proposer")
SOLVER_PROMPT = _prompt("solver-tags")
SOLVER_PROMPTS: dict[Form, str] = {
    "tags": SOLVER_PROMPT,
    "boxed": _prompt("solver-boxed"),
    "answer-line": _prompt("solver-answer-line"),
}
