"""Edit an image with the bundled editor: a LoRA is written for this image and instruction.

example:
  hywu edit photo.jpg "make it look old" --out old.png
  hywu edit photo.jpg "bring it into focus" --out sharp.png --save-lora deblur.safetensors
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..errors import HYWUError
from ..images import WRITABLE, read_image, write_image
from .console import say, table


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, help="image of any size; transparency becomes white")
    parser.add_argument("instruction", help="what to change, in a few words")
    parser.add_argument("--out", type=Path, required=True, help="PNG, JPEG or WebP to write")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise (default 0)")
    parser.add_argument("--steps", type=int, default=4, help="sampling steps (default 4)")
    parser.add_argument("--strength", type=float, default=1.0, help="of the LoRA (default 1)")
    parser.add_argument("--max-side", type=int, default=1024, help="longest side (default 1024)")
    parser.add_argument("--save-lora", type=Path, help="also keep the LoRA (.safetensors, native)")
    parser.add_argument("--editor", type=Path, help="another editor's file")
    parser.add_argument("--generator", type=Path, help="another generator's file")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def run(args: argparse.Namespace) -> int:
    if args.out.suffix.lower() not in WRITABLE:
        raise HYWUError(f"{args.out}: the name must end in {', '.join(WRITABLE)}.")
    for path in (args.out, args.save_lora):
        if path is not None and path.exists() and not args.overwrite:
            raise HYWUError(f"{path}: exists; add --overwrite to replace it.")
    started = time.perf_counter()
    from tqdm import tqdm

    from ..bases.bundled.engine import BundledEditor

    engine = BundledEditor.load(args.editor, args.generator)
    image = read_image(args.image, args.max_side)
    load = time.perf_counter() - started
    with tqdm(total=args.steps, desc="sample", unit="step") as bar:
        edit = engine.edit(
            image, args.instruction, seed=args.seed, steps=args.steps, strength=args.strength,
            progress=lambda done, total: bar.update(),
        )  # fmt: skip
    if edit.warning:
        say(f"warning: {edit.warning}")
    write_image(edit.image, args.out)
    if args.save_lora is not None:
        edit.lora.save(args.save_lora, overwrite=args.overwrite)
    rows = [("load", f"{load:.2f}"), *((k, f"{v:.2f}") for k, v in edit.seconds.items())]
    table(rows, ("stage", "seconds"))
    say(str(args.out))
    return 0
