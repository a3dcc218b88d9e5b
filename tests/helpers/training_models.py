"""Small real models and synthetic pairs for the tests of training inside ComfyUI; runs inside its tree."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import architectures
import comfy.clip_vision
import comfy.ldm.wan.vae
import comfy.model_management as mm
import comfy.sd
import folder_paths
import torch
from pairs import SIZE, TASKS, make_pairs
from safetensors.torch import save_file
from torch import nn

import nodes as stock

__all__ = ["SIZE", "TASKS", "ToyCLIP", "clip_vision", "load_model", "make_pairs", "wan_vae"]


class ToyText(nn.Module):
    """Text encoder of random word vectors, 8 tokens a text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(256, width, generator=generator), requires_grad=False)


class ToyCLIP:
    """What a CLIP socket carries, as far as training asks it."""

    def __init__(self, width: int, pooled: int = 0) -> None:
        self.cond_stage_model, self.pooled = ToyText(width), pooled

    def tokenize(self, text: str) -> list[int]:
        ids = [zlib.crc32(word.encode()) % 256 for word in text.split()][:8]
        return ids + [0] * (8 - len(ids))

    def encode_from_tokens_scheduled(self, tokens: list[int]) -> list:
        made = self.cond_stage_model.table[torch.tensor(tokens)][None]
        pooled = made.mean(1).repeat(1, 1 + self.pooled // made.shape[2])[:, : self.pooled]
        return [[made, {"pooled_output": pooled if self.pooled else None}]]


#: A CLIP vision model of two layers: 28 pixels in patches of 14.
VISION = {
    "model_type": "clip_vision_model", "hidden_act": "quick_gelu", "hidden_size": 32, "image_size": 28,
    "intermediate_size": 64, "layer_norm_eps": 1e-5, "num_attention_heads": 2, "num_channels": 3,
    "num_hidden_layers": 2, "patch_size": 14, "projection_dim": 16,
}  # fmt: skip


def load_model(name: str) -> Any:
    """The architecture with random weights, by the stock loader from its own folder."""
    weights = architectures.random_weights(architectures.build(name), torch.float32)
    file = Path(folder_paths.get_folder_paths("diffusion_models")[0]) / f"{name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"model.diffusion_model.{key}": value for key, value in weights.items()}, file)
    folder_paths.filename_list_cache.clear()
    return stock.UNETLoader().load_unet(file.name, "default")[0]


def clip_vision(folder: Path) -> comfy.clip_vision.ClipVisionModel:
    """`VISION` with random weights; its description is written to `folder`."""
    file = folder / "vision.json"
    file.write_text(json.dumps(VISION), encoding="utf-8")
    made = comfy.clip_vision.ClipVisionModel(str(file))
    torch.manual_seed(0)
    for parameter in made.model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made


def wan_vae() -> comfy.sd.VAE:
    """Wan 2.1's VAE, 8 wide, with random weights."""
    model = comfy.ldm.wan.vae.WanVAE(
        dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
        temperal_downsample=[False, True, True], dropout=0.0,
    )  # fmt: skip
    weights = architectures.random_weights(model, torch.float32)
    weights["conv1.weight"] *= 20  # latents about as large as those of trained weights
    return comfy.sd.VAE(sd=weights, device=mm.get_torch_device())
