"""Images in a node's ui outputs, saved as ComfyUI's own Preview Image does."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import Tensor

from nodes import PreviewImage

from ...hywu_core.atomic import reason
from ...hywu_core.errors import HYWUError


def preview(images: Tensor) -> list[dict[str, Any]]:
    """Save ``[B, H, W, 3]`` in the temp folder; returns the entries for ``ui["images"]``.

    Raises HYWUError naming the folder where it can't be written; none of the images is left then.
    """
    stock = PreviewImage()
    try:
        return stock.save_images(images, "hywu")["ui"]["images"]
    except OSError as error:
        for half in Path(stock.output_dir).glob(f"hywu{stock.prefix_append}_*"):
            with contextlib.suppress(OSError):
                half.unlink()
        raise HYWUError(
            f"{stock.output_dir}: the node's images can't be written there ({reason(error)})."
        ) from error
