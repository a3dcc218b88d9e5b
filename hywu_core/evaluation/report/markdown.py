"""A report as Markdown: the same tables; images stay in the HTML."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from ...files import write_text
from ..tables import Table
from .build import Report


def write_markdown(report: Report, path: Path) -> None:
    """Write the file atomically, over an earlier one."""
    lines = [f"# {safe(report.title)}", "", *(f"- {safe(line)}" for line in report.opening), ""]
    for table in report.tables:
        lines += markdown_table(table)
    if report.exhibits:
        lines += ["## Best, median, worst", ""]
        for exhibit in report.exhibits:
            scores = ", ".join(panel.caption for panel in exhibit.panels if ":" in panel.caption)
            told = f"{exhibit.place}: {exhibit.instruction} ({exhibit.item}): {scores}"
            lines.append(f"- {safe(told)}")
        lines.append("")
    if report.unscored:
        lines += [f"## Without a score ({len(report.unscored)})", ""]
        lines += [*(f"- {safe(line)}" for line in report.unscored), ""]
    lines += ["## Published by others", ""]
    for table in report.theirs:
        lines += markdown_table(table)
    write_text(path, "\n".join(lines))


def markdown_table(table: Table) -> list[str]:
    """A table as the lines of a Markdown section."""
    rule = ["---", *("---:" for _ in table.header[1:])]
    rows = [table.header, rule, *table.rows]
    body = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return [
        f"## {safe(table.title)}",
        "",
        *body,
        "",
        *([safe(table.note), ""] if table.note else []),
    ]


#: What makes markup anywhere in a line: of CommonMark, of tables, strike-through and formulas.
_MARKS = re.compile(r"[\\|<`*_\[~&$]")
#: What makes a heading, a quotation or a list at the beginning.
_OPENING = re.compile(r"^(#|>|[-+=]|\d+(?=[.)]))")
#: What some programs make a link of without being asked.
_LINK = re.compile(r"(?i)(https?|ftp|mailto|xmpp):|www\.|@(?=\w)")


def safe(text: str) -> str:
    """The text for a list item or a heading: nothing in it is markup, a link or a control sequence."""
    return _OPENING.sub(lambda m: m[0] + "\\" if m[0][0].isdigit() else "\\" + m[0], cell(text))


def cell(text: str) -> str:
    """The same for a table's cell, where no list or heading begins."""
    text = "".join(
        "\ufffd" if unicodedata.category(c) == "Cc" else c for c in " ".join(text.split())
    )
    text = _MARKS.sub(lambda match: "\\" + match[0], text)
    return _LINK.sub(lambda m: m[0][:-1] + "\\" + m[0][-1], text)
