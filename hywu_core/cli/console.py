"""What commands write for people: lines and aligned tables on standard output."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable, Sequence

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def say(text: str = "") -> None:
    """Write one line to standard output; control characters, which could steer a terminal, are shown."""
    sys.stdout.write(_CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text) + "\n")
    sys.stdout.flush()


def number(text: str) -> float:
    """The type of options that are finite numbers: "nan" and "inf" are numbers to Python."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def format_table(rows: Iterable[Sequence[object]], header: Sequence[str]) -> str:
    """Columns padded to their widest cell; numbers aligned right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(header), *cells]) for i in range(len(header))]
    numeric = [
        bool(cells)
        and all(row[i].replace(",", "")[:1].lstrip("-+").isdigit() or not row[i] for row in cells)
        for i in range(len(header))
    ]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(list(header)), line(["-" * w for w in widths]), *map(line, cells)])


def table(rows: Iterable[Sequence[object]], header: Sequence[str]) -> None:
    """Write an aligned table to standard output."""
    say(format_table(rows, header))
