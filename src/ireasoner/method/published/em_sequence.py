"""Entropy minimisation, EM-RL-sequence: the log-probability of the whole text.

Source: Agarwal et al. 2025, "The Unreasonable Effectiveness of Entropy Minimization in LLM Reasoning"
(arXiv 2505.15134), equation 3: the negative trajectory-level entropy, estimated by one sample. The baseline is RLOO.

The published reward is never positive. Here the least likely readable trajectory of a group earns 1, and the others as
many nats more as they are likelier. Every token costs, so that it pays to be short. This is the paper's sum; the
training code, read in a copy of the authors' repository (chotkrin/EM_PT), pays the mean over the tokens, where length
is free.

Left out: nothing of the reward. The paper's weight of the KL is 0.001.
"""

from __future__ import annotations

import math

from ireasoner.method.scoring import Context, Group, Parts, RewardError


def reward(group: Group, context: Context) -> Parts:
    """r_i = 1 + l_i − min_j l_j with l_i = Σ_t log π(y_it), and j over the readable trajectories."""
    if context.logprobs is None:
        raise RewardError("the reward em_sequence needs context.logprobs")
    likelihoods = [math.fsum(logprobs) for logprobs in context.logprobs]
    readable = [i for i, key in enumerate(group.answer_keys) if key is not None]
    least = min((likelihoods[i] for i in readable), default=0.0)
    return {"log_probability": [1.0 + value - least for value in likelihoods]}
