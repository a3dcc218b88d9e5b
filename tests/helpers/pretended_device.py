"""A device that is none: tensors that say they are on it, hold their values on the CPU, and meet no others.

Inside `pretended()` whatever is made on DEVICE or moved there computes on the CPU; an operation on tensors of
two devices is an error, as on a real one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

#: "meta", because torch asks nothing of it; what it would do itself never happens.
DEVICE = torch.device("meta")
#: Operations that take tensors of two devices.
MIXED = ("aten::copy_", "aten::_to_copy", "aten::index.", "aten::index_put", "aten::_index_put")


class OnDevice(torch.Tensor):
    """A tensor of the device; `inner` has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:  # which kernel is the device's choice
            args, kwargs = tree_map(_value, (args, kwargs or {}))
            return OnDevice(func(*args, **kwargs))
        if func is Tensor.tolist:
            return args[0].inner.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _value(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
    here = [v for v in given if isinstance(v, OnDevice)]
    elsewhere = [v for v in given if not isinstance(v, OnDevice) and v.ndim]
    if here and elsewhere and not func.name().startswith(MIXED):
        raise RuntimeError(f"{func.name()}: tensors of the device and of the CPU")
    wanted = kwargs.get("device")
    to_device = bool(here) if wanted is None else torch.device(wanted).type == DEVICE.type
    if func.name().startswith("aten::copy_"):
        to_device = isinstance(args[0], OnDevice)
    known = {id(v.inner): v for v in here}
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(_value, (args, kwargs))
    made = func(*args, **kwargs)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, OnDevice):
            return value
        if id(value) in known:
            return known[id(value)]
        return OnDevice(value) if to_device else value

    return tree_map(wrapped, made)


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Around all that happens on the device."""
    tensor, autocast = torch.tensor, torch.is_autocast_enabled

    def enabled(kind: str = "cuda") -> bool:
        return kind != DEVICE.type and autocast(kind)

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        found = tensor(data, *args, **kwargs)
        return found if device is None else found.to(device)

    torch.tensor = made  # dispatches nothing by itself
    torch.is_autocast_enabled = enabled
    try:
        with _Factories():
            yield
    finally:
        torch.tensor, torch.is_autocast_enabled = tensor, autocast
