"""Copies from host memory that a host such as ComfyUI asks for: beside what computes, and page-locked.

    python -m bench.copies --json FILE
    python -m bench.copies --device cpu --tiny --json FILE         for the tests

offloaded   the official generator at two blocks, its layers' weights in page-locked memory, in turn: all on the
            device, each copied when it is asked for, one sublayer ahead (generator/speed/ahead.py)
uploads     a LoRA of the official size from pageable memory: as torch copies it, through two page-locked
            pieces (generator/speed/staging.py), and from page-locked memory

The same code as ComfyUI's nodes run, without ComfyUI. On a CPU there is nothing to copy: the course runs, and its
figures say nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hywu_core.cli.console import say, table
from hywu_core.generator.speed.ahead import Ahead, groups_of
from hywu_core.generator.speed.staging import staged

from .device import seconds_of, use
from .interleaved import summary as of_each_round
from .measure import checked, course_options, write_json
from .one import chosen, usual_dtype
from .sizes import make, random_condition

BLOCKS = 2

RESIDENT = "all on the device"

#: Bytes of the official LoRA.
LORA_BYTES = 176_512 * 4096 * 2


class Offloaded(nn.Linear):
    """A Linear whose weight may rest in host memory; layers.py asks it as it asks a host's."""

    ahead: Ahead | None = None

    def resolve(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.ahead is not None:
            found = self.ahead.values(self, like.device)
            return found["weight"], found["bias"]
        return tuple(v.to(like.device, non_blocking=True) for v in (self.weight, self.bias))


def _to_host(value: Tensor) -> nn.Parameter:
    host = value.cpu()
    return nn.Parameter(host.pin_memory() if value.is_cuda else host, requires_grad=False)


def offloaded(device: torch.device, tiny: bool, seconds: float) -> dict[str, Any]:
    """``{way: {median_s, times, ...}}``: times are ratios to all weights on the device, round by round."""
    size, dtype = chosen("official", tiny, BLOCKS), usual_dtype(device)
    generator = make(size.config(), str(device), dtype)
    condition = random_condition(generator.config, size.condition_tokens, device, dtype)
    layers = [m for m in generator.model.blocks.modules() if isinstance(m, nn.Linear)]
    here = [(layer.weight, layer.bias) for layer in layers]
    there = [tuple(map(_to_host, pair)) for pair in here]

    def placed(pairs: list, kind: type) -> None:
        for layer, (weight, bias) in zip(layers, pairs, strict=True):
            layer.__class__, layer.weight, layer.bias = kind, weight, bias

    def ahead() -> Any:
        placed(there, Offloaded)
        held = Ahead(groups_of(generator))
        for layer in layers:
            layer.ahead = held
        try:
            return generator.generate_grids(condition)
        finally:
            for layer in layers:
                del layer.ahead
            held.close()

    def way(pairs: list, kind: type) -> Callable[[], Any]:
        return lambda: (placed(pairs, kind), generator.generate_grids(condition))[1]

    ways = {RESIDENT: way(here, nn.Linear), "asked for": way(there, Offloaded), "ahead": ahead}
    grids = {name: run() for name, run in ways.items()}
    equal = all(
        torch.equal(a, b)
        for made in grids.values()
        for a, b in zip(made, grids[RESIDENT], strict=True)
    )
    rounds: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(rounds) < 3 or time.perf_counter() - start < seconds:
        rounds.append({name: seconds_of(run, device) for name, run in ways.items()})
    return {**of_each_round(rounds, RESIDENT), "equal": equal}


def uploads(device: torch.device, size: int, repeats: int = 4) -> dict[str, float]:
    """GB/s of each way; the last of several, since page-locked memory is made at the first."""
    pageable = [torch.ones(size // 8, dtype=torch.uint8) for _ in range(8)]
    ways: dict[str, Callable[[], Any]] = {
        "pageable": lambda: [value.to(device, copy=True) for value in pageable],
        "staged": lambda: staged(pageable, device),
    }
    if device.type == "cuda":
        pinned = [value.pin_memory() for value in pageable]
        ways["page-locked"] = lambda: [value.to(device, non_blocking=True) for value in pinned]
    found = {}
    for name, run in ways.items():
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found[name] = size / (time.perf_counter() - start) / 1e9
    return found


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Both; returns what is written to the JSON."""
    device = use(args.device)
    figures: dict[str, Any] = {"uploads": uploads(device, 1 << 16 if args.tiny else LORA_BYTES)}
    write_json(args.json, figures)
    figures["offloaded"] = offloaded(device, args.tiny, 0 if args.tiny else args.seconds)
    write_json(args.json, figures)
    say("\n".join(f"{name}: {gbs:.3g} GB/s" for name, gbs in figures["uploads"].items()))
    rows = [
        (name, f"{1000 * found['median_s']:.4g}", f"{found['times']:.3f}x")
        for name, found in figures["offloaded"].items()
        if name != "equal"
    ]
    table(rows, ("weights", "ms", "to all on the device"))
    say(f"the same bits: {'yes' if figures['offloaded']['equal'] else 'NO'}")
    return figures


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    course_options(parser)
    parser.set_defaults(seconds=20.0)
    return checked(parser, arguments)


if __name__ == "__main__":
    run(parse())
