"""One size and variant of a generator on a device: time, memory, arithmetic, difference from the reference.

    python -m bench.one --size official --variant ours --json FILE [--reference FILE] [--seconds 60]
    python -m bench.one --errors eager ours fp8 --json FILE      each variant against float64, reduced

bench/cuda.py and bench/first_contact.py call it in a process of its own for each measurement. --reference
is where `eager` leaves a sample of its result and the others find it; --off and --on name parts of the fast
path (the fields of `Switches`) to switch off, or on where they are off; --blocks shortens the generator,
--chunk-rows sets the rows of a chunk.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hywu_core import ParameterGenerator
from hywu_core.generator.speed.passes import Switches

from .device import held_bytes, peak_bytes, profile, timed, use
from .measure import write_json
from .sizes import SIZES, Size, make, random_condition, reduced
from .variants import VARIANTS, Unavailable, reference, relative_difference, variant

#: Most calls that one variant is timed with.
CALLS = 20

#: Variants whose time is also told by kind of kernel.
PROFILED = ("eager", "ours", "fp8")

#: Blocks of the reduced size: as many as officially where that takes no time, so that rounding adds up.
REDUCED_BLOCKS = {"cuda": 24}

#: About so many values of a result are kept for comparison.
SAMPLE_VALUES = 1 << 22


def errors(device: torch.device, names: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """Relative error of each variant at a reduced size, against float64; float32 eager besides."""
    config = reduced(REDUCED_BLOCKS.get(device.type, 8))
    condition = random_condition(config, 50, device, torch.float64)
    exact = reference(make(config, str(device), torch.float32).double(), condition)()
    single = make(config, str(device), torch.float32)
    plain = reference(single, condition.to(dtype=torch.float32))()
    found: dict[str, Any] = {"float32 eager": relative_difference(plain, exact)}
    for name in names:
        generator = make(config, str(device), torch.float32).to(dtype)
        try:
            with variant(name, generator, condition.to(dtype=dtype)) as run:
                found[name] = relative_difference(run(), exact)
        except Unavailable as reason:
            found[name] = str(reason)
        except Exception as error:  # one variant's trouble must not cost the others' figures
            found[name] = told(error)
    return found


def told(error: Exception) -> str:
    """One line of an error; all of it goes to stderr."""
    sys.stderr.write("".join(traceback.format_exception(error)))
    lines = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {lines[0][:200] if lines else ''}"


def measure(
    size: Size,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    sample: Path | None = None,
    switches: Switches | None = None,
    chunk_rows: int | None = None,
    show: Callable[[dict[str, Any]], None] = lambda figures: None,
) -> dict[str, Any]:
    """Figures of one size and variant; "skipped" has the reason where there are none, "failed" the error.

    seconds: no call is begun after so many.
    sample: file with a sample of eager's result, which eager writes.
    switches, chunk_rows: the generator's own where None; see the module.
    show: is called with the figures as far as they have come.
    """
    config = size.config()
    condition = random_condition(config, size.condition_tokens, device, dtype)
    flops = config.flops(condition.num_tokens, condition.batch_size)
    figures: dict[str, Any] = {}
    gc.collect()  # a compiled generator's cycles
    before = held_bytes(device)
    try:
        generator = make(config, str(device), dtype)
        generator.switches = switches or generator.switches
        if chunk_rows is not None:
            generator.chunk_bytes = chunk_rows * 4 * config.d_model * dtype.itemsize
        with variant(name, generator, condition) as run:
            figures |= timed(run, device, seconds, CALLS)
            figures["tflops"] = flops / figures["median_s"] / 1e12
            show(figures)
            figures |= _memory(run, generator, device, before)
            show(figures)
            _compare(figures, name, run(), sample)
            if name in PROFILED:
                show(figures)
                figures["profile"] = profile(run, device)
    except Unavailable as reason:
        figures = {"skipped": str(reason)}
    except torch.cuda.OutOfMemoryError as error:
        figures["failed"] = f"out of memory: {str(error).splitlines()[0]}"
    except Exception as error:  # one variant's trouble must not cost the others' figures
        figures["failed"] = told(error)
    return figures


def _compare(figures: dict[str, Any], name: str, result: list[Tensor], path: Path | None) -> None:
    if path is None:
        return
    device, few = result[0].device, sampled(result)
    if name == "eager":
        save_file({str(i): t.cpu() for i, t in enumerate(few)}, str(path))
    elif path.is_file():
        kept = load_file(str(path), str(device))
        expected = [kept[str(i)] for i in range(len(kept))]
        figures["difference_from_eager"] = relative_difference(few, expected)


def sampled(grids: list[Tensor]) -> list[Tensor]:
    """Evenly spread values of every layer of token grids ``[B, layers, ...]``: ``[B, layers, n]``."""
    step = max(1, sum(grid.numel() for grid in grids) // SAMPLE_VALUES)
    step += step > 1 and step % 2 == 0  # one that isn't even meets every column
    return [grid.flatten(2)[..., ::step].contiguous() for grid in grids]


def _memory(
    run: Callable[[], list[Tensor]],
    generator: ParameterGenerator,
    device: torch.device,
    before: int,
) -> dict[str, Any]:
    """Peak bytes of a call: in all, and beyond the generator's weights.

    In all counts everything that came after `before` was held: weights, the kept prefix, a graph's
    inputs and outputs (its intermediates lie in memory that is only reserved). Where blocks are
    offloaded some of their weights are in the peak, so that there is no figure beyond the weights.
    """
    weights = sum(
        t.nbytes
        for t in (*generator.parameters(), *generator.buffers())
        if t.device.type == device.type
    )
    if device.type == "cuda":
        peak = peak_bytes(run, device) - before
        over = None if generator.residency.offloaded else peak - weights
    else:
        over = peak_bytes(run, device)
        peak = weights + over
    return {"weights_bytes": weights, "peak_bytes": peak, "peak_over_weights_bytes": over}


def usual_dtype(device: torch.device) -> torch.dtype:
    """What is measured in: float32 on a CPU, elsewhere bfloat16."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def chosen(name: str, tiny: bool = False, blocks: int | None = None) -> Size:
    """A size by its name, shrunk or shortened."""
    size = SIZES[name].tiny() if tiny else SIZES[name]
    return size if blocks is None else size.shortened(blocks)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--variant", choices=VARIANTS)
    parser.add_argument("--errors", nargs="+", choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=60, help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="shrunk to almost nothing")
    parser.add_argument("--blocks", type=int, help="so many blocks instead of all")
    parser.add_argument("--off", nargs="+", default=[], metavar="PART")
    parser.add_argument("--on", nargs="+", default=[], metavar="PART")
    parser.add_argument("--chunk-rows", type=int)
    parser.add_argument("--reference", type=Path, help="a sample of eager's result")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(arguments)
    device = use(args.device)
    dtype = usual_dtype(device)
    if args.errors:
        write_json(args.json, errors(device, args.errors, dtype))
        return
    figures = measure(
        chosen(args.size, args.tiny, args.blocks), args.variant, device, dtype, args.seconds,
        args.reference, Switches().without(*args.off).also(*args.on), args.chunk_rows,
        lambda found: write_json(args.json, found),
    )  # fmt: skip
    write_json(args.json, figures)


if __name__ == "__main__":
    main()
