"""The bundled editor with its generator: one call from an image and an instruction to the edit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...encoders.bundled import EditorEncoder
from ...errors import HYWUError
from ...generator.checkpoints import load_generator
from ...generator.speed.graphs import generate
from ...injection import inject
from ...lora import GeneratedLoRA
from .checkpoint import bundled, check_made_for, editor_identity, load_editor
from .sampling import edit
from .vocabulary import unknown_instruction


@dataclass(frozen=True)
class Edit:
    """image ``[3, H, W]`` in 0..1; the LoRA that made it; stage -> seconds; a warning or ""."""

    image: Tensor
    lora: GeneratedLoRA
    seconds: dict[str, float]
    warning: str


class BundledEditor:
    """Editor and generator, ready to edit. Load with `BundledEditor.load()`."""

    def __init__(self, editor: nn.Module, generator: Any) -> None:
        self.editor, self.generator = editor, generator
        self.encoder = EditorEncoder(editor, editor_identity(editor))
        check_made_for(generator.config.encoder.get("editor"), self.encoder.identity["editor"])
        generator.config.layout.check(editor)

    @classmethod
    def load(
        cls,
        editor: str | Path | None = None,
        generator: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> BundledEditor:
        """The bundled ones without files. Raises HYWUError naming a file that is missing, damaged, or
        of another model.
        """
        editor, generator = editor or bundled("editor"), generator or bundled("generator")
        return cls(load_editor(editor, device), load_generator(generator, device=device))

    @property
    def known(self) -> list[tuple[str, str]]:
        """(task, phrasing) pairs that the generator was trained on; empty for one that doesn't say."""
        phrasings = self.generator.config.provenance.get("phrasings", {})
        return [(task, text) for task, texts in phrasings.items() for text in texts]

    @torch.no_grad()
    def edit(
        self,
        image: Tensor,
        instruction: str,
        *,
        seed: int = 0,
        steps: int = 4,
        strength: float = 1.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Edit:
        """Edit ``[3, H, W]``, uint8 or float in 0..1, of any size. The same for the same seed.

        Raises HYWUError on an empty instruction or another shape.
        """
        if not instruction.strip():
            raise HYWUError("The instruction is empty; say in a few words what to change.")
        if image.ndim != 3 or image.shape[0] != 3:
            raise HYWUError(f"The image is {tuple(image.shape)}; it must be [3, height, width].")
        scale = 1.0 if image.is_floating_point() else 255.0
        source = (image[None].to(self.editor.text.position.device, torch.float32) / scale).clamp(
            0, 1
        )
        seconds: dict[str, float] = {}
        with _timed(seconds, "encode"):
            condition = self.encoder(source, [instruction])
        with _timed(seconds, "generate"):
            lora = generate(self.generator, condition)
            lora.check_finite()
        with _timed(seconds, "sample"), inject(self.editor, lora, strength):
            result = edit(
                self.editor, source, [instruction], steps=steps, seed=seed, progress=progress
            )
        warning = unknown_instruction(instruction, self.known) if self.known else ""
        return Edit(result[0], lora, seconds, warning)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started
