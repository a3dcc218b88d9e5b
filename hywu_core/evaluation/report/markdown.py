"""A report as Markdown: the same tables; images stay in the HTML."""

from __future__ import annotations

from pathlib import Path

from ...files import write_text
from ..tables import Table
from .build import Report


def write_markdown(report: Report, path: Path) -> None:
    """Write the file atomically, over an earlier one."""
    lines = [f"# {_safe(report.title)}", "", *(f"- {_safe(fact)}" for fact in report.facts), ""]
    for table in report.tables:
        lines += markdown_table(table)
    if report.exhibits:
        lines += ["## Best, median, worst", ""]
        for exhibit in report.exhibits:
            scores = ", ".join(panel.caption for panel in exhibit.panels if ":" in panel.caption)
            lines.append(
                f"- {exhibit.place}: {_safe(exhibit.instruction)} ({exhibit.item}): {scores}"
            )
        lines.append("")
    if report.unscored:
        lines += [f"## Without a score ({len(report.unscored)})", ""]
        lines += [*(f"- {_safe(line)}" for line in report.unscored), ""]
    lines += ["## Published by others", ""]
    for table in report.theirs:
        lines += markdown_table(table)
    write_text(path, "\n".join(lines))


def markdown_table(table: Table) -> list[str]:
    """A table as the lines of a Markdown section."""
    rule = ["---", *("---:" for _ in table.header[1:])]
    rows = [table.header, rule, *table.rows]
    body = ["| " + " | ".join(map(_safe, row)) + " |" for row in rows]
    return [
        f"## {_safe(table.title)}",
        "",
        *body,
        "",
        *([_safe(table.note), ""] if table.note else []),
    ]


def _safe(text: str) -> str:
    # A cell or list item stays one line, and nothing in an instruction becomes markup
    text = " ".join(text.split()).replace("\\", "\\\\")
    for character in "|<`*_[":
        text = text.replace(character, "\\" + character)
    return text
