"""Train a generator (or a baseline) through the frozen bundled editor; the same command goes on.

Your own data: a .jsonl file (or a folder with one) of rows {"source": "a.png", "target": "b.png",
"instruction": "...", "task": "..."}, paths counting from the file; a folder of name.source.png,
name.target.png, name.txt; webdataset tar shards; parquet files, and the arrow files of `datasets`. Without --data the built-in tasks are
trained. Rows with "references" are refused: the bundled editor reads one image.

examples:
  hywu train --out runs/mine --data pairs.jsonl --steps 1000
  hywu train --out runs/mine --data pairs.jsonl --steps 2000      # goes on, beyond the former end
  hywu train --out runs/shared --strategy shared --rank 4 --tasks blur deblur
  hywu train --out runs/blur --strategy single --task blur
  torchrun --nproc_per_node 2 -m hywu_core.cli train --out runs/two --data pairs.jsonl
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..bases.bundled.training import ERRORS
from ..training.crops import POLICIES
from ..training.schedule import OPTIMIZERS, PRECISIONS, RATES
from .console import say

BEST = "best.safetensors"
STRATEGIES = tuple(RATES["muon"])


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of state, logs, weights")
    parser.add_argument("--data", type=Path, help="your pairs: a file, or a folder with them")
    parser.add_argument("--tasks", nargs="+", help="built-in tasks (default: all conflict tasks)")
    parser.add_argument("--task", help="of `--strategy single`: the one task that is trained")
    parser.add_argument("--strategy", choices=STRATEGIES, default="hywu", help="default: hywu")
    parser.add_argument("--rank", type=int, default=2, help="of the LoRA (default 2)")
    parser.add_argument(
        "--steps", type=int, default=500,
        help="optimizer steps (default 500); more than a run was begun with go on beyond its end",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=24, help="examples per step (default 24)")
    parser.add_argument("--accumulation", type=int, default=1, help="parts of a batch (default 1)")
    parser.add_argument("--lr", type=float, help=f"peak learning rate (default: {_rates()})")
    parser.add_argument(
        "--error", choices=ERRORS,
        help="of an item: log counts each by its own measure (default; a former run keeps mse)",
    )  # fmt: skip
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
    parser.add_argument(
        "--init", metavar="FILE",
        help="begin with the weights of a generator; 'bundled' is the bundled one (sets its size and rank)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100, help="steps between states")
    parser.add_argument("--sample-every", type=int, default=100, help="steps between sample grids")
    parser.add_argument(
        "--validation", type=float, default=0.0, metavar="SHARE",
        help="share of --data that is not trained on but measured every --save-every steps; the best "
        f"weights are kept as {BEST} (default 0)",
    )  # fmt: skip
    parser.add_argument(
        "--patience", type=int, default=0, metavar="N",
        help="stop after N measurements without a better one (default 0: never)",
    )  # fmt: skip
    parser.add_argument(
        "--crop",
        choices=POLICIES,
        default="random",
        help="of --data: see docs/training.md (default random)",
    )
    parser.add_argument(
        "--sizes", nargs="+", type=_size, metavar="HxW",
        help="of --data: crops of several resolutions, by the images' proportions (default: the editor's own)",
    )  # fmt: skip
    parser.add_argument("--cache", type=Path, help="of --data: folder that keeps decoded images")
    parser.add_argument(
        "--workers", type=int, help="of --data: threads that decode (default: one per core, to 8)"
    )
    parser.add_argument("--tensorboard", action="store_true", help="also log for TensorBoard")
    parser.add_argument("--wandb", action="store_true", help="also log to Weights & Biases")
    parser.add_argument("--editor", type=Path, help="another editor's file as the base")
    parser.add_argument("--device", help="such as cpu or cuda (default: the accelerator there is)")
    parser.add_argument("--commit", default="", help="commit of the code, kept in the provenance")


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is no HEIGHTxWIDTH, such as 96x128")
    return int(found[1]), int(found[2])


def _rates() -> str:
    return "; ".join(
        f"{optimizer}: " + ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        for optimizer, rates in RATES.items()
    )


def run(args: argparse.Namespace) -> int:
    """Train to the end; exit code 0, or 130 when it was stopped and can go on."""
    from ..experiments.bundled import Request, Training

    asked = {name: value for name, value in vars(args).items() if name in Request.names()}
    training = Training(Request(**asked), say)
    path = training.run()
    if path is None:
        return 130
    if training.main:
        _next_steps(args, path)
    return 0


def _next_steps(args: argparse.Namespace, weights: Path) -> None:
    """What can be done with the weights now."""
    best = args.out / BEST
    say(str(weights) + (f" (the best in validation: {best})" if best.exists() else ""))
    chosen = best if best.exists() else weights
    mine = f" --editor {args.editor}" if args.editor else ""
    evaluate = "hywu eval generate --benchmark folder --data samples --out results"
    evaluate += f" --method {args.out.name or 'mine'} --editor bundled"
    evaluate += f" --editor-file {args.editor}" if args.editor else ""
    if args.strategy == "hywu":
        condition = args.out / "condition.safetensors"
        steps = [
            f"hywu edit image.png 'an instruction' --generator {chosen}{mine} --out edited.png",
            f"hywu condition --checkpoint {chosen}{mine} --image image.png --instruction 'an instruction' "
            f"--out {condition}",
            f"hywu generate --checkpoint {chosen} --condition {condition} --out {args.out / 'lora'}",
            f"{evaluate} --generator {chosen}",
            f"hywu inspect {chosen}",
            f"copy {chosen} into ComfyUI's models/hywu to use it in a graph",
        ]
    elif args.strategy == "sft":
        steps = [f"{evaluate} --fine-tuned {chosen}"]
    else:
        steps = [
            f"{evaluate} --lora {chosen}",
            f"hywu inspect {chosen}",
            f"copy {chosen} into ComfyUI's models/loras to use it in a graph (Load Generated LoRA)",
        ]
    say("next:")
    for step in steps:
        say(f"  {step}")
