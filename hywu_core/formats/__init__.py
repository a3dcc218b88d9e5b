"""A generated LoRA on disk: native (everything), PEFT (a folder), ComfyUI (one file)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..errors import HYWUError
from ..files import open_tensors, parse_header, read_metadata, read_tensors
from ..layout import LoRALayout
from ..lora import GeneratedLoRA
from . import comfyui, native, peft
from .foreign import from_state_dict

_WRITERS: dict[str, Callable[[GeneratedLoRA, Path, bool], Path]] = {
    "native": native.save,
    "peft": peft.save,
    "comfyui": comfyui.save,
}
FORMATS = tuple(_WRITERS)


def save_lora(
    lora: GeneratedLoRA, path: str | Path, format: str = "native", overwrite: bool = False
) -> Path:
    """Write a LoRA and return where it lies; nothing is ever half there.

    format: "native" keeps batch, layout and provenance in one file; "peft" makes a folder for
        ``peft.PeftModel.from_pretrained``; "comfyui" makes a file for ComfyUI's stock LoRA loader. The last
        two hold one LoRA.
    Raises HYWUError on an unknown format, an existing path, a folder that can't be written, a batch where the
    format holds one, and values that are not finite.
    """
    if format not in _WRITERS:
        raise HYWUError(f"Unknown LoRA format '{format}'; choose one of {', '.join(FORMATS)}.")
    if format != "native" and lora.batch_size != 1:
        raise HYWUError(
            f"{path}: the {format} format holds one LoRA and this batch has {lora.batch_size}; "
            "save lora.select(i) for each item, or the whole batch as 'native'."
        )
    lora.check_finite(f"The LoRA for {path}")
    return _WRITERS[format](lora.detach(), Path(path), overwrite)


def load_lora(
    path: str | Path,
    device: torch.device | str = "cpu",
    base: LoRALayout | nn.Module | None = None,
    skip_missing: bool = False,
) -> GeneratedLoRA:
    """Read a LoRA in any format, told apart by the file itself.

    base: the base model or its layout; resolves names of other programs, of the ``lora_unet_*`` kind too, and
        is checked against the LoRA when given.
    skip_missing: leave out what the base lacks and what can't be read; the log and the provenance
        (``left_out``) say it.
    Raises HYWUError naming the file.
    """
    path = Path(path)
    try:
        lora = _load(path, device, base, skip_missing)
    except HYWUError as error:
        text = str(error)
        raise (error if text.startswith(str(path)) else HYWUError(f"{path}: {text}")) from error
    if isinstance(base, LoRALayout):
        _check_targets(path, lora, base)
    elif base is not None:
        lora.layout.missing(base, skip_missing)
    return lora


def lora_header(path: str | Path) -> dict | None:
    """Our header of a LoRA file or PEFT folder, without reading weights; None without one."""
    with open_tensors(peft.weights_of(Path(path))) as file:
        header = parse_header(path, file.metadata())
    return header if str(header.get("format", "")).startswith("hywu-lora") else None


def _load(
    path: Path,
    device: torch.device | str,
    base: LoRALayout | nn.Module | None,
    skip_missing: bool,
) -> GeneratedLoRA:
    file = peft.weights_of(path)
    tensors, header = read_tensors(file, device)
    kind = header.get("format")
    if kind == native.FORMAT:
        return native.load(tensors, header)
    config = peft.read_config(file)
    if kind is not None and not str(kind).startswith("hywu-lora"):
        raise HYWUError(f"{path}: not a LoRA; its header says {kind}.")
    return from_state_dict(tensors, header, config, base, read_metadata(file), skip_missing)


def _check_targets(path: Path, lora: GeneratedLoRA, layout: LoRALayout) -> None:
    wanted = {target.path: target.module for target in layout.targets()}
    unexpected = [
        p for p in lora if (m := wanted.get(p)) is None or _size(m) != _size(lora.target(p).module)
    ]
    if unexpected:
        raise HYWUError(
            f"{path}: made for another base: {len(unexpected)} targets are not in the layout or differ in "
            f"shape, for example {unexpected[0]}; use the base model that this LoRA was made for."
        )


def _size(module) -> tuple[int, int, int]:
    return module.num_experts, module.out_features, module.in_features
