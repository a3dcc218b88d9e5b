"""Make a method's results on a benchmark, laid out as its authors lay them out.

  GEdit-Bench    OUT/METHOD/fullset/<task>/<language>/<key>.png and <key>_SRCIMG.png
  ImgEdit-Bench  OUT/METHOD/<key>.png
  folder         OUT/METHOD/<key>.png

What is there is kept, so the same command resumes an interrupted run and retries what failed (it
stands in OUT/METHOD/failures.jsonl). Exit code 3: finished, but some items have no result.

  hywu eval generate --benchmark folder --data samples --out results --editor bundled
  hywu eval generate --benchmark folder --data samples --out results --method shared \\
      --editor bundled --lora shared
  hywu eval generate --benchmark gedit --data GEdit-Bench --out results --method copy --editor copy
  hywu eval generate --benchmark imgedit --data ImgEdit --out results --method flux --editor comfy \\
      --workflow edit_api.json --comfy-image 12.image --comfy-instruction 6.text --comfy-seed 3.seed
  hywu eval generate --benchmark folder --data items --out results --method mine --editor command \\
      --command 'python edit.py {source} {out} {instruction} {seed}'
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import HYWUError
from ...evaluation.benchmarks import find_benchmark
from ...evaluation.editors import EDITORS
from ...evaluation.results import Results
from ...evaluation.run import GenerationCount, generate
from ...files import check_name
from ..console import say
from . import shared


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hywu eval generate`."""
    shared.add_data(parser, required=True)
    parser.add_argument("--out", required=True, help="folder of all methods' results")
    parser.add_argument("--method", help="name of this method's folder (default: the editor's)")
    parser.add_argument("--seed", type=int, default=0, help="the same for every item (%(default)s)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks")
    parser.add_argument("--languages", nargs="+", metavar="LANG", help="only these (GEdit: en cn)")
    parser.add_argument("--limit", type=int, help="at most so many items per task")
    parser.add_argument("--tries", type=int, default=2, help="tries per item and run (%(default)s)")
    shared.add_kinds(parser, EDITORS, required=True)


def run(args: argparse.Namespace) -> int:
    """Generate what is missing; exit code 0, or 3 when items remain without a result."""
    data = shared.data_path(args.benchmark, args.data)
    out = Path(args.out)
    try:
        method = check_name(args.method or args.editor, "name")
    except HYWUError as error:
        raise HYWUError(f"The method can't be used: {error}.") from error
    benchmark = find_benchmark(args.benchmark)
    items = benchmark.read(data, out)
    for bad in items.bad:
        say(f"not usable: {bad}")
    results = Results(out / method, benchmark)
    selection = {"tasks": args.tasks, "languages": args.languages, "limit": args.limit}
    editor = EDITORS[args.editor].build(vars(args))
    count = generate(results, items, editor, data, args.seed, args.tries, selection)
    tell(results, count)
    return shared.INCOMPLETE if count.failed else 0


def tell(results: Results, count: GenerationCount) -> None:
    """Say what was made and what was not."""
    say(f"{results.root}: {count.made} made, {count.kept} kept, {len(count.failed)} failed")
    for item, reason in list(count.failed.items())[:10]:
        say(f"  {item}: {reason}")
    if count.failed:
        say(
            f"  all of them in {results.root / 'failures.jsonl'}; the same command tries them again"
        )
