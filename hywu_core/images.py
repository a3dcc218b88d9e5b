"""Picture files in and out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import HYWUError
from .files import atomic_path

#: suffix -> Pillow's format name, of what can be written
WRITABLE = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_SIDE = 512


def read_image(path: str | Path, max_side: int = MAX_SIDE) -> Tensor:
    """uint8 ``[3, H, W]``, upright, transparency on white, at most `max_side`; first frame only.

    Raises HYWUError naming the file.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            image = image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise HYWUError(f"{path}: can't be read as an image ({error}).") from error
    if max(image.size) > max_side:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def write_image(image: Tensor, path: str | Path) -> None:
    """``[3, H, W]`` in 0..1 to a PNG, JPEG or WebP by its suffix, atomically; replaces a file."""
    pixels = image.detach().float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    kind = WRITABLE[Path(path).suffix.lower()]
    with atomic_path(path, overwrite=True) as part:
        Image.fromarray(pixels.cpu().numpy()).save(part, format=kind, quality=95)
