"""Capturing by hand, on a stand-in for the parts of `torch.cuda` that it uses: a failed capture leaves nothing behind.

What the stand-in does where a capture fails is read in the source of torch 2.11. `test_gpu.py` tries the real ones.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from traceback import extract_stack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from families import internvl
from ireasoner.method.texts import solver_messages
from ireasoner.rollouts import live
from ireasoner.rollouts.capture import CudaGraph, host_waits
from ireasoner.rollouts.live import LiveEngine
from models import load, requests, sample
from recorded import WAIT, Recording

GPU = torch.device("cuda:0")
POINTS = ("prologue", "begin", "step", "invalid step", "end", "instantiate")
CHATS = [solver_messages("{question}", question) for question in ("Which bar is the tallest?", "Where is it?")]


class FakeGpu:
    """One GPU whose captures fail at a point of `POINTS`, or not at all; `error` is raised there."""

    def __init__(self, fails_at: str = "", error: type[RuntimeError] = RuntimeError) -> None:
        self.fails_at, self.error = fails_at, error
        self.stream, self.capturing = "default", ""  # the current one, and the one that captures
        self.underway: list[tuple[int, int]] = []  # pools that allocations go to
        self.uses: dict[tuple[int, int], int] = {}  # users of each pool that has memory
        self.draws = True  # whether the generator is able to
        self.emptied = self.waited = 0

    def fail(self, point: str) -> None:
        if point == self.fails_at:
            raise self.error(f"failed at {point}")

    def as_before(self) -> bool:
        return (self.stream, self.capturing, self.underway, self.draws) == ("default", "", [], True)

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream.name
        yield_failed = True
        try:
            yield
            yield_failed = False
        finally:
            self.stream = before
            assert yield_failed or not self.capturing

    def end(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.underway:
            raise RuntimeError("not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, device: int, pool: tuple[int, int]) -> None:
        self.uses[pool] -= 1
        assert self.uses[pool] >= 0
        if not self.uses[pool]:
            del self.uses[pool]

    def wait(self) -> None:
        self.waited += 1


class FakeStream:
    def __init__(self, gpu: FakeGpu, name: str) -> None:
        self.device, self.name, self.gpu = GPU, name, gpu

    def wait_stream(self, other: FakeStream) -> None:
        assert not self.gpu.capturing  # the event would become part of the capture

    def synchronize(self) -> None:
        self.gpu.wait()


class FakePool:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.id = gpu, (0, len(gpu.uses) + 1)
        gpu.uses[self.id] = 1

    def use_count(self) -> int:
        return self.gpu.uses.get(self.id, 0)

    def __del__(self) -> None:
        self.gpu.release(0, self.id)


class FakeGraph:
    """Operations of a step are recorded between `capture_begin` and `capture_end`."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.recording, self.ended = gpu, Recording(), False

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        assert self.gpu.stream != "default"
        assert self.gpu.draws
        self.pool, self.gpu.draws = pool, False
        self.gpu.fail("prologue")
        self.gpu.uses[pool] += 1
        self.gpu.underway.append(pool)
        self.gpu.fail("begin")
        self.gpu.capturing = self.gpu.stream
        self.recording.begin()

    def capture_end(self) -> None:
        if not self.gpu.capturing:
            raise RuntimeError("the stream is not capturing")
        self.gpu.capturing = ""
        self.recording.end()
        self.gpu.fail("end")
        if self.gpu.fails_at == "invalid step":
            raise RuntimeError("the capture is invalid")
        self.gpu.end(0, self.pool)
        self.gpu.draws, self.ended = True, True
        self.gpu.fail("instantiate")

    def replay(self) -> None:
        assert self.ended
        self.recording.replay()

    def reset(self) -> None:
        if self.ended:
            self.gpu.release(0, self.pool)
        self.ended = False


def in_place_of_torch(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> FakeStream:
    """Put the stand-ins in the place of torch's; returns a stream to capture on."""

    def set_state(_: Any) -> None:
        gpu.draws = True

    def empty_cache() -> None:
        assert not gpu.underway
        gpu.emptied += 1

    generator = SimpleNamespace(clone_state=lambda: "a copy", graphsafe_set_state=set_state)
    for name, stand_in in {
        "CUDAGraph": partial(FakeGraph, gpu),
        "MemPool": partial(FakePool, gpu),
        "stream": gpu.on,
        "device": lambda _: warnings.catch_warnings(),  # any context
        "current_stream": lambda _: FakeStream(gpu, "default"),
        "current_device": lambda: 0,
        "default_generators": (generator,),
        "empty_cache": empty_cache,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", gpu.end)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", gpu.release)
    return FakeStream(gpu, "of captures")


class Counter:
    """A step that counts how often it ran, in a tensor as a captured step must."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.count, self.seen_on = gpu, torch.zeros(1), ""

    def __call__(self) -> None:
        self.seen_on = self.gpu.stream
        self.count.add_(1)
        self.gpu.fail("step")
        self.gpu.fail("invalid step")


def test_a_capture_runs_nothing_and_a_call_repeats_it(monkeypatch: pytest.MonkeyPatch):
    gpu = FakeGpu()
    stream, step = in_place_of_torch(monkeypatch, gpu), Counter(gpu)
    graph = CudaGraph(stream, step)  # type: ignore[arg-type]
    assert (step.seen_on, step.count.item()) == ("of captures", 0)
    assert gpu.as_before()
    graph()
    graph()
    assert step.count.item() == 2
    assert len(gpu.uses) == 1
    del graph
    assert gpu.uses == {}  # its memory is returned,
    assert gpu.waited == 1  # when its last replay is done
    assert gpu.emptied == 0


@pytest.mark.parametrize("point", POINTS)
def test_a_capture_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, point: str):
    gpu = FakeGpu(point)
    stream, step = in_place_of_torch(monkeypatch, gpu), Counter(gpu)
    with pytest.raises(RuntimeError, match=f"failed at {point}|the capture is invalid"):
        CudaGraph(stream, step)  # type: ignore[arg-type]
    assert gpu.as_before()
    assert gpu.uses == {}
    assert gpu.emptied == 0
    assert step.count.item() == 0
    gpu.fails_at = ""
    CudaGraph(stream, step)()  # type: ignore[arg-type]
    assert step.count.item() == 1
    assert gpu.as_before()


@pytest.mark.parametrize("point", POINTS)
def test_the_memory_that_is_kept_for_reuse_is_given_up_for_a_graph(monkeypatch: pytest.MonkeyPatch, point: str):
    gpu = FakeGpu(point, torch.OutOfMemoryError)
    stream, step = in_place_of_torch(monkeypatch, gpu), Counter(gpu)
    with pytest.raises(torch.OutOfMemoryError):
        CudaGraph(stream, step)  # type: ignore[arg-type]
    assert gpu.emptied == 1
    assert gpu.as_before()
    assert gpu.uses == {}
    empty_cache = torch.cuda.empty_cache

    def make_room() -> None:
        empty_cache()
        gpu.fails_at = ""

    monkeypatch.setattr(torch.cuda, "empty_cache", make_room)
    CudaGraph(stream, step)()  # type: ignore[arg-type]
    assert gpu.emptied == 2
    assert step.count.item() == 1


class Waits(TorchDispatchMode):
    """Warns of what would wait for a GPU, as torch does in the mode "warn"."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation in WAIT:
            asking = next(
                frame for frame in reversed(extract_stack()[:-1]) if "torch" not in Path(frame.filename).parts
            )
            warnings.warn_explicit(
                "called a synchronizing CUDA operation", UserWarning, asking.filename, asking.lineno or 0
            )
        return operation(*args, **kwargs or {})


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str | int]:
    """The modes that torch's search for waits was set to, with a stand-in for it that sees the waits on a CPU."""
    found: list[str | int] = []
    active = Waits()

    def set_mode(mode: str | int) -> None:
        found.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        if mode == "warn":
            active.__enter__()
        else:
            active.__exit__(None, None, None)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    return found


def test_waits_are_found_and_other_warnings_pass(modes: list[str | int]):
    number = torch.ones(1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with host_waits(GPU) as waits:
            number.add_(1)
            warnings.warn("of another matter", stacklevel=1)
            number.item()
            assert number > 1
    assert len(waits) == 2
    assert all("line" in wait for wait in waits)
    assert [str(warning.message) for warning in told] == ["of another matter"]
    assert modes == ["warn", 0]


def test_the_search_for_waits_ends_where_a_step_fails(modes: list[str | int]):
    with pytest.raises(ValueError, match="a fault"), host_waits(GPU):
        raise ValueError("a fault")
    assert modes == ["warn", 0]


def test_no_waits_are_looked_for_without_a_gpu(modes: list[str | int]):
    with host_waits(torch.device("cpu")) as waits:
        torch.ones(1).item()
    assert waits == []
    assert modes == []


def test_a_dynamic_rope_is_found_and_never_captured(
    modes: list[str | int], tmp_path: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
):
    """InternVL3 asks for the longest position in every forward pass, to see whether its frequencies still hold."""
    internvl(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config["text_config"] |= {"rope_parameters": rope, "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    policy = load(str(tmp_path))
    assert policy.shares_attention
    engine, asked = LiveEngine(policy), requests(policy, pictures[:2], CHATS)
    expected = sample(engine, asked, "solver", 3, 12)
    monkeypatch.setattr(live, "host_waits", lambda _: host_waits(GPU))

    def capture(_: Any) -> Callable[[], None]:
        raise AssertionError("a capture was begun")

    engine.capture = capture
    with pytest.warns(UserWarning, match="cannot be captured.*waits for the GPU in .*modeling_rope_utils.py") as told:
        found = sample(engine, asked, "solver", 3, 12)
    assert len(told) == 1
    assert found == expected
    assert engine.capture is None


@pytest.mark.parametrize("point", ["", *(point for point in POINTS if "step" not in point)])
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_the_same_is_sampled_whether_capturing_works_or_fails(
    monkeypatch: pytest.MonkeyPatch, pictures: list[Image.Image], point: str, error: type[RuntimeError]
):
    policy = load()
    engine, asked = LiveEngine(policy), requests(policy, pictures[:2], CHATS)
    expected = [[c.token_ids for c in group] for group in sample(engine, asked, "solver", 3, 24)]
    gpu = FakeGpu(point, error)
    engine.capture = partial(CudaGraph, in_place_of_torch(monkeypatch, gpu))  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = sample(engine, asked, "solver", 3, 24)
    assert [[c.token_ids for c in group] for group in found] == expected
    # Where memory is short, a smaller batch may still be captured.
    assert (engine.capture is None) == (len(told) == 1) == bool(point and error is RuntimeError)
    assert gpu.as_before()
    assert gpu.uses == {}
