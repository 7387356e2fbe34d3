"""Co-rewarding: 1 for the answer that most give when they see the image in another way.

Source: Zhang et al. 2025, "Co-rewarding: Stable Self-supervised RL for Eliciting Reasoning in Large Language Models"
(arXiv 2508.00410), its first instantiation, Co-rewarding-I; compared with the authors' code.

The paper votes on a paraphrase of each question that a larger model has written beforehand. Here the question stays as
it is, and the image is lightly changed (`ireasoner.training.alterations`): the question is asked for the first time, so
that its paraphrase would cost another reply before the solver can begin, and would be no better than the model that
writes it, while a change of the image is certain to keep its meaning.

Left out: learning from the answers about the other view, whose label is the vote on the image as it is; a teacher that
follows the policy slowly and gives the labels in its place (Co-rewarding-II).
"""

from __future__ import annotations

from ireasoner.method.scoring import Context, Group, Parts, RewardError


def reward(group: Group, context: Context) -> Parts:
    """r_i = 1 if a_i is the majority answer of the group that has seen the other view, else 0.

    Where a label says what is true, 1 for the right answers.
    """
    if group.rightness is not None:
        return {"majority_of_the_other_view": [float(i in group.vote.members) for i in range(len(group.solutions))]}
    if context.other_view is None:
        raise RewardError("the reward co_rewarding needs context.other_view, which a recipe with other_view: true has")
    label = context.other_view.vote.answer
    return {"majority_of_the_other_view": [float(key is not None and key == label) for key in group.answer_keys]}
