"""First contact with a GPU: what works, how fast, and what to decide from it, in at most ten minutes.

    python -m bench.first_contact --json FILE [--seconds 570]
    python -m bench.first_contact --device cpu --tiny --json FILE    the whole course on a CPU, for the tests

It needs torch, triton, numpy, safetensors, Pillow, tqdm and pytest, no ComfyUI. In this order, each in a
process of its own, clocks and power logged beside it, the JSON written anew after each:

1. probe: the parts of a generation one by one (bench/probe.py): rates in bursts and sustained, kernels,
   attention on each backend, products, the official vectors
2. waits: the tests that nothing between condition and applied LoRA waits for the device
3. the official size, plain eager and ours
4. the official size in fp8
5. official without experts, Flux-size, bundled (with a CUDA graph), offloaded

The end is a list of decisions, each with the figures it follows from; `decide` makes it again from the
JSON. bench/switches.py is the second ten minutes, bench/on_device.py the third.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hywu_core.cli.console import say, table

from . import clocks, isolated, probe
from .decisions import decisions
from .measure import checked, course_options, write_json

#: (size, variant, seconds it may calculate, seconds it is worth waiting for in all)
OFFICIAL = (("official", "eager", 40, 110), ("official", "ours", 30, 90))
FP8 = (("official", "fp8", 25, 90),)
OTHERS = (
    ("official_dense", "eager", 3, 40),
    ("official_dense", "ours", 3, 40),
    ("flux", "ours", 2, 30),
    ("bundled", "ours", 1, 30),
    ("bundled", "graph", 1, 30),
    ("official", "offloaded", 15, 90),
)

#: Longest time of the probe and of the tests.
PROBE_S, WAITS_S = 130, 70

#: The tests that say whether anything waits for the device.
WAITS = ("tests/core/test_speed_fast.py", "never_waits")


class Course:
    """The figures so far, the time that is left, and the file they go to."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.figures = path, {"measured": {}}
        self._end = time.perf_counter() + seconds
        self._start = time.perf_counter()

    def left(self) -> float:
        return self._end - time.perf_counter()

    def put(self, name: str, result: Any) -> None:
        """Keep a result under a name such as ``probe`` or ``official/ours``, and say so."""
        target = self.figures["measured"] if "/" in name else self.figures
        target[name] = result
        write_json(self.path, self.figures)
        spent = time.perf_counter() - self._start
        reason = isinstance(result, dict) and (result.get("failed") or result.get("skipped"))
        say(f"[{spent:5.0f} s] {name}{f': {reason}' if reason else ''}")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, the device's own description, and whether Triton finds a compiler."""
    import shutil
    import sysconfig

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "compiler": shutil.which("gcc") or shutil.which("cc"),
        "python_header": (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
        "cudnn": torch.backends.cudnn.version(),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "cache_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "driver": clocks.driver(),
        }
    return found


def probed(course: Course, device: str, tiny: bool, names: Sequence[str]) -> None:
    """The probe; where an error ends its process, it goes on behind the check that failed."""
    done: dict[str, Any] = {}
    end = time.perf_counter() + min(PROBE_S, course.left())
    while len(done) < len(names) and end - time.perf_counter() > 5:
        arguments = ["--device", device, "--only", *names, "--skip", *done]
        found = isolated.call(
            "probe", [*arguments, *(["--tiny"] if tiny else [])], end - time.perf_counter()
        )
        new = found.get("checks", {})
        if not new:  # it ended within the first of them
            following = next(name for name in names if name not in done)
            new = {following: {k: found[k] for k in ("failed", "trace") if k in found}}
        done |= new
        course.put("probe", done)


def waits(course: Course, device: torch.device) -> None:
    """The tests in which CUDA itself finds what waits."""
    if device.type != "cuda":
        course.put("waits", {"skipped": "CUDA alone detects what waits for a device"})
        return
    file, words = WAITS
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", words]
    try:
        done = subprocess.run(
            command, cwd=isolated.ROOT, capture_output=True, text=True, timeout=WAITS_S
        )
        tail = done.stdout.strip().splitlines()
        result = {"passed": done.returncode == 0, "summary": tail[-1] if tail else ""}
        if done.returncode:
            result |= {"failed": tail[-1] if tail else "failed", "trace": done.stdout[-3000:]}
    except subprocess.TimeoutExpired:
        result = {"failed": f"ended after {WAITS_S} s"}
    course.put("waits", result)


def measured(
    course: Course,
    items: Sequence[tuple[str, str, float, float]],
    options: Sequence[str],
    sample_of: Callable[[str], Path],
) -> None:
    """Sizes and variants, each in a process of its own while there is time."""
    for size, variant, seconds, longest in items:
        name = f"{size}/{variant}"
        if course.left() < min(20.0, longest):
            course.put(name, {"skipped": f"{course.left():.0f} s were left"})
            continue
        arguments = ["--size", size, "--variant", variant, "--seconds", str(seconds)]
        arguments += ["--reference", str(sample_of(size)), *options]
        result = isolated.call("one", arguments, min(longest, course.left()))
        if "failed" in result and "out of memory" not in result["failed"] and course.left() > 60:
            again = isolated.call("one", arguments, min(60.0, course.left()), blocking=True)
            result["failed_at"] = again.get("failed", "not with CUDA_LAUNCH_BLOCKING=1")
        course.put(name, result)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All steps; returns what is written to the JSON."""
    device = torch.device(args.device)
    course = Course(args.json, args.seconds)
    options = ["--device", args.device, *(["--tiny"] if args.tiny else [])]
    course.figures["environment"] = environment(device)
    with tempfile.TemporaryDirectory() as folder, clocks.course(args.json, course.figures):
        for step in _steps(course, args, device, options, Path(folder)):
            step()
    course.figures["decisions"] = decisions(course.figures)
    write_json(args.json, course.figures)
    show(course.figures)
    return course.figures


def _steps(
    course: Course,
    args: argparse.Namespace,
    device: torch.device,
    options: list[str],
    folder: Path,
) -> Iterator[Callable[[], None]]:
    def sample_of(size: str) -> Path:
        return folder / f"{size}.safetensors"

    names = args.checks or list(probe.CHECKS)
    yield lambda: probed(course, args.device, args.tiny, names)
    yield lambda: waits(course, device)
    for items in (OFFICIAL, FP8, OTHERS):
        chosen = [item for item in items if not args.only or f"{item[0]}/{item[1]}" in args.only]
        yield lambda chosen=chosen: measured(course, chosen, options, sample_of)


def show(figures: dict[str, Any]) -> None:
    """The measured sizes, and the decisions."""
    rows = []
    for name, found in figures["measured"].items():
        if "median_s" not in found:
            reason = found.get("failed") or found.get("skipped") or ""
            rows.append((name, "", "", "", reason[:60]))
            continue
        over, off = found.get("peak_over_weights_bytes"), found.get("difference_from_eager")
        rows.append(
            (
                name,
                f"{1000 * found['median_s']:.4g}",
                f"{found['tflops']:.3g}",
                "" if over is None else f"{over / 1e9:.3g}",
                "" if off is None else f"{off:.1e}",
            )
        )
    say()
    table(rows, ("size and variant", "median ms", "TFLOP/s", "GB over weights", "off eager"))
    say()
    table(
        [(d["question"], d["answer"], d["because"]) for d in figures["decisions"]],
        ("decision", "answer", "because"),
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    course_options(parser)
    parser.add_argument("--only", nargs="+", metavar="SIZE/VARIANT", help="instead of all of them")
    parser.add_argument("--checks", nargs="+", choices=probe.CHECKS, metavar="NAME")
    parser.add_argument(
        "--decide",
        action="store_true",
        help="measure nothing: decide anew from --json (with --device cpu where there is no other)",
    )
    return checked(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if not args.decide:
        run(args)
        return
    figures = json.loads(args.json.read_text())
    figures["decisions"] = decisions(figures)
    show(figures)


if __name__ == "__main__":
    main()
