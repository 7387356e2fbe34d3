"""RESTRAIN: every answer of the group is a possible label, which weighs more the more often it was given.

Source: Yu et al. 2025, "RESTRAIN: From Spurious Votes to Signals, Self-Driven RL with Self-Penalization"
(arXiv 2510.02172). The equations are taken from a note about the paper, since neither the text nor code of the authors
could be read; their constants are not in it. Those below are ours.

The paper sums the losses of GRPO over the labels a_j with weights w_j. The advantage of a trajectory is then
Σ_j w_j (1[a_i = a_j] − f_j) / s_j with s_j = √(f_j (1 − f_j)), the standard deviation of what label j pays. That is the
difference of w(a_i) / s(a_i) from its mean over the group, which is why the recipe divides by no standard deviation
of its own.

Left out: the negative advantage −δ of every trajectory of a group whose majority is too small, which earns nothing here
and so teaches nothing; the weight of each question by how far the untrained model agrees on it.
"""

from __future__ import annotations

import math

from ireasoner.method.answers import vote_shares
from ireasoner.method.scoring import Context, Group, Parts

WIDTH = 0.5  # of the Gaussian g that weighs shares; its centre is 1
LEAST_VOTES = 2  # κ: a majority of fewer is not trusted


def reward(group: Group, context: Context) -> Parts:
    """r_i = w(a_i) / √(f (1 − f)) with f the share of a_i; 0 if the largest share is that of fewer than κ votes.

    w_j = g(f_j) / Σ_l g(f_l) and g(f) = exp(−(f − 1)² / 2σ²). Where all agree there is no other answer to compare with:
    each earns 1.
    """
    if len(group.vote.members) < LEAST_VOTES:
        return {"weighted_label": [0.0] * len(group.answer_keys)}
    shares = vote_shares(group.answer_keys)
    trust = {key: math.exp(-((share - 1.0) ** 2) / (2.0 * WIDTH**2)) for key, share in shares.items()}
    total = sum(trust.values())

    def paid(key: str) -> float:
        spread = math.sqrt(shares[key] * (1.0 - shares[key]))
        return trust[key] / total / spread if spread else 1.0

    return {"weighted_label": [None if key is None else paid(key) for key in group.answer_keys]}
