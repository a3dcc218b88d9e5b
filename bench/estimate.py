"""What one call asks of a GPU, estimated operation by operation on a machine that has none.

    python -m bench.estimate [--sizes NAME ...] [--variants NAME ...] [--json FILE]

The same code as in bench/cuda.py runs on tensors that say they are on a CUDA device and hold nothing
(torch's FakeTensorMode), at full size, in seconds: what doesn't fit together (devices, dtypes, the layouts
of fp8 products) fails here as it would there, and so does what would wait for the device or copy between
host and device. Counted are operations that launch something, arithmetic, bytes read and written (every
tensor once an operation), and the most memory held. Kernels' own workspaces aren't in it, and no times:
the last columns divide by rates that are given, not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hywu_core import Condition, ParameterGenerator
from hywu_core.cli.console import say, table
from hywu_core.generator.speed import fp8

from .measure import write_json
from .sizes import SIZES, Size, make
from .variants import STREAMED_BYTES, reference

CUDA = torch.device("cuda", 0)

#: Products: the index of the operand whose last dimension is summed over.
PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "_scaled_mm": 0, "addmm_": 1}

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

VARIANTS = ("eager", "ours", "fp8", "streamed")


class HostCopy(AssertionError):
    """A copy between host and device that is waited for, on a path that promises none."""


class Ledger(TorchDispatchMode):
    """Counts what runs inside it.

    flops: of products and attention, by dtype of the operands. product_bytes, other_bytes: read and
    written by them and by everything else. launches: operations, by name. peak_bytes: most bytes of
    tensors on the device at once, of those made inside. host_copies: whether copies to the host, and
    those to the device that the host waits for, are allowed; they raise HostCopy where not.
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


def _fused(ledger: Ledger) -> SimpleNamespace:
    """What stands in for kernels.py: the same tensors in and out, nothing computed."""

    def rms_norm(x: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ledger.launch("rms_norm", [x, out], 0 if bias is None else x.numel() * x.element_size())
        return out

    def rotate_(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        for half in (first, second):  # kernels.py reads them where they are
            half.expand(*x.shape[:2], x.shape[3] // 4, 2)
            assert half.dtype == torch.float32
            assert half.device == x.device
        ledger.launch("rotate", [x, first, second], x.numel() * x.element_size())
        return x

    def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.is_contiguous()
        values = torch.empty(x.shape, dtype=fp8.E4M3, device=x.device)
        scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
        ledger.launch("quantize", [x, values, scales])
        return values, scales

    return SimpleNamespace(rms_norm=rms_norm, rotate_=rotate_, quantize_rows=quantize_rows)


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
    fused = _fused(ledger)
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
        for name in ("model.fused_kernels", "speed.fp8._kernels"):
            stack.enter_context(mock.patch(f"hywu_core.generator.{name}", return_value=fused))
        stack.enter_context(mock.patch.object(fp8, "scaled_mm_works", return_value=True))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_Attention(ledger))
        stack.enter_context(ledger)
        stack.enter_context(torch.no_grad())
        yield


def condition_of(size: Size, config: Any, dtype: torch.dtype) -> Condition:
    names, left, parts = list(config.condition), size.condition_tokens, {}
    for i, name in enumerate(names):
        count = left // (len(names) - i)
        left -= count
        parts[name] = torch.empty(1, count, config.condition[name], device=CUDA, dtype=dtype)
    return Condition(parts)


def _prepared(
    name: str, generator: ParameterGenerator, condition: Condition
) -> Callable[[], list[Tensor]]:
    if name == "eager":
        return reference(generator, condition)
    if name == "fp8":
        fp8.to_fp8(generator)
    if name == "streamed":
        generator.memory_budget = STREAMED_BYTES
    return lambda: generator.generate_grids(condition)


def estimate(size: Size, name: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """The figures of one size and variant: a call after the first, whose tables and prefix are kept."""
    ledger = Ledger()
    with pretended_cuda(ledger):
        config = size.config()
        generator = make(config, "cuda", dtype)
        condition = condition_of(size, config, dtype)
        run = _prepared(name, generator, condition)
        run()
        weights = sum(
            t.nbytes for t in (*generator.parameters(), *generator.buffers()) if t.is_cuda
        )
        given = sum(t.nbytes for t in condition.parts.values())
        ledger.flops.clear(), ledger.launches.clear()
        ledger.product_bytes = ledger.other_bytes = 0
        ledger.peak_bytes = ledger.held_bytes
        result = run()
        figures = {
            "launches": sum(ledger.launches.values()),
            "flops": dict(ledger.flops),
            "product_bytes": ledger.product_bytes,
            "other_bytes": ledger.other_bytes,
            "peak_bytes": ledger.peak_bytes - given,
            "peak_over_weights_bytes": ledger.peak_bytes - given - weights,
            "operations": dict(ledger.launches.most_common()),
        }
        if generator.streaming:
            figures["peak_over_weights_bytes"] = None  # some blocks' weights are in the peak
        del result
    return figures


def seconds(figures: dict[str, Any], rates: dict[str, float]) -> tuple[float, float]:
    """(products, everything else) at given rates: TFLOP/s by dtype, and "copy" in GB/s."""
    products = sum(f / rates[dtype] / 1e12 for dtype, f in figures["flops"].items())
    return products, figures["other_bytes"] / rates["copy"] / 1e9


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), metavar="NAME")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument("--tflops", type=float, default=750, help="bf16; default: %(default)s")
    parser.add_argument("--fp8-tflops", type=float, default=1300, help="default: %(default)s")
    parser.add_argument("--copy-gbs", type=float, default=2800, help="default: %(default)s")
    args = parser.parse_args()
    rates = {"bfloat16": args.tflops, "float8_e4m3fn": args.fp8_tflops, "copy": args.copy_gbs}
    found: dict[str, Any] = {"rates": rates, "sizes": {}}
    for size_name in args.sizes:
        size, rows = SIZES[size_name], []
        found["sizes"][size_name] = figures = {}
        for name in args.variants:
            if name == "streamed" and size_name != "official":
                continue
            one = figures[name] = estimate(size, name)
            products, rest = one["seconds_at_rates"] = seconds(one, rates)
            over = one["peak_over_weights_bytes"]
            rows.append(
                (
                    name,
                    f"{one['launches']:,}",
                    f"{sum(one['flops'].values()) / 1e12:.4g}",
                    f"{one['other_bytes'] / 1e9:.4g}",
                    f"{one['peak_bytes'] / 1e9:.3g}",
                    "" if over is None else f"{over / 1e9:.3g}",
                    f"{1000 * products:.4g}",
                    f"{1000 * rest:.4g}",
                )
            )
        say()
        say(f"{size_name}: {size.words}")
        header = (
            "variant", "launches", "TFLOP", "GB beside products", "peak GB", "over weights",
            "ms products", "ms the rest",
        )  # fmt: skip
        table(rows, header)
    write_json(args.json, found)


if __name__ == "__main__":
    main()
