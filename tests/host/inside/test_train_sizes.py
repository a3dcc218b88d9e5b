"""Every size of generator that Train Generator offers: weights, memory, files."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import threading
from pathlib import Path

import architectures
import pytest
import torch
from hywu_nodes.hywu_core.generator.config import SIZES as NAMED
from hywu_nodes.hywu_core.generator.config import GeneratorConfig
from hywu_nodes.hywu_core.generator.model import ParameterGenerator
from hywu_nodes.hywu_core.layout import LoRALayout
from hywu_nodes.hywu_core.training.logs import read_log
from hywu_nodes.nodes.host.train import files
from torch import Tensor
from train_node import checkpoint, interrupt_at

#: Size -> weights that a generator of its name may have.
SIZES = {"XS": (2e6, 4.2e6), "S": (16e6, 25e6), "M": (80e6, 120e6), "L": (320e6, 450e6)}
#: Real models in their full width and depth, without storage.
FULL = {
    "Wan 2.1": {},
    "Wan 2.1 14B": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
    "Flux": {"depth": 19, "depth_single_blocks": 38},
    "SDXL": {},
}


@pytest.mark.parametrize("name", FULL)
def test_a_size_is_what_its_name_says_for_a_tiny_model_and_for_real_ones(monkeypatch, name):
    """Of rank 4, reading a text encoder's 4096 channels."""
    known = architectures.ARCHITECTURES[name.removesuffix(" 14B")]
    wide = dataclasses.replace(known, options={**known.options, **FULL[name]})
    monkeypatch.setitem(architectures.ARCHITECTURES, name, wide)
    layout = LoRALayout.of(architectures.build(name), 4)
    assert NAMED.keys() == SIZES.keys()
    for size, (low, high) in SIZES.items():
        config = GeneratorConfig.of_size(layout, size, {"text": 4096})
        with torch.device("meta"):
            generator = ParameterGenerator(config)
        assert low < sum(p.numel() for p in generator.parameters()) < high


class Memory:
    """Linux's own count of this process's pages, in bytes."""

    @staticmethod
    def read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith(f"{name}:")]
        return int(line.split()[1]) * 1024

    @staticmethod
    def forget_the_most() -> None:
        # what earlier tests took and the C library kept would be used again, and not count
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def held() -> int:
    """Bytes of all tensors that Python knows of."""
    # some objects of libraries warn or fail when they are asked what they are
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_size_s_is_stopped_gone_on_with_loaded_and_generates(call, train, loaded):
    """Its memory is about what was estimated, and nothing of it stays."""
    widgets = {"name": "size_s", "generator_size": "S", "steps": 3}
    gc.collect()
    before, most = held(), None
    if Path("/proc/self/clear_refs").exists():
        Memory.forget_the_most()
        resident = Memory.read("VmRSS")
    interrupt_at(1, lambda: train(**widgets))
    if Path("/proc/self/clear_refs").exists():
        most = Memory.read("VmHWM") - resident
    gc.collect()  # as ComfyUI does between prompts
    left = [held() - before]
    report = json.loads(train(**widgets)[1])
    for thread in threading.enumerate():
        if thread.name == "hywu-digest":  # of the generator that the node gave
            thread.join()
    left.append(held() - before)
    weights, folder = report["generator_weights"], files.run_folder("size_s")
    assert SIZES["S"][0] < weights < SIZES["S"][1]
    losses = [row["loss"] for row in read_log(folder / "log.csv")]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)
    # weights, average and Muon's one moment in float32, two of the heads; the checkpoint in float16
    assert 12 * weights < (folder / "state.safetensors").stat().st_size < 12.5 * weights
    assert 2 * weights < checkpoint("size_s").stat().st_size < 2.1 * weights
    # neither of one that was stopped nor of one that ended: a copy of the weights has 4 bytes each
    assert max(left) < weights
    assert report["memory_estimate_bytes"] >= 16 * weights
    assert most is None or 0.6 < most / report["memory_estimate_bytes"] < 1.4
    with torch.inference_mode():
        made = call.HYWULoadGenerator("size_s.safetensors", "auto")[0]
        image = torch.rand(1, 40, 40, 3, generator=torch.Generator().manual_seed(0))
        condition = call.HYWUConditionEncode(made, image, "make it warm", clip=loaded[2])[0]
        lora = call.HYWUGenerateLoRA(made, condition)[0]
    values = torch.cat([lora[path].B.flatten() for path in lora])
    assert len(lora) == 20
    assert torch.isfinite(values).all()
    assert float(values.abs().max()) > 1e-4


def test_model_layout_takes_any_rank(call, loaded):
    """12 doesn't divide the generator's width."""
    report = json.loads(call.HYWUModelLayout(loaded[0], 12, "S", 64, 1)[1])
    assert SIZES["S"][0] < report["generator"]["parameters"] < SIZES["S"][1]
