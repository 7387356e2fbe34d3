"""Intuitor: self-certainty, how far the solver's next-token distributions are from uniform.

Source: Zhao et al. 2025, "Learning to Reason without External Rewards" (arXiv 2505.19590). The equation is taken from
notes about the paper; compared with the authors' code, which leaves out the constant − ln V.

Left out: nothing of the reward. As in the paper, the model that is trained scores its own texts as it is now.
"""

from __future__ import annotations

from ireasoner.method.scoring import Context, Group, Parts, RewardError


def reward(group: Group, context: Context) -> Parts:
    """r_i = 1/T Σ_t KL(U ‖ π_t) with KL(U ‖ π) = −1/V Σ_v ln(V π(v)), U uniform over the vocabulary of V tokens."""
    if context.distributions is None:
        raise RewardError("the reward intuitor needs context.distributions")
    certainties = [each.certainties for each in context.distributions()]
    return {"self_certainty": [sum(each) / len(each) if each else None for each in certainties]}
