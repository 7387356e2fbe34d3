"""Work in pieces: one for which memory does not suffice is cut in two and tried again."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from ireasoner.method.types import UsageError
from ireasoner.model.policy import Policy

Result = TypeVar("Result")
ADVICE = "lower --max-image-tokens, use a smaller model or a larger device, or end what else uses this one"


class DoesNotFitError(UsageError):
    """Memory does not suffice; the message says for what, and what to change."""


@dataclass(frozen=True)
class Piece:
    """Some of the completions of some prompts: what one pass works on.

    Attributes:
        rows: which prompts.
        columns: which of the completions of each.
        recomputed: whether an update computes activations again in the backward pass instead of keeping them.
    """

    rows: Sequence[int]
    columns: slice
    recomputed: bool = False

    @property
    def size(self) -> int:
        """The number of completions."""
        return len(self.rows) * (self.columns.stop - self.columns.start)

    def halves(self) -> list[Piece]:
        """The piece in two: some of the prompts each or, of a single prompt, some of its completions; [] for one."""
        if len(self.rows) > 1:
            half = (len(self.rows) + 1) // 2
            return [replace(self, rows=rows) for rows in (self.rows[:half], self.rows[half:])]
        first, last = self.columns.start, self.columns.stop
        if last - first > 1:
            middle = (first + last + 1) // 2
            return [replace(self, columns=columns) for columns in (slice(first, middle), slice(middle, last))]
        return []


def gathered(rows: Iterable[int], fits: Callable[[Sequence[int]], bool]) -> list[list[int]]:
    """Rows in batches that fit, each as long as possible. A row that does not fit alone is a batch of its own."""
    batches: list[list[int]] = []
    for row in rows:
        if batches and fits([*batches[-1], row]):
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def cut(piece: Piece, fits: Callable[[Piece], bool]) -> list[Piece]:
    """A piece, cut between its completions into the largest parts that fit; a part is one completion at least."""
    first, last = piece.columns.start, piece.columns.stop
    size = last - first
    while size > 1 and not fits(replace(piece, columns=slice(first, first + size))):
        size -= 1
    return [replace(piece, columns=slice(i, min(i + size, last))) for i in range(first, last, size)]


def halved(policy: Policy, piece: Piece, what: str) -> list[Piece]:
    """The halves of a piece that did not fit; `what` says what it was.

    Raises:
        DoesNotFitError: it is a single completion, or the policy is sharded: the other processes, which take part in
            every pass, know nothing of one that broke off.
    """
    if policy.is_sharded:
        raise DoesNotFitError(
            f"out of memory in {what}, which is not tried again in parts where the model is sharded: start more "
            "processes, lower --tokens-per-batch or --max-image-tokens, or end what else uses this device"
        )
    if halves := piece.halves():
        policy.on_shortage(f"Out of memory in {what}, which is tried again in halves.")
        return halves
    raise DoesNotFitError(f"out of memory in {what}, of which no smaller part can be done: {ADVICE}")


def in_pieces(
    pieces: Sequence[Piece],
    work: Callable[[Piece], Result],
    smaller: Callable[[Piece], Sequence[Piece]],
) -> Iterator[tuple[Piece, Result]]:
    """Work on pieces, one after another.

    Args:
        pieces: what there is to do.
        work: leaves nothing behind if it raises `torch.OutOfMemoryError`, so that it can be done again.
        smaller: what a piece that does not fit is replaced by; it raises `DoesNotFitError` if nothing is left to try.

    Yields:
        Every piece that was done, in the order of `pieces`, and its result.
    """
    waiting = deque(pieces)
    while waiting:
        piece = waiting.popleft()
        try:
            result = work(piece)
        except torch.OutOfMemoryError:
            result = None
        # Outside of the except clause, within which the error still holds the frames and tensors of what failed.
        if result is None:
            release_memory()
            waiting.extendleft(reversed(smaller(piece)))
        else:
            yield piece, result


def release_memory() -> None:
    """Give back what nothing refers to any more, so that other tensors find room in one block."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def out_of_memory_is_told() -> Iterator[None]:
    """Turn a `torch.OutOfMemoryError` of what cannot be done in smaller pieces into one sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        raise DoesNotFitError(f"out of memory: {ADVICE} (torch says: {reason[:200]})") from None
