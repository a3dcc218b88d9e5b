"""Which weights these are: short hashes of some of their values, since one of all would take minutes."""

from __future__ import annotations

from typing import Any

import torch
from comfy.weight_adapter.base import WeightAdapterBase

from ...hywu_core.fingerprint import of_module, of_values
from .application import ROOT
from .unmerged import Unmerged


def base_fingerprint(model: Any) -> str:
    """`of_module` of a MODEL's network as its loader gave it, without LoRAs that are merged into it."""
    kept = {key: entry.weight for key, entry in model.backup.items()}
    kept |= {key: entry[0] for key, entry in model.hook_backup.items()}
    own = {key.removeprefix(ROOT): value for key, value in kept.items() if key.startswith(ROOT)}
    return of_module(model.model.diffusion_model, own)


@torch.no_grad()
def patches_fingerprint(model: Any) -> str:
    """Hash of what lies on a MODEL: merged LoRAs and unmerged ones by their values and strengths, other
    wrappers and patches by their names. Empty for a MODEL as its loader gives it.
    """
    options = model.model_options
    transformer = options.get("transformer_options", {})
    wrappers = [w for by_key in model.wrappers.values() for group in by_key.values() for w in group]
    found = {
        "patches": dict(model.patches),
        "hooks": len(model.hook_patches),
        "wrappers": wrappers,
        "injections": list(model.injections),
        "options": {k: transformer[k] for k in ("patches", "patches_replace") if k in transformer},
        "function": options.get("model_function_wrapper"),
    }
    found = {name: value for name, value in found.items() if value}
    if not found:
        return ""
    return of_values(found, 16, whole=False, unfold=unfold)


def unfold(value: Any) -> Any:
    """What an adapter or an unmerged LoRA is hashed by: its values and strengths."""
    if isinstance(value, WeightAdapterBase):
        return [value.name, value.weights]
    if isinstance(value, Unmerged):
        pairs = {path: list(value.lora[path]) for path in value.active}
        return [value.active, pairs, value.lora.scale, repr(value.scope)]
    return value
