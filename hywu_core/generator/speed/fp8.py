"""Linear layers in 8-bit floating point (e4m3) with one scale per row, for inference.

Weights are quantized once, a scale for each output; activations on each call, a scale for each position
(Micikevicius et al. 2022, "FP8 formats for deep learning"). Products run on the device's fp8 units
through torch._scaled_mm where it has row-wise scales; elsewhere the same quantized values are multiplied
in float32, which is slow and tells the accuracy. docs/speed.md states it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...errors import HYWUError, get_logger

if TYPE_CHECKING:
    from ..model import ParameterGenerator

log = get_logger(__name__)

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0

#: Not quantized: it runs over the condition's tokens only, so that it costs next to nothing.
KEPT = ("W_kv",)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [R, d]`` as e4m3 ``[R, d]`` and float32 scales ``[R, 1]``: x is about their product."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_(min=1e-12) / LARGEST
    return (x.float() / scale).clamp_(-LARGEST, LARGEST).to(E4M3), scale


@dataclass(frozen=True)
class Quantized:
    """Activations in 8 bits: values ``[R, d]`` e4m3, scale ``[R, 1]`` float32.

    shape, dtype: of the tensor that they stand for, whose rows they are.
    """

    values: Tensor
    scale: Tensor
    shape: Sequence[int]
    dtype: torch.dtype

    def view(self, shape: Sequence[int]) -> Quantized:
        """The same rows of a tensor of another shape."""
        return replace(self, shape=shape)


@dataclass(frozen=True)
class Fp8Weight:
    """A quantized weight: values ``[out, in]`` e4m3, scale ``[out, 1]`` float32."""

    values: Tensor
    scale: Tensor

    def linear(self, x: Tensor | Quantized, bias: Tensor | None) -> Tensor:
        """``x [..., in]`` quantized row by row, times the weight: ``[..., out]`` in x's dtype."""
        given = x if isinstance(x, Quantized) else _quantized(x)
        device = given.values.device
        if self.fast(device, given.dtype):
            takes = bias is None or scaled_mm_works(device, True)
            out = torch._scaled_mm(
                given.values,
                self.values.t(),
                scale_a=given.scale,
                scale_b=self.scale.t(),
                bias=bias if takes else None,
                out_dtype=given.dtype,
                use_fast_accum=True,
            )
            out = out if takes else out.add_(bias)
        else:
            out = (given.values.float() @ self.values.float().t()) * given.scale * self.scale.t()
            out = (out if bias is None else out + bias).to(given.dtype)
        return out.view(*given.shape[:-1], self.values.shape[0])

    def fast(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the device's fp8 units multiply activations of this dtype."""
        aligned = all(n % 16 == 0 for n in self.values.shape)
        return aligned and dtype == torch.bfloat16 and scaled_mm_works(device)


def _quantized(x: Tensor) -> Quantized:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    kernels = _kernels(x.device)
    return Quantized(*(kernels.quantize_rows if kernels else quantize_rows)(rows), x.shape, x.dtype)


class Fp8Linear(nn.Module):
    """A Linear with a quantized weight; layers.py asks it through `resolve`, as it asks a host's."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        values, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", values)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def resolve(self, like: Tensor) -> tuple[Fp8Weight, Tensor | None]:
        bias = self.bias
        return (
            Fp8Weight(self.weight, self.weight_scale),
            None if bias is None else bias.to(like.dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.resolve(x)
        return weight.linear(x, bias)


def to_fp8(generator: ParameterGenerator) -> ParameterGenerator:
    """Quantize the linear layers of the generator's blocks to e4m3, in place; returns the generator.

    It can't be trained or saved any more. Call it before a memory_budget starts to offload blocks.
    Raises HYWUError when the layers are a host's own, or blocks are offloaded already.
    """
    if generator.residency.offloaded:
        raise HYWUError(
            "the generator's blocks are offloaded to host memory already; call to_fp8 before the "
            "first generation."
        )
    for block in generator.model.blocks:
        for owner in list(block.modules()):
            for name, linear in list(owner.named_children()):
                if isinstance(linear, nn.Linear) and name not in KEPT:
                    if hasattr(linear, "resolve"):
                        raise HYWUError(
                            "the generator's Linear layers belong to a host that casts them itself; "
                            "load it with load_generator(path) to quantize it to fp8."
                        )
                    setattr(owner, name, Fp8Linear(linear))
    generator.forget()
    return generator.requires_grad_(False)


@functools.cache
def scaled_mm_works(device: torch.device, bias: bool = False) -> bool:
    """Whether the device multiplies e4m3 with row-wise scales, and adds a bias; tried once, on a tile."""
    if device.type != "cuda" or not hasattr(torch, "_scaled_mm"):
        return False
    try:
        a = torch.ones(256, 256, device=device).to(E4M3)
        ones = torch.ones(256, 1, device=device)
        added = torch.ones(256, device=device, dtype=torch.bfloat16) if bias else None
        torch._scaled_mm(
            a,
            a.t(),
            scale_a=ones,
            scale_b=ones.t(),
            bias=added,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        if bias:
            log.info("fp8 products add their bias in a pass of its own here: %s", error)
        else:
            log.warning("fp8 products run in float32 here, slowly: %s", error)
        return False
    return True


@functools.cache
def has_e4m3(device: torch.device) -> bool:
    """Whether a CUDA device has instructions for e4m3; Triton builds no kernel with it elsewhere."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _kernels(device: torch.device) -> ModuleType | None:
    from .passes import fused_kernels

    if device.type != "cuda" or torch.compiler.is_compiling() or not has_e4m3(device):
        return None
    return fused_kernels(device)


def uses_fp8(module: nn.Module) -> bool:
    """Whether any layer was quantized."""
    return any(isinstance(m, Fp8Linear) for m in module.modules())
