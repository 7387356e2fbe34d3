"""What would a model earn for its steps by saying less, the same again, or what fits every image? On the CPU.

    python benchmarks/step_edits.py                                                  # the tiny model, on its pictures
    python tools/real_text_model.py --out smolvlm-real-text
    python benchmarks/step_edits.py --model smolvlm-real-text --groups tests/data/step_groups.jsonl

Solutions are edited, and scored before and after by how likely their steps are to the model (`likelihood`), by the
least likely token of each step (`least likely token`), and by the likelihood less that behind a gray image
(`grounding`, of the recipe `default`). With --groups, the solutions come from a file and the image is gray, so that the
last score is 0. A score that rises is an offer to cheat. Repeated steps count once, and steps that are said of
other images are discounted in training; here they are not, so that the score itself is seen.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from step_scores import GRAY, ask, logprobs

from ireasoner.method.instructions import SOLVER_PROMPT
from ireasoner.method.likelihood import step_tokens
from ireasoner.method.texts import parse_trajectory, solver_messages
from ireasoner.model.inputs import EncodedImage, encode_images, token_texts
from ireasoner.model.loading import load_policy
from ireasoner.model.policy import Policy
from ireasoner.training.config import resolve

Steps = tuple[str, ...]
BOILERPLATE = {
    "en": "Let me look at the image carefully.",
    "de": "Schauen wir uns das Bild genau an.",
    "zh": "让我们仔细看图。",
}
ANSWER = {"en": "So the answer is {}.", "de": "Die Antwort ist also {}.", "zh": "所以答案是{}。"}
EDITS: dict[str, Callable[[Steps, str, str], Steps]] = {
    "as written": lambda steps, answer, language: steps,
    "the last step again": lambda steps, answer, language: (*steps, steps[-1]),
    "boilerplate before it": lambda steps, answer, language: (BOILERPLATE[language], *steps),
    "boilerplate alone": lambda steps, answer, language: (BOILERPLATE[language],),
    "the last step alone": lambda steps, answer, language: steps[-1:],
    "the answer alone": lambda steps, answer, language: (ANSWER[language].format(answer),),
    "the answer at the end": lambda steps, answer, language: (*steps, ANSWER[language].format(answer)),
}


def scores(
    policy: Policy,
    image: EncodedImage,
    gray: EncodedImage,
    messages: list[dict[str, object]],
    group: Sequence[tuple[Steps, str]],
    language: str,
) -> list[tuple[str, dict[str, float]]]:
    """The scores of each solution of a group under each edit."""
    found = []
    for edit, change in EDITS.items():
        for steps, answer in group:
            edited = change(steps, answer, language)
            lines = "\n".join(f"Step {n}: {step}" for n, step in enumerate(edited, 1))
            text = f"<think>{lines}</think><answer>{answer}</answer>"
            ids = policy.processor.tokenizer(text)["input_ids"]
            places = step_tokens(edited, token_texts(policy.processor, ids))
            (seen,) = logprobs(policy, image, messages, [ids], None)
            (blind,) = [seen] if image is gray else logprobs(policy, gray, messages, [ids], None)
            likely, unseen = (np.array([np.exp(own[p].mean()) for p in places if p]) for own in (seen, blind))
            least = [np.exp(seen[p].min()) for p in places if p]
            values = {
                "likelihood": float(likely.mean()),
                "least likely token": float(np.mean(least)),
                "grounding": float((likely - unseen).clip(0).mean()),
            }
            found.append((edit, values))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each language."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, or a folder")
    parser.add_argument("--groups", type=Path, help="JSONL of language, question and texts; else the tiny model's own")
    parser.add_argument("--questions", type=int, default=128)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    policy = load_policy(options.model, resolve({"images": "none", "model": "tiny"}).backbone, device="cpu")
    by_language: dict[str, list[tuple[str, dict[str, float]]]] = defaultdict(list)
    if options.groups:
        (gray,) = encode_images(policy, [Image.new("RGB", (64, 64), GRAY)])
        for line in options.groups.read_text("utf-8").splitlines():
            row = json.loads(line)
            read = [parse_trajectory("<think>" + t.replace("<answer>", "</think><answer>")) for t in row["texts"]]
            group = [(s.reasoning_steps, s.answer or "") for s in read]
            messages = solver_messages(SOLVER_PROMPT, row["question"])
            by_language[row["language"]] += scores(policy, gray, gray, messages, group, row["language"])
    else:
        for one in ask(policy, None, "chalk", options.questions, 0):
            group = [(s.reasoning_steps, s.answer or "") for s in one.solutions if s.reasoning_steps]
            by_language["en"] += scores(policy, one.image, one.gray, one.messages, group, "en")
    for language, found in by_language.items():
        names = list(found[0][1])
        print(f"| {language} | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
        for edit in EDITS:
            own = [values for name, values in found if name == edit]
            print(f"| {edit} | {' | '.join(f'{np.mean([v[name] for v in own]):.3f}' for name in names)} |")
        print()


if __name__ == "__main__":
    main()
