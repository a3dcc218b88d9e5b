"""The tiny HunyuanImage-3 folder and the official code's values for it, for several test files."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from hywu_core import load_generator
from hywu_core.bases.hunyuan_image3 import Pipeline

GOLDEN = Path(__file__).parents[1] / "core" / "golden" / "hunyuan_image3"
BASE, GENERATOR = GOLDEN / "base", GOLDEN / "generator"
SYSTEM = "You are the editor of these tests.\n"
PARTS, CONDITION, LATENTS = 2e-5, 1e-4, 3e-4


class Golden:
    """Values of one file; of large ones every n-th index of a dimension is kept."""

    def __init__(self, name: str) -> None:
        self.metadata: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))
        with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
            self.kept = json.loads((file.metadata() or {}).get("kept", "{}"))
            self.values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def cut(self, name: str, value: Tensor) -> Tensor:
        """What is kept of `name`, of a whole value."""
        for dim, step in self.kept.get(name, []):
            value = value[(slice(None),) * dim + (slice(None, None, step),)]
        return value

    def check(self, name: str, value: Tensor, limit: float = PARTS) -> None:
        """Within a relative L2 of the official value, of the same shape."""
        value, wanted = self.cut(name, value), self[name]
        assert value.shape == wanted.shape, (name, value.shape, wanted.shape)
        assert distance(value, wanted) <= limit, (name, distance(value, wanted))

    def check_image(self, name: str, image: Image.Image) -> None:
        levels = self.cut(name, torch.from_numpy(np.array(image))).int()
        assert levels.shape == self[name].shape
        assert (levels - self[name].int()).abs().max() <= 1


def distance(value: Tensor, wanted: Tensor) -> float:
    """Relative L2."""
    return float((value.float() - wanted.float()).norm() / wanted.float().norm())


@cache
def golden(name: str) -> Golden:
    return Golden(name)


@cache
def pipeline() -> Pipeline:
    """The tiny checkpoint in float32; no test changes it."""
    return Pipeline.load(BASE, dtype=torch.float32, system=SYSTEM)


@cache
def generator() -> Any:
    return load_generator(GENERATOR, dtype=torch.float32, rope_precision="float32")


@cache
def source() -> Image.Image:
    with Image.open(GOLDEN / "edit_source_0.webp") as file:
        return file.convert("RGB")


def other_image(width: int = 400, height: int = 140) -> Image.Image:
    """Another source: smooth colours, of another aspect."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def copy_folder(target: Path, **config: Any) -> Path:
    """A copy of the tiny folder, values of its config.json changed (None removes one)."""
    shutil.copytree(BASE, target)
    edit_json(target / "config.json", **config)
    return target


def edit_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text("utf-8")) | changes
    data = {key: value for key, value in data.items() if value is not None}
    path.write_text(json.dumps(data), encoding="utf-8")


def distilled_folder(target: Path) -> Path:
    """The tiny folder as a distilled checkpoint."""
    copy_folder(target, cfg_distilled=True, use_meanflow=True)
    shutil.copy(GOLDEN / "distilled_extra.safetensors", target / "model-0004-of-0004.safetensors")
    index = target / "model.safetensors.index.json"
    data = json.loads(index.read_text("utf-8"))
    with safe_open(target / "model-0004-of-0004.safetensors", framework="pt") as file:
        data["weight_map"] |= dict.fromkeys(file.keys(), "model-0004-of-0004.safetensors")
    index.write_text(json.dumps(data), encoding="utf-8")
    return target
