"""The parts of `benchmarks/gpu.py` that need no GPU: what is missing, time limits, and the table of what was found."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu  # type: ignore[import-not-found]

    return gpu


def test_what_is_missing_is_one_sentence_before_anything_is_written(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    find_spec = importlib.util.find_spec
    absent = ("peft", "pydantic")
    monkeypatch.setattr(gpu.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(tmp_path / "gpu.json")])
    assert gpu.main() == 2
    message = capsys.readouterr().err
    assert "lacks peft, pydantic: " in message
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_command_out_of_time_is_killed_with_its_children_and_what_it_said_is_kept(gpu: Any, tmp_path: Path):
    child = "import time; time.sleep(1.5); open('late', 'w')"
    code = (
        f"import subprocess, sys, time; print('so far', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    log = tmp_path / "log"
    assert gpu.run([sys.executable, "-c", code], 1, log) == "out of time after 1 seconds"
    assert log.read_text() == "so far\n"
    assert gpu.run([sys.executable, "-c", "print('all')"], 60, log) == "done"
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], 60, log) == "failed with exit code 3"
    time.sleep(0.7)
    assert not (gpu.ROOT / "late").exists()


def test_a_part_that_fails_keeps_what_it_found_and_harms_no_other(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    path = tmp_path / "gpu.json"

    def run(command: list[str], limit: float, log: Path, environment: dict[str, str]) -> str:
        log.write_text("tests/test_gpu.py::test_one PASSED\nTraceback")
        if "bench" in command:
            (tmp_path / "gpu-bench.json").write_text(json.dumps({"sizes": [SIZE], "ceilings": CEILINGS}))
            return "failed with exit code 1"
        return "done"

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--json", str(path)])
    assert gpu.main() == 1
    result = json.loads(path.read_text())
    assert result["parts"]["bench"]["last_lines"] == ["tests/test_gpu.py::test_one PASSED", "Traceback"]
    assert result["parts"]["tests"]["outcomes"] == {"test_one": "passed"}
    assert {row["what"] for row in result["table"]} >= {"GPU tests", "doctor", "bench", "16 images: decode"}


CEILINGS = {"flops_per_second": 8e14, "bytes_per_second": 3e12}
SIZE = {
    "images_per_step": 16,
    "image_tokens": 1024,
    "prompt_tokens": 1300,
    "sides": {
        "ours": {
            "seconds": {"decode": 4.0, "update": 6.0},
            "floor_seconds": {"decode": 2.0, "update": 3.0},
            "step_seconds": 12.0,
            "trajectories_per_second": 80 / 12,
            "peak_bytes": 60 * 2**30,
        }
    },
}


def test_figures_beside_their_aims_by_hand(gpu: Any):
    # Published: 16 images of 20 + 5 s take 400 s, 33.3 times our 12 s. Decoding: 4 s / 2 s. The update: 3 s / 6 s.
    rows = {row["what"]: row for row in gpu.rows_of(SIZE, {"solve": 20.0, "update": 5.0})}
    assert rows["16 images: decode"]["found"] == "4.00 s, 2.00 times its floor"
    assert rows["16 images: update"]["found"] == "6.00 s, 50% of the matrix product's rate"
    assert rows["16 images: published"]["found"] == "400 s, 33.3 times ours (extrapolated)"
    assert [rows[f"16 images: {name}"]["met"] for name in gpu.AIMS] == [True, True, True]
    slower = {**SIZE, "sides": {"ours": {**SIZE["sides"]["ours"], "seconds": {"decode": 5.2, "update": 8.0}}}}  # type: ignore[index]
    rows = {row["what"]: row for row in gpu.rows_of(slower, {"solve": 10.0})}
    assert [rows[f"16 images: {name}"]["met"] for name in gpu.AIMS] == [False, False, False]


def test_extrapolation_by_hand(gpu: Any):
    # Each of the 24 more tokens took 0.125 s; 224 more take 28 s. The update reads 1,000 + 256 tokens instead of 1,032.
    timed = {32: {"propose": 1.0, "solve": 5.0, "update": 2.0}, 8: {"propose": 1.1, "solve": 2.0, "update": 2.0}}
    found = gpu.extrapolated(timed, 256, 1000)
    assert found == pytest.approx({"propose": 1.0, "solve": 33.0, "update": 2.0 * 1256 / 1032})


def test_tests_that_ended_are_counted_in_a_log_that_ends_early(gpu: Any):
    log = """===== test session starts =====
tests/test_gpu.py::test_one PASSED
tests/test_gpu.py::test_two[a] errors of the gradient in bfloat16: shared 0.02 plain 0.02
PASSED
tests/test_gpu.py::test_two[b] FAILED
tests/test_gpu.py::test_three SKIPPED (is about CUDA)
tests/test_gpu.py::test_four
"""
    found = gpu.tests_found(log)
    assert (found["passed"], found["failed"], found["error"], found["skipped"]) == (2, 1, 0, 1)
    assert found["outcomes"]["test_two[b]"] == "failed"
    assert len(found["figures"]) == 1
    summary = """===== warnings summary =====
tests/test_gpu.py::test_two[a]
SKIPPED [1] tests/test_gpu.py:103: is about CUDA
"""
    assert gpu.tests_found(log + summary) == found
