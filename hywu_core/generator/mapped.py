"""A checkpoint's blocks that stay in its files: read through the memory map whenever they are needed.

Pages of a memory map are the system's to take back, so that a generator on the CPU holds no more of its
blocks than the slots they are copied to (see memory.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import HYWUError
from ..files import open_tensors

PREFIX = "model.blocks."


@dataclass(frozen=True)
class Slot:
    """Where a tensor of a file goes: rows [start, start + shape[0]) of a parameter."""

    parameter: str
    start: int
    shape: tuple[int, ...]


class MappedBlocks:
    """Reads the weights of blocks from a checkpoint's files; nothing stays open between reads.

    slots: tensor name in files -> its place among the generator's parameters. files: tensor name ->
    the file that holds it. Raises HYWUError when a file is no longer the one that was loaded.
    """

    def __init__(self, slots: Mapping[str, Slot], files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        self._stamps = {file: _stamp(file) for file in set(files.values())}
        # block -> file -> [(name in the file, parameter inside the block, first row)]
        self._places: dict[int, dict[Path, list[tuple[str, str, int]]]] = {}
        for key, slot in slots.items():
            if slot.parameter.startswith(PREFIX):
                number, _, name = slot.parameter.removeprefix(PREFIX).partition(".")
                places = self._places.setdefault(int(number), {})
                places.setdefault(files[key], []).append((key, name, slot.start))

    @torch.no_grad()
    def __call__(self, i: int, block: nn.Module) -> None:
        """Fill the parameters of `block`, a copy of block i, in their dtype."""
        parameters = dict(block.named_parameters())
        for file, places in self._places[i].items():
            self._check(file)
            with open_tensors(file) as opened:
                for key, name, start in places:
                    value = opened.get_tensor(key)
                    parameters[name][start : start + value.shape[0]].copy_(value)

    def tensor(self, key: str) -> Tensor:
        """A view of the file's map, in the file's dtype."""
        self._check(self._files[key])
        with open_tensors(self._files[key]) as opened:
            return opened.get_tensor(key)

    def _check(self, file: Path) -> None:
        if not file.is_file() or _stamp(file) != self._stamps[file]:
            raise HYWUError(
                f"{file}: changed since the generator was loaded, which reads its blocks from there; "
                "load the generator again."
            )


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns
