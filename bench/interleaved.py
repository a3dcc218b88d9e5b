"""Settings of the fast path at a few blocks, measured in turn in one process: which part gains what.

    python -m bench.interleaved --variant ours --seconds 30 --json FILE [--parts PART ...] [--no-chunks]

A card that heats lowers its clock, so settings measured one after another are judged by their place in the
order. Here the device works until its clock has settled; then each round calls every setting once, begun at
another one each time, and what counts is the median of a setting's ratios to "everything" of the same round.
"everything again" is the same setting once more: how far it is from 1 is what the measurement can't tell.

No setting keeps the constant prefix, so that each block asks for the same, but "prefix kept".
bench/switches.py calls it for each variant.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hywu_core import Condition, ParameterGenerator
from hywu_core.generator.speed.passes import Switches
from hywu_core.generator.speed.prefix import Kept

from .device import seconds_of, use
from .measure import write_json
from .one import chosen, usual_dtype
from .sizes import make, random_condition
from .variants import VARIANTS

#: Blocks: each asks for the same.
BLOCKS = 2

#: (rows of a chunk, in whole waves of tiles): even chunks of two and of three layers, two, four and six waves.
CHUNKS = ((11_032, False), (16_548, False), (8_448, True), (16_896, True), (25_344, True))

#: Seconds of work before anything counts.
SETTLE_S = 4.0

#: "everything" is all parts that are on by themselves.
PLAIN, AGAIN, KEPT = "everything", "everything again", "prefix kept"


@dataclasses.dataclass
class Setting:
    """A way to run the generator; what it keeps is its own, so that settings may take turns."""

    off: tuple[str, ...] = ()
    on: tuple[str, ...] = ()
    chunk_rows: int | None = None
    keeps: bool = False
    prefixes: Kept = dataclasses.field(default_factory=lambda: Kept(only_last=True))

    def apply(self, generator: ParameterGenerator, itemsize: int) -> None:
        rows, width = self.chunk_rows, generator.config.d_model
        generator.switches = Switches().without(*self.off).also(*self.on)
        generator.chunk_bytes = None if rows is None else rows * 4 * width * itemsize
        generator.prefix_cache_bytes = None if self.keeps else 0
        generator.prefixes = self.prefixes


def settings(parts: Sequence[str], chunks: bool) -> Iterator[tuple[str, Setting]]:
    """Every setting by its name; ``keep_prefix`` and what is off by itself are tried by doing it."""
    yield PLAIN, Setting()
    for part in parts:
        if part == "keep_prefix":
            yield KEPT, Setting(keeps=True)
        elif getattr(Switches(), part):
            yield f"without {part}", Setting((part,))
        else:
            yield f"with {part}", Setting(on=(part,))
    for rows, waves in CHUNKS if chunks else ():
        name = f"chunks of {rows} rows" + ("" if waves else ", even")
        yield name, Setting(() if waves else ("waves",), chunk_rows=rows)
    yield AGAIN, Setting()


def measure(
    generator: ParameterGenerator,
    condition: Condition,
    run: Callable[[], Any],
    tried: dict[str, Setting],
    seconds: float,
    show: Callable[[dict[str, Any]], None] = lambda figures: None,
) -> dict[str, Any]:
    """``{setting: {median_s, times, spread, rounds} | {failed}}``.

    seconds: no round is begun after so many; at least three are done.
    show: is called with the figures after each round.
    times is the median ratio to `PLAIN` of the same round, spread half the distance of its quartiles.
    """
    device, itemsize = condition.device, generator.model.norm_input.weight.element_size()
    failed: dict[str, Any] = {}

    def call(name: str) -> float:
        tried[name].apply(generator, itemsize)
        return seconds_of(run, device)

    for name in tried:  # kernels are built, prefixes made
        try:
            call(name)
        except Exception as error:  # one setting's trouble must not cost the others' figures
            sys.stderr.write("".join(traceback.format_exception(error)))
            failed[name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    names = [name for name in tried if name not in failed]
    if PLAIN not in names:
        return failed
    start = time.perf_counter()
    while device.type == "cuda" and time.perf_counter() - start < SETTLE_S:
        call(PLAIN)
    rounds: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(rounds) < 3 or time.perf_counter() - start < seconds:
        first = 5 * len(rounds) % len(names)  # neighbours change as well as places
        order = names[first:] + names[:first]
        rounds.append({name: call(name) for name in (order, order[::-1])[len(rounds) % 2]})
        show(summary(rounds) | failed)
    return summary(rounds) | failed


def summary(rounds: Sequence[dict[str, float]], plain: str = PLAIN) -> dict[str, Any]:
    """Figures of each setting from the seconds of every round; see `measure`. Ratios are to `plain`."""
    found = {}
    for name in rounds[0]:
        ratios = [each[name] / each[plain] for each in rounds]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        found[name] = {
            "median_s": statistics.median(each[name] for each in rounds),
            "times": statistics.median(ratios),
            "spread": (quartiles[2] - quartiles[0]) / 2,
            "rounds": len(rounds),
        }
    return found


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", choices=("ours", "fp8"), required=True)
    parser.add_argument("--parts", nargs="*", default=[], metavar="PART", help="each off once")
    parser.add_argument("--no-chunks", action="store_true", help="no other sizes of chunks")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=30, help="default: %(default)s")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="shrunk to almost nothing")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(arguments)
    device = use(args.device)
    size, dtype = chosen("official", args.tiny, args.blocks), usual_dtype(device)
    generator = make(size.config(), str(device), dtype)
    condition = random_condition(generator.config, size.condition_tokens, device, dtype)
    run = VARIANTS[args.variant](generator, condition)
    tried = dict(settings(args.parts, not args.no_chunks))
    found = measure(
        generator, condition, run, tried, args.seconds,
        lambda figures: write_json(args.json, {"settings": figures}),
    )  # fmt: skip
    write_json(args.json, {"settings": found})


if __name__ == "__main__":
    main()
