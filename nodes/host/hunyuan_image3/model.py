"""HunyuanImage-3 as a MODEL for stock samplers.

Flow matching with ``x_t = (1 - sigma) x0 + sigma noise``; the network predicts dx/dsigma. What it is asked
comes in a CONDITIONING of *HunyuanImage-3 Edit Prompt*: token ids and encoded images in objects that no
cast touches. The prefix of a sequence is computed once per sampling and freed at its end.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.supported_models_base
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....hywu_core.bases.hunyuan_image3.banks import CodedBank
from ....hywu_core.bases.hunyuan_image3.config import HunyuanConfig
from ....hywu_core.bases.hunyuan_image3.editing import Denoiser
from ....hywu_core.bases.hunyuan_image3.images import custom_size
from ....hywu_core.bases.hunyuan_image3.model import HunyuanImage3
from ....hywu_core.bases.hunyuan_image3.placement import CHUNK
from ....hywu_core.bases.hunyuan_image3.plan import activation_bytes, kv_bytes
from ....hywu_core.bases.hunyuan_image3.prompts import Prompts, Request
from ....hywu_core.bases.hunyuan_image3.sequence import TokenSequence
from ....hywu_core.bases.hunyuan_image3.sources import Source
from ....hywu_core.errors import HYWUError
from .. import operations
from .banks import Banks, Staging
from .dynamic import DynamicBank

#: Key of a conditioning's dict, and the wrapper's.
KEY = "hunyuan_image3"
#: Divisible by every usual number of steps, so that the stock scheduler "simple" has the official ones.
TIMESTEPS = 277_200


@dataclass(frozen=True, eq=False)
class Row:
    """What one image of a batch is asked for, in one branch of guidance."""

    prompts: Prompts
    request: Request
    sources: tuple[Source, ...]
    unconditional: bool

    def sequence(self, height: int, width: int) -> TokenSequence:
        """For an image of a size in pixels."""
        config = self.prompts.config
        size = custom_size(height, width, config.image_base_size, config.factor)
        return self.prompts.image(self.request, size)[self.unconditional]


class Operations:
    """Layers for the network; those with few weights are ComfyUI's to load whole."""

    Linear = operations.Linear
    Embedding = operations.Embedding
    Conv2d = operations.Conv2d
    GroupNorm = comfy.ops.manual_cast.GroupNorm


class HostModel(HunyuanImage3):
    """The network with the calling convention of ComfyUI's diffusion models."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__(config, Operations, Banks)
        self.sessions = Sessions(self)
        #: Where experts that rest in host memory pass through.
        self.staging = Staging()
        self.staging.share(self)
        #: What a distilled checkpoint reads where the conditioning says nothing.
        self.default_guidance = 1.0

    @property
    def device(self) -> torch.device:
        """ComfyUI's, also where weights rest in host memory."""
        return mm.get_torch_device()

    def decode(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `HunyuanImage3.decode`."""
        with self.staging.passing():
            return super().decode(*args, **kwargs)

    def forward(
        self, x: Tensor, timestep: Tensor, rows: Sequence[Row] = (),
        guidance_scale: Tensor | None = None, transformer_options: dict[str, Any] | None = None,
        **_: Any,
    ) -> Tensor:  # fmt: skip
        """x ``[B, C, h, w]``, timestep ``[B]`` (1000·sigma), one row per item. Returns dx/dsigma."""
        options = transformer_options or {}
        following = _following(timestep, options) if self.config.meanflow else None
        given = None if guidance_scale is None else float(guidance_scale.flatten()[0])
        guidance = self.default_guidance if given is None else given
        with self.sessions.denoiser(rows, x, options) as denoiser:
            return denoiser(x, timestep, following, guidance)


def _following(timestep: Tensor, options: dict[str, Any]) -> Tensor:
    """Where the step ends, ``[B]`` in 1000·sigma: the next of the sampler's noise levels."""
    sigmas = options.get("sample_sigmas")
    if sigmas is None:
        raise HYWUError(
            "This distilled HunyuanImage-3 reads where a sampling step ends, which this sampler doesn't say; "
            "use KSampler or SamplerCustomAdvanced."
        )
    levels = 1000 * sigmas.to(timestep)
    lower = levels[levels < timestep[0] - 1e-3]
    return (lower.max() if lower.numel() else levels.new_zeros(())).expand_as(timestep)


class Sessions:
    """Denoisers with the prefixes that they keep, for the length of one sampling.

    A prefix is kept per rows, size, LoRAs that act and weights; where weights change by hooks it is
    computed at every step.
    """

    def __init__(self, model: HostModel) -> None:
        self._model, self._open = [model], 0  # in a list: no submodule
        self._kept: dict[tuple, tuple[tuple, Denoiser]] = {}
        self.hooked = False

    def __deepcopy__(self, memo: dict) -> Sessions:
        return self

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Prefixes are kept inside the block and freed at its end, however it ends."""
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self.close()

    def close(self) -> None:
        for _, denoiser in self._kept.values():
            denoiser.close()
        self._kept.clear()

    @contextlib.contextmanager
    def denoiser(
        self, rows: Sequence[Row], x: Tensor, options: dict[str, Any]
    ) -> Iterator[Denoiser]:
        if len(rows) != x.shape[0]:
            raise HYWUError(
                f"The latent has {x.shape[0]} images and the prompt {len(rows)}; give one prompt for all, or "
                "one per image."
            )
        height, width = x.shape[2:]
        where, state = (*map(id, rows), height, width), options.get("hywu_loras", ())
        former, denoiser = self._kept.get(where, ((), None))
        if denoiser is not None and former != state:
            denoiser.close()
            denoiser = None
        denoiser = denoiser or self._make(rows, height, width)
        if not self._open or self.hooked:
            with denoiser:
                yield denoiser
            return
        self._kept[where] = state, denoiser
        yield denoiser

    def _make(self, rows: Sequence[Row], height: int, width: int) -> Denoiser:
        (model,) = self._model
        factor = model.config.factor
        made: dict[int, TokenSequence] = {}
        for row in rows:
            if id(row) not in made:
                made[id(row)] = row.sequence(height * factor, width * factor)
        sequences = [made[id(row)] for row in rows]
        return Denoiser(model, sequences, [row.sources for row in rows], progress=interruptible)


def interruptible(*_: int) -> None:
    """Ends a pass between two layers."""
    mm.throw_exception_if_processing_interrupted()


class Rows(comfy.conds.CONDRegular):
    """Rows of a batch as a condition of ComfyUI's: put together as lists, cast by nobody."""

    cond: list[Row]

    def process_cond(self, batch_size: int, **_: Any) -> Rows:
        if len(self.cond) not in (1, batch_size):
            raise HYWUError(
                f"The prompt is for {len(self.cond)} images and the latent has {batch_size}; take the LATENT "
                "of the same HunyuanImage-3 Edit Prompt, or repeat neither."
            )
        return Rows(self.cond * batch_size if len(self.cond) == 1 else self.cond)

    def can_concat(self, other: Any) -> bool:
        return isinstance(other, Rows)

    def concat(self, others: Sequence[Rows]) -> list[Row]:
        return [row for each in (self, *others) for row in each.cond]

    def size(self) -> list[int]:
        """[rows, tokens before the image, 1]."""
        tokens = max(len(row.prompts.ratio(row.request)) for row in self.cond)
        return [len(self.cond), tokens, 1]


def latent_format(config: HunyuanConfig) -> type[comfy.latent_formats.LatentFormat]:
    """Latents of the VAE and latents that are sampled, for one checkpoint."""

    class Latents(comfy.latent_formats.LatentFormat):
        latent_channels = config.vae.latent_channels
        scale_factor = config.vae.scaling_factor

        def process_in(self, latent: Tensor) -> Tensor:
            return (latent - config.vae.shift_factor) * self.scale_factor

        def process_out(self, latent: Tensor) -> Tensor:
            return latent / self.scale_factor + config.vae.shift_factor

    return Latents


class HunyuanModel(comfy.model_base.BaseModel):
    """Flow matching over HunyuanImage-3; `reader` is what made its prompts (see load.Reader)."""

    def __init__(self, network: HostModel, reader: Any, shift: float) -> None:
        config = _config(network.config)
        super().__init__(config, comfy.model_base.ModelType.FLOW)
        self.diffusion_model, self.reader = network, reader
        self.model_sampling.set_parameters(shift=shift, timesteps=TIMESTEPS, multiplier=1000)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        rows = kwargs.get(KEY)
        if rows is None:
            raise HYWUError(
                "HunyuanImage-3 got a conditioning that isn't its own; connect positive and negative of "
                "HunyuanImage-3 Edit Prompt."
            )
        made: dict[str, Any] = {"rows": Rows(list(rows))}
        if kwargs.get("guidance") is not None:
            scale = torch.tensor([float(kwargs["guidance"])])
            made["guidance_scale"] = comfy.conds.CONDRegular(scale)
        return made

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> float:
        """Bytes: keys and values, a pass' activations, chunks of experts that are copied or decoded."""
        network, dtype = self.diffusion_model, self.get_dtype()
        config = network.config
        batch, (height, width) = input_shape[0], input_shape[2:]
        shapes = (cond_shapes or {}).get("rows") or [[1, 0, 1]]
        prefix, image = max(shape[1] for shape in shapes), height * width
        kept = batch * (prefix + image) * kv_bytes(config, dtype)
        pass_ = activation_bytes(config, batch * max(prefix, image), dtype)
        matrix = (config.hidden_size, max(config.expert_widths))
        bank, decoded = network.model.layers[0].mlp.experts.w1, 0
        if isinstance(bank, (CodedBank, DynamicBank)):
            at_once, codec = (
                (CHUNK, bank.source.codec) if isinstance(bank, CodedBank) else (1, bank.codec)
            )
            decoded = at_once * math.prod(matrix) * dtype.itemsize + codec.scratch_bytes(*matrix)
        return float(kept + pass_ + network.staging.nbytes + decoded)


def _config(config: HunyuanConfig) -> comfy.supported_models_base.BASE:
    class ModelConfig(comfy.supported_models_base.BASE):
        unet_config = {"disable_unet_model_creation": True}
        sampling_settings = {"shift": 3.0, "multiplier": 1000}
        supported_inference_dtypes = [torch.bfloat16, torch.float32]

    ModelConfig.latent_format = latent_format(config)
    return ModelConfig({"disable_unet_model_creation": True})


def while_sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a whole sampling: what is kept for it is freed when it ends, also by an error."""
    patcher = executor.class_obj.model_patcher
    sessions = patcher.model.diffusion_model.sessions
    with sessions.sampling():
        return executor(*args, **kwargs)


def patched(model: HunyuanModel, dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The MODEL, under the host's usual patcher (dynamic, see dynamic.py) or the plain one."""
    host = comfy.model_patcher
    made = host.CoreModelPatcher if dynamic else host.ModelPatcher
    patcher = made(model, mm.get_torch_device(), mm.unet_offload_device())
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, while_sampling)
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _see_hooks)
    return patcher


def _see_hooks(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Weights that hooks change within a sampling would leave a prefix of other weights."""
    model = executor.class_obj
    current = getattr(model, "current_patcher", None)
    model.diffusion_model.sessions.hooked = getattr(current, "current_hooks", None) is not None
    return executor(*args, **kwargs)
