"""Number formats: which a device multiplies fast, which values that are computed with may have."""

from __future__ import annotations

import torch
from torch import Tensor

#: Of values that are computed with.
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


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
