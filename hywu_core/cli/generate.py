"""Condition in, generated LoRA out.

Example:
  hywu generate --checkpoint hywu.safetensors --condition cat.safetensors --out cat-lora --format peft
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import torch
from tqdm import tqdm

from ..condition import Condition
from ..devices import chosen_device
from ..errors import HYWUError
from ..files import with_suffix
from ..formats import FORMATS, save_lora
from ..generator.checkpoints import load_generator, open_checkpoint
from ..generator.model import ParameterGenerator
from ..generator.speed.fp8 import to_fp8
from .console import say

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Computed in bfloat16, the blocks' products in 8 bits.
FP8 = "fp8"

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="official folder or one of our files")
    parser.add_argument(
        "--condition",
        required=True,
        help="a saved Condition, or a safetensors file with one [batch, length, width] tensor",
    )
    parser.add_argument("--out", required=True, help="file to write (a folder for peft)")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="native",
        help="native keeps batch and origin; peft and comfyui hold one LoRA (default: native)",
    )
    parser.add_argument("--item", type=int, help="write only this item of the batch, from 0")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")
    add_generator_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")


def add_generator_options(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """How a generator is loaded; see `load`.

    prefix: of the options' names, such as "generator-".
    """
    parser.add_argument(
        f"--{prefix}dtype",
        choices=(*DTYPES, FP8),
        help="default: as in the checkpoint; fp8: bfloat16 with 8-bit products, on CUDA of compute "
        "capability 8.9 or later (elsewhere slow)",
    )
    parser.add_argument(
        f"--{prefix}rope-precision",
        choices=("float32", "bfloat16"),
        help="position tables (default: as the checkpoint says)",
    )
    parser.add_argument(
        f"--{prefix}memory-budget",
        type=size_of,
        metavar="SIZE",
        help="what weights and intermediates may take on the device, such as 12GB; blocks that don't "
        "fit rest in host memory, on the CPU in the checkpoint's file (default: no limit)",
    )


def size_of(text: str) -> int:
    """Bytes of "12GB", "800 MiB" or a plain number. Raises ArgumentTypeError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match.group(2).lower()) if match else None
    size = float(match.group(1)) * unit if unit else math.inf
    if not size < 1 << 63:  # no machine has more
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write one such as 12GB or 800MiB")
    return int(size)


def check_generator_options(args: argparse.Namespace, prefix: str = "") -> None:
    """Raises HYWUError on options of `add_generator_options` that don't go together."""
    dtype, budget, _ = _options(args, prefix)
    if dtype == FP8 and budget is not None:
        raise HYWUError(
            f"--{prefix}dtype {FP8} and --{prefix}memory-budget: a generator's blocks are quantized on the "
            "device, so that they can't rest elsewhere before; give one of the two."
        )


def load(
    args: argparse.Namespace, path: str, device: torch.device, prefix: str = ""
) -> ParameterGenerator:
    """The generator at `path` as the options of `add_generator_options` say. Raises HYWUError."""
    check_generator_options(args, prefix)
    said, budget, rope = _options(args, prefix)
    dtype = torch.bfloat16 if said == FP8 else DTYPES.get(said)
    generator = load_generator(path, device, dtype, rope, memory_budget=budget)
    return to_fp8(generator) if said == FP8 else generator


def say_plan(generator: ParameterGenerator, condition: Condition) -> None:
    """What a memory budget leaves on the device; nothing without one. Raises HYWUError on too small a one."""
    plan = generator.memory_plan(condition.batch_size, condition.num_tokens)
    if plan is not None:
        say(
            f"{plan.resident_blocks} of {plan.num_blocks} blocks stay on the device, "
            f"{plan.total_bytes / 1e9:.3g} GB in all"
        )


def _options(args: argparse.Namespace, prefix: str) -> tuple[str | None, int | None, str | None]:
    start = prefix.replace("-", "_")
    names = ("dtype", "memory_budget", "rope_precision")
    return tuple(getattr(args, f"{start}{name}") for name in names)  # type: ignore[return-value]


def run(args: argparse.Namespace) -> int:
    device, condition = chosen_device(args.device), _condition(args)
    out = Path(args.out) if args.format == "peft" else with_suffix(args.out)
    if out.exists() and not args.overwrite:
        raise HYWUError(f"{out}: exists already; choose another name or give --overwrite.")
    config = open_checkpoint(args.checkpoint).config
    try:
        config.check_condition(condition.widths)
    except HYWUError as error:
        raise HYWUError(f"{args.condition} does not fit {args.checkpoint}: {error}") from error
    generator = load(args, args.checkpoint, device)
    say_plan(generator, condition)
    with torch.no_grad(), tqdm(total=generator.config.num_blocks, unit="block") as bar:
        lora = generator(condition, on_block=lambda done, total: bar.update())
    path = save_lora(lora, out, args.format, args.overwrite)
    say(f"{path}: {len(lora)} targets, rank {lora.rank}, batch {lora.batch_size} ({args.format})")
    return 0


def _condition(args: argparse.Namespace) -> Condition:
    """What to generate from: the whole file or one item of it. Wrong ones are found before any work."""
    condition = Condition.load(args.condition)
    if not bool(condition.is_finite()):
        raise HYWUError(f"{args.condition}: has values that are not finite; make it again.")
    if args.item is not None:
        condition = condition.select(args.item)
    if args.format != "native" and condition.batch_size != 1:
        raise HYWUError(
            f"{args.condition}: has {condition.batch_size} items and the {args.format} format holds one "
            "LoRA; choose one with --item, or keep them together with --format native."
        )
    return condition
