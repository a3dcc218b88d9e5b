"""What works on a device, on which kernel, how fast: the parts a generation is made of, one by one.

    python -m bench.probe --json FILE [--device cuda] [--only NAME ...] [--skip NAME ...] [--tiny]

Every check stands alone, and the JSON is written anew after each. After an error that leaves the device
unusable the others are not tried: call it again with --skip and the names that are done
(bench/first_contact.py does). --tiny takes the whole course on a CPU, for the tests.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hywu_core.generator.speed.fp8 import scaled_mm_works
from hywu_core.grouped import grouped_linear

from .device import kernel_names, rates, relative_error, seconds_of, use
from .measure import write_json
from .probe_kernels import kernels
from .probe_shapes import BF16, Probe

GOLDEN = Path(__file__).parent.parent / "tests" / "core" / "golden"

#: (dtype, RoPE precision, limit of the relative error), as in tests/core/test_generator.py
MODES = {
    "fp32": (torch.float32, "float32", 1e-5),
    "fp32_bf16_rope": (torch.float32, "bfloat16", 1e-5),
    "bf16": (torch.bfloat16, "bfloat16", 2e-2),
}

BACKENDS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

#: What an error says that no later call on the device survives.
STICKY = ("cuda error", "illegal", "misaligned", "device-side assert", "unspecified launch")


def measured_rates(probe: Probe) -> dict[str, Any]:
    """Burst and sustained: the card's power limit shows after a second or so."""
    edge, span = (128, 0.02) if probe.tiny else (8192, 3.5)
    return rates(probe.device, edge, BF16, span)


Attention = tuple[str, Tensor, Tensor, Tensor, Tensor | None]


def _attentions(p: Probe) -> Iterator[Attention]:
    """(name, q, k, v, mask) of every attention of the engine, at its strides."""
    x = p.random(p.sequences, p.layers, 3 * p.heads, p.head_dim)
    yield ("layers", *(t.transpose(1, 2) for t in x.split(p.heads, 2)), None)
    x = p.random(3, p.length, 3 * p.heads, p.head_dim)
    yield ("within", *(t.transpose(1, 2) for t in x.split(p.heads, 2)), None)
    for length in (p.condition, p.condition - 1):
        kv = p.random(1, length, 2, p.heads, p.head_dim)
        q = p.random(1, 3 * p.length, p.heads, p.head_dim).transpose(1, 2)
        yield f"cross_{length}", q, kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2), None
    for length in (17, 25, 41, 200):  # a small generator's, whose condition has a mask
        mask = torch.rand(2, length, device=p.device) > 0.3
        mask[:, 0] = True
        kv = p.random(2, length, 2, 8, 64)
        q = p.random(2, 128, 8, 64).transpose(1, 2)
        key, value = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
        yield f"masked_{length}", q, key, value, mask[:, None, None]


def attention(probe: Probe) -> dict[str, Any]:
    """Every attention of the engine on every backend: error, cost of the first call, ms, kernels."""
    found: dict[str, Any] = {}
    backends = {"default": None} if probe.tiny else BACKENDS
    for name, q, k, v, mask in _attentions(probe):
        part = 8 if name == "layers" else 1
        some = [t[:part, :4, :2000].float() if t is q else t[:part, :4].float() for t in (q, k, v)]
        expected = F.scaled_dot_product_attention(
            *some, attn_mask=None if mask is None else mask[:part]
        )
        for label, backend in backends.items():

            def call(backend=backend, q=q, k=k, v=v, mask=mask) -> Tensor:
                if backend is None:
                    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

            try:
                first = seconds_of(call, probe.device)
                out = call()
                ms = probe.milliseconds(call)
            except Exception as error:
                if _sticky(error):
                    raise
                found[f"{name}/{label}"] = {"failed": str(error)[:160]}
                continue
            found[f"{name}/{label}"] = {
                "error": relative_error(out[:part, :4, :2000], expected),
                "first_s": round(first, 4),
                "ms": ms,
                "tflops": 4 * q.numel() * k.shape[2] / ms / 1e9,
                "output_is_flat": out.transpose(1, 2).is_contiguous(),
                "kernels": kernel_names(call, probe.device),
            }
    return found


def products(probe: Probe) -> dict[str, Any]:
    """TFLOP/s of each product of a block at the chunk sizes in question: bf16, in place, fp8.

    On a card whose clock has settled, the chunk sizes there and back: one that heats is slower at each step.
    """
    p = probe
    found: dict[str, Any] = {"fp8_works": scaled_mm_works(p.device)}
    _settle(p)
    for out, wide in ((3, 1), (1, 1), (4, 1), (1, 4)):
        n, k = out * p.width, wide * p.width
        weight, bias = p.random(n, k), p.random(n)
        calls = {rows: _products(p, rows, weight, bias, found["fp8_works"]) for rows in p.rows}
        rates: dict[tuple[int, str], list[Any]] = {}
        for rows in (*p.rows, *reversed(p.rows)):
            for name, call in calls[rows].items():
                rates.setdefault((rows, name), []).append(_tflops(p, call, 2 * rows * n * k))
        for (rows, name), (there, back) in rates.items():
            failed = next((r for r in (there, back) if isinstance(r, str)), None)
            found.setdefault(f"{rows}x{n}x{k}", {})[name] = failed or (there + back) / 2
        last = calls[p.rows[-1]]
        found[f"{p.rows[-1]}x{n}x{k}"]["kernels"] = {
            name: kernel_names(call, p.device) for name, call in last.items()
        }
        del calls, last
    return found


def _products(
    p: Probe, rows: int, weight: Tensor, bias: Tensor, fp8: bool
) -> dict[str, Callable[[], Any]]:
    """Each way to multiply so many rows."""
    x, y = p.random(rows, weight.shape[1]), p.random(rows, weight.shape[0])
    calls: dict[str, Callable[[], Any]] = {
        "linear": lambda: F.linear(x, weight, bias),
        "addmm_": lambda: y.addmm_(x, weight.t()),
    }
    if fp8:
        calls |= {"fp8": _fp8_product(x, weight, None), "fp8_bias": _fp8_product(x, weight, bias)}
    return calls


def _tflops(p: Probe, call: Callable[[], Any], flops: int) -> float | str:
    """The rate of a call, or its error."""
    try:
        return flops / 1e9 / p.milliseconds(call)
    except Exception as error:
        if _sticky(error):
            raise
        return str(error)[:160]


def _settle(p: Probe, seconds: float = 2.0) -> None:
    """Products until the clock has come to what the power allows."""
    if p.device.type == "cuda":
        square, start = p.random(8192, 8192), time.perf_counter()
        while time.perf_counter() - start < seconds:
            seconds_of(lambda: [square @ square for _ in range(25)], p.device)


def _fp8_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    left, right = (t.to(torch.float8_e4m3fn) for t in (x, weight))
    rows = torch.ones(x.shape[0], 1, device=x.device)
    columns = torch.ones(1, weight.shape[0], device=x.device)
    return lambda: torch._scaled_mm(
        left, right.t(), scale_a=rows, scale_b=columns, bias=bias, out_dtype=BF16,
        use_fast_accum=True,
    )  # fmt: skip


def strided_accumulate(probe: Probe) -> dict[str, Any]:
    """The output product of the attention across layers, straight into the strided hidden states."""
    p = probe
    states = p.random(1, p.layers, p.length, p.width)
    out, weight = p.random(p.sequences, p.layers, p.width), p.random(p.width, p.width)
    view = states[0, :, : p.sequences]
    turned, expanded = out.transpose(0, 1), weight.t().expand(p.layers, p.width, p.width)
    expected = view.float() + turned.float() @ weight.float().t()

    def accumulate() -> Tensor:
        return view.baddbmm_(turned, expanded)

    def add() -> Tensor:
        return states.transpose(1, 2)[0, : p.sequences].add_(F.linear(out, weight))

    accumulate()
    return {
        "error": relative_error(view, expected),
        "baddbmm_ms": p.milliseconds(accumulate),
        "linear_then_add_ms": p.milliseconds(add),
        "kernels": kernel_names(accumulate, p.device),
    }


def grouped(probe: Probe) -> dict[str, Any]:
    """One product for all experts, of which one is empty."""
    experts, rows = (4, 64) if probe.tiny else (64, 4096)
    x, weight = probe.random(rows, probe.width), probe.random(experts, 16, probe.width)
    ends = torch.arange(1, experts + 1, device=probe.device, dtype=torch.int32) * (rows // experts)
    ends[2] = ends[1]
    bounds = [0, *ends.tolist()]
    expected = torch.cat(
        [
            x[bounds[e] : bounds[e + 1]].float() @ weight[e].float().t()
            for e in range(experts)
        ]
    )  # fmt: skip

    def call() -> Tensor:
        return grouped_linear(x, weight, ends)

    return {
        "error": relative_error(call(), expected),
        "ms": probe.milliseconds(call),
        "kernels": kernel_names(call, probe.device),
    }


def golden(probe: Probe) -> dict[str, Any]:
    """The official vectors on the device: the worst relative error of a tensor in each mode."""
    from safetensors.torch import load_file

    from hywu_core import load_generator

    found = {}
    vectors = sorted(GOLDEN.glob("*/expected.safetensors"))[: 1 if probe.tiny else None]
    for folder in (file.parent for file in vectors):
        expected = load_file(folder / "expected.safetensors")
        for mode, (dtype, rope, limit) in MODES.items():
            generator = load_generator(folder, probe.device, dtype, rope)
            lora = generator(expected["condition"].to(probe.device))
            worst = max(
                relative_error(getattr(pair, side).cpu(), expected[f"{mode}/{path}.lora_{side}"])
                for path, pair in lora.items()
                for side in "AB"
            )
            found[f"{folder.name}/{mode}"] = {
                "worst": worst, "limit": limit, "within": worst <= limit,
            }  # fmt: skip
    return found


CHECKS: dict[str, Callable[[Probe], dict[str, Any]]] = {
    "rates": measured_rates,
    "kernels": kernels,
    "attention": attention,
    "products": products,
    "strided_accumulate": strided_accumulate,
    "grouped": grouped,
    "golden": golden,
}


def _sticky(error: Exception) -> bool:
    return any(word in str(error).lower() for word in STICKY)


@torch.no_grad()
def run(probe: Probe, names: Sequence[str], path: Path | None = None) -> dict[str, Any]:
    """The checks' results by name, written to `path` after each; see the module."""
    found: dict[str, Any] = {}
    for name in names:
        start = time.perf_counter()
        stop = False
        try:
            found[name] = CHECKS[name](probe)
        except Exception as error:
            trace = traceback.format_exc()[-1500:]
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:400]}", "trace": trace}
            stop = probe.device.type == "cuda" and _sticky(error)
        found[name]["check_s"] = round(time.perf_counter() - start, 2)
        write_json(path, {"checks": found})
        if stop:
            break
        if probe.device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="NAME")
    parser.add_argument("--skip", nargs="*", choices=CHECKS, default=[], metavar="NAME")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(arguments)
    names = [name for name in args.only if name not in args.skip]
    run(Probe(use(args.device), args.tiny), names, args.json)


if __name__ == "__main__":
    main()
