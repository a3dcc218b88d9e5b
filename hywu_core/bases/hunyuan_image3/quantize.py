"""Quantize an official folder once: its experts in 8 or 4 bits, everything else byte for byte.

One tensor is in memory at a time. The work lies in ``OUT.quantizing`` until all is whole, then it becomes
OUT; a shard that is whole there is kept when the command runs again, however it was stopped.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ...atomic import sweep
from ...errors import HYWUError, one_line
from ...files import HEADER, atomic_path, folder_lock, read_header, write_json
from ...precision import DTYPES, NAMES
from .checkpoint import INDEX, Folder, Head, open_folder, read_heads
from .codecs import NF4, Codec, Method, codec_of, relative_error
from .pipeline import build
from .quantized import MARKER, OWN_NF4, SCALE

#: Ends the name of the folder that is worked in.
WORK = ".quantizing"
#: Bytes of a tensor that is copied as it is.
PIECE = 64 << 20
FORMATS = {"fp8": "float8_e4m3fn", "int8": "int8_tensorwise", "nf4": OWN_NF4}

#: Called with (layer, relative error of its experts) when a layer's last expert is done.
OnLayer = Callable[[int, float], None]


def quantize(
    path: str | Path, out: str | Path, method: Method, on_layer: OnLayer | None = None
) -> Path:
    """Write the folder `out` with quantized experts; go on where a former run was stopped.

    Raises HYWUError, before anything is written, on a folder that isn't whole or is quantized already, an
    `out` that exists, and a disk with too little room.
    """
    folder, out = open_folder(path), Path(out)
    if out.exists():
        raise HYWUError(f"{out}: exists; choose another name, or remove it.")
    if folder.quantized:
        kind = next(iter(folder.quantized.values())).codec.kind
        raise HYWUError(
            f"{folder.path}: holds {kind} weights already; quantize the folder in bfloat16."
        )
    build(folder)
    shards = sorted(set(folder.files.values()))
    plans = {shard: _entries(folder, shard, method) for shard in shards}
    work = out.with_name(out.name + WORK)
    with folder_lock(work):
        sweep(work, alone=True)
        whole = [shard for shard in shards if _is_whole(work / shard.name, plans[shard], method)]
        _check_room(work, [plans[shard] for shard in shards if shard not in whole])
        for shard in shards:
            if shard not in whole:
                _write_shard(folder, shard, work / shard.name, plans[shard], method)
        _finish(folder, work, shards, plans)
    (work / ".hywu.lock").unlink(missing_ok=True)
    try:
        os.rename(work, out)
    except OSError as error:
        raise HYWUError(f"{out}: can't be written ({error.strerror}).") from error
    for layer, error in errors_of(out).items():
        if on_layer is not None:
            on_layer(layer, error)
    return out


def errors_of(path: Path) -> dict[int, float]:
    """Layer -> relative error (L2) of its experts, as the files of a quantized folder say."""
    sums: dict[int, list[float]] = {}
    for shard in sorted(path.glob("*.safetensors")):
        try:
            for name, (lost, size) in (read_header(shard).get("errors") or {}).items():
                total = sums.setdefault(int(name.split(".")[2]), [0.0, 0.0])
                total[0] += float(lost)
                total[1] += float(size)
        except (AttributeError, IndexError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, HYWUError):
                raise
            raise HYWUError(
                f"{shard}: what its header says of errors is damaged ({one_line(error)}); quantize it again."
            ) from error
    return {layer: math.sqrt(a / b) if b else 0.0 for layer, (a, b) in sorted(sums.items())}


def quantized_bytes(folder: Folder, method: Method) -> int:
    """Bytes of all tensors of the folder after quantizing."""
    shards = sorted(set(folder.files.values()))
    return sum(_data_bytes(_entries(folder, shard, method)) for shard in shards)


def _is_expert(name: str) -> bool:
    return ".experts." in name and name.endswith(".weight")


def _entries(folder: Folder, shard: Path, method: Method) -> dict[str, Head]:
    """The tensors of the new shard and where they lie, from 0 on."""
    entries: dict[str, Head] = {}
    end = 0

    def add(name: str, shape: tuple[int, ...], dtype: str) -> None:
        nonlocal end
        size = math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = Head(shape, dtype, end, end + size)
        end += size

    names = sorted(
        (head.start, name) for name, head in folder.heads.items() if folder.files[name] == shard
    )
    for _, name in names:
        head = folder.heads[name]
        if not _is_expert(name):
            add(name, head.shape, head.dtype)
            continue
        rows, width = head.shape
        parts = codec_of(method).row(width)
        for part, suffix in (("codes", ".weight"), ("scales", SCALE)):
            count, dtype = parts[part]
            add(name.removesuffix(".weight") + suffix, (rows, count), NAMES[dtype])
        add(name.removesuffix(".weight") + MARKER, (len(_marker(method, width)),), "U8")
    return entries


def _marker(method: Method, width: int) -> bytes:
    said: dict[str, Any] = {"format": FORMATS[method]}
    codec = codec_of(method)
    if isinstance(codec, NF4):
        said |= {"block": codec.block, "in_features": width}
    return json.dumps(said).encode()


def _data_bytes(entries: dict[str, Head]) -> int:
    return max((head.stop for head in entries.values()), default=0)


def _head(entries: dict[str, Head], method: Method, errors: dict[str, tuple[str, str]]) -> bytes:
    """A safetensors head; as long for any errors of the same tensors."""
    said = json.dumps({"quantized": {"experts": method}, "errors": errors}, sort_keys=True)
    data: dict[str, Any] = {"__metadata__": {"format": "pt", HEADER: said}}
    for name, head in entries.items():
        data[name] = {
            "dtype": head.dtype, "shape": list(head.shape), "data_offsets": [head.start, head.stop],
        }  # fmt: skip
    text = json.dumps(data).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _is_whole(shard: Path, entries: dict[str, Head], method: Method) -> bool:
    """Whether a former run wrote this shard; one of another method is an error."""
    if not shard.is_file():
        return False
    former = read_header(shard).get("quantized", {}).get("experts")
    found = {name: (head.shape, head.dtype) for name, head in read_heads(shard).items()}
    if former != method or found != {n: (h.shape, h.dtype) for n, h in entries.items()}:
        raise HYWUError(
            f"{shard}: was begun as {former} or of another folder, and {method} is asked for; finish that "
            f"one, or remove {shard.parent}."
        )
    return True


def _check_room(work: Path, plans: list[dict[str, Head]]) -> None:
    needed = sum(_data_bytes(entries) + (1 << 20) for entries in plans)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise HYWUError(
            f"{work}: {needed:,} bytes are still to be written and the disk has {free:,}; free "
            f"{needed - free:,} bytes and run the same command again, it goes on where it was."
        )


def _write_shard(
    folder: Folder, shard: Path, target: Path, entries: dict[str, Head], method: Method
) -> None:
    codec = codec_of(method)
    experts = [n for n, file in folder.files.items() if file == shard and _is_expert(n)]
    blank = dict.fromkeys(sorted(experts), (f"{0:.6e}", f"{0:.6e}"))
    errors = dict(blank)
    with atomic_path(target) as part, _opened(part, shard) as (out, source):
        head = _head(entries, method, blank)
        out.write(head)
        for name in entries:
            original = folder.heads.get(name)
            if original is not None and not _is_expert(name):
                _copy(source, original, out)
            elif name in errors:
                written, errors[name] = _encoded(source, folder.heads[name], codec)
                for value in written:
                    _put(out, value)
                out.write(_marker(method, folder.heads[name].shape[1]))
        out.seek(0)
        out.write(_head(entries, method, errors))


@contextlib.contextmanager
def _opened(part: Path, shard: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    with part.open("r+b") as out, shard.open("rb") as source:
        yield out, source


def _copy(source: IO[bytes], head: Head, out: IO[bytes]) -> None:
    source.seek(head.start)
    left = head.stop - head.start
    while left:
        piece = source.read(min(PIECE, left))
        if not piece:
            raise OSError("a shard ended early")
        out.write(piece)
        left -= len(piece)


def _encoded(source: IO[bytes], head: Head, codec: Codec) -> tuple[list[Tensor], tuple[str, str]]:
    """The parts of a matrix, and its error as text of a fixed length: (squared error, squared size)."""
    source.seek(head.start)
    raw = bytearray(head.stop - head.start)
    if source.readinto(raw) != len(raw):  # type: ignore[attr-defined]
        raise OSError("a shard ended early")
    matrix = torch.frombuffer(raw, dtype=DTYPES[head.dtype]).view(head.shape)
    coded = codec.encode(matrix)
    lost, size = relative_error(coded, codec, matrix)
    return [coded["codes"], coded["scales"]], (f"{lost:.6e}", f"{size:.6e}")


def _put(out: IO[bytes], value: Tensor) -> None:
    out.write(memoryview(value.contiguous().view(torch.uint8).numpy()).cast("B"))


def _finish(
    folder: Folder, work: Path, shards: list[Path], plans: dict[Path, dict[str, Head]]
) -> None:
    """What lies beside the shards, and the index over them."""
    for file in sorted(folder.path.iterdir()):
        known = (
            file.suffix in (".safetensors", ".bin")
            or file.name == INDEX
            or file.name.startswith(".")
        )
        if file.is_file() and not known:
            with atomic_path(work / file.name, overwrite=True) as part:
                shutil.copyfile(file, part)
    names = {name: shard.name for shard in shards for name in plans[shard]}
    total = sum(_data_bytes(entries) for entries in plans.values())
    write_json(work / INDEX, {"metadata": {"total_size": total}, "weight_map": names})
