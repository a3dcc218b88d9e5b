"""Quantized matrices in a folder: of `hywu hunyuan quantize`, ComfyUI's ``comfy_quant``, bitsandbytes.

Each is found by the names beside the weight ``X.weight``:

  X.comfy_quant, X.weight_scale              ComfyUI's marker, a JSON text; also what this project writes
  X.weight.quant_state.bitsandbytes__nf4     bitsandbytes, with absmax, quant_map and nested ones of them
  X.SCB                                      bitsandbytes in 8 bits: a scale per row times 127

What can't be decoded exactly is an error that names the tensor and what to do.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import HYWUError, one_line
from ...files import parse_json
from .codecs import NF4, NF4_LEVELS, Codec, Plain, Scaled

MARKER, SCALE = ".comfy_quant", ".weight_scale"
BNB_STATE = ".weight.quant_state.bitsandbytes__"
BNB_PARTS = (
    ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map",
)  # fmt: skip
BNB_ROWS = ".SCB"
#: ComfyUI's formats that are a scale times 8 bits.
SCALED = {
    "float8_e4m3fn": ("fp8", torch.float8_e4m3fn),
    "float8_e5m2": ("fp8", torch.float8_e5m2),
    "int8_tensorwise": ("int8", torch.int8),
}
#: The marker's format of NF4 as this project writes it.
OWN_NF4 = "hywu_nf4"
WAY_OUT = (
    "take the official folder in bfloat16 and run `hywu hunyuan quantize FOLDER OUT --experts nf4` (or int8, "
    "fp8)"
)

#: (name, rows or None) -> the stored tensor, or those of its rows.
Read = Callable[[str, slice | None], Tensor]


@dataclass(frozen=True)
class Quantized:
    """A matrix ``[out, in]`` stored in several tensors.

    state: what its marker says.
    """

    name: str
    codec: Codec
    shape: tuple[int, int]
    origin: str
    state: Mapping[str, Any]

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".weight")

    def read(self, read: Read, rows: slice | None = None) -> dict[str, Tensor]:
        """The codec's parts of some rows, or of all."""
        out = self.shape[0]
        chosen = rows or slice(0, out)
        if self.origin == "bitsandbytes":
            return self._read_bitsandbytes(read, chosen)
        if self.origin == "bitsandbytes8":
            scales = read(self.stem + BNB_ROWS, None).float().flatten()[chosen, None] / 127
            return {"codes": read(self.name, chosen), "scales": scales}
        scales = read(self.stem + SCALE, None)
        if isinstance(self.codec, Scaled):
            scales = scales.float().reshape(-1, 1).expand(out, 1)
        return {"codes": read(self.name, chosen), "scales": scales[chosen]}

    def _read_bitsandbytes(self, read: Read, rows: slice) -> dict[str, Tensor]:
        out, in_features = self.shape
        block = int(self.state["blocksize"])
        scales = read(self.name + ".absmax", None)
        if "nested_offset" in self.state:
            table = read(self.name + ".nested_quant_map", None).float()
            outer = read(self.name + ".nested_absmax", None).float()
            outer = outer.repeat_interleave(int(self.state["nested_blocksize"]))[: scales.numel()]
            scales = table[scales.flatten().int()] * outer + float(self.state["nested_offset"])
        scales = scales.float().flatten()
        codes = read(self.name, None).flatten().view(torch.uint8)
        if isinstance(self.codec, NF4):
            codes = codes.view(out, -1)[rows]
            return {"codes": codes, "scales": scales.view(out, -1)[rows]}
        # blocks run on over the ends of rows: decoded as one long row
        flat = torch.empty(1, out * in_features)
        NF4("nf4", torch.float32, block).decode(
            {"codes": codes[None], "scales": scales[None]}, flat
        )
        return {"codes": flat.view(out, in_features)[rows]}


def find_quantized(
    shapes: dict[str, tuple[int, ...]], dtypes: Mapping[str, str], read: Read, where: str
) -> dict[str, Quantized]:
    """Quantized matrices by the name of their weight.

    shapes: of all stored tensors; those that are parts of a quantized matrix are taken out, and the matrix' own
        shape is put in.
    dtypes: as safetensors names them.
    where: the folder, for errors.
    """
    found: dict[str, Quantized] = {}
    for name in list(shapes):
        if name.endswith(MARKER):
            made = _comfy(name.removesuffix(MARKER), shapes, dtypes, read, where)
        elif BNB_STATE in name:
            made = _bitsandbytes(name, shapes, dtypes, read, where)
        elif name.endswith(BNB_ROWS):
            made = _bitsandbytes8(name.removesuffix(BNB_ROWS), shapes, where)
        else:
            continue
        found[made.name] = made
    for made in found.values():
        extra = (MARKER, SCALE, BNB_ROWS, *BNB_PARTS, ".weight_format", ".input_scale")
        for name in [made.stem + suffix for suffix in extra]:
            shapes.pop(name, None)
        shapes[made.name] = made.shape
    for name in [n for n in shapes if BNB_STATE in n]:
        del shapes[name]
    lost = [
        n
        for n, dtype in dtypes.items()
        if dtype in ("I8", "U8", "F8_E4M3", "F8_E5M2") and n in shapes and n not in found
    ]
    if lost:
        raise HYWUError(
            f"{where}: {len(lost)} tensors such as {lost[0]} are {dtypes[lost[0]]} and no marker beside "
            f"them says how they were quantized; {WAY_OUT}."
        )
    return found


def _comfy(
    stem: str, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], read: Read, where: str
) -> Quantized:  # fmt: skip
    state = _json(read(stem + MARKER, None), f"{where}: {stem}{MARKER}")
    weight, kind = f"{stem}.weight", state.get("format")
    kind = kind if isinstance(kind, str) else f"{kind!r:.60}"
    params = state.get("params") if isinstance(state.get("params"), dict) else {}
    if weight not in shapes or stem + SCALE not in shapes:
        raise HYWUError(
            f"{where}: {stem} is marked as {kind!r}, but {weight} or {stem}{SCALE} is missing; download it again."
        )
    rotated = state.get("convrot", params.get("convrot", False))
    shape, count = shapes[weight], math.prod(shapes[stem + SCALE])
    if kind == OWN_NF4 and len(shape) == 2:
        with _damaged(f"{where}: {stem}{MARKER}"):
            made = NF4("nf4", torch.bfloat16, _whole(state["block"], "block"))
            width = _whole(state["in_features"], "in_features")
            scales, blocks = shapes[stem + SCALE], -(-width // made.block)
            if shape[1] != -(-width // 2) or scales != (shape[0], blocks):
                raise ValueError(
                    f"{width} columns in blocks of {made.block}, {list(shape)} and {list(scales)}"
                )
        return Quantized(weight, made, (shape[0], width), "comfy", state)
    if kind not in SCALED or rotated or len(shape) != 2 or count not in (1, shape[0]):
        said = f"{kind!r}{' with rotation' if rotated else ''} of shape {list(shape)} with {count} scales"
        raise HYWUError(
            f"{where}: {weight} is stored as {said}. Read are {', '.join(SCALED)} with one scale per "
            f"matrix or row, and what `hywu hunyuan quantize` writes; {WAY_OUT}."
        )
    name, dtype = SCALED[kind]
    return Quantized(weight, Scaled(name, dtype), (shape[0], shape[1]), "comfy", state)


def _bitsandbytes(
    name: str, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], read: Read, where: str
) -> Quantized:  # fmt: skip
    stem, _, kind = name.partition(BNB_STATE)
    weight = f"{stem}.weight"
    state = _json(read(name, None), f"{where}: {name}")
    absent = [n for n in (weight, weight + ".absmax", weight + ".quant_map") if n not in shapes]
    if kind != "nf4" or absent:
        raise HYWUError(
            f"{where}: {weight} is bitsandbytes' {kind}"
            f"{f' without {absent[0]}' if absent else ''}; NF4 with all its tensors is read; {WAY_OUT}."
        )
    levels = read(weight + ".quant_map", None).float().flatten().tolist()
    if len(levels) != 16 or max(abs(a - b) for a, b in zip(levels, NF4_LEVELS, strict=True)) > 1e-6:
        raise HYWUError(f"{where}: {weight}.quant_map isn't NF4's 16 levels; {WAY_OUT}.")
    with _damaged(f"{where}: {name}"):
        out, in_features = (_whole(side, "a side") for side in state["shape"])
        block = _whole(state["blocksize"], "blocksize")
        nested = "nested_offset" in state
        wanted = {
            ".weight": (out * in_features + 1) // 2,
            ".weight.absmax": -(-out * in_features // block),
        }
        if nested:
            outer = _whole(state["nested_blocksize"], "nested_blocksize")
            float(state["nested_offset"])
            wanted[".weight.nested_absmax"] = -(-wanted[".weight.absmax"] // outer)
            wanted[".weight.nested_quant_map"] = 256
        for part, count in wanted.items():
            if (held := math.prod(shapes[stem + part])) != count:
                raise ValueError(f"{stem}{part} holds {held} values where {count} are needed")
        for part in (".weight", ".weight.absmax") if nested else (".weight",):
            if dtypes[stem + part] != "U8":
                raise ValueError(f"{stem}{part} is {dtypes[stem + part]}, not U8")
    codec: Codec = NF4("nf4", torch.float32, block)
    if in_features % block:
        codec = Plain("float32", torch.float32)
    return Quantized(weight, codec, (out, in_features), "bitsandbytes", state)


def _bitsandbytes8(stem: str, shapes: Mapping[str, tuple[int, ...]], where: str) -> Quantized:
    weight = f"{stem}.weight"
    shape = shapes.get(weight, ())
    if len(shape) != 2 or math.prod(shapes[stem + BNB_ROWS]) != shape[0]:
        raise HYWUError(
            f"{where}: {stem}{BNB_ROWS} has {math.prod(shapes[stem + BNB_ROWS])} scales and {weight} the "
            f"shape {list(shape)}; download it again."
        )
    return Quantized(weight, Scaled("int8", torch.int8), (shape[0], shape[1]), "bitsandbytes8", {})


@contextlib.contextmanager
def _damaged(name: str) -> Iterator[None]:
    """What goes wrong in the block is that a marker doesn't say what it should, or disagrees with its tensors."""
    try:
        yield
    except HYWUError:
        raise
    except KeyError as error:
        raise HYWUError(f"{name} is damaged (no {error.args[0]}); download it again.") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise HYWUError(f"{name} is damaged ({one_line(error)}); download it again.") from error


def _whole(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 40:
        raise ValueError(f"{name} is {value!r:.40}")
    return value


def _json(tensor: Tensor, name: str) -> dict[str, Any]:
    return parse_json(tensor.numpy().tobytes(), name, dict, "download it again")
