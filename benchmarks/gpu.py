"""Everything that only a GPU can show, in one command of less than nine minutes; `make test-gpu PYTHON=...` runs it.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --device cpu --model random-25m --image-tokens 64 --tokens 8 --published-tokens 2 4

Nothing is built and nothing is downloaded: the interpreter that runs this must have what `NEEDED` names, or find it in
PYTHONPATH. There are three parts, each in a process of its own and with a time limit: the tests that need a GPU, the
doctor, and the benchmark, the last two on a model with random weights. The JSON file is rewritten after every piece of
a part, so that a part that dies or runs out of time keeps what it found, and harms no other.

The published procedure plays one image after another, so that a step of n images takes n times as long as one of one
image, which is timed. It is timed with two short lengths of completions and extrapolated to the long one: sampling by
the seconds that each token adds, the update in proportion to the length of the sequence.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS = {"tests": 170, "doctor": 110, "bench": 300}  # the most seconds that each may take
AIMS = {"decode": 2.5, "update": 0.4, "published": 25.0}
TOLD = ("gradient in bfloat16", "memory of the loss", "quantisation")  # in lines of the tests that hold figures
NEEDED = {  # what is imported, and the name to install it by
    "torch": "torch", "transformers": "transformers", "peft": "peft",
    "accelerate": "accelerate", "pydantic": "pydantic", "pydantic_core": "pydantic-core", "numpy": "numpy",
    "PIL": "pillow", "jinja2": "jinja2", "yaml": "pyyaml", "rich": "rich", "safetensors": "safetensors",
    "tokenizers": "tokenizers", "pint": "pint", "flexcache": "flexcache", "flexparser": "flexparser",
    "platformdirs": "platformdirs", "text_to_num": "text2num", "num2words": "num2words", "pytest": "pytest",
}  # fmt: skip


def main() -> int:
    asked = arguments().parse_args()
    if asked.part:
        Part(asked).run()
        return 0
    if problem := what_is_missing(asked.device):
        print(problem, file=sys.stderr)
        return 2
    began = time.monotonic()
    asked.json = asked.json.resolve()  # parts run in another folder
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine(asked.device), "asked": vars(asked) | {"json": str(asked.json)}}
    result["parts"] = {}
    for name in asked.parts:
        left = asked.seconds - (time.monotonic() - began)
        result["parts"][name] = run_part(name, min(PARTS[name], left), asked)
        write(asked.json, result)
    result["seconds"] = time.monotonic() - began
    result["table"] = table(result)
    write(asked.json, result)
    show(result)
    print(f"{asked.json} holds all figures; the whole took {result['seconds']:.0f} seconds.")
    return 0 if all(row["met"] for row in result["table"] if row["met"] is not None) else 1


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="'cpu' to try this script")
    parser.add_argument("--model", default="random-7b", help="for doctor and bench")
    parser.add_argument("--images", type=int, nargs="+", default=[16, 1], help="images a step")
    parser.add_argument("--image-tokens", type=int, default=1024)
    parser.add_argument("--group-size", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256, help="of each completion")
    parser.add_argument("--published-tokens", type=int, nargs=2, default=[8, 32], help="to extrapolate from")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=500, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="the file to write")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # run it in this process
    return parser


# --- before anything slow ---------------------------------------------------------------------------------------------


def what_is_missing(device: str) -> str | None:
    """A sentence on what this interpreter lacks; None: nothing."""
    missing = [package for module, package in NEEDED.items() if util.find_spec(module) is None]
    if missing:
        return (
            f"{sys.executable} lacks {', '.join(missing)}: install them, or carry a folder that holds them and name it "
            "in PYTHONPATH (pip install --target FOLDER ...)."
        )
    if device == "cpu":
        return None
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} of {sys.executable} sees no GPU: --device cpu tries this script without one."
    return None


def machine(device: str) -> dict[str, Any]:
    """What the figures belong to: the GPU, its driver, and versions."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda, "cpus": os.cpu_count()}
    for package in NEEDED.values():
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    if device == "cpu":
        return found | {"gpu": None, "driver": None}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        told = "unknown"
    return found | {"gpu": torch.cuda.get_device_name(), "driver": told}


# --- parts as processes -----------------------------------------------------------------------------------------------


def run_part(name: str, limit: float, asked: argparse.Namespace) -> dict[str, Any]:
    """Run a part in a process of its own; what it found, and how it ended."""
    if limit < 10:
        return {"ended": "left out: no time was left", "seconds": 0.0}
    found, log = (asked.json.with_name(f"{asked.json.stem}-{name}.{suffix}") for suffix in ("json", "log"))
    found.unlink(missing_ok=True)
    print(f"{name}: at most {limit:.0f} seconds, told in {log}", flush=True)
    command = [sys.executable, "-u", __file__, "--part", name, "--json", str(found), "--device", asked.device]
    command += ["--model", asked.model, "--image-tokens", str(asked.image_tokens), "--tokens", str(asked.tokens)]
    command += ["--group-size", str(asked.group_size), "--repetitions", str(asked.repetitions)]
    command += ["--images", *map(str, asked.images), "--published-tokens", *map(str, asked.published_tokens)]
    if name == "tests":
        command = [sys.executable, "-u", "-W", "default", "-m", "pytest", "-W", "default", "-v", "-s", "-rfEs"]
        command += ["--override-ini", "addopts="]  # which are for a short report
        command += ["-p", "no:cacheprovider", "--durations=8", str(ROOT / "tests" / "test_gpu.py")]
    carried = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *carried]),
        "IREASONER_TEST_DEVICE": asked.device,
        "HF_HUB_OFFLINE": "1",
    }
    began = time.monotonic()
    ended = run(command, limit, log, environment)
    text = log.read_text("utf-8", "replace")
    part = tests_found(text) if name == "tests" else json.loads(found.read_text()) if found.exists() else {}
    part |= {"ended": ended, "seconds": time.monotonic() - began}
    if ended != "done":
        part["last_lines"] = text.splitlines()[-40:]
        print(*part["last_lines"], sep="\n", flush=True)
    return part


def run(command: Sequence[str], limit: float, log: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Run a command, which is killed after `limit` seconds, with its output in a file; how it ended, in words."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with whatever it started
            process.wait()
            return f"out of time after {limit:.0f} seconds"
    return "done" if code == 0 else f"failed with exit code {code}"


def tests_found(log: str) -> dict[str, Any]:
    """The outcome of each test that ended, from pytest's own lines, and the figures that tests printed."""
    lines = re.split(r"^=+ (?!test session starts)", log, maxsplit=1, flags=re.MULTILINE)[0].splitlines()  # no summary
    outcomes: dict[str, str] = {}
    running = ""
    for line in lines:
        if started := re.match(r"\S*test_gpu\.py::(\S+)", line):
            running = started[1]
        if running and (ended := re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)):
            outcomes[running] = ended[1].lower()
            running = ""
    return {
        **{name: sum(o == name for o in outcomes.values()) for name in ("passed", "failed", "error", "skipped")},
        "outcomes": outcomes,
        "figures": [line for line in log.splitlines() if any(words in line for words in TOLD)],
    }


class Part:
    """The doctor or the benchmark, in a process of its own; what is found is written as it comes."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.found = asked, dict[str, Any]()

    def keep(self, **found: Any) -> None:
        self.found |= found
        write(self.asked.json, self.found)

    def run(self) -> None:
        from ireasoner.app.display import quiet_libraries

        quiet_libraries()  # before transformers is imported
        {"doctor": self.doctor, "bench": self.bench}[self.asked.part]()

    def doctor(self) -> None:
        from ireasoner.app.display import print_finding
        from ireasoner.model.options import BackboneOptions
        from ireasoner.studies.doctor import examine

        asked, findings = self.asked, []
        options = BackboneOptions(dtype="float32" if asked.device == "cpu" else "bfloat16")
        for finding in examine(asked.model, options, device=asked.device):
            print_finding(finding)
            findings.append(asdict(finding))
            self.keep(findings=findings)

    def bench(self) -> None:
        from published_step import Published

        from ireasoner.app.display import print_table
        from ireasoner.studies.bench import heading, load_bench, measure, table

        asked = self.asked
        bench = load_bench(asked.model, asked.tokens, asked.group_size, asked.image_tokens, asked.device)
        sizes: list[dict[str, Any]] = []
        for images in asked.images:
            result = measure(bench, {"ours": bench.ours}, [images], asked.repetitions)
            print(heading(result))
            print_table(*table(result["sizes"][0]))
            sizes += result["sizes"]
            self.keep(**{**result, "sizes": sizes})
        published = Published(bench)
        timed: dict[int, dict[str, Any]] = {}
        for tokens in asked.published_tokens:
            bench.tokens = tokens
            result = measure(bench, {"published": published.step}, [1], 1)
            timed[tokens] = result["sizes"][0]["sides"]["published"]
            self.keep(published={"images_per_step": 1, "timed": timed})
        prompt = sizes[0]["prompt_tokens"]
        seconds = extrapolated({tokens: side["seconds"] for tokens, side in timed.items()}, asked.tokens, prompt)
        self.keep(published={**self.found["published"], "extrapolated_to": asked.tokens, "seconds": seconds})


def extrapolated(timed: Mapping[int, Mapping[str, float]], tokens: int, prompt: int) -> dict[str, float]:
    """Seconds of the published phases with completions of `tokens`, from those with two shorter lengths.

    Args:
        timed: for each of two lengths, seconds by phase.
        tokens: the length to extrapolate to.
        prompt: tokens of the prompt, which the update reads before each completion.
    """
    (few, fewer), (many, more) = sorted(timed.items())
    seconds = dict(more)
    seconds["solve"] += max(0.0, more["solve"] - fewer["solve"]) / (many - few) * (tokens - many)
    seconds["update"] *= (prompt + tokens) / (prompt + many)
    return seconds


# --- what came of it --------------------------------------------------------------------------------------------------


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Replace the file as a whole, so that one that is killed while it writes leaves the former one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=2, default=str) + "\n")
    part.replace(path)


def table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each thing to look at: what was found, what was aimed at, and whether it was met (None: no aim)."""
    parts = result["parts"]
    tests, doctor, bench = (parts.get(name, {}) for name in PARTS)
    rows: list[dict[str, Any]] = []

    def add(what: str, found: str, aim: str = "", met: bool | None = None) -> None:
        rows.append({"what": what, "found": found, "aim": aim, "met": met})

    if "tests" in parts:
        counts = ", ".join(f"{tests.get(name, 0)} {name}" for name in ("passed", "failed", "error", "skipped"))
        add("GPU tests", f"{counts}; {tests['ended']}", "all pass", tests["ended"] == "done")
    if "doctor" in parts:
        findings = doctor.get("findings", [])
        passed = sum(finding["passed"] for finding in findings)
        sound = doctor["ended"] == "done" and passed == len(findings)
        add("doctor", f"{passed} of {len(findings)} checks hold; {doctor['ended']}", "all hold", sound)
    if "bench" in parts and bench["ended"] != "done":
        add("bench", bench["ended"], "done", False)
    if "ceilings" in bench:
        limits = bench["ceilings"]
        add("matrix product", f"{limits['flops_per_second'] / 1e12:.1f} TFLOP/s")
        add("copy", f"{limits['bytes_per_second'] / 1e12:.2f} TB/s")
    published = bench.get("published", {}).get("seconds")
    for size in bench.get("sizes", []):
        rows += rows_of(size, published)
    return rows


def rows_of(size: Mapping[str, Any], published: Mapping[str, float] | None) -> list[dict[str, Any]]:
    """The rows of one size of a step. `published` is what each phase takes it for one image, extrapolated."""
    ours, images = size["sides"]["ours"], size["images_per_step"]
    seconds, floors = ours["seconds"], ours["floor_seconds"]
    step = f"{images} image{'s' if images > 1 else ''}: "
    decode, update = seconds["decode"] / floors["decode"], floors["update"] / seconds["update"]
    found = [
        (f"{seconds['decode']:.2f} s, {decode:.2f} times its floor", "decode", decode <= AIMS["decode"]),
        (f"{seconds['update']:.2f} s, {update:.0%} of the matrix product's rate", "update", update >= AIMS["update"]),
    ]
    aims = {
        "decode": f"at most {AIMS['decode']} times",
        "update": f"at least {AIMS['update']:.0%}",
        "published": f"at least {AIMS['published']:.0f} times",
    }
    whole = f"{ours['step_seconds']:.2f} s, {ours['trajectories_per_second']:.2f} trajectories/s"
    rows = [{"what": f"{step}whole step", "found": whole, "aim": "", "met": None}]
    if published:
        times = images * sum(published.values()) / ours["step_seconds"]
        text = f"{images * sum(published.values()):.0f} s, {times:.1f} times ours (extrapolated)"
        found.append((text, "published", times >= AIMS["published"]))
    rows += [{"what": step + name, "found": text, "aim": aims[name], "met": met} for text, name, met in found]
    if ours["peak_bytes"] is not None:
        peak = f"{ours['peak_bytes'] / 2**30:.1f} GiB"
        rows.append({"what": f"{step}peak memory", "found": peak, "aim": "", "met": None})
    return rows


def show(result: Mapping[str, Any]) -> None:
    """Print the table."""
    told = {True: "met", False: "MISSED", None: ""}
    rows: list[Sequence[str]] = [("", "found", "aim", "")]
    rows += [(row["what"], row["found"], row["aim"], told[row["met"]]) for row in result["table"]]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    about, asked = result["machine"], result["asked"]
    print(
        f"\n{about['gpu'] or 'CPU'} (driver: {about['driver']}), torch {about['torch']}, CUDA {about['cuda']}, ", end=""
    )
    print(f"transformers {about['transformers']}, peft {about['peft']}, Python {about['python']}")
    print(
        f"{asked['model']}, images of about {asked['image_tokens']} tokens, groups of {asked['group_size']}, ", end=""
    )
    print(f"completions of {asked['tokens']} tokens")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
