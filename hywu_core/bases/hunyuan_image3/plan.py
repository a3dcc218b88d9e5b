"""What a run of a folder takes, from the heads of its files and the shapes of its networks alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .checkpoint import Folder, stored_dtype, stored_tensors
from .codecs import Method, codec_of
from .offload import Placement, place
from .pipeline import build, fixed_bytes

#: (bytes per second over the bus, bf16 operations per second sustained): assumed, not measured.
CARDS: dict[str, tuple[float, float]] = {
    "rtx-3090": (25e9, 55e12),
    "rtx-4090": (25e9, 120e12),
    "rtx-5090": (50e9, 160e12),
    "a100": (25e9, 220e12),
    "h100": (50e9, 400e12),
}


@dataclass(frozen=True)
class RunPlan:
    """Bytes of one way to store the experts, for one size of sequence.

    weights: all, placed within the budget (device_weights); kv: keys and values of both branches; moved:
    copied to the device by a pass that reaches every expert; host: experts that rest off the device.
    """

    experts: str
    weights: int
    experts_bytes: int
    device_weights: int
    kv: int
    host: int
    moved: int
    lora: int
    resident_layers: int
    layers: int
    operations: int

    def seconds(self, card: str) -> float:
        """Estimated seconds of a later step: the longer of its copies and its products."""
        rate, products = CARDS[card]
        return max(self.moved / rate, self.operations / products)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    folder: Folder, method: Method | None, budget: int | None, tokens: int, image_tokens: int,
    rank: int = 16,
) -> RunPlan:  # fmt: skip
    """The plan of a folder as it is (None), or with its experts quantized.

    budget: bytes of weights on the device, None for all. tokens: of a sequence with its image;
    image_tokens: that a later step computes. rank: of a LoRA on every matrix of the layers, in bfloat16.
    Raises HYWUError where the budget is too small, with the least that works.
    """
    config, parts = folder.config, build(folder)
    dtype = stored_dtype(folder)
    fixed = fixed_bytes(parts, dtype, torch.float32)
    layers, widest = [], 0
    for i, layer in enumerate(parts.model.model.layers):
        stored = stored_tensors(layer.mlp.experts, f"model.layers.{i}.mlp.experts.")
        total = 0
        for name, tensor in stored.items():
            rows, width = tensor.shape
            codec = folder.codec(name) if method is None else codec_of(method)
            plain = method is None and name not in folder.quantized
            row = width * dtype.itemsize if plain else codec.row_bytes(width)
            total += rows * row
            widest = max(widest, rows // len(tensor.slots) * row)
        layers.append(total)
    everything = fixed + sum(layers)
    placed: Placement = place(
        fixed, layers, config.num_experts, everything if budget is None else budget, widest
    )
    off = sum(size for i, size in enumerate(layers) if i not in placed.resident)
    branches = 1 if config.distilled else 2
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
    return RunPlan(
        method or _stored_as(folder), everything, sum(layers), placed.total_bytes,
        branches * tokens * kv, off, off, _lora_bytes(config, rank), len(placed.resident), len(layers),
        branches * image_tokens * _operations(config),
    )  # fmt: skip


def _stored_as(folder: Folder) -> str:
    kinds: Mapping[str, None] = dict.fromkeys(q.codec.kind for q in folder.quantized.values())
    return ", ".join(kinds) or str(stored_dtype(folder)).removeprefix("torch.")


def _widths(config: Any) -> tuple[int, int]:
    """Rows of the fused q, k, v, and columns of the output projection."""
    heads = config.num_heads
    return (heads + 2 * config.num_kv_heads) * config.head_dim, heads * config.head_dim


def _lora_bytes(config: Any, rank: int) -> int:
    hidden, (qkv, heads) = config.hidden_size, _widths(config)
    total = 0
    for width, shared in zip(config.expert_widths, config.shared_experts, strict=True):
        wide = width * shared
        dense = (hidden + qkv) + (heads + hidden) + (hidden + 2 * wide) + (wide + hidden)
        total += dense + 3 * config.num_experts * (hidden + width)
    return total * rank * 2


def _operations(config: Any) -> int:
    """Of one token's products with the layers' weights (attention's scores left out)."""
    hidden, (qkv, heads) = config.hidden_size, _widths(config)
    each = zip(config.expert_widths, config.shared_experts, config.top_k, strict=True)
    return sum(2 * hidden * (qkv + heads + 3 * width * (shared + k)) for width, shared, k in each)
