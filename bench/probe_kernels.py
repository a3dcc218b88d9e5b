"""The engine's Triton kernels on a device: against torch at the engine's strides, and how fast."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hywu_core.generator.rope import Axes, axis_table, rotate
from hywu_core.generator.speed.passes import fused_kernels

from .device import relative_error
from .probe_shapes import Probe


def kernels(probe: Probe) -> dict[str, Any]:
    """The engine's Triton kernels against torch at the engine's strides, and GB/s of each."""
    found = fused_kernels(probe.device)
    if found is None:
        return {"skipped": "no Triton kernels on this device"}
    p, result = probe, {}
    states = p.random(1, p.layers, p.length, p.width)
    view = states.transpose(1, 2)[:, : p.sequences]
    weight, pending = p.random(p.width), p.random(p.width, dtype=torch.float32)
    expected = F.rms_norm(view.float() + pending, (p.width,), weight.float(), 1e-6)
    count = view.numel() * view.element_size()

    for name, several in (("rms_norm", False), ("rms_norm_rows", True)):

        def norm(several: bool = several) -> Tensor:
            return found.rms_norm(view, weight, 1e-6, pending=pending, several=several)

        result[name] = {
            "error": relative_error(norm(), expected),
            "gbs": p.gigabytes(norm, 2 * count),
        }
    qkv = p.random(p.sequences, p.layers, 3 * p.heads, p.head_dim)
    axes = Axes.of(axis_table(p.layers, p.head_dim, "bfloat16", p.device))
    turning = 2 * p.heads
    turned = rotate(qkv[:, :, :turning], axes.whole()[:, :, None])
    for name, wide in (("rotate", False), ("rotate_wide", True)):
        got = qkv.clone()
        found.rotate_(got[:, :, :turning], *axes, wide=wide)
        result[name] = {
            "error": relative_error(got[:, :, :turning], turned),
            "values_untouched": torch.equal(got[:, :, turning:], qkv[:, :, turning:]),
            "gbs": p.gigabytes(
                lambda g=got, w=wide: found.rotate_(g[:, :, :turning], *axes, wide=w),
                2 * turned.numel() * 2,
            ),
        }
    flat = qkv.flatten(2)
    q, k = turned[:, :, : p.heads].transpose(1, 2), turned[:, :, p.heads :].transpose(1, 2)
    attended = F.scaled_dot_product_attention(
        q.float(), k.float(), qkv[:, :, turning:].transpose(1, 2).float()
    )
    attended = attended.transpose(1, 2).flatten(2)

    def across() -> Tensor:
        return found.across(flat, *axes, p.heads)

    result["across"] = {
        "error": relative_error(across(), attended),
        "ms": p.milliseconds(across),
        "gbs": p.gigabytes(across, flat.numel() * 2 * 4 / 3),
    }
    if p.device.type != "cuda" or torch.cuda.get_device_capability(p.device) >= (8, 9):
        result |= _quantizing(p, found, view, weight, pending, flat, axes, attended, expected)
    return result


def _quantizing(
    p: Probe, found: Any, view: Tensor, weight: Tensor, pending: Tensor, flat: Tensor, axes: Axes,
    attended: Tensor, normed: Tensor,
) -> dict[str, Any]:  # fmt: skip
    """The kernels that write e4m3: error of values times scales, GB/s."""
    wide = p.random(p.rows[-1], 4 * p.width)
    nothing = torch.zeros(view.numel() // p.width, p.width, device=p.device, dtype=view.dtype)
    calls = {
        "quantize_rows": (lambda: found.quantize_rows(wide), wide.float(), wide.numel() * 3),
        "silu_quantized": (
            lambda: found.quantize_rows(wide, silu=True), F.silu(wide.float()), wide.numel() * 3
        ),
        "rms_norm_quantized": (
            lambda: found.rms_norm_quantized(view, weight, 1e-6, pending=pending),
            normed.flatten(0, 2), view.numel() * 3,
        ),
        "rms_norm_added": (
            lambda: found.rms_norm_quantized(view, weight, 1e-6, pending=pending, added=nothing),
            normed.flatten(0, 2), view.numel() * 7,
        ),
        "across_quantized": (
            lambda: found.across_quantized(flat, *axes, p.heads), attended.flatten(0, 1),
            flat.numel() * (2 + 1),
        ),
    }  # fmt: skip
    result = {}
    for name, (call, expected, count) in calls.items():
        values, scales = call()
        result[name] = {
            "error": relative_error(values.float() * scales, expected.reshape(values.shape)),
            "ms": p.milliseconds(call),
            "gbs": p.gigabytes(call, count),
        }
    return result
