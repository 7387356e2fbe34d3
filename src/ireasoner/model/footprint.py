"""The memory that a model takes to train and to sample from, as `counting` finds it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ireasoner.model.loss import CHUNK_LOGITS

# Peaks that were measured (docs/experiments.md): of a layer's backward pass, in what the layer keeps for it; of the
# loss, in float32 logits of a chunk; of drawing a token, in float32 logits.
BACKWARD_PEAK, LOSS_PEAK, DRAW_PEAK = 1.5, 6, 8
GATHERED = 2  # layers that a sharded run holds whole at a time: the one at work, and the next one on its way


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model takes.

    Attributes:
        weights: the backbone and both adapters.
        adapters: both adapters, which are part of `weights`.
        layers: the frozen weights of all layers of the language model, which are part of `weights`.
        widest: the frozen weights of the largest of these layers.
        gathered: the frozen weights that are whole during a pass, beside `weights`: of layers of a sharded run, or
            the largest weight of a quantised one.
        optimizer: AdamW's state of both adapters, and one adapter's gradients twice: their sum so far, and those that
            are being computed.
        kept: a token, what the backward pass needs of all layers.
        layer: a token, what it needs of the largest layer.
        scores: a pair of tokens, scores that the backward pass needs of all layers; 0 where attention is fused.
        passing: a token, the most that a pass without gradients holds at a time, beside the cache.
        inputs: a token, the inputs of all layers, which is what checkpointing keeps.
        cache: a token, keys and values as the model makes them.
        shared: a token, keys and values in a `SharedCache`, whose keys are in float32.
        state: a sequence, what a cache holds beside keys and values (linear attention).
        logits: a token, over the vocabulary, in float32.
        feature: an image token, as the vision tower returns it, with what Qwen3-VL takes from inside the tower.
    """

    weights: int
    adapters: int
    layers: int
    widest: int
    gathered: int
    optimizer: int
    kept: int
    layer: int
    scores: int
    passing: int
    inputs: int
    cache: int
    shared: int
    state: int
    logits: int
    feature: int

    @property
    def fixed(self) -> int:
        """What training takes whatever it trains on."""
        return self.weights + self.gathered + self.optimizer + self._loss(CHUNK_LOGITS)

    def update_per_token(self, recomputed: bool) -> int:
        """At most what an update takes for each token on top of `fixed`, without or with gradient checkpointing."""
        return self._kept(recomputed) + int(BACKWARD_PEAK * self.layer)

    def update(self, tokens: int, written: int, recomputed: bool) -> int:
        """What an update takes on top of weights and optimizer.

        Args:
            tokens: that it runs.
            written: tokens of the completions among them.
            recomputed: whether with gradient checkpointing.
        """
        # First the loss, when no layer is gathered, and then one layer after another, run backward while what the
        # others need is there.
        backward = int(BACKWARD_PEAK * self.layer) * tokens + self.gathered
        return tokens * self._kept(recomputed) + max(self._loss(written), backward)

    def tokens_in(self, free: float) -> int:
        """How many tokens, written ones or others, an update may run in so many bytes, without checkpointing."""
        each = self.update_per_token(False)
        # Logits grow with the tokens, up to a limit.
        growing = (free - self.weights - self.gathered - self.optimizer) / (each + LOSS_PEAK * self.logits)
        return int(max(growing, (free - self.fixed) / each))

    def sampling(self, prompts: int, prompt: int, room: int, count: int, *, at_a_time: int, shares: bool) -> int:
        """What sampling takes on top of the weights; `prompts` of them, of which `at_a_time` are computed together.

        The other arguments are those of `caches`.
        """
        # The images' features are put together for the prompts that are computed together.
        prefill = prompt * (prompts * self.cache + at_a_time * (self.passing + self.feature))
        return max(prefill, prompts * self.caches(prompt, room, count, shares=shares)) + self.gathered

    def caches(self, prompt: int, room: int, count: int, *, shares: bool) -> int:
        """What `count` completions of a prompt hold while they are sampled, with drawing their next tokens.

        Args:
            prompt: tokens of the prompt.
            room: tokens of a completion.
            count: how many completions.
            shares: whether they decode from a `SharedCache`.
        """
        drawing = count * (DRAW_PEAK * self.logits + self.state)
        if not shares:
            return count * (prompt + room) * self.cache + drawing
        # Where keys change to float32, those of the prefill are there until all layers are done, and drawing is later.
        return (prompt + count * room) * self.shared + max(prompt * (self.shared - self.cache), drawing)

    def among(self, length: int) -> Footprint:
        """The same where each token attends to `length` others, which takes memory where attention is not fused."""
        of_layer = self.scores * length * self.layer // self.kept
        # A pass without gradients holds the scores before and after the softmax.
        return replace(
            self,
            kept=self.kept + self.scores * length,
            layer=self.layer + of_layer,
            passing=self.passing + 2 * of_layer,
        )

    def sharded(self, ranks: int) -> Footprint:
        """The same on each of `ranks` processes that have the frozen layers of the language model shared out."""
        if ranks == 1:
            return self
        share, gathered = self.layers // ranks, min(GATHERED * self.widest, self.layers)
        return replace(self, weights=self.weights - self.layers + share, gathered=gathered)

    def _kept(self, recomputed: bool) -> int:
        # The prompt's part of the cache is there twice: completions put their keys and values behind a copy of it.
        return self.inputs + 2 * self.cache if recomputed else self.kept + self.cache

    def _loss(self, tokens: int) -> int:
        return LOSS_PEAK * min(tokens * self.logits, max(4 * CHUNK_LOGITS, self.logits))
