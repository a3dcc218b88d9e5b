"""A GGUF file of a diffusion model, and layers that dequantize where they compute. Runs inside ComfyUI.

The file is written and read by ggml's own package. The layers are what a GGUF loader gives ComfyUI as
`custom_operations`: the weight is the file's bytes, says the shape of what they hold, and becomes floating
point inside `forward` only. The loader nodes people use are on no package index; these layers stand for theirs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import comfy.ops
import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Kind = gguf.GGMLQuantizationType


class Quantized(torch.Tensor):
    """Bytes of a GGUF tensor under the shape of the values that they hold."""

    kind: Kind
    values: torch.Size

    @classmethod
    def of(cls, data: Tensor, kind: Kind, values: torch.Size) -> Quantized:
        made = data.as_subclass(cls)
        made.kind, made.values = kind, values
        return made

    @property
    def shape(self) -> torch.Size:
        return self.values if hasattr(self, "values") else super().shape

    def detach(self) -> Quantized:
        return self.of(super().detach(), self.kind, self.values)

    def to(self, *args: Any, **kwargs: Any) -> Quantized:
        """Bytes change the device; their dtype is the format's business."""
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        moved = self.as_subclass(torch.Tensor).to(device=device)
        return self.of(moved, self.kind, self.values)

    def dequantized(self) -> Tensor:
        """Float32 ``[out, in]``."""
        data = self.as_subclass(torch.Tensor).numpy()
        return torch.from_numpy(gguf.quants.dequantize(data, self.kind)).view(self.values)


class Operations(comfy.ops.manual_cast):
    """What goes to ComfyUI as `custom_operations`."""

    class Linear(torch.nn.Module, comfy.ops.CastWeightBiasOp):
        comfy_cast_weights = True

        def __init__(self, in_features: int, out_features: int, bias=True, device=None, dtype=None):
            super().__init__()
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def _load_from_state_dict(self, state: dict, prefix: str, *_: Any) -> None:
            for name in ("weight", "bias"):
                if f"{prefix}{name}" in state:
                    value = torch.nn.Parameter(state[f"{prefix}{name}"], requires_grad=False)
                    setattr(self, name, value)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight
            weight = weight.dequantized() if isinstance(weight, Quantized) else weight
            bias = None if self.bias is None else self.bias.to(x)
            return F.linear(x, weight.to(x), bias)


def write(path: Path, weights: dict[str, Tensor], architecture: str, kind: Kind) -> int:
    """Matrices in `kind` where its blocks fit, all else in float32. Returns how many were rounded."""
    writer = gguf.GGUFWriter(path, architecture)
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    rounded = 0
    for name, value in weights.items():
        data = value.float().numpy()
        if data.ndim == 2 and data.shape[1] % block == 0 and ".weight" in name:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
            rounded += 1
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


def read(path: Path) -> dict[str, Tensor]:
    """The state dict of a GGUF file: `Quantized` for rounded matrices."""
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = torch.Size(int(n) for n in reversed(tensor.shape))
        data = torch.from_numpy(np.array(tensor.data))
        if tensor.tensor_type == Kind.F32:
            state[tensor.name] = data.view(shape) if math.prod(shape) else data
        else:
            state[tensor.name] = Quantized.of(data, tensor.tensor_type, shape)
    return state


def dequantized(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same state dict in plain float32."""
    return {k: v.dequantized() if isinstance(v, Quantized) else v for k, v in state.items()}
