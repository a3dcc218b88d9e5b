"""A report as one HTML file: images and charts inside, no request to anywhere when opened."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from ...errors import HYWUError
from ...files import write_text
from ...images import encode_image, load_image
from ..tables import Table
from .build import Exhibit, Panel, Report
from .charts import bar_chart

PAGE = Path(__file__).with_name("page.html")

#: Longest side of an embedded image, in pixels.
SIDE = 320


def write_html(report: Report, path: Path) -> None:
    """Write the page atomically, over an earlier one."""
    page = Template(PAGE.read_text(encoding="utf-8"))
    text = page.substitute(title=escape(report.title), body="\n".join(_body(report)))
    write_text(path, text)


def _body(report: Report) -> list[str]:
    parts = [f"<h1>{escape(report.title)}</h1>"]
    parts += [f'<div class="facts">{escape(line)}</div>' for line in report.opening]
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
    uri = data_uri(panel.image) if panel.image else None
    caption = escape(panel.caption)
    image = f'<img src="{uri}" alt="{caption}">' if uri else '<div class="none">no image</div>'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def data_uri(path: Path) -> str | None:
    """A small JPEG of the image for embedding; None when it can't be read."""
    try:
        image = load_image(path)
    except HYWUError:
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return "data:image/jpeg;base64," + base64.b64encode(encode_image(image, "JPEG", 88)).decode()
