"""Means with bootstrap intervals, over items or over clusters of items that share a photograph."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
SEED = 20_240_613

#: Resamples drawn at once: bounds the memory of the index matrix.
_CHUNK = 1_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval and the number of values.

    NaN where there is none: a single value, or values of a single photograph, have no interval.
    """

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if not self.count:
            return "–"
        return f"{self.mean:.2f}{self.interval('')}"

    def interval(self, sign: str) -> str:
        """ " [low, high]", or nothing when there is none; sign: "+" to show signs."""
        return "" if math.isnan(self.low) else f" [{self.low:{sign}.2f}, {self.high:{sign}.2f}]"


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def total(values: Iterable[float]) -> float:
    """Sum in doubles, added from left to right: the same digits on every Python.

    Python's own `sum` does this up to 3.11 and compensates rounding errors from 3.12 on, which moves
    the last printed digit of an average that lies between two. 0.0 without values.
    """
    result = 0.0
    for value in values:
        result += value
    return result


def bootstrap_mean(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """Mean and percentile bootstrap interval.

    clusters: one label a value; whole clusters are drawn, so that several instructions on one
    photograph don't count as independent. Default: each value by itself.
    """
    return bootstrap_mean_of_means([values], [clusters], resamples, seed)


def bootstrap_mean_of_means(
    groups: Sequence[Sequence[float]],
    clusters: Sequence[Sequence[Hashable] | None] | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """Mean of the groups' means; values are redrawn within each group (groups stay as they are)."""
    clusters = clusters or [None] * len(groups)
    pairs = [(g, c) for g, c in zip(groups, clusters, strict=True) if len(g)]
    if not pairs:
        return NOTHING
    rng = np.random.default_rng(seed)
    mean = float(np.mean([np.mean(group) for group, _ in pairs]))
    count = sum(len(group) for group, _ in pairs)
    sums = [_cluster_sums(group, labels) for group, labels in pairs]
    if all(len(sizes) < 2 for _, sizes in sums):
        return Estimate(mean, math.nan, math.nan, count)
    draws = np.mean([_resampled_means(*pair, resamples, rng) for pair in sums], 0)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(mean, float(low), float(high), count)


def _cluster_sums(
    values: Sequence[float], clusters: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:
    data = np.asarray(values, dtype=np.float64)
    if clusters is None:
        return data, np.ones_like(data)
    order = {label: number for number, label in enumerate(dict.fromkeys(clusters))}
    index = np.array([order[label] for label in clusters])
    return np.bincount(index, weights=data), np.bincount(index).astype(np.float64)


def _resampled_means(
    sums: np.ndarray, counts: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    size = len(sums)
    rows = max(1, _CHUNK // size)
    means = []
    for start in range(0, resamples, rows):
        index = rng.integers(0, size, (min(rows, resamples - start), size))
        means.append(sums[index].sum(1) / counts[index].sum(1))
    return np.concatenate(means)
