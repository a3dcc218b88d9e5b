"""The bundled editor as ComfyUI's MODEL, CLIP and VAE, for stock samplers and conditioning nodes.

Flow matching with ``sigma = t``: ``x_t = (1 - t) x0 + t noise``. Latents are pixels in -1..1. The source
image comes as `concat_latent_image` (InstructPixToPixConditioning) or as a reference latent.
"""

from __future__ import annotations

from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import torch
from torch import Tensor, nn

from ...hywu_core.bases.bundled.checkpoint import editor_identity, load_editor
from ...hywu_core.bases.bundled.model import Editor
from ...hywu_core.bases.bundled.sampling import tiled_velocity
from ...hywu_core.errors import HYWUError
from . import operations
from .instructions import lines_of

#: Divisible by every number of steps up to 12, so that the stock scheduler "simple" has even steps.
TIMESTEPS = 27720


class HostEditor(Editor):
    """The editor with the calling convention of ComfyUI's diffusion models.

    identity: which weights these are; generators name the one that they were trained for.
    """

    identity = ""

    @property
    def dtype(self) -> torch.dtype:
        return self.text.position.dtype

    def forward(
        self, x: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor, **_: Any
    ) -> Tensor:
        """x ``[B, 6, H, W]``: x_t and the source image. Returns the velocity ``[B, 3, H, W]``."""
        image, source = x.chunk(2, dim=1)
        return tiled_velocity(_Tile(self), image, timestep, source, text, text_mask.bool())


class _Tile:
    """What the tiling calls: the engine's own forward, interruptible between groups of tiles."""

    def __init__(self, editor: HostEditor) -> None:
        self.editor, self.config = editor, editor.config

    def __call__(self, *args: Tensor) -> Tensor:
        mm.throw_exception_if_processing_interrupted()
        return super(HostEditor, self.editor).forward(*args)


class Pixels(comfy.latent_formats.LatentFormat):
    """RGB in -1..1; previews show it as it is."""

    latent_channels = 3
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class ModelConfig(comfy.supported_models_base.BASE):
    unet_config = {"disable_unet_model_creation": True}
    latent_format = Pixels
    sampling_settings = {"shift": 1.0, "multiplier": 1.0}
    supported_inference_dtypes = [torch.float32]


class EditorModel(comfy.model_base.BaseModel):
    """Flow matching on pixels, conditioned on a source image and the tokens of a text."""

    def __init__(self, editor: HostEditor) -> None:
        flow = comfy.model_base.ModelType.FLOW
        super().__init__(ModelConfig({"disable_unet_model_creation": True}), flow)
        self.diffusion_model = editor
        self.model_sampling.set_parameters(shift=1.0, timesteps=TIMESTEPS, multiplier=1.0)

    def process_timestep(self, timestep: Tensor, **_: Any) -> Tensor:
        # nodes that replace the sampling (ModelSamplingSD3) count in other units
        return timestep / getattr(self.model_sampling, "multiplier", 1.0)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        noise, device = kwargs["noise"], kwargs["device"]
        text = kwargs["cross_attn"]
        mask = kwargs.get("attention_mask")
        if mask is None or mask.shape != text.shape[:2]:
            # joined or averaged texts: all of their tokens count
            mask = torch.ones(text.shape[:2])
        if text.shape[0] not in (1, noise.shape[0]):
            raise HYWUError(
                f"The text has {text.shape[0]} lines and the latent {noise.shape[0]} images; write one "
                "line for all images, or one for each."
            )
        source = _source(noise, kwargs)
        return {
            "c_concat": comfy.conds.CONDNoiseShape(source.to(device)),
            "text": comfy.conds.CONDRegular(text.to(device)),
            "text_mask": comfy.conds.CONDRegular(mask.to(device, torch.float32)),
        }

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> float:
        """Bytes: activations of the tiles that run at once, and some copies of the image."""
        items, (height, width) = input_shape[0], input_shape[2:]
        activations = self.diffusion_model.config.activations(items, height, width)
        return 4.0 * (activations + 8 * 6 * items * height * width)


def _source(noise: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The source image ``[B, 3, H, W]`` for the latent. Raises HYWUError on none, or a misfit."""
    source = kwargs.get("concat_latent_image")
    if source is None and kwargs.get("reference_latents"):
        source = kwargs["reference_latents"][-1]
    if source is None:
        raise HYWUError(
            "The bundled editor edits a source image and got none; put InstructPixToPixConditioning "
            "with that image between the texts and the sampler."
        )
    if source.shape[1:] != noise.shape[1:] or noise.shape[0] % source.shape[0]:
        shapes = (" x ".join(map(str, value.shape)) for value in (source, noise))
        raise HYWUError(
            "The source image is {} and the latent {} (images x channels x height x width); take the "
            "latent from InstructPixToPixConditioning, or encode the same image with the editor's "
            "VAE.".format(*shapes)
        )
    return source.repeat(noise.shape[0] // source.shape[0], 1, 1, 1)


class LineTokenizer:
    """Splits a text into its lines: one for every image, or one for all. The encoder splits them into words."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> dict:
        return {"lines": lines_of(text) or [""]}

    def state_dict(self) -> dict:
        return {}


class WordText(nn.Module):
    """The editor's text encoder under ComfyUI's CLIP."""

    dtypes = {torch.float32}
    disable_offload = (
        True  # newer hosts: a plain patcher, which casts these layers where they are used
    )
    encode_text = Editor.encode_text

    def __init__(self, editor: nn.Module) -> None:
        super().__init__()
        self.config, self.text = editor.config, editor.text

    def reset_clip_options(self) -> None:
        pass

    def set_clip_options(self, options: dict) -> None:
        pass

    def load_sd(self, sd: dict) -> Any:
        return self.load_state_dict(sd, strict=False)

    def encode_token_weights(self, tokens: dict) -> tuple[Tensor, None, dict[str, Tensor]]:
        """Tokens ``[lines, T, C]``, no pooled output, and the mask of the tokens that count."""
        with torch.no_grad():
            text, mask = self.encode_text(tokens["lines"])
        device = mm.intermediate_device()
        return text.float().to(device), None, {"attention_mask": mask.to(device)}


class PixelVAE(comfy.sd.VAE):
    """ComfyUI's pixel-space VAE, which also takes gray and transparent images."""

    def __init__(self) -> None:
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)})

    def encode(self, pixel_samples: Tensor) -> Tensor:
        if 0 in pixel_samples.shape:
            raise HYWUError(
                "InstructPixToPixConditioning cuts images to multiples of 8 pixels, which leaves "
                "nothing of this one; take one of at least 8 x 8, or VAE Encode with ReferenceLatent."
            )
        return super().encode(rgb(pixel_samples))


def rgb(images: Tensor) -> Tensor:
    """``[..., 1 to 4]`` -> ``[..., 3]``: gray becomes RGB, transparency is ignored."""
    return (
        images[..., :3] if images.shape[-1] >= 3 else images[..., :1].expand(*images.shape[:-1], 3)
    )


def load_patcher(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The bundled editor as a MODEL, under the plain patcher, whatever the host's default is."""
    model = EditorModel(load_host_editor())
    patcher = comfy.model_patcher.ModelPatcher(
        model, mm.get_torch_device(), mm.unet_offload_device()
    )
    # newer hosts make copies for other devices by it
    patcher.cached_patcher_init = (load_patcher, ())
    return patcher


def load_host_editor() -> HostEditor:
    """Raises HYWUError when the weights are missing or damaged."""
    editor = load_editor(operations=operations, kind=HostEditor)
    editor.identity = editor_identity(editor)
    return editor


def load_clip() -> comfy.sd.CLIP:
    editor = load_editor(operations=operations)

    class Target:
        params: dict = {}
        tokenizer = LineTokenizer

        @staticmethod
        def clip(**_: Any) -> WordText:
            return WordText(editor)

    size = sum(p.numel() for p in editor.text.parameters())
    return comfy.sd.CLIP(Target, parameters=size)


def load_bundled() -> tuple[Any, comfy.sd.CLIP, PixelVAE]:
    """(MODEL, CLIP, VAE). Raises HYWUError when the weights are missing or damaged."""
    return load_patcher(), load_clip(), PixelVAE()
