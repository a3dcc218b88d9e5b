"""Compare methods judged alike: one HTML file with everything in it, and the same in Markdown.

  hywu eval report results/hywu results/shared results/single --out report.html

The first method is the one that the others are compared with, and whose best, median and worst items
are shown. Methods judged by different judges, prompts or items are not put in one report.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ...errors import HYWUError
from ...evaluation.report.build import build_report
from ...evaluation.report.html import write_html
from ...evaluation.report.markdown import write_markdown
from ...evaluation.scores import MethodScores
from ..console import say
from . import shared


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hywu eval report`."""
    parser.add_argument("results", nargs="+", metavar="OUT/METHOD", help="judged results")
    parser.add_argument("--out", required=True, help="the .html file; .md is written beside it")
    parser.add_argument("--each", type=int, default=2, help="items per place (%(default)s)")
    shared.add_data(parser, required=False)
    shared.add_questionnaire(parser)
    shared.add_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Write both files."""
    methods = [shared.load_scores(root, args) for root in args.results]
    write_reports(methods, Path(args.out), args.each)
    return 0


def write_reports(methods: Sequence[MethodScores], out: Path, each: int) -> None:
    """Write ``out`` and the Markdown beside it."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise HYWUError(f"{out}: must end in .html.")
    if len({scores.method for scores in methods}) != len(methods):
        raise HYWUError("Two methods have the same name; a report tells them apart by it.")
    report = build_report(methods, each)
    write_html(report, out)
    write_markdown(report, out.with_suffix(".md"))
    say(f"written to {out} and {out.with_suffix('.md')}")
