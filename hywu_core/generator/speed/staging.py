"""Copies of pageable host memory to a CUDA device, through page-locked pieces that take turns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Bytes of a page-locked piece through which pageable tensors are copied.
STAGE = 32 << 20


def staged(values: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of contiguous tensors on a device.

    On CUDA a pageable tensor goes through two page-locked pieces of `STAGE` bytes in turn: one is filled while
    the other is copied. The driver's own way with pageable memory is many times slower.
    """
    if device.type != "cuda" or all(value.is_pinned() for value in values):
        return [value.to(device, non_blocking=True) for value in values]
    made = [torch.empty(v.shape, dtype=v.dtype, device=device) for v in values]
    _through(values, made, [_Piece(_page_locked(STAGE)) for _ in range(2)])
    return made


def _through(values: Sequence[Tensor], copies: Sequence[Tensor], pieces: list[_Piece]) -> None:
    turn = 0
    for value, copy in zip(values, copies, strict=True):
        source, goal = (t.contiguous().view(-1).view(torch.uint8) for t in (value, copy))
        start = 0
        while start < source.numel():
            if not pieces[turn].room:
                pieces[turn].sent(copy.device)
                turn = 1 - turn
                pieces[turn].reuse()
            start += pieces[turn].send(source[start:], goal[start:])


class _Piece:
    """Page-locked memory that is filled bit by bit, each bit copied to the device at once."""

    def __init__(self, memory: Tensor) -> None:
        self._memory, self._used, self._event = memory, 0, torch.cuda.Event()

    @property
    def room(self) -> int:
        return len(self._memory) - self._used

    def send(self, source: Tensor, goal: Tensor) -> int:
        """As many bytes as there is room for; how many."""
        count = min(self.room, source.numel())
        piece = self._memory[self._used : self._used + count]
        piece.copy_(source[:count])
        goal[:count].copy_(piece, non_blocking=True)
        self._used += count
        return count

    def sent(self, device: torch.device) -> None:
        self._event.record(torch.cuda.current_stream(device))

    def reuse(self) -> None:
        """Wait until the device has read what was in here."""
        self._event.synchronize()
        self._used = 0


def _page_locked(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
