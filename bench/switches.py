"""The parts of the fast path on a GPU, switched off one by one: the second ten minutes on a device.

    python -m bench.switches --json FILE [--seconds 570]
    python -m bench.switches --device cpu --tiny --json FILE       for the tests

On the official size with a few blocks (every block asks for the same), each setting a process of its own:
everything on, each part of `Switches` off, other chunk sizes; then the parts that cost more than they gain
off, at all blocks; then three kernels under Nsight Compute where it is installed and may count; then
blocks offloaded. The JSON is written anew after each. A part is worth keeping where it makes the whole at
least so much faster that the two measurements of everything don't differ by more.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hywu_core.cli.console import say, table
from hywu_core.generator.speed.passes import Switches

from . import clocks, isolated
from .measure import checked, course_options, write_json

#: Blocks of the short runs: the first has no prefix where it is kept.
BLOCKS = 3

#: Rows of a chunk beside the usual 16,896: two layers, three layers, six waves of tiles.
CHUNK_ROWS = (11_032, 16_548, 25_344)

#: Kernels looked at closely, by what their names have in common.
KERNELS = ("_across", "_rotate", "_rms_norm")

METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "launch__registers_per_thread",
)


def parts(variant: str) -> list[str]:
    """The switches that a variant's products have to do with."""
    names = [field.name for field in dataclasses.fields(Switches)]
    eight = [name for name in names if name.startswith("fp8_")]
    return eight if variant == "fp8" else [name for name in names if name not in eight]


class Course:
    """Settings, each measured in a process of its own while there is time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._end = args, time.perf_counter() + args.seconds
        self.figures: dict[str, Any] = {"settings": {}}

    def left(self) -> float:
        return self._end - time.perf_counter()

    def measure(self, name: str, variant: str, *more: str, longest: float = 60) -> dict[str, Any]:
        """Figures of one setting, kept under its name."""
        if self.left() < 15:
            found: dict[str, Any] = {"skipped": f"{self.left():.0f} s were left"}
        else:
            command = ["--size", "official", "--variant", variant, "--device", self._args.device]
            command += ["--seconds", "2", *more, *(["--tiny"] if self._args.tiny else [])]
            found = isolated.call("one", command, min(longest, self.left()))
        found.pop("profile", None)
        self.put(name, found)
        return found

    def put(self, name: str, found: Any) -> None:
        self.figures["settings"][name] = found
        write_json(self._args.json, self.figures)
        say(f"[{self.left():4.0f} s left] {name}: {_told(found)}")

    def seconds(self, name: str) -> float | None:
        return self.figures["settings"].get(name, {}).get("median_s")


def _told(found: dict[str, Any]) -> str:
    if "median_s" in found:
        return f"{1000 * found['median_s']:.4g} ms"
    return str(found.get("skipped") or found.get("failed") or "measured")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All settings; returns what is written to the JSON."""
    course, short = Course(args), ["--blocks", str(BLOCKS)]
    watched: dict[str, Any] = {}
    with clocks.logged(watched):
        try:
            for variant in args.variants:
                course.measure(f"{variant}: everything", variant, *short)
                for part in args.parts or parts(variant):
                    course.measure(f"{variant}: without {part}", variant, *short, "--off", part)
                course.measure(f"{variant}: everything again", variant, *short)
            for rows in () if args.parts else CHUNK_ROWS:
                name = f"ours: chunks of {rows} rows"
                course.measure(name, "ours", *short, "--chunk-rows", str(rows))
            course.figures["verdicts"] = verdicts(course, args)
            if not args.parts:
                _whole(course, args)
        except KeyboardInterrupt:
            say("Stopped; what was measured is kept.")
    course.figures |= watched
    write_json(args.json, course.figures)
    show(course.figures)
    return course.figures


def verdicts(course: Course, args: argparse.Namespace) -> list[dict[str, Any]]:
    """``[{part, variant, times, keep}]``: how much slower the whole is without a part."""
    made = []
    for variant in args.variants:
        one, again = (course.seconds(f"{variant}: everything{w}") for w in ("", " again"))
        if one is None:
            continue
        usual = min(one, again or one)
        noise = max(one, again or one) / usual
        for part in args.parts or parts(variant):
            without = course.seconds(f"{variant}: without {part}")
            if without is not None:
                times = without / usual
                # what costs less than the noise is kept: the reference says that it gains
                made.append(
                    {"part": part, "variant": variant, "times": times, "keep": times * noise >= 1}
                )
    return made


def _whole(course: Course, args: argparse.Namespace) -> None:
    """The best setting at all blocks, kernels under Nsight Compute, offloaded blocks."""
    worse = [v["part"] for v in course.figures["verdicts"] if not v["keep"]]
    off = ["--off", *worse] if worse else []
    for variant in args.variants:
        course.measure(f"{variant}: the best, all blocks", variant, *off, longest=90)
    for kernel in KERNELS:
        if course.left() > 40:
            course.put(f"Nsight Compute: {kernel}", inspected(kernel, args, course.left()))
    course.measure("offloaded, all blocks", "offloaded", longest=90)


def inspected(kernel: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What Nsight Compute counts of one launch of a kernel."""
    program = shutil.which("ncu")
    if program is None:
        return {"skipped": "there is no ncu here"}
    with tempfile.TemporaryDirectory() as folder:
        command = [
            program, "--kernel-name", f"regex:{kernel}", "--launch-count", "1", "--metrics",
            ",".join(METRICS), sys.executable, "-m", "bench.one", "--size", "official", "--variant",
            "ours", "--blocks", "1", "--seconds", "0", "--device", args.device,
            "--json", str(Path(folder) / "figures.json"),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, cwd=isolated.ROOT, capture_output=True, text=True,
                timeout=min(90.0, seconds),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"failed": "ended after its time"}
    found = counted(done.stdout)
    return found or {"failed": (done.stdout + done.stderr).strip()[-300:]}


def counted(text: str) -> dict[str, str]:
    """The metrics in what Nsight Compute prints: name -> value with its unit."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"\s*(\S+)\s+(\S.*?)?\s+([\d,.]+)\s*$", line)
        if match and match.group(1) in METRICS:
            found[match.group(1)] = f"{match.group(3)} {match.group(2) or ''}".strip()
    return found


def show(figures: dict[str, Any]) -> None:
    rows = [
        (v["variant"], v["part"], f"{v['times']:.3f}x", "keep" if v["keep"] else "switch off")
        for v in figures.get("verdicts", [])
    ]
    say()
    table(rows, ("variant", "part", "the whole without it", "verdict"))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    course_options(parser)
    parser.add_argument("--variants", nargs="+", choices=("ours", "fp8"), default=["ours", "fp8"])
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these, at a few blocks")
    return checked(parser, arguments)


if __name__ == "__main__":
    run(parse())
