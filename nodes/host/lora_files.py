"""Generated LoRAs as files below ComfyUI's folders, in three formats."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch
from torch import Tensor

from ...hywu_core.errors import HYWUError
from ...hywu_core.files import open_tensors, read_header, read_metadata, read_tensors
from ...hywu_core.formats import load_lora as read_lora
from ...hywu_core.formats.foreign import of_pairs, read_pairs
from ...hywu_core.formats.scales import Scales
from ...hywu_core.lora import GeneratedLoRA
from . import paths
from .application import ROOT

#: What the widget shows -> (the engine's format, suffix of the file or folder)
FORMATS = {
    "ComfyUI": ("comfyui", ".safetensors"),
    "PEFT": ("peft", ""),
    "native": ("native", ".safetensors"),
}
#: Start of names that have lost their dots; only the model itself can tell where they were.
FLAT = "lora_unet_"
#: What follows a module's name in the keys of any program.
_MATRIX = re.compile(
    r"[._](lora[._A-Z]|alpha$|diff|hada_|lokr_|glora_|[ab][12]\.weight$|dora_scale|oft_|w_norm|b_norm|set_weight|reshape_)"
    r".*$"
)


def save_lora(lora: GeneratedLoRA, prefix: str, format: str) -> list[str]:
    """Save a batch: one file for all as "native", else one file or folder per image.

    Returns the names below the output folder. Raises HYWUError on values that are not finite and on
    a prefix that leads out of that folder; then nothing is written.
    """
    kind, suffix = FORMATS[format]
    lora.check_finite("The LoRA")
    items = [lora] if kind == "native" else [lora.select(i) for i in range(lora.batch_size)]
    return [
        paths.save_new(prefix, suffix, lambda path, item=item: item.save(path, kind))
        for item in items
    ]


def load_lora(
    name: str, model: Any = None, skip_missing: bool = False
) -> tuple[GeneratedLoRA, list[str]]:
    """(a bundled LoRA or one of the listed files, warnings). Raises HYWUError naming the file.

    model: the MODEL it is for. With it, names of every kind that ComfyUI's own loader knows are translated,
        slices of fused layers too.
    skip_missing: leave out what isn't the model's.
    """
    path = paths.lora_path(name)
    header = read_header(path) if path.is_file() else {"layout": None}
    warnings: list[str] = []
    if "layout" in header or model is None:
        _check_names(path, model, header)
        lora = read_lora(path)
    else:
        lora, warnings = _with_names_of(model, path, skip_missing)
    lora.check_finite(str(path))
    return lora, warnings


def _check_names(path: Path, model: Any, header: dict[str, Any]) -> None:
    """HYWUError on names that only the model can translate, where none is connected."""
    if model is not None or "layout" in header:
        return
    with open_tensors(path) as file:
        names = list(file.keys())
    flat = next((name for name in names if name.startswith(FLAT)), None)
    if flat is not None:
        raise HYWUError(
            f"{path}: names such as {flat} don't say where their dots were; connect the MODEL that "
            "this LoRA is for to the model input of Load Generated LoRA."
        )


def _with_names_of(model: Any, path: Path, skip: bool) -> tuple[GeneratedLoRA, list[str]]:
    """A file under the model's own names, which its names lead to in the table of ComfyUI's own loader."""
    tensors, _ = read_tensors(path, "cpu")
    if not tensors:
        raise HYWUError(f"{path}: is empty; save it again.")
    names = _StockNames(model)
    try:
        tensors = comfy.lora_convert.convert_lora(tensors)
        told = Scales(None, read_metadata(path))
        pairs, scales, left_out = read_pairs(tensors, told, names)
    except (
        KeyError
    ) as error:  # of the conversion, which looks for keys beside those it knows a file by
        raise HYWUError(f"{path}: lacks {error}; it is incomplete.") from error
    except HYWUError as error:
        raise HYWUError(f"{path}: {error}") from error
    _check_plain(path, left_out, names)
    warnings = [f"{path.name}: {said}" for said in told.warnings]
    warnings += _left_out(path, model, left_out.keys(), bool(pairs), skip)
    pieces: dict[str, list[_Piece]] = {}
    for name, (a, b) in pairs.items():
        target, *place = names.targets[name]
        pieces.setdefault(target, []).append(_Piece(a, b, scales[name], *place))
    whole, scale_of = {}, {}
    for target, parts in pieces.items():
        name = target.removeprefix(ROOT).removesuffix(".weight")
        shape = comfy.utils.get_attr(model.model, target).shape
        try:
            a, b, scale_of[name] = _joined(parts, shape)
        except HYWUError as error:
            raise HYWUError(f"{path}: {name}: {error}") from error
        whole[name] = a, b
    return of_pairs(whole, scale_of), warnings


class _StockNames:
    """Names that ComfyUI's own loader knows -> a name for each weight, or slice of one, of the model."""

    def __init__(self, model: Any) -> None:
        self.known: dict[str, Any] = comfy.lora.model_lora_keys_unet(model.model, {})
        #: The name of a weight or slice -> (weight,) or (weight, (dimension, start, length)).
        self.targets: dict[str, tuple[Any, ...]] = {}

    def of(self, name: str) -> str | None:
        found = self.known.get(name)
        if found is None:
            return None
        target, *place = (found,) if isinstance(found, str) else found
        if len(place) > 1 or not target.endswith(".weight"):
            raise HYWUError(_no_pair(target))
        shown = target.removesuffix(".weight")
        if place:
            dimension, start, length = place[0]
            shown += f"[{':, ' * dimension}{start}:{start + length}]"
        self.targets[shown] = target, *place
        return shown


def _no_pair(what: str) -> str:
    return (
        f"what it holds for {what} is no plain pair of lora_A and lora_B, which is all that can be taken here; "
        "use ComfyUI's own Load LoRA."
    )


def _check_plain(path: Path, left_out: Mapping[str, str], names: _StockNames) -> None:
    """HYWUError where a file changes a module of the model in another way than by a pair, or beside it."""
    for key in left_out:
        module = _MATRIX.sub("", key)
        if key != module and module in names.known:
            raise HYWUError(f"{path}: {_no_pair(key)}")


@dataclass(frozen=True)
class _Piece:
    """A pair for a module, or for a slice of a fused one: `at` is (dimension, start, length)."""

    a: Tensor
    b: Tensor
    scale: float
    at: tuple[int, int, int] | None = None


def _joined(parts: list[_Piece], shape: Sequence[int]) -> tuple[Tensor, Tensor, float]:
    """Pairs of one weight ``[out, in]`` or its slices as one of the sum of their ranks: lora_A, lora_B, scale.

    Raises HYWUError on a pair that isn't its slice's size.
    """
    if len(parts) == 1 and parts[0].at is None:
        return parts[0].a, parts[0].b, parts[0].scale
    rank = sum(part.a.shape[0] for part in parts)
    one = len({part.scale for part in parts}) == 1
    dtype = functools.reduce(
        torch.promote_types, (f.dtype for part in parts for f in (part.a, part.b))
    )
    a = torch.zeros(rank, shape[1], dtype=dtype)
    b = torch.zeros(
        shape[0], rank, dtype=dtype if one else torch.promote_types(dtype, torch.float32)
    )
    row = 0
    for part in parts:
        to = slice(row, row := row + part.a.shape[0])
        dimension, start, length = part.at or (0, 0, shape[0])
        span = slice(start, start + length)
        rows, columns = (span, slice(None)) if dimension == 0 else (slice(None), span)
        sizes = tuple(part.b.shape[:1] + part.a.flatten(1).shape[1:])
        if sizes != (wanted := (b[rows].shape[0], a[:, columns].shape[1])):
            raise HYWUError(
                f"the pair for {part.at or 'all'} of it is {sizes[0]} x {sizes[1]}, and that is "
                f"{wanted[0]} x {wanted[1]}; connect the model that it is for."
            )
        a[to, columns] = part.a.flatten(1)
        b[rows, to] = part.b.flatten(1).to(b.dtype) * (1.0 if one else part.scale)
    return a, b, parts[0].scale if one else 1.0


def _left_out(path: Path, model: Any, keys: Set[str], some: bool, skip: bool) -> list[str]:
    """A warning that counts and names what isn't the model's, or HYWUError saying the same."""
    names = sorted({_MATRIX.sub("", key) for key in keys})
    if not names:
        return []
    kind = type(model.model.diffusion_model).__name__
    what = f"{len(names)} of its modules, such as {names[0]}, are no modules of {kind}"
    if skip and some:
        return [f"{path.name}: {what}; they were left out."]
    misfit = getattr(model.model.diffusion_model, "misfit", None)
    if said := misfit and misfit([name.removeprefix("diffusion_model.") for name in names]):
        raise HYWUError(f"{path}: {what}. {said}")
    way = "turn skip_missing on to load the others" if some else "connect the model that it is for"
    raise HYWUError(
        f"{path}: {what}; {way}, or use ComfyUI's own Load LoRA, which also takes those of a CLIP."
    )
