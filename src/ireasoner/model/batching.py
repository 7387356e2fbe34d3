"""How the groups of an update are put together, or cut, so that each pass fits in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ireasoner.model.pieces import Piece, cut, gathered, halved
from ireasoner.model.policy import Policy

Lengths = Sequence[tuple[int, int]]  # of each group: tokens of its prompt, and of its longest completion


class Batching:
    """The micro-batches of an update.

    Args:
        policy: whose update it is.
        tokens_per_batch: most tokens, padding included, of a pass that keeps the activations of every layer for the
            backward pass. A pass with gradient checkpointing may have as many as take the same memory.
    """

    def __init__(self, policy: Policy, tokens_per_batch: int) -> None:
        self.policy, self.tokens_per_batch = policy, tokens_per_batch
        self._lowered: dict[bool, int] = {}  # what is left of each bound where memory did not suffice

    def bound(self, recomputed: bool) -> int:
        """Most tokens of a pass, without or with gradient checkpointing."""
        bound = self.tokens_per_batch
        if recomputed:
            takes = self.policy.footprint
            bound = max(bound, bound * takes.update_per_token(False) // takes.update_per_token(True))
        return min(bound, self._lowered.get(recomputed, bound))

    def pieces(self, lengths: Lengths, count: int) -> list[Piece]:
        """Groups of `count` completions as micro-batches of similar length, cut no more than necessary.

        A group that is too much by itself is checkpointed before it is cut between its completions, because that runs
        its prompt for each part. The gradient is a sum over completions, so that neither changes anything but memory
        and time, apart from rounding.
        """
        always = self.policy.gradient_checkpointing
        fits = partial(self._fits, lengths)
        found: list[Piece] = []
        order = sorted(range(len(lengths)), key=lambda row: lengths[row])
        for rows in gathered(order, lambda rows: fits(Piece(rows, slice(0, count), always))):
            piece = Piece(rows, slice(0, count), always)
            found += cut(piece if fits(piece) else replace(piece, recomputed=True), fits)
        return found

    def smaller(self, lengths: Lengths, piece: Piece) -> list[Piece]:
        """What a micro-batch that did not fit is replaced by. Later ones are made smaller, too.

        Raises:
            DoesNotFitError: it is a single completion, and checkpointed; or the policy is sharded.
        """
        tokens = self.tokens(lengths, piece)
        bounds = (self._lowered.get(piece.recomputed, tokens), max(1, tokens * 3 // 4))
        self._lowered[piece.recomputed] = min(bounds)
        what = f"an update of {tokens} tokens"
        if piece.recomputed or len(piece.rows) > 1 or self.policy.is_sharded:
            return halved(self.policy, piece, what)
        self.policy.on_shortage(f"Out of memory in {what}, which is tried again with gradient checkpointing.")
        return [replace(piece, recomputed=True)]

    def tokens(self, lengths: Lengths, piece: Piece) -> int:
        """The tokens that a micro-batch runs, padding included."""
        prompt, completion = (max(lengths[row][part] for row in piece.rows) for part in (0, 1))
        count = piece.columns.stop - piece.columns.start
        return len(piece.rows) * ((1 if self.policy.shares_prompts else count) * prompt + count * completion)

    def _fits(self, lengths: Lengths, piece: Piece) -> bool:
        return self.tokens(lengths, piece) <= self.bound(piece.recomputed)
