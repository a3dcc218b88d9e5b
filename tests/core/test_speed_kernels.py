"""Triton kernels against torch, in Triton's interpreter: no GPU is needed for that."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
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
    names = "rms_norm several adding rotate across quantize_rows generator fp8"
    assert checked == names.split()


NORM = {
    "HAS_BIAS": False, "HAS_PENDING": False, "HAS_ADDED": False, "QUANTIZE": False, "LIMIT": 448.0,
    "ROWS": 1, "BLOCK": 4096,
}  # fmt: skip
WAITING = {**NORM, "HAS_PENDING": True}
ACROSS = {"N": 32, "NB": 32, "PAIRS": 64}
ROWS = {"LIMIT": 448.0, "SILU": False}

#: (kernel, arguments known when it is built, warps): as passes.py calls them at the official size and at
#: small ones; Triton builds a 1 in, too.
KERNELS = [
    ("_rms_norm", {**NORM, "HAS_BIAS": True}, 8),
    ("_rms_norm", WAITING, 8),
    ("_rms_norm", {**WAITING, "QUANTIZE": True}, 8),
    ("_rms_norm", {**WAITING, "QUANTIZE": True, "HAS_ADDED": True}, 8),
    ("_rms_norm", {**WAITING, "ROWS": 4}, 8),
    ("_rms_norm", {**NORM, "HAS_BIAS": True, "ROWS": 4}, 8),
    ("_rms_norm", {**WAITING, "QUANTIZE": True, "HAS_ADDED": True, "ROWS": 4}, 8),
    ("_rms_norm", {**NORM, "BLOCK": 64, "size2": 1}, 1),
    ("_rotate", {"HEADS": 16, "PAIRS": 64}, 4),
    ("_rotate", {"HEADS": 8, "PAIRS": 16, "size1": 1}, 4),
    ("_rotate_wide", {"HEADS": 32, "PAIRS": 64}, 4),
    ("_rotate_wide", {"HEADS": 16, "PAIRS": 8, "size1": 1}, 4),
    ("_across", ACROSS, 4),
    ("_across", {"N": 5, "NB": 16, "PAIRS": 8}, 4),
    ("_across_quantized", {**ACROSS, "LIMIT": 448.0, "HEADS": 32}, 4),
    ("_quantize_rows", {**ROWS, "DIM": 16384, "BLOCK": 16384, "SILU": True}, 16),
    ("_quantize_rows", {**ROWS, "DIM": 4096, "BLOCK": 4096}, 8),
]

#: What a signature says of the arguments' types; the rest are numbers.
POINTERS = {
    **dict.fromkeys(("x", "weight", "bias", "added", "qkv", "between"), "*bf16"),
    **dict.fromkeys(("first", "second", "scales", "pending"), "*fp32"),
    **dict.fromkeys(("eps", "scale"), "fp32"),
}

#: Strides and widths that are multiples of 16 at the sizes that matter, which Triton makes use of.
MULTIPLES = ("stride0", "stride1", "stride2", "stride_head", "dim")


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize(("name", "constants", "warps"), KERNELS)
def test_kernels_build_for_real_devices_and_keep_to_the_registers(
    name, constants, warps, capability
):
    """With the compiler and assembler that Triton brings; the interpreter knows neither."""
    triton = pytest.importorskip("triton", reason="Triton comes with torch on Linux x86 only")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("Triton's own interface for compiling without a device changed in 3.3")
    quantizes = constants.get("QUANTIZE") or name in ("_quantize_rows", "_across_quantized")
    if quantizes and capability < 89:
        pytest.skip("e4m3 needs compute capability 8.9; fp8.py takes torch below it")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hywu_core.generator.speed import attention_kernels, kernels

    kernel = getattr(kernels, name, None) or getattr(attention_kernels, name)
    types = {**POINTERS, "out": "*fp8e4nv" if quantizes else "*bf16"}
    signature = {
        a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(kernel.arg_names)
        if signature[a].startswith("*") or (a in MULTIPLES and a not in constants)
    }
    built = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )
    assert built.asm["cubin"]
    assert built.metadata.shared <= 99 << 10  # what the smallest of them gives a program
    assert spilled(built.asm["ptx"], capability) == 0


def spilled(ptx: str, capability: int) -> int:
    """Bytes that registers don't hold, as the assembler tells them."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    target = re.search(r"\.target (sm_\w+)", ptx).group(1)
    assembler = tools / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [assembler, "-v", f"-arch={target}", source, "-o", Path(folder) / "kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", done.stderr)))
