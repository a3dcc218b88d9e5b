"""A report as one HTML file: pictures and charts inside, no request to anywhere when opened."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

from ...files import atomic_path
from ..tables import Table
from .build import Report
from .charts import bar_chart
from .gallery import Exhibit, Panel, data_uri

PAGE = Path(__file__).with_name("page.html")


def write_html(report: Report, path: Path) -> None:
    """Write the page atomically, over an earlier one."""
    page = Template(PAGE.read_text(encoding="utf-8"))
    text = page.substitute(title=escape(report.title), body="\n".join(_body(report)))
    with atomic_path(path, overwrite=True) as part:
        part.write_text(text, encoding="utf-8")


def _body(report: Report) -> list[str]:
    parts = [f"<h1>{escape(report.title)}</h1>"]
    parts += [f'<div class="facts">{escape(fact)}</div>' for fact in report.facts]
    parts += ["<h2>Comparison</h2>", _table(report.tables[0])]
    for title, bars in report.charts:
        parts += [f"<h2>{escape(title)}</h2>", bar_chart(bars, report.scale, title)]
    parts.append("<h2>Per method</h2>")
    parts += map(_table, report.tables[1:])
    if report.exhibits:
        parts.append("<h2>Best, median, worst</h2>")
        parts.append('<p class="note">Chosen by the first method\'s overall score.</p>')
        parts += map(_exhibit, report.exhibits)
    if report.unscored:
        parts.append(f"<h2>Without a score ({len(report.unscored)})</h2>")
        lines = "".join(f"<li>{escape(line)}</li>" for line in report.unscored)
        parts.append(f'<ul class="missing">{lines}</ul>')
    parts.append("<h2>Published by others</h2>")
    parts += [f'<div class="theirs">{_table(table)}</div>' for table in report.theirs]
    return parts


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll"><table><caption>{escape(table.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )


def _exhibit(exhibit: Exhibit) -> str:
    panels = "".join(map(_panel, exhibit.panels))
    return (
        f'<div class="exhibit"><p><span class="place">{escape(exhibit.place)}</span>'
        f"{escape(exhibit.instruction)} <small>({escape(exhibit.item)})</small></p>"
        f'<div class="panels">{panels}</div></div>'
    )


def _panel(panel: Panel) -> str:
    uri = data_uri(panel.picture) if panel.picture else None
    caption = escape(panel.caption)
    picture = f'<img src="{uri}" alt="{caption}">' if uri else '<div class="none">no picture</div>'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"
