"""Parse the stored answers and write the scores, also in the benchmark authors' own files.

OUT/METHOD/scores/<questionnaire>__<judge>__.../
    items.csv, summary.json                      always
    <method>_<task>_all_vie_score.csv            GEdit-Bench (and one per language)
    result.json, average_score.json, typescore.json   ImgEdit-Bench

Files that the authors' own scripts wrote are added up too, in their arithmetic:

  hywu eval score their_scores                 a folder with *_vie_score.csv (GEdit-Bench)
  hywu eval score theirs/result.json --data ImgEdit           (ImgEdit-Bench)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ...evaluation.benchmarks import QUESTIONNAIRES
from ...evaluation.scores import write_scores
from ...evaluation.tables import Table
from ..console import number, say, table
from . import shared


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hywu eval score`."""
    parser.add_argument(
        "results", nargs="+", metavar="OUT/METHOD", help="judged results, or the authors' files"
    )
    shared.add_data(parser, required=False)
    shared.add_questionnaire(parser)
    shared.add_choice(parser)
    parser.add_argument("--price-in", type=number, default=0, help="money per million tokens in")
    parser.add_argument("--price-out", type=number, default=0, help="money per million tokens out")


def run(args: argparse.Namespace) -> int:
    """Score every method and print its table."""
    for root in args.results:
        if theirs := _theirs(Path(root), args.data):
            for each in theirs:
                say(f"{each.title} (scores from {root})")
                table(each.rows, each.header)
                say(each.note)
            continue
        scores = shared.load_scores(root, args)
        folder = write_scores(scores, args.price_in, args.price_out)
        summary = scores.questionnaire.table(scores)
        say(f"{summary.title}: {scores.outcome_line()}")
        say(
            f"judge {scores.name.judge} ({scores.name.judge_version}); {scores.questionnaire.title}"
        )
        table(summary.rows, summary.header)
        say(summary.note)
        say(f"written to {folder}")
    return 0


def _theirs(path: Path, data: str | None) -> list[Table]:
    """Tables of files that other programs scored; empty for a folder of results."""
    for kind in QUESTIONNAIRES.values():
        if tables := kind.their_tables(path, data):
            return tables
    return []
