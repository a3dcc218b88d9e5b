"""Where the matrices of expert banks rest: in host memory, or in the folder's mapped files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...errors import HYWUError
from ...generator.speed.offload import blocks_per_buffer
from .checkpoint import Folder, Slot, stored_tensors
from .codecs import Codec, Plain

BANKS = ("w1", "w2", "w3")


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

    def stored(self, expert: int) -> dict[str, Tensor]:
        """The parts of a matrix as they lie in the mapped file, where nothing of them has to be computed."""
        name, slot = self.names[expert]
        return self.folder.coded(name, slot.rows or slice(0, self.shape[0]))

    def read(self, experts: Sequence[int], into: Tensor) -> None:
        for place_, expert in enumerate(experts):
            stored = self.stored(expert)
            for part, view in self.parts(into[place_]).items():
                view.copy_(stored[part])


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


def in_files(
    folder: Folder, layer: int, experts: nn.Module, dtype: torch.dtype
) -> dict[str, InFile]:
    """Where the three banks of a layer lie in the files.

    dtype: of those that aren't quantized.
    Raises HYWUError where the experts of a bank are stored in several ways.
    """
    prefix = f"model.layers.{layer}.mlp.experts."
    names: dict[str, list[tuple[str, Slot]]] = {name: [] for name in BANKS}
    for stored_name, stored in stored_tensors(experts, prefix).items():
        for slot in stored.slots:
            names[slot.parameter.removesuffix(".weight")].append((stored_name, slot))
    sources: dict[str, InFile] = {}
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
