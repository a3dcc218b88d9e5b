"""The layout of a MODEL, and what a generator for it would take on this machine."""

from __future__ import annotations

import json
import time
from functools import lru_cache
from typing import Any

import comfy.model_management as mm
import torch

from ...hywu_core.generator.config import GeneratorConfig
from ...hywu_core.generator.model import ParameterGenerator
from ...hywu_core.layout import LoRALayout
from .generators import activation_bytes

#: Width of the condition that is assumed; it hardly counts.
CONDITION_WIDTH = 1152
#: Share of a large product's speed that a whole forward reaches.
EFFICIENCY = 0.5


def describe(
    model: Any, rank: int, size: str, tokens: int, batch: int, include: str, exclude: str
) -> tuple[str, str]:
    """(table, JSON). Raises HYWUError when the model has no modules that match."""
    layout = LoRALayout.of(
        model.model.diffusion_model, rank, include=patterns(include), exclude=patterns(exclude)
    )
    config = GeneratorConfig.of_size(layout, size, {"hidden_states": CONDITION_WIDTH})
    device = mm.get_torch_device()
    dtype = torch.bfloat16 if mm.should_use_bf16(device) else torch.float32
    with torch.device("meta"):
        parameters = sum(p.numel() for p in ParameterGenerator(config).parameters())
    work = config.flops(tokens, batch)
    report = {
        "model": type(model.model.diffusion_model).__name__,
        "stacks": [
            {
                "layers": list(stack.layers),
                "modules": {m.name: [m.out_features, m.in_features] for m in stack.modules},
                "tokens_per_layer": grid.num_tokens,
            }
            for stack, grid in zip(layout.stacks, config.grids, strict=True)
        ],
        "targets": sum(1 for _ in layout.targets()),
        "rank": rank,
        "lora_values": layout.num_values,
        "lora_bytes": batch * layout.num_values * dtype.itemsize,
        "tokens": sum(grid.num_layers * grid.num_tokens for grid in config.grids),
        "generator": {
            "size": size,
            "d_model": config.d_model,
            "blocks": config.num_blocks,
            "parameters": parameters,
            "weights_bytes": parameters * dtype.itemsize,
            "activation_bytes": activation_bytes(config, batch, tokens, dtype.itemsize),
            "flops": work,
            "seconds": work / (EFFICIENCY * speed(device, dtype)),
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
        },
    }
    return _table(layout, report), json.dumps(report)


def patterns(text: str) -> list[str] | None:
    return [part.strip() for part in text.replace("\n", ",").split(",") if part.strip()] or None


@lru_cache
@torch.inference_mode()
def speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, measured once."""
    side = 512 if device.type == "cpu" else 4096
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        # reading a value waits for the device
        float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _table(layout: LoRALayout, report: dict[str, Any]) -> str:
    lines = [f"{report['model']}: {len(layout.stacks)} stacks, {report['targets']} modules"]
    for stack, found in zip(layout.stacks, report["stacks"], strict=True):
        one, more = stack.layers[0], len(stack.layers) - 1
        title = one + (f" and {more} more" if more else "")
        lines.append(
            f"\n{title or '(outside the blocks)'}: {found['tokens_per_layer']} tokens per layer"
        )
        width = max(len(module.name) for module in stack.modules)
        lines += [f"  {m.name:{width}}  {m.out_features} x {m.in_features}" for m in stack.modules]
    g = report["generator"]
    lines += [
        "",
        f"LoRA of rank {layout.rank}: {report['lora_values']:,} values, {_mb(report['lora_bytes'])} in all",
        f"Tokens: {report['tokens']:,}",
        f"Generator {g['size']}: {g['parameters']:,} weights ({_mb(g['weights_bytes'])}, {g['dtype']})",
        f"Estimated on {g['device']}: {g['seconds']:.3g} s and {_mb(g['activation_bytes'])} beside the "
        "weights",
    ]
    return "\n".join(lines)


def _mb(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"
