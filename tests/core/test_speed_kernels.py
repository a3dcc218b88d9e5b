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


#: (kernel, arguments known when it is built): how layers.py calls them; Triton builds a 1 in, too.
KERNELS = [
    ("_rms_norm", {"HAS_BIAS": True, "BLOCK": 4096}),
    ("_rms_norm", {"HAS_BIAS": False, "BLOCK": 64, "size2": 1}),
    ("_rotate", {"HEADS": 16, "PAIRS": 64}),
    ("_rotate", {"HEADS": 8, "PAIRS": 16, "size1": 1}),
    ("_quantize_rows", {"DIM": 16384, "LIMIT": 448.0, "BLOCK": 4096}),
]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "constants"), KERNELS)
def test_kernels_build_for_real_devices(name, constants, capability):
    """With the compiler and assembler that Triton brings; the interpreter knows neither."""
    triton = pytest.importorskip("triton", reason="Triton comes with torch on Linux x86 only")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("Triton's own interface for compiling without a device changed in 3.3")
    if name == "_quantize_rows" and capability < 89:
        pytest.skip("e4m3 needs compute capability 8.9; fp8.py takes torch below it")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hywu_core.generator.speed import kernels

    kernel = getattr(kernels, name)
    types = {"first": "*fp32", "second": "*fp32", "scales": "*fp32", "eps": "fp32"}
    types |= dict.fromkeys(("x", "weight", "bias"), "*bf16") | {"out": "*bf16"}
    if name == "_quantize_rows":
        types["out"] = "*fp8e4nv"
    signature = {
        a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names
    }
    built = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
    )
    assert built.asm["cubin"]
