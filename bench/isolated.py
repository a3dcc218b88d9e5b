"""A measurement in a process of its own: what an error leaves behind on the device ends with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def call(
    module: str, arguments: list[str], seconds: float, blocking: bool = False
) -> dict[str, Any]:
    """The JSON of ``python -m bench.MODULE ARGUMENTS --json FILE``, as far as it got.

    seconds: after so many it is ended.
    blocking: errors come where they happen (CUDA_LAUNCH_BLOCKING), which is slow.
    Where it fails, "failed" tells how, with the end of what it wrote to standard error under "trace";
    "process_s" is how long it took, start included.
    """
    started = time.perf_counter()
    environment = {**os.environ, **({"CUDA_LAUNCH_BLOCKING": "1"} if blocking else {})}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, "-m", f"bench.{module}", *arguments, "--json", str(path)]
        reason = trace = ""
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=max(1.0, seconds),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            trace = done.stderr.decode(errors="replace")
            if done.returncode:
                reason = _reason(trace, done.returncode)
        except subprocess.TimeoutExpired as error:
            reason = f"ended after {seconds:.0f} s"
            trace = (error.stderr or b"").decode(errors="replace")
        try:
            figures = json.loads(path.read_text())
        except (OSError, ValueError):
            figures = {}
    if reason:
        figures.setdefault("failed", reason)
        figures["trace"] = trace[-1500:]
    figures["process_s"] = round(time.perf_counter() - started, 2)
    return figures


def _reason(trace: str, code: int) -> str:
    lines = [line for line in trace.strip().splitlines() if line.strip()]
    return f"failed: exit code {code}: {lines[-1][:200] if lines else ''}"
