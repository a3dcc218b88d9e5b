"""Which number format a device multiplies fast."""

from __future__ import annotations

import torch


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
