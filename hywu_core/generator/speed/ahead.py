"""A host's offloaded weights, copied one sublayer ahead of what computes, on a stream of their own.

A host such as ComfyUI leaves weights of single layers in host memory. Copied when they are asked for, what
computes waits for them. But a generator asks for its layers in a known order, a sublayer's at once: while one
computes, the next one's are copied here. Two pieces of device memory take turns, each as large as what the
largest sublayer lacks, so that no more is held however far the host runs ahead of the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .offload import ALIGNMENT

if TYPE_CHECKING:
    from ..model import ParameterGenerator

#: What a layer may have.
NAMES = ("weight", "bias", "weight_scale")

Values = dict[str, Tensor]


def groups_of(generator: ParameterGenerator) -> list[list[nn.Module]]:
    """The layers of each sublayer, in the order in which they are asked for."""
    owners = [owner for block in generator.model.blocks for owner in block.children()]
    groups = [[m for m in owner.children() if hasattr(m, "in_features")] for owner in owners]
    return [group for group in groups if group]


class Ahead:
    """Copies for one generation; `close` ends it. Not for several threads at once.

    groups: layers that are asked for together, in order; see `groups_of`.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Module]]) -> None:
        self._groups = groups
        self._of = {layer: i for i, group in enumerate(groups) for layer in group}
        self._slots: list[_Slot] = []
        self._side: torch.cuda.Stream | None = None
        self._now: int | None = None

    def values(self, layer: nn.Module, device: torch.device) -> Values:
        """A layer's tensors on `device`, valid until a layer of another group is asked for.

        Never waits for the device, as long as what is copied is page-locked.
        """
        group = self._of[layer]
        if group != self._now:
            self._begin(group, device)
        (slot,) = (slot for slot in self._slots if slot.group == group)
        return slot.values[layer]

    def close(self) -> None:
        """Give the device memory back; the weights may be others from here on."""
        self._slots, self._now = [], None

    def _begin(self, group: int, device: torch.device) -> None:
        if not self._slots:
            self._slots = self._two_slots(device)
        for slot in self._slots:
            if self._now is not None and slot.group == self._now:
                slot.release()
        self._now = group
        held = [slot for slot in self._slots if slot.group == group]
        slot = held[0] if held else self._slots[0]
        if not held:
            slot.fetch(group, self._groups[group], self._side)
        slot.take()
        (other,) = (one for one in self._slots if one is not slot)
        following = next(
            (g for g in range(group + 1, len(self._groups)) if _missing(self._groups[g], device)),
            None,
        )
        if following is not None:
            other.fetch(following, self._groups[following], self._side)

    def _two_slots(self, device: torch.device) -> list[_Slot]:
        if device.type == "cuda" and self._side is None:
            self._side = torch.cuda.Stream(device)
        size = max(sum(map(_room, _missing(group, device))) for group in self._groups)
        return [_Slot(size, device) for _ in range(2)]


class _Slot:
    """Device memory for what one group lacks there."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.group: int | None = None
        self.values: dict[nn.Module, Values] = {}
        self._flat = torch.empty(size, dtype=torch.uint8, device=device)
        self._copied = self._freed = None
        if device.type == "cuda":
            self._copied, self._freed = torch.cuda.Event(), torch.cuda.Event()
            self.release()  # what had this memory before may still compute

    def fetch(
        self, group: int, layers: Sequence[nn.Module], side: torch.cuda.Stream | None
    ) -> None:
        """Copy a group in, once what computed with the one before is done."""
        self.group = group
        if side is None:
            self._copy(layers)
            return
        with torch.cuda.stream(side):
            side.wait_event(self._freed)
            self._copy(layers)
            self._flat.record_stream(side)
            self._copied.record(side)

    def _copy(self, layers: Sequence[nn.Module]) -> None:
        start, device = 0, self._flat.device
        self.values = {}
        for layer in layers:
            found = self.values[layer] = {}
            for name, value in _tensors(layer):
                if not _is_missing(value, device):
                    found[name] = value
                    continue
                place = self._flat[start : start + value.nbytes].view(value.dtype)
                found[name] = place.view(value.shape)
                found[name].copy_(value, non_blocking=True)
                start += _room(value)

    def take(self) -> None:
        """The current stream may read the group from here on."""
        if self._copied is not None:
            torch.cuda.current_stream(self._flat.device).wait_event(self._copied)

    def release(self) -> None:
        """The current stream has queued all that it does with the group."""
        if self._freed is not None:
            self._freed.record(torch.cuda.current_stream(self._flat.device))


def _tensors(layer: nn.Module) -> list[tuple[str, Tensor]]:
    found = [(name, getattr(layer, name, None)) for name in NAMES]
    return [(name, value.detach()) for name, value in found if value is not None]


def _missing(layers: Sequence[nn.Module], device: torch.device) -> list[Tensor]:
    """The tensors of layers that aren't on the device."""
    values = [value for layer in layers for _, value in _tensors(layer)]
    return [value for value in values if _is_missing(value, device)]


def _is_missing(value: Tensor, device: torch.device) -> bool:
    return value.device != device


def _room(value: Tensor) -> int:
    return -(-value.nbytes // ALIGNMENT) * ALIGNMENT
