"""TTRL: 1 for the majority answer.

Source: Zuo et al. 2025, "TTRL: Test-Time Reinforcement Learning" (arXiv 2504.16084), section 2; compared with the
authors' code. Wei et al. 2025, "Unsupervised Post-Training for Multi-Modal LLM Reasoning via GRPO" (MM-UPT,
arXiv 2505.22453) pay the same for questions about images; compared with their code.

Left out: TTRL votes with 64 trajectories and learns from 32 of them, here all that vote are learned from; MM-UPT's
synthetic questions, in whose place the proposer asks; clipping, since every batch is used once.
"""

from __future__ import annotations

from ireasoner.method.scoring import Context, Group, Parts


def reward(group: Group, context: Context) -> Parts:
    """r_i = 1 if a_i is the majority answer, else 0."""
    return {"majority_answer": [float(i in group.vote.members) for i in range(len(group.solutions))]}
