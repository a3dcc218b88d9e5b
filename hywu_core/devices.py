"""The device that a user names: as asked for, or an error."""

from __future__ import annotations

import torch

from .errors import HYWUError


def chosen_device(name: str | None) -> torch.device:
    """The device of that name, or without a name the machine's accelerator, else the CPU.

    Raises HYWUError on a name that torch doesn't know or a device that isn't there.
    """
    if name is None:
        return torch.device(_accelerator() or "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise HYWUError(
            f"device '{name}': torch knows no such device; name cpu, cuda, cuda:1, mps or xpu."
        ) from error
    if device.type == "cpu":
        return device
    module = getattr(torch, device.type, None)
    count = module.device_count() if hasattr(module, "device_count") else 0
    if not count or not getattr(module, "is_available", lambda: False)():
        raise HYWUError(
            f"device '{name}': torch {torch.__version__} finds no {device.type} device on this machine; "
            f"name {_accelerator() or 'cpu'}, or install a torch made for it."
        )
    if (device.index or 0) >= count:
        raise HYWUError(
            f"device '{name}': this machine has {count} {device.type} device(s), 0 to {count - 1}."
        )
    return device


def _accelerator() -> str:
    """The kind of accelerator that torch finds, or ""."""
    for kind in ("cuda", "xpu", "mps"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            return kind
    return ""
