"""Generator checkpoints: our own single files, and opening and loading either form, shard by shard.

Our file's header says everything: config, layout, encoder, base. official.py has the other form.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import HYWUError
from ..files import open_tensors, read_header, save_tensors
from ..fingerprint import sampled
from .config import GeneratorConfig, RoPEPrecision
from .model import ParameterGenerator
from .official import open_folder
from .tensors import BLOCKS, file_tensors, read_into

FORMAT = "hywu-generator-1"


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

    path: an official folder (config.json and safetensors, sharded or not, with or without index), or one of our
        files.
    dtype: None keeps the file's.
    rope_precision: None keeps the checkpoint's.
    operations, memory_budget: see ParameterGenerator. With a budget that the weights don't fit in, the blocks'
        weights stay in host memory; on the CPU, where the budget is of host memory itself, a generator with a
        budget reads its blocks from the file's memory map (the file must stay; the generator can't be moved or
        cast).
    Tensors go from the file's memory map straight to the device and dtype, one shard at a time.
    Raises HYWUError naming the file and the keys when something is missing, extra, misshaped, not finite or
    truncated.
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
    tensors, mapped = read_into(generator, source.path, source.files, device, blocks, dtype)
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        setattr(generator.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    if memory_budget is not None:
        generator.memory_budget = memory_budget
        if mapped is not None:
            generator.residency.mapped = mapped
            generator.residency.offload(generator.model)
        # planned with the shortest condition; each call plans anew, and may offload more
        elif generator.memory_plan(1, 1).offloads:
            generator.residency.offload(generator.model)
        else:
            generator.to(device)
    return generator.eval()


def open_checkpoint(path: str | Path) -> Source:
    """Find a checkpoint's files and read its description, without reading weights. Raises HYWUError."""
    path = Path(path)
    if path.is_dir():
        return _folder(path)
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
            return _folder(path.parent)
        raise HYWUError(
            f"{path}: not a HY-WU generator file (its header says "
            f"{header.get('format', 'nothing of the kind')}), and no config.json lies beside it."
        )
    try:
        config = GeneratorConfig.from_json(header.get("generator", {}))
    except HYWUError as error:
        raise HYWUError(f"{path}: {error}") from error
    return _with_identity(Source(path, (path,), config))


def _folder(folder: Path) -> Source:
    config, files = open_folder(folder)
    return _with_identity(Source(folder, files, config))


def _with_identity(source: Source) -> Source:
    _check_sizes(source)
    identity = {"name": source.path.name, "digest": checkpoint_digest(source.files)}
    provenance = {**source.config.provenance, "checkpoint": identity}
    return Source(source.path, source.files, source.config.with_(provenance=provenance))


def _check_sizes(source: Source) -> None:
    """Raises HYWUError where the config describes far more than the files hold, before any of it is built."""
    blocks, largest = set(), 0
    for file in source.files:
        with open_tensors(file) as opened:
            for key in opened.keys():  # noqa: SIM118
                largest = max(largest, *opened.get_slice(key).get_shape(), 0)
                if key.startswith(BLOCKS):
                    blocks.add(key.removeprefix(BLOCKS).partition(".")[0])
    config = source.config
    said = {"num_blocks (num_pg_layers)": (config.num_blocks, 2 * len(blocks) + 8)}
    widths = {"d_model": config.d_model, "values of a token": config.values_per_position}
    widths |= {f"width of condition part '{n}'": w for n, w in config.condition.items()}
    said |= {name: (value, 4 * largest) for name, value in widths.items()}
    for name, (value, most) in said.items():
        if value > most:
            raise HYWUError(
                f"{source.path}: the config says {name} {value:,}, and the files hold {len(blocks)} blocks "
                f"and no side longer than {largest:,}; config and weights are of different checkpoints, or "
                "damaged. Download them again."
            )


def checkpoint_digest(files: tuple[Path, ...]) -> str:
    """Identity of a checkpoint: hash of every file's size and of blocks spread over it.

    It tells checkpoints apart in milliseconds, official ones of 16 GB too; it is no integrity check.
    """
    return sampled(files)


def save_generator(
    generator: ParameterGenerator,
    path: str | Path,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write one of our .safetensors files, atomically.

    dtype: None keeps the parameters'.
    """
    tensors = {name: value.detach().to(dtype=dtype) for name, value in file_tensors(generator)}
    config = generator.config
    header = {"format": FORMAT, "generator": config.without_identity().to_json()}
    return save_tensors(path, tensors, header, overwrite)
