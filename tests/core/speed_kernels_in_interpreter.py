"""Run by test_speed_kernels.py with TRITON_INTERPRET=1: every kernel against its torch counterpart."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from bench.sizes import make
from hywu_core import Condition, GeneratorConfig, LoRALayout
from hywu_core.generator.rope import Axes, axis_table, rotate
from hywu_core.generator.speed import kernels
from hywu_core.generator.speed.fp8 import quantize_rows
from hywu_core.layout import Module, Stack

#: relative to the values; the interpreter and torch round once each
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def close(value: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(
        value.float(), expected.float(), rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def rms_norm(dtype: torch.dtype) -> None:
    for dim in (48, 64):
        stream = torch.randn(2, 3, 5, dim).to(dtype)
        weight, bias = torch.randn(dim).to(dtype), torch.randn(dim).to(dtype)
        # as it lies, transposed as across layers, and a chunk of either
        for view in (stream, stream.transpose(1, 2), stream[:, 1:], stream.transpose(1, 2)[:, 2:4]):
            before = view.clone()
            expected = F.rms_norm(before.float(), (dim,), weight.float(), 1e-6)
            out = kernels.rms_norm(view, weight, 1e-6)
            assert out.is_contiguous()
            assert out.shape == view.shape
            close(out, expected, dtype)
            assert torch.equal(view, before)
        whole, view = stream.clone(), stream[:, 1:]
        out = kernels.rms_norm(view, weight, 1e-6, bias)
        close(out, F.rms_norm(whole[:, 1:].float(), (dim,), weight.float(), 1e-6), dtype)
        close(view, whole[:, 1:] + bias, dtype)
        assert torch.equal(stream[:, 0], whole[:, 0])


def rotate_(dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    for head_dim in (8, 24):
        qkv = torch.randn(6, 5, 9, head_dim).to(dtype)  # 3 heads of q, k and v
        layer = axis_table(3, head_dim // 2, "float32", cpu).repeat(2, 1, 1)[:, None]
        place = axis_table(5, head_dim // 2, "float32", cpu, offset=2)[None]
        for axes in (
            Axes(layer, place),
            Axes.of(axis_table(5, head_dim, "bfloat16", cpu)),
            Axes.of(torch.randn(6, 5, head_dim // 2, 2)),
        ):
            before, expected = qkv.clone(), qkv.clone()
            expected[:, :, :6] = rotate(before[:, :, :6], axes.whole()[:, :, None])
            kernels.rotate_(qkv[:, :, :6], axes.first, axes.second)
            close(qkv, expected, dtype)
            assert torch.equal(qkv[:, :, 6:], before[:, :, 6:])
            qkv = before


def rows(dtype: torch.dtype) -> None:
    x = (torch.randn(7, 80) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)
    x[3] = 0
    values, scales = kernels.quantize_rows(x, torch.float32)
    expected, expected_scales = quantize_rows(x)
    torch.testing.assert_close(scales, expected_scales)
    torch.testing.assert_close(values, x.float() / expected_scales)
    # the interpreter's own rounding to e4m3 forgets the carry into the exponent (1.97 becomes 1.0
    # or so); where there is none it must agree
    same = kernels.quantize_rows(x)[0].float() == expected.float()
    assert same.float().mean() > 0.95


def generator(dtype: torch.dtype) -> None:
    """The whole fast path: several stacks and parts, a mask, a batch, chunks."""
    stacks = (
        Stack(("d.0", "d.1"), (Module("qkv", 24, 40), Module("proj", 24, 24))),
        Stack(("s.0",), (Module("linear1", 24, 30),)),
    )
    config = GeneratorConfig(LoRALayout(stacks, 4, 8.0), {"a": 12, "b": 20}, 16, 2, 32, 8, 2)
    parts = {"a": torch.randn(2, 3, 12), "b": torch.randn(2, 4, 20)}
    mask = torch.tensor([[True, True, False, True], [True, False, True, True]])
    condition = Condition(parts, {"b": mask})
    plain, fast = make(config, dtype=dtype), make(config, dtype=dtype)
    exact = make(config).double()
    exact.load_state_dict(plain.state_dict())
    fast.kernels = kernels
    for chunk_bytes in (None, 2000):
        fast.chunk_bytes, fast._prefix = chunk_bytes, None
        results = [g.generate_grids(condition) for g in (plain, fast, exact)]
        for torchs, tritons, right in zip(*results, strict=True):
            own = (torchs.double() - right).norm() / right.norm()
            error = (tritons.double() - right).norm() / right.norm()
            limit = 1.5 * own if dtype == torch.bfloat16 else 1e-5
            assert error <= limit, (error, own)


def main() -> None:
    torch.manual_seed(0)
    for name, check in (
        ("rms_norm", rms_norm),
        ("rotate", rotate_),
        ("quantize_rows", rows),
        ("generator", generator),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            with torch.no_grad():
                check(dtype)
        sys.stdout.write(name + "\n")


if __name__ == "__main__":
    main()
