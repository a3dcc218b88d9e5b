"""What the benchmarks share: paired timing, peak activation memory, peak resident memory, JSON."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

#: Both clocks of a repetition: what the user waits, and what the process computed for it. The second
#: hardly sees what else runs on the machine.
CLOCKS = {"wall_s": time.perf_counter, "cpu_s": time.process_time}

Times = dict[str, dict[str, list[float]]]


def paired(functions: dict[str, Callable[[], Any]], repeats: int) -> Times:
    """Seconds of each function by each clock, run in turn (a, b, a, b, ...) after one warm-up each.

    In turn, so that noise meets all alike. Ctrl-C ends it early and keeps the rounds that are done.
    Returns {function: {clock: [seconds] * repeats}}.
    """
    times: Times = {name: {clock: [] for clock in CLOCKS} for name in functions}
    for function in functions.values():
        function()
    try:
        for _ in tqdm(range(repeats), desc="pairs", unit="pair", leave=False):
            done = {name: _seconds(function) for name, function in functions.items()}
            for name, seconds in done.items():
                for clock, value in seconds.items():
                    times[name][clock].append(value)
    except KeyboardInterrupt:
        if not all(values for clocks in times.values() for values in clocks.values()):
            raise
    return times


def _seconds(function: Callable[[], Any]) -> dict[str, float]:
    start = {clock: read() for clock, read in CLOCKS.items()}
    function()
    return {clock: read() - start[clock] for clock, read in CLOCKS.items()}


def summary(times: Times, reference: str) -> dict[str, dict[str, dict[str, float]]]:
    """{function: {clock: figures}}: median, minimum, maximum, and how much faster than `reference`.

    speedup is the ratio of the two medians; paired_speedup the median of the repetitions' ratios.
    """
    return {
        name: {clock: _figures(values, times[reference][clock]) for clock, values in clocks.items()}
        for name, clocks in times.items()
    }


def _figures(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    ratios = [r / v for r, v in zip(reference, values, strict=True)]
    median = statistics.median(values)
    return {
        "median": median,
        "min": min(values),
        "max": max(values),
        "speedup": statistics.median(reference) / median,
        "paired_speedup": statistics.median(ratios),
    }


def peak_memory(function: Callable[[], Any]) -> int:
    """Most bytes that `function` holds at once on the CPU beyond what was there before.

    Counted from the allocator's own events, so the figure is exact and repeatable.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
    del result
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def course_options(parser: argparse.ArgumentParser) -> None:
    """--json, --device, --seconds and --tiny of a course on a device; see `checked`."""
    parser.add_argument("--json", type=Path, required=True, help="where all figures go")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=570, help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="every size shrunk to almost nothing")


def checked(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed arguments; exits with advice where the device isn't there."""
    args = parser.parse_args(arguments)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("this torch finds no CUDA device; `--device cpu --tiny` tries the course")
    return args


def environment() -> dict[str, Any]:
    """What the figures were taken with."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cuda": cuda,
    }


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    """Write `data` beside the environment; nothing where path is None."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": environment(), **data}, indent=2) + "\n")


def show_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Print figures as JSON, and write the same to a file where one is named."""
    text = json.dumps(figures, indent=2)
    print(text)
    if path:
        path.write_text(text + "\n", encoding="utf-8")
