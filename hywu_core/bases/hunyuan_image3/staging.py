"""Chunks of experts on their way: two slots of device memory, and the products of what lies in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .chunks import multiply, routed
from .codecs import Plain
from .matrices import Source
from .placement import SLOTS


@dataclass
class Traffic:
    """What was copied to the device so far: chunks, experts' matrices, their bytes, those of dense parts;
    most slots in use at once.
    """

    chunks: int = 0
    matrices: int = 0
    nbytes: int = 0
    dense: int = 0
    staged: int = 0
    _in_use: set[int] = field(default_factory=set)


class Slots:
    """Device memory of two chunks, shared by all banks; on CUDA filled on a stream of its own."""

    def __init__(self, nbytes: int, device: torch.device, free: bool = False) -> None:
        """nbytes: of a slot. free: take no memory yet."""
        self.device, self.traffic, self.size = device, Traffic(), nbytes
        self._next = 0
        cuda = device.type == "cuda" and torch.cuda.is_available()
        self._side = torch.cuda.Stream(device) if cuda else None
        self._copied = [torch.cuda.Event() if cuda else None for _ in range(SLOTS)]
        self._freed = [torch.cuda.Event() if cuda else None for _ in range(SLOTS)]
        self.allocate(free)

    def allocate(self, free: bool = False) -> None:
        """Take the memory, or give it back."""
        size = 0 if free else self.size
        if self._side is not None and free:
            # nothing is copied into memory that others may have next
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        self._flat = [
            torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(SLOTS)
        ]
        if self._side is not None and not free:
            # who had the memory before may still compute with it
            self._side.wait_stream(torch.cuda.current_stream(self.device))

    @property
    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self._flat)

    def fetch(self, source: Source, experts: Sequence[int]) -> tuple[int, Tensor]:
        """Start to copy experts of a bank; returns the slot and its view, bytes ``[n, matrix]``."""
        slot, self._next = self._next, (self._next + 1) % SLOTS
        traffic = self.traffic
        if slot in traffic._in_use:
            raise RuntimeError("a slot is fetched into while it is in use")
        traffic._in_use.add(slot)
        traffic.staged = max(traffic.staged, len(traffic._in_use))
        size = len(experts) * source.matrix_bytes
        view = self._flat[slot][:size].view(len(experts), -1)
        if self._side is None:
            source.read(experts, view)
        else:
            with torch.cuda.stream(self._side):
                self._side.wait_event(self._freed[slot])
                source.read(experts, view)
                self._copied[slot].record(self._side)
        traffic.chunks += 1
        traffic.matrices += len(experts)
        traffic.nbytes += size
        return slot, view

    def take(self, slot: int) -> None:
        """The current stream may compute with the slot from here on."""
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied[slot])

    def release(self, slot: int) -> None:
        """All that computes with the slot is queued."""
        self.traffic._in_use.discard(slot)
        if self._side is not None:
            self._freed[slot].record(torch.cuda.current_stream(self.device))

    def turns(
        self, source: Source, used: Sequence[int], chunk: int
    ) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """(bytes, experts) of one chunk of a bank after another; what computes with it is queued in between.

        The next is copied once that is queued: a copy that keeps the CPU, as of memory that isn't page-locked
        or of a file, then passes while the device computes, too.
        """
        held: list[int] = []
        try:
            for i in range(0, len(used), chunk):
                experts = used[i : i + chunk]
                slot, view = self.fetch(source, experts)
                held.append(slot)
                if len(held) == SLOTS:
                    self.release(held.pop(0))
                self.take(slot)
                yield view, experts
        finally:
            for slot in held:
                self.release(slot)


class Workspace:
    """Device memory of a decoded chunk, shared by all banks; of what doesn't fit in it, new memory."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._size, self._device = nbytes, device
        self.allocate()

    @property
    def nbytes(self) -> int:
        return self._flat.nbytes

    def allocate(self, free: bool = False) -> None:
        size = 0 if free else self._size
        self._flat = torch.empty(size, dtype=torch.uint8, device=self._device)

    def decode(self, source: Source, matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """``[n, out, in]`` of the bytes of n matrices; overwritten by the next call."""
        shape, device = (len(matrices), *source.shape), matrices[0].device
        size = math.prod(shape) * dtype.itemsize
        if self._flat.device == device and size <= self._flat.nbytes:
            whole = self._flat[:size].view(dtype).view(shape)
        else:
            whole = torch.empty(shape, dtype=dtype, device=device)
        for flat, out in zip(matrices, whole, strict=True):
            source.codec.decode(source.parts(flat), out)
        return whole


def staged_product(
    x: Tensor, ends: Tensor, out_features: int, source: Source, slots: Slots, chunk: int, workspace: Workspace
) -> Tensor:  # fmt: skip
    """The grouped product ``[T, out]`` with a bank that goes through slots, so many experts at a time.

    x, ends: see `grouped_linear`. Waits for the device to learn which experts have rows (see `routed`).
    """
    bounds, used = routed(ends)
    out = x.new_empty(x.shape[0], out_features)
    for flat, experts in slots.turns(source, used, chunk):
        codec = source.codec
        if isinstance(codec, Plain):
            weight = flat.view(codec.dtype).view(-1, *source.shape).to(x.dtype)
        else:
            weight = workspace.decode(source, list(flat), x.dtype)
        multiply(x, weight, experts, bounds, out)
    return out
