"""Which weights these are: short hashes of some of their values, since one of all would take minutes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor, nn

from .application import ROOT, Unmerged

#: Values of a tensor that are looked at.
VALUES = 64


@torch.no_grad()
def fingerprint(module: nn.Module, instead: Mapping[str, Tensor] | None = None) -> str:
    """Hash of names, shapes, dtypes and some values of each tensor. instead: tensors to look at for
    those of these names.
    """
    sha = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        value = (instead or {}).get(name, value)
        sha.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        sha.update(_some(value))
    return sha.hexdigest()[:16]


def base_fingerprint(model: Any) -> str:
    """`fingerprint` of a MODEL's network as its loader gave it, without LoRAs that are merged into it."""
    kept = {key: entry.weight for key, entry in model.backup.items()}
    kept |= {key: entry[0] for key, entry in model.hook_backup.items()}
    own = {key.removeprefix(ROOT): value for key, value in kept.items() if key.startswith(ROOT)}
    return fingerprint(model.model.diffusion_model, own)


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
    sha = hashlib.sha256()
    feed(sha, found)
    return sha.hexdigest()[:16]


def feed(sha: Any, value: Any, whole: bool = False) -> None:
    """Add a value to a hash, whatever it holds. whole: all values of its tensors, not only some."""
    if isinstance(value, Tensor):
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha.update(_bytes(value) if whole else _some(value))
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            sha.update(repr(key).encode())
            feed(sha, value[key], whole)
    elif isinstance(value, (list, tuple)):
        sha.update(f"[{len(value)}".encode())
        for item in value:
            feed(sha, item, whole)
    elif isinstance(value, WeightAdapterBase):
        feed(sha, [value.name, value.weights], whole)
    elif isinstance(value, Unmerged):
        pairs = {path: list(value.lora[path]) for path in value.active}
        feed(sha, [value.active, pairs, value.lora.scale, repr(value.scope)], whole)
    elif isinstance(value, (str, int, float, bool, type(None))):
        sha.update(repr(value).encode())
    else:
        sha.update(getattr(value, "__qualname__", type(value).__qualname__).encode())


def _some(value: Tensor) -> bytes:
    flat = value.detach().flatten()
    return _bytes(flat[:: max(1, flat.numel() // VALUES)][:VALUES])


def _bytes(value: Tensor) -> bytes:
    flat = value.detach().flatten().cpu().contiguous()
    return flat.view(torch.uint8).numpy().tobytes()
