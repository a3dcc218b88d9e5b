"""What the votes say: the win rate with its interval, agreement, and the paper's figures as theirs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..statistics import by_pair, krippendorff_alpha, percent_agreement, win_rate
from ..tables import Table
from .store import VERDICTS, Store

PUBLISHED = Table(
    "Published: human preference (GSB), win rate of HY-WU",
    ("against", "win rate of HY-WU"),
    (
        ("Step1X-Edit-v1.2", "78.4 %"),
        ("Qwen-Image-Edit-2511", "70.5 %"),
        ("LongCat-Image-Edit", "68.3 %"),
        ("FLUX.2 [Dev]", "67.8 %"),
        ("Seedream 4.5", "55.6 %"),
        ("GPT Image 1.5", "55.5 %"),
        ("Nano Banana 2", "47.6 %"),
        ("Nano Banana Pro", "46.2 %"),
    ),
    "Published by the authors of HY-WU, from the votes of people on their data; not measured here.",
)


def report(store: Store) -> tuple[dict[str, Any], list[Table]]:
    """JSON-safe figures and the tables to print: ours, then the published one."""
    votes = store.votes()
    counts = Counter(vote.verdict for vote in votes)
    rate = win_rate(counts)
    units = by_pair((vote.pair, vote.verdict) for vote in votes)
    per_pair = [len(unit) for unit in units] + [0] * (len(store.pairs) - len(units))
    left = sum(
        vote.verdict != "same" and (vote.verdict == "good") == vote.a_on_left for vote in votes
    )
    data: dict[str, Any] = {
        "method_a": store.about["method_a"],
        "method_b": store.about["method_b"],
        **{verdict: counts[verdict] for verdict in VERDICTS},
        "votes": len(votes),
        "voters": len({vote.voter for vote in votes}),
        "pairs": len(store.pairs),
        "votes_per_pair": {
            "min": min(per_pair),
            "mean": sum(per_pair) / len(per_pair),
            "max": max(per_pair),
        },
        "win_rate": rate[0] if rate else None,
        "wilson_95": list(rate[1:]) if rate else None,
        "ties": counts["same"] / len(votes) if votes else None,
        "left_chosen": left,
        "agreement_percent": _times100(percent_agreement(units)),
        "krippendorff_alpha_nominal": krippendorff_alpha(units),
        "published": PUBLISHED.as_json(),
    }
    return data, [_table(data), PUBLISHED]


def _table(data: dict[str, Any]) -> Table:
    first, second = data["method_a"], data["method_b"]
    spread = data["votes_per_pair"]
    decided = data["good"] + data["bad"]
    alpha, percent = data["krippendorff_alpha_nominal"], data["agreement_percent"]
    rate = "no votes"
    if data["win_rate"] is not None:
        low, high = data["wilson_95"]
        rate = f"{100 * data['win_rate']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    rows = (
        (f"win rate of {first}", rate),
        ("good / same / bad", f"{data['good']} / {data['same']} / {data['bad']}"),
        ("ties", "no votes" if data["ties"] is None else f"{100 * data['ties']:.1f} %"),
        ("votes, voters", f"{data['votes']}, {data['voters']}"),
        (
            "votes per pair",
            f"{spread['mean']:.2f} ({spread['min']} to {spread['max']}) on {data['pairs']} pairs",
        ),
        ("left side chosen", f"{data['left_chosen']} of {decided} decided"),
        ("agreement of voters", "undefined" if percent is None else f"{percent:.1f} %"),
        ("Krippendorff's alpha", "undefined" if alpha is None else f"{alpha:.3f}"),
    )
    note = (
        "Win rate = (good + same / 2) / all, with a Wilson 95 % interval that takes votes as "
        "independent: with few voters or pairs it is too narrow."
    )
    return Table(
        f"Human preference (GSB): {first} against {second}", ("figure", "value"), rows, note
    )


def _times100(value: float | None) -> float | None:
    return None if value is None else 100 * value
