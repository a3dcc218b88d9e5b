"""The bundled editor's strategies on one set of items: generate, judge, score, report, in one go.

  hywu eval wu-eval --data items --out results                      own items with targets
  hywu eval wu-eval --data items --out results --strategies hywu shared --judge openai --model gpt-4.1

Strategies: hywu (a LoRA generated per item), shared (one LoRA for all tasks), single (one LoRA per
task), none (the editor alone). Every step resumes; the report is OUT/report.html and OUT/report.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ...console import say
from ..bundled_editor import STRATEGIES
from ..generate import generate_results
from ..judging import judge_results, store_name
from ..questionnaires import load_questionnaire
from ..results import Results
from ..score_files import write_scores
from ..scores import MethodScores, score_results
from . import generate, judge, report, shared


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hywu eval wu-eval`."""
    parser.add_argument("--data", required=True, help="folder with items.jsonl, or 'samples'")
    parser.add_argument("--out", required=True, help="folder of the results and the report")
    parser.add_argument(
        "--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), metavar="STRATEGY"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same for every item (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="sampling steps (%(default)s)")
    parser.add_argument("--limit", type=int, help="at most so many items a task")
    parser.add_argument("--prompts", metavar="FILE", help="JSON with another wu-eval prompt")
    shared.add_judge(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or 3 when an item has no result or no answer."""
    from ..bundled_editor import BundledEditor

    out = Path(args.out)
    data = shared.data_path("folder", args.data)
    items = shared.load_items("folder", data, out)
    questionnaire = load_questionnaire("wu-eval", args.prompts)
    judging = shared.make_judge(args)
    selection = {"limit": args.limit}
    methods: list[MethodScores] = []
    complete = True
    for strategy in args.strategies:
        results = Results(out / strategy, "folder")
        editor = BundledEditor(strategy, steps=args.steps, device=args.device)
        made = generate_results(results, items, editor, data, args.seed, selection=selection)
        generate.tell(results, made)
        chosen = items.select(limit=args.limit)
        judged = judge_results(results, chosen, questionnaire, judging)
        say(f"{results.root}: {judge.tell(judged)}")
        name = store_name(judging, questionnaire)
        methods.append(score_results(results, chosen, questionnaire, name))
        write_scores(methods[-1])
        complete &= not (made.failed or judged.failed or judged.refused)
    report.write_reports(methods, questionnaire, out / "report.html", each=2)
    return 0 if complete else shared.INCOMPLETE
