"""Write GEdit-Bench's parquet or arrow files as pictures and gedit.jsonl, once.

`generate` does this by itself beside the results; this step is for looking at the data, or for using
it from several places.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import HYWUError
from ...evaluation.gedit import read_gedit
from ...evaluation.gedit_unpack import packed_files, unpack
from ..console import say


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hywu eval unpack`."""
    parser.add_argument("data", help="folder with the published files")
    parser.add_argument("--out", required=True, help="folder to write")


def run(args: argparse.Namespace) -> int:
    """Unpack, then read what was written and say what is in it."""
    files = packed_files(Path(args.data))
    if not files:
        raise HYWUError(f"{args.data}: holds no parquet or arrow file.")
    out = unpack(files, Path(args.out))
    items = read_gedit(out)
    say(f"{out}: {len(items.items)} items in {len(items.tasks())} tasks, {len(items.bad)} unusable")
    for bad in items.bad:
        say(f"  {bad}")
    return 0
