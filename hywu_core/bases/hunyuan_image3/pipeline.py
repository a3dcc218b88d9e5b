"""HunyuanImage-3 with HY-WU: think, condition, edit.

pipeline = Pipeline.load("HunyuanImage-3.0-Instruct", device="cuda", dtype=torch.bfloat16)
request = Request("make it night", [image])
request = pipeline.think(request)                          # pass 1, without a LoRA
condition = pipeline.condition([request])                  # pass 2, without a LoRA
images = pipeline.edit([request], lora=generator(condition))    # pass 3
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from ...condition import OFFICIAL_PART, Condition
from ...errors import HYWUError
from ...images import to_pillow
from ...layout import LoRALayout
from ...lora import GeneratedLoRA
from . import vision
from .checkpoint import FLOAT32, Folder, stored_dtype
from .dispatch import DeviceMap, dispatch
from .editing import Denoiser, OnStep, Sampling, injected, sample
from .embed import Aligner
from .images import Size, align
from .layers import RouterPrecision
from .model import HunyuanImage3, Progress
from .offload import Offloaded, Rest, offload
from .passes import prefill
from .prompts import Prompts, Request
from .resting import Resting, dense_bytes, dense_parts, evicted
from .sequence import TokenSequence
from .sources import Source, SourceEncoder
from .thinking import OnToken, Sampler, think
from .vae import VAE, draw

#: What a generator's checkpoint calls this encoder; a condition of another one is refused.
ENCODER = "hunyuan_image_3"


@dataclass
class Parts:
    """The networks of a folder. Each has its own name in the files: see PREFIXES."""

    model: HunyuanImage3
    vae: VAE
    tower: nn.Module
    aligner: Aligner


PREFIXES = {"model": "", "vae": "vae.", "tower": vision.PREFIX, "aligner": "vision_aligner."}


def build(folder: Folder, network: type[HunyuanImage3] = HunyuanImage3) -> Parts:
    """The folder's networks without weights; every tensor of the files is checked against them.

    network: the class of the transformer.
    Raises HYWUError on tensors that don't fit.
    """
    config = folder.config
    with torch.device("meta"):
        parts = Parts(
            network(config),
            VAE(config.vae),
            vision.build_tower(config.vision),
            Aligner(config.vision.hidden_size, config.hidden_size),
        )
    folder.check({prefix: getattr(parts, name) for name, prefix in PREFIXES.items()})
    return parts


def fixed_bytes(parts: Parts, dtype: torch.dtype, vae_dtype: torch.dtype) -> int:
    """Bytes on the device of all weights but the layers' experts."""
    total = 0
    for name in PREFIXES:
        itemsize = (vae_dtype if name == "vae" else dtype).itemsize
        for key, value in getattr(parts, name).named_parameters():
            if ".experts." not in key:
                router = any(mark in key for mark in FLOAT32)
                total += value.numel() * (4 if router else itemsize)
    return total


def fill(
    folder: Folder,
    parts: Parts,
    device: torch.device | str,
    dtype: torch.dtype | None,
    vae_dtype: torch.dtype = torch.float32,
) -> None:
    """Read the weights of what `build` gave.

    dtype: None keeps the stored one.
    """
    for name, prefix in PREFIXES.items():
        wanted = vae_dtype if name == "vae" else dtype
        folder.fill(getattr(parts, name), prefix, device, wanted)


class Pipeline:
    """The three passes over one checkpoint; each can be used without the others."""

    def __init__(self, prompts: Prompts, parts: Parts) -> None:
        self.prompts, self.config, self.settings = prompts, prompts.config, prompts.settings
        self.model, self.vae = parts.model, parts.vae
        #: Where the experts are, if the model was loaded with a budget.
        self.offloaded: Offloaded | None = None
        self._parts, self._read, self._spread = parts, lambda: None, False
        self.encode_source = SourceEncoder(prompts, parts.vae, parts.tower, parts.aligner)

    @classmethod
    def load(
        cls,
        path: str | Path | Prompts,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        router_precision: RouterPrecision = "float32",
        vae_dtype: torch.dtype = torch.float32,
        system: str | Path | None = None,
        layout: LoRALayout | None = None,
        budget: int | None = None,
        rest: Rest = "file",
        kv: Literal["device", "ram"] = "device",
        device_map: DeviceMap | str | None = None,
    ) -> Pipeline:
        """Load an official folder (its weights in safetensors; no code of it runs).

        path: the folder, or what was read of it already.
        dtype: None keeps the stored one.
        router_precision: "bfloat16" is how official runs multiply.
        system: the system prompt's text, or a .txt or .py file; None reads the folder's.
        layout: of a generator or LoRA that is to be used; checked before the weights are read.
        budget: most bytes of weights on the device; experts that don't fit rest in host memory ("ram") or in
            the files ("file") and are copied in chunks, and so do other parts where it is tighter, each whole while it
            is used.
        kv: where keys and values rest between layers.
        device_map: layers on several devices (see `dispatch`), instead of a budget.
        Raises HYWUError, before anything is allocated, naming what is missing or doesn't fit.
        """
        prompts = path if isinstance(path, Prompts) else Prompts.open(path, system)
        folder = prompts.folder
        parts = build(folder)
        if layout is not None:
            check_layout(parts.model, layout, folder.path)
        device, offloaded = torch.device(device), None
        if device_map is not None:
            kept = dtype or stored_dtype(folder)
            dispatch(folder, parts.model, device_map, device, kept, budget)
        elif budget is not None or folder.quantized:
            kept = dtype or stored_dtype(folder)
            fixed, sizes = fixed_bytes(parts, kept, vae_dtype), dense_bytes(parts, kept, vae_dtype)
            offloaded = offload(
                folder, parts.model, fixed - sum(sizes), budget, device, kept, rest, dense=sizes
            )
            for part in dense_parts(parts)[: offloaded.placement.dropped]:
                each = part.dtype(kept, vae_dtype)
                Resting(folder, part, device, each, rest == "ram", offloaded.traffic)
        fill(folder, parts, device, dtype, vae_dtype)
        parts.model.set_router_precision(router_precision)
        parts.model.kv_device = torch.device("cpu") if kv == "ram" else None
        pipeline = cls(prompts, parts)
        pipeline.offloaded = offloaded
        pipeline._spread = device_map is not None
        pipeline._read = functools.partial(fill, folder, parts, device, dtype, vae_dtype)
        return pipeline

    @property
    def device(self) -> torch.device:
        return self.model.device

    def evicted(self) -> contextlib.AbstractContextManager[None]:
        """In the block no weights are on the device; after it they are read from the folder again.

        Raises HYWUError where layers are on several devices.
        """
        if self._spread:
            raise HYWUError(
                f"{self.prompts.folder.path}: layers on several devices don't leave them; make the LoRA in "
                "a process of its own (`hywu hunyuan condition`, then `hywu generate`)."
            )
        return evicted(self._parts, self.offloaded, self._read)

    # -- the three passes ------------------------------------------------------------------------

    def think(
        self,
        request: Request,
        task: str = "think_recaption",
        sampler: Sampler | None = None,
        most: int | None = None,
        on_token: OnToken | None = None,
    ) -> Request:
        """Pass 1: the request with a chain of thought, and with a ratio where its size is automatic.

        sampler: None takes the checkpoint's settings.
        on_token: see `thinking.think`.
        """
        plain = replace(request, cot="", ratio=None)
        thought = think(
            self.model, self.prompts, plain, self.sources(plain),
            task=task, sampler=sampler or self.sampler(), most=most, on_token=on_token,
        )  # fmt: skip
        return replace(request, cot=thought.cot, ratio=thought.ratio)

    def condition(self, requests: Sequence[Request], progress: Progress | None = None) -> Condition:
        """Pass 2: hidden states of the last layer at every token, ``[B, longest, hidden]``."""
        states, sequences, _ = self._ratio_prefill(requests, progress)
        lengths = [len(s) for s in sequences]
        return condition_of(states, lengths, requests, self.prompts.folder.path.name)

    def edit(
        self,
        requests: Sequence[Request],
        lora: GeneratedLoRA | None = None,
        *,
        align_to_source: bool = True,
        **how: Any,
    ) -> list[Image.Image]:
        """Pass 3: the images, with the LoRA on for both branches; item i has LoRA i.

        align_to_source: bring the output to its source's aspect where the size is automatic.
        how: see `sample`.
        Raises HYWUError, before sampling, on what doesn't fit.
        """
        base, made = self.config.image_base_size, []
        for latent, request in zip(self.sample(requests, lora, **how), requests, strict=True):
            image = to_pillow(self.decode(latent[None])[0])
            aligned = align_to_source and request.automatic
            made.append(align(image, request.images, base) if aligned else image)
        return made

    def sample(
        self,
        requests: Sequence[Request],
        lora: GeneratedLoRA | None = None,
        *,
        strength: float = 1.0,
        steps: int | None = None,
        guidance: float | None = None,
        flow_shift: float | None = None,
        keep_prefix: bool = True,
        noise: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Latents ``[B, C, h, w]`` of pass 3.

        steps, guidance, flow_shift: None takes the checkpoint's.
        noise: instead of the drawn one, of the latents' shape.
        keep_prefix: see `Denoiser`.
        on_step: see `editing.sample`.
        """
        settings = self.settings
        sampling = Sampling(
            settings.steps if steps is None else steps,
            settings.guidance if guidance is None else guidance,
            settings.flow_shift if flow_shift is None else flow_shift,
        )
        drawn, sequences, sources = self.prepare(requests)
        start = drawn if noise is None else noise
        with (
            injected(self.model, lora, strength, self._rows(requests)),
            Denoiser(self.model, sequences, sources, keep_prefix) as denoiser,
        ):
            guided = not self.config.distilled
            return sample(denoiser, start.to(self.device), sampling, guided, on_step)

    # -- what they are made of -------------------------------------------------------------------

    def sampler(self) -> Sampler:
        """How the checkpoint says its text is drawn."""
        settings = self.settings
        if not settings.do_sample:
            return Sampler()
        return Sampler(settings.temperature, settings.top_k, settings.top_p)

    def sources(self, request: Request, generator: torch.Generator | None = None) -> list[Source]:
        """A request's images, encoded; the VAE's noise comes from its seed, image after image."""
        self.prompts.check(request)
        generator = generator or torch.Generator().manual_seed(request.seed)
        encode = self.encode_source
        return [encode(i, encode.noise(i, generator)) for i in request.images]

    def ratios(self, requests: Sequence[Request]) -> list[int]:
        """The bucket that the model would choose for each request."""
        return self._ratio_prefill(requests, None)[2]

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in 0..1 of latents ``[B, C, h, w]``."""
        with torch.no_grad():
            return self.vae.decode(latents)

    def _ratio_prefill(
        self, requests: Sequence[Request], progress: Progress | None
    ) -> tuple[Tensor, list[TokenSequence], list[int]]:
        sources = [self.sources(request) for request in requests]
        sequences = [self.prompts.ratio(request) for request in requests]
        states = prefill(self.model, sequences, sources, progress=progress)
        last = torch.stack([states[i, len(s) - 1] for i, s in enumerate(sequences)])
        with torch.no_grad():
            logits = self.model.logits(last)[:, list(self.prompts.tokens.ratios)]
        return states, sequences, logits.argmax(dim=1).tolist()

    def _rows(self, requests: Sequence[Request]) -> list[int]:
        """The LoRA of each row that the denoiser runs: the items, once per branch."""
        return list(range(len(requests))) * (1 if self.config.distilled else 2)

    def prepare(
        self, requests: Sequence[Request]
    ) -> tuple[Tensor, list[TokenSequence], list[list[Source]]]:
        """Initial noise ``[n, C, h, w]``, and the rows that the denoiser runs: sequences and sources.

        Done without a LoRA: an automatic size is the base model's choice.
        """
        for request in requests:
            self.prompts.check(request)
        drawn, rows = [], []
        for request, size in zip(requests, self._sizes(requests), strict=True):
            generator = torch.Generator().manual_seed(request.seed)
            sources = self.sources(request, generator)
            rows.append((self.prompts.image(request, size), sources))
            height, width = size.height // self.config.factor, size.width // self.config.factor
            # official runs draw the initial noise in bfloat16, after the VAE's
            shape = (1, self.config.vae.latent_channels, height, width)
            drawn.append(draw(shape, generator, torch.bfloat16))
        branches = (0,) if self.config.distilled else (0, 1)
        sequences = [pair[branch] for branch in branches for pair, _ in rows]
        return torch.cat(drawn), sequences, [given for _ in branches for _, given in rows]

    def _sizes(self, requests: Sequence[Request]) -> list[Size]:
        """Each request's size; automatic ones by pass 1, or predicted as pass 2 does."""
        sizes = []
        for request in requests:
            size = self.prompts.size(request)
            if size is None:
                chosen = request.ratio
                chosen = self.ratios([request])[0] if chosen is None else chosen
                size = self.prompts.bucket(chosen)
            sizes.append(size)
        if len({(s.height, s.width) for s in sizes}) != 1:
            said = ", ".join(f"{s.height}x{s.width}" for s in sizes)
            raise HYWUError(
                f"The images of this batch would be {said}; choose one size for all, or run them one by one."
            )
        return sizes


def check_layout(model: HunyuanImage3, layout: LoRALayout, path: Path) -> None:
    """Raise HYWUError where a generator's or LoRA's layers or experts aren't the model's."""
    config = model.config
    layers = max(len(stack.layers) for stack in layout.stacks)
    experts = {m.num_experts for stack in layout.stacks for m in stack.modules if m.num_experts}
    for what, there, here in (
        ("layers", {layers}, config.num_layers),
        ("experts", experts, config.num_experts),
    ):
        if there - {here}:
            raise HYWUError(
                f"{path}: has {here} {what}, the generator writes LoRAs for {max(there)}; use the generator "
                "that was trained for this base model."
            )
    layout.check(model)


def condition_of(
    states: Tensor, lengths: Sequence[int], requests: Sequence[Request], base: str
) -> Condition:
    """The published condition: hidden states ``[B, longest, hidden]``, of each item its first `lengths`.

    base: name of the base model's folder.
    """
    masks = {}
    if len(set(lengths)) > 1:
        at = torch.arange(states.shape[1], device=states.device)
        masks[OFFICIAL_PART] = at < torch.tensor(lengths, device=states.device)[:, None]
    origin = {
        "instruction": [request.instruction for request in requests],
        "encoder": ENCODER,
        "base": base,
    }
    made = Condition({OFFICIAL_PART: states}, masks, origin=origin)
    return replace(made, fingerprint=made.digest())
