"""What one call asks of a GPU, estimated operation by operation on a machine that has none.

    python -m bench.estimate [--sizes NAME ...] [--variants NAME ...] [--json FILE]

The same code as in bench/cuda.py runs on tensors that say they are on a CUDA device and hold nothing
(bench/pretended.py), at full size, in seconds. Counted are operations that launch something, arithmetic,
bytes read and written (every tensor once per operation), and the most memory held. Kernels' own
workspaces aren't in it, and no times: the last columns divide by rates that are given, not measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hywu_core import Condition, ParameterGenerator
from hywu_core.cli.console import say, table
from hywu_core.generator.speed import fp8

from .measure import write_json
from .pretended import CUDA, Ledger, pretended_cuda
from .sizes import SIZES, Size, make
from .variants import OFFLOADED_BYTES, reference

VARIANTS = ("eager", "ours", "fp8", "offloaded")


def condition_of(size: Size, config: Any, dtype: torch.dtype) -> Condition:
    names, left, parts = list(config.condition), size.condition_tokens, {}
    for i, name in enumerate(names):
        count = left // (len(names) - i)
        left -= count
        parts[name] = torch.empty(1, count, config.condition[name], device=CUDA, dtype=dtype)
    return Condition(parts)


def _prepared(
    name: str, generator: ParameterGenerator, condition: Condition
) -> Callable[[], list[Tensor]]:
    if name == "eager":
        return reference(generator, condition)
    if name == "fp8":
        fp8.to_fp8(generator)
    if name == "offloaded":
        generator.memory_budget = OFFLOADED_BYTES
    return lambda: generator.generate_grids(condition)


def estimate(
    size: Size,
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    off: Sequence[str] = (),
    on: Sequence[str] = (),
) -> dict[str, Any]:
    """The figures of one size and variant: a call after the first, whose tables and prefix are kept.

    off, on: parts of the fast path to switch off, or on where they are off: fields of `Switches`.
    """
    ledger = Ledger()
    with pretended_cuda(ledger):
        config = size.config()
        generator = make(config, "cuda", dtype)
        generator.switches = generator.switches.without(*off).also(*on)
        condition = condition_of(size, config, dtype)
        run = _prepared(name, generator, condition)
        run()
        weights = sum(
            t.nbytes for t in (*generator.parameters(), *generator.buffers()) if t.is_cuda
        )
        given = sum(t.nbytes for t in condition.parts.values())
        ledger.flops.clear(), ledger.launches.clear()
        ledger.product_bytes = ledger.other_bytes = 0
        ledger.peak_bytes = ledger.held_bytes
        result = run()
        figures = {
            "launches": sum(ledger.launches.values()),
            "flops": dict(ledger.flops),
            "product_bytes": ledger.product_bytes,
            "other_bytes": ledger.other_bytes,
            "peak_bytes": ledger.peak_bytes - given,
            "peak_over_weights_bytes": ledger.peak_bytes - given - weights,
            "operations": dict(ledger.launches.most_common()),
        }
        if generator.residency.offloaded:
            figures["peak_over_weights_bytes"] = None  # some blocks' weights are in the peak
        del result
    return figures


def seconds(figures: dict[str, Any], rates: dict[str, float]) -> tuple[float, float]:
    """(products, everything else) at given rates: TFLOP/s by dtype, and "copy" in GB/s."""
    products = sum(f / rates[dtype] / 1e12 for dtype, f in figures["flops"].items())
    return products, figures["other_bytes"] / rates["copy"] / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), metavar="NAME")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument("--off", nargs="+", default=[], metavar="PART", help="of the fast path")
    parser.add_argument("--on", nargs="+", default=[], metavar="PART", help="of those that are off")
    parser.add_argument("--tflops", type=float, default=750, help="bf16; default: %(default)s")
    parser.add_argument("--fp8-tflops", type=float, default=1300, help="default: %(default)s")
    parser.add_argument("--copy-gbs", type=float, default=2800, help="default: %(default)s")
    args = parser.parse_args()
    rates = {"bfloat16": args.tflops, "float8_e4m3fn": args.fp8_tflops, "copy": args.copy_gbs}
    found: dict[str, Any] = {"rates": rates, "sizes": {}}
    for size_name in args.sizes:
        size, rows = SIZES[size_name], []
        found["sizes"][size_name] = figures = {}
        for name in args.variants:
            if name == "offloaded" and size_name != "official":
                continue
            one = figures[name] = estimate(size, name, off=args.off, on=args.on)
            products, rest = one["seconds_at_rates"] = seconds(one, rates)
            over = one["peak_over_weights_bytes"]
            rows.append(
                (
                    name,
                    f"{one['launches']:,}",
                    f"{sum(one['flops'].values()) / 1e12:.4g}",
                    f"{one['other_bytes'] / 1e9:.4g}",
                    f"{one['peak_bytes'] / 1e9:.3g}",
                    "" if over is None else f"{over / 1e9:.3g}",
                    f"{1000 * products:.4g}",
                    f"{1000 * rest:.4g}",
                )
            )
        say()
        say(f"{size_name}: {size.words}")
        header = (
            "variant", "launches", "TFLOP", "GB beside products", "peak GB", "over weights",
            "ms products", "ms the rest",
        )  # fmt: skip
        table(rows, header)
    write_json(args.json, found)


if __name__ == "__main__":
    main()
