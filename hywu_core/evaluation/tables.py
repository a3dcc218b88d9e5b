"""The tables of a report: per questionnaire, in the roundings of its authors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import gedit, imgedit, wu_eval
from .items import ItemList
from .scores import ItemScore, MethodScores, gedit_rows, imgedit_scores
from .statistics import Estimate, bootstrap_mean, bootstrap_mean_of_means


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


def summary_table(scores: MethodScores) -> Table:
    """One method's table, in the authors' form where there is one."""
    if scores.questionnaire == "gedit":
        return gedit_table(scores)
    if scores.questionnaire == "imgedit":
        return imgedit_table(scores)
    return wu_eval_table(scores)


def wu_eval_table(scores: MethodScores) -> Table:
    """Tasks × dimensions, each mean with its interval."""
    names = (*wu_eval.DIMENSIONS, "overall")
    rows = []
    for task in (None, *scores.tasks()):
        chosen = [s for s in scores.scored() if task in (None, s.item.task)]
        found = _wu_estimates(chosen)
        rows.append((task or "all tasks", str(len(chosen)), *(str(found[n]) for n in names)))
    return Table(
        f"WU-Eval: {scores.method}",
        ("task", "items", *(name.replace("_", " ") for name in names)),
        tuple(rows),
        "Mean and 95 % interval (bootstrap over photographs, 10,000 resamples), scale 1 to 5.",
    )


def _wu_estimates(scores: Sequence[ItemScore]) -> dict[str, Estimate]:
    values = [{n: s.values[n] for n in wu_eval.DIMENSIONS} for s in scores]
    return wu_eval.estimates(values, [s.item.cluster for s in scores])


def gedit_table(scores: MethodScores) -> Table:
    """Tasks × (semantics, quality, overall) for all items, then averages of the subsets."""
    return gedit_rows_table(scores.method, gedit_rows(scores))


def gedit_rows_table(method: str, rows: Sequence[gedit.Row]) -> Table:
    """The same from rows of the authors' files."""
    everything = gedit.aggregate(rows)
    lines = [
        (task, str(everything.counts[task]), *map(three, everything.tasks[task]))
        for task in everything.tasks
    ]
    subsets = [("Average", None, False), ("Average, intersection", None, True)]
    for language in sorted({row.language for row in rows}):
        subsets += [
            (f"Average {language}", language, False),
            (f"Average {language}, intersection", language, True),
        ]
    for title, language, intersection in subsets:
        part = gedit.aggregate(rows, language, intersection)
        lines.append((title, str(sum(part.counts.values())), *map(three, part.average)))
    absent = [task for task in gedit.TASKS if task not in everything.tasks]
    note = "Scale 0 to 10; averages are means of the task means."
    if absent:
        note += f" No score for {', '.join(absent)}: not comparable with published averages."
    return Table(
        f"GEdit-Bench: {method}",
        ("task", "items", "semantics", "quality", "overall"),
        tuple(lines),
        note,
    )


def imgedit_table(scores: MethodScores) -> Table:
    """Edit types and the total, in the authors' roundings."""
    items, _ = imgedit_scores(scores)
    return imgedit_scores_table(scores.method, items, scores.items)


def imgedit_scores_table(method: str, items: Mapping[str, float], asked: ItemList) -> Table:
    """The same from item scores by key; asked: the benchmark's items, which know the types."""
    of = {item.key: item.task for item in asked.items if item.key in items}
    types = imgedit.type_scores(items, of)
    counts = Counter(of.values())
    lines = [(n, str(counts[n]), f"{types[n]:.2f}") for n in imgedit.EDIT_TYPES if n in types]
    total = imgedit.total_score(types)
    lines.append(("Total", str(len(of)), "–" if total is None else f"{total:.2f}"))
    absent = [name for name in imgedit.EDIT_TYPES if name not in types]
    note = "Scale 1 to 5; the total is the mean over types."
    if absent:
        note += f" No score for {', '.join(absent)}: not comparable with published totals."
    return Table(f"ImgEdit-Bench: {method}", ("type", "items", "score"), tuple(lines), note)


def three(value: float) -> str:
    """Three decimals, as the authors of GEdit-Bench print; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def bars(methods: Sequence[MethodScores]) -> list[Bar]:
    """Overall per task and over all, for every method, with intervals.

    GEdit and ImgEdit average task means: their intervals redraw items within tasks.
    """
    found = []
    for scores in methods:
        tasks = scores.tasks()
        grouped = {t: [s for s in scores.scored() if s.item.task == t] for t in tasks}
        if scores.questionnaire == "wu-eval":
            whole = bootstrap_mean(*_overall(scores.scored())) if scores.scored() else None
        else:
            pairs = [_overall(group) for group in grouped.values() if group]
            whole = bootstrap_mean_of_means([p[0] for p in pairs], [p[1] for p in pairs])
        found.append(Bar("all", scores.method, whole or bootstrap_mean([])))
        found += [Bar(t, scores.method, bootstrap_mean(*_overall(g))) for t, g in grouped.items()]
    return found


def dimension_bars(methods: Sequence[MethodScores]) -> list[Bar]:
    """WU-Eval's dimensions over all tasks, for every method."""
    return [
        Bar(name.replace("_", " "), scores.method, estimate)
        for scores in methods
        for name, estimate in _wu_estimates(scores.scored()).items()
    ]


def _overall(scores: Sequence[ItemScore]) -> tuple[list[float], list[str]]:
    return [s.values["overall"] for s in scores], [s.item.cluster for s in scores]


def comparison_table(methods: Sequence[MethodScores]) -> Table:
    """All methods beside each other, and each one's paired difference to the first.

    A difference is taken over the items that both have a score for, by the same bootstrap.
    """
    first = {s.item.id: s for s in methods[0].scored()}
    rows = []
    whole = {bar.method: bar.estimate for bar in bars(methods) if bar.group == "all"}
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
                str(whole[scores.method]),
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
