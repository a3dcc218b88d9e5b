"""The official folder: which tensor lies in which shard, all checked before anything is allocated.

A stored tensor fills a *slot*: a part of one parameter of ours. Experts are stored one by one, with up and
gate in one matrix; here they are banks (see layers.Experts). No code of the folder runs.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import HYWUError
from ...files import is_file, open_tensors, parse_json
from ...precision import DTYPES
from .codecs import Codec, Plain
from .config import GenerationSettings, HunyuanConfig, read_config
from .quantized import Quantized, find_quantized
from .vision import UNUSED

INDEX = "model.safetensors.index.json"
#: Parts of the names of parameters that are float32 in every model.
FLOAT32 = (".gate.wg.",)
#: Most names that an error lists.
LISTED = 8


class Head(NamedTuple):
    """A tensor in a file: its bytes are [start, stop) of it."""

    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int


@dataclass(frozen=True)
class Slot:
    """parameter: our name.

    expert: which of a bank, or None.
    rows: of the stored tensor, or None.
    """

    parameter: str
    expert: int | None = None
    rows: slice | None = None


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint: its shape and the slots that it fills."""

    shape: tuple[int, ...]
    slots: tuple[Slot, ...]


def stored_tensors(module: nn.Module, prefix: str = "") -> dict[str, Stored]:
    """Name in the files -> what is stored there, for all parameters of a module under `prefix`."""
    found: dict[str, Stored] = {}
    for name, parameter in module.named_parameters():
        path, shape = prefix + name, tuple(parameter.shape)
        owner, marker, bank = path.partition(".experts.")
        if not marker:
            found[path] = Stored(shape, (Slot(name),))
            continue
        if not bank.endswith(".weight") or len(shape) != 3:
            continue  # quantized, or expert by expert: read as it is stored (see banks.CodedBank)
        kind, inner = bank.removesuffix(".weight"), name
        count, out, in_ = shape
        for e in range(count):
            if kind == "w2":
                key = f"{owner}.experts.{e}.down_proj.weight"
                found[key] = Stored((out, in_), (Slot(inner, e),))
                continue
            key = f"{owner}.experts.{e}.gate_and_up_proj.weight"
            rows = slice(0, out) if kind == "w3" else slice(out, 2 * out)
            others = found[key].slots if key in found else ()
            found[key] = Stored((2 * out, in_), (*others, Slot(inner, e, rows)))
    return found


@dataclass(frozen=True)
class Folder:
    """An official folder that was looked through: configs, and the file of every stored tensor.

    shapes: of the model's tensors.
    quantized: those of them that are stored in fewer bits.
    heads: all that the files hold.
    """

    path: Path
    config: HunyuanConfig
    settings: GenerationSettings
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    quantized: Mapping[str, Quantized]
    heads: Mapping[str, Head]

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(file.stat().st_size for file in set(self.files.values()))

    def check(self, parts: Mapping[str, nn.Module]) -> None:
        """One HYWUError for all tensors that are missing, unknown or of another shape.

        parts: prefix in the files -> module (on "meta").
        """
        wanted: dict[str, Stored] = {}
        for prefix, module in parts.items():
            wanted |= stored_tensors(module, prefix)
        missing = [name for name in wanted if name not in self.shapes]
        unknown = [n for n in self.shapes if n not in wanted and not n.startswith(UNUSED)]
        wrong = [
            f"{name} is {list(self.shapes[name])}, config.json says {list(stored.shape)}"
            for name, stored in wanted.items()
            if name in self.shapes and self.shapes[name] != stored.shape
        ]
        said = [
            f"{len(names)} tensors {what}: {_some(names)}"
            for what, names in (
                ("are missing", missing),
                ("are unknown", unknown),
                ("have another shape", wrong),
            )
            if names
        ]
        if said:
            raise HYWUError(
                f"{self.path}: {'. '.join(said)}. Download the folder again, or use the config.json "
                "that belongs to these shards."
            )

    def codec(self, name: str) -> Codec:
        """How a tensor is stored."""
        if name in self.quantized:
            return self.quantized[name].codec
        return Plain("stored", DTYPES[self.heads[name].dtype])

    def coded(self, name: str, rows: slice | None = None) -> dict[str, Tensor]:
        """The parts of a tensor as it is stored, of some rows or of all; see `Codec.row`."""
        if name in self.quantized:
            return self.quantized[name].read(self._stored, rows)
        return {"codes": self._stored(name, rows)}

    def read(self, name: str) -> Tensor:
        """A tensor as numbers: as it is stored, or float32 where it was quantized."""
        if name not in self.quantized:
            return self._stored(name, None)
        return self.codec(name).decode(self.coded(name), torch.empty(self.shapes[name]))

    def _stored(self, name: str, rows: slice | None) -> Tensor:
        with open_tensors(self.files[name]) as opened:
            return opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows]

    @torch.no_grad()
    def fill(
        self,
        module: nn.Module,
        prefix: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        keep: Sequence[str] = FLOAT32,
    ) -> nn.Module:
        """Give a module (on "meta") its weights, tensor by tensor from the mapped files.

        Parameters that aren't on "meta" stay as they are.
        dtype: None keeps the stored one (of quantized ones, the last norm's); parameters whose name holds
        one of `keep` are float32 always. Returns the module, whose parameters take no gradients.
        """
        values: dict[str, Tensor] = {}
        parameters = dict(module.named_parameters())
        usual = stored_dtype(self)
        there = {name for name, value in parameters.items() if not value.is_meta}
        wanted_here = {
            name: stored
            for name, stored in stored_tensors(module, prefix).items()
            if not there.intersection(slot.parameter for slot in stored.slots)
        }
        for name, stored, tensor in self._read(wanted_here):
            for slot in stored.slots:
                kept = any(mark in slot.parameter for mark in keep)
                as_stored = usual if name in self.quantized else tensor.dtype
                wanted = torch.float32 if kept else dtype or as_stored
                piece = tensor if slot.rows is None else tensor[slot.rows]
                if slot.expert is None:
                    # a copy of its own, also where nothing is converted: the map is closed after
                    values[slot.parameter] = piece.to(device, wanted, copy=True)
                    continue
                if slot.parameter not in values:
                    shape = parameters[slot.parameter].shape
                    values[slot.parameter] = torch.empty(shape, dtype=wanted, device=device)
                values[slot.parameter][slot.expert].copy_(piece)
        for name, value in values.items():
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
        return module.eval()

    def _read(self, wanted: Mapping[str, Stored]) -> Iterator[tuple[str, Stored, Tensor]]:
        """Shard by shard, so that each is opened once."""
        by_file: dict[Path, list[str]] = {}
        for name in wanted:
            by_file.setdefault(self.files[name], []).append(name)
        for file, names in by_file.items():
            with open_tensors(file) as opened:
                for name in names:
                    quantized = name in self.quantized
                    yield (
                        name,
                        wanted[name],
                        self.read(name) if quantized else opened.get_tensor(name),
                    )


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(names[:LISTED])
    return listed if len(names) <= LISTED else f"{listed} and {len(names) - LISTED} more"


def open_folder(path: str | Path) -> Folder:
    """Look through an official folder; reads the heads of its files only.

    Raises HYWUError on another model's folder, a missing or truncated shard, a damaged index.
    """
    path = Path(path)
    if not path.is_dir():
        raise HYWUError(
            f"{path}: there is no such folder; choose the one with HunyuanImage-3's config.json."
        )
    data = read_config(path / "config.json")
    try:
        config = HunyuanConfig.from_json(data)
        generation = read_config(path / "generation_config.json")
        settings = GenerationSettings.read(generation, config.max_positions)
    except HYWUError as error:
        named = str(error).startswith(str(path))
        raise error if named else HYWUError(f"{path / 'config.json'}: {error}") from error
    except (TypeError, ValueError) as error:
        raise HYWUError(
            f"{path / 'generation_config.json'}: a value is not of its type ({error}); download it "
            "again."
        ) from error
    files: dict[str, Path] = {}
    heads: dict[str, Head] = {}
    for shard in _shards(path):
        for name, head in read_heads(shard).items():
            if name in files:
                raise HYWUError(
                    f"{path}: {name} lies in {files[name].name} and in {shard.name}; keep the shards "
                    "of one download only."
                )
            files[name], heads[name] = shard, head
    _check_counts(path, config, heads)
    shapes = {name: head.shape for name, head in heads.items()}
    folder = Folder(path, config, settings, files, shapes, {}, heads)
    dtypes = {name: head.dtype for name, head in heads.items()}
    quantized = find_quantized(shapes, dtypes, folder._stored, str(path))
    return replace(folder, quantized=quantized)


def _check_counts(path: Path, config: HunyuanConfig, names: Iterable[str]) -> None:
    """HYWUError where the config counts more or fewer layers than there are: nothing is built of its counts."""
    found: dict[str, set[int]] = {pattern: set() for pattern in config.counts()}
    for name in names:
        for pattern, numbers in found.items():
            if match := re.match(pattern, name):
                numbers.add(int(match[1]))
    for pattern, (key, count) in config.counts().items():
        held = len(found[pattern])
        if held != count:
            raise HYWUError(
                f"{path}: config.json says {key} {count:,}, the files hold {held:,}. Download the folder again, "
                "or use the config.json that belongs to these shards."
            )


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise HYWUError(f"{folder}: holds no .safetensors file; download the weights.")
        return found
    weights = read_config(index).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(v, str) for v in weights.values()):
        raise HYWUError(f"{index}: has no weight_map of names; download it again.")
    # names only: an index must not lead out of its folder
    shards = [folder / Path(name).name for name in sorted(set(weights.values()))]
    if missing := [shard.name for shard in shards if not is_file(shard)]:
        raise HYWUError(
            f"{folder}: {INDEX} names {len(shards)} shards, of which {_some(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; download them into the folder."
        )
    return shards


def read_heads(shard: Path) -> dict[str, Head]:
    """Name -> head of a shard's tensors; an incomplete file is a HYWUError with both sizes."""
    size = shard.stat().st_size
    try:
        with shard.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size - 8:
                raise ValueError(f"its head says {length:,} bytes of a file of {size:,}")
            head: dict[str, Any] = parse_json(handle.read(length), str(shard), dict)
        head.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in head.values()), default=0)
        start = 8 + length
        heads = {
            name: Head(
                tuple(map(int, entry["shape"])), str(entry["dtype"]),
                *(start + int(at) for at in entry["data_offsets"]),
            )
            for name, entry in head.items()
        }  # fmt: skip
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise HYWUError(
            f"{shard}: not a whole safetensors file ({error}); download it again."
        ) from error
    if size != end:
        raise HYWUError(
            f"{shard}: has {size:,} bytes where its head says {end:,}; download it again."
        )
    if unread := [name for name, each in heads.items() if each.dtype not in DTYPES]:
        raise HYWUError(
            f"{shard}: {unread[0]} is of the type {heads[unread[0]].dtype}, which isn't read; download it again."
        )
    return heads


def stored_dtype(folder: Folder) -> torch.dtype:
    """Of the last norm, which stands for the model's: nobody quantizes it."""
    return DTYPES[folder.heads["model.ln_f.weight"].dtype]


def parameters_of(folder: Folder) -> int:
    """How many numbers the folder holds."""
    return sum(math.prod(shape) for shape in folder.shapes.values())
