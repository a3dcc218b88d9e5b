"""Run by test_speed_kernels.py with TRITON_INTERPRET=1: every kernel against its torch counterpart."""

from __future__ import annotations

import sys
from unittest import mock

import torch
import torch.nn.functional as F

from bench.sizes import make
from hywu_core import Condition, GeneratorConfig, LoRALayout, ParameterGenerator
from hywu_core.generator.rope import Axes, axis_table, rotate
from hywu_core.generator.speed import kernels, passes
from hywu_core.generator.speed.fp8 import Fp8Weight, quantize_rows, to_fp8
from hywu_core.generator.speed.passes import FusedPasses, Switches
from hywu_core.layout import Module, Stack

#: relative to the values; the interpreter and torch round once each
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def close(value: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(
        value.float(), expected.float(), rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def rms_norm(dtype: torch.dtype) -> None:
    for dim in (48, 64):
        states = torch.randn(2, 3, 5, dim).to(dtype)
        weight, bias = torch.randn(dim).to(dtype), torch.randn(dim).to(dtype)
        pending = torch.randn(dim)
        # as it lies, transposed as across layers, and a chunk of either
        for view in (states, states.transpose(1, 2), states[:, 1:], states.transpose(1, 2)[:, 2:4]):
            before = view.clone()
            for waiting in (None, pending):
                expected = normed(before, weight, waiting)
                out = kernels.rms_norm(view, weight, 1e-6, pending=waiting)
                assert out.is_contiguous()
                assert out.shape == view.shape
                close(out, expected, dtype)
                quantized, scales = kernels.rms_norm_quantized(
                    view, weight, 1e-6, pending=waiting, dtype=torch.float32
                )
                close(quantized * scales, expected.flatten(0, 2), dtype)
                assert quantized.abs().amax(1).allclose(torch.tensor(448.0))
            assert torch.equal(view, before)
        whole, view = states.clone(), states[:, 1:]
        out = kernels.rms_norm(view, weight, 1e-6, bias=bias)
        close(out, normed(whole[:, 1:], weight, None), dtype)
        close(view, whole[:, 1:] + bias, dtype)
        assert torch.equal(states[:, 0], whole[:, 0])


def rms_norm_of_several(dtype: torch.dtype) -> None:
    """A program that takes several rows, with all that a norm can do besides: bit for bit as one by one."""
    for count, dim in ((1, 48), (2, 64)):  # 2 * 1 * 5 rows aren't a multiple of four, 2 * 2 * 5 are
        states = torch.randn(2, count, 5, dim).to(dtype)
        weight, bias = torch.randn(dim).to(dtype), torch.randn(dim).to(dtype)
        for more in ({}, {"bias": bias}, {"pending": torch.randn(dim)}):
            one, four = states.clone(), states.clone()
            with mock.patch.object(kernels, "MANY", 1):
                out = kernels.rms_norm(four.transpose(1, 2), weight, 1e-6, several=True, **more)
            assert torch.equal(out, kernels.rms_norm(one.transpose(1, 2), weight, 1e-6, **more))
            assert torch.equal(four, one)
        with mock.patch.object(kernels, "MANY", 1):
            eight = kernels.rms_norm_quantized(states, weight, 1e-6, torch.float32, several=True)
        expected = kernels.rms_norm_quantized(states, weight, 1e-6, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(eight, expected, strict=True))


def rms_norm_after_adding(dtype: torch.dtype) -> None:
    """A product added to the hidden states and their norm in one pass, against torch doing both."""
    states = torch.randn(2, 3, 5, 48).to(dtype)
    weight, pending = torch.randn(48).to(dtype), torch.randn(48)
    for name, several in (("rms_norm", False), ("rms_norm_quantized", False), ("rms_norm", True)):
        for waiting in (None, pending):
            whole, chunk = states.clone(), states[:, 1:].clone()
            added = torch.randn(2 * 2 * 5, 48).to(dtype)
            chunk += added.view(chunk.shape)
            more = {"pending": waiting, "added": added, "several": several}
            if name == "rms_norm_quantized":
                values, scales = kernels.rms_norm_quantized(
                    whole[:, 1:], weight, 1e-6, torch.float32, **more
                )
                out = (values * scales).view(chunk.shape)
            else:
                with mock.patch.object(kernels, "MANY", 1):
                    out = kernels.rms_norm(whole[:, 1:], weight, 1e-6, **more)
            # what torch's addition in place leaves (the interpreter cuts bfloat16 off), and nothing beside
            close(whole[:, 1:], chunk, dtype)
            assert dtype == torch.bfloat16 or torch.equal(whole[:, 1:], chunk)
            assert torch.equal(whole[:, 0], states[:, 0])
            close(out, normed(whole[:, 1:], weight, waiting), dtype)


def normed(x: torch.Tensor, weight: torch.Tensor, pending: torch.Tensor | None) -> torch.Tensor:
    wide = x.float() if pending is None else x.float() + pending
    return F.rms_norm(wide, weight.shape, weight.float(), 1e-6)


def rotate_(dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    for head_dim, wide in ((8, False), (8, True), (24, True)):  # 24 isn't a power of two
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
            kernels.rotate_(qkv[:, :, :6], axes.first, axes.second, wide)
            close(qkv, expected, dtype)
            assert torch.equal(qkv[:, :, 6:], before[:, :, 6:])
            qkv = before


def across(dtype: torch.dtype) -> None:
    for layers, heads, head_dim in ((5, 3, 16), (32, 2, 32), (17, 1, 64)):
        assert kernels.takes_across(layers, head_dim)
        qkv = torch.randn(4, layers, 3 * heads * head_dim).to(dtype)
        axes = Axes.of(axis_table(layers, head_dim, "float32", torch.device("cpu"), offset=1))
        split = qkv.view(4, layers, 3 * heads, head_dim)
        turned = rotate(split[:, :, : 2 * heads], axes.whole()[:, :, None]).float()
        expected = F.scaled_dot_product_attention(
            turned[:, :, :heads].transpose(1, 2),
            turned[:, :, heads:].transpose(1, 2),
            split[:, :, 2 * heads :].transpose(1, 2).float(),
        )
        expected = expected.transpose(1, 2).flatten(2)
        out = kernels.across(qkv, axes.first, axes.second, heads)
        assert out.shape == expected.shape
        close(out, expected, dtype)
        quantized, scales = kernels.across_quantized(
            qkv, axes.first, axes.second, heads, torch.float32
        )
        close(quantized * scales, expected.flatten(0, 1), dtype)
        assert quantized.abs().amax(1).allclose(torch.tensor(448.0))
    assert not kernels.takes_across(33, 64)
    assert not kernels.takes_across(8, 24)


def rows(dtype: torch.dtype) -> None:
    x = (torch.randn(7, 80) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)
    x[3] = 0
    for silu in (False, True):
        given = F.silu(x.float()).to(dtype) if silu else x
        values, scales = kernels.quantize_rows(x, torch.float32, silu)
        expected, expected_scales = quantize_rows(given)
        # one rounding to x's dtype may fall to the other side
        rounding = {"rtol": 2 * TOLERANCE[dtype], "atol": 1e-9}
        torch.testing.assert_close(scales, expected_scales, **rounding)
        torch.testing.assert_close(values * scales, given.float(), **rounding)
        # the interpreter's own rounding to e4m3 forgets the carry into the exponent (1.97 becomes
        # 1.0 or so); where there is none it must agree
        same = kernels.quantize_rows(x, silu=silu)[0].float() == expected.float()
        assert same.float().mean() > 0.95


#: Parts of the fast path that floating-point weights take.
PARTS = ("across", "wide_rope", "pending_bias", "strided_accumulate", "waves")
#: ... and those that are off until a device has measured them.
MORE = ("norm_rows",)


def config() -> GeneratorConfig:
    stacks = (
        Stack(("d.0", "d.1"), (Module("qkv", 24, 40), Module("proj", 24, 24))),
        Stack(("s.0",), (Module("linear1", 24, 30),)),
    )
    return GeneratorConfig(LoRALayout(stacks, 4, 8.0), {"a": 12, "b": 20}, 16, 2, 32, 16, 2)


def given() -> Condition:
    """Several parts, a batch, a mask."""
    parts = {"a": torch.randn(2, 3, 12), "b": torch.randn(2, 4, 20)}
    mask = torch.tensor([[True, True, False, True], [True, False, True, True]])
    return Condition(parts, {"b": mask})


def off(values: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    apart = sum((v.double() - e).square().sum() for v, e in zip(values, exact, strict=True))
    return (apart / sum(e.square().sum() for e in exact)).sqrt().item()


def generator(dtype: torch.dtype) -> None:
    """The whole fast path, and with each of its parts off: several stacks, chunks, waves."""
    condition = given()
    plain, fast = make(config(), dtype=dtype), make(config(), dtype=dtype)
    for module in (plain, fast):  # biases are zero at first
        torch.manual_seed(1)
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    exact = make(config()).double()
    exact.load_state_dict(plain.state_dict())
    expected = exact.generate_grids(condition)
    own = off(plain.generate_grids(condition), expected)
    limit = 1e-5 if dtype == torch.float32 else 1.5 * own
    fast.kernels = kernels
    everything = Switches()
    settings = [(everything, None), (everything, 2000), (everything.without(*PARTS), 2000)]
    if dtype == torch.float32:
        settings += [(everything.without(part), 2000) for part in PARTS]
        settings += [(everything.also(part), 2000) for part in MORE]
    for switches, chunk_bytes in settings:
        fast.switches, fast.chunk_bytes = switches, chunk_bytes
        for _ in range(2 if switches == everything else 1):  # the prefix is made, and kept
            error = off(fast.generate_grids(condition), expected)
            assert error <= limit, (switches, error, own)


class Rounding:
    """The kernels, whose 8 bits torch rounds: the interpreter's own rounding forgets a carry."""

    def __getattr__(self, name: str):
        function = getattr(kernels, name)
        if name == "quantize_rows":
            return lambda x, silu=False: self._rounded(function(x, torch.float32, silu))
        if name.endswith("_quantized"):
            return lambda *args, **more: self._rounded(function(*args, dtype=torch.float32, **more))
        return function

    def _rounded(self, made: tuple[torch.Tensor, torch.Tensor]) -> tuple:
        values, scales = made
        return values.to(torch.float8_e4m3fn), scales


def fp8(dtype: torch.dtype) -> None:
    """Norm, SiLU and the attention across layers that write 8 bits, against torch doing it after them."""
    condition = given()
    expected = make(config()).double().generate_grids(condition)
    plain, fast = to_fp8(make(config(), dtype=dtype)), to_fp8(make(config(), dtype=dtype))
    own = off(plain.generate_grids(condition), expected)
    fast.kernels = Rounding()
    parts = ("fp8_norm", "fp8_silu", "fp8_across")
    # on a CPU nothing multiplies 8 bits, so that nothing would be handed on in them
    with mock.patch.object(passes, "_quantizes", lambda to, x: isinstance(to, Fp8Weight)):
        made = {}
        for switches in (Switches(), *(Switches().without(part) for part in parts)):
            fast.switches = switches
            made[switches] = fast.generate_grids(condition)
            error = off(made[switches], expected)
            assert 0.8 * own < error < 1.2 * own, (switches, error, own)
        taking_turns(fast, condition, made[Switches()])


def taking_turns(
    fast: ParameterGenerator, condition: Condition, expected: list[torch.Tensor]
) -> None:
    """One loop over chunks of whole layers against sublayer after sublayer: the same bits."""
    layers = []
    own = FusedPasses.add_norm

    def counted(self, norm, states, added, to):
        layers.append(states.shape[1])
        return own(self, norm, states, added, to)

    grids = fast.config.grids
    positions = max(grid.num_tokens for grid in grids) * fast.config.rows_per_token
    one_layer = 2 * positions * 4 * 32 * 4  # of both items
    for more, chunk_bytes, cut in (
        (("fp8_loop",), None, {1, 2}),
        (("fp8_loop", "norm_rows"), one_layer, {1}),
    ):
        fast.switches, fast.chunk_bytes = Switches().also(*more), chunk_bytes
        layers.clear()
        with (
            mock.patch.object(FusedPasses, "add_norm", counted),
            mock.patch.object(kernels, "MANY", 1),
        ):
            made = fast.generate_grids(condition)
        assert set(layers) == cut
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    first, states = [fast.model.blocks[0].feed_forward.fc1], [torch.empty(2, 2, positions, 32)]
    for rows, fits in ((2 * positions, True), (2 * positions - 1, False)):
        # a chunk that has no room for a layer is cut anywhere, by each sublayer for itself
        run = FusedPasses(rows, Switches().also("fp8_loop"), kernels)
        assert run.takes_turns(first, states) == fits


def main() -> None:
    torch.manual_seed(0)
    for name, check in (
        ("rms_norm", rms_norm),
        ("several", rms_norm_of_several),
        ("adding", rms_norm_after_adding),
        ("rotate", rotate_),
        ("across", across),
        ("quantize_rows", rows),
        ("generator", generator),
        ("fp8", fp8),
    ):
        # the interpreter's tl.dot takes bfloat16 for integers: kernels with products go without it
        halves = {"across": (torch.float16,), "generator": (torch.float16,), "fp8": ()}
        half = halves.get(name, (torch.float16, torch.bfloat16))
        for dtype in (torch.float32, *half):
            with torch.no_grad():
                check(dtype)
        sys.stdout.write(name + "\n")


if __name__ == "__main__":
    main()
