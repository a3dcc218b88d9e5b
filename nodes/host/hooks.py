"""A generated LoRA as ComfyUI's weight hook."""

from __future__ import annotations

import json
import math
from typing import Any

import comfy.hooks

from ...hywu_core.errors import HYWUError
from ...hywu_core.lora import GeneratedLoRA
from .application import match
from .stock_lora import stock_lora


def hook(
    model: Any, lora: GeneratedLoRA, strength: float, before: Any = None
) -> tuple[comfy.hooks.HookGroup, str]:
    """(hooks, report as JSON). Raises HYWUError on a batch and on a LoRA that doesn't fit `model`."""
    if not math.isfinite(strength):
        raise HYWUError(f"The strength is {strength}; it must be a finite number.")
    if lora.batch_size != 1:
        raise HYWUError(
            f"A hook holds one LoRA and this is a batch of {lora.batch_size}; pick one with HY-WU "
            "Select LoRA."
        )
    matched = match(model.model, lora)
    group = comfy.hooks.create_hook_lora(stock_lora(lora), strength, 0.0)
    if before is not None:
        group = before.clone_and_combine(group)
    report = {"matched": len(matched.found), "skipped": len(matched.skipped)}
    return group, json.dumps(report)
