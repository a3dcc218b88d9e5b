"""Experts that rest in host memory or in the mapped files, copied in chunks where they are used.

The experts are 97 % of the weights, and a pass needs them one layer at a time. A budget of device bytes is
met with the most layers whose experts stay there; those of the others go through two slots in turn: a
chunk is copied while the other computes. Only experts that a token was routed to are copied, so that a
step of the text pass copies top-k of each layer. Every expert's product is the same, so are the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ...errors import HYWUError
from ...files import open_tensors
from ...grouped import grouped_linear
from .checkpoint import Folder, Slot, stored_tensors
from .model import HunyuanImage3

#: Where offloaded experts rest: "ram", or "file" for the mapped safetensors.
Rest = Literal["ram", "file"]
#: Slots that chunks take turns in.
SLOTS = 2
#: Most experts of a chunk.
CHUNK = 8
BANKS = ("w1", "w2", "w3")


@dataclass(frozen=True)
class Placement:
    """Device bytes of weights: fixed (all but experts), of each layer's experts, of the slots.

    resident: layers whose experts stay on the device. chunk: experts of a slot, 0 where none is needed.
    """

    fixed_bytes: int
    layer_bytes: tuple[int, ...]
    resident: tuple[int, ...]
    chunk: int
    chunk_bytes: int

    @property
    def total_bytes(self) -> int:
        kept = sum(self.layer_bytes[i] for i in self.resident)
        return self.fixed_bytes + kept + (SLOTS * self.chunk_bytes if self.chunk else 0)


def place(fixed_bytes: int, layers: Sequence[int], experts: int, budget: int) -> Placement:
    """The placement that keeps to `budget`. layers: bytes of each layer's experts, three banks each.

    Raises HYWUError with the least that works.
    """
    whole = tuple(range(len(layers)))
    if fixed_bytes + sum(layers) <= budget:
        return Placement(fixed_bytes, tuple(layers), whole, 0, 0)
    # one expert's matrix of one bank, of the widest layer
    matrix = max(layers) // experts // len(BANKS)
    chunk = min(CHUNK, experts)
    while chunk > 1 and fixed_bytes + SLOTS * chunk * matrix > budget:
        chunk //= 2
    room = budget - fixed_bytes - SLOTS * chunk * matrix
    if room < 0:
        raise HYWUError(
            f"The budget is {budget:,} bytes of weights on the device; this model needs at least "
            f"{budget - room:,} (all but the experts, and two slots of one expert's matrix each). Raise it."
        )
    resident = []
    for i, size in enumerate(layers):
        if size <= room:
            resident.append(i)
            room -= size
    return Placement(fixed_bytes, tuple(layers), tuple(resident), chunk, chunk * matrix)


@dataclass
class Traffic:
    """What was copied to the device so far: chunks, experts' matrices, bytes; most slots in use at once."""

    chunks: int = 0
    matrices: int = 0
    nbytes: int = 0
    staged: int = 0
    _in_use: set[int] = field(default_factory=set)


class Slots:
    """Device memory of two chunks, shared by all banks."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device, self.traffic = device, Traffic()
        self._flat = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._next = 0
        cuda = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if cuda else None
        self._copied = [torch.cuda.Event() if cuda else None for _ in range(SLOTS)]
        self._freed = [torch.cuda.Event() if cuda else None for _ in range(SLOTS)]

    @property
    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self._flat)

    def fetch(self, source: Source, experts: Sequence[int]) -> tuple[int, Tensor]:
        """Start to copy experts of a bank; returns the slot and its view ``[n, out, in]``."""
        slot, self._next = self._next, (self._next + 1) % SLOTS
        traffic = self.traffic
        if slot in traffic._in_use:
            raise RuntimeError("a slot is fetched into while it is in use")
        traffic._in_use.add(slot)
        traffic.staged = max(traffic.staged, len(traffic._in_use))
        shape = (len(experts), *source.shape)
        size = len(experts) * source.matrix_bytes
        view = self._flat[slot][:size].view(source.dtype).view(shape)
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
    """One bank's matrices where they rest."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    @property
    def matrix_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def read(self, experts: Sequence[int], into: Tensor) -> None:
        """Copy matrices into ``[n, out, in]`` on the device."""
        raise NotImplementedError


class InMemory(Source):
    """A bank ``[experts, out, in]`` in host memory, page-locked where the device is CUDA."""

    def __init__(self, bank: Tensor) -> None:
        super().__init__((bank.shape[1], bank.shape[2]), bank.dtype)
        self.bank = bank

    def read(self, experts: Sequence[int], into: Tensor) -> None:
        for place_, expert in enumerate(experts):
            into[place_].copy_(self.bank[expert], non_blocking=True)


class InFile(Source):
    """Matrices in the folder's mapped shards; converted as they are copied."""

    def __init__(
        self, folder: Folder, names: Sequence[tuple[str, Slot]], shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__(shape, dtype)
        self.folder, self.names = folder, list(names)

    def read(self, experts: Sequence[int], into: Tensor) -> None:
        for place_, expert in enumerate(experts):
            name, slot = self.names[expert]
            with open_tensors(self.folder.files[name]) as opened:
                rows = slice(None) if slot.rows is None else slot.rows
                into[place_].copy_(opened.get_slice(name)[rows])


class OffloadedBank(nn.Module):
    """An expert bank without weights of its own; called as `GroupedLinear`, which adapters hook alike."""

    def __init__(self, bank: nn.Module, source: Source, slots: Slots, chunk: int) -> None:
        super().__init__()
        self.num_experts = bank.num_experts
        self.in_features, self.out_features = bank.in_features, bank.out_features
        self.source, self.slots, self.chunk = source, slots, chunk

    def forward(self, x: Tensor, ends: Tensor, items: Tensor | None = None) -> Tensor:
        """See `GroupedLinear`. Waits for the device once, to learn which experts have rows."""
        bounds = [0, *ends.tolist()]
        used = [e for e in range(self.num_experts) if bounds[e + 1] > bounds[e]]
        out = x.new_empty(x.shape[0], self.out_features)
        for slot, weight, experts in self._chunks(used):
            first, last = bounds[experts[0]], bounds[experts[-1] + 1]
            local = torch.tensor([bounds[e + 1] - first for e in experts], dtype=torch.int32)
            self.slots.take(slot)
            piece = grouped_linear(x[first:last], weight.to(x.dtype), local.to(x.device))
            out[first:last] = piece
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

    def __init__(self, placement: Placement, slots: Slots | None) -> None:
        self.placement, self.slots = placement, slots

    @property
    def traffic(self) -> Traffic:
        return self.slots.traffic if self.slots is not None else Traffic()


def offload(
    folder: Folder, model: HunyuanImage3, fixed_bytes: int, budget: int,
    device: torch.device, dtype: torch.dtype, rest: Rest,
) -> Offloaded:  # fmt: skip
    """Exchange banks of a model on "meta" for offloaded ones; `Folder.fill` then reads all others.

    fixed_bytes: of the weights besides the model's layers' experts. Raises HYWUError on a budget too
    small, before anything is allocated.
    """
    layers = [
        sum(p.numel() for p in layer.mlp.experts.parameters()) * dtype.itemsize
        for layer in model.model.layers
    ]
    placement = place(fixed_bytes, layers, model.config.num_experts, budget)
    if not placement.chunk:
        return Offloaded(placement, None)
    slots = Slots(placement.chunk_bytes, device)
    for i, layer in enumerate(model.model.layers):
        if i in placement.resident:
            continue
        experts = layer.mlp.experts
        for name, source in _sources(folder, i, experts, device, dtype, rest).items():
            bank = OffloadedBank(getattr(experts, name), source, slots, placement.chunk)
            setattr(experts, name, bank)
    return Offloaded(placement, slots)


def _sources(
    folder: Folder, layer: int, experts: nn.Module, device: torch.device, dtype: torch.dtype, rest: Rest
) -> dict[str, Source]:  # fmt: skip
    """Where the three banks of a layer rest. In memory they are read now."""
    prefix = f"model.layers.{layer}.mlp.experts."
    names: dict[str, list[tuple[str, Slot]]] = {name: [] for name in BANKS}
    for stored_name, stored in stored_tensors(experts, prefix).items():
        for slot in stored.slots:
            names[slot.parameter.removesuffix(".weight")].append((stored_name, slot))
    sources: dict[str, Source] = {}
    for name, places in names.items():
        count, out, in_ = getattr(experts, name).weight.shape
        source: Source = InFile(folder, places, (out, in_), dtype)
        if rest == "ram":
            bank = torch.empty(count, out, in_, dtype=dtype, pin_memory=device.type == "cuda")
            source.read(range(count), bank)
            source = InMemory(bank)
        sources[name] = source
    return sources
