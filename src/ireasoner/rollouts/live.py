"""Sampling from the live policy: every completion of a call in one batched decode, each prompt computed once.

What prompts about the same image begin with is computed once for all of them (`ireasoner.model.prefilling`).

Where memory does not allow that, there are several batches, and prompts are computed in several parts.

A token is drawn by inverting the cumulative distribution at a uniform number that comes from the request's own seed. So
a completion depends on its own seed and, apart from rounding, never on what else is in the batch.

One token of a large model takes thousands of small kernels, which Python launches more slowly than a GPU runs them. On
a GPU the decoding step is therefore captured once as a CUDA graph and replayed (`capture`). A replay runs the same
kernels on the same memory, so nothing in a step may ask the GPU for a value, and whatever changes from token to token
lies in tensors whose memory stays in place.

Shape suffixes: B prompts, N completions of each, R rows of the shrinking batch, C tokens of a completion, V vocabulary.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ireasoner.method.seeds import uniforms
from ireasoner.method.types import Completion, Role
from ireasoner.model.attention import attending
from ireasoner.model.forward import Prefix, decode
from ireasoner.model.inputs import Prompts, build_prompts
from ireasoner.model.pieces import Piece, cut, gathered, halved, in_pieces
from ireasoner.model.policy import Policy
from ireasoner.model.prefilling import prefill_in_parts
from ireasoner.model.sharding import equal_passes
from ireasoner.rollouts.capture import CudaGraph, host_waits
from ireasoner.rollouts.engine import Request, temperatures


class LiveEngine:
    """Samples from the policy's own weights.

    `capture` turns a decoding step that has run once into a function that repeats it; None: steps are not captured.
    `on_token` is told each token as soon as it is drawn, for someone who waits for a single completion: while it is
    set, a call may ask for no more than one.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None
        if policy.device.type == "cuda" and not policy.is_sharded:  # gathering weights is not captured
            self.capture = partial(CudaGraph, torch.cuda.Stream(policy.device))
        self.on_token: Callable[[int], None] | None = None

    def refresh(self) -> None:
        """Nothing to do: the policy that is sampled from is the one that is trained."""

    def close(self) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def sample(
        self,
        requests: Sequence[Request],
        role: Role | None,
        *,
        n: int = 1,
        max_tokens: int,
        temperature: float | Sequence[float] = 1.0,
    ) -> list[list[Completion]]:
        """Sample n completions of each request, as described in `Engine.sample`.

        The log-probabilities are those of the distribution that was sampled from; at temperature 0, where nothing is
        sampled, those at temperature 1.
        """
        with self.policy.acting_as(role), equal_passes(self.policy):
            return self._sample(requests, n, max_tokens, temperature) if requests else []

    def _sample(
        self, requests: Sequence[Request], n: int, max_tokens: int, temperature: float | Sequence[float]
    ) -> list[list[Completion]]:
        policy = self.policy
        prompts = build_prompts(policy, [r.image for r in requests], [r.messages for r in requests])
        lengths = prompts.mask_BP.sum(1).tolist()
        draws_BNC, temperatures_N = uniforms([r.seed for r in requests], n, max_tokens), temperatures(temperature, n)

        def complete(piece: Piece) -> list[list[Completion]]:
            draws = draws_BNC[piece.rows][:, piece.columns]
            return self._complete(prompts[piece.rows], draws, temperatures_N[piece.columns])

        def smaller(piece: Piece) -> list[Piece]:
            what = f"sampling {piece.size} completions of up to {max_tokens} tokens"
            policy.sampling_bytes = min(self._takes(lengths, piece, max_tokens), policy.sampling_bytes or sys.maxsize)
            return halved(policy, piece, what)

        found: dict[int, list[Completion]] = defaultdict(list)
        pieces = self._pieces(lengths, [id(image) for image in prompts.images], n, max_tokens)
        for piece, groups in in_pieces(pieces, complete, smaller):
            for row, group in zip(piece.rows, groups, strict=True):
                found[row] += group
        return [found[row] for row in range(len(requests))]

    def _pieces(self, lengths: Sequence[int], images: Sequence[int], n: int, room: int) -> list[Piece]:
        """Requests in batches whose caches take at most half of the memory; prefill and drawing have the other half.

        The fewer batches the better: a step of a large batch takes hardly longer than one of a small batch. Neighbours
        that are about the same image stay neighbours, because what their prompts begin with is run once.

        Args:
            lengths: of the prompts.
            images: tells which of them are about the same image.
            n: completions of each.
            room: longest completion.
        """
        limit, columns = self.policy.sampling_bytes, slice(0, n)
        if limit is None:
            return [Piece(range(len(lengths)), columns)]

        def fits(piece: Piece) -> bool:
            return self._takes(lengths, piece, room) <= limit // 2

        longest: dict[int, int] = defaultdict(int)
        for image, length in zip(images, lengths, strict=True):
            longest[image] = max(longest[image], length)
        order = sorted(range(len(lengths)), key=lambda row: longest[images[row]])
        batches = gathered(order, lambda rows: fits(Piece(rows, columns)))
        return [part for rows in batches for part in cut(Piece(sorted(rows), columns), fits)]

    def _takes(self, lengths: Sequence[int], piece: Piece, room: int) -> int:
        """Bytes of the caches of a piece. If the prompts cannot be prefilled in parts, that counts as well."""
        policy, longest = self.policy, max(lengths[row] for row in piece.rows)
        takes = policy.footprint
        each = takes.caches(longest, room, piece.columns.stop - piece.columns.start, shares=policy.shares_attention)
        return len(piece.rows) * (each if policy.shares_prompts else each + longest * takes.passing)

    def _complete(
        self, prompts: Prompts, draws_BNC: NDArray[np.float64], temperatures_N: Sequence[float]
    ) -> list[list[Completion]]:
        """Sample completions of one batch under the adapter that is active."""
        policy, (_, n, max_tokens) = self.policy, draws_BNC.shape
        captures = self.capture is not None and policy.shares_attention  # other caches move to new memory as they grow
        prefix = prefill_in_parts(policy, prompts, self._prefilled_at_a_time(prompts))
        room = max_tokens - 1  # the last token is drawn and not run
        prefix = prefix.share(n, room=room, fixed=captures) if policy.shares_attention else prefix.repeat(n)
        decoding = _Decoding(policy, prefix, draws_BNC, temperatures_N)
        with attending(policy.decoder, prefix.cache):
            self._run(decoding, max_tokens, captures)
        flat = decoding.completions()
        return [flat[i : i + n] for i in range(0, len(flat), n)]

    def _prefilled_at_a_time(self, prompts: Prompts) -> int:
        """How many prompts go through the model together: while they do, each of their tokens takes far more memory
        than what is kept of it."""
        limit = self.policy.sampling_bytes
        if limit is None or not self.policy.shares_prompts:
            return len(prompts)
        takes = self.policy.footprint
        return max(1, limit // 2 // ((takes.passing + takes.feature) * prompts.mask_BP.shape[1]))

    def _run(self, decoding: _Decoding, max_tokens: int, captures: bool) -> None:
        decoding.draw(decoding.prefix.last_hidden_BD)
        step, first = decoding.step, captures  # whether the step is the first one of this batch size
        for drawn in range(max_tokens):
            if self.on_token:
                self.on_token(int(decoding.tokens[:, drawn]))
            unfinished = int((~decoding.done).sum())
            if unfinished == 0 or drawn == max_tokens - 1:
                return
            # A finished row costs as much as any other, so finished rows are dropped in batches; more rarely where the
            # smaller batch has to be captured anew.
            if unfinished <= (0.5 if captures else 0.75) * len(decoding.rows):
                step, first = decoding.step, captures  # the memory of a captured step is returned first
                decoding.drop_finished()
            if first and drawn < max_tokens - 2:  # the last step is not repeated
                step, first = self._captured(step), False
            else:
                step()

    def _captured(self, step: Callable[[], None]) -> Callable[[], None]:
        """Run a step, and return what repeats it: its captured form, or the step itself where it cannot be captured.

        It runs as it is at first, because what is done for the first time (choosing kernels, taking memory) cannot be
        captured, and so that a capture that must fail is never begun.
        """
        with host_waits(self.policy.device) as waits:
            step()
        if self.capture is None:
            return step
        try:
            if waits:
                raise RuntimeError(f"a step waits for the GPU in {waits[0]}")
            return self.capture(step)
        except torch.OutOfMemoryError:
            return step  # it has just run, and needs less memory than its graph; that of a smaller batch may fit
        except RuntimeError as error:
            warnings.warn(f"decoding cannot be captured as a CUDA graph and will be slower: {error}", stacklevel=2)
            self.capture = None
            return step


class _Decoding:
    """One batched decode in progress: what has been drawn so far, and the rows that are not finished.

    Args:
        policy: acts under the role that samples.
        prefix: the prompts, repeated for their completions.
        uniforms_BNC: numbers in [0, 1) that the tokens are drawn with.
        temperatures_N: of the completions of each prompt; 0 is greedy.
    """

    def __init__(
        self, policy: Policy, prefix: Prefix, uniforms_BNC: NDArray[np.float64], temperatures_N: Sequence[float]
    ) -> None:
        self.policy, self.prefix = policy, prefix
        device, longest = policy.device, uniforms_BNC.shape[-1]
        self.temperatures = torch.tensor(temperatures_N, device=device).repeat(len(uniforms_BNC))
        self.uniforms = torch.from_numpy(uniforms_BNC.reshape(-1, longest)).to(device, torch.float64)
        total = len(self.uniforms)
        self.tokens = torch.zeros((total, longest), dtype=torch.long, device=device)
        self.logprobs = torch.zeros((total, longest), device=device)
        self.ends = torch.tensor(policy.end_tokens, dtype=torch.long, device=device)
        self.rows = torch.arange(total, device=device)  # which completion each row of the shrinking batch is
        self.done = torch.zeros(total, dtype=torch.bool, device=device)
        self.t = torch.zeros(1, dtype=torch.long, device=device)  # the token being drawn; a tensor, for the capture

    def draw(self, hidden: Tensor) -> None:
        """Draw the next token of every row from hidden states [R, D]."""
        logits, t = self.policy.output_layer(hidden), self.t
        # Finished rows draw as well, and what comes behind their end is cut off later: to select the others, the host
        # would have to wait for the GPU at every token.
        chosen, chosen_logprobs = _draw(logits, self.uniforms[self.rows, t], self.temperatures[self.rows])
        self.tokens[self.rows, t], self.logprobs[self.rows, t] = chosen, chosen_logprobs
        self.done.logical_or_(torch.isin(chosen, self.ends))

    def step(self) -> None:
        """Run the tokens drawn last and draw the next ones."""
        hidden = decode(self.policy, self.prefix, self.tokens[self.rows, self.t])
        self.t.add_(1)
        self.draw(hidden)

    def drop_finished(self) -> None:
        """Continue with the unfinished rows only."""
        keep = (~self.done).nonzero()[:, 0]
        self.prefix, self.rows, self.done = self.prefix.select(keep), self.rows[keep], self.done[keep]

    def completions(self) -> list[Completion]:
        """What was written, in the order of the prompts."""
        ends = torch.isin(self.tokens, self.ends)
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, ends.shape[1])  # up to the first end token
        columns = zip(self.tokens.tolist(), self.logprobs.tolist(), lengths.tolist(), strict=True)
        return [completion(self.policy, ids[:length], logprobs[:length]) for ids, logprobs, length in columns]


def completion(policy: Policy, ids: Sequence[int], logprobs: Sequence[float]) -> Completion:
    """Sampled token ids as a `Completion`, whose text is without the end token."""
    stopped = ids[-1] in policy.end_tokens
    text = policy.processor.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=False)
    return Completion(text, tuple(ids), tuple(logprobs), "stop" if stopped else "length")


def _draw(logits_RV: Tensor, uniforms_R: Tensor, temperatures_R: Tensor) -> tuple[Tensor, Tensor]:
    """A token of each row and its log-probability."""
    greedy_R = temperatures_R == 0
    logprobs_RV = (logits_RV / temperatures_R.masked_fill(greedy_R, 1)[:, None]).log_softmax(-1)
    cumulative = logprobs_RV.double().exp().cumsum(-1)
    # The total is 1 but for rounding; scaling by it keeps the last token reachable and the index in range.
    sampled = torch.searchsorted(cumulative, (uniforms_R * cumulative[:, -1])[:, None], right=True)[:, 0]
    chosen = torch.where(greedy_R, logits_RV.argmax(-1), sampled.clamp(max=logits_RV.shape[-1] - 1))
    return chosen, logprobs_RV.gather(-1, chosen[:, None])[:, 0]
