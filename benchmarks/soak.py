"""Kill runs, damage files and write hostile texts for as long as one likes, and count what comes of it.

    python benchmarks/soak.py --seconds 600        (or: make soak SECONDS=600; Ctrl-C ends it early)

In turns:

- A small run of the tiny model is killed at random moments and resumed until its end. It must then hold the same files
  as the uninterrupted run, bit by bit but for times: no temporary folder, and no checkpoint that should have gone.
- A run of it samples on two servers, every second one with --overlap. They are killed and hung at random moments
  (`soak_servers.py`), one or both, and now and then the run is killed. It may end only because no server answered
  within --patience, with our sentence (exit code 2), and is resumed then. In the end it must hold the same files as a
  run whose servers nobody disturbed.
- Damaged image files are decoded (`soak_images.py`).
- Run directories are damaged, and every command that reads one is tried on them. It must succeed or say in one sentence
  what is wrong (exit code 2), and no sound checkpoint may be lost.
- Texts that a hostile model might write are read in every form and rewarded, the recipes taking turns.

What is tried runs in forked processes, so that it may hang, crash or fill the memory. The number of a case is the seed
of its damage or texts: `--first` makes it again. Needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import soak_images
import soak_servers
from tqdm import tqdm

from ireasoner.app.cli import main as ireasoner
from ireasoner.method.answers import answer_key
from ireasoner.method.matching import match_value
from ireasoner.method.memory import step_digest
from ireasoner.method.recipe import PUBLISHED, Recipe
from ireasoner.method.scoring import Context, read_group, score_group
from ireasoner.method.texts import parse_question, parse_trajectory
from ireasoner.method.types import FinishReason, Form, TokenDistributions, UsageError
from ireasoner.model.loading import load_policy
from ireasoner.model.options import BackboneOptions
from ireasoner.page.gallery import FILTERS
from ireasoner.page.page import Page, Query
from ireasoner.page.run import RecordedRun
from ireasoner.playground import dataset
from ireasoner.training import loop
from ireasoner.training.checkpoints import verify_checkpoint
from ireasoner.training.config import names, resolve
from ireasoner.training.state import Observer
from ireasoner.training.watch import ENDED_ITSELF

LIMIT_SECONDS, LIMIT_MEGABYTES = 120.0, 600.0
SPARED, PER_CHARACTER = 0.2, 2e-5  # seconds of the processor for a text, and for each of its characters more
KEPT_CHECKPOINTS = 2
OPTIONS: dict[str, Any] = {
    "model": "tiny", "device": "cpu", "seed": 5, "steps": 3, "images_per_step": 2, "group_size": 2,
    "max_question_tokens": 56, "max_solution_tokens": 64, "learning_rate": 3e-3, "proposer_every": 2, "save_every": 1,
    "keep_checkpoints": KEPT_CHECKPOINTS, "watch": False, "probe_every": 2, "probe_images": 1, "eval_questions": 2,
}  # fmt: skip
TIMES = {"elapsed", "training_seconds"}  # keys of `state.json` and `summary.json` that depend on the clock
KINDS = ("kills", "servers", "images", "directories", "completions")
BROKEN = ("wrong", "lost", "slow", "over 600 MB", "tracebacks")


@dataclass
class Counts:
    """How many cases there were of each kind, and how many of them broke which promise."""

    cases: Counter[str] = field(default_factory=Counter)
    broken: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, kind: str, broken: list[str], told: str = "") -> None:
        """Count one case with the promises that it broke; if there are any, `told` says what happened."""
        self.cases[kind] += 1
        self.broken.update((kind, name) for name in broken)
        if broken:
            print(f"{kind}: {', '.join(broken)}: {told}\n", flush=True)

    def table(self) -> str:
        """A line for each kind of case."""
        rows = [("", "tried", *BROKEN)]
        rows += [
            (kind, *map(str, (tried, *(self.broken[kind, b] for b in BROKEN)))) for kind, tried in self.cases.items()
        ]
        return "\n".join(f"{row[0]:12}" + "".join(f"{cell:>13}" for cell in row[1:]) for row in rows)


@dataclass(frozen=True)
class Ended:
    """How a forked process ended: its exit code (negative: a signal), what it printed, and what it used."""

    code: int
    printed: str
    late: bool
    megabytes: float

    def broken(self, allowed: tuple[int, ...]) -> list[str]:
        """The promises of every command that it broke."""
        found = ["slow"] if self.late else []
        found += ["over 600 MB"] if self.megabytes > LIMIT_MEGABYTES else []
        if not self.late and (self.code not in allowed or "Traceback" in self.printed):
            found.append("tracebacks")
        sentences = [line for line in self.printed.splitlines() if line.startswith("ireasoner: ")]
        no_sentence = self.code == 2 and (len(sentences) != 1 or not self.printed.endswith(f"{sentences[0]}\n"))
        if no_sentence or any(not (c.isprintable() or c in "\t\r\n") for c in self.printed):
            found.append("wrong")
        return found


def forked(
    work: Callable[[], int],
    dies: Callable[[float], bool] = lambda seconds: False,
    limit: float = LIMIT_SECONDS,
) -> Ended:
    """Run a function in a process of its own; its result is the exit code.

    Args:
        work: the function.
        dies: asked all the time, with the seconds since the start, whether to kill the process now.
        limit: seconds after which it is killed, and counts as slow.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        sys.stdout.flush()
        own = _resident_megabytes()
        if (child := os.fork()) == 0:
            code = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                code = work()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        started, late = time.monotonic(), False
        while True:
            pid, status, usage = os.wait4(child, os.WNOHANG)
            if pid:
                break
            seconds = time.monotonic() - started
            late = late or seconds > limit
            if late or dies(seconds):
                os.kill(child, signal.SIGKILL)
            time.sleep(0.001)
        output.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return Ended(code, output.read(), late, usage.ru_maxrss / 1024 - own)


def _resident_megabytes() -> float:
    """The memory that a forked process begins with."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


# --- the runs that everything is compared with ------------------------------------------------------------------------


def prepare(place: Path) -> float:
    """Write pictures and questions, a finished run and one that died before its last checkpoint.

    Returns:
        How long the finished run took.
    """
    dataset.write_unlabeled(place / "pool", 5, "chalk")
    dataset.write_questions(place / "test", 3, "chalk")
    # tqdm's own lock is shared with forked processes: one that is killed while it holds it would block all later ones.
    tqdm.set_lock(threading.RLock())
    load_policy("tiny", BackboneOptions(dtype="float32"), device="cpu", seed=0)  # imports what the children need
    started = time.monotonic()
    ended = forked(lambda: train(place, place / "finished"))
    seconds = time.monotonic() - started
    assert ended.code == 0, ended.printed

    def die(step: int, metrics: object, episodes: object) -> None:
        if step == OPTIONS["steps"]:
            os._exit(9)

    def begin() -> int:
        loop.start(resolve(options(place)), place / "unfinished", Observer(on_step=die))
        return 0

    ended = forked(begin)
    assert ended.code == 9, ended.printed
    return seconds


def options(place: Path) -> dict[str, Any]:
    """The options of the small run, with its pictures and questions."""
    return {**OPTIONS, "images": str(place / "pool"), "eval_data": str(place / "test" / "test.jsonl")}


def train(place: Path, out: Path, **more: Any) -> int:
    """Begin a run by the command line, with more options, or resume it where it has begun; the exit code."""
    if (out / "config.yaml").exists():
        return ireasoner(["train", "--resume", str(out)])
    given = [f"--{name}={value}" for name, value in (options(place) | more).items()]
    return ireasoner(["train", "--out", str(out), *given])


def contents(run: Path) -> dict[str, Any]:
    """Every file and folder of a run, by its name, without what depends on the clock."""

    def timeless(record: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in record.items() if key not in TIMES and not key.startswith("time/")}

    found: dict[str, Any] = {}
    for path in run.rglob("*"):
        name = path.relative_to(run).as_posix()
        if path.name == "manifest.json":  # holds the digest of `state.json`, with its times
            found[name] = verify_checkpoint(path.parent)
        elif path.is_dir() or name in ("report.html", "curves.png"):  # these two show times
            found[name] = None
        elif path.name == "metrics.jsonl":
            found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        else:
            found[name] = timeless(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()
    return found


# --- kills ------------------------------------------------------------------------------------------------------------


def soak_kills(number: int, place: Path, seconds: float, counts: Counts) -> None:
    """Kill one run at random moments until it ends, and compare it with the one that nobody killed.

    Half of the kills wait for a save, which takes only a hundredth of the time.
    """
    rng, out = random.Random(number), place / "killed"
    shutil.rmtree(out, ignore_errors=True)
    for _ in range(rng.randint(2, 20)):
        at, saving = rng.uniform(0, seconds), rng.random() < 0.5
        delay = rng.choice((0, 0.003, 0.01)) if saving else 0.0
        due: list[float] = []

        def dies(now: float, at: float = at, saving: bool = saving, delay: float = delay, due: list = due) -> bool:
            if not due and now > at and (not saving or any(out.rglob("*tmp*")) or (out / ".adapters").exists()):
                due.append(now + delay)
            return bool(due) and now >= due[0]

        ended = forked(lambda: train(place, out), dies)
        if ended.code == -signal.SIGKILL and not ended.late:
            counts.add("kills", [])
        else:
            counts.add("kills", ended.broken((0,)), ended.printed)
            break
    ended = forked(lambda: train(place, out))
    broken = ended.broken((0,))
    ours, theirs = contents(out), contents(place / "finished")
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name, 0) != theirs.get(name, 0))
    lost = any(name.startswith("checkpoints/") and name in theirs and name not in ours for name in differing)
    broken += ["wrong"] * bool(differing) + ["lost"] * lost
    counts.add("runs", broken, f"number {number}: {differing} differ\n{ended.printed}")


# --- servers that do not answer ---------------------------------------------------------------------------------------

SERVED_LIMIT_SECONDS = 600.0  # for a run on servers, some of which is waiting for them


@dataclass(frozen=True)
class Served:
    """Two servers, and the patience of the runs that sample on them: several times what a step takes undisturbed."""

    both: list[soak_servers.Server]
    patience: float

    def options(self, overlap: bool) -> dict[str, Any]:
        """Of the small run that samples on these servers, during updates or before them."""
        addresses = ",".join(server.address for server in self.both)
        given = {"servers": addresses, "patience": self.patience, "overlap": overlap}
        return {**given, "eval_questions": 1, "probe_every": 0}  # most is sampled while the run learns

    def may_end(self, printed: str) -> bool:
        """Whether a run may end now with what it printed, as it does where no server answers."""
        now = time.monotonic()
        there = [now - server.since if server.since else 0.0 for server in self.both]
        starts = self.patience  # until a server that was started anew can answer, and is asked
        if "no server has answered within" in printed:
            return max(there) < self.patience + starts
        if "no server answers" in printed:  # when it is resumed
            return max(there) < starts
        # When it begins, it needs them all.
        return min(there) < starts and re.search(r"--servers: \S+ does not answer", printed) is not None


def soak_servers_of_a_run(number: int, place: Path, served: Served, counts: Counts) -> None:
    """Disturb the servers of one run until it ends, and the run itself; compare it with one that nobody disturbed."""
    rng, out = random.Random(number), place / "disturbed"
    options, undisturbed = served.options(number % 2 == 1), place / f"served-{number % 2}"
    shutil.rmtree(out, ignore_errors=True)
    for _ in range(rng.randint(2, 6)):
        run_dies_at = rng.uniform(0, 3 * served.patience) if rng.random() < 0.3 else None
        disturbances = soak_servers.Disturbances(served.both, rng, served.patience, run_dies_at)
        ended = forked(lambda: train(place, out, **options), disturbances, SERVED_LIMIT_SECONDS)
        for what in disturbances.done:
            counts.add(what, [])
        if ended.code == -signal.SIGKILL and not ended.late:
            counts.add("run killed", [])
            continue
        problems = ended.broken((0, 2))
        if ended.code == 2 and not served.may_end(ended.printed):
            problems.append("wrong")
        counts.add("none answers" if ended.code else "run through", problems, f"number {number}:\n{ended.printed}")
        if ended.code == 0:
            break
    for server in served.both:
        server.wait()
    ended = forked(lambda: train(place, out, **options), limit=SERVED_LIMIT_SECONDS)
    ours, theirs = contents(out), contents(undisturbed)
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name, 0) != theirs.get(name, 0))
    differing = [name for name in differing if name != "events.jsonl"]  # which tells of servers that did not answer
    broken = ended.broken((0,)) + ["wrong"] * bool(differing)
    counts.add("runs served", broken, f"number {number}: {differing} differ\n{ended.printed}")


# --- damaged run directories ------------------------------------------------------------------------------------------

NUMBERS = (
    "NaN",
    "Infinity",
    "-1",
    "0",
    "1e999",
    "1e308",
    str(2**64),
    "9" * 5000,
    "null",
    "true",
    '"\\u001b[31m"',
    "{}",
    "[]",
)


def damage(run: Path, place: Path, rng: random.Random) -> str:
    """Damage one file or folder of a run; what was done."""
    path = rng.choice(sorted(rng.choice((run.iterdir(), run.rglob("*")))))
    kinds = ["remove", "file", "folder", "pipe", "link"]
    if path.is_file() and path.stat().st_size:
        kinds += [
            "bytes",
            "cut",
            "empty",
            "splice",
            "long",
            *(["value", "deep"] * 2 if b"\0" not in path.read_bytes() else []),
        ]
    kind = rng.choice(kinds)
    if kind in ("remove", "file", "folder", "pipe", "link"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind == "link":
        target = rng.choice(
            ("/dev/zero", "/dev/null", "/nowhere", path.name, "/etc/passwd", str(place / "finished"), ".")
        )
        path.symlink_to(target)
        kind = f"link to {target}"
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_bytes(rng.randbytes(100))
    elif kind != "remove":
        path.write_bytes(damaged(kind, path.read_bytes(), rng))
    return f"{path.relative_to(run)}: {kind}"


def damaged(kind: str, data: bytes, rng: random.Random) -> bytes:
    """The contents of a file with one damage."""
    start = rng.randrange(rng.choice((len(data), min(len(data), 100))))  # half of them in a header
    if kind == "bytes":
        size = rng.choice((1, 8, 100))
        return data[:start] + rng.randbytes(size) + data[start + size :]
    if kind == "splice":
        other = rng.randrange(len(data))
        return data[:start] + data[other : other + rng.randrange(1, 5000)] + data[start:]
    if kind == "long":
        piece = rng.choice((b"\n", b" ", b"[", b"\0", data[start:]))
        return data + piece * (1_000_000 // len(piece))
    values = [*re.finditer(rb"(?<=: )[^\s,\]}]+", data)]
    if kind in ("value", "deep") and values:
        value = rng.choice(values)
        new = rng.choice(NUMBERS).encode() if kind == "value" else b"[" * 50_000 + b"]" * 50_000
        return data[: value.start()] + new + data[value.end() :]
    return data[:start] if kind == "cut" else b""


def soak_directory(number: int, place: Path, counts: Counts) -> None:
    """Damage a run, and try every command on it; the one that goes on with it comes last."""
    rng, run = random.Random(number), place / "damaged" / "run"
    shutil.rmtree(run.parent, ignore_errors=True)
    shutil.copytree(place / rng.choice(("finished", "unfinished")), run)
    done = "; ".join(damage(run, place, rng) for _ in range(rng.choice((1, 1, 2, 3))))
    sound = sound_checkpoints(run)
    broken: list[str] = []
    told = [f"number {number}: {done}"]
    for command, work in commands(run, place, rng):
        ended = forked(work)
        if problems := ended.broken((0, 2, ENDED_ITSELF) if command == "train" else (0, 2)):
            told.append(f"{command} ended with {ended.code} and {ended.megabytes:.0f} MB: {ended.printed[-3000:]}")
        left = sound_checkpoints(run)
        if any(sum(other > name for other in left) < KEPT_CHECKPOINTS for name in sound - left):
            problems.append("lost")
            told.append(f"{command} left the checkpoints {sorted(left)} of {sorted(sound)}: {ended.printed[-3000:]}")
        broken += [problem for problem in problems if problem not in broken]
    counts.add("directories", broken, "\n".join(told))


def sound_checkpoints(run: Path) -> set[str]:
    """The checkpoints of a run that hold what was saved."""
    return {path.name for path in run.glob("checkpoints/step-*") if verify_checkpoint(path) is None}


def commands(run: Path, place: Path, rng: random.Random) -> Iterator[tuple[str, Callable[[], int]]]:
    """The commands that read a run, by name."""
    target = rng.choice((run, run / "checkpoints" / f"step-{rng.randrange(4):06d}"))
    more = rng.choice(([], ["--steps", "4"]))
    yield "the page", lambda: show(run)
    yield "report", lambda: ireasoner(["report", str(run), "--out", str(place / "report.html")])
    yield "runs", lambda: ireasoner(["runs", str(run.parent)])
    data = ["--data", str(place / "test" / "test.jsonl"), "--limit", "1", "--device", "cpu"]
    yield "eval", lambda: ireasoner(["eval", str(target), *data])
    yield "train", lambda: ireasoner(["train", "--resume", str(run), *more])


def show(run: Path) -> int:
    """Make what `ireasoner view` would serve, but for the curves, which the report draws as well."""
    try:
        recorded = RecordedRun.open(run)
    except UsageError as error:
        print(f"ireasoner: {error}", file=sys.stderr)
        return 2
    page = Page(recorded)
    page.render("page.html")
    for name in FILTERS:
        recorded.refresh()
        page.render("episodes.html", Query(show=name))
    for path in sorted((run / "images").glob("*")):
        recorded.thumbnail(path.name)
    return 0


# --- hostile texts ----------------------------------------------------------------------------------------------------

TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<question>", "</question>", "< / THINK >", "<rationale>")
MARKS = (
    "<|im_end|>", "<image>", "Step 1:", "**Step 2**:", "step 999", "1.", "2)", "(3)", "- ", "***", "###", "\\boxed{",
    "}", "{", "\\}", "\\", "$$", "\\[", "```", "|---|", "`<answer>`", "<b>", "{\"answer\": ", "&#99", "①", "Answer:",
    "**Final answer:**", "the answer is:", "A)", "B", "=", "<", ">",
    '"', "'", "&",
)  # fmt: skip
SPACES = (
    "\n",
    "\r\n",
    "\u2028",
    "\x0b",
    "\x85",
    "\t",
    "    ",
    "\0",
    "\x1b[2J",
    "\u200b",
    "\u202e",
    "e\u0301",
    "\ufffd",
)
FIGURES = (
    "ﬁ", "½", "٣", "𝟙", "²", "😀", "1e999", "-0", "1/0", "0.1", "10^", "10^9999", "9" * 5000, "1,000", "5 cm", "50%",
    "√", "\\frac{1}{0}", "twenty", "hundred", "and", "minus", "NaN", "inf", "None", "π", "√{2}", "^(1/3)", "x^2",
    "sqrt(", "mΩ", "km/h", "Rs.", "€1.250", "3:30 PM", "March 5,", "2021-02-31", "10-20", "first", "三百",
    "einundzwanzig", "% of",
)  # fmt: skip
PHRASES = (
    "the", "red", "bar", "not", "taller than", "is", "are", "because", "or", "maybe", "A and C", "identify the",
    "第一步：",
)  # fmt: skip
WORDS = (*TAGS, *MARKS, *SPACES, *FIGURES, *PHRASES)
QUESTIONS = ("Which bar is the tallest?", "A) red B) blue C) 7", "How many? (A) 1 (B) one (C) 1.0", "", "A) " * 500)


def hostile(rng: random.Random) -> str:
    """A text of up to some ten thousand characters."""
    if rng.random() < 0.2:
        return "".join(rng.choices(WORDS, k=rng.randint(1, 3))) * rng.choice((1, 10, 100, 1000))
    joint = rng.choice(("", " ", "\n"))
    return joint.join(rng.choices(WORDS, k=rng.choice((0, 1, 5, 50, 500))))


def reply(rng: random.Random) -> str:
    """A solver's reply, most often in one of the forms, with hostile parts."""
    think, answer = hostile(rng), rng.choice((hostile(rng), "7", "red"))
    if rng.random() < 0.5:  # so that it is well-formed more often
        think, answer = (re.sub(r"</?\w+>|[{}\\<>]", "", part)[:20_000] for part in (think, answer))
    forms = (
        f"<think>a {think}</think><answer>{answer}</answer>",
        f"a {think}\n\\boxed{{{answer}}}",
        f"a {think}\nAnswer: {answer}",
    )
    return rng.choice((*forms, *forms, think))


def letters(texts: Any) -> np.ndarray:
    """Embeddings [texts, 26]: normalised counts of letters, zeros where there is none."""
    counts = np.array([[text.count(chr(c)) for c in range(97, 123)] for text in texts], dtype=float).reshape(-1, 26)
    return counts / np.maximum(1e-9, np.linalg.norm(counts, axis=1, keepdims=True))


def broken_by_texts(number: int, recipe: Recipe) -> tuple[int, list[str]]:
    """Read a group of hostile texts and reward it; how many there were, and the promises that they broke."""
    rng, broken = random.Random(number), []
    texts = [reply(rng) for _ in range(rng.choice((1, 2, 5, 8)))]
    question, form = rng.choice((*QUESTIONS, hostile(rng))), rng.choice(("tags", "boxed", "answer-line"))
    ends: list[FinishReason] = [rng.choice(("stop", "stop", "stop", "length")) for _ in texts]
    memory = [frozenset(map(step_digest, rng.choices(("a", "a red", "x"), k=2))) for _ in range(3)]
    for text in texts:
        started = time.process_time()
        parse_question(text)
        for each in ("tags", "boxed", "answer-line"):
            parse_trajectory(text, "stop", each)
        answer_key(text, question)
        answer_key(text[:200], question)
        match_value(text[:200], [text[100:300], "7 cm"], question, rng.choice(("exact", "relaxed", "anls", "vqa")))
        broken += ["slow"] * (time.process_time() - started > SPARED + PER_CHARACTER * len(text + question))
    broken += broken_by_rewards(recipe, question, texts, form, ends, memory, rng)
    return len(texts), sorted(set(broken))


def broken_by_rewards(
    recipe: Recipe,
    question: str,
    texts: list[str],
    form: Form,
    ends: list[FinishReason],
    memory: list[frozenset[str]],
    rng: random.Random,
) -> list[str]:
    """The promises that the rewards of a group under one recipe break."""
    tokens = [re.findall(r".{1,50}", text, re.DOTALL) or [""] for text in texts]
    nats = [tuple(rng.expovariate(1.0) for _ in each) for each in tokens]
    context = Context(
        form=form, finish_reasons=ends, step_weight=rng.random(), embed=letters, recent_steps=memory,
        logprobs=[[-value for value in each] for each in nats], tokens=tokens,
        blank_logprobs=lambda: [[-2 * value for value in each] for each in nats],
        distributions=lambda: [TokenDistributions(each, each) for each in nats],
        likelihoods=lambda texts, view="same": [[-rng.expovariate(1.0)] * (len(text) % 4) for _, text in texts],
        other_view=read_group(question, [parse_trajectory(text, "stop", form) for text in texts[::-1]]),
        questions=[question, *rng.choices(QUESTIONS, k=2)],
        true_answer=rng.choice(("7", hostile(rng))), seed=(rng.randrange(100),),
    )  # fmt: skip
    started = time.process_time()
    scored = score_group(question, texts, recipe, context)
    seconds = time.process_time() - started
    malformed = [t.reward for t in scored.trajectories if not t.well_formed]
    earned, bounded = (*scored.rewards, scored.proposer_reward), recipe.reward not in PUBLISHED
    in_bounds = all(math.isfinite(r) and (0 <= r <= 1 or not bounded) for r in earned)
    found = ["slow"] * (seconds > len(texts) * SPARED + PER_CHARACTER * sum(map(len, (*texts, question))))
    return found + ["wrong"] * (not in_bounds or any(malformed))


def soak_texts(first: int, seconds: float) -> int:
    """Read groups of texts for so long; print a line of JSON for each: number, texts, what they broke, what to tell."""
    recipes = [
        resolve({"model": "tiny", "images": ".", "labels": "x", "recipe": name}).recipe for name in names("recipes")
    ]
    number, end = first, time.monotonic() + seconds
    while time.monotonic() < end:
        told = ""
        try:
            texts, broken = broken_by_texts(number, recipes[number % len(recipes)])
        except Exception:
            texts, broken, told = 1, ["tracebacks"], traceback.format_exc()
        print(json.dumps([number, texts, broken, told]), flush=True)
        number += 1
    return 0


# --- all of it --------------------------------------------------------------------------------------------------------


def count_texts(first: int, seconds: float, counts: Counts) -> int:
    """Count what becomes of texts for so long; the number of the next group."""
    ended = forked(lambda: soak_texts(first, seconds))
    rows = [json.loads(line) for line in ended.printed.splitlines() if re.fullmatch(r"\[\d+, \d+, \[.*\]", line)]
    for number, texts, broken, told in rows:
        counts.cases["completions"] += texts - 1
        counts.add("completions", broken, f"number {number} {told}")
    if problems := ended.broken((0,)):
        counts.add("completions", problems, f"after number {rows[-1][0] if rows else first}: {ended.printed[-3000:]}")
    return rows[-1][0] + 1 if rows else first + 1


def count_images(first: int, seconds: float, keep: Path, counts: Counts) -> int:
    """Count what becomes of damaged images for so long; the number of the next one."""

    def decode() -> int:
        print(json.dumps(soak_images.soak(seconds, first, keep)))
        return 0

    ended = forked(decode)
    if ended.code != 0:  # the number of the image stands in the folder's last.txt
        counts.add("images", ["tracebacks"], ended.printed[-3000:])
        return int((keep / "last.txt").read_text()) + 1
    found = json.loads(ended.printed.splitlines()[-1])
    counts.cases["images"] += found["files"]
    for name, column in zip(soak_images.BROKEN, ("slow", "over 600 MB", "tracebacks"), strict=True):
        counts.broken["images", column] += found.get(name, 0)
    if any(found.get(name, 0) for name in soak_images.BROKEN):
        print(ended.printed, flush=True)
    return first + found["files"]


def main() -> int:
    """Returns 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long, at least (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind (%(default)s)")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, help="kinds of cases (all)")
    parser.add_argument("--keep", type=Path, default=Path("soak-images"), help="for images that break a promise")
    arguments = parser.parse_args()
    end, counts = time.monotonic() + arguments.seconds, Counts()
    run = served_run = directory = image = text = arguments.first
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        seconds = prepare(place)
        answer_key("√2 cm, five"), answer_key("1/√2"), answer_key("5 cm")  # loads what every text would load anew
        print(f"The run that the others are compared with took {seconds:.1f} s.", flush=True)
        if "servers" in arguments.only:
            served = Served(stack.enter_context(soak_servers.servers(place / "servers")), max(6.0, 1.5 * seconds))
            for number in range(2):
                options = served.options(number == 1)
                ended = forked(lambda: train(place, place / f"served-{number}", **options))  # noqa: B023
                assert ended.code == 0, ended.printed
        while True:
            if "servers" in arguments.only:
                soak_servers_of_a_run(served_run, place, served, counts)
                served_run += 1
            if "kills" in arguments.only:
                soak_kills(run, place, seconds, counts)
                run += 1
            if "images" in arguments.only:
                image = count_images(image, 3.0, arguments.keep, counts)
            for _ in range(12 if "directories" in arguments.only else 0):
                soak_directory(directory, place, counts)
                directory += 1
            if "completions" in arguments.only:
                text = count_texts(text, 3.0, counts)
            if time.monotonic() >= end:
                break
    print(counts.table())
    return int(counts.broken.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
