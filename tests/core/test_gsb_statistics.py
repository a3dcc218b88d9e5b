"""Wilson intervals and agreement against independent computations."""

from __future__ import annotations

import itertools
import random

import pytest
from scipy.stats import binomtest

from hywu_core.evaluation.statistics import (
    krippendorff_alpha,
    percent_agreement,
    wilson,
    win_rate,
)


@pytest.mark.parametrize("n", [1, 2, 7, 50, 1000])
def test_wilson_is_scipys(n):
    for k in {0, 1, n // 2, n}:
        theirs = binomtest(k, n).proportion_ci(0.95, "wilson")
        assert wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_a_tie_is_half_a_win_and_no_votes_have_no_rate():
    assert win_rate({"good": 3, "same": 2, "bad": 5})[0] == pytest.approx(0.4)
    assert win_rate({}) is None


def coincidence_alpha(units: list[list[str]]) -> float:
    """Krippendorff's alpha by its coincidence matrix, pair by pair."""
    matrix: dict[tuple[str, str], float] = {}
    for unit in units:
        for a, b in itertools.permutations(range(len(unit)), 2):
            cell = (unit[a], unit[b])
            matrix[cell] = matrix.get(cell, 0) + 1 / (len(unit) - 1)
    values = {c for c, _ in matrix}
    total = {c: sum(w for (a, _), w in matrix.items() if a == c) for c in values}
    n = sum(total.values())
    observed = sum(w for (a, b), w in matrix.items() if a != b) / n
    expected = sum(total[a] * total[b] for a in values for b in values if a != b) / (n * (n - 1))
    return 1 - observed / expected


def test_agreement_is_the_definitions_on_random_votes():
    rng = random.Random(5)
    for _ in range(200):
        units = [rng.choices(["good", "same", "bad"], k=rng.randint(1, 6)) for _ in range(12)] + [
            ["good", "bad"]
        ]
        assert krippendorff_alpha(units) == pytest.approx(coincidence_alpha(units), abs=1e-9)
        pairs = [pair for unit in units for pair in itertools.combinations(unit, 2)]
        share = sum(a == b for a, b in pairs) / len(pairs)
        assert percent_agreement(units) == pytest.approx(share)


def test_agreement_is_undefined_without_two_votes_on_a_pair():
    assert krippendorff_alpha([["good"], ["bad"]]) is None
    assert percent_agreement([["good"]]) is None
    assert krippendorff_alpha([["good", "good"]]) is None
