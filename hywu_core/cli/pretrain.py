"""Train the bundled editor on the pretraining tasks; run the same command again to go on.

example:
  hywu pretrain --out runs/editor --steps 4000
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..bases.bundled.transformer import TransformerConfig as EditorConfig
from ..bases.bundled.transformer import TransformerEditor as Editor
from ..experiments.images import ImagePool, split_files
from ..experiments.pretraining import BETAS, WEIGHTS, pretrain
from ..training.schedule import OPTIMIZERS, TrainConfig, chosen_precision
from ..training.state import recorded_precision
from ..training.trainer import STATE
from .console import say


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of state, log and weights")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps (default 4000)")
    parser.add_argument("--batch-size", type=int, default=32, help="crops a step (default 32)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, crops, tasks and noise")
    parser.add_argument(
        "--precision", choices=("auto", "no", "bf16"), default="auto",
        help="auto: bf16 where the device has it in hardware, else no (float32)",
    )  # fmt: skip
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="adamw", help="default: %(default)s"
    )
    parser.add_argument("--device", help="such as cpu or cuda (default: the accelerator there is)")
    parser.add_argument("--save-every", type=int, default=200, help="steps between states")
    parser.add_argument("--commit", default="", help="commit of the code, kept in the provenance")


def run(args: argparse.Namespace) -> int:
    recorded = recorded_precision(args.out / STATE)
    config = TrainConfig(
        args.steps, args.batch_size, args.lr, warmup=100, weight_decay=0.01, ema=0.998, betas=BETAS,
        precision=chosen_precision(args.precision, recorded, args.device), seed=args.seed,
        optimizer=args.optimizer,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    editor = Editor(EditorConfig())
    editor.reset_parameters()
    pool, samples = ImagePool(split_files("train")), ImagePool(split_files("held_out"))
    done = pretrain(
        editor, pool, config, args.out, samples, args.save_every, args.commit, args.device
    )
    if done < config.steps:
        say(f"interrupted after {done} steps; the same command goes on from there")
        return 130
    say(f"{args.out / WEIGHTS}: {config.steps} steps")
    return 0
