"""Official generator folder <-> one file; LoRA formats into each other.

Examples:
  hywu convert HY-WU/ hywu.safetensors                    an official folder into one file
  hywu convert hywu.safetensors HY-WU/ --format official  and back
  hywu convert lora.safetensors adapter/ --format peft    a LoRA for PEFT
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import HYWUError
from ..files import read_header
from ..formats import FORMATS, load_lora, save_lora
from ..generator.checkpoints import FORMAT, load_generator, save_generator
from ..generator.official import save_official
from ..lora import GeneratedLoRA
from .console import say


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a generator (folder or file) or a LoRA in any format")
    parser.add_argument("target", help="what to write")
    parser.add_argument(
        "--format",
        choices=(*FORMATS, "official"),
        default="native",
        help="native: our own file. official: a generator's folder. peft, comfyui: LoRAs only",
    )
    parser.add_argument("--item", type=int, help="of a LoRA's batch, only this item, from 0")
    parser.add_argument(
        "--skip-missing",
        action="store_true",
        help="leave out what can't be read of another program's LoRA, and say what",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at the target")


def is_generator(path: str | Path) -> bool:
    """A folder with config.json, or a file whose header says so."""
    path = Path(path)
    if path.is_dir():
        return (path / "config.json").is_file()
    return read_header(path).get("format") == FORMAT


def run(args: argparse.Namespace) -> int:
    if is_generator(args.source):
        if args.format not in ("native", "official") or args.item is not None:
            raise HYWUError(f"{args.source}: is a generator; its forms are native and official.")
        save = save_official if args.format == "official" else save_generator
        path = save(load_generator(args.source), args.target, overwrite=args.overwrite)
    else:
        if args.format == "official":
            raise HYWUError(f"{args.source}: is no generator; LoRAs have no official form.")
        lora = load_lora(args.source, skip_missing=args.skip_missing)
        tell_left_out(lora)
        if args.item is not None:
            lora = lora.select(args.item)
        path = save_lora(lora, args.target, args.format, args.overwrite)
    say(f"{path}: written ({args.format})")
    return 0


def tell_left_out(lora: GeneratedLoRA) -> None:
    """Say what of a LoRA's file isn't in it."""
    if left_out := lora.provenance.get("left_out"):
        more = " …" if left_out["count"] > len(left_out["names"]) else ""
        say(f"left out: {left_out['count']} entries: {', '.join(left_out['names'])}{more}")
