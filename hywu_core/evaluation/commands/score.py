"""Parse the stored answers and write the scores, also in the benchmark authors' own files.

OUT/METHOD/scores/<questionnaire>__<judge>__.../
    items.csv, summary.json                      always
    <method>_<task>_all_vie_score.csv            GEdit-Bench (and one per language)
    result.json, average_score.json, typescore.json   ImgEdit-Bench
"""

from __future__ import annotations

import argparse

from ...console import say, table
from ..report.build import outcome_line
from ..score_files import write_scores
from ..tables import summary_table
from . import shared


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hywu eval score`."""
    parser.add_argument("results", nargs="+", metavar="OUT/METHOD", help="judged results")
    shared.add_data(parser, required=False)
    shared.add_questionnaire(parser)
    shared.add_choice(parser)
    parser.add_argument("--price-in", type=float, default=0, help="money per million tokens in")
    parser.add_argument("--price-out", type=float, default=0, help="money per million tokens out")


def run(args: argparse.Namespace) -> int:
    """Score every method and print its table."""
    for root in args.results:
        scores, questionnaire = shared.load_scores(root, args)
        folder = write_scores(scores, args.price_in, args.price_out)
        summary = summary_table(scores)
        say(f"{summary.title}: {outcome_line(scores)}")
        say(f"judge {scores.name.judge} ({scores.name.judge_version}); {questionnaire.title}")
        table(summary.rows, summary.header)
        say(summary.note)
        say(f"written to {folder}")
    return 0
