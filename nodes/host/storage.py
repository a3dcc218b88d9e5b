"""Generated LoRAs as files below ComfyUI's folders, in three formats."""

from __future__ import annotations

from ...hywu_core.formats import load_lora as read_lora
from ...hywu_core.lora import GeneratedLoRA
from . import paths

#: What the widget shows -> (the engine's format, suffix of the file or folder)
FORMATS = {
    "ComfyUI": ("comfyui", ".safetensors"),
    "PEFT": ("peft", ""),
    "native": ("native", ".safetensors"),
}


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


def load_lora(name: str) -> GeneratedLoRA:
    """A bundled LoRA, or one of the listed files. Raises HYWUError naming the file."""
    path = paths.lora_path(name)
    lora = read_lora(path)
    lora.check_finite(str(path))
    return lora
