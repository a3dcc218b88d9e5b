"""Win rate, Wilson interval and agreement between voters."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ..statistics import total

Z95 = 1.959963984540054


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
