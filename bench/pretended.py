"""A CUDA device that isn't there: tensors that say they are on one and hold nothing, and what is done with them.

torch's FakeTensorMode, with what fails there as it would on a device: devices, dtypes, the layouts of fp8
products that don't fit together, and what would wait for the device or copy between host and device.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hywu_core.generator.speed import fp8

CUDA = torch.device("cuda", 0)

#: Products: the index of the operand whose last dimension is summed over.
PRODUCTS = {
    "mm": 0,
    "addmm": 1,
    "bmm": 0,
    "baddbmm": 1,
    "_scaled_mm": 0,
    "addmm_": 1,
    "baddbmm_": 1,
}

#: Operations that write their first operand without reading it.
OVERWRITE = {"copy_", "fill_", "zero_", "normal_", "uniform_"}

#: Operations that launch nothing.
NOTHING = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
}


class HostCopy(AssertionError):
    """A copy between host and device that is waited for, on a path that promises none."""


class Ledger(TorchDispatchMode):
    """Counts what runs inside it.

    flops: of products and attention, by dtype of the operands.
    product_bytes, other_bytes: read and written by them and by everything else.
    launches: operations, by name.
    peak_bytes: most bytes of tensors on the device at once, of those made inside.
    host_copies: whether copies to the host, and those to the device that the host waits for, are allowed;
        they raise HostCopy where not.
    """

    def __init__(self, host_copies: bool = True) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.product_bytes = self.other_bytes = 0
        self.held_bytes = self.peak_bytes = 0
        self.host_copies = host_copies
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        before = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        after = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        devices = {t.device.type for t in (*before, *after) if t.ndim or t.device.type != "cpu"}
        if len(devices) > 1 and not self.host_copies and not _goes_ahead(name, args, kwargs, after):
            raise HostCopy(f"{name} copies between {' and '.join(sorted(devices))}")
        for t in after:
            self.hold(t)
        launches = "cuda" in devices and name not in NOTHING and not name.startswith("prim::")
        if launches and not _is_view(func):
            fresh = [t for t in after if not any(t is b for b in before)]
            self.launch(name, [*before[name in OVERWRITE :], *fresh], _written(func, before))
            if name in PRODUCTS:
                self._multiply(name, before[PRODUCTS[name]], after[0])
        return out

    def launch(self, name: str, touched: list[Tensor], written: int = 0) -> None:
        """One operation that reads or writes each of `touched` once, and `written` bytes besides."""
        self.launches[name] += 1
        count = sum(_distinct_bytes(t) for t in touched if t.device.type == "cuda") + written
        if name in PRODUCTS or name == "attention":
            self.product_bytes += count
        else:
            self.other_bytes += count

    def hold(self, t: Tensor) -> None:
        """Count the memory of a tensor until it is freed."""
        storage = t.untyped_storage()
        if t.device.type != "cuda" or storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._free, size)
        self.held_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def _free(self, size: int) -> None:
        self.held_bytes -= size

    def _multiply(self, name: str, left: Tensor, out: Tensor) -> None:
        self.flops[_short(left.dtype)] += 2 * out.numel() * left.shape[-1]


class _Attention(TorchFunctionMode):
    """Attention as a fused kernel does it: the scores are nowhere, the result lies like the query."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
        self._ledger.launch("attention", [q, k, v, out])
        self._ledger.flops[_short(q.dtype)] += 4 * q.numel() * k.shape[2]
        return out.transpose(1, 2)


class _Kernels:
    """What stands in for kernels.py: the same tensors in and out, nothing computed."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    takes_across = staticmethod(
        lambda layers, head_dim: layers <= 32 and head_dim in (16, 32, 64, 128)
    )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, **options: Any) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._norm(x, weight, [out], **options)
        return out

    def rms_norm_quantized(
        self, x: Tensor, weight: Tensor, eps: float, **options: Any
    ) -> tuple[Tensor, Tensor]:
        out = self._rows(x.numel() // x.shape[-1], x.shape[-1], x.device)
        self._norm(x, weight, list(out), **options)
        return out

    def rotate_(self, x: Tensor, first: Tensor, second: Tensor, wide: bool) -> Tensor:
        for half in (first, second):  # kernels.py reads them where they are
            half.expand(*x.shape[:2], x.shape[3] // 4, 2)
            assert half.dtype == torch.float32
            assert half.device == x.device
        self._ledger.launch("rotate", [x, first, second], x.numel() * x.element_size())
        return x

    def across(self, qkv: Tensor, first: Tensor, second: Tensor, heads: int) -> Tensor:
        assert qkv.is_contiguous()
        out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
        self._attended(qkv, [out])
        return out

    def across_quantized(
        self, qkv: Tensor, first: Tensor, second: Tensor, heads: int
    ) -> tuple[Tensor, Tensor]:
        assert qkv.is_contiguous()
        rows, width = qkv.shape[0] * qkv.shape[1], qkv.shape[2] // 3
        between = qkv.new_empty(rows, width)
        out = self._rows(rows, width, qkv.device)
        self._attended(qkv, [between, *out])
        return out

    def quantize_rows(self, x: Tensor, silu: bool = False) -> tuple[Tensor, Tensor]:
        assert x.is_contiguous()
        out = self._rows(*x.shape, x.device)
        self._ledger.launch("quantize", [x, *out])
        return out

    def _rows(self, count: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        values = torch.empty(count, width, dtype=fp8.E4M3, device=device)
        return values, torch.empty(count, 1, dtype=torch.float32, device=device)

    def _attended(self, qkv: Tensor, out: list[Tensor]) -> None:
        self._ledger.launch("attention", [qkv, *out])
        work = 4 * qkv.numel() // 3 * qkv.shape[1]
        self._ledger.flops[_short(qkv.dtype)] += work

    def _norm(
        self, x: Tensor, weight: Tensor, out: list[Tensor], bias: Tensor | None,
        pending: Tensor | None, added: Tensor | None, several: bool,
    ) -> None:  # fmt: skip
        assert bias is None or bias.device == weight.device
        assert pending is None or (pending.dtype, pending.device) == (torch.float32, weight.device)
        touched = [x, *out]
        if added is not None:
            assert added.is_contiguous()
            assert (added.numel(), added.dtype) == (x.numel(), x.dtype)
            touched.append(added)
        writes = bias is not None or added is not None
        self._ledger.launch("rms_norm", touched, x.numel() * x.element_size() if writes else 0)


class _Stream:
    """A stream of the device that isn't there: it keeps no order, for there is nothing to order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = CUDA

    def wait_event(self, event: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def record_event(self, event: Any = None) -> _Event:
        return _Event()


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...


_CURRENT = _Stream()


@contextlib.contextmanager
def pretended_cuda(ledger: Ledger) -> Iterator[None]:
    """Inside, tensors may be made on "cuda" without one; `ledger` counts what is done with them."""
    kernels = _Kernels(ledger)
    with contextlib.ExitStack() as stack:
        for name, value in {
            "current_stream": lambda device=None: _CURRENT,
            "is_current_stream_capturing": lambda: False,
            "stream": lambda stream: contextlib.nullcontext(),
            "Stream": _Stream,
            "Event": _Event,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(Tensor, "record_stream", return_value=None))
        for name in ("speed.passes.fused_kernels", "speed.fp8._kernels"):
            stack.enter_context(mock.patch(f"hywu_core.generator.{name}", return_value=kernels))
        stack.enter_context(mock.patch.object(fp8, "scaled_mm_works", return_value=True))
        stack.enter_context(
            mock.patch("hywu_core.generator.speed.passes.multiprocessors", return_value=132)
        )
        for name in ("memory_reserved", "memory_allocated"):
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=0))
        free = (60 << 30, 80 << 30)
        stack.enter_context(mock.patch.object(torch.cuda, "mem_get_info", return_value=free))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_Attention(ledger))
        stack.enter_context(ledger)
        stack.enter_context(torch.no_grad())
        yield


def _goes_ahead(name: str, args: tuple, kwargs: dict, after: list[Tensor]) -> bool:
    """Whether a copy goes to the device and the host doesn't wait for it."""
    asked = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
    return bool(asked) and all(t.device.type == "cuda" for t in after)


def _is_view(func: Any) -> bool:
    infos = [r.alias_info for r in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def _written(func: Any, before: list[Tensor]) -> int:
    """Bytes that an operation writes into its first operand."""
    infos = [a.alias_info for a in func._schema.arguments]
    writes = any(info is not None and info.is_write for info in infos)
    return _distinct_bytes(before[0]) if writes and before else 0


def _distinct_bytes(t: Tensor) -> int:
    """Bytes of a tensor's values, those that are repeated by expanding counted once."""
    steps = zip(t.shape, t.stride(), strict=True)
    return math.prod(n for n, stride in steps if stride) * t.element_size()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
