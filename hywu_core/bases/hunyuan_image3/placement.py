"""Which weights stay on the device within a budget of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from ...errors import HYWUError
from .codecs import Codec, Plain

#: Slots that chunks take turns in.
SLOTS = 2
#: Most experts of a chunk.
CHUNK = 8


@dataclass(frozen=True)
class Placement:
    """Device bytes of weights: fixed (dense ones that stay, and the largest that doesn't), of each layer's experts, of a slot, of decoding.

    resident: layers whose experts stay on the device.
    chunk: experts that are copied or decoded at once, 0 where neither is done.
    decode_bytes: a decoded chunk, and what decoding a matrix holds.
    dropped: of the dense parts, how many are on the device only while they are used, the first ones.
    """

    fixed_bytes: int
    layer_bytes: tuple[int, ...]
    resident: tuple[int, ...]
    chunk: int
    chunk_bytes: int
    decode_bytes: int = 0
    dropped: int = 0

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
        """A matrix ``[rows, width]``.

        dtype: what it is decoded to.
        """
        stored = rows * codec.row_bytes(width)
        if isinstance(codec, Plain):
            return cls(stored)
        return cls(stored, rows * width * dtype.itemsize, codec.scratch_bytes(rows, width))

    @classmethod
    def largest(cls, all_: Iterable[Matrix]) -> Matrix:
        found = list(all_)
        return cls(*(max(getattr(m, n) for m in found) for n in ("stored", "decoded", "scratch")))


def place(
    fixed_bytes: int, layers: Sequence[int], experts: int, budget: int | None, matrix: Matrix,
    dense: Sequence[int] = (),
) -> Placement:  # fmt: skip
    """The placement that keeps to `budget` (None: no limit).

    fixed_bytes: of what always stays.
    layers: of each layer's experts.
    dense: of parts that may be dropped while they aren't used, one at a time on the device; as few as possible
        are.
    Raises HYWUError with the least that works.
    """
    least = []
    for dropped in range(len(dense) + 1):
        held = fixed_bytes + sum(dense[dropped:]) + max(dense[:dropped], default=0)
        placed = _with_experts(held, layers, experts, budget, matrix)
        if isinstance(placed, Placement):
            return replace(placed, dropped=dropped)
        least.append(placed)
    raise HYWUError(
        f"The budget is {budget:,} bytes of weights on the device; this model needs at least "
        f"{min(least):,} (what is used all the time, the largest other part, two slots of one expert's "
        f"matrix each{', and one that is decoded' if matrix.decoded else ''}). Raise it."
    )


def _with_experts(
    fixed_bytes: int, layers: Sequence[int], experts: int, budget: int | None, matrix: Matrix
) -> Placement | int:
    """The placement, or the least budget that works."""
    whole, most = tuple(range(len(layers))), min(CHUNK, experts)
    halved = [most >> i for i in range(most.bit_length())]
    for chunk in halved if matrix.decoded else (0,):
        decode = chunk * matrix.decoded + matrix.scratch
        placed = Placement(fixed_bytes, tuple(layers), whole, chunk, 0, decode)
        if budget is None or placed.total_bytes <= budget:
            return placed
    for chunk in halved:
        slot, decode = chunk * matrix.stored, chunk * matrix.decoded + matrix.scratch
        room = budget - fixed_bytes - SLOTS * slot - decode
        if room >= 0:
            break
    else:
        return budget - room
    resident = []
    for i, size in enumerate(layers):
        if size <= room:
            resident.append(i)
            room -= size
    return Placement(fixed_bytes, tuple(layers), tuple(resident), chunk, slot, decode)
