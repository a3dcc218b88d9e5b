"""Generated LoRAs as files below ComfyUI's folders, in three formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.lora

from ...hywu_core.errors import HYWUError
from ...hywu_core.files import open_tensors, read_tensors
from ...hywu_core.formats import load_lora as read_lora
from ...hywu_core.formats.foreign import from_state_dict
from ...hywu_core.lora import GeneratedLoRA
from . import paths

#: What the widget shows -> (the engine's format, suffix of the file or folder)
FORMATS = {
    "ComfyUI": ("comfyui", ".safetensors"),
    "PEFT": ("peft", ""),
    "native": ("native", ".safetensors"),
}
#: Start of names that have lost their dots; only the model itself can tell where they were.
FLAT = "lora_unet_"


def save_lora(lora: GeneratedLoRA, prefix: str, format: str) -> list[str]:
    """Save a batch: one file for all as "native", else one file or folder an image.

    Returns the names below the output folder. Raises HYWUError on values that are not finite and on
    a prefix that leads out of that folder; then nothing is written.
    """
    kind, suffix = FORMATS[format]
    lora.check_finite("The LoRA")
    items = [lora] if kind == "native" else [lora.select(i) for i in range(lora.batch_size)]
    names = []
    for item in items:
        path, name = paths.save_path(prefix, suffix)
        item.save(path, kind)
        names.append(name)
    return names


def load_lora(name: str, model: Any = None) -> GeneratedLoRA:
    """A bundled LoRA, or one of the listed files. Raises HYWUError naming the file.

    model: the MODEL it is for, where the file's names are of the ``lora_unet_`` kind.
    """
    path = paths.lora_path(name)
    flat = _first_flat(path) if path.is_file() else None
    if flat is None:
        lora = read_lora(path)
    elif model is None:
        raise HYWUError(
            f"{path}: names such as {flat} don't say where their dots were; connect the MODEL that "
            "this LoRA is for to the model input of Load Generated LoRA."
        )
    else:
        lora = _with_names_of(model, path)
    lora.check_finite(str(path))
    return lora


def _first_flat(path: Path) -> str | None:
    with open_tensors(path) as file:
        names = list(file.keys())
    return next((name for name in names if name.startswith(FLAT)), None)


def _with_names_of(model: Any, path: Path) -> GeneratedLoRA:
    """Names become those of `model`, by the table that ComfyUI's own loaders use."""
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    tensors, header = read_tensors(path, "cpu")
    renamed = {}
    for key, value in tensors.items():
        name, _, rest = key.partition(".")
        if name.startswith(FLAT):
            weight = known.get(name)
            if not isinstance(weight, str):
                kind = type(model.model.diffusion_model).__name__
                what = "a part of a module" if weight else "no module"
                way = "use ComfyUI's own Load LoRA" if weight else "connect the model it is for"
                raise HYWUError(f"{path}: {name} is {what} of {kind}; {way}.")
            key = f"{weight.removesuffix('.weight')}.{rest}"
        renamed[key] = value
    return from_state_dict(renamed, header, None, None)
