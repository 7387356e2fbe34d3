"""The measures of accuracy, and 95 % confidence intervals of means over seeds, over questions, and over both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SAMPLES = 5  # of each question, for mean@1, maj@5 and pass@5
MEASURES = ("greedy", "mean@1", f"maj@{SAMPLES}", f"pass@{SAMPLES}")  # of accuracy, the most important first
RESAMPLES = 10_000
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, 1 to 9 degrees of freedom


def interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """The mean of `values` [questions] with its 95 % percentile bootstrap interval: mean, low, high."""
    rng = np.random.default_rng(0)
    weights = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES)
    low, high = np.quantile(weights @ values / len(values), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def resampled_means(values_KSQ: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bootstrap means of K models over S seeds and Q questions, both resampled with replacement: [RESAMPLES, K].

    The draws depend only on S and Q, so that the means of different models are paired.
    """
    rng = np.random.default_rng(0)
    models, seeds, questions = values_KSQ.shape
    found = np.empty((RESAMPLES, models))
    for rows in np.array_split(np.arange(RESAMPLES), 20):  # in parts, because all weights at once take much memory
        weights_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=len(rows)) / seeds
        weights_RQ = rng.multinomial(questions, np.full(questions, 1 / questions), size=len(rows)) / questions
        for k, values_SQ in enumerate(values_KSQ):
            found[rows, k] = np.einsum("rq,rq->r", weights_RS @ values_SQ, weights_RQ)
    return found


def plus_minus(by_seed: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of a mean over seeds (Student's t); None for a single seed."""
    freedom = len(by_seed) - 1
    if freedom < 1:
        return None
    exact = freedom <= len(T_QUANTILES)  # otherwise an approximation with an error of at most 0.003
    quantile = T_QUANTILES[freedom - 1] if exact else 1.96 + 2.372 / freedom + 2.822 / freedom**2
    return float(quantile * np.std(by_seed, ddof=1) / np.sqrt(len(by_seed)))
