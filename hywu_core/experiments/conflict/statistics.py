"""Mean and interval over photographs: crops of one photograph are no independent observations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ...errors import HYWUError


class Interval(NamedTuple):
    """A mean and its 95 % percentile-bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: Mapping[str, Sequence[float]], resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Interval of a mean; values: photograph -> one number a crop (or task, or phrasing) of it.

    Each photograph counts once, by its own mean; photographs are what is resampled (Efron 1979).
    Raises HYWUError on no photographs, an empty one, or a number that isn't finite.
    """
    empty = [name for name, numbers in values.items() if not len(numbers)]
    if not values or empty:
        raise HYWUError(f"bootstrap: no values for {', '.join(empty) or 'any photograph'}.")
    means = np.array([np.mean(numbers) for numbers in values.values()], dtype=np.float64)
    if not np.isfinite(means).all():
        bad = [name for name, mean in zip(values, means, strict=True) if not np.isfinite(mean)]
        raise HYWUError(f"bootstrap: values that are not finite for {', '.join(bad)}.")
    chosen = np.random.default_rng(seed).integers(len(means), size=(resamples, len(means)))
    low, high = np.percentile(means[chosen].mean(axis=1), [2.5, 97.5])
    return Interval(float(means.mean()), float(low), float(high))


def paired_bootstrap(
    one: Mapping[str, Sequence[float]],
    two: Mapping[str, Sequence[float]],
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of ``one - two``, item by item on the same crops of the same photographs.

    Raises HYWUError when the two don't cover the same items.
    """
    if one.keys() != two.keys():
        odd = sorted(one.keys() ^ two.keys())
        raise HYWUError(f"paired bootstrap: only one side has {', '.join(odd[:5])}.")
    differences = {}
    for name, numbers in one.items():
        if len(numbers) != len(two[name]):
            raise HYWUError(
                f"paired bootstrap: {name} has {len(numbers)} and {len(two[name])} values."
            )
        differences[name] = np.subtract(numbers, two[name]).tolist()
    return bootstrap(differences, resamples, seed)
