"""Applying LoRAs to torch modules: per item, merged, experts, convolutions, errors, undo."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from expert_models import FusedExpert, Mixture, expert_lora
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hywu_core import (
    GeneratedLoRA,
    HYWUError,
    LoRALayout,
    adapters,
    inject,
    injection,
    merge,
    unmerge,
)
from hywu_core.grouped import GroupedLinear, grouped_linear, item_groups


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        image = x.transpose(1, 2).unflatten(2, (2, -1))
        return x + self.conv(image).flatten(2).transpose(1, 2)


class Base(nn.Module):
    def __init__(self, dim: int = 8, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def random_lora(layout: LoRALayout, batch: int = 1, seed: int = 0, std: float = 0.3):
    rng = torch.Generator().manual_seed(seed)
    factors = {}
    for s, stack in enumerate(layout.stacks):
        for m, module in enumerate(stack.modules):
            for side in "AB":
                shape = (batch, len(stack.layers), *module.shape(side, layout.rank))
                factors[s, m, side] = torch.randn(shape, generator=rng) * std
    return GeneratedLoRA(layout, factors)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.fixture
def base():
    return Base()


@pytest.fixture
def x():
    return torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(5))


def test_unmerged_equals_merged_and_both_are_undone(base, x):
    layout = LoRALayout.of(base, rank=2, alpha=3.0)
    assert len(list(layout.targets())) == 9
    lora, before = random_lora(layout), state(base)
    plain = base(x)
    with inject(base, lora, strength=0.8):
        unmerged = base(x)
    assert_unchanged(base, before)
    merged = merge(base, lora, strength=0.8)
    torch.testing.assert_close(base(x), unmerged, rtol=1e-4, atol=1e-5)
    assert (unmerged - plain).abs().max() > 0.1
    unmerge(merged)
    assert_unchanged(base, before)
    unmerge(merged)
    assert_unchanged(base, before)


def test_each_item_of_a_batch_gets_its_own(base, x):
    lora = random_lora(LoRALayout.of(base, rank=2), batch=3)
    with inject(base, lora):
        together = base(x)
    for i in range(3):
        with inject(base, lora.select(i)):
            torch.testing.assert_close(together[i : i + 1], base(x[i : i + 1]))
    with inject(base, lora, index=[2, 0, 2]):
        mapped = base(x)
    for i, k in enumerate([2, 0, 2]):
        with inject(base, lora.select(k)):
            torch.testing.assert_close(mapped[i : i + 1], base(x[i : i + 1]))


def test_windows_repeat_the_index_item_by_item(base, x):
    lora = random_lora(LoRALayout.of(base, rank=2), batch=3)
    windows = x.repeat_interleave(2, dim=0)
    with inject(base, lora, index=[0, 1, 2]):
        result = base(windows)
    with inject(base, lora):
        expected = base(x).repeat_interleave(2, dim=0)
    torch.testing.assert_close(result, expected)


class Counting(TorchDispatchMode):
    """Names of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("batch", "index"), [(1, None), (3, None), (2, [1, 0, 1])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_two_products_add_to_the_output(base, x, batch, index, dtype):
    base.to(dtype)
    given = x.to(dtype)
    lora = random_lora(LoRALayout.of(base, rank=2), batch)
    with inject(base, lora, 0.7, index):
        expected = base(given)  # with gradients: out of place
        with torch.no_grad():
            outputs = [base(given) for _ in range(2)]
            with Counting() as seen:
                outputs.append(base(given))
    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for value in outputs:
        torch.testing.assert_close(value, expected, rtol=limit, atol=limit)
    assert torch.equal(given, x.to(dtype))
    added = [name for name in seen.names if name in ("aten::addmm_", "aten::baddbmm_")]
    assert len(added) >= 6  # one for each Linear; convolutions may give their output other strides
    # a Linear's factors were picked before, others' are at each call
    picked = seen.names.count("aten::index")
    assert picked == (2 * (9 - len(added)) if index else 0)


def test_an_output_that_is_not_dense_is_left_as_it_is(x):
    class Transposing(nn.Linear):
        def forward(self, value):
            return super().forward(value).mT.contiguous().mT

    model = nn.ModuleDict({"b": nn.ModuleList([nn.ModuleDict({"fc": Transposing(8, 8)})])})
    lora = random_lora(LoRALayout.of(model, rank=2))
    with inject(model, lora):
        expected = model["b"][0]["fc"](x)
        with torch.no_grad():
            torch.testing.assert_close(model["b"][0]["fc"](x), expected)


def test_strength_by_pattern(base, x):
    layout = LoRALayout.of(base, rank=2)
    lora = random_lora(layout)
    with inject(base, lora, strength={"*": 0.0, "blocks.1.*": 1.0, "*.conv": 0.0}):
        partial = base(x)
    only = {path: pair for path, pair in lora.items() if path in ("blocks.1.qkv", "blocks.1.proj")}
    expected = GeneratedLoRA.from_pairs(only, alpha=layout.alpha)
    with inject(base, expected):
        torch.testing.assert_close(base(x), partial)


def test_nested_injections_add_up(base, x):
    one = random_lora(LoRALayout.of(base, rank=2), seed=1)
    two = random_lora(LoRALayout.of(base, rank=4, exclude="*.conv"), seed=2)
    before = state(base)
    first, second = merge(base, one), merge(base, two, strength=-0.5)
    expected = base(x)
    unmerge(second)
    unmerge(first)
    assert_unchanged(base, before)
    with inject(base, one), inject(base, two, strength=-0.5):
        torch.testing.assert_close(base(x), expected, rtol=1e-4, atol=1e-5)


def test_undone_when_the_model_raises(base, x):
    lora, before = random_lora(LoRALayout.of(base, rank=2)), state(base)
    with pytest.raises(RuntimeError), inject(base, lora):
        base(x[:, :, :3])
    assert_unchanged(base, before)


@pytest.mark.parametrize("batch", [1, 2])
def test_under_autocast_the_branch_adds_in_the_dtype_of_the_module(base, x, batch, monkeypatch):
    """The bundled editor is sampled so: the input is float32, the output bfloat16."""
    lora, added = random_lora(LoRALayout.of(base, 4), batch), []
    given = x[:1].expand(2, -1, -1).contiguous()
    with torch.no_grad():
        with inject(base, lora):
            exact = base(given)
        own = adapters.add_linear_
        monkeypatch.setattr(
            adapters, "add_linear_", lambda *a: (added.append(a[1].dtype), own(*a))[1]
        )
        with inject(base, lora), torch.autocast("cpu", torch.bfloat16):
            result = base(given)
        plain = base(given)
    assert added == [torch.bfloat16] * 6  # the convolutions' outputs aren't dense here
    assert (result.float() - exact).norm() < 0.02 * (exact - plain).norm()


def test_a_module_that_leaves_autocast_keeps_its_own_dtype(base):
    class Exact(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    model = nn.ModuleDict({"fc": Exact(8, 8)})
    lora, x = random_lora(LoRALayout.of(model, 4, include="*")), torch.randn(1, 3, 8)
    with torch.no_grad(), inject(model, lora):
        exact = model["fc"](x)
        with torch.autocast("cpu", torch.bfloat16):
            result = model["fc"](x)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, exact, rtol=0.02, atol=0.02)


def test_half_precision_base_takes_a_float32_lora(base, x):
    lora = random_lora(LoRALayout.of(base, rank=2), batch=3)
    with inject(base, lora):
        expected = base(x)
    half = Base().bfloat16()
    with inject(half, lora):
        result = half(x.bfloat16())
    assert result.dtype == torch.bfloat16
    assert (result.float() - expected).norm() / expected.norm() < 0.02


def test_gradients_reach_the_lora_alone(base, x):
    base.requires_grad_(False)
    lora = random_lora(LoRALayout.of(base, rank=2), batch=3)
    factors = {key: value.requires_grad_() for key, value in lora.factors.items()}
    with inject(base, GeneratedLoRA(lora.layout, factors)):
        base(x).square().sum().backward()
    assert all(value.grad.abs().sum() > 0 for value in factors.values())


# -- experts ------------------------------------------------------------------------------------


class MoEBlock(nn.Module):
    """Top-1 routing by the sign pattern of two features, as a list of experts or as one weight."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x):
        rows = x.flatten(0, 1)
        route = (rows[:, 0] > 0).long() * 2 + (rows[:, 1] > 0).long()
        order = route.argsort(stable=True)
        ends = torch.bincount(route, minlength=4).cumsum(0).to(torch.int32)
        items = torch.arange(x.shape[0]).repeat_interleave(x.shape[1])[order]
        out = torch.empty_like(rows)
        if isinstance(self.experts, nn.ModuleList):
            pieces = rows[order].tensor_split(ends[:-1].tolist())
            done = [e["w1"](piece) for e, piece in zip(self.experts, pieces, strict=True)]
            out[order] = torch.cat(done)
        else:
            out[order] = self.experts["w1"](rows[order], ends, items=items)
        return x + out.view_as(x)


class MoE(nn.Module):
    def __init__(self, grouped: bool, dim: int = 8) -> None:
        super().__init__()
        torch.manual_seed(1)
        weights = torch.randn(2, 4, dim, dim) * 0.3
        self.layers = nn.ModuleList()
        for layer in range(2):
            if grouped:
                experts = nn.ModuleDict({"w1": GroupedLinear(4, dim, dim)})
                experts["w1"].weight.data.copy_(weights[layer])
            else:
                experts = nn.ModuleList(
                    nn.ModuleDict({"w1": nn.Linear(dim, dim, bias=False)}) for _ in range(4)
                )
                for e, expert in enumerate(experts):
                    expert["w1"].weight.data.copy_(weights[layer, e])
            self.layers.append(MoEBlock(experts))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("grouped", [True, False])
def test_experts_unmerged_equal_merged(grouped, x):
    model = MoE(grouped)
    layout = LoRALayout.of(model, rank=2)
    assert [m.num_experts for m in layout.stacks[0].modules] == [4]
    assert layout.stacks[0].target(1, 0) == "layers.1.experts.w1"
    lora, before = random_lora(layout), state(model)
    with inject(model, lora):
        unmerged = model(x)
    merged = merge(model, lora)
    torch.testing.assert_close(model(x), unmerged, rtol=1e-4, atol=1e-5)
    unmerge(merged)
    assert_unchanged(model, before)


def test_grouped_experts_take_a_lora_per_item(x):
    model = MoE(grouped=True)
    lora = random_lora(LoRALayout.of(model, rank=2), batch=3)
    with inject(model, lora):
        together = model(x)
    for i in range(3):
        with inject(model, lora.select(i)):
            torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1]))
    with pytest.raises(HYWUError, match="experts of this model see rows of all images"):
        separate = MoE(grouped=False)
        with inject(separate, lora):
            separate(x)


@pytest.mark.parametrize("shape", [(16, 24), (6, 10)])
def test_grouped_product_and_its_gradient(shape):
    torch.manual_seed(0)
    in_, out = shape
    x = torch.randn(10, in_, requires_grad=True)
    weight = torch.randn(3, out, in_, requires_grad=True)
    ends = torch.tensor([4, 4, 10], dtype=torch.int32)
    result = grouped_linear(x, weight, ends)
    expected = torch.cat([x[:4] @ weight[0].T, x[4:] @ weight[2].T])
    torch.testing.assert_close(result, expected)
    grads = torch.autograd.grad(result.sum(), (x, weight))
    for ours, theirs in zip(grads, torch.autograd.grad(expected.sum(), (x, weight)), strict=True):
        torch.testing.assert_close(ours, theirs)


class Operations(TorchDispatchMode):
    """Names of what torch does inside the block."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(
    not hasattr(F, "grouped_mm"), reason="this torch has no grouped product on CPUs"
)
@pytest.mark.parametrize("batch", [1, 3])
def test_all_experts_are_two_products_and_nobody_waits(batch):
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"w1": GroupedLinear(4, 16, 24)}) for _ in range(2))
    lora = random_lora(LoRALayout.of(model, rank=8), batch=batch)
    x, ends = torch.randn(12, 16), torch.tensor([3, 3, 8, 12], dtype=torch.int32)
    items = torch.arange(12) % batch
    layer = model.layers[0]["w1"]
    with torch.no_grad():
        plain = layer(x, ends)
        with inject(model, lora), Operations() as operations:
            result = layer(x, ends, items=items)
    for row in range(12):
        a, b = lora["layers.0.w1"]
        item, expert = items[row], int((ends <= row).sum())
        delta = lora.scale * b[item, expert] @ (a[item, expert] @ x[row])
        torch.testing.assert_close(result[row], plain[row] + delta, rtol=1e-4, atol=1e-5)
    names = operations.seen
    assert sum("_grouped_mm" in name for name in names) == 3  # the base's own, A, B
    assert not any("_local_scalar_dense" in name or "mm.default" in name for name in names)


def test_item_groups():
    items, ends = torch.tensor([1, 0, 1, 0, 0]), torch.tensor([2, 2, 5])
    order, group_ends = item_groups(items, ends, 2)
    assert items[order].tolist() == [0, 0, 0, 1, 1]
    assert group_ends.tolist() == [1, 1, 3, 4, 4, 5]


# -- errors -------------------------------------------------------------------------------------


def test_another_base_is_an_error_that_names_everything(base, x):
    layout = LoRALayout.of(Base(dim=10, depth=4), rank=2)
    before = state(base)
    with pytest.raises(HYWUError, match="blocks.3.qkv") as error, inject(base, random_lora(layout)):
        pass
    text = str(error.value)
    assert "3 target modules are missing" in text
    assert "blocks.0.qkv is 24 x 8, the layout says 30 x 10" in text
    with pytest.raises(HYWUError, match="does not fit"):
        merge(base, random_lora(layout))
    assert_unchanged(base, before)


@pytest.mark.parametrize("apply", ["inject", "merge"])
def test_a_part_is_applied_only_when_asked_and_then_said(base, x, apply, caplog):
    """The base lacks two of the layers that the LoRA is for."""
    lora, plain = random_lora(LoRALayout.of(Base(dim=8, depth=4), rank=2)), base(x)
    depth = len(base.blocks)
    lacking = [p for p in lora if p.startswith("blocks.") and int(p.split(".")[1]) >= depth]
    assert lacking
    with pytest.raises(HYWUError, match=f"{len(lacking)} target modules .*skip_missing"):
        merge(base, lora) if apply == "merge" else inject(base, lora).__enter__()
    whole = random_lora(LoRALayout.of(base, rank=2))
    assert not caplog.records
    if apply == "merge":
        merge(base, lora, skip_missing=True)
        applied = base(x)
    else:
        with inject(base, lora, skip_missing=True):
            applied = base(x)
    assert not torch.allclose(applied, plain, atol=1e-3)
    assert len(whole) == len(lora) - len(lacking)
    (record,) = caplog.records
    assert f"{len(lacking)} of the LoRA's {len(lora)} modules aren't in Base" in record.getMessage()
    assert lacking[0] in record.getMessage()


def test_skipping_what_is_missing_skips_neither_all_nor_other_shapes(base):
    another = random_lora(LoRALayout.of(nn.ModuleDict({"other": nn.ModuleList([Base()])}), rank=2))
    with pytest.raises(HYWUError, match="does not fit"), inject(base, another, skip_missing=True):
        pass
    wider = random_lora(LoRALayout.of(Base(dim=10, depth=4), rank=2))
    with (
        pytest.raises(HYWUError, match="have another shape"),
        inject(base, wider, skip_missing=True),
    ):
        pass


@pytest.mark.parametrize("strength", [math.nan, math.inf, {"*": math.nan}, 1e39])
def test_strength_must_be_finite(base, strength):
    lora = random_lora(LoRALayout.of(base, rank=2))
    with pytest.raises(HYWUError, match="finite number"), inject(base, lora, strength):
        pass
    with pytest.raises(HYWUError, match="finite number"):
        merge(base, lora, strength)


def test_other_errors(base, x):
    layout = LoRALayout.of(base, rank=2)
    lora = random_lora(layout, batch=3)
    with (
        pytest.raises(HYWUError, match="'nothing.*' matches none"),
        inject(base, lora, {"nothing.*": 1}),
    ):
        pass
    with pytest.raises(HYWUError, match="batch of 2, but there are 3 LoRAs"), inject(base, lora):
        base(x[:2])
    with pytest.raises(HYWUError, match="does not divide"), inject(base, lora, index=[0, 1]):
        base(x)
    with pytest.raises(HYWUError, match=r"\[7\].*there are 3"), inject(base, lora, index=[0, 7, 1]):
        pass
    with pytest.raises(HYWUError, match="3 LoRAs can't be merged"):
        merge(base, lora)
    base.blocks[0].proj.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), False)
    before = state(base)
    with pytest.raises(HYWUError, match=r"blocks.0.proj.*int8"):
        merge(base, lora.select(0))
    assert_unchanged(base, before)


def test_a_merge_that_fails_halfway_changes_nothing(base, monkeypatch):
    lora, before = random_lora(LoRALayout.of(base, 2)), state(base)
    whole, calls = injection._pieces, []

    def fails_at_the_third(delta, parameters):
        calls.append(1)
        if len(calls) == 3:
            assert not torch.equal(base.blocks[0].qkv.weight, before["blocks.0.qkv.weight"])
            raise MemoryError("full")
        return whole(delta, parameters)

    monkeypatch.setattr(injection, "_pieces", fails_at_the_third)
    with pytest.raises(MemoryError):
        merge(base, lora)
    assert_unchanged(base, before)


# -- experts of other models ------------------------------------------------------------------------


def mixture(form: str) -> nn.Module:
    model = nn.Module()
    model.layer = Mixture(form)
    return model


@pytest.mark.parametrize("form", ["list", "parameters", "banks"])
def test_experts_of_other_forms(form):
    """Lists with fused halves, fused banks and banks equal grouped modules; merged and unmerged."""
    x, lora, model = torch.randn(2, 5, 8), expert_lora(), mixture(form)
    wanted = mixture("grouped")
    torch.testing.assert_close(model.layer(x), wanted.layer(x), rtol=1e-4, atol=1e-4)
    with inject(wanted, lora, 0.7):
        expected = wanted.layer(x)
    before = state(model)
    with inject(model, lora, 0.7):
        made = model.layer(x)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made, model.layer(x), atol=1e-2)
    assert_unchanged(model, before)
    assert not any("_hywu_swapped" in m.__dict__ for m in model.modules())
    merged = merge(model, lora, 0.7)
    torch.testing.assert_close(model.layer(x), expected, rtol=1e-4, atol=1e-4)
    unmerge(merged)
    assert_unchanged(model, before)
    with (
        pytest.raises(HYWUError, match="see rows of all images"),
        inject(model, expert_lora(2)),
    ):
        model.layer(x)


@pytest.mark.parametrize("form", ["parameters", "banks"])
def test_banks_swap_nested_and_are_restored_after_an_error(form):
    x, lora, model = torch.randn(1, 3, 8), expert_lora(), mixture(form)
    plain = model.layer(x)
    with inject(model, lora, 0.25), inject(model, lora, 0.5):
        both = model.layer(x)
    with inject(model, lora, 0.75):
        once = model.layer(x)
    torch.testing.assert_close(both, once, rtol=1e-4, atol=1e-4)
    with inject(model, lora), pytest.raises(RuntimeError):
        model.layer(torch.randn(1, 3, 7))
    assert torch.equal(model.layer(x), plain)
    factors = {key: value.requires_grad_() for key, value in lora.factors.items()}
    with inject(model, GeneratedLoRA(lora.layout, factors)):
        model.layer(x).square().sum().backward()
    assert all(value.grad.abs().sum() > 0 for value in factors.values())


def test_experts_that_differ_in_shape_are_named():
    model = mixture("list")
    model.layer.experts[2] = FusedExpert(*(torch.zeros(4, 8),) * 2, torch.zeros(8, 4))
    with pytest.raises(HYWUError, match=r"layer\.experts\.w1"), inject(model, expert_lora()):
        pass
