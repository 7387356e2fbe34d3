"""Paired comparisons over lmms-eval's sample logs; the numbers are worked out by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ireasoner.app.cli import main
from ireasoner.method.types import UsageError
from ireasoner.studies import compare
from ireasoner.studies.compare import compare_logs, mcnemar
from ireasoner.training.statistics import MEASURES

RECORDED = Path(__file__).parent / "data" / "lmms_eval"
A = [1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
B = [1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0]  # five wins, one loss, ten ties


def sample(number: int, **more: Any) -> dict[str, Any]:
    """A line as lmms-eval 0.7.3 writes it."""
    return {
        "doc_id": number, "target": f"answer {number}", "filtered_resps": "2", "token_counts": [{"output_tokens": 3}],
        "doc_hash": "74234e98", "input": f"question {number}", **more,
    }  # fmt: skip


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def logs(folder: Path, a: Sequence[Any], b: Sequence[Any], metric: str = "exact_match") -> tuple[Path, Path]:
    """Two logs, whose documents have these scores."""
    rows = [[sample(number, **{metric: score}) for number, score in enumerate(scores)] for scores in (a, b)]
    names = [folder / model / "20260101_000000_samples_task.jsonl" for model in ("a", "b")]
    return write(names[0], rows[0]), write(names[1], rows[1])


def test_the_difference_its_interval_and_the_exact_test(tmp_path: Path):
    (row,) = compare_logs(*logs(tmp_path, A, B)).rows
    assert (row.task, row.metric, row.documents) == ("task", "exact_match", 16)
    assert (row.a, row.b) == (6 / 16, 10 / 16)
    assert (row.wins, row.losses, row.ties) == (5, 1, 10)
    # The 16 differences have the mean 1/4 and the variance 1/3; 97.5 % of Student's t with 15 degrees lie below 2.1314.
    half = 2.13145 * (1 / 3 / 16) ** 0.5
    assert row.difference["mean"] == 0.25
    assert (row.difference["low"], row.difference["high"]) == pytest.approx((0.25 - half, 0.25 + half), abs=1e-5)
    # Of six documents that one model alone gets right, at most one is lost: 2 · (1 + 6) / 2⁶.
    assert row.test == "McNemar"
    assert row.difference["p"] == pytest.approx(14 / 64)


@pytest.mark.parametrize(("wins", "losses", "p"), [(0, 0, 1), (3, 3, 1), (6, 0, 2 / 64), (1, 5, 14 / 64)])
def test_mcnemar(wins: int, losses: int, p: float):
    assert mcnemar(wins, losses) == pytest.approx(p)


def test_mcnemar_of_very_many_documents():
    assert mcnemar(100_000, 90_000) < 1e-100
    assert mcnemar(100_000, 99_900) == pytest.approx(0.8245, abs=1e-3)  # of the normal one: 99 / √199900


def test_scores_between_right_and_wrong_are_tested_by_sign_flips(tmp_path: Path):
    (row,) = compare_logs(*logs(tmp_path, [0.2, 0.2, 0.2], [0.7, 0.7, 0.7], "anls")).rows
    assert row.test == "sign flips"
    assert row.difference["mean"] == pytest.approx(0.5)
    assert row.difference["p"] == pytest.approx(2 / 8, abs=0.02)  # all three the same way, of eight ways


def test_documents_about_one_image_are_no_independent_evidence(tmp_path: Path):
    names = logs(tmp_path, [0] * 6, [1] * 6)
    alone = compare_logs(*names).rows[0]
    for path in names:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write(path, [{**row, "input_media": [f"{row['doc_id'] // 3}.png"]} for row in rows])
    together = compare_logs(*names).rows[0]
    assert alone.test == "McNemar"
    assert alone.difference["p"] == pytest.approx(2 / 64)
    assert together.test == "sign flips"
    assert together.difference["p"] == pytest.approx(2 / 4, abs=0.02)  # two images both the same way, of four ways


def test_scores_of_another_scale_keep_it(tmp_path: Path):
    one = compare_logs(*logs(tmp_path / "one", A, B)).rows[0]
    percent = compare_logs(*logs(tmp_path / "percent", [100 * x for x in A], [100 * x for x in B])).rows[0]
    assert percent.test == "sign flips"
    for name in ("mean", "low", "high"):
        assert percent.difference[name] == pytest.approx(100 * one.difference[name])


def test_a_metric_may_be_an_object_with_a_score(tmp_path: Path):
    """As in MME, POPE and MMStar; what has no number, such as a submission, is no metric."""
    rows = [[sample(n, acc={"category": "x", "score": score}, submission={"id": n}, note="text") for n, score in
             enumerate(scores)] for scores in (A, B)]  # fmt: skip
    names = [write(tmp_path / f"{model}_samples_t.jsonl", each) for model, each in zip("ab", rows, strict=True)]
    (row,) = compare_logs(*names).rows
    assert (row.metric, row.wins, row.losses) == ("acc", 5, 1)


def test_every_metric_and_every_filter_has_a_row(tmp_path: Path):
    """Of a task with two filters, every document is logged twice; some metrics are of a part of the documents."""
    names = []
    for model, strict in (("a", 0), ("b", 1)):
        human = [{"human": 1} if number < 2 else {} for number in range(3)]
        rows = [sample(number, exact=strict, **human[number]) for number in range(3)]
        rows += [sample(number, exact=1, **human[number]) for number in range(3)]
        names.append(write(tmp_path / f"{model}_samples_t.jsonl", rows))
    rows = {row.metric: row for row in compare_logs(*names).rows}
    assert list(rows) == ["exact", "human", "exact, filter 2", "human, filter 2"]
    assert rows["human"].documents == 2
    assert (rows["exact"].wins, rows["exact, filter 2"].wins) == (3, 0)
    (row,) = compare_logs(*names, "human").rows
    assert row.metric == "human"
    with pytest.raises(UsageError, match="no metric 'anls' in common: exact, human"):
        compare_logs(*names, "anls")


def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Logs of two models, of two tasks that both have and one that the first has alone."""
    for model, scores in (("a", A), ("b", B)):
        for task in ("chart", "doc"):
            rows = [sample(number, exact_match=score) for number, score in enumerate(scores)]
            write(tmp_path / model / "name__of" / f"20260102_000000_samples_{task}.jsonl", rows)
    write(tmp_path / "a" / "name__of" / "20260102_000000_samples_only.jsonl", [sample(0, exact_match=1)])
    return tmp_path / "a", tmp_path / "b"


def test_folders_are_compared_task_by_task_and_over_all(tmp_path: Path):
    found = compare_logs(*folders(tmp_path))
    assert [row.task for row in found.rows] == ["chart", "doc", "all tasks"]
    assert found.notes == ["Only one of the two was asked only."]
    every = found.rows[2]
    assert (every.documents, every.wins, every.losses) == (32, 10, 2)
    assert every.difference["p"] == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert every.difference["high"] - every.difference["low"] < found.rows[0].difference["high"] - 0.057649


def test_the_newest_log_of_a_task_counts(tmp_path: Path):
    a, b = folders(tmp_path)
    old = [sample(number, exact_match=1) for number in range(3)]
    write(b / "name__of" / "20260101_235959_samples_chart.jsonl", old)
    assert compare_logs(a, b).rows[0].documents == 16
    write(b / "name__of" / "20260103_000000_samples_chart.jsonl", old)
    with pytest.raises(UsageError, match="not about the same documents: 13 are in one of them alone"):
        compare_logs(a, b)


def test_a_folder_with_logs_of_two_models_is_refused(tmp_path: Path):
    folders(tmp_path)
    with pytest.raises(UsageError, match="holds logs of several models"):
        compare_logs(tmp_path, tmp_path / "b")


def test_tasks_on_different_scales_are_not_pooled(tmp_path: Path):
    a, b = folders(tmp_path)
    for folder in (a, b):
        write(folder / "name__of" / "20260102_000000_samples_doc.jsonl", [sample(0, total=80), sample(1, total=20)])
    found = compare_logs(a, b)
    assert [row.task for row in found.rows] == ["chart", "doc"]
    assert found.notes[-1] == "There is no row of all tasks: not all scores lie between 0 and 1."


def test_different_prompts_are_told(tmp_path: Path):
    a, b = logs(tmp_path, A, B)
    write(b, [{**json.loads(line), "input": "shorter"} for line in b.read_text().splitlines()])
    assert compare_logs(a, b).notes == ["task: the two were given different text for 16 of 16 documents."]


def test_different_documents_are_refused(tmp_path: Path):
    a, b = logs(tmp_path, A, B)
    rows = [json.loads(line) for line in b.read_text().splitlines()]
    write(b, [*rows[:-1], {**rows[-1], "target": "another"}])
    with pytest.raises(UsageError, match="document 15 is 'answer 15' in one and 'another' in the other"):
        compare_logs(a, b)
    write(b, rows[:-2])
    with pytest.raises(UsageError, match="2 are in one of them alone"):
        compare_logs(a, b)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (b'{"doc_id": 0}\n', "line 17, is not a sample of lmms-eval"),
        (b"\xff\xfe\n", "line 17, is not a sample"),
        (b"[" * 100_000 + b"\n", "line 17, is not a sample"),
        (b'{"doc_id": 16, "target": "x", "exact_match": NaN}\n', "line 17: exact_match is no finite number"),
        (b'{"doc_id": 16, "target": "x", "exact_match": 1' + b"0" * 400 + b"}\n", "line 17: exact_match is no finite"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes, said: str):
    a, b = logs(tmp_path, A, B)
    a.write_bytes(a.read_bytes() + damage)
    with pytest.raises(UsageError, match=said):
        compare_logs(a, b)


def test_a_line_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compare, "LONGEST", 1 << 20)
    a, b = logs(tmp_path, A, B)
    a.write_bytes(b" " * (2 << 20))
    with pytest.raises(UsageError, match="a line of more than 1 MiB"):
        compare_logs(a, b)


def test_what_is_no_log_is_refused(tmp_path: Path):
    a, b = logs(tmp_path, A, B)
    with pytest.raises(UsageError, match="there is no sample log"):
        compare_logs(a, tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe_samples_t.jsonl")
    with pytest.raises(UsageError, match="there is no sample log"):
        compare_logs(a, tmp_path / "pipe_samples_t.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="which lmms-eval writes with --log_samples"):
        compare_logs(tmp_path / "empty", b)
    write(b, [])
    with pytest.raises(UsageError, match="holds no samples"):
        compare_logs(a, b)
    write(b, [sample(number, f1=1) for number in range(16)])
    with pytest.raises(UsageError, match="no metric in common: exact_match and f1"):
        compare_logs(a, b)


def evaluation(path: Path, scores: Sequence[float], **changes: Any) -> Path:
    """What `ireasoner eval --json` writes, as far as it is read; two questions about each image."""
    asked = [{"image": f"{n // 2}.png", "question": f"question {n}", "answer": str(n)} for n in range(len(scores))]
    columns = {name: list(scores) for name in MEASURES}
    path.write_text(json.dumps({"match": "exact", "asked": asked, "per_question": columns, **changes}))
    return path


def test_evaluations_of_our_own_are_compared_too(tmp_path: Path):
    a, b = evaluation(tmp_path / "a.json", A), evaluation(tmp_path / "b.json", B)
    rows = {row.metric: row for row in compare_logs(a, b).rows}
    assert list(rows) == list(MEASURES)
    assert (rows["greedy"].wins, rows["greedy"].losses, rows["greedy"].test) == (5, 1, "sign flips")
    evaluation(b, B[:-1])
    with pytest.raises(UsageError, match="not about the same documents: 1 are in one of them alone"):
        compare_logs(a, b)


@pytest.mark.parametrize(
    "changes", [{"asked": []}, {"asked": [{}]}, {"per_question": {"before": {}, "after": {}}}, {"asked": "text"}]
)
def test_what_eval_did_not_write_is_refused(tmp_path: Path, changes: dict[str, Any]):
    a, b = evaluation(tmp_path / "a.json", A), evaluation(tmp_path / "b.json", B, **changes)
    with pytest.raises(UsageError, match=r"b\.json is not what ireasoner eval --json wrote of one model"):
        compare_logs(a, b)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    a, b = logs(tmp_path, A, B)
    out = tmp_path / "out.json"
    assert main(["compare", str(a), str(b), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    for text in ("exact_match", "0.375", "0.625", "+0.25 [-0.0576, +0.558]", "0.2188", "McNemar"):
        assert text in printed
    (row,) = json.loads(out.read_text())["rows"]
    assert row["difference"]["p"] == pytest.approx(14 / 64)
    assert main(["compare", str(a), str(tmp_path)]) == 2
    assert "several models" in capsys.readouterr().err


def test_real_logs():
    """Of lmms-eval 0.7.3: the tiny model and an export of 40 steps, on 60 of the playground's questions."""
    found = compare_logs(RECORDED / "base", RECORDED / "trained")
    (row,) = found.rows
    assert (row.task, row.metric, row.test) == ("labelled_questions", "exact_match", "McNemar")
    assert (row.a, row.b) == (14 / 60, 41 / 60)  # the shares that lmms-eval itself printed: 0.2333 and 0.6833
    assert (row.wins, row.losses, row.ties) == (32, 5, 23)
    assert row.difference["p"] == pytest.approx(2 * (1 + 37 + 666 + 7770 + 66045 + 435897) / 2**37)
    assert found.notes == []
