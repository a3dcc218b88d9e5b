"""The same LoRA as native, PEFT and ComfyUI files, and foreign files read into one rank and alpha."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hywu_core import GeneratedLoRA, HYWUError, LoRALayout, inject, load_lora
from hywu_core.files import HEADER
from hywu_core.formats import lora_header, save_lora
from hywu_core.layout import Module, Stack
from hywu_core.tokens import token_grid

LAYOUT = LoRALayout(
    (
        Stack(
            ("blocks.0", "blocks.1"),
            (
                Module("qkv", 6, 18),
                Module("mlp.experts.w1", 6, 5, 3),
                Module("conv", 6, 4, conv=True),
            ),
        ),
        Stack(("last",), (Module("out", 6, 7),)),
    ),
    2,
    3.0,
)


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
    with pytest.raises(HYWUError, match="no module of the base"):
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
