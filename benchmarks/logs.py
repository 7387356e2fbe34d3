"""How texts and answers of real vision-language models are read and judged, on public logs; prints a table.

    python benchmarks/logs.py FOLDER_OF_A_CLONE ...

The logs are in repositories on GitHub, to be cloned by whoever measures; nothing of them is kept here:

- Deep-Agent/R1-V: Qwen2-VL on GeoQA and on counting, before and after GRPO, in the form `tags`;
- JuncyLu/trl_DAPO at commit 9b645d60, before the logs were deleted: what Qwen2.5-VL wrote during training, in the forms
  `tags` and `answer-line`, on multiple-choice questions;
- mathllm/MATH-V: several models on MATH-Vision, in the form `boxed`;
- MMMU-Benchmark/MMMU: GPT-4o on MMMU-Pro, with up to ten options, in the form `answer-line`;
- lupantech/MathVista: several models; only the answers that the log extracted from their texts are judged. Where an
  answer is no option, the log takes the option that is spelled most like it, so some that it calls right are luck.

Each log says which texts it holds for right. The table has, for each of them:

- *readable*: the share of texts with a reasoning step and an answer in the form;
- *in steps*: of the readable thoughts that hold several sentences, the share read as more than one step;
- *log*: the share of texts that the log holds for right;
- *strict*: the share that we hold for right if an answer must have the key of the accepted one, as in the vote;
- *lenient*: the share that the evaluation holds for right, by the metric of `--match`;
- *agree*: the share of readable texts for which the evaluation says what the log says.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ireasoner.method.answers import answer_key
from ireasoner.method.matching import Match, match_value
from ireasoner.method.texts import parse_trajectory
from ireasoner.method.types import Form

HEAD = ("log", "form", "texts", "readable", "several sentences", "in steps", "log", "strict", "lenient", "agree")


@dataclass(frozen=True)
class Logged:
    """One text of a log, its form (None: the log gives the answer alone), and whether the log holds it for right."""

    form: Form | None
    text: str
    question: str
    accepted: str
    right: bool


def offered(question: str, options: Sequence[str]) -> str:
    """A question with its options, one a line, as these benchmarks ask it."""
    return "\n".join([question, *(f"({chr(ord('A') + i)}) {option}" for i, option in enumerate(options))])


def r1_v(path: Path) -> Iterator[Logged]:
    """Answers to GeoQA with verdicts, and counts, which are right if they are equal."""
    for row in json.loads(path.read_text("utf-8"))["results"]:
        right = row["is_correct"] if "is_correct" in row else row["extracted_answer"] == row["ground_truth"]
        yield Logged("tags", row["model_output"], row["question"]["question"], str(row["ground_truth"]), right)


_ROLLOUT = re.compile(
    r"\*\*Prompt:\*\* (?P<prompt>.*)\n\n\*\*Completion:\*\* (?P<text>.*)\n\n\*\*Solution:\*\* (?P<accepted>.*)\n\n"
    r"\*\*Rewards:\*\* accuracy=(?P<accuracy>[\d.-]+)",
    re.DOTALL,
)
_BEFORE_QUESTION = re.compile(r"<\|vision_end\|>|\nuser\n|user Question:")


def dapo(path: Path) -> Iterator[Logged]:
    """Rollouts of a training run. The prompt says in which form the model should answer."""
    for sample in path.read_text("utf-8").split("\n### Sample ")[1:]:
        if found := _ROLLOUT.search(sample):
            form: Form = "tags" if "<answer>" in found["prompt"] else "answer-line"
            question = _BEFORE_QUESTION.split(found["prompt"])[-1].partition("<|im_end|>")[0]
            yield Logged(form, found["text"], question, found["accepted"], float(found["accuracy"]) > 0)


def math_vision(path: Path) -> Iterator[Logged]:
    """Answers to MATH-Vision, whose questions are in another file of the repository."""
    rows = map(json.loads, (path.parents[3] / "data" / "test.jsonl").read_text("utf-8").splitlines())
    asked = {row["id"]: row for row in rows}
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        about = asked[row["id"]]
        question = offered(about["question"], about["options"])
        yield Logged("boxed", row["response"], question, about["answer"], row["correct"])


def mmmu_pro(path: Path) -> Iterator[Logged]:
    """Answers to MMMU-Pro. The options are a list as Python writes it."""
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        question = offered(row["question"], ast.literal_eval(row["options"]))
        yield Logged("answer-line", row["response"], question, row["answer"], row["if_right"])


def math_vista(path: Path) -> Iterator[Logged]:
    """What MathVista's own evaluation extracted from the texts."""
    for row in json.loads(path.read_text("utf-8")).values():
        if "true_false" in row:
            question = offered(row["question"], row["choices"] or [])
            yield Logged(None, str(row["extraction"]), question, row["answer"], row["true_false"])


LOGS: dict[str, Callable[[Path], Iterator[Logged]]] = {
    "src/eval/logs/*.json": r1_v,
    "training_logs/**/rollout_results.md": dapo,
    "outputs/*/*/*-CoT.jsonl": math_vision,
    "mmmu-pro/output/*_cot.jsonl": mmmu_pro,
    "results/*/output_[bilm]*.json": math_vista,  # models that see the images; GPT-4 and others were given captions
}
_SENTENCE_END = re.compile(r"[.!?][\"')\]*]*\s+(?=[A-Z(\\$])|[。！？](?=.)", re.DOTALL)


def measure(logged: Logged, match: Match = "exact") -> Counter[str]:
    """What one text adds to its line of the table."""
    counts = Counter(texts=1, log=int(logged.right))
    answer = logged.text
    if logged.form is not None:
        read = parse_trajectory(logged.text, form=logged.form)
        if read.answer is None:
            return counts
        answer = read.answer
        if _SENTENCE_END.search("\n".join(read.reasoning_steps).strip()):
            counts.update(several=1, in_steps=int(len(read.reasoning_steps) > 1))
    key = answer_key(answer, logged.question)
    strict = key is not None and key == answer_key(logged.accepted, logged.question)
    lenient = match_value(answer, [logged.accepted], logged.question, match) >= 0.5
    counts.update(readable=1, strict=int(strict), lenient=int(lenient), agree=int(lenient == logged.right))
    return counts


def table(folders: Sequence[Path], match: Match = "exact") -> list[tuple[str, ...]]:
    """One line for each log and form that the clones hold.

    Raises:
        FileNotFoundError: a folder holds none of the logs.
    """
    lines: dict[tuple[str, str], Counter[str]] = {}
    for folder in folders:
        found = [(path, read) for pattern, read in LOGS.items() for path in sorted(folder.glob(pattern))]
        if not found:
            raise FileNotFoundError(f"{folder} holds none of the logs that `benchmarks/logs.py --help` lists")
        for path, read in found:
            for logged in read(path):
                line = (f"{folder.name} {path.stem}", logged.form or "answer alone")
                lines[line] = lines.get(line, Counter()) + measure(logged, match)
    return [(*names, *_cells(counts)) for names, counts in lines.items()]


def _cells(counts: Counter[str]) -> tuple[str, ...]:
    def share(part: str, whole: str) -> str:
        return f"{100 * counts[part] / counts[whole]:.1f}" if counts[whole] else "-"

    return (
        str(counts["texts"]),
        share("readable", "texts"),
        str(counts["several"]),
        share("in_steps", "several"),
        share("log", "texts"),
        share("strict", "texts"),
        share("lenient", "texts"),
        share("agree", "readable"),
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", nargs="+", type=Path, metavar="FOLDER_OF_A_CLONE")
    parser.add_argument("--match", choices=get_args(Match), default="exact", help="metric of *lenient* (%(default)s)")
    given = parser.parse_args()
    try:
        rows = table(given.clones, given.match)
    except FileNotFoundError as error:
        parser.error(str(error))
    print("| " + " | ".join(HEAD) + " |")
    print("|---" * len(HEAD) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
