"""Train the bundled editor on the pretraining tasks; run the same command again to go on.

example:
  hywu pretrain --out runs/editor --steps 12000
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..bases.bundled.checkpoint import load_editor, save_editor
from ..bases.bundled.model import Editor, EditorConfig
from ..experiments.images import ImagePool, split_files
from ..experiments.pretraining import STAGES, WEIGHTS, pretrain
from ..training.schedule import OPTIMIZERS, TrainConfig, chosen_precision
from ..training.state import recorded_precision
from ..training.trainer import STATE
from .console import say


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of states, logs and weights"
    )
    parser.add_argument(
        "--steps", type=int, default=12000, help="optimizer steps of the main stage (default 12000)"
    )
    parser.add_argument(
        "--first-steps", type=int, default=800,
        help="steps before, on the mean squared error (default 800)",
    )  # fmt: skip
    parser.add_argument(
        "--fine-steps", type=int, default=8000,
        help="steps after, in which small errors count more (default 8000)",
    )  # fmt: skip
    parser.add_argument(
        "--last-steps", type=int, default=4000,
        help="steps at the end, on larger crops and at falling rates (default 4000)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=24, help="crops per step (default 24)")
    parser.add_argument(
        "--lr", type=float, default=1.5e-3, help="peak learning rate (default 1.5e-3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, crops, tasks and noise")
    parser.add_argument(
        "--precision", choices=("auto", "no", "bf16"), default="auto",
        help="auto: bf16 where the device has it in hardware, else no (float32)",
    )  # fmt: skip
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="muon", help="default: %(default)s"
    )
    parser.add_argument("--device", help="such as cpu or cuda (default: the accelerator there is)")
    parser.add_argument("--save-every", type=int, default=200, help="steps between states")
    parser.add_argument("--commit", default="", help="commit of the code, kept in the provenance")


def run(args: argparse.Namespace) -> int:
    pool = ImagePool(split_files("train")).on(args.device)
    samples = ImagePool(split_files("held_out"))
    asked = (args.first_steps, args.steps, args.fine_steps, args.last_steps)
    plan = tuple(zip(STAGES, asked, strict=True))
    torch.manual_seed(args.seed)
    editor = Editor(EditorConfig())
    editor.reset_parameters()
    for stage, steps in plan:
        if steps < 1:
            continue
        folder = args.out / stage.name
        recorded = recorded_precision(folder / STATE)
        config = TrainConfig(
            steps, max(1, round(args.batch_size * stage.batch)), args.lr, warmup=min(100, steps // 5),
            weight_decay=0.01, ema=0.998, seed=args.seed, optimizer=args.optimizer,
            precision=chosen_precision(args.precision, recorded, args.device),
            schedule=stage.schedule,
        )  # fmt: skip
        trainer = pretrain(
            editor, pool, config, folder, stage, samples, args.save_every, args.commit, args.device
        )
        if trainer.interrupted:
            say(
                f"{folder}: stopped after {trainer.step} of {steps} steps; the same command goes on"
            )
            return 130
        editor = load_editor(folder / WEIGHTS)
    path = save_editor(editor, args.out / WEIGHTS, editor.provenance)
    say(f"{path}: {', '.join(f'{steps} steps {stage.name}' for stage, steps in plan)}")
    return 0
