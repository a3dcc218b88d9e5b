"""Layers that ComfyUI may leave in host memory and that are cast where they are used."""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...hywu_core.generator.speed.fp8 import quantize_rows


class Linear(torch.nn.Linear, comfy.ops.CastWeightBiasOp):
    comfy_cast_weights = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # [out, 1] float32 where the weight is quantized to e4m3: the weight is about their product
        self.register_buffer("weight_scale", None)

    def resolve(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias on like's device in its dtype; see `hywu_core.generator.layers`."""
        if self.weight_scale is not None:
            weight, bias = comfy.ops.cast_bias_weight(self, like)
            return weight.mul_(self.weight_scale.to(like.device, non_blocking=True)), bias
        ready = self.weight.device == like.device and self.weight.dtype == like.dtype
        if ready and not self.weight_function and not self.bias_function:
            return self.weight, self.bias
        return comfy.ops.cast_bias_weight(self, like)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.resolve(x))


def round_weights(blocks: nn.Module) -> None:
    """Keep the weights of all Linear layers in here as e4m3 with one scale per row, in place.

    A quarter of float32's memory, half of bfloat16's; they are cast back where they are used.
    """
    for module in blocks.modules():
        if isinstance(module, Linear):
            values, scale = quantize_rows(module.weight.detach())
            module.weight = nn.Parameter(values, requires_grad=False)
            module.weight_scale = scale


class Conv2d(torch.nn.Conv2d, comfy.ops.CastWeightBiasOp):
    comfy_cast_weights = True

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        ready = weight.device == x.device and weight.dtype == x.dtype
        if not ready or self.weight_function or self.bias_function:
            weight, bias = comfy.ops.cast_bias_weight(self, x)
        return self._conv_forward(x, weight, bias)


class Embedding(torch.nn.Embedding, comfy.ops.CastWeightBiasOp):
    comfy_cast_weights = True
    bias = None

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.weight
        if weight.device != ids.device or self.weight_function:
            weight, _ = comfy.ops.cast_bias_weight(self, device=ids.device, dtype=weight.dtype)
        return F.embedding(ids, weight)
