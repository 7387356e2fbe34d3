"""SARL: reasoning that moves between kinds of steps as in a small world, in tight circles and on short ways.

Source: Wang et al. 2026, "SARL: Label-Free Reinforcement Learning by Rewarding Reasoning Topology" (arXiv 2603.27977).
The equation SR(G) is taken from the description of the authors' repository. Neither the method's section of the paper
nor the code could be read: how steps are clustered, and what a graph of a single kind earns, are ours.

1 is added for every readable text, because one of a single kind of step would earn no more than an unreadable one.

Left out: an embedding model, in whose place stand the mean input embeddings of the backbone. They know words and no
thoughts, so that steps are of one kind if they are worded alike. Answers are not looked at, here as there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ireasoner.method.rewards import FloatArray
from ireasoner.method.scoring import Context, Group, Parts, RewardError

CLUSTERING_WEIGHT = 0.5
SAME_KIND = 0.8  # a step is of the kind whose mean has at least this cosine to it; ours
MOST_STEPS = 64  # of a trajectory; paths between kinds take the cube of their number


def reward(group: Group, context: Context) -> Parts:
    """r_i = 1 + SR(G_i) with SR(G) = C(G)/2 + 1/(1 + L(G)), and 0 for SR where there are fewer than two kinds.

    The nodes of G_i are the kinds of steps of trajectory i, and its edges join those of consecutive steps. C is the
    mean clustering coefficient of the nodes, and L the mean of the shortest paths between two of them.
    """
    if context.embed is None:
        raise RewardError("the reward sarl needs context.embed")
    steps = [context.embed(solution.reasoning_steps[:MOST_STEPS]) for solution in group.solutions]
    worlds = [small_world(kinds(each)) for each in steps]
    return {"readable": [1.0] * len(worlds), "small_world": worlds}


def kinds(steps: NDArray[np.floating]) -> list[int]:
    """The kind of each step, numbered as they come; steps without a word are left out.

    Args:
        steps: normalised embeddings [steps, width]. Each step joins the kind to whose mean it is most similar, or
            begins a new one.
    """
    sums: list[FloatArray] = []
    found = []
    for step in np.asarray(steps, dtype=np.float64)[np.any(steps, axis=1)]:
        similar = [float(step @ total) / float(np.linalg.norm(total)) for total in sums]
        nearest = int(np.argmax(similar)) if similar else 0
        if similar and similar[nearest] >= SAME_KIND:
            sums[nearest] = sums[nearest] + step
        else:
            nearest = len(sums)
            sums.append(step)
        found.append(nearest)
    return found


def small_world(visited: list[int]) -> float:
    """SR of the graph whose nodes were visited in this order, numbered from 0 without gaps."""
    count = len(set(visited))
    if count < 2:
        return 0.0
    edges = np.zeros((count, count))
    edges[visited[:-1], visited[1:]] = 1.0
    edges = np.maximum(edges, edges.T)
    np.fill_diagonal(edges, 0.0)
    pairs = edges.sum(axis=1) * (edges.sum(axis=1) - 1.0)  # of neighbours, of which so many are neighbours themselves:
    clustering = np.divide(np.diag(edges @ edges @ edges), pairs, out=np.zeros(count), where=pairs > 0)
    paths = np.where(edges > 0, 1.0, np.inf)
    np.fill_diagonal(paths, 0.0)
    for via in range(count):
        paths = np.minimum(paths, paths[:, via, None] + paths[via])
    length = paths.sum() / (count * (count - 1))
    return float(CLUSTERING_WEIGHT * clustering.mean() + 1.0 / (1.0 + length))
