"""The same LoRA as native, PEFT and ComfyUI files, and foreign files read into one rank and alpha."""

from __future__ import annotations

import json
import random
import re
import time

import pytest
import torch
from layouts import LAYOUT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hywu_core import GeneratedLoRA, HYWUError, LoRALayout, inject, load_lora
from hywu_core.cli import main
from hywu_core.files import HEADER, read_header
from hywu_core.formats import lora_header, save_lora
from hywu_core.formats.patterns import Pattern
from hywu_core.layout import Module, Stack
from hywu_core.tokens import token_grid


def make(layout=LAYOUT, batch=1, dtype=torch.float32, provenance=None):
    rng = torch.Generator().manual_seed(1)
    grids = []
    for stack in layout.stacks:
        grid = token_grid(stack, layout.rank, 8)
        shape = (batch, grid.num_layers, grid.num_tokens, layout.rank, 8)
        grids.append((torch.randn(shape, generator=rng) * 0.2).to(dtype))
    return GeneratedLoRA.from_grids(
        layout, grids, provenance or {"instruction": "a hat", "base": "toy"}
    )


def assert_same(one, two):
    assert one.layout == two.layout
    assert dict(one.provenance) == dict(two.provenance)
    for key, value in one.factors.items():
        assert two.factors[key].dtype == value.dtype
        assert torch.equal(two.factors[key], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["native", "peft", "comfyui"])
def test_round_trip_is_bit_exact(tmp_path, format, dtype):
    lora = make(dtype=dtype)
    path = lora.save(tmp_path / "lora", format)
    assert_same(lora, load_lora(path))
    assert lora_header(path)["provenance"]["instruction"] == "a hat"
    assert not list(tmp_path.glob(".*"))


def test_native_keeps_a_batch_grids_and_plain_factors(tmp_path):
    lora = make(batch=3)
    loaded = load_lora(lora.save(tmp_path / "grids"))
    assert_same(lora, loaded)
    assert len(loaded.grids) == 2
    plain = GeneratedLoRA(lora.layout, lora.factors, lora.provenance)
    assert_same(plain, load_lora(plain.save(tmp_path / "factors")))


def test_comfyui_keys_shapes_and_alpha(tmp_path):
    lora = make()
    tensors = load_file(lora.save(tmp_path / "x", "comfyui"))
    key = "diffusion_model.blocks.1.qkv"
    assert torch.equal(tensors[f"{key}.lora_up.weight"], lora["blocks.1.qkv"].B[0])
    assert tensors[f"{key}.lora_down.weight"].shape == (2, 6)
    assert tensors[f"{key}.alpha"].item() == 3.0
    assert tensors["diffusion_model.blocks.0.conv.lora_up.weight"].shape == (4, 2, 1, 1)
    expert = tensors["diffusion_model.blocks.0.mlp.experts.2.w1.lora_down.weight"]
    assert torch.equal(expert, lora["blocks.0.mlp.experts.w1"].A[0, 2])


def transformers_model(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    name = {"unfused": "Llama", "fused": "GPTNeoX"}[kind]
    config = getattr(transformers, f"{name}Config")(**common)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", ["fused", "unfused"])
def test_peft_loads_the_folder_with_equal_outputs(tmp_path, kind):
    peft = pytest.importorskip("peft")
    model = transformers_model(kind)
    layout = LoRALayout.of(model, 2, alpha=3.0)
    names = {target.path.rpartition(".")[2] for target in layout.targets()}
    assert ("query_key_value" if kind == "fused" else "q_proj") in names
    lora, tokens = make(layout), torch.arange(8)[None]
    with torch.no_grad():
        plain = model(tokens).logits
        with inject(model, lora):
            ours = model(tokens).logits
        adapted = peft.PeftModel.from_pretrained(model, lora.save(tmp_path / "adapter", "peft"))
        theirs = adapted(tokens).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path / "again")
    again = load_lora(tmp_path / "again")
    assert again.scale == lora.scale
    for path, pair in lora.items():
        assert torch.equal(again[path].A, pair.A)
        assert torch.equal(again[path].B, pair.B)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(6, 5)}) for _ in range(3))
        mlp = nn.ModuleDict({"experts": experts})
        block = {"qkv": nn.Linear(6, 18), "mlp": mlp, "conv": nn.Conv2d(6, 4, 1)}
        self.blocks = nn.ModuleList([nn.ModuleDict(block)])
        self.qkv = nn.Linear(6, 18)


def test_peft_experts_and_convolutions_and_no_other_module(tmp_path):
    peft = pytest.importorskip("peft")
    model = Own()
    stack = Stack(("blocks.0",), LAYOUT.stacks[0].modules)
    lora = make(LoRALayout((stack,), 2, 3.0))
    adapted = peft.PeftModel.from_pretrained(model, lora.save(tmp_path / "a", "peft"))
    adapted.merge_adapter()
    block = adapted.base_model.model.blocks[0]
    for module, a, b in (
        (block["conv"], *(x[0] for x in lora["blocks.0.conv"])),
        (block["mlp"]["experts"][1]["w1"], *(x[0, 1] for x in lora["blocks.0.mlp.experts.w1"])),
    ):
        assert torch.equal(module.lora_A["default"].weight.flatten(1), a)
        assert torch.equal(module.lora_B["default"].weight.flatten(1), b)
        assert module.scaling["default"] == 1.5
    assert isinstance(adapted.base_model.model.qkv, nn.Linear)
    assert not hasattr(adapted.base_model.model.qkv, "lora_A")


class Convolutional(nn.Module):
    """Two blocks of 1x1 convolutions around a 3x3 one that no LoRA is for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "to_in": nn.Conv2d(6, 8, 1, bias=False),
                    "depth": nn.Conv2d(8, 8, 3, padding=1, groups=8),
                    "to_out": nn.Conv2d(8, 6, 1),
                }
            )
            for _ in range(2)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block["to_out"](block["depth"](block["to_in"](x)).relu())
        return x


@torch.no_grad()
def test_peft_loads_convolutions_with_equal_outputs(tmp_path):
    peft = pytest.importorskip("peft")
    model, x = Convolutional(), torch.randn(2, 6, 5, 7)
    layout = LoRALayout.of(model, 2, alpha=3.0)
    targets = {t.path: t.module.conv for t in layout.targets()}
    assert targets == {f"blocks.{i}.{name}": True for i in range(2) for name in ("to_in", "to_out")}
    lora = make(layout)
    plain = model(x)
    with inject(model, lora):
        ours = model(x)
    folder = lora.save(tmp_path / "conv", "peft")
    key = "base_model.model.blocks.1.to_in.lora_B.weight"
    assert load_file(folder / "adapter_model.safetensors")[key].shape == (8, 2, 1, 1)
    adapted = peft.PeftModel.from_pretrained(model, folder)
    torch.testing.assert_close(adapted(x), ours, rtol=1e-5, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-2
    # and back: PEFT's own file of the same adapter, without our header
    adapted.save_pretrained(tmp_path / "again")
    again = load_lora(tmp_path / "again", base=layout)
    assert again.scale == lora.scale
    for path, pair in lora.items():
        assert again.target(path).module.conv
        assert torch.equal(again[path].A, pair.A)
        assert torch.equal(again[path].B, pair.B)


def test_foreign_ranks_and_alphas_become_one(tmp_path):
    tensors, products = {}, {}
    for i, (rank, alpha) in enumerate([(2, 1.0), (4, 3.0), (1, None)]):
        a, b = torch.randn(rank, 6), torch.randn(5, rank)
        key = f"diffusion_model.blocks.{i}.fc"
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = a, b
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        products[f"blocks.{i}.fc"] = (1.0 if alpha is None else alpha / rank) * (b @ a)
    save_file(tensors, tmp_path / "foreign.safetensors")
    lora = load_lora(tmp_path / "foreign.safetensors")
    assert (lora.rank, lora.scale, len(lora)) == (4, 1.0, 3)
    for path, product in products.items():
        torch.testing.assert_close(lora.scale * (lora[path].B @ lora[path].A)[0], product)


def test_kohya_names_need_the_base(tmp_path):
    path = tmp_path / "kohya.safetensors"
    key = "lora_unet_blocks_0_to_q"
    down, up = torch.randn(2, 6), torch.randn(5, 2)
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, path)
    with pytest.raises(HYWUError, match="give the base model or layout"):
        load_lora(path)
    layout = LoRALayout((Stack(("blocks.0",), (Module("to_q", 6, 5),)),), 2, 2.0)
    lora = load_lora(path, base=layout)
    assert torch.equal(lora["blocks.0.to_q"].A[0], down)
    other = LoRALayout((Stack(("blocks.0",), (Module("to_q", 6, 9),)),), 2, 2.0)
    with pytest.raises(HYWUError, match=r"kohya.safetensors: made for another base"):
        load_lora(path, base=other)
    with pytest.raises(HYWUError, match="has no such modules"):
        load_lora(path, base=LAYOUT)


@pytest.mark.parametrize("format", ["native", "peft", "comfyui"])
def test_nothing_is_overwritten_unless_told(tmp_path, format):
    lora = make()
    path = lora.save(tmp_path / "x", format)
    with pytest.raises(HYWUError, match="exists already"):
        lora.save(path, format)
    other = lora.to(dtype=torch.float16)
    if path.is_dir():
        (path / "README.md").write_text("mine")
    assert load_lora(other.save(path, format, overwrite=True)).dtype == torch.float16
    if path.is_dir():
        assert (path / "README.md").read_text() == "mine"


def test_errors_of_saving(tmp_path):
    with pytest.raises(HYWUError, match="Unknown LoRA format 'pickle'"):
        make().save(tmp_path / "x", "pickle")
    for format in ("peft", "comfyui"):
        with pytest.raises(HYWUError, match=r"select\(i\)"):
            make(batch=2).save(tmp_path / "x", format)
    (tmp_path / "file").write_text("")
    for format in ("native", "peft", "comfyui"):
        with pytest.raises(HYWUError, match="can't be written"):
            make().save(tmp_path / "file" / "x", format)
    broken = make()
    broken.grids[0][0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(HYWUError, match="not finite"):
        save_lora(broken, tmp_path / "x")
    grouped = LoRALayout((Stack(("b.0",), (Module("w1", 6, 5, 3),)),), 2, 2.0)
    for format in ("peft", "comfyui"):
        with pytest.raises(HYWUError, match="save as 'native'"):
            make(grouped).save(tmp_path / "y", format)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["grids", "factors"])
def test_a_native_file_that_lacks_a_tensor(tmp_path, kind):
    lora = make()
    if kind == "factors":
        lora = GeneratedLoRA(lora.layout, lora.factors, lora.provenance)
    path = lora.save(tmp_path / "x")
    tensors, header = load_file(path), lora_header(path)
    gone = {"grids": "grid.1", "factors": "factor.1.0.B"}[kind]
    del tensors[gone]
    save_file(tensors, tmp_path / "y.safetensors", metadata={HEADER: json.dumps(header)})
    with pytest.raises(HYWUError, match=rf"y.safetensors: the LoRA file lacks the tensor '{gone}'"):
        load_lora(tmp_path / "y.safetensors")


def test_errors_of_loading(tmp_path):
    path = make().save(tmp_path / "x")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(HYWUError, match="x.safetensors: not a whole safetensors file"):
        load_lora(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HYWUError, match="no PEFT folder"):
        load_lora(tmp_path / "empty")
    cases = {
        "weights": ({"a.weight": torch.ones(2, 2)}, "not a plain LoRA"),
        "half": ({"a.0.lora_A.weight": torch.ones(2, 3)}, "only one of its two"),
        "ranks": (
            {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 4)},
            "ranks differ",
        ),
    }
    for name, (tensors, words) in cases.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(HYWUError, match=rf"{name}.safetensors: .*{words}"):
            load_lora(tmp_path / f"{name}.safetensors")


def test_native_header_reordered_by_another_tool(tmp_path):
    path = make().save(tmp_path / "x")
    tensors, header = load_file(path), lora_header(path)
    header["layout"]["stacks"][0]["modules"].reverse()
    save_file(tensors, tmp_path / "y.safetensors", metadata={HEADER: json.dumps(header)})
    with pytest.raises(HYWUError, match="y.safetensors: the layout's modules are in another order"):
        load_lora(tmp_path / "y.safetensors")


@pytest.mark.parametrize("format", ["peft", "comfyui"])
def test_without_our_header_experts_and_convolutions_are_found(tmp_path, format):
    lora = make()
    path = lora.save(tmp_path / "x", format)
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    file.unlink()
    save_file(tensors, file)
    assert lora_header(path) is None
    loaded = load_lora(file)
    assert set(loaded) == set(lora)
    assert loaded.scale == lora.scale
    for name, pair in lora.items():
        assert loaded.target(name).module.num_experts == lora.target(name).module.num_experts
        assert loaded.target(name).module.conv == lora.target(name).module.conv
        assert torch.equal(loaded[name].A, pair.A)
        assert torch.equal(loaded[name].B, pair.B)
    gone = {k: v for k, v in tensors.items() if ".experts.1." not in k}
    save_file(gone, tmp_path / "gone.safetensors")
    with pytest.raises(HYWUError, match="some experts are missing"):
        load_lora(tmp_path / "gone.safetensors")


def test_alphas_of_a_foreign_peft_folder(tmp_path):
    path = make().save(tmp_path / "x", "peft")
    file = path / "adapter_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    file.unlink()
    save_file(tensors, file)
    config = json.loads((path / "adapter_config.json").read_text())
    changed = {**config, "use_rslora": True, "alpha_pattern": {"qkv": 5}}
    (path / "adapter_config.json").write_text(json.dumps(changed))
    lora, before = load_lora(path), make()
    for name, alpha in (("blocks.0.qkv", 5), ("last.out", 3)):
        expected = alpha / 2**0.5 * (before[name].B @ before[name].A)
        torch.testing.assert_close(lora.scale * (lora[name].B @ lora[name].A), expected)
    for text, words in (
        (json.dumps({**config, "use_dora": True}), "use_dora"),
        (json.dumps({"peft_type": "IA3"}), "not the configuration"),
        ("{", "not JSON"),
    ):
        (path / "adapter_config.json").write_text(text)
        with pytest.raises(HYWUError, match=words):
            load_lora(path)


def test_wide_convolutions_are_refused(tmp_path):
    a, b = torch.ones(2, 4, 3, 3), torch.ones(5, 2, 1, 1)
    save_file({"c.lora_A.weight": a, "c.lora_B.weight": b}, tmp_path / "c.safetensors")
    with pytest.raises(HYWUError, match="larger than 1x1"):
        load_lora(tmp_path / "c.safetensors")


# -- what other programs write ------------------------------------------------------------------------


def pair(out=5, in_=6, rank=2, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    shapes = (rank, in_), (out, rank)
    return tuple(torch.randn(shape, generator=rng).to(dtype) for shape in shapes)


def named(names, form, **options):
    """Tensors of a file: module names in one of the programs' forms."""
    down, up = form
    tensors = {}
    for seed, name in enumerate(names):
        a, b = pair(seed=seed, **options)
        tensors |= {f"{name}{down}.weight": a, f"{name}{up}.weight": b}
    return tensors


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(6, 5)
        self.to_out = nn.ModuleList([nn.Linear(6, 5), nn.Dropout()])


class Diffusers(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn1": Attention()}) for _ in range(2))


TARGETS = {f"blocks.{i}.attn1.{m}" for i in range(2) for m in ("to_q", "to_out.0")}
AB, DOWN_UP = (".lora_A", ".lora_B"), (".lora_down", ".lora_up")


@pytest.mark.parametrize(
    ("start", "form", "spell"),
    [
        ("transformer.", AB, str),
        ("unet.", (".lora.down", ".lora.up"), str),
        ("unet.", ("_lora.down", "_lora.up"), lambda n: n.replace("attn1.", "attn1.processor.")),
        ("base_model.model.", (".lora_A.default", ".lora_B.default"), str),
        ("base_model.model.transformer.", AB, str),
        ("diffusion_model.", DOWN_UP, str),
        ("lora_unet_", DOWN_UP, lambda n: n.replace(".", "_")),
        ("lora_transformer_", DOWN_UP, lambda n: n.replace(".", "_")),
        ("", (".lora_linear_layer.down", ".lora_linear_layer.up"), str),
    ],
)
@pytest.mark.parametrize("kind", ["model", "layout"])
def test_names_of_other_programs_are_the_bases(tmp_path, start, form, spell, kind):
    model = Diffusers()
    base = model if kind == "model" else LoRALayout.of(model, 2)
    names = sorted(TARGETS)
    spelled = [start + spell(n).replace("to_out.0", "to_out" if "unet." in start else "to_out.0")
               for n in names]  # fmt: skip
    if "lora_" in start:
        spelled = [start + n.replace(".", "_") for n in names]
    save_file(named(spelled, form), tmp_path / "x.safetensors")
    lora = load_lora(tmp_path / "x.safetensors", base=base)
    assert set(lora) == TARGETS
    for seed, name in enumerate(names):
        assert torch.equal(lora[name].B[0], pair(seed=seed)[1])


def test_a_part_of_a_file_is_read_only_when_asked_and_then_said(tmp_path, caplog):
    path, model = tmp_path / "kohya.safetensors", Diffusers()
    names = [f"lora_unet_{n.replace('.', '_')}" for n in sorted(TARGETS)]
    more = [f"lora_te_text_model_encoder_layers_{i}_q_proj" for i in range(3)]
    tensors = named([*names, *more], DOWN_UP) | {"blocks.0.attn1.to_q.dora_scale": torch.ones(5)}
    save_file(tensors, path)
    with pytest.raises(
        HYWUError, match=r"4 of 8 entries can't be read: .*q_proj.*skip_missing"
    ) as caught:
        load_lora(path, base=model)
    assert str(caught.value).startswith(str(path))
    assert not caplog.records
    lora = load_lora(path, base=model, skip_missing=True)
    assert set(lora) == TARGETS
    assert lora.provenance["left_out"]["count"] == 4
    assert more[0] in lora.provenance["left_out"]["names"]
    (record,) = caplog.records
    assert "4 of 8 entries are left out: " in record.getMessage()
    save_file(named(more, DOWN_UP), path)
    with pytest.raises(HYWUError, match="3 of 3 entries can't be read"):
        load_lora(path, base=model, skip_missing=True)


def test_a_generated_lora_for_a_larger_base_follows_the_same_rule(tmp_path, caplog):
    model = Diffusers()
    larger = Diffusers()
    larger.blocks.extend([nn.ModuleDict({"attn1": Attention()})])
    path = make(LoRALayout.of(larger, 2)).save(tmp_path / "x")
    with pytest.raises(HYWUError, match=r"2 target modules are missing.*skip_missing"):
        load_lora(path, base=model)
    load_lora(path, base=model, skip_missing=True)
    assert "2 of the LoRA's 6 modules aren't in Diffusers" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_alpha": None}, "lora_alpha is None; a number is needed"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; a number"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"alpha_pattern": {"*bad(": 3}}, r"the pattern '\*bad\('"),
        ({"alpha_pattern": {"to_q": "x"}}, "to_q is 'x'; a number"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]; an object"),
        # Python compiles it alone, and refuses it where PEFT puts it
        ({"alpha_pattern": {"a)|(b": 3}}, r"the pattern 'a\)\|\(b'"),
        ({"alpha_pattern": {r"(to_q)\1": 3}}, "more than the names of modules need"),
        ({"alpha_pattern": {"(a{99}){99}": 3}}, "more than 2000 states"),
        ("lora_alpha", "lora_alpha is None"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_peft_configurations_with_odd_values(tmp_path, capsys, change, words, command):
    save_file(named(["base_model.model.blocks.0.to_q"], AB), tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
    if isinstance(change, str):
        del config[change]
    else:
        config |= change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    target = [str(tmp_path / "out.safetensors")] if command == "convert" else []
    assert main([command, str(tmp_path), *target]) == 1
    error = capsys.readouterr().err
    assert re.search(words, error)
    assert error.count("\n") == 1


def product(lora, name):
    a, b = (factor[0].double() for factor in lora[name])
    return lora.scale * (b @ a)


@pytest.mark.parametrize("rank", [4, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_differing_alphas_change_no_digit(tmp_path, rank, dtype):
    """Powers of two included: in half precision 1/128 of a small value is none any more."""
    tensors = named(["blocks.0.a", "blocks.1.a"], DOWN_UP, rank=rank, dtype=dtype)
    for key in [key for key in tensors if "lora_up" in key]:
        tensors[key] = tensors[key] * 1e-4
    alphas = {"blocks.0.a": 1.0, "blocks.1.a": 3.0}
    tensors |= {f"{name}.alpha": torch.tensor(value) for name, value in alphas.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    lora = load_lora(tmp_path / "x.safetensors")
    for name, alpha in alphas.items():
        a, b = (tensors[f"{name}.lora_{side}.weight"].double() for side in ("down", "up"))
        wanted = alpha / rank * (b @ a)
        assert (product(lora, name) - wanted).norm() < 1e-7 * wanted.norm()


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_adapter_metadata": '{"transformer.lora_alpha": 8, "transformer.r": 2}'},
        {"lora_adapter_metadata": '{"transformer.lora_alpha": 1, "transformer.use_rslora": false, '
         '"transformer.alpha_pattern": {"to_q": 8}}'},
        {"ss_network_alpha": "8.0", "ss_network_dim": "2"},
        {"lora_alpha": "8"},
    ],
)  # fmt: skip
def test_an_alpha_that_only_the_metadata_has_counts(tmp_path, metadata):
    tensors = named(["transformer.blocks.0.attn1.to_q"], AB)
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    lora = load_lora(
        tmp_path / "x.safetensors", base=LoRALayout.of(Diffusers(), 2, include="*0*to_q")
    )
    a, b = (tensors[f"transformer.blocks.0.attn1.to_q.lora_{side}.weight"] for side in "AB")
    assert torch.allclose(product(lora, "blocks.0.attn1.to_q").float(), 4 * (b @ a), rtol=1e-5)


def test_an_alpha_of_the_metadata_that_contradicts_the_tensors_is_said(tmp_path, caplog):
    tensors = named(["a.0.to_q"], AB) | {"a.0.to_q.alpha": torch.tensor(2.0)}
    described = {"lora_adapter_metadata": '{"a.lora_alpha": 8, "a.r": 2}'}
    save_file(tensors, tmp_path / "x.safetensors", metadata=described)
    with pytest.raises(
        HYWUError, match="alpha tensor says the scale 1, the configuration beside it 4"
    ):
        load_lora(tmp_path / "x.safetensors")
    # what a training noted may be of the file that this one was resized from: the tensors count, as in ComfyUI
    save_file(tensors, tmp_path / "x.safetensors", metadata={"ss_network_alpha": "8"})
    assert load_lora(tmp_path / "x.safetensors").scale == 1
    assert "says the scale 1, the file's metadata 4; the tensors count." in caplog.text
    caplog.clear()
    save_file(tensors, tmp_path / "x.safetensors", metadata={"ss_network_alpha": "None"})
    assert load_lora(tmp_path / "x.safetensors").scale == 1
    assert not caplog.text


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_matrices_of_8_bits_are_read(tmp_path, dtype):
    tensors = {key: value.to(dtype) for key, value in named(["a.0.to_q"], AB).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    lora = load_lora(tmp_path / "x.safetensors")
    lora.check_finite("it")
    a, b = lora["a.0.to_q"]
    assert torch.equal(a[0].float(), tensors["a.0.to_q.lora_A.weight"].float())
    assert torch.equal(b[0].float(), tensors["a.0.to_q.lora_B.weight"].float())
    lora.save(tmp_path / "again", "comfyui")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e5m2])
def test_a_native_file_in_another_dtype(tmp_path, dtype):
    path = make().save(tmp_path / "x.safetensors")
    header = {HEADER: json.dumps(read_header(path))}
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path, header)
    if dtype is torch.float8_e5m2:
        load_lora(path).check_finite("it")
        return
    with pytest.raises(HYWUError, match="and a LoRA's values are floating point"):
        load_lora(path)


def test_names_without_a_weight_at_their_end_are_read(tmp_path):
    pair = {"a.0.to_q.lora_A": torch.ones(2, 6), "a.0.to_q.lora_B": torch.ones(5, 2)}
    save_file(pair, tmp_path / "mochi.safetensors")
    assert list(load_lora(tmp_path / "mochi.safetensors")) == ["a.0.to_q"]


def changed(path, change):
    """The file with other tensors and its header as it was."""
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def drop(*parts):
    return lambda t: [t.pop(k) for k in list(t) if any(part in k for part in parts)]


@pytest.mark.parametrize(
    ("format", "change", "words"),
    [
        ("comfyui", lambda t: t.update({k: v * 4 for k, v in t.items() if k.endswith("alpha")}),
         "scale 6 .* and 1.5 in its header"),
        ("comfyui", drop(".alpha"), "scale 1 .* and 1.5 in its header"),
        ("comfyui", drop("blocks.1"), "lacks blocks.1.qkv, which its header lists"),
        ("peft", lambda t: t.update(named(["base_model.model.new"], AB)), "1 modules that .* new"),
        ("peft", drop("last"), "lacks last.out"),
        ("native", lambda t: t.update({"grid.7": torch.ones(1)}), "grid.7"),
        ("native", drop("grid.1"), "lacks .*grid.1"),
    ],
)  # fmt: skip
def test_tensors_rule_over_our_own_header(tmp_path, format, change, words):
    path = make().save(tmp_path / "x", format)
    changed(path / "adapter_model.safetensors" if path.is_dir() else path, change)
    with pytest.raises(HYWUError, match=words) as caught:
        load_lora(path)
    assert str(caught.value).startswith(str(path))


def test_another_alpha_in_our_peft_folder_is_an_error(tmp_path):
    path = make().save(tmp_path / "x", "peft")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))
    with pytest.raises(HYWUError, match=r"scale 4.5 .* and 1.5 in its header"):
        load_lora(path)


@pytest.mark.parametrize("field", ["rank", "alpha", "batch_size"])
def test_a_header_that_contradicts_itself_is_an_error(tmp_path, field):
    path = make().save(tmp_path / "x")
    with safe_open(str(path), "pt") as file:
        header = json.loads(file.metadata()[HEADER])
    save_file(load_file(path), path, metadata={HEADER: json.dumps({**header, field: 7})})
    with pytest.raises(HYWUError, match=f"{field} 7"):
        load_lora(path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a.lora_A.weight": torch.ones(0, 6), "a.lora_B.weight": torch.ones(5, 0)},
        {"a.lora_A.weight": torch.ones(2, 0), "a.lora_B.weight": torch.ones(5, 2)},
        {"a.lora_A.weight": torch.ones(2, 6).int(), "a.lora_B.weight": torch.ones(5, 2).int()},
    ],
)
def test_matrices_that_are_none(tmp_path, tensors):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(HYWUError, match="both must be floating point, without a zero"):
        load_lora(tmp_path / "x.safetensors")


def test_a_rank_that_would_fill_the_memory_is_refused_before(tmp_path):
    tensors = named(["tall"], AB, rank=40_000, in_=1, out=1)
    tensors |= named([f"m{i}" for i in range(40)], AB, rank=1, in_=2000, out=2000)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(HYWUError, match=r"tall has rank 40000; with all .* GiB"):
        load_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "pattern", ["(.*)*x", "(t+)+b", "(a?){30}a{30}x", "(.|to_q)*(o|_)*!", ".*.*.*.*.*.*!"]
)
def test_patterns_that_take_others_for_ever(tmp_path, pattern):
    """Somebody else's file must not hang the server: Python's own matcher takes hours for these."""
    name = "blocks.0." + "a" * 40 + ".to_q"
    save_file(named([f"base_model.model.{name}"], AB), tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "alpha_pattern": {pattern: 1}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    started = time.process_time()
    assert load_lora(tmp_path).scale == 4.0
    assert time.process_time() - started < 2.0


def test_patterns_fit_as_in_peft():
    """Random patterns and names, against the expression that PEFT matches with."""
    rng, compared = random.Random(3), 0
    parts = (
        "a",
        "b",
        ".",
        r"\.",
        r"\d",
        "[ab]",
        "[^a.]",
        "(a|b)",
        "(?:ab|a)",
        "^",
        "$",
        "to_q",
        "0",
        r"\w",
    )
    for _ in range(1500):
        text = "".join(
            rng.choice(parts) + rng.choice(("", "", "*", "+", "?", "{2}", "{1,3}"))
            for _ in range(rng.randint(1, 4))
        )
        text = f"({text})*" if rng.random() < 0.2 else text
        try:
            theirs, ours = re.compile(rf"(.*\.)?({text})$"), Pattern(text)
        except (re.error, HYWUError):
            continue
        for _ in range(5):
            name = "".join(
                rng.choice(("a", "b", ".", "A", "0", "to_q")) for _ in range(rng.randint(0, 5))
            )
            assert ours.fits(name) == bool(theirs.match(name)), (text, name)
            compared += 1
    assert compared > 4000
    assert Pattern("(?:to_q|to_k)").fits("blocks.0.to_k")
    assert not Pattern("q").fits("blocks.0.to_q")
