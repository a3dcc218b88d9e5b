"""A generated LoRA on GGUF-quantized copies of base models: unmerged is exact, the bytes stay as they are.

HYWU_GGUF_NODES names the folder of ComfyUI-GGUF, whose loader node is then tested as well as layers of our own.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import architectures
import comfy.sd
import folder_paths
import pytest
import torch
from hywu_nodes.hywu_core.layout import LoRALayout
from hywu_nodes.hywu_core.lora import GeneratedLoRA
from safetensors.torch import save_file

import nodes as stock

pytest.importorskip("gguf", reason="a ComfyUI of your own needs the package gguf for GGUF models")
import gguf_layers as layers

NODE_PACK = os.environ.get("HYWU_GGUF_NODES", "")
#: Largest difference of two latents that count as equal, as a share of the largest value.
EQUAL = 1e-5
#: Architectures as the files of the node pack name them, and how they are quantized.
CASES = {"SD3": ("sd3", layers.Kind.Q8_0), "Wan 2.1": ("wan", layers.Kind.Q4_0)}


def folder() -> Path:
    return Path(folder_paths.get_folder_paths("diffusion_models")[0])


def load(name: str, weights: dict) -> object:
    """By the stock loader."""
    tensors = {f"model.diffusion_model.{key}": value for key, value in weights.items()}
    folder().mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder() / f"{name}.safetensors")
    folder_paths.filename_list_cache.clear()
    return stock.UNETLoader().load_unet(f"{name}.safetensors", "default")[0]


class ByLayers:
    """The model on the layers of gguf_layers.py."""

    merges = False

    def load(self, file: Path) -> object:
        options = {"custom_operations": layers.Operations, "dtype": torch.float32}
        return comfy.sd.load_diffusion_model_state_dict(layers.read(file), model_options=options)

    def holds(self, weight: object) -> bool:
        """Whether a layer holds the file's bytes."""
        return isinstance(weight, layers.Quantized)


class ByNodePack:
    """The model as the node pack's loader gives it, computing in float32."""

    merges = True  # it adds patches where it dequantizes

    def __init__(self) -> None:
        if "gguf_pack" not in sys.modules:  # it takes its list of folders when it is imported
            spec = importlib.util.spec_from_file_location(
                "gguf_pack", f"{NODE_PACK}/__init__.py", submodule_search_locations=[NODE_PACK]
            )
            sys.modules["gguf_pack"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules["gguf_pack"])

    def load(self, file: Path) -> object:
        loader = sys.modules["gguf_pack"].NODE_CLASS_MAPPINGS["UnetLoaderGGUFAdvanced"]()
        model = loader.load_unet(file.name, "float32", "float32", False)[0]
        model.set_model_compute_dtype(torch.float32)
        return model

    def holds(self, weight: object) -> bool:
        return sys.modules["gguf_pack.dequant"].is_quantized(weight)


def random_loras(layout: LoRALayout) -> GeneratedLoRA:
    """Two, each moving every target's output by about a fifth of its size."""
    generator = torch.Generator().manual_seed(5)
    pairs = {}
    for target in layout.targets():
        module = target.module
        down = torch.randn(2, layout.rank, module.in_features, generator=generator)
        up = torch.randn(2, module.out_features, layout.rank, generator=generator)
        pairs[target.path] = (down * module.in_features**-0.5, up * 0.15)
    return GeneratedLoRA.from_pairs(pairs, layout.alpha)


def gap(one, two) -> float:
    return float((one - two).abs().max() / two.abs().max())


@pytest.mark.parametrize("way", [ByLayers, *([ByNodePack] if NODE_PACK else [])])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_unmerged_is_exact_on_quantized_weights(call, name, way):
    kind, quantized = CASES[name]
    weights = architectures.random_weights(architectures.build(name), torch.float32)
    whole = load("whole", weights)
    file = folder() / "copy.gguf"
    layers.write(file, weights, kind, quantized)
    reference = load("exact", layers.dequantized(layers.read(file)))
    how = way()
    model = how.load(file)
    network = model.model.diffusion_model
    held = [m for m in network.modules() if how.holds(getattr(m, "weight", None))]
    before = [m.weight.as_subclass(torch.Tensor).clone() for m in held]
    loras = random_loras(LoRALayout.of(network, 2))
    assert LoRALayout.of(reference.model.diffusion_model, 2) == loras.layout
    assert len(held) >= len(loras) > 10

    def applied(base, item=None, mode="unmerged"):
        lora = loras if item is None else loras.select(item)
        return call.HYWUApplyLoRA(base, lora, 1.0, mode)[0]

    sample = architectures.sampler(name, stock.common_ksampler)
    plain, merged = sample(reference), sample(applied(reference, 0, "merge"))
    # the copy is another model than the one it was made of
    assert gap(plain, sample(whole)) > 10 * EQUAL
    assert gap(sample(model), plain) < EQUAL
    assert gap(merged, plain) > 100 * EQUAL
    assert gap(sample(applied(model, 0)), merged) < EQUAL
    batch = sample(applied(model), batch=2)
    for i in range(2):
        alone = sample(applied(reference, i, "merge"), batch=2)
        assert gap(batch[i : i + 1], alone[i : i + 1]) < EQUAL
    if how.merges:
        assert gap(sample(applied(model, 0, "merge")), merged) < EQUAL
    for module, kept in zip(held, before, strict=True):
        assert torch.equal(module.weight.as_subclass(torch.Tensor), kept)
