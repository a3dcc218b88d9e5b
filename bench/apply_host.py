"""The part of bench/apply.py that runs in ComfyUI's tree; prints its figures as one line of JSON.

Arguments: ComfyUI's tree, this extension's folder, a folder to write to, the options as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from inside import ARGUMENTS, EXTENSION, load_as, load_nodes, show

# isort: split
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.ldm.wan.model import WanModel
from safetensors.torch import save_file
from tqdm import tqdm

import nodes as stock

FOLDER, options = ARGUMENTS[0], json.loads(ARGUMENTS[1])
for kind in ("diffusion_models", "loras"):
    folder_paths.add_model_folder_path(kind, FOLDER, is_default=True)
NODES = load_nodes()
from hywu_nodes.hywu_core.layout import LoRALayout  # noqa: E402
from hywu_nodes.hywu_core.lora import GeneratedLoRA  # noqa: E402

clocks_of = load_as("measure", f"{EXTENSION}/bench/measure.py")
CLOCKS, summary = clocks_of.CLOCKS, clocks_of.summary

torch.set_grad_enabled(False)
comfy.utils.PROGRESS_BAR_ENABLED = False

Seconds = dict[str, float]


@dataclass
class Case:
    """A MODEL with what its sampler needs.

    inputs: batch -> (positive, negative, latent).
    """

    name: str
    about: str
    model: Any
    inputs: Callable[[int], tuple[list, list, dict]]
    exclude: tuple[str, ...] = ()

    def sample(self, model: Any, batch: int, steps: int) -> torch.Tensor:
        positive, negative, latent = self.inputs(batch)
        return stock.common_ksampler(
            model, 1, steps, 1.0, "euler", "simple", positive, negative, latent
        )[0]["samples"]

    def loras(self, rank: int, count: int, seed: int = 5) -> GeneratedLoRA:
        """`count` random LoRAs on every module of the model's blocks."""
        layout = LoRALayout.of(self.model.model.diffusion_model, rank, exclude=self.exclude)
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(count, *shape, generator=generator)

        pairs = {
            t.path: (
                draw(rank, t.module.in_features) * t.module.in_features**-0.5,
                draw(t.module.out_features, rank) * 0.15,
            )
            for t in layout.targets()
        }
        layers = {t.path: layout.stacks[t.stack].layers[t.layer] for t in layout.targets()}
        return GeneratedLoRA.from_pairs(pairs, layout.alpha, layers=layers)


def editor(tiny: bool) -> Case:
    """The bundled editor on small images."""
    model, clip, vae = NODES["HYWULoadBundledEditor"]().load()
    size = 64
    (text,) = stock.CLIPTextEncode().encode(clip, "blur the image")
    pairs = {}

    def inputs(batch: int) -> tuple[list, list, dict]:
        if batch not in pairs:
            pixels = torch.rand(batch, size, size, 3, generator=torch.Generator().manual_seed(0))
            # what InstructPixToPixConditioning makes of them
            latent = vae.encode(pixels)
            source = [[tokens, {**more, "concat_latent_image": latent}] for tokens, more in text]
            pairs[batch] = source, source, {"samples": torch.zeros_like(latent)}
        return pairs[batch]

    return Case("bundled editor", f"{size} x {size} pixels", model, inputs, ("text.*",))


def wan(tiny: bool) -> Case:
    """Wan 2.1 text to video, one frame; ComfyUI derives the width from the weights."""
    width, layers, side = (128, 1, 8) if tiny else (512, 4, 32)
    network = WanModel(
        model_type="t2v", dim=width, ffn_dim=4 * width, num_heads=width // 128, num_layers=layers,
        in_dim=16, out_dim=16, patch_size=(1, 2, 2), freq_dim=256, dtype=torch.float32,
        device="cpu", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, value in network.state_dict().items():
        fan = value[0].numel() if value.ndim > 1 else 1
        noise = torch.randn(value.shape, generator=generator)
        scale = key.endswith("weight") and value.ndim == 1  # of a norm
        weights[f"model.diffusion_model.{key}"] = (
            1 + 0.05 * noise if scale else noise * (0.7 * fan**-0.5 if fan > 1 else 0.02)
        )
    save_file(weights, f"{FOLDER}/wan.safetensors")
    model = stock.UNETLoader().load_unet("wan.safetensors", "default")[0]
    text = [[torch.randn(1, 32, 4096, generator=generator), {"pooled_output": None}]]

    def inputs(batch: int) -> tuple[list, list, dict]:
        return text, text, {"samples": torch.zeros(batch, 16, 1, side, side)}

    about = f"width {width}, {layers} layers, {side * side // 4} tokens"
    return Case("Wan 2.1", about, model, inputs)


def clocks() -> Seconds:
    return {name: read() for name, read in CLOCKS.items()}


def watched(model: Any) -> tuple[Any, list[tuple[Seconds, Seconds]]]:
    """A clone of the MODEL that notes the clocks before and after each call of the network."""
    calls: list[tuple[Seconds, Seconds]] = []

    def wrapper(apply_model: Callable, args: dict) -> torch.Tensor:
        before = clocks()
        result = apply_model(args["input"], args["timestep"], **args["c"])
        calls.append((before, clocks()))
        return result

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model, calls


def rounds(functions: dict[str, Callable[[], Seconds]], title: str) -> dict:
    """{function: {clock: [seconds]}}, run in turn after one warm-up each."""
    times: dict = {name: {clock: [] for clock in CLOCKS} for name in functions}
    for i in tqdm(range(options["repeats"] + 1), desc=title, unit="round"):
        done = {name: function() for name, function in functions.items()}
        for name, seconds in done.items() if i else ():
            for clock, value in seconds.items():
                times[name][clock].append(value)
    return times


def gap(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())


def apply(model: Any, lora: GeneratedLoRA, mode: str) -> Any:
    return NODES["HYWUApplyLoRA"]().apply(model, lora, 1.0, mode)["result"][0]


def step(case: Case, batch: int) -> dict:
    """Median seconds of a call of the network, plain and with LoRAs unmerged."""

    def timed(model: Any) -> Callable[[], Seconds]:
        def run() -> Seconds:
            seen, calls = watched(model)
            case.sample(seen, batch, options["steps"])
            spent = {c: sorted(end[c] - begin[c] for begin, end in calls) for c in CLOCKS}
            return {c: values[len(values) // 2] for c, values in spent.items()}

        return run

    models = {"plain": case.model, "plain again": case.model}
    for rank in options["ranks"]:
        models[f"rank {rank}"] = apply(case.model, case.loras(rank, 1), "unmerged")
        if batch > 1:
            each = apply(case.model, case.loras(rank, batch), "unmerged")
            models[f"rank {rank}, one each"] = each
    functions = {name: timed(model) for name, model in models.items()}
    return summary(rounds(functions, f"{case.name}, steps of {batch}"), "plain")


def exchange(case: Case) -> dict:
    """Seconds from bringing another LoRA to the first call, and how far the ways' latents are apart.

    Each way exchanges its own: before every timed LoRA another one has sampled in the same way.
    """
    rank = options["ranks"][len(options["ranks"]) // 2]
    loras = [case.loras(rank, 1, seed) for seed in (1, 2)]
    tensors = []
    for i, lora in enumerate(loras):
        lora.save(f"{FOLDER}/lora{i}.safetensors", format="comfyui", overwrite=True)
        tensors.append(NODES["HYWUSelectLoRA"]().select(lora, 0)[1])
    folder_paths.filename_list_cache.clear()

    def from_file(i: int) -> Any:
        loader = stock.LoraLoaderModelOnly()
        return loader.load_lora_model_only(case.model, f"lora{i}.safetensors", 1.0)[0]

    ways: dict[str, Callable[[int], Any]] = {
        "stock, file": from_file,
        "stock, memory": lambda i: comfy.sd.load_lora_for_models(
            case.model, None, tensors[i], 1.0, 0
        )[0],
        "merge": lambda i: apply(case.model, loras[i], "merge"),
        "unmerged": lambda i: apply(case.model, loras[i], "unmerged"),
    }
    latents = {}

    def timed(way: str) -> Callable[[], Seconds]:
        def run() -> Seconds:
            case.sample(ways[way](0), 1, 1)
            begin = clocks()
            seen, calls = watched(ways[way](1))
            latents[way] = case.sample(seen, 1, 1)
            return {c: calls[0][0][c] - begin[c] for c in CLOCKS}

        return run

    functions = {way: timed(way) for way in ways}
    times = rounds(functions, f"{case.name}, exchange")
    reference = latents["stock, file"]
    return {
        "exchange": summary(times, "stock, file"),
        "difference": max(gap(value, reference) for value in latents.values()),
        "effect": gap(case.sample(case.model, 1, 1), reference),
    }


def measure(case: Case) -> dict:
    network = case.model.model.diffusion_model
    return {
        "about": case.about,
        "parameters": sum(p.numel() for p in network.parameters()),
        "step": {str(batch): step(case, batch) for batch in options["batches"]},
        **exchange(case),
    }


figures = {
    "options": options,
    "threads": torch.get_num_threads(),
    "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    "models": {},
}
for make in (editor, wan):
    case = make(options["tiny"])
    figures["models"][case.name] = measure(case)
show(figures)
