"""Writing generator checkpoints: our own single file, and official folders shard by shard."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import HYWUError
from ..files import atomic_path, save_tensors
from .checkpoints import FORMAT, INDEX, check_saveable, file_tensors, slots
from .config import GeneratorConfig
from .model import ParameterGenerator

#: Files of an official folder that hold or list weights.
_OFFICIAL_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors|" + re.escape(INDEX))


def save_generator(
    generator: ParameterGenerator,
    path: str | Path,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write one of our .safetensors files, atomically. dtype: None keeps the parameters'."""
    tensors = {name: value.detach().to(dtype=dtype) for name, value in file_tensors(generator)}
    config = generator.config
    header = {"format": FORMAT, "generator": _without_identity(config).to_json()}
    return save_tensors(path, tensors, header, overwrite)


def save_official(
    generator: ParameterGenerator,
    folder: str | Path,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write an official folder: config.json and shards with an index. Raises HYWUError.

    `lora_a_scale` and `lora_b_scale` are folded into the output projections: the official form has no
    other place for them. One shard is in memory at a time; what is in the folder stays until all is
    written, then shards of a checkpoint that was there before go.
    """
    folder = Path(folder)
    check_saveable(generator)
    description = (
        _without_identity(generator.config).with_(lora_a_scale=1.0, lora_b_scale=1.0).to_official()
    )
    if folder.exists() and not folder.is_dir():
        raise HYWUError(f"{folder}: is a file and a folder goes there; choose another name.")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise HYWUError(f"{folder}: exists already and isn't empty; choose another folder.")
    like = dtype or next(generator.parameters()).dtype
    description["torch_dtype"] = str(like).removeprefix("torch.")
    sizes = _official_shards(generator, dtype, shard_bytes)
    count = len(sizes)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    shards = dict(zip(names if count > 1 else ["model.safetensors"], sizes, strict=True))
    tensors = _official_tensors(generator, dtype)
    with contextlib.ExitStack() as stack:
        # files take their places in reverse order as the stack unwinds: config.json is the last
        _write_json(stack, folder / "config.json", description, overwrite)
        if count > 1:
            total = sum(sum(shard.values()) for shard in sizes)
            weight_map = {key: name for name, shard in shards.items() for key in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(stack, folder / INDEX, index, overwrite)
        for name, shard in shards.items():
            part = stack.enter_context(atomic_path(folder / name, overwrite))
            save_file(
                dict(itertools.islice(tensors, len(shard))), str(part), metadata={"format": "pt"}
            )
    _remove_former(folder, {*shards, *([INDEX] if count > 1 else [])})
    return folder


def _official_shards(
    generator: ParameterGenerator, dtype: torch.dtype | None, shard_bytes: int
) -> list[dict[str, int]]:
    """For each shard: tensor name -> bytes, in order. A shard keeps to `shard_bytes` or is one tensor."""
    dtypes = {name: dtype or p.dtype for name, p in generator.named_parameters()}
    shards: list[dict[str, int]] = [{}]
    for name, slot in slots(generator).items():
        size = math.prod(slot.shape) * dtypes[slot.parameter].itemsize
        if shards[-1] and sum(shards[-1].values()) + size > shard_bytes:
            shards.append({})
        shards[-1][name] = size
    return shards


def _official_tensors(
    generator: ParameterGenerator, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """(name, copy in host memory) of every tensor, the factors on the LoRA folded in."""
    scales = {
        ".proj_out_A.": generator.config.lora_a_scale,
        ".proj_out_B.": generator.config.lora_b_scale,
    }
    for name, value in file_tensors(generator):
        value = value.detach()
        for part, factor in scales.items():
            value = value * factor if part in name and factor != 1.0 else value
        yield name, value.to(device="cpu", dtype=dtype, copy=True)


def _remove_former(folder: Path, written: set[str]) -> None:
    """Delete shards and an index that aren't of the checkpoint just written: readers would take them."""
    for file in folder.glob("model*"):
        if file.name not in written and _OFFICIAL_FILE.fullmatch(file.name):
            file.unlink()


def _write_json(
    stack: contextlib.ExitStack, path: Path, data: Mapping[str, Any], overwrite: bool
) -> None:
    # never sort the keys: the order of pg_mapping is the order of the tokens
    part = stack.enter_context(atomic_path(path, overwrite))
    part.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _without_identity(config: GeneratorConfig) -> GeneratorConfig:
    """The checkpoint's own name and hash are read off the file, so they are not stored in it."""
    provenance = {k: v for k, v in config.provenance.items() if k != "checkpoint"}
    return config.with_(provenance=provenance)
