"""Run inside ComfyUI's tree by test_architectures.py: figures of one or more architectures as JSON lines.

Arguments: ComfyUI's tree, this extension's folder, a folder for files, then names of architectures.
Checkpoints of random weights are loaded by stock loader nodes and sampled by the stock sampler.
"""

from __future__ import annotations

import json
import time
import traceback

from inside_comfyui import ARGUMENTS, error, load_nodes, show

# isort: split
import comfy.lora
import folder_paths
import torch
from safetensors.torch import load_file, save_file

import architectures as a  # isort: skip

import nodes as stock

folder, *names = ARGUMENTS
for kind in ("diffusion_models", "loras"):
    folder_paths.add_model_folder_path(kind, folder, is_default=True)
NODES = load_nodes()
from hywu_nodes.hywu_core.layout import LoRALayout  # noqa: E402
from hywu_nodes.hywu_core.lora import GeneratedLoRA  # noqa: E402
from hywu_nodes.hywu_core.training.base import frozen_digest  # noqa: E402

FP8 = "fp8_e4m3fn"
#: Strength at which most of the LoRA is below half a step of fp8.
FAINT = 0.05

torch.set_grad_enabled(False)


def checkpoint(name: str, weights: dict) -> str:
    file = f"{name}.safetensors"
    save_file({f"model.diffusion_model.{k}": v for k, v in weights.items()}, f"{folder}/{file}")
    folder_paths.filename_list_cache.clear()
    return file


def unet(file: str, dtype: str = "default"):
    return stock.UNETLoader().load_unet(file, dtype)[0]


def random_lora(layout, batch: int = 2) -> GeneratedLoRA:
    """Moves every target's output by about a fifth of its size."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(batch, *shape, generator=generator)

    pairs = {
        t.path: (
            draw(layout.rank, t.module.in_features) * t.module.in_features**-0.5,
            draw(t.module.out_features, layout.rank) * 0.15,
        )
        for t in layout.targets()
    }
    layers = {t.path: layout.stacks[t.stack].layers[t.layer] for t in layout.targets()}
    conv = {t.path for t in layout.targets() if t.module.conv}
    return GeneratedLoRA.from_pairs(pairs, layout.alpha, layers=layers, conv=conv)


def apply(model, lora, strength=1.0, mode="unmerged", **more):
    return NODES["HYWUApplyLoRA"]().apply(model, lora, strength, mode, **more)["result"][0]


def gap(one, two) -> float:
    return float((one - two).abs().max() / two.abs().max())


def keys(model, layout) -> dict:
    """How many targets of the layout ComfyUI's own LoRA keys lead to, and shapes that agree."""
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = dict(model.model.named_parameters())
    found = 0
    for target in layout.targets():
        key = known.get(f"diffusion_model.{target.path}")
        shape = weights[key].flatten(1).shape if key in weights else None
        found += shape == (target.module.out_features, target.module.in_features)
    total = sum(1 for _ in layout.targets())
    linear = {
        key
        for key in {v if isinstance(v, str) else v[0] for v in known.values()}
        if key in weights and weights[key].ndim == 2
    }
    return {
        "matched": found / total,
        "targets": total,
        "linear_in_stacks": sum(
            f"diffusion_model.{t.path}.weight" in linear for t in layout.targets()
        ),
        "linear": len(linear),
    }


def layout_node(model, layout) -> dict:
    """What HY-WU Model Layout says for rank 16, and what is so."""
    shown = NODES["HYWUModelLayout"]().show(model, 16, "XS", 256, 2)["result"]
    report = json.loads(shown[1])
    per_layer = [stack["tokens_per_layer"] * len(stack["layers"]) for stack in report["stacks"]]
    return {
        "targets": report["targets"],
        "tokens": report["tokens"] - sum(per_layer),
        "values": report["lora_values"] - layout.with_rank(16).num_values,
        "parameters": report["generator"]["parameters"],
        "seconds": report["generator"]["seconds"],
        "activation_bytes": report["generator"]["activation_bytes"],
        "lines": shown[0].count("\n"),
    }


def foreign(model, lora) -> dict:
    """The LoRA under names that have lost their dots, read with the model's help and without."""
    tensors = {}
    for key, value in load_file(f"{folder}/lora.safetensors").items():
        path, _, end = key.removeprefix("diffusion_model.").partition(".lora_")
        path, end = (path, f".lora_{end}") if end else (path.removesuffix(".alpha"), ".alpha")
        tensors[f"lora_unet_{path.replace('.', '_')}{end}"] = value
    save_file(tensors, f"{folder}/flat.safetensors")
    node = NODES["HYWULoadLoRA"]()
    loaded = node.load("flat.safetensors", model)["result"][0]
    return {
        "same": set(loaded) == set(lora)
        and all(torch.equal(x, y) for p in lora for x, y in zip(loaded[p], lora[p], strict=True)),
        "without_model": error(lambda: node.load("flat.safetensors")),
    }


def figures(name: str) -> dict:
    weights = a.random_weights(a.build(name), torch.float32)
    file = checkpoint("base", weights)
    del weights
    model = unet(file)
    layout = LoRALayout.of(model.model.diffusion_model, 2)
    result = {
        "model": type(model.model).__name__,
        "parameters": sum(p.numel() for p in model.model.diffusion_model.parameters()),
        "stacks": [[len(s.layers), s.layers[0], len(s.modules)] for s in layout.stacks],
        **keys(model, layout),
        "node": layout_node(model, layout),
    }
    both = random_lora(layout)
    lora = both.select(0)
    lora.save(f"{folder}/lora.safetensors", format="comfyui", overwrite=True)
    folder_paths.filename_list_cache.clear()
    result["foreign"] = foreign(model, lora)
    sample = a.sampler(name, stock.common_ksampler)
    plain = sample(model)
    before = frozen_digest(model.model.diffusion_model)
    unmerged = sample(apply(model, lora))
    loader = stock.LoraLoaderModelOnly()
    from_file = sample(loader.load_lora_model_only(model, "lora.safetensors", 1.0)[0])
    result |= {
        "finite": bool(torch.isfinite(plain).all()),
        "effect": gap(unmerged, plain),
        "merge": gap(sample(apply(model, lora, mode="merge")), from_file),
        "unmerged": gap(unmerged, from_file),
        "untouched": gap(sample(model), plain),
        "weights_same": frozen_digest(model.model.diffusion_model) == before,
    }
    batch = sample(apply(model, both), batch=2)
    other = sample(apply(model, both.select(1)), batch=2)
    result["items"] = max(
        gap(batch[:1], sample(apply(model, lora), batch=2)[:1]), gap(batch[1:], other[1:])
    )
    if a.ARCHITECTURES[name].small:
        result |= fp8(lora, sample)
    return result


def fp8(lora, sample) -> dict:
    """An fp8 copy, against the same rounded weights in float32 with the LoRA merged."""
    model = unet("base.safetensors", FP8)
    # what the loader made of the file: it leaves some weights as they were
    weights = model.model.diffusion_model.state_dict()
    rounded = sum(value.dtype == torch.float8_e4m3fn for value in weights.values())
    reference = unet(checkpoint("rounded", {k: v.float() for k, v in weights.items()}))
    plain = sample(model)
    exact = sample(apply(reference, lora, FAINT, "merge"))
    return {
        "fp8_weights": int(rounded),
        "fp8_base": gap(plain, sample(reference)),
        "fp8_effect": gap(exact, plain),
        "fp8_unmerged": gap(sample(apply(model, lora, FAINT)), exact),
        "fp8_merged": gap(sample(apply(model, lora, FAINT, "merge")), exact),
    }


for name in names:
    start = time.perf_counter()
    try:
        found = figures(name)
    except Exception:  # the test shows it beside the figures of the others
        found = {"error": traceback.format_exc()}
    found["seconds"] = time.perf_counter() - start
    show({name: found})
