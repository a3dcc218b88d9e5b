"""The parts of the fast path on a GPU, switched off one by one: the second ten minutes on a device.

    python -m bench.switches --json FILE [--seconds 170]
    python -m bench.switches --device cpu --tiny --json FILE       for the tests

First, within three minutes: the official size at two blocks, in bf16 and in fp8, each a process of its own in
which all settings take turns (bench/interleaved.py): everything on, each part of `Switches` off, or on where it
is off until measured, other chunk sizes. Then, as far as there is time: the verdicts followed, at all blocks;
three kernels under Nsight Compute where it is installed and may count; blocks offloaded. The JSON is written
anew after each. A part is switched, off or on, only where the whole is faster for it by more than two
measurements of the same differ.
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
from .interleaved import AGAIN, BLOCKS, KEPT, SETTLE_S
from .measure import checked, course_options, write_json

#: Seconds in which a variant's settings take turns, and what its process may take beside them.
ROUNDS_S, BESIDE_S = {"ours": 35.0, "fp8": 25.0}, 30.0

#: Blocks of the official size: the kept prefix is most of one of them.
OFFICIAL_BLOCKS = 24

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
    """Settings and their figures, measured while there is time."""

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

    def interleaved(self, variant: str) -> None:
        """All settings of a variant, which take turns in one process; each kept under its name."""
        args = self._args
        beside = 5.0 if args.tiny else BESIDE_S + SETTLE_S
        seconds = 0.1 if args.tiny else min(ROUNDS_S[variant], self.left() - beside)
        if seconds <= 0:
            self.put(variant, {"skipped": f"{self.left():.0f} s were left"})
            return
        command = ["--variant", variant, "--device", args.device, "--seconds", f"{seconds:g}"]
        command += ["--parts", *(args.parts or parts(variant))]
        command += ["--no-chunks"] if args.parts else []
        found = isolated.call(
            "interleaved", [*command, *(["--tiny"] if args.tiny else [])], self.left()
        )
        if "failed" in found:
            self.put(variant, {name: found.get(name) for name in ("failed", "trace")})
        for name, one in found.get("settings", {}).items():
            self.put(f"{variant}: {name}", one)


def _told(found: dict[str, Any]) -> str:
    if "times" in found:
        return f"{1000 * found['median_s']:.4g} ms, {found['times']:.4f}x everything"
    if "median_s" in found:
        return f"{1000 * found['median_s']:.4g} ms"
    return str(found.get("skipped") or found.get("failed") or "measured")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All settings; returns what is written to the JSON."""
    course = Course(args)
    with clocks.course(args.json, course.figures):
        for variant in args.variants:
            course.interleaved(variant)
        course.figures["verdicts"] = verdicts(course.figures["settings"])
        if not args.parts:
            _whole(course, args)
    show(course.figures)
    return course.figures


def verdicts(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """``[{part, variant, times, keep, on}]``: how much slower the whole is without a part that is on, or with
    one that is off (see `bench.interleaved.settings`), and whether to keep it as it is.

    settings: ``{"VARIANT: SETTING": figures}`` of bench/interleaved.py.
    The prefix is told at all blocks, of which it is as much as it is of two.
    """
    made = []
    for key, found in settings.items():
        variant, _, name = key.partition(": ")
        again = settings.get(f"{variant}: {AGAIN}", {})
        if "times" not in found or "times" not in again:
            continue
        if name == KEPT:
            share = (1 - found["times"]) * BLOCKS / OFFICIAL_BLOCKS
            part, times = "keep_prefix", 1 / (1 - share)
        elif name.startswith(("without ", "with ")):
            part, times = name.partition(" ")[2], found["times"]
        else:
            continue
        # what costs less than the noise is kept: the reference says that it gains
        noise = max(abs(again["times"] - 1), again["spread"])
        keep = times + noise >= 1
        on = not name.startswith("with ")
        made.append({"part": part, "variant": variant, "times": times, "keep": keep, "on": on})
    return made


def _whole(course: Course, args: argparse.Namespace) -> None:
    """The best setting at all blocks, kernels under Nsight Compute, offloaded blocks."""
    changed = [v for v in course.figures["verdicts"] if not v["keep"]]
    for variant in args.variants:
        own = [v for v in changed if v["variant"] == variant]
        asked: list[str] = []
        for option, on in (("--off", True), ("--on", False)):
            names = [v["part"] for v in own if v["on"] == on]
            asked += [option, *names] if names else []
        if own:
            course.measure(f"{variant}: the best, all blocks", variant, *asked, longest=90)
    for kernel in KERNELS:
        if course.left() > 40:
            course.put(f"Nsight Compute: {kernel}", inspected(kernel, args, course.left()))
    if course.left() > 60:
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
        (v["variant"], v["part"], "on" if v["on"] else "off", f"{v['times']:.3f}x", verdict(v))
        for v in figures.get("verdicts", [])
    ]
    say()
    table(rows, ("variant", "part", "is", "the whole with it switched", "verdict"))


def verdict(found: dict[str, Any]) -> str:
    """What to do with a part: leave it as it is, or the other way round."""
    state, other = ("on", "off") if found["on"] else ("off", "on")
    return f"leave {state}" if found["keep"] else f"switch {other}"


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
