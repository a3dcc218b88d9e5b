"""Layers that ComfyUI may leave in host memory and that are cast where they are used."""

from __future__ import annotations

import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor


class Linear(torch.nn.Linear, comfy.ops.CastWeightBiasOp):
    comfy_cast_weights = True

    def resolve(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias on like's device in its dtype; see `hywu_core.generator.layers`."""
        ready = self.weight.device == like.device and self.weight.dtype == like.dtype
        if ready and not self.weight_function and not self.bias_function:
            return self.weight, self.bias
        return comfy.ops.cast_bias_weight(self, like)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.resolve(x))


class Embedding(torch.nn.Embedding, comfy.ops.CastWeightBiasOp):
    comfy_cast_weights = True
    bias = None

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.weight
        if weight.device != ids.device or self.weight_function:
            weight, _ = comfy.ops.cast_bias_weight(self, device=ids.device, dtype=weight.dtype)
        return F.embedding(ids, weight)
