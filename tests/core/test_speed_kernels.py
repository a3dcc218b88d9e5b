"""Triton kernels against torch, in Triton's interpreter: no GPU is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("speed_kernels_in_interpreter.py")


def test_kernels_compute_what_torch_computes():
    pytest.importorskip("triton", reason="Triton comes with torch on Linux x86 only")
    # Triton looks at the variable when it is imported, so the comparison is a process of its own
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = str(SCRIPT.parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    checked = done.stdout.split()
    assert checked == ["rms_norm", "rotate", "quantize_rows", "generator"]
