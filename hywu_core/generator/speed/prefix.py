"""What is made once and read by many calls, threads and streams: position tables, the constant prefix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..model import ParameterGenerator

#: The constant prefix is kept when it is no larger than this, and on CUDA ...
PREFIX_CACHE_BYTES = 256 << 20

#: ... where it takes no more than this part of the memory that is free.
FREE_PART = 0.25


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


class Kept:
    """Values by key, each with the tensors that its readers share; `only_last` holds one at a time."""

    def __init__(self, only_last: bool = False) -> None:
        self._only_last = only_last
        self.found: dict[Any, tuple[Any, Shared]] = {}

    def get(self, key: Any) -> Any:
        """The value, which the current stream may read from here on; None where there is none."""
        found = self.found.get(key)  # read once: another thread may replace it
        if found is None:
            return None
        value, shared = found
        shared.take()
        return value

    def put(self, key: Any, value: Any, tensors: Iterable[Tensor]) -> Any:
        """Keep a value that this stream has made; returns it."""
        entry = {key: (value, Shared(tensors))}
        self.found = entry if self._only_last else {**self.found, **entry}
        return value

    def clear(self) -> None:
        self.found = {}


def prefix_key(generator: ParameterGenerator, tokens: Tensor) -> tuple:
    """What the prefix depends on: device, dtype, precision, and whether a weight was written."""
    model = generator.model
    block = model.blocks[0]
    used = [
        *model.hw_pos.parameters(),
        *model.layer_pos.parameters(),
        *model.norm_tokens.parameters(),
        *block.self_attn_n.parameters(),
        *block.self_attn_hw.parameters(),
        *block.norm1.parameters(),
        *block.norm2.parameters(),
    ]
    # inference tensors keep no version; they can't be trained either
    versions = tuple(0 if p.is_inference() else p._version for p in used)
    pointers = tuple(id(p) for p in used)
    settings = (generator.config.rope_precision, generator.switches)
    return (tokens.device, tokens.dtype, settings, versions, pointers)


def worth_keeping(size: int, limit: int | None, device: torch.device, if_free: bool) -> bool:
    """Whether a prefix of `size` bytes is kept.

    limit: the most it may take; None for `PREFIX_CACHE_BYTES` and, with `if_free`, a part of the
    device's free memory.
    """
    if size <= (PREFIX_CACHE_BYTES if limit is None else limit):
        return True
    if limit is not None or not if_free or device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return size <= FREE_PART * (free + unused)
