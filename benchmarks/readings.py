"""How the readers of answers, options and replies do on lists of cases with a known verdict, by kind.

    python benchmarks/readings.py tests/data/readings_seen.jsonl tests/data/readings_held_out.jsonl

The readers were written with the first list at hand; of the second one, only the totals were looked at. A case says
that two answers are the same (`equal`) or not (`different`), that an answer commits itself to nothing (`hedge`) or does
although it looks as if it did not (`no-hedge`), which options a question offers (`options`), or what is read in a
solver's reply (`completion`). `--show N` prints cases that are read otherwise.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ireasoner.method.answers import answer_key, lettered_options
from ireasoner.method.texts import SOLVER_PROMPTS, parse_trajectory

Case = Mapping[str, Any]


def judged(case: Case) -> Iterator[tuple[str, bool]]:
    """The verdicts on a case, by type: one, or two for a reply, on its answer and its number of steps."""
    question = case.get("question", "")
    match case["type"]:
        case "equal" | "different" | "no-hedge" as kind:
            one, other = (answer_key(case[name], question) for name in ("a", "b" if "b" in case else "expect_same_as"))
            same = one is not None and one == other
            yield kind, same != (kind == "different")
        case "hedge":
            yield "hedge", answer_key(case["a"], question) is None
        case "options":
            found = {_letter(mark): key for mark, key in lettered_options(question).items()}
            offered = {_letter(mark): answer_key(text) if text else "" for mark, text in case["options"].items()}
            # A text that commits itself to nothing, as an option such as "A or B" may, has no key to compare.
            yield (
                "options",
                found.keys() == offered.keys() and all(offered[mark] in (None, key) for mark, key in found.items()),
            )
        case "completion":
            form = case["form"]
            prompt = SOLVER_PROMPTS[form] + ("\n<think>\n" if case["opened"] else "")
            read = parse_trajectory(case["text"], case["finish"], form, prompt)
            right = read.answer == case["answer"]
            if read.answer is not None and case["answer"] is not None:
                right = right or answer_key(read.answer, question) == answer_key(case["answer"], question)
            yield "reply's answer", right
            if case["steps"] is not None:
                yield "reply's steps", right and len(read.reasoning_steps) == case["steps"]


def _letter(mark: str) -> str:
    return chr(ord("A") + int(mark) - 1) if mark.isdigit() else mark.upper()


def read_cases(path: Path) -> list[Case]:
    """The cases of a list, one JSON object on each line."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description="How answers, options and replies are read, beside known verdicts.")
    parser.add_argument("lists", type=Path, nargs="+", help="JSONL files of cases")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print so many cases that are read otherwise")
    given = parser.parse_args()
    answer_key("√2 cm, 3:30 PM")  # loads SymPy and pint, once
    for path in given.lists:
        verdicts: dict[tuple[str, str], list[bool]] = defaultdict(list)
        wrong, slowest = [], 0.0
        for case in read_cases(path):
            started = time.perf_counter()
            found = list(judged(case))
            slowest = max(slowest, time.perf_counter() - started)
            for kind, right in found:
                verdicts[kind, ""].append(right)
                verdicts[kind, case["kind"]].append(right)
                wrong += [] if right else [case]
        print(f"{path.name}: the slowest case took {1000 * slowest:.0f} ms")
        for (kind, row), right in sorted(verdicts.items()):
            name, share = "    " + row if row else kind, sum(right) / len(right)
            print(f"  {name:<52} {sum(right):4} of {len(right):4}  {share:6.1%}")
        for case in wrong[: given.show]:
            print(json.dumps(case, ensure_ascii=False))


if __name__ == "__main__":
    main()
