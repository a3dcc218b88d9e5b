"""Dense weights that leave the device: parts that are there only while they are used, or all for a while."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from . import vision
from .banks import CodedBank
from .checkpoint import Folder
from .offload import Offloaded
from .staging import Traffic

if TYPE_CHECKING:
    from .pipeline import Parts


class Part(NamedTuple):
    """A module without experts, and what its tensors' names start with in the files."""

    module: nn.Module
    prefix: str

    @property
    def in_layers(self) -> bool:
        """Whether every pass uses it."""
        return self.prefix.startswith("model.layers.")

    def dtype(self, dtype: torch.dtype, vae_dtype: torch.dtype) -> torch.dtype:
        return vae_dtype if self.prefix.startswith("vae.") else dtype

    def nbytes(self, dtype: torch.dtype, vae_dtype: torch.dtype) -> int:
        size = self.dtype(dtype, vae_dtype).itemsize
        return sum(p.numel() for p in self.module.parameters()) * size


def dense_parts(parts: Parts) -> list[Part]:
    """What may leave the device while it isn't used, that which is used least first."""
    model = parts.model
    found = [
        Part(parts.vae.decoder, "vae.decoder."), Part(parts.vae.encoder, "vae.encoder."),
        Part(parts.tower, vision.PREFIX), Part(parts.aligner, "vision_aligner."),
        Part(model.lm_head, "lm_head."),
    ]  # fmt: skip
    for i, layer in reversed(list(enumerate(model.model.layers))):
        found.append(Part(layer.mlp.shared_mlp, f"model.layers.{i}.mlp.shared_mlp."))
        found.append(Part(layer.self_attn, f"model.layers.{i}.self_attn."))
    return found


def dense_bytes(parts: Parts, dtype: torch.dtype, vae_dtype: torch.dtype) -> list[int]:
    """Of each of `dense_parts`."""
    return [part.nbytes(dtype, vae_dtype) for part in dense_parts(parts)]


def held_bytes(module: nn.Module) -> int:
    """Bytes of memory behind a module's parameters."""
    return sum(p.nbytes for p in module.parameters() if _is_there(p))


def _is_there(value: Tensor) -> bool:
    return not value.is_meta and value.untyped_storage().nbytes() >= value.nbytes


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """One number, which all dropped weights share."""
    return torch.empty((), dtype=dtype, device=device)


def _exchange(module: nn.Module, made: Callable[[Tensor], Tensor]) -> None:
    for owner in module.modules():
        for leaf, value in list(owner._parameters.items()):
            if value is not None:
                setattr(owner, leaf, nn.Parameter(made(value), requires_grad=False))


class Resting:
    """Brings a part's weights to the device before each use and drops them after it.

    ram: whether they rest in host memory, page-locked where the device is CUDA; else in the files. Between
    uses each parameter has its shape, dtype and device, and no memory.
    """

    def __init__(
        self, folder: Folder, part: Part, device: torch.device, dtype: torch.dtype, ram: bool, traffic: Traffic
    ) -> None:  # fmt: skip
        self._folder, self._part, self._traffic = folder, part, traffic
        self._device, self._dtype = device, dtype
        self._host: dict[str, Tensor] = {}
        if ram:
            folder.fill(part.module, part.prefix, "cpu", dtype)
            pinned = device.type == "cuda"
            for name, value in part.module.named_parameters():
                self._host[name] = value.data.pin_memory() if pinned else value.data
        self._drop()
        part.module.register_forward_pre_hook(self._bring)
        part.module.register_forward_hook(self._drop, always_call=True)

    def _bring(self, *_: object) -> None:
        module = self._part.module
        module.to_empty(device="meta")
        if self._host:
            for name, value in self._host.items():
                owner, _, leaf = name.rpartition(".")
                here = value.to(self._device, non_blocking=True, copy=True)
                setattr(module.get_submodule(owner), leaf, nn.Parameter(here, requires_grad=False))
        else:
            self._folder.fill(module, self._part.prefix, self._device, self._dtype)
        self._traffic.dense += held_bytes(module)

    def _drop(self, *_: object) -> None:
        nothing = _nothing(self._dtype, self._device)
        _exchange(self._part.module, lambda value: nothing.expand(value.shape))


@contextlib.contextmanager
def evicted(parts: Parts, offloaded: Offloaded | None, read: Callable[[], None]) -> Iterator[None]:
    """All weights leave the device in the block.

    read: fills parameters on "meta" from the files.
    """
    modules = (parts.model, parts.vae, parts.tower, parts.aligner)
    banks = [m for m in parts.model.modules() if isinstance(m, CodedBank)]
    for module in modules:
        _exchange(module, lambda value: value.to("meta") if _is_there(value) else value)
    if offloaded is not None:
        offloaded.free()
    try:
        yield
    finally:
        if offloaded is not None:
            offloaded.allocate()
        for bank in banks:
            bank.read()
        read()
