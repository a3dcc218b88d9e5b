"""Reading generator checkpoints: official folders and our own single files, shard by shard.

Both forms hold the same tensors under the official names (``...W_q``, ``W_k``, ``W_v`` apart); in memory
q, k and v are one product. Our file's header says everything: config, layout, encoder, base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HYWUError
from ..files import open_tensors, read_header
from .config import GeneratorConfig, RoPEPrecision
from .fp8 import uses_fp8
from .mapped import MappedBlocks, Slot
from .model import ParameterGenerator

FORMAT = "hywu-generator-1"
INDEX = "model.safetensors.index.json"

#: fused projection -> the official ones it holds, in order
FUSED = {"W_qkv": ("W_q", "W_k", "W_v"), "W_kv": ("W_k", "W_v")}


@dataclass(frozen=True)
class Source:
    """The files of a checkpoint and what it says of itself."""

    path: Path
    files: tuple[Path, ...]
    config: GeneratorConfig


def load_generator(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    rope_precision: RoPEPrecision | None = None,
    operations: Any = nn,
    memory_budget: int | None = None,
) -> ParameterGenerator:
    """Load a generator, ready for inference (eval mode, parameters without gradients).

    path: an official folder (config.json and safetensors, sharded or not, with or without index),
        or one of our files. dtype: None keeps the file's. rope_precision: None keeps the
        checkpoint's. operations, memory_budget: see ParameterGenerator. With a budget that the
        weights don't fit in, the blocks' weights stay in host memory; on the CPU, where the budget is of
        host memory itself, a generator with a budget reads its blocks from the file's memory map
        (the file must stay; the generator can't be moved or cast).
    Tensors go from the file's memory map straight to the device and dtype, one shard at a time.
    Raises HYWUError naming the file and the keys when something is missing, extra, misshaped, not
    finite or truncated.
    """
    source = open_checkpoint(path)
    config = source.config
    if rope_precision is not None:
        config = config.with_(rope_precision=rope_precision)
    with torch.device("meta"):
        generator = ParameterGenerator(config, operations)
    device = torch.device(device)
    blocks = device
    if memory_budget is not None:
        blocks = torch.device("meta" if device.type == "cpu" else "cpu")
    tensors, mapped = _read_into(generator, source, device, blocks, dtype)
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        setattr(generator.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    if memory_budget is not None:
        generator.memory_budget = memory_budget
        if mapped is not None:
            generator.mapped = mapped
            generator.offload()
        # reckoned with the shortest condition; each call plans anew, and may stream more
        elif generator.memory_plan(1, 1).streamed:
            generator.offload()
        else:
            generator.to(device)
    return generator.eval()


def open_checkpoint(path: str | Path) -> Source:
    """Find a checkpoint's files and read its description, without reading weights. Raises HYWUError."""
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise HYWUError(f"{path}: there is no such file or folder.")
    if path.suffix != ".safetensors":
        raise HYWUError(
            f"{path}: not a .safetensors file. Generators load from safetensors only (other formats "
            "can run code); use an official folder or a file that `hywu convert` wrote."
        )
    header = read_header(path)
    if header.get("format") != FORMAT:
        if (path.parent / "config.json").is_file():
            return _open_folder(path.parent)
        raise HYWUError(
            f"{path}: not a HY-WU generator file (its header says "
            f"{header.get('format', 'nothing of the kind')}), and no config.json lies beside it."
        )
    try:
        config = GeneratorConfig.from_json(header.get("generator", {}))
    except HYWUError as error:
        raise HYWUError(f"{path}: {error}") from error
    return _with_identity(Source(path, (path,), config))


def _open_folder(folder: Path) -> Source:
    config_file = folder / "config.json"
    try:
        data = json.loads(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HYWUError(f"{folder}: no config.json; this is not a generator's folder.") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise HYWUError(f"{config_file}: not JSON ({error}); download it again.") from error
    try:
        config = GeneratorConfig.from_official(data)
    except HYWUError as error:
        raise HYWUError(f"{config_file}: {error}") from error
    return _with_identity(Source(folder, _folder_files(folder), config))


def _folder_files(folder: Path) -> tuple[Path, ...]:
    index = folder / INDEX
    if not index.is_file():
        for pattern in ("model.safetensors", "model-*.safetensors", "*.safetensors"):
            if files := tuple(sorted(folder.glob(pattern))):
                return files
        raise HYWUError(f"{folder}: holds no .safetensors file.")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        # only names: an index must not lead out of its folder
        files = tuple(folder / Path(name).name for name in sorted(set(weight_map.values())))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HYWUError(
            f"{index}: not an index of shards ({error!r}); download it again, or delete it: shards "
            "are found without it."
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise HYWUError(f"{folder}: the index names shards that are missing: {', '.join(missing)}.")
    return files


def _with_identity(source: Source) -> Source:
    identity = {"name": source.path.name, "digest": checkpoint_digest(source.files)}
    provenance = {**source.config.provenance, "checkpoint": identity}
    return Source(source.path, source.files, source.config.with_(provenance=provenance))


def checkpoint_digest(files: tuple[Path, ...]) -> str:
    """Identity of a checkpoint: hash of every file's size and of blocks spread over it.

    It tells checkpoints apart in milliseconds, official ones of 16 GB too; it is no integrity check.
    """
    sha, block = hashlib.sha256(), 1 << 18
    for file in files:
        size = file.stat().st_size
        sha.update(f"{size}".encode())
        with file.open("rb") as stream:
            for position in sorted({0, *(max(0, (size - block) * i // 15) for i in range(16))}):
                stream.seek(position)
                sha.update(stream.read(block))
    return sha.hexdigest()[:32]


# -- tensors of a file <-> parameters --------------------------------------------------------------


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

    Raises HYWUError when layers were rounded to fp8: the checkpoint's own values are gone.
    """
    check_saveable(generator)
    parameters = dict(generator.named_parameters())
    for name, slot in slots(generator).items():
        whole = parameters[slot.parameter]
        if whole.is_meta:
            yield name, generator.mapped.tensor(name).to(whole.dtype)
        else:
            yield name, whole[slot.start : slot.start + slot.shape[0]]


def check_saveable(generator: ParameterGenerator) -> None:
    """Raises HYWUError when the values that a file should hold are gone."""
    if uses_fp8(generator):
        raise HYWUError(
            "this generator's linear layers were rounded to fp8, so it can't be saved; save it before "
            "to_fp8, or copy the checkpoint that it was loaded from."
        )


def _read_into(
    generator: ParameterGenerator,
    source: Source,
    device: torch.device,
    blocks: torch.device,
    dtype: torch.dtype | None,
) -> tuple[dict[str, Tensor], MappedBlocks | None]:
    """The generator's parameters, filled from the checkpoint's files; one file open at a time.

    blocks: where the parameters of the transformer's blocks go; the others go to `device`. On "meta"
    they are looked at, left in the files, and read by the second result.
    """
    wanted = slots(generator)
    shapes = {name: tuple(p.shape) for name, p in generator.named_parameters()}
    tensors: dict[str, Tensor] = {}
    read: dict[str, Path] = {}
    sums: dict[str, Tensor] = {}
    for file in source.files:
        with open_tensors(file) as opened:
            _check_keys(file, opened, wanted, read)
            for key in opened.keys():  # noqa: SIM118
                value, slot = opened.get_tensor(key), wanted[key]
                _check_dtype(file, key, value.dtype, dtype)
                name = slot.parameter
                if name not in tensors:
                    place = blocks if name.startswith("model.blocks.") else device
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
            f"{source.path}: lacks {len(missing)} tensors, for example {', '.join(missing[:3])}; a "
            "shard may be missing or the config belongs to another checkpoint."
        )
    mapped = MappedBlocks(wanted, read) if blocks.type == "meta" else None
    _check_finite(source, sums, wanted, tensors, mapped)
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
    source: Source,
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
            f"{source.path}: values that are not finite in {', '.join(bad[:3])}"
            f"{f' and {len(bad) - 3} more tensors' if len(bad) > 3 else ''}; the file is damaged, or "
            "the weights don't fit the dtype (try bfloat16 or float32)."
        )
