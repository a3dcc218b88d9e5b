"""Timing with the device's own clock, peak memory, measured rates, and a profile by kind of kernel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .measure import peak_memory as cpu_peak_memory

#: What a kernel's name says about its kind, tried in order; the rest is "other".
KINDS = {
    "attention": ("flash", "fmha", "attention", "softmax", "sdpa"),
    "matmul": ("gemm", "cutlass", "cublas", "nvjet", "matmul", "addmm", "::mm", "linear", "xmma"),
    "copy": ("memcpy", "memset", "copy", "catarray", "cat"),
    "elementwise": (
        "elementwise", "triton", "norm", "mul", "add", "silu", "vectorized", "reduce", "rotate",
        "quantize",
    ),
}  # fmt: skip

#: So many short calls are timed even where building kernels took the time.
LEAST_CALLS, LEAST_S = 10, 2.0


def use(name: str) -> torch.device:
    """The device of that name, made the current one: events and streams are the current device's."""
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if device.index is not None:
        torch.cuda.set_device(device)
    return torch.device("cuda", torch.cuda.current_device())


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call: between CUDA events, or by the wall clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def timed(
    function: Callable[[], Any], device: torch.device, budget_s: float, most: int
) -> dict[str, float]:
    """Median and spread of up to `most` calls after a warm-up; no call starts after `budget_s`.

    The warm-up counts towards the budget; one call is always timed, and so are `LEAST_CALLS` that take no
    more than `LEAST_S` together. warm_up_s has the first call's wall time: compilation, capture and first
    copies are in it.
    """
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    warm_up = time.perf_counter() - start
    values: list[float] = []
    while not values or (
        len(values) < most
        and (
            time.perf_counter() - start < budget_s
            or (len(values) < LEAST_CALLS and sum(values) < LEAST_S)
        )
    ):
        values.append(seconds_of(function, device))
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {
        "median_s": statistics.median(values),
        "min_s": min(values),
        "max_s": max(values),
        "iqr_s": quartiles[2] - quartiles[0],
        "calls": len(values),
        "warm_up_s": warm_up,
    }


def held_bytes(device: torch.device) -> int:
    """Bytes of all tensors on the device now; 0 where that isn't counted."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Most bytes held during one call: on CUDA all that are held, elsewhere those that came newly."""
    if device.type != "cuda":
        return cpu_peak_memory(function)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = function()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device)


def rates(
    device: torch.device, size: int, dtype: torch.dtype, sustained_s: float = 3.5
) -> dict[str, float]:
    """The device's own rates in TFLOP/s and GB/s.

    matmul_tflops, fp8_matmul_tflops: the fastest of short bursts. sustained_tflops, fp8_sustained_tflops: in
    the second half of `sustained_s` seconds without a pause, when clocks have come to what the power allows;
    a generation takes seconds, so this is what it is judged by. copy_gbs (read + written), upload_gbs,
    download_gbs (page-locked host memory), pageable_gbs (ordinary).
    size: edge of the square matrices; buffers have as many bytes as one of them.
    What the device can't do is left out.
    """
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    flops = 2 * size**3 / 1e12
    found = {"matmul_tflops": flops / _best(lambda: a @ b, device)}
    found["sustained_tflops"] = flops / _sustained(lambda: a @ b, device, sustained_s)
    other = torch.empty_like(a)
    found["copy_gbs"] = 2 * a.nbytes / _best(lambda: other.copy_(a), device) / 1e9
    if device.type == "cuda":
        gigabytes = a.nbytes / 1e9
        host = torch.empty(a.shape, dtype=dtype, pin_memory=True)
        for name, copy in (
            ("upload_gbs", lambda: other.copy_(host, non_blocking=True)),
            ("download_gbs", lambda: host.copy_(other, non_blocking=True)),
        ):
            found[name] = gigabytes / _best(copy, device)
        ordinary = torch.ones(
            a.shape, dtype=dtype
        )  # written, so that no page is made while it counts
        found["pageable_gbs"] = gigabytes / seconds_of(lambda: ordinary.copy_(other), device)
        fp8 = _fp8_product(a, b)
        if fp8 is not None:
            found["fp8_matmul_tflops"] = flops / _best(fp8, device)
            found["fp8_sustained_tflops"] = flops / _sustained(fp8, device, sustained_s)
    return found


def _sustained(function: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of a call in the second half of so many seconds of nothing else."""
    count = 25 if device.type == "cuda" else 1
    spans: list[float] = []
    start = time.perf_counter()
    while not spans or time.perf_counter() - start < seconds:
        spans.append(seconds_of(lambda: [function() for _ in range(count)], device) / count)
    return statistics.median(spans[len(spans) // 2 :])


def _fp8_product(a: Tensor, b: Tensor) -> Callable[[], Tensor] | None:
    from hywu_core.generator.speed.fp8 import quantize_rows, scaled_mm_works

    if not scaled_mm_works(a.device):
        return None
    (left, left_scale), (right, right_scale) = quantize_rows(a), quantize_rows(b)
    return lambda: torch._scaled_mm(
        left,
        right.t(),
        scale_a=left_scale,
        scale_b=right_scale.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _best(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call at its fastest of five, twenty calls each on CUDA."""
    function()
    count = 20 if device.type == "cuda" else 1

    def several() -> None:
        for _ in range(count):
            function()

    return min(seconds_of(several, device) for _ in range(5)) / count


def profile(function: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """One call's time on the device: seconds by kind of kernel, and the ten longest kernels."""
    activity = torch.profiler.ProfilerActivity
    cuda = device.type == "cuda"
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as trace:
        function()
        if cuda:
            torch.cuda.synchronize(device)
    kernels: dict[str, float] = {}
    for event in trace.key_averages():
        time_us = event.self_device_time_total if cuda else event.self_cpu_time_total
        kernels[event.key] = kernels.get(event.key, 0.0) + time_us / 1e6
    kinds: dict[str, float] = {}
    for name, seconds in kernels.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + seconds
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:10]
    return {
        "seconds_by_kind": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "longest": [{"kernel": name[:120], "seconds": seconds} for name, seconds in longest],
    }


def kind_of(kernel: str) -> str:
    """The kind that a kernel's name tells."""
    lower = kernel.lower()
    return next((k for k, words in KINDS.items() if any(w in lower for w in words)), "other")


def kernel_names(function: Callable[[], Any], device: torch.device) -> list[str]:
    """The four longest kernels that a call launches on CUDA, with their number and milliseconds."""
    if device.type != "cuda":
        return []
    return [
        f"{entry['kernel']} {1e3 * entry['seconds']:.3f} ms"
        for entry in profile(function, device)["longest"][:4]
    ]


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`."""
    wide = expected.double()
    return ((value.double() - wide).norm() / wide.norm()).item()
