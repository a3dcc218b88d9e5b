"""Loading an official folder: MODEL, VAE, and the reader that makes prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor, nn

from ....hywu_core.bases.hunyuan_image3.checkpoint import Folder, stored_dtype
from ....hywu_core.bases.hunyuan_image3.config import VAEConfig
from ....hywu_core.bases.hunyuan_image3.layers import RouterPrecision
from ....hywu_core.bases.hunyuan_image3.offload import offload
from ....hywu_core.bases.hunyuan_image3.pipeline import build, fill
from ....hywu_core.bases.hunyuan_image3.plan import METHODS, card_of, generator_plan, plan
from ....hywu_core.bases.hunyuan_image3.prompts import Prompts
from ....hywu_core.bases.hunyuan_image3.sources import SourceEncoder
from ....hywu_core.bases.hunyuan_image3.vae import VAE
from ....hywu_core.errors import HYWUError
from ..generators import fitting_network
from ..paths import generator_path
from .banks import CodedBanks
from .dynamic import dynamic_host, install
from .model import HostModel, HunyuanModel, patched

#: Tokens of an edit of one image at 1 megapixel, its chain of thought and the new image among them.
EDIT_TOKENS = 11_100
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class HostVAE(nn.Module):
    """The VAE as ComfyUI calls it: latents unscaled, the mean where one encodes."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def encode(self, pixels: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in -1..1 -> latents ``[B, C, h, w]``."""
        return self.vae.moments(pixels)[:, :, 0].chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse: pixels in -1..1."""
        return self.vae.frames(latents[:, :, None])[:, :, -1]


class ImageVAE(comfy.sd.VAE):
    """ComfyUI's VAE around this project's; `reader.vae` is the same network."""

    def __init__(self, vae: VAE) -> None:
        # the smallest VAE that the host builds by itself, of which the network is exchanged
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)})
        config: VAEConfig = vae.config
        factor, widest = config.spatial_factor, config.channels[0]
        self.first_stage_model = HostVAE(vae).eval()
        self.downscale_ratio = self.upscale_ratio = factor
        self.latent_channels, self.latent_dim = config.latent_channels, 2
        self.process_input = lambda image: image * 2.0 - 1.0
        # in place, as newer releases expect: they look at the tensor that they gave
        self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        # four frames at the widest level: input, two convolutions, the sum
        bytes_of = mm.dtype_size
        self.memory_used_encode = lambda shape, dtype: (
            16 * widest * shape[-2] * shape[-1] * bytes_of(dtype)
        )
        self.memory_used_decode = lambda shape, dtype: (
            16 * widest * shape[-2] * shape[-1] * factor**2 * bytes_of(dtype)
        )
        self.vae_dtype = next(vae.parameters()).dtype
        self.device, self.output_device = mm.vae_device(), mm.intermediate_device()
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=mm.vae_offload_device()
        )


class Reader:
    """What the HYWU_HUNYUAN socket carries: tokenizer, system prompt, tower and VAE of one folder.

    model: the MODEL that was loaded with it.
    """

    def __init__(self, prompts: Prompts, encoder: SourceEncoder, vae: ImageVAE) -> None:
        self.prompts, self.encoder, self.vae = prompts, encoder, vae
        eyes = nn.ModuleList([encoder.tower, encoder.aligner])
        self.patcher = comfy.model_patcher.ModelPatcher(
            eyes, load_device=mm.text_encoder_device(), offload_device=mm.unet_offload_device()
        )

    @contextlib.contextmanager
    def ready(self) -> Iterator[SourceEncoder]:
        """The encoder of source images, its networks on their devices."""
        mm.load_models_gpu([self.patcher, self.vae.patcher])
        yield self.encoder


def load(
    path: Path, precision: str, router: RouterPrecision, system: str | None, disable_dynamic: bool = False
) -> tuple[Any, ImageVAE, Reader, str]:  # fmt: skip
    """(MODEL, VAE, reader, what a run takes) of an official folder. Raises HYWUError before weights are read.

    precision: "auto" is bfloat16 where the device multiplies it, else float32; "stored" keeps the files'.
    router: see RouterPrecision.
    system: the system prompt, or None for the folder's own.
    disable_dynamic: not by dynamic VRAM, whatever the host's usual way is.
    """
    prompts = Prompts.open(path, system, files=False)
    folder = prompts.folder
    parts = build(folder, HostModel)
    dtype = _dtype(precision)
    dynamic = dynamic_host() and not disable_dynamic
    said = planned(folder, dtype, dynamic, _generator(parts.model))
    kept = dtype or stored_dtype(folder)
    # all banks off the device, as they are stored: where they go is the memory manager's
    if dynamic:
        install(folder, parts.model, kept)
    elif folder.quantized:
        offload(folder, parts.model, 0, None, torch.device("cpu"), kept, "ram", CodedBanks)
    fill(folder, parts, "cpu", dtype)
    network = parts.model
    network.staging.share(network)
    network.set_router_precision(router)
    network.default_guidance = folder.settings.guidance
    vae = ImageVAE(parts.vae)
    reader = Reader(prompts, SourceEncoder(prompts, parts.vae, parts.tower, parts.aligner), vae)
    model = HunyuanModel(network, reader, folder.settings.flow_shift)
    patcher = patched(model, dynamic)
    if dynamic:
        # weights that hooks change within a sampling are another, plain patcher's
        patcher.cached_patcher_init = (load, (path, precision, router, system), 0)
    return patcher, vae, reader, said


def _generator(network: HostModel) -> Path | None:
    """The generator in models/hywu that fits the network, if there is one."""
    try:
        return generator_path(fitting_network(network))
    except HYWUError:
        return None


def planned(
    folder: Folder, dtype: torch.dtype | None, mapped: bool = False, generator: Path | None = None
) -> str:
    """What an edit of one image takes, for the folder and for what it could be quantized to, a line each.

    mapped: whether experts rest in the files.
    generator: that makes the LoRA.
    Raises HYWUError where the weights don't fit in this machine's memory.
    """
    config, settings = folder.config, folder.settings
    image = (config.image_base_size // config.factor) ** 2 + 1
    tokens = min(EDIT_TOKENS, settings.max_length)
    device = mm.get_torch_device()
    card, cpu = card_of(mm.get_torch_device_name(device)), mm.is_device_cpu(device)
    methods = (None,) if folder.quantized else (None, *METHODS)
    image = min(image, tokens)
    beside = 0 if generator is None else generator_plan(generator, tokens - image, None).total_bytes
    plans = [plan(folder, m, None, tokens, image, dtype=dtype, generator=beside) for m in methods]
    memory = mm.get_total_memory(torch.device("cpu"))
    away = plans[0].experts_bytes if mapped else 0
    if plans[0].weights - away > memory:
        fits = [f"{p.experts} {p.weights:,}" for p in plans if p.weights - away <= memory]
        way = (
            f"quantize it once by `hywu hunyuan quantize FOLDER OUT --experts ...`, which takes {', '.join(fits)}"
            if fits
            else "use a machine with more, or `hywu hunyuan edit --budget`, which leaves them in the files"
        )
        raise HYWUError(
            f"{folder.path}: its weights take {plans[0].weights:,} bytes as {plans[0].experts} and this "
            f"machine has {memory:,} of memory; {way}."
        )
    return "\n".join(each.line(card, cpu, mapped) for each in plans)


def _dtype(precision: str) -> torch.dtype | None:
    if precision == "auto":
        fast = mm.should_use_bf16(mm.get_torch_device())
        return torch.bfloat16 if fast else torch.float32
    return DTYPES.get(precision)


def model_of(model: Any) -> HunyuanModel:
    """The HunyuanImage-3 in a MODEL. Raises HYWUError on another one."""
    inner = getattr(model, "model", None)
    if not isinstance(inner, HunyuanModel):
        raise HYWUError(
            f"The MODEL is {type(inner).__name__}, not HunyuanImage-3; connect the one of Load "
            "HunyuanImage-3."
        )
    return inner
