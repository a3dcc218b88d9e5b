"""Random-weight checkpoints of real architectures, for the stock loaders. Runs inside ComfyUI.

The diffusion models are ComfyUI's own classes; the weights are random. Dimensions are tiny where
ComfyUI derives them from the weights, and the true width with one block where it doesn't.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import comfy.ops
import torch
from torch import Tensor


@dataclass(frozen=True)
class Architecture:
    """How to build one, and what its sampler needs.

    kind: module and class inside comfy.ldm. options: the class's arguments. latent: shape of one
    latent without the batch. text, pooled: width of the text's tokens and of its pooled vector.
    small: whether a test may run it several times, for two steps each time.
    """

    kind: str
    options: dict[str, Any]
    latent: tuple[int, ...]
    text: int
    pooled: int = 0
    small: bool = True


def _unet(**options: Any) -> dict[str, Any]:
    return {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
        "use_spatial_transformer": True, "legacy": False, **options,
    }  # fmt: skip


_FLUX = {
    "in_channels": 16, "out_channels": 16, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24,
    "depth": 1, "depth_single_blocks": 1, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "txt_ids_dims": [],
}  # fmt: skip
_LUMINA = {"in_channels": 16, "cap_feat_dim": 32, "n_layers": 1, "n_refiner_layers": 2, "qk_norm": True,
           "patch_size": 2}  # fmt: skip

ARCHITECTURES = {
    "SD 1.5": Architecture(
        "modules.diffusionmodules.openaimodel.UNetModel",
        _unet(
            num_res_blocks=[1, 1], channel_mult=(1, 2), num_heads=8, context_dim=768,
            transformer_depth=[1, 1], transformer_depth_middle=1, transformer_depth_output=[1] * 4,
        ),
        (4, 8, 8), 768, small=False,
    ),
    "SDXL": Architecture(
        "modules.diffusionmodules.openaimodel.UNetModel",
        _unet(
            num_res_blocks=[2, 2, 2], channel_mult=(1, 1, 1), num_head_channels=64, context_dim=2048,
            transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_middle=10,
            transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
            use_linear_in_transformer=True, adm_in_channels=2816, num_classes="sequential",
        ),
        (4, 8, 8), 2048, 1280, small=False,
    ),
    "SD3": Architecture(
        "modules.diffusionmodules.mmdit.MMDiT",
        {
            "input_size": None, "patch_size": 2, "in_channels": 16, "out_channels": 16, "depth": 2,
            "adm_in_channels": 2048, "num_patches": 64, "pos_embed_max_size": 8, "qk_norm": "rms",
            "pos_embed_scaling_factor": None,
            "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}
            },
        },
        (16, 8, 8), 64, 2048,
    ),
    "Flux": Architecture(
        "flux.model.Flux",
        {**_FLUX, "vec_in_dim": 32, "context_in_dim": 64, "guidance_embed": True},
        (16, 4, 4), 64, 32, small=False,
    ),
    "Chroma": Architecture(
        "chroma.model.Chroma",
        {
            **_FLUX, "context_in_dim": 64, "in_channels": 64, "out_channels": 64, "in_dim": 64,
            "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5, "vec_in_dim": None,
        },
        (16, 4, 4), 64, 768, small=False,
    ),
    "Qwen-Image": Architecture(
        "qwen_image.model.QwenImageTransformer2DModel", {"num_layers": 1}, (16, 4, 4), 3584, small=False
    ),
    "Wan 2.1": Architecture(
        "wan.model.WanModel",
        {
            "model_type": "t2v", "dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 2,
            "in_dim": 16, "out_dim": 16, "patch_size": (1, 2, 2), "freq_dim": 256,
        },
        (16, 1, 8, 8), 4096,
    ),
    "HunyuanImage 2.1": Architecture(
        "hunyuan_video.model.HunyuanVideo",
        {
            "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "hidden_size": 256,
            "mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 2,
            "axes_dim": [64, 64], "theta": 256, "qkv_bias": True, "vec_in_dim": None,
            "context_in_dim": 64, "guidance_embed": False, "meanflow": False, "byt5": False,
            "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
        },
        (64, 8, 8), 64,
    ),
    "Lumina 2": Architecture(
        "lumina.model.NextDiT",
        {
            **_LUMINA, "dim": 2304, "n_heads": 24, "n_kv_heads": 8, "axes_dims": [32, 32, 32],
            "axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0,
        },
        (16, 4, 4), 32, small=False,
    ),
    "Z-Image": Architecture(
        "lumina.model.NextDiT",
        {
            **_LUMINA, "dim": 3840, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True, "time_scale": 1000.0,
        },
        (16, 4, 4), 32, small=False,
    ),
}  # fmt: skip


def build(name: str) -> torch.nn.Module:
    """The architecture without storage (on the meta device)."""
    architecture = ARCHITECTURES[name]
    module, _, kind = architecture.kind.rpartition(".")
    namespace = importlib.import_module(f"comfy.ldm.{module}")
    cls = getattr(namespace, kind)
    options = architecture.options
    if params := getattr(namespace, f"{kind}Params", None):
        # a dataclass of options; versions of ComfyUI differ in some
        known = {option.name for option in fields(params)}
        options = {name: value for name, value in options.items() if name in known}
    with torch.device("meta"):
        return cls(
            **options,
            dtype=torch.float32,
            device="meta",
            operations=comfy.ops.disable_weight_init,
        )


def random_weights(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights for the state dict of `model`, with which activations keep their size.

    Large matrices repeat one block of random numbers, which is enough here and takes a moment.
    """
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1_000_003, generator=generator)
    weights, at = {}, 0
    for key, value in model.state_dict().items():
        if value.numel() == 0:
            continue
        at = (at + 7919) % block.numel()
        count = math.ceil((value.numel() + at) / block.numel())
        tensor = block.repeat(count)[at : at + value.numel()].reshape(value.shape)
        if value.ndim >= 2:
            tensor = tensor * (0.7 * math.prod(value.shape[1:]) ** -0.5)
        elif key.endswith("bias"):
            tensor = tensor * 0.02
        else:  # scales of norms
            tensor = 1 + tensor * 0.05
        weights[key] = tensor.to(dtype)
    return weights


def conditioning(name: str, seed: int, scale: float = 1.0) -> list:
    """A text of random tokens, as ComfyUI's CONDITIONING."""
    architecture = ARCHITECTURES[name]
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, 4, architecture.text, generator=generator) * scale
    more: dict[str, Any] = {"pooled_output": None}  # as stock text encoders without one say it
    if architecture.pooled:
        more["pooled_output"] = torch.randn(1, architecture.pooled, generator=generator)
    return [[tokens, more]]


def sampler(name: str, sample: Callable) -> Callable:
    """model -> latent after two steps, or one of a large model, by the stock node's function `sample`."""
    usual = 2 if ARCHITECTURES[name].small else 1
    latent = {"samples": torch.zeros(1, *ARCHITECTURES[name].latent)}
    positive, negative = conditioning(name, 1), conditioning(name, 2)

    def run(model: Any, batch: int = 1, cfg: float = 1.5, steps: int = usual) -> Tensor:
        repeated = {"samples": latent["samples"].repeat(batch, *[1] * (latent["samples"].ndim - 1))}
        return sample(model, 1, steps, cfg, "euler", "simple", positive, negative, repeated)[0][
            "samples"
        ]

    return run
