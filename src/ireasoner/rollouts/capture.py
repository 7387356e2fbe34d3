"""CUDA graphs of a decoding step, captured so that a capture that fails leaves nothing behind.

`torch.cuda.graph` is not used: where a capture fails, it leaves its stream as the current one, the allocator as if the
capture went on (memory is then never returned to the GPU), and the random generator unusable. It also synchronises the
GPU and empties the cache before every capture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

# Graphs whose capture failed. torch's allocator of host memory keeps a pointer to such a graph, and offers no way to
# take it back; so the graph is never freed. It holds no memory of the GPU.
_failed: list[torch.cuda.CUDAGraph] = []


@contextmanager
def host_waits(device: torch.device) -> Iterator[list[str]]:
    """Find where the host waits for the GPU inside, which a captured step must not do.

    torch warns of most waits, but not of all: a capture can still fail. What runs inside runs to its end; torch's mode
    "error" would stop it halfway, and would raise in other threads as well.

    Args:
        device: on another one than a GPU nothing is looked for.

    Yields:
        A list that is filled at the end: the file and the line of each operation that waited.
    """
    waits: list[str] = []
    if device.type != "cuda":
        yield waits
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            waits.append(f"{warning.filename}, line {warning.lineno}")
        elif "debug mode is a prototype" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class CudaGraph:
    """A step as a CUDA graph. To call it launches all of its kernels at once, on the current stream.

    The memory that the step takes while it runs is kept in a pool of the graph's own. It is returned to the GPU with
    the graph: that of a larger batch must not stay reserved.

    Args:
        stream: to capture on, of the device on which the step works; always the same one, because cuBLAS keeps a
            workspace for each.
        step: has run before, so that nothing in it happens for the first time while it is captured. It is not run now.

    Raises:
        RuntimeError: the step cannot be captured, because it waits for the host, for instance. Nothing is changed.
        torch.OutOfMemoryError: the GPU has no memory for the pool.
    """

    def __init__(self, stream: torch.cuda.Stream, step: Callable[[], None]) -> None:
        self._device = stream.device
        try:
            self._capture(stream, step)
            return
        except torch.OutOfMemoryError:
            pass  # and try again below, where the error no longer keeps the tensors of the first try
        # torch does not give memory that it holds for reuse to a graph's pool.
        torch.cuda.empty_cache()
        self._capture(stream, step)

    def _capture(self, stream: torch.cuda.Stream, step: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            graph, pool = torch.cuda.CUDAGraph(), torch.cuda.MemPool()
            try:
                # Thread-local, so that other threads may use the GPU meanwhile: NCCL's watchdog asks it what is done.
                handle = torch.cuda._POOL_HANDLE(pool.id)
                graph.capture_begin(pool=handle, capture_error_mode="thread_local")
                step()
                graph.capture_end()
            except BaseException:
                _abandon(graph, pool)
                raise
        current.wait_stream(stream)
        self._graph, self._pool = graph, pool

    def __call__(self) -> None:
        self._graph.replay()

    def __del__(self) -> None:
        if hasattr(self, "_graph"):  # its capture has not failed
            # The last replay may still be at work in the pool's memory, on a stream that the pool does not know.
            torch.cuda.current_stream(self._device).synchronize()
            self._graph.reset()  # before the pool goes: with a user left, it would not return its memory


def _abandon(graph: torch.cuda.CUDAGraph, pool: torch.cuda.MemPool) -> None:
    """Bring everything back to where it was before a capture that failed at any point; the current stream is its own.

    Read in the source of torch 2.11: where CUDA has found a capture invalid, `capture_end` ends it on the stream,
    raises at once, and leaves all that is undone here.
    """
    device = torch.cuda.current_device()
    with suppress(RuntimeError):  # it has been ended already, or is invalid
        graph.capture_end()
    graph.reset()
    with suppress(RuntimeError):  # it has been ended already, or was never begun
        torch._C._cuda_endAllocateToPool(device, pool.id)
    if pool.use_count() > 1:  # the graph's use, beside that of `pool` itself
        torch._C._cuda_releasePool(device, pool.id)
    # The generator still takes itself to be captured, and would refuse to draw. A copy goes on where it was.
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())
    _failed.append(graph)
