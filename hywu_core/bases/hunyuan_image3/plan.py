"""What a run of a folder takes, from the heads of its files and the shapes of its networks alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...generator.checkpoints import open_checkpoint
from ...generator.model import ParameterGenerator
from ...generator.speed.memory import MemoryPlan
from ...precision import DTYPES
from .checkpoint import Folder, read_heads, stored_dtype, stored_tensors
from .chunks import kept_plan_bytes
from .codecs import Method, Plain, codec_of
from .config import HunyuanConfig, VAEConfig
from .layers import EXPERT_ROWS
from .model import HunyuanImage3
from .pipeline import build, fixed_bytes
from .placement import Matrix, place
from .quantize import quantized_bytes
from .resting import dense_bytes, dense_parts

#: What a folder can be quantized to.
METHODS: tuple[Method, ...] = ("fp8", "int8", "nf4")
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

    weights: all, placed within the budget (device_weights).
    kv: keys and values of both branches.
    moved: copied to the device by a pass that reaches every expert.
    operations: of a later step, attention's scores included (see `step_operations`).
    host: experts that rest off the device.
    dropped: other parts that are there only while they are used.
    cpu_plans: kept by products where the device is a CPU, and not part of `device` (see `kept_plan_bytes`).
    activations: of the transformer's longest pass.
    vae: of decoding the image.
    disk: of the files.
    generator: weights and intermediates of one, 0 without.
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
    activations: int
    vae: int
    disk: int
    generator: int = 0
    dropped: int = 0
    cpu_plans: int = 0

    @property
    def device(self) -> int:
        """The most bytes on the device at once; a generator that doesn't fit beside the weights comes first."""
        passes = self.device_weights + self.kv + self.lora + self.activations
        return max(passes, self.device_weights + self.vae, self.generator)

    def seconds(self, card: str) -> float:
        """Estimated seconds of a later step: the longer of its copies and its products."""
        rate, products = CARDS[card]
        return max(self.moved / rate, self.operations / products)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"device": self.device}

    def line(self, card: str | None = None, cpu: bool = False, mapped: bool = False) -> str:
        """What it says in a sentence, in gigabytes.

        card: for the seconds.
        cpu: whether that is the device.
        mapped: whether experts rest in the files, else all weights are in memory.
        """
        said = {
            "weights": self.weights, "keys and values": self.kv, "activations": self.activations,
            "decoding the image": self.vae, "LoRA": self.lora, "generator": self.generator,
            "in memory": self.weights - (self.experts_bytes if mapped else 0), "files": self.disk,
        }  # fmt: skip
        if not self.generator:
            del said["generator"]
        if cpu and self.cpu_plans:
            said["plans of products at most"] = self.cpu_plans
        parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in said.items())
        pace = "" if card is None else f", {self.seconds(card):.2g} s a step ({card}, estimated)"
        return f"{self.experts}: {parts} GB; up to {self.experts_bytes / 1e9:.3g} GB copied by a pass{pace}"


def plan(
    folder: Folder, method: Method | None, budget: int | None, tokens: int, image_tokens: int,
    rank: int = 16, dtype: torch.dtype | None = None, generator: int = 0,
) -> RunPlan:  # fmt: skip
    """The plan of a folder as it is (None), or with its experts quantized.

    budget: bytes of weights on the device, None for all.
    tokens: of a sequence with its image.
    image_tokens: that a later step computes.
    rank: of a LoRA on every matrix of the layers, in bfloat16.
    dtype: of what isn't quantized, None as stored.
    generator: see `generator_plan`.
    Raises HYWUError where the budget is too small, with the least that works.
    """
    config, parts = folder.config, build(folder)
    dtype = dtype or stored_dtype(folder)
    fixed, dense = fixed_bytes(parts, dtype, torch.float32), dense_parts(parts)
    sizes = dense_bytes(parts, dtype, torch.float32)
    layers, matrices = [], []
    for i, layer in enumerate(parts.model.model.layers):
        stored = stored_tensors(layer.mlp.experts, f"model.layers.{i}.mlp.experts.")
        total = 0
        for name, tensor in stored.items():
            rows, width = tensor.shape
            codec = folder.codec(name) if method is None else codec_of(method)
            if isinstance(codec, Plain):
                codec = Plain("stored", dtype)
            total += rows * codec.row_bytes(width)
            matrices.append(Matrix.of(codec, rows // len(tensor.slots), width, dtype))
        layers.append(total)
    largest = Matrix.largest(matrices)
    placed = place(fixed - sum(sizes), layers, config.num_experts, budget, largest, sizes)
    off = sum(size for i, size in enumerate(layers) if i not in placed.resident)
    dropped = list(zip(dense, sizes, strict=True))[: placed.dropped]
    moved = off + sum(size for part, size in dropped if part.in_layers)
    branches = 1 if config.distilled else 2
    longest = branches * max(tokens - image_tokens, image_tokens)
    return RunPlan(
        method or _stored_as(folder, dtype), fixed + sum(layers), sum(layers), placed.total_bytes,
        branches * tokens * kv_bytes(config, dtype), off, moved, _lora_bytes(config, rank), len(placed.resident), len(layers),
        step_operations(parts.model, branches, image_tokens, tokens),
        activation_bytes(config, longest, dtype, max(tokens - image_tokens, 0)),
        vae_bytes(config.vae, image_tokens * config.factor**2, torch.float32),
        _disk(folder) if method is None else quantized_bytes(folder, method), generator,
        placed.dropped, kept_plan_bytes(dtype),
    )  # fmt: skip


def generator_plan(path: str | Path, tokens: int, budget: int | None) -> MemoryPlan:
    """What a generator takes on a GPU for a condition of so many tokens, from its files' heads.

    Raises HYWUError where its memory budget (None: no limit) is too small.
    """
    source = open_checkpoint(path)
    stored = next(iter(read_heads(source.files[0]).values())).dtype
    with torch.device("meta"):
        generator = ParameterGenerator(source.config).to(DTYPES[stored])
    generator.memory_budget = sys.maxsize if budget is None else budget
    made = generator.memory_plan(1, tokens)
    assert made is not None
    return made


def kv_bytes(config: HunyuanConfig, dtype: torch.dtype) -> int:
    """Keys and values of a token."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def activation_bytes(config: HunyuanConfig, rows: int, dtype: torch.dtype, causal: int = 0) -> int:
    """The most that a pass over `rows` tokens of all branches holds beside weights, keys and values.

    causal: tokens of a sequence at most that see only what came before them. Their mask is a tensor, as booleans
        and as numbers, where the device isn't CUDA. The scores themselves are one nowhere: the kernels that
        `attend` calls hold a tile of them.
    Tensors of this project's code; what a product or an attention kernel takes for itself isn't in it.
    """
    size, hidden, (qkv, heads) = dtype.itemsize, config.hidden_size, _widths(config)
    # the embeddings, a layer's input, its normalized input; cosines and sines
    held = 3 * hidden * size + 8 * config.head_dim
    # q, k, v as projected and q by head, then its rotation: up to four tensors in float32
    attention = (qkv + heads) * size + heads * (16 if size < 4 else 12)
    most = 0
    each = zip(config.expert_widths, config.shared_experts, config.top_k, strict=True)
    for width, shared, k in each:
        part = min(rows * k, EXPERT_ROWS) * size * max(4 * width, hidden + 3 * width)
        # the layer's sum; all experts' outputs; their order, token, item and choice as int64
        routed = rows * (hidden * (1 + k) * size + 40 * k) + part
        dense = rows * (2 * hidden + 4 * width * shared) * size
        most = max(most, routed, dense)
    masks = causal * causal * (1 + size)
    return rows * held + max(rows * attention + masks, most)


def vae_bytes(config: VAEConfig, pixels: int, dtype: torch.dtype) -> int:
    """The most that decoding an image holds: five tensors of the widest level, without convolutions' own."""
    return 5 * config.temporal_factor * config.channels[0] * pixels * dtype.itemsize


def card_of(device: str) -> str | None:
    """The card of `CARDS` with a device's name."""
    return next((c for c in CARDS if c.replace("-", " ") in device.lower().replace("-", " ")), None)


def _disk(folder: Folder) -> int:
    return sum(math.prod(h.shape) * DTYPES[h.dtype].itemsize for h in folder.heads.values())


def _stored_as(folder: Folder, dtype: torch.dtype) -> str:
    kinds: Mapping[str, None] = dict.fromkeys(q.codec.kind for q in folder.quantized.values())
    return ", ".join(kinds) or str(dtype).removeprefix("torch.")


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


def layer_operations(config: Any) -> int:
    """Of one token's products with the layers' weights, routers included; its attention's scores are extra."""
    hidden, (qkv, heads) = config.hidden_size, _widths(config)
    each = zip(config.expert_widths, config.shared_experts, config.top_k, strict=True)
    return sum(
        2 * hidden * (qkv + heads + 3 * width * (shared + k) + config.num_experts)
        for width, shared, k in each
    )


def attention_operations(config: Any, keys: float) -> float:
    """Of one token in all layers: its scores against so many keys, and the sum of their values."""
    return 4 * config.num_heads * config.head_dim * keys * config.num_layers


def step_operations(model: HunyuanImage3, branches: int, image_tokens: int, tokens: int) -> int:
    """Of a later step: its tokens through the layers, each of which sees the whole sequence, and the image's heads.

    model: on "meta" too.
    branches: of guidance.
    image_tokens: that the step computes, one of them the time's.
    tokens: of the whole sequence.
    """
    each = layer_operations(model.config) + attention_operations(model.config, tokens)
    heads = (model.patch_embed, model.final_layer)
    convolved = sum(p.numel() for head in heads for p in head.parameters() if p.ndim == 4)
    return int(branches * (image_tokens * each + (image_tokens - 1) * 2 * convolved))
