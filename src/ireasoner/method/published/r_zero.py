"""R-Zero and VisPlay: 1 for the majority answer; for the proposer, uncertainty without repetition.

Source: Huang et al. 2025, "R-Zero: Self-Evolving Reasoning LLM from Zero Data" (arXiv 2508.05004), and He et al. 2025,
"VisPlay: Self-Evolving Vision-Language Models from Images" (arXiv 2511.15661), which pays the same for questions about
images. The equations are VisPlay's (4 to 10); R-Zero's are known from notes about its paper. Compared with the code of
both, which clusters questions as described, but pays min(p̂, 1 − p̂) less the repetition, which so weighs twice as much,
without the floor at 0; and a question that cannot be read earns −1 less the repetition there, and 0 in the paper.

The gate on the vote is in the recipe: only groups with |p̂ − 1/2| ≤ 1/4 teach the solver, as in the papers. The scripts
keep questions with p̂ from 0.3 to 0.8.

Left out: turns of many steps in which one role alone is trained, so that the solver learns from votes that were taken
before its turn; a tenth of the solver's reward for the form; a group of questions to each image, which are compared
with each other in VisPlay's paper. Here the questions of a step, one to each of its images, are compared, as R-Zero's
paper and the code of both compare those of a batch; of a few questions, even one that is asked once is a large part. A
question shorter than four words is compared by as long word sequences as it has.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from ireasoner.method.scoring import Context, Group, Parts

REPETITION_WEIGHT = 1.0  # λ
FAR_APART = 0.5  # clusters are merged while the mean distance 1 − BLEU of their questions is less
LONGEST = 4  # words of the sequences that BLEU compares
SMOOTHING = 0.1  # what BLEU counts in place of no common sequence (method 1 of Chen and Cherry 2014)


def reward(group: Group, context: Context) -> Parts:
    """r_i = 1 for the majority answer; the proposer earns max(0, 1 − 2 |p̂ − 1/2| − λ |C| / B).

    p̂ is the majority's share, and C the question's cluster among the B questions of the step.
    """
    majority = [float(i in group.vote.members) for i in range(len(group.solutions))]
    worth = 1.0 - 2.0 * abs(group.vote.fraction - 0.5)
    if context.questions and group.question in context.questions:
        shares = cluster_shares(tuple(context.questions))
        worth -= REPETITION_WEIGHT * shares[context.questions.index(group.question)]
    return {"majority_answer": majority, "proposer": max(0.0, worth)}


@lru_cache(1)  # the questions of a step are the same for each of its groups
def cluster_shares(questions: tuple[str, ...]) -> tuple[float, ...]:
    """|C| / B for the cluster C of each of B questions: agglomerative clusters by mean distance, which is 1 − BLEU."""
    distances = {(i, j): 1.0 - bleu(questions[i], questions[j]) for j in range(len(questions)) for i in range(j)}
    clusters = [[i] for i in range(len(questions))]

    def apart(one: Sequence[int], other: Sequence[int]) -> float:
        between = [distances[min(i, j), max(i, j)] for i in one for j in other]
        return math.fsum(between) / len(between)

    while len(clusters) > 1:
        pairs = [(apart(clusters[i], clusters[j]), i, j) for j in range(len(clusters)) for i in range(j)]
        nearest, i, j = min(pairs)
        if nearest >= FAR_APART:
            break
        clusters[i] += clusters.pop(j)
    sizes = {member: len(cluster) for cluster in clusters for member in cluster}
    return tuple(sizes[i] / len(questions) for i in range(len(questions)))


def bleu(text: str, reference: str) -> float:
    """Sentence BLEU of a text against one reference (Papineni et al. 2002): the brevity penalty times the geometric
    mean of the shares of the text's word sequences of 1 to 4 words that the reference has too."""
    words, others = text.split(), reference.split()
    if not set(words) & set(others):
        return 0.0
    logs = []
    for length in range(1, min(LONGEST, len(words)) + 1):
        own, theirs = _sequences(words, length), _sequences(others, length)
        logs.append(math.log((own & theirs).total() or SMOOTHING) - math.log(own.total()))
    return math.exp(min(0.0, 1.0 - len(others) / len(words)) + math.fsum(logs) / len(logs))


def _sequences(words: Sequence[str], length: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + length]) for i in range(len(words) - length + 1))
