"""Generated LoRAs as files below ComfyUI's folders, in three formats."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ...hywu_core.errors import HYWUError
from ...hywu_core.files import open_tensors, read_header, read_tensors
from ...hywu_core.formats import load_lora as read_lora
from ...hywu_core.formats.foreign import from_state_dict
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
_MATRIX = re.compile(r"[._](lora[._A-Z]|alpha$|diff|hada_|lokr_|dora_scale|oft_|w_norm|b_norm).*$")


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
    """What ComfyUI's own loader makes of a file for this model, under the model's own names."""
    tensors, _ = read_tensors(path, "cpu")
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(
        comfy.lora_convert.convert_lora(tensors), known, log_missing=False
    )
    pieces: dict[str, list[_Piece]] = {}
    used: set[str] = set()
    for key, adapter in patches.items():
        target, *place = (key,) if isinstance(key, str) else key
        plain = isinstance(adapter, LoRAAdapter) and not any(
            isinstance(weight, Tensor) for weight in adapter.weights[3:]
        )
        if not plain or len(place) > 1 or not target.endswith(".weight"):
            raise HYWUError(
                f"{path}: what it holds for {target} is no plain pair of lora_A and lora_B, which is all that "
                "can be taken here; use ComfyUI's own Load LoRA."
            )
        used |= adapter.loaded_keys
        up, down, alpha = adapter.weights[:3]
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        pieces.setdefault(target, []).append(_Piece(down, up, scale, *place))
    warnings = _left_out(path, model, tensors.keys() - used, bool(pieces), skip)
    renamed: dict[str, Tensor] = {}
    for target, parts in pieces.items():
        name = target.removeprefix(ROOT).removesuffix(".weight")
        shape = comfy.utils.get_attr(model.model, target).shape
        a, b, scale = parts[0].whole if parts[0].at is None else _joined(parts, shape)
        renamed |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        renamed[f"{name}.alpha"] = torch.tensor(scale * a.shape[0])
    return from_state_dict(renamed, {}, None, None), warnings


@dataclass(frozen=True)
class _Piece:
    """A pair for a module, or for a slice of a fused one: `at` is (dimension, start, length)."""

    a: Tensor
    b: Tensor
    scale: float
    at: tuple[int, int, int] | None = None

    @property
    def whole(self) -> tuple[Tensor, Tensor, float]:
        return self.a, self.b, self.scale


def _joined(parts: list[_Piece], shape: Sequence[int]) -> tuple[Tensor, Tensor, float]:
    """Slices of one weight ``[out, in]`` as a pair of the sum of their ranks: lora_A, lora_B, scale."""
    rank = sum(part.a.shape[0] for part in parts)
    a = parts[0].a.new_zeros(rank, shape[1])
    b = parts[0].b.new_zeros(shape[0], rank)
    scales = {part.scale for part in parts}
    if len(scales) > 1:
        b = b.float()
    row = 0
    for part in parts:
        to = slice(row, row := row + part.a.shape[0])
        dimension, start, length = part.at or (0, 0, shape[0])
        span = slice(start, start + length)
        factor = part.scale if len(scales) > 1 else 1.0
        rows, columns = (span, slice(None)) if dimension == 0 else (slice(None), span)
        a[to, columns] = part.a.flatten(1)
        b[rows, to] = part.b.flatten(1).to(b.dtype) * factor
    return a, b, scales.pop() if len(scales) == 1 else 1.0


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
