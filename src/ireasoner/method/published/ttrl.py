"""TTRL: 1 for the majority answer.

Source: Zuo et al. 2025, "TTRL: Test-Time Reinforcement Learning" (arXiv 2504.16084), and Wei et al. 2025, "Unsupervised
Post-Training for Multi-Modal LLM Reasoning via GRPO" (MM-UPT, arXiv 2505.22453), which pays the same for questions
about images; compared with the code of both. MM-UPT's counts unreadable answers as one answer, which may win the vote.

Left out: TTRL votes with more trajectories than it learns from, here all that vote are learned from; MM-UPT's synthetic
questions, in whose place the proposer asks; clipping, since every batch is used once.
"""

from __future__ import annotations

from ireasoner.method.scoring import Context, Group, Parts


def reward(group: Group, context: Context) -> Parts:
    """r_i = 1 if a_i is the majority answer, else 0."""
    return {"majority_answer": [float(i in group.vote.members) for i in range(len(group.solutions))]}
