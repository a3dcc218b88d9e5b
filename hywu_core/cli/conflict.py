"""Run or resume the experiment on contradictory tasks: one frozen editor, five ways to adapt it.

HY-WU, one shared LoRA, a shared LoRA with as many trained parameters as HY-WU, full fine-tuning, and
one LoRA for each task: same examples, rank, schedule and number of tried learning rates. The same
command goes on after an interruption.

examples:
  hywu conflict --out runs/conflict
  hywu conflict --out runs/conflict --only 'shared*' 'single*'   # a part, for a second process
  hywu conflict --out runs/ranks --only '*_sweep'                # the sweep over ranks alone
  hywu conflict --out runs/quick --quick
  hywu conflict --out runs/conflict --editor runs/editor/editor.safetensors --bundle hywu_core/bases/bundled/weights
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..experiments.conflict.plan import ConflictPlan
from ..training.schedule import OPTIMIZERS, PRECISIONS, chosen_precision
from .console import say


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of the whole experiment")
    parser.add_argument("--editor", type=Path, help="the frozen base (default: the bundled editor)")
    parser.add_argument("--steps", type=int, help=f"of each run (default {ConflictPlan.steps})")
    parser.add_argument(
        "--sweep-steps", type=int, help=f"of the sweep's runs (default {ConflictPlan.sweep_steps})"
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", help=f"of the sweep (default {ConflictPlan.ranks})"
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N",
        help=f"of HY-WU, Shared and Single, from --seed on (default {ConflictPlan.seeds})",
    )  # fmt: skip
    parser.add_argument(
        "--seed-steps",
        type=int,
        help=f"of the other seeds' runs (default {ConflictPlan.seed_steps})",
    )
    parser.add_argument(
        "--precision", choices=("auto", *PRECISIONS), default="auto",
        help="auto: bf16 where the device has it in hardware, else no (float32)",
    )  # fmt: skip
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, help=f"of all runs (default {ConflictPlan.optimizer})"
    )
    parser.add_argument(
        "--error", choices=("mse", "log"), help=f"of an item (default {ConflictPlan.error})"
    )
    parser.add_argument(
        "--written-steps",
        type=int,
        help=f"steps over which composed phrasings come in (default {ConflictPlan.written_steps})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, crops and noise")
    parser.add_argument("--quick", action="store_true", help="a few minutes; figures mean nothing")
    parser.add_argument("--only", nargs="+", default=[], help="names or patterns of runs to do now")
    parser.add_argument("--report", action="store_true", help="report before all runs are done")
    parser.add_argument(
        "--bundle", type=Path, metavar="FOLDER", help="copy the weights there as the bundled ones"
    )
    parser.add_argument(
        "--beside", nargs=2, action="append", default=[], metavar=("NAME", "FOLDER"),
        help="another experiment on the same editor, whose figures are kept in this one's report as well",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the runs and stop")
    parser.add_argument("--device", help="such as cpu (default: what accelerate finds)")
    parser.add_argument("--commit", default="", help="commit of the code, kept in the provenance")


def run(args: argparse.Namespace) -> int:
    import dataclasses

    from ..experiments.conflict.experiment import make_experiment

    plan = ConflictPlan.quick() if args.quick else ConflictPlan()
    changes = {
        "steps": args.steps,
        "sweep_steps": args.sweep_steps,
        "ranks": args.ranks and tuple(args.ranks),
        "seed": args.seed,
        "seeds": args.seeds,
        "seed_steps": args.seed_steps,
        "optimizer": args.optimizer,
        "error": args.error,
        "written_steps": args.written_steps,
        "precision": chosen_precision(args.precision, _recorded(args.out), args.device),
    }
    plan = dataclasses.replace(plan, **{k: v for k, v in changes.items() if v is not None})
    if args.list:
        say("\n".join(run.name for run in plan.runs))
        return 0
    if args.bundle:
        from ..bases.bundled.checkpoint import bundled
        from ..experiments.conflict.runs import bundle

        written = bundle(args.out, args.editor or bundled("editor"), plan, args.bundle)
        say("\n".join(map(str, written)))
        return 0
    experiment = make_experiment(args.out, plan, args.editor, args.device, args.commit, say)
    from ..experiments.conflict.report import keep_beside, write_ranks, write_report

    for name, folder in args.beside:
        say(str(keep_beside(experiment, Path(folder), name)))
    try:
        if not args.report:
            experiment.run(args.only)
    except KeyboardInterrupt:
        say(f"interrupted; the same command goes on from there ({args.out})")
        return 130
    if missing := experiment.missing():
        say(f"not done yet: {', '.join(missing)}")
        if not args.report:
            if chart := write_ranks(experiment, args.out):
                say(str(chart))
            return 0

    say(str(write_report(experiment, args.out)))
    say(f"next: hywu eval own --experiment {args.out} --out {args.out / 'own'}")
    return 0


def _recorded(folder: Path) -> str | None:
    """The precision of the experiment in a folder, if there is one."""
    path = folder / "plan.json"
    if not path.exists():
        return None
    from ..experiments.conflict.runs import read_plan

    return read_plan(path)["plan"].get("precision")
