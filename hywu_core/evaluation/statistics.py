"""Means with bootstrap intervals, proportions with Wilson's, and agreement between voters.

A bootstrap draws items, or clusters of items that share a photograph.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
SEED = 20_240_613

#: Half-width of a normal 95 % interval, in standard deviations.
Z95 = 1.959963984540054

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
        """ " [low, high]", or nothing when there is none.

        sign: "+" to show signs.
        """
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

    clusters: one label a value; whole clusters are drawn, so that several instructions on one photograph
        don't count as independent.
    Default: each value by itself.
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


# -- proportions and agreement ---------------------------------------------------------------------


def wilson(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a proportion; (0, 1) when nothing was counted.

    `successes` may be a half-integer: a tie is half a success. The interval treats votes as
    independent, so it is too narrow where a few voters or pairs carry most votes.
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def win_rate(counts: Mapping[str, int]) -> tuple[float, float, float] | None:
    """(rate, low, high) of (good + same / 2) / all; None without votes."""
    n = sum(counts.values())
    if n == 0:
        return None
    wins = counts.get("good", 0) + counts.get("same", 0) / 2
    return wins / n, *wilson(wins, n)


def by_pair(votes: Iterable[tuple[str, str]]) -> list[list[str]]:
    """(pair, verdict) rows as one list of verdicts per pair."""
    groups: dict[str, list[str]] = defaultdict(list)
    for pair, verdict in votes:
        groups[pair].append(verdict)
    return list(groups.values())


def percent_agreement(units: Sequence[Sequence[str]]) -> float | None:
    """Share of agreeing pairs of voters over all pairs of voters who judged the same unit."""
    agreeing = pairs = 0
    for unit in units:
        pairs += math.comb(len(unit), 2)
        agreeing += sum(math.comb(count, 2) for count in Counter(unit).values())
    return agreeing / pairs if pairs else None


def krippendorff_alpha(units: Sequence[Sequence[str]]) -> float | None:
    """Krippendorff's alpha, nominal scale; units with one vote don't count.

    None where it is undefined: no unit with two votes, or the same verdict everywhere.
    """
    paired = [unit for unit in units if len(unit) > 1]
    marginal = Counter(verdict for unit in paired for verdict in unit)
    n = sum(marginal.values())
    expected = n * n - sum(count * count for count in marginal.values())
    if not paired or expected == 0:
        return None
    observed = total(
        (len(unit) ** 2 - sum(c * c for c in Counter(unit).values())) / (len(unit) - 1)
        for unit in paired
    )
    return 1 - (n - 1) * observed / expected
