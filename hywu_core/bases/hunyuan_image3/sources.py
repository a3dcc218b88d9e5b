"""Source images as the model reads them: a latent of the VAE beside tokens of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from . import vision
from .embed import Aligner
from .images import check_source, to_pixels, vae_image
from .prompts import Prompts
from .sequence import SourceShape
from .vae import VAE, draw

#: Encoded images that are kept for the next pass.
KEPT = 8


@dataclass(frozen=True)
class Source:
    """One source image, encoded.

    image: the original, for the output's aspect.
    latent: float32 ``[C, h, w]``, a sample of the VAE.
    tokens: ``[N, hidden]`` of the vision tower, in the decoder's width, padding included.
    """

    image: Image.Image
    shape: SourceShape
    latent: Tensor
    tokens: Tensor


class SourceEncoder:
    """VAE and vision tower together; made once, used for every source image."""

    def __init__(
        self, prompts: Prompts, vae: VAE, tower: nn.Module, aligner: Aligner, crop: bool = True
    ) -> None:
        self.prompts, self.config = prompts, prompts.config
        self.vae, self.tower, self.aligner = vae, tower, aligner
        self._known: dict[tuple[Any, ...], Source] = {}
        #: Whether images are cut to their bucket, or squeezed into it.
        self.crop = crop

    def noise(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        """The VAE's noise for one image, float32 ``[1, C, 1, h, w]``, as official runs draw it."""
        _, size = vae_image(image, self.config.image_base_size, self.crop)
        factor = self.config.factor
        channels = self.config.vae.latent_channels
        shape = (1, channels, 1, size.height // factor, size.width // factor)
        return draw(shape, generator, torch.float32)

    @torch.no_grad()
    def __call__(self, image: Image.Image, noise: Tensor) -> Source:
        """Encode an image with the VAE's noise (see `noise`), or give it as it was encoded lately: the
        passes read the same images. Raises HYWUError on one too thin.
        """
        check_source(image)
        image = image.convert("RGB")
        key = (image.size, image.tobytes(), noise.numpy().tobytes(), self.crop)
        source = self._known.pop(key, None) or self._encode(image, noise)
        self._known[key] = source
        while len(self._known) > KEPT:
            del self._known[next(iter(self._known))]
        return source

    def _encode(self, image: Image.Image, noise: Tensor) -> Source:
        config = self.config
        pixels, _ = vae_image(image, config.image_base_size, self.crop)
        weight = self.vae.encoder.conv_in.weight
        x = to_pixels(pixels)[None].to(weight.device, weight.dtype)
        latent = self.vae.sample(x, noise.to(weight.device))[0]
        patches = vision.patches_of(image, self.prompts.processor)
        aligned = self.aligner(vision.see(self.tower, [patches]))[0]
        return Source(image, self.prompts.shape(image), latent, aligned)
