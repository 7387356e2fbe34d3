"""`benchmarks/logs.py` finds the logs of each repository, and reads and judges the texts in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LETTER = "<think>\nThe wall is grey.\nSo is the door.\n</think>\n<answer>B</answer>"
ROLLOUT = """### Sample {number}

**Prompt:** {prompt}

**Completion:** {text}

**Solution:** B

**Rewards:** accuracy={accuracy}, total=1.000

"""


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import logs  # type: ignore[import-not-found]

    return logs


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text, "utf-8")


def test_geoqa_answers_are_judged_beside_the_log(logs: Any, tmp_path: Path):
    texts = (
        "<think>A half of 50 is 25. The angle is 25.</think><answer>25</answer>",
        "<think>It is 7 by the figure.</think><answer>7</answer>",
        "The angle is 7.",
    )
    asked = {"question": "How large is the angle?", "ground_truth": "25°"}
    rows = [
        {"question": asked, "ground_truth": "25°", "model_output": text, "is_correct": right}
        for text, right in zip(texts, (True, True, False), strict=True)
    ]
    write(tmp_path / "src/eval/logs/geoqa.json", json.dumps({"accuracy": 66.7, "results": rows}))
    (row,) = logs.table([tmp_path])
    assert row[1:5] == ("tags", "3", "66.7", "1")  # one thought has two sentences
    assert row[6:] == ("66.7", "0.0", "33.3", "50.0")  # the vote tells 25 and 25° apart


def test_the_metric_of_the_evaluation_may_allow_a_tolerance(logs: Any):
    logged = logs.Logged("tags", LETTER.replace("B", "103"), "How many?", "100", True)
    assert (logs.measure(logged)["lenient"], logs.measure(logged, "relaxed")["lenient"]) == (0, 1)


def test_a_count_without_a_verdict_is_right_if_it_is_the_true_one(logs: Any, tmp_path: Path):
    asked = {"question": "How many?", "ground_truth": 4}
    row = {"question": asked, "ground_truth": 4, "model_output": LETTER, "extracted_answer": 4}
    write(tmp_path / "src/eval/logs/count.json", json.dumps({"results": [row]}))
    assert logs.table([tmp_path])[0][6] == "100.0"


def test_rollouts_are_read_in_the_form_that_their_prompt_asks_for(logs: Any, tmp_path: Path):
    tags = "<|im_start|>user\n<|vision_end|>Which is it?\nA: red\nB: grey<|im_end|>\n(Write <think> and <answer>.)"
    line = "system Think. End with 'Answer: X'. user Question: Which is it? A. red B. grey"
    samples = (
        (tags, LETTER, 1),
        (tags, LETTER.replace("B", "A"), -0.5),
        (line, "The wall is grey.\nAnswer: B. grey", 1),
        (line, "B", 1),
    )
    rollouts = (ROLLOUT.format(number=i, prompt=p, text=t, accuracy=a) for i, (p, t, a) in enumerate(samples))
    write(tmp_path / "training_logs/one/rollout_results.md", "\n" + "".join(rollouts))
    by_tags, by_line = logs.table([tmp_path])
    assert by_tags[1:] == ("tags", "2", "100.0", "2", "100.0", "50.0", "50.0", "50.0", "100.0")
    assert by_line[1:] == ("answer-line", "2", "50.0", "0", "-", "100.0", "50.0", "50.0", "100.0")


def test_options_that_stand_beside_the_question_are_part_of_it(logs: Any, tmp_path: Path):
    asked = {"id": "1", "question": "How long is it?", "options": ["3 cm", "4 cm"], "answer": "B"}
    replies = ("It is twice as long.\nSo it is $\\boxed{4 cm}$.", "It is twice as long.\nSo it is $\\boxed{3 cm}$.")
    answers = [{"id": "1", "response": reply, "correct": right} for reply, right in zip(replies, (1, 0), strict=True)]
    write(tmp_path / "math/data/test.jsonl", json.dumps(asked))
    write(tmp_path / "math/outputs/open/Model/Model-CoT.jsonl", "\n".join(map(json.dumps, answers)))
    pro = {"question": "Which?", "options": "['red', 'grey']", "answer": "B", "if_right": True}
    write(
        tmp_path / "pro/mmmu-pro/output/m_cot.jsonl", json.dumps(pro | {"response": "The wall is grey.\nAnswer: grey"})
    )
    vista = {"question": "Which?", "choices": ["red", "grey"], "answer": "grey", "extraction": "(B)"}
    rows = {"1": vista | {"true_false": True}, "2": vista}  # the log did not judge the second one
    write(tmp_path / "vista/results/llava/output_llava.json", json.dumps(rows))
    math, mmmu, given = logs.table([tmp_path / "math", tmp_path / "pro", tmp_path / "vista"])
    assert math[1:] == ("boxed", "2", "100.0", "0", "-", "50.0", "50.0", "50.0", "100.0")
    assert mmmu[1:3] == ("answer-line", "1")
    assert mmmu[6:] == ("100.0", "100.0", "100.0", "100.0")
    assert given[1:] == ("answer alone", "1", "100.0", "0", "-", "100.0", "100.0", "100.0", "100.0")


def test_a_folder_without_logs_is_an_error(logs: Any, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds none of the logs"):
        logs.table([tmp_path])
