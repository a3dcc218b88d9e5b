"""A generated LoRA as ComfyUI's weight hook."""

from __future__ import annotations

from typing import Any

import comfy.hooks

from ...hywu_core.errors import HYWUError
from ...hywu_core.lora import GeneratedLoRA
from .application import match
from .experts import expert_paths
from .scope import check_strength
from .stock_lora import stock_lora


def hook(
    model: Any,
    lora: GeneratedLoRA,
    strength: float,
    before: Any = None,
    skip_missing: bool = False,
) -> tuple[comfy.hooks.HookGroup, str, list[str]]:
    """(hooks, report as JSON, warnings). Raises HYWUError on a batch and on a LoRA that doesn't fit `model`."""
    check_strength(strength)
    if lora.batch_size != 1:
        raise HYWUError(
            f"A hook holds one LoRA and this is a batch of {lora.batch_size}; pick one with HY-WU "
            "Select LoRA."
        )
    if experts := expert_paths(lora):
        raise HYWUError(
            f"{experts[0]} is a LoRA on experts, which ComfyUI's hooks can't hold; use Apply Generated LoRA, "
            "whose scope narrows where it acts."
        )
    matched = match(model.model, lora, skip_missing)
    group = comfy.hooks.create_hook_lora(stock_lora(lora), strength, 0.0)
    if before is not None:
        group = before.clone_and_combine(group)
    return group, matched.report(), matched.warnings
