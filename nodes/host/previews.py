"""Images in a node's ui outputs, saved as ComfyUI's own Preview Image does."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nodes import PreviewImage


def preview(images: Tensor) -> list[dict[str, Any]]:
    """Save ``[B, H, W, 3]`` in the temp folder; returns the entries for ``ui["images"]``."""
    return PreviewImage().save_images(images, "hywu")["ui"]["images"]
