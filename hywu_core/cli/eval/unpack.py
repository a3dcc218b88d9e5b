"""Write a benchmark's packed files (GEdit-Bench: parquet, arrow) as images and their list, once.

`generate` does this by itself beside the results; this step is for looking at the data, or for using
it from several places.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import HYWUError
from ...evaluation.benchmarks import BENCHMARKS
from ..console import say


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hywu eval unpack`."""
    parser.add_argument("data", help="folder with the published files")
    parser.add_argument("--out", required=True, help="folder to write")


def run(args: argparse.Namespace) -> int:
    """Unpack, then read what was written and say what is in it."""
    data, out = Path(args.data), Path(args.out)
    for benchmark in BENCHMARKS.values():
        if files := benchmark.packed_files(data):
            items = benchmark.read(benchmark.unpack(files, out))
            break
    else:
        raise HYWUError(f"{data}: holds no parquet or arrow file.")
    say(f"{out}: {len(items.items)} items in {len(items.tasks())} tasks, {len(items.bad)} unusable")
    for bad in items.bad:
        say(f"  {bad}")
    return 0
