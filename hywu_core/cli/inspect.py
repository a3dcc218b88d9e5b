"""What a checkpoint or a LoRA holds: layout, sizes, origin, norms.

Examples:
  hywu inspect HY-WU/                     layout and size; reads headers only, however large
  hywu inspect lora.safetensors --norms   also the norm of each target's scale*B*A
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from ..errors import HYWUError
from ..files import open_tensors
from ..formats import load_lora, lora_header
from ..formats.native import layout_of
from ..generator.checkpoints import open_checkpoint
from ..layout import LoRALayout
from .console import say, table
from .convert import is_generator


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="official folder, generator file, or a LoRA in any format")
    parser.add_argument("--norms", action="store_true", help="norms per target (reads the LoRA)")
    parser.add_argument("--json", action="store_true", help="write JSON for programs")


def run(args: argparse.Namespace) -> int:
    if is_generator(args.path):
        if args.norms:
            raise HYWUError(f"{args.path}: is a generator; --norms needs a LoRA.")
        layout, facts = _generator(args.path)
    else:
        layout, facts = _lora(args.path, args.norms)
    if args.json:
        say(json.dumps({**facts, "layout": layout.to_json()}, indent=2))
        return 0
    for key, value in facts.items():
        if key != "norms":
            say(f"{key}: {value if isinstance(value, (str, int, float)) else json.dumps(value)}")
    say()
    rows = [(*row[:4], f"{row[4]:,}") for row in layout.describe()]
    table(rows, ("layers", "count", "module", "out x in", "values"))
    if args.norms:
        say()
        norms = facts["norms"].items()
        table(
            [(path, " ".join(f"{v:.4g}" for v in values)) for path, values in norms],
            ("target", "norm of each item"),
        )
    return 0


def _generator(path: str) -> tuple[LoRALayout, dict[str, Any]]:
    source = open_checkpoint(path)
    parameters, size = 0, 0
    for file in source.files:
        size += file.stat().st_size
        with open_tensors(file) as opened:
            for key in opened.keys():  # noqa: SIM118
                parameters += math.prod(opened.get_slice(key).get_shape())
    config = source.config.to_json()
    layout = source.config.layout
    for key in ("layout", "layout_digest"):
        config.pop(key, None)
    facts = {"kind": "generator", "parameters": parameters, "bytes": size}
    return layout, {**facts, "rank": layout.rank, "alpha": layout.alpha, **config}


def _lora(path: str, norms: bool) -> tuple[LoRALayout, dict[str, Any]]:
    header = lora_header(path)
    if header is not None and not norms:
        try:
            layout = layout_of(header)
        except HYWUError as error:
            raise HYWUError(f"{path}: {error}") from error
        batch, provenance = header.get("batch_size", 1), header.get("provenance", {})
        kind = header["format"]
        measured: dict[str, Any] = {}
    else:
        lora = load_lora(Path(path))
        layout, batch, provenance = lora.layout, lora.batch_size, dict(lora.provenance)
        kind = header["format"] if header else "foreign LoRA"
        measured = (
            {"norms": {p: value.tolist() for p, value in lora.norms().items()}} if norms else {}
        )
    facts = {"kind": kind, "batch_size": batch, "rank": layout.rank, "alpha": layout.alpha}
    facts["values"] = layout.num_values * batch
    return layout, {**facts, "provenance": provenance, **measured}
