"""All that is known of Tencent's generator folder: its config.json, its shards, reading and writing.

The form is read off the published inference code (Tencent-Hunyuan/HY-WU, of which nothing is taken): one stack of
numbered layers, one condition part, and a `pg_mapping` whose order in the file is the order of the tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..condition import OFFICIAL_PART
from ..errors import HYWUError
from ..files import atomic_folder, is_file, read_json, write_json
from ..layout import LoRALayout, Module, Stack, check_count
from .config import GeneratorConfig
from .tensors import check_saveable, file_tensors, slots

if TYPE_CHECKING:
    from .model import ParameterGenerator

INDEX = "model.safetensors.index.json"

#: Files of an official folder that hold or list weights.
_WEIGHTS_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors|" + re.escape(INDEX))


# -- config.json -----------------------------------------------------------------------------------


def read_config(config: Mapping[str, Any]) -> GeneratorConfig:
    """The generator of an official ``config.json``, read in file order.

    config: from a reader that keeps file order (``json.load`` does). Official checkpoints run with bfloat16
        position tables unless the file names ``rope_precision`` itself (ours do).
    Raises HYWUError on keys it lacks, values of another type, and a reordered ``pg_mapping``.
    """
    if not isinstance(config, Mapping):
        raise HYWUError("not a JSON object.")
    if config.get("model_type") != "parameter_generator":
        raise HYWUError(f"model_type is {config.get('model_type')!r}, not 'parameter_generator'.")
    layout = read_layout(config)
    recorded = config.get("layout_digest")
    if recorded not in (None, layout.digest):
        raise HYWUError(
            "pg_mapping was reordered after it was written (a tool that sorts keys does that); "
            "its order sets the meaning of every token, so restore the original config.json."
        )
    with _named_values():
        if config["output_dim"] != config["token_dim"]:
            raise HYWUError(
                f"output_dim {config['output_dim']} differs from token_dim "
                f"{config['token_dim']}; they must be equal."
            )
        return GeneratorConfig(
            layout=layout,
            condition={config.get("condition_part", OFFICIAL_PART): int(config["input_dim"])},
            token_dim=int(config["token_dim"]),
            dim_accumulation=int(config["dim_accumulation"]),
            d_model=int(config["d_model"]),
            head_dim=int(config["head_dim"]),
            num_blocks=int(config["num_pg_layers"]),
            rope_precision=config.get("rope_precision", "bfloat16"),
            encoder=config.get("encoder", {"type": "hunyuan_image_3"}),
            base=config.get("base", "tencent/HunyuanImage-3.0-Instruct"),
            provenance=config.get("provenance", {}),
        )


def read_layout(config: Mapping[str, Any]) -> LoRALayout:
    """The layout of an official ``config.json``; see `read_config`. Raises HYWUError."""
    with _named_values():
        modules = _modules(config["pg_mapping"])
        prefix, layers = str(config["prefix"]), int(config["num_base_model_layers"])
        check_count(layers * len(modules))
        stack = Stack(tuple(f"{prefix}{i}" for i in range(layers)), modules)
        return LoRALayout((stack,), int(config["rank"]), float(config["alpha"]))


def write_config(config: GeneratorConfig) -> dict[str, Any]:
    """The ``config.json`` of an official folder, with our additions under keys it ignores.

    Raises HYWUError when the architecture goes beyond the official one.
    """
    if not is_official(config):
        raise HYWUError(
            f"this generator has {len(config.layout.stacks)} stacks and {len(config.condition)} "
            "condition parts; the official form holds one of each, with numbered layers, Linear "
            "modules and each list of experts in one piece. Keep it as one of our .safetensors "
            "files."
        )
    stack, alpha = config.layout.stacks[0], config.layout.alpha
    ((part, width),) = config.condition.items()
    return {
        "model_type": "parameter_generator",
        "architectures": ["ParameterGenerator"],
        "token_dim": config.token_dim,
        "rank": config.layout.rank,
        "alpha": int(alpha) if alpha == int(alpha) else alpha,
        "input_dim": width,
        "dim_accumulation": config.dim_accumulation,
        "d_model": config.d_model,
        "head_dim": config.head_dim,
        "num_base_model_layers": len(stack.layers),
        "output_dim": config.token_dim,
        "num_pg_layers": config.num_blocks,
        "prefix": stack.prefix,
        "pg_mapping": _mapping(config.layout),
        "layout_digest": config.layout.digest,
        "condition_part": part,
        "rope_precision": config.rope_precision,
        "encoder": dict(config.encoder),
        "base": config.base,
        "provenance": dict(config.provenance),
    }


def is_official(config: GeneratorConfig) -> bool:
    """Whether an official folder can hold this generator."""
    stack = config.layout.stacks[0]
    return (
        len(config.layout.stacks) == 1
        and len(config.condition) == 1
        and stack.prefix != ""
        and stack.layers == tuple(f"{stack.prefix}{i}" for i in range(len(stack.layers)))
        # what reads it back must find these modules in this order
        and stack.modules == _modules(_mapping(config.layout))
    )


def _mapping(layout: LoRALayout) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for module in layout.stacks[0].modules:
        dims = {"lora_A_dim": module.in_features, "lora_B_dim": module.out_features}
        if not module.num_experts:
            mapping[module.name] = dims
            continue
        group, _, sub = module.name.rpartition(".")
        entry = mapping.setdefault(
            group, {"type": "grouped", "num_experts": module.num_experts, "sub_weights": {}}
        )
        entry.setdefault("sub_weights", {})[sub] = dims
    return mapping


def _modules(mapping: Mapping[str, Any]) -> tuple[Module, ...]:
    """The modules of a ``pg_mapping``, grouped entries expanded, in file order."""
    modules: list[Module] = []
    for name, entry in mapping.items():
        if entry.get("type") == "grouped":
            experts = int(entry["num_experts"])
            modules += [
                Module(f"{name}.{sub}", int(d["lora_A_dim"]), int(d["lora_B_dim"]), experts)
                for sub, d in entry["sub_weights"].items()
            ]
        else:
            modules.append(Module(name, int(entry["lora_A_dim"]), int(entry["lora_B_dim"])))
    return tuple(modules)


@contextlib.contextmanager
def _named_values() -> Iterator[None]:
    """Around code that reads a ``config.json``: what it lacks or has in another type is a HYWUError."""
    try:
        yield
    except HYWUError:
        raise
    except KeyError as error:
        raise HYWUError(f"the key {error} is missing.") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise HYWUError(f"a value is not of its type ({error}).") from error


# -- the folder ------------------------------------------------------------------------------------


def open_folder(folder: Path) -> tuple[GeneratorConfig, tuple[Path, ...]]:
    """(config, weight files) of an official folder, without reading weights. Raises HYWUError."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise HYWUError(f"{folder}: no config.json; this is not a generator's folder.")
    data = read_json(config_file, way_out="download it again")
    try:
        config = read_config(data)
    except HYWUError as error:
        raise HYWUError(f"{config_file}: {error}") from error
    return config, _folder_files(folder)


def _folder_files(folder: Path) -> tuple[Path, ...]:
    index = folder / INDEX
    if not index.is_file():
        for pattern in ("model.safetensors", "model-*.safetensors", "*.safetensors"):
            if files := tuple(sorted(folder.glob(pattern))):
                return files
        raise HYWUError(f"{folder}: holds no .safetensors file.")
    try:
        weight_map = read_json(index, dict)["weight_map"]
        # only names: an index must not lead out of its folder
        files = tuple(folder / Path(name).name for name in sorted(set(weight_map.values())))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HYWUError(
            f"{index}: not an index of shards ({error!r}); download it again, or delete it: shards "
            "are found without it."
        ) from error
    missing = [file.name for file in files if not is_file(file)]
    if missing:
        raise HYWUError(f"{folder}: the index names shards that are missing: {', '.join(missing)}.")
    return files


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
    unscaled = generator.config.without_identity().with_(lora_a_scale=1.0, lora_b_scale=1.0)
    description = write_config(unscaled)
    if folder.exists() and not folder.is_dir():
        raise HYWUError(f"{folder}: is a file and a folder goes there; choose another name.")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise HYWUError(f"{folder}: exists already and isn't empty; choose another folder.")
    like = dtype or next(generator.parameters()).dtype
    description["torch_dtype"] = str(like).removeprefix("torch.")
    sizes = _shards(generator, dtype, shard_bytes)
    count = len(sizes)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    shards = dict(zip(names if count > 1 else ["model.safetensors"], sizes, strict=True))
    tensors = _scaled_tensors(generator, dtype)
    # the folder is exchanged whole: one half old and half new would load without a word
    with atomic_folder(folder, overwrite=True, drop=_WEIGHTS_FILE.fullmatch) as new:
        for name, shard in shards.items():
            held = dict(itertools.islice(tensors, len(shard)))
            save_file(held, str(new / name), metadata={"format": "pt"})
        if count > 1:
            total = sum(sum(shard.values()) for shard in sizes)
            weight_map = {key: name for name, shard in shards.items() for key in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(new / INDEX, index, ascii=True)
        # never sort the keys: the order of pg_mapping is the order of the tokens
        write_json(new / "config.json", description, ascii=True)
    return folder


def _shards(
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


def _scaled_tensors(
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
