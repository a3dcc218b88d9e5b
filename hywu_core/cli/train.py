"""Train a generator (or a baseline) through the frozen bundled editor; the same command goes on.

Your own data: a .jsonl file, or a folder with one, of rows {"source": "a.png", "target": "b.png",
"instruction": "...", "task": "..."}; paths count from the file. Without --data the built-in tasks
are trained. Rows with "references" are refused: the bundled editor reads one picture.

examples:
  hywu train --out runs/mine --data pairs.jsonl --steps 1000
  hywu train --out runs/shared --strategy shared --rank 4 --tasks blur deblur
  accelerate launch --num_processes 2 -m hywu_core.cli train --out runs/mine --data pairs.jsonl
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from ..errors import HYWUError
from ..training.schedule import OPTIMIZERS, PRECISIONS
from .console import say

WEIGHTS = "weights.safetensors"
#: Peak learning rates that the conflict experiment's trials favour.
RATES = {"hywu": 6e-4, "shared": 3e-3, "sft": 3e-4}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of state, logs, weights")
    parser.add_argument("--data", type=Path, help="your pairs: a .jsonl file or a folder with one")
    parser.add_argument("--tasks", nargs="+", help="built-in tasks (default: all conflict tasks)")
    parser.add_argument("--strategy", choices=RATES, default="hywu", help="default: hywu")
    parser.add_argument("--rank", type=int, default=2, help="of the LoRA (default 2)")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps (default 500)")
    parser.add_argument("--batch-size", type=int, default=24, help="examples a step (default 24)")
    parser.add_argument("--accumulation", type=int, default=1, help="parts of a batch (default 1)")
    parser.add_argument("--lr", type=float, help=f"peak learning rate (default: {RATES})")
    parser.add_argument(
        "--precision", choices=("auto", *PRECISIONS), default="auto",
        help="auto: bf16 where the device has it in hardware, else no (float32)",
    )  # fmt: skip
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="muon",
        help="default: muon (see docs/training.md)",
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute blocks: less memory"
    )
    parser.add_argument("--d-model", type=int, default=512, help="generator's width (default 512)")
    parser.add_argument("--blocks", type=int, default=1, help="generator's blocks (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100, help="steps between states")
    parser.add_argument("--sample-every", type=int, default=100, help="steps between sample grids")
    parser.add_argument("--tensorboard", action="store_true", help="also log for TensorBoard")
    parser.add_argument("--editor", type=Path, help="another editor's file as the base")
    parser.add_argument("--device", help="such as cpu (default: what accelerate finds)")
    parser.add_argument("--commit", default="", help="commit of the code, kept in the provenance")


def run(args: argparse.Namespace) -> int:
    import torch

    from ..bases.bundled.checkpoint import bundled, load_editor
    from ..training.editor_base import EditorBase
    from ..training.schedule import TrainConfig, chosen_precision
    from ..training.state import recorded_precision
    from ..training.trainer import STATE, Trainer

    base = EditorBase(load_editor(args.editor or bundled("editor")))
    batches, phrasings = _data(args, base.module.config.train_size)
    recorded = recorded_precision(args.out / STATE)
    precision = chosen_precision(args.precision, recorded, args.device)
    config = TrainConfig(
        args.steps, args.batch_size, args.lr or RATES[args.strategy], accumulation=args.accumulation,
        warmup=min(40, args.steps // 5), precision=precision, seed=args.seed,
        optimizer=args.optimizer,
    )  # fmt: skip
    torch.manual_seed(args.seed + 1)
    strategy = _strategy(args, base)
    if args.strategy == "hywu":
        strategy.standardize_on(batches, 0)
    trainer = Trainer(
        base, strategy, batches, config, args.out,
        samples=batches(args.steps).select(range(min(8, args.batch_size))),
        save_every=args.save_every, sample_every=args.sample_every, tensorboard=args.tensorboard,
        device=args.device,
    )  # fmt: skip
    if not trainer.run():
        say(f"stopped after {trainer.step} of {args.steps} steps; the same command goes on")
        return 130
    if trainer.accelerator.is_main_process:
        facts = {
            "phrasings": phrasings,
            "commit": args.commit,
            "data": str(args.data or "built-in"),
        }
        say(str(trainer.export(args.out / WEIGHTS, facts)))
    return 0


def _data(args: argparse.Namespace, size: int):
    """(batches, task -> phrasings that are trained on)."""
    from ..experiments.images import ImagePool, split_files
    from ..experiments.tasks import CONFLICT, TaskBatches, get_task
    from ..training.data import PairBatches, number_of_references, read_pairs
    from ..training.editor_base import ONE_PICTURE

    if args.data is None:
        tasks = args.tasks or list(CONFLICT)
        phrasings = {name: list(get_task(name).seen) for name in tasks}
        pool = ImagePool(split_files("train"))
        return TaskBatches(pool, tasks, args.batch_size, size, args.seed), phrasings
    if args.tasks:
        raise HYWUError("--tasks names built-in tasks; your own --data says its tasks itself.")
    pairs, bad = read_pairs(args.data)
    say(f"{args.data}: {len(pairs)} pairs" + (f", {len(bad)} rows skipped:" if bad else ""))
    for line in bad:
        say(f"  {line}")
    if number_of_references(pairs):
        raise HYWUError(f"{args.data}: {ONE_PICTURE}")
    phrasings: dict[str, list[str]] = {}
    for pair in pairs:
        texts = phrasings.setdefault(pair.task, [])
        if pair.instruction not in texts and len(texts) < 16:
            texts.append(pair.instruction)
    return PairBatches(pairs, args.batch_size, size, args.seed), phrasings


def _strategy(args: argparse.Namespace, base):
    from ..experiments.conflict.plan import GeneratorSize
    from ..experiments.conflict.runs import EXCLUDE
    from ..generator.config import GeneratorConfig
    from ..layout import LoRALayout
    from ..training.strategies import FullFineTuning, HyperNetwork, StaticLoRA

    if args.strategy == "sft":
        return FullFineTuning(base)
    layout = LoRALayout.of(base.module, args.rank, exclude=EXCLUDE)
    if args.strategy == "shared":
        return StaticLoRA(base, layout)
    size = replace(GeneratorSize(), d_model=args.d_model, num_blocks=args.blocks)
    config = GeneratorConfig(
        layout, dict(base.condition_parts), dim_accumulation=args.rank, encoder=dict(base.encoder),
        base=base.name, **asdict(size),
    )  # fmt: skip
    return HyperNetwork(base, config, checkpointing=args.checkpointing)
