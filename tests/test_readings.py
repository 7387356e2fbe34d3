"""Answers, options and replies of every kind in `tests/data/readings_*.jsonl` are read as a person reads them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
# The least share of a type that is right: of the cases that the readers were written with, and of those they were not.
SEEN = dict.fromkeys(("different", "hedge", "options", "reply's answer"), 0.99) | {
    "equal": 0.97,
    "no-hedge": 0.95,
    "reply's steps": 0.97,
}
HELD_OUT = {"equal": 0.95, "different": 1.0, "hedge": 0.97, "no-hedge": 0.8, "options": 1.0} | dict.fromkeys(
    ("reply's answer", "reply's steps"), 0.99
)


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readings  # type: ignore[import-not-found]

    return readings


@pytest.mark.parametrize(("name", "least"), [("seen", SEEN), ("held_out", HELD_OUT)])
def test_most_cases_of_each_type_are_read_as_a_person_reads_them(
    readings: Any, name: str, least: dict[str, float]
) -> None:
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for case in readings.read_cases(DATA / f"readings_{name}.jsonl"):
        for kind, right in readings.judged(case):
            verdicts[kind].append(right)
    shares = {kind: sum(right) / len(right) for kind, right in verdicts.items()}
    assert shares.keys() == least.keys()
    assert not {kind: share for kind, share in shares.items() if share < least[kind]}


def test_the_verdicts_notice_what_is_read_wrongly(readings: Any) -> None:
    cases = [
        {"type": "equal", "a": "5", "b": "6"},
        {"type": "different", "a": "5", "b": "five"},
        {"type": "hedge", "a": "5"},
        {"type": "no-hedge", "a": "5 or 6", "expect_same_as": "5"},
        {"type": "options", "question": "Which? A) red B) blue", "options": {"A": "red", "B": "green"}},
        {"type": "completion", "text": "Answer: 5", "finish": "stop", "form": "tags", "opened": False}
        | {"answer": "5", "steps": None},
    ]
    assert [right for case in cases for _, right in readings.judged(case)] == [False] * 6
