"""Layouts: official configs, discovery in any model, JSON, checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hywu_core import GeneratedLoRA, HYWUError, LoRALayout, discovery, inject, merge, unmerge
from hywu_core.generator.official import read_layout
from hywu_core.layout import Module, Stack
from hywu_core.tokens import token_grid

GOLDEN = Path(__file__).parent / "golden"


class Double(nn.Module):
    def __init__(self, dim, out=None):
        super().__init__()
        self.img_qkv = nn.Linear(dim, 3 * dim)
        self.txt_qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, out or dim)


class Single(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear1 = nn.Linear(dim, 7 * dim)
        self.conv = nn.Conv2d(dim, dim, 1)
        self.wide = nn.Conv2d(dim, dim, 3)


class FluxLike(nn.Module):
    def __init__(self, dim=4):
        super().__init__()
        self.img_in = nn.Linear(3, dim)
        self.double_blocks = nn.ModuleList([Double(dim), Double(dim), Double(dim, 9)])
        self.single_blocks = nn.ModuleList(Single(dim) for _ in range(2))


class Expert(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.w1 = nn.Linear(dim, 5)


class MoEBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gate = nn.Linear(dim, 3)
        self.experts = nn.ModuleList(Expert(dim) for _ in range(3))


class MoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(MoEBlock(4) for _ in range(2))


def test_several_stacks_and_a_last_block_that_differs():
    layout = LoRALayout.of(FluxLike(), 2)
    assert [stack.layers for stack in layout.stacks] == [
        ("double_blocks.0", "double_blocks.1"),
        ("double_blocks.2",),
        ("single_blocks.0", "single_blocks.1"),
    ]
    names = [[module.name for module in stack.modules] for stack in layout.stacks]
    assert names == [["img_qkv", "txt_qkv", "proj"]] * 2 + [["linear1", "conv"]]
    assert layout.stacks[2].modules[1] == Module("conv", 4, 4, conv=True)
    assert layout.scale == 1.0
    layout.check(FluxLike())


def test_include_and_exclude():
    layout = LoRALayout.of(FluxLike(), 2, include=["*.proj", "img_in"], exclude="double_blocks.2.*")
    paths = {target.path for target in layout.targets()}
    assert paths == {"img_in", "double_blocks.0.proj", "double_blocks.1.proj"}
    with pytest.raises(HYWUError, match="no repeated blocks"):
        LoRALayout.of(FluxLike(), 2, include="nothing*")


def test_expert_lists_become_grouped_modules():
    layout = LoRALayout.of(MoE(), 2)
    assert layout.stacks[0].modules == (Module("gate", 4, 3), Module("experts.w1", 4, 5, 3))
    layout.check(MoE())


def test_check_names_every_disagreement_at_once():
    layout = LoRALayout.of(FluxLike(), 2)
    model = FluxLike()
    del model.double_blocks[0].img_qkv, model.single_blocks[1].conv
    model.double_blocks[1].proj = nn.Linear(4, 5)
    with pytest.raises(HYWUError) as error:
        layout.check(model)
    for words in (
        "2 target modules are missing: double_blocks.0.img_qkv, single_blocks.1.conv",
        "double_blocks.1.proj is 5 x 4, the layout says 4 x 4",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize("case", ["dense", "ragged", "moe", "long"])
def test_official_config_keeps_file_order_and_json_round_trips(case):
    config = json.loads((GOLDEN / case / "config.json").read_text())
    layout = read_layout(config)
    names = list(
        dict.fromkeys(m.name.rpartition(".w")[0] or m.name for m in layout.stacks[0].modules)
    )
    assert names == list(config["pg_mapping"])
    assert layout.scale == config["alpha"] / config["rank"]
    again = LoRALayout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    assert again.digest == layout.digest
    assert layout.num_values == sum(row[4] for row in layout.describe())


def test_digest_depends_on_the_order_of_modules():
    modules = (Module("a", 2, 3), Module("b", 2, 3))
    one, two = (LoRALayout((Stack(("l.0",), m),), 1, 1.0) for m in (modules, modules[::-1]))
    assert one.digest != two.digest


def test_with_rank_keeps_the_scale():
    layout = LoRALayout((Stack(("l.0",), (Module("a", 2, 3),)),), 2, 3.0)
    assert layout.with_rank(8).scale == layout.scale
    assert layout.with_rank(8, alpha=8.0).scale == 1.0


@pytest.mark.parametrize(
    ("stacks", "rank", "alpha", "words"),
    [
        ((Stack(("l.0",), (Module("a", 2, 3),)),), 0, 1.0, "the rank is 0"),
        ((Stack(("l.0",), (Module("a", 2, 3),)),), 1, float("nan"), "alpha is nan"),
        ((), 1, 1.0, "nothing to adapt"),
        ((Stack(("l.0", "l.0"), (Module("a", 2, 3),)),), 1, 1.0, "listed more than once: l.0.a"),
    ],
)
def test_wrong_layouts(stacks, rank, alpha, words):
    with pytest.raises(HYWUError, match=words):
        LoRALayout(stacks, rank, alpha)


def test_damaged_descriptions():
    module = {"name": "fc", "in_features": 3, "out_features": 4}
    for data, words in (
        ({"stacks": [{"layers": ["a"]}], "rank": 1, "alpha": 1}, "damaged"),
        ({"stacks": [{"layers": ["a"], "modules": [module]}], "rank": "x", "alpha": 1}, "damaged"),
        (
            {"stacks": [{"layers": ["a"], "modules": [{**module, "in_features": "3"}]}]},
            "'fc' has in_features '3'",
        ),
    ):
        with pytest.raises(HYWUError, match=words):
            LoRALayout.from_json(data)
    with pytest.raises(HYWUError, match="the key 'prefix' is missing"):
        read_layout({"pg_mapping": {}})


def test_quantized_layers_are_found_by_their_attributes():
    class Quantized(nn.Module):
        in_features, out_features = 4, 6

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = Quantized()
            self.register_buffer("scale", torch.ones(1))

    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(2))
    assert LoRALayout.of(model, 1).stacks[0].modules == (Module("fc", 4, 6),)


class Level(nn.Module):
    """A level of a UNet: a residual block, then transformer blocks between two projections."""

    def __init__(self, dim, depth):
        super().__init__()
        self.res = nn.ModuleList([nn.Conv2d(dim, dim, 3), nn.Conv2d(dim, dim, 1)])
        self.proj_in, self.proj_out = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList(Double(dim) for _ in range(depth))


def test_levels_of_a_unet():
    model = nn.Module()
    model.down = nn.ModuleList([Level(4, 1), Level(8, 2)])
    model.middle = Level(8, 1)
    model.up = nn.ModuleList([Level(8, 2), Level(4, 1)])
    layout = LoRALayout.of(model, 2)
    stacks = {stack.layers: [m.name for m in stack.modules] for stack in layout.stacks}
    around, inside = ["res.1", "proj_in", "proj_out"], ["img_qkv", "txt_qkv", "proj"]
    wide = [f"{level}.transformer_blocks.{i}" for level in ("down.1", "up.0") for i in (0, 1)]
    wide.insert(2, "middle.transformer_blocks.0")
    assert stacks == {
        ("down.0", "up.1"): around,
        ("down.0.transformer_blocks.0", "up.1.transformer_blocks.0"): inside,
        ("down.1", "up.0"): around,
        tuple(wide): inside,
    }
    layout.check(model)


class Conv1D(nn.Module):
    """As transformers has it: y = x W + b with W [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(
            *x.shape[:-1], self.nf
        )


class GPT2Like(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(
            nn.ModuleDict({"c_attn": Conv1D(12, 4), "c_proj": Conv1D(4, 12)}) for _ in range(2)
        )

    def forward(self, x):
        for block in self.h:
            x = x + block["c_proj"](torch.tanh(block["c_attn"](x)))
        return x


def test_conv1d_is_a_linear_the_other_way_round():
    torch.manual_seed(0)
    model, x = GPT2Like(), torch.randn(3, 5, 4)
    layout = LoRALayout.of(model, 2)
    (stack,) = layout.stacks
    assert [(m.name, m.in_features, m.out_features) for m in stack.modules] == [
        ("c_attn", 4, 12),
        ("c_proj", 12, 4),
    ]
    grids = [torch.randn(1, 2, g.num_tokens, 2, 8) for g in (token_grid(stack, 2, 8),)]
    lora, plain = GeneratedLoRA.from_grids(layout, grids), model(x)
    with inject(model, lora):
        unmerged = model(x)
    merged = merge(model, lora)
    assert (unmerged - plain).norm() > 0.1 * plain.norm()
    assert torch.allclose(model(x), unmerged, atol=1e-4)
    unmerge(merged)
    assert torch.equal(model(x), plain)


def test_transformers_own_conv1d_is_found():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    assert discovery.linear_shape(pytorch_utils.Conv1D(12, 4)) == (0, 12, 4)


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        (
            nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
            {},
            "such as 0, 2; include='*'",
        ),
        (
            GPT2Like(),
            {"include": "*.attn.*"},
            r"match include='\*.attn.\*'.* include='\*c_attn' takes",
        ),
        (GPT2Like(), {"exclude": "*"}, "exclude leaves none of its 4 modules, such as h.0.c_attn"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
            {},
            "weights lie in BatchNorm2d, Conv2d",
        ),
        (nn.ReLU(), {}, "weights lie in no module"),
    ],
)
def test_hints_name_what_the_model_has(model, given, words):
    with pytest.raises(HYWUError, match=words):
        LoRALayout.of(model, 2, **given)


def test_an_exclude_that_matches_nothing_is_said(caplog):
    LoRALayout.of(GPT2Like(), 2, exclude=["*.c_proj", "*.txet.*"])
    assert [r.getMessage() for r in caplog.records] == [
        "exclude='*.txet.*' matches no module of GPT2Like"
    ]
