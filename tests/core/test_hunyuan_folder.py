"""Official folders: what is read of them, and what is said of a bad one before anything is allocated."""

from __future__ import annotations

import json
import shutil
import struct
import sys

import pytest
import torch
from hunyuan_golden import BASE, GENERATOR, SYSTEM, copy_folder, edit_json, pipeline, source
from safetensors.torch import load_file, save_file

from hywu_core import HYWUError
from hywu_core.bases.hunyuan_image3 import Pipeline, Prompts, Request, open_folder
from hywu_core.bases.hunyuan_image3 import checkpoint as reading
from hywu_core.bases.hunyuan_image3.pipeline import build
from hywu_core.bases.hunyuan_image3.system_prompt import own_prompt, system_prompt
from hywu_core.bases.hunyuan_image3.tiny import write_tiny
from hywu_core.generator.checkpoints import load_generator, open_checkpoint


@pytest.fixture(autouse=True)
def nothing_is_allocated(request, monkeypatch):
    """Tests of bad folders fail when a weight is read."""
    if "refused" in request.node.name:

        def read(*_args, **_options):
            raise AssertionError("weights were read")

        monkeypatch.setattr(reading.Folder, "fill", read)


def load(folder, **options):
    return Pipeline.load(folder, dtype=torch.float32, system=SYSTEM, **options)


def test_any_number_of_shards(tmp_path):
    """One file without an index, and seven with one, load as the three of the release's form."""
    tensors = {}
    for shard in BASE.glob("*.safetensors"):
        tensors |= load_file(shard)
    one = copy_folder(tmp_path / "one")
    for shard in one.glob("model*"):
        shard.unlink()
    save_file(tensors, one / "model.safetensors")
    seven = copy_folder(tmp_path / "seven")
    for shard in seven.glob("model*"):
        shard.unlink()
    names, where = sorted(tensors), {}
    for i in range(7):
        file = f"model-{i + 1:05d}-of-00007.safetensors"
        save_file({n: tensors[n] for n in names[i::7]}, seven / file)
        where |= dict.fromkeys(names[i::7], file)
    index = {"metadata": {}, "weight_map": where}
    (seven / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    wanted = pipeline().model.state_dict()
    for folder in (one, seven):
        state = load(folder).model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in wanted.items())


def test_experts_are_banks_with_up_and_gate_apart():
    tensors = {}
    for shard in BASE.glob("*.safetensors"):
        tensors |= load_file(shard)
    experts = pipeline().model.model.layers[2].mlp.experts
    for e in range(8):
        name = f"model.layers.2.mlp.experts.{e}"
        up, gate = tensors[f"{name}.gate_and_up_proj.weight"].float().chunk(2)
        assert torch.equal(experts.w3.weight[e], up)
        assert torch.equal(experts.w1.weight[e], gate)
        assert torch.equal(experts.w2.weight[e], tensors[f"{name}.down_proj.weight"].float())


def test_a_layer_can_be_loaded_by_itself():
    folder = open_folder(BASE)
    layer = build(folder).model.model.layers[1]
    folder.fill(layer, "model.layers.1.", dtype=torch.float32)
    wanted = pipeline().model.model.layers[1].state_dict()
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in wanted.items())


def test_sizes_that_nothing_assumes(tmp_path):
    """Another number of experts, top-k and shared experts per layer, and a shift factor."""
    folder = copy_folder(tmp_path / "base", moe_topk=3, num_shared_expert=[2, 1, 1])
    data = json.loads((folder / "config.json").read_text("utf-8"))
    edit_json(folder / "config.json", vae=data["vae"] | {"shift_factor": 0.5})
    config = open_folder(folder).config
    assert (config.top_k, config.shared_experts) == ((3, 3, 3), (2, 1, 1))
    assert config.vae.shift_factor == 0.5
    with pytest.raises(HYWUError, match=r"shared_mlp.gate_and_up_proj.weight is \[96, 64\]"):
        load(folder)


# -- refused ---------------------------------------------------------------------------------------------


def test_refused_another_models_folder(tmp_path):
    folder = copy_folder(tmp_path / "base", model_type="llama")
    with pytest.raises(HYWUError, match="model_type is 'llama'"):
        load(folder)
    with pytest.raises(HYWUError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(HYWUError, match=r"no config\.json"):
        load(tmp_path)
    with pytest.raises(HYWUError, match="model_type is 'parameter_generator'"):
        load(GENERATOR)
    copy_folder(tmp_path / "other", cond_token_attn_type="causal")
    with pytest.raises(HYWUError, match="cond_token_attn_type is 'causal'"):
        load(tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts": None}, "the key 'num_experts' is missing"),
        ({"num_hidden_layers": "three"}, "a value is not of its type"),
        ({"moe_topk": [2, 2]}, "moe_topk lists 2 values for num_hidden_layers 3"),
        ({"moe_topk": 9}, "moe_topk 9 is more than num_experts 8"),
        ({"num_key_value_heads": 3}, "4 is no multiple of num_key_value_heads 3"),
        ({"vae": {}}, "the key 'block_out_channels' is missing"),
    ],
)
def test_refused_configs(tmp_path, changes, said):
    folder = copy_folder(tmp_path / "base", **changes)
    with pytest.raises(HYWUError, match=said) as error:
        load(folder)
    assert str(folder / "config.json") in str(error.value)


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("", "num_hidden_layers", 10**9, "num_hidden_layers 1e"),
        ("", "num_experts", 10**6, "num_experts 1,000,000, the files hold 8"),
        ("", "hidden_size", 10**30, "hidden_size is a number of many digits"),
        ("vae", "layers_per_block", 10**6, "layers_per_block 1,000,000, the files hold"),
        ("vit", "num_hidden_layers", 10**6, "num_hidden_layers 1,000,000, the files hold"),
    ],
)
def test_refused_counts_of_which_nothing_is_built(tmp_path, part, key, value, said, monkeypatch):
    monkeypatch.setattr("hywu_core.bases.hunyuan_image3.pipeline.build", None)
    folder = copy_folder(tmp_path / "base")
    data = json.loads((folder / "config.json").read_text("utf-8"))
    (data[part] if part else data)[key] = value
    (folder / "config.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(HYWUError, match=said):
        load(folder)


def test_refused_the_base_variant_with_an_edit(tmp_path):
    folder = copy_folder(tmp_path / "base")
    edit_json(folder / "generation_config.json", sequence_template="pretrain")
    prompts = Prompts.open(folder, SYSTEM)
    prompts.check(Request("a cat", [], size="256x256"))
    with pytest.raises(HYWUError, match=r"base model.*HunyuanImage-3\.0-Instruct"):
        prompts.check(Request("a cat", [source()], size="256x256"))


def test_refused_shards_that_are_missing_truncated_or_twice(tmp_path):
    folder = copy_folder(tmp_path / "base")
    second = folder / "model-0002-of-0003.safetensors"
    whole = second.read_bytes()
    second.unlink()
    with pytest.raises(HYWUError, match=r"names 3 shards, of which model-0002\S+ is missing"):
        load(folder)
    second.write_bytes(whole[:-1000])
    with pytest.raises(HYWUError, match=f"has {len(whole) - 1000:,} bytes .* {len(whole):,}"):
        load(folder)
    second.write_bytes(whole[:100])
    with pytest.raises(HYWUError, match="not a whole safetensors file"):
        load(folder)
    second.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(HYWUError, match="not a whole safetensors file"):
        load(folder)
    second.write_bytes(whole)
    (folder / "model.safetensors.index.json").unlink()
    shutil.copy(second, folder / "again.safetensors")
    with pytest.raises(HYWUError, match=r"lies in again\.safetensors and in model-0002"):
        load(folder)


def test_refused_an_index_that_leads_elsewhere(tmp_path):
    folder = copy_folder(tmp_path / "base")
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text("utf-8"))
    data["weight_map"]["lm_head.weight"] = "../../elsewhere.safetensors"
    index.write_text(json.dumps(data), encoding="utf-8")
    (tmp_path.parent / "elsewhere.safetensors").write_bytes(b"")
    with pytest.raises(HYWUError, match="elsewhere.safetensors is missing"):
        load(folder)
    index.write_text("[]", encoding="utf-8")
    with pytest.raises(HYWUError, match=r"index\.json"):
        load(folder)


def test_refused_keys_and_shapes_in_one_error(tmp_path):
    folder = copy_folder(tmp_path / "base")
    shard = folder / "model-0003-of-0003.safetensors"
    tensors = load_file(shard)
    tensors["model.ln_f.weight"] = torch.zeros(65)
    tensors["model.strange"] = torch.zeros(1)
    del tensors["model.layers.1.mlp.experts.3.down_proj.weight"]
    save_file(tensors, shard)
    with pytest.raises(HYWUError) as error:
        load(folder)
    for said in (
        "1 tensors are missing: model.layers.1.mlp.experts.3.down_proj.weight",
        "1 tensors are unknown: model.strange",
        "model.ln_f.weight is [65], config.json says [64]",
        str(folder),
    ):
        assert said in str(error.value)


def test_refused_without_tokenizer_or_system_prompt(tmp_path):
    folder = copy_folder(tmp_path / "base")
    with pytest.raises(HYWUError, match=r"no system_prompt\.py, which holds .* 'en_unified'"):
        Pipeline.load(folder)
    tokenizer = folder / "tokenizer.json"
    text = tokenizer.read_text("utf-8")
    tokenizer.unlink()
    with pytest.raises(HYWUError, match=r"no tokenizer\.json"):
        load(folder)
    tokenizer.write_text("{", encoding="utf-8")
    with pytest.raises(HYWUError, match=r"tokenizer\.json: can't be read"):
        load(folder)
    tokenizer.write_text(text.replace("<joint_img_sep>", "<other>"), encoding="utf-8")
    with pytest.raises(HYWUError, match="has no token <joint_img_sep>"):
        load(folder)


def test_refused_a_generator_for_another_number_of_layers_or_experts(tmp_path):
    for key, value, said in (
        ("num_base_model_layers", 2, "has 3 layers, the generator writes LoRAs for 2"),
        ("num_base_model_layers", 5, "has 3 layers, the generator writes LoRAs for 5"),
    ):
        target = tmp_path / f"{key}{value}"
        shutil.copytree(GENERATOR, target)
        edit_json(target / "config.json", **{key: value})
        layout = open_checkpoint(target).config.layout
        with pytest.raises(HYWUError, match=said):
            load(BASE, layout=layout)
    target = tmp_path / "experts"
    shutil.copytree(GENERATOR, target)
    data = json.loads((target / "config.json").read_text("utf-8"))
    data["pg_mapping"]["mlp.experts"]["num_experts"] = 4
    (target / "config.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(HYWUError, match="has 8 experts, the generator writes LoRAs for 4"):
        load(BASE, layout=open_checkpoint(target).config.layout)


def test_no_code_of_a_folder_runs(tmp_path):
    folder = copy_folder(tmp_path / "base", auto_map={"AutoModel": "evil.Evil"})
    evil = "import sys\nsys.modules['evil_was_here'] = sys\nunified_system_prompt_en = 'Hello.'\n"
    for name in ("system_prompt.py", "evil.py", "modeling_hunyuan.py"):
        (folder / name).write_text(evil, encoding="utf-8")
    loaded = Pipeline.load(folder, dtype=torch.float32)
    assert loaded.prompts.system == "Hello."
    assert "evil_was_here" not in sys.modules


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("unified_system_prompt_en = 'a'\nt2i_system_prompt_en = 'b'", "a"),
        ("X: str = 'only'", "only"),
        ('EN_UNIFIED = """\nmany\nlines\n""".strip()', "many\nlines"),
        ("en_unified = 'a' + 'b'", "ab"),
        ("en_unified_long = 'x'\nen_unified = 'y'", "y"),
        ("first = 'a'\nPROMPTS = {'en_unified': [first], 'en_vanilla': ['b']}", "a"),
        ("PROMPTS = dict(en_unified='a', other='b')", "a"),
        ("class Prompts:\n    x = 'b'\n    EnUnified: str = 'a'", "a"),
        ("def en_unified():\n    return 'a'\nother = 'b'", "a"),
        ("import os\nif os.name:\n    UNIFIED_EN, b = 'a', 'c'", "a"),
        ("WHO = 'you'\nen_unified = f'a {WHO}'\nb = f'{os.name}'", "a you"),
        ("en_unified = '\\n'.join(['a', 'b'])\nc = ''", "a\nb"),
        ("en_unified = textwrap.dedent('  a\\n    b')\nc = ''", "a\n  b"),
        ("PROMPTS = {}\nPROMPTS['en_unified'] = 'a'\nb = 'c'", "a"),
        ("\ufeffen_unified = 'a'\nb = 'c'", "a"),
        ("en_unified = 'a'\nen_unified += 'b'\nc = 'd'", "ab"),
        ("en_unified = 'a'\nen_unified = 'b'\nc = 'd'", "b"),
        ("def en_unified():\n    x = 'l'\n    return x\nx = 'g'\nunified_en_b = 'a'", "a"),
        ("en_recaption = 'x'\nunified_system_prompt_en = 'a'\nen_think_recaption = 'y'", "a"),
    ],
)
def test_a_system_prompt_is_read_as_a_constant(tmp_path, code, found):
    (tmp_path / "system_prompt.py").write_text(code, encoding="utf-8")
    assert system_prompt(tmp_path, "en_unified") == found


def test_system_prompts_otherwise(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("Mine.", encoding="utf-8")
    assert system_prompt(tmp_path, "en_unified", str(text)) == "Mine."
    assert system_prompt(tmp_path, "en_unified", text) == "Mine."
    assert system_prompt(tmp_path, "en_unified", "Two\nlines.") == "Two\nlines."
    assert system_prompt(tmp_path, "en_unified", "") == ""
    assert system_prompt(tmp_path, "none") == ""
    (tmp_path / "system_prompt.py").write_text("a = 'x'\nb = 'y'\nc = open('z')", encoding="utf-8")
    with pytest.raises(HYWUError, match=r"has a \(1 characters\), b \(1 characters\)\. Name one"):
        system_prompt(tmp_path, "en_unified")
    # and that is a way out
    assert system_prompt(tmp_path, "en_unified", "system_prompt.py:b") == "y"
    assert own_prompt(tmp_path, "", "system_prompt.py:b") == "y"
    with pytest.raises(HYWUError, match=r"no string constant c\. It has a"):
        system_prompt(tmp_path, "en_unified", "system_prompt.py:c")
    (tmp_path / "system_prompt.py").write_text("x = 1", encoding="utf-8")
    with pytest.raises(HYWUError, match="It has none"):
        system_prompt(tmp_path, "en_unified")
    (tmp_path / "system_prompt.py").write_text("def", encoding="utf-8")
    with pytest.raises(HYWUError, match="not Python"):
        system_prompt(tmp_path, "en_unified")


@pytest.mark.parametrize(
    "more",
    ["en_unified += more()", "en_unified = more(en_unified)", "if x:\n    en_unified += 'z'"],
)
def test_a_part_of_a_system_prompt_is_not_taken(tmp_path, more):
    code = f"en_unified = 'a'\nb = 'c'\nd = 'e'\n{more}\n"
    (tmp_path / "system_prompt.py").write_text(code, encoding="utf-8")
    with pytest.raises(HYWUError, match=r"named after the mode 'en_unified'\. It has b"):
        system_prompt(tmp_path, "en_unified")
    # and no mode is no reason to take just any
    with pytest.raises(HYWUError, match="mode ''"):
        system_prompt(tmp_path, "", "system_prompt.py")


def test_a_graphs_text_reads_no_other_file(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("Secret.", encoding="utf-8")
    with pytest.raises(HYWUError, match="no system prompt from a file outside"):
        Prompts.open(BASE, str(text), files=False)
    with pytest.raises(HYWUError, match="no system prompt from a file outside"):
        own_prompt(BASE, "en_unified", "../system_prompt.py:x")
    assert Prompts.open(BASE, "Edit it.", files=False).system == "Edit it."
    assert Prompts.open(BASE, str(text)).system == "Secret."


@pytest.mark.parametrize("distilled", [False, True])
def test_a_tiny_folder_of_our_own(tmp_path, distilled):
    """Written, loaded and run; the same bytes for the same seed."""
    path = write_tiny(tmp_path / "tiny", distilled=distilled)
    again = write_tiny(tmp_path / "again", distilled=distilled)
    for file in path.rglob("*.safetensors"):
        assert file.read_bytes() == (again / file.relative_to(path)).read_bytes()
    generator = load_generator(path / "generator", dtype=torch.float32)
    p = Pipeline.load(path / "base", dtype=torch.float32, layout=generator.config.layout)
    request = Request("make it red", [source()], size="128x128")
    lora = generator(p.condition([request]))
    plain, edited = (p.sample([request], given, steps=2) for given in (None, lora))
    assert torch.isfinite(edited).all()
    assert not torch.allclose(plain, edited, atol=1e-3)
    with pytest.raises(HYWUError, match="exists already"):
        write_tiny(tmp_path / "tiny")
