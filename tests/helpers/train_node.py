"""HY-WU Train Generator's widgets for a tiny training, its checkpoint, and its stop button (inside ComfyUI)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import pytest
from hywu_nodes.nodes.host.train import files
from pairs import SIZE

WIDGETS: dict[str, Any] = {
    "name": "wan", "pairs": "colour", "generator_size": "XS", "rank": 2, "steps": 4, "batch_size": 4,
    "accumulation": 1, "learning_rate": 1e-3, "image_size": SIZE, "crops": 1, "source_input": "both",
    "precision": "auto", "checkpointing": False, "sample_every": 0, "sample_steps": 2, "seed": 0,
    "include": "", "exclude": "",
}  # fmt: skip


def checkpoint(name: str) -> Path:
    """Where the node writes the generator of that name."""
    return files.checkpoint_path(name)


def interrupt_at(step: int, action: Callable[[], Any]) -> None:
    """Stopped after a step, by the flag that the stop button sets."""
    left, ask = [step], mm.processing_interrupted

    def stop() -> bool:
        left[0] -= 1
        return left[0] == 0

    mm.processing_interrupted = stop
    try:
        with pytest.raises(mm.InterruptProcessingException):
            action()
    finally:
        mm.processing_interrupted = ask
