"""MODELs of random weights of every architecture whose hidden states are read (inside ComfyUI)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import architectures
import comfy.ldm.flux.model
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import torch
import training_models
from hywu_nodes.hywu_core.generator.checkpoints import save_generator
from hywu_nodes.hywu_core.generator.config import GeneratorConfig
from hywu_nodes.hywu_core.generator.model import ParameterGenerator
from hywu_nodes.hywu_core.layout import LoRALayout
from hywu_nodes.nodes.host.cache import TensorCache
from hywu_nodes.nodes.host.encode import hidden_states
from hywu_nodes.nodes.host.generators import HostGenerator
from hywu_nodes.nodes.host.train.conditions import CachedEncoder

SIDE = training_models.SIZE
PART = hidden_states.PART
IMAGES = torch.rand(3, 80, 48, 3, generator=torch.Generator().manual_seed(0))
TEXTS = "make it warm\nmake it cold\nmake it warm"


class Model:
    """A MODEL of random weights with a text encoder and a VAE that fit it."""

    def __init__(self, name: str, model: Any, vae: Any, text: int, pooled: int = 0) -> None:
        self.name, self.model, self.vae = name, model, vae
        self.clip = training_models.ToyCLIP(text, pooled)
        self.inputs = {"model": model, "vae": vae, "clip": self.clip}

    @property
    def network(self) -> torch.nn.Module:
        return self.model.model.diffusion_model

    def generator(self, folder: Path, **changed: Any) -> HostGenerator:
        """Random weights that read this MODEL's hidden states; `changed`: of the encoder."""
        cache = TensorCache(
            folder / self.name
        )  # texts of one encoder have other pooled outputs elsewhere
        encoder = CachedEncoder(self.model, self.clip, None, cache, "model", self.vae, SIDE)
        identity = {**encoder.identity, "model": {**encoder.identity["model"], **changed}}
        parts = dict(encoder.parts)
        if identity["model"]["contrast"] is None:  # as checkpoints say it that know of none
            del identity["model"]["contrast"]
            parts[PART] //= 2
        return self.reading(folder, parts, identity)

    def reading(
        self, folder: Path, parts: dict[str, int], encoder: dict[str, Any]
    ) -> HostGenerator:
        """Random weights that read these parts."""
        layout = LoRALayout.of(self.network, 2)
        config = GeneratorConfig(layout, parts, 32, 2, 64, 32, 1, encoder=encoder)
        torch.manual_seed(0)
        made = ParameterGenerator(config)
        made.reset_parameters()
        torch.nn.init.normal_(made.model.proj_out_B.weight, std=0.05)
        path = save_generator(made, folder / f"{self.name}.safetensors", overwrite=True)
        return HostGenerator(path, torch.float32)


def narrow(kind: type, **options: Any) -> Any:
    """A MODEL of one of ComfyUI's kinds, narrower than its loader makes it."""
    config = kind(options)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    weights = architectures.random_weights(model.diffusion_model, torch.float32)
    model.diffusion_model.load_state_dict(weights, strict=False)
    return comfy.model_patcher.ModelPatcher(model, mm.get_torch_device(), torch.device("cpu"))


def small_vae(channels: int) -> comfy.sd.VAE:
    vae = comfy.taesd.taesd.TAESD(latent_channels=channels)
    return comfy.sd.VAE(sd=architectures.random_weights(vae, torch.float32))


def flux() -> Any:
    # later ComfyUIs ask which axes the text's positions count, their loaders say none for Flux 1
    fields = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in fields else {}
    return narrow(
        comfy.supported_models.Flux, image_model="flux", guidance_embed=True, in_channels=16,
        out_channels=16, hidden_size=128, mlp_ratio=4.0, num_heads=2, depth=1, depth_single_blocks=2,
        axes_dim=[16, 24, 24], theta=10000, patch_size=2, qkv_bias=True,
        vec_in_dim=32, context_in_dim=64, **newer,
    )  # fmt: skip


def unet(inner: int, outer: int) -> Any:
    """SD 1.5's, 32 channels wide, with that many transformer blocks in its two levels, as SDXL's differ."""
    return narrow(
        comfy.supported_models.SD15, image_size=32, in_channels=4, out_channels=4, model_channels=32,
        num_res_blocks=[1, 1], channel_mult=(1, 2), num_heads=2, context_dim=768,
        transformer_depth=[outer, inner], transformer_depth_middle=1,
        transformer_depth_output=[outer] * 2 + [inner] * 2, use_spatial_transformer=True, legacy=False,
        use_temporal_attention=False,
    )  # fmt: skip


def z_image() -> Any:
    """Pads its text and its image to 32 tokens, in one sequence."""
    return narrow(
        comfy.supported_models.Lumina2, image_model="lumina2", in_channels=16, cap_feat_dim=32,
        n_layers=2, n_refiner_layers=1, qk_norm=True, patch_size=2, dim=256, n_heads=4, n_kv_heads=4,
        axes_dims=[16, 24, 24], axes_lens=[1536, 512, 512], rope_theta=256.0, ffn_dim_multiplier=2.0,
        z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32,
    )  # fmt: skip


def qwen() -> Any:
    """Its blocks give text and image one by one."""
    return narrow(
        comfy.supported_models.QwenImage, image_model="qwen_image", num_layers=2, in_channels=64,
        num_attention_heads=1, joint_attention_dim=64,
    )  # fmt: skip


def models() -> dict[str, Any]:
    """Name -> a function that makes it."""
    return {
        "Wan 2.1": lambda: Model(
            "wan", training_models.load_model("Wan 2.1"), training_models.wan_vae(), 4096
        ),
        "SD3": lambda: Model("sd3", training_models.load_model("SD3"), small_vae(16), 64, 2048),
        "SD 1.5": lambda: Model("sd15", unet(1, 1), small_vae(4), 768),
        "UNet": lambda: Model("unet", unet(1, 0), small_vae(4), 768),
        "Flux": lambda: Model("flux", flux(), small_vae(16), 64, 32),
        "HunyuanImage 2.1": lambda: Model(
            "hunyuan", training_models.load_model("HunyuanImage 2.1"), small_vae(64), 64
        ),
        "Qwen-Image": lambda: Model("qwen", qwen(), training_models.wan_vae(), 64),
        "Z-Image": lambda: Model("z", z_image(), small_vae(16), 32),
    }


def gap(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / one.abs().max())
