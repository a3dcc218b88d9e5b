"""HunyuanImage-3 under ComfyUI's memory manager: sizes told, weights left behind, memory given back."""

from __future__ import annotations

import gc
import shutil
import weakref

import comfy.model_management as mm
import comfy.model_patcher
import pytest
import torch
from hunyuan_golden import BASE, GENERATOR, SYSTEM
from hywu_nodes.hywu_core import grouped
from hywu_nodes.hywu_core.bases.hunyuan_image3 import staging
from hywu_nodes.hywu_core.bases.hunyuan_image3.attention import KVCache, Norm, Rows, Segment
from hywu_nodes.hywu_core.bases.hunyuan_image3.passes import prefill
from hywu_nodes.hywu_core.bases.hunyuan_image3.placement import SLOTS
from hywu_nodes.hywu_core.bases.hunyuan_image3.prompts import Request
from hywu_nodes.hywu_core.bases.hunyuan_image3.thinking import Sampler, think
from hywu_nodes.nodes.host.hunyuan_image3.model import HostModel, HunyuanModel
from pretended_device import DEVICE, pretended
from torch._subclasses import FakeTensorMode

from hywu_core.bases.hunyuan_image3 import open_folder
from hywu_core.bases.hunyuan_image3.plan import plan
from hywu_core.bases.hunyuan_image3.quantize import quantize

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["tiny", "tiny-nf4"])
def folder(request, base):
    target = base / "models" / "hunyuan_image_3" / request.param
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        if request.param == "tiny":
            shutil.copytree(BASE, target)
        else:
            quantize(BASE, target, "nf4")
    return request.param


def test_weights_left_behind_give_the_same(call, folder):
    """Any part of the model on the device: ComfyUI counts what is there and gets back what it asks for."""
    model, *_ = call.HYWULoadHunyuanImage3(folder, "float32", "float32", SYSTEM)
    network = model.model.diffusion_model
    sequence = model.model.reader.prompts.ratio(Request("make it red", [], "", "128x128", 1))
    weights = sum(p.nbytes for p in network.parameters())
    assert model.model_size() == weights + mm.module_size(model.model.model_sampling)
    # what ComfyUI can't cast where it is used, it leaves where it is: these look to it themselves
    others = {
        type(m) for m in network.modules() if m._parameters and not hasattr(m, "comfy_cast_weights")
    }
    assert others == {Norm, torch.nn.Linear}
    routers = [m for m in network.modules() if type(m) is torch.nn.Linear]
    assert routers == [layer.mlp.gate.wg for layer in network.model.layers]
    wanted = prefill(network, [sequence], [[]])
    for room in (weights // 8, weights // 2):
        model.detach()
        assert model.loaded_size() == 0
        model.patch_model(device_to=CPU, lowvram_model_memory=room)
        assert model.model.model_lowvram
        assert 0 < model.loaded_size() < room
        assert torch.equal(prefill(network, [sequence], [[]]), wanted)
    before = model.loaded_size()
    freed = model.partially_unload(CPU, before // 3)
    assert freed >= before // 3
    assert model.loaded_size() == before - freed
    assert torch.equal(prefill(network, [sequence], [[]]), wanted)
    model.partially_load(CPU, extra_memory=1 << 40)
    assert model.loaded_size() == model.model_size()
    model.detach()


def test_memory_is_given_back(call, folder):
    """Nothing holds a model that nobody uses: no cache of ours, no list of ComfyUI's."""
    model, vae, hunyuan = call.HYWULoadHunyuanImage3(folder, "float32", "float32", SYSTEM)
    mm.load_models_gpu([model, vae.patcher, hunyuan.patcher])
    held = [
        weakref.ref(p)
        for module in (model.model, vae.first_stage_model, hunyuan.encoder.tower)
        for p in module.parameters()
    ]
    mm.unload_all_models()
    assert model.loaded_size() == 0
    del model, vae, hunyuan
    gc.collect()
    mm.cleanup_models()
    assert not any(each() is not None for each in held)
    assert KVCache.live() == 0


def test_the_loader_shows_the_plan(call, base):
    """A line per precision, in gigabytes; the generator is the one in models/hywu that fits."""
    for source, target in ((BASE, "hunyuan_image_3/tiny"), (GENERATOR, "hywu/tiny-hunyuan")):
        if not (base / "models" / target).exists():
            shutil.copytree(source, base / "models" / target)
    (text,) = call.shown("HYWULoadHunyuanImage3", "tiny", "float32", "float32", SYSTEM)["text"]
    lines = text.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["float32", "fp8", "int8", "nf4"]
    folder = open_folder(base / "models" / "hunyuan_image_3" / "tiny")
    wanted = plan(folder, None, None, 4096, 257, dtype=torch.float32)
    shown = dict(
        part.rsplit(" ", 1) for part in lines[0].split(": ")[1].split(" GB")[0].split(", ")
    )
    assert list(shown) == [
        "weights", "keys and values", "activations", "decoding the image", "LoRA", "generator", "in memory",
        "files",
    ]  # fmt: skip
    assert float(shown["in memory"]) == float(shown["weights"]) > 0
    assert float(shown["keys and values"]) == pytest.approx(wanted.kv / 1e9, rel=0.01)
    assert float(shown["files"]) == pytest.approx(wanted.disk / 1e9, rel=0.01)
    assert float(shown["generator"]) > 0
    assert "GB copied by a pass" in lines[0]


@pytest.mark.parametrize("some", [False, True])
def test_experts_in_host_memory_go_through_slots(call, folder, some, monkeypatch):
    """With values, on a device that holds a part of the weights: the same results; each routed expert once a pass."""
    inputs = ("float32", "float32", SYSTEM)
    request = Request("make it red", [], "", "128x128", 1)
    with torch.no_grad():
        model, *_ = call.HYWULoadHunyuanImage3(folder, *inputs)
        sequence = model.model.reader.prompts.ratio(request)
        wanted = prefill(model.model.diffusion_model, [sequence], [[]])
        monkeypatch.setattr(mm, "get_torch_device", lambda: DEVICE)
        with pretended():
            network = model.model.diffusion_model
            patcher = comfy.model_patcher.ModelPatcher(model.model, DEVICE, CPU)
            banks = network.staging._banks
            for percent in range(99 if some else 0, -1, -1):
                room = patcher.model_size() * percent // 100 or 1
                patcher.detach()
                patcher.patch_model(device_to=DEVICE, lowvram_model_memory=room)
                away = [b for b in banks if next(b.parameters()).device == CPU]
                if away:
                    break
            assert 0 < len(away) < len(banks) if some else len(away) == len(banks)
            traffic = network.staging.traffic
            made = prefill(network, [sequence], [[]])
            torch.testing.assert_close(made.cpu(), wanted)
            # the sequence has every expert routed to
            assert traffic.matrices == 8 * len(away)
            assert traffic.nbytes == sum(b.matrix_bytes * 8 for b in away)
            assert traffic.staged <= SLOTS
            assert network.staging._slots is None
            before = traffic.matrices
            think(network, model.model.reader.prompts, request, [], sampler=Sampler(), most=1)
            assert traffic.matrices - before == 8 * len(away), "the first word is the prefill's"
            think(network, model.model.reader.prompts, request, [], sampler=Sampler(), most=2)
            assert traffic.matrices - before == (2 * 8 + 2) * len(away), "then a word's two experts"
            patcher.detach()


def apply(module, change, recurse=True):
    """torch.nn.Module's own exchanges tensors in place, which pretended ones refuse."""
    for each in module.modules():
        for kept in (each._parameters, each._buffers):
            for leaf, value in kept.items():
                if value is not None:
                    made = change(value)
                    parameter = kept is each._parameters
                    kept[leaf] = (
                        torch.nn.Parameter(made, requires_grad=False) if parameter else made
                    )
    return module


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_a_pass_runs_on_the_device_wherever_weights_are(call, base, monkeypatch, share):
    """On a pretended CUDA device, where a product of tensors of two devices is an error."""
    target = base / "models" / "hunyuan_image_3" / "tiny"
    if not target.exists():
        shutil.copytree(BASE, target)
    config = call.HYWULoadHunyuanImage3("tiny", "float32", "float32", SYSTEM)[2].prompts.config
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(torch.nn.Module, "_apply", apply)
    monkeypatch.setattr(mm, "get_torch_device", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(grouped, "_has_grouped_product", lambda x, weight: True)
    spread = [
        round(i * 80 / 8) for i in range(9)
    ]  # values are pretended, too: experts have equal shares
    monkeypatch.setattr(staging, "routed", lambda ends: (spread, list(range(8))))
    with FakeTensorMode():
        network = HostModel(config).bfloat16().requires_grad_(False)
        patcher = comfy.model_patcher.ModelPatcher(HunyuanModel(network, None, 3.0), cuda, CPU)
        room = int(share * sum(p.nbytes for p in network.parameters())) or 1
        patcher.patch_model(device_to=cuda, lowvram_model_memory=room)
        where = {p.device.type for p in network.parameters()}
        assert where == ({"cpu"} if share == 0 else {"cpu", "cuda"})
        x = network.model.wte(torch.zeros(1, 40, dtype=torch.int64, device=network.device))
        yx, seen = torch.zeros(1, 40, 2, dtype=torch.int64), [Rows((Segment(0, 40, True),))]
        time = network.time_embed_2(torch.zeros(1, device=network.device), torch.bfloat16)
        traffic = network.staging.traffic
        with torch.no_grad():
            made = network.decode(x, yx, seen)
            away = [b for b in network.staging._banks if b.weight.device.type == "cpu"]
            assert len(away) == {0.0: 9, 0.3: traffic.chunks, 0.7: traffic.chunks}[share]
            assert traffic.chunks == len(away)
            assert traffic.nbytes == sum(b.weight.nbytes for b in away)
            assert network.staging._slots is None
            image = network.final_layer(made, time, (8, 5))
            assert network.logits(made).device.type == "cuda"
        assert image.device.type == "cuda"
        assert patcher.loaded_size() <= room
