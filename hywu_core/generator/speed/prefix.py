"""What is made once and read by many calls, threads and streams: position tables, the constant prefix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..layers import Block, Context
    from ..model import ParameterGenerator
    from .memory import MemoryPlan

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


def constant_prefix(
    generator: ParameterGenerator, block: Block, context: Context, plan: MemoryPlan | None
) -> list[Tensor]:
    """Hidden states ``[B, N, S, d]`` up to the first attention to the condition; the caller's own.

    They are the same for every condition, so those of one item are kept where there is room.
    """
    batch, passes = context.condition.shape[0], context.passes
    if not context.in_place or torch.compiler.is_compiling():
        hidden = [h.expand(batch, *h.shape[1:]) for h in generator.prefix(block, context)]
        return [h.clone() for h in hidden] if context.in_place and batch > 1 else hidden
    key = prefix_key(generator, context.condition)
    found = generator.prefixes.get(key) if plan is None or plan.keep_prefix else None
    if found is not None:
        hidden, pending = found
        passes.resume(pending)
        return [h.expand(batch, *h.shape[1:]).clone() for h in hidden]
    generator.prefixes.clear()
    hidden = generator.prefix(block, context)
    kept = _worth_keeping(generator, sum(h.nbytes for h in hidden), context, plan)
    if kept:
        tensors = [*hidden, *([] if passes.pending is None else [passes.pending])]
        generator.prefixes.put(key, (hidden, passes.pending), tensors)
    hidden = [h.expand(batch, *h.shape[1:]) for h in hidden]
    return [h.clone() for h in hidden] if kept or batch > 1 else hidden


def _worth_keeping(
    generator: ParameterGenerator, size: int, context: Context, plan: MemoryPlan | None
) -> bool:
    """Whether a prefix of `size` bytes is kept: as the plan says, as the generator allows, or as fits."""
    if plan is not None:
        return plan.keep_prefix
    limit, device = generator.prefix_cache_bytes, context.condition.device
    if size <= (PREFIX_CACHE_BYTES if limit is None else limit):
        return True
    if limit is not None or not generator.switches.keep_prefix or device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return size <= FREE_PART * (free + unused)
