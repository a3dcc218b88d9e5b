"""Tensors of a checkpoint and their places in a generator: names, reading, blocks left in their files.

Official folders and our files hold the same tensors under the official names (``...W_q``, ``W_k``, ``W_v``
apart); in memory q, k and v are one product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import HYWUError
from ..files import open_tensors

if TYPE_CHECKING:
    from .model import ParameterGenerator

#: fused projection -> the official ones it holds, in order
FUSED = {"W_qkv": ("W_q", "W_k", "W_v"), "W_kv": ("W_k", "W_v")}

BLOCKS = "model.blocks."


@dataclass(frozen=True)
class Slot:
    """Where a tensor of a file goes: rows [start, start + shape[0]) of a parameter."""

    parameter: str
    start: int
    shape: tuple[int, ...]


def slots(generator: ParameterGenerator) -> dict[str, Slot]:
    """Tensor name in files -> its place among the generator's parameters."""
    result = {}
    for name, parameter in generator.named_parameters():
        shape = tuple(parameter.shape)
        fused, _, leaf = name.rpartition(".")
        owner, _, projection = fused.rpartition(".")
        pieces = FUSED.get(projection)
        if pieces is None:
            result[name] = Slot(name, 0, shape)
            continue
        rows = shape[0] // len(pieces)
        for i, piece in enumerate(pieces):
            result[f"{owner}.{piece}.{leaf}"] = Slot(name, i * rows, (rows, *shape[1:]))
    return result


def file_tensors(generator: ParameterGenerator) -> Iterator[tuple[str, Tensor]]:
    """(name in files, view of the parameter) for every tensor of a checkpoint.

    Raises HYWUError when layers were quantized to fp8: the checkpoint's own values are gone.
    """
    check_saveable(generator)
    parameters = dict(generator.named_parameters())
    for name, slot in slots(generator).items():
        whole = parameters[slot.parameter]
        if whole.is_meta:
            yield name, generator.residency.mapped.tensor(name).to(whole.dtype)
        else:
            yield name, whole[slot.start : slot.start + slot.shape[0]]


def check_saveable(generator: ParameterGenerator) -> None:
    """Raises HYWUError when the values that a file should hold are gone."""
    from .speed.fp8 import uses_fp8

    if uses_fp8(generator):
        raise HYWUError(
            "this generator's linear layers were quantized to fp8, so it can't be saved; save it before "
            "to_fp8, or copy the checkpoint that it was loaded from."
        )


# -- reading --------------------------------------------------------------------------------------


def read_into(
    generator: ParameterGenerator,
    path: Path,
    files: tuple[Path, ...],
    device: torch.device,
    blocks: torch.device,
    dtype: torch.dtype | None,
) -> tuple[dict[str, Tensor], MappedBlocks | None]:
    """The generator's parameters, filled from the checkpoint's files; one file open at a time.

    blocks: where the parameters of the transformer's blocks go; the others go to `device`.
    On "meta" they are looked at, left in the files, and read by the second result.
    """
    wanted = slots(generator)
    shapes = {name: tuple(p.shape) for name, p in generator.named_parameters()}
    tensors: dict[str, Tensor] = {}
    read: dict[str, Path] = {}
    sums: dict[str, Tensor] = {}
    for file in files:
        with open_tensors(file) as opened:
            _check_keys(file, opened, wanted, read)
            for key in opened.keys():  # noqa: SIM118
                value, slot = opened.get_tensor(key), wanted[key]
                _check_dtype(file, key, value.dtype, dtype)
                name = slot.parameter
                if name not in tensors:
                    place = blocks if name.startswith(BLOCKS) else device
                    tensors[name] = torch.empty(
                        shapes[name], dtype=dtype or value.dtype, device=place
                    )
                part = tensors[name][slot.start : slot.start + slot.shape[0]]
                part = value.to(part.dtype) if part.is_meta else part.copy_(value)
                # a sum is finite only if every value is (or it overflows, which is looked at below)
                sums[key] = part.sum(dtype=torch.float32).to(device)
                del value
    missing = sorted(set(wanted) - set(read))
    if missing:
        raise HYWUError(
            f"{path}: lacks {len(missing)} tensors, for example {', '.join(missing[:3])}; a "
            "shard may be missing or the config belongs to another checkpoint."
        )
    mapped = MappedBlocks(wanted, read) if blocks.type == "meta" else None
    _check_finite(path, sums, wanted, tensors, mapped)
    return tensors, mapped


def _check_keys(file: Path, opened: Any, wanted: Mapping[str, Slot], read: dict[str, Path]) -> None:
    """Every key of one file: known, new, of the right shape. One error for all that are wrong."""
    extra, wrong = [], []
    for key in opened.keys():  # noqa: SIM118
        slot = wanted.get(key)
        if slot is None or key in read:
            extra.append(key)
        elif tuple(opened.get_slice(key).get_shape()) != slot.shape:
            shape = tuple(opened.get_slice(key).get_shape())
            wrong.append(f"{key} is {shape}, the config says {slot.shape}")
        read[key] = file
    if extra or wrong:
        parts = [f"{len(extra)} tensors too many ({', '.join(extra[:3])})"] if extra else []
        parts += [f"{len(wrong)} of another shape ({'; '.join(wrong[:3])})"] if wrong else []
        raise HYWUError(
            f"{file}: {' and '.join(parts)}; the weights and the config belong to different "
            "checkpoints."
        )


def _check_dtype(file: Path, key: str, stored: torch.dtype, wanted: torch.dtype | None) -> None:
    """Weights must be numbers that can be computed with, or be cast to such."""
    if not stored.is_floating_point:
        raise HYWUError(
            f"{file}: {key} holds {stored} values; a generator's weights are floating-point numbers, "
            "so use the checkpoint that this one was quantized from."
        )
    if wanted is None and stored.itemsize < 2:
        raise HYWUError(
            f"{file}: {key} holds {stored} values, in which nothing can be computed; load it in "
            "another dtype, for example dtype=torch.bfloat16 (--dtype bfloat16)."
        )


def _check_finite(
    path: Path,
    sums: dict[str, Tensor],
    wanted: dict[str, Slot],
    tensors: dict[str, Tensor],
    mapped: MappedBlocks | None,
) -> None:
    if bool(torch.isfinite(torch.stack(list(sums.values()))).all()):
        return
    bad = []
    for key in sums:
        slot = wanted[key]
        part = tensors[slot.parameter][slot.start : slot.start + slot.shape[0]]
        if part.is_meta:
            part = mapped.tensor(key).to(part.dtype)
        if not bool(torch.isfinite(part).all()):
            bad.append(key)
    if bad:
        raise HYWUError(
            f"{path}: values that are not finite in {', '.join(bad[:3])}"
            f"{f' and {len(bad) - 3} more tensors' if len(bad) > 3 else ''}; the file is damaged, or "
            "the weights don't fit the dtype (try bfloat16 or float32)."
        )


# -- blocks that stay in their files ---------------------------------------------------------------


class MappedBlocks:
    """Reads the weights of blocks from a checkpoint's files; nothing stays open between reads.

    slots: tensor name in files -> its place among the generator's parameters.
    files: tensor name -> the file that holds it.
    Raises HYWUError when a file is no longer the one that was loaded.
    """

    def __init__(self, slots: Mapping[str, Slot], files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        self._stamps = {file: _stamp(file) for file in set(files.values())}
        # block -> file -> [(name in the file, parameter inside the block, first row)]
        self._places: dict[int, dict[Path, list[tuple[str, str, int]]]] = {}
        for key, slot in slots.items():
            if slot.parameter.startswith(BLOCKS):
                number, _, name = slot.parameter.removeprefix(BLOCKS).partition(".")
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
