"""Several processes: the same run as one, to rounding; killed, they say what to do and lose nothing.

Two runs are started by accelerate's launcher, as users start them, and one of their processes is killed, or Ctrl-C
pressed. The processes of the others are forked, which saves each of them the seconds of the imports.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import forked
from forked import Forked
from ireasoner.method.types import UsageError
from ireasoner.model import distributed as processes
from ireasoner.model import loading
from ireasoner.model.distributed import Joined, LostProcessError
from ireasoner.model.parallel import Processes
from ireasoner.playground import dataset
from ireasoner.training import loop
from ireasoner.training.recorder import read_records
from ireasoner.training.sources import folder
from ireasoner.training.state import Run

LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    *("-m", "ireasoner"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("processes")
    dataset.write_unlabeled(out / "unlabeled", 12, "chalk")
    dataset.write_questions(out / "test", 5, "chalk")
    return out


def options(place: Path, **more: Any) -> list[str]:
    given = {
        **{"images": place / "unlabeled", "eval-data": place / "test/test.jsonl", "model": "tiny", "device": "cpu"},
        **{"steps": 3, "images-per-step": 3, "proposer-every": 2, "blank-every": 2, "save-every": 1},
        **{"watch-window": 2, "probe-images": 2, "keep-checkpoints": 0, "group-size": 3, "eval-questions": 3},
        **{"max-solution-tokens": 80, **more},
    }
    return ["train", *(str(part) for name, value in given.items() for part in (f"--{name}", value))]


def finish(processes: list[Forked], expected: int = 0) -> list[str]:
    """Wait for the processes of a run, each of which must end with this code; what each of them printed."""
    found = [process.wait() for process in processes]
    assert [done.returncode for done in found] == [expected] * len(found), "\n".join(done.stderr for done in found)
    return [done.stdout + done.stderr for done in found]


def finish_alone(place: Path, name: str, *arguments: Any, before: Callable[[], object] = int) -> str:
    """Carry out a command in one process; what it printed."""
    return finish([forked.start(*arguments, output=place / f"{name}-printed", before=before)])[0]


def finish_together(place: Path, name: str, *arguments: Any, before: Callable[[], object] = int) -> list[str]:
    """The same in two processes of one run."""
    return finish(forked.start_two(*arguments, output=place / f"{name}-printed", before=before))


@pytest.fixture(scope="module")
def together(place: Path) -> Path:
    finish_together(place, "together", *options(place), "--out", place / "together")
    return place / "together"


def records(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    """The same episodes and probes, numbers and adapters to rounding."""
    for a, b in zip(records(one, "episodes.jsonl"), records(other, "episodes.jsonl"), strict=True):
        assert (a["step"], a["image"], a["question"]) == (b["step"], b["image"], b["question"])
        assert [t["text"] for t in a["trajectories"]] == [t["text"] for t in b["trajectories"]]
        assert [t["reward"] for t in a["trajectories"]] == pytest.approx([t["reward"] for t in b["trajectories"]])
    for a, b in zip(records(one, "metrics.jsonl"), records(other, "metrics.jsonl"), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if not name.startswith(("time/", "sampler_gap/")):
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
    assert [p["text"] for p in records(one, "probes.jsonl")] == [p["text"] for p in records(other, "probes.jsonl")]
    first, second = (json.loads((path / "summary.json").read_text()) for path in (one, other))
    assert first["trained_roles"] == second["trained_roles"]
    assert "solver" in first["trained_roles"]
    for role in first["trained_roles"]:
        mine, theirs = (load_file(path / role / "adapter_model.safetensors") for path in (one, other))
        for name, tensor in mine.items():
            assert tensor.any()
            torch.testing.assert_close(tensor, theirs[name], atol=2e-5, rtol=0)
    assert first["before"] == second["before"]


def assert_bitwise(one: Path, other: Path) -> None:
    """The same episodes, and the same adapters and optimizers in every checkpoint."""
    files = sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    assert sorted(path.relative_to(one) for path in one.rglob("*.safetensors")) == files
    assert [name for name in files if (one / name).read_bytes() != (other / name).read_bytes()] == []
    assert (one / "episodes.jsonl").read_bytes() == (other / "episodes.jsonl").read_bytes()


def test_two_processes_and_one_make_the_same_run(place: Path, together: Path):
    """Three images a step over two processes: baseline, KL, gradients, watch and evaluation are global."""
    finish_alone(place, "alone", *options(place), "--out", place / "alone")
    assert_same_run(place / "alone", together)


def test_a_process_without_images_takes_the_same_steps(place: Path):
    """Also where another view of the image is asked about, which has nothing to sample there either."""
    few = options(place, **{"images-per-step": 1, "steps": 2, "recipe": "paper", "device": "auto", "eval-questions": 1})
    few.append("--other-view")
    first, other = finish_together(place, "few-together", *few, "--out", place / "few-together")
    alone = finish_alone(place, "few-alone", *few, "--out", place / "few-alone")
    said = ["1 of 2 processes have nothing to play" in printed for printed in (first, other, alone)]
    assert said == [True, False, False]
    assert_same_run(place / "few-alone", place / "few-together")


def workers(launcher: int) -> dict[int, int]:
    """The launcher's children that have a rank: their process ids by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
            environment = (path / "environ").read_bytes().split(b"\0") if int(fields[1]) == launcher else []
        except OSError:
            continue
        found |= {int(entry[5:]): int(path.name) for entry in environment if entry.startswith(b"RANK=")}
    return found


@pytest.mark.slow
def test_a_killed_process_ends_the_launched_run_with_a_message_and_nothing_is_lost(place: Path, together: Path):
    out = place / "killed-0"
    with launcher_at_step(out, *options(place), step=2) as launcher:
        os.kill(workers(launcher.pid)[0], signal.SIGKILL)
        said = launcher.communicate(timeout=120)[1]
    assert launcher.returncode != 0
    assert_lost(said, out)
    finish_together(place, "resumed-0", "train", "--resume", out)
    assert_bitwise(out, together)


def test_the_writer_outlives_the_other_process_and_says_so(place: Path, together: Path):
    out = place / "killed-1"
    first, other = forked.start_two(*options(place), "--out", out, output=place / "killed-1-printed")
    with first, other:
        first.wait_until((out / "checkpoints/step-000002").exists)
        other.send(signal.SIGKILL)
        done = first.wait()
    assert done.returncode == 2
    assert_lost(done.stderr, out)
    finish_alone(place, "resumed-1", "train", "--resume", out)  # as many processes as one likes
    assert_same_run(out, together)


def assert_lost(said: str, out: Path) -> None:
    assert "another process of this run has ended" in said
    assert "train --resume RUN" in said
    assert not (out / "summary.json").exists()


@pytest.mark.slow
def test_killed_at_random_moments_two_processes_end_like_the_reference(place: Path, together: Path):
    """First both processes at once, as when the machine fails; then one of them, whichever it is."""
    out, rng = place / "killed-at-random", random.Random()
    moments = [(0, rng.uniform(0, 1), (0, 1)), (2, rng.uniform(0, 1), (rng.randrange(2),))]
    print("after which step, seconds later, ranks:", moments)  # shown if this fails
    kills = 0
    for step, delay, ranks in moments:
        command = ["train", "--resume", out] if step else [*options(place), "--out", out]
        both = forked.start_two(*command, output=place / "killed-at-random-printed")
        both[0].wait_until((out / f"checkpoints/step-{step:06d}").exists)
        time.sleep(delay)
        kills += sum(both[rank].send(signal.SIGKILL) for rank in ranks)  # one may have ended before
        for process in both:
            process.wait(120)
    assert kills >= 2
    finish_together(place, "resumed-at-random", "train", "--resume", out)
    assert_bitwise(out, together)
    assert not list((out / "checkpoints").glob(".*"))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[str]]:
    """Two network namespaces that are connected with each other, 10.213.7.1 and 10.213.7.2: as good as two hosts."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("only root can make network namespaces, with the command ip")
    names = [f"ireasoner-{os.getpid()}-{rank}" for rank in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "net0", "netns", names[0], "type", "veth", "peer", "name", "net0", "netns", names[1])
        for rank, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.213.7.{rank + 1}/24", "dev", "net0")
            ip("-n", name, "link", "set", "net0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr}")
    else:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


CLONE_NEWNET = 0x40000000  # of sched.h: the namespace is one of networks


def move_to(host: str) -> None:
    """Have this process, and the threads that it starts from now on, use the network of a host."""
    with open(f"/run/netns/{host}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def start_on(hosts: list[str], *arguments: object, output: Path, **environment: str) -> list[Forked]:
    """Start one process of a run on each host."""
    shared = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "10.213.7.1",
        "MASTER_PORT": "29500", **environment,
    }  # fmt: skip
    return [
        forked.start(
            *arguments,
            output=output / str(rank),
            environment=shared | {"RANK": str(rank)},
            before=partial(move_to, host),
        )
        for rank, host in enumerate(hosts)
    ]


@pytest.mark.slow
def test_where_the_link_between_two_hosts_is_cut_both_end_soon_and_the_run_goes_on(
    place: Path, together: Path, hosts: list[str]
):
    """Torch alone would wait for half an hour without a word."""
    out, patience, printed = place / "cut", 4, place / "cut-printed"
    both = start_on(
        hosts, *options(place), "--out", out, "--patience", patience, output=printed, GLOO_SOCKET_IFNAME="net0"
    )
    with both[0], both[1]:
        both[0].wait_until((out / "checkpoints/step-000001").exists)
        ip("-n", hosts[1], "link", "set", "net0", "down")
        began = time.monotonic()
        said = finish(both, expected=2)
        assert time.monotonic() - began < patience + 10
    for each in said:
        assert_lost(each, out)
        assert "Timed out waiting 4000ms" in each
    ip("-n", hosts[1], "link", "set", "net0", "up")
    finish(start_on(hosts, "train", "--resume", out, output=place / "mended-printed", GLOO_SOCKET_IFNAME="net0"))
    assert_bitwise(out, together)  # of two processes on one host


def test_a_host_whose_name_leads_nowhere_is_told_before_anything_hangs(place: Path, hosts: list[str]):
    """As where /etc/hosts has 127.0.1.1 for it: gloo would tell the other host this address."""
    both = start_on(hosts, *options(place), "--out", place / "nowhere", output=place / "nowhere-printed")
    for said in finish(both, expected=2):
        assert "set GLOO_SOCKET_IFNAME to the network interface that leads to them (there are net0)" in said


def test_hosts_that_do_not_share_the_run_directory_are_told(place: Path, together: Path):
    """Each would go on from a step of its own."""
    both = []
    for environment in forked.environments_of_two():
        out = place / f"unshared-{environment['RANK']}"
        shutil.copytree(together, out)
        (out / "summary.json").unlink()
        printed = place / f"{out.name}-printed"
        both.append(forked.start("train", "--resume", out, output=printed, environment=environment))
    shutil.rmtree(place / "unshared-1" / "checkpoints" / "step-000003")
    for said in finish(both, expected=2):
        assert "after different steps (2, 3): it must be one folder that all hosts share" in said
    assert records(place / "unshared-0", "metrics.jsonl") == records(together, "metrics.jsonl")


def test_processes_that_do_not_find_each_other_say_where_they_looked(monkeypatch: pytest.MonkeyPatch):
    def fail(**options: Any) -> None:
        assert options["timeout"].total_seconds() == 7
        raise RuntimeError("Unable to find address for: eth7\n#0: a trace")

    monkeypatch.setattr(processes, "PartialState", fail)
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "gpu1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth7"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(LostProcessError, match="did not find each other at gpu1:29500 within --patience") as alone:
        processes.joined("cpu", 7).__enter__()
    assert "GLOO_SOCKET_IFNAME" not in str(alone.value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(LostProcessError, match=r"GLOO_SOCKET_IFNAME .* may have to name the network interface") as lost:
        processes.joined("cpu", 7).__enter__()
    assert str(lost.value).endswith("(torch says: Unable to find address for: eth7)")


def test_a_mistake_is_said_by_each_process(place: Path):
    processes = forked.start_two(
        *options(place, model="no/such/model"), "--out", place / "mistake", output=place / "mistake-printed"
    )
    first, other = finish(processes, expected=2)
    assert "ireasoner: --model: cannot load the model" in first
    assert "ireasoner, process 1: --model: cannot load the model" in other
    assert not (place / "mistake").exists()


def fail_to_load() -> None:
    """Rank 1 has no memory for the model."""

    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("made to fail")

    if os.environ["RANK"] == "1":
        loading.make_policy = fail


def test_where_one_process_cannot_load_the_model_no_folder_is_left(place: Path):
    out = place / "new" / "run"
    both = forked.start_two(*options(place), "--out", out, output=place / "no-load-printed", before=fail_to_load)
    first, other = (process.wait() for process in both)
    assert (first.returncode, other.returncode) == (2, 2)
    assert "another process of this run has ended" in first.stderr
    assert "made to fail" in other.stderr
    assert not out.parent.exists()


def test_alone_nothing_is_exchanged():
    alone = Processes()
    assert alone.is_main
    assert alone.share(3) == [0, 1, 2]
    assert alone.gather(["a", "b"], 2) == ["a", "b"]
    assert alone.sum(torch.tensor([1.5])).item() == 1.5
    assert (alone.any(True), alone.any(False)) == (True, False)
    assert [Processes(i, 2).share(5) for i in range(2)] == [[0, 2, 4], [1, 3]]


def exchange() -> int:
    """What each of two processes does, where whatever torch would send as a pickle is refused."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("an object was sent as a pickle")

    with processes.joined("cpu", 60) as joined:
        for name in ("dumps", "loads", "Pickler", "Unpickler"):
            setattr(pickle, name, refuse)
        torch.distributed.distributed_c10d._pickler = torch.distributed.distributed_c10d._unpickler = refuse
        with pytest.raises(AssertionError, match="as a pickle"):
            torch.distributed.all_gather_object([None, None], 1)
        rank = joined.index
        own = [{"item": i, "text": "ö" * i} for i in joined.share(5)]
        assert joined.gather(own, 5) == [{"item": i, "text": "ö" * i} for i in range(5)]
        assert joined.gather([], 0) == []
        assert joined.sum(torch.tensor([1.5, rank], dtype=torch.float64)).tolist() == [3.0, 1.0]
        assert joined.maximum(float(rank)) == 1.0
        assert math.isnan(joined.maximum(math.nan if rank else 0.0))
        assert (joined.any(rank == 1), joined.any(False)) == (True, False)
        weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))
        if rank == 1:
            (2 * weight.sum() + 3 * bias.sum()).backward()
        joined.sum_gradients([weight, bias])  # the other process has none yet
        assert weight.grad is not None
        assert bias.grad is not None
        assert weight.grad.tolist() == [[2.0, 2.0], [2.0, 2.0]]
        assert bias.grad.tolist() == [3.0, 3.0, 3.0]
        joined.wait()
    return 0


def test_two_processes_exchange_tensors_only(tmp_path: Path):
    """By every method; whatever torch would send as a pickle is refused."""
    environments = forked.environments_of_two()
    finish([Forked(exchange, tmp_path / each["RANK"], {**each, "ACCELERATE_USE_CPU": "1"}) for each in environments])


def test_what_fails_between_processes_keeps_its_reason(monkeypatch: pytest.MonkeyPatch):
    def failing(error: RuntimeError) -> Any:
        def reduce(*_: Any) -> None:
            raise error

        monkeypatch.setattr(processes, "reduce", reduce)
        return Joined(0, 2).sum(torch.ones(1))

    with pytest.raises(LostProcessError) as lost:
        failing(RuntimeError("Connection closed by peer\n#0: a trace"))
    assert "has ended" in str(lost.value)
    assert str(lost.value).endswith("(torch says: Connection closed by peer)")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        failing(torch.OutOfMemoryError("CUDA out of memory"))


def launcher_at_step(out: Path, *command: str, step: int) -> subprocess.Popen[str]:
    """A launcher in a process group of its own, whose run has saved this step."""
    launcher = subprocess.Popen(
        [*LAUNCH, *command, "--out", str(out)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out / f"checkpoints/step-{step:06d}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return launcher


@pytest.mark.slow
def test_ctrl_c_stops_both_processes_with_a_checkpoint(place: Path):
    """A terminal sends it to launcher and processes alike."""
    out = place / "interrupted"
    with launcher_at_step(out, *options(place, steps=200), step=1) as launcher:
        os.killpg(launcher.pid, signal.SIGINT)
        said = launcher.communicate(timeout=120)[0]
    assert f"saved. Continue with: ireasoner train --resume {out}" in said
    played = len(records(out, "metrics.jsonl"))
    assert (out / "checkpoints" / f"step-{played:06d}").is_dir()
    assert not (out / "summary.json").exists()


def fail_at_step_two() -> None:
    """Rank 1 cannot go on at step 2."""
    update = loop.update

    def fail(run: Run, play: Any) -> Any:
        if run.step == 2:
            raise MemoryError("made to fail")
        return update(run, play)

    if os.environ["RANK"] == "1":
        loop.update = fail


def test_a_process_that_fails_ends_the_run_with_its_own_reason(place: Path):
    """Rank 0 must not wait for it for ever."""
    out = place / "failing"
    both = forked.start_two(*options(place), "--out", out, output=place / "failing-printed", before=fail_at_step_two)
    first, other = (process.wait() for process in both)
    assert (first.returncode, other.returncode) == (2, 1)
    assert "made to fail" in other.stderr
    assert_lost(first.stderr, out)
    assert (out / "checkpoints" / "step-000001").is_dir()


def lose(image: str) -> None:
    """The second process, or the only one, cannot read one of the images."""
    read = folder.read_file

    def fail(path: Path, max_bytes: int) -> bytes:
        if str(path).endswith(image):
            raise OSError(5, "Input/output error")
        return read(path, max_bytes)

    if os.environ.get("RANK", "1") == "1":
        folder.read_file = fail


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_is_skipped_by_both(place: Path, together: Path):
    lost = records(together, "episodes.jsonl")[1]["image"]  # the second of the first step: the second process reads it
    few = options(place, **{"steps": 2, "eval-questions": 1})
    for carry_out, name in ((finish_together, "lost-together"), (finish_alone, "lost-alone")):
        carry_out(place, name, *few, "--out", place / name, before=partial(lose, lost))
        (skipped,) = read_records(place / name / "skipped.jsonl")
        assert (skipped["image"], skipped["reason"]) == (lost, "Input/output error")
    assert lost not in {episode["image"] for episode in read_records(place / "lost-together" / "episodes.jsonl")}
    assert_same_run(place / "lost-alone", place / "lost-together")


def test_a_device_with_a_number_is_refused_for_several_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--device cuda:0 names one GPU"), processes.joined("cuda:0", 60):
        pass


def test_a_reward_of_ones_own_is_computed_once_and_shared(place: Path, tmp_path: Path):
    """It may not give the same number twice; here it gives the number of the process that asks."""
    (tmp_path / "own.py").write_text(
        "import os\ndef fn(group, context):\n"
        "    return [(1.0 + int(os.environ['RANK'])) * (k + 1) for k in range(len(group.texts))]\n"
    )
    out = place / "own-reward"
    finish_together(place, "own-reward", *options(place, steps="1", reward=f"{tmp_path}/own.py:fn"), "--out", out)
    episodes = list(read_records(out / "episodes.jsonl"))
    for i, episode in enumerate(episodes):
        for k, t in enumerate(episode["trajectories"]):
            assert t["problem"] is not None or t["reward"] == (1.0 + i % 2) * (k + 1)
    assert any(episode["trajectories"] for episode in episodes)
