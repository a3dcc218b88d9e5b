"""A ComfyUI MODEL as the training loop sees it: latents by the VAE, loss by the MODEL's own sampling.

Every sampling class of ComfyUI says how noise is added (`noise_scaling`) and how the network's output
becomes the denoised latent (`calculate_denoised`), which is linear in the output: ``a x + c output``. So
the error of the denoised latent divided by c is the error of the output: of the noise for eps, of v for
v-prediction, of the velocity for flows, whatever the class.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import comfy.model_management as mm
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor, nn

from ....hywu_core.bases.bundled.training import AT_START, NAME, at_start, logarithmic
from ....hywu_core.condition import Condition
from ....hywu_core.training.base import Batch, Draws
from ..bundled_editor import HostEditor
from ..cache import TensorCache
from ..encode.latents import CachedLatents
from ..identity import base_fingerprint
from .conditions import CachedEncoder, pad_texts, stack

#: How the base gets the source image -> names of the conditioning entries with its latent.
SOURCES = {
    "both": ("concat_latent_image", "reference_latents"),
    "reference_latents": ("reference_latents",),
    "concat_latent": ("concat_latent_image",),
    "none": (),
}


class HostBase:
    """The `BaseModel` of a MODEL with its VAE; call `load` before anything runs through it.

    source_input: a key of `SOURCES`.
    sample_steps: Euler steps of `edit`, at cfg 1.
    """

    def __init__(
        self, patcher: Any, vae: Any, encoder: CachedEncoder, cache: TensorCache, source_input: str,
        sample_steps: int,
    ) -> None:  # fmt: skip
        self.patcher, self.model, self.vae = patcher, patcher.model, vae
        self.graph_encoder = encoder
        #: Image ``[1, 3, H, W]`` in 0..1 -> its latent.
        self.latent = CachedLatents(self.model, vae, cache)
        self.source_input, self.sample_steps = source_input, sample_steps
        self.weights = base_fingerprint(patcher)
        self.vae_weights = self.latent.weights
        #: The bundled editor predicts the clean image; its velocity is only derived from that.
        self.predicts_clean = isinstance(self.module, HostEditor)
        #: Whether shorter texts are padded in a batch; only where the MODEL reads their masks.
        self.pads = False

    @property
    def module(self) -> nn.Module:
        return self.model.diffusion_model

    @property
    def name(self) -> str:
        if self.predicts_clean:
            return NAME
        return f"{type(self.module).__name__}-{self.weights}"

    @property
    def encoder(self) -> Mapping[str, Any]:
        return self.graph_encoder.identity

    @property
    def condition_parts(self) -> Mapping[str, int]:
        return self.graph_encoder.parts

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    def load(self, activation_bytes: int = 0) -> None:
        """Bring the whole base to its device, as tensors that autograd may keep.

        ComfyUI loads weights under inference mode; such tensors can't be saved for a backward pass, so
        each is replaced by a copy with the same bits.
        """
        mm.load_models_gpu([self.patcher], memory_required=activation_bytes, force_full_load=True)
        for module in self.model.modules():
            for table in (module._parameters, module._buffers):
                for key, value in table.items():
                    if value is None or not value.is_inference():
                        continue
                    copy = value.detach().clone()
                    trained = isinstance(value, nn.Parameter)
                    table[key] = nn.Parameter(copy, requires_grad=False) if trained else copy

    # -- what the loop asks for ------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self, source: Tensor, instruction: Sequence[str],
        references: Sequence[Sequence[Tensor]] = (),
    ) -> Condition:  # fmt: skip
        further = references or [()] * len(instruction)
        rows = zip(source.cpu().split(1), instruction, further, strict=True)
        return stack([self.graph_encoder.condition(*row) for row in rows]).to(source.device)

    def draw(self, batch: Batch, seed: int) -> Draws:
        """noise ``[B, *latent]``; u ``[B]`` in [0, 1], one stratum of the schedule per item."""
        generator = torch.Generator().manual_seed(seed)
        count, shape = len(batch), self.latent(batch.source[:1].cpu()).shape[1:]
        noise = torch.randn(count, *shape, generator=generator)
        order = torch.randperm(count, generator=generator)
        u = (order + torch.rand(count, generator=generator)) / count
        if self.predicts_clean:  # the recipe of `hywu train`; the schedule's last entry is t = 1
            u.masked_fill_(at_start(count, AT_START, seed), 1)
        return {"noise": noise, "u": u}

    def loss(self, module: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        device = batch.source.device
        source, target = (
            self.latents(images).to(device) for images in (batch.source, batch.target)
        )
        sampling, clean = self.model.model_sampling, self.model.process_latent_in(target)
        table = sampling.sigmas.to(device)
        sigma = table[(draws["u"] * len(table)).long().clamp_(max=len(table) - 1)].float()
        noise = draws["noise"].to(device)
        x = sampling.noise_scaling(sigma, noise.clone(), clean)
        denoised = self.denoise(module, x, sigma, batch.instruction, source)
        error = denoised.float() - clean
        if self.predicts_clean:
            return logarithmic(error.square().flatten(1).mean(1))
        ones = torch.ones_like(x)
        error = error / sampling.calculate_denoised(sigma, ones, torch.zeros_like(x))
        return error.square().flatten(1).mean(1)

    @torch.no_grad()
    def edit(self, module: nn.Module, batch: Batch, seed: int) -> Tensor:
        source, sampling = (
            self.latents(batch.source).to(batch.source.device),
            self.model.model_sampling,
        )
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", self.sample_steps)
        sigmas = sigmas.to(source.device, torch.float32)
        noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(seed)).to(source)
        x = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(source), True)
        for now, following in itertools.pairwise(sigmas):
            sigma = now.expand(len(batch))
            denoised = self.denoise(module, x, sigma, batch.instruction, source)
            x = x + (x - denoised) / now * (following - now)
        latent = self.model.process_latent_out(sampling.inverse_noise_scaling(sigmas[-1], x))
        images = torch.cat([self._decode(row) for row in latent.split(1)])
        self.load()  # decoding may have moved the base away
        return images.to(batch.source.device)

    # -- through the MODEL -----------------------------------------------------------------------

    def denoise(
        self, module: nn.Module, x: Tensor, sigma: Tensor, texts: Sequence[str], source: Tensor
    ) -> Tensor:
        """The denoised latent ``[B, ...]`` at x and sigma ``[B]``, in the model's own latent space."""
        rows = self.conds(texts, source, x)
        options = dict(self.patcher.model_options.get("transformer_options", {}))
        # what the sampler does before its first step
        options["wrappers"] = comfy.patcher_extension.copy_nested_dicts(self.patcher.wrappers)
        options |= {"cond_or_uncond": [0], "sigmas": sigma}
        with self._running(module):
            return self.model.apply_model(
                x, sigma, **comfy.samplers.cond_cat(rows), transformer_options=options
            )

    def conds(self, texts: Sequence[str], source: Tensor, x: Tensor) -> list[dict[str, Any]]:
        """What the MODEL makes of each item's text and source image, as its samplers ask it."""
        entries = [self.graph_encoder.conditioning(text) for text in texts]
        entries = pad_texts(entries) if self.pads else entries
        rows = []
        for i, entry in enumerate(entries):
            latent, noise = source[i : i + 1], x[i : i + 1]
            values = {"concat_latent_image": latent, "reference_latents": [latent]}
            entry |= {key: values[key] for key in SOURCES[self.source_input]}
            ready = comfy.sampler_helpers.convert_cond([[entry.pop("cross_attn"), entry]])
            ready = comfy.samplers.encode_model_conds(
                self.model.extra_conds, ready, noise, x.device, "positive", latent_image=latent,
                denoise_mask=None, seed=0,
            )  # fmt: skip
            made = ready[0]["model_conds"]
            rows.append({k: c.process_cond(batch_size=1, area=None) for k, c in made.items()})
        return rows

    def batchable(self, texts: Sequence[str], like: Tensor) -> bool:
        """Whether the MODEL takes these texts in one batch, as they are or padded (see `pads`).

        like: source latents of one item.
        """
        many = like.expand(len(texts), *like.shape[1:])
        for self.pads in (False, True):
            rows = self.conds(texts, many, many)
            first = rows[0]
            equal = all(
                row.keys() == first.keys() and all(first[key].can_concat(row[key]) for key in first)
                for row in rows[1:]
            )
            # a MODEL that lets the mask fall would take the padding for text
            if equal and (not self.pads or any("mask" in key for key in first)):
                return True
        self.pads = False
        return False

    @contextlib.contextmanager
    def _running(self, module: nn.Module) -> Iterator[None]:
        """The MODEL with an adapted copy of its network in place."""
        own = self.module
        try:
            self.model.diffusion_model = module
            yield
        finally:
            self.model.diffusion_model = own

    # -- latents ---------------------------------------------------------------------------------

    def latents(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in 0..1 -> the VAE's latents, on the CPU."""
        return torch.cat([self.latent(image) for image in images.split(1)])

    @torch.inference_mode()
    def _decode(self, latent: Tensor) -> Tensor:
        """``[1, C, ...]`` -> ``[1, 3, H, W]`` in 0..1, on the CPU."""
        if getattr(self.vae, "latent_dim", 2) == 2 and latent.ndim == 5:
            latent = latent.squeeze(2)
        image = self.vae.decode(latent).float().cpu()
        return image.reshape(-1, *image.shape[-3:])[:1].movedim(-1, 1).clamp(0, 1)
