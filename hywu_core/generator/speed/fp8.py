"""Linear layers in 8-bit floating point (e4m3) with one scale a row, for inference.

Weights are rounded once, a scale for each output; activations on each call, a scale for each position
(Micikevicius et al. 2022, "FP8 formats for deep learning"). Products run on the device's fp8 units
through torch._scaled_mm where it has row-wise scales; elsewhere the same rounded values are multiplied
in float32, which is slow and tells the accuracy. docs/speed.md states it.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from ...errors import HYWUError
from ..layers import fused_kernels, rounds_to_e4m3
from ..model import ParameterGenerator

log = logging.getLogger(__name__)

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0

#: Not rounded: it runs over the condition's tokens only, so that it costs next to nothing.
KEPT = ("W_kv",)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [R, d]`` as e4m3 ``[R, d]`` and float32 scales ``[R, 1]``: x is about their product."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_(min=1e-12) / LARGEST
    return (x.float() / scale).clamp_(-LARGEST, LARGEST).to(E4M3), scale


@dataclass(frozen=True)
class Fp8Weight:
    """A rounded weight: values ``[out, in]`` e4m3, scale ``[out, 1]`` float32."""

    values: Tensor
    scale: Tensor

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x [..., in]`` rounded row by row, times the weight: ``[..., out]`` in x's dtype."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        kernels = _kernels(x.device)
        rounded, scale = (kernels.quantize_rows if kernels else quantize_rows)(rows)
        if self._fast(x):
            out = torch._scaled_mm(
                rounded,
                self.values.t(),
                scale_a=scale,
                scale_b=self.scale.t(),
                bias=bias,
                out_dtype=x.dtype,
                use_fast_accum=True,
            )
        else:
            out = (rounded.float() @ self.values.float().t()) * scale * self.scale.t()
            out = (out if bias is None else out + bias).to(x.dtype)
        return out.view(*x.shape[:-1], self.values.shape[0])

    def _fast(self, x: Tensor) -> bool:
        aligned = all(n % 16 == 0 for n in self.values.shape)
        return aligned and x.dtype == torch.bfloat16 and scaled_mm_works(x.device)


class Fp8Linear(nn.Module):
    """A Linear with a rounded weight; layers.py asks it through `resolve`, as it asks a host's."""

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
    """Round the linear layers of the generator's blocks to e4m3, in place; returns the generator.

    It can't be trained or saved any more. Call it before a memory_budget starts streaming.
    Raises HYWUError when the layers are a host's own, or blocks are streamed already.
    """
    if generator.streaming:
        raise HYWUError(
            "the generator's blocks are streamed from host memory already; call to_fp8 before the "
            "first generation."
        )
    for block in generator.model.blocks:
        for owner in list(block.modules()):
            for name, linear in list(owner.named_children()):
                if isinstance(linear, nn.Linear) and name not in KEPT:
                    if hasattr(linear, "resolve"):
                        raise HYWUError(
                            "the generator's Linear layers belong to a host that casts them itself; "
                            "load it with load_generator(path) to round it to fp8."
                        )
                    setattr(owner, name, Fp8Linear(linear))
    generator.forget()
    return generator.requires_grad_(False)


@functools.cache
def scaled_mm_works(device: torch.device) -> bool:
    """Whether the device multiplies e4m3 with row-wise scales; tried once, on one tile or so."""
    if device.type != "cuda" or not hasattr(torch, "_scaled_mm"):
        return False
    try:
        a = torch.ones(256, 256, device=device).to(E4M3)
        ones = torch.ones(256, 1, device=device)
        bias = torch.ones(256, device=device, dtype=torch.bfloat16)
        torch._scaled_mm(
            a,
            a.t(),
            scale_a=ones,
            scale_b=ones.t(),
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        log.warning("fp8 products run in float32 here, slowly: %s", error)
        return False
    return True


def _kernels(device: torch.device) -> ModuleType | None:
    if device.type != "cuda" or torch.compiler.is_compiling() or not rounds_to_e4m3(device):
        return None
    return fused_kernels(device)


def uses_fp8(module: nn.Module) -> bool:
    """Whether any layer was rounded."""
    return any(isinstance(m, Fp8Linear) for m in module.modules())
