"""Speed and memory of the generator on a GPU: every size and variant, in one command, in minutes.

    python -m bench.cuda [--json FILE] [--seconds 450] [--sizes NAME ...] [--variants NAME ...]
    python -m bench.cuda --device cpu                 what a CPU can run: bundled, engine
    python -m bench.cuda --device cpu --tiny          the whole course on a CPU, for the tests

Weights are random, made on the device. Each size is timed with CUDA events after a warm-up, the largest
first, its output compared with the plain eager reference, its peak memory read, its arithmetic set
against the device's own measured rates; then every variant is compared with a float64 reference at a
reduced size. On CUDA each size and variant is a process of its own, so that an error on the device costs
one figure; one that failed is run once more with errors told where they happen. It keeps to `--seconds`
by itself: variants get shares of what is left, and what doesn't fit any more is named as not measured.
The JSON is written anew after each. The end compares the figures with the targets.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hywu_core.cli.console import say, table

from . import isolated
from .device import rates, use
from .measure import write_json
from .one import chosen, errors, measure, usual_dtype
from .sizes import CPU_SIZES, SIZES, Size
from .targets import verdicts
from .variants import VARIANTS

#: What makes sense at full size on a CPU: there are no fp8 products, graphs or second memory.
CPU_VARIANTS = ["eager", "ours"]

#: On CUDA `compiled` is measured when it is named: nobody knows how long compiling takes.
CUDA_VARIANTS = [name for name in VARIANTS if name != "compiled"]

#: Two roundings of one function aren't further apart at any size, be one of them fp8.
MOST_OFF = 0.15

#: Seconds of the run's time that are kept for the comparison at the reduced size.
FOR_ERRORS = 45


class Clock:
    """Seconds left of the whole run."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    def left(self) -> float:
        return self._end - time.perf_counter()


def measure_size(
    name: str, names: list[str], clock: Clock, args: argparse.Namespace, device: torch.device
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(variant, figures) of one size; see `one.measure`. Variants follow each other: eager's result first."""
    size = chosen(name, args.tiny)
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder) / "eager.safetensors"
        for i, variant in enumerate(names):
            share = clock.left() * size.share / (len(names) - i)
            least = size.least_s * (2 if variant == "compiled" else 1)
            if clock.left() < least:
                yield variant, {"skipped": f"{clock.left():.0f} s were left of the run's time"}
                continue
            if not args.isolate:
                yield variant, measure(size, variant, device, usual_dtype(device), share, sample)
                continue
            command = [
                "--size", name, "--variant", variant, "--device", args.device,
                "--seconds", f"{share:.1f}", "--reference", str(sample),
                *(["--tiny"] if args.tiny else []),
            ]  # fmt: skip
            yield variant, _isolated(command, clock, share)


def _isolated(command: list[str], clock: Clock, share: float) -> dict[str, Any]:
    """Figures from a process of its own; where it failed, once more with errors where they happen."""
    figures = isolated.call("one", command, min(clock.left(), 3 * share + 60))
    if "failed" in figures and "out of memory" not in figures["failed"] and clock.left() > 30:
        again = isolated.call("one", command, min(clock.left(), 60), blocking=True)
        figures["failed_at"] = again.get("failed", "it did not fail with CUDA_LAUNCH_BLOCKING=1")
        figures["failed_trace"] = again.get("trace", "")
    return figures


def errors_of(names: list[str], args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Relative error of each variant at the reduced size."""
    if not args.isolate:
        return errors(device, names, usual_dtype(device))
    found = isolated.call("one", ["--errors", *names, "--device", args.device], FOR_ERRORS * 2)
    kept = {k: v for k, v in found.items() if k in names or k == "float32 eager"}
    return kept or {name: found.get("failed", "failed") for name in names}


def report(name: str, size: Size, figures: dict[str, dict], rate: float) -> None:
    """The table of one size.

    rate: sustained TFLOP/s of matrix products.
    """
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
                f"{100 * f['tflops'] / rate:.0f} %",
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
    device = use(args.device)
    cuda, clock, names = device.type == "cuda", Clock(args.seconds), list(args.variants)
    edge, span = (8192, 3.5) if cuda else (128 if args.tiny else 1024, 0.05)
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "tiny": args.tiny,
        "rates": rates(device, edge, usual_dtype(device), span),
        "relative_error_at_reduced_size": {},
        "sizes": {},
    }
    if cuda:
        torch.cuda.empty_cache()  # the processes to come need the device's memory
    say(", ".join(f"{name} {value:.3g}" for name, value in figures["rates"].items()))
    sustained = figures["rates"]["sustained_tflops"]
    write_json(args.json, figures)
    try:
        for name in tqdm(args.sizes, desc="sizes", unit="size", leave=False):
            size = chosen(name, args.tiny)
            found: dict[str, dict] = {}
            figures["sizes"][name] = {"words": size.words, "target": size.target, "variants": found}
            for variant_name, result in measure_size(name, names, clock, args, device):
                found[variant_name] = result
                write_json(args.json, figures)
            report(name, size, found, sustained)
        figures["relative_error_at_reduced_size"] = errors_of(names, args, device)
    except KeyboardInterrupt:
        say("Stopped; what was measured is kept.")
    off = figures["relative_error_at_reduced_size"].items()
    table([(n, e[:80] if isinstance(e, str) else f"{e:.2e}") for n, e in off], ("variant", "error"))
    figures["targets"] = [verdict.to_json() for verdict in verdicts(figures)]
    if cuda and not args.tiny:
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
    parser.add_argument(
        "--isolate", action=argparse.BooleanOptionalAction,
        help="a process for each size and variant (default: on CUDA)",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this torch finds no CUDA device; `--device cpu` measures what a CPU can run")
    if args.isolate is None:
        args.isolate = device.type == "cuda"
    full_cpu = device.type != "cuda" and not args.tiny
    args.sizes = args.sizes or list(CPU_SIZES if full_cpu else SIZES)
    args.variants = args.variants or (CPU_VARIANTS if full_cpu else CUDA_VARIANTS)
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
