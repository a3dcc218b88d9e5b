"""GeneratedLoRA: views, selection, mixtures, norms, wrong input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hywu_core import GeneratedLoRA, HYWUError, LoRALayout
from hywu_core.layout import Module, Stack
from hywu_core.tokens import token_grid

MODULES = (Module("qkv", 6, 18), Module("experts.w1", 6, 5, 3))
LAYOUT = LoRALayout(
    (Stack(("b.0", "b.1"), MODULES), Stack(("out",), (Module("fc", 4, 7),))), 2, 3.0
)


def make(batch=2, seed=0, layout=LAYOUT):
    rng = torch.Generator().manual_seed(seed)
    grids = []
    for stack in layout.stacks:
        grid = token_grid(stack, layout.rank, 8)
        shape = (batch, grid.num_layers, grid.num_tokens, layout.rank, 8)
        grids.append(torch.randn(shape, generator=rng))
    return GeneratedLoRA.from_grids(layout, grids, {"seed": seed})


def product(lora, path):
    return lora.scale * lora[path].B @ lora[path].A


def test_matrices_are_views_of_the_buffers():
    lora = make()
    held = {grid.untyped_storage().data_ptr() for grid in lora.grids}
    for _, pair in lora.items():
        assert all(value.untyped_storage().data_ptr() in held for value in pair)
    assert list(lora) == [target.path for target in LAYOUT.targets()]
    assert lora["b.1.experts.w1"].A.shape == (2, 3, 2, 6)
    assert "b.1.qkv" in lora
    assert len(lora) == 5
    assert lora.nbytes == sum(grid.nbytes for grid in lora.grids)
    with pytest.raises(KeyError):
        lora["b.2.qkv"]
    with pytest.raises(TypeError):
        lora.factors[0, 0, "A"] = torch.zeros(1)


def test_select_picks_items_and_names_those_that_are_not_there():
    lora = make(3)
    parts = [lora.select(i) for i in range(3)]
    assert parts[1]["out.fc"].A.data_ptr() == lora["out.fc"].A[1].data_ptr()
    for key, value in lora.factors.items():
        assert torch.equal(torch.cat([part.factors[key] for part in parts]), value)
    assert torch.equal(lora.select([2, 0])["out.fc"].B, lora["out.fc"].B[[2, 0]])
    with pytest.raises(HYWUError, match="Item 3 is out of range"):
        lora.select(3)
    for items in ([0, 3], slice(3, 5), torch.tensor([7])):
        with pytest.raises(HYWUError, match="Items .* out of range: the LoRA has 3 items"):
            lora.select(items)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, -0.5])
def test_blend_mixes_weights_exactly_across_ranks_and_scales(weight):
    one, two = make(2, 0), make(1, 1, LAYOUT.with_rank(3, alpha=0.75))
    mixed = one.blend(two, weight)
    assert mixed.rank == 5
    for path in one:
        expected = (1 - weight) * product(one, path) + weight * product(two, path)
        torch.testing.assert_close(product(mixed, path), expected, rtol=1e-4, atol=1e-4)


def test_blend_loses_nothing_to_the_narrower_dtype():
    one, two = make(1, 0).to(dtype=torch.bfloat16), make(1, 1)
    for first, second in ((one, two), (two, one)):
        mixed = first.blend(second, 0.5)
        assert mixed.dtype == torch.float32
        for path in one:
            parts = [product(lora.to(dtype=torch.float32), path) for lora in (first, second)]
            torch.testing.assert_close(product(mixed, path), sum(parts) / 2, rtol=1e-5, atol=1e-5)


def test_mixtures_refuse_what_does_not_fit():
    one = make(2)
    with pytest.raises(HYWUError, match="finite number"):
        one.blend(make(2, 1), float("nan"))
    with pytest.raises(HYWUError, match="2 and 3 items"):
        one.blend(make(3), 0.5)
    other = LoRALayout((Stack(("c.0",), MODULES),), 2, 3.0)
    with pytest.raises(HYWUError, match="target different modules"):
        one.blend(make(2, 0, other), 0.5)


def test_mixing_with_scale_zero_first_is_refused():
    lora = make()
    nothing = GeneratedLoRA(replace(lora.layout, alpha=0.0), lora.factors, {})
    with pytest.raises(HYWUError, match="scale 0"):
        nothing.blend(lora, 0.5)


def test_norms_equal_those_of_the_product():
    lora = make()
    for path, norm in lora.norms().items():
        expected = product(lora, path).flatten(1).norm(dim=1)
        torch.testing.assert_close(norm, expected, rtol=1e-4, atol=1e-4)


def test_norms_where_a_device_has_no_qr(monkeypatch):
    lora, qr, calls = make(), torch.linalg.qr, []
    expected = lora.norms()

    def missing_every_other_time(*args, **options):
        calls.append(1)
        if len(calls) % 2:
            raise NotImplementedError("linalg_qr")
        return qr(*args, **options)

    monkeypatch.setattr(torch.linalg, "qr", missing_every_other_time)
    assert all(torch.equal(norm, expected[path]) for path, norm in lora.norms().items())


def test_values_that_are_not_finite_are_named():
    lora = make()
    lora.check_finite()
    lora["b.1.qkv"].B[0, 0, 0] = float("inf")
    with pytest.raises(HYWUError, match=r"not finite, in b.1.qkv;"):
        lora.check_finite()


def test_to_and_detach():
    lora = make()
    assert lora.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    lora.grids[0].requires_grad_()
    assert not lora.detach().grids[0].requires_grad


def test_from_pairs_groups_layers_and_refuses_other_ranks():
    lora = make(1)
    again = GeneratedLoRA.from_pairs(dict(lora.items()), 3.0)
    for path, pair in lora.items():
        assert torch.equal(again[path].A, pair.A)
        assert torch.equal(again[path].B, pair.B)
    with pytest.raises(HYWUError, match="differ in rank"):
        GeneratedLoRA.from_pairs({"a.0.x": (torch.ones(1, 2, 3), torch.ones(1, 4, 3))}, 1.0)


def test_wrong_shapes_and_batches():
    factors = dict(make(2).factors)
    with pytest.raises(HYWUError, match="differ in batch size"):
        GeneratedLoRA(LAYOUT, {**factors, (0, 0, "A"): factors[0, 0, "A"][:1]})
    with pytest.raises(HYWUError, match="the layout says"):
        GeneratedLoRA(LAYOUT, {**factors, (0, 0, "A"): factors[0, 0, "B"]})
