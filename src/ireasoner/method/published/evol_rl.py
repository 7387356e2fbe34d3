"""EVOL-RL: the majority selects, and novelty within each side of the vote varies.

Source: Zhou et al. 2025, "Evolving Language Models without Labels: Majority Drives Selection, Novelty Promotes
Variation" (arXiv 2509.15194), section 3.2 and appendix A; compared with the authors' code.

The published rewards lie in [0.5, 1] for the majority, in [−1, −0.5] for the others, and are −1 for the unreadable.
Here 1 is added to all of them. Where only one can be read, the code gives it −1 too; here it is the majority.

Left out: embeddings by Qwen3-Embedding-4B, in whose place stand the mean input embeddings of the backbone, which hardly
tell numbers apart; voting with 64 trajectories and learning from 32 of them; the entropy bonus of each token and
asymmetric clipping; that answers must be numbers.
"""

from __future__ import annotations

import numpy as np

from ireasoner.method.rewards import FloatArray
from ireasoner.method.scoring import Context, Group, Parts, RewardError

MEAN_WEIGHT = 0.5  # α: what the mean similarity counts in novelty; the largest similarity counts the rest


def reward(group: Group, context: Context) -> Parts:
    """r_i = 1.5 + ũ_i / 2 with the majority answer, ũ_i / 2 with another, ũ_i the novelty ranked on its own side."""
    if context.embed is None:
        raise RewardError("the reward evol_rl needs context.embed")
    majority = np.isin(range(len(group.solutions)), group.vote.members)
    variation = np.zeros(len(majority))
    readable = np.array([key is not None for key in group.answer_keys])
    if readable.any():
        texts = np.stack([_mean_of_steps(context.embed(s.reasoning_steps)) for s in group.solutions])
        variation[readable] = 0.5 * novelty(texts[readable], majority[readable])
    return {"majority_answer": 1.5 * majority, "novelty": variation}


def novelty(texts: FloatArray, majority: np.typing.NDArray[np.bool_]) -> FloatArray:
    """ũ [N]: u_i = 1 − (α s̄_i + (1 − α) m_i), moved to [0, 1] by the least and the largest u on its side of the vote.

    s̄_i is the mean similarity to the others of the same side, and m_i the largest to any other; similarities are
    cosines, at least 0. A trajectory that is alone on its side has ũ = 1, and those of a side that are all equally new
    have ũ = 0.5, as in the authors' code. By the equation in the paper's appendix, whose denominator is a little more
    than max u − min u, all of these would have 0.

    Args:
        texts: normalised embeddings [N, width].
        majority: which of them give the majority answer [N].
    """
    similar = np.clip(texts @ texts.T, 0.0, 1.0)
    others = ~np.eye(len(texts), dtype=bool)
    ranked = np.full(len(texts), 0.5)
    for side in (majority, ~majority):
        members = np.flatnonzero(side)
        if len(members) < 2:
            ranked[members] = 1.0
            continue
        mean = np.array([similar[i, others[i] & side].mean() for i in members])
        largest = np.array([similar[i, others[i]].max() for i in members])
        new = 1.0 - (MEAN_WEIGHT * mean + (1.0 - MEAN_WEIGHT) * largest)
        if np.ptp(new) > 1e-9:  # below, rounding alone would rank them
            ranked[members] = (new - new.min()) / np.ptp(new)
    return ranked


def _mean_of_steps(steps: np.typing.NDArray[np.floating]) -> FloatArray:
    """The normalised mean of the embeddings of a trajectory's steps [width]; zeros if there are none."""
    total = np.asarray(steps, dtype=np.float64).sum(axis=0)
    return total / (np.linalg.norm(total) or 1.0)
