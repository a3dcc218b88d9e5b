"""Layers that ComfyUI may leave in host memory and that are cast where they are used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import comfy.model_management as mm
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...hywu_core.generator.model import ParameterGenerator
from ...hywu_core.generator.speed.ahead import Ahead, groups_of
from ...hywu_core.generator.speed.fp8 import quantize_rows


@contextlib.contextmanager
def cast(layer: nn.Module, **to: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight and bias as ComfyUI casts them, for the block's length: the copy is on one of its streams, beside
    what computes.

    to: as `comfy.ops.cast_bias_weight` takes them.
    """
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, offloadable=True, **to)
    try:
        yield weight, bias
    finally:
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)


class Linear(torch.nn.Linear, comfy.ops.CastWeightBiasOp):
    comfy_cast_weights = True
    #: Where the weights of a generator come from that ComfyUI left in host memory.
    ahead: Ahead | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # [out, 1] float32 where the weight is quantized to e4m3: the weight is about their product
        self.register_buffer("weight_scale", None)

    def resolve(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias on like's device in its dtype; see `hywu_core.generator.layers`."""
        if self._ready(like):
            return self.weight, self.bias
        if self.ahead is not None and copies_ahead(self, like):
            found = self.ahead.values(self, like.device)
            bias = found.get("bias")
            weight = self._scaled(found["weight"].to(like.dtype), found.get("weight_scale"))
            return weight, None if bias is None else bias.to(like.dtype)
        # several weights of a sublayer are held at once, which ComfyUI's streams aren't made for
        weight, bias = comfy.ops.cast_bias_weight(self, like)
        return self._scaled(weight, self.weight_scale), bias

    def _ready(self, like: Tensor) -> bool:
        same = self.weight.device == like.device and self.weight.dtype == like.dtype
        return same and not self.weight_function and not self.bias_function

    def _scaled(self, weight: Tensor, scale: Tensor | None) -> Tensor:
        """The weight of a quantized one that was cast, in place."""
        return weight if scale is None else weight.mul_(scale.to(weight.device, non_blocking=True))

    def forward(self, x: Tensor) -> Tensor:
        if self._ready(x):
            return F.linear(x, self.weight, self.bias)
        with cast(self, input=x) as (weight, bias):
            return F.linear(x, self._scaled(weight, self.weight_scale), bias)


def copies_ahead(layer: Linear, like: Tensor) -> bool:
    """Whether a layer's weights are in host memory as they are, and copied on a stream beside what computes."""
    plain = not layer.weight_function and not layer.bias_function
    return plain and like.is_cuda and layer.weight.device.type == "cpu" and mm.NUM_STREAMS > 0


@contextlib.contextmanager
def copied_ahead(network: ParameterGenerator) -> Iterator[None]:
    """For the block's length a generator's layers take offloaded weights from copies that are made ahead."""
    ahead = Ahead(groups_of(network))
    layers = [m for m in network.model.blocks.modules() if isinstance(m, Linear)]
    for layer in layers:
        layer.ahead = ahead
    try:
        yield
    finally:
        for layer in layers:
            del layer.ahead  # no circle outlives a generation
        ahead.close()


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
        ready = self.weight.device == x.device and self.weight.dtype == x.dtype
        if ready and not self.weight_function and not self.bias_function:
            return self._conv_forward(x, self.weight, self.bias)
        with cast(self, input=x) as (weight, bias):
            return self._conv_forward(x, weight, bias)


class Embedding(torch.nn.Embedding, comfy.ops.CastWeightBiasOp):
    comfy_cast_weights = True
    bias = None

    def forward(self, ids: Tensor) -> Tensor:
        if self.weight.device == ids.device and not self.weight_function:
            return F.embedding(ids, self.weight)
        with cast(self, device=ids.device, dtype=self.weight.dtype) as (weight, _):
            return F.embedding(ids, weight)
