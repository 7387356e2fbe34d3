"""PAPO: 1 for the majority answer, and a little more for texts that the image makes likelier.

Source: Wang et al. 2025, "Perception-Aware Policy Optimization for Multimodal Reasoning" (arXiv 2507.06448), which adds
to the loss of GRPO an implicit perception loss, −γ KL(π(y | image) ‖ π(y | masked image)); compared with the authors'
code.

The paper differentiates an estimate of that KL. Here its log-ratio is a part of the reward: the policy gradient of its
mean is the gradient of the KL to the masked policy, which is held fixed, as in the code. What the code estimates of a
token is ρ − ln ρ − 1 with ρ = π(y | masked image) / π(y | image). Its mean is the same, but the mean of its derivative
is that of the KL the other way round. The paper's answers are judged by labels, in whose place stands the majority. To
what the readable trajectories of a group earn for perception, a constant is added, so that the least of them earns 0. γ
weighs a KL in nats a token beside advantages that GRPO has divided by their standard deviation; the recipe's RLOO does
not divide, so that it weighs a little more here.

Left out: the double entropy loss, which keeps the entropies of both policies low, and which the script for 3B does not
use either; clipping; the mean over the tokens of all texts, where here each text has its own; the end token. Texts are
tokenized anew.
"""

from __future__ import annotations

import numpy as np

from ireasoner.method.scoring import Context, Group, Parts, RewardError

PERCEPTION_WEIGHT = 0.02  # γ, as in the authors' scripts for GRPO


def reward(group: Group, context: Context) -> Parts:
    """r_i = 1[a_i is the majority answer] + γ (k_i − min_j k_j), j over the readable trajectories.

    k_i = 1/T Σ_t ln π(y_it | image) − ln π(y_it | masked image), of a masked image with six in ten squares black.
    """
    if context.likelihoods is None:
        raise RewardError("the reward papo needs context.likelihoods")
    texts = [("", text) for text in group.texts]
    seen, masked = (context.likelihoods(texts, view) for view in ("same", "masked"))
    gains = [float(np.mean(np.subtract(a, b))) if len(a) else 0.0 for a, b in zip(seen, masked, strict=True)]
    least = min((gain for gain, key in zip(gains, group.answer_keys, strict=True) if key is not None), default=0.0)
    majority = [float(i in group.vote.members) for i in range(len(group.solutions))]
    return {"majority_answer": majority, "perception": [PERCEPTION_WEIGHT * (gain - least) for gain in gains]}
