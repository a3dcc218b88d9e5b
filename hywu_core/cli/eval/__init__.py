"""Evaluate image editors: results, judges, scores, reports, human votes.

The steps, each resumable, each reading what the one before left in OUT/METHOD:

  hywu eval generate --benchmark folder --data my_items --out results --method mine \\
      --editor command --command 'python edit.py {source} {out} {instruction} {seed}'
  hywu eval judge    results/mine --judge reference
  hywu eval score    results/mine
  hywu eval report   results/mine results/other --out report.html

`hywu eval own --out DIR` does all of them for the bundled weights, by pixels, on held-out photographs.
`hywu eval STEP --help` explains a step. Benchmarks: gedit (GEdit-Bench as published, or exported),
imgedit (ImgEdit-Bench Basic), folder (items.jsonl of your own). GEdit-Bench and ImgEdit-Bench come
from their authors; nothing is downloaded here, and `--data samples` is a two-item sample of our own.
"""

from __future__ import annotations

import argparse

from . import generate, gsb, judge, own, report, score, unpack

#: step -> (module with configure(parser) and run(args) -> int, one line)
STEPS = {
    "generate": (generate, "make a method's results on a benchmark"),
    "judge": (judge, "ask a judge about results"),
    "score": (score, "parse the answers; write scores in the benchmark authors' files"),
    "report": (report, "compare methods: one HTML file and Markdown"),
    "own": (own, "all steps for the bundled weights, on the held-out photographs"),
    "gsb": (gsb, "human preference: a blind voting page, and its report"),
    "unpack": (unpack, "GEdit-Bench's parquet or arrow files into an exported folder"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand per step."""
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True)
    for name, (module, summary) in STEPS.items():
        step = steps.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(step)
        step.set_defaults(run_step=module.run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen step; returns its exit code."""
    return args.run_step(args)
