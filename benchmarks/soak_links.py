"""Cut the link between two hosts at random moments, for as long as one likes, and count what comes of it.

    python benchmarks/soak_links.py --seconds 600        # as root

The hosts are two network namespaces of this machine, with a process each of one small run of the tiny model. After
every cut both processes must end in time, with our sentence (exit code 2) or because the run was complete; the link is
then mended and the run resumed. At its end it must hold the same episodes, adapters and optimizers, bit by bit, as a
run that nobody disturbed. The number of a run is the seed of its moments: `--first` makes it again.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ireasoner.playground import dataset

PATIENCE = 5.0
SPARED = 10.0  # seconds more than that, for the step that each of them is in
HOSTS = [f"ireasoner-soak-{rank}" for rank in range(2)]
ENVIRONMENT = {
    "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "10.213.8.1", "MASTER_PORT": "29500",
    "GLOO_SOCKET_IFNAME": "net0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
OPTIONS = {
    "model": "tiny", "device": "cpu", "seed": 5, "steps": 6, "images-per-step": 3, "group-size": 2,
    "max-solution-tokens": 64, "learning-rate": 3e-3, "proposer-every": 2, "save-every": 1, "keep-checkpoints": 0,
    "watch": False, "probe-images": 1, "eval-questions": 2,
}  # fmt: skip


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def hosts() -> Iterator[None]:
    """The two hosts, connected with each other, 10.213.8.1 and 10.213.8.2."""
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", "net0", "netns", HOSTS[0], "type", "veth", "peer", "name", "net0", "netns", HOSTS[1])
        for rank, host in enumerate(HOSTS):
            ip("-n", host, "address", "add", f"10.213.8.{rank + 1}/24", "dev", "net0")
            ip("-n", host, "link", "set", "net0", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], check=False)


def start(place: Path, out: Path) -> list[subprocess.Popen[bytes]]:
    """Begin or resume a run on both hosts; what they print goes to files."""
    if (out / "config.yaml").exists():
        words = ["train", "--resume", str(out)]
    else:
        options = OPTIONS | {"images": place / "pool", "eval-data": place / "test" / "test.jsonl", "out": out}
        words = ["train", *(f"--{name}={value}" for name, value in options.items())]
    command = [sys.executable, "-m", "ireasoner", *words, "--patience", str(PATIENCE)]
    both = []
    for rank, host in enumerate(HOSTS):
        with open(place / f"printed-{rank}", "wb") as printed:
            environment = os.environ | ENVIRONMENT | {"RANK": str(rank)}
            words = ["ip", "netns", "exec", host, *command]
            both.append(subprocess.Popen(words, env=environment, stdout=printed, stderr=subprocess.STDOUT))
    return both


def finish(place: Path, both: Sequence[subprocess.Popen[bytes]], seconds: float) -> tuple[list[str], str]:
    """Wait for both processes; which promises they broke, and what they printed.

    They have so many seconds, and while they look for each other, which gloo does in several attempts, five times as
    many.
    """
    began, ended = time.monotonic(), [0.0, 0.0]
    while any(process.poll() is None for process in both) and time.monotonic() < began + 5 * seconds:
        ended = [time.monotonic() if process.poll() is None else at for process, at in zip(both, ended, strict=True)]
        time.sleep(0.1)
    broken, told = list[str](), list[str]()
    for rank, process in enumerate(both):
        process.kill()
        said = (place / f"printed-{rank}").read_text("utf-8", "replace")
        if process.wait() not in (0, 2) or "Traceback" in said:
            broken.append("no sentence")
        if ended[rank] > began + seconds and "did not find each other" not in said:
            broken.append("late")
        told.append(said)
    return broken, "\n".join(told)


def contents(run: Path) -> dict[str, bytes]:
    """What must be the same in both runs, by the name of the file."""
    paths = [*run.rglob("*.safetensors"), run / "episodes.jsonl", run / "probes.jsonl"]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths if path.exists()}


def soak(number: int, place: Path, seconds: float, counts: Counter[str]) -> None:
    """Disturb one run until it is complete, or has been cut five times, after which nobody disturbs it."""
    rng, out, broken = random.Random(number), place / "cut", list[str]()
    shutil.rmtree(out, ignore_errors=True)
    for _ in range(5):
        both = start(place, out)
        time.sleep(rng.uniform(0, seconds))
        ip("-n", (end := rng.choice(HOSTS)), "link", "set", "net0", "down")
        counts["cuts"] += 1
        problems, printed = finish(place, both, PATIENCE + SPARED)
        ip("-n", end, "link", "set", "net0", "up")
        if problems:
            print(f"run {number}: {problems}\n{printed}", flush=True)
        broken += problems
        if (out / "summary.json").exists():
            break
    problems, printed = finish(place, start(place, out), 10 * seconds)
    if problems or contents(out) != contents(place / "whole"):
        print(f"run {number}: {problems or 'it differs'}\n{printed}", flush=True)
        broken.append("differs")
    counts["runs"] += 1
    counts.update(broken)


def main() -> int:
    """Returns 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long, at least (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first run (%(default)s)")
    arguments = parser.parse_args()
    counts, end, number = Counter[str](), time.monotonic() + arguments.seconds, arguments.first
    with tempfile.TemporaryDirectory() as folder, hosts():
        place = Path(folder)
        dataset.write_unlabeled(place / "pool", 5, "chalk")
        dataset.write_questions(place / "test", 3, "chalk")
        began = time.monotonic()
        problems, printed = finish(place, start(place, place / "whole"), 300)
        assert not problems, printed
        seconds = time.monotonic() - began
        while time.monotonic() < end:
            soak(number, place, seconds, counts)
            number += 1
    print(f"{counts['cuts']} cuts in {counts['runs']} runs of {seconds:.0f} s:", end=" ")
    print(", ".join(f"{counts[name]} {name}" for name in ("late", "no sentence", "differs")))
    return int(any(counts[name] for name in ("late", "no sentence", "differs")))


if __name__ == "__main__":
    sys.exit(main())
