"""Number formats: which a device multiplies fast, which values that are computed with may have."""

from __future__ import annotations

import torch
from torch import Tensor

#: Of values that are computed with.
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

#: How safetensors names the types that are read.
DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8,
    "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
#: ... and the other way.
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def widened(values: Tensor) -> Tensor:
    """8-bit floating point as bfloat16, which holds each of its values: little can be computed with it."""
    return values.to(torch.bfloat16) if str(values.dtype).startswith("torch.float8") else values


def usual_precision(device: str | None = None) -> str:
    """ "bf16" where the device (default: a GPU, if there is one) multiplies bfloat16 in hardware, else
    "no": a CPU that emulates it takes many times as long as in float32.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    # torch has no public way to ask; a CPU of which these say nothing does well in float32
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if name == "cpu" else ()
    return "bf16" if any(getattr(torch.cpu, each, bool)() for each in asked) else "no"
