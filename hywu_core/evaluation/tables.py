"""Tables and bars of text and figures, and the one that compares methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .statistics import Estimate, bootstrap_mean

if TYPE_CHECKING:
    from .scores import MethodScores


@dataclass(frozen=True)
class Table:
    """A title, column names and rows of text; the first column names the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {
            "title": self.title,
            "header": list(self.header),
            "rows": [list(row) for row in self.rows],
            "note": self.note,
        }


@dataclass(frozen=True)
class Bar:
    """One bar of a chart."""

    group: str
    method: str
    estimate: Estimate


def plain_cell(value: object) -> object:
    """The value for a CSV file: a spreadsheet would run a text that begins like a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def comparison_table(methods: Sequence[MethodScores]) -> Table:
    """All methods beside each other, and each one's paired difference to the first.

    A difference is taken over the items that both have a score for, by the same bootstrap.
    """
    first = {s.item.id: s for s in methods[0].scored()}
    rows = []
    for scores in methods:
        both = [(first[s.item.id], s) for s in scores.scored() if s.item.id in first]
        difference = bootstrap_mean(
            [b.values["overall"] - a.values["overall"] for a, b in both],
            [b.item.cluster for _, b in both],
        )
        outcomes = scores.outcomes()
        rows.append(
            (
                scores.method,
                str(scores.questionnaire.overall(scores)),
                "–" if scores is methods[0] else _signed(difference),
                *(str(count) for count in outcomes.values()),
            )
        )
    return Table(
        "All methods",
        ("method", "overall", f"difference to {methods[0].method}", *outcomes),
        tuple(rows),
        "Overall with its 95 % interval; the difference is per item, over the items that both have.",
    )


def _signed(value: Estimate) -> str:
    return f"{value.mean:+.2f}{value.interval('+')}" if value.count else "–"
