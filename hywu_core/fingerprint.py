"""The one place that hashes: values, modules, files. Hex digits of SHA-256.

What comes out is stored in users' files and caches, so each recipe stays byte for byte as it is; the tests
hold literal values of all of them. Everything that reads a tensor waits for its device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # torch only where tensors are: clients of servers hash files
    import torch
    from torch import Tensor, nn

#: Values of a tensor that `of_values` and `of_module` look at unless all are asked for.
SAMPLE = 64
#: Bytes that are read from a file at once, and of each place that `sampled` looks at.
BLOCK = 1 << 18


def digest(pieces: Iterable[str | bytes | Tensor], digits: int = 32) -> str:
    """Hash of pieces one after another: text as UTF-8, bytes, the values of tensors in their own dtype."""
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(_raw(piece))
    return sha.hexdigest()[:digits]


def of_json(data: Any, digits: int, **options: Any) -> str:
    """Hash of JSON-safe data as ``json.dumps(data, **options)`` writes it."""
    return digest([json.dumps(data, **options)], digits)


def of_values(
    value: Any,
    digits: int = 32,
    whole: bool = True,
    unfold: Callable[[Any], Any] = lambda value: value,
) -> str:
    """Hash of nested mappings, lists, tensors and plain values, whatever else they hold.

    whole: all values of tensors, not `SAMPLE` of each.
    unfold: object -> what it stands for, for objects that are hashed by what is in them; any other counts by
        the name of its class.
    """
    return digest(_pieces(value, whole, unfold), digits)


def of_module(module: nn.Module, instead: Mapping[str, Tensor] | None = None) -> str:
    """16 digits of names, shapes, dtypes and some values of a module's tensors: all would take minutes.

    instead: tensors to look at in place of those of these names.
    """

    def pieces() -> Iterable[str | Tensor]:
        for name, value in sorted(module.state_dict().items()):
            value = (instead or {}).get(name, value)
            yield f"{name}{value.dtype}{tuple(value.shape)}"
            yield _some(value)

    return digest(pieces(), 16)


def of_weights(module: nn.Module, dtype: torch.dtype | None = None, digits: int = 64) -> str:
    """Hash of every value of a module, in `dtype` where one is given, else in their own, which counts."""

    def pieces() -> Iterable[str | Tensor]:
        for name, value in sorted(module.state_dict().items()):
            kind = "" if dtype else f"{value.dtype} "
            yield f"{name} {kind}{tuple(value.shape)}"
            yield value.detach().to(dtype or value.dtype)

    return digest(pieces(), digits)


def of_file(path: str | Path, digits: int = 32) -> str:
    """Hash of a file's bytes. Raises OSError."""
    return of_files([path], digits)


def of_files(paths: Iterable[str | Path], digits: int) -> str:
    """Hash of the bytes of files one after another. Raises OSError."""
    return digest((block for path in paths for block in _blocks(path)), digits)


def sampled(files: Iterable[Path]) -> str:
    """32 digits of each file's size and of 16 places spread over it.

    It names a checkpoint in milliseconds, one of 16 GB too; a change between the places escapes it.
    """

    def pieces() -> Iterable[str | bytes]:
        for file in files:
            size = file.stat().st_size
            yield f"{size}"
            with file.open("rb") as handle:
                for position in sorted({0, *(max(0, (size - BLOCK) * i // 15) for i in range(16))}):
                    handle.seek(position)
                    yield handle.read(BLOCK)

    return digest(pieces())


def _blocks(path: str | Path) -> Iterable[bytes]:
    with Path(path).open("rb") as handle:
        while block := handle.read(4 * BLOCK):
            yield block


def _raw(piece: str | bytes | Tensor) -> bytes | memoryview:
    if isinstance(piece, str):
        # a lone surrogate (half an emoji) has no UTF-8; it is kept apart from what has
        return piece.encode("utf-8", "surrogatepass")
    if isinstance(piece, (bytes, bytearray, memoryview)):
        return piece
    import torch

    flat = piece.detach().flatten().cpu().contiguous()
    return memoryview(np.ascontiguousarray(flat.view(torch.uint8).numpy()))


def _some(value: Tensor) -> Tensor:
    flat = value.detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE]


def _pieces(value: Any, whole: bool, unfold: Callable[[Any], Any]) -> Iterable[str | Tensor]:
    from torch import Tensor

    value = unfold(value)
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}"
        yield value if whole else _some(value)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            yield repr(key)
            yield from _pieces(value[key], whole, unfold)
    elif isinstance(value, (list, tuple)):
        yield f"[{len(value)}"
        for item in value:
            yield from _pieces(item, whole, unfold)
    elif isinstance(value, (str, int, float, bool, type(None))):
        yield repr(value)
    else:
        yield getattr(value, "__qualname__", type(value).__qualname__)
