"""Speed and memory of the generator on a GPU: every size and variant, in one command, in minutes.

    python -m bench.cuda [--json FILE] [--seconds 450] [--sizes NAME ...] [--variants NAME ...]
    python -m bench.cuda --device cpu                 what a CPU can run: bundled, engine
    python -m bench.cuda --device cpu --tiny          the whole course on a CPU, for the tests

Weights are random, made on the device. First every variant is compared with a float64 reference at a
reduced size; then each size is timed with CUDA events after a warm-up, its output compared with the
plain eager reference, its peak memory read, its arithmetic set against the device's own measured
rates. It keeps to `--seconds` by itself: variants get shares of what is left, and what doesn't fit any
more is named as not measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hywu_core import Condition
from hywu_core.console import say, table

from .cuda_sizes import CPU_SIZES, SIZES, Size, random_condition, reduced
from .cuda_variants import VARIANTS, Unavailable, reference, relative_difference, variant
from .device import peak_bytes, profile, rates, timed
from .generator import make
from .measure import write_json

#: Most calls that one variant is timed with.
CALLS = 20

#: What makes sense at full size on a CPU: there are no fp8 products, graphs or second memory.
CPU_VARIANTS = ["eager", "ours"]


class Clock:
    """Seconds left of the whole run."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    def left(self) -> float:
        return self._end - time.perf_counter()


def correctness(device: torch.device, names: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """Relative error of each variant at a reduced size, against float64; float32 eager besides."""
    config = reduced()
    condition = random_condition(config, 50, device, torch.float64)
    exact_generator = make(config, str(device), torch.float32).double()
    exact = reference(exact_generator, condition)()
    single = make(config, str(device), torch.float32)
    errors = {
        "float32 eager": relative_difference(
            reference(single, _as(condition, torch.float32))(), exact
        )
    }
    for name in names:
        generator = make(config, str(device), torch.float32).to(dtype)
        try:
            with variant(name, generator, _as(condition, dtype)) as run:
                errors[name] = relative_difference(run(), exact)
        except Unavailable as reason:
            errors[name] = str(reason)
    return errors


def _as(condition: Condition, dtype: torch.dtype) -> Condition:
    return condition.to(dtype=dtype)


def measure_size(
    size: Size, device: torch.device, names: list[str], clock: Clock, dtype: torch.dtype
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(variant, figures) of one size; figures hold "skipped" with the reason where there are none."""
    config = size.config()
    condition = random_condition(config, size.condition_tokens, device, dtype)
    flops = config.flops(condition.num_tokens, condition.batch_size)
    expected: list[Tensor] | None = None
    # variants change a generator in place (compiled, fp8, streamed), so each has its own
    for i, name in enumerate(names):
        share = clock.left() * size.share / (len(names) - i)
        if clock.left() < size.least_s:
            yield name, {"skipped": f"{clock.left():.0f} s were left of the run's time"}
            continue
        generator = make(config, str(device), dtype)
        try:
            with variant(name, generator, condition) as run:
                figures = _measure(run, device, share, flops)
                result = run()
                if name == "eager":
                    expected = result
                    figures["profile"] = profile(run, device)
                elif expected is not None:
                    figures["difference_from_eager"] = relative_difference(result, expected)
                del result
        except Unavailable as reason:
            figures = {"skipped": str(reason)}
        except torch.cuda.OutOfMemoryError as error:
            figures = {"skipped": f"out of memory: {str(error).splitlines()[0]}"}
        del generator
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield name, figures


def _measure(
    run: Callable[[], list[Tensor]], device: torch.device, seconds: float, flops: float
) -> dict[str, Any]:
    figures: dict[str, Any] = timed(run, device, seconds, CALLS)
    figures["tflops"] = flops / figures["median_s"] / 1e12
    figures["peak_over_weights_bytes"] = peak_bytes(run, device)
    return figures


def report(name: str, size: Size, figures: dict[str, dict], matmul_tflops: float) -> None:
    """The table of one size."""
    eager = figures.get("eager", {}).get("median_s")
    rows = []
    for variant_name, f in figures.items():
        if "skipped" in f:
            rows.append((variant_name, "not measured", "", "", "", "", "", f["skipped"][:60]))
            continue
        difference = f.get("difference_from_eager")
        rows.append(
            (
                variant_name,
                f"{1000 * f['median_s']:.2f}",
                f"{1000 * f['iqr_s']:.2f}",
                f"{eager / f['median_s']:.2f}x" if eager else "",
                f"{f['tflops']:.3g}",
                f"{100 * f['tflops'] / matmul_tflops:.0f} %",
                f"{f['peak_over_weights_bytes'] / 2**30:.3g}",
                "" if difference is None else f"{difference:.1e}",
            )
        )
    header = (
        "variant", "median ms", "spread ms", "faster", "TFLOP/s", "of matmul", "peak GiB",
        "off eager",
    )  # fmt: skip
    say()
    say(f"{name}: {size.words}; target {size.target}")
    table(rows, header)


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """All figures, as they are written to JSON."""
    device = torch.device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    clock, names = Clock(args.seconds), list(args.variants)
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "tiny": args.tiny,
        "rates": rates(
            device, 8192 if device.type == "cuda" else 128 if args.tiny else 1024, dtype
        ),
    }
    say(", ".join(f"{name} {value:.3g}" for name, value in figures["rates"].items()))
    figures["relative_error_at_reduced_size"] = correctness(device, names, dtype)
    errors = figures["relative_error_at_reduced_size"].items()
    table([(n, e if isinstance(e, str) else f"{e:.2e}") for n, e in errors], ("variant", "error"))
    figures["sizes"] = {}
    try:
        for name in tqdm(args.sizes, desc="sizes", unit="size", leave=False):
            size = SIZES[name].tiny() if args.tiny else SIZES[name]
            found: dict[str, dict] = {}
            figures["sizes"][name] = {"words": size.words, "target": size.target, "variants": found}
            for variant_name, result in measure_size(size, device, names, clock, dtype):
                found[variant_name] = result
            report(name, size, found, figures["rates"]["matmul_tflops"])
    except KeyboardInterrupt:
        say("Stopped; what was measured is kept.")
    return figures


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=450, help="default: %(default)s")
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, metavar="NAME", help=f"of {', '.join(SIZES)}"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, metavar="NAME", help=f"of {', '.join(VARIANTS)}"
    )
    parser.add_argument("--tiny", action="store_true", help="every size shrunk to almost nothing")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this torch finds no CUDA device; `--device cpu` measures what a CPU can run")
    full_cpu = device.type != "cuda" and not args.tiny
    args.sizes = args.sizes or list(CPU_SIZES if full_cpu else SIZES)
    args.variants = args.variants or (CPU_VARIANTS if full_cpu else list(VARIANTS))
    if full_cpu and not set(args.sizes) <= set(CPU_SIZES):
        parser.error(f"a CPU runs {' and '.join(CPU_SIZES)}; add --tiny to shrink the others")
    return args


def main() -> None:
    args = parse()
    write_json(args.json, run(args))


if __name__ == "__main__":
    main()
