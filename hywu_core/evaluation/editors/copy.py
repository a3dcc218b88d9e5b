"""The unchanged source: the lower anchor of every table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..items import Item
from ..options import Kind
from .base import WORKERS


@dataclass
class CopyEditor:
    """Changes nothing: the lower anchor of every table."""

    parallel: int = 1

    def describe(self) -> dict[str, Any]:
        return {"kind": "copy"}

    def edit(self, source: Image.Image, item: Item, seed: int) -> Image.Image:
        return source


KIND = Kind(
    "--editor",
    "copy",
    "the unchanged source, a lower anchor",
    lambda workers: CopyEditor(workers),
    (WORKERS,),
)
