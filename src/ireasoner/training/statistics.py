"""The measures of accuracy, and 95 % intervals of their means over seeds, questions, and the images these are about."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

SAMPLES = 5  # of each question, for mean@1, maj@5 and pass@5
MEASURES = ("greedy", "mean@1", f"maj@{SAMPLES}", f"pass@{SAMPLES}")  # of accuracy, the most important first
STRICT = tuple(f"strict_{name}" for name in MEASURES)  # the same, where only the key of the true answer is right
# By measure, the share of the texts that it judges that could be read, and could be right at all.
READABLE = {"greedy": "greedy_well_formed", "mean@1": "well_formed"}
FLIPS = 10_000  # of the signs of differences, for a p-value


def numbered(names: Iterable[Hashable]) -> NDArray[np.int64]:
    """Equal names as equal numbers: 0 for the first name, 1 for the next that differs, and so on."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def half_width(values_SQ: NDArray[np.float64], images_Q: NDArray[np.int64]) -> float:
    """Half the width of the 95 % interval of a mean over seeds and questions; infinite for one seed and one image.

    Questions about the same image are no independent evidence, and neither are the answers under one seed. So the
    variance of the mean is what seeds differ by, plus what images differ by, less what both of these contain (Cameron,
    Gelbach and Miller 2011). Its square root is multiplied by the quantile of Student's t, with Satterthwaite's (1946)
    degrees of freedom. Where seeds differ by far more than images, these are few and uncertain themselves, so Student's
    t over the means of the seeds alone is taken if that is wider. `benchmarks/coverage.py` shows that this covers.

    Args:
        values_SQ: values [seeds, questions]. For the difference of two models, their differences: that pairs them.
        images_Q: the number of the image that each question is about, as `numbered` gives it.
    """
    seeds, questions = values_SQ.shape
    means_S = values_SQ.mean(1)
    about_I = np.bincount(images_Q)  # how many questions are about each image
    images = len(about_I)
    if seeds == images == 1:
        return np.inf
    by_seed = by_image = shared = 0.0
    if seeds > 1:
        by_seed = float(np.var(means_S, ddof=1)) / seeds
    if images > 1:
        # By how much the mean of each seed would fall without each image: the jackknife.
        sums_SI = np.stack([np.bincount(images_Q, row) for row in values_SQ - means_S[:, None]])
        falls_SI = sums_SI / (questions - about_I)
        by_image = (images - 1) / images * float((falls_SI.mean(0) ** 2).sum())
        if seeds > 1:
            apart_SI = falls_SI - falls_SI.mean(0)
            shared = (images - 1) / images * float((apart_SI**2).sum()) / (seeds * (seeds - 1))
    variance = max(by_seed + by_image - shared, by_seed, by_image)  # `shared` is an estimate, and may be too large
    if variance == 0:
        return 0.0
    uncertain = by_seed**2 / max(seeds - 1, 1) + by_image**2 / max(images - 1, 1)
    both = t_quantile(max(variance**2 / uncertain, 1)) * np.sqrt(variance)
    return float(max(both, t_quantile(max(seeds - 1, 1)) * np.sqrt(by_seed)))


def share_interval(values_Q: NDArray[np.float64], images_Q: NDArray[np.int64]) -> tuple[float, float, float]:
    """A mean of shares, such as accuracy, with its 95 % interval: mean, low, high.

    This is Wilson's interval at the number of independent questions whose mean would vary as much (Korn and Graubard
    1998), because near 0 and 1 a symmetric interval covers too little. Without any variation, as where all are right,
    that number is the number of images.
    """
    mean, images = float(values_Q.mean()), int(images_Q.max()) + 1
    quantile = t_quantile(max(images - 1, 1))
    variance = (half_width(values_Q[None], images_Q) / quantile) ** 2
    count = mean * (1 - mean) / variance if variance > 0 else images
    total = count + quantile**2
    middle = (count * mean + quantile**2 / 2) / total
    half = quantile / total * np.sqrt(count * mean * (1 - mean) + quantile**2 / 4)
    low, high = float(middle - half), float(middle + half)
    return (
        mean,
        max(0.0, min(mean, low)),
        min(1.0, max(mean, high)),
    )  # where all are wrong or right, rounding goes beyond


def difference_interval(values_Q: NDArray[np.float64], images_Q: NDArray[np.int64]) -> tuple[float, float, float]:
    """A mean of differences of shares with its 95 % interval, which ends at -1 and 1: mean, low, high."""
    mean, half = float(values_Q.mean()), half_width(values_Q[None], images_Q)
    return mean, max(mean - half, -1.0), min(mean + half, 1.0)


def paired_differences(
    differences: Mapping[str, NDArray[np.float64]], images_Q: NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    """What two models differ by on the same questions, by measure.

    Each measure has its mean, a 95 % interval, and a two-sided p-value by random sign flips: the chance of a mean
    difference at least as large if the models were exchangeable for every image, all questions about it together.

    Args:
        differences: arrays [Q] of differences of shares, by measure.
        images_Q: the number of the image that each question is about, as `numbered` gives it.
    """
    sums_MI = np.stack([np.bincount(images_Q, values) for values in differences.values()])  # [measures, images]
    rng, signs = np.random.default_rng(0), np.array([-1.0, 1.0])
    flipped = np.stack([sums_MI @ rng.choice(signs, size=sums_MI.shape[1]) for _ in range(FLIPS)])
    extreme = (np.abs(flipped) >= np.abs(sums_MI.sum(1)) - 1e-9).sum(0)
    found = {}
    for (name, values), count in zip(differences.items(), extreme, strict=True):
        mean, low, high = difference_interval(values, images_Q)
        found[name] = {"mean": mean, "low": low, "high": high, "p": float((count + 1) / (FLIPS + 1))}
    return found


def t_quantile(freedom: float) -> float:
    """What 97.5 % of Student's t lies below, to five digits, for any degrees of freedom from 1 on.

    With t = √freedom tan θ, the density of θ in (−π/2, π/2) is proportional to cos^(freedom − 1) θ.
    """
    ends = np.linspace(0, np.pi / 2, 20_001)
    mass = np.cumsum(np.cos((ends[:-1] + ends[1:]) / 2) ** (freedom - 1))
    return float(np.sqrt(freedom) * np.tan(np.interp(0.95 * mass[-1], mass, ends[1:])))
