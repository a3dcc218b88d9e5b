"""Run inside ComfyUI's tree by test_bundled_editor.py: the editor under stock nodes, figures as JSON.

Arguments: ComfyUI's tree, this extension's folder.
"""

from __future__ import annotations

import os
import time

from inside_comfyui import error, load_nodes, show

# isort: split
import comfy.samplers
import torch
from comfy_extras.nodes_ip2p import InstructPixToPixConditioning
from comfy_extras.nodes_model_advanced import ModelSamplingSD3

import nodes as stock

started = time.process_time()  # other programs' share of the machine is not the import's
NODES = load_nodes()
import_seconds = time.process_time() - started
from hywu_nodes.hywu_core.bases.bundled.checkpoint import load_editor  # noqa: E402
from hywu_nodes.hywu_core.bases.bundled.sampling import edit  # noqa: E402
from hywu_nodes.nodes.host import cache, generators  # noqa: E402

TEXT = "Make it BLURRY, grüße"


def load():
    return NODES["HYWULoadBundledEditor"]().load()


def sample(model, image, text=TEXT, negative="", steps=6, cfg=1.0, sampler="euler", scheduler="simple",
           seed=3, denoise=1.0):  # fmt: skip
    """Stock nodes only; returns the latent [B, 3, H, W] that KSampler gives."""
    encode = stock.CLIPTextEncode().encode
    result = InstructPixToPixConditioning.execute(
        encode(clip, text)[0], encode(clip, negative)[0], image, vae
    )
    positive, negative, latent = result.args if hasattr(result, "args") else result.result
    latent = {"samples": vae.encode(image)} if denoise < 1 else latent
    sampled = stock.common_ksampler(
        model, seed, steps, cfg, sampler, scheduler, positive, negative, latent, denoise=denoise
    )
    return sampled[0]


def picture(*args, **kwargs):
    """[B, H, W, 3] in 0..1."""
    return stock.VAEDecode().decode(vae, sample(*args, **kwargs))[0]


def gap(one, two) -> float:
    return float((one - two).abs().max())


def engine(image, texts, steps=6, seed=3):
    """The same by hywu_core alone, [B, H, W, 3]."""
    return edit(plain, image.movedim(-1, 1), texts, steps=steps, seed=seed).movedim(1, -1)


def sampler_failures(names_samplers, names_schedulers) -> dict[str, str]:
    """(sampler, scheduler) pairs that fail or give something that is not finite."""
    failed = {}
    pairs = [(s, "simple") for s in names_samplers] + [("euler", s) for s in names_schedulers]
    for sampler, scheduler in pairs:
        try:
            out = sample(model, images[:1], steps=3, sampler=sampler, scheduler=scheduler)[
                "samples"
            ]
            if not torch.isfinite(out).all():
                failed[f"{sampler}/{scheduler}"] = "not finite"
        except Exception as problem:
            failed[f"{sampler}/{scheduler}"] = repr(problem)[:200]
    return failed


def offloaded():
    """Partial load: with a few KB for weights, the rest stays behind and is cast where it is used."""
    fresh, _, _ = load()
    before = sample(fresh, images)["samples"]
    fresh.detach()
    fresh.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=20_000)
    partial = bool(fresh.model.model_lowvram)
    after = sample(fresh, images)["samples"]
    fresh.detach()
    again = sample(fresh, images)["samples"]
    return partial, gap(before, after), gap(before, again)


def generated(generator, text="blur the image"):
    condition = NODES["HYWUConditionEncode"]().encode(generator, images[:1], text)["result"][0]
    return NODES["HYWUGenerateLoRA"]().generate(generator, condition)["result"][0]


def lora_gap(one, two) -> float:
    return max(gap(one[path].B, two[path].B) for path in one)


def generator_offloaded():
    """The generator with most of its weights left behind, and loaded whole again."""
    generator = NODES["HYWULoadGenerator"]().load("bundled", "float32")[0]
    whole = generated(generator)
    patcher = generator.patcher
    patcher.detach()
    patcher.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=20_000)
    partial = bool(patcher.model.model_lowvram)
    generators.CACHE._kept.clear()
    after = generated(generator)
    patcher.detach()
    generators.CACHE._kept.clear()
    return partial, lora_gap(whole, after), lora_gap(whole, generated(generator))


def cache_figures():
    """A cache with room for two LoRAs gets three, in the order a, b, (a read), c."""
    kept = cache.LoRACache(2 * lora.nbytes)
    a, b, c = (lora.to(dtype=torch.float32)._map(torch.clone) for _ in range(3))
    for key, value in (("a", a), ("b", b), ("a", None), ("c", c)):
        kept.get(key) if value is None else kept.put(key, value)
    small = cache.LoRACache(lora.nbytes - 1)
    small.put("a", a)
    found = [key for key in "abc" if kept.get(key) is not None]
    limits = {}
    for text in ("16", "much", "-3"):
        os.environ["HYWU_LORA_CACHE_MB"] = text
        limits[text] = cache.limit_from_environment() >> 20
    return {
        "limits": limits,
        "found": found,
        "bytes": kept.nbytes / lora.nbytes,
        "too_large": small.nbytes,
    }


torch.manual_seed(0)
model, clip, vae = load()
plain = load_editor()
small, _ = plain.config.tile(1 << 12, 1 << 12)
images = torch.rand(2, small, small, 3)
lora = generated(NODES["HYWULoadGenerator"]().load("bundled", "float32")[0])
large = torch.rand(1, 2 * small + 8, small + 24, 3)
with torch.no_grad():
    figures = {
        "import_seconds": import_seconds,
        "small": gap(picture(model, images), engine(images, [TEXT] * 2)),
        "large": gap(picture(model, large), engine(large, [TEXT])),
        "four": gap(picture(model, images, steps=4), engine(images, [TEXT] * 2, 4)),
        "lines": gap(
            picture(model, images, text="blur\nsharpen it"), engine(images, ["blur", "sharpen it"])
        ),
        "changes": gap(picture(model, images), images),
        "samplers": sampler_failures(
            comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS
        ),
        "cfg": gap(picture(model, images, cfg=3.0), picture(model, images, cfg=1.0)),
        "denoise": gap(picture(model, images, denoise=0.5), images),
        "offload": offloaded(),
        "generator_offload": generator_offloaded(),
        "cache": cache_figures(),
        "rgba": gap(vae.encode(torch.cat([images, images[..., :1]], -1)), vae.encode(images)),
        "shifted": gap(
            picture(ModelSamplingSD3().patch(model, 1.0)[0], images, steps=4),
            picture(model, images, steps=4),
        ),
        "gray": list(vae.encode(images[..., :1]).shape),
        "errors": {
            "lines": error(lambda: sample(model, images[:1], text="one\ntwo\nthree")),
            "tiny": error(lambda: sample(model, images[:, :1, :1])),
        },
    }
show(figures)
