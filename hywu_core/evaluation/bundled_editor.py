"""The bundled editor with its generator, or with one static LoRA, as an editor for benchmarks."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..editor.checkpoint import bundled, bundled_loras, editor_identity, load_editor
from ..editor.engine import BundledEditor
from ..editor.sampling import edit
from ..errors import HYWUError
from ..formats import load_lora
from ..injection import inject
from .items import Item


class EngineEditor:
    """Edits each item with a LoRA that is generated for it; or with `lora`, the same for all items.

    lora: the name of a bundled LoRA (shared, single_blur, ...), a file or a PEFT folder; "none" is the
    editor alone; None generates. steps: of the sampling; strength: of the LoRA; device: a torch
    device. One edit at a time. Raises HYWUError when weights are missing or don't fit each other.
    """

    parallel = 1

    def __init__(
        self, lora: str | None = None, steps: int = 4, strength: float = 1.0, device: str = "cpu"
    ) -> None:
        self.steps, self.strength = steps, strength
        self._lock = threading.Lock()  # the LoRA of one item is on the model while it is edited
        path = bundled("editor")
        self._engine = self._lora = None
        if lora is None:
            self._engine = BundledEditor.load(path, bundled("generator"), device)
            self._editor = self._engine.editor
            self._source = self._engine.generator.config.provenance["checkpoint"]["digest"]
        else:
            self._editor = load_editor(path, device)
            self._source = lora
            if lora != "none":
                file = _lora_path(lora)
                self._lora = load_lora(file).to(device)
                self._lora.layout.check(self._editor)
                self._source = f"{file.name} {_digest(file)}"

    def describe(self) -> dict[str, Any]:
        """Which weights, and how they are used; the device changes nothing that is meant."""
        return {
            "kind": "bundled",
            "editor": editor_identity(self._editor),
            "lora": self._source if self._engine is None else "generated",
            "generator": None if self._engine is None else self._source,
            "steps": self.steps,
            "strength": self.strength,
        }

    def edit(self, source: Image.Image, item: Item, seed: int) -> Image.Image:
        """The edited picture, of the source's size."""
        pixels = torch.from_numpy(np.array(source.convert("RGB"))).permute(2, 0, 1)
        with self._lock:
            result = self._edit(pixels, item.instruction, seed)
        array = (result.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        return Image.fromarray(array.cpu().numpy())

    def _edit(self, pixels: Tensor, instruction: str, seed: int) -> Tensor:
        if self._engine is not None:
            options = {"seed": seed, "steps": self.steps, "strength": self.strength}
            return self._engine.edit(pixels, instruction, **options).image
        device = self._editor.text.position.device
        given = pixels[None].to(device, torch.float32) / 255
        if self._lora is None:
            return edit(self._editor, given, [instruction], steps=self.steps, seed=seed)[0]
        with inject(self._editor, self._lora, self.strength):
            return edit(self._editor, given, [instruction], steps=self.steps, seed=seed)[0]


def _lora_path(name: str) -> Path:
    if name in bundled_loras():
        return bundled(name)
    if Path(name).exists():
        return Path(name)
    known = ", ".join([*bundled_loras(), "none"])
    raise HYWUError(f"{name}: there is no such LoRA file, and the bundled ones are {known}.")


def _digest(path: Path) -> str:
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    sha = hashlib.sha256()
    for file in files:
        sha.update(file.read_bytes())
    return sha.hexdigest()[:16]
