"""Sampling on the live policy: every trajectory of a step in one batched decode, each prompt run once.

Rows are drawn by inverting the cumulative distribution at uniform numbers that the caller supplies, so that what a
trajectory says depends on its own seed and, but for rounding, never on what else is in the batch.

A token of a large model is thousands of small kernels, and Python launches them more slowly than a GPU runs them. So on
a GPU the step is captured once as a CUDA graph and replayed: nothing in it asks the host for anything, and all that
changes from token to token lies in tensors that stay where they are.

Shape suffixes: B prompts, N completions of each, R rows of the shrinking batch, C tokens of a completion, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from ireasoner.method.types import Completion, Role
from ireasoner.model.attention import SharedCache, attending
from ireasoner.model.inputs import Prompts
from ireasoner.model.policy import Policy


class TransformersEngine:
    """Samples from the policy's own weights, at temperature 1 from the whole distribution unless told otherwise."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        # Of a step of decoding, makes what does the same again; None: the step itself does.
        self.capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None
        if policy.device.type == "cuda":
            self.capture = partial(cuda_graph, torch.cuda.Stream(policy.device))

    def refresh(self) -> None:
        """Nothing: it samples from the live policy."""

    @torch.no_grad()
    def sample(
        self,
        prompts: Prompts,
        role: Role | None,
        uniforms_BNC: NDArray[np.float64],
        *,
        temperature: float = 1.0,
        min_tokens: int = 0,
    ) -> list[list[Completion]]:
        """N completions of each of B prompts.

        Args:
            prompts: B prompts.
            role: whose adapter; None: the backbone alone.
            uniforms_BNC: numbers in [0, 1): prompts x completions x most tokens of a completion.
            temperature: 0 is greedy. The log-probabilities returned are those of the distribution sampled from
                (at 0: of the unscaled one).
            min_tokens: the end token is not sampled before so many tokens (for benchmarks at equal lengths).
        """
        policy = self.policy
        _, count, longest = uniforms_BNC.shape
        room = longest - 1 if policy.shares_attention else None
        captures = self.capture is not None and policy.shares_attention  # a cache that grows is new memory every time
        with policy.acting_as(role):
            prefix = policy.prefill(prompts).repeat(count, room=room, fixed=captures)
        uniforms = torch.from_numpy(uniforms_BNC.reshape(-1, longest)).to(policy.device, torch.float64)
        total = len(uniforms)
        tokens = torch.zeros((total, longest), dtype=torch.long, device=policy.device)
        logprobs = torch.zeros((total, longest), device=policy.device)
        ends = torch.tensor(policy.end_tokens, device=policy.device)
        lengths = torch.full((total,), longest, device=policy.device)
        rows = torch.arange(total, device=policy.device)  # which trajectory each row of the shrinking batch is
        done = torch.zeros(total, dtype=torch.bool, device=policy.device)
        t = torch.zeros(1, dtype=torch.long, device=policy.device)  # which token is drawn: a tensor, to be captured
        mask = None if isinstance(prefix.cache, SharedCache) else prefix.mask_BP

        def draw(hidden: torch.Tensor) -> None:
            logits = policy.output_layer(hidden).float()
            if min_tokens:
                logits = torch.where(t < min_tokens, logits.index_fill(1, ends, -torch.inf), logits)
            # Of a finished row too: what stands behind its length is cut off. Indexing by a mask would make a GPU
            # wait for the host; so only the count of rows that are left does.
            chosen, chosen_logprobs = _draw(logits, uniforms[rows, t], temperature)
            tokens[rows, t], logprobs[rows, t] = chosen, chosen_logprobs
            ended = torch.isin(chosen, ends) & ~done
            lengths[rows] = torch.where(ended, t + 1, lengths[rows])
            done.logical_or_(ended)

        def step() -> None:
            nonlocal mask
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            hidden = policy.extend(prefix, tokens[rows, t][:, None], mask, prefix.next_position_B + t)[:, 0]
            t.add_(1)
            if isinstance(prefix.cache, SharedCache):
                prefix.cache.advance()
            draw(hidden)

        with policy.acting_as(role), attending(policy.decoder, prefix.cache):
            draw(prefix.last_hidden_BD)
            again: Callable[[], None] | None = None
            for _ in range(longest - 1):
                left = int((~done).sum())
                if left == 0:
                    break
                # Finished rows cost as much as others: drop them in batches; rarer where that means to capture anew.
                if left <= (0.5 if captures else 0.75) * len(rows):
                    keep = (~done).nonzero()[:, 0]
                    prefix, rows, done, again = prefix.select(keep), rows[keep], done[keep], None
                    mask = None if mask is None else mask[keep]
                if again is not None:
                    again()
                else:
                    step()
                    again = self._captured(step) if captures else step
        return _completions(policy, tokens, logprobs, lengths, count)

    def _captured(self, step: Callable[[], None]) -> Callable[[], None]:
        """What does a step, that ran once already, again."""
        if self.capture is None:  # tried before
            return step
        try:
            return self.capture(step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the model's forward pass asks the GPU for a number
            warnings.warn(f"decoding cannot be captured as a CUDA graph and will be slower: {error}", stacklevel=2)
            self.capture = None
            return step


def cuda_graph(stream: torch.cuda.Stream, step: Callable[[], None]) -> Callable[[], None]:
    """The same kernels on the same memory, in one launch.

    Args:
        stream: of the device on which the step works; the same one every time, since cuBLAS keeps memory for each.
        step: ran before, so that nothing in it is done for the first time.

    Raises:
        RuntimeError: the step waits for the host somewhere.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on meanwhile (NCCL's ask the GPU for what is done).
    with torch.cuda.device(stream.device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph.replay


def _draw(logits_BV: torch.Tensor, uniforms_B: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = logits_BV if temperature == 0 else logits_BV / temperature
    logprobs_BV = scaled.log_softmax(-1)
    if temperature == 0:
        chosen = logits_BV.argmax(-1)
    else:
        cumulative = logprobs_BV.double().exp().cumsum(-1)
        # The total is 1 but for rounding; scaling by it keeps the last token reachable and the index in range.
        chosen = torch.searchsorted(cumulative, (uniforms_B * cumulative[:, -1])[:, None], right=True)[:, 0]
        chosen = chosen.clamp(max=logits_BV.shape[-1] - 1)
    return chosen, logprobs_BV.gather(-1, chosen[:, None])[:, 0]


def _completions(
    policy: Policy, tokens: torch.Tensor, logprobs: torch.Tensor, lengths: torch.Tensor, count: int
) -> list[list[Completion]]:
    flat = []
    for ids, values, length in zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), strict=True):
        ids = ids[:length]
        stopped = ids[-1] in policy.end_tokens
        text = policy.processor.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=False)
        flat.append(Completion(text, tuple(ids), tuple(values[:length]), "stop" if stopped else "length"))
    return [flat[i : i + count] for i in range(0, len(flat), count)]


def uniforms(seeds: Sequence[Sequence[int]], count: int, longest: int) -> NDArray[np.float64]:
    """Numbers for `sample`, [len(seeds), count, longest]: each prompt's from its own seed (a sequence of integers)."""
    return np.stack([np.random.default_rng(list(seed)).random((count, longest)) for seed in seeds])
