"""Ask a judge about the results of one or more methods; answers are kept one by one.

  hywu eval judge results/hywu --judge reference
  OPENAI_API_KEY=... hywu eval judge results/hywu --judge openai --model gpt-4.1 --parallel 8
  hywu eval judge results/hywu --judge local --folder models/Qwen2.5-VL-7B-Instruct --device cuda

Answered questions are not asked again; a changed image or prompt is. Failures are asked again by
the next run. Exit code 3: finished, but some questions got no answer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ...evaluation.benchmarks import load_questionnaire
from ...evaluation.judges import JUDGES
from ...evaluation.results import JUDGEMENTS, open_results
from ...evaluation.run import JudgingCount
from ...evaluation.run import judge as run_judge
from ...evaluation.store import ANSWERED, FAILED, REFUSED
from ..console import say
from . import shared


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hywu eval judge`."""
    parser.add_argument("results", nargs="+", metavar="OUT/METHOD", help="results to judge")
    shared.add_data(parser, required=False)
    shared.add_questionnaire(parser)
    shared.add_kinds(parser, JUDGES, default=next(iter(JUDGES)))
    parser.add_argument(
        "--again",
        nargs="+",
        default=[FAILED],
        choices=(FAILED, REFUSED, ANSWERED),
        help="which earlier outcomes are asked once more (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Judge every method; exit code 0, or 3 when a question got no answer."""
    judge = JUDGES[args.judge].build(vars(args))
    code = 0
    for root in args.results:
        data = shared.data_path(args.benchmark, args.data)
        results, items = open_results(root, args.benchmark, data)
        name = args.questionnaire or results.benchmark.usual
        questionnaire = load_questionnaire(name, args.prompts)
        count = run_judge(results, items, questionnaire, judge, tuple(args.again))
        tell(root, count)
        if count.failed or count.refused:
            code = shared.INCOMPLETE
    return code


def tell(root: str | Path, count: JudgingCount) -> None:
    """Say what a run did, and why questions got no answer."""
    say(
        f"{root}: {count.answered} answered, {count.refused} refused, {count.failed} failed, "
        f"{count.kept} known already; {count.without_result} items have no result"
    )
    for reason, times in count.reasons.most_common(10):
        say(f"  {times} x {' '.join(reason.split())}")
    if len(count.reasons) > 10:
        say(f"  and {len(count.reasons) - 10} other reasons, all in its {JUDGEMENTS} folder")
    if count.refused_before:
        say(f"  {count.refused_before} were refused before; --again refused asks them once more")
