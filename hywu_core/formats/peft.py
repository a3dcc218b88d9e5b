"""The adapter folder of PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import HYWUError
from ..files import atomic_folder, read_json, save_tensors, write_json
from ..lora import GeneratedLoRA
from .matrices import expert_path, single_matrices
from .native import header_of

FORMAT = "hywu-lora-peft-1"
CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def save(lora: GeneratedLoRA, path: Path, overwrite: bool) -> Path:
    """Write the folder whole or not at all; other files in an existing one stay."""
    with atomic_folder(path, overwrite) as folder:
        _write(lora, folder)
    return path


def _write(lora: GeneratedLoRA, folder: Path) -> None:
    tensors = {}
    for name, a, b in single_matrices(lora):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    save_tensors(folder / WEIGHTS, tensors, header_of(lora, FORMAT), metadata={"format": "pt"})
    write_json(folder / CONFIG, adapter_config(lora), ascii=True, end="")


def adapter_config(lora: GeneratedLoRA) -> dict[str, Any]:
    """What PEFT reads: one rank and alpha, and one pattern that matches exactly the targets."""
    alpha = lora.layout.alpha
    base = lora.provenance.get("base")
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base if isinstance(base, str) else None,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": "|".join(_pattern(stack) for stack in lora.layout.stacks),
    }


def _pattern(stack) -> str:
    names = []
    for module in stack.modules:
        if module.num_experts:
            marked = expert_path(stack.layers[0] + "." + module.name, "\0")
            name = marked.removeprefix(f"{stack.layers[0]}.")
            names.append(re.escape(name).replace(re.escape("\0"), r"\d+"))
        else:
            names.append(re.escape(module.name))
    modules = f"(?:{'|'.join(names)})"
    layers = [rf"{re.escape(layer)}\." if layer else "" for layer in stack.layers]
    return f"(?:{'|'.join(layers)}){modules}"


def weights_of(path: Path) -> Path:
    """The safetensors file of a LoRA: the path itself, or the one in a PEFT folder."""
    if not path.is_dir():
        return path
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise HYWUError(
            f"{path}: no PEFT folder, which holds {CONFIG} and {WEIGHTS}, and no generator's, which "
            "holds config.json."
        )
    return path / WEIGHTS


def read_config(weights: Path) -> dict[str, Any] | None:
    """adapter_config.json beside adapter_model.safetensors; None when the file is no PEFT adapter."""
    file = weights.with_name(CONFIG)
    if weights.name != WEIGHTS or not file.is_file():
        return None
    config = read_json(file, dict, "save the adapter again")
    if config.get("peft_type") != "LORA":
        raise HYWUError(f"{file}: not the configuration of a PEFT LoRA.")
    if config.get("use_dora") or config.get("lora_bias"):
        raise HYWUError(f"{file}: use_dora or lora_bias is on; only plain LoRAs can be read.")
    return config
