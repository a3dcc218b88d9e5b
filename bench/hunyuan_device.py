"""HunyuanImage-3's base on a device, in at most four minutes: real widths, few layers, random weights.

    python -m bench.hunyuan_device --json FILE [--seconds 228] [--layers 4] [--only NAME ...]
    python -m bench.hunyuan_device --device cpu --tiny --json FILE        the whole course on a CPU, for the tests

It needs what bench/first_contact.py needs, and transformers. An edit with one source image at 1024x1024: the pass
over what comes before the image, a later step with both branches of guidance, one token of text. Each
variant is a process of its own (bench/hunyuan_one.py), and the JSON is written anew after each:

    rates                the device's own: products, copies from page-locked memory
    resident             bfloat16, all on the device; what the others' predictions are compared with
    streamed             bfloat16 in page-locked memory, copied in chunks of 8 experts, no layer stays
    fp8, nf4, int8       experts quantized, on the device; with _streamed: in page-locked memory
    lora                 resident, with a LoRA on every matrix, unmerged
    kv_ram               resident, keys and values in host memory
    vae                  the VAE's decoder, in float32 and bfloat16

share_of_sustained: of the device's sustained bfloat16 products. share_of_copy: of the page-locked upload rate.
bound_share: the longer of both at full rate, over the time taken. A pass of the published 32 layers
(published_s) is what lies outside of the layers plus the layers' time in proportion.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hywu_core.cli.console import say, table

from . import clocks, isolated
from .device import use
from .first_contact import Course, environment
from .hunyuan_one import LAYERS, NAMES
from .measure import checked, course_options

SECONDS = 228.0
#: Longest time of a measurement's process.
LONGEST_S = 50.0


def shares(found: dict[str, Any], rates: dict[str, Any]) -> None:
    """Add to each pass what it achieves of the device's own rates."""
    sustained, upload = rates.get("sustained_tflops"), rates.get("upload_gbs")
    for kind in ("step", "prefix", "token"):
        each = found.get(kind, {})
        seconds, bounds = each.get("median_s"), []
        if not seconds:
            continue
        if sustained and "operations" in each:
            bounds.append(each["operations"] / sustained / 1e12)
            each["share_of_sustained"] = bounds[-1] / seconds
        if upload and each.get("moved_bytes"):
            bounds.append(each["moved_bytes"] / upload / 1e9)
            each["share_of_copy"] = bounds[-1] / seconds
        if bounds:
            each["bound_share"] = max(bounds) / seconds


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All variants; returns what is written to the JSON."""
    course = Course(args.json, args.seconds)
    course.figures["environment"] = environment(use(args.device))
    options = ["--device", args.device, "--layers", str(args.layers)]
    options += ["--tiny"] if args.tiny else []
    with tempfile.TemporaryDirectory() as folder, clocks.course(args.json, course.figures):
        options += ["--reference", str(Path(folder) / "prediction.safetensors")]
        for name in args.only or NAMES:
            if course.left() < 12:
                course.put(f"base/{name}", {"skipped": f"{course.left():.0f} s were left"})
                continue
            longest = min(LONGEST_S, course.left())
            found = isolated.call("hunyuan_one", ["--variant", name, *options], longest)
            shares(found, course.figures["measured"].get("base/rates", {}))
            course.put(f"base/{name}", found)
    show(course.figures)
    return course.figures


def show(figures: dict[str, Any]) -> None:
    """Seconds, shares and differences of each variant."""
    rows = []
    for name, found in figures["measured"].items():
        for kind in ("step", "prefix", "token"):
            if "median_s" not in found.get(kind, {}):
                continue
            each = found[kind]
            shown = [each.get(k) for k in ("share_of_sustained", "share_of_copy", "bound_share")]
            rows.append(
                (
                    name.removeprefix("base/"), kind, f"{1000 * each['median_s']:.4g}",
                    f"{each['published_s']:.3g}", *("" if v is None else f"{v:.0%}" for v in shown),
                    f"{found['difference']:.1e}" if "difference" in found else "",
                )
            )  # fmt: skip
    heads = ("variant", "pass", "ms", "32 layers, s", "products", "copy", "bound", "off")
    say()
    table(rows, heads)
    for name, found in figures["measured"].items():
        if reason := found.get("failed") or found.get("skipped"):
            say(f"{name}: {reason}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    course_options(parser)
    parser.set_defaults(seconds=SECONDS)
    parser.add_argument("--layers", type=int, default=LAYERS, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME")
    return checked(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    run(parse(arguments))


if __name__ == "__main__":
    main()
