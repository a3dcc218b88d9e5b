"""Blocks of a generator that rest in host memory or in files, and take turns on the device."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...errors import HYWUError
from .memory import SLOTS, MemoryPlan

if TYPE_CHECKING:
    from ..layers import Transformer
    from ..tensors import MappedBlocks

#: Most bytes of one page-locked buffer: torch rounds each up to a power of two.
LARGEST_PINNED = 4 << 30

#: Start of every tensor in a flat buffer, in bytes: what vectorized loads want.
ALIGNMENT = 256

#: Held while a generator's blocks are offloaded, which moves its weights.
STARTING = threading.Lock()

#: Fills the tensors of a copy of block i with its weights, from where they rest.
ReadBlock = Callable[[int, nn.Module], None]


class Residency:
    """Where the blocks of a generator rest.

    mapped: what reads the blocks from files, where they rest there.
    """

    def __init__(self) -> None:
        self.mapped: MappedBlocks | None = None
        self._offloaded: OffloadedBlocks | None = None

    @property
    def offloaded(self) -> bool:
        """Whether the blocks' weights rest in host memory."""
        return self._offloaded is not None

    def offload(self, model: Transformer) -> None:
        """Move the blocks' weights to host memory; from there they are copied, or kept besides."""
        with STARTING:
            device = model.norm_input.weight.device
            if self._offloaded is None:
                self._offloaded = OffloadedBlocks(model.blocks, device, self.mapped)

    def blocks(self, model: Transformer, plan: MemoryPlan | None) -> Iterator[nn.Module]:
        """The blocks in turn, each on the device until the next is asked for; close it."""
        if self._offloaded is None:
            if self.mapped is None and (plan is None or not plan.offloads):
                yield from model.blocks
                return
            self.offload(model)
        yield from self._offloaded.run(len(model.blocks) if plan is None else plan.resident_blocks)

    def forget(self) -> None:
        """Drop the copies of offloaded blocks: their weights are others now.

        Raises HYWUError where the blocks are read from a file, which knows nothing of that.
        """
        if self.mapped is not None:
            raise HYWUError("blocks read from a file can't be moved or cast; load the file anew.")
        self._offloaded = None


class OffloadedBlocks:
    """Runs a generator's blocks out of host memory, the next ones copied while one computes.

    The blocks' tensors move into a flat piece of a host buffer (page-locked for CUDA), so that a block is
    one copy; they stay valid there for saving. Some blocks can be kept on the device besides.
    On CUDA copies run on a stream of their own; elsewhere the same code copies in line.
    Generations take turns: a slot serves one at a time.

    read: where the weights rest elsewhere (the blocks' tensors may be on "meta" then): it fills a
        slot's block, and no host buffers are made.
    """

    def __init__(
        self, blocks: nn.ModuleList, device: torch.device, read: ReadBlock | None = None
    ) -> None:
        self._device = device
        self._blocks = list(blocks)
        self._read = read
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._hosts: list[Tensor] = []
        if read is None:
            with torch.inference_mode(False):
                self._hosts = _pack_all(self._blocks, pin=device.type == "cuda")
        self._resident: dict[int, _Slot] = {}
        self._slots: list[_Slot] = []
        self._lock = threading.Lock()

    def run(self, resident: int) -> Iterator[nn.Module]:
        """The blocks in turn, each on the device until the next is asked for.

        resident: how many to keep on the device.
        Close the iterator (contextlib.closing) when it may not be exhausted.
        """
        with self._lock:
            with torch.inference_mode(False):  # tensors made there can't be written elsewhere
                self._keep(resident)
            offloaded = [i for i in range(len(self._blocks)) if i not in self._resident]
            place = {i: self._slots[k % SLOTS] for k, i in enumerate(offloaded)}
            for i in offloaded[:SLOTS]:
                self._fetch(place[i], i)
            following = dict(zip(offloaded, offloaded[SLOTS:], strict=False))
            for i in range(len(self._blocks)):
                slot = self._resident.get(i) or place[i]
                slot.take()
                try:
                    yield slot.block
                finally:
                    slot.release()
                if i in following:
                    self._fetch(slot, following[i])

    def _fetch(self, slot: _Slot, i: int) -> None:
        if self._read is None:
            slot.fetch(self._hosts[i], self._side)
        else:
            self._read(i, slot.block)

    def _keep(self, count: int) -> None:
        """Keep `count` blocks on the device, spread evenly, so that copies hide behind them."""
        total = len(self._blocks)
        wanted = {k * total // count for k in range(count)} if count else set()
        for i in set(self._resident) - wanted:
            del self._resident[i]
        slots = min(SLOTS, total - len(wanted))
        del self._slots[slots:]
        for i in sorted(wanted - set(self._resident)):
            self._resident[i] = _Slot(self._blocks[i], self._device)
            self._fetch(self._resident[i], i)
        while len(self._slots) < slots:
            self._slots.append(_Slot(self._blocks[0], self._device))


class _Slot:
    """Device memory of one block, and a block whose tensors are views of it."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self._flat = torch.empty(_flat_bytes(block), dtype=torch.uint8, device=device)
        # deepcopy finds each tensor of the original in the memo: structure is copied, values aren't
        memo: dict[int, object] = {}
        for owner, leaf, start, like in _places(block):
            view = _view(self._flat, start, like)
            parameter = leaf in owner._parameters
            memo[id(like)] = nn.Parameter(view, requires_grad=False) if parameter else view
        self.block = copy.deepcopy(block, memo)
        self._copied = self._freed = None
        if device.type == "cuda":
            self._copied, self._freed = torch.cuda.Event(), torch.cuda.Event()
            self.release()

    def fetch(self, host: Tensor, side: torch.cuda.Stream | None) -> None:
        """Copy a block in, once what computed here before is done."""
        if side is None:
            self._flat.copy_(host)
            return
        with torch.cuda.stream(side):
            side.wait_event(self._freed)
            self._flat.copy_(host, non_blocking=True)
            self._flat.record_stream(side)
            self._copied.record(side)

    def take(self) -> None:
        """The current stream may use the block from here on."""
        if self._copied is not None:
            current = torch.cuda.current_stream(self._flat.device)
            current.wait_event(self._copied)
            self._flat.record_stream(current)

    def release(self) -> None:
        """The current stream has queued all it does with the block."""
        if self._freed is not None:
            self._freed.record(torch.cuda.current_stream(self._flat.device))


def _places(block: nn.Module) -> Iterator[tuple[nn.Module, str, int, Tensor]]:
    """(owner, attribute, first byte in the flat buffer, tensor) of every tensor of a block."""
    start = 0
    for module in block.modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield module, leaf, start, tensor
                start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _flat_bytes(block: nn.Module) -> int:
    *_, (_, _, start, last) = _places(block)
    return start + last.nbytes


def _view(flat: Tensor, start: int, like: Tensor) -> Tensor:
    return flat[start : start + like.nbytes].view(like.dtype).view(like.shape)


def blocks_per_buffer(block_bytes: int, num_blocks: int) -> int:
    """How many blocks share a page-locked buffer, so that rounding it up wastes least."""

    def waste(count: int) -> float:
        size = count * block_bytes
        return (1 << (size - 1).bit_length()) / size

    most = max(1, min(num_blocks, LARGEST_PINNED // block_bytes))
    return min(range(1, most + 1), key=waste)


def _pack_all(blocks: list[nn.Module], pin: bool) -> list[Tensor]:
    """Move the blocks' tensors to host memory; returns a flat buffer ``[bytes]`` per block."""
    size = max(map(_flat_bytes, blocks))
    step = -(-size // ALIGNMENT) * ALIGNMENT
    group = blocks_per_buffer(step, len(blocks))
    hosts = []
    for first in range(0, len(blocks), group):
        members = blocks[first : first + group]
        whole = torch.empty(len(members) * step, dtype=torch.uint8, pin_memory=pin)
        for block, flat in zip(members, whole.split(step), strict=True):
            hosts.append(_pack(block, flat[: _flat_bytes(block)]))
    return hosts


def _pack(block: nn.Module, flat: Tensor) -> Tensor:
    """Move a block's tensors into ``flat [bytes]``; they become views of it."""
    with torch.no_grad():
        for owner, leaf, start, tensor in list(_places(block)):
            view = _view(flat, start, tensor)
            view.copy_(tensor)
            parameter = leaf in owner._parameters
            setattr(owner, leaf, nn.Parameter(view, requires_grad=False) if parameter else view)
    return flat
