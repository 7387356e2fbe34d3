"""The memory that a model takes to train and to sample from, as `counting` finds it."""

from __future__ import annotations

from dataclasses import dataclass

# A peak that was measured (docs/experiments.md): of a layer's backward pass, in what the layer keeps for it.
BACKWARD_PEAK = 1.5


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model takes.

    Attributes:
        weights: the backbone and both adapters.
        optimizer: AdamW's state of both adapters, and one adapter's gradients twice: their sum so far, and those that
            are being computed.
        loss: logits of an update, at most.
        kept: a token, what the backward pass needs of all layers.
        layer: a token, what it needs of the largest layer; a pass without gradients holds about as much at a time.
        inputs: a token, the inputs of all layers, which is what checkpointing keeps.
        cache: a token, keys and values as the model makes them.
        shared: a token, keys and values in a `SharedCache`, whose keys are in float32.
        state: a sequence, what a cache holds beside keys and values (linear attention).
        draw: a completion, while its next token is drawn.
        feature: an image token, as the vision tower returns it.
    """

    weights: int
    optimizer: int
    loss: int
    kept: int
    layer: int
    inputs: int
    cache: int
    shared: int
    state: int
    draw: int
    feature: int

    @property
    def fixed(self) -> int:
        """What training takes whatever it trains on."""
        return self.weights + self.optimizer + self.loss

    def update_per_token(self, recomputed: bool) -> int:
        """What an update takes for each token, on top of `fixed`: all activations, or with checkpointing.

        While one layer runs backward, the inputs of all and the cache are there; a prompt's part of the cache is there
        twice, because its completions' keys and values are put behind a copy.
        """
        kept = self.inputs + 2 * self.cache if recomputed else self.kept + self.cache
        return kept + int(BACKWARD_PEAK * self.layer)

    def caches(self, prompt: int, room: int, count: int, *, shares: bool) -> int:
        """What `count` completions of a prompt hold while they are sampled, and what drawing their next tokens takes.

        Args:
            prompt: tokens of the prompt.
            room: tokens of a completion.
            count: how many completions.
            shares: whether they decode from a `SharedCache`.
        """
        # Caches are made from those of the prefill, which are still there meanwhile.
        own = prompt * self.shared + count * room * self.shared if shares else count * (prompt + room) * self.cache
        return own + prompt * self.cache + count * (self.draw + self.state)
