"""Speed and memory of the generator on a GPU: every size and variant, in one command, in minutes.

    python -m bench.cuda [--json FILE] [--seconds 450] [--sizes NAME ...] [--variants NAME ...]
    python -m bench.cuda --device cpu                 what a CPU can run: bundled, engine
    python -m bench.cuda --device cpu --tiny          the whole course on a CPU, for the tests

Weights are random, made on the device. First every variant is compared with a float64 reference at a
reduced size; then each size is timed with CUDA events after a warm-up, its output compared with the
plain eager reference, its peak memory read, its arithmetic set against the device's own measured
rates. It keeps to `--seconds` by itself: variants get shares of what is left, and what doesn't fit any
more is named as not measured. A variant that fails is named with its error and the others go on; the
JSON is written anew after each of them. The end compares the figures with the targets.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hywu_core import Condition, ParameterGenerator
from hywu_core.cli.console import say, table

from .device import held_bytes, peak_bytes, profile, rates, timed
from .measure import write_json
from .sizes import CPU_SIZES, SIZES, Size, make, random_condition, reduced
from .targets import verdicts
from .variants import VARIANTS, Unavailable, reference, relative_difference, variant

#: Most calls that one variant is timed with.
CALLS = 20

#: What makes sense at full size on a CPU: there are no fp8 products, graphs or second memory.
CPU_VARIANTS = ["eager", "ours"]

#: Variants whose time is also told by kind of kernel.
PROFILED = ("eager", "ours", "fp8")

#: Two roundings of one function aren't further apart at any size, be one of them fp8.
MOST_OFF = 0.15

#: Blocks of the reduced size: as many as officially where that takes no time, so that rounding adds up.
REDUCED_BLOCKS = {"cuda": 24}


class Clock:
    """Seconds left of the whole run."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    def left(self) -> float:
        return self._end - time.perf_counter()


def correctness(device: torch.device, names: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """Relative error of each variant at a reduced size, against float64; float32 eager besides."""
    config = reduced(REDUCED_BLOCKS.get(device.type, 8))
    condition = random_condition(config, 50, device, torch.float64)
    exact_generator = make(config, str(device), torch.float32).double()
    exact = reference(exact_generator, condition)()
    single = make(config, str(device), torch.float32)
    errors: dict[str, Any] = {
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
        except Exception as error:  # one variant's trouble must not cost the others' figures
            errors[name] = _told(error)
    return errors


def _as(condition: Condition, dtype: torch.dtype) -> Condition:
    return condition.to(dtype=dtype)


def _told(error: Exception) -> str:
    """One line of an error; all of it goes to stderr."""
    sys.stderr.write("".join(traceback.format_exception(error)))
    lines = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {lines[0][:200] if lines else ''}"


def measure_size(
    size: Size, device: torch.device, names: list[str], clock: Clock, dtype: torch.dtype
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(variant, figures) of one size; figures hold "skipped" with the reason where there are none,
    "failed" with the error where one came in between."""
    config = size.config()
    condition = random_condition(config, size.condition_tokens, device, dtype)
    flops = config.flops(condition.num_tokens, condition.batch_size)
    expected: list[Tensor] | None = None
    # variants change a generator in place (compiled, fp8, streamed), so each has its own
    for i, name in enumerate(names):
        share = clock.left() * size.share / (len(names) - i)
        least = size.least_s * (2 if name == "compiled" else 1)
        if clock.left() < least:
            yield name, {"skipped": f"{clock.left():.0f} s were left of the run's time"}
            continue
        figures: dict[str, Any] = {}
        generator = run = None
        gc.collect()  # a compiled generator's cycles
        before = held_bytes(device)
        try:
            generator = make(config, str(device), dtype)
            with variant(name, generator, condition) as run:
                figures |= timed(run, device, share, CALLS)
                figures["tflops"] = flops / figures["median_s"] / 1e12
                figures |= _memory(run, generator, device, before)
                result = run()
                if name == "eager":
                    expected = result
                elif expected is not None:
                    figures["difference_from_eager"] = relative_difference(result, expected)
                del result
                if name in PROFILED:
                    figures["profile"] = profile(run, device)
        except Unavailable as reason:
            figures = {"skipped": str(reason)}
        except torch.cuda.OutOfMemoryError as error:
            figures["failed"] = f"out of memory: {str(error).splitlines()[0]}"
        except Exception as error:  # one variant's trouble must not cost the others' figures
            figures["failed"] = _told(error)
        del generator, run  # the function holds the generator too
        yield name, figures
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _memory(
    run: Callable[[], list[Tensor]],
    generator: ParameterGenerator,
    device: torch.device,
    before: int,
) -> dict[str, Any]:
    """Peak bytes of a call: in all, and beyond the generator's weights.

    In all counts everything that came after `before` was held: weights, the kept prefix, a graph's
    inputs and outputs (its intermediates lie in memory that is only reserved). Where blocks are
    streamed some of their weights are in the peak, so that there is no figure beyond the weights.
    """
    weights = sum(
        t.nbytes
        for t in (*generator.parameters(), *generator.buffers())
        if t.device.type == device.type
    )
    if device.type == "cuda":
        peak = peak_bytes(run, device) - before
        over = None if generator.streaming else peak - weights
    else:
        over = peak_bytes(run, device)
        peak = weights + over
    return {"weights_bytes": weights, "peak_bytes": peak, "peak_over_weights_bytes": over}


def report(name: str, size: Size, figures: dict[str, dict], matmul_tflops: float) -> None:
    """The table of one size."""
    eager = figures.get("eager", {}).get("median_s")
    rows = []
    for variant_name, f in figures.items():
        if "median_s" not in f:
            reason = f.get("skipped") or f["failed"]
            rows.append((variant_name, "not measured", "", "", "", "", "", "", reason[:60]))
            continue
        difference, over = f.get("difference_from_eager"), f.get("peak_over_weights_bytes")
        rows.append(
            (
                variant_name,
                f"{1000 * f['median_s']:.2f}",
                f"{1000 * f['iqr_s']:.2f}",
                f"{eager / f['median_s']:.2f}x" if eager else "",
                f"{f['tflops']:.3g}",
                f"{100 * f['tflops'] / matmul_tflops:.0f} %",
                f"{f['peak_bytes'] / 1e9:.3g}" if "peak_bytes" in f else "",
                "" if over is None else f"{over / 1e9:.3g}",
                f.get("failed", "")[:60] if difference is None else f"{difference:.1e}",
            )
        )
    header = (
        "variant", "median ms", "spread ms", "faster", "TFLOP/s", "of matmul", "peak GB",
        "over weights", "off eager",
    )  # fmt: skip
    say()
    say(f"{name}: {size.words}; target {size.target}")
    table(rows, header)
    for variant_name, f in figures.items():
        kinds = f.get("profile", {}).get("seconds_by_kind", {})
        if kinds:
            spent = ", ".join(f"{kind} {1000 * s:.4g}" for kind, s in kinds.items())
            say(f"ms by kind of kernel, {variant_name}: {spent}")


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """All figures, as they are written to JSON, anew after each variant."""
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and streams are the current device's
        device = torch.device("cuda", torch.cuda.current_device())
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
    table(
        [(n, e[:80] if isinstance(e, str) else f"{e:.2e}") for n, e in errors], ("variant", "error")
    )
    figures["sizes"] = {}
    write_json(args.json, figures)
    try:
        for name in tqdm(args.sizes, desc="sizes", unit="size", leave=False):
            size = SIZES[name].tiny() if args.tiny else SIZES[name]
            found: dict[str, dict] = {}
            figures["sizes"][name] = {"words": size.words, "target": size.target, "variants": found}
            for variant_name, result in measure_size(size, device, names, clock, dtype):
                found[variant_name] = result
                write_json(args.json, figures)
            report(name, size, found, figures["rates"]["matmul_tflops"])
    except KeyboardInterrupt:
        say("Stopped; what was measured is kept.")
    figures["targets"] = [verdict.to_json() for verdict in verdicts(figures)]
    if device.type == "cuda" and not args.tiny:
        say()
        table(
            [(v["target"], v["measured"], v["met"]) for v in figures["targets"]],
            ("target on one H100-class device", "measured", "met"),
        )
    write_json(args.json, figures)
    return figures


def failures(figures: dict[str, Any]) -> list[str]:
    """What failed, and the variants that are further from the reference than rounding explains."""
    found = []
    errors = figures["relative_error_at_reduced_size"]
    own = errors["eager"] if isinstance(errors.get("eager"), float) else 0.0
    for name, error in errors.items():
        if isinstance(error, str):
            found += [f"{name} at the reduced size: {error}"] if error.startswith("failed") else []
            continue
        # others round about as often as the reference; without bf16's own error there is fp8's limit
        limit = max(1e-5, 1.5 * own) if own else 0.05
        if name == "fp8":
            limit = min(0.08, 4 * own) if own > 1e-3 else 0.08
        if not error <= limit:  # NaN isn't
            found.append(f"{name} at the reduced size: its error {error:.1e} is over {limit:.1e}")
    for size, entry in figures["sizes"].items():
        for name, f in entry["variants"].items():
            difference = f.get("difference_from_eager", 0.0)
            if "failed" in f:
                found.append(f"{name} of {size}: {f['failed']}")
            elif not difference <= MOST_OFF:
                found.append(f"{name} of {size}: {difference:.1e} off eager")
    return found


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
    failed = failures(run(args))
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
