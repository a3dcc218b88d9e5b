"""The project's own result: WU-Eval of the bundled weights, all steps in one command.

On the held-out images of the conflict experiment (the same crops and tasks, instructions as text, in
phrasings that were trained on and in held-out ones), judged by the reference judge: HY-WU, the
Shared LoRA, one Single LoRA per task, and the editor alone. SFT's weights are too large to be bundled;
`--experiment` takes them from a folder of `hywu conflict`.

  hywu eval own --out runs/own
  hywu eval own --out runs/own --experiment runs/conflict

    OUT/items/                          sources, targets, seen.jsonl, held_out.jsonl
    OUT/seen/<method>/<key>.png         results, answers and scores as of the other steps
    OUT/held_out/<method>/<key>.png
    OUT/report_seen.html, .md           and report_held_out.html, .md
    OUT/own.md, own.json                the table with its limits

The same command goes on after an interruption. Exit code 3: finished, but some items have no score.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ...bases.bundled.checkpoint import load_editor
from ...errors import HYWUError
from ...evaluation.benchmarks import BENCHMARKS, load_questionnaire
from ...evaluation.benchmarks.base import Questionnaire
from ...evaluation.items import ItemList
from ...evaluation.judges.reference import ReferenceJudge
from ...evaluation.report.markdown import markdown_table
from ...evaluation.results import Results, read_manifest
from ...evaluation.run import generate as run_generate
from ...evaluation.run import judge as run_judge
from ...evaluation.run import store_name
from ...evaluation.scores import MethodScores, score_results, write_scores
from ...experiments.own import LABELS, OwnSet, experiment_plan, own_editors, own_table, write_items
from ...files import write_json, write_text
from ..console import say
from ..console import table as show_table
from . import generate, judge, report, shared


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hywu eval own`."""
    parser.add_argument("--out", type=Path, required=True, help="folder of items, results, reports")
    parser.add_argument(
        "--experiment",
        type=Path,
        metavar="DIR",
        help="a folder of `hywu conflict`, for SFT's weights and the plan of the held-out crops",
    )
    parser.add_argument(
        "--methods", nargs="+", choices=LABELS, help="only these (default: all there are)"
    )
    parser.add_argument("--images", type=int, help="only the first so many; photographs come first")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    parser.add_argument("--each", type=int, default=2, help="items per place in the reports")


def run(args: argparse.Namespace) -> int:
    """Do what is missing of all steps; exit code 0, or 3 when an item has no score."""
    plan = experiment_plan(args.experiment)
    if args.images is not None:
        if args.images < 1:
            raise HYWUError(f"--images {args.images}: 1 or more are needed.")
        plan = replace(plan, max_images=args.images)
    methods = args.methods or [m for m in LABELS if m != "sft" or args.experiment]
    if args.experiment is None and "sft" not in methods:
        say("SFT is left out: --experiment DIR takes its weights from a folder of `hywu conflict`")
    base = load_editor()
    # of fewer images the items are others
    same = args.images is None
    editors = own_editors(methods, plan, args.out, args.device, args.experiment, same)
    items = write_items(args.out, plan)
    benchmark = BENCHMARKS["folder"]
    questionnaire = load_questionnaire(benchmark.usual)
    scores: dict[str, list[MethodScores]] = {}
    for phrasing, file in items.files.items():
        rows = benchmark.read(file)
        scores[phrasing] = []
        for method, editor in editors.items():
            results = Results(args.out / phrasing / method, benchmark)
            generate.tell(results, run_generate(results, rows, editor, file, args.seed))
            scores[phrasing].append(_judged(results, rows, questionnaire))
        path = args.out / f"report_{phrasing}.html"
        report.write_reports(scores[phrasing], path, args.each)
    _write_table(args.out, scores, items, sum(p.numel() for p in base.parameters()), questionnaire)
    whole = all(len(s.scored()) == len(s.scores) for group in scores.values() for s in group)
    return 0 if whole else shared.INCOMPLETE


def _judged(results: Results, items: ItemList, questionnaire: Questionnaire) -> MethodScores:
    """Judge and score one method; what is there is kept."""
    pixels = ReferenceJudge()
    judged = run_judge(results, items, questionnaire, pixels)
    judge.tell(results.root, judged)
    name = store_name(pixels, questionnaire)
    scores = score_results(results, items, questionnaire, name)
    write_scores(scores)
    return scores


def _write_table(
    out: Path,
    scores: Mapping[str, Sequence[MethodScores]],
    items: OwnSet,
    parameters: int,
    questionnaire: Questionnaire,
) -> None:
    table = own_table(scores["seen"], scores["held_out"], items, parameters, questionnaire.title)
    write_text(out / "own.md", "\n".join(markdown_table(table)))
    made_by = {s.method: read_manifest(s.results.root)["editor"] for s in scores["seen"]}
    write_json(out / "own.json", {**items.about, "methods": made_by, "table": table.as_json()})
    show_table(table.rows, table.header)
    say(table.note)
    say(f"written to {out / 'own.md'} and {out / 'own.json'}")
