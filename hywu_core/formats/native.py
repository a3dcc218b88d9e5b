"""Our own format: the generator's buffers as they are, with layout and provenance in the header."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import HYWUError
from ..files import check_fields, save_tensors
from ..layout import LoRALayout
from ..lora import GeneratedLoRA
from ..precision import FLOATS, widened

FORMAT = "hywu-lora-1"


def header_of(lora: GeneratedLoRA, format: str) -> dict[str, Any]:
    """JSON-safe metadata that every format of ours carries."""
    return {
        "format": format,
        "batch_size": lora.batch_size,
        "rank": lora.rank,
        "alpha": lora.layout.alpha,
        "layout": lora.layout.to_json(),
        "layout_digest": lora.layout.digest,
        "provenance": dict(lora.provenance),
    }


def layout_of(header: Mapping[str, Any]) -> LoRALayout:
    """The header's layout. Raises HYWUError when it is damaged, was reordered or contradicts itself."""
    try:
        layout, recorded = LoRALayout.from_json(header["layout"]), header["layout_digest"]
    except KeyError as error:
        raise HYWUError(f"the LoRA's header lacks {error}; save it again.") from error
    check_fields(header, {"provenance": dict, "batch_size": int}, "the LoRA's header")
    for name, value in (("rank", layout.rank), ("alpha", layout.alpha)):
        if header.get(name, value) != value:
            raise HYWUError(
                f"the header says {name} {header[name]!r}, the layout in it {value!r}; use the original file."
            )
    if layout.digest != recorded:
        raise HYWUError(
            f"the layout's modules are in another order than when the file was written (hash "
            f"{layout.digest}, recorded {recorded}); use the original file."
        )
    return layout


def save(lora: GeneratedLoRA, path: Path, overwrite: bool) -> Path:
    if lora.grids:
        tensors = {f"grid.{s}": grid for s, grid in enumerate(lora.grids)}
    else:
        tensors = {f"factor.{s}.{m}.{side}": v for (s, m, side), v in lora.factors.items()}
    return save_tensors(path, tensors, header_of(lora, FORMAT), overwrite)


def load(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> GeneratedLoRA:
    layout, provenance = layout_of(header), header.get("provenance") or {}
    tensors = {name: widened(value) for name, value in tensors.items()}
    for name, value in tensors.items():
        if value.dtype not in FLOATS:
            raise HYWUError(
                f"{name} is {value.dtype}, and a LoRA's values are floating point; use the original file."
            )
    try:
        if "grid.0" in tensors:
            names = [f"grid.{s}" for s in range(len(layout.stacks))]
            lora = GeneratedLoRA.from_grids(layout, [tensors[n] for n in names], provenance)
        else:
            keys = [
                (s, m, side)
                for s, stack in enumerate(layout.stacks)
                for m in range(len(stack.modules))
                for side in "AB"
            ]
            names = ["factor." + ".".join(map(str, key)) for key in keys]
            factors = dict(zip(keys, (tensors[n] for n in names), strict=True))
            lora = GeneratedLoRA(layout, factors, provenance)
    except KeyError as error:
        raise HYWUError(f"the LoRA file lacks the tensor {error}; save it again.") from error
    if more := sorted(tensors.keys() - set(names)):
        raise HYWUError(f"the LoRA file holds {more[0]}, which its layout has no place for.")
    if header.get("batch_size", lora.batch_size) != lora.batch_size:
        raise HYWUError(
            f"the header says batch_size {header['batch_size']!r}, the tensors hold {lora.batch_size} LoRAs; "
            "use the original file."
        )
    return lora
