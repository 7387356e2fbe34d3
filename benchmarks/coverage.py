"""How often a 95 % interval holds the true mean, by simulation; prints a table.

    python benchmarks/coverage.py

Each line draws many worlds: answers that are right or wrong, to a number of questions about each of some images, under
some seeds. Whether an answer is right depends on the seed, the image, the question and chance. Where seeds and images
matter alike, each of them gives the mean the same variance; the true mean over all possible seeds and images is known.
Three intervals are compared:

- *questions*: what this package did before: percentiles of a bootstrap of seeds and of questions, as if no two
  questions were about the same image;
- *images, t*: percentiles of a bootstrap of seeds and of images, or Student's t over the means of the seeds, whichever
  is wider;
- *now*: `half_width` of `ireasoner.training.statistics`, or its `share_interval` for one seed; with their mean width
  beside that of the normal interval that knows the true variance.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ireasoner.training.statistics import half_width, share_interval, t_quantile

RESAMPLES = 400
OF_SEEDS = {"images": 0.0, "both": 1.0, "seeds": 4.0}  # variance of the mean from seeds, with that from images as 1
QUESTION, CHANCE = 0.5, 0.5  # variance of one answer, with that from its image as 1
HEAD = ("seeds", "images", "questions each", "right, %", "what varies", "questions", "images, t", "now", "width")


@dataclass(frozen=True)
class World:
    """One line of the table: how many seeds, images, and questions about each; the true mean; what varies."""

    seeds: int
    images: int
    questions: int
    accuracy: float
    varies: str

    @property
    def image(self) -> NDArray[np.int64]:
        """The number of the image that each question is about [questions]."""
        return np.repeat(np.arange(self.images), self.questions)

    def draw(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """Answers, 1 for right and 0 for wrong [seeds, questions]."""
        of_seed = OF_SEEDS[self.varies] * self.seeds / self.images
        count = self.images * self.questions
        skill = (
            np.sqrt(of_seed) * rng.standard_normal((self.seeds, 1))
            + rng.standard_normal(self.images)[self.image]
            + np.sqrt(QUESTION) * rng.standard_normal(count)
            + np.sqrt(CHANCE) * rng.standard_normal((self.seeds, count))
        )
        needed = NormalDist().inv_cdf(1 - self.accuracy) * np.sqrt(of_seed + 1 + QUESTION + CHANCE)
        return (skill > needed).astype(np.float64)


def bootstrap(
    values_SQ: NDArray[np.float64], image_Q: NDArray[np.int64], rng: np.random.Generator
) -> tuple[float, float]:
    """The 95 % percentile interval over seeds and images, the same number of questions about each."""
    values_SI = np.stack([np.bincount(image_Q, row) for row in values_SQ]) / np.bincount(image_Q)
    seeds, images = values_SI.shape
    weights_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    drawn_RI = rng.integers(images, size=(RESAMPLES, images))
    low, high = np.quantile(np.take_along_axis(weights_RS @ values_SI, drawn_RI, 1).mean(1), [0.025, 0.975])
    return float(low), float(high)


def measure(world: World, count: int) -> tuple[str, ...]:
    """One line of the table."""
    rng = np.random.default_rng(0)
    held, means, widths = np.zeros(3), [], []
    for _ in range(count):
        values_SQ = world.draw(rng)
        mean = float(values_SQ.mean())
        by_questions = bootstrap(values_SQ, np.arange(values_SQ.shape[1]), rng)
        by_images = bootstrap(values_SQ, world.image, rng)
        if world.seeds > 1:
            student = t_quantile(world.seeds - 1) * values_SQ.mean(1).std(ddof=1) / np.sqrt(world.seeds)
            by_images = max(by_images, (mean - student, mean + student), key=lambda ends: ends[1] - ends[0])
        if world.seeds > 1:
            half = half_width(values_SQ, world.image)
            now = mean - half, mean + half
        else:
            _, *now = share_interval(values_SQ[0], world.image)
        found = (by_questions, by_images, now)
        held += [low <= world.accuracy <= high for low, high in found]
        means.append(mean)
        widths.append(now[1] - now[0])
    width = np.mean(widths) / (2 * 1.96 * np.std(means))
    about = (world.seeds, world.images, world.questions, f"{100 * world.accuracy:.0f}", world.varies)
    return (*map(str, about), *(f"{100 * share:.1f}" for share in held / count), f"{width:.2f}")


def worlds() -> Iterator[World]:
    """The lines of the table."""
    for seeds in (1, 2, 3, 5, 10):
        for images, questions in ((10, 1), (10, 10), (100, 1), (100, 10)):
            for varies in ("images", "both", "seeds") if seeds > 1 else ("images",):
                yield World(seeds, images, questions, 0.5, varies)
    for images in (10, 100, 1000):
        yield World(1, images, 1, 0.95, "images")


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description="Coverage of 95 % intervals, by simulation.")
    parser.add_argument("--worlds", type=int, default=1000, help="simulated worlds of each line (1000)")
    count = parser.parse_args().worlds
    print(f"| {' | '.join(HEAD)} |\n" + "|---" * len(HEAD) + "|")
    for world in worlds():
        print(f"| {' | '.join(measure(world, count))} |", flush=True)


if __name__ == "__main__":
    main()
