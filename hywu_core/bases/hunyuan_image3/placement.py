"""Which weights stay on the device within a budget of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ...errors import HYWUError
from .codecs import Codec, Plain

#: Slots that chunks take turns in.
SLOTS = 2
#: Most experts of a chunk.
CHUNK = 8


@dataclass(frozen=True)
class Placement:
    """Device bytes of weights: fixed (all but experts), of each layer's experts, of a slot, of decoding.

    resident: layers whose experts stay on the device. chunk: experts that are copied or decoded at once, 0
    where neither is done. decode_bytes: a decoded chunk, and what decoding a matrix holds.
    """

    fixed_bytes: int
    layer_bytes: tuple[int, ...]
    resident: tuple[int, ...]
    chunk: int
    chunk_bytes: int
    decode_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        kept = sum(self.layer_bytes[i] for i in self.resident)
        return self.fixed_bytes + kept + SLOTS * self.chunk_bytes + self.decode_bytes


@dataclass(frozen=True)
class Matrix:
    """Bytes of the largest matrix of an expert: stored, decoded, and what decoding it holds besides.

    The last two are 0 where nothing is quantized.
    """

    stored: int
    decoded: int = 0
    scratch: int = 0

    @classmethod
    def of(cls, codec: Codec, rows: int, width: int, dtype: torch.dtype) -> Matrix:
        """A matrix ``[rows, width]``; dtype: what it is decoded to."""
        stored = rows * codec.row_bytes(width)
        if isinstance(codec, Plain):
            return cls(stored)
        return cls(stored, rows * width * dtype.itemsize, codec.scratch_bytes(rows, width))

    @classmethod
    def largest(cls, all_: Iterable[Matrix]) -> Matrix:
        found = list(all_)
        return cls(*(max(getattr(m, n) for m in found) for n in ("stored", "decoded", "scratch")))


def place(
    fixed_bytes: int, layers: Sequence[int], experts: int, budget: int | None, matrix: Matrix
) -> Placement:
    """The placement that keeps to `budget` (None: no limit). layers: bytes of each layer's experts.

    Raises HYWUError with the least that works.
    """
    whole, most = tuple(range(len(layers))), min(CHUNK, experts)
    halved = [most >> i for i in range(most.bit_length())]
    for chunk in halved if matrix.decoded else (0,):
        decode = chunk * matrix.decoded + matrix.scratch
        placed = Placement(fixed_bytes, tuple(layers), whole, chunk, 0, decode)
        if budget is None or placed.total_bytes <= budget:
            return placed
    for chunk in halved:
        decode = chunk * matrix.decoded + matrix.scratch
        room = budget - fixed_bytes - SLOTS * chunk * matrix.stored - decode
        if room >= 0:
            break
    else:
        raise HYWUError(
            f"The budget is {budget:,} bytes of weights on the device; this model needs at least "
            f"{budget - room:,} (all but the experts, two slots of one expert's matrix each"
            f"{', and one that is decoded' if matrix.decoded else ''}). Raise it."
        )
    resident = []
    for i, size in enumerate(layers):
        if size <= room:
            resident.append(i)
            room -= size
    slot = chunk * matrix.stored
    return Placement(fixed_bytes, tuple(layers), tuple(resident), chunk, slot, decode)
