"""Values that one thread or stream makes and others read: position tables, the constant prefix."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Shared:
    """Tensors with the point on the device's timeline from which they may be read.

    `take` lets the current stream wait for them (the device waits, the host doesn't) and tells the
    allocator that it reads them. Where there are no streams both are nothing.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = tuple(tensors)
        self._stream = self._event = None
        if self._tensors and self._tensors[0].is_cuda:
            self._stream = torch.cuda.current_stream(self._tensors[0].device)
            if not torch.cuda.is_current_stream_capturing():
                self._event = self._stream.record_event()

    def take(self) -> None:
        if self._event is None or torch.cuda.is_current_stream_capturing():
            return  # who captures a graph has waited before
        current = torch.cuda.current_stream(self._tensors[0].device)
        if current == self._stream:
            return
        current.wait_event(self._event)
        for tensor in self._tensors:
            tensor.record_stream(current)
