"""`hywu hunyuan plan`: its bytes are those of a run at tiny size, and of meta tensors at the published one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hunyuan_golden import BASE, GENERATOR, SYSTEM, generator, golden, pipeline, source
from torch.utils.flop_counter import FlopCounterMode

from bench import hunyuan_base
from bench.measure import peak_memory
from hywu_core import HYWUError, load_generator
from hywu_core.bases.hunyuan_image3 import Pipeline, Request, open_folder
from hywu_core.bases.hunyuan_image3.attention import KVCache, Rows, Segment
from hywu_core.bases.hunyuan_image3.checkpoint import Folder, Head, stored_tensors
from hywu_core.bases.hunyuan_image3.config import HunyuanConfig
from hywu_core.bases.hunyuan_image3.editing import Denoiser
from hywu_core.bases.hunyuan_image3.model import HunyuanImage3
from hywu_core.bases.hunyuan_image3.plan import (
    activation_bytes,
    attention_operations,
    card_of,
    generator_plan,
    plan,
    step_operations,
    vae_bytes,
)
from hywu_core.bases.hunyuan_image3.quantize import quantize
from hywu_core.cli.main import main


@pytest.mark.parametrize("method", [None, "int8", "nf4"])
def test_bytes_are_those_of_a_run(method, tmp_path):
    metadata = golden("edit").metadata
    request = Request(metadata["prompt"], [source()], "", "128x128", 1)
    before = open_folder(BASE)
    everything = plan(before, method, None, 1, 1)
    budget = everything.weights - everything.experts_bytes // 3
    folder = BASE if method is None else quantize(BASE, tmp_path / "out", method)
    p = Pipeline.load(folder, system=SYSTEM, budget=budget, rest="ram")
    parts = (p.model, p.vae, p.encode_source.tower, p.encode_source.aligner)
    weights = sum(v.nbytes for m in parts for v in m.parameters()) + p.offloaded.nbytes
    kept: list[int] = []
    size = p.prompts.image(request, p.prompts.size(request))[0]
    told = plan(before, method, budget, len(size), 65)
    p.sample([request], steps=1, on_step=lambda *_: kept.append(KVCache.live()))
    assert told.device_weights == weights <= budget
    assert 0.9 < p.offloaded.traffic.nbytes / (2 * told.moved) <= 1
    assert told.kv == pytest.approx(kept[0], rel=0.1)
    if method is not None:
        # of the folder itself, as it is stored
        assert plan(open_folder(folder), None, budget, len(size), 65) == told


@pytest.mark.parametrize(
    ("hidden", "width", "k", "batch", "rows", "dtype", "full"),
    [
        (64, 48, 2, 2, 257, torch.float32, True),
        (64, 48, 2, 2, 257, torch.bfloat16, True),
        (512, 384, 4, 2, 300, torch.bfloat16, True),
        (64, 48, 2, 2, 257, torch.float32, False),
        (64, 48, 2, 1, 1500, torch.float32, False),  # a mask of its own is most of it
        (512, 384, 4, 2, 300, torch.bfloat16, False),
    ],
)
def test_activations_are_those_of_a_pass(hidden, width, k, batch, rows, dtype, full):
    """Of tokens that see all, and of text, which sees what came before it."""
    data = json.loads((BASE / "config.json").read_text("utf-8")) | {
        "hidden_size": hidden, "attention_head_dim": hidden // 4, "moe_intermediate_size": width,
        "moe_topk": k, "num_hidden_layers": 2, "num_shared_expert": 1, "vocab_size": 200,
    }  # fmt: skip
    config = HunyuanConfig.from_json(data)
    model, cache = HunyuanImage3(config).to(dtype), KVCache(config, batch, rows)
    yx = torch.arange(rows)[:, None].expand(batch, rows, 2)
    seen = [Rows((Segment(0, rows, full),))] * batch

    def run():
        x = torch.zeros(batch, rows, hidden, dtype=dtype)
        with torch.no_grad():
            return model.decode(x, yx, seen, cache)

    run()  # the keys and values are there
    planned = activation_bytes(config, batch * rows, dtype, 0 if full else rows)
    assert planned == pytest.approx(peak_memory(run), rel=0.1)


def counted(function) -> int:
    """Operations of all products that torch runs, attention's and grouped ones among them."""

    def grouped(x, weight, *_, **__):
        return 2 * x[0] * x[1] * weight[-1]

    def attention(q, k, v, *_, **__):
        return 4 * math.prod(q) * k[2]

    added = {
        torch.ops.aten._grouped_mm: grouped,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    }
    with FlopCounterMode(display=False, custom_mapping=added) as found:
        function()
    return found.get_total_flops()


@pytest.mark.parametrize("hidden", [64, 512])
@pytest.mark.parametrize("grid", [8, 24])
def test_operations_are_those_of_a_step(hidden, grid):
    """Of both branches, with attention's scores: up to half of a tiny step."""
    config = replace(
        hunyuan_base.config_of(2, tiny=True), hidden_size=hidden, head_dim=hidden // 4,
        expert_widths=(hidden * 3 // 4,) * 2,
    )  # fmt: skip
    cpu, dtype = torch.device("cpu"), torch.float32
    model = hunyuan_base.build(config, cpu, dtype, None, streamed=False).model
    sizes = replace(hunyuan_base.Sizes.tiny(), grid=grid)
    sequences = hunyuan_base.sequences(config, sizes)
    shown = hunyuan_base.source(config, sizes, cpu, dtype)
    latents, t = torch.randn(2, config.vae.latent_channels, grid, grid), torch.full((2,), 800.0)
    image, tokens = grid**2 + 1, sequences[0].target.grid.stop
    with Denoiser(model, sequences, [[shown], [shown]]) as denoiser:
        denoiser(latents, t)  # the prefix is there
        found = counted(lambda: denoiser(latents, t))
    planned = step_operations(model, 2, image, tokens)
    assert planned == pytest.approx(found, rel=0.02)
    scores = 2 * image * attention_operations(config, tokens)
    assert planned - scores < 0.98 * found, "scores are a part that shows"


def test_decoding_an_image_takes_what_the_plan_says(monkeypatch):
    """Without what a convolution takes for itself, which differs by device."""
    vae = pipeline().vae

    def only_the_output(conv, x):
        return x.new_zeros(x.shape[0], conv.out_channels, *x.shape[2:])

    monkeypatch.setattr(torch.nn.Conv3d, "forward", only_the_output)
    found = peak_memory(lambda: pipeline().decode(torch.zeros(1, 8, 8, 8)))
    assert vae_bytes(vae.config, 128 * 128, torch.float32) == pytest.approx(found, rel=0.1)


def test_a_lora_takes_what_the_plan_says():
    metadata = golden("edit").metadata
    request = Request(metadata["prompt"], [source()], "", "128x128", 1)
    lora = generator()(pipeline().condition([request]))
    found = sum(factor.numel() * 2 for path in lora for factor in lora[path])
    assert plan(open_folder(BASE), None, None, 1, 1, lora.layout.rank).lora == found


def published() -> Folder:
    """A folder of the published sizes, of which only heads exist; VAE and tower are the tiny one's."""
    data = json.loads((BASE / "config.json").read_text("utf-8"))
    data |= {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "attention_head_dim": 128, "moe_intermediate_size": 3072,
        "moe_topk": 8, "num_experts": 64, "num_shared_expert": 1, "vocab_size": 133120,
        "patch_embed_hidden_dim": 1024, "max_position_embeddings": 22800,
    }  # fmt: skip
    tiny = open_folder(BASE)
    config = HunyuanConfig.from_json(data)
    with torch.device("meta"):
        model = HunyuanImage3(config)
    others = {n: s for n, s in tiny.shapes.items() if n.startswith(("vae.", "vision_model."))}
    shapes = {n: stored.shape for n, stored in stored_tensors(model).items()} | others
    shapes |= {
        "vision_aligner.layers.0.weight": (4096, config.vision.hidden_size),
        "vision_aligner.layers.0.bias": (4096,),
        "vision_aligner.layers.2.weight": (4096, 4096),
        "vision_aligner.layers.2.bias": (4096,),
    }
    heads = {name: Head(shape, "BF16", 0, 0) for name, shape in shapes.items()}
    files = dict.fromkeys(shapes, Path("nowhere"))
    return replace(tiny, config=config, shapes=shapes, heads=heads, files=files)


def test_the_published_size():
    folder = published()
    bf16, nf4 = plan(folder, None, None, 11_100, 4097), plan(folder, "nf4", None, 11_100, 4097)
    with torch.device("meta"):
        model = HunyuanImage3(folder.config)
    banks = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert bf16.experts_bytes == 2 * banks == 154_618_822_656
    assert nf4.experts_bytes == banks * 34 // 64
    assert bf16.kv == 2 * 11_100 * 131_072
    assert bf16.lora == pytest.approx(1.446e9, rel=0.01)
    # two branches of 4,097 tokens: 0.2 PFLOP in the layers' products, a fourth of that in attention's scores
    scores = 2 * 4097 * attention_operations(folder.config, 11_100)
    assert bf16.operations - scores == pytest.approx(0.2e15, rel=0.05)
    assert 0.18 < scores / bf16.operations < 0.22
    # in float32 what isn't quantized takes twice as much
    wide = plan(folder, None, None, 11_100, 4097, dtype=torch.float32)
    assert (wide.experts_bytes, wide.kv) == (2 * bf16.experts_bytes, 2 * bf16.kv)
    offloaded = plan(folder, "nf4", 12_000_000_000, 11_100, 4097)
    assert offloaded.device_weights <= 12_000_000_000
    assert offloaded.host + offloaded.resident_layers * nf4.experts_bytes // 32 == nf4.experts_bytes
    assert offloaded.seconds("h100") < offloaded.seconds("rtx-4090")
    with pytest.raises(HYWUError, match="at least"):
        plan(folder, "nf4", 1_000_000_000, 11_100, 4097)


def test_a_generator_takes_what_it_plans_itself():
    loaded = load_generator(GENERATOR, memory_budget=1 << 40)
    loaded.chunk_bytes = 16_896 * 4 * 4096 * 2  # a GPU's
    assert generator_plan(GENERATOR, 300, None) == loaded.memory_plan(1, 300)
    with pytest.raises(HYWUError, match="at least"):
        generator_plan(GENERATOR, 300, 1000)


def test_cards_are_told_by_their_names():
    assert card_of("NVIDIA GeForce RTX 4090") == "rtx-4090"
    assert card_of("NVIDIA A100-SXM4-80GB") == "a100"
    assert card_of("cpu") is None


def test_the_command(capsys):
    assert main(["hunyuan", "plan", str(BASE), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["experts"] for each in found] == ["bfloat16", "fp8", "int8", "nf4"]
    assert main(["hunyuan", "plan", str(BASE), "--card", "h100"]) == 0
    assert "assumed rates of h100" in capsys.readouterr().out
    assert main(["hunyuan", "plan", str(BASE), "--budget", "0.0001"]) == 1
    assert "at least" in capsys.readouterr().err
    assert main(["hunyuan", "plan", str(BASE), "--json", "--generator", str(GENERATOR)]) == 0
    (first, *_) = json.loads(capsys.readouterr().out)
    assert first["device"] >= first["generator"] > 0
    assert main(["hunyuan", "plan", str(BASE), "--card", "abacus"]) == 1
