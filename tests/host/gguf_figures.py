"""Run inside ComfyUI's tree by test_gguf.py: a LoRA unmerged on a GGUF-quantized copy, figures as JSON.

Arguments: ComfyUI's tree, this extension's folder, a folder for files, and for the loader node that people
use the folder of ComfyUI-GGUF; without it layers of our own hold the quantized weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

from inside_comfyui import ARGUMENTS, load_as, load_nodes, show

# isort: split
import comfy.sd
import folder_paths
import torch
from safetensors.torch import save_file

import architectures as a  # isort: skip
import gguf_layers as g  # isort: skip

import nodes as stock

FOLDER, NODE_PACK = Path(ARGUMENTS[0]), ARGUMENTS[1:]
folder_paths.add_model_folder_path("diffusion_models", str(FOLDER), is_default=True)
NODES = load_nodes()
from hywu_nodes.hywu_core.layout import LoRALayout  # noqa: E402
from hywu_nodes.hywu_core.lora import GeneratedLoRA  # noqa: E402

torch.set_grad_enabled(False)
# After the folder above is known: the pack takes its list of folders when it is imported.
PACK = [load_as("gguf_pack", f"{path}/__init__.py", [path]) for path in NODE_PACK]
#: Architectures as the files of the node pack name them.
ARCHITECTURES = {"SD3": "sd3", "Wan 2.1": "wan"}


def random_loras(layout) -> GeneratedLoRA:
    """Two, each moving every target's output by about a fifth of its size."""
    generator = torch.Generator().manual_seed(5)
    pairs = {}
    for target in layout.targets():
        module = target.module
        down = torch.randn(2, layout.rank, module.in_features, generator=generator)
        up = torch.randn(2, module.out_features, layout.rank, generator=generator)
        pairs[target.path] = (down * module.in_features**-0.5, up * 0.15)
    return GeneratedLoRA.from_pairs(pairs, layout.alpha)


def apply(model, lora, mode="unmerged"):
    return NODES["HYWUApplyLoRA"]().apply(model, lora, 1.0, mode)["result"][0]


def gap(one, two) -> float:
    return float((one - two).abs().max() / two.abs().max())


def figures(name: str, kind) -> dict:
    weights = a.random_weights(a.build(name), torch.float32)
    file = FOLDER / "copy.gguf"
    rounded = g.write(file, weights, ARCHITECTURES[name], kind)
    state = g.read(file)
    exact = {f"model.diffusion_model.{k}": v for k, v in g.dequantized(state).items()}
    save_file(exact, FOLDER / "exact.safetensors")
    folder_paths.filename_list_cache.clear()
    reference = stock.UNETLoader().load_unet("exact.safetensors", "default")[0]
    model = by_node(file) if PACK else by_layers(state)
    network = model.model.diffusion_model
    held = [m for m in network.modules() if is_held(getattr(m, "weight", None))]
    loras = random_loras(LoRALayout.of(network, 2))
    before = [m.weight.as_subclass(torch.Tensor).clone() for m in held]
    sample = a.sampler(name, stock.common_ksampler)
    plain = sample(reference)
    merged = [sample(apply(reference, loras.select(i), "merge")) for i in range(2)]
    batch = sample(apply(model, loras), batch=2)
    other = sample(apply(reference, loras.select(1), "merge"), batch=2)
    first = sample(apply(reference, loras.select(0), "merge"), batch=2)
    found = (
        {"merge": gap(sample(apply(model, loras.select(0), "merge")), merged[0])} if PACK else {}
    )
    return {
        **found,
        "rounded": rounded,
        "held": len(held),
        "targets": len(loras),
        "same_layout": LoRALayout.of(reference.model.diffusion_model, 2) == loras.layout,
        "rounding": gap(plain, sample(unrounded(weights))),
        "base": gap(sample(model), plain),
        "effect": gap(merged[0], plain),
        "unmerged": gap(sample(apply(model, loras.select(0))), merged[0]),
        "items": max(gap(batch[:1], first[:1]), gap(batch[1:], other[1:])),
        "untouched": all(
            torch.equal(m.weight.as_subclass(torch.Tensor), kept)
            for m, kept in zip(held, before, strict=True)
        ),
    }


def by_layers(state: dict):
    """The model on the layers of gguf_layers.py."""
    options = {"custom_operations": g.Operations, "dtype": torch.float32}
    return comfy.sd.load_diffusion_model_state_dict(state, model_options=options)


def by_node(file: Path):
    """The model as the node pack's loader gives it, computing in float32."""
    loader = PACK[0].NODE_CLASS_MAPPINGS["UnetLoaderGGUFAdvanced"]()
    model = loader.load_unet(file.name, "float32", "float32", False)[0]
    model.set_model_compute_dtype(torch.float32)
    return model


def is_held(weight) -> bool:
    """Whether a layer holds the file's bytes."""
    if PACK:
        return sys.modules["gguf_pack.dequant"].is_quantized(weight)
    return isinstance(weight, g.Quantized)


def unrounded(weights: dict):
    save_file(
        {f"model.diffusion_model.{k}": v for k, v in weights.items()}, FOLDER / "whole.safetensors"
    )
    folder_paths.filename_list_cache.clear()
    return stock.UNETLoader().load_unet("whole.safetensors", "default")[0]


CASES = (("SD3", g.Kind.Q8_0), ("Wan 2.1", g.Kind.Q4_0))
show({f"{name}, {kind.name}": figures(name, kind) for name, kind in CASES})
