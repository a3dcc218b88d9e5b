"""Experts that rest in host memory or in the mapped files, copied in chunks where they are used.

The experts are 97 % of the weights, and a pass needs them one layer at a time. A budget of device bytes is
met with the most layers whose experts stay there; those of the others go through two slots in turn: a
chunk is copied while the other computes. Only experts that a token was routed to are copied, so that a
step of the text pass copies top-k of each layer. Every expert's product is the same, so are the results.
Quantized experts are copied as they are stored, and decoded a chunk at a time in memory that is shared by
all and part of the budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ...errors import HYWUError
from ...generator.speed.offload import blocks_per_buffer
from .checkpoint import Folder, Slot, stored_tensors
from .chunks import in_chunks, multiply, routed
from .codecs import Codec, Plain
from .model import HunyuanImage3
from .placement import CHUNK, SLOTS, Matrix, Placement, place

#: Where offloaded experts rest: "ram", or "file" for the mapped safetensors.
Rest = Literal["ram", "file"]
BANKS = ("w1", "w2", "w3")


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
    """Device memory of two chunks, shared by all banks."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device, self.traffic, self._size = device, Traffic(), nbytes
        self.allocate()
        self._next = 0
        cuda = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if cuda else None
        self._copied = [torch.cuda.Event() if cuda else None for _ in range(SLOTS)]
        self._freed = [torch.cuda.Event() if cuda else None for _ in range(SLOTS)]

    def allocate(self, free: bool = False) -> None:
        """Take the memory, or give it back."""
        size = 0 if free else self._size
        self._flat = [
            torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(SLOTS)
        ]

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


class Source:
    """One bank's matrices ``[out, in]`` where they rest, each as `codec` stores it: its parts in turn."""

    def __init__(self, shape: tuple[int, int], codec: Codec) -> None:
        self.shape, self.codec = shape, codec

    @property
    def matrix_bytes(self) -> int:
        return self.shape[0] * self.codec.row_bytes(self.shape[1])

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        """Views ``[out, count]`` of the bytes of one matrix."""
        views, start, rows = {}, 0, self.shape[0]
        for part, (count, dtype) in self.codec.row(self.shape[1]).items():
            size = rows * count * dtype.itemsize
            views[part] = flat[start : start + size].view(dtype).view(rows, count)
            start += size
        return views

    def read(self, experts: Sequence[int], into: Tensor) -> None:
        """Copy matrices into bytes ``[n, matrix]`` on the device."""
        raise NotImplementedError


class InMemory(Source):
    """A bank in memory: pieces ``[n, matrix]`` of bytes, of n experts each (the last may have fewer).

    Page-locked where the device is CUDA; pieces, because torch rounds such memory up to powers of two.
    """

    def __init__(self, pieces: Sequence[Tensor], shape: tuple[int, int], codec: Codec) -> None:
        super().__init__(shape, codec)
        self.pieces = list(pieces)

    def read(self, experts: Sequence[int], into: Tensor) -> None:
        each = len(self.pieces[0])
        for place_, expert in enumerate(experts):
            piece = self.pieces[expert // each]
            into[place_].copy_(piece[expert % each], non_blocking=True)


class InFile(Source):
    """Matrices in the folder's mapped shards; numbers are converted as they are copied."""

    def __init__(
        self, folder: Folder, names: Sequence[tuple[str, Slot]], shape: tuple[int, int], codec: Codec
    ) -> None:  # fmt: skip
        super().__init__(shape, codec)
        self.folder, self.names = folder, list(names)

    def read(self, experts: Sequence[int], into: Tensor) -> None:
        for place_, expert in enumerate(experts):
            name, slot = self.names[expert]
            stored = self.folder.coded(name, slot.rows or slice(0, self.shape[0]))
            for part, view in self.parts(into[place_]).items():
                view.copy_(stored[part])


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


class CodedBank(nn.Module):
    """A quantized bank in a parameter; decoded in chunks where it is used, copied there where it isn't.

    Called as `GroupedLinear`, which adapters hook alike: a LoRA is added to the product of the decoded
    weights.
    """

    def __init__(
        self,
        bank: nn.Module,
        stored: Source,
        device: torch.device,
        chunk: int,
        workspace: Workspace,
    ) -> None:
        super().__init__()
        self.num_experts = bank.num_experts
        self.in_features, self.out_features = bank.in_features, bank.out_features
        self.source, self.chunk, self.workspace, self._device = stored, chunk, workspace, device
        self.read()

    def read(self, device: torch.device | None = None) -> None:
        """Take the weights from where they are stored.

        device: another one than before.
        """
        self._device = self._device if device is None else device
        shape = (self.num_experts, self.source.matrix_bytes)
        coded = torch.empty(shape, dtype=torch.uint8, device=self._device)
        if self._device.type != "meta":
            self.source.read(range(self.num_experts), coded)
        self.coded = nn.Parameter(coded, requires_grad=False)

    def forward(self, x: Tensor, ends: Tensor, items: Tensor | None = None) -> Tensor:
        """See `GroupedLinear`. Waits for the device to learn which experts have rows (see `routed`)."""

        def weights(experts: Sequence[int]) -> Tensor:
            matrices = [self.coded[e].to(x.device, non_blocking=True) for e in experts]
            return self.workspace.decode(self.source, matrices, x.dtype)

        return in_chunks(x, ends, self.out_features, self.chunk, weights)


class OffloadedBank(nn.Module):
    """An expert bank without weights of its own; called as `GroupedLinear`, which adapters hook alike."""

    def __init__(
        self, bank: nn.Module, source: Source, slots: Slots, chunk: int, workspace: Workspace
    ) -> None:
        super().__init__()
        self.num_experts = bank.num_experts
        self.in_features, self.out_features = bank.in_features, bank.out_features
        self.source, self.slots, self.chunk = source, slots, chunk
        self.workspace = workspace

    def forward(self, x: Tensor, ends: Tensor, items: Tensor | None = None) -> Tensor:
        """See `GroupedLinear`. Waits for the device to learn which experts have rows (see `routed`)."""
        bounds, used = routed(ends)
        out = x.new_empty(x.shape[0], self.out_features)
        for slot, weight, experts in self._chunks(used):
            self.slots.take(slot)
            codec = self.source.codec
            if isinstance(codec, Plain):
                weight = weight.view(codec.dtype).view(-1, *self.source.shape).to(x.dtype)
            else:
                weight = self.workspace.decode(self.source, list(weight), x.dtype)
            multiply(x, weight, experts, bounds, out)
        return out

    def _chunks(self, used: Sequence[int]) -> Iterator[tuple[int, Tensor, Sequence[int]]]:
        """(slot, weights, experts), the next chunk on its way while one is used."""
        groups = [used[i : i + self.chunk] for i in range(0, len(used), self.chunk)]
        ahead = [(*self.slots.fetch(self.source, group), group) for group in groups[:1]]
        try:
            for following in (*groups[1:], None):
                current = ahead[0]
                if following is not None:
                    ahead.append((*self.slots.fetch(self.source, following), following))
                yield current
                self.slots.release(ahead.pop(0)[0])
        finally:
            for slot, *_ in ahead:
                self.slots.release(slot)


class Offloaded:
    """A model whose experts go through slots: what of it is where, and what was copied."""

    def __init__(self, placement: Placement, slots: Slots | None, workspace: Workspace) -> None:
        self.placement, self.slots, self.workspace = placement, slots, workspace
        self.traffic = Traffic() if slots is None else slots.traffic

    @property
    def nbytes(self) -> int:
        """Device bytes that the slots and decoding take."""
        slots = 0 if self.slots is None else self.slots.nbytes
        return slots + (self.placement.decode_bytes if self.workspace.nbytes else 0)

    def allocate(self, free: bool = False) -> None:
        """Take the memory of slots and decoding, or give it back."""
        self.workspace.allocate(free)
        if self.slots is not None:
            self.slots.allocate(free)

    def free(self) -> None:
        self.allocate(free=True)


def offload(
    folder: Folder, model: HunyuanImage3, fixed_bytes: int, budget: int | None,
    device: torch.device, dtype: torch.dtype, rest: Rest, coded_bank: type[CodedBank] = CodedBank,
    dense: Sequence[int] = (),
) -> Offloaded:  # fmt: skip
    """Exchange banks of a model on "meta" for offloaded and quantized ones; `Folder.fill` reads the others.

    fixed_bytes: of the weights that always stay.
    dense: see `place`.
    budget: None keeps all on the device.
    coded_bank: the class of quantized banks that stay; another one than CodedBank is a host's, whose memory
        manager counts what a pass takes.
    Raises HYWUError on a budget too small, before anything is allocated.
    """
    all_sources = [
        _sources(folder, i, layer.mlp.experts, dtype) for i, layer in enumerate(model.model.layers)
    ]
    count = model.config.num_experts
    layers = [count * sum(s.matrix_bytes for s in sources.values()) for sources in all_sources]
    largest = Matrix.largest(
        Matrix.of(s.codec, *s.shape, dtype) for sources in all_sources for s in sources.values()
    )
    placement = place(fixed_bytes, layers, count, budget, largest, dense)
    slots = Slots(placement.chunk_bytes, device) if placement.chunk_bytes else None
    held = placement.chunk * largest.decoded if coded_bank is CodedBank else 0
    workspace = Workspace(held, device)
    for i, (layer, sources) in enumerate(zip(model.model.layers, all_sources, strict=True)):
        experts, stays = layer.mlp.experts, i in placement.resident
        for name, source in sources.items():
            bank = getattr(experts, name)
            if stays and isinstance(source.codec, Plain):
                continue
            if stays:
                made = coded_bank(bank, source, device, placement.chunk, workspace)
                setattr(experts, name, made)
                continue
            assert slots is not None
            if rest == "ram":
                source = in_memory(source, count, device.type == "cuda")
            made = OffloadedBank(bank, source, slots, placement.chunk, workspace)
            setattr(experts, name, made)
    return Offloaded(placement, slots, workspace)


def coded_banks(
    folder: Folder, model: HunyuanImage3, dtype: torch.dtype
) -> list[dict[str, CodedBank]]:
    """Exchange a quantized folder's banks for coded ones on "meta"; returns those of each layer, to be read.

    Each decodes in memory of its own time, so that layers can be on several devices.
    """
    meta, made = torch.device("meta"), []
    for i, layer in enumerate(model.model.layers):
        experts, banks = layer.mlp.experts, {}
        for name, source in _sources(folder, i, experts, dtype).items():
            if isinstance(source.codec, Plain):
                continue
            chunk = min(CHUNK, model.config.num_experts)
            banks[name] = CodedBank(getattr(experts, name), source, meta, chunk, Workspace(0, meta))
            setattr(experts, name, banks[name])
        made.append(banks)
    return made


def in_memory(source: Source, count: int, pin: bool = False) -> InMemory:
    """A bank of so many experts, copied to host memory."""
    each = blocks_per_buffer(source.matrix_bytes, count) if pin else count
    pieces = []
    for first in range(0, count, each):
        experts = range(first, min(first + each, count))
        shape = (len(experts), source.matrix_bytes)
        pieces.append(torch.empty(shape, dtype=torch.uint8, pin_memory=pin))
        source.read(experts, pieces[-1])
    return InMemory(pieces, source.shape, source.codec)


def _sources(
    folder: Folder, layer: int, experts: nn.Module, dtype: torch.dtype
) -> dict[str, Source]:
    """Where the three banks of a layer lie in the files.

    dtype: of those that aren't quantized.
    """
    prefix = f"model.layers.{layer}.mlp.experts."
    names: dict[str, list[tuple[str, Slot]]] = {name: [] for name in BANKS}
    for stored_name, stored in stored_tensors(experts, prefix).items():
        for slot in stored.slots:
            names[slot.parameter.removesuffix(".weight")].append((stored_name, slot))
    sources: dict[str, Source] = {}
    for name, places in names.items():
        _, out, in_ = getattr(experts, name).weight.shape
        codecs = {
            folder.codec(stored) if stored in folder.quantized else Plain("stored", dtype)
            for stored, _ in places
        }
        if len(codecs) != 1:
            raise HYWUError(
                f"{folder.path}: the experts of layer {layer} are stored in {len(codecs)} ways; quantize "
                "the folder in bfloat16 again."
            )
        sources[name] = InFile(folder, places, (out, in_), codecs.pop())
    return sources
