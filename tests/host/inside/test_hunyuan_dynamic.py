"""HunyuanImage-3 by ComfyUI's own dynamic VRAM, on a pretended device with so many bytes for weights.

ComfyUI's patcher and casts are real; the allocator below them, which needs a driver, is exchanged for one that
counts.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sample
import pytest
import torch
from hywu_nodes.hywu_core.bases.hunyuan_image3 import open_folder, tiny
from hywu_nodes.hywu_core.bases.hunyuan_image3.passes import prefill
from hywu_nodes.hywu_core.bases.hunyuan_image3.prompts import Request
from hywu_nodes.hywu_core.bases.hunyuan_image3.quantize import quantize
from hywu_nodes.hywu_core.bases.hunyuan_image3.thinking import Sampler, think
from hywu_nodes.hywu_core.errors import HYWUError
from hywu_nodes.hywu_core.generator.checkpoints import load_generator, open_checkpoint
from hywu_nodes.nodes.host.hunyuan_image3 import load
from hywu_nodes.nodes.host.hunyuan_image3.dynamic import DynamicBank, dynamic_host
from hywu_nodes.nodes.host.hunyuan_image3.model import KEY, Row
from pretended_device import DEVICE, OnDevice, pretended

pytestmark = pytest.mark.skipif(
    not hasattr(comfy.model_patcher, "ModelPatcherDynamic"),
    reason="this ComfyUI has no dynamic VRAM",
)
#: Wide enough that ComfyUI doesn't load every matrix beforehand (16 KB).
SIZES = {"LAYERS": 2, "HIDDEN": 256, "HEAD": 64, "WIDTH": 128}
REQUEST = Request("make it red", [], "", "128x128", 1)


class Pages:
    """What `comfy_aimdo.model_vbar.ModelVBAR` is to ComfyUI: weights that stay while `room` bytes hold them."""

    room = 0
    made: Pages

    def __init__(self, size: int, device: int | None) -> None:
        self.offset, self.here, self.pins, self.faults = 0, {}, {}, []
        Pages.made = self

    def alloc(self, size: int):
        self.offset += size
        return (self, self.offset - size, size)

    def fault(self, offset: int, size: int):
        self.faults.append(offset)
        if offset not in self.here:
            if self.loaded_size() + size > Pages.room:
                return None
            signature = len(self.faults).to_bytes(8, "little")
            self.here[offset] = (torch.zeros(size, dtype=torch.uint8), signature)
        self.pins[offset] = self.pins.get(offset, 0) + 1
        return self.here[offset][1]

    def unpin(self, offset: int, size: int) -> None:
        self.pins[offset] -= 1
        assert self.pins[offset] >= 0

    def loaded_size(self) -> int:
        return sum(flat.nbytes for flat, _ in self.here.values())

    def free_memory(self, size: int) -> int:
        freed = 0
        for offset in sorted(self.here, reverse=True):
            if freed >= size:
                break
            if not self.pins[offset]:
                freed += self.here.pop(offset)[0].nbytes
        return freed

    def prioritize(self) -> None:
        pass


class NoPins:
    """Page-locked memory that ComfyUI asks for and doesn't get."""

    size = 0

    def __init__(self, *_: object) -> None:
        pass

    def truncate(self, *_: object, **__: object) -> None:
        pass


@pytest.fixture
def device(monkeypatch):
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch

    def on_device(alloc, _device):
        pages, offset, _ = alloc
        return OnDevice(pages.here[offset][0])

    def free(_device=None, torch_free_too=False):
        return (1 << 40, 0) if torch_free_too else 1 << 40

    monkeypatch.setattr(comfy_aimdo.model_vbar, "ModelVBAR", Pages)
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", NoPins)
    monkeypatch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", on_device)
    patcher = comfy.model_patcher
    monkeypatch.setattr(patcher, "CoreModelPatcher", patcher.ModelPatcherDynamic)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(mm.args, "disable_pinned_memory", True)
    monkeypatch.setattr(mm, "get_torch_device", lambda: DEVICE)
    monkeypatch.setattr(mm, "unet_offload_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(mm, "get_free_memory", free)
    monkeypatch.setattr(mm, "get_torch_device_name", lambda _: "pretended")
    return DEVICE


@pytest.fixture(scope="module", params=["stored", "nf4"])
def folder(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SIZES.items():
            patch.setattr(tiny, name, value)
        made = tiny.write_tiny(tmp_path_factory.mktemp("dynamic") / "tiny") / "base"
    return made if request.param == "stored" else quantize(made, made.parent / "nf4", "nf4")


def predicted(model) -> tuple[torch.Tensor, torch.Tensor, str]:
    """(condition, prediction of a step, text) of a model, on the CPU."""
    network, prompts = model.diffusion_model, model.reader.prompts
    states = prefill(network, [prompts.ratio(REQUEST)], [[]])
    rows = [Row(prompts, REQUEST, (), unconditional) for unconditional in (False, True)]
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    made = network(x.to(network.device), torch.full((2,), 700.0, device=network.device), rows)
    text = think(network, prompts, REQUEST, [], sampler=Sampler(), most=4)
    return states.cpu(), made.cpu(), text.cot


@contextlib.contextmanager
def on_the_cpu():
    """As the plain path's results are wanted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mm, "get_torch_device", lambda: torch.device("cpu"))
        yield


def mapped(address: int) -> str:
    """The file that an address of this process is mapped to."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(None, 5)
        start, stop = (int(each, 16) for each in span.split("-"))
        if start <= address < stop:
            return name
    return ""


def experts(model) -> list[DynamicBank]:
    return [m for m in model.diffusion_model.modules() if isinstance(m, DynamicBank)]


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_results_are_the_plain_ones_whatever_fits(device, folder, share):
    with torch.no_grad():
        plain = load.load(folder, "float32", "float32", "You edit.", True)[0]
        with on_the_cpu():
            wanted = predicted(plain.model)
        with pretended():
            patcher = load.load(folder, "float32", "float32", "You edit.")[0]
            assert patcher.is_dynamic()
            assert dynamic_host()
            Pages.room = int(share * patcher.model_size())
            mm.load_models_gpu([patcher])
            for _ in range(2):  # what stays is found again
                made = predicted(patcher.model)
                for a, b in zip(made[:2], wanted[:2], strict=True):
                    torch.testing.assert_close(a, b)
                assert made[2] == wanted[2]
                assert not any(Pages.made.pins.values()), "memory that can't be taken back"
            assert Pages.made.loaded_size() <= Pages.room
            assert (Pages.made.loaded_size() > 0) == (share > 0)


def test_the_host_is_told_what_there_is_and_takes_it_back(device, folder):
    with torch.no_grad(), pretended():
        patcher, _, _, said = load.load(folder, "stored", "float32", "You edit.")
        network = patcher.model.diffusion_model
        weights = sum(p.nbytes for p in network.parameters())
        assert patcher.model_size() == weights + mm.module_size(patcher.model.model_sampling)
        Pages.room = weights * 2
        mm.load_models_gpu([patcher])
        first = predicted(patcher.model)
        before = patcher.loaded_size()
        assert Pages.made.loaded_size() > 0.8 * weights
        mm.free_memory(1e30, DEVICE)
        assert patcher.loaded_size() == Pages.made.loaded_size() == 0
        mm.load_models_gpu([patcher])
        again = predicted(patcher.model)
        assert torch.equal(first[0], again[0])
        assert patcher.loaded_size() == before
        assert said.startswith("nf4" if folder.name == "nf4" else "bfloat16")


def test_experts_are_views_of_the_files(device, folder):
    """So a machine needs memory for the rest only; weights that hooks change are another model's, all in memory."""
    with torch.no_grad(), pretended():
        patcher = load.load(folder, "stored", "float32", "You edit.")[0]
        for bank in experts(patcher.model):
            for matrix in bank.matrices:
                assert mapped(matrix.weight.data_ptr()).endswith(".safetensors")
        found = open_folder(folder)
        plans = load.plan(found, None, None, 300, 65)
        with pytest.MonkeyPatch.context() as patch:
            enough = plans.weights - plans.experts_bytes
            patch.setattr(mm, "get_total_memory", lambda _: enough)
            load.load(folder, "stored", "float32", "You edit.")
            with pytest.raises(HYWUError, match="this machine has"):
                load.load(folder, "stored", "float32", "You edit.", disable_dynamic=True)
            patch.setattr(mm, "get_total_memory", lambda _: enough - 1)
            with pytest.raises(HYWUError, match="this machine has"):
                load.load(folder, "stored", "float32", "You edit.")
        other = patcher.get_non_dynamic_delegate()
        assert not other.is_dynamic()
        assert not experts(other.model)


def test_a_word_takes_the_experts_it_is_routed_to(device, folder):
    with torch.no_grad(), pretended():
        patcher = load.load(folder, "stored", "float32", "You edit.")[0]
        Pages.room = 0
        mm.load_models_gpu([patcher])
        network, seen = patcher.model.diffusion_model, []
        places = {m._v[1] for bank in experts(patcher.model) for m in bank.matrices}

        def told(*_: object) -> None:
            seen.append(sum(place in places for place in Pages.made.faults))

        prompts = patcher.model.reader.prompts
        for seed in range(8):  # until one writes more than a word
            request = replace(REQUEST, instruction=f"make it red {seed}")
            think(network, prompts, request, [], sampler=Sampler(), most=4, on_token=told)
            if len(seen) > 2:
                break
            seen.clear()
        words = {later - former for former, later in itertools.pairwise(seen)}
        # 2 of 8 experts, 3 banks, 2 layers
        assert words == {2 * 3 * 2}


def sampled(model, reader) -> torch.Tensor:
    """Latents of two guided steps of a stock sampler, on the CPU."""
    given = [Row(reader.prompts, REQUEST, (), unconditional) for unconditional in (False, True)]
    positive, negative = ([[torch.zeros(1, 1, 1), {KEY: [row]}]] for row in given)
    noise = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    return comfy.sample.sample(
        model, noise, 2, 2.5, "euler", "simple", positive, negative, torch.zeros(1, 8, 8, 8), denoise=1.0,
        seed=1, disable_pbar=True,
    ).cpu()  # fmt: skip


def test_a_lora_and_a_stock_sampler(call, device, folder):
    """Unmerged on every matrix: the plain way's latents; memory that was pinned for it isn't any more."""
    source = folder.parent / "generator"
    with torch.no_grad():
        generator = load_generator(source, dtype=torch.float32)
        with on_the_cpu():
            plain, _, reader, _ = load.load(folder, "float32", "float32", "You edit.", True)
            states = predicted(plain.model)[0]
            lora = generator(states)
            wanted = sampled(call.HYWUApplyLoRA(plain, lora, 1.0, "auto")[0], reader)
            without = sampled(plain, reader)
        assert (wanted - without).norm() > 0.01 * without.norm()
        with pretended():
            patcher, _, reader, _ = load.load(folder, "float32", "float32", "You edit.")
            open_checkpoint(source).config.layout.check(patcher.model.diffusion_model)
            Pages.room = patcher.model_size() // 2
            made = sampled(call.HYWUApplyLoRA(patcher, lora, 1.0, "auto")[0], reader)
            torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-4)
            assert Pages.made.faults
            assert not any(Pages.made.pins.values())


def test_on_a_cpu_it_is_the_plain_way_whatever_the_switch_says(device, folder):
    with torch.no_grad(), on_the_cpu():
        assert not dynamic_host()
        patcher = load.load(folder, "float32", "float32", "You edit.")[0]
        assert not patcher.is_dynamic()
        assert not experts(patcher.model)
        mm.load_models_gpu([patcher])
        assert predicted(patcher.model)[0].isfinite().all()
