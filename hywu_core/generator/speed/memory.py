"""Memory of a generation: what it needs, how a budget is met, weights streamed block by block.

A budget is met with the largest chunks and the most resident blocks that fit, in this order: all
blocks resident; blocks streamed from host memory; smaller chunks. Streaming comes before smaller
chunks because it leaves every bit of the result as it was, and costs little where a block computes
longer than it is copied.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import HYWUError
from ..config import GeneratorConfig

#: Slots that streamed blocks take turns in: one computes while the next is copied.
SLOTS = 2

#: Chunks are not made smaller than this many rows of the residual stream.
LEAST_ROWS = 64

#: Most bytes of one page-locked buffer: torch rounds each up to a power of two.
LARGEST_PINNED = 4 << 30

#: Start of every tensor in a flat buffer, in bytes: what vectorized loads want.
ALIGNMENT = 256

#: Bytes that matrix products may take for themselves: oneDNN packs bf16 operands on some CPUs with AMX.
PRODUCT_SCRATCH = 1 << 15

#: Held while a generator starts to stream, which moves its weights.
STARTING = threading.Lock()

#: Fills the tensors of a copy of block i with its weights, from where they rest.
ReadBlock = Callable[[int, nn.Module], None]


@dataclass(frozen=True)
class MemoryPlan:
    """How a generation keeps to a budget; sizes in bytes, on the generator's device.

    chunk_bytes: size of a chunk's widest intermediate. resident_blocks: how many of num_blocks stay
    on the device, the others are streamed. fixed_bytes: weights outside the blocks. block_bytes: one
    block's weights. working_bytes: streams, condition and intermediates at their most.
    keep_prefix: whether the constant prefix is kept between calls (counted in working_bytes).
    """

    chunk_bytes: int
    resident_blocks: int
    num_blocks: int
    fixed_bytes: int
    block_bytes: int
    working_bytes: int
    keep_prefix: bool

    @property
    def streamed(self) -> bool:
        return self.resident_blocks < self.num_blocks

    @property
    def total_bytes(self) -> int:
        held = self.resident_blocks + min(SLOTS, self.num_blocks - self.resident_blocks)
        return self.fixed_bytes + held * self.block_bytes + self.working_bytes


@dataclass(frozen=True)
class Sizes:
    """What a plan depends on beside the budget: the config, the weights' bytes, one call's shape.

    element_size: bytes of a value of the residual stream. default_chunk_bytes: the device's.
    prefix_cache_bytes: the most that a kept prefix may take.
    """

    config: GeneratorConfig
    fixed_bytes: int
    block_bytes: int
    element_size: int
    batch_size: int
    condition_tokens: int
    default_chunk_bytes: int
    prefix_cache_bytes: int

    @property
    def stream_bytes(self) -> int:
        """The residual streams of one batch item."""
        return self.config.num_positions * self.config.d_model * self.element_size

    def working_bytes(self, chunk_bytes: int) -> int:
        """The most that a call holds beside the weights, an upper bound.

        Bounds the eager path; fused kernels hold less. Attention that falls back to whole matrices
        of scores (no flash or memory-efficient kernel for the dtype) is not covered.
        """
        config, size, batch = self.config, self.element_size, self.batch_size
        d, condition = config.d_model, batch * self.condition_tokens
        values = config.values_per_position
        widest = max(config.condition.values())
        # tokens in a wider dtype while they are turned, and the product
        turned = 0 if size == 4 else 8
        lengths = [g.num_tokens * config.rows_per_token for g in config.grids]
        layers = [g.num_layers for g in config.grids]
        whole = batch * max(n * m for n, m in zip(lengths, layers, strict=True))
        rows = min(whole, max(1, chunk_bytes // (4 * d * size)))
        # a chunk holds one sequence of every batch item at least
        attended = max(rows, *(batch * n for n in (*lengths, *layers)))
        out_rows = min(whole, max(4 * rows, *(batch * n for n in lengths)))
        chunk = max(
            attended * d * max(6 * size, 5 * size + 2 * turned),
            rows * d * 6 * size,
            out_rows * (2 * d * size + 2 * values * size),
        )
        # kv, turned keys (a copy a stack), beside the projected condition itself
        keys = condition * d * (4 * size + turned + 4)
        projecting = condition * (widest + 4 * d) * size
        tables = sum(
            2 * 4 * config.head_dim * (n + m) for n, m in zip(lengths, layers, strict=True)
        )
        streams = batch * self.stream_bytes + (self.stream_bytes if batch > 1 else 0)
        output = 0 if values == d else batch * config.num_positions * values * size
        return streams + output + max(keys + chunk, projecting) + tables + PRODUCT_SCRATCH


def plan_memory(sizes: Sizes, budget: int) -> MemoryPlan:
    """The plan that keeps to `budget` bytes. Raises HYWUError naming the least that works."""
    config = sizes.config
    blocks, block = config.num_blocks, sizes.block_bytes
    least_chunk = LEAST_ROWS * 4 * config.d_model * sizes.element_size
    chunk = sizes.default_chunk_bytes
    while True:
        working = sizes.working_bytes(chunk)
        room = budget - sizes.fixed_bytes - working
        if room >= min(SLOTS, blocks) * block:
            break
        if chunk <= least_chunk:
            least = budget - room + min(SLOTS, blocks) * block
            raise HYWUError(
                f"memory_budget is {budget:,} bytes, but this generator needs at least {least:,} "
                f"for a batch of {sizes.batch_size} and {sizes.condition_tokens} condition tokens "
                f"({SLOTS} of {blocks} blocks on the device, the smallest chunks); raise it, or "
                "generate fewer items at once."
            )
        chunk = max(least_chunk, chunk // 2)
    resident = blocks if room >= blocks * block else max(0, room // block - SLOTS)
    held = resident + min(SLOTS, blocks - resident)
    spare = room - held * block
    prefix = sizes.stream_bytes
    keep = prefix <= min(spare, sizes.prefix_cache_bytes)
    return MemoryPlan(
        chunk,
        resident,
        blocks,
        sizes.fixed_bytes,
        block,
        working + (prefix if keep else 0),
        keep,
    )


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


# -- streaming ---------------------------------------------------------------------------------------


class BlockStreamer:
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

        resident: how many to keep on the device. Close the iterator (contextlib.closing) when it may
        not be exhausted.
        """
        with self._lock:
            with torch.inference_mode(False):  # tensors made there can't be written elsewhere
                self._keep(resident)
            streamed = [i for i in range(len(self._blocks)) if i not in self._resident]
            place = {i: self._slots[k % SLOTS] for k, i in enumerate(streamed)}
            for i in streamed[:SLOTS]:
                self._fetch(place[i], i)
            following = dict(zip(streamed, streamed[SLOTS:], strict=False))
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


def blocks_a_buffer(block_bytes: int, num_blocks: int) -> int:
    """How many blocks share a page-locked buffer, so that rounding it up wastes least."""

    def waste(count: int) -> float:
        size = count * block_bytes
        return (1 << (size - 1).bit_length()) / size

    most = max(1, min(num_blocks, LARGEST_PINNED // block_bytes))
    return min(range(1, most + 1), key=waste)


def _pack_all(blocks: list[nn.Module], pin: bool) -> list[Tensor]:
    """Move the blocks' tensors to host memory; returns a flat buffer ``[bytes]`` a block."""
    size = max(map(_flat_bytes, blocks))
    step = -(-size // ALIGNMENT) * ALIGNMENT
    group = blocks_a_buffer(step, len(blocks))
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
