"""Edited images of the bundled editor with LoRAs from bf16 and fp8 generators, against float32's.

    python -m bench.fp8_images [--device cuda] [--side 256] [--json FILE]

The same photograph, instruction and noise; only the generator's arithmetic differs. On a device without
fp8 products the quantized values are multiplied in float32, so that the rounding is the same there.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hywu_core.bases.bundled.checkpoint import bundled
from hywu_core.bases.bundled.engine import BundledEditor
from hywu_core.cli.console import say, table
from hywu_core.generator.checkpoints import load_generator
from hywu_core.generator.speed.fp8 import to_fp8
from hywu_core.images import read_image

from .measure import write_json

IMAGES = Path(__file__).parent.parent / "workflows" / "inputs"

#: (photograph, instruction in words that were trained)
EDITS = [
    ("hywu_coffee.png", "blur the image"),
    ("hywu_cat_soft.png", "bring it into focus"),
    ("hywu_coffee.png", "make it look old"),
    ("hywu_astronaut_aged.png", "restore this old photo"),
    ("hywu_rocket.png", "darken the image"),
    ("hywu_rocket.png", "add fog"),
]


def psnr(one: Tensor, other: Tensor) -> float:
    """Of images in 0..1, in dB."""
    return -10 * (one.double() - other.double()).square().mean().clamp(min=1e-12).log10().item()


def difference(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm of `other`."""
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


def measure(device: str, side: int) -> dict:
    engine = BundledEditor.load(device=device)
    generators = {
        "float32": load_generator(bundled("generator"), device, torch.float32),
        "bf16": load_generator(bundled("generator"), device, torch.bfloat16),
        "fp8 layers in bf16": to_fp8(load_generator(bundled("generator"), device, torch.bfloat16)),
    }
    found: dict[str, dict[str, list[float]]] = {
        name: {"lora_difference": [], "psnr_db": []} for name in generators if name != "float32"
    }
    changed = []
    for file, instruction in tqdm(EDITS, desc="edits", unit="edit", leave=False):
        image = read_image(IMAGES / file, side).to(device)
        results = {}
        for name, generator in generators.items():
            engine.generator = generator
            results[name] = engine.edit(image, instruction)
        exact = results.pop("float32")
        scale = 1.0 if image.is_floating_point() else 255.0
        changed.append(psnr(exact.image, image / scale))
        for name, edit in results.items():
            pairs = zip(edit.lora.grids, exact.lora.grids, strict=True)
            one, other = (
                torch.cat([grid.flatten().double() for grid in grids])
                for grids in zip(*pairs, strict=True)
            )
            found[name]["lora_difference"].append(difference(one, other))
            found[name]["psnr_db"].append(psnr(edit.image, exact.image))
    return {
        "side": side,
        "device": device,
        "psnr_db_of_the_edit": changed,
        "against_float32": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--side", type=int, default=256, help="longest; default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    figures = measure(args.device, args.side)
    rows = []
    for name, values in figures["against_float32"].items():
        apart, db = values["lora_difference"], values["psnr_db"]
        rows.append(
            (
                name,
                f"{100 * statistics.mean(apart):.2f} %",
                f"{statistics.mean(db):.1f}",
                f"{min(db):.1f}",
            )
        )
    header = ("generator", "LoRA off float32's", "images, dB", "the furthest, dB")
    table(rows, header)
    edits = statistics.mean(figures["psnr_db_of_the_edit"])
    say(f"The edits themselves are {edits:.1f} dB from their photographs on average.")
    write_json(args.json, figures)


if __name__ == "__main__":
    main()
