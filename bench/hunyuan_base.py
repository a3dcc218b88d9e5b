"""A base of HunyuanImage-3's published widths with few layers, its weights drawn on the device, and a run's inputs."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from hywu_core.bases.hunyuan_image3.checkpoint import FLOAT32, Folder, Head, Stored, stored_tensors
from hywu_core.bases.hunyuan_image3.codecs import Method, codec_of
from hywu_core.bases.hunyuan_image3.config import GenerationSettings, HunyuanConfig
from hywu_core.bases.hunyuan_image3.model import HunyuanImage3
from hywu_core.bases.hunyuan_image3.offload import Offloaded, offload
from hywu_core.bases.hunyuan_image3.placement import CHUNK, SLOTS, Matrix
from hywu_core.bases.hunyuan_image3.rope import Grid
from hywu_core.bases.hunyuan_image3.sequence import SourceShape, SourceSpan, Target, TokenSequence
from hywu_core.bases.hunyuan_image3.sources import Source
from hywu_core.lora import GeneratedLoRA

#: Layers of the published base.
PUBLISHED_LAYERS = 32
#: The released config.json's sizes; a tiny network's for the tests.
WIDTHS: dict[str, Any] = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "attention_head_dim": 128,
    "moe_intermediate_size": 3072, "moe_topk": 8, "num_experts": 64, "vocab_size": 133120,
    "patch_embed_hidden_dim": 1024,
}  # fmt: skip
TINY: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_head_dim": 16,
    "moe_intermediate_size": 48, "moe_topk": 2, "num_experts": 16, "vocab_size": 320,
    "patch_embed_hidden_dim": 32,
}  # fmt: skip
VAE_CHANNELS, TINY_VAE_CHANNELS = [128, 256, 512, 1024, 1024], [32] * 5
RANK, TINY_RANK = 16, 4


@dataclass(frozen=True)
class Sizes:
    """Tokens of an edit: text before the source, the side of an image's grid, that of the vision tower's, the
    instruction's.
    """

    text: int = 1240
    grid: int = 64
    vision: int = 32
    instruction: int = 40

    @classmethod
    def tiny(cls) -> Sizes:
        return cls(24, 8, 4, 6)


def config_of(layers: int, tiny: bool) -> HunyuanConfig:
    """The published widths (or tiny ones) with so many layers."""
    vit = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_patches": 256, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    }  # fmt: skip
    return HunyuanConfig.from_json(
        (TINY if tiny else WIDTHS)
        | {
            "model_type": "hunyuan_image_3_moe", "num_hidden_layers": layers, "num_shared_expert": 1,
            "norm_topk_prob": True, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "max_position_embeddings": 22800, "image_base_size": 1024,
            "vae": {
                "block_out_channels": TINY_VAE_CHANNELS if tiny else VAE_CHANNELS,
                "layers_per_block": 1 if tiny else 2, "latent_channels": 8 if tiny else 32,
                "ffactor_spatial": 16, "ffactor_temporal": 4, "scaling_factor": 0.5626,
            },
            "vit": vit,
            "vit_processor": {
                "max_num_patches": 1024, "image_mean": [0.5], "image_std": [0.5], "resample": 2,
            },
        }
    )  # fmt: skip


@dataclass(frozen=True)
class DrawnFolder(Folder):
    """A folder without files: each tensor is drawn on `device` when it is read, the same in every process."""

    device: torch.device

    @classmethod
    def of(
        cls, config: HunyuanConfig, modules: Mapping[str, nn.Module], device: torch.device,
        method: Method | None = None,
    ) -> DrawnFolder:  # fmt: skip
        """modules: prefix in the files -> module, on "meta". method: of experts as they are read, or None."""
        shapes = {}
        for prefix, module in modules.items():
            shapes |= {n: s.shape for n, s in stored_tensors(module, prefix).items()}
        experts = [name for name in shapes if ".experts." in name] if method else []
        # the last norm stands for what the folder is stored in
        named = {"model.ln_f.weight": (config.hidden_size,)} | shapes
        heads = {name: Head(shape, "BF16", 0, 0) for name, shape in named.items()}
        quantized = {name: _Drawn(codec_of(method)) for name in experts} if method else {}
        settings = GenerationSettings.read({}, config.max_positions)
        return cls(Path("drawn"), config, settings, {}, shapes, quantized, heads, device)

    def coded(self, name: str, rows: slice | None = None) -> dict[str, Tensor]:
        return self.codec(name).encode(self._stored(name, rows))

    def _stored(self, name: str, rows: slice | None) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            made = torch.zeros if name.endswith(".bias") else torch.ones
            return made(shape, dtype=torch.bfloat16, device=self.device)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        made = torch.randn(shape, dtype=torch.bfloat16, device=self.device, generator=generator)
        made *= math.prod(shape[1:]) ** -0.5
        return made if rows is None else made[rows]

    def _read(self, wanted: Mapping[str, Stored]) -> Iterator[tuple[str, Stored, Tensor]]:
        for name, stored in wanted.items():
            yield name, stored, self._stored(name, None)


@dataclass(frozen=True)
class _Drawn:
    """In the place of `Quantized`, of which a run asks the codec alone."""

    codec: Any


@dataclass(frozen=True)
class Base:
    """The network with its weights. offloaded: None where all is on the device, in bfloat16."""

    model: HunyuanImage3
    offloaded: Offloaded | None
    fixed_bytes: int


def build(
    config: HunyuanConfig, device: torch.device, dtype: torch.dtype, method: Method | None, streamed: bool
) -> Base:  # fmt: skip
    """The transformer; streamed: no layer's experts stay on the device, they rest in page-locked memory."""
    with torch.device("meta"):
        model = HunyuanImage3(config)
    folder = DrawnFolder.of(config, {"": model}, device, method)
    fixed = sum(
        p.numel() * (4 if any(mark in name for mark in FLOAT32) else dtype.itemsize)
        for name, p in model.named_parameters()
        if ".experts." not in name
    )
    offloaded = None
    if streamed or method:
        budget = None
        if streamed:
            largest = _largest(model, folder, dtype, method)
            budget = fixed + CHUNK * (SLOTS * largest.stored + largest.decoded) + largest.scratch
        offloaded = offload(folder, model, fixed, budget, device, dtype, "ram")
        if streamed:
            assert not offloaded.placement.resident
    folder.fill(model, "", device, dtype)
    return Base(model, offloaded, fixed)


def _largest(
    model: HunyuanImage3, folder: DrawnFolder, dtype: torch.dtype, method: Method | None
) -> Matrix:
    banks = model.model.layers[0].mlp.experts
    shapes = [getattr(banks, name).weight.shape[1:] for name in ("w1", "w2", "w3")]
    if method is None:
        return Matrix(max(out * in_ for out, in_ in shapes) * dtype.itemsize)
    return Matrix.largest(Matrix.of(codec_of(method), out, in_, dtype) for out, in_ in shapes)


def drawn_module(
    module: nn.Module, config: HunyuanConfig, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Another network on "meta", filled."""
    return DrawnFolder.of(config, {"x.": module}, device).fill(module, "x.", device, dtype)


def sequences(config: HunyuanConfig, sizes: Sizes) -> list[TokenSequence]:
    """An edit's two branches: text, a source image, an instruction, the image to generate."""
    timestep = sizes.text + 3  # after <boi>, size and ratio
    vae = Grid(timestep + 1, sizes.grid, sizes.grid)
    vision = Grid(vae.stop + 1, sizes.vision, sizes.vision)
    target = vision.stop + 1 + sizes.instruction + 6
    grid = Grid(target + 1, sizes.grid, sizes.grid)
    span = SourceSpan(timestep, vae, vision, vision.stop)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config.vocab_size, (grid.stop + 3,), generator=generator)
    other = ids.clone()
    other[vision.stop + 1 : target - 6] = 10
    goal = Target(target, grid, None, None)
    return [TokenSequence(each, (span,), goal) for each in (ids, other)]


def source(config: HunyuanConfig, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Source:
    """A source image as it is encoded, of random numbers."""
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(
        config.vae.latent_channels, sizes.grid, sizes.grid, generator=generator
    ).to(device)
    tokens = torch.randn(sizes.vision**2, config.hidden_size, generator=generator)
    grid, vision = (sizes.grid, sizes.grid), (sizes.vision, sizes.vision)
    shape = SourceShape(0, grid, vision, sizes.vision**2)
    return Source(Image.new("RGB", (16, 16)), shape, latent, tokens.to(device, dtype))


def lora(
    config: HunyuanConfig, rank: int, device: torch.device, dtype: torch.dtype
) -> GeneratedLoRA:
    """A LoRA on every matrix of the layers, as HY-WU generates, of random numbers."""
    hidden, experts = config.hidden_size, config.num_experts
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    generator = torch.Generator(device).manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return made * (0.3 * shape[-1] ** -0.5)

    pairs = {}
    for i, width in enumerate(config.expert_widths):
        wide = width * config.shared_experts[i]
        shapes = {
            "self_attn.qkv_proj": (hidden, qkv, ()),
            "self_attn.o_proj": (config.num_heads * config.head_dim, hidden, ()),
            "mlp.shared_mlp.gate_and_up_proj": (hidden, 2 * wide, ()),
            "mlp.shared_mlp.down_proj": (wide, hidden, ()),
            "mlp.experts.w1": (hidden, width, (experts,)),
            "mlp.experts.w2": (width, hidden, (experts,)),
            "mlp.experts.w3": (hidden, width, (experts,)),
        }
        for name, (in_, out, more) in shapes.items():
            pairs[f"model.layers.{i}.{name}"] = (
                drawn(1, *more, rank, in_), drawn(1, *more, out, rank),
            )  # fmt: skip
    return GeneratedLoRA.from_pairs(pairs, alpha=float(rank))
