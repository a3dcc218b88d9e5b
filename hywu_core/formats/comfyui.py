"""The single file that ComfyUI's stock LoRA loader takes (kohya's lora_up / lora_down / alpha)."""

from __future__ import annotations

from pathlib import Path

import torch

from ..files import save_tensors
from ..lora import GeneratedLoRA
from .matrices import single_matrices
from .native import header_of

FORMAT = "hywu-lora-comfyui-1"
PREFIX = "diffusion_model."


def save(lora: GeneratedLoRA, path: Path, overwrite: bool) -> Path:
    tensors = {}
    for name, a, b in single_matrices(lora):
        key = f"{PREFIX}{name.removeprefix(PREFIX)}"
        tensors[f"{key}.lora_down.weight"] = a
        tensors[f"{key}.lora_up.weight"] = b
        tensors[f"{key}.alpha"] = torch.tensor(lora.layout.alpha, dtype=torch.float32)
    return save_tensors(path, tensors, header_of(lora, FORMAT), overwrite, {"format": "pt"})
