"""EMPO: the share of the group whose answer means the same.

Source: Zhang et al. 2025, "Right Question is Already Half the Answer: Fully Unsupervised LLM Reasoning Incentivization"
(arXiv 2504.05812), equations 3 to 7; compared with the authors' code. That for TRL pays nothing for mathematics where
all answers differ, as here, and sets no lower bound on the entropy: a unanimous group teaches nothing anyhow. Their
later code for verl pays the share without a threshold, and each unreadable answer as a cluster of its own.

Left out: the small language model that merges free-form answers into clusters of one meaning, in whose place answers
are the same if their keys are, and what the code pays for such answers besides: 0 where the largest cluster is less
than a fifth or the answer repeats the question, and −0.5 for the unreadable; other thresholds on the entropy; no KL at
all, which the paper removes.
"""

from __future__ import annotations

from collections import Counter

from ireasoner.method.scoring import Context, Group, Parts


def reward(group: Group, context: Context) -> Parts:
    """r_i = p(c_j | q) ≈ |c_j| / N for a trajectory of the cluster c_j; 0 if H = ln N, where no two answers agree."""
    sizes, agree = Counter(group.answer_keys), len(group.vote.members) > 1
    return {"share_of_the_cluster": [sizes[key] / len(group.answer_keys) * agree for key in group.answer_keys]}
