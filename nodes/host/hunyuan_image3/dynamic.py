"""Expert banks for ComfyUI's dynamic VRAM: every expert is a layer of its own, left in the mapped files.

Dynamic VRAM keeps of a layer's weights all or nothing, and copies a layer that isn't there whole. A bank as one
layer would be 1.6 GB, of which a word of text needs an eighth; an expert's matrix is 25 MB. So the host keeps as
many experts as fit, takes memory back one by one when others want it, and copies those that a pass is routed
to, the next on its own stream while one computes. Where it has memory for page-locked copies it makes them.
"""

from __future__ import annotations

from collections.abc import Mapping

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....hywu_core.bases.hunyuan_image3.checkpoint import Folder
from ....hywu_core.bases.hunyuan_image3.chunks import routed
from ....hywu_core.bases.hunyuan_image3.codecs import Codec, Plain
from ....hywu_core.bases.hunyuan_image3.matrices import in_files
from ....hywu_core.bases.hunyuan_image3.model import HunyuanImage3
from .. import operations


def dynamic_host() -> bool:
    """Whether ComfyUI places weights by dynamic VRAM on its device: newer releases on CUDA, unless told not to."""
    plain = comfy.model_patcher.ModelPatcher
    usual = getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    return usual is not plain and not mm.is_device_cpu(mm.get_torch_device())


class Expert(nn.Module, comfy.ops.CastWeightBiasOp):
    """One matrix as it is stored: its numbers or codes as `weight`, the scales of codes as `bias`."""

    comfy_cast_weights = True

    def __init__(self, coded: Mapping[str, Tensor]) -> None:
        super().__init__()
        scales = coded.get("scales")
        self.weight = nn.Parameter(coded["codes"], requires_grad=False)
        self.bias = None if scales is None else nn.Parameter(scales, requires_grad=False)


class DynamicBank(nn.Module):
    """A bank of `Expert` layers, called as `GroupedLinear`, which adapters hook alike."""

    def __init__(self, bank: nn.Module, codec: Codec, experts: nn.ModuleList) -> None:
        super().__init__()
        self.num_experts = bank.num_experts
        self.in_features, self.out_features = bank.in_features, bank.out_features
        self.codec, self.matrices = codec, experts

    def forward(self, x: Tensor, ends: Tensor, items: Tensor | None = None) -> Tensor:
        """See `GroupedLinear`. Waits for the device to learn which experts have rows (see `routed`)."""
        bounds, used = routed(ends)
        out = x.new_empty(x.shape[0], self.out_features)
        for e in used:
            rows, matrix = slice(bounds[e], bounds[e + 1]), self.matrices[e]
            with operations.cast(matrix, device=x.device, **self._as(matrix, x)) as (codes, scales):
                out[rows] = F.linear(x[rows], self._decoded(codes, scales, x.dtype))
        return out

    def _as(self, matrix: Expert, x: Tensor) -> dict[str, torch.dtype]:
        if isinstance(self.codec, Plain):
            return {"dtype": x.dtype}
        return {"dtype": matrix.weight.dtype, "bias_dtype": matrix.bias.dtype}

    def _decoded(self, codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        if isinstance(self.codec, Plain):
            return codes
        out = codes.new_empty(self.out_features, self.in_features, dtype=dtype)
        return self.codec.decode({"codes": codes, "scales": scales}, out)


def install(folder: Folder, model: HunyuanImage3, dtype: torch.dtype) -> None:
    """Exchange the banks of a network on "meta" for dynamic ones. What is stored as numbers of `dtype` or as
    codes isn't copied: the parameters are views of the mapped files.
    """
    for i, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        for name, source in in_files(folder, i, experts, dtype).items():
            bank, matrices = getattr(experts, name), nn.ModuleList()
            for e in range(bank.num_experts):
                coded = source.stored(e)
                if isinstance(source.codec, Plain):
                    coded = {"codes": coded["codes"].to(dtype)}
                matrices.append(Expert(coded))
            setattr(experts, name, DynamicBank(bank, source.codec, matrices))
