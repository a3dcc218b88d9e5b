"""Latents of images by a graph's VAE, in the form that a MODEL takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....hywu_core.errors import HYWUError
from ....hywu_core.fingerprint import of_module
from ..cache import TensorCache, digest


@torch.inference_mode()
def encode_latent(model: Any, vae: Any, image: Tensor) -> Tensor:
    """``[1, 3, H, W]`` in 0..1 -> ``[1, C, (1,) h, w]`` on the CPU, as the VAE gives it.

    model: ComfyUI's BaseModel.
    Raises HYWUError when the VAE isn't one of this model.
    """
    latent = vae.encode(image.movedim(1, -1)).float().cpu()
    form = model.latent_format
    dimensions = getattr(form, "latent_dimensions", 2)
    if dimensions == 3 and latent.ndim == 4:
        latent = latent.unsqueeze(2)
    wanted = getattr(form, "latent_channels", latent.shape[1])
    if latent.ndim != 2 + dimensions or latent.shape[1] != wanted:
        raise HYWUError(
            f"The VAE's latents are {tuple(latent.shape)}, the MODEL {type(model).__name__} "
            f"takes {wanted} channels in {dimensions} dimensions; connect the model's own VAE."
        )
    if not bool(torch.isfinite(latent).all()):
        raise HYWUError("The VAE gives NaN or infinite latents; run it with --fp32-vae.")
    return latent


class CachedLatents:
    """`encode_latent`, each image once.

    weights: which VAE this is.
    """

    def __init__(self, model: Any, vae: Any, cache: TensorCache) -> None:
        self.model, self.vae, self.cache = model, vae, cache
        self.weights = of_module(vae.first_stage_model)

    def __call__(self, image: Tensor) -> Tensor:
        image = image.cpu()
        key = digest("latent", self.weights, image)

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            return {"latent": encode_latent(self.model, self.vae, image)}, {}

        return self.cache.get(key, make)[0]["latent"]
