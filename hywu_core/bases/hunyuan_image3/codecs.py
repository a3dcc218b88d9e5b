"""How a matrix of weights is stored: as it is, in 8 bits with a scale per row, in 4 bits with one per block.

Every row stands by itself, so that rows and experts can be read alone. NF4: the 16 levels of Dettmers et
al. 2023 (QLoRA), two to a byte, the first in the high half; each block of a row is levels times a scale.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: What `hywu hunyuan quantize` writes.
Method = Literal["fp8", "int8", "nf4"]
#: Numbers of a row that share a scale in NF4.
BLOCK = 64
#: Bytes of the levels of all pairs.
TABLE = 256 * 2 * 4
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
#: Quantiles of a normal distribution, symmetric about an exact zero.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

#: Part of a stored matrix ("codes", "scales") -> tensor whose rows are the matrix' rows.
Coded = Mapping[str, Tensor]


@dataclass(frozen=True)
class Codec:
    """One way to store matrices ``[out, in]``. `kind` names it in plans and reports."""

    kind: str

    def row(self, in_features: int) -> dict[str, tuple[int, torch.dtype]]:
        """Part -> how many values of which dtype a row takes."""
        raise NotImplementedError

    def row_bytes(self, in_features: int) -> int:
        return sum(count * dtype.itemsize for count, dtype in self.row(in_features).values())

    def scratch_bytes(self, rows: int, in_features: int) -> int:
        """The most that `decode` holds beside its input and its output."""
        return 0

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """``[out, in]`` -> parts ``[out, count]``."""
        raise NotImplementedError

    def decode(self, coded: Coded, out: Tensor) -> Tensor:
        """Write the matrix into ``out [out, in]``, computed in float32 and rounded once; returns it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(Codec):
    """Numbers as they are."""

    dtype: torch.dtype

    def row(self, in_features: int) -> dict[str, tuple[int, torch.dtype]]:
        return {"codes": (in_features, self.dtype)}

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        return {"codes": matrix.to(self.dtype)}

    def decode(self, coded: Coded, out: Tensor) -> Tensor:
        return out.copy_(coded["codes"])


@dataclass(frozen=True)
class Scaled(Codec):
    """Codes of 8 bits times a float32 scale per row."""

    dtype: torch.dtype

    def row(self, in_features: int) -> dict[str, tuple[int, torch.dtype]]:
        return {"codes": (in_features, self.dtype), "scales": (1, torch.float32)}

    def scratch_bytes(self, rows: int, in_features: int) -> int:
        return 4 * rows * in_features

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        values, largest = matrix.float(), LARGEST[self.dtype]
        scales = values.abs().amax(dim=1, keepdim=True) / largest
        # a row of zeros has any scale
        scales = torch.where(scales > 0, scales, 1.0)
        codes = (values / scales).clamp_(-largest, largest)
        codes = codes.round_() if self.dtype is torch.int8 else codes
        return {"codes": codes.to(self.dtype), "scales": scales}

    def decode(self, coded: Coded, out: Tensor) -> Tensor:
        return out.copy_(coded["codes"].float().mul_(coded["scales"]))


@dataclass(frozen=True)
class NF4(Codec):
    """4 bits times a scale per block.

    scale_dtype: bfloat16 as written here, float32 from bitsandbytes.
    """

    scale_dtype: torch.dtype
    block: int = BLOCK

    def row(self, in_features: int) -> dict[str, tuple[int, torch.dtype]]:
        blocks = math.ceil(in_features / self.block)
        return {
            "codes": (math.ceil(in_features / 2), torch.uint8),
            "scales": (blocks, self.scale_dtype),
        }

    def scratch_bytes(self, rows: int, in_features: int) -> int:
        # numbers in float32 beside their pairs' index in int32, after the table of pairs
        return rows * (4 + 8) * math.ceil(in_features / 2) + 2 * TABLE

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        out, in_features = matrix.shape
        blocks = math.ceil(in_features / self.block)
        values = matrix.new_zeros(out, blocks * self.block, dtype=torch.float32)
        values[:, :in_features] = matrix
        values = values.view(out, blocks, self.block)
        scales = values.abs().amax(dim=2).to(self.scale_dtype)
        # levels are chosen for the scale as it is stored
        safe = torch.where(scales > 0, scales.float(), 1.0)[..., None]
        levels = torch.tensor(NF4_LEVELS, device=matrix.device)
        codes = torch.bucketize(values / safe, (levels[1:] + levels[:-1]) / 2, out_int32=True)
        codes = codes.to(torch.uint8).view(out, -1)[:, : in_features + in_features % 2]
        return {"codes": codes[:, ::2] << 4 | codes[:, 1::2], "scales": scales}

    def decode(self, coded: Coded, out: Tensor) -> Tensor:
        codes, scales, (rows, width) = coded["codes"], coded["scales"], out.shape
        pairs = _pairs(codes.device)
        values = pairs.index_select(0, codes.flatten().int()).view(rows, -1)[:, :width]
        whole, rest = divmod(width, self.block)
        blocks = values[:, : whole * self.block].unflatten(1, (whole, self.block))
        blocks *= scales[:, :whole, None].float()
        if rest:
            values[:, whole * self.block :] *= scales[:, whole:].float()
        return out.copy_(values)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """float32 ``[256, 2]``: the two levels of a byte. Kept, so that a decoded matrix doesn't wait for its copy."""
    with torch.inference_mode(False):
        levels = torch.tensor(NF4_LEVELS, device=device)
        return torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)


def codec_of(method: Method) -> Codec:
    """How `hywu hunyuan quantize` stores a matrix."""
    return {
        "fp8": Scaled("fp8", torch.float8_e4m3fn),
        "int8": Scaled("int8", torch.int8),
        "nf4": NF4("nf4", torch.bfloat16),
    }[method]


def relative_error(coded: Coded, codec: Codec, matrix: Tensor) -> tuple[float, float]:
    """(squared error, squared size) of a matrix, both sums in float64."""
    restored = codec.decode(coded, torch.empty(matrix.shape, dtype=torch.float32))
    wanted = matrix.float()
    lost = float((restored - wanted).square_().sum(dtype=torch.float64))
    return lost, float(wanted.square().sum(dtype=torch.float64))
