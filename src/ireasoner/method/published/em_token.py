"""Entropy minimisation, EM-RL-token: the negative entropy of every next-token distribution.

Source: Agarwal et al. 2025, "The Unreasonable Effectiveness of Entropy Minimization in LLM Reasoning"
(arXiv 2505.15134), equation 4. The baseline is RLOO.

The published reward is never positive. Here the readable trajectory of a group with the largest entropy earns 1, and
the others as many nats more as theirs is less. Every token costs, so that it pays to be short. This is the paper's
sum; the training code, read in a copy of the authors' repository (chotkrin/EM_PT), pays the mean over the tokens, where
length is free.

Left out: nothing of the reward. The paper's weight of the KL is 0.001.
"""

from __future__ import annotations

import math

from ireasoner.method.scoring import Context, Group, Parts, RewardError


def reward(group: Group, context: Context) -> Parts:
    """r_i = 1 + max_j h_j − h_i with h_i = Σ_t H(π_t), and j over the readable trajectories."""
    if context.distributions is None:
        raise RewardError("the reward em_token needs context.distributions")
    entropies = [math.fsum(each.entropies) for each in context.distributions()]
    readable = [i for i, key in enumerate(group.answer_keys) if key is not None]
    largest = max((entropies[i] for i in readable), default=0.0)
    return {"low_entropy": [1.0 + largest - value for value in entropies]}
