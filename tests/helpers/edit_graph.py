"""API graphs of an edit with the bundled weights, and what their runs give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hywu_core.headless.client import run_sync

PHOTO = "hywu-test.png"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def put_photo(folder: Path, name: str = PHOTO, size: int = 48, seed: int = 0) -> Tensor:
    """Write a random image of coarse and fine detail; returns it as ``[3, H, W]`` in 0..1.

    Fine detail, so that a trained blur has something to take away.
    """
    generator = torch.Generator().manual_seed(seed)
    scales = [
        torch.nn.functional.interpolate(
            torch.rand(1, 3, side, side, generator=generator), (size, size), mode="nearest"
        )
        for side in (4, size // 2)
    ]
    image = (0.6 * scales[0] + 0.4 * scales[1])[0]
    pixels = image.mul(255).round().byte().permute(1, 2, 0).numpy()
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / name)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def edit_graph(
    text: str = "blur the image", strength: float = 1.0, seed: int = 3, mode: str = "auto",
    image: list | None = None, model: list | None = None, **more: dict,
) -> dict[str, dict]:  # fmt: skip
    """Load, encode, generate, apply, sample, save: the whole edit, with other nodes beside."""
    image = image or ["photo", 0]
    return {
        "generator": node("HYWULoadGenerator", checkpoint="bundled", precision="float32"),
        "editor": node("HYWULoadBundledEditor"),
        "photo": node("LoadImage", image=PHOTO),
        "encode": node(
            "HYWUConditionEncode", generator=["generator", 0], image=image, instruction=text
        ),
        "generate": node(
            "HYWUGenerateLoRA", generator=["generator", 0], condition=["encode", 0]
        ),
        "apply": node(
            "HYWUApplyLoRA", model=["editor", 0], lora=["generate", 0], strength=strength, mode=mode
        ),
        **sampling("", text, model or ["apply", 0], image, seed),
        **more,
    }  # fmt: skip


def sampling(tag: str, text: str, model: list, image: list, seed: int = 3) -> dict[str, dict]:
    """Stock nodes from text and image to a saved image; `tag` keeps several of them apart."""
    return {
        f"text{tag}": node("CLIPTextEncode", text=text, clip=["editor", 1]),
        f"pair{tag}": node(
            "InstructPixToPixConditioning", positive=[f"text{tag}", 0],
            negative=[f"text{tag}", 0], vae=["editor", 2], pixels=image,
        ),
        f"sample{tag}": node(
            "KSampler", model=model, seed=seed, steps=4, cfg=1.0, sampler_name="euler",
            scheduler="simple", positive=[f"pair{tag}", 0], negative=[f"pair{tag}", 1],
            latent_image=[f"pair{tag}", 2], denoise=1.0,
        ),
        f"decode{tag}": node("VAEDecode", samples=[f"sample{tag}", 0], vae=["editor", 2]),
        f"save{tag}": node("SaveImage", images=[f"decode{tag}", 0], filename_prefix="edit"),
    }  # fmt: skip


def run(server, graph: dict[str, dict], timeout: float = 240) -> dict[str, Any]:
    """The outputs of a finished prompt."""
    return run_sync(server.url, graph, timeout=timeout)[0]["outputs"]


def images(server, outputs: dict[str, Any], name: str = "save") -> Tensor:
    """``[B, 3, H, W]`` in 0..1 of a SaveImage node."""
    folder, images = server.base / "output", []
    for item in outputs[name]["images"]:
        with Image.open(folder / item["subfolder"] / item["filename"]) as file:
            images.append(torch.from_numpy(np.array(file.convert("RGB"))))
    return torch.stack(images).permute(0, 3, 1, 2).float() / 255


def said(outputs: dict[str, Any], name: str) -> dict[str, Any]:
    """The JSON report of a node."""
    return json.loads(outputs[name]["text"][0])


#: Levels of 255 by which images that should be equal may differ: products are in bfloat16, in other
#: orders, and ComfyUI cuts off where it writes 8 bits.
SAME = 2


def levels(one: Tensor, two: Tensor) -> float:
    """Largest difference in levels of 255."""
    return float(((one - two).abs().max() * 255).round(decimals=3))
