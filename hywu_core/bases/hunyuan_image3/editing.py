"""The editing pass: a flow sampled by Euler steps; keys and values of the prefix are kept between them.

Tokens before the image's ``<timestep>`` can't see it, so their keys and values are the same at every
step: they are computed once, by themselves, and a step computes ``<timestep>`` and the image's tokens
only. Both branches of guidance are rows of one batch.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import HYWUError
from ...injection import inject
from ...lora import GeneratedLoRA
from .attention import KVCache
from .model import HunyuanImage3, Progress
from .passes import places, prefill
from .sequence import TokenSequence
from .sources import Source

#: Called with (steps done, steps, latents) after each step; what it raises ends the sampling.
OnStep = Callable[[int, int, Tensor], None]


def schedule(steps: int, shift: float) -> Tensor:
    """Noise levels float32 ``[steps + 1]`` from 1 to 0, moved towards 1 by a shift above 1."""
    if steps < 1:
        raise HYWUError(f"{steps} sampling steps; it must be 1 or more.")
    sigma = torch.linspace(1, 0, steps + 1)
    return shift * sigma / (1 + (shift - 1) * sigma)


class Denoiser:
    """Predictions dx/dsigma of images, given sequences that end in the image to generate.

    sequences: one per row of the latents.
    sources: their source images.
    keep_prefix: whether the prefix' keys and values are kept between calls; computed again each time, the
        result is bit by bit the same.
    Use it in a ``with`` block, or call `close`: that frees them.
    """

    def __init__(
        self,
        model: HunyuanImage3,
        sequences: Sequence[TokenSequence],
        sources: Sequence[Sequence[Source]],
        keep_prefix: bool = True,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.sequences, self.sources = model, list(sequences), list(sources)
        self.keep_prefix, self.progress = keep_prefix, progress
        self.targets = [s.target for s in self.sequences if s.target is not None]
        if len(self.targets) != len(self.sequences):
            raise HYWUError("A sequence without an image to generate can't be sampled.")
        if len({(t.grid.height, t.grid.width) for t in self.targets}) != 1:
            raise HYWUError(
                "The images of one batch differ in size; choose one size for all, or run them one by one."
            )
        self._cache: KVCache | None = None

    def __enter__(self) -> Denoiser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    @torch.no_grad()
    def __call__(
        self, latents: Tensor, t: Tensor, t_next: Tensor | None = None, guidance: float = 1.0
    ) -> Tensor:
        """latents ``[B, C, h, w]``; t float32 ``[B]``, 1000·sigma.

        t_next: of the step's end.

        guidance, t_next: what distilled checkpoints read.
        Returns float32 ``[B, C, h, w]``.
        """
        try:
            if self._cache is None:
                self._cache = self._prefix()
            return self._image(latents, t, t_next, guidance, self._cache)
        except BaseException:
            self.close()
            raise
        finally:
            if not self.keep_prefix:
                self.close()

    def _prefix(self) -> KVCache:
        stop = [target.timestep for target in self.targets]
        capacity = max(target.grid.stop for target in self.targets)
        cache = KVCache(self.model.config, len(stop), capacity, self.model.kv_device)
        try:
            prefill(self.model, self.sequences, self.sources, stop, cache, self.progress)
        except BaseException:
            cache.close()
            raise
        return cache

    def _image(
        self, latents: Tensor, t: Tensor, t_next: Tensor | None, guidance: float, cache: KVCache
    ) -> Tensor:
        model, target, dtype = self.model, self.targets[0], self.model.dtype
        latents, t = latents.to(dtype), t.to(latents.device, torch.float32)
        tokens = [model.timestep_emb(t, dtype)[:, None]]
        if target.guidance is not None:
            # official runs hold the guidance in bfloat16: 2500 becomes 2496
            scale = torch.full_like(t, 1000 * guidance).bfloat16().float()
            tokens.append(model.guidance_emb(scale, dtype)[:, None])
        if target.timestep_r is not None:
            if t_next is None:
                raise HYWUError("This checkpoint reads where a step ends; give t_next.")
            tokens.append(model.timestep_r_emb(t_next.to(t), dtype)[:, None])
        tokens.append(model.patch_embed(latents, model.time_embed(t, dtype)))
        x = torch.cat(tokens, dim=1)
        del tokens
        start = [target.timestep for target in self.targets]
        stop = [target.grid.stop for target in self.targets]
        plan = [s.rows(a, b) for s, a, b in zip(self.sequences, start, stop, strict=True)]
        x = model.decode(x, places(self.sequences, start, stop), plan, cache, self.progress)
        size = (target.grid.height, target.grid.width)
        hidden = x[:, -size[0] * size[1] :]
        return model.final_layer(hidden, model.time_embed_2(t, dtype), size).float()


@dataclass(frozen=True)
class Sampling:
    """steps, flow_shift: of the schedule.

    guidance: how far from the unconditional branch; distilled checkpoints read it instead.
    """

    steps: int
    guidance: float
    flow_shift: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise HYWUError(f"The guidance is {self.guidance}; it must be a finite number.")
        if not 0 < self.flow_shift < math.inf:
            raise HYWUError(
                f"The flow shift is {self.flow_shift}; it must be a finite number above 0."
            )


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor,
    sampling: Sampling,
    guided: bool,
    on_step: OnStep | None = None,
) -> Tensor:
    """Latents float32 ``[n, C, h, w]`` from noise of that shape, by Euler steps.

    guided: the denoiser's rows are n conditional, then n unconditional ones. Raises HYWUError
    below one step.
    """
    x, g = noise.float(), sampling.guidance
    sigmas = schedule(sampling.steps, sampling.flow_shift).to(x.device)
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas), 1):
        rows = torch.cat((x, x)) if guided else x
        t, t_next = (1000 * s.expand(len(rows)) for s in (sigma, following))
        prediction = denoiser(rows, t, t_next, g)
        if guided:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + g * (conditional - unconditional)
        x = x + (following - sigma) * prediction
        if on_step is not None:
            on_step(step, sampling.steps, x)
    return x


@contextlib.contextmanager
def injected(
    model: nn.Module, lora: GeneratedLoRA | None, strength: float, rows: list[int]
) -> Iterator[None]:
    """The model with the LoRA, if there is one; row i of its batches has LoRA rows[i]."""
    if lora is None:
        yield
        return
    if lora.batch_size not in (1, max(rows) + 1):
        raise HYWUError(
            f"{max(rows) + 1} requests, but {lora.batch_size} LoRAs; generate one for each, or pick one."
        )
    index = rows if lora.batch_size > 1 else None
    with inject(model, lora, strength, index=index):
        yield
