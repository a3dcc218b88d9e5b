"""What the device does beside a measurement: clocks, power and temperature, twice per second."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hywu_core.cli.console import say

from .measure import write_json

#: What nvidia-smi is asked; a reason for lower clocks is a bit of the last one.
QUERY = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
INTERVAL_MS = 500


@contextlib.contextmanager
def logged(into: dict[str, Any]) -> Iterator[None]:
    """Inside, the device is watched; at the end `into` has the samples and what they amount to.

    Where there is no nvidia-smi it says so.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        into["clocks"] = {"skipped": "there is no nvidia-smi here"}
        yield
        return
    with tempfile.TemporaryFile("w+") as file:
        watch = subprocess.Popen(
            [program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", "-lms",
             str(INTERVAL_MS)],
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield
        finally:
            watch.terminate()
            watch.wait()
            file.seek(0)
            into["clocks"] = summary(file.read())


@contextlib.contextmanager
def course(path: Path, figures: dict[str, Any]) -> Iterator[None]:
    """The block of a course: the device is watched, Ctrl-C ends it, and at its end `figures` are written."""
    watched: dict[str, Any] = {}
    with logged(watched):
        try:
            yield
        except KeyboardInterrupt:
            say("Stopped; what was measured is kept.")
    figures |= watched
    write_json(path, figures)


def driver() -> str | None:
    """The driver's version, None where nvidia-smi doesn't tell."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def summary(text: str) -> dict[str, Any]:
    """Samples of nvidia-smi's lines, and the median and range of each column."""
    names = ("sm_mhz", "memory_mhz", "watts", "celsius")
    samples, reasons = [], set()
    for line in text.splitlines():
        if line.count(",") < 5:
            continue  # it was being written
        cells = [cell.strip() for cell in line.split(",")]
        try:
            stamp, *numbers, reason = cells[:6]
            samples.append([stamp, *map(float, numbers)])
        except ValueError:
            continue  # a column that this driver doesn't know
        reasons.add(reason)
    figures: dict[str, Any] = {"samples": samples, "reasons": sorted(reasons)}
    for i, name in enumerate(names, 1):
        values = [sample[i] for sample in samples]
        if values:
            figures[name] = {
                "median": statistics.median(values), "min": min(values), "max": max(values),
            }  # fmt: skip
    return figures
