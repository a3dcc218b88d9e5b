"""A generated LoRA in host memory with a copy on the device, which ComfyUI's memory manager keeps or evicts.

The host's tensors of a generated LoRA are page-locked where there is CUDA, so that copies neither wait nor
block; those of a LoRA that was read from a file pass through two page-locked pieces. An eviction copies
nothing back. Applied unmerged, a LoRA is an additional model of the MODEL: ComfyUI loads both
before it samples, and leaves both where they are as long as there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management as mm
import comfy.model_patcher
import torch
from torch import Tensor, nn

from ...hywu_core.generator.speed.staging import staged
from ...hywu_core.lora import GeneratedLoRA

#: Bytes that stay free on the device when a copy is kept that nobody uses yet.
SPARE = 1 << 30


def to_host(lora: GeneratedLoRA) -> GeneratedLoRA:
    """A checked copy in host memory. Waits for the device once, for the copy and the check together.

    Raises HYWUError on values that are not finite.
    """
    finite = lora.is_finite()
    host = _maker(lora)([_host_copy(value) for value in _buffers(lora)])
    if lora.device.type == "cuda":
        torch.cuda.current_stream(lora.device).synchronize()
    if not bool(finite):
        lora.check_finite()
    return host


def keep(host: GeneratedLoRA, placed: GeneratedLoRA) -> None:
    """Let the device keep the copy that a generation has left there, if there is room for it."""
    device = mm.get_torch_device()
    if placed.device.type == "cpu" or placed.device != device:
        return
    if mm.get_free_memory(device) < placed.nbytes + SPARE:
        return
    patcher = resident(host)
    patcher.model.lora.ready = _buffers(placed)
    mm.load_models_gpu([patcher])
    patcher.model.lora.ready = ()


def resident(lora: GeneratedLoRA) -> comfy.model_patcher.ModelPatcher:
    """What ComfyUI loads and evicts for a LoRA in host memory; one per LoRA."""
    if lora not in _patchers:
        root = nn.Module()
        root.lora = HeldLoRA(lora)
        _patchers[lora] = comfy.model_patcher.ModelPatcher(
            root, mm.get_torch_device(), torch.device("cpu")
        )
    return _patchers[lora]


class HeldLoRA(nn.Module):
    """The buffers of a LoRA as a module that ComfyUI moves.

    `ready` are copies on a device that the next move there takes instead of making its own.
    """

    def __init__(self, lora: GeneratedLoRA) -> None:
        super().__init__()
        # not the LoRA itself, by which this is found as long as it lives
        self._make: Callable[[Sequence[Tensor]], GeneratedLoRA] = _maker(lora)
        self._host = tuple(value.detach() for value in _buffers(lora))
        self.ready: tuple[Tensor, ...] = ()
        self._place(self._host)

    def _place(self, values: Sequence[Tensor]) -> None:
        for i, value in enumerate(values):
            self.register_parameter(f"buffer_{i}", nn.Parameter(value, requires_grad=False))
        self.placed = self._make([p.detach() for p in self._parameters.values()])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HeldLoRA:
        """What `.to` calls: a copy from the host's tensors, or these themselves again."""
        device = fn(self.buffer_0.new_empty(0)).device
        if device == self._host[0].device:
            self._place(self._host)
        elif device != self.buffer_0.device:
            ready = self.ready and self.ready[0].device == device
            values = self.ready if ready else staged(self._host, device)
            self._place(values)
        return self


def _buffers(lora: GeneratedLoRA) -> tuple[Tensor, ...]:
    """What holds the memory of a LoRA."""
    return lora.grids or tuple(lora.factors.values())


def _maker(lora: GeneratedLoRA) -> Callable[[Sequence[Tensor]], GeneratedLoRA]:
    """Buffers -> a LoRA as this one; without its tensors."""
    layout, provenance = lora.layout, dict(lora.provenance)
    if lora.grids:
        return lambda values: GeneratedLoRA.from_grids(layout, values, provenance)
    names = tuple(lora.factors)

    def make(values: Sequence[Tensor]) -> GeneratedLoRA:
        factors: Mapping[Any, Tensor] = dict(zip(names, values, strict=True))
        return GeneratedLoRA(layout, factors, provenance)

    return make


def _host_copy(value: Tensor) -> Tensor:
    """On the CPU; from CUDA into page-locked memory, without waiting."""
    if value.device.type != "cuda":
        return value.to("cpu")
    staged = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return staged.copy_(value, non_blocking=True)


_patchers: WeakKeyDictionary[GeneratedLoRA, comfy.model_patcher.ModelPatcher] = WeakKeyDictionary()
