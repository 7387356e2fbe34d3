"""`ireasoner view`: what it answers to whom, what it makes of hostile and vanishing runs, and the page in a browser."""

from __future__ import annotations

import fcntl
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

import forked
from ireasoner.method.types import UsageError
from ireasoner.page import write_report
from ireasoner.page.curves import LINES, chart, draw_svg, overlay, panels, panels_together
from ireasoner.page.gallery import select
from ireasoner.page.many import ManyRuns
from ireasoner.page.overview import find_runs, overview
from ireasoner.page.page import Page as Rendered
from ireasoner.page.page import Query
from ireasoner.page.run import LARGEST_PICTURE, TAILS, RecordedRun
from ireasoner.playground.truth import truth_beside
from ireasoner.training.config import Config
from ireasoner.training.recorder import RunDirectoryError, is_locked, writer_lock
from runs import HOSTILE, METRICS, episode, new_run, played_run, probe, unreadable, with_metrics

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

IDLE = "!document.querySelector('[aria-busy]')"
LOADED = "[...document.querySelectorAll('.panel img')].every(i => !i.checkVisibility() || i.complete && i.naturalWidth)"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")


@contextmanager
def viewing(run: Path, *options: str) -> Iterator[tuple[str, int]]:
    """`ireasoner view` as a user starts and ends it; yields its address and port."""
    with (
        TemporaryDirectory() as output,
        forked.start("view", run, "--no-browser", *options, output=Path(output)) as process,
    ):
        address = re.compile(r"(http://127\.0\.0\.1:(\d+)/)")
        process.wait_until(lambda: address.search(process.printed()) is not None)
        found = address.search(process.printed())
        assert found, process.wait()
        try:
            yield found[1], int(found[2])
        finally:
            process.send(signal.SIGINT)
            done = process.wait(20)
            assert (done.returncode, done.stderr) == (0, "")


def get(port: int, path: str, host: str | None = None) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    body = answer.read().decode("utf-8", "replace")
    connection.close()
    return answer.status, dict(answer.getheaders()), body


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, with the truth about its images inside it, and accuracy on held-out questions."""
    out = tmp_path_factory.mktemp("played") / "run"
    played_run(out)
    return out


@pytest.fixture(scope="module")
def viewed(played: Path) -> Iterator[tuple[str, int]]:
    """The address and port of a viewer of that run."""
    with viewing(played) as found:
        yield found


# --- what it answers --------------------------------------------------------------------------------------------------


def test_every_part_is_served_under_a_strict_policy(played: Path, viewed: tuple[str, int]):
    _, port = viewed
    kinds = {
        "/": "text/html",
        "/style.css": "text/css",
        "/page.js": "text/javascript",
        "/pulse": "application/json",
    }
    kinds |= {f"/part/{part}": "text/html" for part in ("working", "episodes", "agreement", "change", "ran")}
    for path, kind in kinds.items():
        status, headers, body = get(port, path)
        assert (status, headers["content-type"].partition(";")[0]) == (200, kind), path
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert body
    status, headers, body = get(port, "/curves/0.svg?v=1")
    assert (status, headers["content-type"]) == (200, "image/svg+xml")
    name = next((played / "images").iterdir()).name
    assert get(port, f"/images/{name}")[0] == 200
    page = get(port, "/")[2]
    assert not re.search(r"\sstyle=|\son\w+=|https?://", page)


def test_hosts_that_are_not_loopback_are_refused(viewed: tuple[str, int]):
    _, port = viewed
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "192.168.0.1",
        "",
        "localhost.evil",
    ):
        assert get(port, "/", host or " ")[0] == 400, host
        assert get(port, "/pulse", host or " ")[0] == 400, host
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost"):
        assert get(port, "/", host)[0] == 200, host


def test_nothing_but_its_own_is_served(played: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(played, run)
    (tmp_path / "secret.png").write_bytes(b"the secret of the house")
    (run / "images" / "00000000.png").symlink_to(tmp_path / "secret.png")
    places = (
        "/images/../config.yaml", "/images/..%2fconfig.yaml", "/images/%2e%2e/config.yaml", "/images/00000000.png",
        "/images/..%2f..%2fsecret.png", "/images//etc/passwd", "/images/%00.png", "/images/", "/config.yaml",
        "/curves/99.svg", "/curves/-1.svg", "/part/page", "/part/..%2fpage", "/templates/page.html",
    )  # fmt: skip
    with viewing(run) as (_, port):
        for place in places:
            status, _, body = get(port, place)
            assert status == 404, place
            assert "secret" not in body
        for query in (
            "?show=%00&q=%ff&from=-1&to=1e9&page=99999999999",
            "?q=" + "x" * 5000,
            "?page=3&show=../..",
            "?q=%3Cb%3E",
        ):
            status, _, body = get(port, f"/part/episodes{query}")
            assert status == 200, query
            assert "<b>" not in body


def test_mistakes_are_told_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from ireasoner.app.cli import main

    run = with_metrics(new_run(tmp_path / "run")).run_dir
    (tmp_path / "bad" / "images").mkdir(parents=True)
    (tmp_path / "bad" / "config.yaml").write_text("steps: [")
    (tmp_path / "truth").write_text("{}\n")
    with viewing(run) as (_, port):
        mistakes = {
            ("view", str(tmp_path / "nowhere")): "is not a run directory",
            ("view", str(tmp_path / "bad")): "this run cannot be shown",
            ("view", str(tmp_path / "bad" / "images")): "is not a run directory, and holds none",
            ("view", str(run), str(tmp_path / "nowhere")): "nowhere is not a run directory",
            ("view", str(run), "--port", str(port), "--no-browser"): f"port {port} cannot be used",
            ("view", str(run), "--port", "70000"): "port: input should be less than or equal to 65535",
            ("view", str(run), "--truth", str(tmp_path / "none")): "cannot read the truth",
            ("view", str(run), "--truth", str(tmp_path / "truth")): "does not hold lines of image and picture",
            ("report", str(tmp_path)): "is not a run directory",
            ("report", str(run), "--out", str(tmp_path / "no" / "file.html")): "cannot be written",
            ("runs", str(tmp_path / "nowhere")): "is not a folder",
        }
        for argv, message in mistakes.items():
            assert main(argv) == 2
            error = capsys.readouterr().err
            assert message in error
            assert len(error.strip().splitlines()) == 1


# --- runs that grow, break and vanish ---------------------------------------------------------------------------------


def test_a_run_is_read_as_it_grows(tmp_path: Path):
    recorder = with_metrics(new_run(tmp_path / "run"), 1)
    run = RecordedRun.open(recorder.run_dir)
    versions = {run.version}
    recorder.episode(episode(question="The first."))
    with (recorder.run_dir / "episodes.jsonl").open("ab") as file:
        file.write(json.dumps(episode(question="The second.", step=2)).encode()[:-20])  # not yet whole
    run.refresh()
    versions.add(run.version)
    assert [entry.question for entry in run.entries] == ["The first."]
    with (recorder.run_dir / "episodes.jsonl").open("ab") as file:
        file.write(json.dumps(episode(question="The second.", step=2)).encode()[-20:] + b"\n")
    run.refresh()
    versions.add(run.version)
    assert [entry.question for entry in run.entries] == ["The first.", "The second."]
    assert [e.question.text for entry in run.entries if (e := run.episode(entry))] == ["The first.", "The second."]
    assert len(versions) == 3
    assert run.damaged == 0


def test_a_run_that_went_back_is_read_anew(tmp_path: Path):
    recorder = with_metrics(new_run(tmp_path / "run"), 4)
    for step in (1, 2, 3, 4):
        recorder.episode(episode(question=f"Of step {step}.", step=step))
    run = RecordedRun.open(recorder.run_dir)
    recorder.rewind(2)
    recorder.episode(episode(question="Another.", step=3))
    run.refresh()
    assert [entry.question for entry in run.entries] == ["Of step 1.", "Of step 2.", "Another."]
    assert run.step == 2


def test_lines_that_are_no_records_are_left_out_and_counted(tmp_path: Path):
    recorder = with_metrics(new_run(tmp_path / "run"))
    deep = b"[" * 100_000 + b"]" * 100_000
    wrong = [
        b"", b"null", b"\x00\xff", deep, b'{"step": 1}', b'{"step": "x", "image": []}', b'{"step": 1e400}',
        json.dumps(episode() | {"trajectories": "many"}).encode(), json.dumps(episode() | {"step": None}).encode(),
        json.dumps(episode() | {"question": {"text": ["a"]}}).encode(),
        json.dumps(episode() | {"trajectories": episode()["trajectories"] * 1000}).encode(),
    ]  # fmt: skip
    for name in TAILS:
        with (recorder.run_dir / f"{name}.jsonl").open("ab") as file:
            file.writelines(line + b"\n" for line in wrong)
    recorder.episode(episode(question="A whole one."))
    run = RecordedRun.open(recorder.run_dir)
    assert [entry.question for entry in run.entries] == ["A whole one."]
    assert run.damaged > 3 * len(wrong)
    assert "A whole one." in write_report(recorder.run_dir, tmp_path / "page.html").read_text("utf-8")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*path, key)
        yield from leaves(item, (*path, key))


STRANGE = (
    None, True, -1, 0, 7, 10**30, -1e300, 1e-300, float("nan"), float("inf"), "", "x", "../../etc/passwd", "\ud800",
    [], {}, [[]], {"a": []}, ["a"] * 100, "x" * 10_000, [None] * 3,
)  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_a_record_of_any_kind_breaks_nothing(played: Path, tmp_path: Path, seed: int):
    """Ten values at random places of a real run's files are replaced by others; six times each."""
    rng = random.Random(seed)
    for _ in range(6):
        run = tmp_path / f"run-{rng.random()}"
        run.mkdir()
        shutil.copytree(played / "images", run / "images")
        for name in ("config.yaml", "summary.json", "versions.json", *(f"{n}.jsonl" for n in TAILS)):
            if (played / name).exists():
                shutil.copy(played / name, run / name)
        for _ in range(10):
            name = rng.choice(["summary.json", "episodes.jsonl", "metrics.jsonl", "probes.jsonl", "versions.json"])
            file = run / name
            lines = [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines()
            number = rng.randrange(len(lines))
            record = json.loads(lines[number])
            if places := list(leaves(record)):
                *way, last = rng.choice(places)
                target = record
                for key in way:
                    target = target[key]
                target[last] = rng.choice(STRANGE)
            lines[number] = json.dumps(record)
            file.write_text("\n".join(lines) + "\n")
        read = RecordedRun.open(run)
        for query in (Query(), Query("disagreement", "x", (0, 2)), Query("wrong", page=3)):
            assert b"What ran?" in Rendered(read).render("page.html", query)
        draw_svg(chart(read, rng.choice(panels(read))))
    write_report(run, tmp_path / "page.html")


@pytest.mark.parametrize("kind", ["bomb", "deep", "number", "list", "binary"])
def test_a_config_of_any_kind_is_refused_in_one_sentence(tmp_path: Path, kind: str):
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghijkl"))
    text = {"bomb": f"{bomb}steps: *l\n", "deep": "[" * 50_000, "number": f"steps: {'9' * 5000}", "list": "- 1\n"}
    (tmp_path / "config.yaml").write_bytes(text.get(kind, "\x00\xff").encode("latin-1"))
    with pytest.raises(UsageError) as refused:
        RecordedRun.open(tmp_path)
    assert len(str(refused.value)) < 6000
    assert "\n" not in str(refused.value)


def test_the_lock_tells_a_running_run_from_a_stopped_one(tmp_path: Path):
    recorder = with_metrics(new_run(tmp_path / "run"))
    run = RecordedRun.open(recorder.run_dir)
    assert run.state == "stopped"
    with (recorder.run_dir / ".lock").open("w") as lock:
        assert run.state == "stopped"  # a lock that nobody holds
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run.state == "running"
    assert run.state == "stopped"
    recorder.write_text("summary.json", '{"stopped_early": false}')
    run.refresh()
    assert run.state == "finished"


def test_who_looks_does_not_keep_a_run_from_starting(tmp_path: Path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunDirectoryError, match="another process is training"), writer_lock(tmp_path):
            pass
    look = f"f = open({str(tmp_path / '.lock')!r}); fcntl.flock(f, fcntl.LOCK_SH); print(flush=True); time.sleep(0.15)"
    process = subprocess.Popen([sys.executable, "-c", f"import fcntl, time; {look}"], stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        with writer_lock(tmp_path):
            pass


def test_a_system_without_fcntl_can_read_runs_and_their_locks(tmp_path: Path):
    """Windows, as far as it can be played: another module for locks, and none of the name `fcntl`."""
    run = with_metrics(new_run(tmp_path / "run")).run_dir
    code = f"""
import importlib, sys, types
from pathlib import Path
from ireasoner.training import recorder
held = set()
def locking(number, mode, count):
    if held and number not in held:
        raise PermissionError(13, "Permission denied")
    held.add(number)
sys.platform = "win32"
sys.modules["fcntl"] = None
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
importlib.reload(recorder)
from ireasoner.page.many import ManyRuns
from ireasoner.page.overview import find_runs, overview
from ireasoner.page.page import Page
from ireasoner.page.run import RecordedRun
path = Path({str(run)!r})
run = RecordedRun.open(path)
states = [run.state]
with recorder.writer_lock(path):
    states += [run.state, overview(path.parent)[1][1]]
    assert b"It is running" in Page(run).render("page.html")
print(states)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("['stopped', 'running', 'running']\n", "")


def test_the_lock_goes_with_its_process_and_leaves_other_files_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "notes.txt")
    assert not is_locked(tmp_path)
    hold = "with writer_lock(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    code = f"import sys, time\nfrom pathlib import Path\nfrom ireasoner.training.recorder import writer_lock\n{hold}"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert is_locked(tmp_path)
        process.kill()
    assert not is_locked(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_was_read_stays_while_a_run_is_deleted_file_by_file(tmp_path: Path):
    recorder = with_metrics(new_run(tmp_path / "run"))
    recorder.episode(episode())
    run = RecordedRun.open(recorder.run_dir)
    for name in ("episodes.jsonl", "metrics.jsonl", "config.yaml"):
        (recorder.run_dir / name).unlink()
        run.refresh()
        assert (run.gone, len(run.entries), run.step) == (True, 1, 3)


def test_another_run_in_the_same_place_is_shown_with_its_own_config(tmp_path: Path):
    recorder = with_metrics(new_run(tmp_path / "run"), 3)
    recorder.episode(episode())
    run = RecordedRun.open(recorder.run_dir)
    version = run.version
    shutil.rmtree(recorder.run_dir)
    run.refresh()
    assert run.gone
    with_metrics(new_run(tmp_path / "run", recipe="paper", steps=9), 3)
    run.refresh()
    assert (run.gone, run.config.recipe.name, run.config.schedule.steps) == (False, "paper", 9)
    assert (run.step, run.entries) == (3, [])
    assert run.version != version


def test_truth_is_sought_again_for_another_run_in_the_same_place(tmp_path: Path):
    sought: list[str] = []

    def find_truth(config: Config) -> None:
        sought.append(config.images)

    run = RecordedRun.open(new_run(tmp_path / "run").run_dir, find_truth)
    run.refresh()
    shutil.rmtree(run.path)
    new_run(tmp_path / "run", images="/others")
    run.refresh()
    assert sought == ["/pictures", "/others"]


def test_a_config_that_cannot_be_read_yet_is_tried_again(tmp_path: Path):
    recorder = with_metrics(new_run(tmp_path / "run"))
    run = RecordedRun.open(recorder.run_dir)
    recorder.write_text("config.yaml", "steps: [")
    for _ in range(2):
        run.refresh()
        assert (run.gone, run.step, run.config.schedule.steps) == (True, 3, 3)
    new_run(tmp_path / "run", steps=7)
    run.refresh()
    assert (run.gone, run.config.schedule.steps) == (False, 7)


def test_curves_are_drawn_anew_whenever_the_run_has_changed(tmp_path: Path):
    recorder = with_metrics(new_run(tmp_path / "run"), 30)
    with viewing(recorder.run_dir) as (_, port):
        page, before = get(port, "/")[2], get(port, "/curves/1.svg")[2]
        recorder.write_text("summary.json", json.dumps({"stopped_early": True, "best_step": 20, "steps": 30}))
        later = get(port, "/")[2]
        assert get(port, "/curves/1.svg")[2] != before  # where it went back to is dotted
        asked = [re.findall(r"curves/1\.svg\?v=[^\"]+", text) for text in (page, later)]
        assert asked[0] != asked[1]  # or the browser would show what it kept
        recorder.rewind(10)
        for step in range(11, 31):
            recorder.metrics(step, METRICS | {"answers/majority_fraction": 0.1})
        drawn = get(port, "/curves/1.svg")[2]
        assert get(port, "/pulse")[0] == 200
        assert get(port, "/curves/1.svg")[2] != drawn
    with viewing(recorder.run_dir) as (_, port):
        again = re.findall(r"curves/1\.svg\?v=[^\"]+", get(port, "/")[2])
        assert len(again) == 1
        assert again not in asked  # nor what it kept of another viewer at this address


def test_links_out_of_a_run_lead_nowhere(tmp_path: Path):
    outside = tmp_path / "outside"
    (outside / "step-000001").mkdir(parents=True)
    recorder = with_metrics(new_run(tmp_path / "run"))
    (recorder.run_dir / "checkpoints").symlink_to(outside)
    (recorder.run_dir / "images" / "00000000.png").write_bytes(b"\x89PNG" + bytes(LARGEST_PICTURE))
    run = RecordedRun.open(recorder.run_dir)
    assert b"step-000001" not in Rendered(run).render("ran.html")
    assert run.thumbnail("images/00000000.png") is None


@pytest.mark.parametrize("images", ["/", ".", "''", '"\\0"', "loop/x"])
def test_whatever_a_config_calls_its_images_it_opens(tmp_path: Path, images: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    recorder = with_metrics(new_run(tmp_path / "run"))
    config = (recorder.run_dir / "config.yaml").read_text()
    recorder.write_text("config.yaml", config.replace("images: /pictures", f"images: {images}"))
    run = RecordedRun.open(recorder.run_dir, lambda config: truth_beside(config.images, recorder.run_dir))
    assert run.true_answer("a.png", "How many?") is None


def test_malformed_text_is_found_too(tmp_path: Path):
    recorder = with_metrics(new_run(tmp_path / "run"))
    record = episode()
    record["trajectories"][2]["text"] = "A Zebra that never closes"
    recorder.episode(record)
    recorder.episode(unreadable(text="a giraffe, unasked"))
    run = RecordedRun.open(recorder.run_dir)
    assert [len(select(run, text=text)) for text in ("zebra", "giraffe", "unicorn")] == [1, 1, 0]


def test_a_run_deleted_under_the_viewer_leaves_what_was_read(tmp_path: Path):
    recorder = with_metrics(new_run(tmp_path / "run"))
    recorder.episode(episode(question="Before the end."))
    with viewing(recorder.run_dir) as (_, port):
        assert "Before the end." in get(port, "/")[2]
        shutil.rmtree(recorder.run_dir)
        for path in ("/", "/part/working", "/part/episodes", "/part/ran", "/curves/0.svg"):
            assert get(port, path)[0] == 200, path
        assert "The run directory is gone" in get(port, "/")[2]
        assert json.loads(get(port, "/pulse")[2])["state"] == "gone"


def test_runs_are_listed_with_state_and_result(played: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from ireasoner.app.cli import main

    shutil.copytree(played, tmp_path / "group" / "real")
    with_metrics(new_run(tmp_path / "\x1b[31mcut"), 2)
    new_run(tmp_path / "fresh")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("some: thing\n")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "config.yaml")
    old = with_metrics(new_run(tmp_path / "old")).run_dir / "config.yaml"
    old.write_text("images: /pictures\nmodel: tiny\nsteps: 3\n")  # of version 0.1
    rows = {row[0]: row[1:] for row in overview(tmp_path)[1:]}
    assert set(rows) == {"group/real", "\x1b[31mcut", "fresh", "old"}
    assert rows["old"][0] == "unreadable"
    assert "written by ireasoner 0.1" in rows["old"][5]
    assert rows["group/real"][:1] + rows["group/real"][4:5] == ["finished", "4/4"]
    assert re.fullmatch(r"greedy [\d.]+ → [\d.]+ % \([+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]\)", rows["group/real"][5])
    assert rows["\x1b[31mcut"][4:] == ["2/3", "reward 0.500, majority 0.700"]
    assert rows["fresh"][4:] == ["0/3", ""]
    assert main(["runs", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "group/real" in printed
    assert "\x1b" not in printed
    (tmp_path / "none").mkdir()
    assert main(["runs", str(tmp_path / "none")]) == 0
    assert "demo" in capsys.readouterr().out
    with pytest.raises(UsageError):
        overview(tmp_path / "nowhere")


def test_viewing_imports_no_torch(played: Path):
    code = f"""
import sys
from pathlib import Path
from ireasoner.page.page import Page, write_report
from ireasoner.page.server import Viewer, application
from ireasoner.page.many import ManyRuns
from ireasoner.page.overview import find_runs, overview
from ireasoner.page.run import RecordedRun
run = RecordedRun.open(Path({str(played)!r}))
Page(run).render("page.html")
application(Viewer(run).routes())
overview(Path({str(played)!r}))
print(sorted(set(sys.modules) & {{"torch", "transformers", "peft", "accelerate", "safetensors"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def tab(browser: Browser, width: int = 1280, **options: Any) -> Iterator[Page]:
    """A page that must neither complain, nor be asked for anything, nor reach for another machine."""
    complaints: list[str] = []
    asked: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.on("console", hear)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    yield page
    assert page.evaluate("window.pwned") is None
    context.close()
    assert complaints == []
    assert all(url.startswith(("http://127.0.0.1:", "data:", "file:")) for url in asked)


def until(page: Page, condition: str, tick: int = 0) -> None:
    """Wait for a condition; `wait_for_function` would need `unsafe-eval`, which the page's policy forbids.

    `tick` milliseconds pass on the page's own clock, which then has to be installed, for each tenth of a second.
    """
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
        if tick:
            page.clock.run_for(tick)
    raise AssertionError(condition)


@needs_browser
def test_a_real_run_in_a_browser(viewed: tuple[str, int], browser: Browser):
    with tab(browser) as page:
        page.goto(viewed[0])
        assert page.locator("#state").inner_text() == "finished"
        assert "8 held-out questions about 4 images" in page.locator(".verdict").inner_text()
        assert page.locator(".panel img").count() >= 11
        until(page, LOADED)
        articles = page.locator("article")
        assert articles.count() == 12  # of the 16
        page.get_by_role("link", name="Next").click()
        until(page, "document.querySelectorAll('article').length === 4")

        page.get_by_label("Show").select_option("most disagreement")
        until(page, "document.querySelectorAll('article').length === 12")
        entropies = [float(x) for x in re.findall(r"entropy ([\d.]+)", page.locator("#episodes").inner_text())]
        assert entropies == sorted(entropies, reverse=True)
        name = page.locator("article .head .hint .said:first-child").nth(3).inner_text()
        page.get_by_label("with").fill(name)
        until(page, f"{IDLE} && document.querySelectorAll('article').length < 12")
        assert set(page.locator("article .head .hint .said:first-child").all_inner_texts()) == {name}
        assert f"q={name.replace('/', '%2F')}" in page.url  # can be shared


@needs_browser
def test_steps_are_coloured_and_reward_terms_add_up_in_a_browser(viewed: tuple[str, int], browser: Browser):
    with tab(browser) as page:
        page.goto(f"{viewed[0]}?show=disagreement")
        page.locator("article > details > summary").nth(1).click()
        opened = page.locator("article").nth(1)
        assert opened.locator(".trajectory").count() == 5
        assert opened.locator(".group.majority").count() == 1
        colours = page.evaluate(
            "[...document.querySelectorAll('.trajectory li')].filter(li => li.offsetParent)"
            ".map(li => [li.className, getComputedStyle(li).backgroundColor, li.title])"
        )
        shades = {name: colour for name, colour, _ in colours if name != "none"}
        assert len(shades) > 1
        assert len(set(shades.values())) == len(shades)
        for name, _, title in colours:
            number = re.match(r"agreement (\d\.\d+)", title)
            assert (number is None) == (name == "none")
            assert number is None or round(10 * float(number[1])) == int(name[1:])
        assert page.get_by_text("does not add up").count() == 0
        trajectories = opened.locator(".trajectory").all()
        for trajectory in trajectories:  # by hand, as a reader would
            reward = trajectory.locator("tr[data-name=reward]").inner_text()
            total, a, outcome, b, agreement = map(float, re.findall(r"\d+\.?\d*", reward))
            assert total == pytest.approx(a * outcome + b * agreement, abs=2e-4)
            text = trajectory.locator("tr[data-name=outcome]").inner_text()
            value, share, length, new = map(float, re.findall(r"\d\.\d{4}", text))
            assert (value, outcome) == (pytest.approx(share * length * new, abs=2e-4), value)
            assert float(trajectory.locator("tr[data-name='step agreement'] td").nth(0).inner_text()) == agreement
            titles = [li.get_attribute("title") or "" for li in trajectory.locator("li").all()]
            counts = [float(found[1]) for title in titles if (found := re.search(r"counts (\d\.\d+)", title))]
            assert agreement == pytest.approx(sum(counts) / len(counts) if counts else 0.0, abs=2e-4)
        assert opened.locator(".heat td").count() > 0


@needs_browser
def test_what_a_model_wrote_stays_text_in_a_browser(tmp_path: Path, browser: Browser):
    recorder = with_metrics(new_run(tmp_path / "run"))
    for text in HOSTILE:
        recorder.episode(episode(text, question=text))
        recorder.episode(unreadable(text=text))
        recorder.probe(probe(0, text, text, question=text, reasoning_steps=[text]))
        recorder.skip(1, text, text)
    with viewing(recorder.run_dir) as (address, _), tab(browser) as page:
        page.goto(address)
        page.get_by_label("with").fill("<script>")
        until(page, f"{IDLE} && document.querySelectorAll('article').length < 12")
        for summary in page.locator("article > details > summary").all():
            summary.click()
        assert "<script>window.pwned = 1</script>" in page.locator("#episodes").inner_text()
        assert page.locator("#episodes script, #episodes iframe, #episodes img").count() == 0
    with tab(browser) as page:
        page.goto(write_report(recorder.run_dir, tmp_path / "page.html").as_uri())
        assert "<script>window.pwned = 1</script>" in page.locator("#episodes").inner_text()
        assert page.locator("main iframe").count() == 0


@needs_browser
def test_the_report_filters_and_searches_without_a_server(played: Path, tmp_path: Path, browser: Browser):
    with tab(browser) as page:
        page.goto(write_report(played, tmp_path / "page.html").as_uri())
        until(page, LOADED)
        shown = page.locator("article:not([hidden])")
        assert shown.count() == 16
        page.get_by_label("Show").select_option("most disagreement")
        entropies = [float(x) for x in re.findall(r"entropy ([\d.]+)", page.locator("#episodes").inner_text())]
        assert entropies == sorted(entropies, reverse=True)
        name = shown.nth(2).locator(".head .hint .said").first.inner_text()
        page.get_by_label("with").fill(name)
        assert 0 < shown.count() < 16
        assert page.locator("#count").inner_text().startswith(f"{shown.count()} of 16 episodes")


@needs_browser
def test_curves_are_read_out_at_a_step(played: Path, viewed: tuple[str, int], browser: Browser):
    with tab(browser) as page:
        page.goto(viewed[0])
        panel = page.locator(".panel").nth(1)
        assert " → " in panel.locator("output").inner_text()
        page.get_by_label("Read the curves at step").focus()
        page.keyboard.press("Home")  # a range is moved by keys
        metrics = RecordedRun.open(played).metrics[0]
        assert float(panel.locator("output").inner_text()) == pytest.approx(
            metrics["answers/majority_fraction"], rel=0.01
        )
        assert page.locator("#at-value").inner_text() == "1"
        page.get_by_role("link", name="Episodes of this step").click()
        until(page, "document.querySelectorAll('article').length === 4")
        assert set(re.findall(r"step (\d+) ·", page.locator("#episodes").inner_text())) == {"1"}


@needs_browser
def test_the_page_is_reached_by_keys_alone(viewed: tuple[str, int], browser: Browser):
    with tab(browser) as page:
        page.goto(viewed[0])
        page.get_by_label("Show").focus()
        page.keyboard.press("ArrowDown")
        until(page, "location.search.includes('show=disagreement')")
        summary = page.locator("article > details > summary").nth(1)
        summary.focus()
        page.keyboard.press("Enter")
        assert page.locator("article").nth(1).locator(".trajectory").first.is_visible()
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"


@needs_browser
def test_episodes_are_gone_through_by_keys(viewed: tuple[str, int], browser: Browser):
    with tab(browser) as page:
        page.goto(viewed[0])
        opened = "[...document.querySelectorAll('article')].findIndex(a => a.querySelector('details').open)"
        for key, place in (("j", 1), ("ArrowRight", 2), ("k", 1), ("ArrowLeft", 0)):
            page.keyboard.press(key)
            assert page.evaluate(opened) == place
            assert page.evaluate("document.querySelectorAll('article > details[open]').length") == 1
        page.get_by_label("with").focus()
        page.keyboard.type("jk")  # there, they are letters
        assert page.get_by_label("with").input_value() == "jk"
        page.get_by_label("with").fill("")
        until(page, f"{IDLE} && document.querySelectorAll('article').length === 12")
        page.locator("article > details > summary").last.focus()
        page.keyboard.press("j")  # after the last one comes the next page
        until(page, "document.querySelectorAll('article').length === 4")


@needs_browser
def test_an_episode_has_an_address_and_neighbours(viewed: tuple[str, int], browser: Browser):
    with tab(browser) as page:
        page.goto(f"{viewed[0]}?show=disagreement")
        asked = page.locator("article strong.question").all_inner_texts()
        page.get_by_role("link", name="Open", exact=True).nth(1).click()
        page.wait_for_url(re.compile(r"\?show=disagreement&q=&episode=\d+-\d+$"))
        address = page.url
        assert page.locator("article").count() == 1
        assert page.locator("strong.question").inner_text() == asked[1]
        assert "2 of 16, most disagreement" in page.locator(".pager").inner_text()
        for key, place in (("j", 2), ("ArrowLeft", 1), ("k", 0)):
            with page.expect_navigation():
                page.keyboard.press(key)
            assert page.locator("strong.question").inner_text() == asked[place]
        page.keyboard.press("k")  # there is none before it
        page.goto(address)
        assert page.locator("strong.question").inner_text() == asked[1]
        page.locator(".up a").click()
        page.wait_for_url(re.compile("#asks$"))
        assert page.get_by_label("Show").input_value() == "disagreement"


@needs_browser
def test_a_picture_is_enlarged_and_put_away(viewed: tuple[str, int], browser: Browser):
    with tab(browser) as page:
        page.goto(viewed[0])
        thumbnail, dialog = page.locator("article img.thumb").first, page.locator("dialog")
        thumbnail.scroll_into_view_if_needed()
        before = page.locator("article > details").first.get_attribute("open")
        thumbnail.click()
        assert dialog.is_visible()
        assert dialog.locator("img").get_attribute("src") == thumbnail.evaluate("image => image.src")
        box = dialog.locator("img").bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) > 700
        page.keyboard.press("Escape")
        assert not dialog.is_visible()
        assert page.locator("article > details").first.get_attribute("open") == before


@needs_browser
def test_a_report_opens_the_episode_that_its_address_names(played: Path, tmp_path: Path, browser: Browser):
    report = write_report(played, tmp_path / "page.html").as_uri()
    with tab(browser) as page:
        page.goto(f"{report}#episode-2-3")
        assert page.locator("#episode-2-3 > details").get_attribute("open") is not None
        assert page.locator("#episode-2-3 .trajectory").first.is_visible()
        page.evaluate("location.hash = 'episode-1-1'")
        until(page, "document.querySelector('#episode-1-1 > details').open")
        page.evaluate("location.hash = '#episode-1-1,script'")  # whatever an address says
        page.keyboard.press("j")
        assert page.locator("article > details[open]").count() > 0


@pytest.fixture(scope="module")
def shelf(played: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """The address and port of a viewer of a folder with three runs that can be shown, and one that cannot."""
    folder = tmp_path_factory.mktemp("shelf")
    shutil.copytree(played, folder / "group" / "first")
    played_run(folder / 'second <b>& %2F"', "paper", steps=6)
    with_metrics(new_run(folder / "third", seed=7), 2)
    with_metrics(new_run(folder / "old")).write_text("config.yaml", "images: /pictures\nmodel: tiny\nsteps: 3\n")
    with viewing(folder) as found:
        yield found


@needs_browser
def test_runs_of_a_folder_are_listed_opened_and_laid_over_each_other(shelf: tuple[str, int], browser: Browser):
    address, _ = shelf
    with tab(browser) as page:
        page.goto(address)
        assert page.locator("tbody tr").count() == 4
        assert "written by ireasoner 0.1" in page.locator("tr", has_text="old").inner_text()
        page.get_by_role("link", name="second").click()
        assert page.locator("h1 .said").inner_text() == 'second <b>& %2F"'
        until(page, LOADED)
        page.get_by_role("link", name="Open", exact=True).first.click()
        assert page.locator("article .trajectory").count() == 5
        until(page, "document.querySelector('article img.thumb').naturalWidth > 0")
        page.get_by_role("link", name="All runs").click()
        for name in ("group/first", "second", "third"):
            page.get_by_role("checkbox", name=name).check()
        page.get_by_role("button", name="Lay the chosen runs over each other").click()
        assert page.locator("h1").inner_text().startswith("3 runs")
        until(page, LOADED)
        legend = page.locator(".panel").first.locator(".series").all_inner_texts()
        assert sorted(legend) == ["group/first", 'second <b>& %2F"', "third"]
        assert page.locator(".results tbody tr").count() == 3
        options = dict(re.findall(r"^(\w+)\t(.*)$", page.locator(".options tbody").inner_text(), re.MULTILINE))
        assert sorted(options["recipe"].split("\t")) == ["default", "default", "paper"]
        assert sorted(options["seed"].split("\t")) == ["0", "0", "7"]
        assert "learning_rate" not in options  # it is the same in all of them
        page.get_by_label("Read the curves at step").focus()
        page.keyboard.press("Home")
        assert page.locator(".panel").nth(1).locator("output").all_inner_texts() == ["0.7"] * 3


def test_the_shelf_serves_its_own_runs_and_nothing_else(shelf: tuple[str, int]):
    _, port = shelf
    page = get(port, "/")[2]
    assert "<b>" not in page
    keys = sorted(set(re.findall(r'href="run/([^/"]+)/"', page)))
    assert keys == ["group-first", "second-b-2F-", "third"]
    for key in keys:
        status, headers, _ = get(port, f"/run/{key}/")
        assert status == 200
        assert headers["content-security-policy"].startswith("default-src 'none'; img-src 'self'")
        assert get(port, f"/run/{key}/", "evil.example")[0] == 400
    places = (
        "/run/nowhere/", "/run/../../etc/", "/run/%2e%2e/", "/run/group%2Ffirst/", "/run/old/", "/run//",
        "/run/third/x", "/run/third/../old/", "/run/third/images/..%2f..%2fthird%2fconfig.yaml",
        "/run/third/config.yaml",
        "/part/working", "/curves/99.svg?run=third", "/curves/0.svg", "/images/0000000000000000.png",
        "/run/third/?episode=1-1", "/run/group-first/?episode=9-9",
    )  # fmt: skip
    for place in places:
        status, headers, _ = get(port, place)
        assert status == 404, place
        assert "html" not in headers["content-type"]
    for query in ("?run=nowhere", "?run=old", f"?run={'x' * 9000}", "?run=../third", "?run=%00&run=%ff"):
        status, _, body = get(port, f"/{query}")
        assert (status, "run/third/" in body) == (200, True), query  # the list


def test_more_runs_than_can_be_told_apart_are_not_drawn(tmp_path: Path):
    for number in range(12):
        with_metrics(new_run(tmp_path / "runs" / f"run-{number}"), 2)
    found = find_runs([tmp_path / "runs"])
    chosen = ManyRuns().opened(found, [*found, *found])
    assert len(chosen) == len(LINES) < len(found) == 12
    assert len({*LINES}) == len(LINES)
    assert {len(overlay(chosen, panel).curves) for panel in panels_together(chosen)} == {10}


def test_runs_are_found_by_names_that_stay(tmp_path: Path):
    for path in ("a/x", "b/x", "a/x y", "a/x-y"):
        new_run(tmp_path / path)
    (tmp_path / "a" / "x" / "data").mkdir()
    found = find_runs([tmp_path / "a" / "x", tmp_path / "b" / "x"])
    assert [(key, name) for key, (_, name) in found.items()] == [("a-x", "a/x"), ("b-x", "b/x")]
    assert [name for _, name in find_runs([tmp_path / "a" / "x", tmp_path / "a" / "x-y"]).values()] == ["x", "x-y"]
    assert sorted(find_runs([tmp_path / "a"])) == ["x", "x-y", "x-y-2"]
    assert find_runs([tmp_path / "nowhere"]) == {}


def test_two_runs_open_laid_over_each_other(played: Path, tmp_path: Path):
    other = with_metrics(new_run(tmp_path / "other")).run_dir
    with forked.start("view", played, other, "--no-browser", output=tmp_path) as process:
        process.wait_until(lambda: "Ctrl-C" in process.printed())
        found = re.search(r":(\d+)(/\?run=\S*run&run=\S*other) ", process.printed())
        assert found, process.printed()
        try:
            assert "2 runs laid over each other" in get(int(found[1]), found[2])[2]
            assert get(int(found[1]), "/")[2].count('type="checkbox"') == 2
        finally:
            process.send(signal.SIGINT)
            process.wait(20)


def test_the_list_and_the_overlay_follow_their_runs(tmp_path: Path):
    recorder = with_metrics(new_run(tmp_path / "runs" / "one"), 2)
    with viewing(tmp_path / "runs") as (_, port):
        for query in ("", "?run=one"):
            before = json.loads(get(port, f"/pulse{query}")[2])
            assert json.loads(get(port, f"/pulse{query}")[2]) == before
            recorder.metrics(3 if query else 4, METRICS)
            assert json.loads(get(port, f"/pulse{query}")[2]) != before
        new_run(tmp_path / "runs" / "two")
        assert "run/two/" in get(port, "/part/runs")[2]


# The contrast of every text with what is behind it, by WCAG; small text needs 4.5.
CONTRASTS = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    function rgb(colour) {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    }
    function linear(c) { return c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4; }
    function light([r, g, b]) { return .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255); }
    function behind(e) {
        while (e && rgb(getComputedStyle(e).backgroundColor)[3] < 255) e = e.parentElement;
        return e ? rgb(getComputedStyle(e).backgroundColor) : [255, 255, 255];
    }
    const shown = [...document.querySelectorAll("main *, nav a, header *")].filter(
        (e) => e.offsetParent && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
    return shown.map((e) => {
        const a = light(rgb(getComputedStyle(e).color)), b = light(behind(e));
        return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), `${e.tagName} ${e.className}: ${e.textContent}`];
    });
}"""


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_is_readable(
    viewed: tuple[str, int], shelf: tuple[str, int], browser: Browser, width: int, scheme: Any
):
    pages = {viewed[0]: 100, f"{viewed[0]}?episode=1-1": 50, shelf[0]: 15}
    pages[f"{shelf[0]}?run=group-first&run=second-b-2F-&run=third"] = 50
    with tab(browser, width, color_scheme=scheme) as page:
        for address, least in pages.items():
            page.goto(address)
            page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, address
            contrasts = page.evaluate(CONTRASTS)
            assert len(contrasts) > least
            assert {text for contrast, text in contrasts if contrast < 4.5} == set()


@needs_browser
def test_the_page_follows_a_run(tmp_path: Path, browser: Browser):
    recorder = with_metrics(new_run(tmp_path / "run"), 2)
    recorder.episode(episode(question="The first."))
    lock = (recorder.run_dir / ".lock").open("w")
    with lock, viewing(recorder.run_dir) as (address, _), tab(browser) as page:
        fcntl.flock(lock, fcntl.LOCK_EX)
        page.clock.install()
        page.goto(address)
        assert page.locator("#state").inner_text() == "running"
        page.get_by_label("Read the curves at step").focus()
        page.keyboard.press("Home")
        page.locator(".panel").nth(1).hover(position={"x": 20, "y": 5})  # where one looks
        page.clock.run_for(3100)
        page.wait_for_timeout(500)  # it has looked once
        recorder.metrics(3, METRICS | {"answers/majority_fraction": 0.123})
        recorder.episode(episode(question="The second.", step=3))
        until(page, "!document.querySelector('#fresh').hidden", tick=1000)
        page.get_by_role("link", name="New episodes: show").click()
        page.locator("strong.question", has_text="The second.").wait_for()
        until(page, "JSON.parse(document.querySelector('#readings').textContent).steps.length === 3", tick=1000)
        assert page.locator("#step").inner_text() == "3"
        assert page.locator("#at-value").inner_text() == "1"  # the reader's step stays, and the focus
        assert page.locator(".panel").nth(1).locator("output").inner_text() == "0.7"
        assert page.evaluate("document.activeElement.className").startswith("hint pager")
        lock.close()
        until(page, "document.querySelector('#state').textContent === 'stopped'", tick=1000)
        shutil.rmtree(recorder.run_dir)
        until(page, "document.querySelector('#state').textContent === 'gone'", tick=1000)
        until(page, "document.body.textContent.includes('The run directory is gone')", tick=1000)


@needs_browser
def test_a_long_run_opens_at_once_and_in_pages(tmp_path: Path, browser: Browser):
    recorder = new_run(tmp_path / "run", steps=2500, images_per_step=1)
    Image.new("RGB", (64, 64), "red").save(recorder.run_dir / "images" / "00000000.png")
    lines = [json.dumps(episode(f"text {step}", step=step, thumbnail="images/00000000.png")) for step in range(1, 2501)]
    (recorder.run_dir / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    rows = [json.dumps(METRICS | {"step": step, "answers/answer_entropy": 1 / step}) for step in range(1, 2501)]
    (recorder.run_dir / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    with viewing(recorder.run_dir) as (address, port), tab(browser) as page:
        page.goto(address)
        assert page.locator("article").count() == 12
        assert "of 2500 episodes" in page.locator(".pager").inner_text()
        assert len(get(port, "/")[2]) < 400_000
        page.get_by_label("with").fill("text 1234")
        until(page, "document.querySelectorAll('article').length === 1")
