"""TTRV: the share of the answer, and the certainty of the group.

Source: Singh et al. 2025, "TTRV: Test-Time Reinforcement Learning for Vision Language Models" (arXiv 2510.06783), whose
two rewards are the frequency of an output and the negative entropy of the distribution of outputs. The constant 0.75,
and the division of the entropy by its largest value for as many different answers, are those of the authors' code,
which counts unreadable outputs as one answer more.

The second part is the same for the whole group, so that it cancels out of every difference from the group's mean: it
only sets the readable ones further apart from the unreadable ones. It is paid as α (1 − H / ln M) in place of
−α H / ln M, so that a readable trajectory never earns less than an unreadable one.

Left out: sampling 32 trajectories and learning from 16 of them.
"""

from __future__ import annotations

import math
from collections import Counter

from ireasoner.method.scoring import Context, Group, Parts

CERTAINTY_WEIGHT = 0.75  # α


def reward(group: Group, context: Context) -> Parts:
    """r_i = p(a_i) + α (1 − H / ln M), H the entropy of the readable votes, which give M different answers."""
    count, votes = len(group.answer_keys), Counter(group.answer_keys)
    different = len(votes.keys() - {None})
    largest = math.log(different) if different > 1 else 1.0  # H is 0 where all answers are the same
    certainty = CERTAINTY_WEIGHT * (1.0 - group.vote.entropy / largest)
    return {"frequency": [votes[key] / count for key in group.answer_keys], "certainty": [certainty] * count}
